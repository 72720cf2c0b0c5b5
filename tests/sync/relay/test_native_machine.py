"""Clients of the native dialect over a network that loses, repeats and cuts: what holds for all."""

from __future__ import annotations

import asyncio
from random import Random
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from sync.device import CONVERSATION, Device
from sync.native import Native, open_frame
from sync.rooms import Place

from crdt_llm.document.conversation import Conversation
from crdt_llm.sync.relay import outbox as outbox_module
from crdt_llm.sync.room.room import STORE_PAUSE_MAX_S
from crdt_llm.sync.update.structure import read_update
from crdt_llm.sync.wire.frames import (
    Ack,
    Change,
    Closed,
    Code,
    Leave,
    Nack,
    Opened,
    Pull,
    State,
    Update,
    decode_from_relay,
)
from crdt_llm.sync.wire.y_websocket import decode_state_vector

if TYPE_CHECKING:
    from crdt_llm.sync.wire.frames import FromRelay

CLIENTS = 3


class Client:
    """A device, and what its client keeps: what has no verdict yet, and how far it has the log."""

    def __init__(self, place: Place, number: int) -> None:
        self.place = place
        self.device = Device(Random(number))
        self.outbox: list[bytes] = []
        self.refused: list[bytes] = []
        self.log: str | None = None
        self.lsn = 0
        self.native: Native | None = None
        self.is_open = False
        self.last_id = 0
        self.in_flight: dict[int, bytes] = {}
        self.lacks = False  # something was put off, so what builds on it is a gap
        self.verdicts: list[int] = []
        self.lsns: list[int] = []
        self.client_id = self.device.replica.client_id
        self.sent: set[bytes] = set()
        self.fresh: set[int] = set()  # clocks that were never sent but on this channel

    async def connect(self) -> None:
        self.native = Native(self.place)
        await self.native.greet()
        await self.open()

    async def open(self) -> None:
        assert self.native is not None
        self.is_open, self.last_id = False, 0
        self.in_flight.clear()
        self.verdicts.clear()
        self.lsns.clear()
        self.lacks = False
        self.fresh.clear()
        vector = self.device.replica.state_vector()
        await self.native.send(open_frame(log=self.log, lsn=self.lsn, state_vector=vector))

    def cut(self) -> None:
        if self.native is not None:
            self.native.connection.leave()
            self.native, self.is_open = None, False

    async def send(self, update: bytes) -> None:
        if self.native is not None and self.is_open:
            self.last_id += 1
            self.in_flight[self.last_id] = update
            if update not in self.sent:
                self.sent.add(update)
                self.fresh |= self._own_clocks(update)
            await self.native.send(Update(1, self.last_id, update))

    async def try_again(self) -> None:
        """Send what was put off, and what came behind it."""
        waiting = set(self.in_flight.values())
        for update in [one for one in self.outbox if one not in waiting]:
            await self.send(update)

    async def hear(self, limit: int | None = None) -> None:
        """Take some of what waits; the rest stays with a slow reader."""
        while self.native is not None and (limit is None or limit > 0):
            raw = self.native.connection.take()
            if raw is None:
                return
            self.native.taken.clear()
            await self._take(decode_from_relay(raw))
            if limit is not None:
                limit -= 1

    async def _take(self, frame: FromRelay) -> None:  # noqa: C901 - a table of frames
        match frame:
            case Opened(log=log, lsn=lsn, update=update):
                self.is_open, self.log = True, log
                self._follow(lsn)
                assert self.device.merge(update)
                await self._have(lsn)
                for waiting in list(self.outbox):
                    await self.send(waiting)
            case Change(lsn=lsn, update=update):
                self._follow(lsn)
                assert not self.fresh & self._own_clocks(update), "an own write came back"
                assert self.device.merge(update), "a hole: the order is not the log's"
                await self._have(lsn)
            case State(lsn=lsn, update=update):
                self._follow(lsn)
                assert self.device.merge(update)
                await self._have(lsn)
            case Ack(id=number, lsn=lsn):
                assert number in self.in_flight, "a verdict on nothing"
                await self._have(lsn)
                for one in sorted(self.in_flight):
                    if one <= number:
                        self._decide(one)
                        self.outbox.remove(self.in_flight.pop(one))
            case Nack(id=number, code=Code.UNAVAILABLE | Code.GAP as code):
                assert min(self.in_flight) == number, "a verdict was passed over"
                self.lacks = self.lacks or code is Code.UNAVAILABLE
                assert self.lacks, "a gap, and nothing was put off"
                self._decide(number)
                del self.in_flight[number]
            case Nack(id=number):
                assert min(self.in_flight) == number, "a verdict was passed over"
                self._decide(number)
                update = self.in_flight.pop(number)
                self.outbox.remove(update)
                self.refused.append(update)
            case Closed():
                self.is_open = False
            case _:
                pass

    def _own_clocks(self, update: bytes) -> set[int]:
        return {one.clock for one in read_update(update).structs.get(self.client_id, ())}

    def _follow(self, lsn: int) -> None:
        assert not self.lsns or lsn >= self.lsns[-1], "the log went back"
        self.lsns.append(lsn)

    async def _have(self, lsn: int) -> None:
        """With this frame it has everything up to there."""
        self.lsn = max(self.lsn, lsn)
        loaded = await self.place.log.load(CONVERSATION)
        mine = decode_state_vector(self.device.replica.state_vector())
        for number, update in loaded.updates:
            if number <= lsn:
                for client, end in read_update(update).ends.items():
                    assert mine.get(client, 0) >= end, "it lacks what it was said to have"

    def _decide(self, number: int) -> None:
        assert not self.verdicts or number > self.verdicts[-1], "two verdicts, or out of order"
        self.verdicts.append(number)


class NativeMachine(RuleBasedStateMachine):
    """Several clients of one conversation."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.clients: list[Client] = []
        self.patch = pytest.MonkeyPatch()

    @initialize()
    def begin(self) -> None:
        """A conversation with a birth, and clients that know it; little may wait for each."""
        self.patch.setattr(outbox_module, "WAITING_FRAMES_MAX", 3)
        self.place = self.loop.run_until_complete(self._begin())
        self.clients = [Client(self.place, number) for number in range(CLIENTS)]
        self.texts = 0
        birth = self.clients[0].device.give_birth()
        self.clients[0].outbox.append(birth)
        self._run(self._settle())

    async def _begin(self) -> Place:
        return Place()

    def _run(self, work: object) -> None:
        self.loop.run_until_complete(work)  # type: ignore[arg-type]

    async def _turns(self) -> None:
        for _ in range(30):
            await asyncio.sleep(0)

    client = st.integers(0, CLIENTS - 1)

    @rule(number=client)
    def connect(self, number: int) -> None:
        client = self.clients[number]
        if client.native is None:
            self._run(client.connect())

    @rule(number=client)
    def cut(self, number: int) -> None:
        self.clients[number].cut()

    @rule(number=client)
    def leave_and_open(self, number: int) -> None:
        client = self.clients[number]
        if client.native is not None and client.is_open:
            self._run(client.native.send(Leave(1)))
            client.is_open = False
            self._run(self._turns())
            self._run(client.hear())
            self._run(client.open())

    @rule(number=client, count=st.integers(1, 6), apart=st.booleans())
    def write(self, number: int, count: int, apart: bool) -> None:  # noqa: FBT001 - drawn
        client = self.clients[number]
        for _ in range(count):
            self.texts += 1
            update = client.device.say(f"text {self.texts}")
            client.outbox.append(update)
            self._run(client.send(update))
            if apart:  # in commits of their own
                self._run(self._turns())

    @rule(talks=client, hears=client, count=st.integers(4, 8), answers=st.booleans())
    def talk_to_a_slow_reader(self, talks: int, hears: int, count: int, answers: bool) -> None:  # noqa: FBT001 - drawn
        for _ in range(count):
            self.write(talks, 1, apart=True)
        if answers:
            self.write(hears, 1, apart=True)
        self._run(self.clients[hears].hear(2))
        self.write(talks, 1, apart=True)
        self._run(self._turns())
        self._run(self.clients[hears].hear())

    @rule(number=client)
    def repeat(self, number: int) -> None:
        client = self.clients[number]
        if client.outbox:
            update = client.outbox[0]
            client.outbox.append(update)
            self._run(client.send(update))

    @rule(number=client, limit=st.integers(1, 5))
    def hear_a_little(self, number: int, limit: int) -> None:
        self._run(self._turns())
        self._run(self.clients[number].hear(limit))

    @rule(number=client)
    def pull(self, number: int) -> None:
        client = self.clients[number]
        if client.native is not None and client.is_open:
            self._run(client.native.send(Pull(1, client.device.replica.state_vector())))

    @precondition(lambda self: not self.place.failing)
    @rule()
    def disk_fails(self) -> None:
        self.place.failing = True

    @rule()
    def disk_heals(self) -> None:
        self.place.failing = False

    @rule(number=client)
    def try_again(self, number: int) -> None:
        self.place.now += STORE_PAUSE_MAX_S
        self._run(self.clients[number].try_again())

    @rule()
    def heal(self) -> None:
        self._run(self._settle())
        vectors = {client.device.replica.state_vector() for client in self.clients}
        views = {tuple(client.device.texts) for client in self.clients}
        assert len(vectors) == len(views) == 1
        assert all(not client.outbox for client in self.clients)
        assert len(self.clients[0].device.texts) == self.texts

    async def _settle(self) -> None:
        self.place.failing = False
        self.place.now += STORE_PAUSE_MAX_S
        for client in self.clients:
            client.cut()
        for _ in range(3):
            for client in self.clients:
                if client.native is None:
                    await client.connect()
                elif not client.is_open:
                    await client.open()
            for _ in range(3):
                await self._turns()
                for client in self.clients:
                    await client.hear()

    @invariant()
    def nothing_acknowledged_is_missing(self) -> None:
        if not self.clients:
            return
        stored = self.place.disk.conversations.get(CONVERSATION)
        if stored is None:
            return
        loaded = self.loop.run_until_complete(self.place.log.load(CONVERSATION))
        replica = Conversation(1)
        if loaded.snapshot is not None:
            replica.apply(loaded.snapshot)
        for _, update in loaded.updates:
            replica.apply(update)
        for client in self.clients:
            waiting = set(client.outbox)
            durable = [one for one in client.device.written if one not in waiting]
            for update in durable:
                assert replica.apply(update).is_empty, "acknowledged, and not in the log"

    def teardown(self) -> None:
        try:
            for client in self.clients:
                client.cut()
            if self.clients:
                self._run(self.place.hub.close())
            assert all(not client.refused for client in self.clients)
        finally:
            self.loop.close()
            self.patch.undo()


NativeMachine.TestCase.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)
TestNativeMachine = NativeMachine.TestCase
