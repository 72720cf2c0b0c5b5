"""The node's side of the native dialect: one socket, and a seat for each conversation.

This module owns when there is a connection, which frame belongs to which seat, what a node has of a
conversation for certain, and that leases are renewed. It must not know models, or what a node does
with a seat; nor how frames travel (``dial`` does).

What a node has *for certain* is kept beside what it works on: everything that came from the relay,
and its own updates once they were acknowledged. After a lost connection a seat is taken anew from
there, and only what is missing crosses the wire. What was not acknowledged is not kept: whether it
became durable or not, the relay knows, and says so with what it sends.

A connection that the relay does not answer on for the length of a lease is over: by then another
node may have been told to act.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from crdt_llm.document.chain import lease_message
from crdt_llm.document.conversation import Conversation
from crdt_llm.document.keys import verify
from crdt_llm.errors import (
    BadProof,
    ConnectionLost,
    Corrupt,
    Forbidden,
    Gap,
    LeaseLost,
    LocalMisuse,
    MalformedMessage,
    Refused,
    TooLarge,
    Unavailable,
)
from crdt_llm.sync.node.lease_wish import LeaseWish
from crdt_llm.sync.transport.retrying import Backoff, refusal
from crdt_llm.sync.wire.frames import (
    CHANNEL_MAX,
    VERSION,
    Ack,
    Answer,
    Change,
    Closed,
    Code,
    Hello,
    Hint,
    Leased,
    Leave,
    Listed,
    Nack,
    Open,
    Opened,
    Presence,
    Renew,
    Renewed,
    State,
    Update,
    WantLease,
    Welcome,
    Work,
    decode_from_relay,
    encode,
)
from crdt_llm.sync.wire.lease import Granted
from crdt_llm.sync.wire.verdict import CloseCode
from crdt_llm.sync.wire.y_websocket import AwarenessState, decode_state_vector

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from contextlib import AbstractAsyncContextManager
    from random import Random

    from crdt_llm.errors import CrdtLlmError
    from crdt_llm.sync.transport.dial import Socket
    from crdt_llm.sync.wire.frames import FromClient, FromRelay

logger = logging.getLogger("crdt_llm.sync")

SEATS_MAX: Final = 200
"""Seats that a node should take at once; a relay allows a few more on one connection, for those
that are just being left."""

KEPT_MAX: Final = 256
"""Conversations without a seat of which is kept what the relay said: a connection that breaks loses
as many seats at once."""

RENEWALS_PER_TTL: Final = 3
"""So that one renewal may be lost, and another one late."""

FLUSH_S_MAX: Final = 2.0
"""How long the end waits for frames that are still on their way; what they give back runs out."""

GREETING_S_MAX: Final = 10.0
"""How long the relay may take to answer the first frame."""

RETRY_S: Final = 0.5
"""Before an update is sent again that the relay could not take, if it does not say when."""


@dataclass(slots=True)
class _Kept:
    """What a node has of a conversation for certain."""

    replica: Conversation
    log: str | None = None
    lsn: int = 0


@dataclass(slots=True)
class _Submitted:
    update: bytes
    done: asyncio.Future[None]


@dataclass(frozen=True, slots=True)
class Calls:
    """What whoever sits on a seat hears.

    Attributes:
        deliver: Others' committed updates, in their order.
        lost: Once, if the seat is lost.
        hint: What is being typed: source, ``after``, bytes that stay, and what follows them.
    """

    deliver: Callable[[bytes], None]
    lost: Callable[[], None]
    hint: Callable[[int, str | None, int, str], object] = lambda *_: None


class NodeSeat:
    """A node's membership in one conversation; made by :meth:`NodeLink.take_seat`.

    Attributes:
        conversation: The conversation's id.
        channel: The number that stands for it.
        state: The document as it was when the seat was taken, as one update.
        opened: Done once the relay has let the node in.
    """

    def __init__(self, link: NodeLink, conversation: str, channel: int, calls: Calls) -> None:
        self.conversation = conversation
        self.channel = channel
        self.state = b""
        self.opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._link = link
        self._calls = calls
        self._over: CrdtLlmError | None = None
        self._last_id = 0
        self._submitted: dict[int, _Submitted] = {}
        self._wish = LeaseWish(
            lambda: link.send(WantLease(channel, hold=True)),
            lambda: link.send(WantLease(channel, hold=False)),
            self._lease_ended,
        )

    # -- for the node --------------------------------------------------------------------------

    async def lease(self) -> Granted:
        """Ask for the lease; returns once it is this node's. To cancel is to want it no more.

        Raises:
            Unavailable: The seat was lost meanwhile.
        """
        if self._over is not None:
            raise self._over.with_traceback(None)
        return await self._wish.wait()

    async def submit(self, update: bytes) -> None:
        """Write. Returns once the update is durable.

        Raises:
            Refused: Against a rule.
            Gap: It builds on something that the relay does not have.
            Unavailable: It is not known to be durable; ``LeaseLost`` if the lease is another's.
        """
        while True:
            if self._over is not None:
                raise self._over.with_traceback(None)
            self._last_id += 1
            done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._submitted[self._last_id] = _Submitted(update, done)
            self._link.send(Update(self.channel, self._last_id, update))
            try:
                await done
            except _AgainError as again:
                await asyncio.sleep(again.after_s)
            else:
                return

    def say(self, client: int, clock: int, state_json: str) -> None:
        """Show a state to everyone in the room, under a client id of this node's own."""
        if self._over is None and self.opened.done():
            states = (AwarenessState(client, clock, state_json),)
            self._link.send(Presence(self.channel, states))

    async def leave(self) -> None:
        """Give the seat back, and the lease with it."""
        if self._over is None:
            self._link.send(Leave(self.channel))
            self._link.leaving[self.channel] = self.conversation
        self.end(ConnectionLost("this seat was left"), told=False)

    # -- for the link --------------------------------------------------------------------------

    @property
    def is_leased(self) -> bool:
        """Whether there is a lease to be renewed."""
        return self._wish.granted is not None

    def end(self, error: CrdtLlmError, *, told: bool = True) -> None:
        """It is of no use any more."""
        if self._over is not None:
            return
        self._over = error
        self._link.forget(self)
        self._wish.fail(error)
        for one in self._submitted.values():
            _fail(one.done, error)
        self._submitted.clear()
        if not self.opened.done():
            _fail(self.opened, error)
        elif told:
            self._calls.lost()

    def take(self, frame: FromRelay) -> None:  # noqa: C901 - a table of frames
        """Take a frame of this channel."""
        match frame:
            case Opened():
                self._take_opened(frame)
            case Change(lsn=lsn, update=update) | State(lsn=lsn, update=update):
                kept = self._link.kept(self.conversation)
                kept.replica.apply(update)
                kept.lsn = lsn
                self._calls.deliver(update)
            case Ack(id=acknowledged):
                for number in [one for one in self._submitted if one <= acknowledged]:
                    one = self._submitted.pop(number)
                    self._link.kept(self.conversation).replica.apply(one.update)
                    if not one.done.done():
                        one.done.set_result(None)
            case Nack(id=number):
                refused = self._submitted.pop(number, None)
                if refused is not None:
                    _fail(refused.done, _error_of(frame))
            case Leased(epoch=None, ttl_ms=retry_ms, reason=reason):
                self._wish.unleased(retry_ms / 1000, reason)
            case Leased():
                self._take_lease(frame)
            case Hint(source=source, after=after, keep=keep, text=text):
                self._calls.hint(source, after, keep, text)
            case Closed(code=code, reason=reason):
                self.end(_closed(code, reason))
            case _:
                pass  # who else is here

    def _take_opened(self, opened: Opened) -> None:
        kept = self._link.kept(self.conversation)
        has = decode_state_vector(opened.state_vector)
        ours = decode_state_vector(kept.replica.state_vector())
        if any(clock > has.get(client, 0) for client, clock in ours.items()):
            # The relay lost something. Bringing it back is for those who wrote it; what a node
            # does must build on what the relay has.
            self._link.drop_kept(self.conversation)
            self._link.send(Leave(self.channel))
            self.end(Unavailable("the relay has lost some of it"))
            return
        kept.replica.apply(opened.update)
        kept.log, kept.lsn = opened.log, opened.lsn
        self.state = kept.replica.diff()
        if not self.opened.done():
            self.opened.set_result(None)

    def _take_lease(self, leased: Leased) -> None:
        epoch = leased.epoch or 0
        message = lease_message(self.conversation, epoch, self._link.node)
        try:
            verify(self._link.relay_key, leased.signature, message)
        except BadProof as error:
            raise MalformedMessage("the relay has not signed its own lease") from error
        ttl_s = leased.ttl_ms / 1000
        self._link.holds(ttl_s)
        node, signature = self._link.node, leased.signature
        self._wish.leased(Granted(self.conversation, epoch, node, signature, ttl_s))

    def _lease_ended(self, reason: str) -> None:
        # What is on its way will be refused; only a new seat shows what was taken before.
        if self._over is None:
            self._link.send(Leave(self.channel))
        self.end(LeaseLost(f"the lease ended: {reason}"))


class NodeLink:
    """A node's connection to a relay, kept up until :meth:`run` is cancelled.

    Args:
        dial: Opens a socket to the relay in the native dialect.
        token: Who we are; asked anew for every connection.
        name: The name of this node, for people.
        node: The node's public key.
        pin: Called with the relay's public key; raises if it is not the one that is known.
        work: Called with conversations to look at.
        random: Spreads the waiting times, and gives client ids.

    Attributes:
        relay_key: The public key of the relay, once connected.
        leaving: Channels that were left, until the relay has heard of it. It names no work there
            yet; so what it still says on one is work.
    """

    def __init__(  # noqa: PLR0913 - everything outside is an argument
        self,
        dial: Callable[[], AbstractAsyncContextManager[Socket]],
        *,
        token: Callable[[], str | None],
        name: str,
        node: bytes,
        pin: Callable[[bytes], None],
        work: Callable[[str], None],
        random: Random,
    ) -> None:
        self.node = node
        self.relay_key = b""
        self.problem: str | None = "not connected yet"
        self._dial = dial
        self._token = token
        self._name = name
        self._pin = pin
        self._work = work
        self._random = random
        self._backoff = Backoff(random)
        self._online = asyncio.Event()
        self._seats: dict[int, NodeSeat] = {}
        self.leaving: dict[int, str] = {}
        self._kept: dict[str, _Kept] = {}  # the least recently used first
        self._last_channel = 0
        self._outgoing: deque[FromClient] = deque()
        self._more = asyncio.Event()
        self._drained = asyncio.Event()
        self._drained.set()
        self._ttl_s: float | None = None  # of the leases that are had
        self._is_leased = asyncio.Event()  # there may be some
        self._renewed = asyncio.Event()

    async def run(self) -> None:
        """Stay connected until cancelled.

        Raises:
            Refused: The relay does not want this node; to come back is of no use.
        """
        while True:
            try:
                await self._connect_once()
            except Unavailable as error:
                wait = self._backoff.next_s()
                self.problem = str(error)
                logger.warning("%s; next attempt in %.1f s", error, wait)
                await asyncio.sleep(wait)
            except MalformedMessage as error:
                wait = self._backoff.next_s()
                self.problem = f"the relay speaks another language: {error}"
                logger.error("%s; next attempt in %.1f s", self.problem, wait)  # noqa: TRY400 - one line
                await asyncio.sleep(wait)

    async def connected(self) -> None:
        """Wait for a connection."""
        await self._online.wait()

    async def flush(self) -> None:
        """Wait for what waits to be sent, for a short while."""
        with suppress(TimeoutError):
            async with asyncio.timeout(FLUSH_S_MAX):
                await self._drained.wait()

    async def take_seat(self, conversation: str, calls: Calls) -> NodeSeat:
        """Take part in a conversation; waits for a connection.

        Args:
            conversation: Its id.
            calls: What is heard of it.

        Raises:
            Unavailable: The connection was lost meanwhile, or the relay has no room now.
            Corrupt: What the relay has of it is damaged.
            Refused: The relay does not let this node in.
        """
        await self._online.wait()
        seat = NodeSeat(self, conversation, self._free_channel(), calls)
        self._seats[seat.channel] = seat
        kept = self.kept(conversation)
        self.send(Open(seat.channel, conversation, kept.log, kept.lsn, kept.replica.state_vector()))
        try:
            await seat.opened
        except asyncio.CancelledError:
            await seat.leave()
            raise
        return seat

    # -- for seats -----------------------------------------------------------------------------

    def send(self, frame: FromClient) -> None:
        """Send a frame of a seat. While there is no connection there are no seats."""
        self._outgoing.append(frame)
        self._drained.clear()
        self._more.set()

    def kept(self, conversation: str) -> _Kept:
        """What is had of a conversation for certain."""
        kept = self._kept.pop(conversation, None)
        if kept is None:
            self._make_space()
            client_id = self._random.randrange(1, 2**32)  # it writes nothing
            kept = _Kept(Conversation(client_id))
        self._kept[conversation] = kept
        return kept

    def drop_kept(self, conversation: str) -> None:
        """Begin with nothing the next time."""
        self._kept.pop(conversation, None)

    def _make_space(self) -> None:
        seated = {seat.conversation for seat in self._seats.values()}
        unused = [one for one in self._kept if one not in seated]
        for conversation in unused[: max(0, len(unused) - KEPT_MAX + 1)]:
            del self._kept[conversation]

    def forget(self, seat: NodeSeat) -> None:
        """A seat is over; its channel's number is not used again soon."""
        if self._seats.get(seat.channel) is seat:
            del self._seats[seat.channel]

    def holds(self, ttl_s: float) -> None:
        """A lease is had: renew it."""
        self._ttl_s = ttl_s
        self._is_leased.set()

    def _free_channel(self) -> int:
        for _ in range(CHANNEL_MAX):
            self._last_channel = self._last_channel % CHANNEL_MAX + 1
            if self._last_channel not in self._seats and self._last_channel not in self.leaving:
                return self._last_channel
        raise LocalMisuse(f"a connection has at most {CHANNEL_MAX} seats")

    # -- one connection ------------------------------------------------------------------------

    async def _connect_once(self) -> None:
        async with self._dial() as socket:
            try:
                await self._serve(socket)
            except ConnectionLost as lost:
                refused = refusal(lost.code, lost.reason)
                if refused is not None:
                    raise refused from lost
                raise

    async def _serve(self, socket: Socket) -> None:
        await socket.send(encode(Hello(VERSION, self._token(), self._name, self.node)))
        try:
            async with asyncio.timeout(GREETING_S_MAX):
                welcome = decode_from_relay(await socket.receive())
        except TimeoutError as error:
            raise ConnectionLost("the relay does not answer") from error
        if not isinstance(welcome, Welcome):
            raise MalformedMessage("a relay greets with Welcome")
        self._pin(welcome.relay)
        self.relay_key, self.problem = welcome.relay, None
        logger.info("connected as %s", welcome.principal)
        self._outgoing.clear()
        self._online.set()
        sides = [
            asyncio.create_task(side, name=f"node {name}")
            for name, side in (
                ("reader", self._read(socket)),
                ("writer", self._write(socket)),
                ("renewals", self._renew()),
            )
        ]
        try:
            await asyncio.wait(sides, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for side in sides:
                side.cancel()
            await asyncio.wait(sides)
            self._hang_up()
        for side in sides:  # each of them ends by raising; the reader knows most
            if not side.cancelled() and (failure := side.exception()) is not None:
                raise failure

    def _hang_up(self) -> None:
        self._online.clear()
        self._ttl_s = None
        self._is_leased.clear()
        self.problem = "the connection to the relay broke"
        for seat in tuple(self._seats.values()):
            seat.end(ConnectionLost(self.problem))
        self.leaving.clear()
        self._outgoing.clear()
        self._drained.set()

    async def _read(self, socket: Socket) -> None:
        while True:
            frame = decode_from_relay(await socket.receive())
            match frame:
                case Renewed(ttl_ms=ttl_ms):
                    self._ttl_s = ttl_ms / 1000
                    self._renewed.set()
                case Work(conversations=conversations):
                    for conversation in conversations:
                        self._work(conversation)
                case Welcome() | Listed() | Answer():
                    pass  # nothing of the kind was asked for
                case Change() | State() | Closed() if frame.channel in self.leaving:
                    conversation = self.leaving[frame.channel]
                    if isinstance(frame, Closed):
                        del self.leaving[frame.channel]
                    else:
                        self._work(conversation)
                case _:
                    seat = self._seats.get(frame.channel)
                    if seat is not None:
                        seat.take(frame)
                        if isinstance(frame, Opened):
                            self._backoff.reset()

    async def _write(self, socket: Socket) -> None:
        while True:
            while self._outgoing:
                await socket.send(encode(self._outgoing.popleft()))
            self._drained.set()
            self._more.clear()
            await self._more.wait()

    async def _renew(self) -> None:
        """While there are leases: ask for more time, and give up when it has run out."""
        while True:
            await self._is_leased.wait()
            ttl_s = self._ttl_s
            if ttl_s is None or not any(seat.is_leased for seat in self._seats.values()):
                self._is_leased.clear()
                continue
            await asyncio.sleep(ttl_s / RENEWALS_PER_TTL)
            self._renewed.clear()
            self.send(Renew())
            try:
                async with asyncio.timeout(ttl_s - ttl_s / RENEWALS_PER_TTL):
                    await self._renewed.wait()
            except TimeoutError as error:
                raise ConnectionLost("the relay did not renew the leases in time") from error


class _AgainError(Exception):
    """The relay could not take an update; the same again, later."""

    def __init__(self, after_s: float) -> None:
        super().__init__()
        self.after_s = after_s


def _fail(future: asyncio.Future[None], error: Exception) -> None:
    """Whoever waits hears of it; if nobody does, that is no fault."""
    if not future.done():
        future.set_exception(error)
        future.exception()


_REFUSALS: Final[Mapping[Code, type[Refused]]] = {
    Code.DENIED: Forbidden,
    Code.INVALID: Refused,
    Code.TOO_LARGE: TooLarge,
}
_TROUBLES: Final[Mapping[Code, type[Gap | LeaseLost]]] = {
    Code.GAP: Gap,
    Code.STALE_EPOCH: LeaseLost,
}


def _error_of(nack: Nack) -> Exception:
    """What a node's write comes to."""
    if nack.code in _REFUSALS:
        return _REFUSALS[nack.code](nack.rule or nack.code, nack.reason)
    if nack.code in _TROUBLES:
        return _TROUBLES[nack.code](nack.reason)
    return _AgainError(RETRY_S if nack.retry_ms is None else nack.retry_ms / 1000)


def _closed(code: int, reason: str) -> CrdtLlmError:
    """What the end of a channel means."""
    if code == CloseCode.DAMAGED:
        return Corrupt(reason)
    return refusal(code, reason) or Unavailable(reason or "the relay ended this seat")
