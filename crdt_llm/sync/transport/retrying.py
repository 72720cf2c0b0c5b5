"""When to come back to a relay: what a close code means, and how long to wait.

This module owns the reading of close codes and the waiting times. It must not know sockets, tasks
or clocks.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from crdt_llm.errors import AuthenticationFailed, Forbidden, Refused, TooLarge
from crdt_llm.sync.wire.verdict import CloseCode

if TYPE_CHECKING:
    from random import Random

RETRY_FIRST_S: Final = 0.25
"""The longest first wait: a relay that restarts is back within a second."""

RETRY_LAST_S: Final = 30.0
"""The longest wait of all: a laptop that wakes up should not sit next to a live relay for long."""

_FINAL_CODES: Final = range(4400, 4500)
"""Close codes that mean "do not come back with the same request", as y-websocket 3 reads them."""

_KINDS: Final[dict[int, type[Refused]]] = {
    CloseCode.UNAUTHENTICATED: AuthenticationFailed,
    CloseCode.FORBIDDEN: Forbidden,
    CloseCode.TOO_LARGE: TooLarge,
}
_CODED_REASON: Final = re.compile(r"([a-z][a-z0-9-]*): (.+)", re.DOTALL)


def refusal(code: int, reason: str) -> Refused | None:
    """What a close code means: ``None`` to come back, or the refusal that it stands for.

    Args:
        code: the websocket close code.
        reason: what the relay said, with its word for programs in front (``word: sentence``);
            empty if it said nothing.
    """
    if code not in _FINAL_CODES:
        return None
    kind = _KINDS.get(code, Refused)
    if coded := _CODED_REASON.fullmatch(reason):
        return kind(coded[1], coded[2])
    known = code in CloseCode.__members__.values()
    word = CloseCode(code).name.lower().replace("_", "-") if known else f"refused-{code}"
    return kind(word, reason or f"the relay refused this conversation ({word}) and gave no reason")


class Backoff:
    """How long to wait before the next try: doubling, with half of it left to chance.

    Chance keeps the devices of a relay that restarts from coming back all at once.
    """

    def __init__(self, random: Random) -> None:
        self._random = random
        self._tries = 0

    def reset(self) -> None:
        """Begin again with short waits; only a completed sync earns that."""
        self._tries = 0

    def next_s(self) -> float:
        """The next wait in seconds."""
        longest = min(RETRY_LAST_S, RETRY_FIRST_S * 2.0 ** min(self._tries, 16))
        self._tries += 1
        return longest * (0.5 + 0.5 * self._random.random())
