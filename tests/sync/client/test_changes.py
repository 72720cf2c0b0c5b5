"""Feeds of changes: bounded, complete, and over when the conversation is."""

from __future__ import annotations

import asyncio
import gc

from hypothesis import given
from hypothesis import strategies as st

from crdt_llm.sync.client.changes import ENTRIES_NAMED_MAX, Changed, Feeds

changes = st.builds(
    Changed,
    entries=st.frozensets(st.sampled_from("abcdef")),
    meta=st.booleans(),
    connection=st.booleans(),
    look=st.booleans(),
    everything=st.just(value=False),
)


@given(st.lists(changes, min_size=1))
def test_what_was_missed_comes_as_one_change_that_leaves_nothing_out(missed: list[Changed]) -> None:
    async def listen() -> Changed:
        feeds = Feeds()
        feed = feeds.open()
        for changed in missed:
            feeds.announce(changed)
        return await anext(feed)

    taken = asyncio.run(listen())
    assert taken.entries == frozenset().union(*(changed.entries for changed in missed))
    assert taken.meta == any(changed.meta for changed in missed)
    assert taken.connection == any(changed.connection for changed in missed)
    assert taken.look == any(changed.look for changed in missed)


def test_a_change_names_a_bounded_number_of_entries() -> None:
    many = Changed(entries=frozenset(str(number) for number in range(ENTRIES_NAMED_MAX)))
    assert not (many | Changed()).everything
    over = many | Changed(entries=frozenset({"one more"}), meta=True)
    assert over == Changed(everything=True, meta=True)
    assert (over | Changed(entries=frozenset({"another"}))).entries == frozenset()


async def test_a_feed_waits_for_news_and_takes_what_is_left_at_the_end() -> None:
    feeds = Feeds()
    feed = feeds.open()
    waiting = asyncio.create_task(anext(feed))
    await asyncio.sleep(0)
    assert not waiting.done()
    feeds.announce(Changed(meta=True))
    assert await waiting == Changed(meta=True)
    feeds.announce(Changed(look=True))
    feeds.end()
    assert [changed async for changed in feed] == [Changed(look=True)]
    assert [changed async for changed in feeds.open()] == []


async def test_cancelling_a_listener_loses_nothing() -> None:
    feeds = Feeds()
    feed = feeds.open()
    waiting = asyncio.create_task(anext(feed))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait({waiting})
    feeds.announce(Changed(meta=True))
    assert await anext(feed) == Changed(meta=True)


def test_a_feed_that_nobody_holds_is_forgotten() -> None:
    feeds = Feeds()
    feed = feeds.open()
    assert len(feeds._feeds) == 1
    del feed
    gc.collect()
    assert len(feeds._feeds) == 0
