"""What a node that is elsewhere should look at: conversations it takes no part in that changed.

This module owns which are named and how often. It must not know frames, sockets or documents.

A node that joins is told of everything that is stored: a crash may have cut replies short. After
that it hears of each conversation that had a commit, at once, but of none more than once in a
while: a reply that another node streams commits many times a second.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Final

from crdt_llm.errors import CrdtLlmError
from crdt_llm.sync.wire.frames import LISTED_MAX

if TYPE_CHECKING:
    from collections.abc import Callable

    from crdt_llm.sync.relay.hub import Hub

logger = logging.getLogger("crdt_llm.sync")

AGAIN_S: Final = 1.0
"""How long a conversation that was named is not named again."""


class WorkList:
    """What one node has not been told yet.

    Args:
        hub: Whose conversations.
        clock: Seconds, monotonic.
        is_of_use: Whether the node may want to hear of a conversation now.
        wake: Called when there is something to :meth:`take`.
    """

    def __init__(
        self,
        hub: Hub,
        clock: Callable[[], float],
        is_of_use: Callable[[str], bool],
        wake: Callable[[], None],
    ) -> None:
        self._hub = hub
        self._clock = clock
        self._is_of_use = is_of_use
        self._wake = wake
        self._waiting: dict[str, None] = {}
        self._later: dict[str, None] = {}
        self._named: dict[str, float] = {}  # the oldest first
        self._stop_hearing = hub.subscribe(self._changed)
        self._begun = asyncio.get_running_loop().create_task(self._begin(), name="work of a node")

    def take(self) -> tuple[str, ...]:
        """Conversations to look at, as many as one frame names."""
        now = self._clock()
        taken: list[str] = []
        while self._waiting and len(taken) < LISTED_MAX:
            conversation = next(iter(self._waiting))
            del self._waiting[conversation]
            if self._is_of_use(conversation):
                taken.append(conversation)
                self._named.pop(conversation, None)
                self._named[conversation] = now
        return tuple(taken)

    def tick(self) -> bool:
        """Let go of what was named long ago; whether there is something to take now."""
        oldest = self._clock() - AGAIN_S
        while self._named and next(iter(self._named.values())) <= oldest:
            del self._named[next(iter(self._named))]
        for conversation in [one for one in self._later if one not in self._named]:
            del self._later[conversation]
            self._waiting[conversation] = None
        return bool(self._waiting)

    def stop(self) -> None:
        """Hear of nothing any more."""
        self._stop_hearing()
        self._begun.cancel()

    async def _begin(self) -> None:
        try:
            for stored in await self._hub.conversations():
                self._waiting[stored.conversation] = None
        except CrdtLlmError as error:
            logger.warning("a node was not told what is stored: %s", error)
        self._wake()

    def _changed(self, conversation: str) -> None:
        if not self._is_of_use(conversation):
            return
        if conversation in self._named:
            self._later[conversation] = None
        else:
            self._waiting[conversation] = None
            self._wake()
