"""``crdt-llm token``: give out access, see what was given out, take it back.

This module owns what is asked for and what is printed, the keys of nodes among it: a relay binds
each to the principal whose token it first came with. It works beside a running relay, which hears
of a revocation within seconds, and of a released key at once; what a token says and how it is
signed is :mod:`crdt_llm.sync.relay.access`'s.
"""

from __future__ import annotations

import json as json_format
import re
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from crdt_llm.cli.printable import one_line
from crdt_llm.document.keys import load_or_create_secret, written_key
from crdt_llm.document.schema import Grant, is_conversation_id
from crdt_llm.errors import LocalMisuse, StoreFailed
from crdt_llm.store.token_ledger import TokenLedger
from crdt_llm.sync.relay.access import Authority, load_or_create_token

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from crdt_llm.cli.folders import DataFolder
    from crdt_llm.store.token_ledger import Issued

_UNITS_MS: Final = {
    "m": 60_000,
    "h": 3_600_000,
    "d": 86_400_000,
    "w": 7 * 86_400_000,
}
_DURATION: Final = re.compile(r"([1-9][0-9]{0,5})([mhdw])\Z")


def now_ms() -> int:
    """Wall time, ms since 1970."""
    return time.time_ns() // 1_000_000


def read_duration(text: str) -> int:
    """``30d`` and the like, in milliseconds.

    Raises:
        LocalMisuse: it is no duration.
    """
    found = _DURATION.match(text)
    if found is None:
        raise LocalMisuse(f"{text!r} is no duration: write 90m, 12h, 30d or 8w")
    return int(found[1]) * _UNITS_MS[found[2]]


def read_scopes(words: Sequence[str]) -> dict[str, Grant] | None:
    """``ID=role`` each, by conversation; ``None`` if there is none.

    Raises:
        LocalMisuse: one is written otherwise.
    """
    scopes: dict[str, Grant] = {}
    for word in words:
        conversation, _, role = word.partition("=")
        if not is_conversation_id(conversation) or role not in set(Grant):
            raise LocalMisuse(
                f"{word!r} is no scope: write a conversation's whole id, =, and owner, writer or"
                " reader"
            )
        scopes[conversation] = Grant(role)
    return scopes or None


@contextmanager
def authority_of(folder: DataFolder) -> Iterator[tuple[Authority, TokenLedger]]:
    """The authority of a data folder that was served at least once.

    Raises:
        StoreFailed: it was not.
        Corrupt: a key or the list of tokens is damaged.
    """
    if not folder.token.exists():
        raise StoreFailed(
            f"{folder.path} is no data folder of a relay: run `crdt-llm serve` once, or name"
            " another with --data"
        )
    ledger = TokenLedger.open(folder.tokens)
    try:
        secret = load_or_create_secret(folder.key("token"))
        owner = load_or_create_token(folder.token)
        yield Authority(owner, secret, ledger, clock=now_ms), ledger
    finally:
        ledger.close()


def run_issue(  # noqa: PLR0913 - the options of a command
    principal: str,
    *,
    folder: DataFolder,
    expires: str | None,
    scopes: Sequence[str],
    node: bool,
    json: bool,
) -> None:
    """Make a token and print it, and nothing else, on standard output.

    Raises:
        LocalMisuse: no such token can be made.
        StoreFailed: it could not be noted.
    """
    if node and scopes:
        raise LocalMisuse("a node serves every conversation: leave --conversation out")
    expires_at = None if expires is None else now_ms() + read_duration(expires)
    with authority_of(folder) as (authority, _):
        token, made = authority.issue(
            principal, expires_at=expires_at, node=node, conversations=read_scopes(scopes)
        )
    if json:
        facts = {"id": made.id, "principal": principal, "expires_at": expires_at, "token": token}
        print(json_format.dumps(facts))  # noqa: T201 - the terminal
        return
    print(token)  # noqa: T201 - as above
    print(  # noqa: T201 - as above
        f"revoke it with: crdt-llm token revoke {made.id}", file=sys.stderr
    )


def run_list(*, folder: DataFolder, json: bool) -> None:
    """Print what was given out, the latest first.

    Raises:
        StoreFailed: it cannot be read now.
    """
    with authority_of(folder) as (_, ledger):
        lines = ledger.issued()
    facts: list[dict[str, Any]] = [
        {
            "id": line.id,
            "principal": line.principal,
            "scope": line.scope,
            "issued_at": line.issued_at,
            "expires_at": line.expires_at,
            "revoked_at": line.revoked_at,
            "inviter": line.inviter,
            "name": line.name,
        }
        for line in lines
    ]
    if json:
        print(json_format.dumps(facts))  # noqa: T201 - the terminal
        return
    for line in lines:
        print(  # noqa: T201 - the terminal
            f"{line.id}  {_state(line.expires_at, line.revoked_at):<16}"
            f"  {one_line(_whom(line), 30):<30}  {one_line(line.scope, 60)}"
        )
    if not lines:
        print("no token was given out; the owner's own is not listed", file=sys.stderr)  # noqa: T201


def run_revoke(token_id: str, *, folder: DataFolder) -> None:
    """End a token; connections that it opened end too.

    Raises:
        LocalMisuse: no such token was given out.
        StoreFailed: it could not be noted.
    """
    with authority_of(folder) as (authority, ledger):
        if ledger.find(token_id) is None:
            raise LocalMisuse(
                f"no token {token_id!r} was given out: crdt-llm token list shows their ids"
            )
        authority.revoke(token_id)


def run_nodes(*, folder: DataFolder, json: bool) -> None:
    """Print which node's key is whose, the latest first.

    Raises:
        StoreFailed: it cannot be read now.
    """
    with authority_of(folder) as (_, ledger):
        nodes = ledger.nodes()
    if json:
        facts = [
            {"key": written_key(one.key), "principal": one.principal, "since": one.since}
            for one in nodes
        ]
        print(json_format.dumps(facts))  # noqa: T201 - the terminal
        return
    for one in nodes:
        day = time.strftime("since %Y-%m-%d", time.localtime(one.since / 1000))
        print(f"{written_key(one.key)}  {day}  {one_line(one.principal, 60)}")  # noqa: T201 - as above
    if not nodes:
        print("no node has come yet", file=sys.stderr)  # noqa: T201 - as above


def run_unbind(beginning: str, *, folder: DataFolder) -> None:
    """Let a node's key be that of whoever comes with it next.

    Raises:
        LocalMisuse: no node came with such a key, or several did.
        StoreFailed: it could not be noted.
    """
    with authority_of(folder) as (authority, ledger):
        known = {written_key(one.key): one for one in ledger.nodes()}
        found = [key for key in known if key.startswith(beginning)] if beginning else []
        if len(found) > 1:
            raise LocalMisuse(f"{len(found)} keys begin with {beginning!r}: give more of it")
        if not found or not authority.release_node(known[found[0]].key):
            raise LocalMisuse(
                f"no node came with a key {beginning!r}: crdt-llm token nodes shows them"
            )
    principal = one_line(known[found[0]].principal, 60)
    print(f"{found[0]} is no longer {principal}'s", file=sys.stderr)  # noqa: T201 - the terminal


def _whom(line: Issued) -> str:
    return line.principal if line.name is None else f"{line.name} ({line.principal})"


def _state(expires_at: int | None, revoked_at: int | None) -> str:
    if revoked_at is not None:
        return "revoked"
    if expires_at is None:
        return "does not end"
    if expires_at <= now_ms():
        return "over"
    return time.strftime("until %Y-%m-%d", time.localtime(expires_at / 1000))
