"""The torch engine's core: requests in, events out, one step at a time.

Owns the running requests, their order, and the loop of schedule, run, postprocess over one model
and one KV tree. It is synchronous and has no clock, no thread and no pipe: whoever drives it calls
:meth:`TorchEngine.step` while :attr:`TorchEngine.busy`, and may start and cancel requests between
two steps. It knows token ids alone.

A step is one prefill chunk of at most ``CHUNK_ROWS_MAX`` rows or one decode step of one request.
Requests that generate take turns; requests that warm take turns when nothing generates.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from crdt_llm.errors import CrdtLlmError, EngineBusy, LocalMisuse, PromptTooLong
from crdt_llm.inference.attention import Chunk
from crdt_llm.inference.engine import (
    BIT_EXACT,
    Capabilities,
    Finished,
    KvDigest,
    Prefilled,
    Sampled,
)
from crdt_llm.inference.kv import TILE, KvTree
from crdt_llm.inference.llama import Llama
from crdt_llm.inference.quantised import WEIGHT_FORMAT
from crdt_llm.inference.sampling import sample

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path as FilePath

    import numpy.typing as npt

    from crdt_llm.inference.engine import (
        FinishReason,
        SamplingParams,
    )
    from crdt_llm.inference.kv import Ids, Path

    Event = Prefilled | Sampled | Finished | KvDigest | CrdtLlmError
    Emit = Callable[[int, Event], None]

CHUNK_ROWS_MAX = 64
"""Rows of a prefill step: so often a cancellation is seen. More would save little, fewer would
read the weights more often."""

REQUESTS_MAX = 64
"""Running requests. Each pins the KV of its path; more than this is a caller that leaks them."""

KV_MEMORY_BYTES = 2 << 30
"""The default KV budget: some 80,000 tokens of a small model, and a share of a laptop's memory that
nobody misses. It is mapped as it is used."""


@dataclass(slots=True)
class Request:
    """One running request: the path it stands on and what it is to do at its end.

    Args:
        id: the caller's number for it.
        kind: what follows when the KV of ``ids`` is there.
        ids: the whole path, with what was sampled.
        path: what of it is resident.
        start: how many ids are the prompt; 0 for other kinds than ``generate``.
        params: how to sample; None for other kinds.
        asked: ids at the beginning, for :class:`Prefilled`.
        computed: rows computed so far for the prompt.
        prefilled: whether :class:`Prefilled` was given.
    """

    id: int
    kind: Literal["warm", "generate", "digest"]
    ids: Ids
    path: Path
    start: int
    params: SamplingParams | None
    asked: int
    computed: int = 0
    prefilled: bool = False

    @property
    def missing(self) -> int:
        """Rows that have to be computed before the next token can be sampled."""
        return len(self.ids) - self.path.length


class TorchEngine:
    """Runs requests over one model.

    Args:
        folder: the model.
        kv_memory_bytes: the most memory that KV may take.

    Raises:
        ModelUnusable: the model cannot be used, and why.
    """

    def __init__(self, folder: FilePath, kv_memory_bytes: int = KV_MEMORY_BYTES) -> None:
        self._model = Llama(folder)
        self._pool = self._model.new_pool(kv_memory_bytes)
        self._tree = KvTree(self._pool)
        self._requests: dict[int, Request] = {}
        self._generating: deque[Request] = deque()
        self._warming: deque[Request] = deque()
        shape = self._model.shape
        # A path that the memory could never hold is too long, not unlucky. One tile stays for the
        # copy that a path needs where it leaves another in the middle of its last tile.
        room = (self._pool.count - 1) * TILE
        self.capabilities = Capabilities(
            fingerprint=self._model.fingerprint,
            exactness=BIT_EXACT,
            positions=min(shape.positions, room),
            vocabulary=shape.vocabulary,
            weight_format=WEIGHT_FORMAT,
        )

    @property
    def busy(self) -> bool:
        """Whether a step has anything to do."""
        return bool(self._requests)

    @property
    def requests(self) -> int:
        """How many requests run."""
        return len(self._requests)

    @property
    def resident_tokens(self) -> int:
        """Tokens whose KV is in memory."""
        return self._tree.resident_tokens

    def warm(self, request: int, ids: npt.ArrayLike) -> None:
        """Start to bring the KV of ``ids``; ends with :class:`Prefilled`."""
        self._admit(request, "warm", ids, 0, None)

    def generate(
        self, request: int, ids: npt.ArrayLike, params: SamplingParams, start: int
    ) -> None:
        """Start a reply; ends with :class:`Finished`."""
        self._admit(request, "generate", ids, start, params)

    def digest(self, request: int, ids: npt.ArrayLike) -> None:
        """Start to bring the KV of ``ids`` and to hash it; ends with :class:`KvDigest`."""
        self._admit(request, "digest", ids, 0, None)

    def cancel(self, request: int) -> None:
        """End a request without a further event; one that has ended already is no error."""
        running = self._requests.get(request)
        if running is not None:
            self._end(running)

    def forget(self, ids: npt.ArrayLike, keep: int) -> None:
        """Drop resident KV; see :meth:`crdt_llm.inference.engine.Engine.forget`."""
        self._tree.forget(np.asarray(ids, np.uint32), keep)

    @torch.inference_mode()
    def step(self, emit: Emit) -> None:
        """Do the next piece of work, and emit its events as they come.

        A request that fails emits its error as its last event; the others go on.
        """
        queue = self._generating or self._warming
        if not queue:
            return
        request = queue[0]
        queue.rotate(-1)
        try:
            self._advance(request, emit)
        except CrdtLlmError as error:
            self._end(request)
            emit(request.id, error)

    # -- inside --------------------------------------------------------------------------------

    def _admit(
        self,
        number: int,
        kind: Literal["warm", "generate", "digest"],
        ids: npt.ArrayLike,
        start: int,
        params: SamplingParams | None,
    ) -> None:
        array = np.array(ids, np.int64)  # a copy: the request appends to it
        if number in self._requests:
            message = f"request {number} is running already"
            raise LocalMisuse(message)
        if len(self._requests) >= REQUESTS_MAX:
            message = f"{REQUESTS_MAX} requests are running: wait for one of them"
            raise EngineBusy(message)
        if not array.size or array.min() < 0 or array.max() >= self.capabilities.vocabulary:
            message = f"ids must be at least one, each in [0, {self.capabilities.vocabulary})"
            raise LocalMisuse(message)
        if kind == "generate" and not 1 <= start <= len(array):
            raise LocalMisuse("start must be in [1, number of ids]")
        if len(array) > self.capabilities.positions:
            message = (
                f"the path has {len(array)} tokens and this engine room for "
                f"{self.capabilities.positions}: shorten the conversation"
            )
            raise PromptTooLong(message)
        tokens = array.astype(np.uint32)
        request = Request(
            id=number,
            kind=kind,
            ids=tokens,
            path=self._tree.open(tokens),
            start=start,
            params=params,
            asked=len(tokens),
        )
        self._requests[number] = request
        (self._generating if kind == "generate" else self._warming).append(request)

    def _end(self, request: Request) -> None:
        del self._requests[request.id]
        (self._generating if request.kind == "generate" else self._warming).remove(request)
        request.path.close()

    def _advance(self, request: Request, emit: Emit) -> None:
        """Compute the next rows; when none are missing, do what the request is for."""
        if request.missing:
            if not request.prefilled:
                # Another request may have computed the same prefix in the meantime.
                request.path.adopt(request.ids)
            if request.missing:
                request.computed += self._compute(request)
        if request.missing:
            return
        if not request.prefilled:
            request.prefilled = True
            if request.kind != "digest":
                reused = request.asked - request.computed
                emit(request.id, Prefilled(request.asked, reused, request.computed))
        if request.params is not None:
            self._continue(request, request.params, emit)
            return
        if request.kind == "digest":
            emit(request.id, self._hash(request))
        self._end(request)

    def _compute(self, request: Request) -> int:
        """Compute the next chunk of a request's path; returns its rows."""
        path = request.path
        extent = path.reserve()
        # Chunks end at multiples of their size, so that the blocks of attention are full.
        rows = min(CHUNK_ROWS_MAX - path.length % CHUNK_ROWS_MAX, request.missing, extent.room)
        ids = request.ids[path.length : path.length + rows]
        slots = [tile.slot for tile in path.tiles]
        chunk = Chunk(position=path.length, rows=rows, slots=slots)
        self._model.forward(torch.from_numpy(ids.astype(np.int64)), [chunk], self._pool)
        path.append(ids)
        return rows

    def _logits(self, request: Request) -> npt.NDArray[np.float32]:
        """The logits at the end of a path whose rows are all there."""
        depth, row = divmod(len(request.ids) - 1, TILE)
        logits = self._model.logits(self._pool, [(request.path.tiles[depth].slot, row)])
        array: npt.NDArray[np.float32] = logits[0].numpy()
        return array

    def _continue(self, request: Request, params: SamplingParams, emit: Emit) -> None:
        """Sample the next token, unless the reply has ended before (when it is resumed)."""
        reason = self._ended(request, params)
        if reason is None:
            chosen, logprob = sample(self._logits(request), params, len(request.ids))
            request.ids = np.append(request.ids, np.uint32(chosen))
            emit(request.id, Sampled(chosen, logprob))
            reason = self._ended(request, params)
        if reason is None:
            return
        emit(request.id, Finished(reason))
        if request.missing:
            # The last token's row, now that nobody waits: what follows on this path then finds
            # everything before it resident.
            with contextlib.suppress(EngineBusy):  # the reply is complete without it
                self._compute(request)
        self._end(request)

    def _ended(self, request: Request, params: SamplingParams) -> FinishReason | None:
        sampled = len(request.ids) - request.start
        if sampled and not params.ignore_eos and int(request.ids[-1]) in params.end_ids:
            return "end"
        if sampled >= params.max_tokens:
            return "length"
        if len(request.ids) >= self.capabilities.positions:
            return "positions"
        return None

    def _hash(self, request: Request) -> KvDigest:
        """Hash tile by tile, each as ``(layer, head, row, value)``."""
        state = hashlib.sha256()
        for index, tile in enumerate(request.path.tiles):
            rows = min(TILE, len(request.ids) - index * TILE)
            values = self._pool.kv[tile.slot, :, :, :rows].contiguous()
            state.update(values.view(torch.uint8).numpy().data)
        logits = self._logits(request).astype("<f4").tobytes()
        return KvDigest(kv=state.digest(), logits=hashlib.sha256(logits).digest())
