"""The torch engine's core: requests in, events out, one step at a time.

Owns the running requests and the loop of schedule, run, postprocess over one model, one KV tree and
one folder of checkpoints. It is synchronous and has no thread and no pipe: whoever drives it calls
:meth:`TorchEngine.step` while :attr:`TorchEngine.busy`, and may start and cancel requests between
two steps. It knows token ids alone.

A step is one forward pass: a row of every reply that runs, and a chunk of one prompt; see
:mod:`~crdt_llm.inference.engine.schedule`.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from crdt_llm.errors import EngineBusy, LocalMisuse, PromptTooLong
from crdt_llm.inference.contract import (
    Capabilities,
    Finished,
    KvDigest,
    Prefilled,
    Queued,
    Sampled,
    Scored,
)
from crdt_llm.inference.engine.sampling import logprob, sample
from crdt_llm.inference.engine.schedule import Request, Schedule
from crdt_llm.inference.kv.checkpoint import DISK_BYTES, Checkpoints, Rows
from crdt_llm.inference.kv.pool import Chunk
from crdt_llm.inference.kv.tree import TILE, KvTree, common_prefix

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path as FilePath

    import numpy.typing as npt

    from crdt_llm.errors import CrdtLlmError
    from crdt_llm.inference.contract import FinishReason, SamplingParams
    from crdt_llm.inference.engine.schedule import Kind, Step
    from crdt_llm.inference.forward.model import Model
    from crdt_llm.inference.kv.tree import Extent, Path, Tile

    Event = Queued | Prefilled | Sampled | Finished | KvDigest | Scored | CrdtLlmError
    Emit = Callable[[int, Event], None]

REQUESTS_MAX = 256
"""Requests that run or wait. More than this is a caller that leaks them."""

KV_MEMORY_BYTES = 2 << 30
"""The default KV budget: some 80,000 tokens of a small model, and a share of a laptop's memory that
nobody misses. It is mapped as it is used."""

SCORED_ROWS_MAX = 64
"""Rows whose logits are made at once for an audit: they take a vocabulary's width each."""

PASSED_ON_STEPS = 2
"""Steps behind the first token of a reply that leave a core to whoever passes it on: to seal it,
commit it and send it takes about as long, and somebody waits for it."""

PACE_WEIGHT = 0.2
"""Of the newest measurement in a running mean: a handful of them outweigh a hiccup."""


@dataclass(slots=True)
class Pace:
    """How long one of something takes, as a running mean."""

    seconds: float | None = None

    def note(self, seconds: float) -> None:
        """Take a measurement into account."""
        before = seconds if self.seconds is None else self.seconds
        self.seconds = before + PACE_WEIGHT * (seconds - before)


@dataclass(frozen=True, slots=True)
class Load:
    """How full an engine is.

    Args:
        requests: all of them.
        waiting: those that take no part in steps yet, for want of room.
        resident_tokens: whose KV is in memory.
        kv_bytes: of memory that KV takes.
        disk_bytes: of checkpoints.
    """

    requests: int
    waiting: int
    resident_tokens: int
    kv_bytes: int
    disk_bytes: int


@dataclass(frozen=True, slots=True)
class _Planned:
    """Rows that the next pass computes."""

    request: Request
    path: Path
    ids: npt.NDArray[np.uint32]
    chunk: Chunk


class TorchEngine:
    """Runs requests over one model.

    Args:
        model: what computes.
        kv_memory_bytes: the most memory that KV may take.
        kv_folder: where KV is written that leaves memory; None writes nothing.
        kv_disk_bytes: the most that this folder may take.
        clock: seconds, monotonic: tells whether it is faster to read KV or to compute it again.

    Raises:
        ModelUnusable: the KV memory is too small for this model.
    """

    def __init__(
        self,
        model: Model,
        kv_memory_bytes: int = KV_MEMORY_BYTES,
        kv_folder: FilePath | None = None,
        kv_disk_bytes: int = DISK_BYTES,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._model = model
        self._clock = clock
        self._kv_memory_bytes = kv_memory_bytes
        kv = None
        if kv_folder is not None:
            kv = Checkpoints(kv_folder, self._model.fingerprint, kv_disk_bytes)
        self._begin(kv)
        # A path that the memory could never hold is too long, not unlucky. One tile stays for the
        # copy that a path needs where it leaves another in the middle of its last tile.
        room = (self._pool.count - 1) * TILE
        self.capabilities = Capabilities(
            fingerprint=self._model.fingerprint,
            exactness=self._model.exactness,
            positions=min(self._model.positions, room),
            vocabulary=self._model.vocabulary,
            weight_format=self._model.weight_format,
        )

    def _begin(self, checkpoints: Checkpoints | None) -> None:
        """Everything but the model: no KV in memory, and no requests."""
        self._pool = self._model.new_pool(self._kv_memory_bytes)
        self._tree = KvTree(self._pool, self._save)
        self._checkpoints = checkpoints
        self._requests: dict[int, Request] = {}
        self._schedule = Schedule(self._pool.count)
        self._row_pace, self._load_pace = Pace(), Pace()

    @property
    def busy(self) -> bool:
        """Whether a step has anything to do."""
        return bool(self._requests)

    @property
    def is_passing_on(self) -> bool:
        """Whether a first token is on its way to whoever waits for it, and no prompt is read."""
        replies = self._schedule.replies
        if replies.waiting or not all(request.decodes for request in replies.running):
            return False
        sampled = (len(request.ids) - request.start for request in replies.running)
        return any(0 < count <= PASSED_ON_STEPS for count in sampled)

    @property
    def load(self) -> Load:
        """How full it is."""
        waiting = len(self._schedule.replies.waiting) + len(self._schedule.ahead.waiting)
        used = self._pool.count - self._tree.free_slots
        return Load(
            requests=len(self._requests),
            waiting=waiting,
            resident_tokens=self._tree.resident_tokens,
            kv_bytes=used * self._model.slot_bytes,
            disk_bytes=0 if self._checkpoints is None else self._checkpoints.bytes,
        )

    def warm(self, request: int, ids: npt.ArrayLike) -> None:
        """Start to bring the KV of ``ids``; ends with :class:`Prefilled`."""
        self._start(request, "warm", ids, 0, None)

    def generate(
        self, request: int, ids: npt.ArrayLike, params: SamplingParams, start: int
    ) -> None:
        """Start a reply; ends with :class:`Finished`."""
        self._start(request, "generate", ids, start, params)

    def digest(self, request: int, ids: npt.ArrayLike) -> None:
        """Start to bring the KV of ``ids`` and to hash it; ends with :class:`KvDigest`."""
        self._start(request, "digest", ids, 0, None)

    def cancel(self, request: int) -> None:
        """End a request without a further event; one that has ended already is no error."""
        running = self._requests.get(request)
        if running is not None:
            self._end(running)

    def forget(self, ids: npt.ArrayLike, keep: int) -> None:
        """Drop KV, on disk too; see :meth:`crdt_llm.inference.contract.Engine.forget`."""
        tokens = np.asarray(ids, np.uint32)
        self._tree.forget(tokens, keep)
        if self._checkpoints is not None:
            self._checkpoints.forget(tokens, keep)
            # A tile that stays, for another text's sake, has to be written again.
            for tile in self._tree.tiles():
                path = tile.path
                if tile.saved and self._checkpoints.find(path, len(path) - 1) is None:
                    tile.saved = 0

    @torch.inference_mode()
    def logits(self, ids: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """The logits behind every resident position of a path, ``(positions, vocabulary)``.

        For whoever measures the model; a reply needs one row of them at a time.
        """
        path = self._tree.open(np.asarray(ids, np.uint32))
        try:
            return self._logits([(path, at) for at in range(path.length)])
        finally:
            path.close()

    def save_one(self) -> bool:
        """Write one tile to disk that is not there yet; False when there is none.

        For idle times. Only what a reply was made from is written: what was computed ahead, of a
        text that somebody is still typing perhaps, is not.
        """
        tile = None if self._checkpoints is None else self._tree.unsaved()
        if tile is None:
            return False
        self._save(tile)
        return True

    @torch.inference_mode()
    def step(self, emit: Emit) -> None:
        """Do the next piece of work, and emit its events as they come.

        A request that fails emits its error as its last event; the others go on.
        """
        self._admit(emit)
        self._run(self._schedule.next(), emit)
        self._postprocess(emit)

    def score(self, request: int, ids: npt.ArrayLike, start: int) -> None:
        """Start to score the ids from ``start`` on; ends with :class:`Scored`."""
        self._start(request, "score", ids, start, None)

    # -- inside --------------------------------------------------------------------------------

    def _start(
        self,
        number: int,
        kind: Kind,
        ids: npt.ArrayLike,
        start: int,
        params: SamplingParams | None,
    ) -> None:
        array = np.array(ids, np.int64)  # a copy: the request appends to it
        if number in self._requests:
            message = f"request {number} is running already"
            raise LocalMisuse(message)
        if len(self._requests) >= REQUESTS_MAX:
            message = f"{REQUESTS_MAX} requests run or wait: wait for one of them"
            raise EngineBusy(message)
        if not array.size or array.min() < 0 or array.max() >= self.capabilities.vocabulary:
            message = f"ids must be at least one, each in [0, {self.capabilities.vocabulary})"
            raise LocalMisuse(message)
        if kind in {"generate", "score"} and not 1 <= start <= len(array):
            raise LocalMisuse("start must be in [1, number of ids]")
        if len(array) > self.capabilities.positions:
            message = (
                f"the path has {len(array)} tokens and this engine room for "
                f"{self.capabilities.positions}: shorten the conversation"
            )
            raise PromptTooLong(message)
        tokens = array.astype(np.uint32)
        request = Request(number, kind, tokens, start, params, asked=len(tokens))
        self._requests[number] = request
        self._schedule.add(request)

    def _admit(self, emit: Emit) -> None:
        """Let requests run, and tell those that wait their place."""
        for request in self._schedule.admit():
            request.path = self._tree.open(request.ids)
        for place, request in enumerate(self._schedule.replies.waiting):
            if request.told != place:
                request.told = place
                emit(request.id, Queued(place))

    def _leave(self, request: Request) -> None:
        """Let go of a request's path; what belongs to a reply may be written to disk."""
        if request.path is not None:
            if request.kind == "generate":
                request.path.keep()
            request.path.close()
            request.path = None

    def _end(self, request: Request) -> None:
        del self._requests[request.id]
        self._schedule.remove(request)
        self._leave(request)

    def _fail(self, request: Request, error: CrdtLlmError, emit: Emit) -> None:
        over = request.finished
        self._end(request)
        if not over:  # else it is complete without its last row
            emit(request.id, error)

    def _run(self, step: Step, emit: Emit) -> None:
        """Compute the rows of a step in one pass."""
        planned: dict[int, _Planned] = {}  # by slot
        for request in step.decoding:
            self._plan(request, 1, planned, emit)
        prefilling = step.prefilling
        if prefilling is not None and prefilling.path is not None:
            # Another request may have computed the same prefix in the meantime.
            prefilling.path.adopt(prefilling.ids)
            if not self._restore(prefilling, planned, emit):
                self._plan(prefilling, step.rows_max, planned, emit)
        if not planned:
            return
        work = list(planned.values())
        before = self._clock()
        ids = torch.from_numpy(np.concatenate([each.ids for each in work]).astype(np.int64))
        self._model.forward(ids, [each.chunk for each in work], self._pool)
        if not step.decoding:
            self._row_pace.note((self._clock() - before) / len(ids))
        for each in work:
            each.path.append(each.ids)
            if not each.request.prefilled:
                each.request.computed += len(each.ids)

    def _plan(
        self, request: Request, rows_max: int, planned: dict[int, _Planned], emit: Emit
    ) -> None:
        """Find room for the next rows of a request."""
        path = request.path
        if path is None or not request.missing:
            return  # it gave way to another one of this step, or has all
        extent = self._reserve(request, path, planned, emit)
        if extent is None or extent.slot in planned:
            return  # of two that stand at one tip the second one copies it, in the next step
        first, end = path.length, path.length + min(rows_max, request.missing)
        room: Extent | None = extent
        while room is not None:  # a chunk for each tile that the rows lie in
            rows = min(end - first, room.room)
            chunk = Chunk(first, rows, [tile.slot for tile in path.tiles])
            planned[room.slot] = _Planned(request, path, request.ids[first : first + rows], chunk)
            first += rows
            room = path.reserve_behind() if first < end else None

    def _reserve(
        self, request: Request, path: Path, planned: dict[int, _Planned], emit: Emit
    ) -> Extent | None:
        """Room for the next rows of a path, though others have to give way; None if it failed."""
        while True:
            try:
                return path.reserve()
            except EngineBusy as error:
                gone = self._schedule.give_way()
                if gone is None:
                    self._fail(request, error, emit)
                    return None
            for slot, each in list(planned.items()):
                if each.request is gone:
                    del planned[slot]
            self._leave(gone)
            gone.told = None
            if gone.finished:  # a reply that is over is complete without its last row
                self._end(gone)
            if gone is request:
                return None

    def _restore(self, request: Request, planned: dict[int, _Planned], emit: Emit) -> bool:
        """Read the next rows of a path from disk, if they are there and that is faster."""
        path, checkpoints = request.path, self._checkpoints
        if path is None or checkpoints is None or not request.missing:
            return False
        one = checkpoints.find(request.ids, path.length)
        if one is None:
            return False
        end = common_prefix(one.ids, request.ids)
        if self._row_pace.seconds is not None and self._load_pace.seconds is not None:
            replay = (end - path.length) * self._row_pace.seconds
            if replay < self._load_pace.seconds:
                return False
        before = self._clock()
        rows = checkpoints.load(one)
        if rows is None:
            return False
        extent = self._reserve(request, path, planned, emit)
        if extent is None or extent.slot in planned:
            return True
        first, last = extent.offset, extent.offset + end - path.length
        self._pool.write(extent.slot, first, rows.kv[:, :, first:last], rows.hidden[first:last])
        path.append(request.ids[path.length : end])
        path.restored()
        self._load_pace.note(self._clock() - before)
        return True

    def _save(self, tile: Tile) -> None:
        """Write the rows of a tile that may be on disk."""
        if self._checkpoints is None:
            return
        ids = tile.path
        kv, hidden = self._pool.read(tile.slot, tile.kept)
        rows = Rows(ids[: len(ids) - len(tile.tokens) + tile.kept], kv, hidden)
        self._checkpoints.save(rows)
        tile.saved = tile.kept

    def _postprocess(self, emit: Emit) -> None:
        """Do what those are for whose rows are all there."""
        sampling = []
        for request in [*self._schedule.replies.running, *self._schedule.ahead.running]:
            if request.path is None or request.missing:
                continue
            self._report(request, request.path, emit)
            if request.params is None:
                self._end(request)
            elif not self._finish(request, request.params, emit):
                sampling.append((request, request.path, request.params))
        if not sampling:
            return
        logits = self._logits([(path, len(request.ids) - 1) for request, path, _ in sampling])
        for row, (request, _, params) in zip(logits, sampling, strict=True):
            chosen, logprob = sample(row, params, len(request.ids))
            request.ids = np.append(request.ids, np.uint32(chosen))
            emit(request.id, Sampled(chosen, logprob))
            self._finish(request, params, emit)

    def _report(self, request: Request, path: Path, emit: Emit) -> None:
        """Say that the KV of the prompt is there, once."""
        if request.prefilled:
            return
        request.prefilled = True
        if request.kind == "digest":
            emit(request.id, self._hash(request, path))
        elif request.kind == "score":
            emit(request.id, self._score(request, path))
        else:
            reused = request.asked - request.computed
            emit(request.id, Prefilled(request.asked, reused, request.computed))

    def _finish(self, request: Request, params: SamplingParams, emit: Emit) -> bool:
        """Whether a reply is over. It leaves when the row of its last token is there too.

        What follows on its path then finds everything before it resident, and nobody waits for it.
        """
        if not request.finished:
            reason = self._ended(request, params)
            if reason is None:
                return False
            request.finished = True
            emit(request.id, Finished(reason))
        if not request.missing:
            self._end(request)
        return True

    def _ended(self, request: Request, params: SamplingParams) -> FinishReason | None:
        sampled = len(request.ids) - request.start
        if sampled and not params.ignore_eos and int(request.ids[-1]) in params.end_ids:
            return "end"
        if sampled >= params.max_tokens:
            return "length"
        if len(request.ids) >= self.capabilities.positions:
            return "positions"
        return None

    def _logits(self, ends: Sequence[tuple[Path, int]]) -> npt.NDArray[np.float32]:
        """The logits behind resident positions, each of a path."""
        places = [(path.tiles[at // TILE].slot, at % TILE) for path, at in ends]
        array: npt.NDArray[np.float32] = self._model.logits(self._pool, places).numpy()
        return array

    def _score(self, request: Request, path: Path) -> Scored:
        """Score the ids of a path whose rows are all there, a chunk at a time."""
        logprobs, likeliest = [], []
        for first in range(request.start, len(request.ids), SCORED_ROWS_MAX):
            chosen = request.ids[first : first + SCORED_ROWS_MAX]
            logits = self._logits([(path, first + n - 1) for n in range(len(chosen))])
            logprobs += [logprob(row, int(one)) for row, one in zip(logits, chosen, strict=True)]
            likeliest += [int(row.argmax()) for row in logits]
        return Scored(np.asarray(logprobs, "<f4").tobytes(), np.asarray(likeliest, "<u4").tobytes())

    def _hash(self, request: Request, path: Path) -> KvDigest:
        """Hash tile by tile, each as ``(layer, head, row, value)``, then their digests.

        The rows of a full tile never change, so its digest is kept.
        """
        state = hashlib.sha256()
        for index, tile in enumerate(path.tiles):
            rows = min(TILE, len(request.ids) - index * TILE)
            digest = tile.digest
            if digest is None or rows < TILE:
                values, _ = self._pool.read(tile.slot, rows)
                digest = hashlib.sha256(values.view(torch.uint8).numpy().data).digest()
                if rows == TILE:
                    tile.digest = digest
            state.update(digest)
        logits = self._logits([(path, len(request.ids) - 1)])[0].astype("<f4").tobytes()
        return KvDigest(kv=state.digest(), logits=hashlib.sha256(logits).digest())
