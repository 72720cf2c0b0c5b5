"""How often somebody may be refused before it has to wait.

A refusal costs a relay more than a write that is accepted, so somebody who is refused all the time
must not get more of it than everyone else. This module owns the count: by principal, by address and
by conversation, with a number that is free and a rate at which it comes back. It only ever delays,
and whoever is refused now and then never notices. It must not know rooms, sockets or rules.

Whoever is in debt by its principal or its address waits before the next update is looked at. A
conversation's debt delays only the answers of those who are refused in it: one of its writers must
not be able to hold up the others.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

REFUSALS_FREE: Final = 20
"""Refusals in a row that nobody waits for: an application with a fault is found by its first."""

REFUSALS_PER_MINUTE: Final = 20
"""The rate behind that, and never less: a person who tries again by hand is not slowed down."""

DELAY_S_MAX: Final = 60.0
"""The longest that anybody waits: then it is told, and may try again."""

COUNTED_MAX: Final = 20_000
"""Principals, addresses and conversations that are counted at a time; 100 bytes each. Beyond it
the one that was refused least recently is forgotten."""

_SECONDS_EACH: Final = 60.0 / REFUSALS_PER_MINUTE


class RefusalRate:
    """The count of one process.

    Args:
        clock: Seconds, monotonic.
        later: Calls something after so many seconds; the event loop's by default.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        later: Callable[[float, Callable[[], None]], object] | None = None,
    ) -> None:
        self._clock = clock
        self._later = later
        # When each would have been refused last, had it come at the rate: a bucket in one number.
        self._paid_until: OrderedDict[tuple[str, str], float] = OrderedDict()

    def refused(self, principal: str, address: str | None, conversation: str) -> float:
        """Count a refusal; how many seconds its answer has to wait."""
        now = self._clock()
        waits = []
        for key in (*_who(principal, address), ("conversation", conversation)):
            paid = max(self._paid_until.pop(key, 0.0), now) + _SECONDS_EACH
            # Nobody gets deeper into debt than what it would be let to wait for.
            paid = min(paid, now + REFUSALS_FREE * _SECONDS_EACH + DELAY_S_MAX)
            self._paid_until[key] = paid
            waits.append(paid - now - REFUSALS_FREE * _SECONDS_EACH)
        while len(self._paid_until) > COUNTED_MAX:
            self._paid_until.popitem(last=False)
        return max(0.0, *waits)

    def debt(self, principal: str, address: str | None) -> float:
        """How many seconds somebody has to wait before it is listened to."""
        if not self._paid_until:
            return 0.0
        free_until = self._clock() + REFUSALS_FREE * _SECONDS_EACH
        owed = [self._paid_until.get(key, 0.0) - free_until for key in _who(principal, address)]
        return max(0.0, *owed)

    def later(self, seconds: float, call: Callable[[], None]) -> None:
        """Call something after so many seconds."""
        if self._later is None:
            asyncio.get_running_loop().call_later(seconds, call)
        else:
            self._later(seconds, call)


def _who(principal: str, address: str | None) -> Iterator[tuple[str, str]]:
    yield ("principal", principal)
    if address is not None:
        yield ("address", address)
