"""The node's side of the native dialect, against a relay that says what the test says."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from random import Random
from typing import TYPE_CHECKING, TypeVar

import pytest
import pytest_asyncio

from crdt_llm.document.chain import lease_message
from crdt_llm.document.conversation import EMPTY_STATE_VECTOR, Conversation
from crdt_llm.document.keys import SigningKey
from crdt_llm.document.schema import SCHEMA_VERSION, Birth, conversation_id
from crdt_llm.errors import (
    AuthenticationFailed,
    ConnectionLost,
    Corrupt,
    Forbidden,
    Gap,
    LeaseLost,
    Refused,
    TooLarge,
    Unavailable,
)
from crdt_llm.sync.node.link import Calls, NodeLink
from crdt_llm.sync.wire.frames import (
    VERSION,
    Ack,
    Change,
    Closed,
    Code,
    Hello,
    Hint,
    Leased,
    Leave,
    Nack,
    Open,
    Opened,
    Renew,
    Renewed,
    Update,
    WantLease,
    Welcome,
    Work,
    decode_from_client,
    encode,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from crdt_llm.errors import CrdtLlmError
    from crdt_llm.sync.node.link import NodeSeat
    from crdt_llm.sync.wire.frames import FromClient, FromRelay

RELAY, NODE = SigningKey(b"r" * 32), SigningKey(b"n" * 32)
BIRTH = Birth("owner", bytes(16))
HERE = conversation_id(BIRTH)
Kind = TypeVar("Kind")


class Wire:
    """One connection; the test is the relay at its other end."""

    def __init__(self) -> None:
        self._up: asyncio.Queue[bytes] = asyncio.Queue()
        self._down: asyncio.Queue[bytes | ConnectionLost] = asyncio.Queue()

    async def send(self, frame: bytes) -> None:
        self._up.put_nowait(frame)

    async def receive(self) -> bytes:
        frame = await self._down.get()
        if isinstance(frame, ConnectionLost):
            raise frame
        return frame

    # -- the relay's end

    def say(self, *frames: FromRelay) -> None:
        for frame in frames:
            self._down.put_nowait(encode(frame))

    def close(self, code: int = 1006, reason: str = "") -> None:
        self._down.put_nowait(ConnectionLost("closed", code=code, reason=reason))

    async def hear(self, kind: type[Kind]) -> Kind:
        frame: FromClient = decode_from_client(await self._up.get())
        assert isinstance(frame, kind), frame
        return frame


class Relay:
    """Where the node dials; every connection is a new wire."""

    def __init__(self) -> None:
        self.wires: asyncio.Queue[Wire] = asyncio.Queue()
        self.worked: list[str] = []
        self.work = asyncio.Event()
        self.document = Conversation(7)
        with self.document.writing() as writer:
            writer.give_birth(BIRTH, SCHEMA_VERSION)
        self.link = NodeLink(
            self.dial,
            token=lambda: "token",
            name="ada",
            node=NODE.public,
            pin=self.pin,
            work=self.take_work,
            random=Random(1),
        )
        self.running = asyncio.create_task(self.link.run())

    def take_work(self, conversation: str) -> None:
        self.worked.append(conversation)
        self.work.set()

    @asynccontextmanager
    async def dial(self) -> AsyncIterator[Wire]:
        wire = Wire()
        self.wires.put_nowait(wire)
        yield wire

    def pin(self, key: bytes) -> None:
        if key != RELAY.public:
            raise Refused("relay-key", "another key")

    async def accept(self) -> Wire:
        wire = await self.wires.get()
        hello = await wire.hear(Hello)
        assert hello == Hello(VERSION, "token", "ada", NODE.public)
        wire.say(Welcome(VERSION, "node", RELAY.public, None, "log"))
        return wire

    def opened(self, channel: int, update: bytes, lsn: int = 3) -> Opened:
        has = self.document.state_vector()
        return Opened(channel, "log", lsn, update, has, None, behind=False)


@pytest_asyncio.fixture
async def relay() -> AsyncIterator[Relay]:
    relay = Relay()
    yield relay
    relay.running.cancel()
    await asyncio.gather(relay.running, return_exceptions=True)


class Sitter:
    """Somebody on a seat, and what they heard."""

    def __init__(self) -> None:
        self.delivered: list[bytes] = []
        self.lost = asyncio.Event()
        self.hints: list[tuple[int, str | None, int, str]] = []
        self.calls = Calls(
            self.delivered.append, self.lost.set, lambda *hint: self.hints.append(hint)
        )


async def seated(relay: Relay) -> tuple[Wire, NodeSeat, Sitter, int]:
    """A node on a seat; its wire, and the number of its channel."""
    wire, sitter = await relay.accept(), Sitter()
    taking = asyncio.create_task(relay.link.take_seat(HERE, sitter.calls))
    asked = await wire.hear(Open)
    assert asked == Open(asked.channel, HERE, None, 0, EMPTY_STATE_VECTOR)
    wire.say(relay.opened(asked.channel, relay.document.diff()))
    return wire, await taking, sitter, asked.channel


def changed(relay: Relay, title: str) -> bytes:
    with relay.document.writing() as writer:
        writer.set_meta("title", title)
    assert writer.change is not None
    return writer.change.update


def signed(epoch: int) -> bytes:
    return RELAY.sign(lease_message(HERE, epoch, NODE.public))


async def test_a_seat_begins_with_the_document_and_hears_what_follows(relay: Relay) -> None:
    wire, seat, sitter, channel = await seated(relay)
    assert Conversation(1, update=seat.state).id == HERE
    update = changed(relay, "news")
    wire.say(Change(channel, 4, update), Hint(channel, 1, "", 0, "hel"), Work((HERE,)))
    await relay.work.wait()
    assert sitter.delivered == [update]
    assert sitter.hints == [(1, "", 0, "hel")]
    assert relay.worked == [HERE]


async def test_what_is_said_on_a_channel_that_was_just_left_is_work(relay: Relay) -> None:
    """The relay names no work there before it has heard that the seat was left."""
    wire, seat, sitter, channel = await seated(relay)
    await seat.leave()
    await wire.hear(Leave)
    wire.say(Change(channel, 4, changed(relay, "news")))
    await relay.work.wait()
    assert (relay.worked, sitter.delivered) == ([HERE], [])
    wire.say(Closed(channel, 1000, ""), Change(channel, 5, changed(relay, "more")), Work((HERE,)))
    relay.work.clear()
    await relay.work.wait()
    assert relay.worked == [HERE, HERE]


async def test_after_a_lost_connection_only_what_is_missing_is_asked_for(relay: Relay) -> None:
    wire, _, sitter, channel = await seated(relay)
    wire.say(Change(channel, 9, changed(relay, "first")))
    known = relay.document.state_vector()
    wire.close()
    await sitter.lost.wait()
    missed = changed(relay, "second")
    wire = await relay.accept()
    taking = asyncio.create_task(relay.link.take_seat(HERE, Sitter().calls))
    asked = await wire.hear(Open)
    assert (asked.log, asked.lsn, asked.state_vector) == ("log", 9, known)
    wire.say(relay.opened(asked.channel, missed, 10))
    document = Conversation(1, update=(await taking).state)
    assert document.meta.title == "second"


async def test_a_node_does_not_build_on_what_the_relay_has_lost(relay: Relay) -> None:
    wire, seat, _, channel = await seated(relay)
    lost = changed(relay, "lost")
    wire.say(Change(channel, 9, lost))
    await seat.leave()
    await wire.hear(Leave)
    relay.document = Conversation(8)
    with relay.document.writing() as writer:
        writer.give_birth(BIRTH, SCHEMA_VERSION)
    for known in (True, False):
        taking = asyncio.create_task(relay.link.take_seat(HERE, Sitter().calls))
        asked = await wire.hear(Open)
        assert (asked.log is not None) is known
        wire.say(relay.opened(asked.channel, relay.document.diff(), 1))
        if known:
            with pytest.raises(Unavailable):
                await taking
            await wire.hear(Leave)
    assert Conversation(1, update=(await taking).state).meta.title == ""


async def test_an_update_is_durable_with_its_acknowledgement_and_kept_then(relay: Relay) -> None:
    wire, seat, sitter, channel = await seated(relay)
    update = changed(relay, "mine")
    submitting = asyncio.create_task(seat.submit(update))
    assert await wire.hear(Update) == Update(channel, 1, update)
    assert not submitting.done()
    wire.say(Ack(channel, 1, 4))
    await submitting
    wire.close()
    await sitter.lost.wait()
    wire = await relay.accept()
    taking = asyncio.create_task(relay.link.take_seat(HERE, Sitter().calls))
    asked = await wire.hear(Open)
    assert asked.state_vector == relay.document.state_vector()
    taking.cancel()


async def test_what_was_not_acknowledged_is_not_known_to_be_durable(relay: Relay) -> None:
    wire, seat, _, _ = await seated(relay)
    submitting = asyncio.create_task(seat.submit(changed(relay, "mine")))
    await wire.hear(Update)
    wire.close()
    with pytest.raises(ConnectionLost):
        await submitting
    with pytest.raises(ConnectionLost):
        await seat.submit(b"more")


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (Code.STALE_EPOCH, LeaseLost),
        (Code.GAP, Gap),
        (Code.DENIED, Forbidden),
        (Code.INVALID, Refused),
        (Code.TOO_LARGE, TooLarge),
    ],
)
async def test_a_refusal_says_why(relay: Relay, code: Code, error: type[CrdtLlmError]) -> None:
    wire, seat, _, channel = await seated(relay)
    submitting = asyncio.create_task(seat.submit(changed(relay, "mine")))
    await wire.hear(Update)
    wire.say(Nack(channel, 1, code, "a-rule", "so it is", None, None))
    with pytest.raises(error, match="so it is"):
        await submitting


async def test_what_the_relay_could_not_take_is_sent_again(relay: Relay) -> None:
    wire, seat, _, channel = await seated(relay)
    update = changed(relay, "mine")
    submitting = asyncio.create_task(seat.submit(update))
    await wire.hear(Update)
    wire.say(Nack(channel, 1, Code.UNAVAILABLE, "", "the disk is full", 1, None))
    assert await wire.hear(Update) == Update(channel, 2, update)
    wire.say(Ack(channel, 2, 4))
    await submitting


async def test_a_lease_is_asked_for_checked_and_renewed(relay: Relay) -> None:
    wire, seat, _, channel = await seated(relay)
    asking = asyncio.create_task(seat.lease())
    assert await wire.hear(WantLease) == WantLease(channel, hold=True)
    wire.say(Leased(channel, None, b"", 60_000, "another node has it"))
    wire.say(Leased(channel, 4, signed(4), 60, ""))  # unasked, when it is free
    lease = await asking
    assert (lease.epoch, lease.node, lease.signature) == (4, NODE.public, signed(4))
    for _ in range(2):
        await wire.hear(Renew)
        wire.say(Renewed(60))


async def test_a_lease_that_the_relay_did_not_sign_is_none(relay: Relay) -> None:
    wire, seat, _, channel = await seated(relay)
    asking = asyncio.create_task(seat.lease())
    await wire.hear(WantLease)
    wire.say(Leased(channel, 4, signed(5), 60_000, ""))
    with pytest.raises(Unavailable):
        await asking


async def test_a_lease_that_ends_takes_the_seat_along(relay: Relay) -> None:
    wire, seat, sitter, channel = await seated(relay)
    asking = asyncio.create_task(seat.lease())
    await wire.hear(WantLease)
    wire.say(Leased(channel, 4, signed(4), 60_000, ""))
    await asking
    submitting = asyncio.create_task(seat.submit(changed(relay, "late")))
    await wire.hear(Update)
    wire.say(Leased(channel, None, b"", 0, "another node has taken over"))
    with pytest.raises(LeaseLost):
        await submitting
    assert sitter.lost.is_set()
    await wire.hear(Leave)


async def test_a_wish_that_is_withdrawn_is_told(relay: Relay) -> None:
    wire, seat, _, channel = await seated(relay)
    asking = asyncio.create_task(seat.lease())
    await wire.hear(WantLease)
    asking.cancel()
    assert await wire.hear(WantLease) == WantLease(channel, hold=False)


async def test_a_relay_that_does_not_renew_is_given_up(relay: Relay) -> None:
    """By then another node may have been told to act."""
    wire, seat, sitter, channel = await seated(relay)
    asking = asyncio.create_task(seat.lease())
    await wire.hear(WantLease)
    wire.say(Leased(channel, 4, signed(4), 30, ""))
    await asking
    await wire.hear(Renew)
    await sitter.lost.wait()
    await relay.accept()


@pytest.mark.parametrize(
    ("code", "error"), [(4403, Forbidden), (4410, Corrupt), (1013, Unavailable)]
)
async def test_a_seat_that_is_not_given_says_why(
    relay: Relay, code: int, error: type[CrdtLlmError]
) -> None:
    wire = await relay.accept()
    taking = asyncio.create_task(relay.link.take_seat(HERE, Sitter().calls))
    asked = await wire.hear(Open)
    wire.say(Closed(asked.channel, code, "because"))
    with pytest.raises(error, match="because"):
        await taking


async def test_a_seat_that_ends_is_lost(relay: Relay) -> None:
    wire, _, sitter, channel = await seated(relay)
    wire.say(Closed(channel, 1013, "too many conversations are open"))
    await sitter.lost.wait()


async def test_a_node_that_is_refused_does_not_come_back(relay: Relay) -> None:
    wire = await relay.accept()
    wire.close(4401, "unauthenticated: that token ended")
    with pytest.raises(AuthenticationFailed, match="that token ended"):
        await relay.running


async def test_a_relay_with_another_key_is_refused(relay: Relay) -> None:
    wire = await relay.wires.get()
    await wire.hear(Hello)
    wire.say(Welcome(VERSION, "node", bytes(32), None, "log"))
    with pytest.raises(Refused, match="another key"):
        await relay.running
