from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from crdt_llm.cli.app import run
from crdt_llm.cli.folders import DataFolder
from crdt_llm.cli.token import authority_of, read_duration, read_scopes
from crdt_llm.document.keys import written_key
from crdt_llm.document.schema import Grant
from crdt_llm.errors import Forbidden, LocalMisuse
from crdt_llm.sync.relay.access import Pass, load_or_create_token

if TYPE_CHECKING:
    from pathlib import Path

HERE = "A" * 22


@pytest.fixture
def folder(tmp_path: Path) -> DataFolder:
    folder = DataFolder(tmp_path)
    load_or_create_token(folder.token)  # as a first `serve` does
    return folder


def test_what_is_printed_is_the_token_and_it_opens_the_door(
    folder: DataFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["token", "issue", "ada", "--expires", "30d", "--data", str(folder.path)]
    assert run([*words, "--conversation", f"{HERE}=reader"]) == 0
    token = capsys.readouterr().out.strip()
    with authority_of(folder) as (authority, _):
        found = authority.authenticate(token)
    assert found is not None
    assert found.principal == "ada"
    assert found.expires_at is not None
    assert found.cap(HERE) is Grant.READER


def test_a_token_is_listed_and_taken_back(
    folder: DataFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--data", str(folder.path)]
    assert run(["token", "issue", "node-2", "--node", "--json", *data]) == 0
    made = json.loads(capsys.readouterr().out)

    assert run(["token", "revoke", made["id"], *data]) == 0
    assert run(["token", "list", "--json", *data]) == 0
    printed = capsys.readouterr().out
    (line,) = json.loads(printed)
    assert (line["id"], line["principal"], line["scope"]) == (made["id"], "node-2", "node")
    assert line["revoked_at"] is not None
    assert made["token"] not in printed
    with authority_of(folder) as (authority, _):
        assert authority.authenticate(made["token"]) is None

    assert run(["token", "list", *data]) == 0
    assert "revoked" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["issue", "ada", "--expires", "soon"], 2, "write 90m"),
        (["issue", "ada", "--conversation", "x=reader"], 2, "is no scope"),
        (["issue", "ada", "--conversation", f"{HERE}=king"], 2, "is no scope"),
        (["issue", "ada", "--node", "--conversation", f"{HERE}=reader"], 2, "every conversation"),
        (["revoke", "unknown"], 2, "token list"),
        (["unbind", "unknown"], 2, "token nodes"),
        (["unbind", ""], 2, "token nodes"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    folder: DataFolder,
    words: list[str],
    code: int,
    says: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(["token", *words, "--data", str(folder.path)]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line


async def test_a_nodes_key_is_listed_and_let_go(
    folder: DataFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--data", str(folder.path)]
    keys = (bytes(32), b"\xfb\xff" * 16, b"\xfb\xfe" * 16)  # two begin with a dash
    old, new = Pass("node-1", "a", node=True), Pass("node-2", "b", node=True)
    with authority_of(folder) as (relay, _):
        for key in keys:
            await relay.admit_node(old, key)

        assert run(["token", "nodes", "--json", *data]) == 0
        lines = json.loads(capsys.readouterr().out)
        assert {line["key"] for line in lines} == set(map(written_key, keys))
        assert {line["principal"] for line in lines} == {"node-1"}
        assert run(["token", "nodes", *data]) == 0
        assert capsys.readouterr().out.count("node-1") == 3

        assert run(["token", "unbind", written_key(keys[1]), *data]) == 0
        assert "no longer node-1's" in capsys.readouterr().err
        with pytest.raises(Forbidden):
            await relay.admit_node(new, keys[0])
        await relay.admit_node(new, keys[1])  # as the running relay sees it
        with pytest.raises(Forbidden):
            await relay.admit_node(old, keys[1])

        assert run(["token", "unbind", *data, "--", written_key(keys[1])[:2]]) == 2
        assert "2 keys begin with" in capsys.readouterr().err
        assert run(["token", "unbind", written_key(keys[0])[:8], *data]) == 0
        assert run(["token", "unbind", written_key(keys[0])[:8], *data]) == 2


def test_a_folder_that_was_never_served_gets_no_keys(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["token", "list", "--data", str(tmp_path)]) == 1
    assert "crdt-llm serve" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_durations_and_scopes_are_read() -> None:
    assert read_duration("90m") == 5_400_000
    assert read_duration("2w") == 14 * 86_400_000
    assert read_scopes([]) is None
    assert read_scopes([f"{HERE}=writer"]) == {HERE: Grant.WRITER}
    for wrong in ("", "0d", "d", "1y", "1 d"):
        with pytest.raises(LocalMisuse):
            read_duration(wrong)
