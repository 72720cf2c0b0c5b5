"""What a client's replica brings back after the log was lost, and what it does not get past."""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random
from typing import TYPE_CHECKING, Any

import msgpack
import pytest
from pycrdt import Array, Doc, Map
from sync.device import AT_MS, BIRTH, CONVERSATION, Device
from sync.leased_node import LeasedNode, ask
from sync.native import PASSES, Native, open_frame
from sync.rooms import RELAY_KEY, born, turns
from sync.rooms import Place as House
from sync.update_writer import update_bytes

from crdt_llm.document.chain import lease_message, verify_path
from crdt_llm.document.conversation import Conversation
from crdt_llm.document.keys import SigningKey
from crdt_llm.document.schema import (
    Birth,
    Born,
    Grant,
    Place,
    Role,
    State,
    Usage,
    conversation_id,
    entry_id,
)
from crdt_llm.document.seal import place_of
from crdt_llm.errors import (
    BadProof,
    Behind,
    Forbidden,
    Gap,
    LocalMisuse,
    Refused,
    StoreFailed,
)
from crdt_llm.store.memory import MemoryDisk
from crdt_llm.store.register import Row
from crdt_llm.sync.relay.access import Pass
from crdt_llm.sync.relay.plain_peer import RemotePeer
from crdt_llm.sync.relay.replacement import replace_stored
from crdt_llm.sync.room import ledger
from crdt_llm.sync.room.restore import SIGNATURES_AT_ONCE, verify_chunks
from crdt_llm.sync.update.structure import HELD_LIMITS, Kind, Struct, read_update
from crdt_llm.sync.wire.frames import Ack, Opened, Restore
from crdt_llm.sync.wire.y_websocket import SyncStep1, SyncStep2, decode, decode_state_vector, encode

if TYPE_CHECKING:
    from collections.abc import Callable

    from sync.rooms import Member

WORDS = "the secret of secrets"


@dataclass
class World:
    """A conversation with an answered turn and a reply that still streams."""

    place: House
    owner: Member
    device: Device
    node: LeasedNode
    question: str
    done: str
    asked: str
    streaming: str

    @property
    def room(self) -> Any:
        return self.place.hub._rooms[CONVERSATION]

    def document(self) -> bytes:
        return bytes(self.room.diff())

    def replica(self) -> Conversation:
        return Conversation(1, update=self.document())

    def lose_log(self, name: str = "another log") -> None:
        self.place.disk = MemoryDisk(name)
        self.place.open_hub(seed=2)

    async def catch_up(self) -> None:
        for update in self.owner.heard:
            self.device.merge(update)
        self.owner.heard.clear()


async def a_world() -> World:
    place = House(leased=True)
    owner, device = await born(place)
    await owner.membership.submit(device.grant("will", Grant.WRITER))
    await owner.membership.submit(device.grant("rita", Grant.READER))
    question, done = await ask(device, owner)
    node = await LeasedNode.sit(place)
    await node.admit(question)
    await node.start(done)
    await node.say(done, "Be")
    await node.say(done, "cause.")
    await node.finish(done)
    for update in owner.heard:
        device.merge(update)
    owner.heard.clear()
    asked, streaming = await ask(device, owner, "and then?")
    await node.admit(asked)
    await node.start(streaming)
    for words in ("Then ", "it ", "rains, "):
        await node.say(streaming, words)
    world = World(place, owner, device, node, question, done, asked, streaming)
    await world.catch_up()
    return world


async def restored(world: World, update: bytes, principal: str = "owner") -> Member:
    member = await world.place.join(principal)
    await member.membership.submit(update, restore=True)
    return member


async def test_one_replica_brings_everything_back_and_the_reply_goes_on() -> None:
    world = await a_world()
    before = world.replica()
    world.lose_log()
    await restored(world, before.diff())
    after = world.replica()
    assert after.view() == before.view()
    assert after.entry(world.streaming) == before.entry(world.streaming)
    assert world.room.behind == ()
    node = LeasedNode(await world.place.join("node", node=True))
    await node.take_lease(world.place)
    assert node.epoch == 2  # the same node; but nobody knows what it wrote meanwhile
    entry = node.replica.entry(world.streaming)
    assert entry is not None
    hidden = node.sealer.open_reply(entry.sealed, place_of(node.replica, entry))
    assert bytes(hidden.ids) == b"Then it rains, "


async def test_a_stock_client_brings_it_back_with_its_step2() -> None:
    world = await a_world()
    document = world.document()
    world.lose_log()
    peer = RemotePeer("owner", lambda: None)
    await world.place.hub.enter(CONVERSATION, peer)
    await peer.receive(encode(SyncStep1(b"\x00")))
    await peer.receive(encode(SyncStep2(document)))
    await turns(200)
    assert peer.close_code is None
    assert world.replica().view() == Conversation(1, update=document).view()


async def will_connects(world: World, his: Device) -> RemotePeer:
    """Will's device answers what a relay asks first."""
    peer = RemotePeer("will", lambda: None)
    await world.place.hub.enter(CONVERSATION, peer)
    frame = peer.take()
    assert frame is not None
    asked = decode(frame)
    assert isinstance(asked, SyncStep1)
    await peer.receive(encode(SyncStep2(his.replica.diff(asked.state_vector))))
    await turns(50)
    return peer


async def test_a_reader_brings_it_back_too() -> None:
    world = await a_world()
    document = world.document()
    world.lose_log()
    await restored(world, document, "rita")
    assert world.replica().view() == Conversation(1, update=document).view()
    with pytest.raises(Forbidden):
        await world.place.join("stranger")


async def test_nobody_else_comes_in_while_the_log_is_empty() -> None:
    world = await a_world()
    world.lose_log()
    with pytest.raises(Forbidden):
        await world.place.join("stranger")
    await world.place.join("will")


async def test_after_the_first_lease_a_client_writes_no_node_fields_again() -> None:
    world = await a_world()
    half = Conversation(1, update=world.document())
    await world.node.say(world.streaming, "and ")
    whole = world.document()
    world.lose_log()
    member = await restored(world, half.diff())
    # The register has no word of the last token: nothing is missing that it knows.
    await LeasedNode.sit(world.place, seed=3)
    with pytest.raises(Refused):
        await member.membership.submit(whole, restore=True)
    assert world.replica().text(world.streaming) == "Then it rains, "


async def test_a_restore_goes_on_after_the_relay_was_started_again() -> None:
    world = await a_world()
    document = world.document()
    world.lose_log()
    owner = await world.place.join()
    del owner
    await world.place.hub.close()
    world.place.open_hub(seed=3)
    await restored(world, document)
    await world.place.hub.close()
    world.place.open_hub(seed=4)
    member = await world.place.join()
    await member.membership.submit(document, restore=True)
    assert world.replica().view() == Conversation(1, update=document).view()


async def test_only_what_is_offered_as_a_restore_is_taken_as_one() -> None:
    world = await a_world()
    document = world.document()
    world.lose_log()
    member = await world.place.join()
    with pytest.raises(Refused) as refused:
        await member.membership.submit(document)  # as large as it may be, but an update
    assert refused.value.code == "node-field"
    await member.membership.submit(document, restore=True)


async def test_an_operator_brings_back_what_the_register_knows_as_anybody_does() -> None:
    world = await a_world()
    before = world.replica()
    world.lose_log()
    assert await world.place.hub.import_trusted(CONVERSATION, before.diff()) == ()
    assert world.replica().view() == before.view()


# -- what does not get past ---------------------------------------------------------------------


class Forger:
    """A document that is rewritten before it is brought back; its structs stay well-formed."""

    def __init__(self, document: bytes, world: World) -> None:
        self.doc: Doc[Any] = Doc(client_id=991)
        self.roots = {
            name: self.doc.get(name, type=Map) for name in ("meta", "access", "leases", "entries")
        }
        self.doc.apply_update(document)
        self.world = world

    @property
    def entries(self) -> Any:
        return self.roots["entries"]

    def lease(self, key: SigningKey, by: SigningKey, epoch: int = 1) -> dict[str, bytes]:
        message = lease_message(CONVERSATION, epoch, key.public)
        return {"node": key.public, "signature": by.sign(message)}


def grow(forger: Forger, name: str, text: str) -> None:
    content = forger.entries[name]["content"]
    content.insert(len(content), text)


def swap(array: Any, position: int, blob: bytes) -> None:
    del array[position]
    array.insert(position, bytes(blob))


def set_in(forger: Forger, name: str, key: str, value: Any) -> None:
    forger.entries[name][key] = value


def emptied(blob: bytes) -> bytes:
    """The same seal, whose signature is genuine, with nothing in it that a key could open."""
    form, key_id, nonce, ciphertext, signature = msgpack.unpackb(bytes(blob))
    return bytes(msgpack.packb([form, key_id, nonce, bytes(len(ciphertext)), signature]))


STRANGER = SigningKey(b"s" * 32)
FORGED_COST = Usage(finish="error", error_code="c", error_message="forged").plain()

FORGED: dict[str, tuple[Callable[[Forger], object], str]] = {
    "a reply's end": (lambda f: grow(f, f.world.done, " Not."), "proof"),
    "words in a stream": (lambda f: grow(f, f.world.streaming, "hate"), "proof"),
    "a question's text": (lambda f: set_in(f, f.world.question, "content", "forged"), "proof"),
    "another seal in the end": (
        lambda f: swap(
            f.entries[f.world.done]["sealed"], 0, f.entries[f.world.streaming]["sealed"][0]
        ),
        "proof",
    ),
    "a chunk in the place of another": (
        lambda f: swap(
            f.entries[f.world.streaming]["sealed"], 0, f.entries[f.world.streaming]["sealed"][1]
        ),
        "proof",
    ),
    "an end whose seal holds something else": (
        lambda f: swap(
            f.entries[f.world.done]["sealed"], 0, emptied(f.entries[f.world.done]["sealed"][0])
        ),
        "proof",
    ),
    "a chunk that holds something else": (
        lambda f: swap(
            f.entries[f.world.streaming]["sealed"],
            1,
            emptied(f.entries[f.world.streaming]["sealed"][1]),
        ),
        "proof",
    ),
    "other entries to be answered from": (
        lambda f: set_in(f, f.world.streaming, "reads", [f.world.question]),
        "proof",
    ),
    "calls of a stream": (
        lambda f: set_in(f, f.world.streaming, "calls", [{"name": "delete_all"}]),
        "proof",
    ),
    "the cost of a stream": (
        lambda f: set_in(f, f.world.streaming, "usage", FORGED_COST),
        "proof",
    ),
    "another cost": (lambda f: set_in(f, f.world.done, "usage", FORGED_COST), "node-field"),
    "a chunk that is none": (
        lambda f: swap(f.entries[f.world.streaming]["sealed"], 1, b"chunk"),
        "proof",
    ),
    "the last chunk cut off": (
        lambda f: f.entries[f.world.streaming]["sealed"].pop(),
        "proof",
    ),
    "chunks taken away": (
        lambda f: set_in(f, f.world.streaming, "sealed", Array([])),
        "proof",
    ),
    "a proof's digest": (
        lambda f: set_in(
            f, f.world.done, "proof", {**f.entries[f.world.done]["proof"], "digest": b"d" * 32}
        ),
        "proof",
    ),
    "calls that it did not make": (
        lambda f: set_in(f, f.world.done, "calls", [{"name": "delete_all"}]),
        "proof",
    ),
    "another place": (
        lambda f: set_in(f, f.world.done, "place", {"parent": "", "epoch": 1}),
        "proof",
    ),
    "an end that was none": (lambda f: set_in(f, f.world.streaming, "state", "done"), "proof"),
    "another end": (lambda f: set_in(f, f.world.done, "state", "failed"), "proof"),
    "another lease": (
        lambda f: f.roots["leases"].update({"1": f.lease(STRANGER, STRANGER)}),
        "leases",
    ),
    "a lease to come": (
        lambda f: f.roots["leases"].update({"7": f.lease(STRANGER, RELAY_KEY, 7)}),
        "leases",
    ),
    "another birth": (
        lambda f: f.roots["meta"].update({"birth": {"owner": "owner", "nonce": b"m" * 16}}),
        "birth",
    ),
    "another's withdrawal": (
        lambda f: set_in(f, f.world.question, "redacted", {"by": "will", "at": 1}),
        "redacted",
    ),
    "another's name": (
        lambda f: set_in(
            f,
            f.world.question,
            "born",
            {**f.entries[f.world.question]["born"], "author": "will"},
        ),
        "proof",
    ),
    "a malformed title": (lambda f: f.roots["meta"].update({"title": 7}), "meta"),
    "an unknown right": (lambda f: f.roots["access"].update({"stan": "king"}), "schema"),
}


@pytest.mark.parametrize("what", FORGED)
async def test_what_does_not_prove_itself_is_refused(what: str) -> None:
    world = await a_world()
    forger = Forger(world.document(), world)
    forge, code = FORGED[what]
    with forger.doc.transaction():
        forge(forger)
    # As one update from nothing: its structs are whatever the forger says they are.
    update = forger.doc.get_update()
    world.lose_log()
    member = await world.place.join()
    with pytest.raises(Refused) as refused:
        await member.membership.submit(update, restore=True)
    assert refused.value.code == code
    assert world.place.durable == 0


async def test_a_forger_of_fresh_node_fields_is_refused() -> None:
    """A pending slot with the words of no node."""
    world = await a_world()
    await world.catch_up()
    _, slot = await ask(world.device, world.owner, "more?")
    forger = Forger(world.document(), world)
    forger.entries[slot]["state"] = "streaming"
    world.lose_log()
    member = await world.place.join()
    with pytest.raises(Refused) as refused:
        await member.membership.submit(forger.doc.get_update(), restore=True)
    assert refused.value.code == "node-field"


async def test_a_seal_of_another_conversation_is_refused() -> None:
    """The same keys, the same text, the same entry ids: only the conversation differs."""
    world = await a_world()
    document = world.document()
    other = conversation_id(Birth(BIRTH.owner, b"m" * 16))
    world.lose_log()
    member = await world.place.join(conversation=other)
    with pytest.raises((Refused, Gap)):
        await member.membership.submit(document, restore=True)


async def test_a_reply_whose_chunks_fit_nowhere_is_searched_in_short_steps() -> None:
    world = await a_world()
    await world.node.say(world.streaming, "x" * 200)
    replica = world.replica()
    entry = replica.entry(world.streaming)
    assert entry is not None
    # The first chunk is one of another place: every beginning of the text is tried.
    forged = replace(entry, sealed=(entry.sealed[1], *entry.sealed[1:]))
    steps: list[None] = []
    with pytest.raises(BadProof):
        steps.extend(verify_chunks(replica, forged, None))
    assert len(steps) >= len(entry.content) / SIGNATURES_AT_ONCE - 1


async def test_a_node_that_was_fenced_off_proves_nothing_late() -> None:
    """Its lease was genuine, and so are its signatures; but nobody ever heard of what it signs."""
    world = await a_world()
    await world.node.finish(world.streaming)
    await world.catch_up()
    question, slot = await ask(world.device, world.owner, "three?")
    successor = await LeasedNode.sit(world.place, seed=9)
    assert successor.epoch == 2
    await successor.admit(question)
    await successor.start(slot)
    await successor.say(slot, "true")
    true = world.document()
    # Under the smaller epoch it would even be the one that continues the line.
    late, name = Conversation(88, update=true), entry_id(AT_MS, Random(5).randbytes(10))
    world.node.replica = late
    with late.writing() as writer:
        clock = late.tree.clock + 1
        said = Born(Role.USER, "node", "t", AT_MS, clock, after=world.streaming)
        writer.add(name, said, "never said")
        writer.place(name, Place(world.streaming, 1))
        world.node._prove(writer, name, world.streaming, text="never said")
    world.lose_log()
    with pytest.raises(Refused) as refused:
        await restored(world, late.diff(), "rita")
    assert refused.value.code == "proof"
    assert world.place.durable == 0
    await restored(world, true, "rita")
    assert world.replica().view() == Conversation(1, update=true).view()


async def test_a_node_that_was_fenced_off_ends_no_reply_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = await a_world()
    half = world.document()
    successor = await LeasedNode.sit(world.place, seed=9)
    with successor.replica.writing() as writer:
        successor._record_lease(writer)
    await successor.submit(writer.change)
    await successor.finish(world.streaming)
    true = world.document()
    world.node.replica = Conversation(88, seal_client_id=89, update=half)
    world.node.heard = len(world.node.member.heard)
    unheard: list[bytes] = []

    async def keep(change: Any) -> bytes:
        unheard.append(change.update)
        return unheard[-1]

    monkeypatch.setattr(world.node, "submit", keep)
    await world.node.finish(world.streaming)
    assert unheard
    world.lose_log()
    with pytest.raises(Refused) as refused:
        await restored(world, world.node.replica.diff(), "rita")
    assert refused.value.code == "proof"
    await restored(world, true, "rita")
    assert world.room.behind == ()


@pytest.mark.parametrize("how", ["under an unknown client id", "under its bringer's"])
async def test_nobody_brings_an_entry_in_anothers_name(how: str) -> None:
    """It would wait for its author for ever, and everybody would read it in that name."""
    world = await a_world()
    hers = Device(Random(34), "owner")
    hers.merge(world.document())
    if how == "under its bringer's":
        hers.replica = Conversation(world.device.replica.client_id, update=world.document())
    hers.principal = "will"
    hers.say("what will never said")
    true = world.document()
    world.lose_log()
    for bringer in ("owner", "rita"):
        with pytest.raises(Refused) as refused:
            await restored(world, hers.replica.diff(), bringer)
        assert refused.value.code == "forged-author"
    assert world.place.durable == 0
    await restored(world, true)


async def test_what_a_reply_reads_is_not_believed_before_it_says_a_word() -> None:
    world = await a_world()
    await world.node.finish(world.streaming)
    await world.catch_up()
    question, slot = await ask(world.device, world.owner, "three?")
    await world.node.admit(question)
    await world.node.start(slot)
    true = world.document()
    forged = forged_under(
        world.node.replica.client_id,
        true,
        lambda roots: roots["entries"][slot].update({"reads": []}),
    )
    world.lose_log()
    await restored(world, forged, "rita")
    entry = world.replica().entry(slot)
    assert entry is not None
    assert (entry.state, entry.reads) == (State.STREAMING, None)


async def test_a_reply_that_a_node_had_to_give_up_comes_back() -> None:
    """Its chunks stay as they are; who gives it up cannot open them."""
    world = await a_world()
    node, slot = world.node, world.streaming
    node.catch_up()
    entry = node.replica.entry(slot)
    assert entry is not None
    assert entry.place is not None
    assert len(entry.sealed) > 1
    with node.replica.writing() as writer:
        writer.state(slot, State.FAILED)
        writer.usage(slot, Usage(finish="error", error_code="unreadable", error_message="m"))
        node._prove(writer, slot, entry.place.parent, state=State.FAILED)
    await node.submit(writer.change)
    before = world.replica()
    forger = Forger(world.document(), world)
    swap(forger.entries[slot]["sealed"], 1, emptied(forger.entries[slot]["sealed"][1]))
    world.lose_log()
    with pytest.raises(Refused):
        await restored(world, forger.doc.get_update())
    await restored(world, before.diff(), "rita")
    assert world.replica().entry(slot) == before.entry(slot)


# -- what the register decides ------------------------------------------------------------------


async def test_what_was_withdrawn_stays_so_and_never_reaches_the_log() -> None:
    world = await a_world()
    await world.owner.membership.submit(world.device.say(WORDS))
    secret = world.device.replica.view()[-1]
    old = world.document()
    with world.device.replica.writing() as writer:
        writer.redact(secret, "owner", 12)
    assert writer.change is not None
    await world.owner.membership.submit(writer.change.update)
    withdrawn = world.document()
    assert WORDS.encode() in old
    world.lose_log()
    member = await restored(world, old)
    stored = world.place.disk.conversations[CONVERSATION]
    assert WORDS.encode() not in b"".join(stored.updates)
    replica = world.replica()
    assert replica.is_redacted(secret)
    assert replica.text(secret) == ""
    assert replica.plain(secret, "redacted") == {"by": "owner", "at": 12}
    # Whoever brought it hears that it was withdrawn.
    theirs = Conversation(5, update=old)
    for update in member.heard:
        theirs.apply(update)
    assert theirs.text(secret) == ""
    await restored(world, withdrawn, "will")
    assert WORDS.encode() not in b"".join(world.place.disk.conversations[CONVERSATION].updates)
    assert world.replica().is_redacted(secret)


async def test_rights_come_from_the_register() -> None:
    world = await a_world()
    old = world.document()
    await world.owner.membership.submit(world.device.grant("will", None))
    await world.owner.membership.submit(world.device.grant("stan", Grant.READER))
    world.lose_log()
    with pytest.raises(Forbidden):
        await world.place.join("will")
    await world.place.join("stan")
    member = await restored(world, old)
    assert dict(world.replica().access()) == {"rita": "reader", "stan": "reader"}
    with pytest.raises(Forbidden):
        await world.place.join("will")
    theirs = Conversation(5, update=old)
    for update in member.heard:
        theirs.apply(update)
    assert dict(theirs.access()) == {"rita": "reader", "stan": "reader"}


async def test_a_room_without_what_was_admitted_is_behind() -> None:
    world = await a_world()
    old = world.document()
    await world.node.finish(world.streaming)
    await world.catch_up()
    new = world.document()
    world.lose_log()
    member = await restored(world, old)
    assert world.room.behind == (world.streaming,)
    with pytest.raises(Behind):
        await world.room.grant_epoch(world.node.key.public)
    own = Device(Random(5))
    own.merge(world.document())
    await member.membership.submit(own.say("it can be read and written"))
    await restored(world, new, "will")
    assert world.room.behind == ()
    assert await world.room.grant_epoch(world.node.key.public) == 2
    assert world.replica().state(world.streaming) is State.DONE


async def test_an_older_copy_of_the_same_log_is_a_loss_too() -> None:
    world = await a_world()
    stored = world.place.disk.conversations[CONVERSATION]
    await world.node.finish(world.streaming)
    new = world.document()
    world.place.disk.conversations[CONVERSATION] = stored
    world.place.open_hub(seed=2)
    member = await world.place.join()
    assert world.room.behind == (world.streaming,)
    await member.membership.submit(new, restore=True)
    assert world.room.behind == ()


async def test_anothers_pending_entry_waits_for_its_author() -> None:
    world = await a_world()
    await world.node.finish(world.streaming)
    will = await world.place.join("will")
    his = Device(Random(21), "will")
    his.merge(will.membership.state)
    await will.membership.submit(his.say("from will"))
    pending = his.replica.view()[-1]
    document = world.document()
    world.lose_log()
    await restored(world, document)
    node = await LeasedNode.sit(world.place, seed=4)
    with pytest.raises(Refused) as refused:
        await node.admit(pending)
    assert refused.value.code == "unconfirmed"
    assert dict(world.place.rows[CONVERSATION].unconfirmed) == {pending: "will"}

    await world.place.hub.close()
    world.place.open_hub(seed=5)  # it outlives the process
    node = await LeasedNode.sit(world.place, seed=4)
    with pytest.raises(Refused):
        await node.admit(pending)

    peer = await will_connects(world, his)
    assert peer.close_code is None
    assert dict(world.place.rows[CONVERSATION].unconfirmed) == {}
    node = LeasedNode(await world.place.join("node", node=True), seed=4)
    await node.take_lease(world.place)
    await node.admit(pending)


async def test_a_native_client_confirms_what_somebody_else_brought_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(PASSES, "will", Pass("will"))
    world = await a_world()
    await world.node.finish(world.streaming)
    will = await world.place.join("will")
    his = Device(Random(21), "will")
    his.merge(will.membership.state)
    await will.membership.submit(his.say("from will"))
    document, clients = world.document(), {his.replica.client_id}
    world.lose_log()
    await restored(world, document)
    assert set(world.place.rows[CONVERSATION].unconfirmed.values()) == {"will"}
    native = Native(world.place, "will")
    await native.greet()
    known = his.replica.state_vector()
    await native.send(open_frame(log="the lost log", lsn=9, state_vector=known))
    await turns(50)
    native.down()
    vector = native.of(Opened)[0].state_vector
    clocks = decode_state_vector(known)
    lacks = {
        one for one, clock in clocks.items() if decode_state_vector(vector).get(one, 0) < clock
    }
    assert lacks == clients
    await native.send(Restore(1, 1, his.replica.diff(vector)))
    await turns(50)
    native.down()
    assert native.of(Ack)
    assert dict(world.place.rows[CONVERSATION].unconfirmed) == {}


async def test_a_pending_entry_that_somebody_made_up_is_never_confirmed() -> None:
    world = await a_world()
    await world.node.finish(world.streaming)
    will = await world.place.join("will")
    his = Device(Random(21), "will")
    his.merge(will.membership.state)
    await will.membership.submit(his.entitle("by will"))
    impostor = Device(Random(22), "will")
    impostor.replica = Conversation(his.replica.client_id, update=world.document())
    impostor.say("what will never said")
    forged = impostor.replica.view()[-1]
    world.lose_log()
    await restored(world, impostor.replica.diff())
    await will_connects(world, his)
    assert dict(world.place.rows[CONVERSATION].unconfirmed) == {forged: "will"}


# -- whose words they are ------------------------------------------------------------------------


@dataclass
class Asked:
    """What will said last, which waits for a place, and who will's device is."""

    world: World
    his: Device
    pending: str
    document: bytes

    async def his_device_comes(self) -> None:
        """With a plain connection, which the relay asks for what it lacks."""
        peer = await will_connects(self.world, self.his)
        peer.leave()

    @property
    def waiting(self) -> dict[str, str]:
        return dict(self.world.place.rows[CONVERSATION].unconfirmed)


async def will_asked() -> Asked:
    world = await a_world()
    await world.node.finish(world.streaming)
    will = await world.place.join("will")
    his = Device(Random(21), "will")
    his.merge(will.membership.state)
    await will.membership.submit(his.say("pay 10"))
    return Asked(world, his, his.replica.view()[-1], world.document())


def written_over(asked: Asked, client: int, key: str, value: Any) -> bytes:
    doc: Doc[Any] = Doc(client_id=client)
    entries = doc.get("entries", type=Map)
    doc.apply_update(asked.document)
    entries[asked.pending][key] = value
    return bytes(doc.get_update())


@pytest.mark.parametrize("bringer", ["rita", "owner", "will"])
@pytest.mark.parametrize("key", ["content", "born"])
async def test_a_restore_does_not_write_over_pending_words(bringer: str, key: str) -> None:
    asked = await will_asked()
    value: Any = "pay 1000"
    if key == "born":
        value = {**asked.his.replica.born_plain(asked.pending), "at": 7}
    forged = written_over(asked, 4_000_000_000, key, value)
    asked.world.lose_log()
    with pytest.raises(Refused) as refused:
        await restored(asked.world, forged, bringer)
    assert refused.value.code == "frozen"
    assert asked.world.place.durable == 0


async def test_words_written_over_in_an_entry_that_is_back_are_refused_too() -> None:
    asked = await will_asked()
    forged = written_over(asked, 4_000_000_000, "content", "pay 1000")
    asked.world.lose_log()
    await restored(asked.world, asked.document)
    with pytest.raises(Refused) as refused:
        await restored(asked.world, forged, "rita")
    assert refused.value.code == "frozen"
    assert asked.world.replica().text(asked.pending) == "pay 10"


async def test_words_written_over_under_the_authors_client_id_are_not_confirmed() -> None:
    asked = await will_asked()
    forged = written_over(asked, asked.his.replica.client_id, "content", "pay 1000")
    asked.world.lose_log()
    await restored(asked.world, forged, "rita")
    await asked.his_device_comes()
    assert asked.waiting == {asked.pending: "will"}


async def test_an_entry_in_anothers_name_is_not_confirmed_by_hearing_of_it() -> None:
    asked = await will_asked()
    impostor = Device(Random(33), "will")
    impostor.merge(asked.document)
    impostor.say("what will never said")
    forged = impostor.replica.view()[-1]
    rows = asked.world.place.rows
    # A row that was made of a log does not know whose all client ids are.
    rows[CONVERSATION] = replace(rows[CONVERSATION], former={"": (b"",)})
    asked.world.lose_log()
    await restored(asked.world, impostor.replica.diff(), "rita")
    await asked.his_device_comes()
    asked.his.merge(asked.world.room.diff(asked.his.replica.state_vector()))
    await asked.his_device_comes()  # what it heard it sends back, as every replica does
    assert asked.waiting == {forged: "will"}


async def test_who_lost_the_right_to_write_confirms_nothing() -> None:
    asked = await will_asked()
    await asked.world.owner.membership.submit(asked.world.device.grant("will", Grant.READER))
    asked.world.lose_log()
    await restored(asked.world, asked.document)
    await asked.his_device_comes()
    assert asked.waiting == {asked.pending: "will"}


# -- who may only read ---------------------------------------------------------------------------


async def test_a_reader_brings_no_words_of_its_own() -> None:
    world = await a_world()
    rita = Device(Random(99), "rita")
    rita.merge(world.document())
    world.lose_log()
    rita.say("words of a reader")
    with pytest.raises(Forbidden):
        await restored(world, rita.replica.diff(), "rita")
    assert world.place.durable == 0


async def test_a_token_for_reading_brings_no_words_of_an_owner() -> None:
    world = await a_world()
    own = Device(Random(99))
    own.merge(world.document())
    world.lose_log()
    own.say("with a token that may not")
    peer = RemotePeer("owner", lambda: None, cap=Grant.READER)
    await world.place.hub.enter(CONVERSATION, peer)
    await peer.receive(encode(SyncStep2(own.replica.diff())))
    await turns(50)
    assert peer.close_code is not None
    assert world.place.durable == 0


async def test_a_reader_gives_the_conversation_no_facts_of_its_own() -> None:
    world = await a_world()
    await world.owner.membership.submit(world.device.entitle("by the owner"))
    true = world.document()
    rita = Device(Random(99), "rita")
    rita.merge(true)
    with rita.replica.writing() as writer:
        writer.set_meta("title", "by a reader")
        writer.set_meta("policy", {"reply": "auto"})
    world.lose_log()
    member = await restored(world, rita.replica.diff(), "rita")
    # What was there before cannot be told from a forged one, so it stays away...
    assert world.replica().meta_plain().keys() == {"schema", "birth"}
    for update in member.heard:
        rita.merge(update)
    assert "policy" not in rita.replica.meta_plain()
    world.lose_log("a third log")
    await restored(world, true, "rita")  # ...and is taken from a reader who left it as it was
    assert world.replica().meta.title == "by the owner"
    await restored(world, rita.replica.diff(), "rita")
    assert world.replica().meta.title == "by the owner"


async def test_nobody_brings_a_stop_in_anothers_name() -> None:
    world = await a_world()
    for bringer in ("rita", "will"):
        forger = Device(Random(99), bringer)
        forger.merge(world.document())
        with forger.replica.writing() as writer:
            writer.stop(world.streaming, "owner")
        world.lose_log(f"the log of {bringer}")
        with pytest.raises(Refused) as refused:
            await restored(world, forger.replica.diff(), bringer)
        assert refused.value.code == "stop"
        world.lose_log(f"the next log of {bringer}")
        await restored(world, world.device.replica.diff())


async def test_a_stop_that_was_known_comes_back_with_anybody() -> None:
    world = await a_world()
    with world.device.replica.writing() as writer:
        writer.stop(world.streaming, "owner")
    assert writer.change is not None
    await world.owner.membership.submit(writer.change.update)
    document = world.document()
    world.lose_log()
    await restored(world, document, "rita")
    assert world.replica().plain(world.streaming, "stop") == "owner"


async def test_a_writer_brings_its_own_stop_and_anybody_brings_it_again() -> None:
    world = await a_world()
    will = Device(Random(99), "will")
    will.merge(world.document())
    with will.replica.writing() as writer:
        writer.stop(world.streaming, "will")
    world.lose_log()
    await restored(world, will.replica.diff(), "will")
    document = world.document()
    world.lose_log("a third log")
    await restored(world, document, "rita")
    assert world.replica().plain(world.streaming, "stop") == "will"


async def test_only_a_node_that_was_known_ended_a_request_without_a_place() -> None:
    world = await a_world()
    _, slot = await ask(world.device, world.owner, "more?")
    forger = Device(Random(99), "will")
    forger.merge(world.document())
    with forger.replica.writing() as writer:
        writer.state(slot, State.FAILED)
    world.node.catch_up()
    with world.node.replica.writing() as writer:
        writer.state(slot, State.SUPERSEDED)
    await world.node.submit(writer.change)
    document = world.document()
    world.lose_log()
    with pytest.raises(Refused) as refused:
        await restored(world, forger.replica.diff(), "will")
    assert refused.value.code == "node-field"
    await restored(world, document, "rita")
    assert world.replica().state(slot) is State.SUPERSEDED


# -- what the register has of facts, stops and ends ----------------------------------------------


def forged_under(client: int, document: bytes, write: Callable[[Any], object]) -> bytes:
    """A document with something in it that was written under a client id of somebody else."""
    doc: Doc[Any] = Doc(client_id=client)
    meta, entries = doc.get("meta", type=Map), doc.get("entries", type=Map)
    doc.apply_update(document)
    with doc.transaction():
        write({"meta": meta, "entries": entries})
    return bytes(doc.get_update())


@dataclass
class Ends:
    """A conversation with all that a row has of facts, and what came just before the last of it.

    The owner has named it and stopped its reply, a node has ended a request; another one waits.
    """

    world: World
    before: bytes
    waiting: str
    superseded: str

    @classmethod
    async def make(cls, last: str) -> Ends:
        world = await a_world()
        await world.owner.membership.submit(world.device.entitle("an old name"))
        _, superseded = await ask(world.device, world.owner, "more?")
        _, waiting = await ask(world.device, world.owner, "and more?")
        writes = {"title": cls._name, "stop": cls._stop, "end": cls._end}
        ends = cls(world, b"", waiting, superseded)
        for what in sorted(writes, key=lambda what: what == last):
            ends.before = world.document()
            await writes[what](ends)
        await world.catch_up()
        return ends

    async def _name(self) -> None:
        await self.world.owner.membership.submit(self.world.device.entitle("its name"))

    async def _stop(self) -> None:
        with self.world.device.replica.writing() as writer:
            writer.stop(self.world.streaming, "owner")
        assert writer.change is not None
        await self.world.owner.membership.submit(writer.change.update)

    async def _end(self) -> None:
        node = self.world.node
        node.catch_up()
        with node.replica.writing() as writer:
            writer.state(self.superseded, State.FAILED)
            writer.usage(self.superseded, Usage(finish="error", error_code="c", error_message="m"))
        await node.submit(writer.change)

    def client(self, what: str) -> int:
        node, device = self.world.node.replica, self.world.device.replica
        return node.client_id if what == "end" else device.client_id

    def forge(self, roots: Any, what: str) -> None:
        slot = roots["entries"][self.waiting]
        if what == "title":
            roots["meta"]["title"] = "forged"
        elif what == "stop":
            slot["stop"] = "owner"
        else:
            slot["state"] = "failed"
            slot["usage"] = FORGED_COST

    def check(self, replica: Conversation) -> None:
        """All is as it was registered, and nothing else."""
        assert replica.meta.title == "its name"
        assert replica.plain(self.world.streaming, "stop") == "owner"
        assert replica.state(self.superseded) is State.FAILED
        self.check_nothing_forged(replica)

    def check_nothing_forged(self, replica: Conversation) -> None:
        assert replica.meta.title in {"", "its name"}
        for key in ("stop", "state", "usage"):
            assert not replica.has(self.waiting, key)
        usage = replica.plain(self.superseded, "usage")
        assert usage is None or usage["error"]["message"] == "m"


@pytest.mark.parametrize(
    ("what", "instead"),
    [
        ("title", None),
        ("title", "title"),
        ("title", "stop"),
        ("stop", None),
        ("stop", "stop"),
        ("stop", "title"),
        ("end", None),
        ("end", "end"),
    ],
)
async def test_a_reader_forges_nothing_under_a_known_client_id(
    what: str, instead: str | None
) -> None:
    """Past the end of what was written under it, or within it, in the place of what is true."""
    ends = await Ends.make(instead or "title")
    world = ends.world
    true = world.document()
    base = true if instead is None else ends.before
    forged = forged_under(ends.client(what), base, lambda roots: ends.forge(roots, what))
    for bringer in ("rita", "will"):
        world.lose_log(f"a log for {bringer}")
        with pytest.raises(Refused) as refused:
            await restored(world, forged, bringer)
        assert refused.value.code == {"title": "meta", "end": "node-field"}.get(what, what)
        assert world.place.durable == 0
    # Nothing of it is in the way of what is true.
    owner = await restored(world, true)
    ends.check(world.replica())
    world.device.merge(world.document())
    ends.check(world.device.replica)
    await owner.membership.submit(world.device.say("it goes on"))


@pytest.mark.parametrize(
    ("what", "instead"),
    [("title", None), ("title", "title"), ("stop", None), ("end", None), ("end", "end")],
)
async def test_what_may_be_older_than_the_row_is_left_out(what: str, instead: str | None) -> None:
    """A row that was made of a log does not know what there was before."""
    ends = await Ends.make(instead or "title")
    world = ends.world
    true, row = world.document(), world.place.rows[CONVERSATION]
    world.place.rows[CONVERSATION] = row = replace(row, former={"": (b"",)})
    base = true if instead is None else ends.before
    forged = forged_under(ends.client(what), base, lambda roots: ends.forge(roots, what))
    world.lose_log()
    rita = await restored(world, forged, "rita")
    ends.check_nothing_forged(world.replica())
    found = world.place.rows[CONVERSATION]
    assert (found.facts, found.stops, found.ends) == (row.facts, row.stops, row.ends)
    # Who brought it hears of that, as whoever is there.
    theirs = Conversation(5, update=forged)
    for update in rita.heard:
        theirs.apply(update)
    ends.check_nothing_forged(theirs)
    await restored(world, true)  # what was lost to a forgery is told again
    ends.check(world.replica())
    world.device.merge(world.document())
    ends.check(world.device.replica)


@pytest.mark.parametrize("bringer", ["rita", "will", "owner"])
async def test_what_is_registered_comes_back_with_anybody(bringer: str) -> None:
    ends = await Ends.make("stop")
    before = ends.world.replica()
    ends.world.lose_log()
    await restored(ends.world, before.diff(), bringer)
    after = ends.world.replica()
    ends.check(after)
    assert after.state_vector() == before.state_vector()  # nothing was written to put it right
    usage = after.plain(ends.superseded, "usage")
    assert usage["error"]["message"] == "m"


async def test_a_replica_that_is_older_takes_nothing_from_what_is_registered() -> None:
    ends = await Ends.make("title")
    world, true, older = ends.world, ends.world.document(), ends.before
    assert Conversation(5, update=older).meta.title == "an old name"
    world.lose_log()
    await restored(world, older, "rita")
    assert world.replica().meta.title == ""  # a digest has no value that could be put back
    await restored(world, true, "rita")
    ends.check(world.replica())
    world.lose_log("a third log")
    await restored(world, older, "owner")
    assert world.replica().meta.title == "an old name"  # its own, as it stands there
    await restored(world, true, "will")
    ends.check(world.replica())


async def test_stops_and_ends_are_put_back_where_a_replica_is_older() -> None:
    ends = await Ends.make("title")
    world = ends.world
    older = Conversation(5, update=ends.before)
    with older.writing() as writer:
        writer.remove(world.streaming, "stop")
        writer.remove(ends.superseded, "state")
        writer.remove(ends.superseded, "usage")
    world.lose_log()
    await restored(world, older.diff(), "rita")
    assert world.replica().plain(world.streaming, "stop") == "owner"
    assert world.replica().state(ends.superseded) is State.FAILED
    document = world.document()
    world.lose_log("a third log")  # what a room has put back comes again with anybody
    await restored(world, document, "rita")
    assert world.replica().plain(world.streaming, "stop") == "owner"
    assert world.replica().state(ends.superseded) is State.FAILED


async def test_a_cost_that_is_not_the_registered_one_does_not_count() -> None:
    ends = await Ends.make("title")
    world, slot = ends.world, ends.superseded

    def rewrite(roots: Any) -> None:
        roots["entries"][slot]["usage"] = FORGED_COST

    true = world.document()
    forged = forged_under(ends.client("end"), true, rewrite)
    world.lose_log()
    with pytest.raises(Refused) as refused:
        await restored(world, forged, "rita")
    assert refused.value.code == "node-field"
    row = world.place.rows[CONVERSATION]
    world.place.rows[CONVERSATION] = replace(row, former={"": (b"",)})
    world.lose_log("a third log")
    await restored(world, forged, "rita")
    assert not world.replica().has(slot, "usage")
    assert world.replica().state(slot) is State.FAILED
    assert world.place.rows[CONVERSATION].ends == row.ends


async def test_a_writer_forges_nothing_in_anothers_name_and_brings_its_own() -> None:
    ends = await Ends.make("title")
    world = ends.world

    def forge(roots: Any) -> None:
        roots["meta"]["title"] = "forged"
        roots["entries"][ends.waiting]["stop"] = "owner"

    forged = forged_under(ends.client("title"), world.document(), forge)
    will = Device(Random(99), "will")
    will.merge(world.document())
    with will.replica.writing() as writer:
        writer.set_meta("model", "as will says")
        writer.stop(ends.waiting, "will")
    world.lose_log()
    with pytest.raises(Refused):
        await restored(world, forged, "will")
    await restored(world, will.replica.diff(), "will")
    assert world.replica().meta.model == "as will says"
    assert world.replica().plain(ends.waiting, "stop") == "will"
    assert world.place.rows[CONVERSATION].stops[ends.waiting] == ("will",)


async def lagging(ends: Ends) -> bytes:
    """A document of which the register does not have the last change: it was killed in between."""
    world = ends.world
    kept = world.place.rows[CONVERSATION]
    world.place.register_failing = "register-before-commit"
    with world.device.replica.writing() as writer:
        writer.set_meta("title", "a newer name")
        writer.stop(ends.waiting, "owner")
    assert writer.change is not None
    with pytest.raises(StoreFailed):
        await world.owner.membership.submit(writer.change.update)
    world.place.register_failing = None
    assert world.place.rows[CONVERSATION] is kept
    return world.device.replica.diff()


async def test_a_row_that_lags_behind_refuses_no_honest_restore() -> None:
    """Nobody but its author has what was not registered: it was never handed out."""
    ends = await Ends.make("title")
    newest = await lagging(ends)
    world = ends.world
    world.lose_log()
    await restored(world, ends.before, "will")  # as far as he ever heard
    with pytest.raises(Refused):
        await restored(world, newest, "will")  # he cannot have it
    await restored(world, newest)
    assert world.replica().meta.title == "a newer name"
    assert world.replica().plain(ends.waiting, "stop") == "owner"
    row = world.place.rows[CONVERSATION]
    assert row.stops == {world.streaming: ("owner",), ends.waiting: ("owner",)}
    assert ledger.missing_facts(row, world.replica()) == {}


async def test_a_row_that_lags_behind_follows_a_log_that_is_there() -> None:
    ends = await Ends.make("title")
    await lagging(ends)
    world = ends.world
    world.place.open_hub(seed=2)
    await world.place.join()
    row = world.place.rows[CONVERSATION]
    assert row.stops == {world.streaming: ("owner",), ends.waiting: ("owner",)}
    assert ledger.missing_facts(row, world.replica()) == {}


async def test_a_restore_that_the_register_did_not_hear_of_comes_again() -> None:
    ends = await Ends.make("title")
    world, true = ends.world, ends.world.document()
    for seam in ("register-before-commit", "register-after-commit"):
        world.lose_log(f"a log for {seam}")
        member = await world.place.join("rita")
        world.place.register_failing = seam
        with pytest.raises(StoreFailed):
            await member.membership.submit(ends.before, restore=True)
        world.place.register_failing = None
        world.place.open_hub(seed=5)
        ends.check_nothing_forged(await _loaded(world))
        await restored(world, true)
        ends.check(world.replica())


async def _loaded(world: World) -> Conversation:
    await world.place.join()
    return world.replica()


async def test_a_row_from_before_facts_were_kept_believes_client_ids() -> None:
    ends = await Ends.make("title")
    world, true = ends.world, ends.world.document()
    forged = forged_under(ends.client("title"), true, lambda roots: ends.forge(roots, "title"))
    row = world.place.rows[CONVERSATION]
    old = replace(row, facts=None, stops={}, ends={})
    world.place.rows[CONVERSATION] = Row.decode(CONVERSATION, old.encode(), scrub_owed=False)
    world.lose_log()
    await restored(world, true, "rita")
    ends.check(world.replica())
    assert world.place.rows[CONVERSATION].facts is None
    world.lose_log("a third log")
    await restored(world, forged, "rita")
    assert world.replica().meta.title == "forged"
    # A room that finds its log whole knows them from then on.
    world.lose_log("a fourth log")
    await restored(world, true)
    await LeasedNode.sit(world.place, seed=3)
    await world.place.hub.close()
    world.place.open_hub(seed=4)
    await world.place.join()
    found = world.place.rows[CONVERSATION]
    assert (found.facts, found.stops, found.ends) == (row.facts, row.stops, row.ends)


async def test_what_came_with_a_restore_can_be_brought_back_again_and_confirmed() -> None:
    world = await a_world()
    his = Device(Random(41), "will")
    his.merge(world.document())
    his.say("offline")
    pending = his.replica.view()[-1]
    world.lose_log()
    await restored(world, his.replica.diff(), "will")
    document = world.document()
    world.lose_log("a third log")
    await restored(world, document)
    asked = Asked(world, his, pending, document)
    assert asked.waiting == {pending: "will"}
    await asked.his_device_comes()
    assert asked.waiting == {}


# -- without the register -----------------------------------------------------------------------


async def test_without_a_row_an_operator_may_vouch_for_it() -> None:
    world = await a_world()
    before = world.replica()
    world.place.rows.clear()
    world.lose_log()
    assert await world.place.hub.import_trusted(CONVERSATION, before.diff()) == ()
    assert world.replica().view() == before.view()
    row = world.place.rows[CONVERSATION]
    assert (row.owner, dict(row.access)) == ("owner", dict(before.access()))
    assert row.tips == ledger.leaves(before)
    node = await LeasedNode.sit(world.place, seed=9)
    assert node.epoch == 2
    assert all(one.problem is None for one in verify_path(before, before.view(), RELAY_KEY.public))


async def test_an_import_says_what_it_could_not_verify() -> None:
    world = await a_world()
    forger = Forger(world.document(), world)
    grow(forger, world.done, " Not.")
    forger.roots["leases"]["1"] = forger.lease(world.node.key, STRANGER)
    world.place.rows.clear()
    world.lose_log()
    doubts = await world.place.hub.import_trusted(CONVERSATION, forger.doc.get_update())
    assert any("lease of epoch 1" in line for line in doubts)
    assert any(world.done in line for line in doubts)
    assert all("\n" not in line for line in doubts)
    assert world.replica().text(world.done) == "Because. Not."


async def test_an_import_of_what_the_register_knows_is_believed_no_more_than_any() -> None:
    world = await a_world()
    forger = Forger(world.document(), world)
    grow(forger, world.done, " Not.")
    with pytest.raises(Refused):
        await world.place.hub.import_trusted(CONVERSATION, forger.doc.get_update())


async def test_an_import_after_a_loss_believes_nothing_either_that_the_register_knows() -> None:
    world = await a_world()
    forger = Forger(world.document(), world)
    grow(forger, world.done, " Not.")
    world.lose_log()
    with pytest.raises(Refused):
        await world.place.hub.import_trusted(CONVERSATION, forger.doc.get_update())
    assert world.place.durable == 0


async def test_what_was_imported_can_be_brought_back_by_anybody() -> None:
    asked = await will_asked()
    world = asked.world
    world.place.rows.clear()
    world.lose_log()
    await world.place.hub.import_trusted(CONVERSATION, asked.document)
    world.lose_log("a third log")
    await restored(world, asked.document, "rita")
    assert asked.waiting == {asked.pending: "will"}
    await asked.his_device_comes()
    assert asked.waiting == {}


async def test_an_import_is_of_that_conversation() -> None:
    world = await a_world()
    document = world.document()
    other = conversation_id(Birth(BIRTH.owner, b"m" * 16))
    with pytest.raises((Refused, Gap)):
        await world.place.hub.import_trusted(other, document)


# -- in any order -------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
async def test_replicas_of_any_age_in_any_order_give_the_newest_back(seed: int) -> None:
    random = Random(seed)
    world = await a_world()
    ages = [world.document()]
    for words in ("we ", "stay ", "in."):
        await world.node.say(world.streaming, words)
        ages.append(world.document())
    await world.node.finish(world.streaming)
    ages.append(world.document())
    await world.catch_up()
    question, _ = await ask(world.device, world.owner, "sure?")
    ages.append(world.document())
    await world.node.admit(question)
    newest = world.replica()
    ages.append(newest.diff())
    world.lose_log()
    brought = [*random.sample(ages[:-1], 3), ages[-1]]
    random.shuffle(brought)
    for update in brought:
        await restored(world, update, random.choice(["owner", "will", "rita"]))
    replica = world.replica()
    assert replica.view() == newest.view()
    assert replica.state_vector() == newest.state_vector()
    assert world.room.behind == ()


# -- behind for good ------------------------------------------------------------------------------


def collected(document: bytes, clients: set[int]) -> bytes:
    """The same document, with all that some clients wrote as if it had been collected."""
    structure = read_update(document, HELD_LIMITS)
    structs: list[Struct] = []
    for client, items in structure.structs.items():
        end = items[-1].end
        nothing = Struct(Kind.GC, client, 0, end, None, None, None, None, None)
        structs += [nothing] if client in clients else items
    return update_bytes(structs)


async def behind_for_good() -> tuple[World, bytes]:
    """A reader has brought back structs that say nothing, at the clocks of what a node wrote."""
    world = await a_world()
    await world.node.finish(world.streaming)
    true = world.document()
    row = world.place.rows[CONVERSATION]
    nodes = {client for client, whose in row.clients.items() if ledger.are_of_a_node(whose)}
    world.lose_log()
    await restored(world, collected(true, nodes), "rita")
    owner = await restored(world, true)
    assert world.room.behind == (world.streaming,)  # known clocks, so nothing of it came in
    own = Device(Random(5))
    own.merge(world.document())
    await owner.membership.submit(own.say("written meanwhile"))
    return world, true


def replacing(world: World, update: bytes) -> Any:
    place = world.place
    return replace_stored(
        CONVERSATION,
        update,
        log=place.hub._log,
        register=place.hub._register,
        relay_key=RELAY_KEY.public,
    )


async def test_an_operator_puts_a_true_replica_in_the_place_of_one_that_says_nothing() -> None:
    world, true = await behind_for_good()
    later = set(world.replica().tree.entries)
    await world.place.hub.close()
    world.place.open_hub(seed=7)
    dropped = await replacing(world, true)
    before = Conversation(1, update=true)
    assert set(dropped) == later - set(before.tree.entries)
    assert dropped
    node = LeasedNode(await world.place.join("node", node=True))
    assert world.replica().view() == before.view()
    assert world.replica().entry(world.streaming) == before.entry(world.streaming)
    assert world.room.behind == ()
    await node.take_lease(world.place)


async def test_nothing_is_replaced_that_lacks_nothing_or_by_what_does_not_prove_itself() -> None:
    world, true = await behind_for_good()
    await world.place.hub.close()
    world.place.open_hub(seed=7)
    stored = world.place.disk.conversations[CONVERSATION]
    forger = Forger(true, world)
    grow(forger, world.done, " Not.")
    with pytest.raises(Refused):
        await replacing(world, forger.doc.get_update())
    half = Conversation(1, update=true)
    nothing = collected(true, set(decode_state_vector(half.state_vector())) - {half.client_id})
    with pytest.raises((Behind, Gap)):
        await replacing(world, nothing)
    assert world.place.disk.conversations[CONVERSATION] == stored
    await replacing(world, true)
    with pytest.raises(LocalMisuse):
        await replacing(world, true)
