from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import pytest
from sync.device import CONVERSATION
from sync.native import IDENTITY, PASSES, device, open_frame, update_frame
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from crdt_llm.document.schema import Grant
from crdt_llm.errors import StoreFailed
from crdt_llm.store.memory import MemoryDisk, MemoryLog
from crdt_llm.store.token_ledger import TokenLedger
from crdt_llm.sync.relay.access import Authority, Pass
from crdt_llm.sync.relay.hub import Hub
from crdt_llm.sync.relay.metrics import Metrics
from crdt_llm.sync.relay.server import Limits, Relay
from crdt_llm.sync.relay.static_page import StaticPage
from crdt_llm.sync.wire.frames import (
    HELLO_BYTES_MAX,
    SUBPROTOCOL,
    Ack,
    Change,
    Hello,
    Nack,
    Opened,
    Update,
    Welcome,
    decode_from_relay,
    encode,
)
from crdt_llm.sync.wire.verdict import CloseCode

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from websockets.asyncio.client import ClientConnection
    from websockets.typing import Subprotocol

    from crdt_llm.sync.wire.frames import FromClient, FromRelay

Kind = TypeVar("Kind")


class Served:
    """A relay on a free port."""

    def __init__(self, **options: Any) -> None:
        self.passes: dict[str, Pass] = dict(PASSES)
        self.ended: set[str] = set()
        options.setdefault("identity", IDENTITY)
        self.relay = Relay(
            Hub(MemoryLog(MemoryDisk("log"), clock=lambda: 0)),
            authenticate=lambda token: self.passes.get(token or ""),
            is_valid=lambda found: found.principal not in self.ended,
            **options,
        )

    def open(self, path: str = "/", **options: Any) -> connect:
        host, port = self.relay.address
        options.setdefault("subprotocols", [SUBPROTOCOL])
        return connect(f"ws://{host}:{port}{path}", compression=None, **options)


@asynccontextmanager
async def serving(**options: Any) -> AsyncIterator[Served]:
    served = Served(**options)
    await served.relay.start()
    async with served.relay:
        yield served


async def send(socket: ClientConnection, *frames: FromClient) -> None:
    for frame in frames:
        await socket.send(encode(frame))


async def read(socket: ClientConnection, kind: type[Kind]) -> Kind:
    """The next frame of a kind; others are passed over."""
    while True:
        raw = await socket.recv()
        assert isinstance(raw, bytes)
        frame: FromRelay = decode_from_relay(raw)
        if isinstance(frame, kind):
            return frame


async def greet(socket: ClientConnection, token: str | None = "owner") -> Welcome:  # noqa: S107 - a name
    await send(socket, Hello(1, token, "test", None))
    return await read(socket, Welcome)


async def end_of(socket: ClientConnection) -> int:
    async def read_all() -> None:
        while True:
            await socket.recv()

    with pytest.raises(ConnectionClosed) as closed:
        await read_all()
    assert closed.value.rcvd is not None
    return closed.value.rcvd.code


async def test_two_connections_share_a_conversation() -> None:
    async with serving() as served, served.open() as one, served.open() as two:
        a, b = device(1), device(2)
        assert one.subprotocol == SUBPROTOCOL
        for socket in (one, two):
            await greet(socket)
            await send(socket, open_frame())
            await read(socket, Opened)
        await send(one, update_frame(1, a.give_birth()), update_frame(2, a.say("hello")))
        while (await read(one, Ack)).id < 2:
            pass
        while b.texts != ["hello"]:
            b.hear([await read(two, Change)])


@pytest.mark.parametrize("way", ["header", "query"])
async def test_the_token_may_come_with_the_handshake(way: str) -> None:
    header = {"Authorization": "Bearer friend"} if way == "header" else None
    path = "/?token=friend" if way == "query" else "/"
    async with serving() as served, served.open(path, additional_headers=header) as socket:
        assert (await greet(socket, None)).principal == "friend"


async def test_a_wrong_token_is_final() -> None:
    async with serving() as served, served.open() as socket:
        await send(socket, Hello(1, "wrong", "test", None))
        assert await end_of(socket) == CloseCode.UNAUTHENTICATED


@pytest.mark.parametrize("frame", [b"", b"\xc0", b"\x91\x63", "text", encode(open_frame())])
async def test_what_is_no_hello_is_final(frame: bytes | str) -> None:
    async with serving() as served, served.open() as socket:
        await socket.send(frame)
        assert await end_of(socket) == CloseCode.MALFORMED


async def test_only_a_known_peer_may_send_much() -> None:
    async with serving() as served, served.open() as socket:
        await greet(socket)
        await send(socket, open_frame())
        await read(socket, Opened)
        await send(socket, Update(1, 1, bytes(2 * HELLO_BYTES_MAX)))
        assert (await read(socket, Nack)).id == 1
        async with served.open() as other:
            await other.send(bytes(HELLO_BYTES_MAX + 1))
            assert await end_of(other) == 1009  # RFC 6455: too big


async def test_who_does_not_say_who_it_is_must_go_and_may_come_back() -> None:
    async with serving(limits=Limits(hello_s=0.05)) as served, served.open() as socket:
        assert await end_of(socket) == CloseCode.TRY_AGAIN


async def test_the_unknown_are_bounded_by_address_and_do_not_count_once_known() -> None:
    async with (
        serving(limits=Limits(unknown_of_address=2)) as served,
        served.open() as one,
        served.open() as two,
    ):
        with pytest.raises(InvalidStatus) as refused:
            await served.open().__aenter__()
        assert refused.value.response.status_code == 503
        await greet(one)
        async with served.open() as three:
            await greet(three)
        await greet(two)
        assert not served.relay._unknown


async def test_a_token_that_is_passed_on_does_not_take_all_places() -> None:
    limits = Limits(connections_of_guest=1)
    async with serving(limits=limits) as served, served.open() as one, served.open() as two:
        served.passes["link"] = Pass("guest:1", conversations={CONVERSATION: Grant.WRITER})
        await greet(one, "link")
        await greet(one, "link")  # a token again, on the same connection
        await send(two, Hello(1, "link", "test", None))
        assert await end_of(two) == CloseCode.TRY_AGAIN


async def test_another_path_is_the_plain_dialect() -> None:
    async with serving() as served, served.open(f"/{CONVERSATION}?token=owner") as socket:
        assert socket.subprotocol is None


async def test_without_an_identity_there_is_no_native_dialect() -> None:
    relay = Relay(Hub(MemoryLog(MemoryDisk("log"), clock=lambda: 0)), authenticate=PASSES.get)  # type: ignore[arg-type]
    await relay.start()
    async with relay:
        host, port = relay.address
        offered: list[Subprotocol] = [SUBPROTOCOL]  # type: ignore[list-item]
        async with connect(f"ws://{host}:{port}/?token=owner", subprotocols=offered) as socket:
            assert socket.subprotocol is None
            assert await end_of(socket) == CloseCode.NO_SUCH_CONVERSATION


@pytest.mark.parametrize("path", ["/", f"/{CONVERSATION}?token=friend"])
async def test_a_token_that_ends_ends_its_connections(path: str) -> None:
    async with serving() as served, served.open(path) as socket, served.open() as other:
        await greet(other)
        if path == "/":
            await greet(socket, "friend")
        else:
            await socket.recv()
        served.ended.add("friend")
        served.relay._end_expired()
        assert await end_of(socket) == CloseCode.UNAUTHENTICATED
        await send(other, open_frame())
        await read(other, Opened)


async def test_nobody_is_sent_away_because_the_ledger_fails() -> None:
    async with serving() as served, served.open() as socket, served.open() as other:
        await greet(socket)
        await greet(other, "friend")

        def judge(found: Pass) -> bool:
            if found.principal == "owner":
                raise StoreFailed("the ledger is locked")
            return False

        served.relay._is_valid = judge
        served.relay._end_expired()
        assert await end_of(other) == CloseCode.UNAUTHENTICATED
        await send(socket, open_frame())
        await read(socket, Opened)


async def test_a_stop_says_come_back() -> None:
    served = Served()
    await served.relay.start()
    async with served.open() as socket:
        await greet(socket)
        await served.relay.stop()
        assert await end_of(socket) == CloseCode.RESTART
    assert not asyncio.all_tasks() - {asyncio.current_task()}


async def get(served: Served, path: str, headers: str = "") -> tuple[int, str, str]:
    host, port = served.relay.address
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: {host}:{port}\r\n{headers}\r\n".encode())
    head, _, body = (await reader.read()).decode().partition("\r\n\r\n")
    writer.close()
    return int(head.split()[1]), head.lower(), body


async def test_clients_find_the_relays_key_and_its_nodes() -> None:
    async with serving(node_keys=(b"e" * 32,)) as served, served.open() as socket:
        await send(socket, Hello(1, "node", "test", b"n" * 32))
        await read(socket, Welcome)
        _, head, body = await get(served, "/.well-known/crdt-llm.json")
        assert "content-type: application/json" in head
        assert json.loads(body) == {
            "protocols": ["crdt-llm.v1"],
            "relay_key": "a2tra2tra2tra2tra2tra2tra2tra2tra2tra2tra2s",
            "node_keys": [
                "ZWVlZWVlZWVlZWVlZWVlZWVlZWVlZWVlZWVlZWVlZWU",
                "bm5ubm5ubm5ubm5ubm5ubm5ubm5ubm5ubm5ubm5ubm4",
            ],
        }


async def test_nobody_comes_with_the_key_of_the_relays_own_node() -> None:
    async with serving(node_keys=(b"e" * 32,)) as served, served.open() as socket:
        await send(socket, Hello(1, "node", "test", b"e" * 32))
        assert await end_of(socket) == CloseCode.FORBIDDEN


async def test_a_nodes_key_is_one_principals(tmp_path: Path) -> None:
    ledger = TokenLedger.open(tmp_path / "tokens.db")
    authority = Authority("owners", b"s" * 32, ledger, clock=lambda: 1_000)
    async with serving(admit_node=authority.admit_node) as served:
        served.passes["other"] = Pass("another node", node=True)
        async with served.open() as socket:
            await send(socket, Hello(1, "node", "test", b"n" * 32))
            await read(socket, Welcome)
        async with served.open() as socket:
            await send(socket, Hello(1, "other", "test", b"n" * 32))
            assert await end_of(socket) == CloseCode.FORBIDDEN
    ledger.close()


async def test_a_relay_without_a_key_is_not_well_known() -> None:
    async with serving(identity=None) as served:
        assert (await get(served, "/.well-known/crdt-llm.json"))[0] == 404


async def test_metrics_are_shown_where_there_are_any() -> None:
    async with serving() as served:
        assert (await get(served, "/metrics"))[0] == 404
    async with serving(metrics=Metrics()) as served, served.open() as socket:
        await greet(socket)
        status, head, body = await get(served, "/metrics")
        assert status == 200
        assert "content-type: text/plain; version=0.0.4" in head
        assert 'crdt_llm_connections{dialect="native"} 1.0' in body
        sent = len(encode(Hello(1, "owner", "test", None)))
        assert f'crdt_llm_frame_bytes_total{{direction="in"}} {float(sent)}' in body


async def test_a_built_page_is_served(tmp_path: Path) -> None:
    (tmp_path / "assets").mkdir()
    (tmp_path / "index.html").write_text("<p>built</p>")
    (tmp_path / "assets" / "page-12345678.js").write_text("script")
    async with serving(built_page=StaticPage(tmp_path)) as served:
        for path in ("/", f"/c/{CONVERSATION}", "/?token=owner"):
            status, head, body = await get(served, path)
            assert (status, body) == (200, "<p>built</p>")
            assert "default-src 'self'" in head
        status, head, _ = await get(served, "/assets/page-12345678.js")
        assert (status, "immutable" in head) == (200, True)
        answer = StaticPage(tmp_path).answer("/", None, None)
        assert answer is not None
        status, head, body = await get(served, "/", f"If-None-Match: {answer.headers['ETag']}\r\n")
        assert (status, body) == (304, "")
        assert (await get(served, "/none.js"))[0] == 404
        assert (await get(served, "/%2e%2e/secret"))[0] == 404
        assert (await get(served, f"/{CONVERSATION}"))[0] == 401
