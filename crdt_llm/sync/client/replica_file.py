"""Where a device keeps its replicas: one locked folder with one log, or memory alone.

This module owns the names in the folder, the lock, and the choice of the log. It must not know what
is in a replica, nor any socket.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Self

from filelock import FileLock, Timeout

from crdt_llm.errors import DataFolderBusy, StoreFailed
from crdt_llm.store.memory import MemoryDisk, MemoryLog
from crdt_llm.store.sqlite import SqliteLog

if TYPE_CHECKING:
    from pathlib import Path

    from crdt_llm.store.log import Clock, UpdateLog

LOG_NAME: Final = "replica.db"
LOCK_NAME: Final = "replica.lock"


class ReplicaFile:
    """The replicas of one device. Make one with :meth:`open`."""

    def __init__(self, log: UpdateLog, lock: FileLock | None) -> None:
        self.log = log
        self._lock = lock
        self._touched: dict[str, None] = {}  # what changed since it was opened, the last at the end

    @classmethod
    async def open(cls, folder: Path | None, clock: Clock) -> Self:
        """Open the folder, which is made if it is missing, or memory for ``None``.

        Args:
            folder: belongs to this process alone until :meth:`close`.
            clock: milliseconds since 1970.

        Raises:
            DataFolderBusy: another process has it open.
            StoreFailed: the folder or the file cannot be opened.
            Corrupt: the file in it is not an intact log.
        """
        if folder is None:
            return cls(MemoryLog(MemoryDisk("memory"), clock=clock), None)
        lock = _locked(folder)
        try:
            return cls(await SqliteLog.open(folder / LOG_NAME, clock=clock), lock)
        except BaseException:
            lock.release()
            raise

    async def conversations(self) -> tuple[str, ...]:
        """The ids of what is kept here, last changed first."""
        kept = [stored.conversation for stored in await self.log.conversations()]
        # The log knows when something was saved, which may be a while after it came.
        ranks = {name: rank for rank, name in enumerate(self._touched)}
        return tuple(sorted(kept, key=lambda name: -ranks.get(name, -1)))

    def touch(self, conversation: str) -> None:
        """A conversation changes, and will be saved."""
        self._touched.pop(conversation, None)
        self._touched[conversation] = None

    async def close(self) -> None:
        """Finish what was handed over, and let others have the folder."""
        try:
            await self.log.close()
        finally:
            if self._lock is not None:
                self._lock.release()


def _locked(folder: Path) -> FileLock:
    # Held by the open file, so it ends with the process, however that ends.
    lock = FileLock(folder / LOCK_NAME, mode=0o600, thread_local=False)
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock.acquire(timeout=0)
    except Timeout:
        raise DataFolderBusy(
            f"another client uses the conversations in {folder}; close it, or name another data"
            " folder"
        ) from None
    except OSError as error:
        raise StoreFailed(f"the data folder {folder} cannot be used: {error}") from error
    return lock
