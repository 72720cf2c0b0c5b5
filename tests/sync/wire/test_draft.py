from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crdt_llm.errors import MalformedMessage
from crdt_llm.sync.wire.draft import Said, common


@pytest.mark.parametrize("keep", [1, 3, 99])
def test_a_draft_keeps_whole_characters_that_are_there(keep: int) -> None:
    with pytest.raises(MalformedMessage):
        Said("", "äö".encode()).then("", keep, "x")


def test_a_draft_is_not_shown() -> None:
    assert "secret" not in repr(Said("", b"secret"))


@given(st.text(), st.text())
def test_what_two_texts_share_is_text(one: str, other: str) -> None:
    a, b = one.encode(errors="replace"), other.encode(errors="replace")
    keep = common(a, b)
    assert a[:keep] == b[:keep]
    assert (a[:keep] + b[keep:].decode().encode()) == b
    assert common(a, a) == len(a)
