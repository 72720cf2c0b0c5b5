from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest_asyncio
from cli import shell
from cli.scripted_server import Server

from crdt_llm.cli.stored import list_stored, load_stored
from crdt_llm.sync.client.client import Client

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


@dataclass(frozen=True)
class Exported:
    """A conversation that was exported, and the folder of its relay, which is stopped."""

    identity: str
    file: Path
    server: Server

    @property
    def data(self) -> list[str]:
        return ["--data", str(self.server.folder.path)]

    def lose_log(self) -> None:
        for file in self.server.folder.path.glob("log.db*"):
            file.unlink()

    def lose_register(self) -> None:
        for file in self.server.folder.path.glob("register.db*"):
            file.unlink()


@pytest_asyncio.fixture
async def exported(tmp_path: Path) -> AsyncIterator[Exported]:
    file = tmp_path / "talk.yjs"
    async with Server(tmp_path, ["The Rhine."]) as server:
        token = server.folder.token.read_text().strip()
        async with Client(server.url, token=token, device="phone") as client:
            conversation = await client.create("Rivers")
            await (await conversation.ask("Name a river.")).text()
            await conversation.synced_once()
            identity = conversation.id
        data = ["--data", str(server.folder.path)]
        done = await shell.run("export", identity, "--output", str(file), *data)
        assert done.code == 0, done.err
    yield Exported(identity, file, server)


async def test_after_the_log_was_lost_a_file_brings_all_of_it_back(exported: Exported) -> None:
    before = load_stored(exported.server.folder.log, exported.identity)
    exported.lose_log()
    done = await shell.run("import", str(exported.file), *exported.data)
    assert (done.code, done.out.strip(), done.err) == (0, exported.identity, "")
    after = load_stored(exported.server.folder.log, exported.identity)
    assert after.view() == before.view()
    for name in before.view():
        assert after.entry(name) == before.entry(name)
    checked = await shell.run(
        "inspect", "--verify", "--model", str(exported.server.model_dir), *exported.data
    )
    assert checked.code == 0, checked.err
    assert "chain: 2 entries hold" in checked.out


async def test_without_the_register_trust_is_asked_for_and_doubts_are_listed(
    exported: Exported,
) -> None:
    exported.lose_log()
    exported.lose_register()
    done = await shell.run("import", str(exported.file), *exported.data)
    assert done.code == 2
    assert "--trust" in done.complaint
    assert list_stored(exported.server.folder.log) == ()
    done = await shell.run("import", str(exported.file), "--trust", "--json", *exported.data)
    assert done.code == 0, done.err
    facts = json.loads(done.out)
    assert facts["conversation"] == exported.identity
    assert facts["unverified"]
    stored = load_stored(exported.server.folder.log, exported.identity)
    assert [stored.text(name) for name in stored.view()] == ["Name a river.", "The Rhine."]


async def test_a_folder_that_is_served_is_left_alone(exported: Exported) -> None:
    process = await shell.start("serve", "--no-node", "--port", "0", *exported.data)
    assert process.stdout is not None
    assert (await process.stdout.readline()).startswith(b"ready")
    done = await shell.run("import", str(exported.file), *exported.data)
    process.terminate()
    await process.wait()
    assert done.code == 1
    assert "another crdt-llm serves" in done.complaint


async def test_a_file_that_is_no_conversation_is_said_to_be_none(
    exported: Exported, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.yjs"
    for content, says in (
        (b"not a document", "is no conversation"),
        (b"\x00\x00", "no birth"),
        (exported.file.read_bytes()[:-7], "is no conversation"),
    ):
        broken.write_bytes(content)
        done = await shell.run("import", str(broken), *exported.data)
        assert done.code == 2
        assert says in done.complaint
    done = await shell.run("import", str(tmp_path / "missing"), *exported.data)
    assert done.code == 1
    assert "cannot be read" in done.complaint


async def test_only_what_lacks_something_is_replaced(exported: Exported) -> None:
    done = await shell.run("import", "--replace", str(exported.file), *exported.data)
    assert done.code == 2
    assert "without --replace" in done.complaint
    done = await shell.run("import", "--replace", "--trust", str(exported.file), *exported.data)
    assert done.code == 2
    before = load_stored(exported.server.folder.log, exported.identity)
    exported.lose_log()
    done = await shell.run("import", "--replace", "--json", str(exported.file), *exported.data)
    assert done.code == 0, done.err
    assert json.loads(done.out) == {"conversation": exported.identity, "dropped": []}
    after = load_stored(exported.server.folder.log, exported.identity)
    assert after.view() == before.view()
