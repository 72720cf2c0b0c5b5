"""Keeping one conversation connected: dial, sync, serve, wait, dial again.

This module owns when there is a connection and what its end means. It must not know how frames
travel (``dial`` does), what the messages mean to each other (:class:`~crdt_llm.sync.link.Link`
does) or what is in a replica. A lost connection means nothing: the replica goes on, and the next
connection carries what either side lacks.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Final

from crdt_llm.errors import ConnectionLost, Refused, RemoteMisuse, Unavailable
from crdt_llm.sync.link import Asked, Backoff, DevicesChanged, Link, Offered, Phase, Traffic

if TYPE_CHECKING:
    from collections.abc import Callable
    from random import Random

    from crdt_llm.sync.dial import Dial, Socket
    from crdt_llm.sync.local_replica import LocalReplica

logger = logging.getLogger("crdt_llm.sync")

RENEW_S: Final = 15.0
"""How often presence is announced anew; relays and Yjs clients forget it after 30 s."""

DRAIN_S_MAX: Final = 2.0
"""How long closing waits for frames that are still on their way; the file has them anyway."""


class Uplink:
    """One conversation's way to the relay.

    Args:
        replica: what is kept in sync.
        dial: opens a socket for the conversation's id.
        device: the name that other devices see.
        random: spreads the waiting times.
        announce: called after any change of what the properties say.
    """

    def __init__(
        self,
        replica: LocalReplica,
        dial: Dial,
        *,
        device: str,
        random: Random,
        announce: Callable[[], None],
    ) -> None:
        self.traffic = Traffic()
        self.refused: Refused | None = None
        self._replica = replica
        self._dial = dial
        self._device = device
        self._backoff = Backoff(random)
        self._announce = announce
        self._link: Link | None = None
        self._task: asyncio.Task[None] | None = None  # stays connected; None while paused
        self._tasks: set[asyncio.Task[None]] = set()  # it, and earlier ones that still hang up
        self._more = asyncio.Event()  # a frame waits to be sent
        self._drained = asyncio.Event()  # none does
        self._drained.set()
        self._overflow: ConnectionLost | None = None
        replica.on_durable(self._publish)

    # -- how things stand ----------------------------------------------------------------------

    @property
    def online(self) -> bool:
        """Whether there is a connection."""
        return self._link is not None

    @property
    def synced(self) -> bool:
        """Whether everything that the relay had on connecting, and since, was merged."""
        return self._link is not None and self._link.phase is Phase.SYNCED

    @property
    def devices(self) -> tuple[str, ...]:
        """The names of the other devices that are connected now."""
        return () if self._link is None else self._link.devices

    # -- going online and offline --------------------------------------------------------------

    def resume(self) -> None:
        """Connect, and stay connected. After a refusal this asks once more."""
        if self._task is not None and not self._task.done():
            return
        self.refused = None
        self._backoff.reset()
        self._task = asyncio.create_task(
            self._stay_connected(frozenset(self._tasks)),
            name=f"uplink {self._replica.conversation_id}",
        )
        self._tasks.add(self._task)
        self._task.add_done_callback(self._tasks.discard)

    def pause(self) -> None:
        """Go offline until :meth:`resume`. What is written meanwhile waits in the file."""
        if self._task is not None:
            self._task.cancel()
            self._task = None
        self._hang_up()

    async def close(self) -> None:
        """Send what waits to be sent, and go offline for good."""
        if self.online:
            try:
                async with asyncio.timeout(DRAIN_S_MAX):
                    await self._drained.wait()
            except TimeoutError:
                logger.info("conversation %s: closed in the middle", self._replica.conversation_id)
        self.pause()
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def _stay_connected(self, before: frozenset[asyncio.Task[None]]) -> None:
        if before:
            await asyncio.wait(before)  # one connection at a time
        while True:
            try:
                await self._connect_once()
            except Refused as error:
                logger.warning("conversation %s: %s", self._replica.conversation_id, error)
                self.refused = error
                self._announce()
                return
            except (RemoteMisuse, Unavailable) as error:
                logger.info("conversation %s: %s", self._replica.conversation_id, error)
            except Exception:  # what is in the file is safe, and a later try may fare better
                logger.exception("a bug in the uplink of %s", self._replica.conversation_id)
            await asyncio.sleep(self._backoff.next_s())

    async def _connect_once(self) -> None:
        async with self._dial(self._replica.conversation_id) as socket:
            link = Link(self._replica.document.client_id, self._device, self.traffic)
            self._link = link
            try:
                await self._serve(socket, link)
            except ConnectionLost as lost:
                refused = link.refusal(lost)
                if refused is not None:
                    raise refused from lost
                raise
            finally:
                if self._link is link:
                    self._hang_up()

    def _hang_up(self) -> None:
        if self._link is not None:
            self._link = None
            self._drained.set()
            self._announce()

    # -- one connection ------------------------------------------------------------------------

    async def _serve(self, socket: Socket, link: Link) -> None:
        self._overflow = None
        link.open(self._replica.document.state_vector())
        self._kick()
        self._announce()
        reader = asyncio.create_task(self._read(socket, link), name="uplink reader")
        writer = asyncio.create_task(self._write(socket, link), name="uplink writer")
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
        while True:
            before = link.phase, link.devices
            match link.receive(await socket.receive()):
                case Asked(state_vector):
                    update = await self._replica.diff(state_vector)
                    link.answer(update)
                case Offered() as offer:
                    missing = await self._replica.merge(offer.update)
                    have = self._replica.document.state_vector()
                    link.merged(offer, gap=missing is not None, state_vector=have)
                    if link.phase is Phase.SYNCED:
                        self._backoff.reset()
                case DevicesChanged() | None:
                    pass
            self._kick()
            if (link.phase, link.devices) != before:
                self._announce()

    async def _write(self, socket: Socket, link: Link) -> None:
        loop = asyncio.get_running_loop()
        renew_at = loop.time() + RENEW_S
        while True:
            while (frame := link.data_to_send()) is not None:
                await socket.send(frame)
            self._drained.set()
            self._more.clear()
            if self._overflow is not None:
                raise self._overflow
            try:
                async with asyncio.timeout_at(renew_at):
                    await self._more.wait()
            except TimeoutError:
                renew_at = loop.time() + RENEW_S
                link.renew()

    def _publish(self, update: bytes) -> None:
        """Send a local write that is on disk now."""
        if self._link is None:
            return
        try:
            self._link.publish(update)
        except ConnectionLost as lost:
            self._overflow = lost
        self._kick()

    def _kick(self) -> None:
        self._drained.clear()
        self._more.set()
