"""The whole stack in one seed: devices, network, relay and node simulated, the engine real.

Clients, sessions, rooms and the node are the production code; the clock, the wires and the disks
are replaced. The engine is the production process on the tiny model: starting one takes seconds, so
one serves every run of a module. Its answers take no time on the simulated clock, which stands
still while anybody waits for one; each of them then takes a fixed while. So what happens first does
not depend on how busy the machine is.
"""

from __future__ import annotations

import asyncio
import selectors
from contextlib import aclosing, contextmanager
from random import Random
from typing import TYPE_CHECKING, Any, Final

from sync.simulated_network import Network

from crdt_llm import Client
from crdt_llm.cli.embedded_node import EmbeddedSeats
from crdt_llm.document.conversation import Conversation
from crdt_llm.document.keys import SigningKey
from crdt_llm.document.seal import Sealer
from crdt_llm.errors import EngineDied, StoreFailed
from crdt_llm.inference.engine.process import EngineProcess
from crdt_llm.inference.node.node import Node
from crdt_llm.inference.node.reply import Identity
from crdt_llm.inference.node.seat import Surroundings
from crdt_llm.inference.prompt.renderer import ParentTail, Renderer
from crdt_llm.inference.prompt.tokens import Vocabulary
from crdt_llm.store.memory import MemoryDisk, MemoryLog
from crdt_llm.store.register import MemoryRegister
from crdt_llm.sync.client.replica_file import ReplicaFile
from crdt_llm.sync.relay.leases import LeaseOffice
from crdt_llm.sync.relay.server import TICK_S

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterator, Sequence
    from pathlib import Path

    from crdt_llm.inference.contract import GenerationEvent, Prefilled, SamplingParams
    from crdt_llm.inference.node.workplace import Workplace
    from crdt_llm.store.memory import MemorySeam
    from crdt_llm.store.register import Row
    from crdt_llm.sync.client.client import OpenConversation
    from crdt_llm.sync.relay.hub import Hub

DEVICES: Final = ("laptop", "phone", "tablet")

BEGINNING_MS: Final = 1_700_000_000_000

ANSWER_S: Final = 0.0213
"""What each token takes on the simulated clock: two or three of them make a flush."""

COMMIT_S: Final = (0.0, 0.001, 0.017)
SLOW_COMMIT_S: Final = (0.1, 0.4)

OUTSIDE_S_MAX: Final = 120.0
"""Real seconds after which an engine that says nothing hangs; starting one takes a few."""

SPINS_MAX: Final = 50_000
"""Rounds of the loop in which nobody waits for anything; the busiest moment takes a few hundred."""

QUIET_S: Final = 150.0
"""Five times the longest wait before another try: by then everybody has done what they can."""

RELAY_KEY: Final = SigningKey(b"r" * 32)


class _Selector(selectors.DefaultSelector):
    """Moves the clock where others would wait, unless somebody waits for the world outside."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.awaited_outside = 0
        self._spins = 0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        events = super().select(0)
        if events or (timeout is not None and timeout <= 0):
            self._spins += 1
            if self._spins > SPINS_MAX:
                self._spins = 0
                raise AssertionError("somebody spins, and never waits for anything")
            return events
        self._spins = 0
        if self.awaited_outside:
            events = super().select(OUTSIDE_S_MAX)
            if not events:
                raise AssertionError("the engine hangs")
        elif timeout is None:
            raise AssertionError("everybody waits for something that nothing will bring")
        else:
            self.now_s += timeout
        return events


class StackLoop(asyncio.SelectorEventLoop):
    """An event loop with a clock of its own, which stands still while the engine computes."""

    def __init__(self) -> None:
        self._world = _Selector()
        super().__init__(self._world)

    def time(self) -> float:
        return self._world.now_s

    def rewind(self) -> None:
        """Begin again at zero, when nothing is left of what was before: then a seed replays."""
        assert not self._world.awaited_outside, "somebody of an earlier run waits for the engine"
        self._world.now_s = 0.0

    @contextmanager
    def outside(self) -> Iterator[None]:
        """Stop the clock: what is awaited now happens in the world outside."""
        self._world.awaited_outside += 1
        try:
            yield
        finally:
            self._world.awaited_outside -= 1

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return self.run_until_complete(coroutine)


class _LentEngine:
    """An engine that outlives the node which borrows it."""

    def __init__(self, engine: EngineProcess, loop: StackLoop) -> None:
        self.capabilities = engine.capabilities
        self._engine = engine
        self._loop = loop

    async def warm(self, ids: Sequence[int]) -> Prefilled:
        with self._loop.outside():
            done = await self._engine.warm(ids)
        await asyncio.sleep(ANSWER_S)
        return done

    async def generate(
        self, ids: Sequence[int], params: SamplingParams, start: int
    ) -> AsyncGenerator[GenerationEvent, None]:
        async with aclosing(self._engine.generate(ids, params, start)) as events:
            while True:
                with self._loop.outside():
                    event = await anext(events, None)
                if event is None:
                    return
                await asyncio.sleep(ANSWER_S)
                yield event

    async def forget(self, ids: Sequence[int], keep: int = 0) -> None:
        with self._loop.outside():
            await self._engine.forget(ids, keep)

    async def close(self) -> None:
        """It was only lent."""


class House:
    """What every run of a module shares: the loop, the model's words, and one engine process."""

    def __init__(self, model_dir: Path) -> None:
        self.loop = StackLoop()
        self.vocabulary = Vocabulary.load(model_dir)
        self.renderer = Renderer.learn(model_dir, self.vocabulary)
        self.engine: EngineProcess | None = None
        self.starts = True  # whether an engine can be started
        self._model_dir = model_dir

    async def lend(self) -> _LentEngine:
        if not self.starts:
            raise EngineDied("there is no memory for it")
        return _LentEngine(await self.borrowed(), self.loop)

    async def borrowed(self) -> EngineProcess:
        """The engine itself; for checks, which take no simulated time."""
        if self.engine is None:
            with self.loop.outside():
                self.engine = await EngineProcess.start(self._model_dir, threads=1)
        return self.engine

    async def kill_engine(self) -> None:
        """SIGKILL; whoever waits for it hears of it before anything else happens."""
        engine, self.engine = self.engine, None
        if engine is not None:
            with self.loop.outside():
                engine._process.kill()
                await engine._reader
                await engine.close()

    async def forget_everything(self) -> None:
        """Empty the KV cache: every conversation begins with the same token."""
        beginning = self.renderer.segment(
            role="user", content="", is_root=True, root_at_ms=0, parent=ParentTail()
        )
        with self.loop.outside():
            await (await self.borrowed()).forget(beginning[:1])

    async def abandon_all(self) -> None:
        """End every task of a run, however it went."""
        engine_reader = None if self.engine is None else self.engine._reader
        rest = asyncio.all_tasks() - {asyncio.current_task(), engine_reader}
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)

    def close(self) -> None:
        self.loop.run(self.kill_engine())
        self.loop.run(self.loop.shutdown_asyncgens())
        self.loop.close()


class Device:
    """A client with a disk that outlives it."""

    def __init__(self, name: str, world: World) -> None:
        self.name = name
        self.disk = MemoryDisk(name)
        self.acknowledged: set[str] = set()
        self.own_clients: set[int] = set()  # ids that it ever wrote under
        self._world = world
        self._tasks: frozenset[asyncio.Task[Any]] = frozenset()
        self.log: MemoryLog
        self.client: Client
        self.conversation: OpenConversation

    async def _seam(self, _: MemorySeam) -> None:
        await asyncio.sleep(self._world.random.choice((0.0, 0.013)))

    async def start(self, conversation: str | None) -> None:
        world, before = self._world, asyncio.all_tasks()
        self.log = MemoryLog(self.disk, clock=world.now_ms, faults=self._seam)
        self.client = Client(
            "ws://127.0.0.1/",
            device=self.name,
            clock=world.now_ms,
            random=world.random,
            dial=world.network.dial_for(self.name),
        )
        self.client._file = ReplicaFile(self.log, None)
        if conversation is None:
            self.conversation = await self.client.create()
        else:
            self.conversation = await self.client.open(conversation)
        self._tasks = frozenset(asyncio.all_tasks() - before)

    @property
    def document(self) -> Conversation:
        """The replica; noting under which id it writes."""
        document = self.conversation.document
        self.own_clients.add(document.client_id)
        return document

    async def crash(self) -> None:
        """End without a word: memory is gone, the disk stays as it is."""
        self.log.crash()
        await self._world.network.cut(self.name)
        self.conversation.pause()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def write(self, act: Callable[[OpenConversation], Awaitable[object]]) -> None:
        """Write, and note what was promised by the time that the call returned."""
        before = set(self.document.tree.entries)
        await act(self.conversation)
        document = self.document
        for entry in set(document.tree.entries) - before:
            born = document.born(entry)
            if born is not None and born.device == self.name:
                self.acknowledged.add(entry)


class Server:
    """One life of the process that serves: log, rooms and node. A crash takes all of it."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.log = MemoryLog(world.disk, clock=world.now_ms, faults=self._seam)
        register = MemoryRegister(world.register_disk)
        world.network.start_relay(self.log, register, RELAY_KEY.public)
        assert world.network._hub is not None
        self.hub: Hub = world.network._hub
        self.office = LeaseOffice(self.hub.grant_epoch, RELAY_KEY.sign, clock=world.house.loop.time)
        self.node: Node | None = None
        self._unsubscribe: Callable[[], None] | None = None
        self._ticking = asyncio.create_task(self._tick(), name="tick")

    async def _seam(self, seam: MemorySeam) -> None:
        await asyncio.sleep(self._world.random.choice(self._world.commit_s))
        if seam == "before-commit" and self._world.disk_fails:
            raise StoreFailed("the disk is full")

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self.hub.tick()

    async def start_node(self) -> None:
        """As ``serve`` does."""
        if self.node is not None:
            return
        hub, house, world = self.hub, self._world.house, self._world
        seats = EmbeddedSeats(hub, world.identity.key.public, self.office)
        surroundings = Surroundings(seats.take, house.lend, world.now_ms, world.random.randbytes)
        self.node = Node(surroundings, house.renderer, house.vocabulary, world.identity)
        await self.node.start()
        self._unsubscribe = hub.subscribe(self.node.notice)
        for stored in await hub.conversations():
            await self.node.visit(stored.conversation)

    async def stop_node(self) -> None:
        node, self.node = self.node, None
        if node is not None and self._unsubscribe is not None:
            self._unsubscribe()
            await node.close()

    async def stop(self) -> None:
        """End as on a signal."""
        self._ticking.cancel()
        await self.stop_node()
        await self.office.close()
        await self._world.network.stop_relay()
        await self.log.close()

    async def crash(self) -> None:
        """End without a word: what was not durable at this moment is lost, and nobody hears."""
        network = self._world.network
        self.log.crash()
        for device in DEVICES:
            await network.cut(device)
        network._hub = None
        rooms = [room._task for room in self.hub._rooms.values()]
        dying = {self._ticking, *rooms, *self.hub._ending}
        for task in dying:
            task.cancel()
        await asyncio.gather(*dying, return_exceptions=True)
        await self.stop_node()
        await self.office.close()


class World:
    """Everything of one run, and the seed that moves it."""

    def __init__(self, house: House, seed: int) -> None:
        self.house = house
        self.random = Random(seed)
        self.network = Network(self.random)
        self.disk = MemoryDisk("relay")
        self.register_disk: dict[str, Row] = {}
        self.disk_fails = False
        self.commit_s: tuple[float, ...] = COMMIT_S
        self.devices = {name: Device(name, self) for name in DEVICES}
        keys = Random(f"keys {seed}")
        self.sealer = Sealer(keys.randbytes(32), self.random.randbytes)
        self.identity = Identity(
            key=SigningKey(keys.randbytes(32)),
            sealer=self.sealer,
            random=self.random.randbytes,
            model="",
            renderer=house.renderer.id,
        )
        self.server: Server

    def now_ms(self) -> int:
        return BEGINNING_MS + int(self.house.loop.time() * 1000)

    async def begin(self) -> None:
        self.server = Server(self)
        await self.server.start_node()
        first, *others = self.devices.values()
        await first.start(None)
        for device in others:
            await device.start(first.conversation.id)

    @property
    def conversation(self) -> str:
        return self.devices[DEVICES[0]].conversation.id

    @property
    def workplace(self) -> Workplace:
        """What the node has of the conversation."""
        assert self.server.node is not None
        desk, _ = self.server.node._desks[self.conversation]
        assert desk._sitting is not None, "the node has no seat"
        return desk._sitting.work

    def durable(self) -> Conversation:
        """What the relay's disk holds, as a replica of its own."""
        replica = Conversation(self.random.getrandbits(31) + 1)
        stored = self.disk.conversations.get(self.conversation)
        if stored is not None:
            updates = stored.updates
            for update in updates if stored.snapshot is None else (stored.snapshot, *updates):
                replica.apply(update)
        return replica

    async def crash_server(self) -> None:
        away = self.server.node is None
        await self.server.crash()
        self.server = Server(self)
        if not away:
            await self.server.start_node()

    async def heal(self) -> None:
        """No more faults; then wait until everybody has done what they can."""
        self.network.noise = 0.0
        self.network.cut_off.clear()
        self.disk_fails = False
        self.commit_s = COMMIT_S
        await self.server.start_node()
        for device in self.devices.values():
            device.conversation.resume()
        for device in self.devices.values():
            await device.conversation.synced_once()
        await asyncio.sleep(QUIET_S)

    async def end(self) -> None:
        for device in self.devices.values():
            await device.conversation.close()
        await self.server.stop()
