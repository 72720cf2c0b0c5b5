from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from sync.device import CONVERSATION

from crdt_llm.errors import LocalMisuse
from crdt_llm.sync.relay import static_page as static_page_module
from crdt_llm.sync.relay.static_page import StaticPage, policy

if TYPE_CHECKING:
    from pathlib import Path

FILES = {
    "index.html": b"<!doctype html>",
    "sw.js": b"worker",
    "icon.svg": b"<svg/>",
    "manifest.webmanifest": b"{}",
    "assets/page-Ab_3-x9Z.js": b"script",
    "assets/plain.css": b"style",
    "notes.secret": b"not of the page",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, body in FILES.items():
        path = tmp_path / "page" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(body)
    (tmp_path / "owner.token").write_text("secret")
    return tmp_path / "page"


@pytest.mark.parametrize("path", ["/", f"/c/{CONVERSATION}", "/index.html"])
def test_the_page_itself_is_asked_for_each_time(folder: Path, path: str) -> None:
    answer = StaticPage(folder).answer(path, None, None)
    assert answer is not None
    assert (answer.status, answer.body) == (200, FILES["index.html"])
    assert answer.headers["Cache-Control"] == "no-cache"
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"


@pytest.mark.parametrize(
    ("path", "kind", "is_immutable"),
    [
        ("/sw.js", "text/javascript; charset=utf-8", False),
        ("/icon.svg", "image/svg+xml", False),
        ("/manifest.webmanifest", "application/manifest+json", False),
        ("/assets/page-Ab_3-x9Z.js", "text/javascript; charset=utf-8", True),
        ("/assets/plain.css", "text/css; charset=utf-8", False),
    ],
)
def test_files_say_what_they_are_and_how_long_they_keep(
    folder: Path,
    path: str,
    kind: str,
    is_immutable: bool,  # noqa: FBT001 - a case
) -> None:
    answer = StaticPage(folder).answer(path, None, None)
    assert answer is not None
    assert answer.headers["Content-Type"] == kind
    assert ("immutable" in answer.headers["Cache-Control"]) is is_immutable


@pytest.mark.parametrize(
    "path",
    [
        "/none.js",
        "/notes.secret",
        "/../owner.token",
        "/assets/../../owner.token",
        "//index.html",
        "/c/short",
        "/c/",
        "/assets",
        "",
        "/\0",
    ],
)
def test_nothing_else_is_there(folder: Path, path: str) -> None:
    assert StaticPage(folder).answer(path, None, None) is None


def test_what_is_known_is_not_sent_again(folder: Path) -> None:
    page = StaticPage(folder)
    first = page.answer("/", None, None)
    assert first is not None
    tag = first.headers["ETag"]
    for tags in (tag, f"W/{tag}", f'"another", {tag}'):
        again = page.answer("/", None, tags)
        assert again is not None
        assert (again.status, again.body) == (304, b"")
        assert again.headers["ETag"] == tag
    changed = page.answer("/", None, '"another"')
    assert changed is not None
    assert changed.status == 200


def test_the_policy_allows_no_inline_code_and_no_other_hosts() -> None:
    allowed = dict(part.split(" ", 1) for part in policy("example.org:8765").split("; "))
    assert allowed["default-src"] == "'self'"
    assert allowed["connect-src"] == "'self' ws://example.org:8765 wss://example.org:8765"
    assert allowed["frame-ancestors"] == allowed["base-uri"] == "'none'"
    assert "unsafe" not in policy("example.org")


@pytest.mark.parametrize("host", [None, "", "a b", "x; script-src *", "h\r\nX: y", "a" + ":1" * 2])
def test_a_strange_host_adds_nothing_to_the_policy(host: str | None) -> None:
    assert "connect-src 'self';" in policy(host)


def test_a_folder_without_a_page_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LocalMisuse, match=r"index\.html"):
        StaticPage(tmp_path)


def test_a_page_is_bounded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(static_page_module, "BYTES_MAX", 10)
    with pytest.raises(LocalMisuse, match="at most"):
        StaticPage(folder)
