"""The forward step as native kernels: a whole step in one call.

Owns the binding: structures, pointers, and whose memory they point to. It knows slots, but not
which ids they hold. The arithmetic, and why a row's result is one value in any company, stand in
``native/step.cpp`` and its headers.

The interpreter's lock is not held during a call; a step has a lock of its own, as one call at a
time has its buffers and threads.
"""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from typing import TYPE_CHECKING, Final

import torch

from crdt_llm.errors import LocalMisuse
from crdt_llm.inference.forward.native import KernelsUnavailable, library
from crdt_llm.inference.forward.weights import BF16, INT8

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from crdt_llm.inference.forward.weights import LayerWeights, Shape
    from crdt_llm.inference.kv.pool import Chunk, KvPool, Layout

LANES: Final = 16
"""Values in a register; a head is a whole number of registers."""

SIZE_MAX: Final = 2**31 - 1
"""Of anything; the kernels count in 32 bits."""

_FORMATS: Final = {INT8: 0, BF16: 1}

_Pointer = ctypes.c_void_p


class _Sizes(ctypes.Structure):
    _fields_ = (
        ("layers", ctypes.c_int32),
        ("hidden", ctypes.c_int32),
        ("intermediate", ctypes.c_int32),
        ("heads", ctypes.c_int32),
        ("kv_heads", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("vocabulary", ctypes.c_int32),
        ("format", ctypes.c_int32),
        ("epsilon", ctypes.c_float),
    )


class _LayerWeights(ctypes.Structure):
    _fields_ = (
        ("attention_norm", _Pointer),
        ("queries_keys_values", _Pointer),
        ("queries_keys_values_bias", _Pointer),
        ("head_norm", _Pointer),
        ("output", _Pointer),
        ("output_bias", _Pointer),
        ("mlp_norm", _Pointer),
        ("gate_up", _Pointer),
        ("gate_up_bias", _Pointer),
        ("down", _Pointer),
        ("down_bias", _Pointer),
    )


class _Pool(ctypes.Structure):
    _fields_ = (("kv", _Pointer), ("hidden", _Pointer))


class _Chunk(ctypes.Structure):
    _fields_ = (
        ("position", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("tiles", ctypes.c_int64),
        ("slots", ctypes.POINTER(ctypes.c_int64)),
    )


class Pairs:
    """Tiles in pairs, as attention.hpp reads them: no step has to bring a whole path into them.

    Keys are ``(16 positions, pair of dimensions, position, 2)``, values ``(pair of positions,
    dimension, 2)``.
    """

    block = LANES

    def pack(self, kv: Tensor) -> Tensor:
        """See :class:`~crdt_llm.inference.kv.pool.Layout`."""
        dim = kv.shape[-1]
        return self._turn(kv, (-1, LANES, dim // 2, 2), (-1, 2, dim))

    def unpack(self, kv: Tensor) -> Tensor:
        """See :class:`~crdt_llm.inference.kv.pool.Layout`."""
        dim = kv.shape[-1]
        return self._turn(kv, (-1, dim // 2, LANES, 2), (-1, dim, 2))

    @staticmethod
    def _turn(kv: Tensor, keys: tuple[int, ...], values: tuple[int, ...]) -> Tensor:
        """Keys and values seen in these shapes, the two axes behind the first exchanged in each."""
        parts = zip(kv.chunk(2, 1), (keys, values), strict=True)
        turned = [
            part.reshape(*part.shape[:2], *shape).transpose(3, 4).reshape(part.shape)
            for part, shape in parts
        ]
        return torch.cat(turned, 1)


class NativeStep:
    """A model's arithmetic.

    Args:
        shape: of the model.
        cosines: of every position, ``(positions, head_dim)``.
        sines: as ``cosines``; signed.
        weight_format: ``int8`` or ``bf16``.

    Raises:
        KernelsUnavailable: not here, or not for this shape.
    """

    def __init__(self, shape: Shape, cosines: Tensor, sines: Tensor, weight_format: str) -> None:
        if shape.head_dim % LANES:
            raise KernelsUnavailable(f"heads of {shape.head_dim} are no multiple of {LANES}")
        sizes = (
            *(shape.layers, shape.hidden, shape.intermediate, shape.heads),
            *(shape.kv_heads, shape.head_dim, shape.vocabulary),
        )
        width = max(shape.hidden, shape.intermediate, shape.heads * shape.head_dim)
        if min(sizes) < 1 or max(*sizes, width) > SIZE_MAX:
            raise KernelsUnavailable("the model has a size that is none")
        loaded = library()
        self._code = loaded.code
        self.build = f"native/{loaded.build}"
        self._shape = shape
        self._tables = cosines.contiguous(), sines.contiguous()  # the model points into them
        told = _Sizes(*sizes, _FORMATS[weight_format], shape.norm_epsilon)
        # Threads beyond those of a call sleep, so there may be as many as anybody could ask for.
        threads = max(torch.get_num_threads(), len(os.sched_getaffinity(0)))
        new = self._code.crdt_llm_new
        new.restype = _Pointer
        self._model = _Pointer(new(ctypes.byref(told), *map(_address, self._tables), threads))
        self._process = os.getpid()
        self._turn = threading.Lock()
        ending = weakref.finalize(self, _free, self._code, self._model, self._process)
        ending.atexit = False  # a thread may still compute, and memory ends with the process

    @property
    def layout(self) -> Layout:
        """See :class:`~crdt_llm.inference.forward.llama.ForwardStep`."""
        return Pairs()

    def add_layer(self, weights: LayerWeights) -> None:
        """The next layer."""
        # Copies that are contiguous live until the call is over.
        tensors = [
            None if tensor is None else tensor.contiguous()
            for tensor in (getattr(weights, name) for name, _ in _LayerWeights._fields_)
        ]
        pointers = _LayerWeights(*(_address(tensor) for tensor in tensors))
        self._code.crdt_llm_add_layer(self._model, ctypes.byref(pointers))

    def set_head(self, norm: Tensor, weights: Tensor) -> None:
        """What follows the last layer: its norm, and the vocabulary; both in float32."""
        norm, weights = norm.contiguous(), weights.contiguous()
        self._code.crdt_llm_set_head(self._model, _address(norm), _address(weights))

    def forward(self, state: Tensor, chunks: Sequence[Chunk], pool: KvPool) -> None:
        """Compute the rows of one or more chunks, each into the last of its slots.

        Args:
            state: float32, ``(rows, hidden)``: embeddings of the chunks in their order; used up.
            chunks: where the rows stand; no two of them in one slot. One that goes on where another
                one fills its tile stands behind it.
            pool: where the KV before them is, and theirs goes.
        """
        self._check(state, chunks, pool)
        state = state.contiguous()
        told = (_Chunk * len(chunks))()
        for one, chunk in zip(told, chunks, strict=True):
            count = len(chunk.slots)
            one.position, one.rows, one.tiles = chunk.position, chunk.rows, count
            one.slots = (ctypes.c_int64 * count)(*chunk.slots)  # the structure keeps it alive
        place = _Pool(_address(pool.kv), _address(pool.hidden))
        with self._turn:
            self._code.crdt_llm_forward(
                self._model,
                _address(state),
                told,
                len(chunks),
                ctypes.byref(place),
                self._threads(),
            )

    def logits(self, hidden: Tensor) -> Tensor:
        """The logits that follow rows of a pool: bfloat16 ``(rows, hidden)`` to float32."""
        hidden = hidden.contiguous()
        found = torch.empty(len(hidden), self._shape.vocabulary)
        with self._turn:
            self._code.crdt_llm_logits(
                self._model, _address(hidden), len(hidden), _address(found), self._threads()
            )
        return found

    def _check(self, state: Tensor, chunks: Sequence[Chunk], pool: KvPool) -> None:
        """What is told lies in the memory that it is read from and written to."""
        if len(state) != sum(chunk.rows for chunk in chunks):
            raise LocalMisuse("a step has as many rows as its chunks")
        for chunk in chunks:
            if chunk.position + chunk.rows > self._shape.positions:
                raise LocalMisuse("a chunk ends behind the last position of the model")
            if min(chunk.slots) < 0 or max(chunk.slots) >= pool.count:
                raise LocalMisuse("a chunk has a slot that the pool has not")

    def _threads(self) -> int:
        """Of the next call. A fork of the process has none but its own."""
        return torch.get_num_threads() if os.getpid() == self._process else 1


def _free(code: ctypes.CDLL, model: ctypes.c_void_p, process: int) -> None:
    """Free a model where it was made: its threads, whose end is waited for, are not in a fork."""
    if os.getpid() == process:
        code.crdt_llm_free(model)


def _address(tensor: Tensor | None) -> ctypes.c_void_p:
    return _Pointer(None if tensor is None else tensor.data_ptr())
