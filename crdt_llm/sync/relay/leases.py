"""Leases: which node acts for which conversation, and for how long.

This module owns who holds a lease, who waits for one, and when it is over. It must not know
frames, sockets or documents. :class:`LeaseDesk` is the bookkeeping: pure, with the time as its only
outside. :class:`LeaseOffice` carries out what the desk says: it has epochs made durable, signs
leases, and tells the holders.

A lease says who *should* work; it protects nothing by itself, for a node that was asleep for an
hour knows nothing of the time that has passed. What protects a conversation is the *epoch*, a
number that only grows: it is durable before its holder hears of it, and a room refuses, inside its
own turn, what comes from a node under any other one. So two nodes never write at the same time,
whatever their clocks and the network do. The rules:

L1. At most one holder a conversation. A new holder gets a new epoch.
L2. A lease is over when it was not renewed for its ttl, or at once when it is given back. A
    connection that ends does not end its leases: the node may be back within the ttl.
L3. The same node (its public key) that comes back within the ttl, on another connection, goes on
    under the epoch that it has; its old connection, should it still be there, holds nothing. The
    key alone is public: whoever lets nodes in sees to it that one key is one principal's.
L4. The node in the relay's own process goes first: nothing that it computes crosses a wire. It
    takes over at once, its leases do not run out, and nobody takes them by its key. (A reply that
    was begun elsewhere is resumed at the next token.)
L5. Who waits is given the lease unasked, in the order of asking, as soon as it is free.
L6. Whoever loses a lease is told (:class:`Ended`) before anybody else is granted it. Whoever wires
    holders to rooms must stop its writes in that very call, and likewise when its connection ends:
    what was received and not yet judged must be judged as nobody's.
L7. A grant passes through the room's turn (``grant_epoch``), also where the epoch stays, as it
    does while the node is the same. So all that was committed before was sent to the new holder
    before it hears of its lease.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol, TypeAlias

from crdt_llm.document.chain import lease_message
from crdt_llm.errors import CrdtLlmError
from crdt_llm.sync.wire.lease import Granted
from crdt_llm.sync.wire.verdict import reason_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

logger = logging.getLogger("crdt_llm.sync")

TTL_S: Final = 10.0
"""How long a lease goes on unrenewed: how long a person waits for a reply whose node was killed."""

RETRY_S: Final = 2.0
"""When to ask again for a lease that could not be given for another reason than a holder."""


class LeaseHolder(Protocol):
    """One connection of a node, or the node in the relay's process. Compared by identity."""

    @property
    def node(self) -> bytes:
        """The node's Ed25519 public key; it stays the same as long as the holder is there."""
        ...

    @property
    def embedded(self) -> bool:
        """Whether it is the node in the relay's own process."""
        ...

    def leased(self, lease: Granted) -> None:
        """It holds this lease now (or: still), and its writes count under the epoch."""
        ...

    def unleased(self, conversation: str, retry_s: float, reason: str) -> None:
        """It does not hold the lease of this conversation (any more): its writes count no more.

        Args:
            conversation: Which.
            retry_s: When asking again may be of use; who waits is told unasked, too.
            reason: One line for people.
        """
        ...


# -- the desk's events -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Grant:
    """``holder`` is next: have its epoch made durable, then call :meth:`LeaseDesk.confirm`.

    Attributes:
        conversation: Whose lease.
        holder: Who gets it.
    """

    conversation: str
    holder: LeaseHolder


@dataclass(frozen=True, slots=True)
class Ended:
    """``holder`` had the lease and has it no more."""

    conversation: str
    holder: LeaseHolder
    reason: str


@dataclass(frozen=True, slots=True)
class Wait:
    """``holder`` asked, and somebody else has the lease."""

    conversation: str
    holder: LeaseHolder
    retry_s: float
    reason: str


@dataclass(frozen=True, slots=True)
class Vacant:
    """A lease ran out and nobody waits for it: work may be left, so whoever can serve looks."""

    conversation: str


LeaseEvent: TypeAlias = Grant | Ended | Wait | Vacant


@dataclass(slots=True)
class _Lease:
    grant: Grant  # the last; what was granted before it does not count any more
    expires_at: float | None  # None: it does not run out
    is_confirmed: bool = False
    is_connected: bool = True

    @property
    def holder(self) -> LeaseHolder:
        return self.grant.holder


@dataclass(slots=True)
class _Conversation:
    lease: _Lease | None = None
    waiting: dict[LeaseHolder, None] = field(default_factory=dict)  # in the order of asking


class LeaseDesk:
    """Who holds what. Every method answers with what is to be done, in this order.

    Args:
        clock: Seconds, monotonic.
        ttl_s: How long a lease goes on unrenewed.
    """

    def __init__(self, clock: Callable[[], float], ttl_s: float = TTL_S) -> None:
        self.ttl_s = ttl_s
        self._clock = clock
        self._conversations: dict[str, _Conversation] = {}

    # -- asked by holders ----------------------------------------------------------------------

    def want(self, conversation: str, holder: LeaseHolder) -> list[LeaseEvent]:
        """A node asks for a lease. Asking again changes nothing."""
        place = self._conversations.setdefault(conversation, _Conversation())
        events = self._expire(conversation, place)
        # A lease that has just run out, with nobody waiting, was forgotten with its conversation.
        place = self._conversations.setdefault(conversation, place)
        lease = place.lease
        if lease is None:
            return [*events, self._give(conversation, place, holder)]
        if lease.holder is holder:
            if lease.is_confirmed:
                lease.grant = Grant(conversation, holder)
                events.append(lease.grant)
            return events  # else the answer to the first question is on its way
        if lease.holder.node == holder.node and not lease.holder.embedded:  # L3
            if lease.is_connected:
                events.append(
                    Ended(conversation, lease.holder, "your node has come back elsewhere")
                )
            return [*events, self._give(conversation, place, holder)]
        if holder.embedded and not lease.holder.embedded:  # L4
            events.append(Ended(conversation, lease.holder, "the relay's own node has taken over"))
            return [*events, self._give(conversation, place, holder)]
        place.waiting[holder] = None
        return [*events, self._wait(conversation, lease, holder)]

    def give_back(self, conversation: str, holder: LeaseHolder) -> list[LeaseEvent]:
        """A node has nothing to do any more, or does not want to wait any longer."""
        place = self._conversations.get(conversation)
        if place is None:
            return []
        place.waiting.pop(holder, None)
        if place.lease is None or place.lease.holder is not holder:
            self._tidy(conversation, place)
            return []
        events: list[LeaseEvent] = [Ended(conversation, holder, "given back")]
        return events + self._pass_on(conversation, place)

    def renew(self, holder: LeaseHolder) -> list[LeaseEvent]:
        """A node is alive: what it holds goes on. What had run out before is over (L2)."""
        events = self.tick()
        for _, place in self._held_by(holder):
            if place.lease is not None and place.lease.expires_at is not None:
                place.lease.expires_at = self._clock() + self.ttl_s
        return events

    def lost(self, holder: LeaseHolder) -> list[LeaseEvent]:
        """A connection ended: it waits for nothing any more; what it holds runs on (L2)."""
        events: list[LeaseEvent] = []
        for conversation, place in tuple(self._conversations.items()):
            place.waiting.pop(holder, None)
            if place.lease is not None and place.lease.holder is holder:
                place.lease.is_connected = False
                if place.lease.expires_at is None:  # an embedded node comes back with its relay
                    events += self._pass_on(conversation, place)
            self._tidy(conversation, place)
        return events

    # -- told by whoever carries events out ----------------------------------------------------

    def confirm(self, grant: Grant) -> bool:
        """The epoch of a grant is durable.

        Returns:
            Whether the grant still stands; if not, its holder must not hear of it.
        """
        place = self._conversations.get(grant.conversation)
        lease = None if place is None else place.lease
        if lease is None or lease.grant is not grant or not lease.is_connected:
            return False
        if not lease.is_confirmed and lease.expires_at is not None:
            lease.expires_at = self._clock() + self.ttl_s
        lease.is_confirmed = True
        return True

    def fail(self, grant: Grant, reason: str) -> list[LeaseEvent]:
        """The epoch of a grant could not be made durable. Whoever waits next is tried."""
        place = self._conversations.get(grant.conversation)
        if place is None or place.lease is None or place.lease.grant is not grant:
            return []
        events: list[LeaseEvent] = []
        if place.lease.is_connected:
            events.append(Ended(grant.conversation, grant.holder, reason))
        return events + self._pass_on(grant.conversation, place)

    # -- time ----------------------------------------------------------------------------------

    def tick(self) -> list[LeaseEvent]:
        """End what ran out. Call it at :attr:`next_at`, or every second or so."""
        events: list[LeaseEvent] = []
        for conversation, place in tuple(self._conversations.items()):
            events += self._expire(conversation, place)
        return events

    @property
    def next_at(self) -> float | None:
        """When the next lease runs out if nobody renews it, by the clock."""
        ends = (
            place.lease.expires_at
            for place in self._conversations.values()
            if place.lease is not None and place.lease.expires_at is not None
        )
        return min(ends, default=None)

    # -- asked by the relay --------------------------------------------------------------------

    def holder(self, conversation: str) -> LeaseHolder | None:
        """Who has the lease; also one whose connection ended a moment ago."""
        place = self._conversations.get(conversation)
        return None if place is None or place.lease is None else place.lease.holder

    def held(self, holder: LeaseHolder) -> tuple[str, ...]:
        """The conversations whose lease somebody has."""
        return tuple(conversation for conversation, _ in self._held_by(holder))

    # -- inside --------------------------------------------------------------------------------

    def _held_by(self, holder: LeaseHolder) -> Iterator[tuple[str, _Conversation]]:
        for conversation, place in self._conversations.items():
            if place.lease is not None and place.lease.holder is holder:
                yield conversation, place

    def _give(self, conversation: str, place: _Conversation, holder: LeaseHolder) -> Grant:
        place.waiting.pop(holder, None)
        ends = None if holder.embedded else self._clock() + self.ttl_s
        grant = Grant(conversation, holder)
        place.lease = _Lease(grant, ends)
        return grant

    def _wait(self, conversation: str, lease: _Lease, holder: LeaseHolder) -> Wait:
        left = self.ttl_s
        if lease.expires_at is not None:
            left = max(0.0, lease.expires_at - self._clock())
        return Wait(conversation, holder, left, "another node has the lease")

    def _expire(self, conversation: str, place: _Conversation) -> list[LeaseEvent]:
        lease = place.lease
        if lease is None or lease.expires_at is None or self._clock() < lease.expires_at:
            return []
        events: list[LeaseEvent] = []
        if lease.is_connected:
            events.append(Ended(conversation, lease.holder, "the lease was not renewed in time"))
        events += self._pass_on(conversation, place)
        if place.lease is None:
            events.append(Vacant(conversation))
        return events

    def _pass_on(self, conversation: str, place: _Conversation) -> list[LeaseEvent]:
        """The lease is free: whoever waits gets it (L4, L5)."""
        place.lease = None
        waiting = sorted(place.waiting, key=lambda one: not one.embedded)  # stable: L5
        if not waiting:
            self._tidy(conversation, place)
            return []
        return [self._give(conversation, place, waiting[0])]

    def _tidy(self, conversation: str, place: _Conversation) -> None:
        if place.lease is None and not place.waiting:
            self._conversations.pop(conversation, None)


GrantEpoch: TypeAlias = "Callable[[str, bytes], Awaitable[int]]"
"""Makes an epoch current in a conversation, durable and in its room's turn (L7).

It takes the conversation and the node's public key, answers the epoch (the same while the node is)
and raises a ``CrdtLlmError`` if there can be no lease now."""


class LeaseOffice:
    """The desk at work: its events become signed leases, or calls that end them.

    Args:
        grant_epoch: See :data:`GrantEpoch`.
        sign: The relay's signature over a message.
        clock: Seconds, monotonic.
        ttl_s: How long a lease goes on unrenewed.
        vacant: Told of conversations whose lease ran out while nobody waited for it.
    """

    def __init__(
        self,
        grant_epoch: GrantEpoch,
        sign: Callable[[bytes], bytes],
        *,
        clock: Callable[[], float],
        ttl_s: float = TTL_S,
        vacant: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.desk = LeaseDesk(clock, ttl_s)
        self.vacant = vacant
        self._grant_epoch = grant_epoch
        self._sign = sign
        self._granting: dict[asyncio.Task[None], None] = {}  # in order: a seed must replay

    def want(self, conversation: str, holder: LeaseHolder) -> None:
        """A node asks for a lease; it is answered by one of the holder's two calls."""
        self._carry_out(self.desk.want(conversation, holder))

    def give_back(self, conversation: str, holder: LeaseHolder) -> None:
        """A node does not want a lease, or to wait for it, any more."""
        self._carry_out(self.desk.give_back(conversation, holder))

    def renew(self, holder: LeaseHolder) -> float:
        """A node is alive. Returns how long, in seconds, its leases go on from now."""
        self._carry_out(self.desk.renew(holder))
        return self.desk.ttl_s

    def lost(self, holder: LeaseHolder) -> None:
        """A node's connection ended. It is not called any more; its leases run on (L2)."""
        self._carry_out(self.desk.lost(holder))

    def tick(self) -> None:
        """End what ran out; call it every second or so."""
        self._carry_out(self.desk.tick())

    async def close(self) -> None:
        """Grant nothing any more."""
        for task in tuple(self._granting):
            task.cancel()
        await asyncio.gather(*self._granting, return_exceptions=True)

    def _carry_out(self, events: list[LeaseEvent]) -> None:
        for event in events:
            match event:
                case Grant():
                    task = asyncio.get_running_loop().create_task(
                        self._grant(event), name=f"lease of {event.conversation}"
                    )
                    self._granting[task] = None
                    task.add_done_callback(self._granted)
                case Ended(conversation, holder, reason):
                    logger.info("conversation %s: a lease ended: %s", conversation, reason)
                    holder.unleased(conversation, RETRY_S, reason)
                case Wait(conversation, holder, retry_s, reason):
                    holder.unleased(conversation, retry_s, reason)
                case Vacant(conversation):
                    self.vacant(conversation)

    def _granted(self, task: asyncio.Task[None]) -> None:
        self._granting.pop(task, None)

    async def _grant(self, grant: Grant) -> None:
        conversation, holder = grant.conversation, grant.holder
        try:
            epoch = await self._grant_epoch(conversation, holder.node)
        except CrdtLlmError as error:
            logger.warning("conversation %s: no lease: %s", conversation, error)
            self._carry_out(self.desk.fail(grant, reason_of(error)))
            return
        if self.desk.confirm(grant):
            signature = self._sign(lease_message(conversation, epoch, holder.node))
            logger.info("conversation %s: lease of epoch %d granted", conversation, epoch)
            holder.leased(Granted(conversation, epoch, holder.node, signature, self.desk.ttl_s))
