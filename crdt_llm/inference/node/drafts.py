"""What people are typing, and what an engine has read of it: never stored, never logged.

This module owns the texts of the drafts of one conversation, which part of a text can be read while
it is still being typed, and the arithmetic of a scratch branch: what of it an admission takes over
and what is to be forgotten. It must not know engines or documents; when a draft is read is
:mod:`crdt_llm.inference.node.ahead`'s business.

A draft is a *scratch branch* behind the tip of its line::

    [ path to the tip )[ the draft's ids )
    0              base      first ... done ... tried

``[first, done)`` was computed for the draft and for nothing else, and ``[done, tried)`` may have
been, by an engine that was interrupted.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from crdt_llm.inference.node.fed import Drop

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

SOURCES_MAX: Final = 4
"""Drafts of one conversation that are kept: more people do not type at the same time, and each may
hold a branch of KV. The one that was touched last stays longest."""

TEXT_BYTES_MAX: Final = 1 << 16
"""Of a draft that is kept: more than most models can read. What is typed beyond it is read when it
is sent."""

WORD_CHARACTERS_MAX: Final = 24
"""Where there was no space for so long there may never be one: the language writes none."""

HELD_CHARACTERS: Final = 8
"""What is then held back instead of a word: tokens of such languages are shorter."""


def settled(text: str) -> int:
    """How many characters of a text do not change any more while somebody types at its end.

    The last word is not finished, and a space becomes part of the word that follows it. Where a
    language writes no spaces some characters are held back instead.
    """
    finished = text.rstrip()
    if len(finished) == len(text):
        words = max(finished.rfind(space) for space in (" ", "\n", "\t"))
        finished = finished[: words + 1].rstrip()
    if len(text) - len(finished) > WORD_CHARACTERS_MAX:
        return len(text) - HELD_CHARACTERS
    return len(finished)


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """How many ids two sequences share from their start."""
    pairs = enumerate(zip(left, right, strict=False))
    shorter = min(len(left), len(right))
    return next((index for index, (one, other) in pairs if one != other), shorter)


@dataclass(slots=True)
class Scratch:
    """A branch that an engine reads ahead of a draft; see the module's picture.

    Attributes:
        tip: the entry that it stands behind.
        base: tokens of the path to ``tip``.
        ids: the path and what of the draft is to be read.
        done: tokens of which an engine said that it has them.
        tried: tokens that an engine was asked for.
        first: the first token that was computed for the draft; ``None`` before any was.
        blind: whether an engine was asked before, and interrupted before it could answer.
    """

    tip: str
    base: int
    ids: tuple[int, ...] = field(repr=False)
    done: int = 0
    tried: int = 0
    first: int | None = None
    blind: bool = False

    def ask(self, tokens: int) -> tuple[int, ...]:
        """The ids that an engine is asked for next: so many more than it has."""
        self.blind = self.blind or (self.first is None and self.tried > self.base)
        self.tried = min(max(self.done, self.base) + tokens, len(self.ids))
        return self.ids[: self.tried]

    def note(self, reused: int, prompt: int) -> None:
        """An engine has the first ``prompt`` tokens, and had ``reused`` before it was asked."""
        if self.first is None:
            self.first = self.base if self.blind else max(reused, self.base)
        self.done = max(self.done, prompt)

    def computed(self, upto: int) -> int:
        """How many of the first ``upto`` tokens were computed for the draft."""
        return 0 if self.first is None else max(0, min(upto, self.done) - self.first)

    def cut(self, keep: int) -> Drop | None:
        """What an engine has to forget so that only the first ``keep`` tokens stay."""
        keep = max(keep, self.base)
        return Drop(self.ids[: self.tried], keep) if self.tried > keep else None


@dataclass(slots=True)
class _Draft:
    after: str = ""
    text: bytes = field(default=b"", repr=False)
    typed: bool = False  # since it was last read
    ended: bool = False
    scratch: Scratch | None = None


@dataclass(slots=True)
class Tally:
    """Tokens that drafts had computed, over the life of a node.

    Where two people type the same at the same time, what is dropped of both may count twice.

    Attributes:
        adopted: those that an admitted entry took over.
        wasted: those that were dropped.
    """

    adopted: int = 0
    wasted: int = 0


class Drafts:
    """The drafts of one conversation.

    Args:
        tally: where tokens are counted.

    Attributes:
        drops: what engines have to forget and were not told yet.
    """

    def __init__(self, tally: Tally) -> None:
        self.drops: deque[Drop] = deque()
        self._tally = tally
        self._drafts: dict[Hashable, _Draft] = {}  # the one that was touched last is the last

    # -- what people type ----------------------------------------------------------------------

    def hint(self, source: Hashable, after: str | None, keep: int, text: str) -> None:
        """Take what somebody has typed; total, whatever it says.

        Args:
            source: tells drafts apart.
            after: the entry that it will be written after; ``None`` drops the draft.
            keep: how many UTF-8 bytes of the draft before stay.
            text: what follows them.
        """
        if after is None:
            self.end(source)
            return
        draft = self._drafts.pop(source, None) or _Draft()
        if not 0 <= keep <= len(draft.text):  # we know less of it than its author thinks
            self._drop(draft, 0)
            return
        draft.after, draft.typed, draft.ended = after, True, False
        draft.text = (draft.text[:keep] + text.encode(errors="replace"))[:TEXT_BYTES_MAX]
        self._drafts[source] = draft
        if not draft.text:
            self.end(source)
        while len(self._drafts) > SOURCES_MAX:
            self.drop(next(iter(self._drafts)))

    def end(self, source: Hashable) -> None:
        """Somebody types no more. What was read stays for now: the text may have been sent."""
        draft = self._drafts.get(source)
        if draft is not None:
            draft.text, draft.typed, draft.ended = b"", False, True

    def drop(self, source: Hashable, *, if_ended: bool = False) -> None:
        """Drop a draft with what was read of it; if asked so, only when nobody types any more."""
        draft = self._drafts.get(source)
        if draft is not None and (draft.ended or not if_ended):
            del self._drafts[source]
            self._drop(draft, 0)

    @property
    def waiting(self) -> tuple[Hashable, ...]:
        """Who has typed since their draft was last read, the last one first."""
        return tuple(source for source in reversed(self._drafts) if self._drafts[source].typed)

    def after(self, source: Hashable) -> str:
        """The entry that a draft is written after."""
        return self._drafts[source].after

    def take(self, source: Hashable) -> str:
        """The text of a draft, which counts as read now."""
        draft = self._drafts[source]
        draft.typed = False
        return draft.text.decode(errors="ignore")

    def touch(self, source: Hashable) -> None:
        """A draft could not be read to its end: look at it again."""
        if source in self._drafts:
            self._drafts[source].typed = True

    # -- scratch branches ----------------------------------------------------------------------

    def branch(self, source: Hashable, tip: str, base: int, ids: tuple[int, ...]) -> Scratch | None:
        """The branch to be read for a draft now.

        What the branch before shares with it stays; the rest of that one is to be forgotten.

        Args:
            source: whose draft.
            tip: the entry that it stands behind.
            base: tokens of the path to ``tip``.
            ids: the path and what of the draft can be read.
        """
        draft = self._drafts.get(source)
        if draft is None:
            return None
        before, scratch = draft.scratch, Scratch(tip, base, ids)
        if before is not None:
            common = common_prefix(before.ids, ids) if before.tip == tip else 0
            self._drop(draft, common)
            if before.tip == tip:
                # Beyond what stays, the next token that is computed is computed for the draft.
                stays = before.first is not None and before.first <= common
                scratch.first = before.first if stays else None
                scratch.blind = before.blind
                scratch.done = min(before.done, common)
                scratch.tried = min(before.tried, common)
        draft.scratch = scratch
        return scratch

    def is_read_behind(self, tip: str) -> bool:
        """Whether anything was read of a draft behind an entry."""
        scratches = (draft.scratch for draft in self._drafts.values())
        return any(scratch is not None and scratch.tip == tip for scratch in scratches)

    def admitted(self, tip: str, ids: Sequence[int]) -> tuple[int, int] | None:
        """Something was admitted behind ``tip``: what was read ahead of it is taken over.

        All drafts behind that tip are over, until their authors type on.

        Args:
            tip: the entry that it was admitted behind.
            ids: the path to what was admitted.

        Returns:
            The first and the last token (half open, counted from the path's start) that a draft may
            have computed of it; ``None`` if there was no draft.
        """
        firsts, lasts, known = [], [], [0]
        for draft in self._drafts.values():
            scratch = draft.scratch
            if scratch is None or scratch.tip != tip:
                continue
            common = common_prefix(scratch.ids, ids)
            # Where no engine has answered yet, whatever it has of the draft is taken for its work.
            firsts.append(scratch.base if scratch.first is None else scratch.first)
            lasts.append(min(common, scratch.tried))
            known.append(min(common, scratch.done) if scratch.first is not None else 0)
            draft.scratch, draft.typed = None, False
            self._forget(scratch, common)
        if not lasts or max(lasts) <= min(firsts):
            return None
        self._tally.adopted += max(0, max(known) - min(firsts))
        return min(firsts), max(lasts)

    def reset(self) -> None:
        """Drop every branch and every text: something was withdrawn, or the seat is lost."""
        for draft in self._drafts.values():
            self._drop(draft, 0)
            draft.text, draft.typed = b"", False

    def lose(self) -> None:
        """The engine died, and with it everything that it had read."""
        for draft in self._drafts.values():
            draft.typed = draft.typed or draft.scratch is not None
            draft.scratch = None
        self.drops.clear()

    def _drop(self, draft: _Draft | None, keep: int) -> None:
        """Drop a draft's branch from a token on, but for what another branch shares with it."""
        if draft is None or draft.scratch is None:
            return
        scratch, draft.scratch = draft.scratch, None
        others = [
            (common_prefix(other.scratch.ids[: other.scratch.done], scratch.ids), other.scratch)
            for other in self._drafts.values()
            if other.scratch is not None and other.scratch.tip == scratch.tip
        ]
        shared, heir = max(others, key=lambda other: other[0], default=(0, None))
        if heir is not None and shared > keep:
            if heir.first is not None and scratch.first is not None:
                heir.first = min(heir.first, max(scratch.first, keep))
            keep = shared
        self._forget(scratch, keep)

    def _forget(self, scratch: Scratch, keep: int) -> None:
        drop = scratch.cut(keep)
        if drop is not None:
            self.drops.append(drop)
        self._tally.wasted += scratch.computed(scratch.done) - scratch.computed(keep)
