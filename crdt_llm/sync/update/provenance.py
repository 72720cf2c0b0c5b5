"""Which struct stands under each key of a document, and so under whose client id it was written.

A reader of a document sees values; whose they are, only their clocks say. This module owns finding
that: it follows what took the place of a value to where the first one hung. It is pure; it must not
know replicas, rooms, principals or what a key means.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING, Final

from crdt_llm.document.conversation import ENTRIES, META
from crdt_llm.sync.update.shape import struct_at
from crdt_llm.sync.update.structure import HELD_LIMITS, Id, Kind, read_update

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from crdt_llm.sync.update.structure import Struct, UpdateStructure

_COLLECTED: Final = (Kind.GC, Kind.SKIP)
_VALUELESS: Final = (*_COLLECTED, Kind.DELETED)


class Provenance:
    """What stands where in one document.

    Args:
        structure: All of the document, as a replica of ours writes it.
    """

    def __init__(self, structure: UpdateStructure) -> None:
        self._structure = structure
        self._places: dict[Id, tuple[str | Id, str | None] | None] = {}
        self._standing: dict[tuple[str | Id, str], Struct] = {}
        for client, structs in structure.structs.items():
            deleted = structure.deleted.get(client, ())
            for item in structs:
                # Of a run of values that replaced each other only the last can be left.
                if item.kind in _VALUELESS or _has(deleted, item.end - 1):
                    continue
                place = self._place_of(item)
                if place is not None and place[1] is not None:
                    self._standing[place[0], place[1]] = item
        self._places.clear()

    @classmethod
    def of(cls, document: bytes) -> Provenance:
        """Of a document as an update, which a replica of ours has written.

        Raises:
            MalformedMessage: No update.
            TooLarge: Larger than a replica may be.
        """
        return cls(read_update(document, HELD_LIMITS))

    def meta(self, key: str) -> Struct | None:
        """What stands under a key of the root ``meta``."""
        return self._standing.get((META, key))

    def entry(self, name: str) -> Struct | None:
        """What made the entry that stands under a name."""
        return self._standing.get((ENTRIES, name))

    def field(self, name: str, key: str) -> Struct | None:
        """What stands in a field of that entry."""
        entry = self.entry(name)
        return None if entry is None else self._standing.get((Id(entry.client, entry.clock), key))

    def _place_of(self, item: Struct) -> tuple[str | Id, str | None] | None:
        """What a struct hangs at and under which key; a text is followed once, not once a word."""
        passed: list[Id] = []
        while item.parent is None:
            here = Id(item.client, item.clock)
            if here in self._places:
                place = self._places[here]
                break
            passed.append(here)
            beside = item.origin or item.right_origin
            neighbour = struct_at(self._structure, beside) if beside is not None else None
            if neighbour is None or neighbour.kind in _COLLECTED:
                place = None
                break
            item = neighbour
        else:
            place = (item.parent, item.parent_sub)
        self._places.update(dict.fromkeys(passed, place))
        return place


def _has(ranges: Sequence[range], clock: int) -> bool:
    position = bisect_right(ranges, clock, key=lambda one: one.start) - 1
    return position >= 0 and clock in ranges[position]


def client_of(item: Struct | None, clients: Mapping[int, str]) -> str | None:
    """Whose the client id is that something was written under, if that is known."""
    return None if item is None else clients.get(item.client)
