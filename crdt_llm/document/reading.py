"""The reading: which entries of a path the model reads, and in which order.

A pure, total function of the document, as the view is; everybody who holds the document can say
what a reply was answered from. It knows no tokens, no model and no limit: what happens when a path
is too long is decided by the node, and what it decided stands in the document.

The rules, numbered so that code and tests can cite them:

P1. A path is read as it stands, from its first entry to its last.
P2. A slot with ``reads`` was answered from those entries, in that order (names that are not on its
    path before it do not count), and whatever comes behind it goes on from there.
P3. An author's entry that ``covers`` a first and a last entry is a summary. It is read in the place
    of all that is read from the one to the other, and not where it stands itself.
P4. A summary that was withdrawn, or that stands for anything that was (a withdrawn entry, or a
    summary that is), covers nothing: it is read where it stands, as withdrawn.
P5. A summary whose range is not there, or runs backwards, is read as any other entry.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from crdt_llm.document.schema import Role

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from crdt_llm.document.conversation import Conversation


@dataclass(frozen=True, slots=True)
class Reading:
    """What the model reads of a path.

    Attributes:
        entries: the entries, in order.
        spoiled: summaries on the path that stand for something that was withdrawn (P4).
    """

    entries: tuple[str, ...]
    spoiled: frozenset[str] = frozenset()


def read(conversation: Conversation, entry: str) -> Reading:
    """The reading of the path that ends in ``entry``. Costs the path's length."""
    path = conversation.tree.path(entry)
    order: list[str] = []
    withdrawn: set[str] = set()
    spoiled: set[str] = set()
    for position, name in enumerate(path):
        if conversation.is_redacted(name):
            withdrawn.add(name)
        reads = conversation.reads(name)
        if reads is not None:
            order = _known(reads, path[:position])  # P2
        covered = _covered(conversation, name, order)
        if covered is None or name in withdrawn:
            order.append(name)  # P1
            continue
        ends, within = covered
        if not withdrawn.isdisjoint(ends) or not withdrawn.isdisjoint(order[i] for i in within):
            withdrawn.add(name)  # P4
            spoiled.add(name)
            order.append(name)
        elif within:
            order[within.start : within.stop] = [name]  # P3
        else:
            order.append(name)  # P5
    return Reading(tuple(order), frozenset(spoiled))


def read_of(conversation: Conversation, slot: str, parent: str) -> tuple[str, ...]:
    """The entries that a slot behind ``parent`` is answered from: P2 for the slot itself."""
    reads = conversation.reads(slot)
    if reads is None:
        return read(conversation, parent).entries
    return tuple(_known(reads, conversation.tree.path(parent)))


def is_withdrawn(conversation: Conversation, entry: str) -> bool:
    """Whether an entry is read as withdrawn: it was redacted, or it is a spoiled summary (P4)."""
    if conversation.is_redacted(entry):
        return True
    return is_summary(conversation, entry) and entry in read(conversation, entry).spoiled


def is_summary(conversation: Conversation, entry: str) -> bool:
    """Whether an entry says that it stands for others."""
    born = conversation.born(entry)
    return born is not None and born.covers is not None and born.role is not Role.ASSISTANT


def _known(reads: Iterable[str], before: Collection[str]) -> list[str]:
    known = set(before)
    return [name for name in dict.fromkeys(reads) if name in known]


def _covered(
    conversation: Conversation, name: str, order: list[str]
) -> tuple[tuple[str, str], range] | None:
    """A summary's first and last entry, and where in ``order`` they and all between them are."""
    born = conversation.born(name)
    if born is None or born.covers is None or not is_summary(conversation, name):
        return None
    first, last = born.covers
    if first not in order or last not in order:
        return born.covers, range(0)
    return born.covers, range(order.index(first), order.index(last) + 1)
