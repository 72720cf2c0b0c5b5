"""What a line typed at the prompt asks for.

This module owns the commands' names and arguments. It is pure; :mod:`crdt_llm.cli.dialogue` carries
them out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from crdt_llm.errors import LocalMisuse


@dataclass(frozen=True, slots=True)
class Say:
    """Send a message and ask for a reply."""

    text: str


@dataclass(frozen=True, slots=True)
class Do:
    """A command.

    Attributes:
        name: one of :data:`COMMANDS`.
        words: its arguments; the last one may hold spaces.
    """

    name: str
    words: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Form:
    """How a command is written.

    Attributes:
        arguments: for people.
        least: how many there must be.
        most: how many there may be; the last one takes the rest of the line.
        does: for people.
    """

    arguments: str
    least: int
    most: int
    does: str


COMMANDS: Final[dict[str, Form]] = {
    "edit": Form("N|last TEXT", 2, 2, "say something else in the place of entry N; a new branch"),
    "regenerate": Form("", 0, 0, "another reply in the place of the last one; a new branch"),
    "extend": Form("", 0, 0, "go on where the last reply was cut off"),
    "stop": Form("", 0, 0, "end the reply that is being written"),
    "branches": Form("[K]", 0, 1, "list the branches, or look at branch K on this device"),
    "history": Form("", 0, 0, "print the conversation again"),
    "title": Form("TEXT", 1, 1, "name the conversation"),
    "share": Form("NAME owner|writer|reader|nobody", 2, 2, "say what somebody may do here"),
    "archive": Form("[back]", 0, 1, "put the conversation away in your list, or take it back"),
    "leave": Form("", 0, 0, "give up your right in a conversation that somebody else made"),
    "refused": Form("", 0, 0, "list what the relay refused"),
    "resend": Form("K", 1, 1, "send refused message K once more"),
    "discard": Form("K", 1, 1, "forget refused message K"),
    "list": Form("", 0, 0, "list this device's conversations"),
    "open": Form("ID", 1, 1, "go to another conversation; the beginning of its id is enough"),
    "new": Form("", 0, 0, "begin a conversation"),
    "help": Form("", 0, 0, "this list"),
    "quit": Form("", 0, 0, "leave (so does Ctrl-D)"),
}


def parse(line: str) -> Say | Do | None:
    """Read a line; ``None`` if there is nothing in it.

    A message that begins with a slash is typed with two of them.

    Raises:
        LocalMisuse: there is no such command, or it is written otherwise.
    """
    text = line.strip()
    if not text:
        return None
    if not text.startswith("/"):
        return Say(text)
    if text.startswith("//"):
        return Say(text[1:])
    name, _, rest = text[1:].partition(" ")
    form = COMMANDS.get(name)
    if form is None:
        raise LocalMisuse(f"there is no command /{name}; /help lists them, //{name} sends it")
    words = tuple(rest.split(maxsplit=max(form.most - 1, 0))) if form.most else (rest,)
    words = tuple(word.strip() for word in words if word.strip())
    if not form.least <= len(words) <= form.most:
        raise LocalMisuse(f"write it like this: {usage(name)}")
    return Do(name, words)


def usage(name: str) -> str:
    """How a command is written."""
    return f"/{name} {COMMANDS[name].arguments}".rstrip()


def help_lines() -> list[str]:
    """The commands, one a line."""
    width = max(len(usage(name)) for name in COMMANDS)
    return [f"  {usage(name):<{width}}  {form.does}" for name, form in COMMANDS.items()]
