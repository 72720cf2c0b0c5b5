"""What a room keeps of its conversation in the register, and what it says after a loss.

This module owns how a :class:`~crdt_llm.store.register.Row` follows from a document: whose the
conversation is, who may do what, which admitted entries nothing stands behind, what was withdrawn;
and how a row says whose a client id is.
It must not know rooms, stores or sockets: it is pure, and rows go in and come out.

A row changes with the facts in it, never with a token of a reply: :func:`follow` answers the very
row it was given unless an edit touched one of those facts.
"""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from crdt_llm.document.conversation import ACCESS, ENTRIES, META
from crdt_llm.document.schema import REDACTION_DELETES, ROOT
from crdt_llm.store.register import Row

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from crdt_llm.document.conversation import Change, Conversation

ROOMS_OWN: Final = "room"
"""Whose the client ids are that rooms wrote corrections under."""

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
    withdrawn = (entry for entry in conversation.tree.entries if conversation.is_redacted(entry))
    row = _with_access(row, conversation)
    row = _with_redactions(row, conversation, withdrawn)
    return _with_tips(row, leaves(conversation))


def concerns(change: Change) -> bool:
    """Whether a change may touch a fact of the row; a token of a reply never does."""
    return any(edit.root != ENTRIES or len(edit.path) <= 1 for edit in change.edits)


def follow(row: Row, change: Change, conversation: Conversation) -> Row:
    """The row after a change; the same object if the change touched none of its facts."""
    placed: dict[str, str] = {}
    proved: set[str] = set()
    withdrawn: set[str] = set()
    for edit in change.edits:
        entry = edit.entry
        if edit.root == ACCESS or (edit.root == META and edit.key == "birth"):
            row = _with_access(row, conversation)
        elif edit.root == ENTRIES and entry is not None and len(edit.path) <= 1:
            keys = {edit.key} if edit.path else set(edit.new or ())
            if "place" in keys and conversation.tree.is_admitted(entry):
                placed[entry] = conversation.tree.facts(entry).parent or ROOT
            if "proof" in keys:
                proved.add(entry)
            if "redacted" in keys:
                withdrawn.add(entry)
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
