"""One conversation as this device has it: the replica in memory and its log on disk, kept as one.

This module owns the promise that a local write is on disk when its call returns, when a write may
go out, the line between what the relay has acknowledged and what it has not, what becomes of a
refused write, what happens when the disk says no, and when the log is compacted. It must not know
sockets or frames.

The document that is shown is the acknowledged part with the outbox on top: the writes of this
device that the relay has not acknowledged yet, each with what it *meant*. A refused write leaves
clocks that no other replica will ever have. So the document is then built anew from the
acknowledged part, under a fresh client id; the rest of the outbox is written again by what it
meant; and what was refused becomes a draft on this device. One record on disk says all of that.

Everything goes to disk through one queue, in the order in which the replica took it, so that no
update in the log ever builds on one that is missing there. A local write is urgent and takes
whatever waits before it along. Merged updates wait a moment for company: a crash loses at most the
last of them, and the relay has those.

A new write goes to the disk and to the relay at the same time: the relay's own disk takes as long
as ours, and neither need wait for the other. A crash in between loses nothing and doubles nothing:
if the relay took the write, it comes back from there like anybody's, since nothing of it is here;
if not, it never happened, and nobody was told otherwise. No clock gets a second value, since no
process writes under a client id of one before it. And the log is in order: what it says of the
relay stands behind the writes that the relay had to have for it. What is written *again* after a
refusal waits for the disk: with the old form still in the log it would be written once more.

A local write that could not be made durable, and was not sent, never happened: the replica is
thrown away and built anew, under a fresh client id, from the log and from what was merged since.
One that was sent is the relay's to decide about: acknowledged it has happened, and waits for the
disk with what was merged; refused it has not, and needs the disk as before to become a draft. Where
no answer comes any more it goes as if it had not been sent, and the relay's places are forgotten:
the next connection brings all that is not here, and so the write too if it got there.

An update is at any moment in the log, in the queue, or under way from the one to the other. Whoever
reads both holds the lock under which updates change places: else one that is under way is in
neither, the replica is built without it, and the next compaction takes it from the disk too.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from itertools import takewhile
from typing import TYPE_CHECKING, Final

from crdt_llm.document.conversation import EMPTY_STATE_VECTOR, ENTRIES, Conversation
from crdt_llm.document.schema import REDACTION_DELETES
from crdt_llm.errors import Corrupt, CrdtLlmError, LocalMisuse, MalformedMessage, StoreFailed
from crdt_llm.sync.client import intents
from crdt_llm.sync.client.journal import (
    Acknowledged,
    Discarded,
    Drafted,
    Heard,
    Kept,
    Position,
    RefusedWrite,
    Rewrote,
    Whole,
    Wrote,
    decode,
    encode,
)
from crdt_llm.sync.update.structure import brings, find_gap, read_update
from crdt_llm.sync.wire.y_websocket import CLIENT_ID_MAX, decode_state_vector, encode_state_vector

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from random import Random

    from crdt_llm.document.conversation import Change, Writer
    from crdt_llm.store.log import UpdateLog
    from crdt_llm.sync.client.intents import Intent
    from crdt_llm.sync.client.journal import Record
    from crdt_llm.sync.update.structure import Missing, UpdateStructure

logger = logging.getLogger("crdt_llm.sync")

COMMIT_WINDOW_S: Final = 0.2
"""How long merged updates wait for company: a streaming reply costs five commits a second then,
and not one for every few tokens."""

RETRY_S: Final = 5.0
"""How long after a disk said no it is asked again: what was written again after a refusal goes out
once it is on disk, and there may be nothing new to write. Somebody has to make room meanwhile."""

COMMIT_UPDATES_MAX: Final = 1024
"""Updates in one commit: what a second of the busiest conversation brings, many times over."""

COMMIT_BYTES_MAX: Final = 16 * 2**20
"""Bytes in one commit, unless a single update is larger: one transaction has to hold them."""

WAITING_BYTES_MAX: Final = 8 * 2**20
"""Merged bytes that may wait for the disk. Beyond it merging waits, and so does the relay."""

COMPACT_BYTES_MIN: Final = 64 * 2**10
"""A log shorter than this is not worth a compaction: reading it takes a few milliseconds."""

COMPACT_RATIO: Final = 1.0
"""A log longer than so many times its snapshot is compacted: it never doubles what is read at the
next start by more than once, and a byte is rewritten about once for each time the document doubles.
"""

_FORBIDDEN: Final = "forbidden"
"""The rule that says that one may not write here at all: it is broken by all that waits."""


@dataclass(slots=True, eq=False)
class Written:
    """A write of this device that the relay has not acknowledged.

    Attributes:
        number: grows with each write of this replica; written again it has a new one.
        update: its bytes.
        intent: what it meant.
        ends: client -> the first clock after it.
        deletes: it deletes something, which clocks do not tell.
        is_new: it says what was never written before in another form.
        durable: it is on disk.
        is_out: the relay may have it.
    """

    number: int
    update: bytes = field(repr=False)
    intent: Intent
    ends: Mapping[int, int]
    deletes: bool
    is_new: bool = False
    durable: bool = False
    is_out: bool = False

    @property
    def may_go(self) -> bool:
        """Whether others may hear of it."""
        return self.is_new or self.durable

    def is_in(self, clocks: Mapping[int, int]) -> bool:
        """Whether clocks say that whoever has them has this write; if unsure, not."""
        ends = self.ends.items()
        return not self.deletes and all(clocks.get(client, 0) >= end for client, end in ends)


@dataclass(slots=True, eq=False)
class _Waiting:
    """A record on its way to the disk."""

    record: bytes
    local: bool  # it never happened if the disk does not take it, unless the relay did
    numbers: tuple[int, ...] = ()  # writes that are durable with it
    is_relayed: bool = False  # a local write that the relay has: it did happen
    is_refused: bool = False  # by the disk: a local write that waits for the relay's answer
    done: asyncio.Future[None] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )

    def fail(self, error: Exception) -> None:
        if not self.done.done():
            self.done.set_exception(error)
            self.done.exception()  # whoever waited may have been cancelled: no complaint about that

    def succeed(self) -> None:
        if not self.done.done():
            self.done.set_result(None)


class LocalReplica:
    """A replica and its log. Make one with :meth:`open`.

    Args:
        conversation_id: the name it has in the log.
        log: where it lives.
        random: draws client ids.
    """

    def __init__(self, conversation_id: str, log: UpdateLog, random: Random) -> None:
        self.conversation_id = conversation_id
        self._log = log
        self._random = random
        self._clients: set[int] = set()  # every id that was ever drawn for this replica
        self._document = Conversation(self._fresh_client())
        self._stale = True  # the document is not what the log and the queue say: build it anew
        self._acknowledged: dict[int, int] = {}  # client -> first clock that the relay may lack
        self._outbox: dict[int, Written] = {}  # by number, in order
        self._in_flight: set[int] = set()  # what was sent, and an answer may still come
        self._refused: dict[int, RefusedWrite] = {}
        self._last_number = 0
        self._relay_log: str | None = None
        self._relay_lsn = 0
        self._moving = asyncio.Lock()  # held while updates go to the log, or log and queue are read
        self._change_listeners: list[Callable[[Change | None], None]] = []
        self._outbox_listeners: list[Callable[[frozenset[str] | None], None]] = []
        self._write_listeners: list[Callable[[], None]] = []
        self._queue: list[_Waiting] = []
        self._queued_bytes = 0
        self._work = asyncio.Event()  # something waits for the disk
        self._urgent = asyncio.Event()  # and somebody waits for it
        self._lsn = 0  # of our own log
        self._log_bytes = 0
        self._snapshot_bytes = 0
        self._redacted = False  # withdrawn text lies in the log, and maybe in its free pages
        self._disk_said_no = False  # the last time that it was asked
        self._closing = False
        self._keeper: asyncio.Task[None] | None = None

    @classmethod
    async def open(cls, conversation_id: str, log: UpdateLog, random: Random) -> LocalReplica:
        """Load a conversation, or begin an empty one if the log has nothing of it.

        Raises:
            Corrupt: what is stored is not what was written.
            StoreFailed: it could not be read now.
        """
        replica = cls(conversation_id, log, random)
        await replica._mend()
        replica._keeper = asyncio.create_task(
            replica._keep(), name=f"replica file {conversation_id}"
        )
        return replica

    async def close(self) -> None:
        """Bring everything that waits to disk, and stop."""
        self._closing = True
        self._in_flight.clear()  # nobody will say what became of it
        self._work.set()
        self._urgent.set()
        if self._keeper is not None:
            # One caller's cancellation must not tear the last commit apart.
            await asyncio.shield(self._keeper)

    # -- reading -------------------------------------------------------------------------------

    @property
    def document(self) -> Conversation:
        """The replica, for reading. It may be another object after every ``await``."""
        return self._document

    @property
    def is_empty(self) -> bool:
        """Whether nothing is known of this conversation yet."""
        return self._document.state_vector() == EMPTY_STATE_VECTOR

    @property
    def outbox(self) -> tuple[Written, ...]:
        """What the relay has not acknowledged, in order."""
        return tuple(self._outbox.values())

    @property
    def refused_writes(self) -> tuple[RefusedWrite, ...]:
        """What the relay refused, in order, until it is discarded."""
        return tuple(self._refused.values())

    @property
    def position(self) -> tuple[str | None, int]:
        """The relay's log, and up to where in it everything is here."""
        return self._relay_log, self._relay_lsn

    @property
    def acknowledged(self) -> Mapping[int, int]:
        """The clocks of the acknowledged part: client -> first clock that is not in it."""
        return self._acknowledged

    def next_to_send(self, after: int) -> Written | None:
        """The first write with a greater number, if it may go; whoever asks sends it."""
        first = next(iter(self._outbox), 0)
        for number in range(max(after + 1, first), self._last_number + 1):
            written = self._outbox.get(number)
            if written is not None:
                if not written.may_go:
                    return None
                self._send_off((written,))
                return written
        return None

    def _send_off(self, writes: Iterable[Written]) -> None:
        for written in writes:
            written.is_out = True
            self._in_flight.add(written.number)

    def part(self) -> None:
        """No answer comes any more to what was sent until now."""
        self._in_flight.clear()
        if any(item.local for item in self._queue):
            # What only waits for an answer is the disk's to decide now.
            self._work.set()
            self._urgent.set()

    def on_change(self, listener: Callable[[Change | None], None]) -> None:
        """Call ``listener`` after every change; with ``None`` when the replica was built anew."""
        self._change_listeners.append(listener)

    def on_outbox(self, listener: Callable[[frozenset[str] | None], None]) -> None:
        """Call ``listener`` with the entries of writes that became durable or were acknowledged.

        With ``None`` it is called when others, with new numbers, took the place of the outbox.
        """
        self._outbox_listeners.append(listener)

    def on_write(self, listener: Callable[[], None]) -> None:
        """Call ``listener`` when something was written that may go out."""
        self._write_listeners.append(listener)

    async def diff(self, state_vector: bytes = EMPTY_STATE_VECTOR) -> tuple[bytes, tuple[int, ...]]:
        """All that a replica with ``state_vector`` lacks, and the numbers of the writes in it.

        Of our own it holds only what may go out; whoever asks sends it.

        Raises:
            MalformedMessage: the bytes are no state vector.
            StoreFailed: the replica had to be built anew, and that failed.
        """
        while True:
            await self._ready()
            held = {number for number, one in self._outbox.items() if not one.may_go}
            waits = [item.done for item in self._queue if not held.isdisjoint(item.numbers)]
            if not waits:
                self._send_off(self._outbox.values())
                return self._document.diff(state_vector), tuple(self._outbox)
            await asyncio.wait(waits)

    async def acknowledged_diff(self, state_vector: bytes) -> bytes:
        """What a replica with ``state_vector`` lacks of the acknowledged part.

        Raises:
            StoreFailed: it cannot be read from the disk now.
            Corrupt: what is stored is not what was written.
        """
        await self._ready()
        if not self._outbox:
            return self._document.diff(state_vector)
        async with self._moving:
            kept = Kept.of(await self._log.load(self.conversation_id))
            for item in self._queue:
                kept.take(decode(item.record))
            return self._applied(kept.acknowledged).diff(state_vector)

    # -- writing -------------------------------------------------------------------------------

    async def write(
        self,
        compose: Callable[[Conversation, Writer], None],
        check: Callable[[Change, Conversation], None] | None = None,
    ) -> None:
        """Write in one transaction; returns when it is on disk, or if that fails, at the relay.

        Args:
            compose: writes; it is given the document as it is at that moment, and may not wait.
            check: looks at what was written, and at the document with it; if it raises, nothing
                was written.

        Raises:
            StoreFailed: it is not on disk, and is not in the replica any more. If it was sent and
                the connection ended before the answer, the relay may have it.
        """
        await self._ready()
        try:
            change = self._written(compose)
            if check is not None and change is not None:
                check(change, self._document)
        except BaseException:
            # The library keeps what was written until then.
            self._stale = True
            await self._mend()
            raise
        if change is None or change.is_empty:
            return
        written = self._add(change, is_new=True)
        item = self._put(
            Wrote(written.number, written.update), local=True, numbers=(written.number,)
        )
        for listener in self._write_listeners:
            listener()
        self._urgent.set()
        # Cancelled, the caller does not hear the end of it; what was written stays written.
        await asyncio.shield(item.done)

    def _written(self, compose: Callable[[Conversation, Writer], None]) -> Change | None:
        with self._document.writing() as writer:
            compose(self._document, writer)
        return writer.change

    def _add(self, change: Change, *, is_new: bool = False) -> Written:
        self._last_number += 1
        written = _of(self._last_number, change.update, intents.intent_of(change))
        written.is_new = is_new
        self._outbox[written.number] = written
        return written

    async def merge(self, update: bytes, lsn: int = 0) -> Missing | None:
        """Merge what the relay sent: it is durable there, so it is acknowledged.

        Args:
            update: a Yjs update.
            lsn: with it, everything up to here in the relay's log is here.

        Returns:
            ``None``, or what it builds on that is not here; then nothing was merged.

        Raises:
            MalformedMessage: it is no update.
            TooLarge: it is over a limit.
            StoreFailed: too much waits for a disk that does not take it.
        """
        await self._ready()
        structure = read_update(update)
        missing = find_gap(structure, self._acknowledged)
        if missing is not None:
            missing = self._acknowledge_below(structure)
            if missing is not None:
                return missing
        try:
            self._document.apply(update)
        except MalformedMessage:
            self._stale = True
            await self._mend()
            raise
        self._relay_lsn = max(self._relay_lsn, lsn)
        if not (structure.deleted or brings(structure, self._acknowledged)):
            return None
        _raise_to(self._acknowledged, structure.ends)
        item = self._put(Heard(update, lsn), local=False)
        self._acknowledge_known()
        if self._queued_bytes > WAITING_BYTES_MAX:
            self._urgent.set()
            await asyncio.shield(item.done)
        return None

    def _acknowledge_below(self, structure: UpdateStructure) -> Missing | None:
        """Find the writes of ours that an update from the relay builds on: it must have them."""
        clocks = dict(self._acknowledged)
        for written in self._outbox.values():
            if written.durable or written.is_out:
                _raise_to(clocks, written.ends)
        missing = find_gap(structure, clocks)
        if missing is not None:
            return missing
        clocks, numbers = dict(self._acknowledged), []
        for written in self._outbox.values():
            if find_gap(structure, clocks) is None:
                break
            _raise_to(clocks, written.ends)
            numbers.append(written.number)
        self.acknowledge(numbers)
        return None

    def _acknowledge_known(self) -> None:
        """Take out of the outbox what has come back from the relay."""
        known = [one.number for one in self._outbox.values() if one.is_in(self._acknowledged)]
        if known:
            self.acknowledge(known)

    def acknowledge(self, numbers: Iterable[int]) -> None:
        """The relay has these writes of ours. Those that are not in the outbox are ignored."""
        taken = [self._outbox.pop(number) for number in numbers if number in self._outbox]
        if not taken:
            return
        for written in taken:
            _raise_to(self._acknowledged, written.ends)
            self._in_flight.discard(written.number)
        self._keep_relayed({written.number for written in taken})
        self._put(Acknowledged(tuple(written.number for written in taken)), local=False)
        self._tell_outbox(taken)

    def _keep_relayed(self, numbers: set[int]) -> None:
        """What the relay has did happen, whatever our disk says."""
        for item in self._queue:
            if item.local and not numbers.isdisjoint(item.numbers):
                item.local, item.is_relayed = False, True
                if item.is_refused:
                    item.succeed()

    def settle(self, log: str | None, lsn: int) -> None:
        """From here on the relay's LSNs are of this log, and everything up to ``lsn`` is here.

        Without a log the position is forgotten: the state vector tells the relay what is here.
        """
        if (log, lsn) != (self._relay_log, self._relay_lsn):
            self._relay_log, self._relay_lsn = log, lsn
            self._put(Position(log, lsn), local=False)

    # -- refusals ------------------------------------------------------------------------------

    async def refuse(self, numbers: Iterable[int], code: str, rule: str, reason: str) -> None:
        """Take writes of ours back: the relay refused them as one.

        The document is built anew without them, all that waited behind them is written again, and
        what they said becomes a draft. If they were several, which one it was is not known: they
        are written again one by one, and nothing is refused yet.

        Raises:
            StoreFailed: the log cannot be read now; nothing has changed.
            Corrupt: it is damaged.
        """
        async with self._moving:
            if self._stale:
                await self._build()
            kept = Kept.of(await self._log.load(self.conversation_id))
            for item in self._queue:
                kept.take(decode(item.record))
            culprits = [number for number in numbers if number in self._outbox]
            if not culprits:
                return
            self._rewrite(kept, culprits, code, rule, reason)

    def _rewrite(self, kept: Kept, culprits: list[int], code: str, rule: str, reason: str) -> None:
        """Build the document and the outbox anew; the caller holds the lock."""
        before, pending = self.outbox, [item for item in self._queue if item.local]
        waiting = {number for item in pending for number in item.numbers}
        joined = tuple(edit for number in culprits for edit in self._outbox[number].intent)
        is_known = len(intents.split(joined)) == 1
        self._document = self._applied(kept.acknowledged)
        self._stale = False
        self._outbox.clear()
        gone: dict[str, str] = {}
        # What became of the writes, by their old numbers.
        refused: dict[int, RefusedWrite] = {}
        again: dict[int, Written | None] = {}
        for written in before:
            is_culprit, is_waiting = written.number in culprits, written.number in waiting
            if is_culprit and not is_known and not is_waiting:
                for part in intents.split(written.intent):
                    self._write_again(part)
                continue
            is_hopeless = rule == _FORBIDDEN and not is_waiting
            intent, adds = written.intent, intents.entries_of(written.intent)
            left = intents.without(intent, gone)
            # A request for a reply to what is refused goes with it.
            is_orphan = bool(adds) and not intents.entries_of(left)
            if (is_culprit and is_known) or is_hopeless or is_orphan:
                self._last_number += 1
                draft = RefusedWrite(self._last_number, code, rule, reason, intent)
                refused[written.number] = draft
                gone |= adds
            else:
                again[written.number] = self._write_again(left)
        self._document.subscribe(self._changed)
        self._refused |= {one.id: one for one in refused.values()}
        self._queue_rewritten(pending, again, refused)
        logger.info(
            "conversation %s: %d writes refused (%s: %s), %d left",
            self.conversation_id,
            len(refused),
            code,
            reason,
            len(self._outbox),
        )
        for listener in self._change_listeners:
            listener(None)
        self._tell_outbox(None)

    def _write_again(self, intent: Intent) -> Written | None:
        change = self._written(lambda document, writer: intents.write(intent, document, writer))
        return None if change is None or change.is_empty else self._add(change)

    def _queue_rewritten(
        self,
        pending: list[_Waiting],
        again: Mapping[int, Written | None],
        refused: Mapping[int, RefusedWrite],
    ) -> None:
        """Queue the record of a new outbox, and behind it what still waits as a local write.

        If the disk refuses one of those, it never happened, as what it was or as a draft; what was
        on disk is there anyway.
        """
        waiting = {number for item in pending for number in item.numbers}
        later = {written.number for n in waiting if (written := again.get(n)) is not None}
        kept = [written for written in self._outbox.values() if written.number not in later]
        drafts = tuple(draft for number, draft in refused.items() if number not in waiting)
        self._queue = [item for item in self._queue if not item.local]
        rewrote = Rewrote(tuple(Wrote(one.number, one.update) for one in kept), drafts)
        self._put(rewrote, local=False, numbers=tuple(one.number for one in kept))
        for item in pending:
            for number in item.numbers:  # one; none if an earlier refusal took it
                written, draft = again.get(number), refused.get(number)
                record: Record = Acknowledged(())  # nothing is left of it
                if written is not None:
                    record = Wrote(written.number, written.update)
                elif draft is not None:
                    record = Drafted(draft)
                item.record = encode(record)
                item.numbers = () if written is None else (written.number,)
            self._queue.append(item)
        self._queued_bytes = sum(len(item.record) for item in self._queue)
        self._urgent.set()

    async def discard(self, refused: int) -> None:
        """Forget a refused write; one that is not there is forgotten already.

        Raises:
            StoreFailed: it may be there again after a restart.
        """
        if self._refused.pop(refused, None) is not None:
            item = self._put(Discarded(refused), local=False)
            self._tell_outbox(frozenset())
            self._urgent.set()
            await asyncio.shield(item.done)

    def _put(self, record: Record, *, local: bool, numbers: tuple[int, ...] = ()) -> _Waiting:
        item = _Waiting(encode(record), local, numbers)
        self._queue.append(item)
        self._queued_bytes += len(item.record)
        self._work.set()
        return item

    def _tell_outbox(self, writes: Iterable[Written] | None) -> None:
        entries = None
        if writes is not None:
            entries = frozenset(entry for one in writes for entry in intents.entries_of(one.intent))
        for listener in self._outbox_listeners:
            listener(entries)

    # -- the replica ---------------------------------------------------------------------------

    def _fresh_client(self) -> int:
        while True:
            client = self._random.randint(1, CLIENT_ID_MAX)
            if client not in self._clients:
                self._clients.add(client)
                return client

    async def _ready(self) -> None:
        if self._stale:
            await self._mend()
        if self._closing:
            raise LocalMisuse(f"conversation {self.conversation_id} is closed on this device")

    async def _mend(self) -> None:
        """Build the replica anew, unless somebody else did it meanwhile."""
        async with self._moving:
            if self._stale:
                await self._build()

    async def _build(self) -> None:
        """Build the replica from the log and what waits for it; the caller holds the lock."""
        loaded = await self._log.load(self.conversation_id)
        kept = Kept.of(loaded)
        on_disk = frozenset(kept.outbox)
        for item in self._queue:
            kept.take(decode(item.record))
        for update in kept.outbox.values():
            self._clients.update(read_update(update).structs)
        document = self._applied(kept.acknowledged)
        self._lsn = loaded.lsn
        self._log_bytes = sum(len(update) for _, update in loaded.updates)
        self._snapshot_bytes = len(loaded.snapshot or b"")
        self._relay_log, self._relay_lsn = kept.log, kept.lsn
        self._acknowledged = decode_state_vector(document.state_vector())
        self._refused = dict(kept.refused)
        self._last_number = max(self._last_number, kept.last_number)
        self._outbox = self._outbox_of(document, kept, on_disk)
        document.subscribe(self._changed)
        self._document = document
        self._stale = False
        for listener in self._change_listeners:
            listener(None)

    def _outbox_of(
        self, document: Conversation, kept: Kept, on_disk: frozenset[int]
    ) -> dict[int, Written]:
        """Put the writes that wait onto a document of the acknowledged part."""
        outbox: dict[int, Written] = {}
        for number, update in kept.outbox.items():
            change = self._apply(document, update)
            self._redacted |= _withdraws(change)
            known = self._outbox.get(number)
            if known is not None and known.update == update:
                outbox[number] = known
            else:
                outbox[number] = _of(number, update, intents.intent_of(change))
                outbox[number].durable = number in on_disk
        return outbox

    def _applied(self, updates: Iterable[bytes]) -> Conversation:
        """A document of its own, under a client id that nobody ever wrote under."""
        document = Conversation(self._fresh_client())
        for update in updates:
            # Whoever wrote it was killed before the text was gone from the disk.
            self._redacted |= _withdraws(self._apply(document, update))
        if document.client_id in decode_state_vector(document.state_vector()):
            return self._applied((document.diff(),))  # once in four billion times
        return document

    def _apply(self, document: Conversation, update: bytes) -> Change:
        try:
            return document.apply(update)
        except MalformedMessage as error:
            raise Corrupt(
                f"the stored replica of conversation {self.conversation_id} cannot be read;"
                " move the file away, and the conversation comes back from the relay"
            ) from error

    def _changed(self, change: Change) -> None:
        self._redacted |= _withdraws(change)
        for listener in self._change_listeners:
            listener(change)

    # -- the log -------------------------------------------------------------------------------

    async def _keep(self) -> None:
        """Carry what waits to the disk, until closed."""
        try:
            await self._keep_up()
        except BaseException:
            # A bug of ours. Nobody may wait for a disk that nobody writes to.
            self._closing = True
            for item in self._queue:
                item.fail(StoreFailed(f"conversation {self.conversation_id} cannot be saved"))
            raise

    async def _keep_up(self) -> None:
        async with self._moving:
            await self._compact_if_due()
        while not (self._closing and not self._queue):
            # What is in the queue here was not taken by the disk.
            is_new = await _set_within(RETRY_S if self._queue else None, self._work)
            if is_new and not self._urgent.is_set():
                # If nobody waits, whatever came together meanwhile goes now.
                await _set_within(COMMIT_WINDOW_S, self._urgent)
            self._work.clear()
            self._urgent.clear()
            while self._queue:
                if not await self._commit():
                    break
            if self._closing:
                return

    async def _commit(self) -> bool:
        """Carry one batch to the disk; whether that worked."""
        async with self._moving:
            batch = self._batch()
            try:
                self._lsn = await self._log.append(
                    self.conversation_id, [item.record for item in batch]
                )
            except CrdtLlmError as error:
                await self._give_up(error)
                return False
            self._disk_said_no = False
            del self._queue[: len(batch)]
            durable: list[Written] = []
            for item in batch:
                self._queued_bytes -= len(item.record)
                self._log_bytes += len(item.record)
                durable += [self._outbox[n] for n in item.numbers if n in self._outbox]
                item.succeed()
            for written in durable:
                written.durable = True
            if durable:
                self._tell_outbox(durable)
            await self._compact_if_due()
            return True

    def _batch(self) -> list[_Waiting]:
        size = 0

        def fits(item: _Waiting) -> bool:
            nonlocal size
            size += len(item.record)
            return size <= COMMIT_BYTES_MAX

        return list(takewhile(fits, self._queue[:COMMIT_UPDATES_MAX])) or self._queue[:1]

    async def _give_up(self, error: CrdtLlmError) -> None:
        """The disk says no: local writes never happened, what was merged waits for another try.

        The caller holds the lock.
        """
        lost = [item for item in self._queue if item.local and not self._is_in_flight(item)]
        gone = frozenset(map(id, lost))
        kept = [item for item in self._queue if id(item) not in gone]
        # It is asked again and again: once is enough to be told of a disk that is full for hours.
        logger.log(
            logging.WARNING if lost or not self._disk_said_no else logging.DEBUG,
            "conversation %s: %d local writes lost, %d updates wait: %s",
            self.conversation_id,
            len(lost),
            len(kept),
            error,
        )
        self._disk_said_no = True
        self._queue = self._left(gone)
        for number in (number for item in lost for number in item.numbers):
            self._outbox.pop(number, None)  # at once: from here on nobody may send it any more
        for record in (decode(item.record) for item in lost):
            if isinstance(record, Drafted):
                self._refused.pop(record.refused.id, None)
        self._queued_bytes = sum(len(item.record) for item in self._queue)
        if lost:
            self._stale = True
            try:
                await self._build()
            except (StoreFailed, Corrupt) as again:
                # Whoever uses the replica next tries again, and hears of it if that fails too.
                logger.warning("conversation %s: %s", self.conversation_id, again)
        for item in lost:
            item.fail(error)
        for item in kept:
            if item.is_relayed:
                item.succeed()
            elif not item.local:  # who waits for room hears of it
                item.fail(error)

    def _left(self, gone: frozenset[int]) -> list[_Waiting]:
        """The queue without some of it."""
        left: list[_Waiting] = []
        is_unsure = False
        for item in self._queue:
            if id(item) not in gone:
                if not (is_unsure and isinstance(decode(item.record), Position)):
                    left.append(_waiting_on(item))
            elif not is_unsure and any(one.is_out for one in self._writes_of((item,))):
                # The relay may have it, and may say behind it that all up to a place is here.
                left.append(_Waiting(encode(Position(None, 0)), local=False))
                is_unsure = True
        return left

    def _is_in_flight(self, item: _Waiting) -> bool:
        return not self._in_flight.isdisjoint(item.numbers)

    def _writes_of(self, items: Iterable[_Waiting]) -> Iterator[Written]:
        numbers = (number for item in items for number in item.numbers)
        return (self._outbox[number] for number in numbers if number in self._outbox)

    # -- compaction ----------------------------------------------------------------------------

    async def _compact_if_due(self) -> None:
        """Fold the log into a snapshot, if that is worth it; the caller holds the lock."""
        due = self._log_bytes > max(COMPACT_BYTES_MIN, COMPACT_RATIO * self._snapshot_bytes)
        # With something in the queue the document is ahead of the log: the next commit will see.
        if not (due or self._redacted) or self._queue or self._stale:
            return
        scrub = self._redacted
        try:
            snapshot = await self._snapshot()
            if snapshot is None:
                return
            await self._log.compact(self.conversation_id, snapshot, self._lsn)
            self._log_bytes, self._snapshot_bytes = 0, len(snapshot)
            if scrub:
                await self._log.scrub()
                self._redacted = False
        except (StoreFailed, Corrupt) as error:
            # Nothing is lost by a long log. After the next commit it is tried again.
            logger.warning("conversation %s was not compacted: %s", self.conversation_id, error)

    async def _snapshot(self) -> bytes | None:
        """All of it in one record, without what was withdrawn; ``None`` if that has to wait."""
        if self._outbox:
            kept = Kept.of(await self._log.load(self.conversation_id))
            if self._queue or self._stale:
                return None  # somebody wrote meanwhile: after the next commit
            redacted = frozenset(filter(self._is_redacted, self._document.tree.entries))
            acknowledged = self._applied(kept.acknowledged)
            with acknowledged.writing() as writer:
                for entry in redacted & set(acknowledged.tree.entries):
                    writer.clear(entry)
            self._join_withdrawn(redacted)
            update = acknowledged.diff()
        else:
            update = self._document.diff()
        return encode(
            Whole(
                update,
                self._relay_log,
                self._relay_lsn,
                tuple(Wrote(one.number, one.update) for one in self._outbox.values()),
                tuple(self._refused.values()),
                self._last_number,
            )
        )

    def _is_redacted(self, entry: str) -> bool:
        return self._document.has(entry, "redacted")

    def _join_withdrawn(self, redacted: frozenset[str]) -> None:
        """Let go of text that was withdrawn before the relay acknowledged it.

        The clocks of a write may have arrived there, so they must stay what they are; its text goes
        when the document's own form of it is sent instead, for all that waits as one.
        """
        waiting = tuple(edit for one in self._outbox.values() for edit in one.intent)
        if not any(
            isinstance(edit, intents.Add) and edit.entry in redacted and edit.content is not None
            for edit in waiting
        ):
            return
        update = self._document.diff(encode_state_vector(self._acknowledged))
        self._last_number += 1
        joined = _of(self._last_number, update, intents.withdrawn(waiting, redacted))
        joined.durable = True
        self._outbox = {joined.number: joined}
        self._tell_outbox(None)


async def _set_within(seconds: float | None, event: asyncio.Event) -> bool:
    """Wait for an event, but not for longer; whether it came."""
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return False
    return True


def _waiting_on(item: _Waiting) -> _Waiting:
    """What goes on waiting for a disk that did not take it: an update, with nobody waiting for it.

    Only who waits for a write that is on its way to the relay goes on waiting too, for the answer.
    """
    item.is_refused = item.local
    return item if item.local else _Waiting(item.record, local=False, numbers=item.numbers)


def _of(number: int, update: bytes, intent: Intent) -> Written:
    structure = read_update(update)
    return Written(number, update, intent, structure.ends, bool(structure.deleted))


def _raise_to(clocks: dict[int, int], ends: Mapping[int, int]) -> None:
    for client, end in ends.items():
        clocks[client] = max(clocks.get(client, 0), end)


def _withdraws(change: Change) -> bool:
    """Whether text was withdrawn, or what a withdrawal had met on its way was cleared away.

    A salt that was written beside the withdrawal comes with it, and goes with the node's next word:
    until it has left the disk too, a short secret can be guessed.
    """
    return any(
        (edit.key == "redacted" and edit.new is not None)
        or (edit.action == "delete" and edit.root == ENTRIES and edit.key in REDACTION_DELETES)
        for edit in change.edits
    )
