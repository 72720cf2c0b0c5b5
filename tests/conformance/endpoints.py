"""Endpoints for the suite to try: a relay as it is, and one behind something that lies."""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

from websockets.asyncio.client import connect
from websockets.asyncio.server import serve
from websockets.exceptions import ConnectionClosed
from websockets.typing import Subprotocol

from crdt_llm.conformance.connection import Endpoint
from crdt_llm.document.keys import SigningKey
from crdt_llm.store.archive import Archive
from crdt_llm.store.sqlite import SqliteLog
from crdt_llm.store.token_ledger import TokenLedger
from crdt_llm.sync.relay.access import Authority
from crdt_llm.sync.relay.conversation_list import ConversationLists
from crdt_llm.sync.relay.hub import Hub
from crdt_llm.sync.relay.native_peer import RelayIdentity
from crdt_llm.sync.relay.requests import Requests
from crdt_llm.sync.relay.server import Relay
from crdt_llm.sync.wire import frames

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from websockets.asyncio.client import ClientConnection
    from websockets.asyncio.server import ServerConnection

    from crdt_llm.sync.wire.frames import FromClient, FromRelay

TOKEN = "the-owners-own-token"  # noqa: S105 - of a relay that lives for a second
DEADLINE_S = 20.0  # nothing waits that long but what is broken
BROKEN_DEADLINE_S = 1.5  # what a lie makes wait is waited for in vain


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


@asynccontextmanager
async def relay(folder: Path) -> AsyncIterator[Endpoint]:
    """A real relay on a real socket and disk."""
    log = await SqliteLog.open(folder / "log.db")
    ledger = TokenLedger.open(folder / "tokens.db")
    authority = Authority(TOKEN, bytes(32), ledger, clock=_now_ms)
    identity = RelayIdentity(SigningKey(bytes(32)).public, log.log_id)
    hub = Hub(log)
    archive = Archive.open(folder / "archive.db")
    lists = ConversationLists(hub, archive, clock=_now_ms)
    running = Relay(
        hub,
        authenticate=authority.authenticate,
        is_valid=authority.is_valid,
        identity=identity,
        lists=lists,
        requests=Requests(lists, authority),
    )
    await running.start()
    try:
        host, port = running.address
        yield Endpoint(f"ws://{host}:{port}", TOKEN, DEADLINE_S)
    finally:
        await running.stop()
        await log.close()
        ledger.close()
        archive.close()


@asynccontextmanager
async def behind(
    endpoint: Endpoint,
    *,
    up: Callable[[FromClient], list[FromClient]] = lambda frame: [frame],
    down: Callable[[FromRelay], list[FromRelay]] = lambda frame: [frame],
) -> AsyncIterator[Endpoint]:
    """The same endpoint behind something that changes what it says, frame by frame."""

    async def carry(socket: ServerConnection) -> None:
        async with connect(
            endpoint.url, subprotocols=[Subprotocol(frames.SUBPROTOCOL)], compression=None
        ) as real:
            there = asyncio.create_task(_upwards(socket, real, up))
            try:
                async for data in real:
                    for frame in down(frames.decode_from_relay(_binary(data))):
                        await socket.send(frames.encode(frame))
            except ConnectionClosed:
                pass
            finally:
                there.cancel()
                with suppress(asyncio.CancelledError, ConnectionClosed):
                    await there
            await socket.close(real.close_code or 1011, real.close_reason or "")

    server = await serve(
        carry,
        "127.0.0.1",
        0,
        subprotocols=[Subprotocol(frames.SUBPROTOCOL)],
        compression=None,
        max_size=frames.FRAME_BYTES_MAX,
    )
    try:
        host, port = server.sockets[0].getsockname()[:2]
        yield Endpoint(f"ws://{host}:{port}", endpoint.token, BROKEN_DEADLINE_S)
    finally:
        server.close()
        await server.wait_closed()


async def _upwards(
    socket: ServerConnection,
    real: ClientConnection,
    up: Callable[[FromClient], list[FromClient]],
) -> None:
    async for data in socket:
        for frame in up(frames.decode_from_client(_binary(data))):
            await real.send(frames.encode(frame))
    await real.close()


def _binary(data: str | bytes) -> bytes:
    assert isinstance(data, bytes)
    return data
