"""The whole stack under whatever may happen to it; afterwards everything must agree, to the bit.

Production clients, sessions, rooms, store contract, node and engine process; clock, wires and disks
are simulated (see :mod:`stack.simulated_stack`). Devices write on line and off, fork, regenerate,
extend, stop and move the head; connections break and frames come twice; disks fail; the server
process crashes with commits half way; the node and the engine die and come back.

``CRDT_LLM_STACK_EXAMPLES=500`` runs so many examples instead of the few of a usual run, and
``CRDT_LLM_STACK_STEPS`` sets how many things happen in each of them.
"""

from __future__ import annotations

import asyncio
import os
import sys
from random import Random
from typing import TYPE_CHECKING, Any, Final, cast

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from stack.simulated_stack import COMMIT_S, DEVICES, RELAY_KEY, SLOW_COMMIT_S, House, World

from crdt_llm.document.chain import verify_path
from crdt_llm.document.conversation import Conversation
from crdt_llm.document.schema import ENDED, State
from crdt_llm.inference.prompt.transcript import Transcript
from crdt_llm.inference.replay.replay import replay
from crdt_llm.sync.client import local_replica
from crdt_llm.sync.room import upkeep
from crdt_llm.sync.wire.y_websocket import decode_state_vector

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from stack.simulated_stack import Device

    from crdt_llm.document.schema import Entry
    from crdt_llm.inference.engine.process import EngineProcess
    from crdt_llm.sync.client.client import OpenConversation, Sampling

# A failure is made smaller for up to five minutes before it is shown.
pytestmark = pytest.mark.timeout(900)

EXAMPLES: Final = int(os.environ.get("CRDT_LLM_STACK_EXAMPLES", "30"))
STEPS: Final = int(os.environ.get("CRDT_LLM_STACK_STEPS", "25"))
KILL: Final = 37  # of a hundred: an engine takes seconds to start, and Hypothesis likes the ends

names = st.sampled_from(DEVICES)
asked = st.fixed_dictionaries(
    {
        "max_tokens": st.integers(1, 30),
        "temperature": st.sampled_from((0.0, 0.7)),
        "ignore_eos": st.booleans(),
        "stop": st.sampled_from(((), ("e",), ("ab", "b c"))),
    }
)


class Agreement:
    """What must hold at every moment, of all that any device has ever seen."""

    def __init__(self) -> None:
        self.places: dict[str, tuple[str | None, int]] = {}
        self.texts: dict[str, str] = {}  # of replies, the longest that was seen
        self.said: dict[str, str] = {}  # of admitted author's entries

    def look(self, document: Conversation) -> None:
        tree = document.tree
        for entry in tree.entries:
            facts = tree.facts(entry)
            if facts.slot:
                self._reply(entry, document.text(entry))
            if tree.is_admitted(entry):
                place = facts.parent, facts.epoch
                assert self.places.setdefault(entry, place) == place, "an admitted entry moved"
                if not facts.slot:
                    text = document.text(entry)
                    assert self.said.setdefault(entry, text) == text, "an admitted entry changed"
        shown = document.view()
        assert len(set(shown)) == len(shown)
        reached = {entry for tip in tree.tips() for entry in tree.path(tip)}
        missing = {entry for entry in tree.entries if not tree.is_end(entry)} - reached
        assert not missing, "an entry is on no line"

    def _reply(self, entry: str, text: str) -> None:
        longest = self.texts.get(entry, "")
        assert text.startswith(longest) or longest.startswith(text), "a reply's text was rewritten"
        self.texts[entry] = max(text, longest, key=len)


class Stack(RuleBasedStateMachine):
    """Three devices, a relay, a node and an engine."""

    def __init__(self, house: House) -> None:
        super().__init__()
        self.house = house
        self.loop = house.loop
        self.loop.rewind()
        self.agreement = Agreement()
        self.random = Random()
        self.world: World | None = None
        self.patch = pytest.MonkeyPatch()
        # So that these short conversations are compacted again and again, on both sides.
        self.patch.setattr(local_replica, "COMPACT_BYTES_MIN", 2000)
        self.patch.setattr(upkeep, "COMPACT_BYTES_MIN", 2000)

    @initialize(seed=st.integers(0, 2**32), slow=st.booleans())
    def begin(self, seed: int, *, slow: bool = False) -> None:
        self.random = Random(seed)
        self.world = World(self.house, seed)
        self.loop.run(self.world.begin())
        self.slow_disk(slow=slow)

    @property
    def here(self) -> World:
        assert self.world is not None
        return self.world

    def at(self, name: str) -> Device:
        return self.here.devices[name]

    def pick(self, name: str, *, slots: bool | None = None, ended: bool = False) -> str | None:
        """Some entry that a device has, by what it is."""
        document = self.at(name).document
        entries = [
            entry
            for entry in sorted(document.tree.entries)
            if slots in (None, document.tree.facts(entry).slot)
            and (not ended or (document.tree.is_admitted(entry) and document.state(entry) in ENDED))
        ]
        return self.random.choice(entries) if entries else None

    # -- what devices do -----------------------------------------------------------------------

    @rule(name=names, text=st.text("ab é🧀", max_size=6))
    def send(self, name: str, text: str) -> None:
        self.loop.run(self.at(name).write(lambda c: c.send(text)))

    @rule(name=names, text=st.text("ab é🧀", max_size=6), params=asked)
    def ask(self, name: str, text: str, params: dict[str, Any]) -> None:
        self.loop.run(self.at(name).write(lambda c: c.ask(text, **params)))

    @rule(name=names, params=asked, seconds=st.sampled_from((0.3, 0.5)))
    def ask_and_hear_the_beginning(self, name: str, params: dict[str, Any], seconds: float) -> None:
        """So that what happens next often happens in the middle of a reply."""
        params |= {"max_tokens": 40, "ignore_eos": True, "stop": ()}
        self.loop.run(self.at(name).write(lambda c: c.ask("go on", **params)))
        self.loop.run(asyncio.sleep(seconds))

    @rule(params=asked)
    def ask_at_once(self, params: dict[str, Any]) -> None:
        async def all_of_them() -> None:
            devices = self.here.devices.values()
            await asyncio.gather(
                *(device.write(lambda c: c.ask("at once", **params)) for device in devices)
            )

        self.loop.run(all_of_them())

    @rule(name=names, params=asked, switch=st.booleans())
    def fork(self, name: str, params: dict[str, Any], *, switch: bool) -> None:
        entry = self.pick(name, slots=False)
        if entry is not None:
            self.loop.run(
                self.at(name).write(lambda c: c.fork(entry, "no, so", switch=switch, **params))
            )

    @rule(name=names, switch=st.booleans())
    def regenerate(self, name: str, *, switch: bool) -> None:
        slot = self.pick(name, slots=True)
        if slot is not None:
            self.loop.run(self.at(name).write(lambda c: c.regenerate(slot, switch=switch)))

    @rule(name=names, params=asked)
    def extend(self, name: str, params: dict[str, Any]) -> None:
        slot = self.pick(name, slots=True, ended=True)
        if slot is not None:
            self.loop.run(self.at(name).write(lambda c: c.extend(slot, **params)))

    @rule(name=names)
    def stop_what_runs(self, name: str) -> None:
        self.loop.run(self.at(name).write(lambda c: c.stop()))

    @rule(name=names)
    def stop_anything(self, name: str) -> None:
        slot = self.pick(name, slots=True)
        if slot is not None:
            self.loop.run(self.at(name).write(lambda c: c.stop(slot)))

    @rule(name=names)
    def set_head(self, name: str) -> None:
        entry = self.pick(name)
        if entry is not None:
            self.loop.run(self.at(name).write(lambda c: c.set_head(entry)))

    @rule(name=names, home=st.booleans())
    def look(self, name: str, *, home: bool) -> None:
        self.at(name).conversation.look(None if home else self.pick(name))

    @rule(name=names, policy=st.sampled_from(("queue", "interrupt")))
    def set_policy(self, name: str, policy: str) -> None:
        async def act(conversation: OpenConversation) -> None:
            await conversation._replica.write(
                lambda _, writer: writer.set_meta("policy", {"on_new_entry": policy})
            )

        self.loop.run(self.at(name).write(act))

    # -- what happens to them ------------------------------------------------------------------

    @rule(name=names)
    def pause(self, name: str) -> None:
        self.at(name).conversation.pause()

    @rule(name=names)
    def resume(self, name: str) -> None:
        async def resume() -> None:
            self.at(name).conversation.resume()

        self.loop.run(resume())

    @rule(name=names)
    def break_connection(self, name: str) -> None:
        self.loop.run(self.here.network.cut(name))

    @rule(name=names, cut_off=st.booleans())
    def partition(self, name: str, *, cut_off: bool) -> None:
        if not cut_off:
            self.here.network.cut_off.discard(name)
            return
        self.here.network.cut_off.add(name)
        self.loop.run(self.here.network.cut(name))

    @rule(noise=st.sampled_from((0.0, 0.3)))
    def repeat_frames(self, noise: float) -> None:
        self.here.network.noise = noise

    @rule(name=names)
    def crash_device(self, name: str) -> None:
        async def crash() -> None:
            device = self.at(name)
            identity = device.conversation.id
            await device.crash()
            await device.start(identity)

        self.loop.run(crash())

    @rule()
    def crash_server(self) -> None:
        self.loop.run(self.here.crash_server())

    @rule(fails=st.booleans())
    def break_disk(self, *, fails: bool) -> None:
        self.here.disk_fails = fails

    @rule(slow=st.booleans())
    def slow_disk(self, *, slow: bool) -> None:
        """So that crashes find commits half way, and writes queue up behind them."""
        self.here.commit_s = SLOW_COMMIT_S if slow else COMMIT_S

    @rule(comes_back=st.booleans())
    def stop_node(self, *, comes_back: bool) -> None:
        async def stop() -> None:
            await self.here.server.stop_node()
            if comes_back:
                await self.here.server.start_node()

        self.loop.run(stop())

    @rule()
    def start_node(self) -> None:
        self.loop.run(self.here.server.start_node())

    @rule(dice=st.integers(0, 99))
    def kill_engine_rarely(self, dice: int) -> None:
        if dice == KILL:
            self.kill_engine()

    def kill_engine(self) -> None:
        self.loop.run(self.house.kill_engine())

    @rule(seconds=st.sampled_from((0.0, 0.03, 0.2, 1.0, 60.0)))
    def let_time_pass(self, seconds: float) -> None:
        self.loop.run(asyncio.sleep(seconds))

    # -- what must hold ------------------------------------------------------------------------

    @invariant()
    def what_was_admitted_never_moves(self) -> None:
        if self.world is not None:
            for device in self.world.devices.values():
                self.agreement.look(device.document)

    @invariant()
    def what_a_device_was_sent_is_durable(self) -> None:
        """A crash at any moment takes nothing that anybody has seen."""
        if self.world is None:
            return
        durable = decode_state_vector(self.world.durable().state_vector())
        for device in self.world.devices.values():
            for client, clock in decode_state_vector(device.document.state_vector()).items():
                known = client in device.own_clients or durable.get(client, 0) >= clock
                assert known, f"{device.name} was sent what is not durable"

    @rule(dice=st.integers(0, 9))
    def heal_sometimes(self, dice: int) -> None:
        if dice == 3:
            self.heal()

    def heal(self) -> None:
        self.loop.run(self.here.heal())
        self.what_was_admitted_never_moves()
        self.loop.run(self.check_agreement())

    async def check_agreement(self) -> None:
        durable = self.here.durable()
        self.agreement.look(durable)
        replicas = {name: device.document for name, device in self.here.devices.items()}
        work = self.here.workplace
        replicas["node"] = work.conversation
        for name, replica in replicas.items():
            check_equal(name, replica, durable)
        for device in self.here.devices.values():
            assert device.conversation.refused is None
            missing = device.acknowledged - set(durable.tree.entries)
            assert not missing, f"{device.name} was promised {missing}"
        check_settled(durable)
        fresh = Conversation(self.random.getrandbits(31) + 1, update=durable.diff())
        transcript = Transcript(fresh, self.house.renderer, self.here.sealer)
        for tip in fresh.tree.tips():
            assert work.transcript.ids(tip) == transcript.ids(tip)
        self.check_replies(fresh, transcript)
        await self.check_engine(fresh, transcript)

    def check_replies(self, document: Conversation, transcript: Transcript) -> None:
        """Every reply says what its sealed ids say, and what it cost."""
        for reply in placed_replies(document):
            hidden = transcript.hidden(reply)
            assert hidden is not None
            assert reply.place is not None
            stop = hidden.params["stop"]
            assert reply.content == self.house.vocabulary.text_of(hidden.ids, hidden.kinds, stop)
            assert reply.usage is not None
            before = transcript.ids(reply.place.parent)
            assert reply.usage.prompt == len(before) + len(hidden.injected)
            assert reply.usage.prefilled <= reply.usage.prompt
            assert reply.usage.sampled == len(hidden.sampled) <= hidden.params["max_tokens"]
            assert len(reply.sealed) == 1

    async def check_engine(self, document: Conversation, transcript: Transcript) -> None:
        """The KV that grew with the conversation is the one that a replay makes, bit for bit."""
        tips = [tip for tip in document.tree.tips() if transcript.ids(tip)]
        with self.loop.outside():
            engine = await self.house.borrowed()
            grown = {tip: await engine.digest(transcript.ids(tip)) for tip in tips}
            await self.house.forget_everything()
            for tip in reversed(tips):
                assert await engine.digest(transcript.ids(tip)) == grown[tip]
            await self.check_tokens(document, transcript, engine)

    async def check_tokens(
        self, document: Conversation, transcript: Transcript, engine: EngineProcess
    ) -> None:
        """However often a reply was cut and taken up, it is the one that nothing disturbed."""
        sampled = [
            reply.id
            for reply in placed_replies(document)
            if (hidden := transcript.hidden(reply)) is not None and hidden.sampled
        ]
        async for row in replay(document, sampled, transcript, self.house.renderer, engine):
            assert row.exact, row

    def teardown(self) -> None:
        failed = sys.exc_info()[0] is not None  # then there is nothing to add to it
        try:
            if self.world is not None and not failed:
                self.heal()
                self.loop.run(self.check_disks())
        finally:
            self.patch.undo()
            self.loop.run(self.house.abandon_all())

    async def check_disks(self) -> None:
        """What was promised is still there when everybody starts anew."""
        await self.here.end()
        durable = self.here.durable()
        for device in self.here.devices.values():
            await device.start(device.conversation.id)
            document = device.document
            missing = device.acknowledged - set(document.tree.entries)
            assert not missing, f"the disk of {device.name} lacks {missing}"
            check_equal(f"the disk of {device.name}", document, durable)
            await device.conversation.close()


def check_equal(name: str, replica: Conversation, durable: Conversation) -> None:
    have, there = (decode_state_vector(d.state_vector()) for d in (replica, durable))
    assert have == there, name
    assert replica.view() == durable.view(), name
    assert replica.meta == durable.meta, name
    entries = sorted(durable.tree.entries)
    assert sorted(replica.tree.entries) == entries, name
    for entry in entries:
        assert replica.entry(entry) == durable.entry(entry), name


def check_settled(document: Conversation) -> None:
    """Nothing waits: every slot has ended, and the chain holds to every tip."""
    tree = document.tree
    assert tree.pending == ()
    assert tree.superseded == frozenset()
    for entry in tree.entries:
        if tree.facts(entry).slot:
            assert document.state(entry) in ENDED
            assert tree.is_admitted(entry) or was_never_begun(document, entry)
    for tip in tree.tips():
        path = tree.path(tip)
        verdicts = list(verify_path(document, path, RELAY_KEY.public))
        assert [verdict.problem for verdict in verdicts] == [None] * len(path)


def was_never_begun(document: Conversation, name: str) -> bool:
    """Whether a slot ended before its prompt was fixed, for one of the reasons that there are."""
    entry = document.entry(name)
    assert entry is not None
    match entry.state:
        case State.STOPPED:
            return entry.stop is not None
        case State.SUPERSEDED:
            return not entry.born.fork
        case State.FAILED:  # long runs reach the end of the model's positions
            return entry.usage is not None and entry.usage.error_code == "context-full"
        case _:
            return False


def placed_replies(document: Conversation) -> Iterator[Entry]:
    for name in sorted(document.tree.entries):
        entry = document.entry(name)
        if entry is not None and entry.is_slot and entry.place is not None:
            yield entry


@pytest.fixture(scope="module")
def house(tiny_model_dir: Path) -> Iterator[House]:
    house = House(tiny_model_dir)
    yield house
    house.close()


def test_whatever_happens_everybody_agrees_to_the_bit(house: House) -> None:
    run_state_machine_as_test(
        cast("type[Stack]", lambda: Stack(house)),  # it takes factories too, and says so
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_one_story_with_everything_in_it(house: House) -> None:
    """What random runs reach by chance, each once for certain, in the middle of a reply."""
    stack = Stack(house)
    try:
        stack.begin(11)
        story = Story(stack)
        first = story.reply_begins("laptop", temperature=0.7)
        stack.kill_engine()
        story.until(lambda document: document.state(first) is State.DONE)
        second = story.reply_begins("phone", temperature=0.7)
        stack.crash_server()
        story.until(lambda document: document.state(second) is State.DONE)
        third = story.reply_begins("tablet", temperature=0.0)
        stack.stop_node(comes_back=True)
        story.until(lambda document: document.state(third) is State.DONE)
        fourth = story.reply_begins("phone", temperature=0.0)
        stack.break_disk(fails=True)
        stack.let_time_pass(0.2)
        stack.break_disk(fails=False)
        story.until(lambda document: document.state(fourth) is State.DONE)
        story.check_merge()
        story.check_branches(first)
        story.check_superseded()
        stack.heal()
        durable = stack.here.durable()
        for slot in (first, second, third, fourth):
            reply = durable.entry(slot)
            assert reply is not None
            assert reply.usage is not None
            assert reply.usage.sampled == LONG
    except BaseException:
        stack.loop.run(house.abandon_all())
        raise
    stack.teardown()


def test_a_stop_is_heard_while_no_engine_starts(house: House) -> None:
    """Also of a reply that was admitted and has no token yet: nothing waits for the engine."""
    stack = Stack(house)
    try:
        stack.begin(12)
        story = Story(stack)
        house.starts = False
        stack.kill_engine()  # the node has not noticed, and admits what comes
        stack.ask("phone", "anybody?", {"max_tokens": 5})
        slot = stack.at("phone").document.view()[-1]
        story.until(lambda document: document.state(slot) is State.STREAMING)
        stack.loop.run(stack.at("phone").write(lambda c: c.stop(slot)))
        story.until(lambda document: document.state(slot) is State.STOPPED)
    except BaseException:
        stack.loop.run(house.abandon_all())
        raise
    finally:
        house.starts = True
    stack.teardown()


def test_a_node_that_restarts_while_its_writes_are_on_their_way(house: House) -> None:
    """What the old one handed over must be decided before the new one reads what there is."""
    for seed in range(1, 5):
        stack = Stack(house)
        try:
            stack.begin(seed)
            stack.slow_disk(slow=True)
            for _ in range(12):
                params = {"max_tokens": stack.random.choice((3, LONG)), "temperature": 0.7}
                stack.ask(stack.random.choice(DEVICES), "go on", params)
                stack.let_time_pass(stack.random.choice((0.05, 0.1, 0.2, 0.4)))
                stack.send(stack.random.choice(DEVICES), "so that commits queue up")
                stack.let_time_pass(stack.random.choice((0.05, 0.1, 0.2, 0.4)))
                stack.stop_node(comes_back=True)
        except BaseException:
            stack.loop.run(house.abandon_all())
            raise
        stack.teardown()


LONG: Final = 40  # tokens: some ten flushes, so that there is a middle


class Story:
    """Steps of a run that wait for what they are about."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack

    def until(self, holds: Callable[[Conversation], bool]) -> None:
        """Let time pass until something holds of what is durable."""
        for _ in range(2000):
            self.stack.what_a_device_was_sent_is_durable()
            if holds(self.stack.here.durable()):
                return
            self.stack.let_time_pass(0.05)
        raise AssertionError("it never came to that")

    def reply_begins(self, name: str, *, temperature: float, tokens: int = LONG) -> str:
        before = set(self.stack.here.durable().tree.entries)
        params = {"max_tokens": tokens, "temperature": temperature, "ignore_eos": True}
        self.stack.ask(name, "go on", params)
        slots: list[str] = []

        def streams(document: Conversation) -> bool:
            slots[:] = [
                entry
                for entry in set(document.tree.entries) - before
                if document.state(entry) is State.STREAMING
            ]
            return any(len(entry.sealed) > 2 for slot in slots if (entry := document.entry(slot)))

        self.until(streams)
        return slots[0]

    def check_merge(self) -> None:
        """What was written without a connection comes after what has happened since."""
        stack = self.stack
        stack.partition("tablet", cut_off=True)
        stack.send("tablet", "from far away")
        (far,) = stack.at("tablet").acknowledged - set(stack.here.durable().tree.entries)
        near = self.reply_begins("phone", temperature=0.0)
        assert far not in stack.here.durable().tree
        stack.partition("tablet", cut_off=False)
        self.until(lambda document: document.tree.is_admitted(far))
        path = stack.here.durable().tree.path(far)
        assert path.index(near) < path.index(far)

    def check_branches(self, reply: str) -> None:
        stack, phone = self.stack, self.stack.at("phone")
        params: Sampling = {"max_tokens": 5, "temperature": 0.0, "ignore_eos": True}
        parent = phone.document.tree.up(reply)
        stack.loop.run(phone.write(lambda c: c.regenerate(reply, **params)))
        stack.loop.run(phone.write(lambda c: c.fork(parent, "another way", **params)))
        stack.loop.run(phone.write(lambda c: c.extend(reply, **params)))
        self.until(lambda document: phone.acknowledged.issubset(document.tree.entries))
        self.until(lambda document: not document.tree.pending)
        tree = stack.here.durable().tree
        assert len(tree.children(parent)) == 2
        assert len(tree.children(reply)) == 2
        assert len(tree.children(tree.up(parent))) == 2

    def check_superseded(self) -> None:
        """Devices that ask at once get one reply; a request that was stopped gets none."""
        stack = self.stack
        devices = stack.here.devices.values()
        self.until(lambda _: len({device.conversation.path() for device in devices}) == 1)
        busy = self.reply_begins("laptop", temperature=0.0, tokens=400)
        stack.ask_at_once({"max_tokens": 5, "temperature": 0.0, "ignore_eos": True})
        promised = set[str]().union(*(device.acknowledged for device in devices))
        self.until(lambda document: promised <= set(document.tree.entries))
        self.until(lambda _: busy in stack.at("tablet").document.tree)
        assert stack.here.durable().state(busy) is State.STREAMING
        stack.loop.run(stack.at("tablet").write(lambda c: c.stop(busy)))
        self.until(
            lambda document: (
                [document.state(entry) for entry in document.tree.entries].count(State.SUPERSEDED)
                == 2
            )
        )
        self.until(lambda document: document.state(busy) is State.STOPPED)
