"""What the node shows of itself: what it is doing, at its own pace."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
from local_room import LocalRoom, LocalSeat, make_node

from crdt_llm.inference.contract import Capabilities, Finished, Prefilled, Queued, Sampled
from crdt_llm.inference.engine.process import EngineProcess
from crdt_llm.inference.node import node as nodes
from crdt_llm.inference.node import presence
from crdt_llm.inference.node.presence import (
    COUNT_INTERVAL_S,
    RENEW_S,
    SHOW_INTERVAL_S,
    Doing,
    NodeState,
    Presence,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence
    from pathlib import Path

    from crdt_llm.inference.contract import GenerationEvent, SamplingParams


@dataclass
class Window:
    """A seat that others can see."""

    loop: asyncio.AbstractEventLoop
    shown: list[tuple[float, int, int, dict[str, Any]]] = field(default_factory=list)

    def show(self, client: int, clock: int, state: dict[str, Any]) -> None:
        self.shown.append((self.loop.time(), client, clock, state))


class SteppedLoop(asyncio.SelectorEventLoop):
    """A loop whose clock is moved by hand."""

    now_s = 100.0

    def time(self) -> float:
        return self.now_s

    def wait(self, seconds: float) -> None:
        """Let so much time pass, in small steps."""
        until = self.now_s + seconds
        while self.now_s < until:
            self.now_s = min(until, self.now_s + 0.01)
            self.run_until_complete(asyncio.sleep(0))


def test_numbers_are_shown_once_a_second_and_the_last_ones_always() -> None:
    loop = SteppedLoop()
    window, read = Window(loop), [0]

    async def change() -> None:
        one.changed()

    one = Presence(window, 7, lambda: NodeState("m", Doing.GENERATING, read[0], read[0]))
    for tokens in range(1, 101):
        read[0] = tokens
        loop.run_until_complete(change())
        loop.wait(0.02)
    loop.wait(COUNT_INTERVAL_S)
    times = [at for at, *_ in window.shown]
    assert 3 <= len(times) <= 4
    assert all(b - a >= COUNT_INTERVAL_S - 1e-6 for a, b in pairwise(times))
    assert window.shown[-1][3] == NodeState("m", Doing.GENERATING, 100, 100).plain()
    assert [clock for _, _, clock, _ in window.shown] == list(range(1, len(times) + 1))
    one.close()
    loop.close()


def test_what_it_is_doing_is_shown_at_most_four_times_a_second() -> None:
    loop = SteppedLoop()
    window, looks = Window(loop), [0]

    def look() -> NodeState:
        looks[0] += 1
        return NodeState("m", (Doing.PREFILLING, Doing.GENERATING)[looks[0] % 2])

    async def change() -> None:
        one.changed()

    one = Presence(window, 7, look)
    for _ in range(100):
        loop.run_until_complete(change())
        loop.wait(0.02)
    times = [at for at, *_ in window.shown]
    assert 2 / SHOW_INTERVAL_S - 1 <= len(times) <= 2 / SHOW_INTERVAL_S + 1
    assert all(b - a >= SHOW_INTERVAL_S - 1e-6 for a, b in pairwise(times))
    assert looks[0] == len(times)  # whoever is not shown is not looked at either
    one.close()
    loop.close()


def test_what_does_not_change_is_shown_again_only_before_others_take_it_for_gone() -> None:
    loop = SteppedLoop()
    window = Window(loop)

    async def change() -> None:
        one.changed()

    one = Presence(window, 7, lambda: NodeState("m"))
    for _ in range(50):
        loop.run_until_complete(change())
        loop.wait(0.1)
    assert len(window.shown) == 1
    loop.wait(RENEW_S)
    assert len(window.shown) == 2
    one.close()
    loop.wait(2 * RENEW_S)
    assert len(window.shown) == 2
    loop.close()


@dataclass(slots=True)
class SeenSeat(LocalSeat):
    shown: list[dict[str, Any]] = field(default_factory=list)

    def show(self, client: int, clock: int, state: dict[str, Any]) -> None:
        assert client > 0
        assert clock > 0
        self.shown.append(state["node"])
        self.room.changed.set()


class SeenRoom(LocalRoom):
    """A room whose seats can be seen."""

    async def take_seat(self, *given: Any) -> LocalSeat:
        seat = await super().take_seat(*given)
        seen = SeenSeat(*(getattr(seat, name) for name in LocalSeat.__slots__))
        self.seats[self.seats.index(seat)] = seen
        return seen


@pytest.fixture
def shown_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The node shows all that it does, with no pace."""
    for name in ("SHOW_INTERVAL_S", "COUNT_INTERVAL_S", "SETTLE_S"):
        monkeypatch.setattr(presence, name, 0.0)


@pytest.mark.usefixtures("shown_at_once")
async def test_people_see_what_the_node_is_doing_and_how_much_it_has_read(
    tiny_model_dir: Path,
) -> None:
    room = SeenRoom(1)
    node = make_node(room, tiny_model_dir, lambda: EngineProcess.start(tiny_model_dir, threads=1))
    await node.start()
    node.notice(room.id)
    try:
        reply = await room.ended(room.ask("hello", temperature=0.0, max_tokens=60, ignore_eos=True))
        assert reply.usage is not None
        (seat,) = room.seats
        assert isinstance(seat, SeenSeat)
        total = reply.usage.prompt + reply.usage.sampled
        await room.until(
            lambda: seat.shown[-1]["doing"] == "idle" and seat.shown[-1]["warm"] == total
        )
        doing = [state["doing"] for state in seat.shown]
        assert "prefilling" in doing
        assert "generating" in doing
        assert doing.index("prefilling") < doing.index("generating")
        assert seat.shown[-1] == {
            "model": node.identity.model,
            "doing": "idle",
            "warm": total,
            "tokens": total,
            "queue": 0,
        }
        assert all(state["warm"] <= state["tokens"] for state in seat.shown)
    finally:
        await node.close()


class CrowdedEngine:
    """Goes on with an event of a reply when it is told to."""

    capabilities = Capabilities("crowded", 1, 1000, 1 << 20, "none")

    def __init__(self, *events: GenerationEvent) -> None:
        self.steps: asyncio.Queue[None] = asyncio.Queue()
        self._events = events

    async def warm(self, ids: Sequence[int]) -> Prefilled:
        return Prefilled(len(ids), 0, len(ids))

    async def generate(
        self, ids: Sequence[int], params: SamplingParams, start: int
    ) -> AsyncGenerator[GenerationEvent, None]:
        del ids, params, start
        for event in self._events:
            await self.steps.get()
            yield event

    async def forget(self, ids: Sequence[int], keep: int = 0) -> None:
        """It remembers nothing."""

    async def close(self) -> None:
        """It holds nothing."""


def seen(room: LocalRoom) -> tuple[str, int] | None:
    """What the node shows last: what it is doing, and its place in the queue."""
    shown = [state for seat in room.seats if isinstance(seat, SeenSeat) for state in seat.shown]
    return (shown[-1]["doing"], shown[-1]["queue"]) if shown else None


@pytest.mark.usefixtures("shown_at_once")
async def test_a_reply_that_waits_for_the_engine_shows_its_place(tiny_model_dir: Path) -> None:
    told = (Queued(2), Queued(0), Prefilled(1, 0, 1), Sampled(5, -0.5), Queued(1), Sampled(6, -0.5))
    engine, room = CrowdedEngine(*told, Finished("length")), SeenRoom(1)

    async def start() -> CrowdedEngine:
        return engine

    node = make_node(room, tiny_model_dir, start)
    await node.start()
    node.notice(room.id)
    try:
        slot = room.ask("hello", max_tokens=2)
        for expected in (
            ("queued", 3),
            ("queued", 1),
            ("prefilling", 0),
            ("generating", 0),
            ("queued", 2),
            ("generating", 0),
        ):
            engine.steps.put_nowait(None)
            await room.until(lambda: seen(room) == expected)  # noqa: B023
        engine.steps.put_nowait(None)
        await room.ended(slot)
    finally:
        await node.close()


@pytest.mark.usefixtures("shown_at_once")
async def test_a_reply_that_the_node_has_no_room_for_shows_its_place(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nodes, "REPLIES_MAX", 0)
    engine, room = CrowdedEngine(Prefilled(1, 0, 1), Finished("length")), SeenRoom(1)

    async def start() -> CrowdedEngine:
        return engine

    node = make_node(room, tiny_model_dir, start)
    await node.start()
    assert node.stand_in_line("another conversation", waits=True) == 1
    node.notice(room.id)
    try:
        room.ask("hello")
        await room.until(lambda: seen(room) == ("queued", 2))
        assert node.stand_in_line("another conversation", waits=False) == 0
        await node.visit(room.id)
        await room.until(lambda: seen(room) == ("queued", 1))
    finally:
        await node.close()
