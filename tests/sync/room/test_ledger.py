"""What a room keeps in the register: as the document has it, and only when its facts change."""

from __future__ import annotations

import asyncio
from random import Random
from typing import TYPE_CHECKING

import pytest
from sync.device import CONVERSATION, Device
from sync.leased_node import LeasedNode, ask
from sync.rooms import RELAY_KEY, Place, born, turns

from crdt_llm.document.chain import lease_message
from crdt_llm.document.conversation import Conversation
from crdt_llm.document.rules import Author
from crdt_llm.document.schema import Grant, State, Usage
from crdt_llm.errors import Refused, StoreFailed, Unavailable
from crdt_llm.sync.room import ledger

if TYPE_CHECKING:
    from sync.rooms import Member

    from crdt_llm.store.register import RegisterSeam, Row


def row(place: Place) -> Row:
    return place.rows[CONVERSATION]


def document(place: Place) -> Conversation:
    stored = place.disk.conversations[CONVERSATION]
    replica = Conversation(1)
    for update in (*([stored.snapshot] if stored.snapshot else []), *stored.updates):
        replica.apply(update)
    return replica


async def answering(place: Place, owner: Member, device: Device) -> tuple[LeasedNode, str]:
    """A node that has begun to answer a question, and the slot."""
    question, slot = await ask(device, owner)
    node = await LeasedNode.sit(place)
    await node.admit(question)
    await node.start(slot)
    return node, slot


async def a_turn(place: Place) -> tuple[LeasedNode, Device, str]:
    owner, device = await born(place)
    node, slot = await answering(place, owner, device)
    await node.say(slot, "Be")
    await node.say(slot, "cause.")
    await node.finish(slot)
    return node, device, slot


async def test_a_birth_makes_the_row() -> None:
    place = Place(leased=True)
    _, device = await born(place)
    found = row(place)
    assert (found.owner, found.epoch, found.access_version) == ("owner", 0, 0)
    assert found.clients == {device.replica.client_id: "person owner"}
    assert found.lsn == place.durable


async def test_a_token_of_a_stream_changes_nothing() -> None:
    place = Place(leased=True)
    owner, device = await born(place)
    node, slot = await answering(place, owner, device)
    await node.say(slot, "Be")  # the seal's own client id is bound here
    before = place.saves
    for word in ("cause ", "it ", "rains."):
        await node.say(slot, word)
    assert place.saves == before
    await node.finish(slot)
    assert place.saves == before + 1


async def test_the_row_says_what_was_admitted_last_with_its_digest() -> None:
    place = Place(leased=True)
    _, _, slot = await a_turn(place)
    replica = document(place)
    assert row(place).tips == {slot: ledger.digest_of(replica, slot)}
    assert len(row(place).tips[slot]) == 32
    assert ledger.missing_tips(row(place), replica) == ()


async def test_the_row_follows_rights_and_withdrawals() -> None:
    place = Place(leased=True)
    owner, device = await born(place)
    await owner.membership.submit(device.grant("will", Grant.WRITER))
    assert dict(row(place).access) == {"will": "writer"}
    await owner.membership.submit(device.grant("will", None))
    assert (dict(row(place).access), row(place).access_version) == ({}, 2)
    secret = device.say("secret")
    await owner.membership.submit(secret)
    (entry,) = device.replica.view()
    with device.replica.writing() as writer:
        writer.redact(entry, "owner", 12)
    assert writer.change is not None
    await owner.membership.submit(writer.change.update)
    assert dict(row(place).redacted) == {entry: ("owner", 12)}


async def test_the_row_follows_facts_stops_and_ends_and_saves_once_for_each() -> None:
    place = Place(leased=True)
    owner, device = await born(place)
    slots = [(await ask(device, owner))[1] for _ in range(2)]
    node = await LeasedNode.sit(place)
    assert (dict(row(place).facts or {}), row(place).former) == ({}, {})
    before = place.saves
    digests = [ledger.digest_of_value(title) for title in ("one", "two", "three")]
    for title in ("one", "two", "three", "two"):
        await owner.membership.submit(device.entitle(title))
    assert place.saves == before + 4
    assert row(place).facts == {"title": digests[1]}
    assert row(place).former == {"title": (digests[2], digests[1], digests[0])}
    await owner.membership.submit(device.entitle(None))
    assert row(place).facts == {}
    assert ledger.was_registered(row(place), "title", digests[0])
    assert not ledger.was_registered(row(place), "title", ledger.digest_of_value("four"))
    with device.replica.writing() as writer:
        writer.stop(slots[0], "owner")
    assert writer.change is not None
    await owner.membership.submit(writer.change.update)
    assert row(place).stops == {slots[0]: ("owner",)}
    node.catch_up()
    usage = Usage(finish="error", error_code="c", error_message="m")
    with node.replica.writing() as said:
        said.state(slots[0], State.SUPERSEDED)
        said.state(slots[1], State.FAILED)
        said.usage(slots[1], usage)
    before = place.saves
    await node.submit(said.change)
    assert place.saves == before + 1
    cost = ledger.digest_of_value(usage.plain())
    assert row(place).ends == {slots[0]: ("superseded", b""), slots[1]: ("failed", cost)}
    assert ledger.reconciled(row(place), document(place)) is row(place)


async def test_of_facts_that_change_often_the_oldest_are_forgotten() -> None:
    place = Place(leased=True)
    owner, device = await born(place)
    for number in range(ledger.FORMER_MAX + 2):
        await owner.membership.submit(device.entitle(f"{number}"))
    former = row(place).former["title"]
    assert len(former) == ledger.FORMER_MAX
    assert former[-1] == b""  # so anything may be one of them
    assert ledger.was_registered(row(place), "title", ledger.digest_of_value("never"))


async def test_a_row_made_of_a_log_does_not_know_what_was_before() -> None:
    place = Place(leased=True)
    owner, device = await born(place)
    await owner.membership.submit(device.entitle("one"))
    assert not ledger.was_registered(row(place), "title", b"any")
    await owner.membership.submit(device.say("hello"))
    place.rows.clear()
    place.open_hub()
    await place.join()
    assert row(place).facts == {"title": ledger.digest_of_value("one")}
    assert ledger.was_registered(row(place), "title", b"any")


async def test_what_follows_step_by_step_is_what_the_document_says() -> None:
    place = Place(leased=True)
    node, device, _ = await a_turn(place)
    owner = await place.join()
    for update in node.written:
        device.replica.apply(update)
    for _ in range(3):
        question, slot = await ask(device, owner)
        await node.admit(question)
        await node.start(slot)
        kept, replica = row(place), document(place)
        assert ledger.reconciled(kept, replica) is kept
        await node.say(slot, "x")
        await node.finish(slot)
        for update in node.written[-4:]:
            device.replica.apply(update)
        kept, replica = row(place), document(place)
        assert ledger.reconciled(kept, replica) is kept


@pytest.mark.parametrize("seam", ["register-before-commit", "register-after-commit"])
async def test_nothing_is_acknowledged_before_the_register_has_it(seam: RegisterSeam) -> None:
    place = Place(leased=True)
    owner, device = await born(place)
    other = await place.join()
    place.register_failing = seam
    with pytest.raises(StoreFailed):
        await owner.membership.submit(device.grant("will", Grant.WRITER))
    assert other.heard == []
    assert [type(error) for error in other.lost] == [StoreFailed]
    place.register_failing = None
    assert place.durable == 2  # the log had it: the room that comes next reconciles
    again = await place.join()
    assert dict(row(place).access) == {"will": "writer"}
    await again.membership.submit(device.written[-1])


async def test_a_log_without_a_row_gets_one() -> None:
    place = Place(leased=True)
    node, _, slot = await a_turn(place)
    kept = row(place)
    place.rows.clear()
    place.open_hub()
    await place.join()
    found = row(place)
    assert (found.owner, found.epoch, found.holder) == ("owner", 1, node.key.public)
    assert found.tips == kept.tips == {slot: found.tips[slot]}


# -- client ids -------------------------------------------------------------------------------


async def test_a_client_id_belongs_to_whoever_used_it_first() -> None:
    place = Place(leased=True)
    owner, device = await born(place)
    await owner.membership.submit(device.grant("will", Grant.WRITER))
    will = await place.join("will")
    impostor = Device(Random(8), "will")
    impostor.replica = Conversation(device.replica.client_id, update=will.membership.state)
    with pytest.raises(Refused) as refused:
        await will.membership.submit(impostor.say("as if I were the owner's phone"))
    assert refused.value.code == "forged-client"
    own = Device(Random(9), "will")
    own.merge(will.membership.state)
    await will.membership.submit(own.say("hello"))
    stolen = Device(Random(10))
    stolen.replica = Conversation(own.replica.client_id, update=document(place).diff())
    with pytest.raises(Refused, match="somebody else"):
        await owner.membership.submit(stolen.entitle("mine"))


async def test_a_binding_outlives_the_process() -> None:
    place = Place(leased=True)
    owner, device = await born(place)
    await owner.membership.submit(device.grant("will", Grant.WRITER))
    place.open_hub()
    will = await place.join("will")
    impostor = Device(Random(8), "will")
    impostor.replica = Conversation(device.replica.client_id, update=will.membership.state)
    with pytest.raises(Refused, match="somebody else"):
        await will.membership.submit(impostor.say("hello"))


async def test_a_refused_update_binds_nothing() -> None:
    place = Place(leased=True)
    owner, device = await born(place)
    await owner.membership.submit(device.grant("will", Grant.WRITER))
    will = await place.join("will")
    thief = Device(Random(8), "will")
    thief.merge(will.membership.state)
    with pytest.raises(Refused):
        await will.membership.submit(thief.forge())
    fresh = Device(Random(8))
    fresh.replica = Conversation(thief.replica.client_id, update=document(place).diff())
    await owner.membership.submit(fresh.entitle("mine"))


async def test_a_nodes_id_is_no_persons() -> None:
    place = Place(leased=True)
    node, device, _ = await a_turn(place)
    owner = await place.join("owner")
    await owner.membership.submit(device.grant("node", Grant.WRITER))
    person = await place.join("node")
    impostor = Device(Random(8), "node")
    impostor.replica = Conversation(node.replica.client_id, update=person.membership.state)
    with pytest.raises(Refused, match="somebody else"):
        await person.membership.submit(impostor.say("hello"))


async def test_the_rooms_own_id_is_nobodys() -> None:
    place = Place(leased=True)
    owner, _ = await born(place)
    room = place.hub._rooms[CONVERSATION]
    impostor = Device(Random(8))
    impostor.replica = Conversation(room._replica.document.client_id, update=document(place).diff())
    with pytest.raises(Refused, match="somebody else"):
        await owner.membership.submit(impostor.say("hello"))


# -- leases -----------------------------------------------------------------------------------


async def test_an_epoch_grows_with_the_holder_and_stays_with_it() -> None:
    place = Place(leased=True)
    await born(place)
    room = place.hub._rooms[CONVERSATION]
    assert room.epoch == 0
    assert [await room.grant_epoch(key) for key in (b"a" * 32, b"a" * 32, b"b" * 32)] == [1, 1, 2]
    assert (room.epoch, row(place).epoch, row(place).holder) == (2, 2, b"b" * 32)
    place.open_hub()
    await place.join()
    again = place.hub._rooms[CONVERSATION]
    assert again.epoch == 2
    assert await again.grant_epoch(b"b" * 32) == 2
    assert await again.grant_epoch(b"a" * 32) == 3


async def test_no_lease_without_a_birth() -> None:
    place = Place(leased=True)
    await place.join()
    with pytest.raises(Unavailable, match="birth"):
        await place.hub._rooms[CONVERSATION].grant_epoch(b"a" * 32)


@pytest.mark.parametrize("seam", ["register-before-commit", "register-after-commit"])
async def test_an_epoch_is_durable_before_anybody_has_it(seam: RegisterSeam) -> None:
    place = Place(leased=True)
    await born(place)
    place.register_failing = seam
    with pytest.raises(StoreFailed):
        await place.hub._rooms[CONVERSATION].grant_epoch(b"a" * 32)
    place.register_failing = None
    await place.join()
    granted = await place.hub._rooms[CONVERSATION].grant_epoch(b"b" * 32)
    assert granted == (1 if seam == "register-before-commit" else 2)


@pytest.mark.parametrize("what", ["words", "proof"])
async def test_a_fenced_node_writes_nothing(what: str) -> None:
    place = Place(leased=True)
    owner, device = await born(place)
    old, slot = await answering(place, owner, device)
    await old.say(slot, "in time")
    await LeasedNode.sit(place, seed=1)
    with pytest.raises(Refused) as refused:
        await (old.say(slot, "late") if what == "words" else old.finish(slot))
    assert refused.value.code == "stale-epoch"


async def test_what_waits_behind_a_lease_that_ends_is_fenced_too() -> None:
    """It was written under the old lease, though its writer has a new one by then."""
    place = Place(leased=True)
    owner, device = await born(place)
    old, slot = await answering(place, owner, device)
    place.gate.clear()
    blocking = asyncio.create_task(owner.membership.submit(device.entitle("in the way")))
    await turns()
    room = place.hub._rooms[CONVERSATION]
    granting = [asyncio.create_task(room.grant_epoch(key)) for key in (b"x" * 32, old.key.public)]
    place.gate.set()
    await blocking
    assert [await one for one in granting] == [2, 3]
    place.gate.clear()
    blocking = asyncio.create_task(owner.membership.submit(device.entitle("again")))
    await turns()
    late = asyncio.create_task(old.say(slot, "late"))
    await turns()
    old.member.membership.author = Author("node", node=True, epoch=3)
    place.gate.set()
    with pytest.raises(Refused, match="another node"):
        await late
    await blocking


async def test_what_waits_behind_a_connection_that_ends_is_fenced_though_the_epoch_stays() -> None:
    """The same node is back on another connection, and generates the same words again."""
    place = Place(leased=True)
    owner, device = await born(place)
    old, slot = await answering(place, owner, device)
    place.gate.clear()
    blocking = asyncio.create_task(owner.membership.submit(device.entitle("in the way")))
    await turns()
    late = asyncio.create_task(old.say(slot, "twice"))
    await turns()
    old.member.membership.author = Author("node", node=True, epoch=None)
    granting = asyncio.create_task(place.hub._rooms[CONVERSATION].grant_epoch(old.key.public))
    place.gate.set()
    await blocking
    assert await granting == old.epoch
    with pytest.raises(Refused, match="another node"):
        await late


async def test_a_node_without_a_lease_writes_nothing() -> None:
    place = Place(leased=True)
    owner, device = await born(place)
    question, _ = await ask(device, owner)
    node = LeasedNode(await place.join("node", node=True))
    with pytest.raises(Refused) as refused:
        await node.admit(question)
    assert refused.value.code == "stale-epoch"


@pytest.mark.parametrize("forged", ["signature", "key"])
async def test_a_node_records_no_lease_that_was_not_granted(forged: str) -> None:
    place = Place(leased=True)
    await born(place)
    node = await LeasedNode.sit(place)
    key = b"k" * 32 if forged == "key" else node.key.public
    signature = RELAY_KEY.sign(lease_message(CONVERSATION, node.epoch, key))
    with node.replica.writing() as writer:
        writer.add_lease(node.epoch, key, b"s" * 64 if forged == "signature" else signature)
    with pytest.raises(Refused) as refused:
        await node.submit(writer.change)
    assert refused.value.code == "leases"
