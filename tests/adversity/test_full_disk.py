"""A disk without space, for real: the kernel refuses to let the server's files grow."""

from __future__ import annotations

import json
import resource
from random import Random
from typing import TYPE_CHECKING

from adversity.serving import LONG, SHORT, Serving, end_of, known_to_the_relay, sampled
from cli import shell
from sync.device import Device
from websockets.asyncio.client import connect
from websockets.typing import Subprotocol

from crdt_llm.document.schema import State
from crdt_llm.sync.wire.frames import SUBPROTOCOL, Closed, Hello, Open, Opened, decode_from_relay
from crdt_llm.sync.wire.frames import encode as encode_frame
from crdt_llm.sync.wire.verdict import CloseCode
from crdt_llm.sync.wire.y_websocket import AuthDenied, SyncUpdate, encode

if TYPE_CHECKING:
    from pathlib import Path

    from websockets.asyncio.client import ClientConnection

    from crdt_llm.sync.client.client import OpenConversation


def fill_disk(serving: Serving) -> None:
    """From now on no file of the server's can grow beyond what its write-ahead log has."""
    size = serving.folder.log.with_name("log.db-wal").stat().st_size
    assert size > serving.log.stat().st_size  # what it logs must still find its place
    resource.prlimit(serving.running.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def free_disk(serving: Serving) -> None:
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    resource.prlimit(serving.running.pid, resource.RLIMIT_FSIZE, unlimited)


def writer_of(conversation: OpenConversation, seed: int) -> Device:
    device = Device(Random(seed))
    device.replica.apply(conversation.document.diff())
    return device


async def refused_for_now(serving: Serving, conversation: str, update: bytes) -> None:
    async with serving.socket(conversation) as socket:
        await socket.send(encode(SyncUpdate(update)))
        code, _, messages = await end_of(socket)
    assert code == CloseCode.TRY_AGAIN
    assert not any(isinstance(message, AuthDenied) for message in messages)  # come back


async def texts_at_the_relay(serving: Serving, conversation: str) -> list[str]:
    async with serving.client("witness") as client:
        witness = await client.open(conversation)
        await witness.synced_once()
        return [entry.content for entry in witness.view()]


async def test_a_full_disk_says_come_back_and_a_reply_goes_on_when_there_is_space(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    params = LONG | {"max_tokens": 1000, "temperature": 0.7, "seed": 3}
    with Serving(tmp_path, tiny_model_dir) as serving:
        async with serving.client() as client:
            quiet, talking = await client.create("quiet"), await client.create("talking")
            await (await quiet.ask("before", **SHORT)).text()
            await known_to_the_relay(quiet, serving)
            device = writer_of(quiet, 1)
            reply = await talking.ask("a long story", **params)
            await sampled(talking, reply.id)
            fill_disk(serving)
            lost = device.say("this one found no place")
            await refused_for_now(serving, quiet.id, lost)
            status, body = await serving.get("/readyz")
            assert (status, json.loads(body)["ready"]) == (503, False)
            assert await serving.get("/healthz") == (200, "ok\n")
            assert "this one found no place" not in await texts_at_the_relay(serving, quiet.id)
            written = await quiet.send("kept on the device meanwhile")
            await refused_for_now(serving, quiet.id, lost)
            assert not reply.ended
            free_disk(serving)
            entry = await reply.entry()
            assert entry.state is State.DONE
            await known_to_the_relay(quiet, serving)
            texts = await texts_at_the_relay(serving, quiet.id)
            assert texts[0] == "before"
            assert texts[-1] == quiet.entry(written).content
            after = await (await quiet.ask("and now?", **SHORT)).entry()
            assert after.state is State.DONE
            assert (await serving.get("/readyz"))[0] == 200
            undisturbed = await client.create("undisturbed")
            assert entry.content == await (await undisturbed.ask("a long story", **params)).text()
        assert await serving.stop() == 0


async def test_a_disk_that_is_full_at_the_start_is_told_in_one_line(tmp_path: Path) -> None:
    serving = Serving(tmp_path, None)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
    try:
        done = await shell.run(*serving.command[3:])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (done.code, done.out) == (1, "")
    assert f"{serving.folder.path}/" in done.complaint  # the first file that found no place
    assert "unexpected" not in done.complaint
    assert list(serving.folder.path.glob("log*")) == []  # nothing half made
    with serving:  # and with space it starts
        assert await serving.stop() == 0


async def received(socket: ClientConnection) -> bytes:
    frame = await socket.recv()
    assert isinstance(frame, bytes)
    return frame


async def test_who_only_reads_notices_nothing_of_a_full_disk(tmp_path: Path) -> None:
    with Serving(tmp_path, None) as serving:
        async with serving.client() as client:
            conversation = await client.create("a talk")
            await conversation.send("before")
            await known_to_the_relay(conversation, serving)
            address = f"ws://127.0.0.1:{serving.port}/"
            offered = [Subprotocol(SUBPROTOCOL)]
            async with connect(address, compression=None, subprotocols=offered) as socket:
                await socket.send(encode_frame(Hello(1, serving.token, "reader", None)))
                await socket.recv()  # Welcome
                await socket.send(encode_frame(Open(1, conversation.id, None, 0, b"\0")))
                assert isinstance(decode_from_relay(await received(socket)), Opened)
                fill_disk(serving)
                entry = await conversation.send("kept on the device meanwhile")
                while (await serving.get("/readyz"))[0] != 503:
                    pass
                assert not conversation.acknowledged(entry)
                assert conversation.synced
                free_disk(serving)
                frames = [decode_from_relay(await received(socket))]
                while b"meanwhile" not in getattr(frames[-1], "update", b""):
                    frames.append(decode_from_relay(await received(socket)))
        assert not any(isinstance(frame, Closed) for frame in frames)
