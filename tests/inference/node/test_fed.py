"""What the engine was given: what has to be forgotten of it, and where."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from crdt_llm.inference.node.fed import Drop, Fed


def test_what_is_behind_a_withdrawn_entry_goes_wherever_it_was_read() -> None:
    fed = Fed()
    fed.note([("a", (1, 2)), ("b", (3,)), ("c", (4, 5))])
    fed.note([("a", (1, 2)), ("b", (3,)), ("d", (6,))])
    fed.note([("summary", (9,)), ("b", (7, 3)), ("d", (6,))])
    fed.withdraw("b")
    assert set(fed.drops) == {Drop((1, 2, 3), 2), Drop((9, 7, 3), 1)}
    fed.drops.clear()
    for gone in "bcd":
        fed.withdraw(gone)
    assert not fed.drops
    fed.withdraw("a")
    assert list(fed.drops) == [Drop((1, 2), 0)]


def test_a_reply_is_known_as_far_as_it_got() -> None:
    fed = Fed()
    fed.note([("a", (1,)), ("reply", (2,))])
    fed.note([("a", (1,)), ("reply", (2, 3, 4))])
    fed.note([("a", (1,)), ("reply", (2, 3)), ("b", (5,))])
    fed.withdraw("reply")
    assert list(fed.drops) == [Drop((1, 2, 3, 4), 1)]


def test_an_entry_without_ids_goes_with_what_is_behind_it() -> None:
    fed = Fed()
    fed.note([("a", (1,)), ("empty", ()), ("b", (2,))])
    fed.withdraw("empty")
    assert list(fed.drops) == [Drop((1, 2), 1)]


@given(
    st.lists(st.lists(st.sampled_from("abcde"), unique=True), max_size=8), st.sampled_from("abcde")
)
def test_every_drop_lets_stay_what_is_before_and_covers_what_is_behind(
    readings: list[list[str]], gone: str
) -> None:
    ids = {name: (number, number) for number, name in enumerate("abcde")}
    fed = Fed()
    for reading in readings:
        fed.note([(name, ids[name]) for name in reading])
    fed.withdraw(gone)
    for reading in readings:
        whole = tuple(token for name in reading for token in ids[name])
        if gone not in reading:
            # Nothing of it agrees with a drop beyond what is kept.
            for drop in fed.drops:
                shorter = min(len(whole), len(drop.ids))
                assert shorter <= drop.keep or whole[:shorter] != drop.ids[:shorter]
            continue
        keep = 2 * reading.index(gone)
        assert Drop(whole[: keep + 2], keep) in fed.drops
