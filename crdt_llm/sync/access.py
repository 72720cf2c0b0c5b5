"""Who may talk to the relay at all: tokens and origins.

This module owns the owner's token file, the comparison of tokens, and which web pages may connect.
What a principal may do in a conversation is said by the document itself.
"""

from __future__ import annotations

import hmac
import os
from base64 import urlsafe_b64encode
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, TypeAlias
from urllib.parse import urlsplit

from crdt_llm.document.keys import read_or_make
from crdt_llm.errors import Corrupt
from crdt_llm.sync.loopback import is_loopback

if TYPE_CHECKING:
    from pathlib import Path

Authenticate: TypeAlias = Callable[[str | None], str | None]
"""A token, or ``None`` if there was none, to the principal it stands for, or ``None``."""

OWNER: Final = "owner"
TOKEN_BYTES: Final = 32  # as hard to guess as the keys it stands beside
TOKEN_CHARACTERS: Final = 43  # base64url of 32 bytes, without padding
TOKEN_CHARACTERS_MAX: Final = 512  # longer ones are not compared: nobody issues them

_DEFAULT_PORTS: Final = {"http": 80, "https": 443, "ws": 80, "wss": 443}


@dataclass(frozen=True, slots=True)
class TokenAccess:
    """Access for whoever has the one token.

    Attributes:
        token: The secret; ``repr`` does not show it.
        principal: Whom it stands for.
    """

    token: str = field(repr=False)
    principal: str = OWNER

    def authenticate(self, token: str | None) -> str | None:
        """The principal, if ``token`` is the token. Takes the same time for any wrong one."""
        if token is None or len(token) > TOKEN_CHARACTERS_MAX:
            return None
        given = token.encode(errors="replace")
        return self.principal if hmac.compare_digest(given, self.token.encode()) else None


def load_or_create_token(path: Path, random: Callable[[int], bytes] = os.urandom) -> str:
    """Read the token in ``path``, or make one, mode 0600, if there is no such file.

    Raises:
        Corrupt: The file holds something else, or others may read it.
    """
    made = read_or_make(
        path, lambda: urlsafe_b64encode(random(TOKEN_BYTES)).rstrip(b"=") + b"\n", random
    )
    token_text = made.strip().decode(errors="replace")
    if len(token_text) != TOKEN_CHARACTERS or not token_text.isascii():
        raise Corrupt(f"the token file {path} is damaged: delete it, and a new one is made")
    return token_text


def may_connect(origin: str | None, host: str | None, allowed: frozenset[str]) -> bool:
    """Whether a page may open a connection (cross-site websocket hijacking, RFC 6455, 10.2).

    Args:
        origin: The ``Origin`` header; programs that are no browsers send none.
        host: The ``Host`` header.
        allowed: Further origins, as ``https://example.org``.

    Returns:
        Whether the page came from this server, from this machine, or is allowed.
    """
    if origin is None or origin in allowed:
        return True
    try:
        page = urlsplit(origin)
        port = page.port or _DEFAULT_PORTS.get(page.scheme)
        here = urlsplit(f"//{host or ''}")
        ports = {here.port} if here.port else set(_DEFAULT_PORTS.values())
        same = page.hostname == here.hostname and port in ports
    except ValueError:
        return False
    if page.scheme not in _DEFAULT_PORTS or not page.hostname:
        return False
    return same or is_loopback(page.hostname)
