"""The embedded default of the update log: one SQLite file, one writer thread, group commit.

It owns when things are written and by whom: the queue in front of the writer, what shares a
commit, what a failure means to whom, when the WAL is folded back. What a file looks like is
:mod:`crdt_llm.store.sqlite_file`. It must not know what an update means.

Three parties: the event loop (checks, order, backpressure, results), the writer thread (owns one
connection, runs every transaction) and the reader thread (owns the other, so that loading a long
conversation does not hold up commits). While a commit is on its way to the disk, appends collect;
the next commit takes them all. So the number of commits follows the disk, not the traffic.

Durability is ``journal_mode=WAL`` with ``synchronous=FULL``: a commit has been synced to disk when
it returns. LSNs are given out inside the transaction, so even two processes on one file cannot
give out one twice; but rooms of two processes would not see each other's updates, which is for
the lock on the data folder to prevent.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import sqlite3
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Literal, Self, TypeVar, get_args

from crdt_llm.errors import Corrupt, CrdtLlmError, LocalMisuse, StoreFailed
from crdt_llm.store import sqlite_file
from crdt_llm.store.budget import ByteBudget
from crdt_llm.store.log import Limits, Status, check_compaction
from crdt_llm.store.sqlite_file import Head

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from crdt_llm.store.log import Clock, Loaded, Stored
    from crdt_llm.store.sqlite_file import Connect

    Faults = Callable[["Seam"], None]

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

Seam = Literal[
    "before-begin",
    "after-insert",
    "before-commit",
    "after-commit",
    "compact-before-begin",
    "compact-after-snapshot",
    "compact-after-drop",
    "compact-before-commit",
    "compact-after-commit",
    "delete-before-begin",
    "delete-after-rows",
    "delete-before-commit",
    "delete-after-commit",
    "before-checkpoint",
    "after-checkpoint",
    "scrub-before-vacuum",
    "scrub-after-vacuum",
]
"""Where ``faults`` is called, always in the writer thread. The first four are an append's."""

SEAMS: Final[tuple[Seam, ...]] = get_args(Seam)

CHECKPOINT_PAGES: Final = 2000
"""The WAL is folded back after about so many pages (8 MB). More often, and the same pages are
written to the file again and again; more rarely, and opening after a crash, which reads the whole
WAL, and each checkpoint take longer than anybody likes to wait."""

HEADS_KEPT_MAX: Final = 4096
"""Heads remembered between commits, about 300 bytes each; more than the rooms of one relay."""

UPDATE_OVERHEAD_BYTES: Final = 128
"""What a queued update takes besides its bytes: even empty ones must not fill memory."""


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _new_log_id() -> str:
    return secrets.token_hex(16)


def _no_faults(_seam: Seam) -> None:
    """Fail nowhere: what everything but a test wants."""


@dataclass(frozen=True, slots=True)
class _Append:
    """One call of ``append`` on its way to the disk."""

    conversation: str
    updates: tuple[bytes, ...]
    update_bytes: int
    at_ms: int
    done: asyncio.Future[int]

    @property
    def cost(self) -> int:
        """What it holds of the queue's budget."""
        return self.update_bytes + UPDATE_OVERHEAD_BYTES * len(self.updates)


class SqliteLog:
    """An :class:`~crdt_llm.store.log.UpdateLog` in one SQLite file. Make one with :meth:`open`."""

    def __init__(  # noqa: PLR0913 - everything outside is an argument; `open` is for people
        self,
        path: Path,
        *,
        loop: asyncio.AbstractEventLoop,
        clock: Clock,
        faults: Faults,
        connect: Connect,
        limits: Limits,
    ) -> None:
        self._path = path
        self._loop = loop
        self._clock = clock
        self._faults = faults
        self._connect = connect
        self._limits = limits
        self._log_id = ""
        self._closing: asyncio.Task[None] | None = None
        self._budget = ByteBudget(
            limits.queued_bytes_max + limits.append_updates_max * UPDATE_OVERHEAD_BYTES
        )
        # Threads of executors are joined when the interpreter ends, so nothing that was handed
        # over is torn apart even if nobody called close().
        self._writer = ThreadPoolExecutor(1, f"log-writer-{path.name}")
        self._reader = ThreadPoolExecutor(1, f"log-reader-{path.name}")
        # Guards the two below, which the event loop fills and the writer empties.
        self._lock = threading.Lock()
        self._queue: deque[_Append] = deque()
        self._drain_scheduled = False
        # Touched by the writer thread only.
        self._connection: sqlite3.Connection | None = None
        self._heads: dict[str, Head] = {}
        self._data_version = -1
        self._pages_since_checkpoint = 0
        # Touched by the reader thread only.
        self._reading: sqlite3.Connection | None = None
        # Written by the writer thread, read by anyone.
        self._failure: str | None = None

    @classmethod
    async def open(  # noqa: PLR0913 - everything outside is an argument
        cls,
        path: Path,
        *,
        clock: Clock = _now_ms,
        faults: Faults = _no_faults,
        connect: Connect = sqlite_file.connect_file,
        new_log_id: Callable[[], str] = _new_log_id,
        limits: Limits | None = None,
    ) -> Self:
        """Open the log at ``path``, or create it if nothing is there. Its folder must exist.

        Args:
            path: the file; SQLite keeps ``-wal`` and ``-shm`` beside it while it is open.
            clock: milliseconds since 1970, asked once per append.
            faults: called at every :data:`Seam` in the writer thread. What it raises before a
                commit makes that transaction fail; after a commit it changes nothing.
            connect: makes a connection to an existing file, in autocommit mode. Called in the
                thread that will own it, once each for writing and reading, and for creating.
            new_log_id: a random name for a new log; letters and digits.
            limits: what it accepts.

        Raises:
            Corrupt: the file is not an intact log of a version that we know.
            StoreFailed: it cannot be opened or created now.
        """
        loop = asyncio.get_running_loop()
        log = cls(
            path,
            loop=loop,
            clock=clock,
            faults=faults,
            connect=connect,
            limits=limits or Limits(),
        )
        try:
            log._log_id = await loop.run_in_executor(log._writer, log._open_writer, new_log_id)
            await loop.run_in_executor(log._reader, log._open_reader)
        except BaseException:
            await log.close()
            raise
        return log

    async def __aenter__(self) -> Self:
        """Return the log itself."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close it."""
        await self.close()

    @property
    def path(self) -> Path:
        """The file."""
        return self._path

    @property
    def log_id(self) -> str:
        """See :class:`~crdt_llm.store.log.UpdateLog`."""
        return self._log_id

    @property
    def status(self) -> Status:
        """See :class:`~crdt_llm.store.log.UpdateLog`."""
        return Status(self._failure)

    # --- in the event loop ---------------------------------------------------------------------

    async def append(self, conversation: str, updates: Sequence[bytes]) -> int:
        """See :class:`~crdt_llm.store.log.UpdateLog`."""
        self._check_open()
        self._limits.check_append(conversation, updates)
        append = _Append(
            conversation,
            # A bytearray may change while it waits.
            tuple(bytes(update) for update in updates),
            sum(len(update) for update in updates),
            self._clock(),
            self._loop.create_future(),
        )
        await self._budget.acquire(append.cost)
        if self._closing is not None:
            self._budget.release(append.cost)
            self._check_open()
        # From here on it is carried out whole, whether or not anybody waits for the result.
        with self._lock:
            self._queue.append(append)
            if not self._drain_scheduled:
                self._drain_scheduled = True
                self._writer.submit(self._drain)
        return await append.done

    async def load(self, conversation: str) -> Loaded:
        """See :class:`~crdt_llm.store.log.UpdateLog`."""
        self._limits.check_conversation(conversation)
        return await self._read(
            lambda connection: sqlite_file.read_conversation(connection, self._path, conversation)
        )

    async def conversations(self) -> tuple[Stored, ...]:
        """See :class:`~crdt_llm.store.log.UpdateLog`."""
        return await self._read(sqlite_file.read_list)

    async def compact(self, conversation: str, snapshot: bytes, through: int) -> None:
        """See :class:`~crdt_llm.store.log.UpdateLog`."""
        self._check_open()
        snapshot = bytes(snapshot)
        self._limits.check_snapshot(conversation, snapshot)
        await self._budget.acquire(len(snapshot))
        await self._write(
            lambda: self._compact(conversation, snapshot, through), cost=len(snapshot)
        )

    async def delete(self, conversation: str) -> None:
        """See :class:`~crdt_llm.store.log.UpdateLog`."""
        self._limits.check_conversation(conversation)
        await self._write(lambda: self._delete(conversation))

    async def scrub(self) -> None:
        """See :class:`~crdt_llm.store.log.UpdateLog`.

        It copies the whole file once (``VACUUM``), and needs that much free space: SQLite's
        ``secure_delete`` wipes the rows and pages that were deleted, but not the copies of rows
        that rebalancing a page leaves in its gap.
        """
        await self._write(self._scrub)

    async def probe(self) -> Status:
        """See :class:`~crdt_llm.store.log.UpdateLog`."""
        with contextlib.suppress(StoreFailed, Corrupt):  # it is what the status then says
            await self._write(self._probe)
        return self.status

    async def close(self) -> None:
        """See :class:`~crdt_llm.store.log.UpdateLog`."""
        if self._closing is None:
            self._closing = self._loop.create_task(self._close())
        # One caller's cancellation must not leave the others with half a close.
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        # The reader first: it could hold up the last checkpoint.
        await self._loop.run_in_executor(self._reader, self._close_reader)
        await self._loop.run_in_executor(self._writer, self._close_writer)
        self._reader.shutdown(wait=False)
        self._writer.shutdown(wait=False)

    def _check_open(self) -> None:
        if self._closing is not None:
            raise LocalMisuse(f"{self._path} is closed")

    async def _read(self, work: Callable[[sqlite3.Connection], Result]) -> Result:
        self._check_open()
        return await self._loop.run_in_executor(self._reader, self._reading_whole, work)

    async def _write(self, work: Callable[[], Result], cost: int = 0) -> Result:
        """Run ``work`` in the writer thread, after what is queued there; release ``cost`` then."""
        try:
            self._check_open()
            future = self._loop.run_in_executor(self._writer, self._explained, work)
        except BaseException:
            self._budget.release(cost)
            raise
        future.add_done_callback(lambda _: self._budget.release(cost))
        # Cancelling the caller must not cancel work that is still queued: once handed over, it is
        # carried out.
        return await asyncio.shield(future)

    def _settle(self, batch: Sequence[_Append], outcome: Sequence[int] | CrdtLlmError) -> None:
        """Hand out the result of a commit."""
        for index, append in enumerate(batch):
            self._budget.release(append.cost)
            if append.done.done():  # its caller was cancelled
                continue
            if isinstance(outcome, CrdtLlmError):
                # An exception of its own for everyone: raising one object in several tasks would
                # mix up their tracebacks.
                error = type(outcome)(*outcome.args)
                error.__cause__ = outcome.__cause__
                append.done.set_exception(error)
            else:
                append.done.set_result(outcome[index])

    # --- in the reader thread ------------------------------------------------------------------

    def _open_reader(self) -> None:
        try:
            self._reading, _ = sqlite_file.open_checked(self._path, self._connect)
            self._reading.execute("PRAGMA query_only = ON")
        except Exception as error:
            raise sqlite_file.explain(error, self._path) from error

    def _close_reader(self) -> None:
        if self._reading is not None:
            self._reading.close()
            self._reading = None

    def _reading_whole(self, work: Callable[[sqlite3.Connection], Result]) -> Result:
        """Run ``work`` on one consistent state."""
        connection = self._reading
        if connection is None:
            raise LocalMisuse(f"{self._path} is closed")
        try:
            connection.execute("BEGIN")
            try:
                return work(connection)
            finally:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
        except Exception as error:
            raise sqlite_file.explain(error, self._path) from error

    # --- in the writer thread ------------------------------------------------------------------

    def _open_writer(self, new_log_id: Callable[[], str]) -> str:
        try:
            if not self._path.exists():
                sqlite_file.create(self._path, new_log_id(), self._connect)
            self._connection, log_id = sqlite_file.open_checked(self._path, self._connect)
        except Exception as error:
            raise sqlite_file.explain(error, self._path) from error
        return log_id

    def _close_writer(self) -> None:
        while self._queue:
            self._commit(self._take_batch())
        if self._connection is None:
            return
        try:
            # Leaves one file behind, without a WAL beside it.
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        except sqlite3.Error:
            logger.warning("%s: its WAL stays until the next opening", self._path, exc_info=True)
        self._connection.close()
        self._connection = None

    def _explained(self, work: Callable[[], Result]) -> Result:
        """Run ``work``; an error of it becomes one of ours and the status."""
        try:
            return work()
        except Exception as error:
            explained = self._explain(error)
            if explained is error:
                raise
            raise explained from error

    def _explain(self, error: Exception) -> CrdtLlmError:
        explained = sqlite_file.explain(error, self._path)
        if isinstance(explained, StoreFailed):
            self._failure = str(explained)
            logger.warning("%s", explained, exc_info=error)
        return explained

    def _drain(self) -> None:
        """Commit one batch. What came in meanwhile is the next one's, after others' turn."""
        try:
            batch = self._take_batch()
            if batch:  # else close() was faster
                self._commit(batch)
                self._checkpoint_if_due()
        except Exception:
            # Every outcome has been handed out; what is left is a bug or a test's fault.
            logger.exception("%s: after a commit", self._path)
        finally:
            with self._lock:
                self._drain_scheduled = bool(self._queue)
                if self._drain_scheduled:
                    self._writer.submit(self._drain)

    def _take_batch(self) -> list[_Append]:
        """Take what shares the next commit: one append, then as many as the limits let."""
        batch: list[_Append] = []
        updates = 0
        update_bytes = 0
        with self._lock:
            while self._queue:
                append = self._queue[0]
                updates += len(append.updates)
                update_bytes += append.update_bytes
                if batch and (
                    updates > self._limits.commit_updates_max
                    or update_bytes > self._limits.commit_bytes_max
                ):
                    break
                batch.append(self._queue.popleft())
        return batch

    def _commit(self, batch: Sequence[_Append]) -> None:
        """Commit a batch and hand out its outcome, whatever it is."""
        outcome: Sequence[int] | CrdtLlmError
        try:
            outcome = self._insert(batch)
        except Exception as error:  # noqa: BLE001 - every failure has to reach those who wait
            outcome = self._explain(error)
            outcome.__cause__ = error if error is not outcome else None
        conversations = list(dict.fromkeys(append.conversation for append in batch))
        if isinstance(outcome, Corrupt) and len(conversations) > 1:
            # Damage in one conversation is no reason to fail the others: nothing was committed, so
            # each may try alone.
            for conversation in conversations:
                self._commit([append for append in batch if append.conversation == conversation])
            return
        if not isinstance(outcome, CrdtLlmError):
            self._after("after-commit")
        try:
            self._loop.call_soon_threadsafe(self._settle, batch, outcome)
        except RuntimeError:  # the event loop is gone, and all who waited with it
            logger.warning("%s: nobody waits for %d appends any more", self._path, len(batch))

    def _insert(self, batch: Sequence[_Append]) -> list[int]:
        """Append a batch in one transaction; return the last LSN of each of its appends."""
        lsns: list[int] = []
        rows: list[tuple[str, int, bytes]] = []
        heads: dict[str, Head] = {}
        with self._transaction("before-begin", "before-commit") as connection:
            for append in batch:
                name = append.conversation
                head = heads.get(name) or self._head(connection, name)
                if head is None:
                    floor = sqlite_file.read_floor(connection, self._path, name)
                    head = Head(name, floor, floor, 0, None, 0)
                rows.extend(
                    (name, lsn, update) for lsn, update in enumerate(append.updates, head.lsn + 1)
                )
                head = replace(
                    head,
                    lsn=head.lsn + len(append.updates),
                    log_bytes=head.log_bytes + append.update_bytes,
                    changed_at=append.at_ms,
                )
                heads[name] = head
                lsns.append(head.lsn)
            sqlite_file.insert_updates(connection, rows)
            sqlite_file.put_heads(connection, heads.values())
            self._faults("after-insert")
        self._remember(heads)
        overflow = sum(append.update_bytes for append in batch) // sqlite_file.PAGE_BYTES
        # Of every conversation the last page of its updates and the page of its head.
        self._pages_since_checkpoint += 2 * len(heads) + overflow
        return lsns

    def _compact(self, conversation: str, snapshot: bytes, through: int) -> None:
        with self._transaction("compact-before-begin", "compact-before-commit") as connection:
            head = self._head(connection, conversation)
            if head is None:
                raise LocalMisuse(f"{conversation} has no log that could be compacted")
            check_compaction(
                conversation,
                through=through,
                snapshot_lsn=head.snapshot_lsn,
                lsn=head.lsn,
                has_snapshot=head.snapshot_bytes is not None,
            )
            sqlite_file.put_snapshot(connection, conversation, through, snapshot)
            self._faults("compact-after-snapshot")
            head = sqlite_file.drop_updates(connection, self._path, head, through)
            head = replace(head, snapshot_bytes=len(snapshot))
            sqlite_file.put_heads(connection, [head])
            self._faults("compact-after-drop")
        self._remember({conversation: head})
        self._pages_since_checkpoint += 2 + 2 * (len(snapshot) // sqlite_file.PAGE_BYTES)
        self._after("compact-after-commit")
        self._checkpoint_if_due()

    def _delete(self, conversation: str) -> None:
        with self._transaction("delete-before-begin", "delete-before-commit") as connection:
            sqlite_file.delete_conversation(connection, self._path, conversation)
            self._faults("delete-after-rows")
        self._heads.pop(conversation, None)
        self._after("delete-after-commit")

    def _scrub(self) -> None:
        connection = self._own_connection()
        self._faults("scrub-before-vacuum")
        connection.execute("VACUUM")
        self._faults("scrub-after-vacuum")
        # The old pages are in the file until the WAL has been folded back, and the old WAL until
        # it has been cut off.
        self._checkpoint("TRUNCATE")

    def _probe(self) -> None:
        with self._transaction(None, None) as connection:
            sqlite_file.touch(connection)

    def _own_connection(self) -> sqlite3.Connection:
        """Return the writer's connection, a new one if the last had to be thrown away."""
        if self._connection is None:
            self._connection, _ = sqlite_file.open_checked(self._path, self._connect)
            self._data_version = -1
        return self._connection

    @contextlib.contextmanager
    def _transaction(
        self, before_begin: Seam | None, before_commit: Seam | None
    ) -> Iterator[sqlite3.Connection]:
        """Run a block as one transaction: durable afterwards, without effect if it raises."""
        connection = self._own_connection()
        if before_begin:
            self._faults(before_begin)
        connection.execute("BEGIN IMMEDIATE")
        committing = False
        try:
            # It changes when any other connection has written.
            version = connection.execute("PRAGMA data_version").fetchone()[0]
            if version != self._data_version:
                self._heads.clear()
                self._data_version = version
            yield connection
            if before_commit:
                self._faults(before_commit)
            committing = True
            connection.execute("COMMIT")
        except BaseException:
            self._undo(connection, committing=committing)
            raise
        self._failure = None

    def _undo(self, connection: sqlite3.Connection, *, committing: bool) -> None:
        """Take a failed transaction back, so that it stays without effect also after a crash."""
        # What the failed commit left is read anew, not assumed.
        self._heads.clear()
        try:
            # After some errors (a full disk) SQLite has already rolled back.
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            if committing:
                # If it was the sync that failed, the WAL may hold all of the transaction, and
                # though nobody reads beyond the committed end now, recovery after a crash would.
                # Another commit is written over it.
                connection.execute("BEGIN IMMEDIATE")
                sqlite_file.touch(connection)
                connection.execute("COMMIT")
        except sqlite3.Error:
            logger.warning("%s: a new connection after a failed one", self._path, exc_info=True)
            self._connection = None
            connection.close()

    def _head(self, connection: sqlite3.Connection, conversation: str) -> Head | None:
        """Return a conversation's head as of this transaction, None if it is unknown."""
        if conversation not in self._heads:
            return sqlite_file.read_head(connection, self._path, conversation)
        return self._heads[conversation]

    def _remember(self, heads: dict[str, Head]) -> None:
        """Keep committed heads for the next commit."""
        if len(self._heads) + len(heads) > HEADS_KEPT_MAX:
            self._heads.clear()
        self._heads.update(heads)

    def _after(self, seam: Seam) -> None:
        """Pass a seam behind a commit: what happens there cannot undo it."""
        try:
            self._faults(seam)
        except Exception:
            logger.exception("%s: at %s", self._path, seam)

    def _checkpoint_if_due(self) -> None:
        if self._pages_since_checkpoint < CHECKPOINT_PAGES:
            return
        # Also if it fails: the next try is due after as many pages again, not after every commit.
        self._pages_since_checkpoint = 0
        try:
            self._checkpoint("PASSIVE")
        except (sqlite3.Error, StoreFailed):
            # Nothing is lost, all of it is in the WAL.
            logger.warning("%s: the WAL could not be folded back", self._path, exc_info=True)

    def _checkpoint(self, mode: Literal["PASSIVE", "TRUNCATE"]) -> None:
        """Fold the WAL back into the file."""
        self._faults("before-checkpoint")
        busy, _, _ = self._own_connection().execute(f"PRAGMA wal_checkpoint({mode})").fetchone()
        if busy:
            raise StoreFailed(f"{self._path} is being read, its WAL cannot be cut: try again")
        self._faults("after-checkpoint")
