"""A conversation on paper: which lines to print below the ones that were printed.

This module owns the layout of a conversation on a terminal that only grows downwards, while entries
stream, arrive from other devices, or turn out to stand elsewhere after a merge. It is pure: entries
in, lines out. It must not know terminals, prompts or connections.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from crdt_llm.cli.printable import one_line, printable
from crdt_llm.document.schema import Role, State

if TYPE_CHECKING:
    from collections.abc import Sequence

    from crdt_llm.document.schema import Entry

NAME_CHARACTERS_MAX: Final = 40  # a name stands before every entry; it must not push the text away
WAITING_MAX: Final = 5  # entries below a streaming one that are shown with one line each


@dataclass(frozen=True, slots=True)
class _Printed:
    """What was printed of an entry."""

    entry: str
    text: str  # header and text as they stood
    lines: int  # of it, that are on paper
    closed: bool  # its end is, too


class Scroll:
    """What is on paper, and what comes next.

    Args:
        principal: who "you" are...
        device: ...and on which device.
    """

    def __init__(self, principal: str, device: str) -> None:
        self._you = (principal, device)
        self._printed: list[_Printed] = []
        self._live: tuple[str, ...] = ()

    @property
    def live(self) -> tuple[str, ...]:
        """What is not final yet, to be shown below the paper and replaced with each change."""
        return self._live

    def clear(self) -> None:
        """Begin on a new page."""
        self._printed.clear()
        self._live = ()

    def advance(self, entries: Sequence[Entry]) -> list[str]:
        """Take the view as it is now; give the lines to print.

        An entry is printed to its last complete line; while it is still written, nothing behind it
        is printed. If something on paper is not so any more, the view is printed anew from there.
        """
        same = self._common(entries)
        lines = self._correction(same, len(entries))
        del self._printed[same:]
        number = same
        if self._printed and not self._printed[-1].closed:
            number -= 1
        self._live = ()
        while number < len(entries):
            lines += self._print(number, entries[number])
            if not self._printed[-1].closed:
                self._live = self._unfinished(number, entries)
                break
            number += 1
        return lines

    def _common(self, entries: Sequence[Entry]) -> int:
        """How many printed entries still stand as they were printed."""
        for number, printed in enumerate(self._printed):
            if number >= len(entries) or entries[number].id != printed.entry:
                return number
            text = self._text(number, entries[number])
            if text != printed.text and (printed.closed or not text.startswith(printed.text)):
                return number
        return len(self._printed)

    def _correction(self, same: int, entries: int) -> list[str]:
        """What to say before some of what is on paper is printed anew, or is gone."""
        if not any(printed.lines for printed in self._printed[same:]):
            return []
        if same < entries:
            return [f"-- from [{same + 1}] on the conversation reads: --"]
        return [
            f"-- the conversation ends with [{same}] now --" if same else "-- it is empty now --"
        ]

    def _print(self, number: int, entry: Entry) -> list[str]:
        text, closed = self._text(number, entry), is_final(entry)
        rows = text.split("\n")
        complete = rows if closed else rows[:-1]
        done = 0
        if len(self._printed) > number:
            done = self._printed.pop().lines
        self._printed.append(_Printed(entry.id, text, len(complete), closed))
        ending = [_ending(entry)] if closed and _ending(entry) else []
        return complete[done:] + ending

    def _unfinished(self, number: int, entries: Sequence[Entry]) -> tuple[str, ...]:
        growing = self._text(number, entries[number]).split("\n")[-1]
        behind = [
            f"(waits) {one_line(self._text(later, entries[later]))}"
            for later in range(number + 1, len(entries))
        ]
        more = len(behind) - WAITING_MAX
        rest = (f"(and {more} more)",) if more > 0 else ()
        return (growing, *behind[:WAITING_MAX], *rest)

    def _text(self, number: int, entry: Entry) -> str:
        text = "(withdrawn)" if entry.redacted else printable(entry.content)
        return f"[{number + 1}] {self.name_of(entry)}: {text}"

    def name_of(self, entry: Entry) -> str:
        """Who says an entry, for people."""
        born = entry.born
        if born.role is not Role.USER:
            return born.role.value
        if (born.author, born.device) == self._you:
            return "you"
        where = f"@{born.device}" if born.device else ""
        return one_line(f"{born.author}{where}", NAME_CHARACTERS_MAX)


def is_final(entry: Entry) -> bool:
    """Whether an entry's text will not grow any more."""
    return entry.ended or entry.redacted


def _ending(entry: Entry) -> str:
    """What to say below an entry that did not end by itself."""
    usage = entry.usage
    if entry.redacted or not entry.is_slot:
        return ""
    if entry.state is State.STOPPED:
        return "    (stopped; /extend goes on)"
    if entry.state is State.FAILED:
        said = usage.error_message if usage is not None else None
        return f"    (failed: {one_line(said or 'the node could not finish this reply')})"
    if usage is not None and usage.finish == "length":
        return f"    (cut after {usage.sampled} tokens; /extend goes on)"
    return ""
