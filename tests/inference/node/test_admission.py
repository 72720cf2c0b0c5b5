"""What gets a place, when, and what becomes of a slot that cannot have one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
from lent_engine import assert_text_is_of_its_ids, running
from local_room import LocalRoom, make_node

from crdt_llm.document.chain import verify_path
from crdt_llm.document.schema import State
from crdt_llm.inference.contract import Finished, Prefilled, Sampled

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Sequence
    from pathlib import Path

    from crdt_llm.inference.contract import GenerationEvent
    from crdt_llm.inference.engine.process import EngineProcess
    from crdt_llm.inference.node.node import Node

pytestmark = pytest.mark.asyncio(loop_scope="module")

GREEDY = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True}


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
