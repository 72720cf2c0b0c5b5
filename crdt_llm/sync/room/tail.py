"""The end of a conversation's log, in memory: what someone who was away for a moment lacks.

This module owns how much of it is kept. It must not know documents or peers: updates are opaque.

A state vector can say what a peer lacks too, but the answer then carries every deletion that the
document ever saw, and costs a walk over all of it. Most who come back were away for seconds.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

TAIL_BYTES_MAX: Final = 128 << 10
"""Bytes kept of one conversation: a few replies. With a thousand rooms that is 128 MB at most."""

TAIL_UPDATES_MAX: Final = 1024
"""Updates kept, whose Python objects weigh more than small updates do."""


class Tail:
    """The last committed updates of one conversation, without a gap."""

    def __init__(self) -> None:
        self._updates: deque[tuple[int, bytes]] = deque()
        self._bytes = 0
        self._end = 0

    def begin(self, lsn: int, updates: Sequence[tuple[int, bytes]]) -> None:
        """Forget everything and go on from what was loaded, which ends at ``lsn``."""
        self._updates.clear()
        self._bytes = 0
        self._end = lsn
        for number, update in updates[-TAIL_UPDATES_MAX:]:
            self._add(number, update)

    def append(self, lsn: int, updates: Sequence[bytes]) -> None:
        """Add what was committed with consecutive LSNs, the last of which is ``lsn``."""
        self._end = lsn
        for number, update in enumerate(updates, lsn - len(updates) + 1):
            self._add(number, update)

    def since(self, lsn: int) -> list[bytes] | None:
        """The updates after ``lsn``, in order; ``None`` if some are not kept, or it lies ahead."""
        if lsn == self._end:
            return []
        if not self._updates or not self._updates[0][0] <= lsn + 1 <= self._end:
            return None
        return [update for number, update in self._updates if number > lsn]

    def _add(self, lsn: int, update: bytes) -> None:
        self._updates.append((lsn, update))
        self._bytes += len(update)
        while self._bytes > TAIL_BYTES_MAX or len(self._updates) > TAIL_UPDATES_MAX:
            self._bytes -= len(self._updates.popleft()[1])
