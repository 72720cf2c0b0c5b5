"""What the engine was given to read, as a tree, so that it can be made to forget a part of it.

This module owns nothing but that tree: entries in the order in which they were read, each with its
ids. A withdrawn entry may have been read in several places (behind another summary, with or without
what was dropped); everything behind it was computed from it, wherever that was. It must not know
documents or engines.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


@dataclass(frozen=True, slots=True)
class Drop:
    """What an engine has to forget: see :meth:`crdt_llm.inference.contract.Engine.forget`."""

    ids: tuple[int, ...]
    keep: int


@dataclass(slots=True)
class _Node:
    ids: tuple[int, ...] = ()
    children: dict[str, _Node] = field(default_factory=dict)


class Fed:
    """What an engine was given of one conversation; as large as what was rendered of it.

    Attributes:
        drops: what engines have to forget and were not told yet.
    """

    def __init__(self) -> None:
        self._root = _Node()
        self.drops: deque[Drop] = deque()

    def note(self, segments: Iterable[tuple[str, tuple[int, ...]]]) -> None:
        """Entries are being read, in this order, each with its ids.

        Of a reply that is not complete yet the ids so far will do.
        """
        node = self._root
        for name, ids in segments:
            child = node.children.get(name)
            if child is None:
                child = node.children[name] = _Node()
            if len(ids) >= len(child.ids):
                child.ids = ids
            node = child

    def withdraw(self, entry: str) -> None:
        """Forget an entry and everything that was read behind it; :attr:`drops` says where."""
        self.drops.extend(self._withdraw(self._root, (), entry))

    def _withdraw(self, node: _Node, before: tuple[int, ...], entry: str) -> Iterator[Drop]:
        stack = [(node, before)]
        while stack:
            node, before = stack.pop()
            gone = node.children.pop(entry, None)
            if gone is not None:
                yield from _drops(gone, before)
            stack.extend((child, before + child.ids) for child in node.children.values())


def _drops(node: _Node, before: tuple[int, ...]) -> Iterator[Drop]:
    stack = [node]
    while stack:
        node = stack.pop()
        if node.ids:
            yield Drop(before + node.ids, len(before))
        else:  # it added nothing itself: what was read behind it goes
            stack.extend(node.children.values())
