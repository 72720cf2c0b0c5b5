"""One scrub of the log for all conversations that owe one.

This module owns that scrubs are shared: wiping a log rewrites all of it, whoever asked. It must not
know what was withdrawn, nor where it is noted that a scrub is owed.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from crdt_llm.store.log import UpdateLog


class Scrubber:
    """Scrubs a log; whoever asks while one is under way shares the next one."""

    def __init__(self, log: UpdateLog) -> None:
        self._log = log
        self._running: asyncio.Task[None] | None = None
        self._next: asyncio.Task[None] | None = None

    async def scrub(self) -> None:
        """Wipe what was removed before this call; returns once that is done.

        Raises:
            StoreFailed: traces may be left.
            Corrupt: the log's file is damaged.
        """
        if self._next is None:
            self._next = asyncio.get_running_loop().create_task(self._run(), name="scrub")
        # Whoever does not wait for it any more does not stop it for the others.
        await asyncio.shield(self._next)

    async def _run(self) -> None:
        if self._running is not None:
            await asyncio.wait([self._running])
        self._running, self._next = self._next, None
        try:
            await self._log.scrub()
        finally:
            self._running = None
