from __future__ import annotations

import asyncio
import io
import json
from typing import TYPE_CHECKING, Self

import pytest
import pytest_asyncio
from cli import shell
from cli.scripted_server import FAIL, Server

from crdt_llm.cli import chat
from crdt_llm.cli.chat import Pipe, Wish, choose, read_message
from crdt_llm.cli.connection import door_to
from crdt_llm.document.schema import TEXT_BYTES_MAX, Role, State
from crdt_llm.errors import (
    DataFolderBusy,
    LocalMisuse,
    MalformedMessage,
    Refused,
    ReplyFailed,
    StoreFailed,
    TooLarge,
    Unavailable,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from crdt_llm.cli.connection import Door
    from crdt_llm.sync.client.client import OpenConversation

NOWHERE = "http://127.0.0.1:9/"  # the discard port, where nobody listens
UNKNOWN = "A" * 22


@pytest_asyncio.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    async with Server(tmp_path, ["The first line.", "The second\nline."]) as server:
        yield server


class Paper(io.StringIO):
    """Text that can be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self._news = asyncio.Event()

    def write(self, text: str) -> int:
        if text:
            self._news.set()
        return super().write(text)

    async def written(self) -> str:
        """Everything, as soon as there is something."""
        await self._news.wait()
        return self.getvalue()


class Device:
    """A device of the test: a client, its door, and what its pipe printed."""

    def __init__(self, server: Server, name: str = "terminal", url: str | None = None) -> None:
        self.door: Door = door_to(url or server.url, server.folder.token)
        self.client = server.device(name, self.door)
        self.out, self.notes = Paper(), Paper()

    async def __aenter__(self) -> Self:
        await self.client.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.client.__aexit__()

    async def open(self, wish: Wish | None = None) -> OpenConversation:
        return await choose(self.client, self.door, wish or Wish())

    async def send(self, text: str, wish: Wish | None = None) -> int:
        wish = wish or Wish()
        pipe = Pipe(await self.open(wish), self.door, self.out, self.notes, device="test")
        return await pipe.send(text, wish)


# -- a message through a pipe ----------------------------------------------------------------------


def test_the_whole_of_standard_input_is_one_message() -> None:
    assert read_message(io.BytesIO("a\n\n bé \n\r\n".encode())) == "a\n\n bé "


@pytest.mark.parametrize(
    ("given", "error"),
    [
        (b"", LocalMisuse),
        (b"\n\n", LocalMisuse),
        (b"\xff\xfe", MalformedMessage),
        (b"x" * (TEXT_BYTES_MAX + 1), TooLarge),
    ],
)
def test_what_is_no_message_is_not_sent(given: bytes, error: type[Exception]) -> None:
    with pytest.raises(error):
        read_message(io.BytesIO(given))


async def test_a_pipe_sends_one_message_and_prints_the_reply(server: Server) -> None:
    async with Device(server) as device:
        assert await device.send("Hi") == 0
        assert device.out.getvalue() == "The first line.\n"
        assert device.notes.getvalue() == ""
        view = (await device.open()).view()
    assert [(entry.born.role, entry.content) for entry in view] == [
        (Role.USER, "Hi"),
        (Role.ASSISTANT, "The first line."),
    ]


async def test_the_reply_is_printed_as_it_comes(server: Server) -> None:
    server.engine.go.clear()
    async with Device(server) as device:
        sending = asyncio.create_task(device.send("Hi"))
        beginning = await device.out.written()
        assert "The first line.".startswith(beginning)
        assert len(beginning) < len("The first line.")
        server.engine.go.set()
        assert await sending == 0
    assert device.out.getvalue() == "The first line.\n"


async def test_the_next_message_goes_to_the_last_conversation(server: Server) -> None:
    async with Device(server) as device:
        await device.send("one")
        first = (await device.open()).id
        await device.send("two", Wish(new=True))
        second = (await device.open()).id
        await device.send("three", Wish(conversation=first))
        await device.send("four", Wish(conversation=second[:6]))
        asked = {
            name: [
                entry.content
                for entry in (await device.client.open(name)).view()
                if entry.born.role is Role.USER
            ]
            for name in (first, second)
        }
    assert asked == {first: ["one", "three"], second: ["two", "four"]}


async def test_the_sampler_is_asked_for_what_the_options_say(server: Server) -> None:
    async with Device(server) as device:
        await device.send("Hi", Wish(max_tokens=50, temperature=0.25, seed=7))
    (params,) = server.engine.asked
    assert (params.max_tokens, params.temperature, params.seed) == (50, 0.25, 7)


async def test_a_new_conversation_can_begin_with_a_system_entry(server: Server) -> None:
    async with Device(server) as device:
        await device.send("Hi", Wish(system="Be brief."))
        await device.send("Again", Wish(system="Be brief."))  # the same command line once more
        view = (await device.open()).view()
        with pytest.raises(LocalMisuse, match="--new"):
            await device.send("Hi", Wish(system="Be long."))
    assert [entry.content for entry in view if entry.born.role is Role.SYSTEM] == ["Be brief."]
    assert view[0].born.role is Role.SYSTEM


async def test_json_says_what_the_reply_cost(server: Server) -> None:
    async with Device(server) as device:
        assert await device.send("Hi", Wish(json=True)) == 0
        identity = (await device.open()).id
    facts = json.loads(device.out.getvalue())
    assert (facts["conversation"], facts["state"]) == (identity, "done")
    assert facts["text"] == "The first line."
    assert facts["usage"]["sampled"] > 0


async def test_a_reply_that_fails_is_a_failure(server: Server) -> None:
    server.engine.lines[:] = [FAIL]
    async with Device(server) as device:
        with pytest.raises(ReplyFailed, match="the script says so"):
            await device.send("Hi")
    assert device.out.getvalue() == ""


async def test_a_reply_that_is_stopped_elsewhere_is_a_failure(server: Server) -> None:
    server.engine.go.clear()
    async with Device(server) as device, Device(server, "phone") as phone:
        conversation = await device.open()
        sending = asyncio.create_task(device.send("Hi"))
        other = await phone.client.open(conversation.id)
        changes = other.changes()
        while not any(entry.state is State.STREAMING for entry in other.view()):
            await anext(changes)
        await other.stop()
        with pytest.raises(ReplyFailed, match="stopped"):
            await sending


async def test_a_refusal_is_a_failure(server: Server) -> None:
    server.folder.token.chmod(0o600)
    server.folder.token.write_text("another token\n".replace(" ", "-"))
    async with Device(server) as device:
        with pytest.raises(Refused, match="token"):
            await device.send("Hi")


async def test_without_a_relay_the_message_is_kept_and_sent_later(server: Server) -> None:
    async with Device(server, url=NOWHERE) as device:
        with pytest.raises(Unavailable, match="the message is kept"):
            await device.send("Hi")
    async with Device(server) as device:
        conversation = await device.open()
        reply = conversation.reply(conversation.view()[-1].id)
        assert await reply.text() == "The first line."


async def test_a_lost_relay_is_told_once_and_the_reply_goes_on(server: Server) -> None:
    server.engine.lines[:] = ["The first line."]
    server.engine.go.clear()
    async with Device(server) as device:
        sending = asyncio.create_task(device.send("Hi"))
        await device.out.written()
        await server.stop()
        await device.notes.written()
        server.engine.go.set()
        await server.start()
        assert await sending == 0
    assert device.out.getvalue() == "The first line.\n"
    assert len(device.notes.getvalue().splitlines()) == 1
    assert "the relay went away" in device.notes.getvalue()


async def test_nobody_answering_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat, "PATIENCE_S", 0.0)
    async with Server(tmp_path, [""], with_node=False) as server, Device(server) as device:
        sending = asyncio.create_task(device.send("Hi"))
        assert "does a node run there?" in await device.notes.written()
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending


# -- which conversation ----------------------------------------------------------------------------


async def test_another_device_joins_by_the_whole_id(server: Server) -> None:
    async with Device(server) as device, Device(server, "phone") as phone:
        await device.send("Hi")
        conversation = await device.open()
        joined = await phone.open(Wish(conversation=conversation.id))
        assert [e.content for e in joined.view()] == [e.content for e in conversation.view()]


async def test_a_conversation_that_nobody_has_is_an_error(server: Server) -> None:
    async with Device(server) as device:
        with pytest.raises(StoreFailed, match=UNKNOWN):
            await device.open(Wish(conversation=UNKNOWN))


async def test_an_unknown_conversation_needs_the_relay(server: Server) -> None:
    async with Device(server, url=NOWHERE) as device:
        with pytest.raises(Unavailable, match="not on this device"):
            await device.open(Wish(conversation=UNKNOWN))


async def test_what_is_no_id_is_wrong_usage(server: Server) -> None:
    async with Device(server) as device:
        with pytest.raises(LocalMisuse):
            await device.open(Wish(conversation="no id"))


async def from_a_terminal(server: Server, text: str) -> int:
    """What the command does with a message, beside whatever is open; its exit code."""
    return await chat._chat(
        Wish(),
        text,
        folder=server.folder,
        device="terminal",
        url=server.url,
        token_file=None,
    )


async def test_a_second_terminal_is_a_device_of_its_own_in_the_same_conversation(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    async with Device(server, name="terminal") as device:
        conversation = await device.open()
        await (await conversation.ask("From the first terminal.")).entry()
        assert await from_a_terminal(server, "From the second.") == 0
        assert capsys.readouterr().out
        texts = [entry.content for entry in conversation.view()]
        assert "From the second." in texts


async def test_there_is_an_end_to_terminals(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat, "DEVICES_MAX", 1)
    async with Device(server, name="terminal"):
        with pytest.raises(DataFolderBusy, match="--device"):
            await from_a_terminal(server, "Hi")


# -- as a process ----------------------------------------------------------------------------------


async def test_chat_by_its_command_line(server: Server) -> None:
    where = ("--url", server.url, "--data", str(server.folder.path))
    assert (await shell.run("chat", *where, stdin=b"one")).out == "The first line.\n"
    assert (await shell.run("chat", *where, stdin=b"two")).out == "The second\nline.\n"
    listed = await shell.run("chat", "--list", *where)
    (line,) = listed.out.splitlines()
    assert line.endswith("one")
    (facts,) = json.loads((await shell.run("chat", "--list", "--json", *where)).out)
    assert line.startswith(facts["conversation"])
    assert (facts["entries"], facts["begins"]) == (4, "one")


async def test_the_list_needs_no_relay_and_no_token(tmp_path: Path) -> None:
    done = await shell.run("chat", "--list", "--data", str(tmp_path))
    assert (done.code, done.out, done.err) == (0, "", "")


async def test_without_a_token_the_line_says_how_to_get_one(tmp_path: Path) -> None:
    done = await shell.run("chat", "--data", str(tmp_path), stdin=b"Hi")
    assert (done.code, done.out) == (1, "")
    assert "crdt-llm serve" in done.complaint


async def test_without_a_relay_the_line_says_that_the_message_is_kept(server: Server) -> None:
    where = ("--url", NOWHERE, "--data", str(server.folder.path))
    done = await shell.run("chat", *where, stdin=b"Hi")
    assert (done.code, done.out) == (1, "")
    assert "the message is kept" in done.complaint


async def test_a_failed_reply_is_exit_code_1(server: Server) -> None:
    server.engine.lines[:] = [FAIL]
    where = ("--url", server.url, "--data", str(server.folder.path))
    done = await shell.run("chat", *where, stdin=b"Hi")
    assert (done.code, done.out) == (1, "")
    assert "the script says so" in done.complaint


async def test_an_empty_pipe_is_wrong_usage(server: Server) -> None:
    done = await shell.run("chat", "--url", server.url, "--data", str(server.folder.path))
    assert (done.code, done.out) == (2, "")
    assert "standard input is empty" in done.complaint
