"""A loop with time of its own and a network in memory, so that a whole fleet runs from one seed.

The clients, the rooms and the sessions are the production code; only the clock, the wire and the
disks are replaced.
"""

from __future__ import annotations

import asyncio
import selectors
from collections import deque
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from crdt_llm.errors import AuthenticationFailed, ConnectionLost, Stopping
from crdt_llm.sync.relay.access import Pass
from crdt_llm.sync.relay.hub import Hub
from crdt_llm.sync.relay.native_peer import NativeConnection, RelayIdentity

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine, Mapping
    from random import Random
    from typing import Any

    from crdt_llm.store.log import UpdateLog
    from crdt_llm.store.register import Register
    from crdt_llm.sync.transport.dial import Dial


class _Selector(selectors.SelectSelector):
    """Never waits: what would be waiting moves the clock."""

    now_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise AssertionError("everybody waits for something that nothing will bring")
        self.now_s += max(timeout, 0.0)
        return super().select(0)


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """An event loop in which a minute passes as soon as nobody has anything to do."""

    def __init__(self) -> None:
        self._clock = _Selector()
        super().__init__(self._clock)

    def time(self) -> float:
        return self._clock.now_s

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Run to the end, however long that takes on the loop's own clock."""
        return self.run_until_complete(coroutine)

    def finish(self) -> None:
        """End what still runs, and close."""
        tasks = asyncio.all_tasks(self)
        for task in tasks:
            task.cancel()
        if tasks:
            self.run(asyncio.wait(tasks))
        self.close()


def _admit(token: str | None) -> Pass:
    """Tokens are names here."""
    if not token:
        raise AuthenticationFailed("unauthenticated", "who are you?")
    return Pass(token)


class Line:
    """One connection: frames in order, each some time on its way, until it breaks.

    Args:
        random: draws the delays.
        noise: the chance that it breaks with a frame on its way.
    """

    def __init__(self, random: Random, noise: float, hub: Hub, identity: RelayIdentity) -> None:
        self.ended: ConnectionLost | None = None  # after what is on its way down
        self.broken = False
        self._random = random
        self._noise = noise
        self._connection = NativeConnection(
            hub, identity, admit=_admit, came_with="owner", wake=self._woken
        )
        self._up: deque[bytes] = deque()
        self._down: deque[bytes] = deque()
        self._news = asyncio.Condition()
        self._wakes = asyncio.Event()
        self._pumps = [asyncio.create_task(self._pump_up()), asyncio.create_task(self._pump_down())]

    def cut(self) -> None:
        """Break it: what is on its way is lost, and neither side is told more."""
        self.broken = True
        self.ended = ConnectionLost("the line was cut")
        self._connection.leave()
        for pump in self._pumps:
            pump.cancel()
        self._wakes.set()

    def dismiss(self) -> None:
        """The relay stops, and says so."""
        self._connection.refuse(Stopping("restarting"))

    def _woken(self) -> None:
        self._wakes.set()

    async def _travel(self) -> bool:
        """Take some time; whether the frame arrives."""
        await asyncio.sleep(self._random.choice((0.0, 0.01, 0.1)))
        if self._random.random() < self._noise:
            asyncio.get_running_loop().call_soon(self.cut)
            await self._tell()
            return False
        return True

    async def _pump_up(self) -> None:
        while True:
            async with self._news:
                await self._news.wait_for(lambda: self._up)
            frame = self._up.popleft()
            if await self._travel():
                await self._connection.receive(frame)

    async def _pump_down(self) -> None:
        while True:
            self._wakes.clear()
            while (frame := self._connection.take()) is not None:
                if await self._travel():
                    self._down.append(frame)
                    await self._tell()
            if self._connection.close_code is not None:
                code, reason = int(self._connection.close_code), self._connection.close_reason
                self.ended = ConnectionLost(f"closed: {reason}", code=code, reason=reason)
                await self._tell()
                return
            await self._wakes.wait()

    async def _tell(self) -> None:
        async with self._news:
            self._news.notify_all()

    # -- the client's socket -------------------------------------------------------------------

    async def send(self, frame: bytes) -> None:
        if self.ended is not None:
            raise self.ended
        self._up.append(frame)
        await self._tell()

    async def receive(self) -> bytes:
        while not self._down or self.broken:
            if self.ended is not None:
                raise self.ended
            async with self._news:
                await self._news.wait_for(lambda: self._down or self.ended)
        return self._down.popleft()


class Network:
    """Devices, a relay, and what is between them."""

    def __init__(self, random: Random) -> None:
        self.noise = 0.0
        self.cut_off: set[str] = set()
        self._random = random
        self._hub: Hub | None = None
        self._identity: RelayIdentity
        self._lines: dict[Line, str] = {}

    def start_relay(
        self, log: UpdateLog, register: Register | None = None, key: bytes | None = None
    ) -> None:
        loop = asyncio.get_running_loop()
        self._hub = Hub(
            log,
            register=register,
            relay_key=key,
            clock=loop.time,
            random=self._random.randbytes,
        )
        self._identity = RelayIdentity(bytes(32), log.log_id)

    async def stop_relay(self) -> None:
        hub, self._hub = self._hub, None
        if hub is not None:
            await hub.close()
            for line in tuple(self._lines):
                line.dismiss()

    async def cut(self, device: str) -> None:
        """Break the lines of a device; it may dial again."""
        for line, owner in tuple(self._lines.items()):
            if owner == device:
                line.cut()
                await line._tell()

    def dial_for(self, device: str) -> Dial:
        """How a device reaches the relay."""

        @asynccontextmanager
        async def dial() -> AsyncIterator[Line]:
            await asyncio.sleep(self._random.choice((0.0, 0.05)))
            if self._hub is None or device in self.cut_off:
                raise ConnectionLost("nobody answers")
            line = Line(self._random, self.noise, self._hub, self._identity)
            self._lines[line] = device
            try:
                yield line
            finally:
                line.cut()
                del self._lines[line]

        return dial

    @property
    def lines(self) -> Mapping[Line, str]:
        return self._lines
