from __future__ import annotations

import re
from dataclasses import replace
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crdt_llm.cli.scroll import WAITING_MAX, Scroll
from crdt_llm.document.schema import Born, Entry, Role, State, Usage

_ids = (f"entry {number}" for number in count())


def said(text: str, *, device: str = "terminal", author: str = "owner") -> Entry:
    return Entry(next(_ids), Born(Role.USER, author, device, 0, 1), text)


def reply(text: str = "", state: State | None = State.STREAMING) -> Entry:
    return Entry(next(_ids), Born(Role.ASSISTANT, "owner", "terminal", 0, 1), text, state=state)


def scroll() -> Scroll:
    return Scroll("owner", "terminal")


def test_entries_are_printed_once_with_number_and_name() -> None:
    paper, view = scroll(), [said("Hi"), reply("Hello.", State.DONE)]
    assert paper.advance(view) == ["[1] you: Hi", "[2] assistant: Hello."]
    assert paper.advance(view) == []
    assert paper.live == ()


def test_others_are_named_with_their_device() -> None:
    view = [said("Hi", device="phone"), said("Ho", author="ann", device="pad")]
    assert scroll().advance(view) == ["[1] owner@phone: Hi", "[2] ann@pad: Ho"]


def test_complete_lines_of_a_reply_are_printed_as_they_come() -> None:
    paper, answer = scroll(), reply("one\ntw")
    assert paper.advance([answer]) == ["[1] assistant: one"]
    assert paper.live == ("tw",)
    assert paper.advance([replace(answer, content="one\ntwo\nth")]) == ["two"]
    assert paper.live == ("th",)
    assert paper.advance([replace(answer, content="one\ntwo\nthree", state=State.DONE)]) == [
        "three"
    ]
    assert not paper.live


def test_what_follows_a_growing_reply_waits_below_it() -> None:
    paper, answer = scroll(), reply("on")
    later = [said(f"later {number}") for number in range(WAITING_MAX + 2)]
    assert paper.advance([answer, *later]) == []
    assert paper.live[0] == "[1] assistant: on"
    assert paper.live[1] == "(waits) [2] you: later 0"
    assert paper.live[-1] == "(and 2 more)"
    assert len(paper.live) == 2 + WAITING_MAX
    ended = replace(answer, content="one", state=State.DONE)
    assert paper.advance([ended, *later])[:2] == ["[1] assistant: one", "[2] you: later 0"]


@pytest.mark.parametrize(
    ("entry", "line"),
    [
        (reply("x", State.STOPPED), "    (stopped; /extend goes on)"),
        (
            replace(reply("x", State.FAILED), usage=Usage(error_message="no\nroom")),
            "    (failed: no room)",
        ),
        (
            replace(reply("x", State.DONE), usage=Usage(finish="length", sampled=7)),
            "    (cut after 7 tokens; /extend goes on)",
        ),
    ],
)
def test_a_reply_that_did_not_end_by_itself_says_so(entry: Entry, line: str) -> None:
    assert scroll().advance([entry]) == ["[1] assistant: x", line]


def test_from_where_the_view_differs_it_is_printed_anew() -> None:
    paper, first, mine, theirs = scroll(), said("a"), said("b"), said("c", device="phone")
    paper.advance([first, mine])
    assert paper.advance([first, theirs, mine]) == [
        "-- from [2] on the conversation reads: --",
        "[2] owner@phone: c",
        "[3] you: b",
    ]


def test_a_request_of_which_nothing_was_printed_goes_without_a_word() -> None:
    paper, first, slot, more = scroll(), said("a"), reply(state=None), said("b")
    paper.advance([first, slot])
    assert paper.advance([first, more]) == ["[2] you: b"]


def test_a_withdrawn_text_is_not_repeated() -> None:
    paper, secret = scroll(), said("secret")
    paper.advance([secret])
    assert paper.advance([replace(secret, content="", redacted=True)]) == [
        "-- from [1] on the conversation reads: --",
        "[1] you: (withdrawn)",
    ]


def test_nobody_s_text_controls_the_terminal() -> None:
    lines = scroll().advance([said("\x1b]0;owned\x07\rx"), reply("\x9b2J\u202e", State.DONE)])
    assert lines == ["[1] you: \ufffd]0;owned\ufffd\ufffdx", "[2] assistant: \ufffd2J\ufffd"]


def test_a_clear_page_begins_at_the_beginning() -> None:
    paper, view = scroll(), [said("a")]
    paper.advance(view)
    paper.clear()
    assert paper.advance(view) == ["[1] you: a"]


@given(st.text("ab\n", max_size=12), st.lists(st.integers(0, 12)))
def test_a_stream_looks_like_its_end_however_it_was_cut(text: str, cuts: list[int]) -> None:
    answer, streamed = reply(), scroll()
    lines: list[str] = []
    for cut in sorted(cuts):
        lines += streamed.advance([replace(answer, content=text[:cut])])
    ended = replace(answer, content=text, state=State.DONE)
    lines += streamed.advance([ended])
    assert lines == scroll().advance([ended])


def read(lines: list[str]) -> list[str]:
    """What somebody who reads the paper from top to bottom takes to be the conversation."""
    entries: list[str] = []
    for line in lines:
        if found := re.match(r"-- from \[(\d+)\] on", line):
            del entries[int(found[1]) - 1 :]
        elif found := re.match(r"-- the conversation ends with \[(\d+)\]", line):
            del entries[int(found[1]) :]
        elif line == "-- it is empty now --":
            entries.clear()
        else:
            entries.append(line)
    return entries


@given(st.lists(st.lists(st.sampled_from("abcd"), unique=True, max_size=4), max_size=6))
def test_whatever_happens_the_paper_says_how_the_conversation_is(views: list[list[str]]) -> None:
    entries = {name: said(name) for name in "abcd"}
    paper = scroll()
    lines: list[str] = []
    for view in views:
        lines += paper.advance([entries[name] for name in view])
        shown = [f"[{number}] you: {name}" for number, name in enumerate(view, start=1)]
        assert read(lines) == shown
