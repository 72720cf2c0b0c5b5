"""A wire that is listened to: what a relay sends to anybody goes through it, and is kept.

Owns the sockets and the bytes from the relay. It must not know what they mean. (Frames to clients
are neither masked nor compressed, so what is in a frame is in the bytes.)
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Callable

CHUNK_BYTES_MAX = 1 << 16


@dataclass(slots=True)
class Tap:
    """Passes connections on to a port of this machine.

    Attributes:
        port_of_relay: where the relay is now.
        port: where to connect instead.
        heard: what came from the relay, by connection.
    """

    port_of_relay: Callable[[], int]
    port: int = 0
    heard: list[bytearray] = field(default_factory=list)
    _server: asyncio.Server | None = None

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._pass_on, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        await self._server.wait_closed()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    async def _pass_on(self, down: asyncio.StreamReader, up: asyncio.StreamWriter) -> None:
        """From ``down``, the client, to the relay, and back."""
        heard = bytearray()
        self.heard.append(heard)
        try:
            relay, to_relay = await asyncio.open_connection("127.0.0.1", self.port_of_relay())
        except ConnectionError:
            up.close()  # it is not there now
            return
        async with asyncio.TaskGroup() as both:
            both.create_task(_carry(down, to_relay))
            both.create_task(_carry(relay, up, heard))


async def _carry(
    source: asyncio.StreamReader, sink: asyncio.StreamWriter, heard: bytearray | None = None
) -> None:
    with suppress(ConnectionError):  # either side may go without a word
        while chunk := await source.read(CHUNK_BYTES_MAX):
            if heard is not None:
                heard += chunk
            sink.write(chunk)
            await sink.drain()
    sink.close()
