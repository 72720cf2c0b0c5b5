"""The client's doorway to websockets: from an address and a token to a socket of frames.

This module owns the forms of an address, what goes into the opening handshake, and the translation
of the library's errors into ours. It must not know what a frame means.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Final, Protocol, Self, TypeAlias
from urllib.parse import parse_qs, urlsplit

from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException
from websockets.typing import Subprotocol

from crdt_llm.errors import (
    AuthenticationFailed,
    ConnectionLost,
    Forbidden,
    LocalMisuse,
    MalformedMessage,
    Refused,
)
from crdt_llm.sync.wire.frames import FRAME_BYTES_MAX, SUBPROTOCOL
from crdt_llm.sync.wire.loopback import is_loopback

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from websockets.asyncio.client import ClientConnection

OPEN_TIMEOUT_S: Final = 10.0
"""For the whole handshake: a phone on a bad network needs some seconds, nobody waits for more."""

CLOSE_TIMEOUT_S: Final = 2.0
"""For the closing handshake: a relay that has gone does not answer, and nothing depends on it."""

FRAMES_BUFFERED_MAX: Final = 64
"""Frames read ahead of the merge; beyond it the socket is left to fill, and the relay waits."""

_logger: Final = logging.getLogger("crdt_llm.sync.socket")
_logger.setLevel(logging.INFO)  # below it the library logs headers, and with them the token

_SCHEMES: Final = {"ws": "ws", "wss": "wss", "http": "ws", "https": "wss"}
_TRANSIENT: Final = frozenset(
    {HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS}
)


class Socket(Protocol):
    """A connection that carries whole frames in order."""

    async def send(self, frame: bytes) -> None:
        """Hand a frame over; waits while the network is slower than we are.

        Raises:
            ConnectionLost: it is closed.
        """

    async def receive(self) -> bytes:
        """The next frame.

        Raises:
            ConnectionLost: it is closed, and why.
            MalformedMessage: what came is text.
        """


Dial: TypeAlias = Callable[[], AbstractAsyncContextManager[Socket]]
"""Opens a socket to a relay in the native dialect; leaving the context closes it.

Entering raises ``ConnectionLost`` to try again, or ``Refused`` where that has no use.
"""


@dataclass(frozen=True, slots=True)
class Address:
    """Where a relay is, without any secret.

    Attributes:
        base: the websocket address; ends with ``/``.
        token: what the address brought along as ``?token=``.
        is_loopback: whether it is on this machine, where no proxy belongs in between.
    """

    base: str
    token: str | None
    is_loopback: bool

    @classmethod
    def parse(cls, url: str) -> Self:
        """Read ``ws://``, ``wss://``, ``http://`` or ``https://`` with a host and maybe a path.

        Raises:
            LocalMisuse: it is no such address.
        """
        try:
            parts = urlsplit(url)
            host, _port = parts.hostname, parts.port  # reading the port checks it
            (host or "").encode("idna")  # as whoever looks the name up does
        except ValueError as error:
            raise LocalMisuse(f"{url!r} is no address of a relay: {error}") from error
        scheme = _SCHEMES.get(parts.scheme)
        if scheme is None or not host:
            raise LocalMisuse(
                f"{url!r} is no address of a relay: write it like ws://127.0.0.1:8765/"
            )
        if parts.username is not None or parts.fragment:
            raise LocalMisuse(
                "a relay's address holds no user, password or fragment: hand the token over as"
                " token=..."
            )
        query = parse_qs(parts.query, keep_blank_values=True)
        token = query.pop("token", [None])[-1]
        if query:
            raise LocalMisuse("a relay's address has no query but ?token=...")
        path = parts.path if parts.path.endswith("/") else f"{parts.path}/"
        return cls(f"{scheme}://{parts.netloc}{path}", token or None, is_loopback(host))


class _WebSocket:
    def __init__(self, connection: ClientConnection) -> None:
        self._connection = connection

    async def send(self, frame: bytes) -> None:
        try:
            await self._connection.send(frame)
        except ConnectionClosed as error:
            raise _lost(error) from error

    async def receive(self) -> bytes:
        try:
            frame = await self._connection.recv()
        except ConnectionClosed as error:
            raise _lost(error) from error
        if isinstance(frame, str):
            raise MalformedMessage("the relay sent text; every frame of the dialect is binary")
        return frame


def _lost(error: ConnectionClosed) -> ConnectionLost:
    if error.rcvd is None:  # the network went, or the relay with it
        return ConnectionLost("the connection to the relay broke")
    code, reason = error.rcvd.code, error.rcvd.reason
    said = f": {reason}" if reason else ""
    return ConnectionLost(
        f"the relay closed the connection ({code}){said}", code=code, reason=reason
    )


def native_dial(address: Address) -> Dial:
    """Dial with websockets. Who we are is said in the first frame, so there is no secret here.

    Args:
        address: where the relay is.
    """
    return lambda: _open(address)


@asynccontextmanager
async def _open(address: Address) -> AsyncIterator[Socket]:
    try:
        connection = await connect(
            address.base,
            subprotocols=[Subprotocol(SUBPROTOCOL)],
            compression=None,  # our frames are small and the relay's time is dear
            user_agent_header="crdt-llm",
            proxy=None if address.is_loopback else True,
            open_timeout=OPEN_TIMEOUT_S,
            close_timeout=CLOSE_TIMEOUT_S,
            max_size=FRAME_BYTES_MAX,
            max_queue=FRAMES_BUFFERED_MAX,
            logger=_logger,
        )
    except InvalidStatus as error:
        raise _turned_away(error.response.status_code) from error
    except (OSError, TimeoutError, WebSocketException) as error:
        raise ConnectionLost(f"no connection to {address.base}: {error}") from error
    async with connection:
        if connection.subprotocol != SUBPROTOCOL:
            raise Refused("no-dialect", f"what answers at {address.base} is no {SUBPROTOCOL}")
        yield _WebSocket(connection)


def _turned_away(status: int) -> Refused | ConnectionLost:
    """What an HTTP status in place of a websocket means."""
    if status == HTTPStatus.UNAUTHORIZED:
        return AuthenticationFailed("unauthenticated", "the relay does not know this token")
    if status == HTTPStatus.FORBIDDEN:
        return Forbidden("forbidden", "the relay does not let this device in")
    if 400 <= status < 500 and status not in _TRANSIENT:  # noqa: PLR2004 - HTTP's client errors
        return Refused("no-relay", f"there is no relay at this address (HTTP {status})")
    return ConnectionLost(f"the relay is not ready (HTTP {status})")
