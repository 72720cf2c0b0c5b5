"""A path of the tree as token ids: what the model has read, entry by entry.

This module owns the mapping from entries to *segments*, the ids that an entry adds to a prompt,
once and for all. A segment depends on its entry and on how its parent ended, never on anything
else, so the prompt of a path is the prompt of its parent plus one segment. It must not know
engines: a segment is the same whatever computes it. All of it is derived: it can be dropped at any
moment and comes back from the document.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from crdt_llm.document.chain import parent_digest
from crdt_llm.document.schema import ROOT, Role
from crdt_llm.document.seal import Hidden, Kind, Where
from crdt_llm.errors import BadProof
from crdt_llm.inference.prompt import REDACTED_TEXT, ParentTail

if TYPE_CHECKING:
    from crdt_llm.document.conversation import Conversation
    from crdt_llm.document.schema import Entry
    from crdt_llm.document.seal import Sealer
    from crdt_llm.inference.prompt import Renderer

NO_PARENT: Final = ParentTail(is_reply=False)


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
        self._segments: dict[str, tuple[int, ...]] = {}
        self._hidden: dict[str, Hidden] = {}

    # -- what the node tells it ----------------------------------------------------------------

    def forget(self) -> None:
        """Drop everything derived, e.g. after a redaction: what follows a secret came from it."""
        self._segments.clear()
        self._hidden.clear()

    def keep(self, reply: str, hidden: Hidden) -> None:
        """Remember a reply that ended here, so that it need not be opened again."""
        self._hidden[reply] = hidden
        self._segments.pop(reply, None)

    # -- replies -------------------------------------------------------------------------------

    def where(self, reply: Entry) -> Where:
        """The place that a reply's hidden fields are bound to.

        Raises:
            BadProof: it has no place, or its parent has no proof.
        """
        if reply.place is None:
            raise BadProof(f"entry {reply.id} has no place")
        parent = parent_digest(self._conversation, reply.place.parent)
        identity = self._conversation.id or ""
        return Where(identity, reply.id, parent, reply.place.epoch, 0)

    def hidden(self, reply: Entry) -> Hidden | None:
        """A reply's hidden state; ``None`` if it has none that we can use.

        Ids are kept as they were sampled as long as the vocabulary and the template are the ones
        they were made with; else the reply is read from its text, once.

        Raises:
            BadProof: there is a sealed field, and it is not ours or was changed.
        """
        known = self._hidden.get(reply.id)
        if known is None and reply.sealed and not reply.redacted:
            known = self._sealer.open_reply(reply.sealed, self.where(reply))
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
        first = next(iter(self._conversation.tree.path(parent)), None)
        born = self._conversation.born(first) if first is not None else None
        return entry.born.at if born is None else born.at

    def opening(self, slot: Entry, parent: str) -> tuple[int, ...]:
        """The ids that stand between the path to ``parent`` and a reply's first sampled id."""
        return self._renderer.reply_opening(
            is_root=parent == ROOT,
            root_at_ms=self._root_at_ms(parent, slot),
            parent=self._tail(parent),
            extend=slot.born.params.extend and self._can_extend(parent),
        )

    def _can_extend(self, parent: str) -> bool:
        entry = self._conversation.entry(parent) if parent != ROOT else None
        return entry is not None and entry.is_slot

    def segment(self, name: str) -> tuple[int, ...]:
        """The ids that an admitted entry adds to the prompt. A reply must have ended."""
        known = self._segments.get(name)
        if known is None:
            entry = self._conversation.entry(name)
            if entry is None:
                raise BadProof(f"entry {name} cannot be read any more")
            known = self._segments[name] = self._render(entry, self._conversation.tree.up(name))
        return known

    def render(self, name: str, parent: str) -> tuple[int, ...]:
        """As :meth:`segment`, for an author's entry that is about to get its place."""
        entry = self._conversation.entry(name)
        if entry is None:
            raise BadProof(f"entry {name} cannot be read any more")
        return self._render(entry, parent)

    def _render(self, entry: Entry, parent: str) -> tuple[int, ...]:
        content = REDACTED_TEXT if entry.redacted else entry.content
        if entry.born.role is Role.ASSISTANT:
            hidden = None if entry.redacted else self.hidden(entry)
            if hidden is not None:
                return hidden.ids
            return (*self.opening(entry, parent), *self._renderer.reply_text(content))
        return self._renderer.segment(
            role=entry.born.role.value,
            content=content,
            is_root=parent == ROOT,
            root_at_ms=self._root_at_ms(parent, entry),
            parent=self._tail(parent),
        )

    def ids(self, entry: str) -> tuple[int, ...]:
        """The prompt of a path: every segment from the root to ``entry``."""
        path = self._conversation.tree.path(entry)
        return tuple(token for name in path for token in self.segment(name))

    def opened(self, slot: Entry, parent: str) -> Hidden:
        """A reply's hidden state before its first id was sampled."""
        opening = self.opening(slot, parent)
        return Hidden(ids=opening, kinds=(Kind.INJECTED,) * len(opening))
