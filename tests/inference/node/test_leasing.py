"""A node whose lease comes late, ends, and comes back."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING

import pytest
from lent_engine import start_node
from local_room import LocalRoom

from crdt_llm.document.chain import verify_path
from crdt_llm.document.schema import State
from crdt_llm.errors import LeaseLost

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from local_room import LocalSeat

    from crdt_llm.inference.engine.process import EngineProcess
    from crdt_llm.inference.node.seat import Lease

pytestmark = pytest.mark.asyncio(loop_scope="module")

LONG = {"temperature": 0.7, "max_tokens": 600, "seed": 3, "ignore_eos": True}
SHORT = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True}


class Desk:
    """Where the node's leases come from: given, kept back or ended as the test says."""

    def __init__(self, room: LocalRoom) -> None:
        self.room = room
        self.free = asyncio.Event()
        self.free.set()
        self.asked = asyncio.Event()
        self.withdrawn = asyncio.Event()
        self.epoch = 1
        self.seat: LeasedSeat | None = None

    async def take_seat(
        self, conversation: str, deliver: Callable[[bytes], None], lost: Callable[[], None]
    ) -> LeasedSeat:
        self.seat = LeasedSeat(self, await self.room.take_seat(conversation, deliver, lost))
        return self.seat

    def end_lease(self) -> None:
        """Another node has the next epoch."""
        self.epoch += 1
        self.free.clear()
        self.asked.clear()
        assert self.seat is not None
        self.seat.lost()


class LeasedSeat:
    def __init__(self, desk: Desk, seat: LocalSeat) -> None:
        self.state, self.lost, self.leave = seat.state, seat.lost, seat.leave
        self._desk, self._seat, self._epoch = desk, seat, 0

    async def lease(self) -> Lease:
        desk = self._desk
        desk.asked.set()
        try:
            await desk.free.wait()
        except asyncio.CancelledError:
            desk.withdrawn.set()
            raise
        self._epoch = desk.epoch
        return self._seat.lease_of(desk.epoch)

    async def submit(self, update: bytes) -> None:
        if self._epoch != self._desk.epoch:
            raise LeaseLost("another node has the lease now")
        await self._seat.submit(update)


async def test_no_lease_is_asked_for_where_nothing_is_to_do(
    tiny_model_dir: Path, engine: EngineProcess
) -> None:
    room = LocalRoom()
    desk = Desk(room)
    node = await start_node(room, tiny_model_dir, engine, take_seat=desk.take_seat)
    await node.visit(room.id)
    assert not desk.asked.is_set()
    await room.ended(room.ask("hello", **SHORT))
    assert desk.asked.is_set()
    await node.close()


async def test_nothing_is_written_before_the_lease_comes(
    tiny_model_dir: Path, engine: EngineProcess
) -> None:
    room = LocalRoom()
    desk = Desk(room)
    desk.free.clear()
    slot = room.ask("hello", **SHORT)
    written = len(room.updates)
    node = await start_node(room, tiny_model_dir, engine, take_seat=desk.take_seat)
    await node.visit(room.id)
    await desk.asked.wait()
    assert len(room.updates) == written
    desk.free.set()
    assert (await room.ended(slot)).state is State.DONE
    await node.close()


async def test_a_wish_is_withdrawn_when_another_node_did_the_work(
    tiny_model_dir: Path, engine: EngineProcess
) -> None:
    room = LocalRoom()
    waiting, working = Desk(room), Desk(room)
    waiting.free.clear()
    slot = room.ask("hello", **SHORT)
    idle = await start_node(room, tiny_model_dir, engine, take_seat=waiting.take_seat)
    await waiting.asked.wait()
    busy = await start_node(room, tiny_model_dir, engine, take_seat=working.take_seat)
    await room.ended(slot)
    await waiting.withdrawn.wait()
    await busy.close()
    await idle.close()


async def test_a_lease_that_ends_in_mid_reply_costs_nothing_but_time(
    tiny_model_dir: Path, engine: EngineProcess
) -> None:
    """However often: it is not the reply's fault, and the chain holds over all epochs."""
    room, whole = LocalRoom(), LocalRoom()
    desk = Desk(whole)
    node = await start_node(whole, tiny_model_dir, engine, take_seat=desk.take_seat)
    expected = (await whole.ended(whole.ask("a story", **LONG))).content
    await node.close()
    desk = Desk(room)
    node = await start_node(room, tiny_model_dir, engine, take_seat=desk.take_seat)
    slot = room.ask("a story", **LONG)
    written = 0

    def wrote(leases: int) -> bool:
        """Whether words were written under the last of so many leases."""
        return len(room.replica.epochs()) == leases and len(room.entry(slot).content) > written

    for part in range(1, 6):
        await room.until(partial(wrote, part))
        written = len(room.entry(slot).content)
        desk.end_lease()
        await desk.asked.wait()
        assert room.replica.state(slot) is State.STREAMING
        desk.free.set()
    reply = await room.ended(slot)
    assert (reply.state, reply.content) == (State.DONE, expected)
    assert room.replica.epochs() == (1, 2, 3, 4, 5, 6)
    problems = [one.problem for one in verify_path(room.replica, room.replica.view())]
    assert problems == [None, None]
    await node.close()
