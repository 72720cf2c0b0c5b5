"""The pool's memory: rows are what was written to them, in whatever order a tile holds them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crdt_llm.errors import LocalMisuse
from crdt_llm.inference.forward.native_step import Pairs
from crdt_llm.inference.kv.pool import ROW_BY_ROW, Chunk, KvPool, RowShape
from crdt_llm.inference.kv.tree import TILE

if TYPE_CHECKING:
    from crdt_llm.inference.kv.pool import Layout

LAYOUTS = pytest.mark.parametrize("layout", [ROW_BY_ROW, Pairs()], ids=["rows", "pairs"])
SHAPE = RowShape(layers=2, kv_heads=3, head_dim=16, hidden=8)
SLOTS = 3

slots = st.integers(0, SLOTS - 1)
rows = st.integers(0, TILE)
steps = st.lists(
    st.tuples(st.sampled_from(["write", "copy", "wipe", "take"]), slots, slots, rows, rows),
    max_size=12,
)


def drawn(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows that are all different."""
    generator = torch.Generator().manual_seed(seed)
    kv = (SHAPE.layers, 2 * SHAPE.kv_heads, count, SHAPE.head_dim)
    values = torch.randn(kv, generator=generator).to(SHAPE.dtype)
    return values, torch.randn(count, SHAPE.hidden, generator=generator).to(SHAPE.dtype)


@LAYOUTS
@settings(max_examples=60)
@given(steps=steps)
def test_rows_are_what_was_written(
    layout: Layout, steps: list[tuple[str, int, int, int, int]]
) -> None:
    pool = KvPool(SLOTS, SHAPE, layout=layout)
    expected = [tuple(torch.zeros_like(part) for part in drawn(TILE, 0)) for _ in range(SLOTS)]
    for seed, (what, slot, other, start, end) in enumerate(steps):
        mine = expected[slot]
        if what == "write" and start <= end:
            kv, hidden = drawn(end - start, seed)
            pool.write(slot, start, kv, hidden)
            mine[0][:, :, start:end] = kv
            mine[1][start:end] = hidden
        elif what == "copy" and slot != other:
            pool.wipe(slot, 0)  # as a slot is given out
            pool.copy_rows(other, slot, end)
            for to, source, axis in zip(mine, expected[other], (2, 0), strict=True):
                to.zero_()
                to.narrow(axis, 0, end).copy_(source.narrow(axis, 0, end))
        elif what == "wipe":
            pool.wipe(slot, start)
            mine[0][:, :, start:] = 0
            mine[1][start:] = 0
        elif what == "take":
            pool.wipe(slot, 0)
            pool.take(slot)
            for part in mine:
                part.zero_()
    for slot, (kv, hidden) in enumerate(expected):
        for count in (1, TILE // 2 + 3, TILE):
            had_kv, had_hidden = pool.read(slot, count)
            assert torch.equal(had_kv, kv[:, :, :count])
            assert torch.equal(had_hidden, hidden[:count])
            assert had_kv.is_contiguous()


@LAYOUTS
@given(blocks=st.integers(1, 4))
def test_what_is_packed_is_unpacked_again(layout: Layout, blocks: int) -> None:
    kv, _ = drawn(blocks * layout.block, blocks)
    packed = layout.pack(kv)
    assert torch.equal(layout.unpack(packed), kv)
    # Whole blocks are the beginning of a tile: that rows are copied and wiped by rests on it.
    more, _ = drawn(TILE, 0)
    more[:, :, : kv.shape[2]] = kv
    assert torch.equal(layout.pack(more)[:, :, : kv.shape[2]], packed)


def test_pairs_lie_as_the_kernels_read_them() -> None:
    kv = torch.arange(2 * TILE * 4, dtype=torch.float32).reshape(1, 2, TILE, 4)
    keys, values = Pairs().pack(kv)[0]
    at, dimension = 37, 3
    block, lane = divmod(at, Pairs.block)
    place = ((block * 2 + dimension // 2) * Pairs.block + lane) * 2 + dimension % 2
    assert keys.flatten()[place] == kv[0, 0, at, dimension]
    assert values.flatten()[(at // 2 * 4 + dimension) * 2 + at % 2] == kv[0, 1, at, dimension]


@pytest.mark.parametrize(
    ("position", "count", "tiles"), [(0, 0, 1), (TILE - 1, 2, 1), (TILE, 1, 1), (0, 1, 2)]
)
def test_a_chunk_that_is_none(position: int, count: int, tiles: int) -> None:
    with pytest.raises(LocalMisuse):
        Chunk(position, count, range(tiles))
