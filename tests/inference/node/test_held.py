"""Entries whose admission the relay refuses until their author was here."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest
from lent_engine import start_node
from local_room import LocalRoom, LocalSeat

from crdt_llm.document.schema import State
from crdt_llm.errors import Refused
from crdt_llm.inference.node.held import Held

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any

    from crdt_llm.inference.engine.process import EngineProcess


pytestmark = pytest.mark.asyncio(loop_scope="module")

SHORT = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True}


@dataclass(slots=True)
class StrictRoom(LocalRoom):
    """A room where some entries wait for their author."""

    unconfirmed: set[str] = field(default_factory=set)
    refusals: int = 0
    seats_taken: int = 0
    left: asyncio.Event = field(default_factory=asyncio.Event)

    async def empty(self, seats_taken: int) -> None:
        """Wait until so many seats were taken, and all of them were left."""
        while self.seats or self.seats_taken < seats_taken:
            self.left.clear()
            await self.left.wait()

    async def take_seat(self, *given: Any) -> StrictSeat:
        self.seats_taken += 1
        seat = await LocalRoom.take_seat(self, *given)
        strict = StrictSeat(*(getattr(seat, name) for name in LocalSeat.__slots__))
        self.seats[self.seats.index(seat)] = strict
        return strict


class StrictSeat(LocalSeat):
    async def submit(self, update: bytes) -> None:
        await asyncio.sleep(0)
        room = self.room
        assert isinstance(room, StrictRoom)
        change = type(room.replica)(1, update=room.replica.diff()).apply(update)
        for edit in change.edits:
            if edit.key == "place" and edit.entry in room.unconfirmed:
                room.refusals += 1
                raise Refused("unconfirmed", f"entry {edit.entry} waits until will was here")
        await LocalSeat.submit(self, update)

    async def leave(self) -> None:
        await LocalSeat.leave(self)
        assert isinstance(self.room, StrictRoom)
        self.room.left.set()


async def test_it_waits_for_its_author_and_costs_one_seat(
    tiny_model_dir: Path, engine: EngineProcess
) -> None:
    room = StrictRoom(3)
    first = await _answered(room, tiny_model_dir, engine)
    theirs = room.write("brought back", after=first)
    slot = room.write(None, after=theirs)
    room.unconfirmed.add(theirs)
    node = await start_node(room, tiny_model_dir, engine)
    await room.empty(3)  # the one for the first reply, one that was lost, and one for a last look
    assert (room.refusals, room.seats_taken) == (1, 3)

    other = room.write("elsewhere", after=first, fork=True)
    answer = room.write(None, after=other)
    node.notice(room.id)
    assert (await room.ended(answer)).state is State.DONE
    assert room.replica.state(slot) is None
    await room.empty(6)  # tried once for the change, and once when the reply had ended
    assert (room.refusals, room.seats_taken) == (3, 6)

    room.unconfirmed.clear()
    node.notice(room.id)  # nothing is new in the document
    assert (await room.ended(slot)).state is State.DONE
    assert (room.refusals, room.seats_taken) == (3, 7)
    await node.close()


async def _answered(room: LocalRoom, model_dir: Path, engine: EngineProcess) -> str:
    node = await start_node(room, model_dir, engine)
    slot = room.ask("hello", **SHORT)
    await room.ended(slot)
    await node.close()
    return slot


async def test_a_seat_where_nothing_is_to_do_is_given_back(
    tiny_model_dir: Path, engine: EngineProcess
) -> None:
    """A node that is told of every change has no seat for nothing, and is soon there again."""
    room = StrictRoom(4)
    node = await start_node(room, tiny_model_dir, engine, gives_back=True)
    await room.empty(1)
    slot = room.ask("hello", **SHORT)
    assert room.replica.state(slot) is None
    node.notice(room.id)
    assert (await room.ended(slot)).state is State.DONE
    assert (len(room.seats), room.seats_taken) == (1, 2)  # with the lease it stays
    await node.close()


async def test_a_reply_that_runs_is_not_interrupted_for_another_try() -> None:
    held = Held()
    held.hold(["A", "B"], Refused("unconfirmed", "entry B waits"))
    assert held.entries(at_rest=True) == {"B"}
    held.release()
    assert held.entries(at_rest=False) == {"B"}
    assert held.entries(at_rest=True) == frozenset()
    held.admitted(["B"])
    assert not held


async def test_a_refusal_that_names_nobody_holds_the_whole_run() -> None:
    held = Held()
    held.hold(["A", "B"], Refused("unconfirmed", "not yet"))
    assert held.entries(at_rest=True) == {"A"}


async def test_a_lease_that_was_recorded_is_no_reason_to_try_again() -> None:
    """Two nodes that each look when the other one recorded its lease would never rest."""
    room = LocalRoom(5)
    entry = room.write("brought back")
    held = Held()
    held.hold([entry], Refused("unconfirmed", entry))
    held.look(room.replica)
    with room.replica.writing() as writer:
        writer.add_lease(1, bytes(32), bytes(64))
    held.look(room.replica)
    assert held.entries(at_rest=True) == {entry}
    held.look(room.replica)  # asked to look, and all is as it was: somebody confirmed it
    assert not held.entries(at_rest=True)
    held.hold([entry], Refused("unconfirmed", entry))
    held.look(room.replica)
    room.write("more")
    held.look(room.replica)
    assert not held.entries(at_rest=True)
