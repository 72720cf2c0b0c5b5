"""What a room keeps of its conversation in the register, and what it says after a loss.

This module owns how a :class:`~crdt_llm.store.register.Row` follows from a document: whose the
conversation is, who may do what, which admitted entries nothing stands behind, what was withdrawn,
which facts it states of itself, which replies were stopped and which requests ended without a
place; and how a row says whose a client id is.
It must not know rooms, stores or sockets: it is pure, and rows go in and come out.

A row changes with the facts in it, never with a token of a reply: :func:`follow` answers the very
row it was given unless an edit touched one of those facts.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import msgpack

from crdt_llm.document.chain import canonical
from crdt_llm.document.conversation import ACCESS, ENTRIES, META
from crdt_llm.document.rules import is_meta
from crdt_llm.document.schema import ENDED, REDACTION_DELETES, ROOT
from crdt_llm.store.register import Row

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from crdt_llm.document.conversation import Change, Conversation

ROOMS_OWN: Final = "room"
"""Whose the client ids are that rooms wrote corrections under."""

FORMER_MAX: Final = 64
"""Digests that are kept of what a fact was before: 2 kB. What is older is known as anything."""

_NODE: Final = "node "
_PERSON: Final = "person "


def clients_of(principal: str, *, node: bool = False) -> str:
    """How a row says whose a client id is: a node's is no person's, whatever their names."""
    return (_NODE if node else _PERSON) + principal


def are_of_a_node(whose: str | None) -> bool:
    """Whether a client id that is known to be somebody's is a node's."""
    return whose is not None and whose.startswith(_NODE)


def first_row(conversation: Conversation) -> Row | None:
    """The row of a document that has none yet; ``None`` while it has no birth.

    The epoch is the last one that the document speaks of, so that the next is greater than any.
    """
    birth, name = conversation.meta.birth, conversation.id
    if birth is None or name is None:
        return None
    epoch = max(conversation.epochs(), default=0)
    lease = conversation.lease(epoch)
    row = Row(name, birth.owner, birth.nonce, epoch=epoch, holder=lease[0] if lease else b"")
    return reconciled(row, conversation)


def reconciled(row: Row, conversation: Conversation) -> Row:
    """The row with all its facts read from the document anew; costs the document's length."""
    tree = conversation.tree
    withdrawn = (entry for entry in tree.entries if conversation.is_redacted(entry))
    row = _with_access(row, conversation)
    row = _with_redactions(row, conversation, withdrawn)
    if row.facts is None:
        # Of a conversation that has just begun it is all that there ever was.
        former = {"": (b"",)} if tree.entries else {}
        row = replace(row, facts=_frozen({}), former=_frozen(former))
    row = _with_facts(row, conversation, {*(row.facts or {}), *conversation.meta_plain()})
    # Only a slot that has ended, as the tree sees it, may have either.
    slots = {name for name in tree.entries if tree.facts(name).slot and tree.facts(name).ended}
    row = _with_stops(row, conversation, row.stops.keys() | slots)
    row = _with_ends(row, conversation, row.ends.keys() | slots)
    return _with_tips(row, leaves(conversation))


def concerns(change: Change) -> bool:
    """Whether a change may touch a fact of the row; a token of a reply never does."""
    return any(edit.root != ENTRIES or len(edit.path) <= 1 for edit in change.edits)


def follow(row: Row, change: Change, conversation: Conversation) -> Row:
    """The row after a change; the same object if the change touched none of its facts."""
    stated: dict[str, bool] = {}  # key -> whether it had a value before
    written: dict[str, set[str]] = {}  # field -> in which entries
    for edit in change.edits:
        entry = edit.entry
        if edit.root == META and edit.key is not None:
            stated.setdefault(edit.key, edit.action != "add")
        if edit.root == ACCESS or (edit.root == META and edit.key == "birth"):
            row = _with_access(row, conversation)
        elif edit.root == ENTRIES and entry is not None and len(edit.path) <= 1:
            for key in (edit.key,) if edit.path else (edit.new or ()):
                written.setdefault(key or "", set()).add(entry)
    if row.facts is not None:
        # What a restore brought and did not keep takes nothing away that is registered.
        meta = conversation.meta_plain() if stated else {}
        kept = {key for key, before in stated.items() if before or key in meta}
        row = _with_facts(row, conversation, kept)
        row = _with_stops(row, conversation, written.get("stop", ()))
        ended = (written.get(key, set()) for key in ("state", "usage", "place"))
        row = _with_ends(row, conversation, set().union(*ended))
    tree = conversation.tree
    placed = {
        entry: tree.facts(entry).parent or ROOT
        for entry in written.get("place", ())
        if tree.is_admitted(entry)
    }
    proved, withdrawn = written.get("proof", set()), written.get("redacted", set())
    if placed or proved & row.tips.keys():
        parents = set(placed.values())
        names = (row.tips.keys() | placed.keys()) - parents
        digests = {
            # What was registered once stays: a replica that is older may have less of it.
            entry: row.tips.get(entry) or digest_of(conversation, entry)
            for entry in names
        }
        row = _with_tips(row, digests)
    return _with_redactions(row, conversation, withdrawn) if withdrawn else row


def withdraws(change: Change) -> bool:
    """Whether a change withdrew something, or cleared away what a withdrawal had left."""
    return any(
        edit.root == ENTRIES
        and (
            (edit.action == "delete" and edit.key in REDACTION_DELETES)
            or edit.key == "redacted"
            or (not edit.path and "redacted" in (edit.new or ()))
        )
        for edit in change.edits
        if len(edit.path) <= 1
    )


def leaves(conversation: Conversation) -> dict[str, bytes]:
    """The admitted entries that nothing admitted stands behind, with their digests."""
    tree = conversation.tree
    admitted = {entry for entry in tree.entries if tree.is_admitted(entry)}
    parents = {tree.facts(entry).parent for entry in admitted}
    return {entry: digest_of(conversation, entry) for entry in sorted(admitted - parents)}


def digest_of(conversation: Conversation, entry: str) -> bytes:
    """An entry's chain digest; empty while it has none."""
    found = conversation.entry(entry)
    return found.proof.digest if found is not None and found.proof is not None else b""


def missing_tips(row: Row, conversation: Conversation) -> tuple[str, ...]:
    """The registered tips that the document lacks, or has with another digest.

    A tip that the register knows without a digest was still streaming: having it is enough.
    """
    return tuple(
        entry
        for entry, digest in row.tips.items()
        if not conversation.tree.is_admitted(entry)
        or (digest and digest_of(conversation, entry) != digest)
    )


def digest_of_value(value: Any) -> bytes:
    """What is registered of a plain value: SHA-256 of it in the chain's canonical form."""
    return hashlib.sha256(msgpack.packb(canonical(value))).digest()


def missing_facts(row: Row, conversation: Conversation) -> dict[str, bytes]:
    """The registered facts that the document lacks, or has with another value."""
    if not row.facts:
        return {}
    meta = conversation.meta_plain()
    return {key: digest for key, digest in row.facts.items() if _fact(key, meta) != digest}


def was_registered(row: Row, key: str, digest: bytes) -> bool:
    """Whether a value may be one that a fact had before, as a replica that is older has it."""
    former = row.former.get(key, ())
    return digest in former or b"" in former or "" in row.former


def stop_of(row: Row, slot: str) -> str | None:
    """Who asked last for the end of a reply."""
    return row.stops[slot][0] if slot in row.stops else None


def end_of(conversation: Conversation, slot: str) -> tuple[str, bytes] | None:
    """How a request ended that has no place, and the digest of what it says of its cost."""
    state = conversation.state(slot)
    if state not in ENDED or conversation.has(slot, "place"):
        return None
    usage = conversation.plain(slot, "usage")
    return str(state), b"" if usage is None else digest_of_value(usage)


def _fact(key: str, meta: Mapping[str, Any]) -> bytes | None:
    value = meta.get(key)
    return digest_of_value(value) if is_meta(key, value) else None


def _with_facts(row: Row, conversation: Conversation, keys: Iterable[str]) -> Row:
    before = row.facts or {}
    meta = conversation.meta_plain() if keys else {}
    facts = _updated(before, {key: _fact(key, meta) for key in keys})
    if facts == dict(before):
        return row
    former = dict(row.former)
    for key, digest in before.items():
        if facts.get(key) != digest:
            older = (digest, *(one for one in former.get(key, ()) if one != digest))
            cut = len(older) > FORMER_MAX
            former[key] = (*older[: FORMER_MAX - 1], b"") if cut else older
    return replace(row, facts=_frozen(facts), former=_frozen(former))


def _with_stops(row: Row, conversation: Conversation, slots: Iterable[str]) -> Row:
    stops = dict(row.stops)
    for slot in slots:
        who, before = conversation.plain(slot, "stop"), stops.get(slot, ())
        if isinstance(who, str):
            stops[slot] = (who, *(one for one in before if one != who))
    return row if stops == dict(row.stops) else replace(row, stops=_frozen(stops))


def _with_ends(row: Row, conversation: Conversation, slots: Iterable[str]) -> Row:
    """An end is for good, and so is what was said of its cost: a replica may have lost that."""
    found = {slot: end_of(conversation, slot) for slot in slots}
    fresh = {slot: end for slot, end in found.items() if slot not in row.ends or (end and end[1])}
    ends = _updated(row.ends, fresh)
    return row if ends == dict(row.ends) else replace(row, ends=_frozen(ends))


def _updated(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """What was registered and what is found now; ``None`` where there is nothing any more."""
    after = {**before, **now}
    return {key: value for key, value in after.items() if value is not None}


def _with_access(row: Row, conversation: Conversation) -> Row:
    access = dict(conversation.access())
    if access == dict(row.access):
        return row
    return replace(row, access=_frozen(access), access_version=row.access_version + 1)


def _with_tips(row: Row, tips: Mapping[str, bytes]) -> Row:
    return row if dict(tips) == dict(row.tips) else replace(row, tips=_frozen(tips))


def _with_redactions(row: Row, conversation: Conversation, entries: Iterable[str]) -> Row:
    """Withdrawn once is withdrawn for good; who did it first stays in the row."""
    fresh = {
        entry: _said(conversation.plain(entry, "redacted"))
        for entry in entries
        if entry not in row.redacted
    }
    if not fresh:
        return row
    return replace(row, redacted=_frozen({**row.redacted, **fresh}), scrub_owed=True)


def _said(value: Any) -> tuple[str, int]:
    by, at = (value.get("by"), value.get("at")) if isinstance(value, dict) else (None, None)
    return (by if isinstance(by, str) else ""), (at if isinstance(at, int) else 0)


def _frozen(plain: Mapping[str, Any]) -> Mapping[str, Any]:
    return MappingProxyType(dict(plain))
