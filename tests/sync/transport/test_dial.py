"""Addresses, and what goes into and comes out of the opening handshake."""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING

import pytest
from websockets.asyncio.server import serve
from websockets.typing import Subprotocol

from crdt_llm.errors import (
    AuthenticationFailed,
    ConnectionLost,
    Forbidden,
    LocalMisuse,
    MalformedMessage,
    Refused,
)
from crdt_llm.sync.transport.dial import Address, native_dial
from crdt_llm.sync.wire.frames import SUBPROTOCOL

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from websockets.asyncio.server import Server, ServerConnection
    from websockets.http11 import Request, Response


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("ws://127.0.0.1:8765", "ws://127.0.0.1:8765/"),
        ("ws://127.0.0.1:8765/", "ws://127.0.0.1:8765/"),
        ("http://localhost:8765/", "ws://localhost:8765/"),
        ("https://example.org", "wss://example.org/"),
        ("wss://example.org/chat/sync", "wss://example.org/chat/sync/"),
        ("http://[::1]:8765/", "ws://[::1]:8765/"),
        ("HTTP://Example.org/", "ws://Example.org/"),
    ],
)
def test_forms_of_an_address(url: str, base: str) -> None:
    assert Address.parse(url).base == base
    assert Address.parse(url).token is None


def test_a_token_in_the_address_is_taken_out() -> None:
    address = Address.parse("http://127.0.0.1:8765/?token=s%20e-cret")
    assert address == Address("ws://127.0.0.1:8765/", "s e-cret", is_loopback=True)


@pytest.mark.parametrize(
    ("url", "loopback"),
    [
        ("ws://127.0.0.1/", True),
        ("ws://[::1]/", True),
        ("ws://localhost/", True),
        ("ws://relay.localhost/", True),
        ("ws://10.0.0.1/", False),
        ("ws://localhost.example.org/", False),
    ],
)
def test_loopback_needs_no_proxy(url: str, *, loopback: bool) -> None:
    assert Address.parse(url).is_loopback is loopback


@pytest.mark.parametrize(
    "url",
    [
        "",
        "127.0.0.1:8765",
        "ftp://example.org/",
        "ws://",
        "ws://example.org:port/",
        "ws://example.org:99999/",
        "ws://user:secret@example.org/",
        "ws://example.org/#top",
        "ws://example.org/?room=1",
        "ws://[::1/",
        "http://127.0.0..1:8765/",
        f"http://{'x' * 64}.example/",
    ],
)
def test_what_is_no_address_is_said_in_one_line(url: str) -> None:
    with pytest.raises(LocalMisuse) as caught:
        Address.parse(url)
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    """Answers with the HTTP status that the path names; speaks text on ``/text``."""

    def answer(connection: ServerConnection, request: Request) -> Response | None:
        name = request.path.strip("/")
        return connection.respond(HTTPStatus(int(name)), "no\n") if name.isdigit() else None

    async def talk(connection: ServerConnection) -> None:
        await connection.send("hello")
        await connection.wait_closed()

    subprotocols = [Subprotocol(SUBPROTOCOL)]
    async with serve(
        talk, "127.0.0.1", 0, process_request=answer, subprotocols=subprotocols
    ) as running:
        yield running


def address_of(server: Server, path: str = "") -> Address:
    port = next(iter(server.sockets)).getsockname()[1]
    return Address.parse(f"ws://127.0.0.1:{port}/{path}")


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (401, AuthenticationFailed),
        (403, Forbidden),
        (404, Refused),
        (426, Refused),
        (408, ConnectionLost),
        (429, ConnectionLost),
        (500, ConnectionLost),
        (503, ConnectionLost),
    ],
)
async def test_an_http_answer_says_whether_to_come_back(
    server: Server, status: int, kind: type[Exception]
) -> None:
    with pytest.raises(kind) as caught:
        async with native_dial(address_of(server, str(status)))():
            raise AssertionError("it opened")
    assert type(caught.value) is kind


async def test_nobody_there_means_try_again(unused_tcp_port: int) -> None:
    address = Address.parse(f"ws://127.0.0.1:{unused_tcp_port}/")
    with pytest.raises(ConnectionLost, match="no connection"):
        async with native_dial(address)():
            raise AssertionError("it opened")


async def test_text_is_malformed(server: Server) -> None:
    async with native_dial(address_of(server, "text"))() as socket:
        with pytest.raises(MalformedMessage, match="text"):
            await socket.receive()
    with pytest.raises(ConnectionLost):
        await socket.send(b"too late")
    with pytest.raises(ConnectionLost):
        await socket.receive()


async def test_a_server_of_another_kind_is_not_tried_again() -> None:
    async def talk(connection: ServerConnection) -> None:
        await connection.wait_closed()

    async with serve(talk, "127.0.0.1", 0) as other:
        with pytest.raises(Refused, match=SUBPROTOCOL):
            async with native_dial(address_of(other))():
                raise AssertionError("it opened")
