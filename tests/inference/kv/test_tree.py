"""The KV tree against its invariants, with slots that know which row they hold."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    rule,
)

from crdt_llm.errors import EngineBusy, LocalMisuse
from crdt_llm.inference.kv.tree import TILE, KvTree, common_prefix

if TYPE_CHECKING:
    from crdt_llm.inference.kv.tree import Extent, Path

SLOTS = 6


@dataclass
class RecordingSlots:
    """Rows as the whole id path they were computed from: a wrong row cannot look right.

    Beside each stands the number of its computation, which tells a copy from a row computed anew.
    """

    count: int = SLOTS
    rows: list[list[tuple[int, ...] | None]] = field(default_factory=list)
    origins: list[list[int | None]] = field(default_factory=list)
    computations: int = 0

    def __post_init__(self) -> None:
        self.rows = [[None] * TILE for _ in range(self.count)]
        self.origins = [[None] * TILE for _ in range(self.count)]

    def compute(self, slot: int, row: int, ids: np.ndarray) -> None:
        self.rows[slot][row] = tuple(ids.tolist())
        self.origins[slot][row] = self.computations
        self.computations += 1

    def copy_rows(self, source: int, target: int, rows: int) -> None:
        self.rows[target][:rows] = self.rows[source][:rows]
        self.origins[target][:rows] = self.origins[source][:rows]

    def take(self, slot: int) -> None:
        self.wipe(slot, 0)

    def wipe(self, slot: int, start: int) -> None:
        self.rows[slot][start:] = [None] * (TILE - start)
        self.origins[slot][start:] = [None] * (TILE - start)


def ids_of(*runs: tuple[int, int]) -> np.ndarray:
    """``(id, times)`` ..."""
    return np.concatenate([np.full(times, value, np.uint32) for value, times in runs])


def compute(path: Path, slots: RecordingSlots, ids: np.ndarray, limit: int = 64) -> int:
    """Bring the rows of ``ids``, as the engine does; returns how many were computed."""
    computed = 0
    while path.length < len(ids):
        first, end = path.length, min(path.length + limit, len(ids))
        extent: Extent | None = path.reserve()
        parts = []
        while extent is not None:
            rows = min(extent.room, end - first)
            for index in range(rows):
                slots.compute(extent.slot, extent.offset + index, ids[: first + index + 1])
            parts.append(ids[first : first + rows])
            first += rows
            extent = path.reserve_behind() if first < end else None
        for part in parts:
            path.append(part)
            computed += len(part)
    return computed


def check_rows(path: Path, slots: RecordingSlots, ids: np.ndarray) -> None:
    for position in range(path.length):
        slot = path.tiles[position // TILE].slot
        assert slots.rows[slot][position % TILE] == tuple(ids[: position + 1].tolist())


def bring(tree: KvTree, slots: RecordingSlots, ids: np.ndarray) -> int:
    path = tree.open(ids)
    computed = compute(path, slots, ids)
    check_rows(path, slots, ids)
    path.close()
    return computed


@pytest.fixture
def slots() -> RecordingSlots:
    return RecordingSlots()


@pytest.fixture
def tree(slots: RecordingSlots) -> KvTree:
    return KvTree(slots)


def test_an_appended_turn_computes_what_is_new(tree: KvTree, slots: RecordingSlots) -> None:
    assert bring(tree, slots, ids_of((1, 300))) == 300
    assert bring(tree, slots, ids_of((1, 300), (2, 70))) == 70
    assert bring(tree, slots, ids_of((1, 300), (2, 70))) == 0


def test_a_fork_computes_nothing_of_what_it_shares(tree: KvTree, slots: RecordingSlots) -> None:
    bring(tree, slots, ids_of((1, 300), (2, 100)))
    assert bring(tree, slots, ids_of((1, 300), (3, 5))) == 5
    assert bring(tree, slots, ids_of((1, 280), (4, 5))) == 5
    assert bring(tree, slots, ids_of((1, 300), (2, 101))) == 1


def test_full_tiles_are_shared_by_reference(tree: KvTree, slots: RecordingSlots) -> None:
    bring(tree, slots, ids_of((1, TILE), (2, 10)))
    bring(tree, slots, ids_of((1, TILE), (3, 10)))
    assert tree.free_slots == SLOTS - 3
    assert tree.resident_tokens == TILE + 20


def test_a_running_path_keeps_its_rows_while_another_grows_the_same_tile(
    tree: KvTree, slots: RecordingSlots
) -> None:
    first = tree.open(ids_of((1, 50)))
    compute(first, slots, ids_of((1, 50)))
    second = tree.open(ids_of((1, 50), (2, 1)))
    assert second.length == 50
    compute(first, slots, ids_of((1, 50), (3, 20)))
    compute(second, slots, ids_of((1, 50), (2, 20)))
    check_rows(first, slots, ids_of((1, 50), (3, 20)))
    check_rows(second, slots, ids_of((1, 50), (2, 20)))


def test_what_another_path_has_computed_since_is_adopted(
    tree: KvTree, slots: RecordingSlots
) -> None:
    ids = ids_of((1, 50), (2, 400))
    late = tree.open(ids)
    early = tree.open(ids)
    compute(early, slots, ids)
    assert late.adopt(ids) == 450
    check_rows(late, slots, ids)


def test_a_path_that_forked_off_moves_to_the_sibling_that_went_its_way(
    tree: KvTree, slots: RecordingSlots
) -> None:
    bring(tree, slots, ids_of((1, 50), (2, 20)))
    late = tree.open(ids_of((1, 50), (3, 30)))
    assert late.length == 50
    bring(tree, slots, ids_of((1, 50), (3, 30)))
    assert late.adopt(ids_of((1, 50), (3, 30))) == 30
    check_rows(late, slots, ids_of((1, 50), (3, 30)))


def test_the_least_recently_used_tile_goes_first(tree: KvTree, slots: RecordingSlots) -> None:
    for value in range(SLOTS):
        bring(tree, slots, ids_of((value, 10)))
    bring(tree, slots, ids_of((0, 10)))  # used again
    bring(tree, slots, ids_of((99, 10)))  # evicts 1
    assert bring(tree, slots, ids_of((0, 10))) == 0
    assert bring(tree, slots, ids_of((2, 10))) == 0
    assert bring(tree, slots, ids_of((1, 10))) == 10


def test_a_pinned_path_is_never_evicted(tree: KvTree, slots: RecordingSlots) -> None:
    ids = ids_of((1, (SLOTS - 1) * TILE))
    pinned = tree.open(ids)
    compute(pinned, slots, ids)
    bring(tree, slots, ids_of((2, 10)))
    bring(tree, slots, ids_of((3, 10)))
    check_rows(pinned, slots, ids)
    other = tree.open(ids_of((4, 10)))
    compute(other, slots, ids_of((4, 10)))
    with pytest.raises(EngineBusy):
        tree.open(ids_of((5, 10))).reserve()
    other.close()
    assert bring(tree, slots, ids_of((5, 10))) == 10


def test_a_reservation_that_is_never_written_gives_its_slot_back(tree: KvTree) -> None:
    path = tree.open(ids_of((1, 10)))
    path.reserve()
    assert tree.free_slots == SLOTS - 1
    path.close()
    path.close()
    assert tree.free_slots == SLOTS


def test_what_is_reserved_behind_a_tile_goes_back_if_it_is_never_written(tree: KvTree) -> None:
    path = tree.open(ids_of((1, 300)))
    path.reserve()
    extent = path.reserve_behind()
    assert extent is not None
    assert (extent.offset, extent.room) == (0, TILE)
    path.close()
    assert tree.free_slots == SLOTS
    assert not list(tree.tiles())


def test_there_may_be_no_room_behind_a_tile(tree: KvTree, slots: RecordingSlots) -> None:
    for value in range(2, SLOTS + 1):
        compute(tree.open(ids_of((value, 1))), slots, ids_of((value, 1)))
    path = tree.open(ids_of((1, 300)))
    path.reserve()
    assert path.reserve_behind() is None
    path.append(ids_of((1, TILE)))
    assert path.length == TILE


def test_neighbouring_tiles_of_a_path_lie_in_neighbouring_slots(
    tree: KvTree, slots: RecordingSlots
) -> None:
    ids = ids_of((1, 3 * TILE))
    path = tree.open(ids)
    compute(path, slots, ids)
    numbers = [tile.slot for tile in path.tiles]
    assert numbers == list(range(numbers[0], numbers[0] + 3))


def test_forgetting_drops_a_path_from_a_position_on(tree: KvTree, slots: RecordingSlots) -> None:
    secret = ids_of((1, 300), (2, 20))
    bring(tree, slots, np.append(secret, ids_of((3, 300))))
    bring(tree, slots, ids_of((1, 280), (4, 5)))
    tree.forget(secret, keep=300)
    held = {row for slot in slots.rows for row in slot if row is not None}
    assert not any(row[: len(secret)][300:] for row in held if row[:300] == tuple(secret[:300]))
    assert bring(tree, slots, ids_of((1, 280), (4, 5))) == 0
    assert bring(tree, slots, secret) == 20


def test_forgetting_leaves_another_text_that_begins_alike(
    tree: KvTree, slots: RecordingSlots
) -> None:
    bring(tree, slots, ids_of((1, 10), (2, 5), (3, 5)))
    bring(tree, slots, ids_of((1, 10), (2, 5), (4, 5)))
    tree.forget(ids_of((1, 10), (2, 5), (3, 5)), keep=10)
    assert bring(tree, slots, ids_of((1, 10), (2, 5), (4, 5))) == 0
    tree.forget(ids_of((1, 10), (2, 5)), keep=10)
    assert bring(tree, slots, ids_of((1, 10), (2, 5), (4, 5))) == 10


def test_a_forgotten_path_that_still_runs_is_wiped_when_it_ends(
    tree: KvTree, slots: RecordingSlots
) -> None:
    ids = ids_of((1, 300))
    path = tree.open(ids)
    compute(path, slots, ids)
    tree.forget(ids, keep=0)
    longer = np.append(ids, ids_of((2, 300)))
    compute(path, slots, longer)
    check_rows(path, slots, longer)
    assert tree.open(longer).length == 0
    path.close()
    assert tree.free_slots == SLOTS
    assert all(row is None for slot in slots.rows for row in slot)


def test_what_a_running_path_copies_from_a_forgotten_tile_stays_forgotten(
    tree: KvTree, slots: RecordingSlots
) -> None:
    secret, other = ids_of((1, 100)), ids_of((1, 60), (2, 30))
    bring(tree, slots, secret)
    path = tree.open(other)  # stands at 60 in the tile of the secret, and pins it
    tree.forget(secret[:50], keep=0)
    compute(path, slots, other)
    check_rows(path, slots, other)
    assert tree.open(other).length == 0
    path.close()
    assert tree.free_slots == SLOTS
    assert all(row is None for slot in slots.rows for row in slot)


@pytest.mark.parametrize("keep", [-1, 10, 11])
def test_forgetting_keeps_less_than_it_names(tree: KvTree, keep: int) -> None:
    with pytest.raises(LocalMisuse):
        tree.forget(ids_of((1, 10)), keep=keep)


def test_a_closed_path_takes_no_rows(tree: KvTree) -> None:
    path = tree.open(ids_of((1, 10)))
    path.close()
    with pytest.raises(LocalMisuse):
        path.reserve()


def test_rows_without_a_reservation_are_refused(tree: KvTree, slots: RecordingSlots) -> None:
    path = tree.open(ids_of((1, 10)))
    compute(path, slots, ids_of((1, 10)))
    other = tree.open(ids_of((1, 5), (2, 5)))
    with pytest.raises(LocalMisuse):
        other.append(ids_of((2, 5)))


def test_common_prefix_of_arrays() -> None:
    assert common_prefix(ids_of((1, 3)), ids_of((1, 5))) == 3
    assert common_prefix(ids_of((1, 3), (2, 1)), ids_of((1, 5))) == 3
    assert common_prefix(ids_of((1, 0)), ids_of((1, 5))) == 0


# Runs of few ids, whose edges fall at and beside the ends of tiles.
RUNS = st.lists(
    st.tuples(st.integers(0, 2), st.sampled_from([1, 2, 100, 255, 256, 257])),
    min_size=1,
    max_size=3,
).map(lambda runs: ids_of(*runs))


class KvMachine(RuleBasedStateMachine):
    """Requests that open, grow, adopt, close and forget in any order; every row is checked."""

    paths: Bundle[tuple[Path, list[np.ndarray]]] = Bundle("paths")

    def __init__(self) -> None:
        super().__init__()
        self.slots = RecordingSlots(count=12)
        self.tree = KvTree(self.slots)
        self.open: list[tuple[Path, list[np.ndarray]]] = []
        self.forgotten: set[int | None] = set()

    @rule(target=paths, ids=RUNS)
    def open_path(self, ids: np.ndarray) -> tuple[Path, list[np.ndarray]]:
        return self._open(ids)

    @rule(path=paths, rows=st.sampled_from([1, 63, 64, 256]))
    def grow(self, path: tuple[Path, list[np.ndarray]], rows: int) -> None:
        upto = path[1][0][: path[0].length + rows]
        try:
            compute(path[0], self.slots, upto)
        except EngineBusy:
            assert self.tree.free_slots == 0

    @rule(path=paths)
    def adopt(self, path: tuple[Path, list[np.ndarray]]) -> None:
        before = path[0].length
        assert path[0].adopt(path[1][0]) == path[0].length - before

    @rule(path=paths, ids=RUNS)
    def extend(self, path: tuple[Path, list[np.ndarray]], ids: np.ndarray) -> None:
        path[1][0] = np.concatenate([path[1][0][: path[0].length], ids])

    @rule(path=consumes(paths))
    def close(self, path: tuple[Path, list[np.ndarray]]) -> None:
        path[0].close()
        self.open = [each for each in self.open if each[0] is not path[0]]

    @rule(ids=RUNS, share=st.floats(0, 0.99))
    def forget(self, ids: np.ndarray, share: float) -> None:
        self._forget(ids, int(share * len(ids)))

    @rule(target=paths, path=paths, ids=RUNS, share=st.floats(0, 0.99))
    def forget_what_a_new_path_shares(
        self, path: tuple[Path, list[np.ndarray]], ids: np.ndarray, share: float
    ) -> tuple[Path, list[np.ndarray]]:
        """The new path stands inside a tile of the other when the other's text is forgotten."""
        read = path[1][0][: path[0].length]
        opened = self._open(np.concatenate([read[: int(share * len(read))], ids]))
        if read.size:
            self._forget(read, 0)
        self.grow(opened, 64)
        return opened

    def _open(self, ids: np.ndarray) -> tuple[Path, list[np.ndarray]]:
        opened = (self.tree.open(ids), [ids])
        self.open.append(opened)
        return opened

    def _forget(self, ids: np.ndarray, keep: int) -> None:
        before = self._adoptable()
        self.tree.forget(ids, keep)
        self.forgotten |= before - self._adoptable()
        for tile, start, text in self._tiles():
            end = start + len(tile)
            whole = np.concatenate([text, tile])
            agrees = common_prefix(whole, ids) == min(len(whole), len(ids))
            if agrees and end > keep:
                # Only for the sake of another text that builds on it.
                assert len(whole) < len(ids)

    def _adoptable(self) -> set[int | None]:
        """The computations whose rows a new path could stand on."""
        return {
            origin
            for tile in self.tree.tiles()
            for origin in self.slots.origins[tile.slot][: len(tile.tokens)]
        }

    def _tiles(self) -> list[tuple[np.ndarray, int, np.ndarray]]:
        found = []
        stack = [(tile, 0, np.empty(0, np.uint32)) for tile in self.tree._roots]
        while stack:
            tile, start, text = stack.pop()
            found.append((tile.tokens, start, text))
            below = np.concatenate([text, tile.tokens])
            stack.extend((child, start + TILE, below) for child in tile.children)
        return found

    @invariant()
    def every_row_of_every_open_path_is_its_own(self) -> None:
        for path, (ids,) in self.open:
            assert path.length <= len(ids)
            check_rows(path, self.slots, ids)

    @invariant()
    def every_slot_is_free_or_held_once(self) -> None:
        in_tree = [tile.slot for tile in self.tree.tiles()]
        pinned = {tile.slot for path, _ in self.open for tile in path.tiles}
        assert len(in_tree) == len(set(in_tree))
        assert not self.tree._free & (set(in_tree) | pinned)
        assert self.tree._free | set(in_tree) | pinned == set(range(self.slots.count))

    @invariant()
    def what_was_forgotten_is_seen_by_running_paths_alone(self) -> None:
        assert not self.forgotten & self._adoptable()
        for slot in self.tree._free:
            assert not self.forgotten & set(self.slots.origins[slot])

    @invariant()
    def only_full_tiles_have_children(self) -> None:
        assert all(tile.full for tile in self.tree.tiles() if tile.children)


KvMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestKvMachine = KvMachine.TestCase


# -- what may be on disk ---------------------------------------------------------------------------


def test_only_what_a_path_keeps_may_be_written(slots: RecordingSlots) -> None:
    saved: list[np.ndarray] = []
    tree = KvTree(slots, lambda tile: saved.append(tile.path))
    kept = tree.open(ids_of((1, 300)))
    compute(kept, slots, ids_of((1, 300)))
    kept.keep()
    compute(kept, slots, ids_of((1, 300), (2, 40)))  # goes on, and was not kept since
    kept.close()
    assert [tile.kept for tile in tree.tiles()] == [TILE, 44]
    bring(tree, slots, ids_of((3, (SLOTS - 1) * TILE)))  # evicts the second tile
    bring(tree, slots, ids_of((4, 2 * TILE)))  # evicts the first one, and what nobody kept
    assert [len(path) for path in saved] == [340, TILE]


def test_a_copy_keeps_what_its_original_did(tree: KvTree, slots: RecordingSlots) -> None:
    first = tree.open(ids_of((1, 50)))
    compute(first, slots, ids_of((1, 50)))
    first.keep()
    compute(first, slots, ids_of((1, 50), (2, 50)))
    fork = tree.open(ids_of((1, 60)))
    compute(fork, slots, ids_of((1, 60)))
    assert sorted(tile.kept for tile in tree.tiles()) == [50, 50]
    assert all(tile.unsaved for tile in tree.tiles())


def test_what_came_from_disk_is_not_written_again(tree: KvTree, slots: RecordingSlots) -> None:
    path = tree.open(ids_of((1, 100)))
    compute(path, slots, ids_of((1, 100)))
    path.restored()
    assert tree.unsaved() is None
    compute(path, slots, ids_of((1, 120)))
    path.keep()
    path.close()
    tile = tree.unsaved()
    assert tile is not None
    tree.forget(ids_of((1, 120)), keep=110)
    assert (tile.kept, tile.saved) == (110, 0)
