"""The reading: rules P1 to P5, and that it is total on whatever a document holds."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING

from hypothesis import given
from hypothesis import strategies as st

from crdt_llm.document.conversation import Conversation
from crdt_llm.document.reading import Reading, is_withdrawn, read, read_of
from crdt_llm.document.schema import Born, Place, Role, entry_id

if TYPE_CHECKING:
    from collections.abc import Sequence

Covers = tuple[str, str]


class Document:
    """One line of admitted entries."""

    def __init__(self) -> None:
        self.conversation = Conversation(7)
        self.last = ""
        self._random = Random(1)

    def say(self, *, covers: Covers | None = None, after: str | None = None) -> str:
        return self._add(Role.SYSTEM if covers else Role.USER, covers, after)

    def reply(self, reads: Sequence[str] | None = None) -> str:
        slot = self._add(Role.ASSISTANT, None, None)
        if reads is not None:
            with self.conversation.writing() as writer:
                writer.set(slot, "reads", list(reads))
        return slot

    def redact(self, entry: str) -> None:
        with self.conversation.writing() as writer:
            writer.redact(entry, "olga", 1)

    def _add(self, role: Role, covers: Covers | None, after: str | None) -> str:
        clock = self.conversation.tree.clock + 1
        parent = self.last if after is None else after
        born = Born(role, "olga", "phone", clock, clock, after=parent, covers=covers)
        name = entry_id(clock, self._random.randbytes(10))
        with self.conversation.writing() as writer:
            writer.add(name, born, None if role is Role.ASSISTANT else "text")
            writer.place(name, Place(parent, 1))
        self.last = name
        return name

    def read(self, entry: str | None = None) -> tuple[str, ...]:
        return read(self.conversation, self.last if entry is None else entry).entries


def test_p1_a_path_is_read_as_it_stands() -> None:
    document = Document()
    entries = (document.say(), document.reply(), document.say())
    assert document.read() == entries
    assert read(document.conversation, "") == Reading(())


def test_p2_a_reply_and_what_follows_go_on_from_what_it_reads() -> None:
    document = Document()
    system, _, _, question = (document.say() for _ in range(4))
    before = document.read()
    slot = document.reply([system, question])
    assert read_of(document.conversation, slot, question) == (system, question)
    assert document.read(question) == before
    later = document.say()
    assert document.read() == (system, question, slot, later)


def test_p2_names_that_are_not_before_the_slot_do_not_count() -> None:
    document = Document()
    first, second = document.say(), document.say()
    slot = document.reply([second, "nowhere", first, second])
    assert document.read() == (second, first, slot)


def test_p3_a_summary_is_read_in_the_place_of_what_it_covers() -> None:
    document = Document()
    system, first, second, question = (document.say() for _ in range(4))
    summary = document.say(covers=(first, second))
    assert document.read() == (system, summary, question)
    assert document.read(question) == (system, first, second, question)
    slot = document.reply()
    assert document.read() == (system, summary, question, slot)


def test_p3_a_summary_may_cover_an_earlier_one() -> None:
    document = Document()
    first, second, third = (document.say() for _ in range(3))
    one = document.say(covers=(first, second))
    fourth = document.say()
    two = document.say(covers=(one, third))
    assert document.read() == (two, fourth)


def test_a_fork_from_before_a_summary_undoes_it() -> None:
    document = Document()
    first, second, question = (document.say() for _ in range(3))
    document.say(covers=(first, second))
    fork = document.say(after=question)
    assert document.read() == (first, second, question, fork)


def test_p4_a_withdrawn_summary_covers_nothing() -> None:
    document = Document()
    first, second = document.say(), document.say()
    summary = document.say(covers=(first, second))
    document.redact(summary)
    assert document.read() == (first, second, summary)
    assert is_withdrawn(document.conversation, summary)


def test_p4_a_summary_of_what_was_withdrawn_is_spoiled_and_so_is_one_that_covers_it() -> None:
    document = Document()
    first, second, third = (document.say() for _ in range(3))
    one = document.say(covers=(first, second))
    two = document.say(covers=(one, third))
    assert document.read() == (two,)
    assert not is_withdrawn(document.conversation, two)
    document.redact(second)
    reading = read(document.conversation, two)
    assert reading == Reading((first, second, third, one, two), frozenset({one, two}))
    assert is_withdrawn(document.conversation, one)
    assert is_withdrawn(document.conversation, two)
    assert not is_withdrawn(document.conversation, third)


def test_p5_a_range_that_is_not_there_covers_nothing() -> None:
    document = Document()
    first, second = document.say(), document.say()
    backwards = document.say(covers=(second, first))
    elsewhere = document.say(covers=("nowhere", first))
    assert document.read() == (first, second, backwards, elsewhere)
    assert not is_withdrawn(document.conversation, backwards)


@given(st.data())
def test_whatever_is_written_every_entry_is_read_at_most_once_and_the_last_one_always(
    data: st.DataObject,
) -> None:
    document, names = Document(), ["nowhere"]
    for _ in range(data.draw(st.integers(1, 10))):
        known = st.sampled_from(names)
        kind = data.draw(st.sampled_from(["say", "cover", "reply", "reads", "redact"]))
        if kind == "redact" and document.last:
            document.redact(data.draw(st.sampled_from(names[1:])))
        elif kind == "cover":
            names.append(document.say(covers=(data.draw(known), data.draw(known))))
        elif kind == "reads":
            names.append(document.reply(data.draw(st.lists(known))))
        elif kind == "reply":
            names.append(document.reply())
        else:
            names.append(document.say())
    order = document.read()
    assert len(set(order)) == len(order)
    assert set(order) <= set(names[1:])
    assert document.last in order
    # It goes on from what its parent's path reads, unless something says otherwise.
    plain = document.say()
    assert document.read() == (*order, plain)
