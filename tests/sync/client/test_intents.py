"""What a write meant: from a change to plain edits, and back."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crdt_llm.document.conversation import Conversation
from crdt_llm.document.schema import SCHEMA_VERSION, Birth, Born, Grant, Role, entry_id
from crdt_llm.sync.client import intents
from crdt_llm.sync.client.intents import Add, Ask, GiveRight, SetMeta

IDS = tuple(entry_id(number, bytes([number] * 10)) for number in range(1, 10))
A, B, C, D, E = IDS[:5]


def message(entry: str, clock: int, after: str = "", text: str = "said", **more: Any) -> Add:
    return Add(entry, Born(Role.USER, "me", "here", 1, clock, after=after, **more), text)


def slot(entry: str, clock: int, after: str, **more: Any) -> Add:
    return Add(entry, Born(Role.ASSISTANT, "me", "here", 1, clock, after=after, **more), None)


def written(document: Conversation, *edits: intents.PlainEdit) -> intents.Intent:
    """Write an intent, and read what it meant from what it did."""
    with document.writing() as writer:
        intents.write(edits, document, writer)
    assert writer.change is not None
    return intents.intent_of(writer.change)


ALL: intents.Intent = (
    message(A, 1),
    slot(B, 2, A),
    message(C, 3, B, "more"),
    SetMeta("title", "A trip"),
    SetMeta("head", B),
    GiveRight("guest:1", "writer"),
    Ask(B, "stop", "me"),
)


def test_what_is_written_is_what_was_meant() -> None:
    found = written(Conversation(1), *ALL)
    assert sorted(map(repr, found)) == sorted(map(repr, ALL))
    assert [edit.entry for edit in found if isinstance(edit, Add)] == [A, B, C]  # as they follow


def test_taking_away_is_meant_too() -> None:
    document = Conversation(1)
    written(document, *ALL)
    gone = (SetMeta("title", None), GiveRight("guest:1", None))
    assert set(written(document, *gone)) == set(gone)
    redaction = Ask(A, "redacted", {"by": "me", "at": 5})
    assert written(document, redaction) == (redaction,)  # and not what goes with it
    assert document.text(A) == ""


def test_a_birth_is_meant() -> None:
    document = Conversation(1)
    with document.writing() as writer:
        writer.give_birth(Birth("me", bytes(16)), SCHEMA_VERSION)
        writer.set_meta("title", "A trip")
    assert writer.change is not None
    meant = intents.intent_of(writer.change)
    again = Conversation(2)
    written(again, *meant)
    assert again.meta == document.meta
    assert intents.what_of(meant) in {"the beginning", "a title"}
    assert intents.text_of(meant) == "A trip"


def test_what_a_node_writes_is_nobodys_intent() -> None:
    document = Conversation(1)
    written(document, message(A, 1), slot(B, 2, A))
    with document.writing() as writer:
        writer.open_reply(B)
        writer.append_text(B, "words")
        writer.add_lease(1, bytes(32), bytes(64))
    assert writer.change is not None
    assert intents.intent_of(writer.change) == ()


def test_what_is_about_an_entry_that_is_not_here_is_left_out() -> None:
    document = Conversation(1)
    with document.writing() as writer:
        intents.write((Ask(A, "stop", "me"), SetMeta("title", "x")), document, writer)
    assert document.entry(A) is None
    assert document.meta.title == "x"


# -- without what was refused ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("intent", "left"),
    [
        ((message(C, 3, A),), (message(C, 3, ""),)),  # moves to what stands
        ((message(C, 3, B),), (message(C, 3, ""),)),  # over two that are gone
        ((slot(C, 3, A),), ()),  # a request for a reply to nothing
        ((slot(C, 3, B), message(D, 4, C)), (message(D, 4, ""),)),
        ((message(C, 3, A), slot(D, 4, C)), (message(C, 3, ""), slot(D, 4, C))),
        ((Ask(A, "stop", "me"), SetMeta("head", B)), ()),
        ((SetMeta("title", "x"), GiveRight("p", None)),) * 2,
        ((message(C, 3, E), slot(D, 4, E)),) * 2,  # stands elsewhere
    ],
)
def test_what_is_left_when_earlier_entries_are_gone(
    intent: intents.Intent, left: intents.Intent
) -> None:
    assert intents.without(intent, {A: "", B: A}) == left


def test_several_writes_come_apart() -> None:
    first, asked, second = message(A, 1), slot(B, 2, A), message(C, 3, B)
    again, title = slot(D, 4, A, fork=True), SetMeta("title", "x")
    head, stop, other = SetMeta("head", B), Ask(B, "stop", "me"), SetMeta("head", E)
    parts = intents.split((again, second, stop, title, asked, head, first, other))
    assert parts == ((title, other), (first, asked, again, stop, head), (second,))
    assert intents.split(()) == ()
    assert intents.split((slot(D, 4, E),)) == ((slot(D, 4, E),),)


adds = st.lists(st.tuples(st.booleans(), st.integers(0, 8)), min_size=1, max_size=len(IDS)).map(
    lambda drawn: tuple(
        (slot if is_slot and number else message)(
            IDS[number], number + 1, IDS[after % number] if number else ""
        )
        for number, (is_slot, after) in enumerate(drawn)
    )
)


@given(adds, st.sets(st.sampled_from(IDS)))
def test_nothing_that_says_something_is_lost_by_taking_others_out(
    intent: intents.Intent, out: set[str]
) -> None:
    afters = intents.entries_of(intent)
    gone = {entry: after for entry, after in afters.items() if entry in out}
    rest = tuple(edit for edit in intent if isinstance(edit, Add) and edit.entry not in gone)
    left = intents.without(rest, gone)
    stands = set(intents.entries_of(left))
    assert stands >= {edit.entry for edit in rest if edit.content is not None}
    assert set(intents.entries_of(left).values()) <= stands | {""}
    assert sum(map(len, intents.split(left))) == len(left)
    assert sorted(edit for part in intents.split(left) for edit in intents.entries_of(part)) == (
        sorted(stands)
    )


# -- once more -------------------------------------------------------------------------------------


def test_once_more_is_said_now_at_the_end_of_the_line() -> None:
    meant = (message(A, 1, D), slot(B, 2, A), message(C, 3, E, fork=True), SetMeta("head", B))
    now = intents.anew(
        meant, after=D, clock=40, at=99, author="also me", is_there=lambda entry: entry == E
    )
    borns = {edit.entry: edit.born for edit in now if isinstance(edit, Add)}
    assert [(one.clock, one.after, one.at, one.author) for one in borns.values()] == [
        (41, D, 99, "also me"),
        (42, A, 99, "also me"),
        (43, E, 99, "also me"),  # another line, which is there
    ]
    assert now[-1] == SetMeta("head", B)
    lost = intents.anew(meant[2:3], after=D, clock=0, at=1, author="me", is_there=lambda _: False)
    assert intents.entries_of(lost) == {C: D}


def test_what_was_withdrawn_since_is_not_kept() -> None:
    meant = (message(A, 1), message(B, 2, A))
    (first, second) = intents.withdrawn(meant, frozenset({A}))
    assert isinstance(first, Add)
    assert (first.content, second) == (None, meant[1])


@pytest.mark.parametrize(
    ("intent", "text", "what"),
    [
        ((message(A, 1), slot(B, 2, A)), "said", "a message"),
        ((message(A, 1), message(B, 2)), "said\n\nsaid", "a message"),
        ((slot(B, 2, A), SetMeta("head", B)), "", "a request for a reply"),
        ((SetMeta("title", "A trip"),), "A trip", "a title"),
        ((SetMeta("head", B),), "", "a change"),
        ((GiveRight("p", Grant.READER.value),), "", "a right"),
        ((Ask(B, "stop", "me"),), "", "a stop"),
        ((Ask(B, "redacted", {"by": "me", "at": 1}),), "", "a withdrawal"),
        ((), "", "a change"),
    ],
)
def test_what_people_are_told(intent: intents.Intent, text: str, what: str) -> None:
    assert (intents.text_of(intent), intents.what_of(intent)) == (text, what)


# -- in a file -------------------------------------------------------------------------------------


def test_an_intent_comes_back_from_plain_values() -> None:
    intent = (*ALL, Ask(A, "redacted", {"by": "me", "at": 5}), message(D, 9, call="x", fork=True))
    assert intents.read(intents.plain(intent)) == intent


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from(("entries", "meta", "access", "ask", "user", "role", "clock", A)),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.dictionaries(st.sampled_from(("role", "clock", "params", "covers")), inner)
    ),
    max_leaves=16,
)


@given(plain)
def test_any_plain_values_are_an_intent_or_refused(value: Any) -> None:
    try:
        intent = intents.read(value)
    except ValueError:
        return
    assert intents.read(intents.plain(intent)) == intent
