"""Whoever is refused all the time waits; nobody else does, and nobody below 20 a minute."""

from __future__ import annotations

import asyncio
from random import Random
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sync.device import Device
from sync.rooms import Place, born, turns

from crdt_llm.document.schema import Grant
from crdt_llm.errors import Refused
from crdt_llm.sync.room import refusal_rate
from crdt_llm.sync.room.refusal_rate import (
    DELAY_S_MAX,
    REFUSALS_FREE,
    REFUSALS_PER_MINUTE,
    RefusalRate,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from sync.rooms import Member


class Timers:
    """A clock, and what is to be called when."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.calls: list[tuple[float, Callable[[], None]]] = []

    def later(self, seconds: float, call: Callable[[], None]) -> None:
        self.calls.append((self.now + seconds, call))

    def pass_by(self, seconds: float) -> None:
        self.now += seconds
        due = [call for at, call in self.calls if at <= self.now]
        self.calls = [(at, call) for at, call in self.calls if at > self.now]
        for call in due:
            call()


def test_the_first_ones_are_free_and_the_next_wait() -> None:
    timers = Timers()
    rate = RefusalRate(lambda: timers.now)
    waits = [rate.refused("will", "1.2.3.4", "c") for _ in range(REFUSALS_FREE + 3)]
    assert waits[:REFUSALS_FREE] == [0.0] * REFUSALS_FREE
    assert waits[REFUSALS_FREE:] == pytest.approx([3.0, 6.0, 9.0])
    assert rate.debt("will", None) == pytest.approx(9.0)
    assert rate.debt("olga", "1.2.3.4") == pytest.approx(9.0)
    assert rate.debt("olga", "5.6.7.8") == 0.0


def test_at_twenty_a_minute_nobody_ever_waits() -> None:
    timers = Timers()
    rate = RefusalRate(lambda: timers.now)
    for _ in range(500):
        assert rate.refused("will", "1.2.3.4", "c") == 0.0
        timers.now += 60 / REFUSALS_PER_MINUTE
    assert REFUSALS_PER_MINUTE >= 20


def test_a_conversations_debt_holds_nobody_up_who_was_not_refused() -> None:
    timers = Timers()
    rate = RefusalRate(lambda: timers.now)
    for number in range(100):
        rate.refused(f"p{number}", f"10.0.0.{number}", "c")
    assert rate.debt("honest", "10.1.0.1") == 0.0
    assert rate.refused("honest", "10.1.0.1", "c") > 0
    assert rate.refused("honest", "10.1.0.1", "another") == 0.0


@given(st.lists(st.tuples(st.integers(0, 3), st.floats(0, 20)), max_size=200))
def test_no_wait_is_longer_than_the_longest(story: list[tuple[int, float]]) -> None:
    timers = Timers()
    rate = RefusalRate(lambda: timers.now)
    for who, passes in story:
        assert 0 <= rate.refused(f"p{who}", None, "c") <= DELAY_S_MAX + 1e-6
        timers.now += passes


def test_what_is_counted_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusal_rate, "COUNTED_MAX", 10)
    rate = RefusalRate(lambda: 0.0)
    for number in range(1000):
        rate.refused(f"p{number}", f"a{number}", f"c{number}")
    assert len(rate._paid_until) <= 10


# -- in a room ----------------------------------------------------------------------------------


async def a_room() -> tuple[Place, Timers, Member, Device]:
    timers = Timers()
    place = Place(refusals=RefusalRate(lambda: timers.now, timers.later))
    owner, device = await born(place)
    await owner.membership.submit(device.grant("will", Grant.WRITER))
    return place, timers, owner, device


def forged(state: bytes, seed: int) -> bytes:
    device = Device(Random(seed), "will")
    device.merge(state)
    return device.forge()


async def a_debtor(place: Place) -> tuple[Member, asyncio.Future[None]]:
    """Will, who was refused as often as is free, and his next forgery."""
    will = await place.join("will")
    state = will.membership.state
    for seed in range(REFUSALS_FREE):
        with pytest.raises(Refused):
            await will.membership.submit(forged(state, seed))
    return will, asyncio.ensure_future(will.membership.submit(forged(state, 99)))


def honest_words(state: bytes) -> bytes:
    device = Device(Random(100), "will")
    device.merge(state)
    return device.say("hello")


async def test_whoever_is_refused_all_the_time_waits_and_the_others_do_not() -> None:
    place, timers, owner, device = await a_room()
    will, late = await a_debtor(place)
    await turns(50)
    assert not late.done()
    # Nor is what it sends meanwhile looked at, honest or not.
    behind = asyncio.ensure_future(will.membership.submit(honest_words(will.membership.state)))
    await owner.membership.submit(device.say("everybody else goes on"))
    await turns(50)
    assert not late.done()
    assert not behind.done()
    timers.pass_by(3.1)
    with pytest.raises(Refused):
        await late
    timers.pass_by(3.1)
    await behind


async def test_another_connection_of_a_debtor_waits_too() -> None:
    place, timers, _, _ = await a_room()
    _, late = await a_debtor(place)
    await turns()
    again = await place.join("will")
    behind = asyncio.ensure_future(again.membership.submit(honest_words(again.membership.state)))
    await turns(50)
    assert not behind.done()
    timers.pass_by(3.1)
    with pytest.raises(Refused):
        await late
    timers.pass_by(60)
    await behind


async def test_a_room_that_stops_keeps_nobody_waiting() -> None:
    place, _, _, _ = await a_room()
    _, late = await a_debtor(place)
    await turns()
    await place.hub.close()
    outcome = (await asyncio.gather(late, return_exceptions=True))[0]
    assert isinstance(outcome, Exception)
