from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio
from chat_folders import FORMATS
from cli import shell
from cli.scripted_server import FAIL, Server

from crdt_llm.cli.inspect import Question, _ask_relay, run_inspect
from crdt_llm.document.schema import State
from crdt_llm.errors import BadProof, CrdtLlmError, LocalMisuse, ModelUnusable, StoreFailed
from crdt_llm.sync.client.client import Client
from crdt_llm.sync.wire.y_websocket import decode_state_vector

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from crdt_llm.sync.client.client import OpenConversation

UNKNOWN = "A" * 22


@pytest_asyncio.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    async with Server(tmp_path, ["The first line.", "The second\nline.", FAIL]) as server:
        yield server


@pytest_asyncio.fixture
async def conversation(server: Server) -> AsyncIterator[OpenConversation]:
    token = server.folder.token.read_text().strip()
    async with Client(server.url, token=token, device="phone") as client:
        conversation = await client.create("Rivers")
        await (await conversation.ask("Name a river.", temperature=0.5)).text()
        await (await conversation.ask("Another one.")).text()
        await conversation.synced_once()
        yield conversation


def look(server: Server, capsys: pytest.CaptureFixture[str], **asked: Any) -> str:
    """What ``inspect`` prints, from the folder of a running server."""
    question = Question(**{"conversation": None, "model": str(server.model_dir)} | asked)
    code = run_inspect(question, folder=server.folder, url=None, token_file=None)
    assert code == 0
    return capsys.readouterr().out


@pytest.mark.usefixtures("conversation")
async def test_one_row_per_entry_of_the_view(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    heading, titles, *rows = look(server, capsys).splitlines()
    assert "“Rivers”: 4 entries, 1 branch" in heading
    assert titles.split()[:8] == [
        "#", "id", "after", "role", "author", "state", "placed", "tokens",
    ]  # fmt: skip
    assert [row.split()[3] for row in rows] == ["user", "assistant"] * 2
    assert [row.split()[2] for row in rows] == ["-", *(row.split()[1] for row in rows[:-1])]
    assert [row.split()[5] for row in rows] == ["-", "done", "-", "done"]
    assert rows[0].endswith("Name a river.")
    assert rows[3].endswith("The second line.")


async def test_json_has_everything_that_is_visible(
    server: Server, conversation: OpenConversation, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = json.loads(look(server, capsys, json=True))
    assert (facts["conversation"], facts["title"]) == (conversation.id, "Rivers")
    entries = facts["entries"]
    assert [fact["id"] for fact in entries] == list(conversation.path())
    assert [fact["text"] for fact in entries] == [one.content for one in conversation.view()]
    assert entries[1]["params"] == {"temperature": 0.5}
    assert entries[1]["usage"]["reused"] + entries[1]["usage"]["prefilled"] > 0
    assert all(fact["placed"] and fact["shown"] and fact["digest"] for fact in entries)
    assert all("hidden" not in fact for fact in entries)


async def test_it_works_when_no_server_runs_and_leaves_nothing_behind(
    server: Server, conversation: OpenConversation, capsys: pytest.CaptureFixture[str]
) -> None:
    await conversation.close()
    await server.stop()
    before = {path.name: path.read_bytes() for path in server.folder.path.glob("log.db*")}
    assert "Another one." in look(server, capsys)
    after = {path.name: path.read_bytes() for path in server.folder.path.glob("log.db*")}
    assert after == before
    await server.start()


async def test_a_conversation_is_named_by_how_its_id_begins(
    server: Server, conversation: OpenConversation, capsys: pytest.CaptureFixture[str]
) -> None:
    assert look(server, capsys, conversation=conversation.id[:5]).startswith(conversation.id)


@pytest.mark.usefixtures("conversation")
async def test_an_unknown_conversation_is_an_error(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(StoreFailed, match=UNKNOWN):
        look(server, capsys, conversation=UNKNOWN)


def test_an_empty_folder_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(StoreFailed, match="--data"):
        look(Server(tmp_path, [""]), capsys)


async def test_all_shows_every_branch_and_what_has_no_place(
    server: Server, conversation: OpenConversation, capsys: pytest.CaptureFixture[str]
) -> None:
    reply = await conversation.fork(conversation.view()[2].id, "Something else.")
    entry = await reply.entry()
    assert entry.state is State.FAILED
    shown = json.loads(look(server, capsys, json=True))["entries"]
    everything = json.loads(look(server, capsys, json=True, all=True))["entries"]
    assert {fact["text"] for fact in everything} - {fact["text"] for fact in shown} >= {
        "Another one.",
        "The second\nline.",
    }
    failed = next(fact for fact in everything if fact["id"] == entry.id)
    assert failed["usage"]["error"]["message"] == "the script says so"


# -- verification ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("conversation")
async def test_verify_says_how_much_holds(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    *_, chain, tokens = look(server, capsys, verify=True).splitlines()
    assert chain == "chain: 4 entries hold"
    assert tokens == "tokens: 2 replies hold, the text of 2 follows from them"
    facts = json.loads(look(server, capsys, verify=True, json=True))["verification"]
    assert facts == {
        "holds": True,
        "chain": 4,
        "tokens": 2,
        "texts": 2,
        "other_model": 0,
        "problem": None,
    }


@pytest.mark.usefixtures("conversation")
async def test_verify_without_keys_checks_the_chain(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    for key in ("relay", "master"):
        server.folder.key(key).unlink()
    *_, chain, tokens = look(server, capsys, verify=True, model="no such model").splitlines()
    assert chain == "chain: 4 entries hold (leases not checked: no relay key here)"
    assert "not checked" in tokens


@pytest.mark.usefixtures("conversation")
async def test_verify_names_the_entry_that_does_not_hold(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    server.folder.key("relay").write_bytes(bytes(32))  # the leases are another relay's
    first = json.loads(look(server, capsys, json=True))["entries"][0]["id"]
    with pytest.raises(BadProof, match=f"{first} does not hold: a signature"):
        look(server, capsys, verify=True)
    assert "chain: 0 entries hold" in capsys.readouterr().out


@pytest.mark.usefixtures("conversation")
async def test_another_model_s_tokens_are_said_to_be_unchecked(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = FORMATS["strict"].build(tmp_path / "other")
    weights = server.model_dir / "model.safetensors"
    (other / weights.name).write_bytes(weights.read_bytes())
    *_, tokens, text = look(server, capsys, verify=True, model=str(other)).splitlines()
    assert tokens == "tokens: 2 replies hold, the text of 0 follows from them"
    assert text == "text: 2 replies are of another model: name it with --model"


@pytest.mark.usefixtures("conversation")
async def test_verify_needs_the_model_s_tokenizer(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ModelUnusable):
        look(server, capsys, verify=True, model=str(tmp_path))


# -- hidden fields ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("conversation")
async def test_hidden_shows_what_is_sealed(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = json.loads(look(server, capsys, hidden=True, json=True))["entries"]
    sealed = entries[1]["hidden"]
    assert sealed["model"] == "scripted"
    assert sealed["params"]["temperature"] == 0.5
    assert [kind for kind, _ in sealed["kinds"]] == ["injected", "sampled"]
    assert sum(count for _, count in sealed["kinds"]) == len(sealed["ids"])
    assert "hidden" not in entries[0]
    shown = look(server, capsys, hidden=True)
    assert "temperature=0.5" in shown
    assert " ".join(map(str, sealed["ids"])) in shown


@pytest.mark.usefixtures("conversation")
async def test_hidden_needs_the_key(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    server.folder.key("master").unlink()
    with pytest.raises(CrdtLlmError, match=r"master\.key"):
        look(server, capsys, hidden=True)


@pytest.mark.usefixtures("conversation")
async def test_hidden_with_another_key_says_so(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    server.folder.key("master").write_bytes(bytes(32))
    assert "sealed with key" in look(server, capsys, hidden=True)


# -- from a relay ----------------------------------------------------------------------------------


async def test_a_relay_is_asked_by_its_address(
    server: Server, conversation: OpenConversation
) -> None:
    asked = await _ask_relay(conversation.id, server.url, server.folder.token)
    ours, theirs = (one.state_vector() for one in (asked, conversation.document))
    assert decode_state_vector(ours) == decode_state_vector(theirs)


async def test_a_relay_that_has_no_such_conversation_is_an_error(server: Server) -> None:
    with pytest.raises(StoreFailed, match=UNKNOWN):
        await _ask_relay(UNKNOWN, server.url, server.folder.token)


@pytest.mark.parametrize("given", [None, "AAAA"])
async def test_a_relay_is_asked_for_a_whole_id(server: Server, given: str | None) -> None:
    with pytest.raises(LocalMisuse, match="22 characters"):
        await _ask_relay(given, server.url, server.folder.token)


async def test_inspect_by_its_command_line(server: Server, conversation: OpenConversation) -> None:
    words = ("--data", str(server.folder.path), "--verify", "--model", str(server.model_dir))
    from_folder = await shell.run("inspect", *words)
    from_relay = await shell.run("inspect", conversation.id, "--url", server.url, *words)
    assert (from_folder.code, from_folder.err) == (0, "")
    assert from_relay == from_folder


@pytest.mark.usefixtures("conversation")
async def test_what_does_not_hold_is_exit_code_1(server: Server) -> None:
    server.folder.key("relay").write_bytes(bytes(32))
    words = ("--data", str(server.folder.path), "--verify", "--model", str(server.model_dir))
    done = await shell.run("inspect", *words)
    assert done.code == 1
    assert "does not hold" in done.complaint
