from __future__ import annotations

import asyncio
import contextlib
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Self

import pytest_asyncio
from cli.scripted_server import Server
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from crdt_llm.cli.chat import Wish, choose
from crdt_llm.cli.commands import COMMANDS
from crdt_llm.cli.connection import door_to
from crdt_llm.cli.dialogue import INTERRUPTED, Dialogue, wrap
from crdt_llm.document import rules
from crdt_llm.document.schema import Role
from crdt_llm.errors import Refused
from crdt_llm.sync.client.client import Client
from crdt_llm.sync.room import judge

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    import pytest

    from crdt_llm.document.conversation import Change, Conversation
    from crdt_llm.sync.client.client import OpenConversation


class Screen(DummyOutput):
    """A terminal that keeps what was printed above the prompt, and can be waited for."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._news = asyncio.Event()

    def write(self, data: str) -> None:
        # The prompt itself is drawn in pieces of a line.
        if data.endswith("\n") and not data.endswith("\r\n"):
            self.lines += data.splitlines()

    def flush(self) -> None:  # after every line that was printed, and every drawing of the prompt
        self._news.set()

    async def drawn(self) -> None:
        self._news.clear()
        await self._news.wait()

    async def until(self, text: str) -> str:
        """The first line with ``text`` in it that was not waited for before."""
        while True:
            for number, line in enumerate(self.lines):
                if text in line:
                    del self.lines[: number + 1]
                    return line
            await self.drawn()


class Sitting:
    """Somebody at the prompt of a device."""

    def __init__(self, server: Server, name: str = "terminal", url: str | None = None) -> None:
        self.server = server
        self.screen = Screen()
        self._stack = contextlib.AsyncExitStack()
        self.door = door_to(url or server.url, server.folder.token)
        self.client = server.device(name, self.door)

    async def __aenter__(self) -> Self:
        await self._stack.enter_async_context(self.client)
        self._keys = self._stack.enter_context(create_pipe_input())
        self._stack.enter_context(create_app_session(input=self._keys, output=self.screen))
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def sit_down(self, wish: Wish | None = None) -> OpenConversation:
        conversation = await choose(self.client, self.door, wish or Wish())
        self.dialogue = Dialogue(
            self.client,
            self.door,
            sampling={},
            list_lines=lambda: ["the list"],
            source=self._keys,
            target=self.screen,
        )
        self.task = asyncio.create_task(self.dialogue.run(conversation))
        await self.screen.until(f"-- conversation {conversation.id}")
        return conversation

    def type(self, *lines: str) -> None:
        for line in lines:
            self._keys.send_text(line + "\r")

    def press(self, key: str) -> None:
        self._keys.send_text(key)

    async def until(self, text: str) -> str:
        return await self.screen.until(text)

    async def prompt_with(self, text: str, columns: int = 80) -> list[str]:
        """The rows of the prompt, as soon as one of them has ``text`` in it."""
        while True:
            rows = self.dialogue._prompt(columns).split("\n")
            if any(text in row for row in rows):
                return rows
            await self.screen.drawn()

    async def leave(self) -> int:
        self.type("/quit")
        return await self.task


@pytest_asyncio.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    async with Server(tmp_path, ["The first line.", "The second line.", "The third."]) as server:
        yield server


@pytest_asyncio.fixture
async def sitting(server: Server) -> AsyncIterator[Sitting]:
    async with Sitting(server) as sitting:
        yield sitting


async def changed(conversation: OpenConversation, holds: Callable[[], bool]) -> None:
    changes = conversation.changes()
    while not holds():
        await anext(changes)


# -- talking ---------------------------------------------------------------------------------------


async def test_a_line_is_sent_and_the_reply_printed(sitting: Sitting) -> None:
    await sitting.sit_down()
    sitting.type("Hi")
    assert await sitting.until("[1]") == "[1] you: Hi"
    assert await sitting.until("[2]") == "[2] assistant: The first line."
    assert await sitting.leave() == 0


async def test_the_end_of_input_leaves(sitting: Sitting) -> None:
    await sitting.sit_down()
    sitting.press("\x04")  # Ctrl-D
    assert await sitting.task == 0


async def test_what_is_still_written_stays_on_the_screen(sitting: Sitting) -> None:
    sitting.server.engine.go.clear()
    await sitting.sit_down()
    sitting.type("Hi")
    await sitting.prompt_with("[2] assistant: T")
    assert await sitting.leave() == 0
    assert any(line.startswith("[2] assistant: T") for line in sitting.screen.lines)
    sitting.server.engine.go.set()


async def test_ctrl_c_leaves_with_130(sitting: Sitting) -> None:
    await sitting.sit_down()
    sitting.press("half a word\x03")
    assert await sitting.task == INTERRUPTED


async def test_opening_shows_the_history(sitting: Sitting) -> None:
    first = await sitting.sit_down()
    sitting.type("Hi")
    await sitting.until("[2]")
    await sitting.leave()
    assert (await sitting.sit_down()).id == first.id
    assert await sitting.until("[1]") == "[1] you: Hi"
    assert await sitting.until("[2]") == "[2] assistant: The first line."
    await sitting.leave()


async def test_a_reply_grows_above_the_prompt_while_one_types(sitting: Sitting) -> None:
    sitting.server.engine.go.clear()
    await sitting.sit_down()
    sitting.type("Hi")
    await sitting.until("[1]")
    live, prompt = await sitting.prompt_with("[2] assistant: T")
    assert prompt == "> "
    assert live != "[2] assistant: The first line."
    sitting.type("/help")  # the prompt takes commands meanwhile
    await sitting.until("/help")
    sitting.server.engine.go.set()
    assert await sitting.until("[2]") == "[2] assistant: The first line."
    await sitting.leave()


async def test_other_devices_entries_appear(sitting: Sitting, server: Server) -> None:
    conversation = await sitting.sit_down()
    await conversation.synced_once()
    async with Client(
        server.url, token=server.folder.token.read_text().strip(), device="phone"
    ) as phone:
        other = await phone.open(conversation.id)
        await other.synced_once()
        await other.ask("From the phone")
        assert await sitting.until("[1]") == "[1] owner@phone: From the phone"
        assert await sitting.until("[2]") == "[2] assistant: The first line."
        assert "here too: phone" in sitting.dialogue._bar()
    await sitting.leave()


async def test_what_waits_behind_a_reply_is_shown_below_it(sitting: Sitting) -> None:
    sitting.server.engine.go.clear()
    await sitting.sit_down()
    sitting.type("Hi")
    await sitting.prompt_with("[2] assistant: T")
    sitting.type("And this")
    assert "(waits) [3] you: And this" in await sitting.prompt_with("waits")
    sitting.server.engine.go.set()
    await sitting.until("[2] assistant: The first line.")
    await sitting.until("[3] you: And this")
    await sitting.until("[4] assistant: The second line.")
    await sitting.leave()


# -- without a relay -------------------------------------------------------------------------------


async def test_an_absent_relay_is_told_once_and_what_is_written_is_sent_later(
    tmp_path: Path,
) -> None:
    server = Server(tmp_path, ["The first line."])
    await server.start()  # it takes a port
    await server.stop()
    async with Sitting(server) as sitting:
        await sitting.sit_down()
        assert "will be sent" in await sitting.until("no relay answers")
        sitting.type("Hi")
        assert await sitting.until("[1]") == "[1] you: Hi"
        assert (await sitting.prompt_with("(offline)"))[-1] == "(offline) > "
        assert "offline" in sitting.dialogue._bar()
        await server.start()
        await sitting.until("the relay is back")
        assert await sitting.until("[2]") == "[2] assistant: The first line."
        assert sitting.dialogue._prompt(80) == "> "
        assert not any("no relay answers" in line for line in sitting.screen.lines)
        await sitting.leave()
        await server.stop()


async def test_a_refusal_is_told_and_what_was_written_stays(server: Server) -> None:
    server.folder.token.write_text("another-token")
    async with Sitting(server) as sitting:
        await sitting.sit_down()
        assert "stays here" in await sitting.until("refused")
        sitting.type("Hi")
        await sitting.until("[1] you: Hi")
        await sitting.leave()


# -- commands --------------------------------------------------------------------------------------


async def test_edit_makes_a_branch_and_looks_at_it(sitting: Sitting) -> None:
    await sitting.sit_down()
    sitting.type("Hi")
    await sitting.until("[2]")
    sitting.type("/edit 1 Hello instead")
    await sitting.until("-- from [1] on")
    assert await sitting.until("[1]") == "[1] you: Hello instead"
    assert await sitting.until("[2]") == "[2] assistant: The second line."
    sitting.type("/branches")
    assert "you: Hi" in await sitting.until("  1  ")
    assert "you: Hello instead" in await sitting.until("* 2  ")
    sitting.type("/branches 1")
    await sitting.until("[1] you: Hi")
    await sitting.until("[2] assistant: The first line.")
    sitting.type("/edit last Once more")
    await sitting.until("[1] you: Once more")
    await sitting.until("[2] assistant: The third.")
    await sitting.leave()


async def test_regenerate_keeps_the_question(sitting: Sitting) -> None:
    conversation = await sitting.sit_down()
    sitting.type("Hi")
    await sitting.until("[2] assistant: The first line.")
    sitting.type("/regenerate")
    await sitting.until("[2] assistant: The second line.")
    assert [entry.content for entry in conversation.view()] == ["Hi", "The second line."]
    assert len(conversation.branches()) == 2
    await sitting.leave()


async def test_stop_and_extend(sitting: Sitting) -> None:
    sitting.server.engine.go.clear()
    conversation = await sitting.sit_down()
    sitting.type("Hi")
    await changed(
        conversation, lambda: len(conversation.view()) == 2 and bool(conversation.view()[1].content)
    )
    sitting.type("/stop")
    await sitting.until("(stopped")
    sitting.server.engine.go.set()
    sitting.type("/extend")
    await sitting.until("[3] assistant:")
    assert [entry.born.role for entry in conversation.view()][1:] == [Role.ASSISTANT] * 2
    await sitting.leave()


async def test_history_prints_it_all_again(sitting: Sitting) -> None:
    await sitting.sit_down()
    sitting.type("Hi")
    await sitting.until("[2]")
    sitting.type("/history")
    await sitting.until("[1] you: Hi")
    await sitting.until("[2] assistant: The first line.")
    await sitting.leave()


async def test_new_open_title_and_list(sitting: Sitting) -> None:
    first = await sitting.sit_down()
    sitting.type("Hi")
    await sitting.until("[2]")
    sitting.type("/title Rivers", "/new")
    second = (await sitting.until("-- conversation")).split()[2]
    assert second != first.id
    sitting.type("/list")
    await sitting.until("the list")
    sitting.type(f"/open {first.id}")
    assert "Rivers" in await sitting.until(f"-- conversation {first.id}")
    await sitting.until("[1] you: Hi")
    assert "Rivers" in sitting.dialogue._bar()
    await sitting.leave()


async def test_mistakes_are_told_and_change_nothing(sitting: Sitting) -> None:
    conversation = await sitting.sit_down()
    for line in ("/nonsense", "/edit 1", "/edit 7 x", "/stop", "/extend", "/branches 3"):
        sitting.type(line)
        await sitting.until("  ! ")
    sitting.type("/open " + "A" * 22)
    await sitting.until("has no conversation")
    sitting.type("/open nonsense")
    await sitting.until("  ! ")
    assert conversation.view() == ()
    sitting.type("Hi")
    await sitting.until("[2] assistant: The first line.")
    await sitting.leave()


async def test_every_command_of_the_help_is_carried_out(sitting: Sitting) -> None:
    await sitting.sit_down()
    for name, form in COMMANDS.items():
        if name != "quit":
            sitting.type(" ".join([f"/{name}", *["x"] * form.least]))
    assert await sitting.leave() == 0


async def test_the_first_ctrl_c_stops_the_reply_and_the_second_leaves(sitting: Sitting) -> None:
    sitting.server.engine.go.clear()
    conversation = await sitting.sit_down()
    sitting.type("Hi")
    await changed(
        conversation, lambda: len(conversation.view()) == 2 and bool(conversation.view()[1].content)
    )
    sitting.press("\x03")
    await sitting.until("Ctrl-C once more leaves")
    await sitting.until("(stopped")
    sitting.press("\x03")
    assert await sitting.task == INTERRUPTED


async def test_a_beginning_of_an_id_is_enough_to_open_it(sitting: Sitting) -> None:
    first = await sitting.sit_down()
    sitting.type("Hi")
    await sitting.until("[2]")
    sitting.type("/new")
    await sitting.until("-- conversation")
    sitting.type(f"/open {first.id[:8]}")
    await sitting.until(f"-- conversation {first.id}")
    await sitting.leave()


async def test_a_question_that_a_later_one_took_over_is_marked(sitting: Sitting) -> None:
    conversation = await sitting.sit_down()
    conversation.pause()
    sitting.type("One?", "Two?")
    await sitting.until("[2] you: Two?")
    assert "[1] gets no reply of its own" in await sitting.until("no reply of its own")
    await sitting.leave()


async def test_what_the_relay_refused_is_told_and_can_be_sent_again_or_dropped(
    sitting: Sitting, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(change: Change, conversation: Conversation, **options: Any) -> None:
        rules.check(change, conversation, **options)
        if any(conversation.text(entry) == "Psst" for entry in change.entries):
            raise Refused("content", "not that")

    monkeypatch.setattr(judge, "rules", SimpleNamespace(check=check))
    conversation = await sitting.sit_down()
    sitting.type("Psst")
    assert "(not that): a message Psst" in await sitting.until("! refused")
    await sitting.until("/resend 1 or /discard 1")
    assert conversation.view() == ()
    sitting.type("/refused")
    await sitting.until("1  a message (not that): Psst")
    sitting.type("/discard 1", "/refused")
    await sitting.until("nothing was refused here")
    sitting.type("Psst")
    await sitting.until("/resend 1")
    monkeypatch.undo()
    sitting.type("/resend 1")
    await sitting.until("[2] assistant: The first line.")
    assert [entry.content for entry in conversation.view()] == ["Psst", "The first line."]
    assert conversation.refused_writes == ()
    await sitting.leave()


async def test_sharing_writes_the_right_down(sitting: Sitting) -> None:
    conversation = await sitting.sit_down()
    sitting.type("/share ada writer")
    await sitting.until("ada is writer here")
    assert conversation.members() == {"owner": "owner", "ada": "writer"}
    sitting.type("/share ada nobody")
    await sitting.until("ada is nobody here")
    assert conversation.members() == {"owner": "owner"}
    for line in ("/share ada king", "/leave", "/archive there"):
        sitting.type(line)
        await sitting.until("  ! ")
    await sitting.leave()


async def test_the_node_hears_what_is_typed_but_no_commands(
    sitting: Sitting, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversation = await sitting.sit_down()
    told: asyncio.Queue[str] = asyncio.Queue()
    monkeypatch.setattr(conversation, "draft", told.put_nowait)
    sitting.press("Hi")
    heard = [await told.get()]
    while heard[-1] != "Hi":
        heard.append(await told.get())
    sitting.press("\x7f\x7f/h")
    while heard[-1]:
        heard.append(await told.get())
    assert not any(text.startswith("/") for text in heard)
    sitting.press("\x7f\x7f")
    await sitting.leave()


# -- rows ------------------------------------------------------------------------------------------


def test_rows_are_as_wide_as_the_terminal() -> None:
    assert list(wrap("abcdefg", 3)) == ["abc", "def", "g"]
    assert list(wrap("", 3)) == [""]
    assert list(wrap("水水水", 4)) == ["水水", "水"]


async def test_only_the_last_rows_of_a_long_line_stand_above_the_prompt(sitting: Sitting) -> None:
    sitting.server.engine.go.clear()
    await sitting.sit_down()
    sitting.type("Hi")
    await sitting.prompt_with("[2] assistant: T")
    rows = sitting.dialogue._prompt(2).split("\n")
    *live, prompt = rows
    assert len(live) == 6
    assert all(len(row) <= 2 for row in live)
    assert "[2] assistant: The first line.".find("".join(live)) > 0
    assert prompt == "> "
    sitting.server.engine.go.set()
    await sitting.until("[2] assistant: The first line.")
    await sitting.leave()
