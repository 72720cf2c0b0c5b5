from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING

import pytest
from sync.device import CONVERSATION, Device
from sync.rooms import Place, born, turns

from crdt_llm.document.schema import Grant
from crdt_llm.errors import Refused, Stopping
from crdt_llm.sync.relay import outbox as outbox_module
from crdt_llm.sync.relay import plain_peer as peer_module
from crdt_llm.sync.relay.plain_peer import RemotePeer
from crdt_llm.sync.room import room as room_module
from crdt_llm.sync.wire.verdict import CLOSE_REASON_BYTES_MAX, CloseCode
from crdt_llm.sync.wire.y_websocket import (
    AUTH_REASON_BYTES_MAX,
    AuthDenied,
    AwarenessState,
    AwarenessUpdate,
    QueryAwareness,
    SyncStep1,
    SyncStep2,
    SyncUpdate,
    decode,
    encode,
)

if TYPE_CHECKING:
    from crdt_llm.sync.wire.y_websocket import Message


class Connection:
    """A device on a peer; nothing moves unless the test moves it."""

    def __init__(self, seed: int, principal: str = "owner") -> None:
        self.device = Device(Random(seed), principal)
        self.woken = 0
        self.peer = RemotePeer(principal, self.wake)
        self.taken: list[Message] = []

    def wake(self) -> None:
        self.woken += 1

    async def open(self, place: Place) -> None:
        await place.hub.enter(CONVERSATION, self.peer)
        self.device.connect()

    async def up(self) -> None:
        for frame in self.device.frames():
            await self.peer.receive(frame)
        await turns()

    def down(self, count: int | None = None) -> None:
        while count is None or count > 0:
            frame = self.peer.take()
            if frame is None:
                return
            self.taken.append(decode(frame))
            if self.device.link is not None:
                self.device.take(frame)
            if count is not None:
                count -= 1

    async def settle(self) -> None:
        for _ in range(4):
            self.down()
            await turns()
            await self.up()
        self.down()

    def of(self, kind: type[Message]) -> list[Message]:
        return [message for message in self.taken if isinstance(message, kind)]


async def connected(place: Place, seed: int, principal: str = "owner") -> Connection:
    connection = Connection(seed, principal)
    await connection.open(place)
    await connection.settle()
    return connection


async def test_two_devices_end_equal_and_an_update_is_no_echo() -> None:
    place = Place()
    await born(place)
    a, b = await connected(place, 1), await connected(place, 2)
    a.device.say("from a")
    await a.settle()
    await b.settle()
    assert b.device.texts == ["from a"]
    assert len(b.of(SyncUpdate)) == 1
    assert a.of(SyncUpdate) == []


async def test_the_server_asks_first_and_answers_after_the_clients_answer() -> None:
    place = Place()
    owner, device = await born(place)
    await owner.membership.submit(device.say("secret so far"))
    connection = Connection(1)
    await connection.open(place)
    step1, *_ = frames = connection.device.frames()
    await connection.peer.receive(step1)
    await turns()
    connection.down()
    assert len(connection.of(SyncStep1)) == 1
    assert connection.of(SyncStep2) == []
    assert len(frames) >= 1
    await connection.settle()
    assert connection.device.texts == ["secret so far"]


async def test_a_gap_is_mended_over_the_wire() -> None:
    place = Place()
    await born(place)
    connection = await connected(place, 1)
    connection.device.say("lost on the way")
    connection.device.frames()
    connection.device.say("arrives")
    await connection.settle()
    assert connection.peer.close_code is None
    reader = await connected(place, 2)
    assert reader.device.texts == ["lost on the way", "arrives"]


async def test_a_refusal_reaches_the_client_and_nobody_else() -> None:
    place = Place()
    await born(place)
    hostile, other = await connected(place, 1), await connected(place, 2)
    hostile.device.forge()
    hostile.device.say("after it")
    await hostile.up()
    hostile.down()
    await other.settle()
    assert hostile.peer.close_code == CloseCode.REFUSED
    assert hostile.taken[-1] == AuthDenied("schema: meta has no 'no-such-key'")
    assert hostile.peer.take() is None
    assert other.of(SyncUpdate) == []
    assert other.device.texts == []


@pytest.mark.parametrize("batch", [1, 64])
async def test_what_waited_behind_a_refused_update_is_never_looked_at(
    monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    monkeypatch.setattr(room_module, "BATCH_UPDATES_MAX", batch)
    place = Place()
    await born(place)
    hostile = await connected(place, 1)
    place.gate.clear()
    hostile.device.entitle("blocks the turn")
    await hostile.up()
    hostile.device.forge()
    await hostile.up()
    other = Device(Random(9))
    other.merge(hostile.device.written[0])
    other.merge(place.hub._rooms[CONVERSATION]._replica.document.diff())
    await hostile.peer.receive(encode(SyncUpdate(other.entitle("fine by itself"))))
    await turns()
    place.gate.set()
    await turns()
    assert place.durable == 2
    assert hostile.peer.close_code == CloseCode.REFUSED


async def test_a_slow_reader_gets_one_difference_for_all_it_missed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(outbox_module, "WAITING_FRAMES_MAX", 10)
    place = Place()
    await born(place)
    writer, slow = await connected(place, 1), await connected(place, 2)
    updates, documents = len(slow.of(SyncUpdate)), len(slow.of(SyncStep2))
    for number in range(50):
        writer.device.say(f"{number}")
        await writer.up()
    assert len(slow.peer._outbox._updates) <= 10
    await slow.settle()
    assert slow.device.texts == writer.device.texts
    assert len(slow.of(SyncUpdate)) == updates
    assert len(slow.of(SyncStep2)) == documents + 1


async def test_a_reader_that_stays_slow_misses_nothing_however_the_frames_fall(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(outbox_module, "WAITING_FRAMES_MAX", 5)
    for seed in range(20):
        random = Random(seed)
        place = Place()
        await born(place)
        writer, slow = await connected(place, 1), await connected(place, 2)
        for _ in range(60):
            if random.random() < 0.7:
                writer.device.say("x")
                await writer.up()
            else:
                slow.down(random.randrange(4))
                await turns()
            if random.random() < 0.05:
                assert slow.device.link is not None
                slow.device.link.put(SyncStep1(slow.device.replica.state_vector()))
                await slow.up()
        await slow.settle()
        assert slow.device.texts == writer.device.texts


async def test_what_fits_no_frame_comes_as_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_module, "UPDATE_BYTES_MAX", 300)
    place = Place()
    await born(place)
    writer, reader = await connected(place, 1), await connected(place, 2)
    documents = len(reader.of(SyncStep2))
    writer.device.say("x" * 300)
    await writer.up()
    await reader.settle()
    assert reader.device.texts == ["x" * 300]
    assert reader.of(SyncUpdate) == []
    assert len(reader.of(SyncStep2)) == documents + 1


async def test_presence_is_shared_and_echoed() -> None:
    place = Place()
    await born(place)
    a, b = await connected(place, 1), await connected(place, 2)
    a.down()
    mine = AwarenessUpdate((AwarenessState(77, 1, '{"name":"a"}'),))
    await a.peer.receive(encode(mine))
    await turns()
    a.down()
    b.down()
    assert a.taken[-1] == b.taken[-1] == mine
    late = await connected(place, 3)
    assert any(mine.states[0] in message.states for message in late.of(AwarenessUpdate))  # type: ignore[union-attr]


async def test_presence_can_be_asked_for() -> None:
    place = Place()
    await born(place)
    a = await connected(place, 1)
    await a.peer.receive(encode(AwarenessUpdate((AwarenessState(77, 1, "{}"),))))
    a.down()
    await a.peer.receive(encode(QueryAwareness()))
    a.down()
    assert AwarenessState(77, 1, "{}") in a.taken[-1].states  # type: ignore[union-attr]


async def test_whoever_leaves_is_gone_for_all() -> None:
    place = Place()
    await born(place)
    a, b = await connected(place, 1), await connected(place, 2)
    await a.peer.receive(encode(AwarenessUpdate((AwarenessState(77, 3, "{}"),))))
    a.peer.leave()
    b.down()
    assert AwarenessState(77, 3, None) in b.taken[-1].states  # type: ignore[union-attr]


async def test_presence_that_is_not_renewed_expires() -> None:
    place = Place()
    await born(place)
    a = await connected(place, 1)
    await a.peer.receive(encode(AwarenessUpdate((AwarenessState(77, 3, "{}"),))))
    a.down()
    place.now += 31
    place.hub.tick()
    a.down()
    assert AwarenessState(77, 3, None) in a.taken[-1].states  # type: ignore[union-attr]


async def test_a_stop_says_come_back() -> None:
    place = Place()
    await born(place)
    connection = await connected(place, 1)
    await place.hub.close()
    assert connection.peer.close_code == CloseCode.RESTART
    assert not any(isinstance(message, AuthDenied) for message in connection.taken)


async def test_a_failed_commit_says_come_back() -> None:
    place = Place()
    await born(place)
    writer, reader = await connected(place, 1), await connected(place, 2)
    place.failing = True
    writer.device.say("x")
    await writer.up()
    assert writer.peer.close_code == CloseCode.TRY_AGAIN
    assert not any(isinstance(message, AuthDenied) for message in writer.taken)
    assert reader.peer.close_code is None
    assert reader.device.texts == []


async def test_whoever_loses_the_right_is_told_why() -> None:
    place = Place()
    owner, device = await born(place)
    await owner.membership.submit(device.grant("will", Grant.WRITER))
    will = await connected(place, 1, "will")
    await owner.membership.submit(device.grant("will", None))
    will.down()
    assert will.peer.close_code == CloseCode.FORBIDDEN
    assert isinstance(will.taken[-1], AuthDenied)


async def test_reasons_fit_their_frames() -> None:
    peer = RemotePeer("owner", lambda: None)
    peer.refuse(Refused("long", "ä" * 5000))
    message = decode(peer.take() or b"")
    assert isinstance(message, AuthDenied)
    assert 1000 < len(message.reason.encode()) <= AUTH_REASON_BYTES_MAX
    assert len(peer.close_reason.encode()) <= CLOSE_REASON_BYTES_MAX
    peer.refuse(Stopping("twice"))
    assert peer.close_code == CloseCode.REFUSED


async def test_after_the_end_nothing_goes_in_or_out() -> None:
    place = Place()
    await born(place)
    connection = await connected(place, 1)
    connection.peer.refuse(Refused("x", "y"))
    connection.down()
    connection.device.say("too late")
    await connection.up()
    other = await connected(place, 2)
    other.device.say("z")
    await other.up()
    assert connection.peer.take() is None
    assert other.device.texts == ["z"]
