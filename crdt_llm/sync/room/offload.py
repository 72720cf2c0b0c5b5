"""Work on bytes that would keep the event loop: done in a thread if there are many of them."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

Result = TypeVar("Result")

OFFLOAD_BYTES_MIN: Final = 32 << 10
"""From here on an update is read and searched for gaps in a thread: 1.5 MB take the better part of
a second, and the event loop belongs to all conversations."""


async def offload(size: int, work: Callable[[], Result]) -> Result:
    """Do what costs as much as ``size`` bytes to read, in a thread if that is long."""
    return await asyncio.to_thread(work) if size >= OFFLOAD_BYTES_MIN else work()
