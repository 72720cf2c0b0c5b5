"""Attention over tiles at absolute positions, so that no cut of a prompt shows in the result.

Owns how the rows of a chunk attend to the KV of a path: which kernel calls, in which shapes, and
how their results are put together. It knows no weights and no token ids; slots come from outside.

Every kernel call has a shape that is fixed by absolute positions alone: the query rows
``[b * block, (b + 1) * block)`` form a block, filled up with zero rows where the chunk has no row,
and a block meets each tile of ``TILE`` keys on its own. Chunks, neighbours and forks change how
many such products there are, never what one of them looks like. Tiles are put together by their
log-sum-exp, one after the other in the order of positions.

The result is by definition that of small blocks, which suit the decode step. A prefill is twice as
fast in larger ones; they are used where :func:`wide_blocks_agree` has found, on this machine and
for the shapes of this model, that they give the same bits.

Sources: the split over keys is Flash-Decoding (Dao et al., 2023); the query heads of one KV head
stand side by side as query rows, which is what makes one new token cheap on a CPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from crdt_llm.inference.kv.pool import KV_DTYPE, Chunk, KvPool, RowShape
from crdt_llm.inference.kv.tree import TILE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

PRODUCT_ROWS_MIN = 4
"""Rows that a product has at least. With fewer, matrix libraries take a kernel of another kind,
which adds in another order and is no faster."""

WIDE_BLOCK = 8
"""Query rows of a block in a prefill. It divides TILE: a block ends in one tile. Wider ones are a
few per cent faster still, and a waste for short chunks."""

WIDE_ROWS_MIN = 4
"""From so many rows on a chunk is computed in wide blocks."""


class TiledAttention:
    """The attention of one chunk, prepared once and used in every layer.

    Args:
        pool: where the KV is.
        chunk: the rows.
        heads: query heads; a multiple of the pool's KV heads.
        block: query rows of a block: :func:`small_block`, or ``WIDE_BLOCK`` where it agrees.
    """

    def __init__(self, pool: KvPool, chunk: Chunk, heads: int, block: int) -> None:
        self._pool = pool
        self._chunk = chunk
        self._block = block
        self._group = heads // pool.kv_heads
        self._scale = pool.head_dim**-0.5
        skipped = chunk.offset % block  # rows of the first block before the chunk
        self._blocks = -(-(skipped + chunk.rows) // block)
        self._rows = slice(skipped, skipped + chunk.rows)
        first = chunk.offset - skipped
        rows = torch.arange(first, first + self._blocks * block).view(-1, block, 1, 1)
        hidden = (torch.arange(TILE) > rows).expand(-1, -1, self._group, -1)
        mask = torch.zeros(hidden.shape, dtype=KV_DTYPE).masked_fill_(hidden, float("-inf"))
        mask = mask.reshape(self._blocks, 1, block * self._group, TILE)
        # What the kernel is called with: the blocks of a chunk with one tile, or the one block of a
        # short chunk with neighbouring tiles.
        self._calls: list[tuple[int, int, Tensor | None]] = []
        if self._blocks > 1:
            self._calls += [(slot, slot + 1, None) for slot in chunk.slots[:-1]]
            self._calls.append((chunk.slots[-1], chunk.slots[-1] + 1, mask))
        else:
            *before, (start, count) = _runs(chunk.slots)
            self._calls += [(other, other + tiles, None) for other, tiles in before]
            # A mask of zeros adds nothing: one call for the last tile and its neighbours.
            visible = mask.new_zeros(count - 1, *mask.shape[1:])
            self._calls.append((start, start + count, torch.cat((visible, mask))))
        shape = (self._blocks, self._block, pool.kv_heads, self._group, pool.head_dim)
        self._padded = torch.zeros(shape, dtype=KV_DTYPE)
        self._taken = self._padded.flatten(0, 1)[self._rows]

    def __call__(self, layer: int, queries: Tensor, keys_values: Tensor) -> Tensor:
        """Write the chunk's keys and values, and attend.

        Args:
            layer: index of the layer.
            queries: float32, ``(rows, heads, head_dim)``.
            keys_values: float32, ``(rows, 2 * kv_heads, head_dim)``: keys, then values.

        Returns:
            float32, ``(rows, heads * head_dim)``.
        """
        chunk, pool = self._chunk, self._pool
        last = pool.kv[chunk.slots[-1], layer]
        last[:, chunk.offset : chunk.offset + chunk.rows].copy_(keys_values.transpose(0, 1))
        self._taken.copy_(queries.view(self._taken.shape))
        blocks = self._padded.transpose(1, 2).reshape(
            self._blocks, pool.kv_heads, -1, pool.head_dim
        )
        found = [
            self._product(blocks, pool.keys[layer][start:end], pool.values[layer][start:end], mask)
            for start, end, mask in self._calls
        ]
        if self._blocks > 1:
            output = torch.stack([output for output, _ in found])
            log_sum = torch.stack([log_sum for _, log_sum in found])
        elif len(found) > 1:
            output = torch.cat([output for output, _ in found]).unsqueeze(1)
            log_sum = torch.cat([log_sum for _, log_sum in found]).unsqueeze(1)
        else:
            output, log_sum = (part.unsqueeze(1) for part in found[0])
        return _merge(self._to_rows(output), self._to_rows(log_sum.unsqueeze(-1)))

    def _product(
        self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The kernel: softmax over each tile, and the log of its denominator.

        Args:
            queries: ``(blocks, kv_heads, rows, head_dim)``.
            keys: ``(tiles, kv_heads, TILE, head_dim)``; one tile, or one block.
            values: as ``keys``.
            mask: what is added to the scores, or None.

        Returns:
            ``(products, kv_heads, rows, head_dim)``, ``(products, kv_heads, rows)``.
        """
        products = max(len(queries), len(keys))
        # With one product in all the kernel is called outside of its parallel region, where the
        # matrix library may split it over threads: another order of additions. So there are two.
        batch = 2 if products * self._pool.kv_heads == 1 else products
        output, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(  # noqa: SLF001 - the public function hides the log-sum-exp
            queries.expand(batch, -1, -1, -1),
            keys.expand(batch, -1, -1, -1),
            values.expand(batch, -1, -1, -1),
            attn_mask=mask if mask is None else mask.expand(batch, -1, -1, -1),
            scale=self._scale,
        )
        return output[:products], log_sum[:products]

    def _to_rows(self, blocks: Tensor) -> Tensor:
        """``(tiles, blocks, kv_heads, rows, n)`` to ``(tiles, rows, kv_heads, group, n)``.

        Without the rows that were filled up.
        """
        kv_heads = self._pool.kv_heads
        split = blocks.view(len(blocks), self._blocks, kv_heads, self._block, self._group, -1)
        return split.transpose(2, 3).flatten(1, 2)[:, self._rows]


def small_block(heads: int, kv_heads: int) -> int:
    """The query rows of the blocks that define the result: 1, 2 or 4.

    One row costs as much as its whole block, so a block is no larger than a product needs.
    """
    block = 1
    while block * (heads // kv_heads) < PRODUCT_ROWS_MIN:
        block *= 2
    return block


def wide_blocks_agree(heads: int, kv_heads: int, head_dim: int) -> bool:
    """Whether blocks of ``WIDE_BLOCK`` rows give the bits of small ones, here and for this shape.

    Which kernel a matrix library takes depends on the shape of a product, not on its values, and
    there are two shapes: so random values tell. Every row of a block is compared, in a tile that
    is masked and in one that is not.
    """
    generator = torch.Generator().manual_seed(1)
    pool = KvPool(2, RowShape(1, kv_heads, head_dim, 1))
    pool.kv.copy_(torch.randn(pool.kv.shape, generator=generator))
    for offset in range(0, TILE, 4 * WIDE_BLOCK):
        chunk = Chunk(TILE + offset, 2 * WIDE_BLOCK, (0, 1))
        queries = torch.randn(chunk.rows, heads, head_dim, generator=generator) * 2
        keys_values = torch.randn(chunk.rows, 2 * kv_heads, head_dim, generator=generator)
        small, wide = (
            TiledAttention(pool, chunk, heads, block)(0, queries, keys_values)
            for block in (small_block(heads, kv_heads), WIDE_BLOCK)
        )
        if not torch.equal(small, wide):
            return False
    return True


def _runs(slots: Sequence[int]) -> list[tuple[int, int]]:
    """Neighbouring slots as ``(first, count)``: each run is one view of the pool."""
    runs: list[tuple[int, int]] = []
    for slot in slots:
        if runs and slot == sum(runs[-1]):
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((slot, 1))
    return runs


def _merge(outputs: Tensor, log_sums: Tensor) -> Tensor:
    """Put the tiles of each row together, weighted by their share of the whole denominator.

    The weighted sum is one addition after the other in the order of positions, because a reduction
    may pick its order by the size of the batch.

    Args:
        outputs: bfloat16 ``(tiles, rows, kv_heads, group, head_dim)``.
        log_sums: float32 ``(tiles, rows, kv_heads, group, 1)``.

    Returns:
        float32 ``(rows, heads * head_dim)``.
    """
    rows = outputs.shape[1]
    if len(outputs) == 1:
        return outputs[0].float().reshape(rows, -1)
    # Row by row: along any other dimension the last elements go through a scalar `exp`.
    weights = log_sums.movedim(0, -1).softmax(-1).movedim(-1, 0)
    first, *others = (outputs * weights).unbind()
    for other in others:
        first += other
    return first.reshape(rows, -1)
