"""Who may talk to the relay at all: tokens and origins.

This module owns the owner's token file, signed tokens, and which web pages may connect. A token
only says who somebody is, for how long, and in which conversations at most; what a principal may do
in a conversation is said by the document itself.

A signed token is a JSON Web Token (RFC 7519) with an EdDSA signature (RFC 8037): ``sub`` is the
principal, ``jti`` its id, ``exp`` when it ends; ``node`` is true for an inference node, and
``conversations`` maps ids to the most that it allows there (absent: everywhere, everything).
"""

from __future__ import annotations

import hmac
import os
from base64 import urlsafe_b64encode
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeAlias
from urllib.parse import urlsplit

import jwt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from crdt_llm.document.keys import read_or_make
from crdt_llm.document.schema import (
    PRINCIPAL_CHARACTERS_MAX,
    WHOLE_MAX,
    Grant,
    is_conversation_id,
)
from crdt_llm.errors import Corrupt, Forbidden, LocalMisuse
from crdt_llm.store.token_ledger import Issued
from crdt_llm.sync.wire.loopback import is_loopback

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping
    from pathlib import Path

    from crdt_llm.store.token_ledger import TokenLedger

Authenticate: TypeAlias = "Callable[[str | None], Pass | None]"
"""A token, or ``None`` if there was none, to what it proves, or ``None``."""

AdmitNode: TypeAlias = "Callable[[Pass, bytes], Awaitable[None]]"
"""Lets a node's public key in with what a token proves, or raises a ``CrdtLlmError``."""

OWNER: Final = "owner"
TOKEN_BYTES: Final = 32  # as hard to guess as the keys it stands beside
TOKEN_CHARACTERS: Final = 43  # base64url of 32 bytes, without padding
TOKEN_CHARACTERS_MAX: Final = 8 << 10
"""Characters of a token; one for a hundred conversations takes 6 KiB. Longer ones are not read."""

SCOPES_MAX: Final = 100
"""Conversations that one token names: it travels with every connection."""

INVITATION_MS: Final = 366 * 86_400_000
"""How long an invitation counts that was not given an end: a year. Nobody renews a guest's."""

INVITATIONS_MAX: Final = 1000
"""Invitations of one principal that count at a time: each is a line that every list shows."""

GUEST: Final = "guest:"
"""What the principals of invitations begin with, so that nobody takes them for somebody known."""

_ISSUER: Final = "crdt-llm"
_ALGORITHM: Final = "EdDSA"
_ID_BYTES: Final = 8  # not secret, and never the same twice

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

    def authenticate(self, token: str | None) -> Pass | None:
        """Its pass, if ``token`` is the token. Takes the same time for any wrong one."""
        if token is None or len(token) > TOKEN_CHARACTERS_MAX:
            return None
        given = token.encode(errors="replace")
        return Pass(self.principal) if hmac.compare_digest(given, self.token.encode()) else None


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
        return False  # no address that a browser would send
    if page.scheme not in _DEFAULT_PORTS or not page.hostname:
        return False
    return same or is_loopback(page.hostname)


@dataclass(frozen=True, slots=True)
class Pass:
    """What a token proves.

    Attributes:
        principal: Who.
        id: The token's name, by which it can be revoked; empty for the owner's own.
        expires_at: ms since 1970, or ``None`` if it does not end.
        node: Whether it is an inference node's.
        conversations: The most that it allows, by conversation; ``None`` allows everything that
            the document does, everywhere.
    """

    principal: str
    id: str = ""
    expires_at: int | None = None
    node: bool = False
    conversations: Mapping[str, Grant] | None = None

    def may_enter(self, conversation: str) -> bool:
        """Whether it is of any use in a conversation."""
        return self.conversations is None or conversation in self.conversations

    def cap(self, conversation: str) -> Grant | None:
        """The most that it allows there; ``None`` if it does not narrow anything."""
        return None if self.conversations is None else self.conversations.get(conversation)


class Authority:
    """Issues tokens, and says what they prove.

    Args:
        owner_token: The owner's own token, from its file.
        secret: The Ed25519 seed that signs all others, 32 bytes.
        ledger: Where issued and revoked ones are noted.
        clock: ms since 1970.
        random: Random bytes.
    """

    def __init__(
        self,
        owner_token: str,
        secret: bytes,
        ledger: TokenLedger,
        *,
        clock: Callable[[], int],
        random: Callable[[int], bytes] = os.urandom,
    ) -> None:
        self._owner_token = owner_token.encode()
        self._key = Ed25519PrivateKey.from_private_bytes(secret)
        self._public = self._key.public_key()
        self._ledger = ledger
        self._clock = clock
        self._random = random

    def authenticate(self, token: str | None) -> Pass | None:
        """What a token proves; ``None`` if that is nothing (any more).

        Raises:
            StoreFailed: It cannot be found out now whether it was revoked.
        """
        if token is None or len(token) > TOKEN_CHARACTERS_MAX:
            return None
        if hmac.compare_digest(token.encode(errors="replace"), self._owner_token):
            return Pass(OWNER)
        found = self._read(token)
        return found if found is not None and self.is_valid(found) else None

    def is_valid(self, found: Pass) -> bool:
        """Whether a pass still counts: a connection outlives the moment of its handshake.

        Raises:
            StoreFailed: It cannot be found out now.
        """
        if found.expires_at is not None and found.expires_at <= self._clock():
            return False
        return not found.id or not self._ledger.is_revoked(found.id)

    def issue(  # noqa: PLR0913 - all that is noted of a token
        self,
        principal: str,
        *,
        expires_at: int | None = None,
        node: bool = False,
        conversations: Mapping[str, Grant] | None = None,
        inviter: str | None = None,
        name: str | None = None,
    ) -> tuple[str, Pass]:
        """Make a token and note it, which may wait for the disk.

        Args:
            principal: Whom it stands for.
            expires_at: ms since 1970; ``None`` never.
            node: Whether it is for an inference node.
            conversations: The most that it allows, by conversation; ``None`` is everywhere.
            inviter: Whose invitation it is.
            name: Whom the inviter means it for.

        Returns:
            The token, which is kept nowhere, and what it proves.

        Raises:
            LocalMisuse: Not for such a name, time or scope.
            TooLarge: Too many invitations of the same principal count.
            StoreFailed: It could not be noted, so it was not made.
        """
        if not 0 < len(principal) <= PRINCIPAL_CHARACTERS_MAX or not principal.isprintable():
            raise LocalMisuse(f"a principal has 1 to {PRINCIPAL_CHARACTERS_MAX} plain characters")
        now = self._clock()
        if expires_at is not None and expires_at <= now:
            raise LocalMisuse("that token would have ended before it was made")
        if expires_at is not None and expires_at > WHOLE_MAX:
            raise LocalMisuse("that token would end later than a time can say: leave its end out")
        if conversations is not None:
            if not 0 < len(conversations) <= SCOPES_MAX:
                raise LocalMisuse(f"a token names 1 to {SCOPES_MAX} conversations")
            if not all(map(is_conversation_id, conversations)):
                raise LocalMisuse("a conversation id is 22 characters of A-Z a-z 0-9 - _")
        token_id = self._random(_ID_BYTES).hex()
        made = Pass(principal, token_id, expires_at, node, conversations)
        scope = "node" if node else _scope_of(conversations)
        line = Issued(token_id, principal, scope, now, expires_at, inviter=inviter, name=name)
        self._ledger.record(line, invitations_max=INVITATIONS_MAX)
        return self._sign(made, now), made

    async def invite(
        self,
        conversation: str,
        role: Grant,
        expires_at: int | None = None,
        *,
        inviter: str,
        name: str | None = None,
    ) -> tuple[str, Pass]:
        """A token for a guest who is nobody elsewhere.

        It opens nothing by itself: an owner gives the guest's principal its right in the document.

        Args:
            conversation: Where.
            role: The most that it allows there.
            expires_at: ms since 1970; ``None`` in :data:`INVITATION_MS`.
            inviter: Who invites.
            name: Whom, for people.

        Raises:
            LocalMisuse: Nobody is invited as an owner, and see :meth:`issue`.
            TooLarge: See :meth:`issue`.
            StoreFailed: See :meth:`issue`.
        """
        if role is Grant.OWNER:
            raise LocalMisuse("invite writers or readers; an owner makes owners in the document")
        ends = self._clock() + INVITATION_MS if expires_at is None else expires_at
        guest = GUEST + self._random(_ID_BYTES).hex()
        issue = partial(
            self.issue,
            guest,
            expires_at=ends // 1000 * 1000,  # a token says seconds
            conversations={conversation: role},
            inviter=inviter,
            name=name,
        )
        return await self._ledger.aside(issue)

    async def admit_node(self, found: Pass, key: bytes) -> None:
        """Bind a node's public key to the principal that comes with it first, until it is released.

        A connection only claims its key. So what protects a node's leases from whoever has another
        node's token is that the key came with another principal before.

        Args:
            found: What its token proves.
            key: The node's public key.

        Raises:
            Forbidden: The key is another principal's.
            StoreFailed: It cannot be found out or noted now.
        """
        owner = self._ledger.node_owner(key)
        if owner is None:
            claim = partial(self._ledger.claim_node, key, found.principal, self._clock())
            owner = await self._ledger.aside(claim)
        if owner != found.principal:
            raise Forbidden("not-your-node", "this node's key came with another principal before")

    def release_node(self, key: bytes) -> bool:
        """Let a node's public key be that of whoever comes with it next; it may wait for the disk.

        A connection that came with it goes on. What ends it is :meth:`revoke`, with its token.

        Args:
            key: The node's public key.

        Returns:
            Whether it was anybody's.

        Raises:
            StoreFailed: It could not be noted.
        """
        return self._ledger.release_node(key)

    def revoke(self, token_id: str) -> None:
        """End a token, on live connections too; it may wait for the disk.

        Raises:
            StoreFailed: It could not be noted.
        """
        self._ledger.revoke(token_id, self._clock())

    async def revoke_aside(self, token_id: str) -> None:
        """The same, without holding up the event loop.

        Raises:
            StoreFailed: It could not be noted.
        """
        await self._ledger.aside(partial(self.revoke, token_id))

    def conversations_of(self, token_id: str) -> frozenset[str] | None:
        """The conversations that a token was issued for; ``None`` if everywhere, or unknown.

        Raises:
            StoreFailed: It cannot be found out now.
        """
        issued = self._ledger.find(token_id)
        named = [] if issued is None else [one.split(" of ") for one in issued.scope.split(", ")]
        scoped = all(len(one) == 2 for one in named)  # noqa: PLR2004 - a role, a conversation
        return frozenset(one[1] for one in named) if named and scoped else None

    def _sign(self, made: Pass, now: int) -> str:
        claims: dict[str, Any] = {
            "iss": _ISSUER,
            "sub": made.principal,
            "jti": made.id,
            "iat": now // 1000,
        }
        if made.expires_at is not None:
            claims["exp"] = made.expires_at // 1000
        if made.node:
            claims["node"] = True
        if made.conversations is not None:
            claims["conversations"] = {key: str(one) for key, one in made.conversations.items()}
        return jwt.encode(claims, self._key, algorithm=_ALGORITHM)

    def _read(self, token: str) -> Pass | None:
        try:
            claims = jwt.decode(
                token,
                self._public,
                algorithms=[_ALGORITHM],
                issuer=_ISSUER,
                # Time is judged by `is_valid`, with our own clock, then and later.
                options={"require": ["sub", "jti"], "verify_exp": False, "verify_iat": False},
            )
        except jwt.InvalidTokenError:
            return None  # whatever is wrong with it: that helps only who made it up
        expires, scopes = claims.get("exp"), claims.get("conversations")
        return Pass(
            principal=claims["sub"],
            id=claims["jti"],
            expires_at=None if expires is None else int(expires) * 1000,
            node=claims.get("node") is True,
            conversations=None
            if scopes is None
            else {conversation: Grant(role) for conversation, role in scopes.items()},
        )


def _scope_of(conversations: Mapping[str, Grant] | None) -> str:
    if conversations is None:
        return "everything"
    return ", ".join(f"{role} of {conversation}" for conversation, role in conversations.items())
