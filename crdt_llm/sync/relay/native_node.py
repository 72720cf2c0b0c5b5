"""A node at the other end of a native connection: its leases, and what it should look at.

This module ties the lease office and the list of work to the channels of one connection. It must
not know sockets, sessions or documents.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from crdt_llm.sync.wire import frames
from crdt_llm.sync.wire.verdict import shorten

if TYPE_CHECKING:
    from collections.abc import Callable

    from crdt_llm.sync.relay.channel_peer import ChannelPeer
    from crdt_llm.sync.relay.leases import LeaseOffice
    from crdt_llm.sync.relay.work import WorkList
    from crdt_llm.sync.wire.lease import Granted

NO_LEASES_RETRY_MS: Final = 60_000
"""When a node may ask again a relay that gives no leases: after its next restart it may."""


class RemoteNode:
    """Holds the leases of one connection; see :class:`~crdt_llm.sync.relay.leases.LeaseHolder`.

    Attributes:
        node: Its public key, which is the same as long as the connection is there.

    Args:
        key: Its public key.
        leases: Where it gets its leases; ``None`` if there are none to be had.
        work: What it should look at.
        send: Takes a frame for it.
    """

    embedded = False

    def __init__(
        self,
        key: bytes,
        leases: LeaseOffice | None,
        work: WorkList,
        send: Callable[[frames.FromRelay], None],
    ) -> None:
        self.node = key
        self._leases = leases
        self._work = work
        self._send = send
        self._asking: dict[str, ChannelPeer] = {}  # conversation -> who asked for its lease last

    # -- for the connection --------------------------------------------------------------------

    def want(self, channel: ChannelPeer, *, hold: bool) -> None:
        """WantLease came."""
        if self._leases is None:
            reason = "this relay gives no leases"
            self._send(frames.Leased(channel.number, None, b"", NO_LEASES_RETRY_MS, reason))
        elif hold:
            before = self._asking.get(channel.conversation)
            if before is not None and before is not channel:
                before.hold(None)
            self._asking[channel.conversation] = channel
            self._leases.want(channel.conversation, self)
        else:
            self._leases.give_back(channel.conversation, self)

    def renew(self) -> None:
        """Renew came."""
        ttl_s = 0.0 if self._leases is None else self._leases.renew(self)
        self._send(frames.Renewed(_ms(ttl_s)))

    def forget(self, channel: ChannelPeer) -> None:
        """A channel ended, and with it its lease."""
        if self._asking.get(channel.conversation) is channel:
            del self._asking[channel.conversation]
            if self._leases is not None:
                self._leases.give_back(channel.conversation, self)

    def take_work(self) -> frames.Work | None:
        """What to look at, if there is anything."""
        conversations = self._work.take()
        return frames.Work(conversations) if conversations else None

    def tick(self) -> bool:
        """Whether there is work that waited for its time."""
        return self._work.tick()

    def leave(self) -> None:
        """The connection is gone; its leases run on for their time."""
        self._work.stop()
        if self._leases is not None:
            self._leases.lost(self)
        self._asking.clear()

    # -- for the lease office ------------------------------------------------------------------

    def leased(self, lease: Granted) -> None:
        """See :class:`~crdt_llm.sync.relay.leases.LeaseHolder`."""
        channel = self._asking.get(lease.conversation)
        if channel is not None:
            ttl_ms = _ms(lease.ttl_s)
            self._send(frames.Leased(channel.number, lease.epoch, lease.signature, ttl_ms, ""))
            channel.hold(lease.epoch)

    def unleased(self, conversation: str, retry_s: float, reason: str) -> None:
        """See :class:`~crdt_llm.sync.relay.leases.LeaseHolder`."""
        channel = self._asking.get(conversation)
        if channel is not None:
            channel.hold(None)
            line = shorten(reason, frames.REASON_BYTES_MAX)
            self._send(frames.Leased(channel.number, None, b"", _ms(retry_s), line))


def _ms(seconds: float) -> int:
    return max(0, round(seconds * 1000))
