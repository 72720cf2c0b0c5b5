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

from crdt_llm.document.conversation import EMPTY_UPDATE
from crdt_llm.document.schema import Birth, conversation_id
from crdt_llm.errors import ConnectionLost, Refused
from crdt_llm.store.memory import MemoryDisk, MemoryLog
from crdt_llm.sync.client import connection as module
from crdt_llm.sync.client.channel import RENEW_S
from crdt_llm.sync.client.connection import DRAIN_S_MAX, Connection
from crdt_llm.sync.client.local_replica import LocalReplica
from crdt_llm.sync.client.uplink import Uplink
from crdt_llm.sync.transport.retrying import RETRY_FIRST_S, RETRY_LAST_S
from crdt_llm.sync.wire.frames import (
    Ack,
    Answer,
    Closed,
    Code,
    Draft,
    Hello,
    Leave,
    Listed,
    Nack,
    Open,
    Opened,
    Presence,
    Request,
    Restore,
    Update,
    Watch,
    Welcome,
    decode_from_client,
    encode,
)
from crdt_llm.sync.wire.y_websocket import encode_state_vector

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine, Iterator

    from crdt_llm.sync.wire.frames import FromClient, FromRelay

NOTHING = b"\x00"
BIRTH = Birth("owner", bytes(16))
CONVERSATION = conversation_id(BIRTH)
WELCOME = Welcome(1, "owner", bytes(32), None, "log")


class Line:
    """A socket whose other end is the test."""

    def __init__(self, exchange: Exchange) -> None:
        self.heard: list[FromClient] = []
        self.open = asyncio.Event()  # frames get through
        self.open.set()
        self._exchange = exchange
        self._down: deque[bytes | Exception] = deque()
        self._news = asyncio.Event()

    async def send(self, frame: bytes) -> None:
        await self.open.wait()
        message = decode_from_client(frame)
        self.heard.append(message)
        self._exchange.react(self, message)

    async def receive(self) -> bytes:
        while not self._down:
            self._news.clear()
            await self._news.wait()
        what = self._down.popleft()
        if isinstance(what, Exception):
            raise what
        return what

    def say(self, *what: FromRelay | Exception) -> None:
        self._down.extend(w if isinstance(w, Exception) else encode(w) for w in what)
        self._news.set()

    def of(self, kind: type[Any]) -> list[Any]:
        return [message for message in self.heard if isinstance(message, kind)]


class Exchange:
    """Where lines are dialled; notes when, and how many at a time."""

    def __init__(self) -> None:
        self.lines: list[Line] = []
        self.dialled_s: list[float] = []
        self.here = 0
        self.most = 0
        self.error: Exception | None = None
        self.welcomes = True
        self.opens = True  # what is opened is in sync at once
        self.acknowledges = True
        self.has = NOTHING
        self.hangs_up_s = 0.0

    def react(self, line: Line, message: FromClient) -> None:
        match message:
            case Hello() if self.welcomes:
                line.say(WELCOME)
            case Open(channel) if self.opens:
                line.say(Opened(channel, "log", 0, EMPTY_UPDATE, self.has, "owner", behind=False))
            case Update(channel, identity, _) | Restore(channel, identity, _):
                if self.acknowledges:
                    line.say(Ack(channel, identity, 1))
            case Leave(channel):
                line.say(Closed(channel, 1000, "left"))
            case _:
                pass

    @asynccontextmanager
    async def dial(self) -> AsyncIterator[Line]:
        self.dialled_s.append(asyncio.get_running_loop().time())
        if self.error is not None:
            raise self.error
        line = Line(self)
        self.lines.append(line)
        self.here += 1
        self.most = max(self.most, self.here)
        try:
            yield line
        finally:
            await asyncio.sleep(self.hangs_up_s)
            self.here -= 1


class Scene:
    """A connection, and an uplink on a replica in memory."""

    def __init__(self, replica: LocalReplica) -> None:
        self.exchange = Exchange()
        self.replica = replica
        self.welcomed: list[Welcome] = []
        self.connection = Connection(
            self.exchange.dial,
            token="a token",  # noqa: S106 - the test's own
            device="laptop",
            random=Random(1),
            greeted=self.welcomed.append,
        )
        self.uplink = Uplink(
            replica, self.connection, device="laptop", random=Random(1), announce=lambda: None
        )

    async def write(self, title: str) -> None:
        await self.replica.write(lambda _, writer: writer.set_meta("title", title))

    async def end(self) -> None:
        await self.uplink.close(DRAIN_S_MAX)
        await self.connection.close()
        await self.replica.close()

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
    replica = await LocalReplica.open(CONVERSATION, log, Random(1))
    await replica.write(lambda _, writer: writer.give_birth(BIRTH, 1))
    return Scene(replica)


def play(test: Any) -> Any:
    """Run a test coroutine on a clock of its own."""

    def run(loop: VirtualTimeLoop) -> None:
        coroutine: Coroutine[Any, Any, None] = test()
        loop.run(coroutine)

    run.__name__ = test.__name__
    return run


@play
async def test_hello_comes_first_and_alone_with_the_token_in_it() -> None:
    it = await scene()
    it.exchange.welcomes = False
    it.uplink.resume()
    await asyncio.sleep(5)
    assert it.line.heard == [Hello(1, "a token", "laptop", None)]
    assert not it.uplink.online
    it.line.say(WELCOME)
    await asyncio.sleep(1)
    assert it.welcomed == [WELCOME]
    assert it.uplink.synced
    await it.end()


@play
async def test_waits_grow_while_connections_bring_no_sync() -> None:
    it = await scene()
    it.exchange.opens = False
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
    await it.end()


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
    await it.end()


@play
async def test_a_refused_connection_is_not_tried_again_until_asked_for() -> None:
    it = await scene()
    it.uplink.resume()
    await asyncio.sleep(1)
    it.line.say(ConnectionLost("closed", code=4401, reason="unauthenticated: not you"))
    await asyncio.sleep(10 * RETRY_LAST_S)
    assert len(it.exchange.dialled_s) == 1
    assert isinstance(it.uplink.refused, Refused)
    assert it.uplink.refused.reason == "not you"
    it.uplink.resume()
    await asyncio.sleep(1)
    assert it.uplink.synced
    await it.end()


@play
async def test_a_refused_channel_leaves_the_others_alone() -> None:
    it = await scene()
    other = (await scene()).replica
    beside = Uplink(other, it.connection, device="laptop", random=Random(2), announce=lambda: None)
    it.uplink.resume()
    beside.resume()
    await asyncio.sleep(1)
    first, _ = (message.channel for message in it.line.of(Open))
    it.line.say(Closed(first, 4403, "forbidden: not yours"))
    await asyncio.sleep(10 * RETRY_LAST_S)
    assert it.uplink.refused is not None
    assert not it.uplink.online
    assert beside.synced
    assert len(it.exchange.lines) == 1
    it.uplink.resume()
    await asyncio.sleep(1)
    assert it.uplink.synced
    assert len({message.channel for message in it.line.of(Open)}) == 3
    await beside.close(0)
    await other.close()
    await it.end()


@play
async def test_a_channel_that_ends_comes_back_on_the_same_connection() -> None:
    it = await scene()
    it.uplink.resume()
    await asyncio.sleep(1)
    it.line.say(Closed(it.line.of(Open)[0].channel, 1013, "later"))
    await asyncio.sleep(2 * RETRY_FIRST_S)
    assert it.uplink.synced
    assert (len(it.exchange.lines), len(it.line.of(Open))) == (1, 2)
    it.line.say(Closed(it.line.of(Open)[1].channel, 1013, "later"))
    it.line.say(ConnectionLost("gone"))  # before it could come back
    await asyncio.sleep(2)
    assert it.uplink.synced
    assert len(it.line.of(Open)) == 1
    await it.end()


@play
async def test_there_is_one_connection_at_a_time_and_none_that_nobody_needs() -> None:
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
    it.uplink.pause()
    await asyncio.sleep(10)
    assert it.exchange.here == 0
    await it.end()


@play
async def test_writes_go_out_in_order_once_synced_and_again_after_a_loss() -> None:
    it = await scene()
    it.exchange.opens = it.exchange.acknowledges = False
    it.uplink.resume()
    await asyncio.sleep(1)
    await it.write("one")
    await asyncio.sleep(1)
    assert it.line.of(Update) == []
    channel = it.line.of(Open)[0].channel
    opened = Opened(channel, "log", 0, EMPTY_UPDATE, NOTHING, "owner", behind=False)
    it.line.say(opened)
    await asyncio.sleep(1)
    await it.write("two")
    await asyncio.sleep(1)
    birth, one, two = it.line.of(Update)
    assert [one.id, two.id] == [2, 3]
    assert b"one" in one.update
    assert b"two" in two.update
    it.line.say(Ack(channel, birth.id, 1))
    await asyncio.sleep(1)
    it.exchange.opens = it.exchange.acknowledges = True
    it.exchange.has = encode_state_vector(it.replica.acknowledged)
    it.line.say(ConnectionLost("gone"))
    await asyncio.sleep(1)
    assert [again.update for again in it.line.of(Update)] == [one.update, two.update]
    assert it.line.of(Restore) == []
    assert it.replica.outbox == ()
    await it.end()


@play
async def test_what_the_relay_lost_is_restored_before_the_outbox() -> None:
    it = await scene()
    it.uplink.resume()
    await it.write("kept")
    await asyncio.sleep(1)
    assert it.replica.outbox == ()
    it.uplink.pause()
    await it.write("not acknowledged")
    it.uplink.resume()  # the relay says again that it has nothing
    await asyncio.sleep(1)
    (restore,), (update,) = it.line.of(Restore), it.line.of(Update)
    assert b"kept" in restore.update
    assert b"not acknowledged" not in restore.update
    assert b"not acknowledged" in update.update
    assert (restore.id, update.id) == (1, 2)
    assert it.uplink.stalled is None
    await it.end()


@play
async def test_a_restore_that_is_not_taken_is_said_and_nothing_is_written() -> None:
    it = await scene()
    it.uplink.resume()
    await asyncio.sleep(1)
    it.uplink.pause()
    await it.write("waits")
    it.exchange.acknowledges = False
    it.uplink.resume()
    await asyncio.sleep(1)
    (restore,) = it.line.of(Restore)
    refusal = Nack(restore.channel, restore.id, Code.INVALID, "proof", "it is not so", None, None)
    it.line.say(refusal)
    await asyncio.sleep(1)
    assert it.line.of(Update) == []
    assert it.uplink.stalled is not None
    assert it.uplink.stalled.reason == "it is not so"
    assert it.uplink.synced
    assert len(it.replica.outbox) == 1
    await it.end()


@play
async def test_closing_waits_for_the_last_answer_but_not_for_ever() -> None:
    it = await scene()
    it.uplink.resume()
    await asyncio.sleep(1)
    it.line.open.clear()
    await it.write("last words")
    asyncio.get_running_loop().call_later(DRAIN_S_MAX / 2, it.line.open.set)
    await it.uplink.close(DRAIN_S_MAX)
    assert it.replica.outbox == ()

    it.uplink.resume()
    await asyncio.sleep(1)
    it.line.open.clear()
    await it.write("never heard")
    before = asyncio.get_running_loop().time()
    await it.uplink.close(DRAIN_S_MAX)
    assert asyncio.get_running_loop().time() - before <= DRAIN_S_MAX + 0.1
    assert not it.uplink.online
    await it.end()


@play
async def test_presence_is_renewed_however_busy_the_line_is() -> None:
    it = await scene()
    it.uplink.resume()
    for number in range(int(4 * RENEW_S) - 1):
        await asyncio.sleep(1)
        await it.write(str(number))
    presence = it.line.of(Presence)
    assert [message.states[0].clock for message in presence] == [1, 2, 3, 4]
    await it.end()


@play
async def test_a_draft_is_told_in_differences_ten_times_a_second_at_most() -> None:
    it = await scene()
    it.uplink.resume()
    await asyncio.sleep(1)
    text = "Wörter, die wachsen"
    for length in range(1, len(text) + 1):
        it.uplink.draft("", text[:length])
        await asyncio.sleep(0.02)
    await asyncio.sleep(1)
    drafts = it.line.of(Draft)
    assert len(drafts) <= 1 + 0.02 * len(text) / 0.1 + 1
    told = b""
    for draft in drafts:
        told = told[: draft.keep] + draft.text.encode()
    assert told.decode() == text
    assert sum(len(draft.text) for draft in drafts) == len(text)
    it.line.say(ConnectionLost("gone"))
    await asyncio.sleep(1)
    assert it.line.of(Draft) == [Draft(it.line.of(Open)[0].channel, "", 0, text)]
    it.uplink.draft("", "")
    await it.write("the message itself")
    await asyncio.sleep(2)
    assert it.line.of(Draft)[-1].after is None
    said = [message for message in it.line.heard if isinstance(message, Update | Draft)]
    assert isinstance(said[-2], Update)  # what was typed is there before the draft is dropped
    await it.end()


@play
async def test_a_request_makes_a_connection_of_its_own() -> None:
    it = await scene()
    asking = asyncio.create_task(it.connection.request("archive", {"archived": True}))
    await asyncio.sleep(1)
    (request,) = it.line.of(Request)
    it.line.say(Answer(request.id, {"done": 1}, "", ""))
    assert await asking == {"done": 1}
    await asyncio.sleep(1)
    assert it.exchange.here == 0
    refused = asyncio.create_task(it.connection.request("revoke", {}))
    await asyncio.sleep(1)
    it.line.say(Answer(it.line.of(Request)[0].id, None, "forbidden", "not yours"))
    with pytest.raises(Refused, match="not yours"):
        await refused
    lost = asyncio.create_task(it.connection.request("revoke", {}))
    await asyncio.sleep(1)
    it.line.say(ConnectionLost("gone"))
    with pytest.raises(ConnectionLost):
        await lost
    await it.end()


@play
async def test_the_list_is_asked_for_on_each_connection() -> None:
    it = await scene()
    it.connection.watch()
    watch = it.connection.listings.watch()
    for number in range(2):
        await asyncio.sleep(1)
        assert it.line.of(Watch) == [Watch(on=True)]
        it.line.say(Listed(whole=True, end=False, conversations=((CONVERSATION, {"title": "a"}),)))
        other = (CONVERSATION[::-1], {"title": f"b{number}", "changed_at": 5})
        it.line.say(Listed(whole=True, end=True, conversations=(other,)))
        assert [line.title for line in await anext(watch)] == [f"b{number}", "a"]
        it.line.say(Listed(whole=False, end=True, conversations=((CONVERSATION, None),)))
        assert [line.title for line in await anext(watch)] == [f"b{number}"]
        it.line.say(ConnectionLost("gone"))
    waiting = asyncio.ensure_future(anext(watch))
    await asyncio.sleep(1)
    await it.end()
    with pytest.raises(ConnectionLost, match="closed"):
        await waiting


@play
async def test_another_token_is_told_on_the_same_connection() -> None:
    it = await scene()
    it.uplink.resume()
    await asyncio.sleep(1)
    it.exchange.welcomes = False
    it.connection.renew("another")
    await it.write("meanwhile")
    await asyncio.sleep(1)
    assert [hello.token for hello in it.line.of(Hello)] == ["a token", "another"]
    assert not any(b"meanwhile" in update.update for update in it.line.of(Update))
    it.line.say(WELCOME)
    await asyncio.sleep(1)
    assert any(b"meanwhile" in update.update for update in it.line.of(Update))
    assert len(it.exchange.lines) == 1
    await it.end()


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
    assert logged == ["a bug in the connection"]
    assert it.uplink.synced
    await it.end()
