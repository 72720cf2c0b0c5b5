"""Nodes that take over from each other, in one seed: wires, clocks, disks and crashes simulated.

Lease desk, rooms, connections, links, nodes and their decisions are the production code. The engine
is a script at the engine's contract: each token follows from the seed and everything before it, so
that a reply which was begun by one node and ended by another can be told from its right text by a
single character.

A relay's clock runs at a rate of its own, up to twice or half as fast as the nodes': leases run out
before a node gives up, and long after. A line that is cut off holds what was sent until it heals,
and a node that gave it up long ago is then heard once more.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter, deque
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import TYPE_CHECKING, Final

from chat_folders import FORMATS
from stack.simulated_stack import StackLoop

from crdt_llm.cli.embedded_node import EmbeddedSeats
from crdt_llm.cli.node import RemoteSeat
from crdt_llm.document.chain import verify_path
from crdt_llm.document.conversation import Conversation
from crdt_llm.document.keys import SigningKey
from crdt_llm.document.schema import (
    SCHEMA_VERSION,
    Birth,
    Born,
    Params,
    Role,
    State,
    conversation_id,
    entry_id,
)
from crdt_llm.document.seal import FINAL_CHUNK, Sealer, place_of, verify_chunk
from crdt_llm.errors import ConnectionLost, CrdtLlmError, Unavailable
from crdt_llm.inference.contract import Capabilities, Finished, Prefilled, Sampled
from crdt_llm.inference.node.node import Node
from crdt_llm.inference.node.reply import Identity
from crdt_llm.inference.node.seat import Surroundings
from crdt_llm.inference.prompt.renderer import Renderer
from crdt_llm.inference.prompt.tokens import Vocabulary
from crdt_llm.store.memory import MemoryDisk, MemoryLog
from crdt_llm.store.register import MemoryRegister
from crdt_llm.sync.node.link import Calls, NodeLink
from crdt_llm.sync.relay.access import Pass
from crdt_llm.sync.relay.hub import Hub
from crdt_llm.sync.relay.leases import LeaseOffice
from crdt_llm.sync.relay.native_peer import NativeConnection, RelayIdentity
from crdt_llm.sync.wire.frames import Code, Nack, Open, decode_from_client, decode_from_relay

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
    from pathlib import Path

    from crdt_llm.document.schema import Entry
    from crdt_llm.inference.contract import Engine, GenerationEvent, SamplingParams
    from crdt_llm.store.memory import MemorySeam
    from crdt_llm.store.register import Row
    from crdt_llm.sync.relay.hub import Membership

OWNER: Final = "owner"
NODES: Final = ("ada", "bob", "cyd")
BEGINNING_MS: Final = 1_700_000_000_000
TTL_S: Final = 3.0
STEP_S: Final = 0.2  # a token: each is a flush of its own
STEPS: Final = 20  # of a schedule
SILENCE_S: Final = (20.0, 40.0)  # after which either side lets go of a line that says nothing
SETTLE_S_MAX: Final = 400.0  # many times the longest wait before another try
MASTER: Final = b"m" * 32
RELAY_KEY: Final = SigningKey(b"r" * 32)


class House:
    """What every schedule shares: the model's words."""

    def __init__(self, folder: Path) -> None:
        chat = FORMATS["thinking"]
        model_dir = chat.build(folder / "model")
        self.vocabulary = Vocabulary.load(model_dir)
        self.renderer = Renderer.learn(model_dir, self.vocabulary)
        letters = "abcdefghijklmnopqrstuvwxyz "
        self.letters = [self.vocabulary.encode_text(letter)[0] for letter in letters]

    def next_token(self, ids: Sequence[int], seed: int) -> int:
        """The only right token after these."""
        said = f"{seed} {' '.join(map(str, ids[-8:]))} {len(ids)}"
        return self.letters[hashlib.sha256(said.encode()).digest()[0] % len(self.letters)]

    def run(self, seed: int) -> Report:
        """Play one schedule, on a loop of its own: nothing of another one is left in it."""
        loop = StackLoop()
        try:
            report: Report = loop.run(_play(self, seed))
            loop.run(loop.shutdown_asyncgens())
        finally:
            loop.close()
        return report

    def count_opens(self, tokens: int) -> Counter[str]:
        """How often each of two nodes takes a seat while one of them streams so many tokens."""
        loop = StackLoop()
        try:
            opens: Counter[str] = loop.run(_stream(self, tokens))
            loop.run(loop.shutdown_asyncgens())
        finally:
            loop.close()
        return opens


class ScriptedEngine:
    """Says the only right thing, a token at a time."""

    capabilities = Capabilities("scripted", 2, 100_000, 1000, "none")

    def __init__(self, house: House) -> None:
        self._house = house

    async def warm(self, ids: Sequence[int]) -> Prefilled:
        await asyncio.sleep(STEP_S)
        return Prefilled(len(ids), 0, len(ids))

    async def generate(
        self, ids: Sequence[int], params: SamplingParams, start: int
    ) -> AsyncGenerator[GenerationEvent, None]:
        await asyncio.sleep(STEP_S)
        yield Prefilled(len(ids), 0, len(ids))
        said = list(ids)
        while len(said) - start < params.max_tokens:
            await asyncio.sleep(STEP_S)
            said.append(self._house.next_token(said, params.seed))
            yield Sampled(said[-1], -0.5)
        yield Finished("length")

    async def forget(self, ids: Sequence[int], keep: int = 0) -> None:
        """It remembers nothing."""

    async def close(self) -> None:
        """It holds nothing."""


# -- wires -------------------------------------------------------------------------------------


class Pipe:
    """One direction of a line: frames in order, each after a while; none while it is cut off."""

    def __init__(self, random: Random) -> None:
        self._random = random
        self._frames: deque[tuple[float, bytes]] = deque()
        self._news = asyncio.Event()
        self.stalled = False
        self.ended = False  # nothing comes after what is in it

    def put(self, frame: bytes) -> None:
        if self.ended:
            return
        now = asyncio.get_running_loop().time()
        self._frames.append((now + self._random.choice((0.001, 0.01, 0.1)), frame))
        self._news.set()

    def end(self, *, drop: bool = False) -> None:
        self.ended = True
        if drop:
            self._frames.clear()
        self._news.set()

    def stall(self, *, on: bool) -> None:
        self.stalled = on
        self._news.set()

    async def get(self) -> bytes:
        while True:
            if not self.stalled and self._frames:
                at, frame = self._frames[0]
                wait = at - asyncio.get_running_loop().time()
                if wait <= 0:
                    self._frames.popleft()
                    return frame
                await asyncio.sleep(wait)
                continue
            if self.ended and not self._frames and not self.stalled:
                raise ConnectionLost("the other side has gone")
            self._news.clear()
            await self._news.wait()


class Line:
    """A connection between a node and the relay, as the node sees it."""

    def __init__(self, world: World, owner: str) -> None:
        self.owner = owner
        self.up, self.down = Pipe(world.random), Pipe(world.random)
        self._world = world
        self._serving = asyncio.create_task(self._serve(), name=f"line of {owner}")

    # -- the node's side

    async def send(self, frame: bytes) -> None:
        await asyncio.sleep(0)
        if isinstance(decode_from_client(frame), Open):
            self._world.opens[self.owner] += 1
        self.up.put(frame)

    async def receive(self) -> bytes:
        return await self.down.get()

    # -- the relay's side

    async def _serve(self) -> None:
        world, wake = self._world, asyncio.Event()
        connection = NativeConnection(
            world.hub,
            RelayIdentity(RELAY_KEY.public, world.log.log_id),
            admit=lambda _: Pass("node", node=True),
            came_with=None,
            wake=wake.set,
            leases=world.office,
            clock=world.relay_clock,
        )

        async def pump() -> None:
            while connection.close_code is None:
                await wake.wait()
                wake.clear()
                while (frame := connection.take()) is not None:
                    world.watch(frame)
                    self.down.put(frame)

        pumping = asyncio.create_task(pump(), name=f"pump of {self.owner}")
        ticking = asyncio.create_task(_every(1.0, connection.tick), name="work")
        try:
            while connection.close_code is None:
                await connection.receive(await self.up.get())
        except ConnectionLost:
            pass
        finally:
            for task in (pumping, ticking):
                task.cancel()
            await asyncio.gather(pumping, ticking, return_exceptions=True)
            connection.leave()
            self.down.end()

    # -- what happens to it

    def stall(self, *, on: bool) -> None:
        self.up.stall(on=on)
        self.down.stall(on=on)

    def reset(self, *, late: bool) -> None:
        """The node's side is gone; what it sent may arrive all the same, later."""
        self.up.end(drop=not late)
        self.down.end(drop=True)
        self.down.stall(on=False)

    def let_go(self) -> None:
        """The relay gives it up; the node may not hear of that yet."""
        self._serving.cancel()

    async def cut(self) -> None:
        """The relay's side is gone, and everybody can tell."""
        self.let_go()
        await asyncio.gather(self._serving, return_exceptions=True)
        self.down.stall(on=False)

    @property
    def is_over(self) -> bool:
        return self._serving.done()


async def _every(seconds: float, call: Callable[[], object]) -> None:
    while True:
        await asyncio.sleep(seconds)
        call()


# -- who takes part ----------------------------------------------------------------------------


class Machine:
    """A machine with a node on it; its key outlives every crash."""

    def __init__(self, world: World, name: str) -> None:
        self.name = name
        self.key = SigningKey(hashlib.sha256(name.encode()).digest())
        self.cut_off = False
        self.lines: list[Line] = []
        self._world = world
        self._random = Random(f"{world.seed} {name}")
        self._tasks: list[asyncio.Task[None]] = []
        self.node: Node | None = None

    @asynccontextmanager
    async def _dial(self) -> AsyncIterator[Line]:
        await asyncio.sleep(self._random.choice((0.0, 0.05)))
        if self.cut_off or not self._world.is_up:
            await asyncio.sleep(self._random.choice((0.0, 1.0)))
            raise ConnectionLost("nobody answers")
        line = Line(self._world, self.name)
        self.lines = [one for one in self.lines if not one.is_over]
        self.lines.append(line)
        try:
            yield line
        finally:
            # What was sent may be under way for as long as the network holds it.
            line.reset(late=self._random.random() < 0.7)

    async def start(self) -> None:
        if self.node is not None:
            return
        world = self._world
        looks: asyncio.Queue[str] = asyncio.Queue()
        link = NodeLink(
            self._dial,
            token=lambda: "node",
            name=self.name,
            node=self.key.public,
            pin=world.check_pin,
            work=looks.put_nowait,
            random=self._random,
        )

        async def take_seat(
            conversation: str, deliver: Callable[[bytes], None], lost: Callable[[], None]
        ) -> RemoteSeat:
            return RemoteSeat(await link.take_seat(conversation, Calls(deliver, lost)))

        node = self.node = world.make_node(take_seat, self.key, self._random, gives_back=True)

        async def look() -> None:
            while True:
                await node.visit(await looks.get())

        await node.start()
        self._tasks = [
            asyncio.create_task(link.run(), name=f"link of {self.name}"),
            asyncio.create_task(look(), name=f"looks of {self.name}"),
        ]

    async def stop(self) -> None:
        """End as on a signal: seats and leases are given back."""
        node, self.node = self.node, None
        if node is not None:
            closing = asyncio.create_task(node.close())
            # A node that waits for a line that is cut off is killed in the end.
            await asyncio.wait({closing}, timeout=5.0)
            await self._end(node)
            await asyncio.gather(closing, return_exceptions=True)

    async def crash(self) -> None:
        """End without a word."""
        node, self.node = self.node, None
        if node is not None:
            power_cut = self._random.random() < 0.3
            for line in self.lines:
                if not power_cut:
                    line.reset(late=self._random.random() < 0.5)
                else:  # nobody tells the relay: it finds out when it asks
                    line.up.end(drop=True)
                    line.up.stall(on=True)
                    delay = self._random.uniform(*SILENCE_S)
                    self._after(delay, partial(line.up.stall, on=False))
            await self._end(node)

    async def _end(self, node: Node) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await node.close()

    def partition(self, *, on: bool) -> None:
        """Cut the machine off: either side lets go of its lines if that lasts, at its own time."""
        self.cut_off = on
        for line in self.lines:
            line.stall(on=on)
            if on:
                self._after(self._random.uniform(*SILENCE_S), partial(self._give_up, line))
                self._after(self._random.uniform(*SILENCE_S), partial(self._be_given_up, line))

    def _give_up(self, line: Line) -> None:
        if line.up.stalled:
            line.reset(late=True)

    def _be_given_up(self, line: Line) -> None:
        if line.up.stalled:
            line.let_go()

    def _after(self, seconds: float, call: Callable[[], None]) -> None:
        asyncio.get_running_loop().call_later(seconds, call)


@dataclass
class Report:
    """What came of a schedule."""

    seed: int
    replies: int = 0
    resumed: int = 0
    takeovers: int = 0
    refused_late: int = 0
    events: Counter[str] = field(default_factory=Counter)
    trace: str = ""


class World:
    """Everything of one schedule."""

    def __init__(self, house: House, seed: int) -> None:
        self.house = house
        self.seed = seed
        self.random = Random(seed)
        self.report = Report(seed)
        self.opens: Counter[str] = Counter()  # seats that were asked for, by node
        self.disk = MemoryDisk("relay")
        self.register_disk: dict[str, Row] = {}
        self.is_up = False
        self.rate = self.random.choice((0.5, 0.9, 1.0, 1.1, 2.0))
        self.person = Person(self)
        self.machines = {name: Machine(self, name) for name in NODES}
        self.embedded: Node | None = None
        self.embedded_key = SigningKey(b"e" * 32)
        self._unsubscribe: Callable[[], None] | None = None
        self._trace = hashlib.sha256()
        self.log: MemoryLog
        self.hub: Hub
        self.office: LeaseOffice

    # -- clocks

    def now_s(self) -> float:
        return asyncio.get_running_loop().time()

    def relay_clock(self) -> float:
        return 1000.0 + self.rate * self.now_s()

    def note(self, event: str) -> None:
        self.report.events[event.split(maxsplit=1)[0]] += 1
        self._trace.update(f"{self.now_s():.6f} {event}\n".encode())
        self.report.trace = self._trace.hexdigest()

    # -- the relay

    async def start_relay(self) -> None:
        self.log = MemoryLog(self.disk, clock=self._now_ms, faults=self._seam)
        self.hub = Hub(
            self.log,
            register=MemoryRegister(self.register_disk),
            relay_key=RELAY_KEY.public,
            clock=self.relay_clock,
            random=self.random.randbytes,
        )
        self.office = LeaseOffice(
            self.hub.grant_epoch,
            RELAY_KEY.sign,
            clock=self.relay_clock,
            ttl_s=TTL_S,
            vacant=self.hub.notice,
        )
        self.is_up = True
        self._ticking = asyncio.create_task(_every(0.5, self._tick), name="relay tick")
        await self.person.join()

    def _now_ms(self) -> int:
        return BEGINNING_MS + int(self.now_s() * 1000)

    async def _seam(self, _: MemorySeam) -> None:
        await asyncio.sleep(self.random.choice((0.0, 0.001, 0.017)))

    def _tick(self) -> None:
        self.hub.tick()
        self.office.tick()

    async def crash_relay(self) -> None:
        """The process is gone: what was not durable is lost, and every line breaks."""
        self.is_up = False
        await self.stop_embedded()
        self.log.crash()
        rooms = [room._task for room in self.hub._rooms.values()]
        ending = sorted(self.hub._ending, key=asyncio.Task.get_name)
        dying = [self._ticking, *rooms, *ending]  # in an order that replays
        for task in dying:
            task.cancel()
        await asyncio.gather(*dying, return_exceptions=True)
        await self.office.close()
        for machine in self.machines.values():
            for line in machine.lines:
                await line.cut()
            machine.lines.clear()

    async def start_embedded(self) -> None:
        if self.embedded is not None or not self.is_up:
            return
        seats = EmbeddedSeats(self.hub, self.embedded_key.public, self.office)
        node = self.embedded = self.make_node(seats.take, self.embedded_key, self.random)
        await node.start()
        self._unsubscribe = self.hub.subscribe(node.notice)
        for stored in await self.hub.conversations():
            await node.visit(stored.conversation)

    async def stop_embedded(self) -> None:
        node, self.embedded = self.embedded, None
        if node is not None and self._unsubscribe is not None:
            self._unsubscribe()
            await node.close()

    def make_node(
        self,
        take_seat: Callable[..., object],
        key: SigningKey,
        random: Random,
        *,
        gives_back: bool = False,
    ) -> Node:
        house = self.house

        async def start_engine() -> Engine:
            return ScriptedEngine(house)

        surroundings = Surroundings(
            take_seat,  # type: ignore[arg-type]
            start_engine,
            self._now_ms,
            random.randbytes,
            gives_back=gives_back,
        )
        sealer = Sealer(MASTER, random.randbytes)
        identity = Identity(key, sealer, random.randbytes, "", house.renderer.id)
        return Node(surroundings, house.renderer, house.vocabulary, identity)

    # -- what is seen on the wires

    def check_pin(self, relay: bytes) -> None:
        assert relay == RELAY_KEY.public

    def watch(self, frame: bytes) -> None:
        told = decode_from_relay(frame)
        if isinstance(told, Nack) and told.code is Code.STALE_EPOCH:
            self.report.refused_late += 1


class Person:
    """The owner, beside the relay: writes, and watches everything that is committed."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._random = Random(f"{world.seed} person")
        self.replica = Conversation(self._random.randrange(1, 2**32))
        self.birth = Birth(OWNER, self._random.randbytes(16))
        self.conversation = conversation_id(self.birth)
        self.written: set[str] = set()
        self._texts: dict[str, str] = {}
        self._epochs: dict[str, set[int]] = {}
        self._membership: Membership | None = None

    async def join(self) -> None:
        hub = self._world.hub
        self._membership = await hub.join(self.conversation, OWNER, deliver=self._deliver)
        self._deliver(self._membership.state)
        if self.replica.id is None:
            with self.replica.writing() as writer:
                writer.give_birth(self.birth, SCHEMA_VERSION)
            assert writer.change is not None
            await self._membership.submit(writer.change.update)

    async def _submit(self, write: Callable[..., object]) -> None:
        """Write; what did not become durable is gone with the replica that has it."""
        world = self._world
        if self._membership is None or not world.is_up:
            return
        with self.replica.writing() as writer:
            write(writer)
        assert writer.change is not None
        try:
            await self._membership.submit(writer.change.update)
        except Unavailable:
            self.replica = Conversation(self._random.randrange(1, 2**32))
            if world.is_up:
                await self.join()

    def _born(self, role: Role, clock: int, after: str, **more: object) -> Born:
        at = BEGINNING_MS + int(self._world.now_s() * 1000)
        return Born(role, OWNER, "phone", at, clock, after=after, **more)  # type: ignore[arg-type]

    def _new_id(self) -> str:
        at = BEGINNING_MS + int(self._world.now_s() * 1000)
        return entry_id(at, self._random.randbytes(10))

    def _params(self) -> Params:
        tokens = self._random.choice((2, 8, 30))
        return Params(max_tokens=tokens, seed=self._random.randrange(1000), temperature=0.7)

    async def ask(self, tokens: int | None = None) -> None:
        tree, question, slot = self.replica.tree, self._new_id(), self._new_id()
        clock, after = tree.clock, tree.last("")
        params = self._params() if tokens is None else Params(max_tokens=tokens, seed=1)

        def write(writer: object) -> None:
            writer.add(question, self._born(Role.USER, clock + 1, after), "why?")  # type: ignore[attr-defined]
            born = self._born(Role.ASSISTANT, clock + 2, question, params=params)
            writer.add(slot, born)  # type: ignore[attr-defined]

        await self._submit(write)
        self.written |= {question, slot} & set(self.replica.tree.entries)

    async def ask_again(self) -> None:
        """Another reply in the place of one: a branch."""
        slots = [one for one in self.replica.tree.entries if self.replica.has(one, "place")]
        placed = [one for one in slots if self._entry(one).is_slot]
        if not placed:
            return
        place = self._entry(self._random.choice(placed)).place
        assert place is not None
        slot, clock = self._new_id(), self.replica.tree.clock + 1
        params = self._params()
        born = self._born(Role.ASSISTANT, clock, place.parent, fork=True, params=params)
        await self._submit(lambda writer: writer.add(slot, born))
        self.written |= {slot} & set(self.replica.tree.entries)

    async def stop_one(self) -> None:
        tree = self.replica.tree
        running = [one for one in tree.entries if self.replica.state(one) is State.STREAMING]
        if running:
            slot = self._random.choice(running)
            await self._submit(lambda writer: writer.set(slot, "stop", OWNER))

    def _entry(self, name: str) -> Entry:
        entry = self.replica.entry(name)
        assert entry is not None
        return entry

    # -- watching ------------------------------------------------------------------------------

    def _deliver(self, update: bytes) -> None:
        change = self.replica.apply(update)
        world = self._world
        touched = {edit.entry for edit in change.edits if edit.entry is not None}
        for name in sorted(touched):
            entry = self.replica.entry(name)
            if entry is None or not entry.is_slot or entry.place is None:
                continue
            before = self._texts.get(name, "")
            assert entry.content.startswith(before), "what a reply had said was rewritten"
            self._texts[name] = entry.content
            if not entry.sealed:
                continue
            # Whoever wrote this had the lease that was in force when it was committed.
            chunk = FINAL_CHUNK if entry.ended else len(entry.sealed) - 1
            where = place_of(self.replica, entry, chunk)
            epoch = verify_chunk(
                self.replica, entry.sealed[-1], where, entry.content, RELAY_KEY.public
            )
            seen = self._epochs.setdefault(name, set())
            assert epoch >= max(seen, default=0), "an earlier node wrote after a later one"
            seen.add(epoch)
            world.note(f"wrote {name} {epoch} {len(entry.content)}")

    # -- the end -------------------------------------------------------------------------------

    @property
    def is_settled(self) -> bool:
        replica = self.replica
        slots = [one for one in replica.tree.entries if self._entry(one).is_slot]
        ended = all(self._entry(one).ended for one in slots)
        return ended and not replica.tree.pending

    def check(self) -> None:
        """Everything was answered, once, and rightly; and everybody can recompute it."""
        replica, report, house = self.replica, self._world.report, self._world.house
        assert self.written <= set(replica.tree.entries), "what was durable is lost"
        for tip in replica.tree.tips():
            path = replica.tree.path(tip)
            problems = [one.problem for one in verify_path(replica, path, RELAY_KEY.public)]
            assert problems == [None] * len(path)
        sealer = Sealer(MASTER, Random(0).randbytes)
        for name in sorted(replica.tree.entries):
            entry = self._entry(name)
            if not entry.is_slot or entry.place is None:
                continue
            hidden = sealer.open_reply(entry.sealed, place_of(replica, entry))
            prompt = [*self._prompt(sealer, entry.place.parent), *hidden.injected]
            expected: list[int] = []
            for _ in range(len(hidden.sampled)):
                token = house.next_token([*prompt, *expected], hidden.params["seed"])
                expected.append(token)
            assert list(hidden.sampled) == expected, "a reply is not the one that it must be"
            assert entry.content == house.vocabulary.text_of(hidden.ids, hidden.kinds, ())
            if entry.state is State.DONE:
                assert len(expected) == hidden.params["max_tokens"]
            else:
                assert entry.state is State.STOPPED
            report.replies += 1
            report.resumed += len(self._epochs.get(name, ())) > 1
        row = self._world.register_disk[self.conversation]
        assert row.epoch >= max(replica.epochs(), default=0)
        report.takeovers = max(0, len(replica.epochs()) - 1)

    def _prompt(self, sealer: Sealer, parent: str) -> tuple[int, ...]:
        from crdt_llm.inference.prompt.transcript import Transcript  # noqa: PLC0415 - derived, for this

        return Transcript(self.replica, self._world.house.renderer, sealer).ids(parent)


async def _play(house: House, seed: int) -> Report:
    world = World(house, seed)
    try:
        await world.start_relay()
        first, *others = world.machines.values()
        await first.start()
        for machine in others:
            if world.random.random() < 0.7:
                await machine.start()
        await world.person.ask()
        for _ in range(STEPS):
            await asyncio.sleep(world.random.choice((0.02, 0.3, 1.0, 1.0, 7.0)))
            await _step(world)
        await _heal(world)
        world.person.check()
    finally:
        await _abandon()
    return world.report


async def _stream(house: House, tokens: int) -> Counter[str]:
    world = World(house, 1)
    try:
        await world.start_relay()
        for name in NODES[:2]:
            await world.machines[name].start()
        await world.person.ask(tokens)
        await asyncio.sleep(tokens * STEP_S + 2 * TTL_S)
        assert world.person.is_settled
        world.person.check()
    finally:
        await _abandon()
    return world.opens


async def _step(world: World) -> None:  # noqa: C901 - a table of what happens
    """One thing that happens."""
    random = world.random
    machine = random.choice(list(world.machines.values()))
    kind = random.choices(
        (
            "ask",
            "again",
            "stop",
            "crash",
            "restart",
            "leave",
            "partition",
            "heal",
            "relay",
            "house",
        ),
        weights=(6, 2, 1, 4, 4, 1, 4, 3, 1, 1),
    )[0]
    world.note(f"{kind} {machine.name}")
    match kind:
        case "ask":
            await world.person.ask()
        case "again":
            await world.person.ask_again()
        case "stop":
            await world.person.stop_one()
        case "crash":
            await machine.crash()
        case "restart":
            await machine.start()
        case "leave":
            await machine.stop()
        case "partition":
            machine.partition(on=True)
        case "heal":
            machine.partition(on=False)
        case "relay":
            await world.crash_relay()
            await asyncio.sleep(random.choice((0.0, 2.0)))
            await world.start_relay()
        case "house":
            if world.embedded is None:
                await world.start_embedded()
            else:
                await world.stop_embedded()


async def _heal(world: World) -> None:
    """No more faults; then wait until everything is answered."""
    world.note("end")
    for machine in world.machines.values():
        machine.partition(on=False)
    await next(iter(world.machines.values())).start()
    until = world.now_s() + SETTLE_S_MAX
    while not world.person.is_settled:
        assert world.now_s() < until, "a reply is lost"
        await asyncio.sleep(1.0)


async def _abandon() -> None:
    rest = asyncio.all_tasks() - {asyncio.current_task()}
    for task in rest:
        task.cancel()
    with suppress(CrdtLlmError):
        await asyncio.gather(*rest, return_exceptions=True)
