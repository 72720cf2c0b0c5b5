"""A bare connection to an endpoint: frames out, frames in, nothing taken care of.

This module owns the socket and the waiting for one certain frame. It shares the grammar with the
product and nothing else: no client, no link, no retries, so that a case sees what an endpoint sends
and not what a forgiving client makes of it.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus
from websockets.typing import Subprotocol

from crdt_llm.errors import ConnectionLost, CrdtLlmError, MalformedMessage
from crdt_llm.sync.wire import frames, y_websocket
from crdt_llm.sync.wire.frames import SUBPROTOCOL, VERSION, Closed, Hello, Welcome

if TYPE_CHECKING:
    from collections.abc import Callable

    from websockets.asyncio.client import ClientConnection

_Frame = TypeVar("_Frame")

SEEN_MAX: Final = 100_000
"""Frames of one connection that are kept to be looked at; a case sees some hundred."""


class Broken(CrdtLlmError):  # noqa: N818 - it says what the endpoint did
    """The endpoint did not do what the protocol says."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where to connect.

    Attributes:
        url: ``ws://host:port`` or ``wss://host:port``, without a path.
        token: Who we are: an owner of new conversations.
        deadline_s: How long anything may take.
    """

    url: str
    token: str
    deadline_s: float


class Native:
    """One connection in the native dialect."""

    def __init__(self, socket: ClientConnection, deadline_s: float) -> None:
        self._socket = socket
        self._deadline_s = deadline_s
        self._next_id = 0
        self.waiting: list[Any] = []  # came, and nobody asked for it yet
        self.received_bytes = 0

    @classmethod
    async def connect(cls, endpoint: Endpoint) -> Native:
        """Connect, and say nothing yet.

        Raises:
            Broken: The endpoint does not speak the dialect.
        """
        try:
            socket = await connect(
                endpoint.url + "/",
                subprotocols=[Subprotocol(SUBPROTOCOL)],
                compression=None,
                max_size=frames.FRAME_BYTES_MAX,
                open_timeout=endpoint.deadline_s,
                ping_interval=None,
                close_timeout=1,
            )
        except (OSError, InvalidHandshake, TimeoutError) as error:
            raise Broken(f"no connection in the native dialect: {_why(error)}") from error
        if socket.subprotocol != SUBPROTOCOL:
            await socket.close()
            raise Broken(f"the handshake did not agree on {SUBPROTOCOL}")
        return cls(socket, endpoint.deadline_s)

    async def hello(self, token: str | None, device: str = "conformance") -> Welcome:
        """Say who we are.

        Raises:
            Broken: There is no welcome.
            ConnectionLost: We are not welcome.
        """
        await self.send(Hello(VERSION, token, device, None))
        return await self.expect(Welcome)

    async def send(self, frame: frames.Frame) -> None:
        """Send a frame."""
        await self.send_bytes(frames.encode(frame))

    async def send_bytes(self, data: bytes | str) -> None:
        """Send whatever, also what no frame is.

        Raises:
            ConnectionLost: The endpoint has closed.
        """
        try:
            await self._socket.send(data)
        except ConnectionClosed as error:
            raise self._lost(error) from error

    def next_id(self) -> int:
        """A fresh update id."""
        self._next_id += 1
        return self._next_id

    async def receive(self) -> Any:
        """The next frame, whatever it is.

        Raises:
            Broken: None came in time, or one that is none.
            ConnectionLost: The endpoint has closed.
        """
        try:
            async with asyncio.timeout(self._deadline_s):
                data = await self._socket.recv()
        except TimeoutError:
            raise Broken(f"nothing came for {self._deadline_s:g} s") from None
        except ConnectionClosed as error:
            raise self._lost(error) from error
        if isinstance(data, str):
            raise Broken("a text frame came; the dialect is binary")
        self.received_bytes += len(data)
        try:
            return frames.decode_from_relay(data)
        except MalformedMessage as error:
            raise Broken(f"a frame came that is none: {error}") from error

    async def expect(
        self, kind: type[_Frame], where: Callable[[_Frame], bool] = lambda _: True
    ) -> _Frame:
        """The next frame of a kind; those of other kinds wait.

        Raises:
            Broken: It did not come in time.
            ConnectionLost: The endpoint has closed.
        """
        for index, frame in enumerate(self.waiting):
            if isinstance(frame, kind) and where(frame):
                return self.waiting.pop(index)  # type: ignore[no-any-return]  # as just checked
        try:
            async with asyncio.timeout(self._deadline_s):
                while True:
                    frame = await self.receive()
                    if isinstance(frame, kind) and where(frame):
                        return frame
                    self.waiting.append(frame)
                    if len(self.waiting) > SEEN_MAX:
                        raise Broken(f"no {kind.__name__} among {SEEN_MAX} frames")
        except TimeoutError:
            raise Broken(f"no {kind.__name__} came in {self._deadline_s:g} s") from None

    async def expect_end(self) -> tuple[int, str]:
        """Wait until the endpoint closes the connection.

        Returns:
            The close code, and the reason.

        Raises:
            Broken: It does not.
        """
        try:
            async with asyncio.timeout(self._deadline_s):
                while True:
                    self.waiting.append(await self.receive())
        except ConnectionLost as lost:
            return lost.code, lost.reason
        except TimeoutError:
            raise Broken("the connection was left open") from None

    async def expect_closed(self, channel: int) -> Closed:
        """Wait until the endpoint ends a channel."""
        return await self.expect(Closed, lambda closed: closed.channel == channel)

    async def close(self) -> None:
        """Hang up."""
        with suppress(ConnectionClosed):
            await self._socket.close()

    def cut(self) -> None:
        """Lose the connection without a word, as a phone in a tunnel does."""
        self._socket.transport.abort()

    @staticmethod
    def _lost(error: ConnectionClosed) -> ConnectionLost:
        close = error.rcvd
        code, reason = (1006, "") if close is None else (close.code, close.reason)
        return ConnectionLost(f"the endpoint closed ({code} {reason})", code=code, reason=reason)


class Plain:
    """One connection in the plain dialect, as a stock Yjs client has it."""

    def __init__(self, socket: ClientConnection, deadline_s: float) -> None:
        self._socket = socket
        self._deadline_s = deadline_s

    @classmethod
    async def connect(cls, endpoint: Endpoint, conversation: str, token: str) -> Plain:
        """Join a conversation.

        Raises:
            Broken: The endpoint does not speak the dialect.
        """
        try:
            socket = await connect(
                f"{endpoint.url}/{conversation}",
                additional_headers={"Authorization": f"Bearer {token}"},
                compression=None,
                max_size=y_websocket.FRAME_BYTES_MAX,
                open_timeout=endpoint.deadline_s,
                ping_interval=None,
                close_timeout=1,
            )
        except (OSError, InvalidHandshake, TimeoutError) as error:
            raise Broken(f"no connection in the plain dialect: {_why(error)}") from error
        return cls(socket, endpoint.deadline_s)

    async def send(self, message: y_websocket.Message) -> None:
        """Send a message."""
        await self._socket.send(y_websocket.encode(message))

    async def expect(self, kind: type[_Frame]) -> _Frame:
        """The next message of a kind; others are dropped.

        Raises:
            Broken: It did not come in time.
            ConnectionLost: The endpoint has closed.
        """
        try:
            async with asyncio.timeout(self._deadline_s):
                while True:
                    data = await self._socket.recv()
                    message = y_websocket.decode(data if isinstance(data, bytes) else data.encode())
                    if isinstance(message, kind):
                        return message
        except TimeoutError:
            raise Broken(f"no {kind.__name__} came in {self._deadline_s:g} s") from None
        except ConnectionClosed as error:
            close = error.rcvd
            code, reason = (1006, "") if close is None else (close.code, close.reason)
            raise ConnectionLost("the endpoint closed", code=code, reason=reason) from error
        except MalformedMessage as error:
            raise Broken(f"a message came that is none: {error}") from error

    async def close(self) -> None:
        """Hang up."""
        with suppress(ConnectionClosed):
            await self._socket.close()


def _why(error: Exception) -> str:
    if isinstance(error, InvalidStatus):
        return f"HTTP {error.response.status_code}"
    return str(error) or type(error).__name__
