"""Reading a conversation's log without keeping the thread, and when it is folded and wiped."""

from __future__ import annotations

import asyncio
from random import Random
from typing import TYPE_CHECKING

import pytest
from sync.device import CONVERSATION, Device
from sync.rooms import Place, born

from crdt_llm.document.conversation import Conversation
from crdt_llm.errors import Corrupt, StoreFailed
from crdt_llm.store.log import Loaded
from crdt_llm.store.memory import MemoryDisk, MemoryLog
from crdt_llm.sync.room.scrubbing import Scrubber
from crdt_llm.sync.room.upkeep import REPLAY_CHUNK, Upkeep, replay, replica_of

if TYPE_CHECKING:
    from collections.abc import Awaitable


def written(count: int) -> tuple[Device, list[bytes]]:
    device = Device(Random(1))
    return device, [
        device.give_birth(),
        *(device.entitle(str(number)) for number in range(count - 1)),
    ]


async def others_turns(work: Awaitable[object]) -> int:
    """How often others got the thread while something went on."""
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    counting = asyncio.create_task(count())
    await work
    counting.cancel()
    return turns


async def test_others_get_the_thread_while_a_log_is_replayed() -> None:
    device, updates = written(10 * REPLAY_CHUNK)
    replica = Conversation(5)
    assert await others_turns(replay(updates, replica.apply)) >= 10 - 1
    assert replica.state_vector() == device.replica.state_vector()


async def test_others_get_the_thread_while_a_conversation_without_a_room_is_read() -> None:
    place = Place()
    owner, device = await born(place)
    count = 10 * REPLAY_CHUNK
    for number in range(count):
        await owner.membership.submit(device.entitle(str(number)))
    place.open_hub()
    reading = place.hub.read(CONVERSATION, lambda conversation: conversation.meta.title)
    assert await others_turns(reading) >= 10
    assert await place.hub.read(CONVERSATION, lambda one: one.meta.title) == str(count - 1)


async def test_a_replica_is_of_the_snapshot_the_log_and_what_was_accepted() -> None:
    device, updates = written(4)
    loaded = Loaded(updates[0], 1, ((2, updates[1]), (3, updates[2])))
    replica = await replica_of(loaded, CONVERSATION, 5, updates[3:])
    assert replica.state_vector() == device.replica.state_vector()
    assert replica.meta_plain() == device.replica.meta_plain()
    with pytest.raises(Corrupt, match=CONVERSATION):
        await replica_of(Loaded(None, 0, ((1, b"no update"),)), CONVERSATION, 5)


class Kept:
    """A conversation's upkeep on a simulated disk."""

    def __init__(self) -> None:
        self.failing = False
        self.wiped = asyncio.Event()
        self.log = MemoryLog(MemoryDisk("log"), clock=lambda: 0, faults=self.fault)
        self.upkeep = Upkeep(CONVERSATION, self.log, Scrubber(self.log), self.wiped.set)

    async def fault(self, _seam: str) -> None:
        if self.failing:
            raise StoreFailed("no space")


async def test_what_is_owed_is_not_served_from_memory_and_is_gone_after_a_scrub() -> None:
    kept, (device, updates) = Kept(), written(3)
    await kept.upkeep.append(updates)
    assert kept.upkeep.since(1) == updates[1:]
    kept.upkeep.owe()
    assert kept.upkeep.since(1) is None
    await kept.upkeep.load(5)  # the file still has it
    assert kept.upkeep.since(1) is None
    assert not await kept.upkeep.wipe(device.replica.diff)
    assert kept.upkeep.is_scrubbing
    await kept.wiped.wait()
    assert await kept.upkeep.wipe(device.replica.diff)
    assert (await kept.log.load(CONVERSATION)).updates == ()


async def test_what_is_owed_stays_so_while_the_log_cannot_be_folded() -> None:
    kept, (device, updates) = Kept(), written(3)
    await kept.upkeep.append(updates)
    kept.upkeep.owe()
    kept.failing = True
    assert not await kept.upkeep.wipe(device.replica.diff)
    assert not kept.upkeep.is_scrubbing
    kept.failing = False
    assert not await kept.upkeep.wipe(device.replica.diff)
    assert kept.upkeep.is_scrubbing


async def test_what_is_withdrawn_during_a_scrub_is_owed_still() -> None:
    kept, (device, updates) = Kept(), written(3)
    await kept.upkeep.append(updates)
    kept.upkeep.owe()
    await kept.upkeep.wipe(device.replica.diff)
    kept.upkeep.owe()
    await kept.wiped.wait()
    assert not await kept.upkeep.wipe(device.replica.diff)
