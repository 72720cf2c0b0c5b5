"""A path of the tree as token ids: what the model has read, entry by entry.

This module owns the mapping from entries to *segments*, the ids that an entry adds to a prompt,
once and for all. A segment depends on its entry and on how the one that is read before it ended,
never on anything else, so a prompt that goes on costs one segment. Which entries are read, and in
which order, :mod:`crdt_llm.document.reading` says. It must not know engines: a segment is the same
whatever computes it. All of it is derived: it can be dropped at any moment and comes back from the
document.
"""

from __future__ import annotations

import asyncio
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Final

from crdt_llm.document.reading import is_withdrawn, read, read_of
from crdt_llm.document.schema import ROOT, Role
from crdt_llm.document.seal import Hidden, Kind, place_of
from crdt_llm.errors import BadProof, PromptTooLong
from crdt_llm.inference.prompt.renderer import REDACTED_TEXT, ParentTail

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from crdt_llm.document.conversation import Conversation
    from crdt_llm.document.schema import Entry
    from crdt_llm.document.seal import Sealer
    from crdt_llm.inference.prompt.renderer import Renderer

NO_PARENT: Final = ParentTail(is_reply=False)

OFFLOAD_CHARACTERS_MIN: Final = 16_384
"""From here on a text is encoded in a thread: a megabyte takes a second, and the event loop belongs
to all conversations."""

SEGMENTS_PER_TURN_MAX: Final = 64
"""Segments that are made before others get the event loop again: some milliseconds' worth."""


class Transcript:
    """The segments of one conversation.

    Args:
        conversation: the replica to read.
        renderer: turns roles and texts into ids.
        sealer: opens the ids of replies that this process did not make.
    """

    def __init__(
        self,
        conversation: Conversation,
        renderer: Renderer,
        sealer: Sealer,
    ) -> None:
        self._conversation = conversation
        self._renderer = renderer
        self._sealer = sealer
        # entry -> what is read before it -> ids. What is pending may still come to stand behind
        # another entry, and render differently.
        self._segments: dict[str, dict[str, tuple[int, ...]]] = {}
        self._hidden: dict[str, Hidden] = {}
        self._roots_at_ms: dict[str, int] = {}

    # -- what the node tells it ----------------------------------------------------------------

    def forget(self) -> None:
        """Drop everything derived, e.g. after a redaction: what follows a secret came from it."""
        self._segments = {}
        self._hidden = {}

    def keep(self, reply: str, hidden: Hidden) -> None:
        """Remember a reply that ended here, so that it need not be opened again."""
        self._hidden[reply] = hidden
        self._segments.pop(reply, None)

    # -- what is read --------------------------------------------------------------------------

    def reading(self, entry: str) -> tuple[str, ...]:
        """The entries that the model reads of a path, in order."""
        return read(self._conversation, entry).entries

    def reading_of(self, slot: str, parent: str) -> tuple[str, ...]:
        """The entries that a slot behind ``parent`` is answered from."""
        return read_of(self._conversation, slot, parent)

    def count_withdrawn(self, reading: Sequence[str]) -> int:
        """How many of the entries are read as withdrawn."""
        return sum(is_withdrawn(self._conversation, name) for name in reading)

    # -- replies -------------------------------------------------------------------------------

    def hidden(self, reply: Entry) -> Hidden | None:
        """A reply's hidden state; ``None`` if it has none that we can use.

        Ids are kept as they were sampled as long as the vocabulary and the template are the ones
        they were made with; else the reply is read from its text, once.

        Raises:
            BadProof: there is a sealed field, and it is not ours or was changed.
        """
        known = self._hidden.get(reply.id)
        if known is None and reply.sealed and not reply.redacted:
            known = self._sealer.open_reply(reply.sealed, place_of(self._conversation, reply))
            if reply.ended:
                self._hidden[reply.id] = known
        return known if known is not None and known.renderer == self._renderer.id else None

    def _tail(self, parent: str) -> ParentTail:
        entry = self._conversation.entry(parent) if parent != ROOT else None
        if entry is None or not entry.is_slot:
            return NO_PARENT
        hidden = None if entry.redacted else self.hidden(entry)
        sampled = hidden.sampled if hidden is not None else ()
        return ParentTail(is_reply=True, last_sampled=sampled[-1] if sampled else None)

    # -- segments ------------------------------------------------------------------------------

    def _root_at_ms(self, parent: str, entry: Entry) -> int:
        """When the first entry of a path was born; remembered on the way down."""
        if parent == ROOT:
            at_ms = entry.born.at
        elif parent in self._roots_at_ms:
            at_ms = self._roots_at_ms[parent]
        else:
            first = self._conversation.born(self._conversation.tree.path(parent)[0])
            at_ms = entry.born.at if first is None else first.at
        if self._conversation.tree.is_admitted(entry.id):
            self._roots_at_ms[entry.id] = at_ms
        return at_ms

    def opening(
        self, slot: Entry, parent: str, reading: Sequence[str] | None = None
    ) -> tuple[int, ...]:
        """The ids that stand between a prompt and a reply's first sampled id.

        Args:
            slot: the slot.
            parent: the entry that it stands behind in the tree.
            reading: what it reads; by default what its parent's path says.
        """
        reading = self.reading(parent) if reading is None else reading
        before = reading[-1] if reading else ROOT
        return self._opening(slot, parent, before)

    def _opening(self, slot: Entry, parent: str, before: str) -> tuple[int, ...]:
        return self._renderer.reply_opening(
            is_root=before == ROOT,
            root_at_ms=self._root_at_ms(parent, slot),
            parent=self._tail(before),
            extend=slot.born.params.extend,
        )

    def segment(self, name: str, before: str | None = None) -> tuple[int, ...]:
        """The ids that an entry adds to the prompt. A reply must have ended.

        Args:
            name: the entry.
            before: the entry that is read before it; its ``up`` by default.

        Raises:
            BadProof: it cannot be read.
        """
        before = self._conversation.tree.up(name) if before is None else before
        known = self._segments.get(name, {}).get(before)
        if known is None:
            known = self._plan(name, before)()
            self._segments.setdefault(name, {})[before] = known
        return known

    def drafting(self, reading: Sequence[str]) -> Callable[[str], tuple[int, ...]]:
        """The ids that a user's entry with a text would add behind a reading. None are kept."""
        before = reading[-1] if reading else ROOT
        path = self._conversation.tree.path(before)
        first = self._conversation.born(path[0]) if path else None
        render = partial(
            self._renderer.segment,
            role=Role.USER.value,
            is_root=before == ROOT,
            root_at_ms=0 if first is None else first.at,
            parent=self._tail(before),
        )
        return lambda content: render(content=content)

    def _plan(self, name: str, before: str) -> Callable[[], tuple[int, ...]]:
        """What makes a segment: everything is read now, and encoded when it is called."""
        entry = self._conversation.entry(name)
        if entry is None:
            raise BadProof(f"entry {name} cannot be read any more")
        parent = self._conversation.tree.up(name)
        withdrawn = is_withdrawn(self._conversation, name)
        content = REDACTED_TEXT if withdrawn else entry.content
        if entry.born.role is Role.ASSISTANT:
            hidden = None if entry.redacted else self.hidden(entry)
            if hidden is not None:
                ids = hidden.ids
                return lambda: ids
            opening = self._opening(entry, parent, before)
            return lambda: (*opening, *self._renderer.reply_text(content))
        return partial(
            self._renderer.segment,
            role=entry.born.role.value,
            content=content,
            is_root=before == ROOT,
            root_at_ms=self._root_at_ms(parent, entry),
            parent=self._tail(before),
        )

    async def load(self, entry: str, limit: int) -> bool:
        """As :meth:`load_reading`, of what is read of the path that ends in ``entry``."""
        return await self.load_reading(self.reading(entry), limit)

    async def load_reading(self, reading: Sequence[str], limit: int) -> bool:
        """Make the segments of a reading, a few at a time, large texts in a thread.

        Args:
            reading: the entries, in the order in which they are read.
            limit: tokens; the rest of a longer reading is not looked at.

        Returns:
            Whether it waited in between. Then the document may have changed, and whoever decided
            something before should decide anew; calling again goes on where this call stopped.

        Raises:
            PromptTooLong: there are more tokens than ``limit``.
            BadProof: something cannot be read.
        """
        tokens = made = 0
        for before, name in pairwise((ROOT, *reading)):
            if before not in self._segments.get(name, ()):
                made += 1
                if await self._make(name, before, made):
                    return True
            tokens += len(self.segment(name, before))
            if tokens > limit:
                raise PromptTooLong(
                    f"the conversation has more than {limit} tokens here, and the model no more "
                    "positions: fork from an earlier entry or begin a new conversation"
                )
        return False

    async def _make(self, name: str, before: str, made: int) -> bool:
        """Make one segment where that may take long; says whether others were let go on."""
        if len(self._conversation.text(name)) >= OFFLOAD_CHARACTERS_MIN:
            await self._encode_aside(name, before)
            return True
        if made > SEGMENTS_PER_TURN_MAX:
            await asyncio.sleep(0)
            return True
        return False

    def known_sizes(
        self, reading: Sequence[str], running: Mapping[str, int]
    ) -> tuple[tuple[str, int], ...]:
        """The entries of a reading with the number of their tokens, as far as that is known."""
        return tuple(
            (name, running.get(name, len(self._segments.get(name, {}).get(before, ()))))
            for before, name in pairwise((ROOT, *reading))
        )

    async def count_fitting(
        self, reading: Sequence[str], limit: int, *, from_end: bool = False
    ) -> int | None:
        """How many entries of a reading have no more tokens than ``limit``.

        Args:
            reading: the entries, in the order in which they are read.
            limit: tokens.
            from_end: whether to count from the last one.

        Returns:
            How many; ``None`` if this waited, see :meth:`load_reading`.

        Raises:
            BadProof: something cannot be read.
        """
        pairs = list(pairwise((ROOT, *reading)))
        tokens = 0
        for count, (before, name) in enumerate(reversed(pairs) if from_end else pairs):
            unknown = before not in self._segments.get(name, ())
            if unknown and await self._make(name, before, count):
                return None
            tokens += len(self.segment(name, before))
            if tokens > limit:
                return count
        return len(pairs)

    def asking(self, reading: Sequence[str], question: str) -> tuple[int, ...]:
        """The ids of a user's question behind a reading, up to where a reply would begin."""
        opening = self._renderer.reply_opening(
            is_root=False, root_at_ms=0, parent=NO_PARENT, extend=False
        )
        return self.drafting(reading)(question) + opening

    def ids(self, entry: str) -> tuple[int, ...]:
        """The prompt of what is read of the path that ends in ``entry``."""
        return self.ids_of(self.reading(entry))

    def ids_of(self, reading: Sequence[str]) -> tuple[int, ...]:
        """The prompt of a reading: every segment in order."""
        return tuple(token for _, ids in self.segments(reading) for token in ids)

    def segments(self, reading: Sequence[str]) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """The entries of a reading, each with its ids."""
        pairs = pairwise((ROOT, *reading))
        return tuple((name, self.segment(name, before)) for before, name in pairs)

    async def _encode_aside(self, name: str, before: str) -> None:
        segments = self._segments
        ids = await asyncio.to_thread(self._plan(name, before))
        # Goes nowhere if `forget` put others in their place meanwhile.
        segments.setdefault(name, {})[before] = ids

    def opened(self, slot: Entry, parent: str, reading: Sequence[str] | None = None) -> Hidden:
        """A reply's hidden state before its first id was sampled; see :meth:`opening`."""
        opening = self.opening(slot, parent, reading)
        return Hidden(ids=opening, kinds=(Kind.INJECTED,) * len(opening))
