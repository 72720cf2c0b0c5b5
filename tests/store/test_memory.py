from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings
from store.contract import A, B, Contract, LogMachine, Place

from crdt_llm.errors import StoreFailed
from crdt_llm.store.log import Loaded
from crdt_llm.store.memory import MemoryDisk, MemoryLog

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from crdt_llm.store.log import Limits, UpdateLog
    from crdt_llm.store.memory import MemorySeam


class MemoryPlace(Place):
    def __init__(self) -> None:
        super().__init__()
        self.disk = MemoryDisk("memory")
        self.crash_after = -1
        self.reached: asyncio.Event | None = None

    async def open(self, limits: Limits | None = None) -> UpdateLog:
        return MemoryLog(self.disk, clock=self.clock, faults=self.faults, limits=limits)

    async def faults(self, _seam: MemorySeam) -> None:
        await asyncio.sleep(0)
        if self.reached is None:
            return
        self.crash_after -= 1
        if self.crash_after < 0:
            self.reached.set()
            await asyncio.Event().wait()

    async def crash(self, log: UpdateLog) -> None:
        assert isinstance(log, MemoryLog)
        log.crash()

    async def crash_within(
        self, log: UpdateLog, operation: Callable[[], Awaitable[object]], seam: int
    ) -> None:
        self.crash_after, self.reached = seam, asyncio.Event()
        task = asyncio.ensure_future(operation())
        reached = asyncio.ensure_future(self.reached.wait())
        await asyncio.wait([task, reached], return_when=asyncio.FIRST_COMPLETED)
        reached.cancel()
        await self.crash(log)
        await asyncio.wait([task])
        self.reached = None


@pytest.fixture
def place() -> Place:
    return MemoryPlace()


class TestContract(Contract):
    pass


class MemoryMachine(LogMachine):
    make_place = MemoryPlace


TestMachine = MemoryMachine.TestCase
TestMachine.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)


class Failing:
    """A disk that fails when it is told to."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.commits = 0

    async def __call__(self, seam: MemorySeam) -> None:
        await asyncio.sleep(0)
        if seam == "before-commit":
            self.commits += 1
            if self.error:
                raise self.error


async def test_a_failed_commit_fails_exactly_its_appends() -> None:
    disk, faults = MemoryDisk("memory"), Failing()
    log = MemoryLog(disk, clock=lambda: 0, faults=faults)
    await log.append(A, [b"one"])
    faults.error = OSError("no space")
    results = await asyncio.gather(
        log.append(A, [b"lost"]), log.append(B, [b"lost"]), return_exceptions=True
    )
    assert all(isinstance(result, StoreFailed) for result in results)
    assert not log.status.healthy
    assert not (await log.probe()).healthy
    faults.error = None
    assert (await log.probe()).healthy
    assert await log.append(A, [b"two"]) == 2
    assert await log.load(A) == Loaded(None, 0, ((1, b"one"), (2, b"two")))
    assert (await log.load(B)).lsn == 0
    await log.close()


async def test_appends_that_wait_together_share_a_commit() -> None:
    faults = Failing()
    async with MemoryLog(MemoryDisk("memory"), clock=lambda: 0, faults=faults) as log:
        await asyncio.gather(*(log.append(f"c{n}", [b"x"]) for n in range(50)))
    assert faults.commits == 1


async def test_who_waits_at_a_crash_learns_nothing() -> None:
    place = MemoryPlace()
    log = await place.open()
    append = asyncio.ensure_future(log.append(A, [b"one"]))
    # At the second seam it is durable, and not acknowledged.
    await place.crash_within(log, lambda: append, seam=1)
    assert append.cancelled()
    assert (await (await place.open()).load(A)).lsn == 1
