"""The node with a real engine process on a tiny model: what becomes of a conversation."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio
from lent_engine import Lent, running
from local_room import LocalRoom, make_node

from crdt_llm.document.chain import verify_path
from crdt_llm.document.conversation import Conversation
from crdt_llm.document.schema import SCHEMA_VERSION, Born, Params, Role, State, entry_id
from crdt_llm.errors import EngineDied, PromptTooLong
from crdt_llm.inference.contract import Capabilities, Finished, Prefilled, Sampled
from crdt_llm.inference.engine.process import EngineProcess
from crdt_llm.inference.node import generation, replies
from crdt_llm.inference.prompt.renderer import ParentTail, Renderer
from crdt_llm.inference.prompt.tokens import Vocabulary
from crdt_llm.inference.prompt.transcript import Transcript

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Sequence
    from pathlib import Path

    from crdt_llm.document.schema import Entry
    from crdt_llm.document.seal import Hidden
    from crdt_llm.inference.contract import GenerationEvent
    from crdt_llm.inference.node.node import Node

GREEDY = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True}


pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def warm_engine(tiny_model_dir: Path) -> AsyncIterator[EngineProcess]:
    async with await EngineProcess.start(tiny_model_dir, threads=1) as engine:
        yield engine


@pytest_asyncio.fixture(loop_scope="module")
async def engine(warm_engine: EngineProcess, tiny_model_dir: Path) -> EngineProcess:
    """An engine with nothing in its cache."""
    await forget_all(warm_engine, tiny_model_dir)
    return warm_engine


async def forget_all(engine: EngineProcess, model_dir: Path) -> None:
    """Every conversation begins with the same token."""
    renderer = Renderer.learn(model_dir, Vocabulary.load(model_dir))
    beginning = renderer.segment(
        role="user", content="", is_root=True, root_at_ms=0, parent=ParentTail()
    )
    await engine.forget(beginning[:1])


def hidden_of(room: LocalRoom, node: Node, entry: Entry) -> Hidden:
    identity = node.identity
    transcript = Transcript(room.replica, node.renderer, identity.sealer)
    hidden = transcript.hidden(entry)
    assert hidden is not None
    return hidden


def assert_text_is_of_its_ids(room: LocalRoom, node: Node, entry: Entry) -> None:
    hidden = hidden_of(room, node, entry)
    stop = hidden.params["stop"]
    assert entry.content == node.vocabulary.text_of(hidden.ids, hidden.kinds, stop)


async def test_a_slot_is_admitted_answered_and_proved(
    tiny_model_dir: Path, engine: EngineProcess
) -> None:
    room = LocalRoom()
    async with running(room, tiny_model_dir, engine) as node:
        slot = room.ask("hello", **GREEDY)
        reply = await room.ended(slot)
        assert reply.state is State.DONE
        assert reply.usage is not None
        assert reply.usage.finish == "length"
        assert reply.usage.sampled == 12
        assert reply.usage.prompt == reply.usage.prefilled > 0
        path = room.replica.view()
        assert path[-1] == slot
        assert [v.problem for v in verify_path(room.replica, path)] == [None, None]
        assert len(reply.sealed) == 1
        assert_text_is_of_its_ids(room, node, reply)


async def test_what_hidden_fields_are_written_in_is_kept_for_the_next_turn_and_no_longer(
    tiny_model_dir: Path, engine: EngineProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    released = asyncio.Event()
    make, release = Conversation._second, Conversation.release_seal

    def second(self: Conversation) -> Any:
        made.append("made")
        return make(self)

    def let_go(self: Conversation) -> None:
        release(self)
        released.set()

    monkeypatch.setattr(Conversation, "_second", second)
    monkeypatch.setattr(Conversation, "release_seal", let_go)
    room = LocalRoom()
    async with running(room, tiny_model_dir, engine):
        for text in ("hello", "and then?", "go on"):
            await room.ended(room.ask(text, **GREEDY))
        assert made == ["made"]
        monkeypatch.setattr(replies, "SEAL_KEPT_S", 0.0)
        await room.ended(room.ask("that is all", **GREEDY))
        async with asyncio.timeout(10):
            await released.wait()
        await room.ended(room.ask("one thing more", **GREEDY))
        assert made == ["made", "made"]


async def test_an_appended_turn_prefills_nothing_again(
    tiny_model_dir: Path, engine: EngineProcess
) -> None:
    room = LocalRoom()
    async with running(room, tiny_model_dir, engine):
        before = await room.ended(room.ask("hello", **GREEDY))
        for text in ("and then?", "you don't say", "go on"):
            reply = await room.ended(room.ask(text, **GREEDY))
            assert reply.usage is not None
            assert before.usage is not None
            computed_before = before.usage.prompt + before.usage.sampled - 1
            assert reply.usage.reused == computed_before
            before = reply


async def test_slots_that_wait_together_get_one_reply(
    tiny_model_dir: Path, engine: EngineProcess
) -> None:
    room = LocalRoom()
    first = room.ask("from the phone", **GREEDY)
    second = room.ask("from the laptop", **GREEDY)
    async with running(room, tiny_model_dir, engine):
        reply = await room.ended(second)
        assert reply.state is State.DONE
        assert room.replica.state(first) is State.SUPERSEDED
        assert first not in room.replica.view()
        assert len(room.replica.view()) == 3


async def test_stop_ends_a_reply_with_what_it_has(
    tiny_model_dir: Path, engine: EngineProcess
) -> None:
    room = LocalRoom()
    async with running(room, tiny_model_dir, engine) as node:
        slot = room.ask("tell me everything", temperature=0.0, max_tokens=1500, ignore_eos=True)
        await room.until(lambda: bool(room.replica.entry(slot).sealed))  # type: ignore[union-attr]
        room.set(slot, "stop", "owner")
        reply = await room.ended(slot)
        assert reply.state is State.STOPPED
        assert reply.usage is not None
        assert 0 < reply.usage.sampled < 1500
        assert_text_is_of_its_ids(room, node, reply)
        after = await room.ended(room.ask("and now?", **GREEDY))
        assert after.place is not None
        assert after.state is State.DONE


async def test_a_stopped_request_that_was_never_admitted_is_told_so(
    tiny_model_dir: Path, engine: EngineProcess
) -> None:
    room = LocalRoom()
    slot = room.ask("never mind", **GREEDY)
    room.set(slot, "stop", "owner")
    async with running(room, tiny_model_dir, engine):
        reply = await room.ended(slot)
        assert reply.state is State.STOPPED
        assert reply.place is None


async def test_extend_goes_on_where_the_reply_was_cut(
    tiny_model_dir: Path, engine: EngineProcess
) -> None:
    room, whole = LocalRoom(), LocalRoom()
    async with running(room, tiny_model_dir, engine) as node:
        params = {"temperature": 0.0, "ignore_eos": True}
        cut = await room.ended(room.ask("hello", max_tokens=6, **params))
        more = room.write(None, after=cut.id, params=Params(max_tokens=6, extend=True, **params))  # type: ignore[arg-type]
        rest = await room.ended(more)
        first, second = hidden_of(room, node, cut), hidden_of(room, node, rest)
        assert second.injected == ()
    async with running(whole, tiny_model_dir, engine) as node:
        reply = await whole.ended(whole.ask("hello", max_tokens=12, **params))
        assert hidden_of(whole, node, reply).sampled == first.sampled + second.sampled


async def test_a_fork_and_a_regeneration_share_what_is_computed(
    tiny_model_dir: Path, engine: EngineProcess
) -> None:
    room = LocalRoom()
    async with running(room, tiny_model_dir, engine):
        first = await room.ended(room.ask("hello there", **GREEDY))
        assert first.place is not None
        again = room.write(
            None,
            after=first.place.parent,
            fork=True,
            params=Params(**GREEDY),  # type: ignore[arg-type]
        )
        reply = await room.ended(again)
        assert reply.place == first.place
        assert reply.usage is not None
        assert reply.usage.prefilled == 0
        assert reply.content == first.content


@pytest.mark.parametrize("temperature", [0.0, 0.7])
async def test_a_killed_engine_changes_no_token(tiny_model_dir: Path, temperature: float) -> None:
    params = {"temperature": temperature, "max_tokens": 60, "seed": 5, "ignore_eos": True}
    texts = []
    for kill in (False, True):
        room = LocalRoom()
        async with running(room, tiny_model_dir) as node:
            slot = room.ask("a long story", **params)
            await room.until(lambda: bool(room.replica.entry(slot).sealed))  # type: ignore[union-attr]  # noqa: B023
            if kill:
                assert isinstance(node.engine, EngineProcess)
                os.kill(node.engine.process_id, signal.SIGKILL)
            reply = await room.ended(slot)
            assert reply.state is State.DONE
            assert_text_is_of_its_ids(room, node, reply)
            texts.append(hidden_of(room, node, reply).sampled)
    assert texts[0] == texts[1]


async def test_a_new_node_goes_on_at_the_token_where_the_old_one_stopped(
    tiny_model_dir: Path, engine: EngineProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Written often, and long enough that it is still being written after a second time.
    monkeypatch.setattr(generation, "window_s", lambda _: 0.0)
    params = {"temperature": 0.7, "max_tokens": 1500, "seed": 3, "ignore_eos": True}
    alone = LocalRoom()
    async with running(alone, tiny_model_dir, engine) as node:
        reply = await alone.ended(alone.ask("a long story", **params))
        expected = hidden_of(alone, node, reply).sampled
    room = LocalRoom()
    slot = room.ask("a long story", **params)
    async with running(room, tiny_model_dir, engine):
        await room.until(lambda: len(room.replica.entry(slot).sealed) > 1)  # type: ignore[union-attr]
    assert room.replica.state(slot) is State.STREAMING
    await forget_all(engine, tiny_model_dir)
    async with running(room, tiny_model_dir, engine) as node:
        reply = await room.ended(slot)
        assert hidden_of(room, node, reply).sampled == expected
        assert reply.usage is not None
        assert reply.usage.prefilled == reply.usage.prompt  # one replay, and nothing more


async def test_policy_auto_answers_once(tiny_model_dir: Path, engine: EngineProcess) -> None:
    room = LocalRoom()
    with room.replica.writing() as writer:
        writer.set_meta("schema", SCHEMA_VERSION)
        writer.set_meta("policy", {"reply": "auto"})
    async with running(room, tiny_model_dir, engine):
        user = room.write("hello")
        await room.until(lambda: len(room.replica.view()) == 2)
        slot = room.replica.view()[-1]
        room.set(slot, "stop", "owner")
        await room.ended(slot)
        born = room.replica.born(slot)
        assert born is not None
        assert (born.author, born.after) == ("node", user)
        later = room.write("again", role=Role.USER)
        await room.until(lambda: len(room.replica.tree.children(later)) == 1)
        assert (await room.ended(room.replica.view()[-1])).state is State.DONE
        assert len(room.replica.tree.children(later)) == 1


async def test_a_prompt_longer_than_the_model_fails_clearly(
    tiny_model_dir: Path, engine: EngineProcess
) -> None:
    room = LocalRoom()
    async with running(room, tiny_model_dir, engine):
        slot = room.ask("word " * 4000, **GREEDY)
        reply = await room.ended(slot)
        assert reply.state is State.FAILED
        assert reply.place is None
        assert reply.usage is not None
        assert reply.usage.error_code == "context-full"
        user = room.replica.view()[0]
        assert room.entry(user).place is not None


async def test_redaction_stops_a_reply_and_hides_it_from_the_model(
    tiny_model_dir: Path, engine: EngineProcess
) -> None:
    room = LocalRoom()
    async with running(room, tiny_model_dir, engine):
        slot = room.ask("a secret", temperature=0.0, max_tokens=1500, ignore_eos=True)
        await room.until(lambda: bool(room.replica.entry(slot).sealed))  # type: ignore[union-attr]
        since = room.replica.state_vector()
        entries = room.replica._roots["entries"]
        with room.replica.writing() as writer:
            writer.set(slot, "redacted", {"by": "owner", "at": 1})
            for key in ("content", "sealed"):
                del entries[slot][key]
        room._tell(room.replica, since)
        reply = await room.ended(slot)
        assert reply.state is State.STOPPED
        assert (reply.content, reply.sealed, reply.salt) == ("", (), None)
        assert [v.problem for v in verify_path(room.replica, room.replica.view())] == [None, None]
        assert (await room.ended(room.ask("next", **GREEDY))).state is State.DONE


async def test_many_conversations_share_one_engine(tiny_model_dir: Path) -> None:
    rooms = {room.id: room for room in (LocalRoom(seed) for seed in range(4))}
    first = next(iter(rooms.values()))
    node = make_node(first, tiny_model_dir, lambda: EngineProcess.start(tiny_model_dir, threads=1))
    for room in rooms.values():
        room.node = first.node
    node.surroundings = type(node.surroundings)(
        lambda conversation, deliver, lost: rooms[conversation].take_seat(
            conversation, deliver, lost
        ),
        *(
            getattr(node.surroundings, name)
            for name in ("start_engine", "clock_ms", "random", "sleep")
        ),
    )
    await node.start()
    try:
        slots = {name: room.ask("hello", **GREEDY) for name, room in rooms.items()}
        for name in rooms:
            node.notice(name)
        replies = await asyncio.gather(*(rooms[name].ended(slots[name]) for name in rooms))
        assert len({reply.content for reply in replies}) == 1
    finally:
        await node.close()


async def test_stop_ends_a_reply_while_there_is_no_engine(tiny_model_dir: Path) -> None:
    """I2 needs no engine: the first one dies before it made a token, the second never starts."""
    room, engines = LocalRoom(), [NoEngine(dies=True)]
    never = asyncio.Event()

    async def start() -> NoEngine:
        if not engines:
            await never.wait()
        return engines.pop()

    node = make_node(room, tiny_model_dir, start)
    await node.start()
    node.notice(room.id)
    try:
        slot = room.ask("hello", **GREEDY)
        await room.until(lambda: room.replica.state(slot) is State.STREAMING)
        room.set(slot, "stop", "owner")
        reply = await room.ended(slot)
        assert reply.state is State.STOPPED
        assert reply.proof is not None
    finally:
        await node.close()


class NoEngine:
    """An engine whose process ends whenever it is asked for anything."""

    def __init__(self, *, dies: bool) -> None:
        assert dies
        self.capabilities = Capabilities("none", 2, 2048, 1000, "none")

    async def warm(self, _ids: object) -> None:
        raise EngineDied("gone")

    async def generate(self, *_: object) -> AsyncIterator[None]:
        nothing: tuple[None, ...] = ()
        for one in nothing:
            yield one
        raise EngineDied("gone")

    async def close(self) -> None:
        """Nothing is open."""


class HastyEngine:
    """An engine that answers before it is asked to wait, and lets something happen first."""

    def __init__(self, engine: EngineProcess, meanwhile: list[Callable[[], object]]) -> None:
        self.warm, self.digest, self.forget = engine.warm, engine.digest, engine.forget
        self.capabilities = engine.capabilities
        self.meanwhile = meanwhile
        self.asked = 0

    async def generate(
        self, ids: Sequence[int], _params: object, _start: int
    ) -> AsyncGenerator[GenerationEvent, None]:
        self.asked += 1
        if self.meanwhile:
            self.meanwhile.pop()()
        yield Prefilled(len(ids), 0, 0)
        yield Sampled(40, -1.0)
        yield Finished("length")

    async def close(self) -> None:
        """It was only lent."""


@asynccontextmanager
async def hasty(
    room: LocalRoom,
    model_dir: Path,
    engine: EngineProcess,
    meanwhile: list[Callable[[], object]],
) -> AsyncIterator[tuple[Node, HastyEngine]]:
    given = HastyEngine(engine, meanwhile)

    async def start() -> HastyEngine:
        return given

    node = make_node(room, model_dir, start)
    await node.start()
    node.notice(room.id)
    try:
        yield node, given
    finally:
        await node.close()


async def test_what_an_engine_makes_at_once_waits_for_the_place(
    tiny_model_dir: Path, engine: EngineProcess
) -> None:
    room = LocalRoom()
    async with hasty(room, tiny_model_dir, engine, []) as (node, given):
        reply = await room.ended(room.ask("hello", **GREEDY))
        assert reply.state is State.DONE
        assert reply.usage is not None
        assert (reply.usage.sampled, given.asked) == (1, 1)
        assert_text_is_of_its_ids(room, node, reply)


async def test_who_writes_while_the_engine_gets_its_command_is_heard(
    tiny_model_dir: Path, engine: EngineProcess
) -> None:
    room, meanwhile = LocalRoom(), list[Callable[[], object]]()
    async with hasty(room, tiny_model_dir, engine, meanwhile) as (node, given):
        slot = room.ask("hello", **GREEDY)
        meanwhile.append(lambda: room.set(slot, "stop", "owner"))
        stopped = await room.ended(slot)
        assert (stopped.state, stopped.place) == (State.STOPPED, None)  # it was never begun
        assert (given.asked, node.running) == (1, 0)

        slot = room.ask("hello again", **GREEDY)
        meanwhile.append(lambda: room.write("and one thing more"))
        reply = await room.ended(slot)
        assert reply.state is State.DONE
        assert (given.asked, node.running) == (3, 0)
        path = room.replica.tree.path(slot)
        assert [verdict.problem for verdict in verify_path(room.replica, path)] == [None] * 3


async def test_a_slot_that_cannot_begin_still_supersedes_the_ones_before_it(
    tiny_model_dir: Path, engine: EngineProcess
) -> None:
    room = LocalRoom()
    room.write("word " * 4000)
    first = room.ask("one", **GREEDY)
    second = room.ask("two", **GREEDY)
    async with running(room, tiny_model_dir, engine):
        assert (await room.ended(second)).state is State.FAILED
        assert room.replica.state(first) is State.SUPERSEDED


async def test_a_large_entry_is_encoded_beside_the_event_loop(
    tiny_model_dir: Path, engine: EngineProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = []
    whole = Renderer.segment

    def segment(self: Renderer, **given: object) -> tuple[int, ...]:
        threads.append((len(str(given["content"])), threading.current_thread()))
        return whole(self, **given)  # type: ignore[arg-type]

    monkeypatch.setattr(Renderer, "segment", segment)
    room = LocalRoom()
    room.write("word " * 20_000)
    slot = room.ask("and?", **GREEDY)
    async with running(room, tiny_model_dir, engine):
        assert (await room.ended(slot)).state is State.FAILED
    large = [thread for size, thread in threads if size > 50_000]
    assert large
    assert threading.main_thread() not in large


async def test_a_long_path_is_rendered_a_few_entries_at_a_time(tiny_model_dir: Path) -> None:
    room = LocalRoom()
    for number in range(200):
        room.write(f"entry {number}")
    node = make_node(room, tiny_model_dir, asyncio.Event().wait)
    transcript = Transcript(room.replica, node.renderer, node.identity.sealer)
    last = room.replica.view()[-1]
    turns = 1
    while await transcript.load(last, 100_000):
        turns += 1
    assert turns >= 3
    assert transcript.ids(last)
    with pytest.raises(PromptTooLong):
        await transcript.load(last, 50)


async def test_a_pending_entry_is_rendered_anew_when_it_comes_to_stand_elsewhere(
    tiny_model_dir: Path, engine: EngineProcess
) -> None:
    """Its close of a reply belongs to whoever comes first behind that reply."""
    room = LocalRoom()
    async with running(room, tiny_model_dir, engine) as node:
        reply = await room.ended(room.ask("hello", **GREEDY))
        renderer, sealer = node.renderer, node.identity.sealer
    transcript = Transcript(room.replica, renderer, sealer)
    late = room.write("late", after=reply.id)
    alone = transcript.segment(late)
    name = entry_id(1, b"early-bird")
    born = Born(
        Role.USER, "owner", "laptop", 1, room.replica.tree.facts(late).clock, after=reply.id
    )
    with room.replica.writing() as writer:
        writer.add(name, born, "early")
    assert room.replica.tree.up(late) == name
    assert transcript.segment(late) != alone
    fresh = Transcript(room.replica, renderer, sealer)
    assert transcript.ids(late) == fresh.ids(late)


async def test_a_seat_is_left_only_when_what_was_submitted_is_decided(
    tiny_model_dir: Path, engine: EngineProcess
) -> None:
    """Else the next one could admit the same entry again, at the same time as the last one did."""
    room, at_the_disk, may_commit = LocalRoom(), asyncio.Event(), asyncio.Event()
    room.write("hello")
    accept = room.accept
    node = make_node(room, tiny_model_dir, lambda: lend(engine))
    take_seat = node.surroundings.take_seat

    async def slow_seat(*given: object) -> object:
        seat = await take_seat(*given)  # type: ignore[arg-type]

        async def submit(update: bytes) -> None:
            at_the_disk.set()
            await may_commit.wait()
            accept(update, seat)  # type: ignore[arg-type]

        return SlowSeat(seat, submit)

    node.surroundings = replace(node.surroundings, take_seat=slow_seat)  # type: ignore[arg-type]
    await node.start()
    node.notice(room.id)
    await at_the_disk.wait()
    closing = asyncio.create_task(node.close())
    await asyncio.sleep(0)
    assert room.seats
    may_commit.set()
    await closing
    assert not room.seats
    assert room.replica.lease(1) is not None


async def lend(engine: EngineProcess) -> Lent:
    return Lent(engine)


class SlowSeat:
    def __init__(self, seat: object, submit: object) -> None:
        self.submit = submit
        self.leave = seat.leave  # type: ignore[attr-defined]
        self.lease = seat.lease  # type: ignore[attr-defined]
        self.state = seat.state  # type: ignore[attr-defined]
