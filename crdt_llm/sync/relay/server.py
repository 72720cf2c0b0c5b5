"""The relay's sockets: websockets in both dialects, and a few plain HTTP pages.

This module only moves bytes and bounds them: handshakes, tokens, origins, limits, keepalive, and a
graceful stop. It must not know what a frame says, nor documents; whatever it carries is decided in
:mod:`crdt_llm.sync.relay.plain_session` and :mod:`crdt_llm.sync.room.room`.

``ws://host:port/<conversation id>?token=…`` joins a conversation in the plain dialect; the token
may instead come as ``Authorization: Bearer …``. ``ws://host:port/`` with the subprotocol
``crdt-llm.v1`` is the native dialect, which brings the token in its first frame.

A connection that is refused is accepted first, because a browser tells its page nothing about a
failed handshake: the reason comes in the close code, in the plain dialect also as its auth message.
Only what cannot be an honest page (a foreign origin) or would cost too much (too many connections)
is refused by HTTP.

Tokens travel in URLs because browsers cannot set headers on websockets. So no request line is ever
logged, and the library's own logging of handshakes is off.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
from base64 import urlsafe_b64encode
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final, Protocol, Self
from urllib.parse import parse_qs, unquote

from websockets.asyncio.server import ServerConnection, broadcast, serve
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Response

from crdt_llm.document.schema import is_conversation_id
from crdt_llm.errors import (
    AuthenticationFailed,
    CrdtLlmError,
    Forbidden,
    MalformedMessage,
    Unavailable,
)
from crdt_llm.sync.relay.access import may_connect
from crdt_llm.sync.relay.metrics import CONTENT_TYPE
from crdt_llm.sync.relay.native_peer import NativeConnection
from crdt_llm.sync.relay.plain_peer import RemotePeer
from crdt_llm.sync.relay.static_page import NO_POLICY_NEEDED
from crdt_llm.sync.wire import y_websocket as plain
from crdt_llm.sync.wire.frames import FRAME_BYTES_MAX, HELLO_BYTES_MAX, SUBPROTOCOL
from crdt_llm.sync.wire.verdict import CloseCode, one_line

if TYPE_CHECKING:
    import ssl
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from websockets.asyncio.server import Server
    from websockets.http11 import Request
    from websockets.typing import Subprotocol

    from crdt_llm.sync.relay.access import AdmitNode, Authenticate, Pass
    from crdt_llm.sync.relay.conversation_list import ConversationLists
    from crdt_llm.sync.relay.hub import Hub
    from crdt_llm.sync.relay.leases import LeaseOffice
    from crdt_llm.sync.relay.metrics import Dialect, Metrics
    from crdt_llm.sync.relay.native_peer import RelayIdentity
    from crdt_llm.sync.relay.requests import Requests
    from crdt_llm.sync.relay.static_page import StaticPage

logger = logging.getLogger("crdt_llm.sync")

# The library logs request lines, and with them tokens, at level DEBUG, and whole stacks above it.
_library_logger = logging.getLogger("crdt_llm.sync.websockets")
_library_logger.setLevel(logging.CRITICAL + 1)

TICK_S: Final = 1.0
"""How often leases are looked at, of which ten seconds are a usual time."""

TICKS_PER_SWEEP: Final = 5
"""Ticks after which all that expired is let go: a sixth of the time after which presence does."""

FRAMES_PER_TURN: Final = 8
"""Frames of one connection that are taken without letting others go on: a small read from the
socket may hold a thousand of them."""

READ_BYTES_MAX: Final = 8 << 10
"""Bytes of one read from a socket. What was read is taken apart into frames in one go, some 30 us
each, and asyncio's own 256 KiB may hold 6,000 of them: a fifth of a second in which nobody else is
served."""

_PAGE: Final = """<!doctype html>
<meta charset="utf-8"><title>crdt-llm</title>
<h1>crdt-llm</h1>
<p>A relay for conversations is running here. Join one with any Yjs client:
<pre>new WebsocketProvider(relayUrl, conversationId, doc, { params: { token } })</pre>
<p>or with <code>crdt-llm chat</code>.
"""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one relay takes on. Times are seconds.

    Attributes:
        connections: Open websockets. Each takes some 100 KB with its queues.
        connections_of_guest: Those of one principal whose token names its conversations: such a
            token is a link that people pass on, and must not take everybody's places.
        sockets: Sockets of any kind, so that half-open handshakes cannot eat all file handles.
        handshakes_of_address: Sockets of one address that have not come to the end of theirs: it
            may hold each for ``open_s``, and must not hold all.
        frame_bytes: One message; the largest holds a whole document and a state vector.
        unknown: Connections, of either dialect, that have not shown a token that counts: each may
            hold what a first frame takes, and a socket, for ``hello_s``.
        unknown_of_address: As many of one address: a household, or an office behind one router.
        hello_s: How long the first frame of the native dialect may take.
        queue_frames: Frames of one connection that were read from the socket and wait.
        write_buffer_bytes: Bytes of one connection that wait for the kernel.
        open_s: How long a handshake may take: a phone on a bad line needs a few seconds.
        ping_interval_s: How often a silent connection is asked whether it is there; below the
            minute after which home routers forget a connection.
        ping_timeout_s: How long it may take to say so.
        close_s: How long a peer may take to agree to the end.
        refused_close_s: How long one that was never let in may: it is counted until then.
    """

    connections: int = 2000
    connections_of_guest: int = 64
    sockets: int = 2500
    handshakes_of_address: int = 500
    frame_bytes: int = FRAME_BYTES_MAX
    unknown: int = 256
    unknown_of_address: int = 32
    hello_s: float = 10.0
    queue_frames: int = 4
    write_buffer_bytes: int = 64 << 10
    open_s: float = 10.0
    ping_interval_s: float = 20.0
    ping_timeout_s: float = 20.0
    close_s: float = 5.0
    refused_close_s: float = 1.0


class Relay:
    """A server in front of a hub.

    Args:
        hub: The rooms. :meth:`stop` closes it.
        authenticate: What a token proves.
        is_valid: Whether what it proved still counts; asked of live connections again and again.
        admit_node: Lets a node's key in with what its token proves; ``None`` lets every key in, but
            those in ``node_keys``.
        leases: Where nodes get their leases; ``None`` if there are none to be had.
        lists: The conversation lists of the native dialect; :meth:`stop` closes them.
        requests: What clients of the native dialect may ask for.
        identity: What it says of itself in the native dialect, which it does not speak without.
        origins: Further origins whose pages may connect, as ``https://example.org``.
        page: What ``GET /`` shows where there is no built page.
        built_page: The files of the page, if it was built.
        metrics: What ``GET /metrics`` shows; without it there is none.
        node_keys: The public keys of nodes in this process, for those who look them up.
        node_problem: For ``/readyz``: ``None``, or why the node cannot answer; without a function
            there is no node here.
        limits: What it takes on.
        tls: A context for TLS.
    """

    def __init__(  # noqa: PLR0913 - everything outside is an argument
        self,
        hub: Hub,
        *,
        authenticate: Authenticate,
        is_valid: Callable[[Pass], bool] = lambda _: True,
        identity: RelayIdentity | None = None,
        admit_node: AdmitNode | None = None,
        leases: LeaseOffice | None = None,
        lists: ConversationLists | None = None,
        requests: Requests | None = None,
        origins: frozenset[str] = frozenset(),
        page: str = _PAGE,
        built_page: StaticPage | None = None,
        metrics: Metrics | None = None,
        node_keys: tuple[bytes, ...] = (),
        node_problem: Callable[[], str | None] | None = None,
        limits: Limits | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._hub = hub
        self._authenticate = authenticate
        self._is_valid = is_valid
        self._identity = identity
        self._bind_node = admit_node
        self._lists = lists
        self._requests = requests
        self._leases = leases
        if leases is not None:
            leases.vacant = hub.notice
        self._origins = origins
        self._page = page
        self._built_page = built_page
        self._metrics = metrics
        self._node_keys = node_keys
        self._node_problem = node_problem
        self._limits = limits or Limits()
        self._tls = tls
        self._server: Server | None = None
        self._ticking: asyncio.Task[None] | None = None
        self._connections = 0
        self._unknown: Counter[str] = Counter()  # by address
        self._known: dict[_Carried, Pass] = {}
        self._native: set[NativeConnection] = set()

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> None:
        """Accept connections; port 0 takes a free one.

        Raises:
            OSError: The address is taken or not ours.
        """
        limits = self._limits
        self._server = await serve(
            self._serve,
            host,
            port,
            ssl=self._tls,
            # Conversations are small frames: deflate costs more time than it saves bytes.
            compression=None,
            process_request=self._route,
            select_subprotocol=self._select_dialect,
            server_header=None,
            create_connection=_counted(limits.sockets, limits.handshakes_of_address),
            # Nobody is known yet: see `_admit`.
            max_size=min(HELLO_BYTES_MAX, limits.frame_bytes),
            max_queue=limits.queue_frames,
            write_limit=limits.write_buffer_bytes,
            open_timeout=limits.open_s,
            ping_interval=limits.ping_interval_s,
            ping_timeout=limits.ping_timeout_s,
            close_timeout=limits.close_s,
            logger=_library_logger,
        )
        self._ticking = asyncio.get_running_loop().create_task(self._tick(), name="relay tick")

    @property
    def address(self) -> tuple[str, int]:
        """The host and port of the first socket."""
        if self._server is None:
            raise RuntimeError("the relay was not started")
        host, port = self._server.sockets[0].getsockname()[:2]
        return host, port

    async def stop(self) -> None:
        """Finish what was accepted, tell everyone to come back soon (1012), and let go."""
        if self._ticking is not None:
            self._ticking.cancel()
        if self._lists is not None:
            await self._lists.close()
        await self._hub.close()
        if self._server is not None:
            self._server.close(code=CloseCode.RESTART, reason="restarting")
            await self._server.wait_closed()

    async def __aenter__(self) -> Self:
        """Return the relay; start it first."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop it."""
        await self.stop()

    async def _tick(self) -> None:
        for tick in itertools.count(1):
            await asyncio.sleep(TICK_S)
            try:
                if self._leases is not None:
                    self._leases.tick()
                for connection in tuple(self._native):
                    connection.tick()
                if tick % TICKS_PER_SWEEP == 0:
                    self._hub.tick()
                    self._end_expired()
            except Exception as failure:  # noqa: BLE001 - the next one may work
                logger.error("what expired stays: %s", one_line(failure))  # noqa: TRY400 - one line

    def _end_expired(self) -> None:
        for carried, found in tuple(self._known.items()):
            try:
                is_valid = self._is_valid(found)
            except Unavailable as error:  # nobody is sent away for a fault of ours
                logger.warning("whether a token was revoked is not known now: %s", error)
                continue
            if not is_valid:
                carried.refuse(AuthenticationFailed("unauthenticated", "that token ended"))

    # -- plain HTTP ----------------------------------------------------------------------------

    def _route(self, socket: ServerConnection, request: Request) -> Response | None:
        """Answer plain requests; ``None`` lets a websocket handshake go on."""
        path, _, query = request.path.partition("?")
        upgrade = ",".join(request.headers.get_all("Upgrade")).lower()
        if "websocket" not in upgrade:
            return self._answer(request, unquote(path), _token_of(request, query))
        origins, hosts = request.headers.get_all("Origin"), request.headers.get_all("Host")
        if len(origins) > 1 or len(hosts) > 1:
            return _response(HTTPStatus.BAD_REQUEST, "one Origin and one Host, please")
        if not may_connect(_first(origins), _first(hosts), self._origins):
            return _response(HTTPStatus.FORBIDDEN, "pages of that origin may not connect here")
        if self._connections >= self._limits.connections:
            return _response(HTTPStatus.SERVICE_UNAVAILABLE, "too many connections")
        if self._is_crowded(_address_of(socket)):
            return _response(
                HTTPStatus.SERVICE_UNAVAILABLE, "too many who did not say who they are"
            )
        return None

    def _select_dialect(
        self, socket: ServerConnection, offered: Sequence[Subprotocol]
    ) -> Subprotocol | None:
        path = "" if socket.request is None else socket.request.path.partition("?")[0]
        native = next((one for one in offered if one == SUBPROTOCOL), None)
        return native if path == "/" and self._identity is not None else None

    def _is_crowded(self, address: str) -> bool:
        limits = self._limits
        of_address = self._unknown[address] >= limits.unknown_of_address
        return of_address or self._unknown.total() >= limits.unknown

    def _answer(  # noqa: PLR0911 - one each
        self, request: Request, path: str, token: str | None
    ) -> Response:
        match path:
            case "/healthz":
                return _response(HTTPStatus.OK, "ok")
            case "/readyz":
                return self._readiness()
            case "/metrics" if self._metrics is not None:
                return _made(HTTPStatus.OK, {"Content-Type": CONTENT_TYPE}, self._metrics.render())
            case "/.well-known/crdt-llm.json" if self._identity is not None:
                return self._keys(self._identity)
            case "/" if self._built_page is None:
                return _response(HTTPStatus.OK, self._page, "text/html")
        if not is_conversation_id(path[1:]):
            return self._file(request, path)
        if self._authenticate(token) is None:
            response = _response(HTTPStatus.UNAUTHORIZED, "a valid token is needed")
            response.headers["WWW-Authenticate"] = "Bearer"
            return response
        response = _response(HTTPStatus.UPGRADE_REQUIRED, "join a conversation by websocket")
        response.headers["Upgrade"] = "websocket"
        return response

    def _file(self, request: Request, path: str) -> Response:
        host = _first(request.headers.get_all("Host"))
        tags = ",".join(request.headers.get_all("If-None-Match"))
        page = self._built_page
        found = None if page is None else page.answer(path, host, tags)
        if found is None:
            return _response(HTTPStatus.NOT_FOUND, "there is nothing here")
        return _made(found.status, found.headers, found.body)

    def _keys(self, identity: RelayIdentity) -> Response:
        """Clients pin the first, and look up whom the others belong to."""
        nodes = {one.node_key for one in self._native if one.node_key is not None}
        keys = [*self._node_keys, *sorted(nodes - set(self._node_keys))]
        body = {
            "protocols": [SUBPROTOCOL],
            "relay_key": _base64url(identity.key),
            "node_keys": [_base64url(key) for key in keys],
        }
        return _response(HTTPStatus.OK, json.dumps(body), "application/json")

    def _readiness(self) -> Response:
        health = self._hub.health
        node = "none" if self._node_problem is None else self._node_problem() or "ok"
        ready = health.store is None and node in {"none", "ok"}
        body = {
            "ready": ready,
            # The reason is for whoever reads the log: it names paths, and anybody may ask here.
            "store": "ok" if health.store is None else "failing",
            "node": node,
            "damaged_conversations": len(health.damaged),
            "connections": self._connections,
        }
        status = HTTPStatus.OK if ready else HTTPStatus.SERVICE_UNAVAILABLE
        return _response(status, json.dumps(body), "application/json")

    # -- websockets ----------------------------------------------------------------------------

    async def _serve(self, socket: ServerConnection) -> None:
        self._connections += 1
        unknown = _Unknown(self._unknown, _address_of(socket))
        try:
            await self._carry(socket, unknown)
        except ConnectionClosed:
            pass  # as every connection does
        except Exception as failure:  # noqa: BLE001 - one connection's fault must not be another's
            logger.error("a connection: %s", one_line(failure))  # noqa: TRY400 - one line an error
            await socket.close(CloseCode.INTERNAL_ERROR, "something went wrong here")
        finally:
            unknown.end()
            self._connections -= 1

    async def _carry(self, socket: ServerConnection, unknown: _Unknown) -> None:
        request = socket.request
        if request is None:
            raise RuntimeError("a websocket without a request")
        path, _, query = request.path.partition("?")
        token = _token_of(request, query)
        if socket.subprotocol == SUBPROTOCOL and self._identity is not None:
            await self._carry_native(socket, self._identity, token, unknown)
        else:
            await self._carry_plain(socket, unquote(path[1:]), token, unknown)

    async def _carry_plain(
        self, socket: ServerConnection, conversation: str, token: str | None, unknown: _Unknown
    ) -> None:
        wire = _Wire(socket, self._limits.write_buffer_bytes, self._metrics)
        try:
            found = self._admit(token)
            self._check_places(found)
            if not found.may_enter(conversation) and is_conversation_id(conversation):
                raise Forbidden("forbidden", "this token is for other conversations")
        except CrdtLlmError as error:
            peer = RemotePeer("", wire.wake, metrics=self._metrics)
            peer.refuse(error)
            socket.close_timeout = self._limits.refused_close_s
            await self._run(socket, wire, peer)
            return
        unknown.end()
        cap = found.cap(conversation)
        peer = RemotePeer(found.principal, wire.wake, cap=cap, metrics=self._metrics)
        peer.address = _address_of(socket) or None
        socket.protocol.max_message_size = min(plain.FRAME_BYTES_MAX, self._limits.frame_bytes)
        self._known[peer] = found
        try:
            await self._run(socket, wire, peer, self._enter(conversation, peer))
        finally:
            del self._known[peer]

    async def _carry_native(
        self,
        socket: ServerConnection,
        identity: RelayIdentity,
        token: str | None,
        unknown: _Unknown,
    ) -> None:
        def admit(shown: str | None) -> Pass:
            found = self._admit(shown)
            if connection not in self._known:  # else it is a new token on the same connection
                self._check_places(found)
            self._known[connection] = found
            socket.protocol.max_message_size = self._limits.frame_bytes
            socket.close_timeout = self._limits.close_s
            unknown.end()
            return found

        def be_late() -> None:
            if unknown.counts:
                connection.refuse(Unavailable("say who you are sooner"))

        socket.close_timeout = self._limits.refused_close_s
        wire = _Wire(socket, self._limits.write_buffer_bytes, self._metrics)
        connection = NativeConnection(
            self._hub,
            identity,
            admit=admit,
            admit_node=self._admit_node,
            came_with=token,
            address=_address_of(socket) or None,
            wake=wire.wake,
            leases=self._leases,
            lists=self._lists,
            requests=self._requests,
            metrics=self._metrics,
        )
        self._native.add(connection)
        late = asyncio.get_running_loop().call_later(self._limits.hello_s, be_late)
        try:
            await self._run(socket, wire, connection)
        finally:
            late.cancel()
            self._known.pop(connection, None)
            self._native.discard(connection)

    def _admit(self, token: str | None) -> Pass:
        found = self._authenticate(token)
        if found is None:
            raise AuthenticationFailed("unauthenticated", "a valid token is needed")
        return found

    def _check_places(self, found: Pass) -> None:
        if found.conversations is None:
            return
        taken = sum(
            one.principal == found.principal and one.conversations is not None
            for one in self._known.values()
        )
        if taken >= self._limits.connections_of_guest:
            raise Unavailable("too many connections with this token: close one")

    async def _admit_node(self, found: Pass, key: bytes) -> None:
        if key in self._node_keys:
            raise Forbidden("not-your-node", "that key is this relay's own node's")
        if self._bind_node is not None:
            await self._bind_node(found, key)

    async def _run(
        self,
        socket: ServerConnection,
        wire: _Wire,
        carried: _Carried,
        entering: Awaitable[None] | None = None,
    ) -> None:
        dialect: Dialect = "native" if isinstance(carried, NativeConnection) else "plain"
        if self._metrics is not None:
            self._metrics.opened(dialect)
        wire.carried = carried
        wire.wake()  # it may have been refused before it had a wire
        sending = asyncio.get_running_loop().create_task(wire.run(carried))
        try:
            if entering is not None:
                await entering
            taken = 0
            async for message in socket:
                taken += 1
                if self._metrics is not None:
                    self._metrics.received(len(message))
                if isinstance(message, str):
                    carried.refuse(MalformedMessage("this protocol has no text frames"))
                else:
                    await carried.receive(message)
                if taken % FRAMES_PER_TURN == 0:
                    await asyncio.sleep(0)
        finally:
            if self._metrics is not None:
                self._metrics.closed(dialect)
            carried.leave()
            sending.cancel()
            with suppress(asyncio.CancelledError):
                await sending

    async def _enter(self, conversation: str, peer: RemotePeer) -> None:
        try:
            await self._hub.enter(conversation, peer)
        except CrdtLlmError as error:
            peer.refuse(error)


class _Unknown:
    """One connection's place among those of its address that have not said who they are (yet)."""

    def __init__(self, places: Counter[str], address: str) -> None:
        self.counts = True
        self._places = places
        self._address = address
        places[address] += 1

    def end(self) -> None:
        """It is known now, or gone. Safe to call twice."""
        if self.counts:
            self.counts = False
            self._places -= Counter((self._address,))  # which leaves no zeros


def _counted(limit: int, opening_max: int) -> type[ServerConnection]:
    """Connections that are counted from their first byte on, not from the end of the handshake.

    Args:
        limit: Of all of them.
        opening_max: Of those of one address that are in their handshakes.
    """
    count = 0
    opening: Counter[str] = Counter()

    class Socket(ServerConnection):
        _opening: _Unknown | None = None

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            nonlocal count
            count += 1
            if hasattr(transport, "max_size"):  # asyncio's own transports; others have no such size
                transport.max_size = READ_BYTES_MAX
            super().connection_made(transport)
            address = _address_of(self)
            self._opening = _Unknown(opening, address)
            if count > limit or opening[address] > opening_max:
                self.transport.abort()

        async def handshake(self, *arguments: Any, **named: Any) -> None:
            try:
                await super().handshake(*arguments, **named)
            finally:
                self._end_opening()

        def connection_lost(self, exc: Exception | None) -> None:
            nonlocal count
            count -= 1
            self._end_opening()
            super().connection_lost(exc)

        def _end_opening(self) -> None:
            if self._opening is not None:
                self._opening.end()

    return Socket


class _Carried(Protocol):
    """What hangs on a wire: a connection in either dialect."""

    close_code: CloseCode | None
    close_reason: str

    async def receive(self, frame: bytes) -> None:
        """Take one frame."""

    def take(self) -> bytes | None:
        """The next frame to send."""

    def refuse(self, error: CrdtLlmError) -> None:
        """End the connection, saying why."""

    def leave(self) -> None:
        """The socket is gone."""


class _Wire:
    """What a peer's frames go out by: at once while the kernel takes them, else in a task.

    Most frames find the socket ready. To write those in the room's own turn saves two switches of
    task a frame, which is half the cost of a broadcast.
    """

    def __init__(
        self, socket: ServerConnection, write_buffer_bytes: int, metrics: Metrics | None
    ) -> None:
        self._socket = socket
        self._metrics = metrics
        self._write_buffer_bytes = write_buffer_bytes
        self._news = asyncio.Event()
        self._is_sending = False  # the task has a frame that must go first
        self.carried: _Carried | None = None

    def wake(self) -> None:
        """Send what there is, as far as it does not have to wait."""
        if self._is_sending or self.carried is None:
            return
        while self._socket.transport.get_write_buffer_size() < self._write_buffer_bytes:
            frame = self.carried.take()
            if frame is None:
                break
            broadcast((self._socket,), frame)
            self._count(frame)
        else:
            self._news.set()
        if self.carried.close_code is not None:
            self._news.set()

    def _count(self, frame: bytes) -> None:
        if self._metrics is not None:
            self._metrics.sent(len(frame))

    async def run(self, carried: _Carried) -> None:
        """Send until it is time to close, then close."""
        try:
            while carried.close_code is None:
                await self._news.wait()
                self._news.clear()
                self._is_sending = True
                while (frame := carried.take()) is not None:
                    await self._socket.send(frame)
                    self._count(frame)
                self._is_sending = False
            await self._socket.close(carried.close_code, carried.close_reason)
        except ConnectionClosed:
            pass  # the reader sees it too, and lets go
        except Exception as failure:  # noqa: BLE001 - a fault of ours: nobody would send any more
            logger.error("a connection: %s", one_line(failure))  # noqa: TRY400 - one line an error
            await self._socket.close(CloseCode.INTERNAL_ERROR, "something went wrong here")


def _address_of(socket: ServerConnection) -> str:
    address = socket.remote_address
    return str(address[0]) if isinstance(address, tuple) and address else ""


def _token_of(request: Request, query: str) -> str | None:
    for value in request.headers.get_all("Authorization"):
        scheme, _, token = value.partition(" ")
        if scheme.lower() == "bearer":
            return token.strip()
    try:
        return _first(parse_qs(query, max_num_fields=16).get("token", []))
    except ValueError:  # too many fields
        return None


def _first(values: list[str]) -> str | None:
    return values[0] if values else None


def _response(status: HTTPStatus, text: str, kind: str = "text/plain") -> Response:
    body = (text if text.endswith("\n") else text + "\n").encode()
    return _made(status, {"Content-Type": f"{kind}; charset=utf-8"}, body)


def _made(status: HTTPStatus, headers: Mapping[str, str], body: bytes) -> Response:
    every = {
        "Connection": "close",
        "Cache-Control": "no-store",
        "Content-Security-Policy": NO_POLICY_NEEDED,
        # The page's own address may hold the token.
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }
    if status is not HTTPStatus.NOT_MODIFIED:  # it has no body to measure (RFC 9110, 15.4.5)
        every["Content-Length"] = str(len(body))
    return Response(status.value, status.phrase, Headers(every | dict(headers)), body)


def _base64url(key: bytes) -> str:
    return urlsafe_b64encode(key).rstrip(b"=").decode()
