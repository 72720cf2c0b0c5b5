r"""The KV tree: which tokens' KV is resident, in which slots, and who shares it.

Owns the bookkeeping of the KV cache: a radix tree of tiles keyed by token ids, the paths that hold
tiles in use, and least-recently-used eviction. It moves no tensor itself: a :class:`Slots` does, so
this module knows neither torch nor a model. One thread owns a tree.

A *tile* covers the absolute positions ``[k * TILE, (k + 1) * TILE)`` of every path through it. It
lives in one slot of the pool and holds the rows of its first ``len(tile.tokens)`` positions::

    position   0        256       512    600
               [ tile 0 )[ tile 1 )[ tile 2 |          a path of 600 tokens
                              \
                               [ tile 1')[ tile 2' |   its fork at 300: tile 0 is shared,
                                                       rows [256, 300) of tile 1 were copied

Invariants:
  1. A row never changes once it is written: KV depends on the ids before it alone.
  2. Only a full tile has children, so a shared prefix is shared by reference in whole tiles. (The
     step that fills a tile may have an empty child of it reserved.)
  3. A tile grows at its end only, by the one path that stands at its tip; any other path that goes
     on differently from inside a tile copies the rows it shares.
  4. A tile is evicted only if no path pins it and nothing resident builds on it.
  5. What may be written to disk are the rows ``[0, tile.kept)``: those of paths that somebody
     marked with :meth:`Path.keep`. What was computed for a text that is still being typed is not.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np

from crdt_llm.errors import EngineBusy, LocalMisuse

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy.typing as npt

    Ids = npt.NDArray[np.uint32]

TILE = 256
"""Rows of a tile. Attention runs over whole tiles at absolute positions, which is what makes it
independent of how a prompt was cut; a smaller tile costs calls, a larger one idle rows and copies.
"""


class Slots(Protocol):
    """The rows themselves, wherever they are: ``count`` slots of :data:`TILE` rows each."""

    @property
    def count(self) -> int:
        """How many slots there are."""
        ...

    def copy_rows(self, source: int, target: int, rows: int) -> None:
        """Copy the rows ``[0, rows)`` of a slot into another."""
        ...

    def take(self, slot: int) -> None:
        """Make a free slot ready for a new tile: all of its rows are zero."""
        ...

    def wipe(self, slot: int, start: int) -> None:
        """Set the rows ``[start, TILE)`` of a slot to zero."""
        ...


@dataclass(eq=False, slots=True)
class Tile:
    """A node of the tree. ``tokens`` has as many ids as rows are valid.

    ``kept`` counts the rows that may be written to disk, ``saved`` those that were. ``digest`` is
    that of the rows of a full tile, once somebody has asked for it.
    """

    slot: int
    parent: Tile | None
    tokens: Ids
    children: list[Tile] = field(default_factory=list)
    pins: int = 0
    touched: int = 0
    detached: bool = False
    kept: int = 0
    saved: int = 0
    digest: bytes | None = None

    @property
    def path(self) -> Ids:
        """The ids of every position up to the last valid row of this tile."""
        parts, tile = [self.tokens], self.parent
        while tile is not None:
            parts.append(tile.tokens)
            tile = tile.parent
        return np.concatenate(parts[::-1])

    @property
    def unsaved(self) -> bool:
        """Whether rows that may be on disk are not."""
        return self.kept > self.saved and not self.detached

    @property
    def full(self) -> bool:
        """Whether the next token belongs to a child."""
        return len(self.tokens) == TILE


@dataclass(frozen=True, slots=True)
class Extent:
    """Where the next rows of a path go: the rows ``[offset, offset + room)`` of ``slot``."""

    slot: int
    offset: int
    room: int


def common_prefix(left: Ids, right: Ids) -> int:
    """How many ids two arrays share from their start."""
    shorter = min(len(left), len(right))
    unequal = np.flatnonzero(left[:shorter] != right[:shorter])
    return int(unequal[0]) if unequal.size else shorter


class Path:
    """A walk from the root that holds its tiles in memory until :meth:`close`.

    ``length`` counts the resident positions: the path covers ``[0, length)``.
    """

    __slots__ = ("_tree", "closed", "length", "tiles")

    def __init__(self, tree: KvTree) -> None:
        self._tree = tree
        self.tiles: list[Tile] = []
        self.length = 0
        self.closed = False

    def adopt(self, ids: Ids) -> int:
        """Follow the tree along ``ids`` as far as it is resident.

        Adopts also what another path has written since; copies nothing, changes no tile.

        Args:
            ids: the whole path, from position 0; ``ids[:length]`` is what is covered already.

        Returns:
            How many positions were gained.
        """
        return self._tree.adopt(self, ids)

    def reserve(self) -> Extent:
        """Find room for the next rows, copying a partly shared tile first. Changes no ``length``.

        Raises:
            EngineBusy: every slot is in use by a running request.
        """
        return self._tree.reserve(self)

    def reserve_behind(self) -> Extent | None:
        """Find room for rows behind the tile that was reserved, so that one step fills both.

        Whoever asks appends the rest of that tile before anything else happens to the tree, or
        closes the path.

        Returns:
            The next tile; None if every slot is in use by a running request.
        """
        return self._tree.reserve_behind(self)

    def append(self, ids: Ids) -> None:
        """Record that the rows reserved now hold the KV of ``ids``, of one tile."""
        self._tree.append(self, ids)

    def keep(self) -> None:
        """Allow that the rows ``[0, length)`` are written to disk (invariant 5)."""
        for index, tile in enumerate(self.tiles):
            tile.kept = max(tile.kept, min(TILE, self.length - index * TILE))

    def restored(self) -> None:
        """Note that the rows ``[0, length)`` came from disk: they may be there, and are."""
        self.keep()
        tile = self.tiles[(self.length - 1) // TILE]
        tile.saved = max(tile.saved, len(tile.tokens))

    def close(self) -> None:
        """Let go of the tiles; they stay resident until they are evicted. Idempotent."""
        self._tree.close(self)


def _discard(_tile: Tile) -> None:
    """Save a tile nowhere."""


class KvTree:
    """The tree over a pool of slots.

    Args:
        slots: the pool.
        save: called with a tile that is about to be evicted and is :attr:`Tile.unsaved`.
    """

    def __init__(self, slots: Slots, save: Callable[[Tile], None] = _discard) -> None:
        self._slots = slots
        self._save = save
        self._roots: list[Tile] = []
        self._free = set(range(slots.count))
        self._clock = 0

    @property
    def resident_tokens(self) -> int:
        """Rows that are valid, over all tiles of the tree."""
        return sum(len(tile.tokens) for tile in self.tiles())

    @property
    def free_slots(self) -> int:
        """Slots that hold nothing."""
        return len(self._free)

    def tiles(self) -> Iterator[Tile]:
        """Every tile that a new path could stand on; parents before their children."""
        stack = list(self._roots)
        while stack:
            tile = stack.pop()
            yield tile
            stack.extend(tile.children)

    def unsaved(self) -> Tile | None:
        """A tile that should be written to disk: the one that was used longest ago."""
        tiles = [tile for tile in self.tiles() if tile.unsaved]
        return min(tiles, key=lambda tile: tile.touched) if tiles else None

    def open(self, ids: Ids) -> Path:
        """Start a path with the longest common prefix of ``ids`` and everything resident."""
        path = Path(self)
        self.adopt(path, ids)
        return path

    def adopt(self, path: Path, ids: Ids) -> int:
        """See :meth:`Path.adopt`."""
        before = path.length
        while path.length < len(ids):
            depth = path.length // TILE
            start = depth * TILE
            current = path.tiles[depth] if depth < len(path.tiles) else None
            best, rows = None, path.length - start
            # The path's own tile first, so that among equals it stays where it is.
            own = [] if current is None else [current]
            for tile in own + self._children(path.tiles[depth - 1] if depth else None):
                shared = common_prefix(tile.tokens, ids[start : start + TILE])
                if shared > rows:
                    best, rows = tile, shared
            if best is None:
                break
            if best is not current:
                best.pins += 1
                path.tiles[depth:] = [best]
                if current is not None:
                    self._unpin(current)
            path.length = start + rows
            if rows < TILE:
                break
        self._touch(path)
        return path.length - before

    def reserve(self, path: Path) -> Extent:
        """See :meth:`Path.reserve`."""
        self._check_open(path)
        depth, offset = divmod(path.length, TILE)
        if depth == len(path.tiles):
            parent = path.tiles[-1] if path.tiles else None
            path.tiles.append(self._new_tile(parent, np.empty(0, np.uint32)))
        else:
            tile = path.tiles[depth]
            if len(tile.tokens) != offset:  # invariant 3: somebody else stands at its tip
                tokens = tile.tokens[:offset].copy()
                # Rows of a forgotten tile stay forgotten in the copy.
                copy = self._new_tile(tile.parent, tokens, detached=tile.detached)
                copy.kept = min(tile.kept, offset)
                self._slots.copy_rows(tile.slot, copy.slot, offset)
                path.tiles[depth] = copy
                self._unpin(tile)
        return Extent(slot=path.tiles[depth].slot, offset=offset, room=TILE - offset)

    def reserve_behind(self, path: Path) -> Extent | None:
        """See :meth:`Path.reserve_behind`."""
        self._check_open(path)
        try:
            tile = self._new_tile(path.tiles[-1], np.empty(0, np.uint32))
        except EngineBusy:
            return None
        path.tiles.append(tile)
        return Extent(slot=tile.slot, offset=0, room=TILE)

    def append(self, path: Path, ids: Ids) -> None:
        """See :meth:`Path.append`."""
        self._check_open(path)
        depth, offset = divmod(path.length, TILE)
        tile = path.tiles[depth]
        if len(tile.tokens) != offset or len(ids) > TILE - offset:
            message = "append needs a reservation at this position, and room for the rows"
            raise LocalMisuse(message)
        tile.tokens = np.concatenate([tile.tokens, ids.astype(np.uint32, copy=False)])
        path.length += len(ids)
        self._touch(path)

    def close(self, path: Path) -> None:
        """See :meth:`Path.close`."""
        if path.closed:
            return
        path.closed = True
        for tile in reversed(path.tiles):
            self._unpin(tile)

    def forget(self, ids: Ids, keep: int) -> None:
        """Drop the rows from position ``keep`` on, of every path that agrees with ``ids``.

        A path agrees if one of the two begins with the other. Rows that it shares with a path that
        differs from ``ids`` later on stay, for that path's sake. A tile that is still pinned leaves
        the tree at once, and its slot is wiped when the last path lets go.

        Raises:
            LocalMisuse: ``keep`` outside ``[0, len(ids))``.
        """
        if not 0 <= keep < len(ids):
            message = "keep must be at least 0 and below the number of ids"
            raise LocalMisuse(message)
        for tile in list(self._roots):
            self._forget(tile, 0, ids, keep)

    # -- inside --------------------------------------------------------------------------------

    def _children(self, tile: Tile | None) -> list[Tile]:
        return self._roots if tile is None else tile.children

    def _touch(self, path: Path) -> None:
        self._clock += 1
        for tile in path.tiles:
            tile.touched = self._clock

    @staticmethod
    def _check_open(path: Path) -> None:
        if path.closed:
            message = "this path is closed"
            raise LocalMisuse(message)

    def _new_tile(self, parent: Tile | None, tokens: Ids, *, detached: bool = False) -> Tile:
        slot = self._take_slot(parent)
        # A forgotten path goes on, but nobody may adopt it.
        detached = detached or (parent is not None and parent.detached)
        tile = Tile(slot=slot, parent=parent, tokens=tokens, pins=1, detached=detached)
        if not detached:
            self._children(parent).append(tile)
        return tile

    def _take_slot(self, parent: Tile | None) -> int:
        if not self._free:
            self._evict()
        # A path in neighbouring slots is read in one call, so take the next one if it is free;
        # a new path starts where the most room follows.
        following = -1 if parent is None else parent.slot + 1
        slot = following if following in self._free else self._roomiest()
        self._free.remove(slot)
        self._slots.take(slot)
        return slot

    def _roomiest(self) -> int:
        """The first slot of the longest run of free slots; its middle, if a path ends before it."""
        best_start, best_run = -1, 0
        start, run = -1, 0
        for slot in [*sorted(self._free), self._slots.count + 1]:
            if slot == start + run:
                run += 1
                continue
            if run > best_run:
                best_start, best_run = start, run
            start, run = slot, 1
        if best_run > 1 and best_start > 0:
            return best_start + best_run // 2
        return best_start

    def _evict(self) -> None:
        """Free the least recently used tile that nothing needs (invariant 4)."""
        candidates = [tile for tile in self.tiles() if not tile.pins and not tile.children]
        if not candidates:
            message = "running requests fill the KV memory budget: wait for one of them or raise it"
            raise EngineBusy(message)
        tile = min(candidates, key=lambda tile: tile.touched)
        if tile.unsaved:
            self._save(tile)
        self._drop(tile)

    def _drop(self, tile: Tile) -> None:
        self._children(tile.parent).remove(tile)
        tile.detached = True
        self._free.add(tile.slot)

    def _unpin(self, tile: Tile) -> None:
        tile.pins -= 1
        if tile.pins:
            return
        if tile.detached:
            self._slots.wipe(tile.slot, 0)
            self._free.add(tile.slot)
        elif not tile.tokens.size:
            self._drop(tile)  # reserved and never written

    def _forget(self, tile: Tile, start: int, ids: Ids, keep: int) -> None:
        shared = common_prefix(tile.tokens, ids[start:])
        if shared < min(len(tile.tokens), len(ids) - start):
            return  # another text
        for child in list(tile.children):
            if len(ids) <= start + TILE:
                self._truncate(child, 0)  # keep < len(ids): it lies wholly behind the cut
            else:
                self._forget(child, start + TILE, ids, keep)
        if not tile.children and keep < start + TILE:
            self._truncate(tile, max(keep - start, 0))

    def _truncate(self, tile: Tile, rows: int) -> None:
        """Keep the first ``rows`` rows of a tile and nothing of what builds on it."""
        for child in list(tile.children):
            self._truncate(child, 0)
        if len(tile.tokens) <= rows and tile.tokens.size:
            return
        if tile.pins:
            self._children(tile.parent).remove(tile)
            tile.detached = True
        elif rows:
            tile.tokens = tile.tokens[:rows].copy()
            tile.kept = min(tile.kept, rows)
            tile.digest = None
            tile.saved = 0  # whoever forgets removes it from disk too
            self._slots.wipe(tile.slot, rows)
        else:
            self._slots.wipe(tile.slot, 0)
            self._drop(tile)
