"""A node's side of one lease: waiting for it, asking again, and hearing that it is over.

This module owns when a node asks. It must not know frames or sockets, nor who grants leases.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

    from crdt_llm.errors import CrdtLlmError
    from crdt_llm.sync.wire.lease import Granted

RETRY_S_MIN: Final = 0.1
"""No node asks again sooner, whatever it was told: a lease that is about to end needs a moment."""


class LeaseWish:
    """A node's side of one lease: waiting for it, asking again when that may be of use.

    Args:
        ask: Asks for the lease.
        withdraw: Says that it is not wanted (any more).
        ended: Called once if the lease ends after it was had.
    """

    def __init__(
        self, ask: Callable[[], None], withdraw: Callable[[], None], ended: Callable[[str], None]
    ) -> None:
        self._ask = ask
        self._withdraw = withdraw
        self._ended = ended
        self._waiting: asyncio.Future[Granted] | None = None
        self._again: asyncio.TimerHandle | None = None
        self._granted: Granted | None = None

    @property
    def granted(self) -> Granted | None:
        """The lease, while it is had."""
        return self._granted

    async def wait(self) -> Granted:
        """Ask; returns once the lease is had. To cancel is to want it no more.

        Raises:
            CrdtLlmError: What :meth:`fail` was called with.
        """
        if self._granted is not None:
            return self._granted
        self._waiting = asyncio.get_running_loop().create_future()
        self._ask()
        try:
            return await self._waiting
        except asyncio.CancelledError:
            if self._granted is None:
                self._withdraw()
            raise
        finally:
            self._waiting = None
            self._stop_asking()

    def leased(self, granted: Granted) -> None:
        """The lease is had."""
        self._granted = granted
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(granted)

    def unleased(self, retry_s: float, reason: str) -> None:
        """It is not had (any more)."""
        had, self._granted = self._granted, None
        if had is not None:
            self._ended(reason)
        elif self._waiting is not None and not self._waiting.done():
            self._stop_asking()
            loop = asyncio.get_running_loop()
            self._again = loop.call_later(max(retry_s, RETRY_S_MIN), self._ask)

    def fail(self, error: CrdtLlmError) -> None:
        """It cannot be had here any more."""
        self._granted = None
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_exception(error)

    def _stop_asking(self) -> None:
        if self._again is not None:
            self._again.cancel()
            self._again = None
