"""The memory of KV: slots of one tile each, and the rows of a forward step among them.

Owns the layout of keys, values and hidden states. It knows no ids, no paths and no arithmetic:
which slot holds what is the affair of :mod:`~crdt_llm.inference.kv`, and what is computed into it
that of the two forward steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from crdt_llm.errors import LocalMisuse
from crdt_llm.inference.kv import TILE

if TYPE_CHECKING:
    from collections.abc import Sequence

KV_DTYPE = torch.bfloat16
"""What keys and values are kept in: half the memory of float32, and as fast in the kernel."""


def _lazy_zeros(*shape: int) -> torch.Tensor:
    """Zeroed memory that the system maps when it is first touched.

    numpy asks for it with ``calloc``; ``torch.zeros`` writes every byte, which for the whole budget
    takes seconds and makes it resident at once.
    """
    return torch.from_numpy(np.zeros(shape, np.uint16)).view(KV_DTYPE)


class KvPool:
    """The rows of every slot: keys and values of all layers, and the last hidden state.

    The hidden state makes the logits of any resident position available without computing the
    token again; it adds a few per cent to the KV.

    Args:
        count: slots.
        layers: of the model.
        kv_heads: heads of keys; as many of values.
        head_dim: size of a head.
        hidden: width of the last hidden state.
    """

    def __init__(self, count: int, layers: int, kv_heads: int, head_dim: int, hidden: int) -> None:
        self.kv = _lazy_zeros(count, layers, 2 * kv_heads, TILE, head_dim)
        self.hidden = _lazy_zeros(count, TILE, hidden)
        self.kv_heads = kv_heads
        self.head_dim = head_dim
        # Views by layer, ``(count, kv_heads, TILE, head_dim)``: a decode step makes no others.
        self.keys = self.kv[:, :, :kv_heads].unbind(1)
        self.values = self.kv[:, :, kv_heads:].unbind(1)

    @staticmethod
    def slot_bytes(layers: int, kv_heads: int, head_dim: int, hidden: int) -> int:
        """Memory of one slot."""
        return TILE * (2 * layers * kv_heads * head_dim + hidden) * KV_DTYPE.itemsize

    @property
    def count(self) -> int:
        """How many slots there are."""
        return len(self.kv)

    def copy_rows(self, source: int, target: int, rows: int) -> None:
        """Copy the rows ``[0, rows)`` of a slot into another."""
        self.kv[target, :, :, :rows] = self.kv[source, :, :, :rows]
        self.hidden[target, :rows] = self.hidden[source, :rows]

    def wipe(self, slot: int, start: int) -> None:
        """Set the rows ``[start, TILE)`` of a slot to zero."""
        self.kv[slot, :, :, start:] = 0
        self.hidden[slot, start:] = 0


@dataclass(frozen=True, slots=True)
class Chunk:
    """The rows of one forward step: positions ``[position, position + rows)`` within one tile.

    Args:
        position: of the first row.
        rows: how many; they end in the tile in which they begin.
        slots: the slots of the path's tiles; the last one takes the new rows.
    """

    position: int
    rows: int
    slots: Sequence[int]

    def __post_init__(self) -> None:
        tile = self.position // TILE
        if self.rows < 1 or (self.position + self.rows - 1) // TILE != tile:
            raise LocalMisuse("a chunk has rows, and all of them in one tile")
        if len(self.slots) != tile + 1:
            raise LocalMisuse("a chunk needs the slots of every tile up to its own")

    @property
    def offset(self) -> int:
        """Of the first row in its tile."""
        return self.position % TILE
