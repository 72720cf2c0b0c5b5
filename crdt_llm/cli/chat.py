"""``crdt-llm chat``: which conversation, and whether a person or a pipe talks.

This module owns the choice of the conversation, the list of them, and the single message that comes
through a pipe. The prompt is :mod:`crdt_llm.cli.dialogue`'s. It never loads a model: it is a client
like any other.
"""

from __future__ import annotations

import asyncio
import json as json_format
import sys
import time
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, BinaryIO, Final, TextIO

from crdt_llm.cli.connection import Standing, door_to, known
from crdt_llm.cli.printable import one_line, printable
from crdt_llm.cli.stored import complete_id, list_stored, load_stored
from crdt_llm.document.schema import TEXT_BYTES_MAX, Role, State
from crdt_llm.errors import (
    Corrupt,
    DataFolderBusy,
    LocalMisuse,
    MalformedMessage,
    ReplyFailed,
    TooLarge,
)
from crdt_llm.sync.client.client import Client
from crdt_llm.sync.client.replica_file import LOG_NAME

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from crdt_llm.cli.connection import Door
    from crdt_llm.cli.folders import DataFolder
    from crdt_llm.document.schema import Entry
    from crdt_llm.sync.client.client import OpenConversation, Reply, Sampling

BEGINNING_CHARACTERS: Final = 50  # of a conversation without a title, in the list
DEVICES_MAX: Final = 9  # terminals side by side; beyond that something keeps them open
PATIENCE_S: Final = 10.0
"""After so long without a first word a pipe's user is told that nobody seems to answer."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What was asked for on the command line.

    ``drafts``: whether the node may read along at the prompt.
    """

    conversation: str | None = None
    new: bool = False
    system: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    seed: int | None = None
    json: bool = False
    drafts: bool = True

    @property
    def sampling(self) -> Sampling:
        """What to ask of the sampler with every reply."""
        asked: Sampling = {}
        if self.max_tokens is not None:
            asked["max_tokens"] = self.max_tokens
        if self.temperature is not None:
            asked["temperature"] = self.temperature
        if self.seed is not None:
            asked["seed"] = self.seed
        return asked


def run_chat(  # noqa: PLR0913 - what the command's options say
    wish: Wish, *, folder: DataFolder, device: str, url: str, token_file: Path | None, list_: bool
) -> int:
    """Talk, send what comes through the pipe, or list.

    Returns:
        The exit code.

    Raises:
        CrdtLlmError: it failed; the message says what to do.
    """
    home = folder.device(device)
    if list_:
        print_list(home / LOG_NAME, json=wish.json)
        return 0
    if wish.new and wish.conversation is not None:
        raise LocalMisuse("--new begins a conversation: leave the id out, or --new")
    if sys.stdin is None:  # as the interpreter says that it was closed
        raise LocalMisuse("standard input is closed: pipe a message in, or run it in a terminal")
    message = None if sys.stdin.isatty() else read_message(sys.stdin.buffer)
    return asyncio.run(
        _chat(wish, message, folder=folder, device=device, url=url, token_file=token_file)
    )


async def _chat(  # noqa: PLR0913 - as above
    wish: Wish,
    message: str | None,
    *,
    folder: DataFolder,
    device: str,
    url: str,
    token_file: Path | None,
) -> int:
    door = door_to(url, token_file or folder.token)
    async with AsyncExitStack() as stack:
        client, home = await _enter(stack, door, folder, device, url)
        served = [stored.conversation for stored in list_stored(folder.log)]
        conversation = await choose(client, door, wish, served)
        if message is not None:
            pipe = Pipe(conversation, door, sys.stdout, sys.stderr, device=client.device)
            return await pipe.send(message, wish)
        from crdt_llm.cli.dialogue import Dialogue  # noqa: PLC0415 - a pipe needs no terminal

        lines = partial(list_lines, home / LOG_NAME)
        dialogue = Dialogue(
            client, door, sampling=wish.sampling, list_lines=lines, drafts=wish.drafts
        )
        return await dialogue.run(conversation)


async def _enter(
    stack: AsyncExitStack, door: Door, folder: DataFolder, device: str, url: str
) -> tuple[Client, Path]:
    """Take a device's folder. If another chat has it open, this is one more device beside it.

    Raises:
        DataFolderBusy: so many chats are open already.
    """
    for number in range(1, DEVICES_MAX + 1):
        name = device if number == 1 else f"{device}-{number}"
        home = folder.device(name)
        client = Client(url, token=door.token, data=home, device=name, dial=door.dial)
        try:
            await stack.enter_async_context(client)
        except DataFolderBusy:
            continue  # another chat has it
        return client, home
    raise DataFolderBusy(
        f"{DEVICES_MAX} chats are open as {device}: close one, or name a device with --device"
    )


async def choose(
    client: Client, door: Door, wish: Wish, served: Sequence[str] = ()
) -> OpenConversation:
    """Open the conversation that was asked for: by its id, a new one, or the last one.

    Args:
        client: this device.
        door: the relay.
        wish: what was asked for.
        served: the conversations of the relay whose data folder this is, last changed first; a
            device that has none yet begins with the first of them.

    Raises:
        LocalMisuse: the id has not the form of one, or begins several.
        CrdtLlmError: it cannot be had.
    """
    ids = await client.conversations()
    if wish.conversation is not None:
        found = complete_id(wish.conversation, ids) or wish.conversation
        conversation = await client.open(found)
        await known(conversation, door)
    elif ids and not wish.new:
        conversation = await client.open(ids[0])
    elif served and not wish.new and wish.system is None:
        conversation = await client.open(served[0])
        await known(conversation, door)
    else:
        conversation = await client.create()
    if wish.system is not None:
        await _begin_with(conversation, wish.system)
    return conversation


async def _begin_with(conversation: OpenConversation, text: str) -> None:
    """Make a new conversation begin with a system entry; asking again for the same is fine."""
    view = conversation.view()
    if not view:
        await conversation.send(text, role="system")
    elif view[0].born.role is not Role.SYSTEM or view[0].content != text:
        raise LocalMisuse("--system is what a new conversation begins with: add --new")


# -- the list --------------------------------------------------------------------------------------


def _listed(path: Path) -> list[dict[str, Any]]:
    facts = []
    for stored in list_stored(path):
        fact: dict[str, Any] = {
            "conversation": stored.conversation,
            "changed_at": stored.changed_at,
            "bytes": stored.log_bytes + stored.snapshot_bytes,
        }
        try:
            replica = load_stored(path, stored.conversation)
        except Corrupt as error:
            fact["damage"] = str(error)
        else:
            view = [entry for name in replica.view() if (entry := replica.entry(name))]
            fact |= {
                "title": replica.meta.title,
                "entries": len(replica.tree),
                "begins": _beginning(view),
            }
        facts.append(fact)
    return facts


def _beginning(view: list[Entry]) -> str:
    """What a conversation is about, as far as one line says it."""
    asked = (entry.content for entry in view if entry.born.role is Role.USER)
    return one_line(next(asked, ""), BEGINNING_CHARACTERS)


def list_lines(path: Path) -> list[str]:
    """This device's conversations, last changed first, one a line."""
    lines = []
    for fact in _listed(path):
        at = time.strftime("%Y-%m-%d %H:%M", time.localtime(fact["changed_at"] / 1000))
        if "damage" in fact:
            lines.append(f"{fact['conversation']}  damaged: {one_line(fact['damage'])}")
        else:
            what = one_line(fact["title"], BEGINNING_CHARACTERS) or fact["begins"]
            lines.append(f"{fact['conversation']}  {at}  {fact['entries']:>4}  {what}".rstrip())
    return lines


def print_list(path: Path, *, json: bool) -> None:
    """Print the list."""
    if json:
        print(json_format.dumps(_listed(path)))  # noqa: T201 - the terminal
        return
    for line in list_lines(path):
        print(line)  # noqa: T201 - as above


# -- a pipe ----------------------------------------------------------------------------------------


def read_message(source: BinaryIO) -> str:
    """The whole of standard input as one message, without the newlines at its end.

    Raises:
        LocalMisuse: there is nothing in it.
        TooLarge: it is longer than an entry may be.
        MalformedMessage: it is no UTF-8 text.
    """
    raw = source.read(TEXT_BYTES_MAX + 1)
    if len(raw) > TEXT_BYTES_MAX:
        raise TooLarge("text", f"standard input is over {TEXT_BYTES_MAX} bytes: send less at once")
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise MalformedMessage(f"standard input is no UTF-8 text ({error.reason})") from error
    text = text.rstrip("\r\n")
    if not text:
        raise LocalMisuse("standard input is empty: pipe a message in, or run it in a terminal")
    return text


class Pipe:
    """One message out, one reply in.

    Args:
        conversation: where.
        door: the way to the relay.
        out: takes the reply.
        notes: takes what people should know meanwhile.
        device: this device's name, which a message that could not be sent is kept under.
    """

    def __init__(
        self,
        conversation: OpenConversation,
        door: Door,
        out: TextIO,
        notes: TextIO,
        *,
        device: str,
    ) -> None:
        self._device = device
        self._conversation = conversation
        self._door = door
        self._out = out
        self._notes = notes

    async def send(self, message: str, wish: Wish) -> int:
        """Send a message, print the reply as it comes.

        Returns:
            0: the reply is whole.

        Raises:
            Unavailable: there is no relay; the message is kept.
            Refused: the relay does not let this conversation in.
            ReplyFailed: the reply failed, was stopped, or will not come.
        """
        reply = await self._conversation.ask(message, **wish.sampling)
        await self._door.reached(
            f"the message is kept on device {self._device}, and sent when `crdt-llm chat"
            f" {self._conversation.id} --device {self._device}` finds one; start one with"
            " `crdt-llm serve`"
        )
        telling = asyncio.create_task(self._tell(reply), name="notes")
        try:
            if wish.json:
                await reply.entry()
            else:
                await self._print(reply)
            entry = await reply.entry()
        finally:
            telling.cancel()
            with suppress(asyncio.CancelledError):
                await telling
        if wish.json:
            self._out.write(json_format.dumps(self._facts(entry)) + "\n")
        check_done(entry)
        return 0

    async def _print(self, reply: Reply) -> None:
        """Pass the text on as it comes; it ends with a newline, whatever happens."""
        plain = printable if self._out.isatty() else str
        end = ""
        try:
            async for delta in reply:
                self._out.write(plain(delta))
                self._out.flush()
                end = "" if delta.endswith("\n") else "\n"
        finally:
            self._out.write(end)
            self._out.flush()

    async def _tell(self, reply: Reply) -> None:
        """Say once that nobody answers, and once that the relay went."""
        waiting = asyncio.create_task(self._lost(), name="loss")
        try:
            await asyncio.wait({waiting}, timeout=PATIENCE_S)
            if not waiting.done() and self._conversation.entry(reply.id).state is None:
                self._note("no reply yet: does a node run there? Still waiting; Ctrl-C leaves")
            await waiting
        finally:
            waiting.cancel()
        self._note("the relay went away; the reply goes on when it is back. Ctrl-C leaves")

    async def _lost(self) -> None:
        while self._door.standing(self._conversation) is not Standing.AWAY:
            await self._door.news()

    def _note(self, line: str) -> None:
        self._notes.write(f"crdt-llm: {line}\n")
        self._notes.flush()

    def _facts(self, entry: Entry) -> dict[str, Any]:
        return {
            "conversation": self._conversation.id,
            "entry": entry.id,
            "state": None if entry.state is None else entry.state.value,
            "text": entry.content,
            "usage": None if entry.usage is None else entry.usage.plain(),
        }


def check_done(entry: Entry) -> None:
    """Raise unless a reply is whole.

    Raises:
        ReplyFailed: it is not, and why.
    """
    usage = entry.usage
    match entry.state:
        case State.DONE if not entry.redacted:
            return
        case State.FAILED:
            code = usage.error_code if usage is not None else None
            said = usage.error_message if usage is not None else None
            raise ReplyFailed(code or "failed", f"the reply failed: {said or 'no reason given'}")
        case State.STOPPED:
            raise ReplyFailed("stopped", "the reply was stopped; what there is was printed")
    raise ReplyFailed("no-reply", "there will be no reply: the request was taken over or withdrawn")
