"""Bad bytes, bad tokens and bad ids at a real server, while somebody else's reply goes on."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, suppress
from random import Random
from typing import TYPE_CHECKING

import pytest
from adversity.serving import LONG, SHORT, end_of, known_to_the_relay, sampled
from sync.device import Device
from websockets.exceptions import ConnectionClosed, InvalidStatus

from crdt_llm.document.schema import Birth, State, conversation_id
from crdt_llm.sync.wire.verdict import CloseCode
from crdt_llm.sync.wire.y_websocket import (
    FRAME_BYTES_MAX,
    AuthDenied,
    SyncStep1,
    SyncStep2,
    SyncUpdate,
    decode,
    decode_state_vector,
    encode,
    write_var_uint,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from adversity.serving import Serving

    from crdt_llm.sync.client.client import OpenConversation, Reply

NOBODYS = conversation_id(Birth("owner", b"sixteen bytes 01"))


@asynccontextmanager
async def streaming(serving: Serving) -> AsyncIterator[tuple[OpenConversation, Reply]]:
    """Somebody else's reply, which is under way; at the end it must come to its own."""
    async with serving.client("bystander") as client:
        conversation = await client.create()
        reply = await conversation.ask("tell me a story", **LONG)
        assert not (await sampled(conversation, reply.id)).ended
        yield conversation, reply
        entry = await reply.entry()
        assert entry.state is State.DONE
        assert entry.usage is not None
        assert entry.usage.sampled == LONG["max_tokens"]


def _born(seed: int) -> tuple[str, Device]:
    birth = Birth("owner", Random(seed).randbytes(16))
    device = Device(Random(seed))
    device.give_birth(birth)
    return conversation_id(birth), device


def _truncations() -> list[bytes]:
    """A good frame, cut at every place."""
    _, device = _born(1)
    whole = encode(SyncStep2(device.replica.diff()))
    return [whole[:length] for length in range(0, len(whole), 7)]


def _noise(seed: int) -> bytes:
    random = Random(seed)
    return random.randbytes(random.randrange(1, 3000))


def _mutation(seed: int) -> bytes:
    """A good update with a few bytes that are not what they were."""
    random = Random(seed)
    _, device = _born(seed)
    device.say("a text that somebody wrote")
    update = bytearray(device.replica.diff())
    for _ in range(random.randrange(1, 4)):
        update[random.randrange(len(update))] = random.randrange(256)
    return encode(SyncUpdate(bytes(update)))


FINAL: dict[str, list[bytes] | list[str]] = {
    "truncated": _truncations(),
    "unknown": [b"\x04", b"\x7f\x00", b"\x00\x03\x00", b"\x02\x01\x00", b"\xff" * 9],
    "left over": [encode(SyncStep1(b"\x00")) + b"\x00", b"\x03\x03"],
    "an update of nothing": [encode(SyncUpdate(b"")), encode(SyncStep2(b"\x01"))],
    "a length that lies": [b"\x00\x02" + write_var_uint(2**40) + b"x"],
    "text": ["", "hello", '{"type": "sync"}', "\u0000" * 100],
}


@pytest.mark.parametrize("kind", FINAL)
async def test_a_frame_that_says_nothing_is_final_for_its_sender_alone(
    serving: Serving, kind: str
) -> None:
    async with streaming(serving):
        for frame in FINAL[kind]:
            async with serving.socket(NOBODYS) as socket:
                await socket.send(frame)
                code, reason, messages = await end_of(socket)
                assert code == CloseCode.MALFORMED, frame
                assert reason.startswith("malformed: ")
                assert "\n" not in reason
                assert messages[-1] == AuthDenied(reason)


async def test_noise_ends_its_own_connection_or_changes_nothing(serving: Serving) -> None:
    """Some random bytes are a message (a question, a presence): those may be answered."""
    frames = [_noise(seed) for seed in range(60)] + [_mutation(seed) for seed in range(60)]
    async with streaming(serving):
        for frame in frames:
            async with serving.socket(NOBODYS) as socket:
                await socket.send(frame)
                await socket.send(b"\x04")  # no message for certain: its end tells that it is over
                code, _, _ = await end_of(socket)
                assert CloseCode(code).is_final, frame
        async with serving.socket(NOBODYS) as socket:
            assert decode(await socket.recv(decode=False)) == SyncStep1(b"\x00")


@pytest.mark.parametrize("length", [FRAME_BYTES_MAX + 1, 2**62])
async def test_a_frame_over_the_limit_is_ended_before_it_is_read(
    serving: Serving, length: int
) -> None:
    header = b"\x82\xff" + length.to_bytes(8) + b"mask"  # binary, masked, 64 bits (RFC 6455, 5.2)
    async with streaming(serving), serving.socket(NOBODYS) as socket:
        socket.transport.write(header)
        code, _, _ = await end_of(socket)
        assert code == 1009  # message too big (RFC 6455, 7.4.1)


async def test_an_entry_over_the_limit_is_refused(serving: Serving) -> None:
    name, device = _born(2)
    device.say("x" * ((1 << 20) + 1))
    async with streaming(serving), serving.socket(name) as socket:
        await socket.send(encode(SyncStep2(device.replica.diff())))
        code, reason, _ = await end_of(socket)
        assert code in {CloseCode.TOO_LARGE, CloseCode.REFUSED}
        assert reason.partition(":")[0]
    async with serving.socket(name) as socket:  # nothing of it is there, not even the birth
        assert decode(await socket.recv(decode=False)) == SyncStep1(b"\x00")


async def test_a_birth_of_another_id_is_refused(serving: Serving) -> None:
    _, device = _born(3)
    async with serving.socket(NOBODYS) as socket:
        await socket.send(encode(SyncStep2(device.replica.diff())))
        code, reason, _ = await end_of(socket)
        assert code == CloseCode.REFUSED
        assert "another conversation" in reason


async def test_a_forged_reply_is_refused_and_nobody_sees_it(serving: Serving) -> None:
    async with serving.client() as client:
        conversation = await client.create()
        reply = await conversation.ask("hello", **SHORT)
        text = await reply.text()
        await known_to_the_relay(conversation, serving)
        forger = Device(Random(4))
        forger.replica.apply(conversation.document.diff())
        with forger.replica.writing() as writer:
            writer.append_text(reply.id, " and I owe you money")
        assert writer.change is not None
        async with serving.socket(conversation.id) as socket:
            await socket.send(encode(SyncUpdate(writer.change.update)))
            code, _, _ = await end_of(socket)
            assert CloseCode(code) in {CloseCode.REFUSED, CloseCode.FORBIDDEN}
        assert (await (await conversation.ask("go on", **SHORT)).entry()).state is State.DONE
        assert conversation.entry(reply.id).content == text


@pytest.mark.parametrize(
    "name", ["", "short", "a" * 23, "a" * 22 + "/b", "%ff" * 22, "..%2f..%2fowner.token"]
)
async def test_what_is_no_id_is_refused(serving: Serving, name: str) -> None:
    async with serving.socket(name) as socket:
        code, reason, _ = await end_of(socket)
    assert code == CloseCode.NO_SUCH_CONVERSATION
    assert reason.startswith("no-such-conversation: ")


@pytest.mark.parametrize("token", [None, "wrong", "a" * 43, "a" * 4000, "%00", "%ff"])
async def test_without_the_token_nothing_is_to_be_had(serving: Serving, token: str | None) -> None:
    async with serving.socket(NOBODYS, token=token) as socket:
        code, reason, messages = await end_of(socket)
    assert code == CloseCode.UNAUTHENTICATED
    assert messages == [AuthDenied(reason)]
    query = "" if token is None else f"?token={token}"
    status, body = await serving.get(f"/{NOBODYS}{query}")
    assert (status, body) == (401, "a valid token is needed\n")


async def test_what_came_with_a_wrong_token_is_not_written(serving: Serving) -> None:
    name, device = _born(5)
    async with serving.socket(name, token="wrong") as socket:  # noqa: S106 - that is the test
        with suppress(ConnectionClosed):
            await socket.send(encode(SyncStep2(device.replica.diff())))
        assert (await end_of(socket))[0] == CloseCode.UNAUTHENTICATED
    async with serving.socket(name) as socket:
        assert decode(await socket.recv(decode=False)) == SyncStep1(b"\x00")


@pytest.mark.parametrize(
    "origin",
    ["https://evil.example", "null", "http://127.0.0.1.evil.example", "file://", "javascript:x"],
)
async def test_a_foreign_page_does_not_connect(serving: Serving, origin: str) -> None:
    with pytest.raises(InvalidStatus) as refused:
        await serving.socket(NOBODYS, origin=origin)
    assert refused.value.response.status_code == 403


@pytest.mark.parametrize(
    "junk",
    [
        b"\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # the beginning of TLS
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 1000 + b"\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 1000000\r\n\r\n",
        Random(0).randbytes(5000) + b"\r\n\r\n",
    ],
)
async def test_junk_on_the_port_ends_its_own_connection(serving: Serving, junk: bytes) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", serving.port)
    with suppress(ConnectionError):
        writer.write(junk)
        writer.write_eof()
        await reader.read()
    writer.close()
    assert await serving.get("/healthz") == (200, "ok\n")


FLOOD_UPDATES = 30_000


async def test_a_flood_of_updates_in_one_conversation_lets_another_s_reply_end(
    serving: Serving,
) -> None:
    """The reply is asked for behind thousands of updates, and ends before they are checked."""
    name, device = _born(6)
    # More than any machine checks while it makes one reply; what is left then is not sent.
    flood = [encode(SyncUpdate(device.entitle(f"{n} {'x' * 100}"))) for n in range(FLOOD_UPDATES)]
    author = device.replica.client_id
    total = decode_state_vector(device.replica.state_vector())[author]
    async with serving.client("bystander") as client, serving.socket(name) as socket:
        conversation = await client.create()
        await conversation.synced_once()
        await socket.send(encode(SyncStep2(device.written[0])))
        ended = asyncio.Event()

        async def send_all() -> int:
            for sent, update in enumerate(flood):
                if ended.is_set():
                    return sent
                await socket.send(update)
            return len(flood)

        flooding = asyncio.create_task(send_all())
        reply = await conversation.ask("hello", **SHORT)
        assert (await reply.entry()).state is State.DONE
        assert 0 < await clock_at_the_relay(serving, name, author) < total
        ended.set()
        last = await flooding - 1
        async with serving.client("witness") as other:  # and nothing of it is lost
            witness = await other.open(name)
            feed = witness.changes()
            while not witness.title.startswith(f"{last} "):
                await witness.next_of(feed, lambda _: True)


async def clock_at_the_relay(serving: Serving, conversation: str, author: int) -> int:
    """How much of a client's writing is durable: what the relay's first question says."""
    async with serving.socket(conversation) as socket:
        question = decode(await socket.recv(decode=False))
    assert isinstance(question, SyncStep1)
    return decode_state_vector(question.state_vector).get(author, 0)
