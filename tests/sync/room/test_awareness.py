from __future__ import annotations

import functools
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crdt_llm.document.rules import Author
from crdt_llm.sync.room.awareness import (
    EXPIRY_S,
    GONE_MAX,
    IDS_PER_CONNECTION_MAX,
    IDS_PER_PRINCIPAL_MAX,
    STATES_MAX,
    Awareness,
    messages,
)
from crdt_llm.sync.wire.y_websocket import AWARENESS_STATE_BYTES_MAX, AwarenessState, decode, encode


class Time:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass(frozen=True)
class Connection:
    """Whoever speaks; each of its own principal if nothing else is said."""

    author: Author


@functools.cache
def by(name: str | int) -> Connection:
    return Connection(Author(str(name)))


def here(client: int, clock: int, state: str = "{}") -> AwarenessState:
    return AwarenessState(client, clock, state)


def gone(client: int, clock: int) -> AwarenessState:
    return AwarenessState(client, clock, None)


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def room(time: Time) -> Awareness:
    return Awareness(time)


def test_a_state_is_news_once(room: Awareness) -> None:
    assert room.receive(by("a"), [here(1, 1)]) == (here(1, 1),)
    assert room.receive(by("a"), [here(1, 1)]) == ()
    assert room.receive(by("a"), [here(1, 2, '"x"')]) == (here(1, 2, '"x"'),)
    assert room.states == (here(1, 2, '"x"'),)


def test_an_older_state_is_dropped(room: Awareness) -> None:
    room.receive(by("a"), [here(1, 5)])
    assert room.receive(by("a"), [here(1, 4)]) == ()
    assert room.receive(by("a"), [gone(1, 4)]) == ()
    assert room.states == (here(1, 5),)


def test_a_state_at_clock_zero_is_ignored(room: Awareness) -> None:
    assert room.receive(by("a"), [here(1, 0)]) == ()
    assert len(room) == 0


def test_nobody_speaks_for_an_id_of_another_connection(room: Awareness) -> None:
    room.receive(by("a"), [here(1, 1)])
    assert room.receive(by("b"), [here(1, 2, '"forged"')]) == ()
    assert room.receive(by("b"), [gone(1, 2)]) == ()
    assert room.states == (here(1, 1),)


def test_a_connection_that_closes_takes_its_ids_along(room: Awareness) -> None:
    room.receive(by("a"), [here(1, 3), here(2, 4)])
    room.receive(by("b"), [here(3, 1)])
    assert set(room.leave(by("a"))) == {gone(1, 3), gone(2, 4)}
    assert room.states == (here(3, 1),)
    assert room.leave(by("a")) == ()


def test_null_is_news_and_frees_the_id(room: Awareness) -> None:
    room.receive(by("a"), [here(1, 1)])
    assert room.receive(by("a"), [gone(1, 1)]) == (gone(1, 1),)
    assert room.receive(by("b"), [here(1, 2)]) == (here(1, 2),)
    assert room.leave(by("b")) == (gone(1, 2),)


def test_a_late_repetition_by_somebody_else_is_no_ghost(room: Awareness) -> None:
    room.receive(by("a"), [here(1, 3)])
    room.leave(by("a"))
    assert room.receive(by("b"), [here(1, 3)]) == ()
    assert room.receive(by("c"), [here(1, 4)]) == (here(1, 4),)


def test_what_is_not_renewed_expires(room: Awareness, time: Time) -> None:
    room.receive(by("a"), [here(1, 1), here(2, 1)])
    time.now += EXPIRY_S - 1
    room.receive(by("a"), [here(1, 2)])
    assert room.expire() == ()
    time.now += 2
    assert room.expire() == (gone(2, 1),)
    assert room.states == (here(1, 2),)


def test_the_clocks_of_the_gone_are_forgotten_in_time(room: Awareness, time: Time) -> None:
    room.receive(by("a"), [here(1, 9)])
    room.leave(by("a"))
    time.now += EXPIRY_S + 1
    room.expire()
    assert room.receive(by("b"), [here(1, 1)]) == (here(1, 1),)


def test_a_connection_has_a_bounded_number_of_ids(room: Awareness) -> None:
    states = [here(client, 1) for client in range(1, IDS_PER_CONNECTION_MAX + 10)]
    assert len(room.receive(by("a"), states)) == IDS_PER_CONNECTION_MAX
    assert len(room.receive(by("b"), [here(10**6, 1)])) == 1


def test_a_principal_has_a_bounded_number_of_ids(room: Awareness) -> None:
    pages = [Connection(Author("reader")) for _ in range(IDS_PER_PRINCIPAL_MAX + 1)]
    for client, page in enumerate(pages[:-1], 1):
        assert room.receive(page, [here(client, 1)])
    assert room.receive(pages[-1], [here(10**6, 1)]) == ()
    assert room.receive(by("another"), [here(10**6, 1)])
    room.leave(pages[0])
    assert room.receive(pages[-1], [here(10**6 + 1, 1)])


def test_a_room_has_a_bounded_number_of_states_and_memories(room: Awareness) -> None:
    for client in range(1, STATES_MAX + 10):
        room.receive(by(client), [here(client, 1)])
    assert len(room) == STATES_MAX
    for client in range(10**6, 10**6 + GONE_MAX + 10):
        room.leave(by(client - 1))
        room.leave(by(1 + client % STATES_MAX))
        room.receive(by(client), [here(client, 1)])
    assert len(room._gone) <= GONE_MAX


def test_all_states_of_a_full_room_fit_the_frames_of_the_dialect() -> None:
    state = '"' + "x" * (AWARENESS_STATE_BYTES_MAX - 2) + '"'
    states = [here(client, 1, state) for client in range(1, STATES_MAX + 1)]
    packed = [decode(encode(message)) for message in messages(states)]
    assert [one for message in packed for one in message.states] == states  # type: ignore[union-attr]


@given(
    st.lists(
        st.tuples(
            st.sampled_from("abc"),
            st.integers(1, 4),
            st.integers(0, 5),
            st.sampled_from(["{}", '"y"', None]),
        )
        | st.tuples(st.just("leave"), st.sampled_from("abc"))
        | st.tuples(st.just("wait"), st.integers(1, 40))
    )
)
def test_whoever_hears_the_news_knows_what_the_room_knows(steps: list[tuple[object, ...]]) -> None:
    time = Time()
    room = Awareness(time)
    heard: dict[int, AwarenessState] = {}
    for step in steps:
        match step:
            case ("leave", str(owner)):
                news = room.leave(by(owner))
            case ("wait", int(seconds)):
                time.now += seconds
                news = room.expire()
            case (str(owner), int(client), int(clock), state):
                news = room.receive(by(owner), [AwarenessState(client, clock, state)])  # type: ignore[arg-type]
            case _:
                raise AssertionError(step)
        for state in news:
            if state.state_json is None:
                assert state.clock >= heard.pop(state.client).clock
            else:
                assert state.client not in heard or state.clock > heard[state.client].clock
                heard[state.client] = state
        assert set(heard.values()) == set(room.states)
