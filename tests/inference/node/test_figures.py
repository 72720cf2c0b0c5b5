"""What a node counts: tokens, and how full its engine is."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from local_room import LocalRoom, make_node

from crdt_llm.errors import EngineDied
from crdt_llm.inference.contract import Prefilled
from crdt_llm.inference.engine.pipe import Measured
from crdt_llm.inference.engine.process import EngineProcess
from crdt_llm.inference.node.drafts import Tally
from crdt_llm.inference.node.figures import Computed, Figures, keep_measuring

if TYPE_CHECKING:
    from pathlib import Path


class FullEngine:
    def __init__(self) -> None:
        self.is_dead = False

    async def measure(self) -> Measured:
        if self.is_dead:
            raise EngineDied("it died")
        return Measured(requests=5, waiting=2, resident_tokens=7, kv_bytes=1 << 20, disk_bytes=9)


def values(figures: Figures) -> dict[str, float]:
    return {figure.name: figure.read() for figure in figures.all}


async def test_every_figure_is_what_it_says() -> None:
    figures, engine = Figures(Computed(), Tally()), FullEngine()
    figures.computed.note(Prefilled(10, 4, 6))
    figures.computed.sampled = 3
    figures.drafted.adopted, figures.drafted.wasted = 11, 12
    await figures.measure(engine)
    assert values(figures) == {
        "node_sampled_tokens": 3,
        "node_prefilled_tokens": 6,
        "node_reused_tokens": 4,
        "node_drafts_adopted_tokens": 11,
        "node_drafts_wasted_tokens": 12,
        "engine_requests": 5,
        "engine_queue": 2,
        "engine_kv_memory_bytes": 1 << 20,
        "engine_kv_disk_bytes": 9,
    }
    assert "engine_queue 2" in str(figures)
    for gone in (None, object()):
        await figures.measure(engine)
        await figures.measure(gone)
        assert values(figures)["engine_kv_memory_bytes"] == 0
    engine.is_dead = True
    await figures.measure(engine)
    assert values(figures)["engine_requests"] == 0


async def test_a_reply_is_counted_token_by_token(tiny_model_dir: Path) -> None:
    room = LocalRoom(1)
    node = make_node(room, tiny_model_dir, lambda: EngineProcess.start(tiny_model_dir, threads=1))
    await node.start()
    node.notice(room.id)
    measured: asyncio.Queue[float] = asyncio.Queue()

    async def tick(seconds: float) -> None:
        measured.put_nowait(seconds)
        await asyncio.Event().wait()

    try:
        slot = room.ask("hello", temperature=0.0, max_tokens=20, ignore_eos=True)
        usage = (await room.ended(slot)).usage
        assert usage is not None
        computed = node.figures.computed
        assert computed.sampled == usage.sampled == 20
        assert computed.prefilled + computed.reused >= usage.prompt
        measuring = asyncio.create_task(keep_measuring(node, sleep=tick))
        await measured.get()
        assert values(node.figures)["engine_kv_memory_bytes"] > 0
        measuring.cancel()
        await asyncio.gather(measuring, return_exceptions=True)
    finally:
        await node.close()
