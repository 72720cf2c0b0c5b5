"""The lists of conversations: what each principal takes part in, and how that changes.

This module owns what a line of a list says and when whoever watches hears of it. It must not know
frames or sockets. A line is made of the document (title, rights, times), bounded by what the
watcher's token allows, and of what the principal has put away; if the document is lost, of the
register.

Nothing here reacts to single commits: what changed is marked, and looked at every once in a while,
for a reply that streams commits many times a second.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from crdt_llm.document.rules import Author
from crdt_llm.errors import CrdtLlmError
from crdt_llm.sync.room.rights import right_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from crdt_llm.document.conversation import Conversation
    from crdt_llm.document.schema import Grant
    from crdt_llm.store.archive import Archive
    from crdt_llm.sync.relay.access import Pass
    from crdt_llm.sync.relay.hub import Hub

logger = logging.getLogger("crdt_llm.sync")

PACE_S: Final = 1.0
"""Between two looks at what changed: a list that is a second old is fresh."""

LINES_MAX: Final = 10_000
"""Conversations in one list, the latest first: ten years of three a day."""

SUMMARIES_MAX: Final = 20_000
"""Summaries kept, some 500 bytes each; the others are read from the log again when asked for."""


@dataclass(frozen=True, slots=True)
class Summary:
    """What lists say of a conversation, for whoever may see it.

    Attributes:
        title: What it is called.
        created_at: ms since 1970.
        owner: The principal in its birth.
        access: principal -> right.
    """

    title: str
    created_at: int | None
    owner: str
    access: Mapping[str, str]


def summarise(conversation: Conversation) -> Summary | None:
    """The summary of a document; ``None`` while it has no birth."""
    meta = conversation.meta
    if meta.birth is None:
        return None
    return Summary(meta.title, meta.created_at, meta.birth.owner, dict(conversation.access()))


def _grant(found: Pass, conversation: str, summary: Summary | None) -> Grant | None:
    if summary is None or not found.may_enter(conversation):
        return None
    return right_of(summary, Author(found.principal, cap=found.cap(conversation)))


Lines: TypeAlias = tuple[tuple[str, "Mapping[str, Any] | None"], ...]


@dataclass(eq=False, slots=True)
class Watcher:
    """Somebody who watches their list.

    Attributes:
        found: What their token proves.
        tell: Takes lines and whether these are all there are; answers whether there was room.
    """

    found: Pass
    tell: Callable[[Lines, bool], bool]
    lines: dict[str, Mapping[str, Any]] = field(default_factory=dict)  # as told
    is_begun: bool = False  # it was told the whole list
    missed: dict[str, None] = field(default_factory=dict)  # what changed before it was


class ConversationLists:
    """Every principal's list.

    Args:
        hub: The conversations.
        archive: What principals have put away.
        clock: ms since 1970.
        sleep: Waits for so many seconds.
    """

    def __init__(
        self,
        hub: Hub,
        archive: Archive,
        *,
        clock: Callable[[], int],
        sleep: Callable[[float], Any] = asyncio.sleep,
    ) -> None:
        self._hub = hub
        self._archive = archive
        self._clock = clock
        self._sleep = sleep
        self._summaries: dict[str, Summary | None] = {}  # the least recently used first
        self._reading: dict[str, object] = {}
        self._changed_at: dict[str, int] = {}
        self._watchers: dict[Watcher, None] = {}
        self._dirty: dict[str, None] = {}
        self._looking: asyncio.Task[None] | None = None
        self._beginning: set[asyncio.Task[None]] = set()
        self._stop_hearing = hub.subscribe(self._committed)

    def watch(self, found: Pass, tell: Callable[[Lines, bool], bool]) -> Callable[[], None]:
        """Tell somebody of their whole list, and then of what changes in it.

        Args:
            found: What their token proves.
            tell: See :class:`Watcher`. Lines are ``(id, facts)``, facts ``None`` for what is gone.

        Returns:
            What ends it.
        """
        watcher = Watcher(found, tell)
        self._watchers[watcher] = None
        task = asyncio.get_running_loop().create_task(self._begin(watcher), name="begin a list")
        self._beginning.add(task)
        task.add_done_callback(self._beginning.discard)

        def stop() -> None:
            self._watchers.pop(watcher, None)
            task.cancel()

        return stop

    async def grant(self, found: Pass, conversation: str) -> Grant | None:
        """What somebody may do in a conversation, as things are.

        Raises:
            CrdtLlmError: That cannot be found out now.
        """
        return _grant(found, conversation, await self._summary(conversation))

    async def put_away(self, principal: str, conversation: str, *, archived: bool) -> None:
        """Put a conversation away in a principal's own list, or take it back.

        Raises:
            StoreFailed: It is as it was.
        """
        await self._archive.put(principal, conversation, archived=archived)
        self._mark(conversation)

    async def close(self) -> None:
        """Tell nobody anything any more."""
        self._stop_hearing()
        self._watchers.clear()
        tasks = [*self._beginning, *([self._looking] if self._looking is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # -- what changed --------------------------------------------------------------------------

    def _committed(self, conversation: str) -> None:
        self._changed_at[conversation] = self._clock()
        self._summaries.pop(conversation, None)
        self._reading.pop(conversation, None)
        self._mark(conversation)

    def _mark(self, conversation: str) -> None:
        if self._watchers:
            self._dirty[conversation] = None
            if self._looking is None:
                looking = asyncio.get_running_loop().create_task(self._look(), name="look at lists")
                self._looking = looking

    async def _look(self) -> None:
        try:
            while self._dirty and self._watchers:
                dirty, self._dirty = tuple(self._dirty), {}
                for watcher in tuple(self._watchers):
                    if watcher.is_begun:
                        await self._tell_changes(watcher, dirty)
                    else:
                        watcher.missed.update(dict.fromkeys(dirty))
                await self._sleep(PACE_S)
        finally:
            self._looking = None

    async def _tell_changes(self, watcher: Watcher, dirty: Iterable[str]) -> None:
        news: dict[str, Mapping[str, Any] | None] = {}
        try:
            away = self._archive.of(watcher.found.principal)
            for conversation in dirty:
                line = await self._line(watcher.found, conversation, away)
                if line != watcher.lines.get(conversation):
                    news[conversation] = line
        except CrdtLlmError as error:
            logger.warning("a list is not up to date: %s", error)
            self._dirty.update(dict.fromkeys(dirty))
            return
        if not news:
            return
        if not watcher.tell(tuple(news.items()), False):
            self._dirty.update(dict.fromkeys(news))
            return
        for conversation, line in news.items():
            if line is None:
                watcher.lines.pop(conversation, None)
            else:
                watcher.lines[conversation] = line

    # -- what there is -------------------------------------------------------------------------

    async def _begin(self, watcher: Watcher) -> None:
        found = watcher.found
        while True:
            try:
                names = await self._hub.conversations_of(found.principal)
                away = self._archive.of(found.principal)
                for name, changed_at in names.items():
                    self._changed_at.setdefault(name, changed_at)
                latest = sorted(names, key=lambda one: -self._changed_at[one])[:LINES_MAX]
                for conversation in latest:
                    line = await self._line(found, conversation, away)
                    if line is not None:
                        watcher.lines[conversation] = line
            except CrdtLlmError as error:
                logger.warning("a list cannot be read now: %s", error)
                await self._sleep(PACE_S)
            else:
                break
        watcher.is_begun = True
        watcher.tell(tuple(watcher.lines.items()), True)
        for conversation in watcher.missed:
            self._mark(conversation)
        watcher.missed.clear()

    async def _line(
        self, found: Pass, conversation: str, away: frozenset[str]
    ) -> Mapping[str, Any] | None:
        summary = await self._summary(conversation)
        grant = _grant(found, conversation, summary)
        if grant is None or summary is None:
            return None
        return {
            "title": summary.title,
            "role": str(grant),
            "owner": summary.owner,
            "created_at": summary.created_at,
            "changed_at": self._changed_at.get(conversation),
            "archived": conversation in away,
        }

    async def _summary(self, conversation: str) -> Summary | None:
        if conversation in self._summaries:
            summary = self._summaries.pop(conversation)
        else:
            reading = self._reading[conversation] = object()
            summary = await self._hub.read(conversation, summarise)
            if summary is None and (row := await self._hub.row(conversation)) is not None:
                summary = Summary("", None, row.owner, row.access)
            if self._reading.get(conversation) is not reading:
                return summary  # it changed meanwhile, and is looked at again
            del self._reading[conversation]
        self._summaries[conversation] = summary
        if len(self._summaries) > SUMMARIES_MAX:
            del self._summaries[next(iter(self._summaries))]
        return summary
