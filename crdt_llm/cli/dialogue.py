"""The interactive chat: a prompt that stays usable while the conversation grows above it.

This module owns the loop at the prompt: what a line does, what is printed when, and what the prompt
and the bar below it say. It must not know sockets or files: it drives an open client, and lays out
with :mod:`crdt_llm.cli.scroll`.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from itertools import pairwise
from typing import TYPE_CHECKING, Final

from prompt_toolkit import PromptSession
from prompt_toolkit.application import run_in_terminal
from prompt_toolkit.patch_stdout import patch_stdout
from prompt_toolkit.utils import get_cwidth

from crdt_llm.cli import commands
from crdt_llm.cli.commands import Do, Say
from crdt_llm.cli.connection import Standing, known
from crdt_llm.cli.printable import one_line
from crdt_llm.cli.scroll import Scroll
from crdt_llm.cli.stored import complete_id
from crdt_llm.document.schema import TEXT_BYTES_MAX, Role, State
from crdt_llm.errors import CrdtLlmError, LocalMisuse

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence

    from prompt_toolkit.input import Input
    from prompt_toolkit.output import Output

    from crdt_llm.cli.connection import Door
    from crdt_llm.document.schema import Entry
    from crdt_llm.sync.client.changes import Changed
    from crdt_llm.sync.client.client import Client, OpenConversation, Sampling
    from crdt_llm.sync.client.journal import RefusedWrite

LIVE_ROWS_MAX: Final = 6  # of what is still written, above the prompt; the rest follows on paper
DEVICES_NAMED_MAX: Final = 3  # in the bar
BEGINNING_CHARACTERS: Final = 60  # of an entry that stands for a branch

INTERRUPTED: Final = 130  # 128 + SIGINT, as shells say it


class Interrupted(Exception):  # noqa: N818 - a key, not an error
    """Ctrl-C at the prompt. Not a ``KeyboardInterrupt``, which would tear the event loop down."""


class Terminal:
    """A prompt at the bottom, and paper above it.

    Args:
        prompt: what stands before the cursor, asked anew with every redraw.
        bar: what stands below it.
        typed: told of the line each time it changes.
        source: where keys come from; ``None`` is the process's own.
        target: where the screen is; ``None`` is the process's own.
    """

    def __init__(
        self,
        prompt: Callable[[int], str],
        bar: Callable[[], str],
        *,
        typed: Callable[[str], None] | None = None,
        source: Input | None = None,
        target: Output | None = None,
    ) -> None:
        self._session: PromptSession[str] = PromptSession(
            message=lambda: prompt(self._columns()),
            bottom_toolbar=bar,
            erase_when_done=True,  # the entry itself is printed, when it is in the conversation
            interrupt_exception=Interrupted,
            input=source,
            output=target,
        )
        if typed is not None:
            self._session.default_buffer.on_text_changed += lambda buffer: typed(buffer.text)

    def _columns(self) -> int:
        return self._session.output.get_size().columns

    async def ask(self) -> str | None:
        """The next line; ``None`` when there will be none.

        Raises:
            Interrupted: by Ctrl-C.
        """
        try:
            return await self._session.prompt_async()
        except EOFError:
            return None  # Ctrl-D: nothing more will be typed

    async def show(self, lines: Sequence[str]) -> None:
        """Print lines above the prompt."""
        if not lines:
            return
        output = self._session.output

        def write() -> None:
            output.write("\n".join(lines) + "\n")
            output.flush()

        await run_in_terminal(write)

    def refresh(self) -> None:
        """Draw the prompt and the bar anew."""
        self._session.app.invalidate()


def wrap(text: str, columns: int) -> Iterator[str]:
    """Rows of at most so many columns; wide characters take two."""
    row, width = "", 0
    for character in text.expandtabs(4):
        size = get_cwidth(character)
        if width + size > max(columns, 2) and row:
            yield row
            row, width = "", 0
        row, width = row + character, width + size
    yield row


class Dialogue:
    """One sitting at the prompt.

    Args:
        client: this device.
        door: the way to the relay.
        sampling: asked for with every reply.
        list_lines: this device's conversations, for people.
        drafts: whether the node may read what is being typed.
        source: where keys come from.
        target: where the screen is.
    """

    def __init__(  # noqa: PLR0913 - everything outside is an argument
        self,
        client: Client,
        door: Door,
        *,
        sampling: Sampling,
        list_lines: Callable[[], list[str]],
        drafts: bool = True,
        source: Input | None = None,
        target: Output | None = None,
    ) -> None:
        self._client = client
        self._door = door
        self._sampling = sampling
        self._list_lines = list_lines
        self._terminal = Terminal(
            self._prompt,
            self._bar,
            typed=self._typed if drafts else None,
            source=source,
            target=target,
        )
        self._told_refused: set[int] = set()
        self._told_superseded: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._scroll = Scroll(client.principal, client.device)
        self._entries: dict[str, Entry] = {}
        self._standing = Standing.CONNECTING
        self._conversation: OpenConversation | None = None
        self._watching: asyncio.Task[None] | None = None

    @property
    def _open(self) -> OpenConversation:
        if self._conversation is None:
            raise LocalMisuse("no conversation is open at this prompt")
        return self._conversation

    # -- the loop ------------------------------------------------------------------------------

    async def run(self, conversation: OpenConversation) -> int:
        """Talk until the end of input.

        Returns:
            The exit code.

        Raises:
            CrdtLlmError: the conversation cannot be had.
        """
        with patch_stdout():  # logs and warnings do not write across the prompt
            await known(conversation, self._door)
            await self._enter(conversation)
            try:
                return await self._loop()
            finally:
                await self._leave()

    async def _loop(self) -> int:
        while True:
            try:
                line = await self._next_line()
            except Interrupted:
                if not await self._stop_what_runs():
                    return INTERRUPTED
                continue
            try:
                wish = Do("quit") if line is None else commands.parse(line)
                if wish == Do("quit"):
                    # The prompt goes, and with it what stood above it.
                    await self._terminal.show(self._scroll.live)
                    return 0
                await self._obey(wish)
            except CrdtLlmError as error:
                await self._terminal.show([f"  ! {one_line(str(error))}"])

    async def _stop_what_runs(self) -> bool:
        """The first Ctrl-C ends the reply that is being written; whether there was one."""
        try:
            if await self._open.stop() is None:
                return False
        except CrdtLlmError as error:
            await self._terminal.show([f"  ! {one_line(str(error))}"])
            return False
        await self._terminal.show(["-- stopping the reply; Ctrl-C once more leaves --"])
        return True

    def _typed(self, line: str) -> None:
        """Let the node read along; a command is none of its business."""
        if self._conversation is not None:
            is_message = not line.startswith("/") and len(line.encode()) <= TEXT_BYTES_MAX
            self._conversation.draft(line if is_message else "")

    async def _next_line(self) -> str | None:
        asking = asyncio.create_task(self._terminal.ask(), name="prompt")
        watching = self._watching
        sides: set[asyncio.Task[object]] = {asking} if watching is None else {asking, watching}
        try:
            await asyncio.wait(sides, return_when=asyncio.FIRST_COMPLETED)
            if not asking.done() and watching is not None:
                watching.result()  # it never ends but by raising: nobody would see what happens
            return await asking
        finally:
            asking.cancel()

    async def _enter(self, conversation: OpenConversation) -> None:
        self._conversation = conversation
        self._scroll.clear()
        self._entries.clear()
        self._told_refused.clear()
        self._told_superseded.clear()
        title = one_line(conversation.title, BEGINNING_CHARACTERS)
        name = f"{conversation.id} {title}".rstrip()
        await self._terminal.show([f"-- conversation {name} (/help lists the commands) --"])
        await self._catch_up(None)
        self._watching = asyncio.create_task(self._watch(conversation), name="screen")

    async def _leave(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
            with suppress(asyncio.CancelledError):
                await self._watching
            self._watching = None
        for task in self._tasks:
            task.cancel()

    # -- seeing --------------------------------------------------------------------------------

    async def _watch(self, conversation: OpenConversation) -> None:
        feed = conversation.changes()
        await self._catch_up(None)  # what happened before the feed was opened
        async with asyncio.TaskGroup() as both:
            both.create_task(self._watch_door())
            async for changed in feed:
                await self._catch_up(changed)

    async def _watch_door(self) -> None:
        while True:
            await self._door.news()
            await self._tell_standing()

    async def _catch_up(self, changed: Changed | None) -> None:
        """Print what is new. ``changed`` says which entries have to be read again."""
        await self._tell_standing()
        for name in tuple(self._entries):
            if changed is None or changed.touches(name):
                del self._entries[name]
        await self._terminal.show(self._scroll.advance(self._view()))
        await self._tell_superseded()
        await self._tell_refused()
        self._terminal.refresh()

    async def _tell_superseded(self) -> None:
        """Mark each question that a later one took over: it gets no reply of its own."""
        view = self._view()
        for number, (entry, behind) in enumerate(pairwise(view), start=1):
            if entry.is_slot or behind.is_slot or entry.id in self._told_superseded:
                continue
            if self._has_superseded_request(entry.id):
                self._told_superseded.add(entry.id)
                await self._terminal.show(
                    [f"    ([{number}] gets no reply of its own: a later message took over)"]
                )

    def _has_superseded_request(self, entry: str) -> bool:
        document = self._open.document
        return any(
            slot in document.tree.superseded or document.state(slot) is State.SUPERSEDED
            for slot in document.tree.children(entry)
        )

    async def _tell_refused(self) -> None:
        """Say once of each refused write that it was refused, and how to keep its text."""
        for number, refused in enumerate(self._open.refused_writes, start=1):
            if refused.id in self._told_refused:
                continue
            self._told_refused.add(refused.id)
            said = one_line(refused.text, BEGINNING_CHARACTERS)
            await self._terminal.show(
                [
                    f"  ! refused ({one_line(refused.reason)}): {refused.what} {said}".rstrip(),
                    f"    it is kept on this device: /resend {number} or /discard {number}",
                ]
            )

    def _view(self) -> list[Entry]:
        conversation = self._open
        for name in conversation.path():
            if name not in self._entries:
                self._entries[name] = conversation.entry(name)
        return [self._entries[name] for name in conversation.path()]

    async def _tell_standing(self) -> None:
        """Say once that the relay went, or came back."""
        before, self._standing = self._standing, self._door.standing(self._open)
        self._terminal.refresh()
        if self._standing is before:
            return
        match self._standing:
            case Standing.AWAY:
                note = (
                    f"no relay answers at {self._door.url}: what you write is kept, and will be"
                    " sent when it is back"
                )
            case Standing.REFUSED:
                note = f"refused: {one_line(str(self._open.refused))}; what you write stays here"
            case Standing.ONLINE if before is Standing.AWAY:
                note = "the relay is back"
            case _:
                return
        await self._terminal.show([f"-- {note} --"])

    # -- the prompt ----------------------------------------------------------------------------

    def _prompt(self, columns: int) -> str:
        rows = [row for line in self._scroll.live for row in wrap(line, columns)]
        offline = "(offline) " if self._standing in (Standing.AWAY, Standing.REFUSED) else ""
        return "\n".join((*rows[-LIVE_ROWS_MAX:], f"{offline}> "))

    def _bar(self) -> str:
        conversation = self._open
        name = one_line(conversation.title, BEGINNING_CHARACTERS) or conversation.id
        parts = [name, self._standing.value]
        if self._standing is Standing.AWAY:
            parts.append("what you write will be sent when the relay is back")
        if devices := conversation.devices:
            named = ", ".join(one_line(device, 20) for device in devices[:DEVICES_NAMED_MAX])
            more = len(devices) - DEVICES_NAMED_MAX
            parts.append(f"here too: {named}{f' and {more} more' if more > 0 else ''}")
        return " · ".join(parts)

    # -- doing ---------------------------------------------------------------------------------

    async def _obey(self, wish: Say | Do | None) -> None:
        match wish:
            case None:
                return
            case Say(text):
                self._open.draft("")
                await self._open.ask(text, **self._sampling)
            case Do(name, words):
                actions: dict[str, Callable[..., Awaitable[None]]] = {
                    "edit": self._edit,
                    "regenerate": self._regenerate,
                    "extend": self._extend,
                    "stop": self._stop,
                    "branches": self._branches,
                    "history": self._history,
                    "title": self._title,
                    "share": self._share,
                    "archive": self._archive,
                    "leave": self._leave_it,
                    "refused": self._refused,
                    "resend": self._resend,
                    "discard": self._discard,
                    "list": self._list,
                    "open": self._go_to,
                    "new": self._begin,
                    "help": self._help,
                }
                await actions[name](*words)

    async def _edit(self, which: str, text: str) -> None:
        await self._open.fork(self._numbered(which), text, **self._sampling)

    def _numbered(self, which: str) -> str:
        view = self._view()
        if which == "last":
            asked = [entry for entry in view if entry.born.role is Role.USER]
            if asked:
                return asked[-1].id
        elif which.isdecimal() and 0 < int(which) <= len(view):
            return view[int(which) - 1].id
        raise LocalMisuse(f"there is no entry {which} here to edit: take a number in brackets")

    async def _regenerate(self) -> None:
        await self._open.regenerate(**self._sampling)

    async def _extend(self) -> None:
        await self._open.extend(**self._sampling)

    async def _stop(self) -> None:
        if await self._open.stop() is None:
            raise LocalMisuse("no reply is being written here")

    async def _branches(self, which: str | None = None) -> None:
        branches = self._open.branches()
        if which is None:
            lines = [
                f"  {'*' if branch.shown else ' '} {number}  {self._beginning(branch.tip)}"
                for number, branch in enumerate(branches, start=1)
            ]
            await self._terminal.show(lines or ["  nothing is here yet"])
        elif which.isdecimal() and 0 < int(which) <= len(branches):
            self._open.look(branches[int(which) - 1].tip)
        else:
            raise LocalMisuse(f"there is no branch {which}: /branches lists them")

    def _beginning(self, tip: str) -> str:
        """What tells a branch from the others: where it leaves them, and how it goes on there."""
        document = self._open.document
        path = document.tree.path(tip)
        line = document.tree.line(tip)
        first = line if line in path else path[0]
        number = path.index(first) + 1
        entry = self._open.entry(first)
        text = one_line(entry.content, BEGINNING_CHARACTERS)
        return f"{len(path)} entries, from [{number}] {self._scroll.name_of(entry)}: {text}"

    async def _history(self) -> None:
        self._scroll.clear()
        self._told_superseded.clear()
        await self._catch_up(None)

    async def _title(self, text: str) -> None:
        await self._open.rename(text)

    async def _share(self, name: str, role: str) -> None:
        await self._open.share(name, None if role == "nobody" else role)
        await self._terminal.show([f"-- {one_line(name)} is {role} here --"])

    async def _archive(self, back: str = "") -> None:
        if back not in {"", "back"}:
            raise LocalMisuse("write /archive, or /archive back")
        # The relay keeps it: the prompt does not wait for that.
        self._spawn(self._archived(self._open, archived=not back))

    async def _archived(self, conversation: OpenConversation, *, archived: bool) -> None:
        try:
            await conversation.archive(archived=archived)
        except CrdtLlmError as error:
            await self._terminal.show([f"  ! {one_line(str(error))}"])
            return
        done = "put away in your list" if archived else "back in your list"
        await self._terminal.show([f"-- {conversation.id} is {done} --"])

    def _spawn(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.create_task(work, name="request")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _leave_it(self) -> None:
        await self._open.leave()
        await self._terminal.show(
            ["-- you gave up your right here; what is on this device stays --"]
        )

    async def _refused(self) -> None:
        lines = [
            f"  {number}  {refused.what} ({one_line(refused.reason)}): {one_line(refused.text)}"
            for number, refused in enumerate(self._open.refused_writes, start=1)
        ]
        await self._terminal.show(lines or ["  nothing was refused here"])

    def _refused_number(self, which: str) -> RefusedWrite:
        refused = self._open.refused_writes
        if which.isdecimal() and 0 < int(which) <= len(refused):
            return refused[int(which) - 1]
        raise LocalMisuse(f"there is no refused message {which}: /refused lists them")

    async def _resend(self, which: str) -> None:
        await self._open.resend(self._refused_number(which))

    async def _discard(self, which: str) -> None:
        await self._open.discard(self._refused_number(which))

    async def _list(self) -> None:
        await self._terminal.show(self._list_lines() or ["  no conversations are here yet"])

    async def _go_to(self, beginning: str) -> None:
        ids = await self._client.conversations()
        found = complete_id(beginning, ids) or beginning
        if found == self._open.id:
            return
        conversation = await self._client.open(found)
        try:
            await known(conversation, self._door)
        except CrdtLlmError:
            await conversation.close()
            raise
        await self._change_to(conversation)

    async def _begin(self) -> None:
        await self._change_to(await self._client.create())

    async def _change_to(self, conversation: OpenConversation) -> None:
        before = self._open
        await self._leave()
        await self._enter(conversation)
        await before.close()

    async def _help(self) -> None:
        await self._terminal.show(commands.help_lines())
