"""Entries that the relay does not let be admitted yet.

This module owns which entries of one conversation are left alone, and until when. It must not know
engines, seats or how a refusal travels.

After a loss somebody may bring back what somebody else wrote. Nothing proves a pending entry but
the replica that wrote it, so it waits until its author was here. A node finds that out by being
refused, and a refused write costs it its replica. So it does not try again before something changed
that may matter: an entry came or was admitted, a reply ended, or the node was told to look although
the document is as it was (that is what a confirmation looks like). A lease that is recorded is no
such change: two nodes would call each other for ever.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from crdt_llm.errors import Refused

if TYPE_CHECKING:
    from collections.abc import Iterable

    from crdt_llm.document.conversation import Conversation

_UNCONFIRMED: Final = "unconfirmed"


def is_unconfirmed(error: BaseException) -> bool:
    """Whether a write was refused only because an author has not been here yet."""
    return isinstance(error, Refused) and error.code == _UNCONFIRMED


class Held:
    """The entries of one conversation that are not admitted for now."""

    def __init__(self) -> None:
        self._refused: dict[str, None] = {}
        self._doubtful: dict[str, None] = {}  # refused before, to be tried once more
        self._seen: tuple[bytes, int, tuple[str, ...]] | None = None

    def __bool__(self) -> bool:
        return bool(self._refused or self._doubtful)

    def entries(self, *, at_rest: bool) -> frozenset[str]:
        """What is left alone now.

        Args:
            at_rest: whether a refusal would interrupt nothing; only then is anything tried again.
        """
        return frozenset(self._refused if at_rest else self._refused | self._doubtful)

    def hold(self, admitted: Iterable[str], error: Refused) -> None:
        """An admission was refused: leave those alone that it was refused for.

        Args:
            admitted: what it was to admit, in its order.
            error: the refusal. It names the entry for people; if it does not, the whole run waits.
        """
        run = tuple(admitted)
        for entry in [one for one in run if one in error.reason] or run[:1]:
            self._doubtful.pop(entry, None)
            self._refused[entry] = None
        self._seen = None

    def release(self) -> None:
        """Something changed that may matter: each may be tried once more."""
        self._doubtful |= self._refused
        self._refused.clear()

    def admitted(self, entries: Iterable[str]) -> None:
        """These have their places."""
        for entry in entries:
            self._doubtful.pop(entry, None)

    def look(self, conversation: Conversation) -> None:
        """A seat was taken anew, with this replica; see the module for what matters in it."""
        if not self:
            return
        tree = conversation.tree
        seen = (conversation.state_vector(), sum(1 for _ in tree.entries), tree.pending)
        if self._seen is not None and (self._seen[0] == seen[0] or self._seen[1:] != seen[1:]):
            self.release()
        self._seen = seen
