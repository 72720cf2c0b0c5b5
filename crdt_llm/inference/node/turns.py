"""Who may use the engine at the same time: all replies together, or a suspect alone.

This module owns the waiting. It knows neither engines nor replies. An engine's process that dies
takes all replies with it that it worked on, and nobody can tell which of them it died of. So each
of them goes on alone: the guilty one dies alone then, and is found; the others come to their ends.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable


class Turns:
    """Turns at something that many may use together, or one alone."""

    def __init__(self) -> None:
        self._inside = 0
        self._is_alone = False
        self._waiting_alone = 0
        self._changed = asyncio.Event()

    @asynccontextmanager
    async def taken(self, *, alone: bool) -> AsyncIterator[None]:
        """Wait for a turn, and have it for the length of a block.

        Args:
            alone: nobody else is inside meanwhile. Who waits for that goes before those who come
                later, so it is not kept waiting for ever.
        """
        if alone:
            self._waiting_alone += 1
            try:
                await self._until(lambda: not self._inside)
            finally:
                self._waiting_alone -= 1
                self._announce()
        else:
            await self._until(lambda: not (self._is_alone or self._waiting_alone))
        self._inside += 1
        self._is_alone = alone
        try:
            yield
        finally:
            self._inside -= 1
            self._is_alone = False
            self._announce()

    async def _until(self, holds: Callable[[], bool]) -> None:
        while not holds():
            await self._changed.wait()

    def _announce(self) -> None:
        """Let everyone who waits have a look."""
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
