"""Keeping one conversation in step with the relay, over whatever connection there is.

This module owns what is done about the events of a channel: merging, acknowledging, taking back
what was refused, giving back what the relay lost. It must not know sockets or frames' bytes, nor
what is in a replica. A lost connection means nothing: the replica goes on, and the next connection
carries what either side lacks.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Protocol

from crdt_llm.errors import MalformedMessage, Refused
from crdt_llm.sync.client.channel import (
    CompanyChanged,
    Lacks,
    NotRestored,
    Rejected,
    Settled,
)
from crdt_llm.sync.client.presence import Company
from crdt_llm.sync.client.traffic import Traffic
from crdt_llm.sync.transport.retrying import Backoff, refusal
from crdt_llm.sync.wire.frames import Change, Closed, Opened, State
from crdt_llm.sync.wire.y_websocket import decode_state_vector, encode_state_vector

if TYPE_CHECKING:
    from collections.abc import Callable
    from random import Random

    from crdt_llm.sync.client.channel import (
        Channel,
        Event,
    )
    from crdt_llm.sync.client.local_replica import LocalReplica
    from crdt_llm.sync.client.presence import NodePresence

logger = logging.getLogger("crdt_llm.sync")


class Line(Protocol):
    """What an uplink needs of the connection that it shares with others."""

    def join(self, uplink: Uplink) -> None:
        """Take part from now on: :meth:`Uplink.connected` is called once there is a connection."""

    def leave(self, uplink: Uplink) -> None:
        """Take no part any more."""

    def channel(self, uplink: Uplink, company: Company) -> Channel | None:
        """A channel for it, if there is a connection; its events come to :meth:`Uplink.handle`."""

    def kick(self) -> None:
        """Something waits to be sent."""


class Uplink:
    """One conversation's way to the relay.

    Args:
        replica: what is kept in step.
        line: the connection.
        device: the name that other devices see.
        random: spreads the waiting times.
        announce: called after any change of what the properties say.
    """

    def __init__(
        self,
        replica: LocalReplica,
        line: Line,
        *,
        device: str,
        random: Random,
        announce: Callable[[], None],
    ) -> None:
        self.traffic = Traffic()
        self.refused: Refused | None = None
        self.stalled: Refused | None = None
        self.grant: str | None = None
        self._replica = replica
        self._line = line
        self._device = device
        self._backoff = Backoff(random)
        self._announce = announce
        self._channel: Channel | None = None
        self._is_joined = False
        self._again: asyncio.TimerHandle | None = None
        self._draft: tuple[str, str] | None = None
        self._empty = asyncio.Event()  # nothing waits for the relay
        replica.on_outbox(self._outbox_changed)
        replica.on_write(self._written)

    @property
    def conversation_id(self) -> str:
        """The conversation's id."""
        return self._replica.conversation_id

    # -- how things stand ----------------------------------------------------------------------

    @property
    def online(self) -> bool:
        """Whether there is a connection."""
        return self._channel is not None

    @property
    def synced(self) -> bool:
        """Whether everything that the relay had on connecting, and since, was merged."""
        return self._channel is not None and self._channel.is_synced

    @property
    def settled(self) -> bool:
        """Whether the relay and this device have the same, as far as either knows."""
        writable = self._channel is not None and self._channel.is_writable
        return self.synced and writable and not self._replica.outbox

    @property
    def devices(self) -> tuple[str, ...]:
        """The names of the other devices that are connected now."""
        return () if self._channel is None else self._channel.company.devices

    @property
    def node(self) -> NodePresence | None:
        """What the conversation's node says of itself, if one is here."""
        return None if self._channel is None else self._channel.company.node

    # -- going online and offline --------------------------------------------------------------

    def resume(self) -> None:
        """Connect, and stay connected. After a refusal this asks once more."""
        if self._is_joined and self.refused is None:
            return
        self._is_joined = True
        self.refused = None
        self._backoff.reset()
        self._line.join(self)

    def pause(self) -> None:
        """Go offline until :meth:`resume`. What is written meanwhile waits in the file."""
        self._is_joined = False
        self._cancel_again()
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.leave()
            self._replica.part()
            self._line.kick()
            self._announce()
        self._line.leave(self)

    async def close(self, patience_s: float) -> None:
        """Wait a little for what has to reach the relay, and go offline for good."""
        if self._channel is not None and self._channel.is_writable:
            try:
                async with asyncio.timeout(patience_s):
                    while self._replica.outbox and self._channel is not None:
                        self._empty.clear()
                        await self._empty.wait()
            except TimeoutError:
                logger.info("conversation %s: closed in the middle", self.conversation_id)
        self.pause()

    def draft(self, after: str, text: str) -> None:
        """Let the node know what is being typed; an empty text takes it back."""
        self._draft = (after, text) if text else None
        if self._channel is not None:
            self._channel.draft(after, text)
            self._line.kick()

    # -- for the connection --------------------------------------------------------------------

    @property
    def replica(self) -> LocalReplica:
        """What is kept in step."""
        return self._replica

    def connected(self) -> None:
        """There is a connection: take part."""
        self._cancel_again()
        company = Company(self._replica.document.client_id, self._device)
        self._channel = self._line.channel(self, company)
        if self._channel is None:
            return
        log, lsn = self._replica.position
        state_vector = encode_state_vector(self._replica.acknowledged)
        self._channel.open(self.conversation_id, log, lsn, state_vector)
        if self._draft is not None:
            self._channel.draft(*self._draft)
        self._announce()

    def disconnected(self, refused: Refused | None) -> None:
        """The connection is gone; with a refusal, for good."""
        self._cancel_again()
        self._drop()
        if refused is not None:
            self.refused = refused
            self._is_joined = False
            self._announce()

    def _drop(self) -> None:
        self._empty.set()
        if self._channel is not None:
            self._channel = None
            self._replica.part()
            self.stalled = None
            self._announce()

    async def handle(self, channel: Channel, event: Event) -> None:
        """Do what an event of the channel asks for.

        Raises:
            MalformedMessage: the relay is wrong; give the connection up.
            StoreFailed: this device cannot go on now.
        """
        if channel is not self._channel:
            return  # it was left meanwhile
        before = self._standing()
        try:
            await self._do(channel, event)
        except Refused as error:  # something here is over a limit: it is the same with each try
            channel.leave()
            self._end(error)
        if self._standing() != before:
            self._announce()

    def _standing(self) -> tuple[object, ...]:
        return self.synced, self.stalled, self.refused

    async def _do(self, channel: Channel, event: Event) -> None:
        match event:
            case Opened():
                await self._opened(channel, event)
            case Change() | State():
                await self._came(channel, event)
            case Settled(numbers):
                self._replica.acknowledge(numbers)
                if not numbers:
                    self._announce()  # it is the restored document that the relay has
            case Rejected(numbers, code, rule, reason, settled):
                self._replica.acknowledge(settled)
                await self._replica.refuse(numbers, code, rule, reason)
                channel.restart(carefully=True)
            case Lacks(state_vector):
                update, numbers = await self._replica.diff(state_vector)
                channel.catch_up(update, numbers)
            case NotRestored(code, reason):
                self.stalled = Refused(code, reason)
                self._empty.set()
                logger.warning("conversation %s was not restored: %s", self.conversation_id, reason)
            case Closed(_, code, reason):
                self._closed(code, reason)
            case CompanyChanged():
                self._announce()

    async def _opened(self, channel: Channel, opened: Opened) -> None:
        if await self._replica.merge(opened.update) is not None:
            self._replica.settle(None, 0)  # so that the next try does not build on it
            raise MalformedMessage("the relay left out something that this device lacks")
        self._replica.settle(opened.log, opened.lsn)
        self.grant = opened.grant
        relay = decode_state_vector(opened.state_vector)
        known = [one.number for one in self._replica.outbox if one.is_in(relay)]
        self._replica.acknowledge(known)
        restore = None
        ours = self._replica.acknowledged
        if any(relay.get(client, 0) < clock for client, clock in ours.items()):
            restore = await self._replica.acknowledged_diff(opened.state_vector)
            logger.warning("conversation %s: the relay lost it", self.conversation_id)
        channel.opened(restore)
        self._backoff.reset()

    async def _came(self, channel: Channel, frame: Change | State) -> None:
        missing = await self._replica.merge(frame.update, frame.lsn)
        have = encode_state_vector(self._replica.acknowledged)
        channel.merged(frame, gap=missing is not None, state_vector=have)

    def _closed(self, code: int, reason: str) -> None:
        refused = refusal(code, reason)
        if refused is not None:
            self._end(refused)
            return
        self._drop()
        logger.info("conversation %s: closed (%d) %s", self.conversation_id, code, reason)
        loop = asyncio.get_running_loop()
        self._again = loop.call_later(self._backoff.next_s(), self._come_back)

    def _end(self, refused: Refused) -> None:
        """The relay does not let this conversation in."""
        logger.warning("conversation %s: %s", self.conversation_id, refused)
        self._drop()
        self.refused = refused
        self._is_joined = False
        self._line.leave(self)

    def _come_back(self) -> None:
        self._again = None
        if self._is_joined and self._channel is None:
            self.connected()
            self._line.kick()

    def _cancel_again(self) -> None:
        if self._again is not None:
            self._again.cancel()
            self._again = None

    # -- for the replica -----------------------------------------------------------------------

    def _written(self) -> None:
        if self._channel is not None:
            self._line.kick()

    def _outbox_changed(self, entries: frozenset[str] | None) -> None:
        if not self._replica.outbox:
            self._empty.set()
        if self._channel is not None:
            if entries is None:
                self._channel.restart(carefully=False)
            self._line.kick()
