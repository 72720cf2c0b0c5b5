"""The node with a real engine process on a tiny model: what becomes of a conversation."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from lent_engine import Lent, assert_text_is_of_its_ids, running
from local_room import LocalRoom, make_node

from crdt_llm.document.chain import verify_path
from crdt_llm.document.schema import SCHEMA_VERSION, Params, Role, State
from crdt_llm.inference.engine.process import EngineProcess

if TYPE_CHECKING:
    from pathlib import Path


pytestmark = pytest.mark.asyncio(loop_scope="module")

GREEDY = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True}


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
