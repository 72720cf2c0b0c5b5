"""A path of the tree as token ids: what the model has read, entry by entry.

This module owns the mapping from entries to *segments*, the ids that an entry adds to a prompt,
once and for all. A segment depends on its entry and on how its parent ended, never on anything
else, so the prompt of a path is the prompt of its parent plus one segment. It must not know
engines: a segment is the same whatever computes it. All of it is derived: it can be dropped at any
moment and comes back from the document.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Final

from crdt_llm.document.schema import ROOT, Role
from crdt_llm.document.seal import Hidden, Kind, place_of
from crdt_llm.errors import BadProof, PromptTooLong
from crdt_llm.inference.prompt import REDACTED_TEXT, ParentTail

if TYPE_CHECKING:
    from collections.abc import Callable

    from crdt_llm.document.conversation import Conversation
    from crdt_llm.document.schema import Entry
    from crdt_llm.document.seal import Sealer
    from crdt_llm.inference.prompt import Renderer

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
        self._segments: dict[tuple[str, str], tuple[int, ...]] = {}
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
        self._segments.pop(self._key(reply), None)

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

    def opening(self, slot: Entry, parent: str) -> tuple[int, ...]:
        """The ids that stand between the path to ``parent`` and a reply's first sampled id."""
        return self._renderer.reply_opening(
            is_root=parent == ROOT,
            root_at_ms=self._root_at_ms(parent, slot),
            parent=self._tail(parent),
            extend=slot.born.params.extend,
        )

    def segment(self, name: str) -> tuple[int, ...]:
        """The ids that an entry adds to the prompt, behind its ``up``. A reply must have ended.

        Raises:
            BadProof: it cannot be read.
        """
        key = self._key(name)
        known = self._segments.get(key)
        if known is None:
            known = self._segments[key] = self._plan(name)()
        return known

    def _key(self, name: str) -> tuple[str, str]:
        # What is pending may still come to stand behind another entry, and render differently.
        return name, self._conversation.tree.up(name)

    def _plan(self, name: str) -> Callable[[], tuple[int, ...]]:
        """What makes a segment: everything is read now, and encoded when it is called."""
        entry = self._conversation.entry(name)
        if entry is None:
            raise BadProof(f"entry {name} cannot be read any more")
        parent = self._conversation.tree.up(name)
        content = REDACTED_TEXT if entry.redacted else entry.content
        if entry.born.role is Role.ASSISTANT:
            hidden = None if entry.redacted else self.hidden(entry)
            if hidden is not None:
                ids = hidden.ids
                return lambda: ids
            opening = self.opening(entry, parent)
            return lambda: (*opening, *self._renderer.reply_text(content))
        return partial(
            self._renderer.segment,
            role=entry.born.role.value,
            content=content,
            is_root=parent == ROOT,
            root_at_ms=self._root_at_ms(parent, entry),
            parent=self._tail(parent),
        )

    async def load(self, entry: str, limit: int) -> bool:
        """Make the segments of a path, a few at a time, large texts in a thread.

        Args:
            entry: where the path ends.
            limit: tokens; the rest of a longer path is not looked at.

        Returns:
            Whether it waited in between. Then the document may have changed, and whoever decided
            something before should decide anew; calling again goes on where this call stopped.

        Raises:
            PromptTooLong: the path has more tokens than ``limit``.
            BadProof: something on it cannot be read.
        """
        tokens = made = 0
        for name in self._conversation.tree.path(entry):
            if self._key(name) not in self._segments:
                made += 1
                text = self._conversation.text(name)
                if len(text) >= OFFLOAD_CHARACTERS_MIN:
                    await self._encode_aside(name)
                    return True
                if made > SEGMENTS_PER_TURN_MAX:
                    await asyncio.sleep(0)
                    return True
            tokens += len(self.segment(name))
            if tokens > limit:
                raise PromptTooLong(
                    f"the conversation has more than {limit} tokens here, and the model no more "
                    "positions: fork from an earlier entry or begin a new conversation"
                )
        return False

    def ids(self, entry: str) -> tuple[int, ...]:
        """The prompt of a path: every segment from the root to ``entry``."""
        path = self._conversation.tree.path(entry)
        return tuple(token for name in path for token in self.segment(name))

    async def _encode_aside(self, name: str) -> None:
        segments, key = self._segments, self._key(name)
        ids = await asyncio.to_thread(self._plan(name))
        segments[key] = ids  # goes nowhere if `forget` put others in their place meanwhile

    def opened(self, slot: Entry, parent: str) -> Hidden:
        """A reply's hidden state before its first id was sampled."""
        opening = self.opening(slot, parent)
        return Hidden(ids=opening, kinds=(Kind.INJECTED,) * len(opening))
