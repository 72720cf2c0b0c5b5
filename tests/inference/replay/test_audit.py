"""The audit: the same build agrees to the last bit, and every difference is found."""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import pytest_asyncio
from local_room import LocalRoom, make_node

from crdt_llm.document.seal import Sealer
from crdt_llm.inference.contract import Scored
from crdt_llm.inference.engine.process import EngineProcess
from crdt_llm.inference.prompt.transcript import Transcript
from crdt_llm.inference.replay.audit import ArgmaxChange, audit

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

    from crdt_llm.inference.contract import Capabilities
    from crdt_llm.inference.node.node import Node
    from crdt_llm.inference.replay.audit import Audited

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def engine(tiny_model_dir: Path) -> AsyncIterator[EngineProcess]:
    async with await EngineProcess.start(tiny_model_dir, threads=1) as engine:
        yield engine


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def answered(tiny_model_dir: Path) -> tuple[LocalRoom, Node]:
    """A greedy reply, one at temperature 0.7, and one that was withdrawn from its path."""
    room = LocalRoom(3)
    node = make_node(room, tiny_model_dir, lambda: EngineProcess.start(tiny_model_dir, threads=1))
    await node.start()
    node.notice(room.id)
    await room.ended(room.ask("hello", temperature=0.0, max_tokens=24, ignore_eos=True))
    await room.ended(room.ask("more", temperature=0.7, max_tokens=24, ignore_eos=True))
    await node.close()
    return room, node


async def audited(answered: tuple[LocalRoom, Node], scorer: EngineProcess | Other) -> list[Audited]:
    room, node = answered
    transcript = Transcript(room.replica, node.renderer, node.identity.sealer)
    return [one async for one in audit(room.replica, room.replica.view(), transcript, scorer)]


class Other:
    """Another build: what it makes of one token differs."""

    def __init__(self, engine: EngineProcess, position: int, by: float, *, best: bool) -> None:
        self.capabilities: Capabilities = replace(engine.capabilities, fingerprint="other")
        self._engine, self._position, self._by, self._best = engine, position, by, best

    async def score(self, ids: Sequence[int], start: int) -> Scored:
        scored = await self._engine.score(ids, start)
        logprobs = np.frombuffer(scored.logprobs, "<f4").copy()
        likeliest = np.frombuffer(scored.likeliest, "<u4").copy()
        logprobs[self._position] += self._by
        if not self._best:
            likeliest[self._position] = 7
        return Scored(logprobs.tobytes(), likeliest.tobytes())


async def test_the_same_build_agrees_to_the_last_bit(
    answered: tuple[LocalRoom, Node], engine: EngineProcess
) -> None:
    rows = await audited(answered, engine)
    assert [one.tokens for one in rows] == [24, 24]
    assert [one.difference for one in rows] == [0.0, 0.0]
    assert all(one.same_model and not one.changes and one.agrees(0.0) for one in rows)


async def test_a_difference_is_reported_as_large_as_it_is(
    answered: tuple[LocalRoom, Node], engine: EngineProcess
) -> None:
    first, _ = await audited(answered, Other(engine, 5, -0.5, best=True))
    assert first.difference == pytest.approx(0.5, abs=0.01)  # as exact as a float16
    assert not first.changes
    assert not first.same_model
    assert not first.agrees(0.4)
    assert first.agrees(0.6)


async def test_every_choice_that_would_change_is_named(
    answered: tuple[LocalRoom, Node], engine: EngineProcess
) -> None:
    room, node = answered
    greedy, drawn = await audited(answered, Other(engine, 5, 0.0, best=False))
    transcript = Transcript(room.replica, node.renderer, node.identity.sealer)
    hidden = transcript.hidden(room.entry(greedy.entry))
    assert hidden is not None
    assert greedy.changes == (ArgmaxChange(5, hidden.sampled[5], 7),)
    assert not greedy.agrees(1.0)
    # Of a token that was drawn it is known only where it was more likely than all others.
    hidden = transcript.hidden(room.entry(drawn.entry))
    assert hidden is not None
    assert bool(drawn.changes) == (hidden.logprobs[5] > np.log(0.5))


async def test_scores_are_those_of_the_reply_itself(
    answered: tuple[LocalRoom, Node], engine: EngineProcess
) -> None:
    """Teacher-forced or sampled, whatever the chunks: one value, in float32 too."""
    room, node = answered
    transcript = Transcript(room.replica, node.renderer, node.identity.sealer)
    entry = room.replica.view()[-1]
    ids = transcript.ids(entry)
    whole = await engine.score(ids, 1)
    half = await engine.score(ids, len(ids) // 2)
    assert whole.logprobs.endswith(half.logprobs)
    assert whole.likeliest.endswith(half.likeliest)
    assert len(whole.logprobs) == 4 * (len(ids) - 1)
    assert all(value <= 0 for (value,) in struct.iter_unpack("<f", whole.logprobs))


async def test_what_cannot_be_read_is_a_problem_and_what_is_not_there_is_skipped(
    answered: tuple[LocalRoom, Node], engine: EngineProcess
) -> None:
    room, node = answered
    strange = Transcript(room.replica, node.renderer, Sealer(b"x" * 32, node.identity.random))
    rows = [one async for one in audit(room.replica, room.replica.view(), strange, engine)]
    assert all(one.problem is not None and not one.agrees(9.0) for one in rows)
