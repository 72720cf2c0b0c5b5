"""Presence: who is here, as the y-websocket dialect shares it. Never stored, never a promise.

This module owns which states are known, who may speak for which client id, and when a state ends.
It must not know sockets, documents or stores; time is an argument.

The rules, from ``y-protocols/awareness`` and from what its reference server leaves open:

1. A state replaces an older one of its client: its clock must be greater; ``null`` may come at the
   same clock. A first state has a clock of at least 1.
2. A connection owns the ids that it introduced; it, and all connections of its principal together,
   may have so many. Stock clients repeat to the server what they hear of others, so states of an id
   that another connection owns are dropped without offence.
3. A connection that closes takes its ids along: everybody hears ``null`` for them.
4. A state that was not renewed for 30 s (clients renew after 15 s) is gone.
5. The clock of an id that is gone is remembered for a while, or a late repetition by somebody else
   would bring its ghost back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from crdt_llm.sync.wire.y_websocket import (
    AWARENESS_BYTES_MAX,
    AWARENESS_STATES_MAX,
    AwarenessState,
    AwarenessUpdate,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from crdt_llm.document.rules import Author

EXPIRY_S: Final = 30.0
"""A state that was not renewed for so long is gone; ``outdatedTimeout`` of y-protocols."""

IDS_PER_CONNECTION_MAX: Final = 16
"""A page has one id; the rest is room for a process that holds several replicas."""

IDS_PER_PRINCIPAL_MAX: Final = 64
"""Of all connections of one principal: a person with a dozen pages open on some devices. So nobody
takes the places of everybody else."""

STATES_MAX: Final = AWARENESS_STATES_MAX
"""States in one room: what a message may carry."""

GONE_MAX: Final = 4 * STATES_MAX
"""Clocks remembered of ids that are gone; beyond it the oldest are forgotten."""

_STATE_OVERHEAD_BYTES: Final = 16  # client, clock and length, as varUints


class Speaker(Protocol):
    """A connection. Compared by identity."""

    @property
    def author(self) -> Author:
        """Who is at the other end."""
        ...


@dataclass(frozen=True, slots=True)
class _Present:
    state: AwarenessState
    owner: Speaker
    renewed_at: float


class Awareness:
    """The presence of one room.

    Args:
        clock: Seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._present: dict[int, _Present] = {}
        self._gone: dict[int, tuple[int, float]] = {}  # client -> (clock, since when), oldest first

    def __len__(self) -> int:
        return len(self._present)

    @property
    def states(self) -> tuple[AwarenessState, ...]:
        """Every state of a client that is here."""
        return tuple(present.state for present in self._present.values())

    def receive(
        self, owner: Speaker, states: Iterable[AwarenessState]
    ) -> tuple[AwarenessState, ...]:
        """Take what a connection says.

        Args:
            owner: The connection.
            states: What it said.

        Returns:
            What is new in it: for everybody, its sender included.
        """
        now = self._clock()
        principal = owner.author.principal
        owned = sum(present.owner is owner for present in self._present.values())
        of_principal = sum(
            present.owner.author.principal == principal for present in self._present.values()
        )
        news: list[AwarenessState] = []
        for state in states:
            present = self._present.get(state.client)
            if present is None:
                last, _ = self._gone.get(state.client, (0, now))
                full = (
                    owned >= IDS_PER_CONNECTION_MAX
                    or of_principal >= IDS_PER_PRINCIPAL_MAX
                    or len(self._present) >= STATES_MAX
                )
                if state.state_json is None or state.clock <= last or full:
                    continue
                owned += 1
                of_principal += 1
            elif present.owner is not owner:
                continue
            elif state.state_json is None:
                if state.clock < present.state.clock:
                    continue
                self._forget(state.client, state.clock, now)
                owned -= 1
                of_principal -= 1
                news.append(state)
                continue
            elif state.clock <= present.state.clock:
                continue
            self._gone.pop(state.client, None)
            self._present[state.client] = _Present(state, owner, now)
            news.append(state)
        return tuple(news)

    def leave(self, owner: Speaker) -> tuple[AwarenessState, ...]:
        """Let a connection go; the answer says ``null`` for all ids that it owned."""
        return self._end(lambda present: present.owner is owner)

    def expire(self) -> tuple[AwarenessState, ...]:
        """Let go of what was not renewed; the answer says ``null`` for it."""
        oldest = self._clock() - EXPIRY_S
        for client in [client for client, (_, since) in self._gone.items() if since < oldest]:
            del self._gone[client]
        return self._end(lambda present: present.renewed_at < oldest)

    def _end(self, ends: Callable[[_Present], bool]) -> tuple[AwarenessState, ...]:
        now = self._clock()
        ended = [present.state for present in self._present.values() if ends(present)]
        for state in ended:
            self._forget(state.client, state.clock, now)
        return tuple(AwarenessState(state.client, state.clock, None) for state in ended)

    def _forget(self, client: int, clock: int, now: float) -> None:
        del self._present[client]
        self._gone[client] = (clock, now)
        if len(self._gone) > GONE_MAX:
            del self._gone[next(iter(self._gone))]


def messages(states: Iterable[AwarenessState]) -> Iterator[AwarenessUpdate]:
    """Pack states into as few messages as the dialect's limits allow."""
    packed: list[AwarenessState] = []
    size = _STATE_OVERHEAD_BYTES
    for state in states:
        length = _STATE_OVERHEAD_BYTES + len((state.state_json or "null").encode())
        if packed and (size + length > AWARENESS_BYTES_MAX or len(packed) == AWARENESS_STATES_MAX):
            yield AwarenessUpdate(tuple(packed))
            packed, size = [], _STATE_OVERHEAD_BYTES
        packed.append(state)
        size += length
    if packed:
        yield AwarenessUpdate(tuple(packed))
