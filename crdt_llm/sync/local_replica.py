"""One conversation as this device has it: the replica in memory and its log on disk, kept as one.

This module owns the promise that a local write is on disk before anyone hears of it, the order of
what goes to disk, what happens when the disk says no, and when the log is compacted. It must not
know sockets, the dialect, or what a write means.

Everything goes to disk through one queue, in the order in which the replica took it, so that no
update in the log ever builds on one that is missing there. A local write is urgent and takes
whatever waits before it along. Merged updates wait a moment for company: a crash loses at most the
last of them, and the relay has those.

A local write that could not be made durable never happened: the replica is thrown away and built
anew, under a fresh client id, from the log and from what was merged since. Nobody else had seen it.

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

from crdt_llm.document.conversation import EMPTY_STATE_VECTOR, Conversation
from crdt_llm.errors import Corrupt, CrdtLlmError, LocalMisuse, MalformedMessage, StoreFailed
from crdt_llm.sync.structure import find_gap, read_update
from crdt_llm.sync.wire import CLIENT_ID_MAX, decode_state_vector

if TYPE_CHECKING:
    from collections.abc import Callable
    from random import Random

    from crdt_llm.document.conversation import Change, Writer
    from crdt_llm.store.log import Loaded, UpdateLog
    from crdt_llm.sync.structure import Missing

logger = logging.getLogger("crdt_llm.sync")

COMMIT_WINDOW_S: Final = 0.2
"""How long merged updates wait for company: a streaming reply costs five commits a second then,
and not one for every few tokens."""

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


@dataclass(frozen=True, slots=True)
class _Waiting:
    """An update on its way to the disk."""

    update: bytes
    local: bool
    done: asyncio.Future[None] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )

    def fail(self, error: Exception) -> None:
        self.done.set_exception(error)
        self.done.exception()  # whoever waited may have been cancelled: no complaint about that


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
        self._moving = asyncio.Lock()  # held while updates go to the log, or log and queue are read
        self._change_listeners: list[Callable[[Change | None], None]] = []
        self._durable_listeners: list[Callable[[bytes], None]] = []
        self._queue: list[_Waiting] = []
        self._queued_bytes = 0
        self._work = asyncio.Event()  # something waits for the disk
        self._urgent = asyncio.Event()  # and somebody waits for it
        self._lsn = 0
        self._log_bytes = 0
        self._snapshot_bytes = 0
        self._redacted = False  # withdrawn text lies in the log, and maybe in its free pages
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

    def on_change(self, listener: Callable[[Change | None], None]) -> None:
        """Call ``listener`` after every change; with ``None`` when the replica was built anew."""
        self._change_listeners.append(listener)

    def on_durable(self, listener: Callable[[bytes], None]) -> None:
        """Call ``listener`` with every local write, in order, once it is on disk."""
        self._durable_listeners.append(listener)

    async def diff(self, state_vector: bytes = EMPTY_STATE_VECTOR) -> bytes:
        """All that a replica with ``state_vector`` lacks. Holds only what is on disk of our own.

        Raises:
            MalformedMessage: the bytes are no state vector.
            StoreFailed: the replica had to be built anew, and that failed.
        """
        while True:
            await self._ready()
            writes = [item.done for item in self._queue if item.local]
            if not writes:
                return self._document.diff(state_vector)
            await asyncio.wait(writes)

    # -- writing -------------------------------------------------------------------------------

    async def write(
        self,
        compose: Callable[[Conversation, Writer], None],
        check: Callable[[Change, Conversation], None] | None = None,
    ) -> None:
        """Write in one transaction; returns when it is on disk.

        Args:
            compose: writes; it is given the document as it is at that moment, and may not wait.
            check: looks at what was written, and at the document with it; if it raises, nothing
                was written.

        Raises:
            StoreFailed: it is not on disk, and is not in the replica any more.
        """
        await self._ready()
        try:
            with self._document.writing() as writer:
                compose(self._document, writer)
            change = writer.change
            if check is not None and change is not None:
                check(change, self._document)
        except BaseException:
            # The library keeps what was written until then.
            self._stale = True
            await self._mend()
            raise
        if change is None or change.is_empty:
            return
        item = self._put(change.update, local=True)
        self._urgent.set()
        # Cancelled, the caller does not hear the end of it; what was written stays written.
        await asyncio.shield(item.done)

    async def merge(self, update: bytes) -> Missing | None:
        """Merge an update from the relay.

        Returns:
            ``None``, or what it builds on that is not here; then nothing was merged.

        Raises:
            MalformedMessage: it is no update.
            TooLarge: it is over a limit.
            StoreFailed: too much waits for a disk that does not take it.
        """
        await self._ready()
        structure = read_update(update)
        missing = find_gap(structure, decode_state_vector(self._document.state_vector()))
        if missing is not None:
            return missing
        try:
            change = self._document.apply(update)
        except MalformedMessage:
            self._stale = True
            await self._mend()
            raise
        if change.is_empty:
            return None
        item = self._put(change.update, local=False)
        if self._queued_bytes > WAITING_BYTES_MAX:
            self._urgent.set()
            await asyncio.shield(item.done)
        return None

    def _put(self, update: bytes, *, local: bool) -> _Waiting:
        item = _Waiting(update, local)
        self._queue.append(item)
        self._queued_bytes += len(update)
        self._work.set()
        return item

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
        document = self._built(loaded)
        while document.client_id in decode_state_vector(document.state_vector()):
            document = self._built(loaded)  # once in four billion times
        self._lsn = loaded.lsn
        self._log_bytes = sum(len(update) for _, update in loaded.updates)
        self._snapshot_bytes = len(loaded.snapshot or b"")
        document.subscribe(self._changed)
        self._document = document
        self._stale = False
        for listener in self._change_listeners:
            listener(None)

    def _built(self, loaded: Loaded) -> Conversation:
        document = Conversation(self._fresh_client())
        try:
            if loaded.snapshot is not None:
                document.apply(loaded.snapshot)
            for _, update in loaded.updates:
                # Whoever wrote it was killed before the text was gone from the disk.
                self._redacted |= _withdraws(document.apply(update))
        except MalformedMessage as error:
            raise Corrupt(
                f"the stored replica of conversation {self.conversation_id} cannot be read;"
                " move the file away, and the conversation comes back from the relay"
            ) from error
        for item in self._queue:
            document.apply(item.update)
        return document

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
            await self._work.wait()
            if not self._urgent.is_set():
                try:
                    async with asyncio.timeout(COMMIT_WINDOW_S):
                        await self._urgent.wait()
                except TimeoutError:
                    pass  # nobody waits: whatever came together meanwhile goes now
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
                    self.conversation_id, [item.update for item in batch]
                )
            except CrdtLlmError as error:
                await self._give_up(error)
                return False
            del self._queue[: len(batch)]
            for item in batch:
                self._queued_bytes -= len(item.update)
                self._log_bytes += len(item.update)
                if item.local:
                    for listener in self._durable_listeners:
                        listener(item.update)
                item.done.set_result(None)
            await self._compact_if_due()
            return True

    def _batch(self) -> list[_Waiting]:
        size = 0

        def fits(item: _Waiting) -> bool:
            nonlocal size
            size += len(item.update)
            return size <= COMMIT_BYTES_MAX

        return list(takewhile(fits, self._queue[:COMMIT_UPDATES_MAX])) or self._queue[:1]

    async def _give_up(self, error: CrdtLlmError) -> None:
        """The disk says no: local writes never happened, what was merged waits for another try.

        The caller holds the lock.
        """
        lost = [item for item in self._queue if item.local]
        kept = [item for item in self._queue if not item.local]
        logger.warning(
            "conversation %s: %d local writes lost, %d merged updates wait: %s",
            self.conversation_id,
            len(lost),
            len(kept),
            error,
        )
        # Those who wait for room hear of it; the updates themselves stay, with nobody waiting.
        self._queue = [_Waiting(item.update, local=False) for item in kept]
        self._queued_bytes = sum(len(item.update) for item in kept)
        if lost:
            self._stale = True
            try:
                await self._build()
            except (StoreFailed, Corrupt) as again:
                # Whoever uses the replica next tries again, and hears of it if that fails too.
                logger.warning("conversation %s: %s", self.conversation_id, again)
        for item in (*lost, *kept):
            item.fail(error)

    async def _compact_if_due(self) -> None:
        """Fold the log into a snapshot, if that is worth it; the caller holds the lock."""
        due = self._log_bytes > max(COMPACT_BYTES_MIN, COMPACT_RATIO * self._snapshot_bytes)
        # With something in the queue the document is ahead of the log: the next commit will see.
        if not (due or self._redacted) or self._queue or self._stale:
            return
        snapshot, scrub = self._document.diff(), self._redacted
        try:
            await self._log.compact(self.conversation_id, snapshot, self._lsn)
            self._log_bytes, self._snapshot_bytes = 0, len(snapshot)
            if scrub:
                await self._log.scrub()
                self._redacted = False
        except (StoreFailed, Corrupt) as error:
            # Nothing is lost by a long log. After the next commit it is tried again.
            logger.warning("conversation %s was not compacted: %s", self.conversation_id, error)


def _withdraws(change: Change) -> bool:
    return any(edit.key == "redacted" and edit.new is not None for edit in change.edits)
