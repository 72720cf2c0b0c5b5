from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING, Any

import pytest
from hostile_updates import KINDS, a_world
from hypothesis import event, example, given, settings
from hypothesis import strategies as st
from sync.update_writer import update_bytes

from crdt_llm.document import rules
from crdt_llm.document.conversation import Conversation
from crdt_llm.document.schema import Born, Role, State, entry_id
from crdt_llm.errors import MalformedMessage, Refused
from crdt_llm.sync.room import judge
from crdt_llm.sync.room.look import glance_at, look_at
from crdt_llm.sync.update.growth import GROWTH_BYTES_MAX, read_growth
from crdt_llm.sync.update.structure import TRANSACTION_LIMITS, Id, Kind, Struct, read_update
from crdt_llm.sync.wire.y_websocket import CLOCK_MAX, decode_state_vector

if TYPE_CHECKING:
    from collections.abc import Mapping

SLOT = entry_id(1, b"\xab" * 10)
KNOWN = {1: 7, 300: 2**20, 2**31: 5, 2**32 - 1: CLOCK_MAX - 1, 9: 0}


def the_whole_says(update: bytes, known: Mapping[int, int]) -> Any:
    """What is found without a glance, whoever sent it: growth is no matter of who."""
    looks: list[Any] = []
    for node in (True, False):
        try:
            looks.append(look_at(update, TRANSACTION_LIMITS, known, node=node))
        except (Refused, MalformedMessage) as error:
            looks.append(error)
    return looks


def check_glance(update: bytes, known: Mapping[int, int]) -> bool:
    """A glance finds what the whole reading finds, or says nothing; whether it found something."""
    look = glance_at(update, known)
    if look is not None:
        assert the_whole_says(update, known) == [look, look]
        assert look.structure == read_update(update)
    return look is not None


# ------------------------------------------------------------- what is recognised, and what is not


def replies() -> tuple[Conversation, Conversation]:
    """A node's replica with an open reply that has begun, and a relay's."""
    node, relay = Conversation(70_000, seal_client_id=2**32 - 5), Conversation(5)
    with node.writing() as writer:
        writer.add(SLOT, Born(Role.ASSISTANT, "olga", "phone", 1, 1))
        writer.state(SLOT, State.STREAMING)
        writer.open_reply(SLOT)
        writer.append_text(SLOT, "So")
        writer.append_sealed(SLOT, b"0")
    relay.apply(node.diff())
    return node, relay


@pytest.mark.parametrize("words", [" on", "é", "🦜 flies", "x" * 5000, None])
@pytest.mark.parametrize("blob", [b"1", b"", b"\x00" * 300, None])
def test_what_a_node_writes_for_a_token_is_known_at_a_glance(
    words: str | None, blob: bytes | None
) -> None:
    if words is None and blob is None:
        return
    node, relay = replies()
    for _ in range(3):
        with node.writing() as writer:
            if words is not None:
                writer.append_text(SLOT, words)
            if blob is not None:
                writer.append_sealed(SLOT, blob)
        assert writer.change is not None
        update = writer.change.update
        assert check_glance(update, decode_state_vector(relay.state_vector()))
        relay.apply(update)
        assert not check_glance(update, decode_state_vector(relay.state_vector()))  # known by now
    assert relay.text(SLOT) == node.text(SLOT)


def test_words_behind_another_writers_last_one_are_known_too() -> None:
    node, relay = replies()
    successor = Conversation(70_001, seal_client_id=2**32 - 6, update=node.diff())
    found = []
    for _ in range(2):
        with successor.writing() as writer:
            writer.append_text(SLOT, "!")
        assert writer.change is not None
        found.append(check_glance(writer.change.update, decode_state_vector(relay.state_vector())))
        relay.apply(writer.change.update)
    assert found == [False, True]  # who is new here is looked at properly, once


LAST = Id(1, 6)


def text(client: int = 1, clock: int = 7, words: str = "x", origin: Id | None = LAST) -> Struct:
    length = len(words.encode("utf-16-le")) // 2
    parent = "meta" if origin is None else None
    return Struct(Kind.STRING, client, clock, length, origin, None, parent, None, words)


@pytest.mark.parametrize(
    "structs",
    [
        [text(clock=8)],  # a gap
        [text(clock=6)],  # in part known
        [text(client=2, clock=0)],  # a new client
        [text(origin=Id(300, 2**20))],  # behind what is not known
        [text(origin=Id(3, 0))],
        [text(origin=Id(2**31, 5)), text(2**31, 5, origin=Id(2**31, 4))],  # beside its own other
        [text(origin=None)],
        [text()._replace(right_origin=Id(1, 6))],
        [text(), text(clock=8, origin=Id(1, 7))],
        [text(2**32 - 1, CLOCK_MAX - 1, "xyz")],
        [text()._replace(kind=Kind.ANY, content=("words",))],
        [text()._replace(kind=Kind.ANY, content=(b"1", b"2"), length=2)],
        [text()._replace(kind=Kind.ANY, content=(), length=0)],
        [text()._replace(kind=Kind.EMBED, content=(1,))],
        [text()._replace(kind=Kind.DELETED, content=None)],
        [text(words="")],
        [text(), text(300, 2**20), text(2**31, 5)],
        [],
    ],
)
def test_all_else_is_left_to_the_whole_reading(structs: list[Struct]) -> None:
    assert read_growth(update_bytes(structs), KNOWN) is None


def test_so_is_what_deletes_something_and_what_is_long() -> None:
    assert read_growth(update_bytes([text()]), KNOWN) is not None
    assert read_growth(update_bytes([text()], {1: [range(3, 4)]}), KNOWN) is None
    assert read_growth(update_bytes([text()]) + b"\x00", KNOWN) is None
    assert read_growth(update_bytes([text(words="x" * GROWTH_BYTES_MAX)]), KNOWN) is None


# ------------------------------------------------------------------- the same as the whole reading


CLIENTS = st.sampled_from([*KNOWN, 1, 300, 2**31, 1, 300, 2])
NEAR = st.sampled_from([0] * 12 + [-1, 1, -(2**20)])
CHANGES = st.sampled_from([0] * 3 + [1, 2])


@st.composite
def near_growth(draw: st.DrawFn) -> bytes:
    """An update that is growth, or nearly, and then some of its bytes are others."""
    structs = []
    for client in draw(st.lists(CLIENTS, min_size=1, max_size=3, unique=draw(st.booleans()))):
        clock = max(0, KNOWN.get(client, 0) + draw(NEAR))
        beside = draw(st.just(client) | CLIENTS)
        origin = Id(beside, max(0, KNOWN.get(beside, 0) - 1 + draw(NEAR)))
        kind = draw(st.sampled_from([Kind.STRING, Kind.ANY, Kind.STRING, Kind.ANY, Kind.BINARY]))
        if kind is Kind.STRING:
            words = draw(st.text("aé🦜\0", min_size=draw(CHANGES), max_size=200))
            structs.append(text(client, clock, words, origin))
            continue
        content: Any = draw(st.binary(max_size=200))
        if kind is Kind.ANY:
            content = (content,) if draw(st.integers(0, 9)) else (content, "more")
        length = len(content) if kind is Kind.ANY else 1
        structs.append(
            text(client, clock, "", origin)._replace(kind=kind, length=length, content=content)
        )
    deleted = {1: [range(2, 3)]} if draw(st.integers(0, 9)) == 0 else None
    update = bytearray(update_bytes(structs, deleted))
    for _ in range(draw(CHANGES)):
        at = draw(st.integers(0, len(update) - 1))
        match draw(st.integers(0, 3)):
            case 0:
                update[at] = draw(st.integers(0, 255))
            case 1:
                update[at] ^= 0x80
            case 2:
                del update[at]
            case _:
                update.insert(at, draw(st.sampled_from([0, 1, 0x80, 0x84, 0xFF])))
        if not update:
            break
    return bytes(update)


@settings(max_examples=400, deadline=None)
@given(near_growth())
@example(b"\x01\x01\x01\x07\x84\x81\x00\x06\x01x\x00")  # numbers longer than needed
@example(b"\x01\x01\x81\x00\x07\x84\x81\x00\x06\x01x\x00")
@example(b"\x01\x01\x01\x87\x00\x84\x01\x06\x01x\x00")
@example(b"\x01\x01\x01\x07\x84\x01\x06\x81\x00x\x00")
@example(b"\x02\x01\x01\x07\x84\x01\x06\x01x\x01\x01\x07\x84\x01\x06\x01x\x00")  # one client twice
@example(b"\x01\x01\x01\x07\x84\x01\x06\x03\xed\xa0\x80\x00")  # half of a pair
@example(b"\x01\x01\x01\x07\x84\x01\x06\x7fx\x00")
@example(b"\x01\x01\x01\x07\x88\x01\x06\x01\x74\x7fx\x00")
@example(b"\x01\x00\x01\x07\x84\x01\x06\x01x\x00")  # more or fewer structs than there are
@example(b"\x01\x02\x01\x07\x84\x01\x06\x01x\x00")
@example(b"")
@example(b"\x00\x00")
def test_a_glance_never_differs_from_the_whole_reading(update: bytes) -> None:
    event("growth" if check_glance(update, KNOWN) else "something else")


@pytest.mark.parametrize("name", KINDS)
async def test_nor_of_what_is_hostile(name: str) -> None:
    world, rng = await a_world(), Random(name)
    for _ in range(40):
        _, update = KINDS[name](world, rng)
        check_glance(update, world.known)


# ------------------------------------------------------------------------------------- in the room


async def test_a_token_needs_no_more_than_that(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the whole reading nor all the rules: that is what makes a stream cheap."""
    world = await a_world()
    node, reply = world.node, world.streaming
    with node.replica.writing() as writer:  # under client ids that are not known yet
        writer.append_text(reply, "I")
        writer.append_sealed(reply, b"0")
    await node.submit(writer.change)

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("this was not needed")

    monkeypatch.setattr(judge, "look_at", fail)
    monkeypatch.setattr(rules, "_Check", fail)
    for words in (" think", ", therefore", " 🦜"):
        with node.replica.writing() as writer:
            writer.append_text(reply, words)
            writer.append_sealed(reply, words.encode())
        await node.submit(writer.change)
    assert world.room.read(lambda replica: replica.text(reply)) == "Then I think, therefore 🦜"
