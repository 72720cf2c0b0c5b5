"""A program that appends and compacts, says what was acknowledged, and waits to be killed.

``crash_child.py FILE [SEAM NUMBER]``: with a seam it kills itself when that seam is reached for the
NUMBER-th time. On standard output: ``appended NAME LSN`` and ``compacted NAME LSN``, each after the
log has acknowledged it.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

from crdt_llm.store.sqlite import SqliteLog

CONVERSATIONS = ("first", "second", "third")
UPDATES_BETWEEN_SNAPSHOTS = 20


def update(name: str, lsn: int) -> bytes:
    """What this conversation's log must hold at this LSN: short mostly, sometimes some pages."""
    return f"{name}:{lsn};".encode() * (900 if lsn % 17 == 0 else 1 + lsn % 5)


def snapshot(name: str, lsn: int) -> bytes:
    """What a snapshot of this conversation through this LSN must be."""
    return f"{name} through {lsn};".encode() * 300


async def write(log: SqliteLog, name: str) -> None:
    lsn = (await log.load(name)).lsn
    while True:
        batch = range(lsn + 1, lsn + 2 + lsn % 3)
        lsn = await log.append(name, [update(name, number) for number in batch])
        sys.stdout.write(f"appended {name} {lsn}\n")
        sys.stdout.flush()
        if lsn % UPDATES_BETWEEN_SNAPSHOTS < len(batch):
            await log.compact(name, snapshot(name, lsn - 1), lsn - 1)
            sys.stdout.write(f"compacted {name} {lsn - 1}\n")
            sys.stdout.flush()


async def delete_and_scrub(log: SqliteLog) -> None:
    while True:
        await log.append("passing", [b"to be deleted"])
        await log.delete("passing")
        await log.scrub()


async def main() -> None:
    path, *fatal = sys.argv[1:]
    reached = 0

    def faults(seam: str) -> None:
        nonlocal reached
        if fatal and seam == fatal[0]:
            reached += 1
            if reached == int(fatal[1]):
                os.kill(os.getpid(), signal.SIGKILL)

    log = await SqliteLog.open(Path(path), faults=faults)
    tasks = [write(log, name) for name in CONVERSATIONS]
    if fatal:
        tasks.append(delete_and_scrub(log))
    await asyncio.gather(*tasks)


if __name__ == "__main__":
    asyncio.run(main())
