"""What ``serve`` checks before it serves."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from cli.scripted_server import Server

from crdt_llm import Client
from crdt_llm.cli.embedded_node import show_figures
from crdt_llm.cli.folders import DataFolder
from crdt_llm.cli.serve import KEYS, built_page, lock_folder, serve
from crdt_llm.errors import Corrupt, DataFolderBusy
from crdt_llm.store.sqlite import SqliteLog
from crdt_llm.sync.relay.metrics import Metrics

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("name", KEYS)
async def test_a_key_that_is_missing_beside_conversations_is_not_made_anew(
    tmp_path: Path, name: str
) -> None:
    folder = DataFolder(tmp_path)
    await (await SqliteLog.open(folder.log)).close()
    for other in KEYS:
        folder.key(other).parent.mkdir(exist_ok=True)
        folder.key(other).write_bytes(b"k" * 32)
        folder.key(other).chmod(0o600)
    folder.key(name).unlink()
    with pytest.raises(Corrupt, match=f"{name}.key is missing"):
        await serve(folder, host="127.0.0.1", port=0, model_dir=None)
    assert not folder.key(name).exists()


async def test_the_node_s_figures_are_among_the_relay_s_and_name_nobody(tmp_path: Path) -> None:
    metrics = Metrics()
    async with Server(tmp_path, ["The first line."]) as server:
        token = server.folder.token.read_text().strip()
        showing = asyncio.create_task(show_figures(server.node, metrics))
        async with Client(server.url, token=token) as client:
            conversation = await client.create()
            await (await conversation.ask("confidential")).entry()
        shown = metrics.render().decode()
        showing.cancel()
        await asyncio.gather(showing, return_exceptions=True)
    (sampled,) = [
        one for one in shown.splitlines() if one.startswith("crdt_llm_node_sampled_tokens_total ")
    ]
    assert float(sampled.split()[1]) > 0
    assert "crdt_llm_engine_kv_disk_bytes 0.0" in shown
    for secret in (conversation.id, "confidential", "first line"):
        assert secret not in shown


def test_a_folder_is_served_once(tmp_path: Path) -> None:
    lock = lock_folder(DataFolder(tmp_path))
    with pytest.raises(DataFolderBusy, match="another crdt-llm serves"):
        lock_folder(DataFolder(tmp_path))
    lock.release()
    lock_folder(DataFolder(tmp_path)).release()


def test_a_page_that_was_not_built_is_one_line_and_no_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert built_page(tmp_path) is None
    (line,) = capsys.readouterr().err.splitlines()
    assert "make install" in line


def test_a_page_that_was_built_is_served(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "index.html").write_text("<!doctype html>")
    page = built_page(tmp_path)
    assert page is not None
    assert page.answer("/", "127.0.0.1", None) is not None
    assert capsys.readouterr().err == ""
