"""Backpressure by bytes: who wants to queue something waits here until there is room.

It owns one number and the order of those who wait. It must not know what the bytes are for.
"""

from __future__ import annotations

import asyncio
from collections import deque


class ByteBudget:
    """A first-come-first-served semaphore that counts bytes.

    Nobody overtakes: a small request waits behind a large one, so that the appends of one
    conversation are queued in the order in which they were asked for.
    """

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._bytes_held = 0
        # Everyone who has not got going yet, also those who were granted their bytes in this very
        # turn of the event loop: as long as one is listed, newcomers queue up behind.
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @property
    def bytes_held(self) -> int:
        """Bytes that were acquired and not yet released."""
        return self._bytes_held

    async def acquire(self, size: int) -> None:
        """Wait until ``size`` bytes (at most ``bytes_max``) are free, and take them.

        Cancelled while it waits, it takes nothing.
        """
        if not self._waiting and self._bytes_held + size <= self._bytes_max:
            self._bytes_held += size
            return
        turn = asyncio.get_running_loop().create_future()
        entry = (size, turn)
        self._waiting.append(entry)
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # granted and cancelled in the same turn
                self._bytes_held -= size
            raise
        finally:
            self._waiting.remove(entry)
            # Those who came behind this one may have room since.
            self._grant()

    def release(self, size: int) -> None:
        """Give ``size`` bytes back and let those go on who now have room."""
        self._bytes_held -= size
        self._grant()

    def _grant(self) -> None:
        for size, turn in self._waiting:
            if turn.done():
                continue
            if self._bytes_held + size > self._bytes_max:
                break
            self._bytes_held += size
            turn.set_result(None)
