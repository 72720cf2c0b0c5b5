"""A second writing of the view's rules, straight from their prose, slow and recursive.

It shares nothing with :mod:`crdt_llm.document.tree` but the form of its input, and keeps nothing
between questions: every answer walks the facts again. The tests compare the two.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from crdt_llm.document.tree import Facts

ROOT = ""


class NaiveView:
    """The rules, one method for each notion of the prose."""

    def __init__(self, facts: Iterable[Facts]) -> None:
        self.facts = {one.id: one for one in facts}
        self.superseded: set[str] = set()
        while True:  # who is superseded decides on the bases, and the other way round
            again = {entry for entry in self.facts if self._is_taken_over(entry)}
            if again == self.superseded:
                break
            self.superseded = again

    def rank(self, entry: str) -> tuple[int, str]:
        return self.facts[entry].clock, entry

    def is_admitted(self, entry: str) -> bool:
        """A place counts only if its parents lead to the root."""
        seen = set()
        while entry != ROOT:
            if entry in seen or entry not in self.facts:
                return False
            seen.add(entry)
            parent = self.facts[entry].parent
            if parent is None:
                return False
            entry = parent
        return True

    def after(self, entry: str) -> str:
        """`after` counts only if it names a present entry with a smaller clock."""
        named = self.facts[entry].after
        present = named in self.facts and self.facts[named].clock < self.facts[entry].clock
        return named if present else ROOT

    def _ended_unplaced(self, entry: str) -> bool:
        if self.is_admitted(entry):
            return False
        one = self.facts[entry]
        return one.ended or one.parent is not None

    def _is_taken_over(self, entry: str) -> bool:
        """A `continue` slot followed by another pending slot of its line."""
        one = self.facts[entry]
        if self.is_admitted(entry) or self._ended_unplaced(entry) or not one.slot or one.fork:
            return False
        return any(
            other.slot
            and not self.is_admitted(other.id)
            and not self._ended_unplaced(other.id)
            and self.rank(other.id) > self.rank(entry)
            and self.line(other.id) == self.line(entry)
            for other in self.facts.values()
        )

    def is_end(self, entry: str) -> bool:
        """Whether it is an unplaced end."""
        return entry in self.facts and (self._ended_unplaced(entry) or entry in self.superseded)

    def is_pending(self, entry: str) -> bool:
        return not self.is_admitted(entry) and not self.is_end(entry)

    def base(self, entry: str) -> str:
        """Follow `after` past unplaced ends."""
        after = self.after(entry)
        return self.base(after) if self.is_end(after) else after

    def continuing(self, parent: str) -> str | None:
        """Of several admitted `continue` children the smallest (epoch, id)."""
        children = [
            (one.epoch, one.id)
            for one in self.facts.values()
            if one.parent == parent and not one.fork and self.is_admitted(one.id)
        ]
        return min(children)[1] if children else None

    def line(self, entry: str) -> str:
        if entry == ROOT or entry not in self.facts:
            return ROOT
        one = self.facts[entry]
        if self.is_admitted(entry):
            assert one.parent is not None
            return self.line(one.parent) if self.continuing(one.parent) == entry else entry
        if self.is_pending(entry) and one.fork:
            return entry
        return self.line(self.base(entry))

    def tip(self, line: str) -> str:
        """Follow an admitted line to its end."""
        following = self.continuing(line)
        return line if following is None else self.tip(following)

    def queue(self, line: str) -> list[str]:
        """The pending entries of a line by (clock, id)."""
        waiting = [one for one in self.facts if self.is_pending(one) and self.line(one) == line]
        return sorted(waiting, key=self.rank)

    def up(self, entry: str) -> str:
        one = self.facts[entry]
        if self.is_admitted(entry):
            assert one.parent is not None
            return one.parent
        if self.is_end(entry) or one.fork:
            return self.base(entry)
        line = self.line(entry)
        earlier = [other for other in self.queue(line) if self.rank(other) < self.rank(entry)]
        return earlier[-1] if earlier else self.tip(line)

    def path(self, entry: str) -> tuple[str, ...]:
        return () if entry == ROOT else (*self.path(self.up(entry)), entry)

    def last(self, entry: str) -> str:
        line = self.line(entry)
        waiting = self.queue(line)
        return waiting[-1] if waiting else self.tip(line)

    def view(self, head: str) -> tuple[str, ...]:
        return self.path(self.last(head))

    def pending(self) -> tuple[str, ...]:
        return tuple(sorted(filter(self.is_pending, self.facts), key=self.rank))

    def clock(self) -> int:
        return max((one.clock for one in self.facts.values()), default=0)
