from __future__ import annotations

import asyncio
from dataclasses import replace
from random import Random
from typing import TYPE_CHECKING

import pytest
from sync.device import CONVERSATION, Device
from sync.rooms import Place, born, turns

from crdt_llm.document.schema import Birth, conversation_id
from crdt_llm.errors import (
    ConnectionLost,
    Corrupt,
    Refused,
    Stopping,
    StoreFailed,
    Unavailable,
)
from crdt_llm.store.sqlite import SqliteLog
from crdt_llm.sync.relay import hub as hub_module
from crdt_llm.sync.relay.hub import IDLE_S, UNBORN_MAX, Hub

if TYPE_CHECKING:
    from pathlib import Path

    from sync.rooms import Member

OTHER = Birth("owner", b"another 16 bytes")


@pytest.mark.parametrize(
    "name", ["", "x", "a" * 21, "a" * 23, "a" * 21 + "/", "ä" * 22, "a" * 21 + "\n"]
)
async def test_a_room_has_the_name_of_a_conversation(name: str) -> None:
    with pytest.raises(Refused) as refused:
        await Place().join(conversation=name)
    assert refused.value.code == "no-such-conversation"


async def test_opens_at_the_same_time_share_one_load() -> None:
    place = Place()
    await asyncio.gather(*(place.join() for _ in range(20)))
    assert place.log.loads == 1


async def test_an_idle_room_goes_after_a_while_and_comes_back_whole() -> None:
    place = Place()
    owner, device = await born(place)
    await owner.membership.submit(device.say("kept"))
    owner.membership.leave()
    await turns()
    place.hub.tick()
    assert CONVERSATION in place.hub._rooms
    place.now += IDLE_S + 1
    place.hub.tick()
    await turns()
    assert CONVERSATION not in place.hub._rooms
    again, reader = await place.join(), Device(Random(1))
    reader.merge(again.membership.state)
    assert reader.texts == ["kept"]
    assert place.log.loads == 2


async def test_a_room_with_somebody_in_it_stays() -> None:
    place = Place()
    await born(place)
    place.now += 100 * IDLE_S
    place.hub.tick()
    await turns()
    assert CONVERSATION in place.hub._rooms


async def give_birth(place: Place, number: int) -> tuple[str, Member]:
    birth = Birth("owner", bytes([number]) * 16)
    member = await place.join(conversation=conversation_id(birth))
    await member.membership.submit(Device(Random(number)).give_birth(birth))
    return conversation_id(birth), member


async def test_rooms_in_memory_are_bounded_and_the_idle_go_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hub_module, "ROOMS_MAX", 2)
    place = Place()
    (_, first), (name, second) = [await give_birth(place, number) for number in range(2)]
    with pytest.raises(Unavailable):
        await give_birth(place, 2)
    first.membership.leave()
    third, _ = await give_birth(place, 2)
    assert set(place.hub._rooms) == {name, third}
    assert first.lost == second.lost == []


async def test_rooms_without_a_birth_go_before_somebody_is_sent_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hub_module, "ROOMS_MAX", 2)
    place = Place()
    name, first = await give_birth(place, 0)
    made_up = await place.join("squatter", conversation="A" * 22)
    other, _ = await give_birth(place, 1)
    assert set(place.hub._rooms) == {name, other}
    assert [type(error) for error in made_up.lost] == [Unavailable]
    assert first.lost == []


async def test_rooms_without_a_birth_are_bounded_by_principal() -> None:
    place = Place(leased=True)
    births = [Birth("owner", bytes([n]) * 16) for n in range(UNBORN_MAX + 1)]
    made_up = [conversation_id(birth) for birth in births]
    name, owner = await give_birth(place, 99)
    owner.membership.leave()
    place.now += IDLE_S
    place.hub.tick()
    await turns()
    members = [await place.join(conversation=one) for one in made_up[:-1]]
    with pytest.raises(Unavailable, match="of yours"):
        await place.join(conversation=made_up[-1])
    await place.join("another", conversation=conversation_id(Birth("another", b"a" * 16)))
    assert name not in place.hub._rooms
    await place.join(conversation=name)  # what exists does not count
    await members[0].membership.submit(Device(Random(1)).give_birth(births[0]))
    await place.join(conversation=made_up[-1])  # nor does what exists by now


async def test_subscribers_hear_of_every_commit_and_of_nothing_else(
    caplog: pytest.LogCaptureFixture,
) -> None:
    place = Place()
    changed: list[str] = []

    def fail(_: str) -> None:
        raise ValueError("a fault")

    place.hub.subscribe(fail)
    end = place.hub.subscribe(changed.append)
    owner, device = await born(place)
    await owner.membership.submit(device.written[0])
    with pytest.raises(Refused):
        await owner.membership.submit(device.forge())
    assert changed == [CONVERSATION]
    assert "ValueError: a fault" in caplog.text
    end()
    other = Device(Random(8))
    other.merge(device.written[0])
    await owner.membership.submit(other.say("x"))
    assert changed == [CONVERSATION]


async def test_conversations_are_those_of_the_log() -> None:
    place = Place()
    await place.join()
    assert await place.hub.conversations() == ()
    await born(place)
    assert [one.conversation for one in await place.hub.conversations()] == [CONVERSATION]


async def test_closing_finishes_what_was_handed_over() -> None:
    place = Place()
    owner, device = await born(place)
    other = await place.join()
    writes = [asyncio.create_task(owner.membership.submit(device.say("x"))) for _ in range(30)]
    await turns(2)
    await place.hub.close()
    assert await asyncio.gather(*writes) == [None] * 30
    assert place.durable == 31
    for member in (owner, other):
        assert [type(error) for error in member.lost] == [Stopping]
    with pytest.raises(Stopping):
        await place.join()
    with pytest.raises(Stopping):
        await owner.membership.submit(device.say("too late"))
    await place.hub.close()


async def test_closing_ends_though_somebody_floods() -> None:
    place = Place()
    owner, device = await born(place)
    written = 0

    async def flood() -> None:
        nonlocal written
        while True:
            await owner.membership.submit(device.say("x"))
            written += 1

    flooding = [asyncio.create_task(flood()) for _ in range(10)]
    await turns()
    await place.hub.close()
    outcomes = await asyncio.gather(*flooding, return_exceptions=True)
    assert all(isinstance(outcome, Stopping) for outcome in outcomes)
    assert place.durable == 1 + written


async def test_a_membership_that_was_left_writes_nothing() -> None:
    place = Place()
    owner, device = await born(place)
    owner.membership.leave()
    with pytest.raises(ConnectionLost):
        await owner.membership.submit(device.say("x"))
    owner.membership.leave()
    assert owner.lost == []


async def test_giving_up_joining_leaves_nobody_behind() -> None:
    place = Place()
    joining = asyncio.create_task(place.join())
    await asyncio.sleep(0)
    joining.cancel()
    await turns()
    assert place.hub._rooms[CONVERSATION].is_idle


async def test_a_damaged_conversation_harms_no_other_and_is_reported() -> None:
    place = Place()
    await born(place)
    fine = conversation_id(OTHER)
    other, device = await place.join(conversation=fine), Device(Random(2))
    await other.membership.submit(device.give_birth(OTHER))
    await place.hub.close()
    stored = place.disk.conversations[CONVERSATION]
    place.disk.conversations[CONVERSATION] = replace(stored, updates=(b"\1\2\3",))
    after = Place(disk=place.disk)
    with pytest.raises(Corrupt, match=CONVERSATION):
        await after.join()
    assert list(after.hub.health.damaged) == [CONVERSATION]
    await after.join(conversation=fine)
    after.disk.conversations[CONVERSATION] = stored
    await after.join()
    assert after.hub.health.damaged == {}


async def test_health_is_that_of_the_store() -> None:
    place = Place()
    owner, device = await born(place)
    assert place.hub.health.store is None
    place.failing = True
    with pytest.raises(StoreFailed):
        await owner.membership.submit(device.say("x"))
    health: object = place.hub.health.store  # mypy takes it for what it was above
    assert "no space" in str(health)


async def test_rooms_on_sqlite_survive_a_restart(tmp_path: Path) -> None:
    device = Device(Random(7))
    async with await SqliteLog.open(tmp_path / "log.db") as log:
        hub = Hub(log)
        member = await hub.join(CONVERSATION, "owner", deliver=device.received.append)
        await member.submit(device.give_birth())
        writes = [member.submit(device.say(f"line {number}")) for number in range(200)]
        await asyncio.gather(*writes)
        await hub.close()
    async with await SqliteLog.open(tmp_path / "log.db") as log:
        hub, again = Hub(log), Device(Random(8))
        member = await hub.join(CONVERSATION, "owner", deliver=again.received.append)
        again.merge(member.state)
        assert again.texts == [f"line {number}" for number in range(200)]
        await hub.close()
