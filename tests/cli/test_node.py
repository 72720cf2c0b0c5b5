"""A node as a program of its own: its folder, its keys, its relay's, and a reply."""

from __future__ import annotations

import asyncio
import logging
from contextlib import asynccontextmanager
from random import Random
from typing import TYPE_CHECKING

import pytest
from cli.scripted_server import NODE_TOKEN, Server
from cli.shell import run

from crdt_llm import Client
from crdt_llm.cli.node import (
    Looks,
    NodeFolder,
    Secrets,
    make_node,
    pinned,
    read_master_key,
    serve_node,
)
from crdt_llm.document.chain import verify_path
from crdt_llm.document.keys import SigningKey
from crdt_llm.document.schema import State
from crdt_llm.errors import AuthenticationFailed, Corrupt, DataFolderBusy, Refused
from crdt_llm.sync.node.link import NodeLink
from crdt_llm.sync.transport.dial import Address, native_dial

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from crdt_llm.inference.contract import Engine

MASTER = b"m" * 32
BASE = "ws://relay.example.org/"


def secret_file(path: Path, secret: bytes, mode: int = 0o600) -> Path:
    path.write_bytes(secret)
    path.chmod(mode)
    return path


def link_to(server: Server, key: SigningKey, token: str = NODE_TOKEN) -> tuple[NodeLink, Looks]:
    looks = Looks()
    link = NodeLink(
        native_dial(Address.parse(server.url)),
        token=lambda: token,
        name="test",
        node=key.public,
        pin=lambda _: None,
        work=looks.add,
        random=Random(1),
    )
    return link, looks


@asynccontextmanager
async def running(server: Server, key: SigningKey) -> AsyncIterator[None]:
    """A node beside the server, until the block ends; it must end well."""
    link, looks = link_to(server, key)
    secrets = Secrets(key, MASTER)

    async def start_engine() -> Engine:
        return server.engine

    node = make_node(link, secrets, server.model_dir, start_engine)
    stopping, ready = asyncio.Event(), asyncio.Event()
    serving = asyncio.create_task(serve_node(link, looks, node, stopping=stopping, ready=ready.set))
    await ready.wait()
    try:
        yield
    finally:
        stopping.set()
        await serving


def test_two_nodes_never_share_a_folder(tmp_path: Path) -> None:
    folder = NodeFolder(tmp_path / "node")
    with folder.locked(), pytest.raises(DataFolderBusy, match="--data"), folder.locked():
        pass
    with folder.locked():
        assert folder.path.stat().st_mode & 0o077 == 0


def test_the_master_key_is_brought_and_never_made(tmp_path: Path) -> None:
    path = tmp_path / "master.key"
    with pytest.raises(Corrupt, match="there is no master key"):
        read_master_key(path)
    assert not path.exists()
    secret_file(path, b"m" * 32, 0o644)
    with pytest.raises(Corrupt, match="chmod 600"):
        read_master_key(path)
    secret_file(path, b"m" * 32)
    assert read_master_key(path) == b"m" * 32


def test_a_relay_is_held_to_the_key_that_it_showed_first(tmp_path: Path) -> None:
    folder = NodeFolder(tmp_path)
    check = pinned(folder, BASE)
    check(b"1" * 32)
    check(b"1" * 32)
    with pytest.raises(Refused, match="another key than before") as refused:
        pinned(folder, BASE)(b"2" * 32)
    assert str(folder.pin(BASE)) in str(refused.value)
    pinned(folder, "ws://elsewhere.example.org/")(b"2" * 32)


async def test_a_node_of_its_own_answers_and_proves_with_its_own_key(tmp_path: Path) -> None:
    key = SigningKey(b"k" * 32)
    async with Server(tmp_path, ["The first line."], with_node=False) as server:
        token = server.folder.token.read_text().strip()
        async with running(server, key), Client(server.url, token=token) as client:
            conversation = await client.create()
            reply = await (await conversation.ask("one")).entry()
            assert (reply.state, reply.content) == (State.DONE, "The first line.")
            document = conversation.document
            lease = document.lease(1)
            assert lease is not None
            assert lease[0] == key.public
            relay = SigningKey(server.folder.key("relay").read_bytes()).public
            problems = [one.problem for one in verify_path(document, document.view(), relay)]
            assert problems == [None, None]


async def test_a_verbose_node_logs_its_counts_when_they_changed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def told() -> list[str]:
        return [one for one in caplog.messages if "node_sampled_tokens" in one]

    caplog.set_level(logging.INFO, "crdt_llm.cli")  # whatever earlier tests made of the root's
    async with Server(tmp_path, ["The first line."], with_node=False) as server:
        async with running(server, SigningKey(b"q" * 32)):
            pass
        assert told() == []
        caplog.set_level(logging.DEBUG, "crdt_llm.cli")
        async with running(server, SigningKey(b"k" * 32)):
            pass
    (line,) = told()
    assert "node_drafts_adopted_tokens 0" in line


async def test_a_node_that_stops_gives_its_leases_back_at_once(tmp_path: Path) -> None:
    """Another one goes on with the reply in the middle, without waiting for the lease to end."""
    first, second = SigningKey(b"1" * 32), SigningKey(b"2" * 32)
    async with Server(tmp_path, ["The first line."], with_node=False) as server:
        token = server.folder.token.read_text().strip()
        async with Client(server.url, token=token) as client:
            conversation = await client.create()
            async with running(server, first):
                server.engine.go.clear()
                reply = await conversation.ask("one")
                assert await anext(aiter(reply))
            server.engine.go.set()
            async with running(server, second):
                entry = await reply.entry()
            assert (entry.state, entry.content) == (State.DONE, "The first line.")
            assert conversation.document.epochs() == (1, 2)


async def test_a_token_that_is_no_node_s_is_refused(tmp_path: Path) -> None:
    async with Server(tmp_path, ["line"], with_node=False) as server:
        owner = server.folder.token.read_text().strip()
        for token in (owner, "wrong"):
            link, _ = link_to(server, SigningKey(b"k" * 32), token)
            with pytest.raises(AuthenticationFailed):
                await link.run()


async def test_what_is_missing_is_said_in_one_line(tmp_path: Path) -> None:
    data = str(tmp_path / "node")
    outcome = await run("node", "--data", data)
    assert outcome.code == 1
    assert "there is no token" in outcome.complaint
    token = secret_file(tmp_path / "node.token", b"token\n")
    outcome = await run("node", "--data", data, "--token-file", str(token))
    assert outcome.code == 1
    assert "master.key" in outcome.complaint
    assert NodeFolder(tmp_path / "node").key.stat().st_mode & 0o077 == 0
