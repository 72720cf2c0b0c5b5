"""What people type reaches the node before they send it, and they see what it is doing."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio
from stack.test_turn_costs import GREEDY, Stack, done, two_devices

from crdt_llm.inference.engine.process import EngineProcess
from crdt_llm.inference.node import presence
from crdt_llm.sync.wire.draft import NOTHING, Said

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

    from crdt_llm.inference.contract import Prefilled
    from crdt_llm.sync.wire.y_websocket import AwarenessState

pytestmark = pytest.mark.asyncio(loop_scope="module")

TEXT = "the user asks what was said, and how the model reads it"


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def process(tiny_model_dir: Path) -> AsyncIterator[EngineProcess]:
    async with await EngineProcess.start(tiny_model_dir, threads=1) as process:
        yield process


@pytest_asyncio.fixture(loop_scope="module")
async def stack(
    tmp_path: Path, tiny_model_dir: Path, process: EngineProcess
) -> AsyncIterator[Stack]:
    async with Stack(tmp_path, tiny_model_dir, process) as stack:
        yield stack


async def test_a_draft_at_the_relay_is_read_by_the_node(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = len(stack.node.vocabulary.encode_text(TEXT[: TEXT.rindex(" ")]))
    read, warm = asyncio.Event(), stack.engine.warm

    async def watched(ids: Sequence[int]) -> Prefilled:
        answer = await warm(ids)
        read.set()
        return answer

    monkeypatch.setattr(stack.engine, "warm", watched)
    async with two_devices(stack) as (phone, _):
        first = await done(await phone.ask("hello", **GREEDY))
        drafts, source = stack.hub.drafts, stack.hub.drafts.new_source()
        tally, computed = stack.node.drafted, stack.engine.prefilled
        said = Said()
        for end in range(1, len(TEXT) + 1):
            said = said.then(first.id, end - 1, TEXT[end - 1 : end])
            drafts.say(source, phone.id, said)
        while stack.engine.prefilled < computed + words:
            read.clear()
            await read.wait()
        reply = await done(await phone.ask(TEXT, **GREEDY))
        drafts.say(source, phone.id, NOTHING)
        assert reply.usage is not None
        assert reply.usage.drafted >= words
        assert reply.usage.drafted == tally.adopted
        assert reply.usage.drafted < reply.usage.prefilled
        stored = phone.document.diff()
        assert stored.count(TEXT.encode()) == 1


async def test_people_see_what_the_node_is_doing(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(presence, "SHOW_INTERVAL_S", 0.0)
    monkeypatch.setattr(presence, "SETTLE_S", 0.0)
    async with two_devices(stack) as (phone, _):
        shown: list[dict[str, Any]] = []
        watcher = await stack.hub.join(phone.id, "owner", deliver=lambda _: None)

        def see(states: tuple[AwarenessState, ...]) -> None:
            for state in states:
                said = json.loads(state.state_json or "null")
                if said and "node" in said:
                    shown.append(said["node"])

        monkeypatch.setattr(watcher, "presence", see)
        await done(await phone.ask("hello", max_tokens=60, temperature=0.0, ignore_eos=True))
        assert {"prefilling", "generating"} <= {state["doing"] for state in shown}
        watcher.leave()
