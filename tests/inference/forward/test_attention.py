"""Attention over tiles: right against the formula, and one result however the rows are cut."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest
import torch

from crdt_llm.errors import LocalMisuse
from crdt_llm.inference.forward import attention
from crdt_llm.inference.forward.attention import (
    WIDE_BLOCK,
    TiledAttention,
    small_block,
    wide_blocks_agree,
)
from crdt_llm.inference.kv.pool import Chunk, KvPool, RowShape
from crdt_llm.inference.kv.tree import TILE

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

# (query heads, KV heads, head size)
HEADS = [(9, 3, 64), (4, 1, 64), (2, 1, 128), (2, 2, 16), (8, 2, 16)]
LENGTH = 530


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def attend(
    heads: tuple[int, int, int],
    ends: Sequence[int],
    slots: Sequence[int] = (0, 1, 2),
    block: int | None = None,
) -> torch.Tensor:
    """All rows of one random text, whose chunks end at ``ends`` and at the ends of tiles."""
    query_heads, kv_heads, head_dim = heads
    generator = torch.Generator().manual_seed(7)
    queries = torch.randn(LENGTH, query_heads, head_dim, generator=generator)
    keys_values = torch.randn(LENGTH, 2 * kv_heads, head_dim, generator=generator)
    pool = KvPool(8, RowShape(2, kv_heads, head_dim, 16))
    outputs = []
    edges = sorted({0, TILE, 2 * TILE, LENGTH, *ends})
    for start, end in itertools.pairwise(edges):
        chunk = Chunk(start, end - start, slots[: start // TILE + 1])
        rows = block or small_block(query_heads, kv_heads)
        attended = TiledAttention(pool, chunk, query_heads, rows)
        outputs.append(attended(1, queries[start:end], keys_values[start:end]))
    return torch.cat(outputs)


def by_formula(heads: tuple[int, int, int]) -> torch.Tensor:
    query_heads, kv_heads, head_dim = heads
    generator = torch.Generator().manual_seed(7)
    queries = torch.randn(LENGTH, query_heads, head_dim, generator=generator).double()
    keys_values = torch.randn(LENGTH, 2 * kv_heads, head_dim, generator=generator).double()
    group = query_heads // kv_heads
    keys = keys_values[:, :kv_heads].repeat_interleave(group, 1)
    values = keys_values[:, kv_heads:].repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", queries, keys) * head_dim**-0.5
    scores.masked_fill_(torch.ones(LENGTH, LENGTH).triu(1).bool(), float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), values).reshape(LENGTH, -1)


@pytest.mark.parametrize("heads", HEADS)
def test_rows_attend_to_themselves_and_what_is_before(heads: tuple[int, int, int]) -> None:
    difference = (attend(heads, [64, 128, 300]).double() - by_formula(heads)).abs()
    assert difference.max() < 0.03
    assert difference.mean() < 0.001


CUTS = {
    "single rows": range(LENGTH),
    "rows of three": range(0, LENGTH, 3),
    "chunks of 64": range(0, LENGTH, 64),
    "ragged": [1, 2, 5, 77, 78, 140, 141, 255, 257, 258, 400, 401, 403, 511, 513],
}


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize("cut", list(CUTS))
def test_no_cut_and_no_thread_leaves_a_trace(
    heads: tuple[int, int, int], threads: int, cut: str
) -> None:
    whole = attend(heads, [])
    torch.set_num_threads(threads)
    assert torch.equal(attend(heads, list(CUTS[cut])), whole)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize("cut", list(CUTS))
def test_wide_blocks_are_used_only_if_they_leave_no_trace(
    heads: tuple[int, int, int], threads: int, cut: str
) -> None:
    if not wide_blocks_agree(*heads):
        pytest.skip("on this machine wide blocks differ, so the engine does not use them")
    expected = attend(heads, [])
    torch.set_num_threads(threads)
    assert torch.equal(attend(heads, list(CUTS[cut]), block=WIDE_BLOCK), expected)


def test_a_product_of_few_rows_is_found_to_disagree(monkeypatch: pytest.MonkeyPatch) -> None:
    assert wide_blocks_agree(3, 1, 64)
    product = TiledAttention._product

    def other_for_few_rows(
        self: TiledAttention,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        output, log_sum = product(self, queries, keys, values, mask)
        if queries.shape[2] < 8:
            output[..., -1, 5] *= 1.01
        return output, log_sum

    monkeypatch.setattr(TiledAttention, "_product", other_for_few_rows)
    assert not wide_blocks_agree(3, 1, 64)


@pytest.mark.parametrize(("heads", "rows"), [((1, 1), 4), ((2, 1), 2), ((9, 3), 2), ((8, 2), 1)])
def test_a_small_block_has_as_many_rows_as_a_product_needs(
    heads: tuple[int, int], rows: int
) -> None:
    assert small_block(*heads) == rows


def test_where_the_slots_lie_leaves_no_trace() -> None:
    ends = list(range(0, LENGTH, 7))
    together = attend(HEADS[0], ends, (0, 1, 2))
    for slots in ((5, 6, 7), (0, 4, 2), (3, 2, 1)):
        assert torch.equal(attend(HEADS[0], ends, slots), together)


def test_neighbouring_slots_are_one_run() -> None:
    assert attention._runs([]) == []
    assert attention._runs([3]) == [(3, 1)]
    assert attention._runs([3, 4, 5, 7, 1, 2]) == [(3, 3), (7, 1), (1, 2)]


def test_rows_are_copied_and_wiped_whole() -> None:
    pool = KvPool(2, RowShape(1, 1, 4, 6))
    pool.kv[0], pool.hidden[0] = 1, 1
    pool.copy_rows(0, 1, 10)
    assert pool.kv[1, :, :, :10].all()
    assert pool.hidden[1, :10].all()
    assert not pool.kv[1, :, :, 10:].any()
    assert not pool.hidden[1, 10:].any()
    pool.wipe(0, 5)
    assert pool.kv[0, :, :, :5].all()
    assert not pool.kv[0, :, :, 5:].any()
    assert not pool.hidden[0, 5:].any()


def test_a_slot_is_zero_whenever_it_is_taken() -> None:
    pool = KvPool(2, RowShape(1, 1, 4, 6))
    for _ in range(3):
        for slot in (0, 1):
            pool.take(slot)
            assert not pool.kv[slot].any()
            assert not pool.hidden[slot].any()
            pool.kv[slot], pool.hidden[slot] = 1, 1


@pytest.mark.parametrize(
    ("position", "rows", "slots"), [(0, 0, 1), (200, 100, 1), (256, 1, 1), (0, 1, 2)]
)
def test_a_chunk_lies_in_one_tile_and_has_its_slots(position: int, rows: int, slots: int) -> None:
    with pytest.raises(LocalMisuse):
        Chunk(position, rows, list(range(slots)))
