"""When there is a connection, and what its end means; on a clock of the test's own."""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from contextlib import asynccontextmanager
from random import Random
from typing import TYPE_CHECKING, Any

import pytest
from sync.simulated_network import VirtualTimeLoop

from crdt_llm.document.schema import Birth
from crdt_llm.errors import ConnectionLost, Refused
from crdt_llm.store.memory import MemoryDisk, MemoryLog
from crdt_llm.sync import uplink as module
from crdt_llm.sync.link import RETRY_FIRST_S, RETRY_LAST_S
from crdt_llm.sync.local_replica import LocalReplica
from crdt_llm.sync.uplink import DRAIN_S_MAX, RENEW_S, Uplink
from crdt_llm.sync.wire import (
    AwarenessUpdate,
    SyncStep1,
    SyncStep2,
    SyncUpdate,
    decode,
    encode,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine, Iterator

    from crdt_llm.sync.wire import Message

NOTHING = b"\x00"
EMPTY = b"\x00\x00"


class Line:
    """A socket whose other end is the test."""

    def __init__(self) -> None:
        self.heard: list[Message] = []
        self.open = asyncio.Event()  # frames get through
        self.open.set()
        self._down: deque[bytes | Exception] = deque()
        self._news = asyncio.Event()

    async def send(self, frame: bytes) -> None:
        await self.open.wait()
        self.heard.append(decode(frame))

    async def receive(self) -> bytes:
        while not self._down:
            self._news.clear()
            await self._news.wait()
        what = self._down.popleft()
        if isinstance(what, Exception):
            raise what
        return what

    def say(self, *what: Message | Exception) -> None:
        self._down.extend(w if isinstance(w, Exception) else encode(w) for w in what)
        self._news.set()

    def sync(self) -> None:
        self.say(SyncStep1(NOTHING), SyncStep2(EMPTY))


class Exchange:
    """Where lines are dialled; notes when, and how many at a time."""

    def __init__(self) -> None:
        self.lines: list[Line] = []
        self.dialled_s: list[float] = []
        self.here = 0
        self.most = 0
        self.error: Exception | None = None
        self.syncs = True  # a new line is brought in sync at once
        self.hangs_up_s = 0.0

    @asynccontextmanager
    async def dial(self, _conversation: str) -> AsyncIterator[Line]:
        self.dialled_s.append(asyncio.get_running_loop().time())
        if self.error is not None:
            raise self.error
        line = Line()
        self.lines.append(line)
        self.here += 1
        self.most = max(self.most, self.here)
        if self.syncs:
            line.sync()
        try:
            yield line
        finally:
            await asyncio.sleep(self.hangs_up_s)
            self.here -= 1


class Scene:
    """An uplink on a replica in memory."""

    def __init__(self, replica: LocalReplica) -> None:
        self.exchange = Exchange()
        self.replica = replica
        self.announced = 0
        self.uplink = Uplink(
            replica, self.exchange.dial, device="laptop", random=Random(1), announce=self._count
        )

    def _count(self) -> None:
        self.announced += 1

    async def write(self, title: str) -> None:
        await self.replica.write(lambda _, writer: writer.set_meta("title", title))

    @property
    def line(self) -> Line:
        return self.exchange.lines[-1]

    def waits_s(self) -> list[float]:
        times = self.exchange.dialled_s
        return [later - earlier for earlier, later in itertools.pairwise(times)]


@pytest.fixture
def loop() -> Iterator[VirtualTimeLoop]:
    loop = VirtualTimeLoop()
    yield loop
    loop.finish()


async def scene() -> Scene:
    log = MemoryLog(MemoryDisk("memory"), clock=lambda: 0)
    replica = await LocalReplica.open("conversation", log, Random(1))
    birth = Birth("owner", bytes(16))
    await replica.write(lambda _, writer: writer.give_birth(birth, 1))
    return Scene(replica)


def play(test: Any) -> Any:
    """Run a test coroutine on a clock of its own."""

    def run(loop: VirtualTimeLoop) -> None:
        coroutine: Coroutine[Any, Any, None] = test()
        loop.run(coroutine)

    run.__name__ = test.__name__
    return run


@play
async def test_waits_grow_while_connections_bring_no_sync() -> None:
    it = await scene()
    it.exchange.syncs = False
    it.uplink.resume()
    for _ in range(12):
        await asyncio.sleep(2 * RETRY_LAST_S)
        if it.uplink.online:
            it.line.say(ConnectionLost("gone"))
    it.exchange.error = ConnectionLost("nobody answers")
    it.line.say(ConnectionLost("gone"))
    del it.exchange.dialled_s[:]
    await asyncio.sleep(10 * RETRY_LAST_S)
    assert min(it.waits_s()) >= RETRY_LAST_S / 2
    await it.uplink.close()


@play
async def test_a_completed_sync_makes_the_next_wait_short_again() -> None:
    it = await scene()
    it.exchange.error = ConnectionLost("nobody answers")
    it.uplink.resume()
    await asyncio.sleep(10 * RETRY_LAST_S)
    assert it.waits_s()[-1] >= RETRY_LAST_S / 2
    it.exchange.error = None
    await asyncio.sleep(2 * RETRY_LAST_S)
    assert it.uplink.synced
    del it.exchange.dialled_s[:-1]
    now = asyncio.get_running_loop().time()
    it.line.say(ConnectionLost("gone"))
    await asyncio.sleep(RETRY_FIRST_S)
    assert it.exchange.dialled_s[-1] - now <= RETRY_FIRST_S
    assert it.uplink.synced
    await it.uplink.close()


@play
async def test_a_refusal_is_not_tried_again_until_asked_for() -> None:
    it = await scene()
    it.uplink.resume()
    await asyncio.sleep(1)
    it.line.say(ConnectionLost("closed", code=4403, reason="forbidden: not yours"))
    await asyncio.sleep(10 * RETRY_LAST_S)
    assert len(it.exchange.dialled_s) == 1
    assert isinstance(it.uplink.refused, Refused)
    assert it.uplink.refused.reason == "not yours"
    it.uplink.resume()
    await asyncio.sleep(1)
    assert it.uplink.synced
    await it.uplink.close()


@play
async def test_there_is_one_connection_at_a_time() -> None:
    it = await scene()
    it.exchange.hangs_up_s = 1.0
    for _ in range(3):
        it.uplink.resume()
        await asyncio.sleep(0.1)
        it.uplink.pause()
    it.uplink.resume()
    it.uplink.resume()
    await asyncio.sleep(10)
    assert it.uplink.synced
    assert it.exchange.most == 1
    await it.uplink.close()
    assert it.exchange.here == 0


@play
async def test_writes_go_out_in_order_and_only_once_synced_with() -> None:
    it = await scene()
    it.exchange.syncs = False
    it.uplink.resume()
    await asyncio.sleep(1)
    await it.write("one")
    await asyncio.sleep(1)
    assert not any(isinstance(message, SyncUpdate) for message in it.line.heard)
    it.line.sync()
    await asyncio.sleep(1)
    for title in ("two", "three"):
        await it.write(title)
    await asyncio.sleep(1)
    first, presence, answer, *updates = it.line.heard
    assert isinstance(first, SyncStep1)
    assert isinstance(presence, AwarenessUpdate)
    assert isinstance(answer, SyncStep2)
    assert b"one" in answer.update
    assert [b"two" in u.update for u in updates if isinstance(u, SyncUpdate)] == [True, False]
    await it.uplink.close()


@play
async def test_closing_waits_for_what_is_on_its_way_but_not_for_ever() -> None:
    it = await scene()
    it.uplink.resume()
    await asyncio.sleep(1)
    it.line.open.clear()
    await it.write("last words")
    asyncio.get_running_loop().call_later(DRAIN_S_MAX / 2, it.line.open.set)
    await it.uplink.close()
    assert any(isinstance(m, SyncUpdate) and b"last words" in m.update for m in it.line.heard)

    it.uplink.resume()
    await asyncio.sleep(1)
    it.line.open.clear()
    await it.write("never heard")
    before = asyncio.get_running_loop().time()
    await it.uplink.close()
    assert asyncio.get_running_loop().time() - before <= DRAIN_S_MAX + 0.1
    assert not it.uplink.online


@play
async def test_a_socket_that_takes_nothing_is_given_up_and_the_next_sync_carries_all() -> None:
    it = await scene()
    it.uplink.resume()
    await asyncio.sleep(1)
    it.line.open.clear()
    for number in range(1100):
        await it.write(str(number))
    it.line.open.set()
    await asyncio.sleep(1)
    assert len(it.exchange.lines) == 2
    assert it.uplink.synced
    answer = next(m for m in it.line.heard if isinstance(m, SyncStep2))
    assert b"1099" in answer.update
    await it.uplink.close()


@play
async def test_presence_is_renewed_however_busy_the_line_is() -> None:
    it = await scene()
    it.uplink.resume()
    for number in range(int(4 * RENEW_S) - 1):
        await asyncio.sleep(1)
        await it.write(str(number))
    presence = [m for m in it.line.heard if isinstance(m, AwarenessUpdate)]
    assert [m.states[0].clock for m in presence] == [1, 2, 3, 4]
    await it.uplink.close()


@play
async def test_a_bug_of_ours_is_logged_and_the_connection_tried_again() -> None:
    it = await scene()
    it.exchange.error = ZeroDivisionError("a bug")
    with pytest.MonkeyPatch.context() as patch:
        logged: list[str] = []
        patch.setattr(module.logger, "exception", lambda text, *_: logged.append(text))
        it.uplink.resume()
        await asyncio.sleep(RETRY_FIRST_S / 4)
        it.exchange.error = None
        await asyncio.sleep(1)
    assert logged == ["a bug in the uplink of %s"]
    assert it.uplink.synced
    await it.uplink.close()
