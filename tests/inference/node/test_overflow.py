"""A path that is too long for the model: what each policy does about it, and what it costs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from lent_engine import running
from local_room import LocalRoom

from crdt_llm.document.chain import verify_path
from crdt_llm.document.reading import is_summary, read
from crdt_llm.document.schema import Params, Role, State
from crdt_llm.inference.node.overflow import HEADING
from crdt_llm.inference.prompt.transcript import Transcript
from crdt_llm.inference.replay.replay import replay

if TYPE_CHECKING:
    from pathlib import Path

    from crdt_llm.document.schema import Entry
    from crdt_llm.inference.engine.process import EngineProcess
    from crdt_llm.inference.node.node import Node

pytestmark = pytest.mark.asyncio(loop_scope="module")

POSITIONS = 2048  # of the tiny model
GREEDY = {"temperature": 0.0, "max_tokens": 8, "ignore_eos": True}
LONG = "the user asks what was said and the model reads it; " * 12  # some 250 tokens


def room_with(policy: str, seed: int) -> LocalRoom:
    room = LocalRoom(seed)
    since = room.replica.state_vector()
    with room.replica.writing() as writer:
        writer.set_meta("policy", {"overflow": policy})
    room._tell(room.replica, since)
    room.write("You are a tiny model.", role=Role.SYSTEM)
    return room


async def fill(room: LocalRoom) -> list[Entry]:
    """Turns that together are somewhat longer than the model's positions."""
    replies, tokens = [], 0
    while tokens < POSITIONS - 400:
        reply = await room.ended(room.ask(LONG, **GREEDY))
        assert reply.state is State.DONE
        assert reply.usage is not None
        assert reply.reads is None
        tokens = reply.usage.prompt
        replies.append(reply)
    return replies


async def overflow(room: LocalRoom) -> Entry:
    """The first reply that does not read the whole path; or one that fails."""
    while True:
        reply = await room.ended(room.ask(LONG, **GREEDY))
        if reply.reads is not None or reply.state is not State.DONE:
            return reply


def prompt(room: LocalRoom, node: Node, slot: Entry) -> tuple[int, ...]:
    transcript = Transcript(room.replica, node.renderer, node.identity.sealer)
    hidden = transcript.hidden(slot)
    assert hidden is not None
    assert slot.place is not None
    before = transcript.ids_of(transcript.reading_of(slot.id, slot.place.parent))
    return before + hidden.injected


async def assert_sound(room: LocalRoom, node: Node, engine: EngineProcess) -> None:
    """The chain verifies, and every reply comes out again from the document alone."""
    path = room.replica.view()
    assert [verdict.problem for verdict in verify_path(room.replica, path)] == [None] * len(path)
    transcript = Transcript(room.replica, node.renderer, node.identity.sealer)
    replies = [one async for one in replay(room.replica, path, transcript, node.renderer, engine)]
    assert all(one.exact and one.skipped is None for one in replies)


async def test_refuse_says_so_and_changes_nothing(
    tiny_model_dir: Path, engine: EngineProcess
) -> None:
    room = room_with("refuse", 1)
    async with running(room, tiny_model_dir, engine):
        await fill(room)
        reply = await overflow(room)
        assert reply.state is State.FAILED
        assert reply.place is None
        assert reply.usage is not None
        assert reply.usage.error_code == "context-full"
        assert read(room.replica, room.replica.view()[-1]).entries == room.replica.view()


async def test_drop_oldest_records_what_is_read_and_goes_on_from_there(
    tiny_model_dir: Path, engine: EngineProcess
) -> None:
    room = room_with("drop_oldest", 2)
    async with running(room, tiny_model_dir, engine) as node:
        await fill(room)
        reply = await overflow(room)
        assert reply.state is State.DONE
        assert reply.reads is not None
        assert reply.usage is not None
        path = room.replica.tree.path(reply.id)[:-1]
        system, *rest = reply.reads
        assert system == path[0]
        assert tuple(rest) == path[-len(rest) :]
        assert 0 < len(rest) < len(path) - 1
        assert room.replica.born(rest[0]).role is Role.USER  # type: ignore[union-attr]
        # One prefill, of all but the beginning that stays, and reported.
        shown = prompt(room, node, reply)
        assert len(shown) == reply.usage.prompt < POSITIONS
        assert reply.usage.prefilled > reply.usage.prompt // 2
        # Then it goes on as cheaply as before, and says nothing more about it.
        later = await room.ended(room.ask("and on", **GREEDY))
        assert later.reads is None
        assert later.usage is not None
        assert later.usage.prefilled < 60
        assert prompt(room, node, later)[: len(shown)] == shown
        await assert_sound(room, node, engine)


async def test_a_fork_from_before_reads_the_whole_path_again(
    tiny_model_dir: Path, engine: EngineProcess
) -> None:
    room = room_with("drop_oldest", 3)
    async with running(room, tiny_model_dir, engine):
        replies = await fill(room)
        await overflow(room)
        again = room.write(None, after=replies[1].id, fork=True, params=Params(**GREEDY))  # type: ignore[arg-type]
        reply = await room.ended(again)
        assert reply.reads is None
        assert reply.state is State.DONE
        path = room.replica.tree.path(again)
        assert read(room.replica, again).entries == path


async def test_summarise_writes_an_entry_that_is_read_in_the_place_of_others(
    tiny_model_dir: Path, engine: EngineProcess
) -> None:
    room = room_with("summarise", 4)
    async with running(room, tiny_model_dir, engine) as node:
        replies = await fill(room)
        reply = await overflow(room)
        assert reply.state is State.DONE
        view = room.replica.view()
        summaries = [name for name in view if is_summary(room.replica, name)]
        assert len(summaries) == 1
        summary = room.entry(summaries[0])
        assert summary.born.author == "node"
        assert summary.content.startswith(HEADING)
        assert len(summary.content) > len(HEADING)
        assert summary.born.covers is not None
        covered = view[slice(*(view.index(name) for name in summary.born.covers))]
        assert reply.reads is not None
        assert reply.reads[1] == summary.id
        assert not set(covered) & set(reply.reads)
        assert reply.usage is not None
        assert reply.usage.prefilled > reply.usage.prompt // 2
        later = await room.ended(room.ask("and on", **GREEDY))
        assert later.usage is not None
        assert later.usage.prefilled < 60
        assert later.reads is None
        await assert_sound(room, node, engine)
        # A fork from before it undoes it.
        fork = await room.ended(
            room.write(None, after=replies[-1].id, fork=True, params=Params(**GREEDY))  # type: ignore[arg-type]
        )
        assert summary.id not in read(room.replica, fork.id).entries


async def test_a_summary_of_what_is_withdrawn_later_is_withdrawn_too(
    tiny_model_dir: Path, engine: EngineProcess
) -> None:
    room = room_with("summarise", 5)
    async with running(room, tiny_model_dir, engine) as node:
        replies = await fill(room)
        await overflow(room)
        summary = next(n for n in room.replica.view() if is_summary(room.replica, n))
        first = replies[0].place
        assert first is not None
        since = room.replica.state_vector()
        with room.replica.writing() as writer:
            writer.redact(first.parent, "owner", 1)
        room._tell(room.replica, since)
        await room.until(lambda: room.replica.is_redacted(summary))
        assert room.entry(summary).content == ""
        assert room.entry(summary).salt is None
        later = await room.ended(room.ask("and on", **GREEDY))
        assert later.state is State.DONE
        path = room.replica.view()
        assert [verdict.problem for verdict in verify_path(room.replica, path)] == [None] * len(
            path
        )
        assert prompt(room, node, later)


async def test_a_request_that_is_stopped_while_it_waits_for_a_summary_gets_none(
    tiny_model_dir: Path, engine: EngineProcess
) -> None:
    room = room_with("summarise", 6)
    async with running(room, tiny_model_dir, engine) as node:
        await fill(room)
        while True:
            slot = room.ask(LONG, **GREEDY)
            desk, _ = node._desks[room.id]
            sitting = desk._sitting
            assert sitting is not None
            await room.until(lambda: room.replica.state(slot) is not None or _waits(sitting, slot))  # noqa: B023
            if room.replica.state(slot) is None:
                break
            await room.ended(slot)
        room.set(slot, "stop", "owner")
        reply = await room.ended(slot)
        assert reply.state is State.STOPPED
        assert reply.place is None
        assert not any(is_summary(room.replica, name) for name in room.replica.view())


def _waits(sitting: object, slot: str) -> bool:
    return slot in sitting._overflow.preparing  # type: ignore[attr-defined]


async def test_an_offline_merge_of_many_times_the_positions_is_summed_up_in_parts(
    tiny_model_dir: Path, engine: EngineProcess
) -> None:
    room = room_with("summarise", 7)
    for _ in range(40):
        room.write(LONG)
    slot = room.ask("so?", **GREEDY)
    async with running(room, tiny_model_dir, engine):
        reply = await room.ended(slot)
        assert reply.state is State.DONE
        summaries = [name for name in room.replica.view() if is_summary(room.replica, name)]
        assert len(summaries) > 1


@pytest.mark.parametrize("policy", ["drop_oldest", "summarise"])
async def test_one_entry_that_is_too_long_is_refused_whatever_the_policy(
    tiny_model_dir: Path, engine: EngineProcess, policy: str
) -> None:
    room = room_with(policy, 8)
    room.write("before")
    async with running(room, tiny_model_dir, engine):
        reply = await room.ended(room.ask("word " * 4000, **GREEDY))
        assert reply.state is State.FAILED
        assert reply.usage is not None
        assert reply.usage.error_code == "context-full"
