"""None of what hostile clients and fenced nodes send is taken, and the room is none the worse."""

from __future__ import annotations

import logging
from random import Random

import pytest
from hostile_updates import KINDS, a_world, is_same, run
from sync.device import Device

from crdt_llm.document.conversation import Conversation
from crdt_llm.sync.wire.y_websocket import decode_state_vector

EACH = 110  # of each kind; the bench sends a hundred thousand


@pytest.mark.parametrize("name", KINDS)
async def test_no_hostile_update_is_taken(name: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    world = await a_world()
    bound = dict(world.room._registered.clients)
    outcomes = await run(world, Random(name), EACH, (name,))
    outcome = outcomes[name]
    assert [update.hex() for update in outcome.taken] == []
    assert sum(outcome.codes.values()) == EACH
    assert outcome.codes["no-op"] < EACH // 2  # the kind is about something that is refused
    assert outcome.codes["unreadable"] == 0  # no check failed where it should have decided
    assert is_same(world.room.diff(), world.document)
    assert world.room._registered.clients == bound
    assert world.owner.lost == world.will.lost == []


@pytest.mark.parametrize("seed", range(3))
async def test_after_them_the_room_is_what_it_would_be_without_them(
    seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Refused updates are taken back; between them honest people and the node go on."""
    caplog.set_level(logging.CRITICAL)
    world = await a_world()
    rng = Random(seed)
    device = Device(Random(seed))
    device.merge(world.document)
    for number in range(12):
        outcomes = await run(world, rng, len(KINDS), tuple(KINDS))
        assert [name for name, outcome in outcomes.items() if outcome.taken] == []
        for update in world.owner.heard:
            device.merge(update)
        world.owner.heard.clear()
        write = device.entitle if number % 2 else device.say
        await world.owner.membership.submit(write(f"honest {number}"))
        world.learn()
    replica, anew = world.room._replica.document, Conversation(1, update=world.room.diff())
    assert replica.view() == anew.view()
    assert {name: replica.entry(name) for name in replica.tree.entries} == {
        name: anew.entry(name) for name in anew.tree.entries
    }
    assert replica.tree.pending == anew.tree.pending
    assert replica.meta == anew.meta
    assert dict(replica.access()) == dict(anew.access())
    assert world.room._replica.known == decode_state_vector(world.room.state_vector())


async def test_what_a_flood_leaves_behind_is_bounded(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    world = await a_world()
    await run(world, Random(5), 1000, tuple(KINDS))
    room = world.room
    assert len(room._replica._ahead) <= 64
    seats = room._seats
    assert seats._late == seats._line == type(seats._line)()
    assert len(seats._seats) == 6
    assert all(
        not seat.queue and seat.unsettled == seat.unsettled_bytes == 0
        for seat in seats._seats.values()
    )
