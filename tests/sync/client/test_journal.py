"""Records of a device's file: their bytes, what they add up to, and damaged ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crdt_llm.document.schema import Born, Params, Role, entry_id
from crdt_llm.errors import Corrupt
from crdt_llm.store.log import Loaded
from crdt_llm.sync.client import intents
from crdt_llm.sync.client.journal import (
    Acknowledged,
    Discarded,
    Drafted,
    Heard,
    Kept,
    Position,
    RefusedWrite,
    Rewrote,
    Whole,
    Wrote,
    decode,
    encode,
)

if TYPE_CHECKING:
    from crdt_llm.sync.client.journal import Record

MARK = b"\x80\x00"
ENTRY, SLOT = (entry_id(1, bytes([number] * 10)) for number in (1, 2))

numbers = st.integers(1, 30)
lsns = st.integers(0, 2**53)
updates = st.binary(min_size=1, max_size=8)
logs = st.none() | st.text(max_size=8)
borns = st.builds(
    Born,
    st.just(Role.USER),
    st.text(max_size=5),
    st.text(max_size=5),
    st.integers(0, 2**40),
    st.integers(1, 2**40),
    fork=st.booleans(),
    after=st.sampled_from(("", ENTRY)),
    params=st.builds(Params, max_tokens=st.none() | st.integers(1, 9), stop=st.just(("\n",))),
)
edits = st.one_of(
    st.builds(intents.Add, st.just(ENTRY), borns, st.none() | st.text(max_size=9)),
    st.builds(intents.SetMeta, st.just("title"), st.text(max_size=9)),
    st.builds(intents.GiveRight, st.text(max_size=5), st.none() | st.just("writer")),
    st.builds(intents.Ask, st.just(ENTRY), st.just("stop"), st.text(max_size=9)),
)
refusals = st.builds(
    RefusedWrite,
    numbers,
    st.sampled_from(("denied", "invalid")),
    st.text(max_size=9),
    st.text(max_size=9),
    st.lists(edits, max_size=3).map(tuple),
)
wrotes = st.builds(Wrote, numbers, updates)
outboxes = st.lists(wrotes, max_size=3, unique_by=lambda one: one.number).map(
    lambda ones: tuple(sorted(ones, key=lambda one: one.number))
)
refused = st.lists(refusals, max_size=2, unique_by=lambda one: one.id).map(tuple)
records: st.SearchStrategy[Record] = st.one_of(
    st.builds(Heard, updates, lsns),
    wrotes,
    st.builds(Acknowledged, st.lists(numbers, max_size=3).map(tuple)),
    st.builds(Position, logs, lsns),
    st.builds(Rewrote, outboxes, refused),
    st.builds(Discarded, numbers),
    st.builds(Drafted, refusals),
    st.builds(Whole, updates, logs, lsns, outboxes, refused, numbers),
)
plain = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=3) | st.binary(max_size=3),
    lambda inner: st.lists(inner, max_size=7) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=20,
)


def whole_of(kept: Kept) -> Whole:
    """The snapshot of what records add up to; merging is the document's, so they are just glued."""
    return Whole(
        b"".join(kept.acknowledged),
        kept.log,
        kept.lsn,
        tuple(Wrote(number, update) for number, update in kept.outbox.items()),
        tuple(kept.refused.values()),
        kept.last_number,
    )


@given(records)
def test_every_record_comes_back(record: Record) -> None:
    assert decode(encode(record)) == record


def test_what_has_no_mark_is_an_update_of_the_relays() -> None:
    assert decode(b"\x00\x00") == Heard(b"\x00\x00", 0)
    assert decode(b"") == Heard(b"", 0)


@given(st.binary(max_size=60))
def test_any_bytes_are_a_record_or_damage(data: bytes) -> None:
    try:
        record = decode(MARK + data)
    except Corrupt:
        return
    Kept().take(record)  # what is read can be added up


@given(st.integers(-2, 9), st.lists(plain, max_size=7))
def test_values_that_are_not_of_their_kind_are_damage(kind: int, values: list[object]) -> None:
    try:
        record = decode(MARK + msgpack.packb([kind, *values]))
    except Corrupt:
        return
    Kept().take(record)
    assert decode(encode(record)) == record


@given(records, st.data())
def test_half_a_record_is_damage(record: Record, data: st.DataObject) -> None:
    whole = encode(record)
    cut = data.draw(st.integers(len(MARK), len(whole) - 1))
    with pytest.raises(Corrupt):
        decode(whole[:cut])


@given(st.lists(records, max_size=12), st.data())
def test_a_snapshot_in_between_makes_no_difference(said: list[Record], data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(said)))
    straight, before = Kept(), Kept()
    for record in said:
        straight.take(record)
    for record in said[:cut]:
        before.take(record)
    later = tuple((number, encode(one)) for number, one in enumerate(said[cut:], cut + 1))
    again = Kept.of(Loaded(encode(whole_of(before)), cut, later))
    assert whole_of(again) == whole_of(straight)
    assert b"".join(again.updates) == b"".join(straight.updates)


@given(st.lists(records, max_size=12))
def test_numbers_are_never_given_twice(said: list[Record]) -> None:
    kept, greatest = Kept(), 0
    for record in said:
        kept.take(record)
        assert kept.last_number >= max((greatest, *kept.outbox, *kept.refused))
        greatest = kept.last_number


def test_what_is_acknowledged_changes_sides_once() -> None:
    kept = Kept()
    for record in (Wrote(1, b"one"), Wrote(2, b"two"), Wrote(3, b"three")):
        kept.take(record)
    kept.take(Acknowledged((1, 3, 9)))
    kept.take(Acknowledged((1,)))
    assert kept.acknowledged == [b"one", b"three"]
    assert kept.outbox == {2: b"two"}
    assert kept.updates == (b"one", b"three", b"two")


def test_a_position_goes_back_only_when_it_is_said() -> None:
    kept = Kept()
    kept.take(Position("a", 7))
    kept.take(Heard(b"late", 5))
    assert (kept.log, kept.lsn) == ("a", 7)
    kept.take(Position("b", 2))
    assert (kept.log, kept.lsn) == ("b", 2)


def test_a_refusal_replaces_the_outbox_and_is_kept_until_it_is_discarded() -> None:
    born = Born(Role.USER, "me", "here", 1, 1)
    slot = Born(Role.ASSISTANT, "me", "here", 1, 2, after=ENTRY)
    intent = (intents.Add(ENTRY, born, "hello"), intents.Add(SLOT, slot, None))
    refused = RefusedWrite(3, "denied", "forbidden", "no", intent)
    kept = Kept()
    kept.take(Wrote(1, b"one"))
    kept.take(Wrote(2, b"two"))
    kept.take(Rewrote((Wrote(4, b"two again"),), (refused,)))
    assert kept.outbox == {4: b"two again"}
    assert kept.refused == {3: refused}
    assert (refused.text, refused.what) == ("hello", "a message")
    assert (refused.entry, refused.entries) == (ENTRY, (ENTRY, SLOT))
    kept.take(Discarded(3))
    assert kept.refused == {}
    assert kept.last_number == 4
