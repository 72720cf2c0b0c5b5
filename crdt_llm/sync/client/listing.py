"""A person's conversations, as the relay lists them.

This module owns what a line of the list says and how the list changes. It must not know sockets or
documents.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self
from weakref import WeakSet

if TYPE_CHECKING:
    from collections.abc import Mapping

    from crdt_llm.errors import CrdtLlmError
    from crdt_llm.sync.wire.frames import Listed


@dataclass(frozen=True, slots=True)
class Listing:
    """One conversation in the relay's list.

    Attributes:
        id: the conversation's.
        title: its title, or ``""``.
        role: ``owner``, ``writer`` or ``reader``: what one may do there.
        owner: the principal that made it.
        created_at: ms since 1970, or ``None``.
        changed_at: ms since 1970, or ``None``.
        archived: whether one has put it away; others do not see that.
    """

    id: str
    title: str = ""
    role: str = ""
    owner: str = ""
    created_at: int | None = None
    changed_at: int | None = None
    archived: bool = False

    @classmethod
    def of(cls, conversation: str, facts: Mapping[str, Any]) -> Self:
        """Read facts; what is missing or malformed counts as not said."""
        title, role, owner = (
            value if isinstance(value := facts.get(name), str) else ""
            for name in ("title", "role", "owner")
        )
        created_at, changed_at = (
            value if type(value := facts.get(name)) is int else None
            for name in ("created_at", "changed_at")
        )
        archived = facts.get("archived") is True
        return cls(conversation, title, role, owner, created_at, changed_at, archived)


class Listings:
    """The list as it is now, and those who watch it."""

    def __init__(self) -> None:
        self._lines: dict[str, Listing] = {}
        self._growing: dict[str, Listing] | None = None  # a whole list that is not whole yet
        self._watches: WeakSet[Watch] = WeakSet()
        self.is_known = False

    @property
    def lines(self) -> tuple[Listing, ...]:
        """All of them, the last changed first."""
        return tuple(
            sorted(self._lines.values(), key=lambda line: (-(line.changed_at or 0), line.id))
        )

    def watch(self) -> Watch:
        """Somebody who hears of every change from now on."""
        watch = Watch(self)
        self._watches.add(watch)
        return watch

    def take(self, listed: Listed) -> None:
        """Take what the relay says."""
        if listed.whole and self._growing is None:
            self._growing = {}
        lines = self._lines if self._growing is None else self._growing
        for conversation, facts in listed.conversations:
            if facts is None:
                lines.pop(conversation, None)
            else:
                lines[conversation] = Listing.of(conversation, facts)
        if self._growing is not None:
            if not (listed.whole and listed.end):
                return
            self._lines, self._growing = self._growing, None
            self.is_known = True
        for watch in self._watches:
            watch.tell()

    def forget(self) -> None:
        """The connection is gone: the list is as it was, and nobody knows whether it still is."""
        self._growing = None
        self.is_known = False

    def end(self, error: CrdtLlmError) -> None:
        """There will be no list; whoever watches hears why."""
        for watch in self._watches:
            watch.fail(error)


class Watch:
    """The list each time it changes, as an asynchronous iterator; who is slow misses steps."""

    def __init__(self, listings: Listings) -> None:
        self._listings = listings
        self._news = asyncio.Event()
        self._error: CrdtLlmError | None = None
        if listings.is_known:
            self._news.set()

    def tell(self) -> None:
        """There is something new."""
        self._news.set()

    def fail(self, error: CrdtLlmError) -> None:
        """There will be nothing new."""
        self._error = error
        self._news.set()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> tuple[Listing, ...]:
        await self._news.wait()
        if self._error is not None:
            raise self._error.with_traceback(None)
        self._news.clear()
        return self._listings.lines
