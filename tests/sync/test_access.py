from __future__ import annotations

import stat
from typing import TYPE_CHECKING

import pytest

from crdt_llm.errors import Corrupt
from crdt_llm.sync.access import (
    OWNER,
    TOKEN_CHARACTERS,
    TokenAccess,
    load_or_create_token,
    may_connect,
)

if TYPE_CHECKING:
    from pathlib import Path


def test_the_token_is_made_once_and_for_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "data" / "owner.token"
    token = load_or_create_token(path)
    assert len(token) == TOKEN_CHARACTERS
    assert load_or_create_token(path) == token
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [one.name for one in path.parent.iterdir()] == ["owner.token"]


def test_tokens_differ(tmp_path: Path) -> None:
    assert load_or_create_token(tmp_path / "a") != load_or_create_token(tmp_path / "b")


def test_who_is_faster_wins(tmp_path: Path) -> None:
    path = tmp_path / "owner.token"

    def somebody_is_faster(count: int) -> bytes:
        if not path.exists():
            load_or_create_token(path)
        return bytes(count)

    token = load_or_create_token(path, somebody_is_faster)
    assert token == load_or_create_token(path)
    assert token != "A" * TOKEN_CHARACTERS


@pytest.mark.parametrize("content", [b"", b"short", b"\xff" * 43, b"x" * 44])
def test_a_damaged_token_file_is_not_used(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "owner.token"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(Corrupt, match="damaged"):
        load_or_create_token(path)


def test_a_token_that_others_may_read_is_not_used(tmp_path: Path) -> None:
    path = tmp_path / "owner.token"
    load_or_create_token(path)
    path.chmod(0o640)
    with pytest.raises(Corrupt, match="chmod 600"):
        load_or_create_token(path)


def test_only_the_token_is_the_token() -> None:
    access = TokenAccess("secret")
    assert access.authenticate("secret") == OWNER
    for wrong in (None, "", "secre", "secret ", "SECRET", "sécret", "\ud800", "x" * 10**6):
        assert access.authenticate(wrong) is None
    assert "secret" not in repr(access)


@pytest.mark.parametrize(
    ("origin", "host", "may"),
    [
        (None, "127.0.0.1:8765", True),
        ("http://127.0.0.1:8765", "127.0.0.1:8765", True),
        ("http://localhost:5173", "127.0.0.1:8765", True),
        ("http://app.localhost", "127.0.0.1:8765", True),
        ("http://[::1]:3000", "[::1]:8765", True),
        ("http://127.8.9.1", None, True),
        ("https://relay.example", "relay.example", True),
        ("https://relay.example", "relay.example:443", True),
        ("http://relay.example:8765", "relay.example:8765", True),
        ("https://allowed.example", "127.0.0.1:8765", True),
        ("https://evil.example", "127.0.0.1:8765", False),
        ("http://relay.example:1", "relay.example:8765", False),
        ("http://relay.example:1", "relay.example", False),
        ("http://relay.example", "relay.example:8765", False),
        ("https://relay.example.evil", "relay.example", False),
        ("https://localhost.evil.example", "127.0.0.1", False),
        ("http://127.0.0.1.evil.example", "127.0.0.1", False),
        ("http://allowed.example", "127.0.0.1:8765", False),
        ("null", "127.0.0.1:8765", False),
        ("file://", "127.0.0.1:8765", False),
        ("", "127.0.0.1:8765", False),
        ("http://[", "127.0.0.1:8765", False),
        ("http://a:99999", "a:99999", False),
        ("http://evil.example", None, False),
    ],
)
def test_pages_from_elsewhere_may_not_connect(
    origin: str | None,
    host: str | None,
    may: bool,  # noqa: FBT001 - a column of the table
) -> None:
    assert may_connect(origin, host, frozenset({"https://allowed.example"})) is may
