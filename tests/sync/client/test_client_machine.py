"""A fleet of devices over a bad network: whatever happens, nothing acknowledged is ever lost.

The machine drives production clients against production rooms. Devices write, go offline, lose
their connection in the middle of a frame, are cut off, crash and start again from their disks;
disks fail; the relay restarts, or loses all it had; it refuses writes in the middle of others.
After healing all replicas are equal, nothing is there twice, and what was refused is a draft.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from random import Random
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from sync.simulated_network import Network, VirtualTimeLoop

from crdt_llm import Client
from crdt_llm.document import rules
from crdt_llm.errors import LocalMisuse, Refused, StoreFailed
from crdt_llm.store.memory import MemoryDisk, MemoryLog
from crdt_llm.sync.client import local_replica
from crdt_llm.sync.client.intents import Add
from crdt_llm.sync.client.replica_file import ReplicaFile
from crdt_llm.sync.room import judge
from crdt_llm.sync.wire.y_websocket import decode_state_vector

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from crdt_llm.document.conversation import Change, Conversation
    from crdt_llm.store.memory import MemorySeam
    from crdt_llm.sync.client.client import OpenConversation, Reply

# A failure is made smaller for up to five minutes before it is shown.
pytestmark = pytest.mark.timeout(900)

DEVICES: Final = ("laptop", "phone", "tablet")
QUIET_S: Final = 300.0
"""Ten times the longest wait before another try: after that long everybody who can has synced."""

OFFENCE: Final = "offence"
"""A text with this in it is against a rule that only the relay knows."""

devices = st.sampled_from(DEVICES)


def check_with_offences(change: Change, conversation: Conversation, **options: Any) -> None:
    rules.check(change, conversation, **options)
    if any(OFFENCE in conversation.text(entry) for entry in change.entries):
        raise Refused("content", "that is offensive")


class Device:
    """A client with a disk that outlives it."""

    def __init__(self, name: str, network: Network, random: Random) -> None:
        self.name = name
        self.disk = MemoryDisk(name)
        self.disk_fails = False
        self.acknowledged: set[str] = set()
        self.relayed: set[str] = set()  # of these, what a disk that fails may not have
        self.offences: Counter[str] = Counter()  # texts that the relay will not take
        self.said = 0
        self._network = network
        self._random = random
        self._now_ms = 1_700_000_000_000
        self._tasks: frozenset[asyncio.Task[Any]] = frozenset()
        self.log: MemoryLog
        self.client: Client
        self.conversation: OpenConversation

    async def _seam(self, seam: MemorySeam) -> None:
        await asyncio.sleep(self._random.choice((0.0, 0.02)))
        if seam == "before-commit" and self.disk_fails:
            raise StoreFailed("the disk is full")

    def _clock(self) -> int:
        self._now_ms += 1
        return self._now_ms

    async def start(self, conversation: str | None) -> None:
        before = asyncio.all_tasks()
        self.log = MemoryLog(self.disk, clock=self._clock, faults=self._seam)
        self.client = Client(
            "ws://127.0.0.1/",
            device=self.name,
            clock=self._clock,
            random=self._random,
            dial=self._network.dial_for(self.name),
        )
        self.client._file = ReplicaFile(self.log, None)
        if conversation is None:
            self.conversation = await self.client.create()
        else:
            self.conversation = await self.client.open(conversation)
        self._tasks = frozenset(asyncio.all_tasks() - before)

    async def crash(self) -> None:
        """End without a word: memory is gone, the disk stays as it is."""
        self.log.crash()
        # The relay has them, and may lose its log before it is asked.
        self.acknowledged -= self.relayed
        await self._network.cut(self.name)
        self.conversation.pause()
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)

    async def offend(self, *, ask: bool) -> None:
        """Write what the relay refuses, and note that the text was promised all the same."""
        self.said += 1
        text = f"{OFFENCE} {self.said} of {self.name}"
        try:
            await (self.conversation.ask(text) if ask else self.conversation.send(text))
        except StoreFailed:
            assert self.disk_fails
        else:
            self.offences[text] += 1

    async def write(self, act: Callable[[OpenConversation], Awaitable[Reply | str]]) -> None:
        """Write, and note what was promised."""
        known = set(self.conversation.document.tree.entries)
        try:
            done = await act(self.conversation)
        except StoreFailed:
            assert self.disk_fails
            assert set(self.conversation.document.tree.entries) <= known | self.arrived()
        except LocalMisuse:
            assert not self.conversation.view()  # there was nothing to act on
        else:
            entry = done if isinstance(done, str) else done.id
            if self.conversation.refusal_of(entry) is None:
                self.acknowledged.add(entry)
                if self.disk_fails:
                    self.relayed.add(entry)

    def orphans(self) -> set[str]:
        """Requests for a reply to what was refused; they say nothing themselves."""
        refused = self.conversation.refused_writes
        edits = (edit for one in refused for edit in one.intent)
        return {edit.entry for edit in edits if isinstance(edit, Add) and edit.content is None}

    def arrived(self) -> set[str]:
        """Entries that others wrote."""
        document = self.conversation.document
        return {
            entry
            for entry in document.tree.entries
            if (born := document.born(entry)) is not None and born.device != self.name
        }


class Fleet(RuleBasedStateMachine):
    """Three devices and a relay."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = VirtualTimeLoop()
        self.patch = pytest.MonkeyPatch()
        # So that these short conversations are compacted again and again.
        self.patch.setattr(local_replica, "COMPACT_BYTES_MIN", 500)
        self.patch.setattr(judge, "rules", SimpleNamespace(check=check_with_offences))

    @initialize(seed=st.integers(0, 2**32))
    def begin(self, seed: int) -> None:
        self.random = Random(seed)
        self.network = Network(self.random)
        self.relay_disk = MemoryDisk("relay")
        self.losses = 0
        self.devices = {name: Device(name, self.network, self.random) for name in DEVICES}
        self.loop.run(self._begin())

    async def _begin(self) -> None:
        await self._start_relay()
        first, *others = self.devices.values()
        await first.start(None)
        for device in others:
            await device.start(first.conversation.id)

    async def _start_relay(self) -> None:
        self.network.start_relay(MemoryLog(self.relay_disk, clock=lambda: 0))

    def at(self, name: str) -> Device:
        return self.devices[name]

    # -- what happens --------------------------------------------------------------------------

    @rule(name=devices, text=st.text("ab é🧀", max_size=5))
    def send(self, name: str, text: str) -> None:
        self.loop.run(self.at(name).write(lambda c: c.send(text)))

    @rule(name=devices, ask=st.booleans())
    def offend(self, name: str, *, ask: bool) -> None:
        self.loop.run(self.at(name).offend(ask=ask))

    @rule(name=devices)
    def offend_among_others(self, name: str) -> None:
        async def all_at_once() -> None:
            device = self.at(name)
            await asyncio.gather(
                device.write(lambda c: c.send("before")),
                device.offend(ask=True),
                device.write(lambda c: c.ask("after")),
                device.write(lambda c: c.send("and after that")),
            )

        self.loop.run(all_at_once())

    @rule(name=devices)
    def ask(self, name: str) -> None:
        self.loop.run(self.at(name).write(lambda c: c.ask("?", max_tokens=5)))

    @rule(name=devices, switch=st.booleans())
    def edit(self, name: str, *, switch: bool) -> None:
        async def act(conversation: OpenConversation) -> Reply | str:
            own = [entry.id for entry in conversation.view() if not entry.is_slot]
            if not own:
                return await conversation.send("nothing to edit yet")
            return await conversation.fork(self.random.choice(own), "!", switch=switch)

        self.loop.run(self.at(name).write(act))

    @rule(name=devices)
    def regenerate(self, name: str) -> None:
        async def act(conversation: OpenConversation) -> Reply | str:
            if not any(entry.is_slot for entry in conversation.view()):
                return await conversation.ask("no reply yet")
            return await conversation.regenerate()

        self.loop.run(self.at(name).write(act))

    @rule(name=devices)
    def stop(self, name: str) -> None:
        async def act(conversation: OpenConversation) -> Reply | str:
            await conversation.stop()
            return await conversation.send("stopped")

        self.loop.run(self.at(name).write(act))

    @rule(name=devices)
    def write_at_once(self, name: str) -> None:
        async def both() -> None:
            others = [self.devices[other] for other in DEVICES if other != name]
            await asyncio.gather(*(device.write(lambda c: c.ask("both")) for device in others))

        self.loop.run(both())

    @rule(name=devices)
    def pause(self, name: str) -> None:
        self.at(name).conversation.pause()

    @rule(name=devices)
    def resume(self, name: str) -> None:
        self.loop.run(self._resume(name))

    async def _resume(self, name: str) -> None:
        self.at(name).conversation.resume()

    @rule(name=devices)
    def break_connection(self, name: str) -> None:
        self.loop.run(self.network.cut(name))

    @rule(name=devices)
    def cut_off(self, name: str) -> None:
        self.network.cut_off.add(name)
        self.loop.run(self.network.cut(name))

    @rule(name=devices)
    def reach_again(self, name: str) -> None:
        self.network.cut_off.discard(name)

    @rule()
    def restart_relay(self) -> None:
        async def restart() -> None:
            await self.network.stop_relay()
            await self._start_relay()

        self.loop.run(restart())

    @rule()
    def lose_the_log(self) -> None:
        async def lose() -> None:
            await self.network.stop_relay()
            self.losses += 1
            self.relay_disk = MemoryDisk(f"relay after {self.losses} losses")
            await self._start_relay()

        self.loop.run(lose())

    @rule(name=devices)
    def crash(self, name: str) -> None:
        async def crash() -> None:
            device = self.at(name)
            identity = device.conversation.id
            await device.crash()
            await device.start(identity)

        self.loop.run(crash())

    @rule(name=devices, fails=st.booleans())
    def break_disk(self, name: str, *, fails: bool) -> None:
        self.at(name).disk_fails = fails

    @rule(noise=st.sampled_from((0.0, 0.3)))
    def make_noise(self, noise: float) -> None:
        self.network.noise = noise

    @rule(seconds=st.sampled_from((0.0, 0.05, 1.0, 60.0)))
    def let_time_pass(self, seconds: float) -> None:
        self.loop.run(asyncio.sleep(seconds))

    # -- what must hold ------------------------------------------------------------------------

    @precondition(lambda self: self.random.random() < 0.1)
    @rule()
    def heal(self) -> None:
        self.loop.run(self._heal())

    async def _heal(self) -> None:
        self.network.noise = 0.0
        self.network.cut_off.clear()
        for device in self.devices.values():
            device.disk_fails = False
            device.conversation.resume()  # of those who went offline on purpose
        for device in self.devices.values():
            await device.conversation.synced_once()
        await asyncio.sleep(QUIET_S)

        first, *others = (device.conversation.document for device in self.devices.values())
        for document in others:
            have, there = (decode_state_vector(d.state_vector()) for d in (document, first))
            assert have == there
            assert document.view() == first.view()
            assert set(document.tree.entries) == set(first.tree.entries)
        assert not any(OFFENCE in first.text(entry) for entry in first.tree.entries)
        for device in self.devices.values():
            missing = device.acknowledged - set(first.tree.entries) - device.orphans()
            assert not missing, f"{device.name} was promised {missing}"
            drafts = Counter(one.text for one in device.conversation.refused_writes if one.text)
            assert drafts == device.offences
            messages = [one for one in device.conversation.refused_writes if one.text]
            assert {one.what for one in messages} <= {"a message"}
            assert not device.conversation.unacknowledged
            assert device.conversation.synced
            assert device.conversation.refused is None

    def teardown(self) -> None:
        try:
            if hasattr(self, "devices"):
                self.loop.run(self._end())
        finally:
            self.patch.undo()
            self.loop.finish()

    async def _end(self) -> None:
        await self._heal()
        for device in self.devices.values():
            await device.conversation.close()
            await device.start(device.conversation.id)
            await device.conversation.close()
            there = set(device.conversation.document.tree.entries)
            missing = device.acknowledged - there - device.orphans()
            assert not missing, f"the disk of {device.name} lacks {missing}"
            drafts = Counter(one.text for one in device.conversation.refused_writes if one.text)
            assert drafts == device.offences, f"the disk of {device.name}"
        await self.network.stop_relay()


Fleet.TestCase.settings = settings(
    max_examples=25,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestFleet = Fleet.TestCase


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("ask", [False, True])
def test_what_a_full_disk_did_not_take_and_the_relay_refused_is_gone(
    seed: int, *, ask: bool
) -> None:
    fleet = Fleet()
    try:
        fleet.begin(seed)
        fleet.let_time_pass(60.0)
        fleet.break_disk("tablet", fails=True)
        fleet.offend("tablet", ask=ask)
        assert not fleet.at("tablet").offences  # its caller was told so
        fleet.let_time_pass(1.0)
        assert not fleet.at("tablet").conversation.refused_writes
    finally:
        fleet.teardown()  # which looks once more
