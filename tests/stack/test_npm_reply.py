"""A stock JavaScript client asks the real node, and sees the reply stream in."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import pytest
from sync.test_npm_peers import node_peer

from crdt_llm.cli.embedded_node import make_node
from crdt_llm.cli.folders import DataFolder
from crdt_llm.document.keys import SigningKey
from crdt_llm.store.sqlite import SqliteLog
from crdt_llm.sync.relay.access import TokenAccess
from crdt_llm.sync.relay.hub import Hub
from crdt_llm.sync.relay.leases import LeaseOffice
from crdt_llm.sync.relay.server import Relay
from crdt_llm.sync.wire.y_websocket import decode_state_vector

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.npm

TOKEN = "a-token"  # noqa: S105 - a test's own


async def test_a_reply_streams_into_stock_clients_and_they_end_equal(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    async with AsyncExitStack() as stack:
        log = await SqliteLog.open(tmp_path / "log.db")
        stack.push_async_callback(log.close)
        hub = Hub(log)
        relay = Relay(hub, authenticate=TokenAccess(TOKEN).authenticate)
        stack.push_async_callback(relay.stop)
        await relay.start()
        relay_key = SigningKey(bytes(32))
        office = LeaseOffice(hub.grant_epoch, relay_key.sign, clock=time.monotonic)
        node = make_node(DataFolder(tmp_path), hub, tiny_model_dir, office)
        stack.push_async_callback(node.close)
        await node.start()
        hub.subscribe(node.notice)

        first = await stack.enter_async_context(node_peer())
        second = await stack.enter_async_context(node_peer())
        join = {"url": f"ws://127.0.0.1:{relay.address[1]}", "token": TOKEN, "principal": "owner"}
        conversation = await first.ask("birth", principal="owner")
        await first.ask("connect", conversation=conversation, **join)
        await first.ask("synced")
        await second.ask("connect", conversation=conversation, **join)
        await second.ask("synced")

        params = {"max_tokens": 1500, "temperature": 0.7, "seed": 3, "ignore_eos": True}
        slot = await first.ask("ask", text="Hello from a page.", params=params)
        seen, also_seen = await asyncio.gather(
            first.ask("reply", slot=slot), second.ask("reply", slot=slot)
        )
        assert seen["state"] == "done"
        assert seen["usage"]["sampled"] == 1500
        assert len(seen["steps"]) > 2, "the reply came in one piece"
        assert seen["steps"] == sorted(seen["steps"])
        assert seen["text"] == also_seen["text"]

        one, two = await first.ask("state"), await second.ask("state")
        assert one["content"] == two["content"]
        vectors = [decode_state_vector(bytes.fromhex(state["vector"])) for state in (one, two)]
        assert vectors[0] == vectors[1]
        assert (tmp_path / "log.db").stat().st_mode & 0o077 == 0
