"""What a device's file says of a conversation: records, and what they add up to.

This module owns the form of the records that a replica's log consists of and how they add up. It
must not know the log itself, nor documents: updates are opaque.

A record is one entry of an update log: two bytes that no Yjs update begins with, then a MessagePack
list, a number for its kind first. What has not the two bytes is an update that came from the relay:
a file of the time before there were records consists of those.

What the relay has acknowledged and what it has not are kept apart: the first is what a replica is
built anew from when a write is refused, the second is sent until there is an answer. Each record is
durable whole or not at all, and each of them is enough for its step: there is no moment at which a
text is in neither part.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import msgpack

from crdt_llm.errors import Corrupt
from crdt_llm.sync.client import intents

if TYPE_CHECKING:
    from collections.abc import Sequence

    from crdt_llm.store.log import Loaded
    from crdt_llm.sync.client.intents import Intent

_MARK: Final = b"\x80\x00"
"""The number zero, written in one byte too many: how no encoder begins an update."""


@dataclass(frozen=True, slots=True)
class RefusedWrite:
    """A write that the relay refused: a draft on this device, for a person to decide about.

    Attributes:
        id: a number of this replica's own.
        code: why, for programs: a code of the native dialect.
        rule: the rule that was broken, as ``protocol/SCHEMA.md`` names it; may be empty.
        reason: why, in one line for people.
        intent: what was written.
    """

    id: int
    code: str
    rule: str
    reason: str
    intent: Intent = field(repr=False)

    @property
    def text(self) -> str:
        """What it said; empty for what says nothing, such as a request for another reply."""
        return intents.text_of(self.intent)

    @property
    def what(self) -> str:
        """What kind of write it was, for people."""
        return intents.what_of(self.intent)

    @property
    def entries(self) -> tuple[str, ...]:
        """The ids that its entries had; the first is the message's."""
        return tuple(intents.entries_of(self.intent))

    @property
    def entry(self) -> str:
        """The id that its first entry had, or ``""`` if it was none."""
        return next(iter(self.entries), "")


@dataclass(frozen=True, slots=True)
class Heard:
    """From the relay: durable there, and everything up to ``lsn`` is here now."""

    update: bytes
    lsn: int


@dataclass(frozen=True, slots=True)
class Wrote:
    """Written on this device, and not acknowledged yet."""

    number: int
    update: bytes


@dataclass(frozen=True, slots=True)
class Acknowledged:
    """The relay has these writes of ours."""

    numbers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Position:
    """From here on LSNs are of this log of the relay's."""

    log: str | None
    lsn: int


@dataclass(frozen=True, slots=True)
class Rewrote:
    """The whole outbox as it is now, and what became a draft on the way."""

    outbox: tuple[Wrote, ...]
    refused: tuple[RefusedWrite, ...]


@dataclass(frozen=True, slots=True)
class Discarded:
    """A refused write is of no interest any more."""

    id: int


@dataclass(frozen=True, slots=True)
class Drafted:
    """A write that was refused before it was in the file: all that the file has of it."""

    refused: RefusedWrite


@dataclass(frozen=True, slots=True)
class Whole:
    """All of it: a snapshot."""

    acknowledged: bytes
    log: str | None
    lsn: int
    outbox: tuple[Wrote, ...]
    refused: tuple[RefusedWrite, ...]
    last_number: int


Record: TypeAlias = Heard | Wrote | Acknowledged | Position | Rewrote | Discarded | Whole | Drafted

_KINDS: Final[tuple[type[Record], ...]] = (
    Heard,
    Wrote,
    Acknowledged,
    Position,
    Rewrote,
    Discarded,
    Whole,
    Drafted,
)
"""The kinds by number; later ones are added at the end."""


def encode(record: Record) -> bytes:
    """The bytes of a record."""
    values = [_bare(getattr(record, one.name)) for one in fields(record)]
    packed: bytes = msgpack.packb([_KINDS.index(type(record)), *values], use_bin_type=True)
    return _MARK + packed


def decode(data: bytes) -> Record:
    """The record in an entry of the log.

    Raises:
        Corrupt: it is none.
    """
    if not data.startswith(_MARK):
        return Heard(data, 0)
    try:
        return _record(msgpack.unpackb(data[len(_MARK) :], strict_map_key=False))
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise Corrupt("a record of the replica cannot be read") from error


def _bare(value: Any) -> Any:
    match value:
        case Wrote():
            return [value.number, value.update]
        case RefusedWrite():
            return [value.id, value.code, value.rule, value.reason, intents.plain(value.intent)]
        case tuple():
            return [_bare(one) for one in value]
        case _:
            return value


def _record(values: Any) -> Record:  # noqa: PLR0911 - one each
    match values:
        case [0, bytes(update), int(lsn)]:
            return Heard(update, lsn)
        case [1, *written]:
            return _wrote(written)
        case [2, list(numbers)] if all(isinstance(number, int) for number in numbers):
            return Acknowledged(tuple(numbers))
        case [3, str() | None as log, int(lsn)]:
            return Position(log, lsn)
        case [4, list(outbox), list(refused)]:
            return Rewrote(_outbox(outbox), _refused(refused))
        case [5, int(number)]:
            return Discarded(number)
        case [6, bytes(update), str() | None as log, int(lsn), list(outbox), list(refused), int(n)]:
            return Whole(update, log, lsn, _outbox(outbox), _refused(refused), n)
        case [7, refused]:
            return Drafted(_refused_write(refused))
        case _:
            raise ValueError("no record that is known here")


def _outbox(values: Sequence[Any]) -> tuple[Wrote, ...]:
    return tuple(_wrote(value) for value in values)


def _wrote(value: Any) -> Wrote:
    match value:
        case [int(number), bytes(update)]:
            return Wrote(number, update)
        case _:
            raise ValueError("that is no write")


def _refused(values: Sequence[Any]) -> tuple[RefusedWrite, ...]:
    return tuple(_refused_write(value) for value in values)


def _refused_write(value: Any) -> RefusedWrite:
    match value:
        case [int(number), str(code), str(rule), str(reason), intent]:
            return RefusedWrite(number, code, rule, reason, intents.read(intent))
        case _:
            raise ValueError("that is no refused write")


@dataclass(slots=True)
class Kept:
    """What the records add up to.

    Attributes:
        acknowledged: updates that make up the acknowledged document, in an order in which none
            builds on a later one.
        log: the relay's log that ``lsn`` speaks of.
        lsn: up to where in it everything is here.
        outbox: the writes that are not acknowledged, by number, in order.
        refused: the refused writes, by id.
        last_number: the greatest number that was ever given to a write or a refusal.
    """

    acknowledged: list[bytes] = field(default_factory=list)
    log: str | None = None
    lsn: int = 0
    outbox: dict[int, bytes] = field(default_factory=dict)
    refused: dict[int, RefusedWrite] = field(default_factory=dict)
    last_number: int = 0

    @classmethod
    def of(cls, loaded: Loaded) -> Kept:
        """What a log holds.

        Raises:
            Corrupt: it holds something else.
        """
        kept = cls()
        if loaded.snapshot is not None:
            kept.take(decode(loaded.snapshot))
        for _, entry in loaded.updates:
            kept.take(decode(entry))
        return kept

    def take(self, record: Record) -> None:
        """Add one more record."""
        match record:
            case Heard(update, lsn):
                self.acknowledged.append(update)
                self.lsn = max(self.lsn, lsn)
            case Wrote(number, update):
                self.outbox[number] = update
                self.last_number = max(self.last_number, number)
            case Acknowledged(numbers):
                self._acknowledge(numbers)
            case Position(log, lsn):
                self.log, self.lsn = log, lsn
            case Rewrote(outbox, refused):
                self._replace(outbox, refused)
            case Drafted(draft):
                self.refused[draft.id] = draft
                self.last_number = max(self.last_number, draft.id)
            case Discarded(number):
                self.refused.pop(number, None)
            case Whole():
                self.acknowledged = [record.acknowledged]
                self.log, self.lsn = record.log, record.lsn
                self.outbox.clear()
                self.refused.clear()
                self._replace(record.outbox, record.refused)
                self.last_number = max(self.last_number, record.last_number)

    def _acknowledge(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            update = self.outbox.pop(number, b"")
            if update:
                self.acknowledged.append(update)

    def _replace(self, outbox: Sequence[Wrote], refused: Sequence[RefusedWrite]) -> None:
        self.outbox = {one.number: one.update for one in outbox}
        self.refused.update((one.id, one) for one in refused)
        numbers = (*self.outbox, *self.refused, self.last_number)
        self.last_number = max(numbers)

    @property
    def updates(self) -> tuple[bytes, ...]:
        """Everything, acknowledged or not, in an order in which it can be applied."""
        return (*self.acknowledged, *self.outbox.values())
