"""What a start makes of files that are not what they should be: one line, and exit code 1."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import sqlite3
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
from adversity.serving import SHORT, Serving, known_to_the_relay
from cli import shell

from crdt_llm.cli.app import FAILED, run
from crdt_llm.document.keys import load_or_create_secret
from crdt_llm.document.schema import State
from crdt_llm.errors import Refused
from crdt_llm.store.sqlite import SqliteLog
from crdt_llm.sync.relay.access import load_or_create_token

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from crdt_llm.cli.folders import DataFolder


@dataclass(frozen=True, slots=True)
class Start:
    """Starts a server in this process: what it loads is loaded once for all tests."""

    capsys: pytest.CaptureFixture[str]
    caplog: pytest.LogCaptureFixture

    def complaint(self, serving: Serving, *words: str, ready: bool = False) -> str:
        """The one line that a failing start ends with."""
        self.caplog.set_level("INFO")
        code = run([*serving.command[3:], *words])
        shown = self.capsys.readouterr()
        assert (code, shown.out.startswith("ready ")) == (FAILED, ready)
        (line,) = (*shown.err.splitlines(), *self.caplog.messages)
        assert line.startswith("crdt-llm: ")
        assert not line.startswith("crdt-llm: unexpected")
        return line


@pytest.fixture
def start(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> Start:
    return Start(capsys, caplog)


@pytest.fixture
def served(tmp_path: Path) -> Serving:
    """A data folder with all its files, as a server left it."""
    serving = Serving(tmp_path, None)
    asyncio.run(_fill(serving.folder))
    return serving


async def _fill(folder: DataFolder) -> None:
    folder.path.mkdir()
    load_or_create_token(folder.token)
    for name in ("relay", "node", "master"):
        load_or_create_secret(folder.key(name))
    await (await SqliteLog.open(folder.log)).close()


# -- the data folder -------------------------------------------------------------------------------


def _no_database(path: Path) -> None:
    path.write_bytes(b"Dear diary, today I was taken for a database.\n" * 1000)


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2 + 100)


def _scrambled(path: Path) -> None:
    """The schema's page, behind the file's header."""
    raw = bytearray(path.read_bytes())
    raw[100:4096] = bytes(byte ^ 0x55 for byte in raw[100:4096])
    path.write_bytes(raw)


def _others(path: Path) -> None:
    path.unlink()
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE photos (id INTEGER)")
    connection.close()


def _newer(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    "damage", [_no_database, _empty, _truncated, _scrambled, _others, _newer, _folder]
)
def test_a_damaged_log_is_not_served(
    start: Start, served: Serving, damage: Callable[[Path], None]
) -> None:
    log = served.folder.log
    damage(log)
    before = None if log.is_dir() else log.read_bytes()
    assert str(log) in start.complaint(served)
    assert before is None or log.read_bytes() == before  # left as it was found


async def test_one_damaged_conversation_is_told_so_and_the_others_go_on(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    serving = Serving(tmp_path, tiny_model_dir)
    with serving:
        async with serving.client() as client:
            damaged, intact = await client.create("damaged"), await client.create("intact")
            for conversation in (damaged, intact):
                text = f"a text of the {conversation.title} conversation"
                await (await conversation.ask(text, **SHORT)).text()
                await known_to_the_relay(conversation, serving)
        assert await serving.stop() == 0
        raw = serving.folder.log.read_bytes()
        stored = b"a text of the damaged conversation"
        assert stored in raw
        serving.folder.log.write_bytes(raw.replace(stored, stored.swapcase()))
        serving.start()
        async with serving.client() as client:
            again = await client.open(intact.id)
            await again.synced_once()
            assert again.view()[0].content == "a text of the intact conversation"
            reply = await (await again.ask("go on", **SHORT)).entry()
            assert reply.state is State.DONE
            other = await client.open(damaged.id)
            with pytest.raises(Refused, match="damaged"):
                await other.synced_once()
        _, body = await serving.get("/readyz")
        assert json.loads(body)["damaged_conversations"] == 1
        assert "Traceback" not in serving.errors


async def test_a_second_server_on_the_same_folder_refuses_and_harms_nothing(tmp_path: Path) -> None:
    with Serving(tmp_path, None) as serving:
        done = await shell.run(*Serving(tmp_path, None).command[3:])
        assert (done.code, done.out) == (FAILED, "")
        assert str(serving.folder.path) in done.complaint
        assert await serving.get("/healthz") == (200, "ok\n")


def test_a_port_that_is_taken_is_told_so(start: Start, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert "--port" in start.complaint(Serving(tmp_path, None, port=port))


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid"])
def test_an_address_of_another_machine_is_told_so(start: Start, tmp_path: Path, host: str) -> None:
    start.complaint(Serving(tmp_path, None), "--host", host)


def test_a_data_folder_that_is_a_file_is_told_so(start: Start, tmp_path: Path) -> None:
    serving = Serving(tmp_path, None)
    serving.folder.path.write_text("no folder")
    assert str(serving.folder.path) in start.complaint(serving)


def _shorter(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:20])


def _readable(path: Path) -> None:
    path.chmod(0o644)


SECRETS = ("owner.token", "keys/relay.key", "keys/node.key", "keys/master.key")


@pytest.mark.parametrize("damage", [_shorter, _readable, _folder])
@pytest.mark.parametrize("name", SECRETS)
def test_a_damaged_secret_is_not_replaced_and_not_used(
    start: Start,
    served: Serving,
    tiny_model_dir: Path,
    name: str,
    damage: Callable[[Path], None],
) -> None:
    path = served.folder.path / name
    secret = path.read_bytes()
    damage(path)
    served.model_dir = tiny_model_dir
    line = start.complaint(served)
    assert str(path) in line
    assert path.is_dir() or path.read_bytes() in secret
    assert secret.hex() not in line
    assert secret[:20].decode(errors="replace") not in line


async def test_secrets_and_conversations_are_private(tmp_path: Path, tiny_model_dir: Path) -> None:
    with Serving(tmp_path, tiny_model_dir) as serving:
        async with serving.client() as client:
            conversation = await client.create()
            await (await conversation.ask("hello", **SHORT)).text()
        files = [path for path in serving.folder.path.rglob("*") if path.is_file()]
        assert {serving.folder.path / name for name in SECRETS} < set(files)
        assert serving.folder.log.with_name("log.db-wal") in files
        modes = {path.name: path.stat().st_mode & 0o777 for path in files}
        assert set(modes.values()) == {0o600}, modes


# -- the model -------------------------------------------------------------------------------------


def _without(name: str) -> Callable[[Path], None]:
    return lambda model: (model / name).unlink()


def _with(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda model: (model / name).write_bytes(content)


def _cut(name: str) -> Callable[[Path], None]:
    return lambda model: os.truncate(model / name, (model / name).stat().st_size // 2)


def _renamed_tensor(model: Path) -> None:
    """A file of the right length that lacks what the model needs."""
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes().replace(b"model.norm.weight", b"model.form.weight"))


def _other_architecture(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    config |= {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}
    (model / "config.json").write_text(json.dumps(config))


def _wrong_shape(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"hidden_size": 96}))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        pytest.param(_without("config.json"), "config.json", id="no config"),
        pytest.param(_with("config.json", b"{"), "config.json", id="half a config"),
        pytest.param(_without("tokenizer.json"), "tokenizer.json", id="no tokenizer"),
        pytest.param(_cut("tokenizer.json"), "tokenizer.json", id="half a tokenizer"),
        pytest.param(_without("model.safetensors"), "model.safetensors", id="no weights"),
        pytest.param(_cut("model.safetensors"), "model.safetensors", id="half the weights"),
        pytest.param(_with("model.safetensors", b"\0" * 99), "model.safetensors", id="zeros"),
        pytest.param(_without("chat_template.jinja"), "chat template", id="no template"),
        pytest.param(_with("chat_template.jinja", b"{% for"), "template", id="half a template"),
        pytest.param(_with("chat_template.jinja", b"\xff\xfe"), "chat_template", id="no text"),
    ],
)
def test_a_damaged_model_is_told_so(
    start: Start,
    tmp_path: Path,
    tiny_model_dir: Path,
    damage: Callable[[Path], object],
    says: str,
) -> None:
    model = shutil.copytree(tiny_model_dir, tmp_path / "model")
    damage(model)
    line = start.complaint(Serving(tmp_path, model))
    assert says in line
    assert str(model) in line


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_renamed_tensor, "model.norm.weight"),
        (_other_architecture, "gpt2"),
        (_wrong_shape, "embed_tokens"),
        (_with("config.json", b"{}"), "model_type"),
    ],
)
def test_weights_that_only_the_engine_can_judge_end_the_server_in_one_line(
    start: Start,
    tmp_path: Path,
    tiny_model_dir: Path,
    damage: Callable[[Path], object],
    says: str,
) -> None:
    """The relay is up by then: the engine takes seconds to load, and devices need not wait."""
    model = shutil.copytree(tiny_model_dir, tmp_path / "model")
    damage(model)
    line = start.complaint(Serving(tmp_path, model), ready=True)
    assert says in line
    assert str(model) in line


@pytest.mark.parametrize("name", ["no-such-model", "./nowhere", "", "../x/../y"])
def test_an_unknown_model_is_told_so(start: Start, tmp_path: Path, name: str) -> None:
    serving = Serving(tmp_path, tmp_path)
    line = start.complaint(serving, "--model", name)
    assert f"no model {name!r}" in line


async def test_an_unknown_hub_id_is_told_so_offline(tmp_path: Path) -> None:
    """In a process: the hub's library reads its settings once."""
    done = await shell.run(*Serving(tmp_path, tmp_path).command[3:], "--model", "nobody/no-model")
    progress, complaint = done.err.splitlines()
    assert (done.code, done.out, progress) == (FAILED, "", "downloading nobody/no-model")
    assert complaint.startswith("crdt-llm: could not fetch nobody/no-model")


def test_a_file_is_no_model(start: Start, tmp_path: Path) -> None:
    (tmp_path / "model").write_text("no folder")
    assert str(tmp_path / "model") in start.complaint(Serving(tmp_path, tmp_path / "model"))
