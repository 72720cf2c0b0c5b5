"""What an author wrote, as plain edits that can be written once more.

This module owns the way from what a transaction did to the edits that it meant, and back: a write
that was refused leaves structs that no other replica will ever have, so whatever was written after
it has to be written anew, under another client id and onto another document. It must not know
disks, sockets or the relay. It is pure but for :func:`write`, which writes into a document.

An intent is what one transaction meant, all or nothing. What only a node writes is no part of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from crdt_llm.document.conversation import ACCESS, ENTRIES, META
from crdt_llm.document.schema import ROOT, Grant, Role, read_born

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from crdt_llm.document.conversation import Change, Conversation, Edit, Writer
    from crdt_llm.document.schema import Born

_ASKED: Final = frozenset({"stop", "redacted"})  # what an author writes into an entry that is there


@dataclass(frozen=True, slots=True)
class Add:
    """A new entry.

    Attributes:
        entry: its id.
        born: what its author says of it.
        content: its text; ``None`` for a slot, and for one that was withdrawn at once.
    """

    entry: str
    born: Born
    content: str | None = field(repr=False)


@dataclass(frozen=True, slots=True)
class SetMeta:
    """A fact of the conversation; ``None`` takes it away."""

    key: str
    value: Any = field(repr=False)


@dataclass(frozen=True, slots=True)
class GiveRight:
    """A principal's right; ``None`` takes it away."""

    principal: str
    grant: str | None


@dataclass(frozen=True, slots=True)
class Ask:
    """A slot's ``stop``, or an entry's ``redacted`` with all that goes with it."""

    entry: str
    key: str
    value: Any


PlainEdit: TypeAlias = Add | SetMeta | GiveRight | Ask

Intent: TypeAlias = tuple[PlainEdit, ...]
"""What one transaction meant."""


# -- from a change ---------------------------------------------------------------------------------


def intent_of(change: Change) -> Intent:
    """What an author's transaction meant: entries first, as they follow each other."""
    return tuple(sorted((edit for one in change.edits for edit in _plain_edits(one)), key=_order))


def _plain_edits(edit: Edit) -> Sequence[PlainEdit]:
    deleted = edit.action == "delete"
    match edit.root, edit.path, edit.key:
        case "meta", (), str(key):
            return (SetMeta(key, None if deleted else edit.new),)
        case "access", (), str(key):
            return (GiveRight(key, None if deleted else edit.new),)
        case "entries", (), str(key) if edit.action == "add":
            return _new_entry(key, edit.new)
        case "entries", (str(entry),), str(key) if key in _ASKED and not deleted:
            return (Ask(entry, key, edit.new),)
        case _:
            return ()  # what goes with a redaction; and nothing else is an author's


def _new_entry(entry: str, fields: Mapping[str, Any]) -> Sequence[PlainEdit]:
    born = read_born(fields.get("born"))
    if born is None:
        return ()
    content = fields.get("content")
    asked = tuple(Ask(entry, key, fields[key]) for key in sorted(_ASKED & fields.keys()))
    return (Add(entry, born, content if isinstance(content, str) else None), *asked)


# -- and back --------------------------------------------------------------------------------------


def write(intent: Intent, document: Conversation, writer: Writer) -> None:
    """Write an intent (again).

    Args:
        intent: what to write; what it says of entries that are not there is left out.
        document: the one that is written to.
        writer: of an open transaction on it.
    """
    added = {edit.entry for edit in intent if isinstance(edit, Add)}
    for edit in intent:
        match edit:
            case Add(entry, born, content):
                writer.add(entry, born, content)
            case SetMeta(key, value):
                writer.set_meta(key, value)
            case GiveRight(principal, grant):
                writer.grant(principal, None if grant is None else Grant(grant))
            case Ask(entry, key, value) if entry in added or entry in document.tree:
                if key == "redacted":
                    writer.redact(entry, value["by"], value["at"])
                else:
                    writer.set(entry, key, value)
            case Ask():
                pass


def without(intent: Intent, gone: Mapping[str, str]) -> Intent:
    """What is left of an intent when earlier entries will not be there.

    Args:
        intent: one that was written after them.
        gone: each of them, with the entry that it was written after.

    Returns:
        The same with what was written after a missing entry moved to the nearest one that is there;
        what is about a missing entry alone, and a request for a reply to it, is left out.
    """
    missing = dict(gone)
    left: list[PlainEdit] = []
    for edit in sorted(intent, key=_order):
        match edit:
            case Add(entry, born, None) if born.after in missing:
                missing[entry] = born.after
            case Add(_, born) if born.after in missing:
                left.append(replace(edit, born=replace(born, after=_standing(born, missing))))
            case SetMeta("head", value) if value in missing:
                pass
            case Ask(entry) if entry in missing:
                pass
            case _:
                left.append(edit)
    return tuple(left)


def _standing(born: Born, gone: Mapping[str, str]) -> str:
    after = born.after
    while after in gone:
        after = gone[after]
    return after


def entries_of(intent: Intent) -> dict[str, str]:
    """The entries that an intent adds, each with the one that it is written after."""
    return {edit.entry: edit.born.after for edit in intent if isinstance(edit, Add)}


def split(intent: Intent) -> tuple[Intent, ...]:
    """The parts of an intent that stand for themselves.

    An entry keeps the slots that ask for a reply to it, and the head that shows them. Usually that
    is the whole; several writes that had to be sent as one come apart again.
    """
    parts: list[list[PlainEdit]] = []
    part_of: dict[str, list[PlainEdit]] = {}
    rest: list[PlainEdit] = []  # facts of the conversation that belong to no entry
    for edit in sorted(intent, key=_order):
        match edit:
            case Add(entry, born, content):
                beside = part_of.get(born.after) if content is None else None
                if beside is None:
                    parts.append(beside := [])
                beside.append(edit)
                part_of[entry] = beside
            case SetMeta("head", value) if value in part_of:
                part_of[value].append(edit)
            case Ask(entry) if entry in part_of:
                part_of[entry].append(edit)
            case _:
                rest.append(edit)
    if rest:
        # Before the rest, nothing can be there: a birth is among it.
        parts.insert(0, rest)
    return tuple(tuple(part) for part in parts)


def _order(edit: PlainEdit) -> tuple[int, str]:
    """Entries by their clocks, what is about them after."""
    return (edit.born.clock, edit.entry) if isinstance(edit, Add) else (2**53, "")


def anew(  # noqa: PLR0913 - all that an entry is born with
    intent: Intent,
    *,
    after: str,
    clock: int,
    at: int,
    author: str,
    is_there: Callable[[str], bool],
) -> Intent:
    """The same, said now: for what was refused and is sent once more.

    Args:
        intent: what was meant then.
        after: the entry that the line ends with now.
        clock: the greatest that this device can see.
        at: the time, ms since 1970.
        author: who says it now.
        is_there: whether the document has an entry.
    """
    own: set[str] = set()
    said: list[PlainEdit] = []
    for edit in sorted(intent, key=_order):
        match edit:
            case Add(entry, born):
                clock += 1
                stays = born.after in own or (born.fork and is_there(born.after))
                where = born.after if stays else after
                now = replace(born, author=author, at=at, clock=clock, after=where)
                said.append(replace(edit, born=now))
                own.add(entry)
            case _:
                said.append(edit)
    return tuple(said)


def withdrawn(intent: Intent, entries: frozenset[str]) -> Intent:
    """The same without the text of entries that were redacted since."""
    return tuple(
        replace(edit, content=None) if isinstance(edit, Add) and edit.entry in entries else edit
        for edit in intent
    )


def text_of(intent: Intent) -> str:
    """What a person would miss: the texts of its entries, or the title that it gives."""
    texts = [edit.content for edit in intent if isinstance(edit, Add) and edit.content]
    titles = [
        str(edit.value)
        for edit in intent
        if isinstance(edit, SetMeta) and edit.key == "title" and edit.value
    ]
    return "\n\n".join(texts or titles)


def what_of(intent: Intent) -> str:
    """What kind of write it is, for people: one word or two."""
    for edit in intent:
        match edit:
            case Add(_, born):
                return "a request for a reply" if born.role is Role.ASSISTANT else "a message"
            case GiveRight():
                return "a right"
            case Ask(_, key):
                return "a stop" if key == "stop" else "a withdrawal"
            case SetMeta("birth"):
                return "the beginning"
            case SetMeta("title"):
                return "a title"
            case SetMeta():
                continue
    return "a change"


# -- as plain values, for a file -------------------------------------------------------------------


def plain(intent: Intent) -> list[Any]:
    """The form that a file keeps."""
    return [_plain(edit) for edit in intent]


def _plain(edit: PlainEdit) -> list[Any]:
    match edit:
        case Add(entry, born, content):
            return [ENTRIES, entry, born.plain(), content]
        case SetMeta(key, value):
            return [META, key, value]
        case GiveRight(principal, grant):
            return [ACCESS, principal, grant]
        case Ask(entry, key, value):
            return ["ask", entry, key, value]


def read(value: Any) -> Intent:
    """The intent that :func:`plain` gave; ``ValueError`` for anything else."""
    if not isinstance(value, list):
        raise ValueError("an intent is a list")  # noqa: TRY004 - a damaged file, not a bug
    return tuple(_read(edit) for edit in value)


def _read(edit: Any) -> PlainEdit:
    match edit:
        case ["entries", str(entry), dict(plain_born), str() | None as content]:
            born = read_born(plain_born)
            if born is not None:
                return Add(entry, born, content)
        case ["meta", str(key), value]:
            return SetMeta(key, value)
        case ["access", str(principal), str() | None as grant]:
            return GiveRight(principal, grant)
        case ["ask", str(entry), str(key), value]:
            return Ask(entry, key, value)
        case _:
            pass
    raise ValueError("that is no edit of an intent")


__all__ = [
    "ROOT",
    "Add",
    "Ask",
    "GiveRight",
    "Intent",
    "PlainEdit",
    "SetMeta",
    "anew",
    "entries_of",
    "intent_of",
    "plain",
    "read",
    "split",
    "text_of",
    "what_of",
    "withdrawn",
    "without",
    "write",
]
