"""Who works in the next step, who waits, and who gives way.

Owns the order of requests: two lanes (replies before whatever is computed ahead), a bound on how
many run at once in each, the queue behind it, and turns. It knows how many rows a request misses
and how many tiles it needs; it knows no model and moves nothing.

A reply that runs takes part in every step with the one row of its next token, so a step serves all
of them for little more than the price of one. Beside them one request at a time has a chunk of its
prompt computed; those that have more of it take turns.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from crdt_llm.inference.kv.tree import TILE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from crdt_llm.inference.contract import SamplingParams
    from crdt_llm.inference.kv.tree import Ids, Path

REPLIES_MAX = 16
"""Replies that run at once: a step of 16 rows takes about three times as long as one of a single
row, measured, which is as slow as a stream should get."""

AHEAD_MAX = 4
"""Requests of the other lane that run at once: each pins the KV of its path."""

CHUNK_ROWS_MAX = 96
"""Rows of a prefill step: so often a cancellation is seen. A message of some sentences is one step
of them; more would save little, fewer would read the weights more often."""

SHARED_CHUNK_ROWS_MAX = 32
"""Rows of a chunk while replies run: their next token waits for all of it."""

Kind = Literal["warm", "generate", "digest", "score"]


@dataclass(eq=False, slots=True)
class Request:
    """One request: the path it stands on and what it is to do at its end.

    Args:
        id: the caller's number for it.
        kind: what follows when the KV of ``ids`` is there.
        ids: the whole path, with what was sampled.
        start: how many ids are the prompt; 0 for ``warm`` and ``digest``.
        params: how to sample; None for other kinds.
        asked: ids at the beginning, for :class:`~crdt_llm.inference.contract.Prefilled`.
        path: what of it is resident; None while the request waits.
        computed: rows computed so far for the prompt.
        prefilled: whether :class:`~crdt_llm.inference.contract.Prefilled` was given.
        finished: whether the reply is over; then only its last row is missing.
        told: the place in the queue that its caller knows of.
    """

    id: int
    kind: Kind
    ids: Ids
    start: int
    params: SamplingParams | None
    asked: int
    path: Path | None = None
    computed: int = 0
    prefilled: bool = False
    finished: bool = False
    told: int | None = None

    @property
    def missing(self) -> int:
        """Rows that have to be computed before the next token can be sampled."""
        return len(self.ids) - (self.path.length if self.path is not None else 0)

    @property
    def decodes(self) -> bool:
        """Whether all that is missing is the row of the last token."""
        return self.prefilled and self.missing == 1

    @property
    def tiles(self) -> int:
        """Tiles that the path needs now, and one for a copy where it leaves another path."""
        return -(-len(self.ids) // TILE) + 1


@dataclass(slots=True)
class Lane:
    """Requests of one rank: those that run, oldest first, and those that wait."""

    running_max: int
    running: list[Request] = field(default_factory=list)
    waiting: deque[Request] = field(default_factory=deque)
    turns: deque[Request] = field(default_factory=deque)

    def __iter__(self) -> Iterator[Request]:
        yield from self.running
        yield from self.waiting

    def remove(self, request: Request) -> None:
        """Take a request out, wherever it is."""
        for place in (self.running, self.waiting, self.turns):
            if request in place:
                place.remove(request)


@dataclass(frozen=True, slots=True)
class Step:
    """What to compute next.

    Args:
        decoding: replies that get their next row.
        prefilling: whose prompt gets a chunk, or None.
        rows_max: of the chunk.
    """

    decoding: tuple[Request, ...]
    prefilling: Request | None
    rows_max: int


class Schedule:
    """The requests of one engine.

    Args:
        tiles: how many fit the memory.
    """

    def __init__(self, tiles: int) -> None:
        self._tiles = tiles
        self.replies = Lane(REPLIES_MAX)
        self.ahead = Lane(AHEAD_MAX)

    def __len__(self) -> int:
        return sum(1 for lane in (self.replies, self.ahead) for _ in lane)

    def add(self, request: Request) -> None:
        """A new request: it waits until :meth:`admit`."""
        self._lane(request).waiting.append(request)

    def remove(self, request: Request) -> None:
        """A request is over."""
        self._lane(request).remove(request)

    def admit(self) -> list[Request]:
        """Let those that wait run, in their order, as far as there is room; returns them."""
        admitted = []
        for lane in (self.replies, self.ahead):
            while lane.waiting and len(lane.running) < lane.running_max:
                request = lane.waiting[0]
                if lane.running and self._pinned + request.tiles > self._tiles:
                    break
                lane.waiting.popleft()
                lane.running.append(request)
                lane.turns.append(request)
                admitted.append(request)
            if lane.running:
                break  # the other lane is for idle times
        return admitted

    def next(self) -> Step:
        """The next step. Replies go before everything else, and prompts take turns."""
        lane = self.replies if self.replies.running else self.ahead
        decoding = tuple(request for request in lane.running if request.decodes)
        turns = lane.turns
        prefilling = None
        for _ in range(len(turns)):
            turns.rotate(-1)
            if turns[-1].missing and not turns[-1].decodes:
                prefilling = turns[-1]
                break
        return Step(decoding, prefilling, SHARED_CHUNK_ROWS_MAX if decoding else CHUNK_ROWS_MAX)

    def give_way(self) -> Request | None:
        """Send somebody back to the head of the queue, since memory is full; None if nobody can.

        The one who came last, of those of lower rank first. Never the oldest of what runs, so that
        there is always one that gets on.
        """
        lanes = (self.ahead, self.replies) if self.replies.running else (self.ahead,)
        for lane in lanes:
            spared = 0 if lane is self.ahead and self.replies.running else 1
            if len(lane.running) > spared:
                request = lane.running[-1]
                lane.remove(request)
                lane.waiting.appendleft(request)
                return request
        return None

    def _lane(self, request: Request) -> Lane:
        return self.replies if request.kind == "generate" else self.ahead

    @property
    def _pinned(self) -> int:
        """Tiles that what runs needs at most."""
        return sum(request.tiles for lane in (self.replies, self.ahead) for request in lane.running)
