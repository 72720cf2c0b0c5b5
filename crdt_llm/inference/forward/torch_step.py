"""The forward step in operations of torch: for CPUs and shapes that the native one does not serve.

Owns the arithmetic of a chunk in the weight format ``int8``. It knows slots, but not which ids they
hold, nor requests, nor sampling.

The result of a row depends on the row and on the KV before it alone, bit for bit: linear layers by
:mod:`~crdt_llm.inference.forward.quantised`, attention by
:mod:`~crdt_llm.inference.forward.attention`, and here by keeping to operations that treat each row
or each element alike. Two habits of the library need care: it splits large element-wise operations
over threads, and the elements at the end of such a part go through scalar code, whose ``exp``
rounds differently; and it may fuse a multiplication with an addition in one of the two. So rows go
through SiLU in parts that are not split, whose width has no such end, and products are added in a
step of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from crdt_llm.inference.forward.attention import (
    WIDE_BLOCK,
    WIDE_ROWS_MIN,
    TiledAttention,
    small_block,
    wide_blocks_agree,
)
from crdt_llm.inference.forward.quantised import (
    Int8Linear,
    Rows,
    check_integer_product,
    prepacked_product_is_exact,
)
from crdt_llm.inference.kv.pool import ROW_BY_ROW

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from crdt_llm.inference.forward.weights import LayerWeights, Shape
    from crdt_llm.inference.kv.pool import Chunk, KvPool, Layout

ELEMENTS_MAX_PER_THREAD = 32768
"""Up to so many elements torch does not split an element-wise operation over threads
(``at::internal::GRAIN_SIZE``)."""

VECTOR_ELEMENTS = 32
"""A multiple of this many float32 has no end that goes through scalar code: two AVX-512 registers,
which is what the vectorised loop takes at a time."""


@dataclass(frozen=True, slots=True)
class _Layer:
    """The weights of one layer; ``head_norm`` is Qwen3's."""

    attention_norm: Tensor
    queries_keys_values: Int8Linear
    head_norm: Tensor | None
    output: Int8Linear
    mlp_norm: Tensor
    gate_up: Int8Linear
    down: Int8Linear


class TorchStep:
    """A model's arithmetic.

    Args:
        shape: of the model.
        cosines: of every position, ``(positions, head_dim)``.
        sines: as ``cosines``; signed.

    Raises:
        ModelUnusable: products of whole numbers are not exact here.
    """

    build = "torch"

    def __init__(self, shape: Shape, cosines: Tensor, sines: Tensor) -> None:
        check_integer_product()
        self._prepacked = prepacked_product_is_exact()
        self._shape = shape
        self._cosines, self._sines = cosines.unsqueeze(1), sines.unsqueeze(1)
        self._small_block = small_block(shape.heads, shape.kv_heads)
        wide = wide_blocks_agree(shape.heads, shape.kv_heads, shape.head_dim)
        self._wide_block = WIDE_BLOCK if wide else self._small_block
        self._layers: list[_Layer] = []

    @property
    def layout(self) -> Layout:
        """See :class:`~crdt_llm.inference.forward.llama.ForwardStep`."""
        return ROW_BY_ROW

    def add_layer(self, weights: LayerWeights) -> None:
        """The next layer."""
        pad = -self._shape.intermediate % VECTOR_ELEMENTS
        gates_ups = weights.gate_up.chunk(2)
        biases = (None, None) if weights.gate_up_bias is None else weights.gate_up_bias.chunk(2)
        self._layers.append(
            _Layer(
                attention_norm=weights.attention_norm,
                queries_keys_values=self._linear(
                    [weights.queries_keys_values], [weights.queries_keys_values_bias]
                ),
                head_norm=weights.head_norm,
                output=self._linear([weights.output], [weights.output_bias]),
                mlp_norm=weights.mlp_norm,
                gate_up=self._linear(
                    [functional.pad(part, (0, 0, 0, pad)) for part in gates_ups],
                    [None if bias is None else functional.pad(bias, (0, pad)) for bias in biases],
                ),
                down=self._linear([functional.pad(weights.down, (0, pad))], [weights.down_bias]),
            )
        )

    def set_head(self, norm: Tensor, weights: Tensor) -> None:
        """What follows the last layer: its norm, and the vocabulary."""
        self._norm = norm
        self._head = self._linear([weights], [None])

    def forward(self, state: Tensor, chunks: Sequence[Chunk], pool: KvPool) -> None:
        """Compute the rows of one or more chunks, each into the last of its slots.

        Products see the rows of all chunks at once; attention sees one path at a time.

        Args:
            state: float32, ``(rows, hidden)``: embeddings of the chunks in their order; used up.
            chunks: where the rows stand; no two of them in one slot. One that goes on where another
                one fills its tile stands behind it.
            pool: where the KV before them is, and theirs goes.
        """
        shape = self._shape
        rows = len(state)
        parts = [
            TiledAttention(pool, chunk, shape.heads, self._block(chunk.rows)) for chunk in chunks
        ]
        sizes = [chunk.rows for chunk in chunks]
        cosines = self._rotation(self._cosines, chunks)
        sines = self._rotation(self._sines, chunks)
        rotated_heads = shape.heads + shape.kv_heads
        all_heads = rotated_heads + shape.kv_heads
        epsilon = shape.norm_epsilon
        for index, layer in enumerate(self._layers):
            vectors = layer.queries_keys_values(_normed(state, layer.attention_norm, epsilon))
            vectors = vectors.view(rows, all_heads, shape.head_dim)
            rotated = vectors[:, :rotated_heads]
            if layer.head_norm is not None:
                rotated.mul_(_inverse_norm(rotated, epsilon)).mul_(layer.head_norm)
            turned = rotated.roll(shape.head_dim // 2, -1).mul_(sines)
            rotated.mul_(cosines).add_(turned)
            queries, keys_values = vectors[:, : shape.heads], vectors[:, shape.heads :]
            if len(parts) == 1:
                attended = parts[0](index, queries, keys_values)
            else:
                each = zip(
                    parts, torch.split(queries, sizes), torch.split(keys_values, sizes), strict=True
                )
                attended = torch.cat([part(index, *theirs) for part, *theirs in each])
            state += layer.output(Rows.round(attended))
            gates = layer.gate_up(_normed(state, layer.mlp_norm, epsilon))
            state += layer.down(Rows.round(_gated(gates)))
        state *= _inverse_norm(state, epsilon)
        state *= self._norm
        for chunk, hidden in zip(chunks, torch.split(state, sizes), strict=True):
            pool.hidden[chunk.slots[-1], chunk.offset : chunk.offset + chunk.rows] = hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """The logits that follow rows.

        Args:
            hidden: bfloat16, ``(rows, hidden)``: of a pool.

        Returns:
            float32, ``(rows, vocabulary)``.
        """
        return self._head(Rows.round(hidden.float()))

    # -- inside --------------------------------------------------------------------------------

    def _linear(self, matrices: list[Tensor], biases: list[Tensor | None]) -> Int8Linear:
        return Int8Linear.quantise(matrices, biases, prepacked=self._prepacked)

    def _block(self, rows: int) -> int:
        return self._wide_block if rows >= WIDE_ROWS_MIN else self._small_block

    @staticmethod
    def _rotation(table: Tensor, chunks: Sequence[Chunk]) -> Tensor:
        parts = [table[chunk.position : chunk.position + chunk.rows] for chunk in chunks]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _inverse_norm(state: Tensor, epsilon: float) -> Tensor:
    """One over the root of the mean square (RMS norm, Zhang and Sennrich, 2019), by row."""
    return state.square().mean(-1, keepdim=True).add_(epsilon).rsqrt_()


def _normed(state: Tensor, gain: Tensor, epsilon: float) -> Rows:
    """RMS norm of each row, rounded. Rounding sees no factor of a row: it joins the row's scale."""
    return Rows.round(state * gain, _inverse_norm(state, epsilon))


def _gated(gates: Tensor) -> Tensor:
    """``silu(gate) * up`` of ``(rows, 2 * width)``, in parts that torch splits harmlessly."""
    width = gates.shape[1] // 2
    rows_max = len(gates)
    if not _splits_into_registers(rows_max * width):
        rows_max = max(1, ELEMENTS_MAX_PER_THREAD // width)
    parts = [
        functional.silu(part[:, :width]).mul_(part[:, width:]) for part in _in_rows(gates, rows_max)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _splits_into_registers(elements: int) -> bool:
    """Whether no part that a thread is given ends within a vector register."""
    threads = min(torch.get_num_threads(), -(-elements // ELEMENTS_MAX_PER_THREAD))
    return -(-elements // threads) % VECTOR_ELEMENTS == 0


def _in_rows(rows: Tensor, count_max: int) -> Iterator[Tensor]:
    for start in range(0, len(rows), count_max):
        yield rows[start : start + count_max]
