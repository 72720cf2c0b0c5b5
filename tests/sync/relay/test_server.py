from __future__ import annotations

import asyncio
import json
import logging
import threading
from contextlib import asynccontextmanager, suppress
from random import Random
from typing import TYPE_CHECKING, Any

import pytest
from sync.device import BIRTH, CONVERSATION, Device
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from crdt_llm.document.schema import Birth, Grant, conversation_id
from crdt_llm.errors import StoreFailed
from crdt_llm.store.memory import MemoryDisk, MemoryLog
from crdt_llm.sync.relay.access import Pass
from crdt_llm.sync.relay.hub import Hub
from crdt_llm.sync.relay.plain_peer import RemotePeer
from crdt_llm.sync.relay.server import Limits, Relay
from crdt_llm.sync.room import look as look_module
from crdt_llm.sync.update.structure import find_gap
from crdt_llm.sync.wire.verdict import CloseCode
from crdt_llm.sync.wire.y_websocket import (
    AuthDenied,
    AwarenessState,
    AwarenessUpdate,
    SyncStep1,
    SyncStep2,
    SyncUpdate,
    decode,
    encode,
    write_var_uint,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

    from websockets.asyncio.client import ClientConnection

    from crdt_llm.store.memory import MemorySeam
    from crdt_llm.sync.update.structure import Missing, UpdateStructure
    from crdt_llm.sync.wire.y_websocket import Message

TOKENS = {"owners-secret": Pass("owner"), "strangers-secret": Pass("stranger")}


class Served:
    """A relay on a free port, over a simulated disk."""

    def __init__(self, **options: Any) -> None:
        self.disk = MemoryDisk("log")
        self.failing = False
        self.hub = Hub(MemoryLog(self.disk, clock=lambda: 0, faults=self._fault))
        options.setdefault("authenticate", lambda token: TOKENS.get(token or ""))
        self.relay = Relay(self.hub, **options)

    async def _fault(self, seam: MemorySeam) -> None:
        if self.failing and seam == "before-commit":
            raise StoreFailed("no space")

    @property
    def address(self) -> str:
        host, port = self.relay.address
        return f"{host}:{port}"

    def open(
        self,
        conversation: str = CONVERSATION,
        token: str | None = "owners-secret",  # noqa: S107 - a test's own
        **options: Any,
    ) -> connect:
        query = "" if token is None else f"?token={token}"
        url = f"ws://{self.address}/{conversation}{query}"
        return connect(url, compression=None, **options)

    async def get(self, path: str, headers: str = "", method: str = "GET") -> tuple[int, str, str]:
        host, port = self.relay.address
        reader, writer = await asyncio.open_connection(host, port)
        writer.write(f"{method} {path} HTTP/1.1\r\nHost: {host}:{port}\r\n{headers}\r\n".encode())
        answer = (await reader.read()).decode()
        writer.close()
        head, _, body = answer.partition("\r\n\r\n")
        return int(head.split()[1]) if head else 0, head, body


@asynccontextmanager
async def serving(**options: Any) -> AsyncIterator[Served]:
    served = Served(**options)
    await served.relay.start()
    async with served.relay:
        yield served


async def read(socket: ClientConnection) -> Message:
    frame = await socket.recv()
    assert isinstance(frame, bytes)
    return decode(frame)


async def end_of(socket: ClientConnection) -> tuple[int, str, list[Message]]:
    """The close code, its reason, and what came before."""
    messages: list[Message] = []

    async def read_all() -> None:
        while True:
            messages.append(await read(socket))

    with pytest.raises(ConnectionClosed) as closed:
        await read_all()
    assert closed.value.rcvd is not None
    return closed.value.rcvd.code, closed.value.rcvd.reason, messages


async def sync(socket: ClientConnection, device: Device) -> None:
    """Run a device on a socket until it is in sync."""
    link = device.connect()
    while not link.is_synced:
        for frame in device.frames():
            await socket.send(frame)
        answer = await socket.recv()
        assert isinstance(answer, bytes)
        device.take(answer)
    for frame in device.frames():
        await socket.send(frame)


async def hear(socket: ClientConnection, device: Device, text: str) -> None:
    """Take frames until a text is in the view."""
    while text not in device.texts:
        frame = await socket.recv()
        assert isinstance(frame, bytes)
        device.take(frame)


async def say(socket: ClientConnection, device: Device, text: str) -> None:
    device.say(text)
    for frame in device.frames():
        await socket.send(frame)


def new_device(seed: int, *, born: bool = False) -> Device:
    device = Device(Random(seed))
    if born:
        device.give_birth()
    return device


async def test_two_devices_talk_and_a_third_catches_up() -> None:
    async with serving() as served, served.open() as one, served.open() as two:
        a, b = new_device(1, born=True), new_device(2)
        await sync(one, a)
        await sync(two, b)
        await say(one, a, "hello")
        await hear(two, b, "hello")
        await say(two, b, "hello back")
        await hear(one, a, "hello back")
        async with served.open() as three:
            c = new_device(3)
            await sync(three, c)
            assert c.texts == a.texts == b.texts == ["hello", "hello back"]


async def test_a_token_may_come_in_a_header() -> None:
    async with serving() as served:
        header = {"Authorization": "Bearer owners-secret"}
        async with served.open(token=None, additional_headers=header) as socket:
            assert isinstance(await read(socket), SyncStep1)


@pytest.mark.parametrize("token", [None, "", "wrong", "owners-secret%20", "a" * 4_000])
async def test_without_its_token_nobody_comes_in_and_is_told_why(token: str | None) -> None:
    async with serving() as served, served.open(token=token) as socket:
        code, reason, messages = await end_of(socket)
        assert code == CloseCode.UNAUTHENTICATED
        assert messages == [AuthDenied(reason)]
        assert served.hub._rooms == {}


@pytest.mark.parametrize("name", ["", "short", "a" * 23, "a" * 22 + "/b", "%ff" * 22])
async def test_what_is_no_conversation_id_is_refused(name: str) -> None:
    async with serving() as served, served.open(name) as socket:
        code, _, messages = await end_of(socket)
        assert code == CloseCode.NO_SUCH_CONVERSATION
        assert isinstance(messages[0], AuthDenied)


async def test_a_stranger_is_forbidden() -> None:
    async with serving() as served, served.open() as socket:
        device = new_device(1, born=True)
        await sync(socket, device)
        async with served.open(token="strangers-secret") as other:  # noqa: S106 - a test's own
            code, _, _ = await end_of(other)
            assert code == CloseCode.FORBIDDEN


async def test_a_refused_update_ends_its_own_connection_only() -> None:
    async with serving() as served, served.open() as one, served.open() as two:
        a, b = new_device(1, born=True), new_device(2)
        await sync(one, a)
        await sync(two, b)
        b.forge()
        for frame in b.frames():
            await two.send(frame)
        code, reason, messages = await end_of(two)
        assert (code, messages[-1]) == (CloseCode.REFUSED, AuthDenied(reason))
        await say(one, a, "still here")
        async with served.open() as three:
            c = new_device(3)
            await sync(three, c)
            assert c.texts == ["still here"]


@pytest.mark.parametrize(
    "frame", [b"", b"\x04", b"\0\3\0", b"\0\2\5x", "text", b"\0\2\1\7", b"\xff" * 50]
)
async def test_garbage_is_final(frame: bytes | str) -> None:
    async with serving() as served, served.open() as socket:
        await socket.send(frame)
        code, _, _ = await end_of(socket)
        assert code == CloseCode.MALFORMED


async def test_a_frame_over_the_limit_is_not_read() -> None:
    async with serving(limits=Limits(frame_bytes=1000)) as served, served.open() as socket:
        await socket.send(bytes(1001))
        code, _, _ = await end_of(socket)
        assert code == 1009  # RFC 6455: too big


async def test_a_fault_of_ours_ends_one_connection_with_a_retry_code(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving() as served, served.open() as one:
        a = new_device(1, born=True)
        await sync(one, a)
        with monkeypatch.context() as patch:

            async def fail(*_: object) -> None:
                raise ValueError("two\nlines")

            patch.setattr(RemotePeer, "receive", fail)
            async with served.open() as two:
                await two.send(encode(SyncStep1(b"\0")))
                code, _, _ = await end_of(two)
                assert code == CloseCode.INTERNAL_ERROR
        await say(one, a, "still here")
        async with served.open() as three:
            b = new_device(3)
            await sync(three, b)
            assert b.texts == ["still here"]
    (record,) = [one for one in caplog.records if one.levelno >= logging.ERROR]
    assert record.getMessage().endswith("ValueError: two lines")


async def test_a_failing_disk_says_come_back_and_heals() -> None:
    async with serving() as served:
        device = new_device(1, born=True)
        async with served.open() as socket:
            await sync(socket, device)
            served.failing = True
            await say(socket, device, "kept on the device")
            code, _, messages = await end_of(socket)
            assert code == CloseCode.TRY_AGAIN
            assert not any(isinstance(message, AuthDenied) for message in messages)
        status, _, body = await served.get("/readyz")
        assert (status, json.loads(body)["store"]) == (503, "failing")
        assert "no space" not in body
        served.failing = False
        async with served.open() as socket:
            await sync(socket, device)
            other = new_device(2)
            async with served.open() as second:
                await sync(second, other)
                await hear(second, other, "kept on the device")
        assert (await served.get("/readyz"))[0] == 200


async def test_a_stop_finishes_what_came_in_and_says_come_back() -> None:
    served = Served()
    await served.relay.start()
    async with served.open() as socket:
        device = new_device(1, born=True)
        await sync(socket, device)
        await say(socket, device, "the last")
        async with served.open() as second:
            other = new_device(2)
            await sync(second, other)
            await hear(second, other, "the last")
        await served.relay.stop()
        code, _, _ = await end_of(socket)
        assert code == CloseCode.RESTART
    assert served.disk.conversations[CONVERSATION].lsn == 2


async def test_stopping_needs_no_client_to_agree() -> None:
    served = Served(limits=Limits(close_s=0.05))
    await served.relay.start()
    host, port = served.relay.address
    _, writer = await asyncio.open_connection(host, port)
    key = "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
    upgrade = "Connection: Upgrade\r\nUpgrade: websocket\r\n"
    path = f"/{CONVERSATION}?token=owners-secret"
    writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\n{upgrade}{key}\r\n".encode())
    await writer.drain()
    await asyncio.wait_for(served.relay.stop(), 30)
    writer.close()


@pytest.mark.parametrize(
    "origin", [None, "http://localhost:3000", "http://127.0.0.1", "https://good.example"]
)
async def test_honest_pages_and_programs_connect(origin: str | None) -> None:
    async with (
        serving(origins=frozenset({"https://good.example"})) as served,
        served.open(origin=origin) as socket,
    ):
        assert isinstance(await read(socket), SyncStep1)


async def test_pages_of_other_origins_do_not_connect() -> None:
    async with serving() as served:
        with pytest.raises(InvalidStatus) as refused:
            await served.open(origin="https://evil.example").__aenter__()
        assert refused.value.response.status_code == 403


async def test_connections_are_bounded() -> None:
    async with serving(limits=Limits(connections=1)) as served:
        async with served.open() as socket:
            await read(socket)
            with pytest.raises(InvalidStatus) as refused:
                await served.open().__aenter__()
            assert refused.value.response.status_code == 503
        assert served.relay._server is not None
        if ending := tuple(served.relay._server.handler_tasks):
            await asyncio.wait(ending)
        async with served.open() as socket:
            assert isinstance(await read(socket), SyncStep1)


async def test_who_proves_nothing_takes_few_places_and_not_for_long() -> None:
    limits = Limits(unknown_of_address=1, refused_close_s=0.05)
    async with serving(limits=limits) as served:
        host, port = served.relay.address
        reader, writer = await asyncio.open_connection(host, port)
        writer.write(  # it will not agree to the end
            f"GET /{CONVERSATION}?token=wrong HTTP/1.1\r\nHost: {host}:{port}\r\n"
            "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
            "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n".encode()
        )
        assert b" 101 " in await reader.readline()
        with pytest.raises(InvalidStatus) as refused:
            await served.open()
        assert refused.value.response.status_code == 503
        await reader.read()  # to the end: the relay does not wait for long
        for _ in range(10):
            await asyncio.sleep(0)
        assert not served.relay._unknown
        async with served.open() as one, served.open() as two:  # the known do not count
            assert isinstance(await read(one), SyncStep1)
            assert isinstance(await read(two), SyncStep1)
        writer.close()


async def test_sockets_are_bounded_from_their_first_byte() -> None:
    async with serving(limits=Limits(sockets=2)) as served:
        host, port = served.relay.address
        held = [await asyncio.open_connection(host, port) for _ in range(2)]
        reader, writer = await asyncio.open_connection(host, port)
        with suppress(ConnectionResetError):  # the kernel's other way to say the same
            assert await reader.read() == b""
        for _, other in [*held, (reader, writer)]:
            other.close()


async def test_handshakes_of_one_address_are_bounded_and_the_ended_do_not_count() -> None:
    async with serving(limits=Limits(handshakes_of_address=1)) as served:
        host, port = served.relay.address
        async with served.open() as one, served.open() as two:
            assert isinstance(await read(one), SyncStep1)
            assert isinstance(await read(two), SyncStep1)
            _, held = await asyncio.open_connection(host, port)
            reader, writer = await asyncio.open_connection(host, port)
            with suppress(ConnectionResetError):
                assert await reader.read() == b""
            writer.close()
            held.close()


async def test_a_token_that_is_passed_on_does_not_take_all_places() -> None:
    passes = {
        "link": Pass("guest:1", conversations={CONVERSATION: Grant.WRITER}),
        "known": Pass("owner"),
    }
    options = {"authenticate": passes.get, "limits": Limits(connections_of_guest=1)}
    async with serving(**options) as served:
        async with served.open(token="known") as one, served.open(token="known") as two:  # noqa: S106 - no secrets
            assert isinstance(await read(one), SyncStep1)
            assert isinstance(await read(two), SyncStep1)
        async with served.open(token="link") as first:  # noqa: S106 - as above
            assert isinstance(await read(first), SyncStep1)
            async with served.open(token="link") as second:  # noqa: S106 - as above
                code, _, _ = await end_of(second)
            assert code == CloseCode.TRY_AGAIN
        assert served.relay._server is not None
        if ending := tuple(served.relay._server.handler_tasks):
            await asyncio.wait(ending)
        async with served.open(token="link") as later:  # noqa: S106 - as above
            assert isinstance(await read(later), SyncStep1)


async def test_a_handshake_that_never_ends_is_ended() -> None:
    async with serving(limits=Limits(open_s=0.05)) as served:
        host, port = served.relay.address
        reader, writer = await asyncio.open_connection(host, port)
        writer.write(b"GET / HTTP/1.1\r\n")
        assert await asyncio.wait_for(reader.read(), 30) == b""
        writer.close()


async def test_plain_pages() -> None:
    async with serving(page="<p>hello</p>") as served:
        status, head, body = await served.get("/")
        assert (status, body) == (200, "<p>hello</p>\n")
        assert "content-type: text/html" in head.lower()
        assert "server:" not in head.lower()
        assert (await served.get("/healthz"))[::2] == (200, "ok\n")
        assert (await served.get("/nothing"))[0] == 404
        assert (await served.get(f"/{CONVERSATION}"))[0] == 401
        assert (await served.get(f"/{CONVERSATION}?token=wrong"))[0] == 401
        assert (await served.get(f"/{CONVERSATION}?token=owners-secret"))[0] == 426
        bearer = "Authorization: Bearer owners-secret\r\n"
        assert (await served.get(f"/{CONVERSATION}", bearer))[0] == 426


async def test_a_large_page_arrives_whole() -> None:
    async with serving(page="x" * 3_000_000) as served:
        assert len((await served.get("/"))[2]) == 3_000_001


async def test_readiness_speaks_of_store_and_node() -> None:
    problem: list[str | None] = [None]
    async with serving(node_problem=lambda: problem[0]) as served:
        status, _, body = await served.get("/readyz")
        assert status == 200
        assert json.loads(body) == {
            "ready": True,
            "store": "ok",
            "node": "ok",
            "damaged_conversations": 0,
            "connections": 0,
        }
        problem[0] = "the model is loading"
        status, _, body = await served.get("/readyz")
        assert (status, json.loads(body)["node"]) == (503, "the model is loading")


async def test_a_damaged_conversation_is_final_and_harms_no_other() -> None:
    async with serving() as served:
        other = Birth("owner", b"another 16 bytes")
        async with served.open() as socket:
            await sync(socket, new_device(1, born=True))
        stored = served.disk.conversations[CONVERSATION]
        object.__setattr__(stored, "updates", (b"\1\2\3",))
        await served.hub._rooms[CONVERSATION].stop()
        async with served.open() as socket:
            code, reason, _ = await end_of(socket)
            assert code == CloseCode.DAMAGED
            assert "restored from a replica" in reason
        async with served.open(conversation_id(other)) as socket:
            assert isinstance(await read(socket), SyncStep1)
        _, _, body = await served.get("/readyz")
        assert json.loads(body)["damaged_conversations"] == 1


async def test_tokens_are_never_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="crdt_llm")
    async with serving() as served:
        host, port = served.relay.address
        async with served.open() as socket:
            await sync(socket, new_device(1, born=True))
        await served.get(f"/{CONVERSATION}?token=owners-secret")
        await served.get("/?token=owners-secret", "Upgrade: websocket\r\n")
        for junk in (b"owners-secret\r\n\r\n", b"GET /?token=owners-secret SPAM/1\r\n\r\n"):
            reader, writer = await asyncio.open_connection(host, port)
            writer.write(junk)
            await reader.read()
            writer.close()
    assert "secret" not in "".join(
        record.getMessage() + str(record.exc_info)
        for record in caplog.records
        if record.name.startswith("crdt_llm")
    )


@asynccontextmanager
async def another_conversation(served: Served) -> AsyncIterator[Callable[[str], Awaitable[None]]]:
    """Two devices in it, and how they talk: what the one says the other must hear."""
    birth = Birth("owner", b"another 16 bytes")
    name = conversation_id(birth)
    async with served.open(name) as two, served.open(name) as three:
        b, c = new_device(2), new_device(3)
        b.give_birth(birth)
        await sync(two, b)
        await sync(three, c)

        async def talk(text: str) -> None:
            await say(two, b, text)
            await hear(three, c, text)

        yield talk


async def test_one_conversation_that_floods_does_not_stop_another() -> None:
    """The other's whole exchange ends while the flood still runs."""
    async with serving() as served, served.open() as one, another_conversation(served) as talk:
        a = new_device(1, born=True)
        await sync(one, a)
        a.disconnect()
        updates = [encode(SyncUpdate(a.say("x" * 100))) for _ in range(1500)]

        async def flood() -> None:
            for update in updates:
                await one.send(update)

        flooding = asyncio.create_task(flood())
        for number in range(10):
            await talk(f"{number}")
        done = served.disk.conversations[CONVERSATION].lsn
        await flooding
        assert done < len(updates)


def collected(structs: int) -> bytes:
    """An update of so many structs of two bytes, which join into one that fills fifteen."""
    return (
        b"\1"
        + b"".join(map(write_var_uint, (structs, 77, 0)))
        + b"\0\1" * structs
        + b"\0"  # and no deletions
    )


async def test_a_large_cheap_update_does_not_stop_another_conversation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The other's whole exchange ends while the update is still searched."""
    searching, go_on = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def search_long(structure: UpdateStructure, known: Mapping[int, int]) -> Missing | None:
        if 77 in structure.structs:
            loop.call_soon_threadsafe(searching.set)
            assert go_on.wait(timeout=10)
        return find_gap(structure, known)

    monkeypatch.setattr(look_module, "find_gap", search_long)
    async with serving() as served, served.open() as one, another_conversation(served) as talk:
        assert isinstance(await read(one), SyncStep1)
        await one.send(encode(SyncStep2(collected(2**16))))
        await searching.wait()
        await talk("meanwhile")
        go_on.set()


async def test_only_the_answer_to_a_question_may_be_as_large_as_a_document() -> None:
    async with serving() as served, served.open() as socket:
        await sync(socket, new_device(1, born=True))
        await socket.send(encode(SyncStep2(collected(2**16))))
        code, reason, _ = await end_of(socket)
        assert code == CloseCode.TOO_LARGE
        assert reason.startswith("too-many-structs")


async def test_the_birth_of_another_conversation_is_refused() -> None:
    async with serving() as served, served.open("A" * 22) as socket:
        device = new_device(1, born=True)
        assert conversation_id(BIRTH) != "A" * 22
        await socket.send(encode(SyncStep2(device.replica.diff())))
        code, reason, _ = await end_of(socket)
        assert code == CloseCode.REFUSED
        assert "another conversation" in reason
        assert served.disk.conversations == {}


async def test_a_flood_of_presence_does_not_keep_others_from_being_served() -> None:
    async with serving() as served, served.open() as one, another_conversation(served) as talk:
        await sync(one, new_device(1, born=True))
        sent = 0

        async def flood() -> None:
            nonlocal sent
            while True:
                sent += 1
                state = AwarenessState(77, sent, '{"name":"loud"}')
                await one.send(encode(AwarenessUpdate((state,))))
                await asyncio.sleep(0)  # the test's own loop is the others' too

        async def listen() -> None:
            async for _ in one:
                pass

        tasks = [asyncio.create_task(flood()), asyncio.create_task(listen())]
        for number in range(10):
            await talk(f"{number}")
        for task in tasks:
            task.cancel()
        assert sent > 10
        assert served.hub._rooms[CONVERSATION].awareness.states
