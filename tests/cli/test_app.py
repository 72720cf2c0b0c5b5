from __future__ import annotations

import asyncio
import errno
import os
import signal
import sys
from typing import TYPE_CHECKING

import pytest
import typer
from cli import shell
from cli.scripted_server import Server

from crdt_llm.cli import app as commands
from crdt_llm.cli.app import run
from crdt_llm.errors import LocalMisuse, ModelUnusable

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

COMMANDS = (
    "serve",
    "chat",
    "inspect",
    "replay",
    "audit",
    "export",
    "import",
    "conformance",
    "model fetch",
    "token issue",
    "token list",
    "token revoke",
)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*command.split(), "--help"]) == 0
    shown = capsys.readouterr()
    assert f"Example: crdt-llm {command}" in shown.out
    assert "--verbose" in shown.out
    assert shown.err == ""


@pytest.mark.parametrize("command", ["serve", "node"])
def test_the_memory_of_the_kv_cache_is_a_number_that_can_be_meant(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([command, "--help"]) == 0
    shown = capsys.readouterr().out
    assert "--kv-memory MIB" in shown
    assert "--lease-ttl" not in shown  # for tests
    for value in ("0", "-1", "2GB", str(1 << 40)):
        assert run([command, "--kv-memory", value]) == commands.USAGE
        assert "--kv-memory" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["serve", "node", "replay", "audit"])
def test_where_and_how_the_model_computes_can_be_chosen(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([command, "--help"]) == 0
    shown = capsys.readouterr().out
    assert "--device DEVICE" in shown
    assert "cuda" in shown
    assert "float32" in shown
    assert run([command, "--weights", "int4"]) == commands.USAGE
    assert "--weights" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["0", "nan", "inf", "3600"])
def test_a_lease_that_never_ends_or_begins_is_refused(
    value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["serve", "--no-node", "--lease-ttl", value, "--port", "99999"]) == commands.USAGE
    assert "--lease-ttl" in capsys.readouterr().err


def test_the_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(command.split()[0] in shown for command in COMMANDS)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["chat", "--nonsense"], "--nonsense"),
        (["nonsense"], "nonsense"),
        (["chat", "--seed", "many"], "--seed"),
        (["serve", "--port", "70000"], "--port"),
        (["chat", "--max-tokens", "0"], "--max-tokens"),
        (["inspect", "one", "two"], "two"),
        (["chat", "--list", "--device", "../x"], "device"),
        (["inspect", "--url", "ftp://nowhere/", "a" * 22], "ftp"),
        (["inspect", "--url", "http://127.0.0.1:1/", "short"], "22 characters"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(
    words: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "owner.token").write_text("secret")
    if words[0] in {"chat", "inspect"}:
        words = [*words, "--data", str(tmp_path)]
    assert run(words) == commands.USAGE
    shown = capsys.readouterr()
    assert shown.out == ""
    assert len(shown.err.splitlines()) == 1
    assert says in shown.err


@pytest.mark.parametrize("words", [[], ["model"]])
def test_a_group_without_a_command_shows_its_usage(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(words) == commands.USAGE
    assert "Usage: crdt-llm" in capsys.readouterr().err


def test_a_failure_is_one_line_that_says_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["model", "fetch", str(tmp_path)]) == commands.FAILED
    shown = capsys.readouterr()
    assert shown.out == ""
    assert len(shown.err.splitlines()) == 1
    assert "config.json" in shown.err


def _failing(monkeypatch: pytest.MonkeyPatch, failure: BaseException) -> None:
    """Make ``model fetch`` fail."""

    def fail(*_: object, **__: object) -> None:
        raise failure

    monkeypatch.setattr("crdt_llm.cli.model.run_fetch", fail)


@pytest.mark.parametrize(
    ("failure", "code", "says"),
    [
        (ModelUnusable("it is\nbroken"), commands.FAILED, "crdt-llm: it is broken"),
        (LocalMisuse("\x1b]0;title\x07"), commands.USAGE, "crdt-llm: \ufffd]0;title\ufffd"),
        (LocalMisuse("written otherwise"), commands.USAGE, "crdt-llm: written otherwise"),
        (ZeroDivisionError("by zero"), commands.FAILED, "ZeroDivisionError: by zero"),
        (OSError(errno.EADDRINUSE, "address in use"), commands.FAILED, "choose --port"),
        (PermissionError(13, "Denied", "/x/y"), commands.FAILED, "crdt-llm: /x/y: Denied"),
        (OSError("no number"), commands.FAILED, "unexpected OSError: no number"),
        (ModuleNotFoundError("no", name="torch._C"), commands.FAILED, "crdt-llm[inference]"),
        (ModuleNotFoundError("no", name="crdt_llm.x"), commands.FAILED, "ModuleNotFoundError"),
    ],
)
def test_every_error_is_one_line(
    failure: Exception,
    code: int,
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _failing(monkeypatch, failure)
    assert run(["model", "fetch"]) == code
    shown = capsys.readouterr().err
    assert len(shown.splitlines()) == 1
    assert says in shown


def test_verbose_shows_where_an_error_arose(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _failing(monkeypatch, ZeroDivisionError("by zero"))
    assert run(["model", "fetch", "--verbose"]) == commands.FAILED
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert shown.splitlines()[-1].startswith("crdt-llm: unexpected ZeroDivisionError")


def test_an_interrupt_is_quiet(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _failing(monkeypatch, KeyboardInterrupt())
    assert run(["model", "fetch"]) == commands.INTERRUPTED
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "order",
    [
        lambda name: [name, "--json"],
        lambda name: ["--json", name],
        lambda name: ["--json", "--", name],
    ],
)
@pytest.mark.parametrize("name", ["-" + "a" * 21, "--" + "B_-9" * 5, "a" * 22])
def test_an_id_may_begin_with_a_dash(
    name: str, order: Callable[[str], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def note(question: object, **_: object) -> int:
        asked.append(question)
        return 0

    monkeypatch.setattr("crdt_llm.cli.inspect.run_inspect", note)
    assert run(["inspect", *order(name)]) == 0
    (question,) = asked
    assert (question.conversation, question.json) == (name, True)  # type: ignore[attr-defined]


def test_a_command_s_exit_code_is_the_program_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crdt_llm.cli.inspect.run_inspect", lambda *_, **__: 1)
    assert run(["inspect"]) == 1


def test_no_option_could_be_taken_for_an_id() -> None:
    for command in COMMANDS:
        group = typer.main.get_command(commands.app)
        for word in command.split():
            group = group.commands[word]  # type: ignore[attr-defined]
        names = [name for option in group.params for name in option.opts]
        assert all(len(name) < commands._ID_CHARACTERS for name in names)


# -- as a process ----------------------------------------------------------------------------------


async def test_help_for_chat_loads_nothing_heavy() -> None:
    done = await shell.run("chat", "--help", light=True)
    assert (done.code, done.err) == (0, "")


async def test_a_piped_chat_loads_nothing_heavy(tmp_path: Path) -> None:
    async with Server(tmp_path, ["Hello."]) as server:
        words = ("--url", server.url, "--data", str(server.folder.path))
        done = await shell.run("chat", *words, stdin=b"Hi\n", light=True)
    assert (done.code, done.out, done.err) == (0, "Hello.\n", "")


async def test_ctrl_c_ends_a_waiting_chat_with_130_and_without_a_word(tmp_path: Path) -> None:
    async with Server(tmp_path, [""], with_node=False) as server:
        server.changed.clear()
        process = await shell.start("chat", "--url", server.url, "--data", str(server.folder.path))
        assert process.stdin is not None
        process.stdin.write(b"Is anybody there?\n")
        process.stdin.write_eof()
        await server.changed.wait()  # it has sent its message and waits for the reply
        process.send_signal(signal.SIGINT)
        done = await shell.finish(process)
    assert (done.code, done.out, done.err) == (130, "", "")


async def test_a_reader_that_leaves_is_no_reason_to_complain(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "crdt_llm", "chat", "--list", "--json", "--data", str(tmp_path),
        stdout=writing,
        stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    os.close(writing)
    _, complaint = await process.communicate()
    assert (process.returncode, complaint) == (commands.FAILED, b"")


async def test_verbose_logs_to_standard_error(tmp_path: Path) -> None:
    async with Server(tmp_path, ["Hello."]) as server:
        words = ("--url", server.url, "--data", str(server.folder.path), "--verbose")
        await server.stop()
        done = await shell.run("chat", *words, stdin=b"Hi\n")
        await server.start()
    assert done.code == commands.FAILED
    assert "INFO crdt_llm.sync" in done.err
    assert "Traceback" in done.err
    token = server.folder.token.read_text().strip()
    assert token not in done.err
