"""The production rooms on a simulated disk, network and clock, with crashes at every seam.

One seed is one run: the event loop has nothing to wait for, so the order of everything follows from
the seed, and a failing seed replays. What is simulated is only the outside: the disk
(:mod:`crdt_llm.store.memory`, which says what survives a crash), the wires (which delay, and may
drop, repeat and swap frames, as a broken proxy would), and the devices at their other ends, which
are the client's own core on a replica.

A crash takes the whole process: from that moment nothing of it reaches a wire or the disk, whatever
it still believes.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING, ClassVar

import pytest
from sync.device import CONVERSATION, Device
from sync.rooms import turns

from crdt_llm.document.conversation import Conversation
from crdt_llm.errors import CrdtLlmError, MalformedMessage, StoreFailed
from crdt_llm.store.memory import MemoryDisk, MemoryLog
from crdt_llm.sync.relay import outbox as outbox_module
from crdt_llm.sync.relay.hub import Hub
from crdt_llm.sync.relay.plain_peer import RemotePeer
from crdt_llm.sync.room import room as room_module
from crdt_llm.sync.room import seats as seats_module
from crdt_llm.sync.room import upkeep as upkeep_module
from crdt_llm.sync.room.room import STORE_PAUSE_MAX_S
from crdt_llm.sync.update.structure import brings, find_gap, read_update
from crdt_llm.sync.wire.y_websocket import decode_state_vector

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from crdt_llm.store.memory import MemorySeam
    from crdt_llm.sync.relay.hub import Membership

SEEDS = 40
STEPS = 300
QUIET_ROUNDS = 20  # a turn of a room that commits takes a few of them
FATES = ("arrives", "swapped", "repeated", "dropped")
DEVICES = 3


@dataclass
class Wire:
    """One connection, as seen from outside the process."""

    device: Device
    up: deque[bytes] = field(default_factory=deque)
    down: deque[bytes] = field(default_factory=deque)
    inbox: asyncio.Queue[bytes] = field(default_factory=asyncio.Queue)
    peer: RemotePeer | None = None
    reader: asyncio.Task[None] | None = None
    has_news: bool = False

    def wake(self) -> None:
        self.has_news = True


class Process:
    """One life of the relay's process."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.is_dead = False
        self.crash_in = -1  # visits of seams until it dies; negative: it does not
        self.failing = False
        self.log = MemoryLog(world.disk, clock=lambda: 0, faults=self.seam)
        self.hub = Hub(self.log, clock=lambda: world.now, random=world.random.randbytes)
        self.node: Membership | None = None
        self.tasks: list[asyncio.Task[None]] = []

    async def seam(self, seam: MemorySeam) -> None:
        for _ in range(self.world.random.randrange(4)):
            await asyncio.sleep(0)
        self.visit()
        if self.failing and seam == "before-commit":
            raise StoreFailed("no space")

    def visit(self) -> None:
        """A place where a crash may happen."""
        if self.crash_in >= 0 and not self.is_dead:
            self.crash_in -= 1
            if self.crash_in < 0:
                self.crash()

    def crash(self) -> None:
        self.is_dead = True
        self.log.crash()
        self.world.check_durable()


class World:
    """Everything outside the process, and the seed that moves it."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.disk = MemoryDisk("log")
        self.now = 0.0
        self.devices = [Device(self.random) for _ in range(DEVICES)]
        self.devices[0].give_birth()
        self.wires: dict[Device, Wire] = {}
        self.lossy = True
        self.heard_by_node: list[bytes] = []
        self.promised: list[bytes] = []  # updates that the node was told are durable
        self.node_replica: Device | None = None
        self.process = Process(self)
        self.crashes = 0

    # -- what must hold --------------------------------------------------------------------------

    def check_durable(self) -> None:
        """Whatever anybody has received, or was promised, is on the disk."""
        durable = self.durable()
        known = decode_state_vector(durable.state_vector())
        received = [update for device in self.devices for update in device.received]
        for update in (*received, *self.heard_by_node, *self.promised):
            structure = read_update(update)
            assert find_gap(structure, known) is None
            assert not brings(structure, known, {}) or structure.deleted
            assert durable.apply(update).is_empty, "somebody has what the disk has not"

    def durable(self) -> Conversation:
        replica = Conversation(1)
        stored = self.disk.conversations.get(CONVERSATION)
        for update in () if stored is None else (stored.snapshot, *stored.updates):
            if update is not None:
                replica.apply(update)
        return replica

    # -- what may happen -------------------------------------------------------------------------

    async def connect(self, device: Device) -> None:
        await self.cut(device)
        wire = Wire(device)
        wire.peer = RemotePeer("owner", wire.wake)
        try:
            await self.process.hub.enter(CONVERSATION, wire.peer)
        except CrdtLlmError:
            return
        device.connect()
        self.wires[device] = wire
        wire.reader = asyncio.get_running_loop().create_task(self.read(wire, wire.peer))

    async def read(self, wire: Wire, peer: RemotePeer) -> None:
        while True:
            await peer.receive(await wire.inbox.get())

    async def cut(self, device: Device) -> None:
        device.disconnect()
        wire = self.wires.pop(device, None)
        if wire is None:
            return
        if wire.peer is not None:
            wire.peer.leave()
        if wire.reader is not None:
            wire.reader.cancel()
            await asyncio.wait([wire.reader])

    def pump(self, wire: Wire) -> None:
        """Let the process write frames to a wire, as far as its socket takes them."""
        assert wire.peer is not None
        for _ in range(self.random.randrange(1, 6)):
            frame = None if self.process.is_dead else wire.peer.take()
            if frame is None:
                wire.has_news = False
                return
            wire.down.append(frame)
            self.process.visit()  # between two frames: some peers have heard, others have not

    def move(self, frames: deque[bytes]) -> bytes | None:
        """The next frame of a wire that delays, and may drop, repeat and swap."""
        if not frames:
            return None
        fate = self.random.choices(FATES, (94, 2, 2, 2))[0] if self.lossy else "arrives"
        if fate == "swapped" and len(frames) > 1:
            frames[0], frames[1] = frames[1], frames[0]
        frame = frames.popleft()
        if fate == "repeated":
            frames.appendleft(frame)
        return None if fate == "dropped" else frame

    async def step(self) -> None:
        device = self.random.choice(self.devices)
        (action,) = self.random.choices(list(self.chances), list(self.chances.values()))
        await action(self, device)
        await turns(self.random.randrange(6))
        if self.process.is_dead:
            await self.restart()

    async def write(self, device: Device) -> None:
        if device.replica.id is None:
            return
        if self.random.random() < 0.8:
            device.say(f"{self.random.randrange(1000)}" * self.random.randrange(1, 30))
        else:
            device.entitle(f"{self.random.randrange(10)}")

    async def pass_time(self, _: Device) -> None:
        self.now += self.random.random() * 60
        self.process.hub.tick()

    async def break_or_mend_the_disk(self, _: Device) -> None:
        self.process.failing = self.random.random() < 0.3

    async def doom(self, _: Device) -> None:
        self.process.crash_in = self.random.randrange(12)

    async def carry(self, device: Device) -> None:
        if device in self.wires:
            await self.exchange(self.wires[device])

    async def exchange(self, wire: Wire) -> None:
        device = wire.device
        for _ in range(self.random.randrange(1, 5)):
            wire.up.extend(device.frames())
            if (frame := self.move(wire.up)) is not None and not self.process.is_dead:
                wire.inbox.put_nowait(frame)
            await turns(self.random.randrange(3))
            self.pump(wire)
            if (frame := self.move(wire.down)) is not None:
                try:
                    device.take(frame)
                except MalformedMessage:  # what a broken proxy made of it: the client comes back
                    await self.cut(device)
                    return
        closing = wire.peer is None or wire.peer.close_code is not None
        if closing and not wire.has_news and not wire.down:
            await self.cut(device)

    async def seat_node(self, _: Device) -> None:
        """Something in the process itself takes part, and rebuilds from what it is given."""
        if self.process.node is not None:
            self.process.node.leave()
            self.process.node = None
        replica = Device(self.random)

        def deliver(update: bytes) -> None:
            if not self.process.is_dead:
                self.heard_by_node.append(update)
                assert replica.merge(update), "the order of the log leaves no gaps"
                self.process.visit()

        try:
            node = await self.process.hub.join(CONVERSATION, "owner", deliver=deliver)
        except CrdtLlmError:
            self.node_replica = None
            return
        if not self.process.is_dead:
            self.heard_by_node.append(node.state)
        replica.merge(node.state)
        self.process.node, self.node_replica = node, replica

    async def node_writes(self, _: Device) -> None:
        node, replica = self.process.node, self.node_replica
        if node is None or replica is None or replica.replica.id is None:
            return
        update = replica.say("from inside")

        async def submit() -> None:
            process = self.process
            try:
                await node.submit(update)
            except CrdtLlmError:
                if process.node is node:
                    process.node = None
                return
            if not process.is_dead:
                self.promised.append(update)

        self.process.tasks.append(asyncio.get_running_loop().create_task(submit()))

    async def restart(self) -> None:
        self.crashes += 1
        for device in self.devices:
            await self.cut(device)
        dead = self.process
        self.process = Process(self)
        self.node_replica = None
        for task in (*dead.tasks, *(room._task for room in dead.hub._rooms.values())):
            task.cancel()
            await asyncio.wait([task])

    async def heal(self) -> None:
        """No more faults; everybody comes back until nothing moves."""
        self.lossy = False
        self.process.failing, self.process.crash_in = False, -1
        self.now += STORE_PAUSE_MAX_S
        await turns(50)
        for device in self.devices:
            await self.connect(device)
        quiet = 0
        for _ in range(1000):
            for wire in tuple(self.wires.values()):
                await self.exchange(wire)
            await turns(3)
            moving = any(
                wire.up or wire.down or wire.has_news or not wire.inbox.empty()
                for wire in self.wires.values()
            )
            quiet = 0 if moving else quiet + 1
            if quiet > QUIET_ROUNDS:
                break
        assert set(self.wires) == set(self.devices), "somebody was turned away"

    chances: ClassVar[dict[Callable[[World, Device], Awaitable[None]], int]] = {
        write: 20,
        carry: 57,
        connect: 10,
        cut: 2,
        seat_node: 3,
        node_writes: 3,
        pass_time: 2,
        break_or_mend_the_disk: 2,
        doom: 2,
    }


@pytest.fixture(autouse=True)
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits that a short run reaches: slow readers, full batches, compactions."""
    monkeypatch.setattr(outbox_module, "WAITING_FRAMES_MAX", 6)
    monkeypatch.setattr(room_module, "BATCH_UPDATES_MAX", 4)
    monkeypatch.setattr(seats_module, "UNSETTLED_MAX", 3)
    monkeypatch.setattr(upkeep_module, "COMPACT_BYTES_MIN", 2000)


async def run(seed: int) -> World:
    world = World(seed)
    for _ in range(STEPS):
        await world.step()
    await world.heal()
    return world


@pytest.mark.parametrize("seed", range(SEEDS))
async def test_what_anybody_has_is_durable_and_all_end_equal(seed: int) -> None:
    world = await run(seed)
    world.check_durable()
    durable = world.durable()
    durable_vector = decode_state_vector(durable.state_vector())
    for device in world.devices:
        assert decode_state_vector(device.replica.state_vector()) == durable_vector
        assert device.replica.view() == durable.view()
        assert [device.replica.text(entry) for entry in durable.view()] == [
            durable.text(entry) for entry in durable.view()
        ]
        assert device.replica.meta == durable.meta
    await world.process.hub.close()
    for device in world.devices:
        await world.cut(device)


async def test_a_seed_replays() -> None:
    """The library orders the keys of a plain map by chance, so bytes may differ, lengths not."""
    traces = []
    for _ in range(2):
        world = await run(5)
        stored = world.disk.conversations[CONVERSATION]
        received = [[len(update) for update in device.received] for device in world.devices]
        updates = [len(update) for update in stored.updates]
        traces.append((stored.lsn, updates, received, world.devices[0].texts, world.crashes))
    assert traces[0] == traces[1]


async def test_the_runs_reach_what_they_are_for() -> None:
    """Crashes with and without a commit behind them, compaction, slow readers, the node."""
    worlds = [await run(seed) for seed in range(6)]
    assert sum(world.crashes for world in worlds) > 6
    assert any(world.promised for world in worlds)
    stored = [world.disk.conversations[CONVERSATION] for world in worlds]
    assert any(one.snapshot is not None for one in stored)
    assert sum(one.lsn for one in stored) > 6 * 15
