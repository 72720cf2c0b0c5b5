"""A small SQLite file beside the log: how it is opened, read, and written.

This module owns the connections, the thread and what a fault means. It must not know what is in the
file: whoever has one brings its schema and its statements.

There are two connections. One reads, at once and in the thread that opened the file: a write-ahead
log keeps it from ever waiting for a writer, in this process or another. The other one writes, and a
write waits: for the disk, some milliseconds, and for another process, up to :data:`BUSY_TIMEOUT_S`.
So a relay writes by :meth:`SideFile.aside`, on the file's one thread, and a command, which has
nothing else to do, in its own.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self, TypeVar

from crdt_llm.errors import Corrupt, StoreFailed

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_Result = TypeVar("_Result")

BUSY_TIMEOUT_S: Final = 2.0
"""How long to wait for the other process; a write takes milliseconds."""

WAITING_MAX: Final = 8
"""Writes that wait for the thread. Whoever sends a request waits for its answer and is not read
from meanwhile: all of them, each after another's lock, stay below what a silent connection is
given."""

_FILE_MODE: Final = 0o600


@dataclass(frozen=True, slots=True)
class Kind:
    """What a file is.

    Attributes:
        application_id: In the file's header: tells our files from other programs' databases.
        schema: Its tables, made where they are not there.
        is_no: Said of a file that is something else, as "is not a list of tokens".
        if_damaged: What to do about a damaged one, as "move it away".
    """

    application_id: int
    schema: str
    is_no: str
    if_damaged: str


class SideFile:
    """One file, or tables in memory.

    Args:
        name: For errors.
        kind: What it is.
        reader: A connection of the thread that opens it.
        writer: A connection for any thread; in memory the same.
    """

    def __init__(
        self, name: str, kind: Kind, reader: sqlite3.Connection, writer: sqlite3.Connection
    ) -> None:
        self._name = name
        self._kind = kind
        self._reader = reader
        self._writer = writer
        self._lock = threading.Lock()
        self._thread: ThreadPoolExecutor | None = None
        self._waiting = 0

    @classmethod
    def open(cls, path: Path | None, kind: Kind) -> Self:
        """Open the file, or make one; ``None`` keeps everything in memory.

        Raises:
            Corrupt: It is no such file.
            StoreFailed: It cannot be opened now.
        """
        name = ":memory:" if path is None else str(path)
        try:
            if path is not None:
                os.close(os.open(path, os.O_RDWR | os.O_CREAT, _FILE_MODE))
            writer = _connect(name, any_thread=True)
        except (OSError, sqlite3.Error) as error:
            raise StoreFailed(f"{name} cannot be opened ({error}): check its rights") from error
        file = cls(name, kind, writer, writer)
        try:
            file._run(file._prepare)
            if path is not None:
                file._reader = _connect(name)
        except BaseException:
            writer.close()
            raise
        return file

    def _prepare(self) -> None:
        (found,) = self._writer.execute("PRAGMA application_id").fetchone()
        if found not in {0, self._kind.application_id}:
            raise Corrupt(f"{self._name} {self._kind.is_no}: move it away")
        self._writer.execute("PRAGMA journal_mode = WAL")
        self._writer.execute("PRAGMA synchronous = FULL")
        if found == 0:
            self._writer.execute(f"PRAGMA application_id = {self._kind.application_id}")
        self._writer.executescript(self._kind.schema)

    def read(self, work: Callable[[sqlite3.Connection], _Result]) -> _Result:
        """Do something that only reads, in the thread that opened the file.

        Raises:
            StoreFailed: It cannot be read now.
            Corrupt: It is damaged.
        """
        if self._reader is self._writer:
            with self._lock:
                return self._run(lambda: work(self._reader))
        return self._run(lambda: work(self._reader))

    def write(self, work: Callable[[sqlite3.Connection], _Result]) -> _Result:
        """Do something as one transaction, durably, in the caller's thread; it may wait.

        Raises:
            StoreFailed: Nothing was written.
            Corrupt: It is damaged.
        """

        def transact() -> _Result:
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                result = work(self._writer)
                self._writer.execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):  # some errors end the transaction themselves
                    self._writer.execute("ROLLBACK")
                raise
            return result

        with self._lock:
            return self._run(transact)

    async def aside(self, call: Callable[[], _Result]) -> _Result:
        """Call something that writes, on the file's own thread. To cancel stops nothing.

        Raises:
            StoreFailed: Too many wait for that already.
        """
        if self._waiting >= WAITING_MAX:
            raise StoreFailed(f"too many wait for {self._name}")
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="side file")
        self._waiting += 1
        done = asyncio.get_running_loop().run_in_executor(self._thread, call)
        done.add_done_callback(self._one_less)
        return await asyncio.shield(done)

    def _one_less(self, done: asyncio.Future[_Result]) -> None:
        self._waiting -= 1
        if not done.cancelled():
            done.exception()  # whoever waits hears of it; nobody may, any more

    def close(self) -> None:
        """Finish what is being written and let go of the file."""
        if self._thread is not None:
            self._thread.shutdown()
        self._reader.close()
        self._writer.close()

    def _run(self, work: Callable[[], _Result]) -> _Result:
        try:
            return work()
        except sqlite3.OperationalError as error:
            raise StoreFailed(f"{self._name} cannot be used now ({error})") from error
        except sqlite3.Error as error:
            raise Corrupt(f"{self._name} is damaged ({error}): {self._kind.if_damaged}") from error


def _connect(name: str, *, any_thread: bool = False) -> sqlite3.Connection:
    return sqlite3.connect(
        name, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=not any_thread
    )
