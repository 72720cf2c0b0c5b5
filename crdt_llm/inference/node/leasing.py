"""The lease of one sitting: asked for once there is something to write, and written down.

This module owns the asking. When a lease is wanted is decided in
:mod:`crdt_llm.inference.node.evaluate`. It must not know how others decide who gets it.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from crdt_llm.errors import Unavailable

if TYPE_CHECKING:
    from collections.abc import Callable

    from crdt_llm.inference.node.seat import Lease
    from crdt_llm.inference.node.workplace import Workplace

logger = logging.getLogger("crdt_llm.inference")


class Leasing:
    """The node's lease of one conversation, while it has a seat there.

    Args:
        conversation: the conversation's id.
        work: the replica that it is written in.
        wake: asks for another look.
    """

    def __init__(self, conversation: str, work: Workplace, wake: Callable[[], None]) -> None:
        self._id = conversation
        self._work = work
        self._wake = wake
        self._lease: Lease | None = None
        self._asking: asyncio.Task[None] | None = None

    @property
    def is_granted(self) -> bool:
        """Whether this seat was given a lease, written down or not."""
        return self._lease is not None

    @property
    def is_asking(self) -> bool:
        """Whether one is being waited for, which may take as long as another node is alive."""
        return self._asking is not None

    def ask(self) -> None:
        """Ask for one, unless that was done."""
        if self._asking is None:
            self._asking = asyncio.create_task(self._wait(), name=f"lease of {self._id}")

    async def _wait(self) -> None:
        try:
            self._lease = await self._work.seat.lease()
        except Unavailable as error:
            logger.info("conversation %s: no lease: %s", self._id, error)
        finally:
            self._asking = None
            self._wake()

    def cancel(self) -> tuple[asyncio.Task[None], ...]:
        """Want it no more, if it is still being waited for; returns whom to wait for then."""
        if self._asking is None:
            return ()
        self._asking.cancel()
        return (self._asking,)

    def find(self) -> None:
        """Note whether ours is in the document by now."""
        if not self._work.leased and self._lease is not None:
            self._work.find_lease(self._lease)

    async def record(self) -> None:
        """Write it down, so that proofs count under it."""
        lease = self._lease
        if lease is not None:
            await self._work.write(lambda w: w.add_lease(lease.epoch, lease.node, lease.signature))
