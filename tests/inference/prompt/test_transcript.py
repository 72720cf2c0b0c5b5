"""A path as token ids: a little at a time, and anew where an entry comes to stand elsewhere."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING

import pytest
from lent_engine import running
from local_room import LocalRoom, make_node

from crdt_llm.document.schema import Born, Role, State, entry_id
from crdt_llm.errors import PromptTooLong
from crdt_llm.inference.prompt.renderer import Renderer
from crdt_llm.inference.prompt.transcript import Transcript

if TYPE_CHECKING:
    from pathlib import Path

    from crdt_llm.inference.engine.process import EngineProcess


pytestmark = pytest.mark.asyncio(loop_scope="module")

GREEDY = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True}


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
