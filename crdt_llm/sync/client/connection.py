"""One socket for all that a client has open: dial, say hello, serve, wait, dial again.

This module owns when there is a connection and what its end means. It must not know how frames
travel (``dial`` does), what they say to each other (:class:`~crdt_llm.sync.client.link.Link`
does), or what is done about a conversation (:class:`~crdt_llm.sync.client.uplink.Uplink` does).
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from crdt_llm.errors import ConnectionLost, Refused, RemoteMisuse, Unavailable
from crdt_llm.sync.client.link import Happened, Link
from crdt_llm.sync.client.listing import Listings
from crdt_llm.sync.client.traffic import Traffic
from crdt_llm.sync.transport.retrying import Backoff, refusal
from crdt_llm.sync.wire.frames import Answer, Listed, Welcome

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from random import Random

    from crdt_llm.sync.client.channel import Channel
    from crdt_llm.sync.client.link import LinkEvent
    from crdt_llm.sync.client.presence import Company
    from crdt_llm.sync.client.uplink import Uplink
    from crdt_llm.sync.transport.dial import Dial, Socket

logger = logging.getLogger("crdt_llm.sync")

DRAIN_S_MAX: Final = 2.0
"""How long closing waits for what has to reach the relay; the file has it anyway."""


class Connection:
    """The connection of one client. There is a socket while somebody has a use for it.

    Args:
        dial: opens a socket.
        token: who we are to the relay; ``None`` if the handshake says so.
        device: this device's name.
        random: spreads the waiting times.
        greeted: looks at what the relay says of itself; may refuse it.
    """

    def __init__(
        self,
        dial: Dial,
        *,
        token: str | None,
        device: str,
        random: Random,
        greeted: Callable[[Welcome], None],
    ) -> None:
        self.traffic = Traffic()
        self.listings = Listings()
        self._dial = dial
        self._token = token
        self._device = device
        self._backoff = Backoff(random)
        self._greeted = greeted
        self._uplinks: dict[Uplink, None] = {}
        self._channels: dict[Channel, Uplink] = {}
        self._watching = False
        self._visits = 0  # of those who need a connection for a moment
        self._answers: dict[int, asyncio.Future[Answer]] = {}
        self._link: Link | None = None  # once the relay has said who it is
        self._greetings: list[asyncio.Future[None]] = []  # who waits for that
        self._task: asyncio.Task[None] | None = None  # stays connected; None while nobody needs it
        self._tasks: set[asyncio.Task[None]] = set()  # it, and earlier ones that still hang up
        self._more = asyncio.Event()  # a frame may wait to be sent

    # -- for uplinks ---------------------------------------------------------------------------

    def join(self, uplink: Uplink) -> None:
        """See :class:`~crdt_llm.sync.client.uplink.Line`."""
        self._uplinks[uplink] = None
        if self._link is not None:
            uplink.connected()
            self.kick()
        self._follow_need()

    def leave(self, uplink: Uplink) -> None:
        """See :class:`~crdt_llm.sync.client.uplink.Line`."""
        self._uplinks.pop(uplink, None)
        self._follow_need()

    def channel(self, uplink: Uplink, company: Company) -> Channel | None:
        """See :class:`~crdt_llm.sync.client.uplink.Line`."""
        if self._link is None:
            return None
        channel = self._link.channel(company, uplink.replica.next_to_send, uplink.traffic)
        self._channels[channel] = uplink
        return channel

    def kick(self) -> None:
        """Something may wait to be sent."""
        self._more.set()

    # -- for the client ------------------------------------------------------------------------

    @property
    def online(self) -> bool:
        """Whether there is a connection, and the relay has said who it is."""
        return self._link is not None

    def watch(self) -> None:
        """Have the list from now on."""
        if not self._watching:
            self._watching = True
            if self._link is not None:
                self._link.watch(on=True)
                self.kick()
            self._follow_need()

    async def request(self, name: str, arguments: Mapping[str, Any]) -> Mapping[str, Any]:
        """Have the relay do something that is not a write.

        Raises:
            Refused: it will not.
            ConnectionLost: it may have, or not: the connection ended before the answer.
            Unavailable: too many requests wait.
        """
        with self._visiting():
            link = await self._linked()
            identity = link.request(name, arguments)
            waiting = self._answers[identity] = asyncio.get_running_loop().create_future()
            self.kick()
            try:
                answer = await waiting
            finally:
                self._answers.pop(identity, None)
        values: Mapping[str, Any] | None = answer.values
        if values is None:
            raise Refused(answer.code or "refused", answer.reason or "the relay will not do that")
        return values

    def renew(self, token: str) -> None:
        """Use another token from now on; a live connection goes on under it."""
        self._token = token
        if self._link is not None:
            self._link.say_hello(token)
            self.kick()

    async def close(self) -> None:
        """Hang up for good."""
        self._uplinks.clear()
        self._watching = False
        self._follow_need()
        self.listings.end(ConnectionLost("the client was closed"))
        while self._tasks:
            await asyncio.wait(self._tasks)

    @contextmanager
    def _visiting(self) -> Iterator[None]:
        self._visits += 1
        self._follow_need()
        try:
            yield
        finally:
            self._visits -= 1
            self._follow_need()

    async def _linked(self) -> Link:
        while self._link is None:
            greeting: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._greetings.append(greeting)
            await greeting
        return self._link

    # -- staying connected ---------------------------------------------------------------------

    def _follow_need(self) -> None:
        needed = bool(self._uplinks or self._watching or self._visits)
        running = self._task is not None and not self._task.done()
        if needed and not running:
            self._backoff.reset()
            stay = self._stay_connected(frozenset(self._tasks))
            self._task = asyncio.create_task(stay, name="connection")
            self._tasks.add(self._task)
            self._task.add_done_callback(self._tasks.discard)
        elif not needed and self._task is not None:
            self._task.cancel()
            self._task = None
            self._hang_up(None)

    async def _stay_connected(self, before: frozenset[asyncio.Task[None]]) -> None:
        if before:
            await asyncio.wait(before)  # one connection at a time
        while True:
            try:
                await self._connect_once()
            except Refused as error:
                logger.warning("the relay does not let us in: %s", error)
                self._task = None
                self._hang_up(error)
                return
            except (RemoteMisuse, Unavailable) as error:
                logger.info("no connection: %s", error)
            except Exception:  # what is in the file is safe, and a later try may fare better
                logger.exception("a bug in the connection")
            await asyncio.sleep(self._backoff.next_s())

    async def _connect_once(self) -> None:
        task = asyncio.current_task()
        async with self._dial() as socket:
            try:
                await self._serve(socket, Link(self._token, self._device, self.traffic))
            except ConnectionLost as lost:
                refused = refusal(lost.code, lost.reason)
                if refused is not None:
                    raise refused from lost
                raise
            finally:
                if self._task is task:
                    self._hang_up(None)

    def _hang_up(self, refused: Refused | None) -> None:
        """The connection is over; with a refusal for good, until somebody asks once more."""
        self._link = None
        self._channels.clear()
        self.listings.forget()
        lost = ConnectionLost("the connection to the relay ended before its answer")
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(refused or lost)
                answer.exception()  # whoever waited may have been cancelled
        uplinks = tuple(self._uplinks)
        if refused is not None:
            greetings, self._greetings = self._greetings, []
            for greeting in greetings:
                if not greeting.done():
                    greeting.set_exception(refused)
                    greeting.exception()
            self._uplinks.clear()
            self._watching = False
            self.listings.end(refused)
        for uplink in uplinks:
            uplink.disconnected(refused)

    # -- one connection ------------------------------------------------------------------------

    async def _serve(self, socket: Socket, link: Link) -> None:
        reader = asyncio.create_task(self._read(socket, link), name="connection reader")
        writer = asyncio.create_task(self._write(socket, link), name="connection writer")
        sides = (reader, writer)
        try:
            await asyncio.wait(sides, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for side in sides:
                side.cancel()
            await asyncio.wait(sides)
            failures = [side.exception() for side in sides if not side.cancelled()]
        for failure in failures:  # each side ends by raising; the reader knows more
            if failure is not None:
                raise failure

    async def _read(self, socket: Socket, link: Link) -> None:
        loop = asyncio.get_running_loop()
        while True:
            event = link.receive(await socket.receive(), loop.time())
            if event is not None:
                await self._handle(link, event)
            self.kick()

    async def _handle(self, link: Link, event: LinkEvent) -> None:
        match event:
            case Welcome():
                self._greet(link, event)
            case Listed():
                self.listings.take(event)
                self._backoff.reset()
            case Answer(identity):
                waiting = self._answers.get(identity)
                if waiting is not None and not waiting.done():
                    waiting.set_result(event)
                self._backoff.reset()
            case Happened(channel, what):
                uplink = self._channels.get(channel)
                if uplink is not None:
                    await uplink.handle(channel, what)
                    if uplink.synced:
                        self._backoff.reset()

    def _greet(self, link: Link, welcome: Welcome) -> None:
        self._greeted(welcome)
        if self._link is link:
            return  # a token was renewed
        self._link = link
        if self._watching:
            link.watch(on=True)
        for uplink in tuple(self._uplinks):
            uplink.connected()
        greetings, self._greetings = self._greetings, []
        for greeting in greetings:
            if not greeting.done():
                greeting.set_result(None)

    async def _write(self, socket: Socket, link: Link) -> None:
        loop = asyncio.get_running_loop()
        while True:
            while (frame := link.data_to_send(loop.time())) is not None:
                await socket.send(frame)
            self._more.clear()
            due_s = link.due_s(loop.time())
            try:
                async with asyncio.timeout_at(None if due_s == float("inf") else due_s):
                    await self._more.wait()
            except TimeoutError:
                pass  # something is due
