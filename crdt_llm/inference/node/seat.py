"""What the node takes from outside, as contracts: seats, leases, engines, time and chance.

This module owns no behaviour. It is where the node's world ends: whoever wires a node up, be it
with rooms in the same process or with a socket, implements these.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Hashable

    from crdt_llm.inference.contract import Engine


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to act as a conversation's node."""

    epoch: int
    node: bytes
    signature: bytes


class Seat(Protocol):
    """The node's membership in one conversation."""

    @property
    def state(self) -> bytes:
        """The document as it was when the seat was taken, as one update."""
        ...

    async def lease(self) -> Lease:
        """Ask for the conversation's lease; returns once this node has it.

        That may take as long as another node is alive. To cancel the call is to want it no more.
        A lease that ends takes its seat along: ``lost`` is called.

        Raises:
            Unavailable: the seat was lost meanwhile.
        """
        ...

    async def submit(self, update: bytes) -> None:
        """Commit an update. Returns once it is durable.

        Raises:
            Refused: it is against a rule.
            Unavailable: it did not become durable; ``LeaseLost`` if this node is not the
                conversation's any more.
        """
        ...

    async def leave(self) -> None:
        """Give the seat back, and the lease with it."""
        ...


class TakeSeat(Protocol):
    """How the node joins a conversation."""

    async def __call__(
        self, conversation: str, deliver: Callable[[bytes], None], lost: Callable[[], None]
    ) -> Seat:
        """Join.

        Args:
            conversation: its id.
            deliver: called with others' committed updates, in their order.
            lost: called when the seat is of no use any more and must be taken anew.
        """
        ...


class TakeHint(Protocol):
    """How a node hears what people type; see :meth:`crdt_llm.inference.node.node.Node.hint`."""

    def __call__(
        self, conversation: str, source: Hashable, *, after: str | None, keep: int, text: str
    ) -> None:
        """Take a hint."""
        ...


@dataclass(frozen=True, slots=True)
class Surroundings:
    """Everything that the node takes from outside.

    Attributes:
        take_seat: joins a conversation.
        start_engine: starts the engine, anew after it died.
        clock_ms: wall time, for ``at`` and for what a reply cost.
        random: ids, salts, client ids: so many random bytes.
        sleep: waits some seconds, between attempts to get an engine or a seat back.
        seats_max: how many seats it can have at once.
        gives_back: whether a seat where nothing is to do is given back; the node must then be told
            of every change where it has none.
    """

    take_seat: TakeSeat
    start_engine: Callable[[], Awaitable[Engine]]
    clock_ms: Callable[[], int]
    random: Callable[[int], bytes]
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    seats_max: int = 1000
    gives_back: bool = False
