"""Stock clients - the npm packages ``yjs`` and ``y-websocket``, in Node - on the real relay."""

from __future__ import annotations

import asyncio
import json
import shutil
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import pytest
from sync.device import Device
from websockets.asyncio.client import connect

from crdt_llm.document.conversation import Conversation
from crdt_llm.store.sqlite import SqliteLog
from crdt_llm.sync.relay.access import TokenAccess
from crdt_llm.sync.relay.hub import Hub
from crdt_llm.sync.relay.server import Relay
from crdt_llm.sync.wire.verdict import CloseCode
from crdt_llm.sync.wire.y_websocket import SyncStep1, SyncStep2, decode, encode
from crdt_llm.sync.wire.y_websocket import decode_state_vector as clocks

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = pytest.mark.npm

PEERS = Path(__file__).parents[1] / "js"
TOKEN = "a-token"  # noqa: S105 - a test's own


class NodePeer:
    """One Node process with one Yjs document."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def ask(self, request: str, **given: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"do": request} | given).encode() + b"\n")
        await self._process.stdin.drain()
        answer = json.loads(await self._process.stdout.readline())
        assert "error" not in answer, answer
        return answer["answer"]


@asynccontextmanager
async def node_peer() -> AsyncIterator[NodePeer]:
    node = shutil.which("node")
    if node is None or not (PEERS / "node_modules").is_dir():
        pytest.skip("needs node and `npm ci` in tests/js")
    process = await asyncio.create_subprocess_exec(
        node,
        "peer.mjs",
        cwd=PEERS,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=1 << 24,  # a line may hold a document
    )
    try:
        yield NodePeer(process)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.kill()
        await process.wait()


class World:
    """A relay on disk that can be restarted on its port, and the peers of a test."""

    def __init__(self, stack: AsyncExitStack, path: Path) -> None:
        self._stack = stack
        self._path = path
        self._port = 0
        self._log: SqliteLog | None = None
        self.relay: Relay | None = None

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self._port}"

    async def start(self) -> None:
        self._log = await SqliteLog.open(self._path)
        access = TokenAccess(TOKEN)
        self.relay = Relay(Hub(self._log), authenticate=access.authenticate)
        await self.relay.start(port=self._port)
        self._port = self.relay.address[1]

    async def stop(self) -> None:
        assert self._log is not None
        assert self.relay is not None
        await self.relay.stop()
        await self._log.close()

    async def peer(self) -> NodePeer:
        return await self._stack.enter_async_context(node_peer())

    async def join(
        self, peer: NodePeer, conversation: str, token: str = TOKEN, greeting: str = ""
    ) -> None:
        await peer.ask(
            "connect",
            url=self.url,
            conversation=conversation,
            token=token,
            principal="owner",
            greeting=greeting,
        )


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with AsyncExitStack() as stack:
        world = World(stack, tmp_path / "log.db")
        await world.start()
        yield world
        # Before the peers end: a stop with clients on it is what must work.
        await world.stop()


async def born(world: World) -> tuple[NodePeer, str]:
    """A stock client that made a conversation offline and then joined it."""
    peer = await world.peer()
    conversation = await peer.ask("birth", principal="owner")
    await peer.ask("say", text="written offline")
    await world.join(peer, conversation)
    await peer.ask("synced")
    return peer, conversation


async def test_a_stock_client_makes_a_conversation_and_another_ends_equal(world: World) -> None:
    one, conversation = await born(world)
    two = await world.peer()
    await world.join(two, conversation)
    await two.ask("synced")
    assert await two.ask("texts", count=1) == ["written offline"]
    await two.ask("say", text="hello 👋 from two")
    assert await one.ask("texts", count=2) == ["written offline", "hello 👋 from two"]
    for number in range(30):
        await (one, two)[number % 2].ask("say", text=f"line {number}")
    await one.ask("texts", count=32)
    await two.ask("texts", count=32)
    first, second = await one.ask("state"), await two.ask("state")
    assert first["vector"] == second["vector"]
    # The library behind the relay keeps no order of keys in plain maps, so bytes may differ.
    assert first["content"] == second["content"]


async def test_what_is_stored_is_what_the_clients_have(world: World) -> None:
    one, conversation = await born(world)
    state = await one.ask("state")
    assert world.relay is not None
    member = await world.relay._hub.join(conversation, "owner", deliver=lambda _: None)
    stored = Conversation(1, update=member.state)
    assert clocks(stored.state_vector()) == clocks(bytes.fromhex(state["vector"]))
    assert stored.id == conversation
    assert [stored.text(entry) for entry in stored.view()] == state["texts"]


async def test_offline_writes_arrive_after_a_reconnect_and_a_restart(world: World) -> None:
    one, conversation = await born(world)
    two = await world.peer()
    await world.join(two, conversation)
    await two.ask("synced")
    await one.ask("disconnect")
    await one.ask("say", text="one alone")
    await two.ask("say", text="two alone")
    await world.stop()
    assert CloseCode.RESTART in await two.ask("closed")
    await two.ask("unsynced")
    await two.ask("say", text="two without a relay")
    await world.start()
    await one.ask("reconnect")
    await one.ask("synced")
    await two.ask("synced")
    texts = await one.ask("texts", count=4)
    assert sorted(texts) == sorted(
        ["written offline", "one alone", "two alone", "two without a relay"]
    )
    assert await two.ask("texts", count=4) == texts
    first, second = await one.ask("state"), await two.ask("state")
    assert first == second


async def test_what_is_typed_before_the_first_question_has_a_gap_and_arrives(world: World) -> None:
    one = await world.peer()
    conversation = await one.ask("birth", principal="owner")
    await one.ask("say", text="written offline")
    await world.join(one, conversation, greeting="typed in the handler")
    await one.ask("synced")
    two = await world.peer()
    await world.join(two, conversation, greeting="from a page that knows nothing yet")
    texts = await two.ask("texts", count=3)
    assert sorted(texts) == [
        "from a page that knows nothing yet",
        "typed in the handler",
        "written offline",
    ]
    assert await one.ask("texts", count=3) == texts


async def test_a_refusal_reaches_a_stock_client_and_it_does_not_come_back(world: World) -> None:
    one, conversation = await born(world)
    two = await world.peer()
    await world.join(two, conversation)
    await two.ask("synced")
    await two.ask("forge")
    refusal = await two.ask("refused")
    assert refusal == {
        "code": CloseCode.REFUSED,
        "reason": "schema: meta has no 'no-such-key'",
        "comesBack": False,
        "connections": 1,
    }
    await one.ask("say", text="undisturbed")
    three = await world.peer()
    await world.join(three, conversation)
    assert await three.ask("texts", count=2) == ["written offline", "undisturbed"]


async def test_a_wrong_token_reaches_a_stock_client(world: World) -> None:
    peer = await world.peer()
    conversation = await peer.ask("birth", principal="owner")
    await world.join(peer, conversation, token="wrong")  # noqa: S106 - a test's own
    refusal = await peer.ask("refused")
    assert (refusal["code"], refusal["comesBack"]) == (CloseCode.UNAUTHENTICATED, False)


async def test_presence_passes_between_stock_clients(world: World) -> None:
    one, conversation = await born(world)
    two = await world.peer()
    await world.join(two, conversation)
    await one.ask("introduce", name="one")
    await two.ask("introduce", name="two")
    assert await one.ask("present", name="two") == ["one", "two"]
    assert await two.ask("present", name="one") == ["one", "two"]
    await two.ask("disconnect")
    await one.ask("absent", name="two")


async def test_a_stock_client_and_our_own_replica_end_equal(world: World) -> None:
    """A second writing of the client's side: our own codec and replica, on the same socket."""
    one, conversation = await born(world)
    device = Device(Random(3))
    async with connect(f"{world.url}/{conversation}?token={TOKEN}") as socket:
        asked = decode(_binary(await socket.recv()))
        assert isinstance(asked, SyncStep1)
        await socket.send(encode(SyncStep1(device.replica.state_vector())))
        await socket.send(encode(SyncStep2(device.replica.diff(asked.state_vector))))
        while device.replica.id is None:
            message = decode(_binary(await socket.recv()))
            if isinstance(message, SyncStep2):
                device.merge(message.update)
        device.connect()
        device.link.answer(device.replica.diff())  # type: ignore[union-attr]
        device.say("from Python")
        for frame in device.frames():
            await socket.send(frame)
        assert await one.ask("texts", count=2) == ["written offline", "from Python"]
        vector = bytes.fromhex((await one.ask("state"))["vector"])
        assert clocks(vector) == clocks(device.replica.state_vector())


def _binary(frame: str | bytes) -> bytes:
    assert isinstance(frame, bytes)
    return frame
