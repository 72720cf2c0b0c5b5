"""An update log without a disk, for simulations: the same contract, deterministic, crashes on call.

It owns an explicit line between what is durable (:class:`MemoryDisk`, which survives) and what a
crash loses (:class:`MemoryLog`, one process's view of it). It must not use threads, clocks or
randomness of its own: how long a commit takes, whether it fails and when the crash comes are the
caller's, so a seed replays. It is no cache and no store for real conversations.

A commit passes two seams, both awaited: before the first nothing of it is durable, after it all of
it is, and only after the second does anybody hear of it. A crash while it waits at the second
leaves updates that are durable and were never acknowledged, just as a real one can.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, Self

from crdt_llm.errors import LocalMisuse, StoreFailed
from crdt_llm.store.budget import ByteBudget
from crdt_llm.store.log import Limits, Loaded, Status, Stored, check_compaction

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from crdt_llm.store.log import Clock

    MemoryFaults = Callable[["MemorySeam"], Awaitable[None]]

MemorySeam = Literal["before-commit", "after-commit"]
"""Where ``faults`` is awaited. What it raises at the first makes the commit fail."""


async def _instant(_seam: MemorySeam) -> None:
    """Take no time and never fail."""


@dataclass(frozen=True, slots=True)
class _Conversation:
    snapshot: bytes | None
    snapshot_lsn: int
    updates: tuple[bytes, ...]
    changed_at: int

    @property
    def lsn(self) -> int:
        return self.snapshot_lsn + len(self.updates)


@dataclass(slots=True)
class MemoryDisk:
    """What survives a crash. It is changed in one step per commit, so it is never half written.

    Attributes:
        log_id: the log's random name.
        conversations: what is durable, by name.
        floors: where the numbering of a deleted conversation goes on if it comes back.
    """

    log_id: str
    conversations: dict[str, _Conversation] = field(default_factory=dict)
    floors: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Append:
    conversation: str
    updates: tuple[bytes, ...]
    update_bytes: int
    at_ms: int
    done: asyncio.Future[int]


@dataclass(frozen=True, slots=True)
class _Change:
    """A commit of its own: a compaction, a deletion, or nothing at all (a probe)."""

    apply: Callable[[], None]
    size: int
    done: asyncio.Future[None]


class MemoryLog:
    """An :class:`~crdt_llm.store.log.UpdateLog` on a :class:`MemoryDisk`.

    Args:
        disk: what is there already, and what will be left. One log at a time.
        clock: milliseconds since 1970, asked once per append.
        faults: awaited at each :data:`MemorySeam`.
        limits: what it accepts.
    """

    def __init__(
        self,
        disk: MemoryDisk,
        *,
        clock: Clock,
        faults: MemoryFaults = _instant,
        limits: Limits | None = None,
    ) -> None:
        self._disk = disk
        self._clock = clock
        self._faults = faults
        self._limits = limits or Limits()
        self._budget = ByteBudget(self._limits.queued_bytes_max)
        self._queue: deque[_Append | _Change] = deque()
        self._in_flight: tuple[_Append | _Change, ...] = ()
        self._writer: asyncio.Task[None] | None = None
        self._failure: str | None = None
        self._closed = False

    async def __aenter__(self) -> Self:
        """Return the log itself."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close it."""
        await self.close()

    @property
    def log_id(self) -> str:
        """See :class:`~crdt_llm.store.log.UpdateLog`."""
        return self._disk.log_id

    @property
    def status(self) -> Status:
        """See :class:`~crdt_llm.store.log.UpdateLog`."""
        return Status(self._failure)

    async def append(self, conversation: str, updates: Sequence[bytes]) -> int:
        """See :class:`~crdt_llm.store.log.UpdateLog`."""
        self._check_open()
        self._limits.check_append(conversation, updates)
        append = _Append(
            conversation,
            tuple(bytes(update) for update in updates),
            sum(len(update) for update in updates),
            self._clock(),
            asyncio.get_running_loop().create_future(),
        )
        await self._hand_over(append, append.update_bytes)
        return await append.done

    async def load(self, conversation: str) -> Loaded:
        """See :class:`~crdt_llm.store.log.UpdateLog`."""
        self._check_open()
        self._limits.check_conversation(conversation)
        stored = self._disk.conversations.get(conversation)
        if stored is None:
            return Loaded(None, self._disk.floors.get(conversation, 0), ())
        updates = enumerate(stored.updates, stored.snapshot_lsn + 1)
        return Loaded(stored.snapshot, stored.snapshot_lsn, tuple(updates))

    async def compact(self, conversation: str, snapshot: bytes, through: int) -> None:
        """See :class:`~crdt_llm.store.log.UpdateLog`."""
        self._check_open()
        snapshot = bytes(snapshot)
        self._limits.check_snapshot(conversation, snapshot)
        await self._change(
            lambda: self._apply_snapshot(conversation, snapshot, through), len(snapshot)
        )

    async def conversations(self) -> tuple[Stored, ...]:
        """See :class:`~crdt_llm.store.log.UpdateLog`."""
        self._check_open()
        stored = [
            Stored(
                name,
                one.lsn,
                sum(len(update) for update in one.updates),
                len(one.snapshot or b""),
                one.changed_at,
            )
            for name, one in self._disk.conversations.items()
        ]
        return tuple(sorted(stored, key=lambda item: (-item.changed_at, item.conversation)))

    async def delete(self, conversation: str) -> None:
        """See :class:`~crdt_llm.store.log.UpdateLog`."""
        self._check_open()
        self._limits.check_conversation(conversation)
        await self._change(lambda: self._apply_deletion(conversation))

    async def scrub(self) -> None:
        """See :class:`~crdt_llm.store.log.UpdateLog`; there is nothing to wipe."""
        await self._change(lambda: None)

    async def probe(self) -> Status:
        """See :class:`~crdt_llm.store.log.UpdateLog`."""
        try:
            await self._change(lambda: None)
        except StoreFailed as error:
            return Status(str(error))
        return self.status

    async def close(self) -> None:
        """See :class:`~crdt_llm.store.log.UpdateLog`."""
        self._closed = True
        if self._writer is not None:
            await asyncio.wait([self._writer])

    def crash(self) -> None:
        """Lose everything but the disk, at once. Who waits is cancelled: the outcome is unknown."""
        self._closed = True
        if self._writer is not None:
            self._writer.cancel()
        for operation in (*self._in_flight, *self._queue):
            operation.done.cancel()
        self._queue.clear()

    def _check_open(self) -> None:
        if self._closed:
            raise LocalMisuse("the log is closed")

    async def _change(self, apply: Callable[[], None], size: int = 0) -> None:
        self._check_open()
        change = _Change(apply, size, asyncio.get_running_loop().create_future())
        await self._hand_over(change, size)
        await change.done

    async def _hand_over(self, operation: _Append | _Change, size: int) -> None:
        """Queue an operation once there is room; from then on it is carried out whole."""
        await self._budget.acquire(size)
        if self._closed:
            self._budget.release(size)
            self._check_open()
        self._queue.append(operation)
        if self._writer is None or self._writer.done():
            self._writer = asyncio.get_running_loop().create_task(self._write())

    async def _write(self) -> None:
        while self._queue:
            self._in_flight = self._take_commit()
            try:
                await self._faults("before-commit")
            except Exception as error:  # noqa: BLE001 - whoever waits has to hear of it
                self._failure = f"the simulated disk failed: {error}"
                outcomes: list[int | Exception | None] = [
                    StoreFailed(self._failure) for _ in self._in_flight
                ]
            else:
                outcomes = [self._apply(operation) for operation in self._in_flight]
                self._failure = None
                await self._faults("after-commit")
            for operation, outcome in zip(self._in_flight, outcomes, strict=True):
                self._settle(operation, outcome)
            self._in_flight = ()

    def _take_commit(self) -> tuple[_Append | _Change, ...]:
        """Take one change, or the appends up to the next change that the limits let share."""
        taken = [self._queue.popleft()]
        if isinstance(taken[0], _Append):
            updates, update_bytes = len(taken[0].updates), taken[0].update_bytes
            while self._queue and isinstance(append := self._queue[0], _Append):
                updates += len(append.updates)
                update_bytes += append.update_bytes
                if (
                    updates > self._limits.commit_updates_max
                    or update_bytes > self._limits.commit_bytes_max
                ):
                    break
                taken.append(append)
                self._queue.popleft()
        return tuple(taken)

    def _settle(self, operation: _Append | _Change, outcome: int | Exception | None) -> None:
        self._budget.release(
            operation.update_bytes if isinstance(operation, _Append) else operation.size
        )
        if operation.done.done():  # its caller was cancelled
            return
        if isinstance(outcome, Exception):
            operation.done.set_exception(outcome)
        elif isinstance(operation, _Append):
            operation.done.set_result(outcome or 0)
        else:
            operation.done.set_result(None)

    def _apply(self, operation: _Append | _Change) -> int | Exception | None:
        """Make one operation durable; return its LSN, or why it cannot be done."""
        if isinstance(operation, _Change):
            try:
                operation.apply()
            except LocalMisuse as error:
                return error
            return None
        floor = self._disk.floors.get(operation.conversation, 0)
        stored = self._disk.conversations.get(operation.conversation)
        stored = stored or _Conversation(None, floor, (), operation.at_ms)
        stored = replace(
            stored, updates=(*stored.updates, *operation.updates), changed_at=operation.at_ms
        )
        self._disk.conversations[operation.conversation] = stored
        return stored.lsn

    def _apply_snapshot(self, conversation: str, snapshot: bytes, through: int) -> None:
        stored = self._disk.conversations.get(conversation)
        if stored is None:
            raise LocalMisuse(f"{conversation} has no log that could be compacted")
        check_compaction(
            conversation,
            through=through,
            snapshot_lsn=stored.snapshot_lsn,
            lsn=stored.lsn,
            has_snapshot=stored.snapshot is not None,
        )
        self._disk.conversations[conversation] = replace(
            stored,
            snapshot=snapshot,
            snapshot_lsn=through,
            updates=stored.updates[through - stored.snapshot_lsn :],
        )

    def _apply_deletion(self, conversation: str) -> None:
        stored = self._disk.conversations.pop(conversation, None)
        if stored is not None:
            self._disk.floors[conversation] = stored.lsn + 1
