"""A node at the other end of a native connection: leases, work, and hints of what is typed."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from sync.device import CONVERSATION
from sync.native import PASSES, Native, device, open_frame, update_frame
from sync.rooms import Place, born, turns

from crdt_llm.document.chain import lease_message
from crdt_llm.document.keys import SigningKey, verify
from crdt_llm.document.schema import Birth, Grant, conversation_id
from crdt_llm.errors import Forbidden, Unavailable
from crdt_llm.store.register import MemoryRegister
from crdt_llm.sync.relay import drafts as drafts_module
from crdt_llm.sync.relay.access import Pass
from crdt_llm.sync.relay.hub import Hub
from crdt_llm.sync.relay.leases import LeaseOffice
from crdt_llm.sync.wire.frames import (
    VERSION,
    Ack,
    Change,
    Closed,
    Code,
    Draft,
    Hello,
    Hint,
    Leased,
    Leave,
    Nack,
    Renew,
    Renewed,
    WantLease,
    Welcome,
    Work,
)
from crdt_llm.sync.wire.verdict import CloseCode

if TYPE_CHECKING:
    from sync.native import NativeDevice

RELAY_KEY = SigningKey(b"r" * 32)
NODE_KEYS = [SigningKey(bytes([n]) * 32).public for n in range(3)]


class World:
    """A hub that keeps leases, and nodes that ask for them."""

    def __init__(self) -> None:
        self.place = Place()
        self.place.hub = Hub(
            self.place.log,
            register=MemoryRegister(),
            clock=lambda: self.place.now,
        )
        self.office = LeaseOffice(
            self.place.hub.grant_epoch, RELAY_KEY.sign, clock=lambda: self.place.now
        )
        self.office.vacant = self.place.hub.notice

    async def node(self, number: int = 0) -> Native:
        native = Native(self.place, "node", leases=self.office, clock=lambda: self.place.now)
        await native.greet(NODE_KEYS[number])
        await native.send(open_frame())
        await turns()
        native.down()
        return native

    async def holding(self, number: int = 0) -> Native:
        native = await self.node(number)
        await native.send(WantLease(1, hold=True))
        await turns()
        native.down()
        return native

    async def person(self, seed: int = 1, principal: str = "owner") -> tuple[Native, NativeDevice]:
        native = Native(self.place, principal)
        await native.greet()
        await native.send(open_frame())
        await turns()
        replica = device(seed, principal)
        replica.hear(native.down())
        return native, replica


async def test_a_lease_is_signed_and_renewed() -> None:
    world = World()
    await born(world.place)
    node = await world.holding()
    (lease,) = node.of(Leased)
    assert (lease.channel, lease.epoch, lease.ttl_ms, lease.reason) == (1, 1, 10_000, "")
    message = lease_message(CONVERSATION, 1, NODE_KEYS[0])
    verify(RELAY_KEY.public, lease.signature, message)
    await node.send(Renew())
    assert node.down() == [Renewed(10_000)]


async def test_without_a_desk_there_are_no_leases() -> None:
    place = Place()
    await born(place)
    native = Native(place, "node")
    await native.greet(NODE_KEYS[0])
    await native.send(open_frame())
    await turns()
    await native.send(WantLease(1, hold=True))
    native.down()
    (lease,) = native.of(Leased)
    assert lease.epoch is None
    assert lease.reason


async def test_whoever_waits_gets_the_lease_unasked_and_the_other_loses_it_first() -> None:
    world = World()
    await born(world.place)
    one, two = await world.holding(0), await world.holding(1)
    assert [lease.epoch for lease in two.of(Leased)] == [None]
    world.place.now += 11
    world.office.tick()
    await turns()
    assert [lease.epoch for lease in one.down() if isinstance(lease, Leased)] == [None]
    assert [lease.epoch for lease in two.down() if isinstance(lease, Leased)] == [2]


async def test_a_lease_that_is_given_back_is_free() -> None:
    world = World()
    await born(world.place)
    one, two = await world.holding(0), await world.holding(1)
    await one.send(WantLease(1, hold=False))
    await turns()
    assert [lease.epoch for lease in two.down() if isinstance(lease, Leased)] == [2]


async def test_leaving_the_conversation_gives_its_lease_back() -> None:
    world = World()
    await born(world.place)
    one, two = await world.holding(0), await world.holding(1)
    await one.send(Leave(1))
    await turns()
    assert [type(frame) for frame in one.down()] == [Closed]
    assert [lease.epoch for lease in two.down() if isinstance(lease, Leased)] == [2]


async def test_a_node_that_comes_back_in_time_keeps_its_epoch() -> None:
    world = World()
    await born(world.place)
    one = await world.holding(0)
    one.connection.leave()
    world.place.now += 5
    again = await world.holding(0)
    assert [lease.epoch for lease in again.of(Leased)] == [1]


@pytest.mark.parametrize("key", [None, NODE_KEYS[2]])
async def test_a_connection_stays_that_of_one_node(key: bytes | None) -> None:
    world = World()
    await born(world.place)
    one, two = await world.holding(0), await world.node(1)
    await one.send(Hello(VERSION, "node", "test", NODE_KEYS[0]))
    assert [type(frame) for frame in one.down()] == [Welcome]
    await one.send(Hello(VERSION, "node", "test", key))
    assert one.connection.close_code is CloseCode.UNAUTHENTICATED
    await two.send(WantLease(1, hold=True))
    await turns()
    assert [lease.epoch for lease in two.down() if isinstance(lease, Leased)] == [None]
    world.place.now += 11
    world.office.tick()
    await turns()
    assert [lease.epoch for lease in two.down() if isinstance(lease, Leased)] == [2]


async def test_a_nodes_key_that_is_not_let_in_is_final_and_asked_for_once() -> None:
    asked: list[tuple[str, bytes]] = []

    async def admit_node(found: Pass, key: bytes) -> None:
        asked.append((found.principal, key))
        if key != NODE_KEYS[0]:
            raise Forbidden("not-your-node", "it is another's")

    node = Native(Place(), "node", admit_node=admit_node)
    await node.greet(NODE_KEYS[0])
    await node.greet(NODE_KEYS[0])
    assert asked == [("node", NODE_KEYS[0])]
    impostor = Native(Place(), "node", admit_node=admit_node)
    await impostor.send(Hello(VERSION, "node", "test", NODE_KEYS[1]))
    assert impostor.connection.close_code is CloseCode.FORBIDDEN
    assert impostor.connection.node_key is None


async def test_a_connection_that_went_while_its_key_was_looked_at_stays_gone() -> None:
    looked_at, gate = asyncio.Event(), asyncio.Event()

    async def admit_node(found: Pass, key: bytes) -> None:
        del found, key
        looked_at.set()
        await gate.wait()

    node = Native(Place(), "node", admit_node=admit_node)
    greeting = asyncio.ensure_future(node.send(Hello(VERSION, "node", "test", NODE_KEYS[0])))
    await looked_at.wait()
    node.connection.refuse(Unavailable("say who you are sooner"))
    gate.set()
    await greeting
    assert node.connection.close_code is CloseCode.TRY_AGAIN
    assert node.down() == []


async def test_a_device_does_not_become_a_node() -> None:
    native = Native(Place(), "node")
    await native.greet()
    await native.send(Hello(VERSION, "node", "test", NODE_KEYS[0]))
    assert native.connection.close_code is CloseCode.UNAUTHENTICATED


async def test_a_node_without_a_lease_writes_nothing() -> None:
    world = World()
    await born(world.place)
    node = await world.holding(0)
    world.place.now += 11
    world.office.tick()
    await turns()
    late = device(5, "node")
    late.hear(node.taken)
    await node.send(update_frame(1, late.entitle("written too late")))
    await turns()
    assert [frame.code for frame in node.down() if isinstance(frame, Nack)] == [Code.STALE_EPOCH]


async def test_a_node_hears_of_all_that_is_stored_and_then_of_what_it_takes_no_part_in() -> None:
    world = World()
    owner, replica = await born(world.place)
    node = Native(world.place, "node", leases=world.office, clock=lambda: world.place.now)
    await node.greet(NODE_KEYS[0])
    await turns()
    assert node.down() == [Work((CONVERSATION,))]
    await owner.membership.submit(replica.say("soon after"))
    await owner.membership.submit(replica.say("and again"))
    node.connection.tick()
    assert node.down() == []
    world.place.now += 1
    node.connection.tick()
    assert node.down() == [Work((CONVERSATION,))]
    await node.send(open_frame())
    await turns()
    node.down()
    world.place.now += 1
    node.connection.tick()
    await owner.membership.submit(replica.say("heard as a change"))
    assert [type(frame) for frame in node.down()] == [Change]


async def test_a_new_conversation_is_work_at_once() -> None:
    world = World()
    node = Native(world.place, "node", leases=world.office, clock=lambda: world.place.now)
    await node.greet(NODE_KEYS[0])
    await turns()
    node.down()
    await born(world.place)
    assert node.down() == [Work((CONVERSATION,))]


async def test_people_hear_of_no_work() -> None:
    world = World()
    native = Native(world.place)
    await native.greet()
    await born(world.place)
    await turns()
    assert native.down() == []


async def test_an_abandoned_lease_is_work_for_everybody_else() -> None:
    world = World()
    await born(world.place)
    one = await world.holding(0)
    one.connection.leave()
    other = Native(world.place, "node", leases=world.office, clock=lambda: world.place.now)
    await other.greet(NODE_KEYS[1])
    await turns()
    other.down()
    world.place.now += 11
    other.connection.tick()
    world.office.tick()
    assert other.down() == [Work((CONVERSATION,))]


async def test_a_draft_reaches_the_node_with_the_lease_and_nobody_else() -> None:
    world = World()
    await born(world.place)
    node, idle = await world.holding(0), await world.node(1)
    writer, _ = await world.person()
    reader, _ = await world.person(2)
    await writer.send(Draft(1, "", 0, "What is"))
    (hint,) = [frame for frame in node.down() if isinstance(frame, Hint)]
    assert (hint.channel, hint.after, hint.keep, hint.text) == (1, "", 0, "What is")
    assert reader.down() == idle.down() == []
    assert world.place.durable == 1
    writer.connection.leave()
    (gone,) = node.down()
    assert gone == Hint(1, hint.source, None, 0, "")


async def test_of_many_drafts_only_the_latest_is_passed_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(drafts_module, "DRAFT_INTERVAL_S", 0)
    world = World()
    await born(world.place)
    node = await world.holding()
    writer, _ = await world.person()
    for end in range(1, 6):
        await writer.send(Draft(1, "", end - 1, "hello"[end - 1]))
    await asyncio.sleep(0.001)
    await turns()
    hints = [frame for frame in node.down() if isinstance(frame, Hint)]
    assert [(hint.keep, hint.text) for hint in hints] == [(0, "h"), (1, "ello")]


async def test_a_draft_that_was_typed_before_the_lease_is_told_with_it() -> None:
    world = World()
    await born(world.place)
    writer, _ = await world.person()
    await writer.send(Draft(1, "", 0, "early"))
    node = await world.holding()
    assert [type(frame) for frame in node.taken if isinstance(frame, Leased | Hint)] == [
        Leased,
        Hint,
    ]


async def test_a_draft_that_makes_no_sense_is_dropped_and_the_next_whole_one_counts() -> None:
    world = World()
    await born(world.place)
    node = await world.holding()
    writer, _ = await world.person()
    await writer.send(Draft(1, "", 7, "lost"))
    assert node.down() == []
    await writer.send(Draft(1, "", 0, "whole"))
    assert [frame.text for frame in node.down() if isinstance(frame, Hint)] == ["whole"]
    assert writer.connection.close_code is None


async def test_readers_drafts_are_not_passed_on() -> None:
    world = World()
    owner, replica = await born(world.place)
    await owner.membership.submit(replica.grant("friend", Grant.READER))
    node = await world.holding()
    friend, _ = await world.person(2, "friend")
    await friend.send(Draft(1, "", 0, "no answer to be had"))
    assert node.down() == []


async def test_a_draft_in_a_conversation_that_was_just_created_is_passed_on() -> None:
    world = World()
    writer, replica = await world.person()
    await writer.send(update_frame(1, replica.give_birth()))
    await turns()
    node = await world.holding()
    await writer.send(Draft(1, "", 0, "first words"))
    assert [frame.text for frame in node.down() if isinstance(frame, Hint)] == ["first words"]


async def test_rights_that_come_and_go_count_for_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafts_module, "DRAFT_INTERVAL_S", 0)
    world = World()
    owner, replica = await born(world.place)
    await owner.membership.submit(replica.grant("friend", Grant.READER))
    node = await world.holding()
    friend, _ = await world.person(2, "friend")

    async def heard(frame: Draft) -> list[tuple[str | None, str]]:
        await friend.send(frame)
        await asyncio.sleep(0.001)
        await turns()
        return [(hint.after, hint.text) for hint in node.down() if isinstance(hint, Hint)]

    assert await heard(Draft(1, "", 0, "not")) == []
    await owner.membership.submit(replica.grant("friend", Grant.WRITER))
    assert await heard(Draft(1, "", 3, " now")) == [("", "not now")]
    await owner.membership.submit(replica.grant("friend", Grant.READER))
    assert await heard(Draft(1, "", 7, " any more")) == [(None, "")]


async def test_a_renewed_token_counts_for_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PASSES, "narrow", Pass("owner", conversations={CONVERSATION: Grant.READER}))
    monkeypatch.setattr(drafts_module, "DRAFT_INTERVAL_S", 0)
    world = World()
    await born(world.place)
    node = await world.holding()
    writer, _ = await world.person()
    await writer.send(Draft(1, "", 0, "as an owner"))
    node.down()
    await writer.send(Hello(VERSION, "narrow", "test", None))
    await asyncio.sleep(0.001)
    await turns()
    assert [hint.after for hint in node.down() if isinstance(hint, Hint)] == [None]


async def test_drafts_of_one_connection_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafts_module, "DRAFTS_PER_CONNECTION_MAX", 1)
    world = World()
    await born(world.place)
    node = await world.holding()
    writer, _ = await world.person()
    other = Birth("owner", b"another 16 bytes")
    await writer.send(open_frame(2, conversation=conversation_id(other)))
    await turns()
    replica = device(9)
    await writer.send(update_frame(1, replica.give_birth(other), 2), Leave(2))
    await writer.send(open_frame(2, conversation=conversation_id(other)))
    await turns()
    assert [ack.channel for ack in writer.of(Ack)] or writer.down()
    await writer.send(Draft(1, "", 0, "first"), Draft(2, "", 0, "second"))
    hints = [frame for frame in node.down() if isinstance(frame, Hint)]
    assert [hint.after for hint in hints] == ["", None]


async def test_the_embedded_node_hears_drafts_too() -> None:
    place = Place()
    await born(place)
    heard: list[tuple[int, str | None, int, str]] = []

    def hint(source: int, after: str | None, keep: int, text: str) -> bool:
        heard.append((source, after, keep, text))
        return True

    member = await place.hub.join(
        CONVERSATION, "node", node=True, deliver=lambda _: None, hint=hint
    )
    native = Native(place)
    await native.greet()
    await native.send(open_frame())
    await turns()
    await native.send(Draft(1, "", 0, "typing"))
    member.leave()
    await native.send(Draft(1, None, 0, ""))
    assert heard == [(1, "", 0, "typing")]
