"""The memory of KV: slots of one tile each, and the rows of a forward step among them.

Owns the layout of keys, values and hidden states, on which device they are, and the way between
there and the host. It knows no ids, no paths and no arithmetic: which slot holds what is the affair
of :mod:`~crdt_llm.inference.kv.tree`, and what is computed into it that of a model.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from crdt_llm.errors import LocalMisuse, ModelUnusable
from crdt_llm.inference.kv.tree import TILE

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Self

KV_DTYPE = torch.bfloat16
"""What keys and values are kept in: half the memory of float32, and as fast in the kernel."""

HOST = torch.device("cpu")

SLOTS_MIN = 2
"""A path that leaves a tile in the middle needs the tile and its copy."""


@dataclass(frozen=True, slots=True)
class RowShape:
    """What one row of a pool holds.

    Args:
        layers: of the model.
        kv_heads: heads of keys; as many of values.
        head_dim: size of a head.
        hidden: width of the last hidden state.
        dtype: of all of them.
    """

    layers: int
    kv_heads: int
    head_dim: int
    hidden: int
    dtype: torch.dtype = KV_DTYPE

    @property
    def slot_bytes(self) -> int:
        """Memory of a slot."""
        values = 2 * self.layers * self.kv_heads * self.head_dim + self.hidden
        return TILE * values * self.dtype.itemsize


class Layout(Protocol):
    """In which order a tile holds its values.

    Rows ``[0, n)`` with ``n`` a multiple of ``block`` are the first ``n * head_dim`` values of a
    tile in any layout, so that rows can be copied and wiped without regard to it.
    """

    @property
    def block(self) -> int:
        """Rows whose values may be mixed with each other."""

    def pack(self, kv: torch.Tensor) -> torch.Tensor:
        """From rows: ``(layers, 2 * kv_heads, n * block, head_dim)``, in the order of a tile."""

    def unpack(self, kv: torch.Tensor) -> torch.Tensor:
        """From the order of a tile: rows, as they were given to :meth:`pack`; a copy or a view."""


class RowByRow:
    """One row behind the other."""

    block = 1

    def pack(self, kv: torch.Tensor) -> torch.Tensor:
        """See :class:`Layout`."""
        return kv

    def unpack(self, kv: torch.Tensor) -> torch.Tensor:
        """See :class:`Layout`."""
        return kv


ROW_BY_ROW = RowByRow()


def _lazy_zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeroed memory; on the host the system maps it when it is first touched.

    In huge pages where it has some: the rows of a tile lie all over it, so that with small pages
    the first rows of a new tile cost hundreds of page faults, which take longer than a step.
    """
    if device.type != HOST.type:
        return torch.zeros(*shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
    if hasattr(mmap, "MADV_HUGEPAGE"):  # Linux
        with contextlib.suppress(OSError):  # a kernel without them: small ones do
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(*shape)


class KvPool:
    """The rows of every slot: keys and values of all layers, and the last hidden state.

    The hidden state makes the logits of any resident position available without computing the
    token again; it adds a few per cent to the KV.

    Args:
        count: slots.
        shape: of a row.
        device: where they are.
        layout: of the tiles in ``kv``; by others than whoever chose it they are seen as rows.
    """

    def __init__(
        self,
        count: int,
        shape: RowShape,
        device: torch.device = HOST,
        layout: Layout = ROW_BY_ROW,
    ) -> None:
        kv_heads, head_dim = shape.kv_heads, shape.head_dim
        kv = (count, shape.layers, 2 * kv_heads, TILE, head_dim)
        self.kv = _lazy_zeros(kv, shape.dtype, device)
        self.hidden = _lazy_zeros((count, TILE, shape.hidden), shape.dtype, device)
        self.kv_heads = kv_heads
        self.head_dim = head_dim
        self._layout = layout
        self._never_taken = set(range(count))
        # Views by layer, ``(count, kv_heads, TILE, head_dim)``, if tiles are laid out row by row: a
        # decode step makes no others.
        self.keys = self.kv[:, :, :kv_heads].unbind(1)
        self.values = self.kv[:, :, kv_heads:].unbind(1)

    @classmethod
    def within(
        cls,
        memory_bytes: int,
        shape: RowShape,
        device: torch.device = HOST,
        layout: Layout = ROW_BY_ROW,
    ) -> Self:
        """A pool of as many slots as fit the memory.

        Raises:
            ModelUnusable: not even two slots fit.
        """
        count = memory_bytes // shape.slot_bytes
        if count < SLOTS_MIN:
            message = (
                f"a KV memory of {memory_bytes} bytes is too small for this model: "
                f"give it at least {SLOTS_MIN * shape.slot_bytes}"
            )
            raise ModelUnusable(message)
        return cls(count, shape, device, layout)

    @property
    def count(self) -> int:
        """How many slots there are."""
        return len(self.kv)

    def copy_rows(self, source: int, target: int, rows: int) -> None:
        """Copy the rows ``[0, rows)`` of a slot into another, which has zeros behind them."""
        end = self._whole(rows)
        self.kv[target, :, :, :end] = self.kv[source, :, :, :end]
        self._set(target, rows, end, None)
        self.hidden[target, :rows] = self.hidden[source, :rows]

    def read(self, slot: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows ``[0, rows)`` of a slot, contiguous and on the host.

        Returns:
            keys and values, ``(layers, 2 * kv_heads, rows, head_dim)``, and hidden states,
            ``(rows, hidden)``.
        """
        whole = self.kv[slot, :, :, : self._whole(rows)]
        kv = self._layout.unpack(whole)[:, :, :rows].contiguous()
        return kv.to(HOST), self.hidden[slot, :rows].to(HOST)

    def write(self, slot: int, first: int, kv: torch.Tensor, hidden: torch.Tensor) -> None:
        """Set the rows of a slot from ``first`` on to rows of the host, shaped as :meth:`read`."""
        end = first + len(hidden)
        self._set(slot, first, end, kv)
        self.hidden[slot, first:end].copy_(hidden)

    def take(self, slot: int) -> None:
        """Make a slot ready for a new tile: all of its rows are zero.

        The first time they are so already. To write zeros there would have the system map some
        megabytes at once, which takes longer than a step.
        """
        if slot in self._never_taken:
            self._never_taken.remove(slot)
        else:
            self.wipe(slot, 0)

    def wipe(self, slot: int, start: int) -> None:
        """Set the rows ``[start, TILE)`` of a slot to zero."""
        end = self._whole(start)
        self._set(slot, start, end, None)
        self.kv[slot, :, :, end:] = 0
        self.hidden[slot, start:] = 0

    def _whole(self, rows: int) -> int:
        """Up to the end of a block of the layout."""
        return -(-rows // self._layout.block) * self._layout.block

    def _set(self, slot: int, first: int, end: int, kv: torch.Tensor | None) -> None:
        """Set the rows ``[first, end)`` of a slot to others, or to zeros."""
        if first == end:
            return
        begin = first // self._layout.block * self._layout.block
        whole = self.kv[slot, :, :, begin : self._whole(end)]
        rows = self._layout.unpack(whole)
        some = rows[:, :, first - begin : end - begin]
        if kv is None:
            some.zero_()
        else:
            some.copy_(kv)
        if rows is not whole:
            whole.copy_(self._layout.pack(rows))


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
