"""What listeners hear of an open conversation, in bounded memory however slow they are.

This module owns the word :class:`Changed` and the feeds that carry it. It must not know what is
done about a change. A feed holds at most one change: what a listener has not taken yet grows
together with what comes next, because what counts is how things stand, and not each step there.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Final, Self
from weakref import WeakSet

ENTRIES_NAMED_MAX: Final = 256
"""Entries that one change names. A listener that is further behind reads everything anew, which is
no more work and needs no list."""


@dataclass(frozen=True, slots=True)
class Changed:
    """What happened since the listener looked last.

    Attributes:
        entries: entries that are new, or whose text or fields changed.
        meta: the title, the shared head, rights or the like changed.
        connection: online, synced, refused or the devices present changed.
        look: this device looks at another branch.
        everything: too much to name, or the replica was built anew: read all of it.
    """

    entries: frozenset[str] = frozenset()
    meta: bool = False
    connection: bool = False
    look: bool = False
    everything: bool = False

    def __or__(self, later: Changed) -> Changed:
        """Both, as one."""
        entries = self.entries | later.entries
        everything = self.everything or later.everything or len(entries) > ENTRIES_NAMED_MAX
        return Changed(
            entries=frozenset() if everything else entries,
            meta=self.meta or later.meta,
            connection=self.connection or later.connection,
            look=self.look or later.look,
            everything=everything,
        )

    def touches(self, entry: str) -> bool:
        """Whether an entry may have changed."""
        return self.everything or entry in self.entries


class Feed:
    """One listener's changes, as an asynchronous iterator; ends when the conversation is closed."""

    def __init__(self, *, ended: bool) -> None:
        self._waiting: Changed | None = None
        self._ended = ended
        self._news = asyncio.Event()
        if ended:
            self._news.set()

    def put(self, changed: Changed) -> None:
        """Add to what the listener has not taken yet."""
        self._waiting = changed if self._waiting is None else self._waiting | changed
        self._news.set()

    def end(self) -> None:
        """Let the listener take what is left, and then end."""
        self._ended = True
        self._news.set()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Changed:
        while self._waiting is None:
            if self._ended:
                raise StopAsyncIteration
            await self._news.wait()
            if not self._ended:
                self._news.clear()
        changed, self._waiting = self._waiting, None
        return changed


class Feeds:
    """All listeners of one conversation. A feed that nobody holds any more is forgotten."""

    def __init__(self) -> None:
        self._feeds: WeakSet[Feed] = WeakSet()
        self._ended = False

    def open(self) -> Feed:
        """A new feed; it hears of everything from now on."""
        feed = Feed(ended=self._ended)
        self._feeds.add(feed)
        return feed

    def announce(self, changed: Changed) -> None:
        """Tell every listener."""
        for feed in self._feeds:
            feed.put(changed)

    def end(self) -> None:
        """Nothing will happen any more."""
        self._ended = True
        for feed in self._feeds:
            feed.end()
