"""What the node shows of itself in a conversation: what it is doing, and how much it has read.

This module owns the form of that state and its pace: what it is doing is shown at most four times a
second, mere numbers once a second, and all of it again before others would take the node for gone.
It is never stored and promises nothing. It must not know what carries it.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Callable

SHOW_INTERVAL_S: Final = 0.25  # between two states: as often as anybody reads a word
COUNT_INTERVAL_S: Final = 1.0  # between two that differ in numbers alone, as those of a reply do
SETTLE_S: Final = 0.1  # before any: what changed may begin a reply, and its first token goes first
RENEW_S: Final = 15.0  # others take who was silent for 30 s for gone (y-protocols/awareness)


class Doing(StrEnum):
    """What the node is doing in a conversation."""

    IDLE = "idle"
    PREFILLING = "prefilling"
    GENERATING = "generating"
    QUEUED = "queued"


@dataclass(frozen=True, slots=True)
class NodeState:
    """The node's state in one conversation.

    Attributes:
        model: the fingerprint of its model.
        doing: what it is doing.
        warm: tokens of the shown path whose KV it has.
        tokens: tokens of the shown path, as far as it has read it.
        queue: the place of what waits for room, 1 is next; 0 if nothing does.
    """

    model: str
    doing: Doing = Doing.IDLE
    warm: int = 0
    tokens: int = 0
    queue: int = 0

    def does_as(self, other: NodeState) -> bool:
        """Whether only the numbers of tokens may differ."""
        mine = (self.model, self.doing, self.queue)
        return mine == (other.model, other.doing, other.queue)

    def plain(self) -> dict[str, Any]:
        """The form in which it is shown."""
        return {
            "node": {
                "model": self.model,
                "doing": self.doing.value,
                "warm": self.warm,
                "tokens": self.tokens,
                "queue": self.queue,
            }
        }


@runtime_checkable
class Shows(Protocol):
    """A seat that others can see."""

    def show(self, client: int, clock: int, state: dict[str, Any]) -> None:
        """Show a state to everyone in the conversation, as far as it gets there.

        Args:
            client: the client id that it is shown under.
            clock: grows with each state.
            state: JSON.
        """
        ...


class Presence:
    """The node's state in one conversation, shown when it changes.

    Args:
        seat: where it is shown; a seat that cannot shows nothing.
        client: the client id that it is shown under.
        look: says what to show now; ``None`` for nothing.
    """

    def __init__(self, seat: object, client: int, look: Callable[[], NodeState | None]) -> None:
        self._seat = seat if isinstance(seat, Shows) else None
        self._client = client
        self._look = look
        self._clock = 0
        self._shown: NodeState | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._shown_at = 0.0  # by the loop's clock
        self._may_look_at = 0.0

    def changed(self) -> None:
        """Something may be different: show it soon."""
        if self._seat is None:
            return
        now = asyncio.get_running_loop().time()
        self._call_at(max(now + SETTLE_S, self._may_look_at))

    def close(self) -> None:
        """Show nothing more."""
        self._seat = None
        if self._timer is not None:
            self._timer.cancel()

    def _call_at(self, when: float) -> None:
        if self._timer is not None:
            if self._timer.when() <= when and not self._timer.cancelled():
                return
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_at(when, self._show)

    def _show(self) -> None:
        self._timer = None
        loop, state = asyncio.get_running_loop(), self._look()
        if self._seat is None or state is None:
            return
        now = loop.time()
        self._may_look_at = now + SHOW_INTERVAL_S
        again_at = self._shown_at + RENEW_S
        if state != self._shown:
            counts = self._shown is not None and state.does_as(self._shown)
            again_at = self._shown_at + COUNT_INTERVAL_S if counts else now
        if now >= again_at:
            self._clock += 1
            self._shown, self._shown_at = state, now
            self._seat.show(self._client, self._clock, state.plain())
            again_at = now + RENEW_S
        self._call_at(again_at)
