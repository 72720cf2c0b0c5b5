from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from crdt_llm.sync.room.tail import TAIL_BYTES_MAX, TAIL_UPDATES_MAX, Tail


def test_an_empty_tail_knows_only_its_end() -> None:
    tail = Tail()
    tail.begin(5, [])
    assert tail.since(5) == []
    assert tail.since(4) is None
    assert tail.since(6) is None


def test_what_was_loaded_and_what_was_committed_follow_each_other() -> None:
    tail = Tail()
    tail.begin(3, [(2, b"two"), (3, b"three")])
    tail.append(5, [b"four", b"five"])
    assert tail.since(1) == [b"two", b"three", b"four", b"five"]
    assert tail.since(3) == [b"four", b"five"]
    assert tail.since(0) is None


def test_beginning_anew_forgets() -> None:
    tail = Tail()
    tail.append(2, [b"one", b"two"])
    tail.begin(2, [])
    assert tail.since(1) is None
    assert tail.since(2) == []


def test_an_update_over_the_limit_leaves_nothing_that_would_have_a_hole() -> None:
    tail = Tail()
    tail.append(1, [b"one"])
    tail.append(2, [bytes(TAIL_BYTES_MAX + 1)])
    assert tail.since(0) is None
    assert tail.since(1) is None
    assert tail.since(2) == []
    tail.append(3, [b"three"])
    assert tail.since(2) == [b"three"]


def test_many_small_updates_are_bounded_too() -> None:
    tail = Tail()
    tail.append(TAIL_UPDATES_MAX + 1, [b"x"] * (TAIL_UPDATES_MAX + 1))
    assert tail.since(0) is None
    assert len(tail.since(1) or ()) == TAIL_UPDATES_MAX


@given(st.lists(st.lists(st.integers(0, TAIL_BYTES_MAX), min_size=1, max_size=4), max_size=8))
def test_what_it_gives_is_the_end_of_the_log(commits: list[list[int]]) -> None:
    tail, log = Tail(), [bytes(size) for commit in commits for size in commit]
    end = 0
    for commit in commits:
        end += len(commit)
        tail.append(end, log[end - len(commit) : end])
    for lsn in range(end + 1):
        given_back = tail.since(lsn)
        assert given_back is None or given_back == log[lsn:]
