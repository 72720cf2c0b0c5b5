"""The relay's list as a client keeps it."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crdt_llm.errors import ConnectionLost
from crdt_llm.sync.client.listing import Listing, Listings
from crdt_llm.sync.wire.frames import Listed

A, B, C = ("A" * 22, "B" * 22, "C" * 22)

facts = st.dictionaries(
    st.sampled_from(
        ("title", "role", "owner", "created_at", "changed_at", "archived", "more to come")
    ),
    st.none() | st.booleans() | st.integers() | st.text(max_size=3) | st.lists(st.integers()),
)


def ids(listings: Listings) -> list[str]:
    return [line.id for line in listings.lines]


@given(facts)
def test_facts_that_make_no_sense_count_as_not_said(said: dict[str, object]) -> None:
    line = Listing.of(A, said)
    for name in ("title", "role", "owner"):
        wanted = said.get(name)
        assert getattr(line, name) == (wanted if isinstance(wanted, str) else "")
    for name in ("created_at", "changed_at"):
        wanted = said.get(name)
        assert getattr(line, name) == (wanted if type(wanted) is int else None)
    assert line.archived is (said.get("archived") is True)


def test_a_list_is_known_once_its_last_frame_came() -> None:
    listings = Listings()
    listings.take(Listed(True, False, ((A, {"changed_at": 1}),)))
    assert [listings.is_known, *ids(listings)] == [False]
    listings.take(Listed(True, True, ((B, {"changed_at": 2}), (C, {}))))
    assert listings.is_known
    assert ids(listings) == [B, A, C]  # the last changed first


def test_a_change_in_the_middle_of_a_list_does_not_end_it() -> None:
    listings = Listings()
    listings.take(Listed(True, False, ((A, {"title": "old"}), (B, {}))))
    listings.take(Listed(False, True, ((A, {"title": "new"}), (B, None))))
    assert not listings.is_known
    listings.take(Listed(True, True, ((C, {}),)))
    assert {line.id: line.title for line in listings.lines} == {A: "new", C: ""}


def test_a_new_list_replaces_the_old_one() -> None:
    listings = Listings()
    listings.take(Listed(True, True, ((A, {}), (B, {}))))
    listings.take(Listed(False, True, ((A, None), (C, {}))))
    assert ids(listings) == [B, C]
    listings.take(Listed(False, True, ((A, None),)))  # gone already
    listings.forget()
    assert not listings.is_known
    assert ids(listings) == [B, C]  # as it was, while nobody knows
    listings.take(Listed(True, False, ((A, {}),)))
    listings.forget()  # a connection that ended half-way
    listings.take(Listed(True, True, ((C, {}),)))
    assert ids(listings) == [C]


async def test_whoever_is_slow_misses_steps_but_never_the_last() -> None:
    listings = Listings()
    watch = listings.watch()
    listings.take(Listed(True, True, ((A, {}),)))
    assert await anext(watch) == (Listing(A),)
    for title in ("one", "two", "three"):
        listings.take(Listed(False, True, ((A, {"title": title}),)))
    assert await anext(watch) == (Listing(A, "three"),)
    waiting = asyncio.ensure_future(anext(watch))
    await asyncio.sleep(0)
    assert not waiting.done()
    listings.take(Listed(False, True, ((A, None),)))
    assert await waiting == ()


async def test_who_comes_later_gets_the_list_at_once() -> None:
    listings = Listings()
    listings.take(Listed(True, True, ((A, {}),)))
    assert await anext(listings.watch()) == (Listing(A),)
    listings.forget()
    late = asyncio.ensure_future(anext(listings.watch()))
    await asyncio.sleep(0)
    assert not late.done()  # what is known may be wrong by now
    late.cancel()


async def test_everybody_hears_why_there_is_no_list() -> None:
    listings = Listings()
    watches = [listings.watch() for _ in range(2)]
    error = ConnectionLost("gone")
    listings.end(error)
    for watch in watches:
        for _ in range(2):
            with pytest.raises(ConnectionLost) as caught:
                await anext(watch)
            assert caught.value is error
