"""What is asked of an update before a room's replica sees it.

This module owns the reading. It is pure, so that any thread may do it; it must not know who sent an
update, nor what follows from the answers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from crdt_llm.sync.update.growth import read_growth
from crdt_llm.sync.update.shape import check_shape
from crdt_llm.sync.update.structure import (
    HELD_LIMITS,
    brings,
    find_gap,
    find_rewrite,
    read_update,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from crdt_llm.sync.update.structure import (
        Id,
        Limits,
        Missing,
        UpdateStructure,
    )


@dataclass(frozen=True, slots=True)
class Look:
    """What an update's structure says, given what is known.

    Attributes:
        structure: All of it.
        fresh: The clients that it has new clocks of, and the first clock after those.
        repeated: The clients that it has known clocks of, and the first of these.
        missing: What it builds on that is not known.
        brings: Whether it may change anything.
    """

    structure: UpdateStructure
    fresh: Mapping[int, int]
    repeated: Mapping[int, int]
    missing: Missing | None
    brings: bool


def look_at(update: bytes, limits: Limits, known: Mapping[int, int], *, node: bool) -> Look:
    """All that is asked of an update before the replica sees it; pure, so any thread may do it.

    Raises:
        MalformedMessage: No update.
        TooLarge: Over one of ``limits``.
        Refused: It writes where no reader of the document looks, so that no rule would see it.
    """
    structure = read_update(update, limits)
    check_shape(structure, known, node=node)
    fresh = {client: end for client, end in structure.ends.items() if end > known.get(client, 0)}
    repeated = {
        client: structs[0].clock
        for client, structs in structure.structs.items()
        if structs[0].clock < known.get(client, 0)
    }
    missing = find_gap(structure, known)
    return Look(structure, fresh, repeated, missing, missing is None and brings(structure, known))


def glance_at(update: bytes, known: Mapping[int, int]) -> Look | None:
    """The same as :func:`look_at`, of a reply's next words; ``None`` if an update is not that."""
    structure = read_growth(update, known)
    return Look(structure, structure.ends, {}, None, brings=True) if structure else None


def find_rewritten(structure: UpdateStructure, held: bytes) -> Id | None:
    """The first clock at which an update says something else than ``held``, an update of ours."""
    return find_rewrite(structure, read_update(held, HELD_LIMITS))
