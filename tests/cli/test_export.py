from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio
from cli import shell
from cli.scripted_server import Server

from crdt_llm.cli.export import REDACTED, markdown
from crdt_llm.cli.stored import fresh_client_id, load_stored
from crdt_llm.document.conversation import Conversation
from crdt_llm.sync.client.client import Client

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


@pytest_asyncio.fixture
async def served(tmp_path: Path) -> AsyncIterator[tuple[Server, str]]:
    async with Server(tmp_path, ["The Rhine.", "The Elbe."]) as server:
        token = server.folder.token.read_text().strip()
        async with Client(server.url, token=token, device="phone") as client:
            conversation = await client.create("Rivers")
            await (await conversation.ask("Name a river.")).text()
            await (await conversation.ask("Another one.")).text()
            await conversation.synced_once()
            yield server, conversation.id


async def test_a_document_is_whole_and_private(served: tuple[Server, str], tmp_path: Path) -> None:
    server, identity = served
    path = tmp_path / "talk.yjs"
    data = ["--data", str(server.folder.path)]
    done = await shell.run("export", identity, "--output", str(path), *data)
    assert done.code == 0, done.err
    assert path.stat().st_mode & 0o077 == 0
    found = Conversation(fresh_client_id(), update=path.read_bytes())
    stored = load_stored(server.folder.log, identity)
    assert found.id == identity
    assert found.view() == stored.view()
    for name in stored.view():
        assert found.entry(name) == stored.entry(name)


async def test_json_and_markdown_say_what_was_said(served: tuple[Server, str]) -> None:
    server, identity = served
    data = ["--data", str(server.folder.path)]
    done = await shell.run("export", identity, "--format", "json", *data)
    facts = json.loads(done.out)
    assert facts["conversation"] == identity
    texts = [entry["text"] for entry in facts["entries"]]
    assert texts == ["Name a river.", "The Rhine.", "Another one.", "The Elbe."]
    done = await shell.run("export", "--format", "markdown", *data)
    assert done.out.startswith("# Rivers\n\n## user (owner · phone)\n\nName a river.\n\n")
    assert done.out.endswith("## assistant\n\nThe Elbe.\n")


async def test_from_a_relay_it_is_the_same(served: tuple[Server, str]) -> None:
    server, identity = served
    token = ["--token-file", str(server.folder.token)]
    done = await shell.run("export", identity, "--format", "markdown", "--url", server.url, *token)
    stored = load_stored(server.folder.log, identity)
    assert done.out == markdown(stored)


async def test_a_file_that_cannot_be_written_is_one_line(
    served: tuple[Server, str], tmp_path: Path
) -> None:
    server, _ = served
    data = ["--data", str(server.folder.path)]
    missing = tmp_path / "missing" / "talk.yjs"
    done = await shell.run("export", "--output", str(missing), *data)
    assert done.code == 1
    assert "cannot be written" in done.complaint


async def test_what_was_withdrawn_is_a_marker(served: tuple[Server, str]) -> None:
    server, identity = served
    conversation = load_stored(server.folder.log, identity)
    first = conversation.view()[0]
    with conversation.writing() as writer:
        writer.set(first, "redacted", {"by": "owner", "at": 1})
    text = markdown(conversation)
    assert "Name a river." not in text
    assert f"## user (owner · phone)\n\n{REDACTED}\n" in text


@pytest.mark.parametrize("command", [["export", "nope", "--format", "json"]])
async def test_an_unknown_id_is_said_so(served: tuple[Server, str], command: list[str]) -> None:
    server, _ = served
    done = await shell.run(*command, "--data", str(server.folder.path))
    assert done.code == 1
    assert "nope" in done.complaint
