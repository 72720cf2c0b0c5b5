"""The command around the suite: the operator's commands, and where the results go."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio
from conformance.endpoints import relay

from crdt_llm.cli.app import FAILED, run
from crdt_llm.cli.conformance import run_conformance

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from crdt_llm.conformance.connection import Endpoint


@pytest_asyncio.fixture
async def endpoint(tmp_path: Path) -> AsyncIterator[Endpoint]:
    folder = tmp_path / "relay"
    folder.mkdir()
    async with relay(folder) as endpoint:
        yield endpoint


async def conformance(endpoint: Endpoint, folder: Path, **asked: Any) -> int:
    """The command, which has an event loop of its own."""
    token_file = folder / "token"
    token_file.write_text(endpoint.token)
    options = {"only": (), "crash": None, "wipe": None, "report": None, "json": False}
    return await asyncio.to_thread(
        run_conformance,
        endpoint.url,
        token_file=token_file,
        deadline_s=endpoint.deadline_s,
        **options | asked,
    )


async def test_the_report_takes_the_place_of_the_last_one(
    endpoint: Endpoint, tmp_path: Path
) -> None:
    report = tmp_path / "report.json"
    for case in ("durable-ack", "duplicate"):
        assert await conformance(endpoint, tmp_path, only=[case], report=report) == 0
        (facts,) = json.loads(report.read_text())["cases"]
        assert (facts["id"], facts["outcome"]) == (case, "pass")


def test_a_report_that_cannot_be_written_is_said_before_anything_is_tried(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    token = tmp_path / "token"
    token.write_text("nobody-asks-for-it")
    report = tmp_path / "missing" / "report.json"
    nobody_there = "http://127.0.0.1:1/"  # had it been tried, that would be the error
    words = ["conformance", nobody_there, "--token-file", str(token), "--report", str(report)]
    assert run(words) == FAILED
    said = f"crdt-llm: the report {report} cannot be written (No such file or directory)\n"
    assert capsys.readouterr() == ("", said)


def test_a_run_that_does_not_begin_leaves_the_last_report_alone(tmp_path: Path) -> None:
    token, report, fresh = (tmp_path / name for name in ("token", "report.json", "fresh.json"))
    token.write_text("nobody-takes-it")
    report.write_text("the last one")
    for path in (report, fresh):
        words = ["conformance", "http://127.0.0.1:1/", "--token-file", str(token)]
        assert run([*words, "--report", str(path)]) == FAILED
    assert report.read_text() == "the last one"
    assert not fresh.exists()


@pytest.mark.parametrize(("option", "case"), [("crash", "crash"), ("wipe", "lost-log")])
async def test_what_the_operator_did_not_name_is_skipped_and_what_fails_is_named(
    option: str, case: str, endpoint: Endpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert await conformance(endpoint, tmp_path, only=[case]) == 0
    assert f"(--{option})" in capsys.readouterr().out
    assert await conformance(endpoint, tmp_path, only=[case], **{option: "exit 7"}) == 1
    assert f"the command of --{option} failed with exit code 7" in capsys.readouterr().out
