"""The built page: files that a browser gets, and the headers that keep it harmless.

This module owns which path is which file, how long it may be kept, and the page's security policy.
It must not know sockets. All files are read when the relay starts, so that no request ever names a
path on disk.
"""

from __future__ import annotations

import hashlib
import re
from base64 import urlsafe_b64encode
from dataclasses import dataclass, field
from http import HTTPStatus
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from crdt_llm.document.schema import is_conversation_id
from crdt_llm.errors import LocalMisuse

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

FILES_MAX: Final = 512
"""Files of a page; a built one has some ten."""

BYTES_MAX: Final = 32 << 20
"""Bytes of all files, which stay in memory; a built page has less than one MB."""

_INDEX: Final = "index.html"
_CONVERSATION: Final = "/c/"
_HASHED: Final = re.compile(r"^assets/.*-[A-Za-z0-9_-]{8,}\.[a-z0-9]+$")
_HOST: Final = re.compile(r"^(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.-]+)(:[0-9]{1,5})?$")

_TYPES: Final = MappingProxyType(
    {
        ".css": "text/css; charset=utf-8",
        ".html": "text/html; charset=utf-8",
        ".ico": "image/x-icon",
        ".js": "text/javascript; charset=utf-8",
        ".json": "application/json",
        ".map": "application/json",
        ".png": "image/png",
        ".svg": "image/svg+xml",
        ".txt": "text/plain; charset=utf-8",
        ".wasm": "application/wasm",
        ".webmanifest": "application/manifest+json",
        ".woff2": "font/woff2",
    }
)

NO_POLICY_NEEDED: Final = "default-src 'none'; frame-ancestors 'none'"
"""For answers that are no page: they load nothing, whatever is in them."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a browser gets."""

    status: HTTPStatus
    headers: Mapping[str, str]
    body: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class _File:
    body: bytes
    kind: str
    tag: str
    is_immutable: bool


class StaticPage:
    """The files of one folder.

    Args:
        folder: A built page, with ``index.html`` at its top.

    Raises:
        LocalMisuse: There is no such page, or it is over a limit.
        OSError: It cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, _File] = {}
        size = 0
        for path in sorted(folder.rglob("*")):
            if not path.is_file() or path.suffix not in _TYPES:
                continue
            name, body = path.relative_to(folder).as_posix(), path.read_bytes()
            size += len(body)
            if len(self._files) >= FILES_MAX or size > BYTES_MAX:
                raise LocalMisuse(f"a page has at most {FILES_MAX} files and {BYTES_MAX} bytes")
            tag = urlsafe_b64encode(hashlib.sha256(body).digest()[:18]).decode()
            self._files[name] = _File(
                body, _TYPES[path.suffix], f'"{tag}"', _HASHED.match(name) is not None
            )
        if _INDEX not in self._files:
            raise LocalMisuse(f"{folder} holds no page: it has no {_INDEX}")

    def answer(self, path: str, host: str | None, known_tags: str | None) -> Answer | None:
        """What is at a path; ``None`` for nothing.

        Args:
            path: Of the request, decoded, without its query.
            host: The ``Host`` header.
            known_tags: The ``If-None-Match`` header (RFC 9110, 13.1.2).
        """
        file = self._files.get(self._name_of(path))
        if file is None:
            return None
        headers = {
            "Content-Type": file.kind,
            "ETag": file.tag,
            "Cache-Control": "public, max-age=31536000, immutable"
            if file.is_immutable
            else "no-cache",
            "Content-Security-Policy": policy(host),
            "Cross-Origin-Opener-Policy": "same-origin",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
        }
        tags = [tag.strip().removeprefix("W/") for tag in (known_tags or "").split(",")]
        if file.tag in tags:
            return Answer(HTTPStatus.NOT_MODIFIED, headers, b"")
        return Answer(HTTPStatus.OK, headers, file.body)

    def _name_of(self, path: str) -> str:
        shows_conversation = path.startswith(_CONVERSATION) and is_conversation_id(
            path.removeprefix(_CONVERSATION)
        )
        return _INDEX if path == "/" or shows_conversation else path[1:]


def policy(host: str | None) -> str:
    """The page's Content-Security-Policy: everything from here, and nothing inline.

    ``'self'`` covers websockets in new browsers only, so this host's are named too.
    """
    here = f" ws://{host} wss://{host}" if host is not None and _HOST.match(host) else ""
    return "; ".join(
        (
            "default-src 'self'",
            f"connect-src 'self'{here}",
            "object-src 'none'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    )
