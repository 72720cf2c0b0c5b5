from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crdt_llm.cli.printable import one_line, printable


@pytest.mark.parametrize(
    "text", ["plain", "two\nlines\tand a tab", "äöü 水 🦀 עברית", "family 👩\u200d👧", "e\u0301"]
)
def test_ordinary_text_stays_as_it_is(text: str) -> None:
    assert printable(text) == text


@pytest.mark.parametrize("character", ["\x1b", "\x07", "\r", "\x00", "\x7f", "\x9b", "\u202e"])
def test_what_a_terminal_obeys_is_replaced(character: str) -> None:
    assert printable(f"a{character}b") == "a\ufffdb"


@given(st.text())
def test_no_control_character_gets_through(text: str) -> None:
    shown = printable(text)
    assert len(shown) == len(text)
    assert not any(unicodedata.category(c) in {"Cc", "Cs"} for c in shown if c not in "\n\t")


@given(st.text(), st.integers(2, 20))
def test_one_line_is_one_line_of_that_length(text: str, length: int) -> None:
    line = one_line(text, length)
    assert len(line) <= length
    assert len(line.splitlines()) <= 1


def test_a_cut_line_says_so() -> None:
    assert one_line("one two  three", 7) == "one tw…"
    assert one_line("one\ntwo", 7) == "one two"
