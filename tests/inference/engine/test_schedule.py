"""Who works, who waits, who gives way."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from crdt_llm.inference.contract import SamplingParams
from crdt_llm.inference.engine.schedule import (
    AHEAD_MAX,
    CHUNK_ROWS_MAX,
    REPLIES_MAX,
    SHARED_CHUNK_ROWS_MAX,
    Request,
    Schedule,
)
from crdt_llm.inference.kv.tree import KvTree

if TYPE_CHECKING:
    from crdt_llm.inference.engine.schedule import Kind

MANY = 1000


class NoSlots:
    """Room for rows that nobody computes."""

    count = MANY

    def copy_rows(self, source: int, target: int, rows: int) -> None:
        """Nothing is in them."""

    def take(self, slot: int) -> None:
        """As above."""

    def wipe(self, slot: int, start: int) -> None:
        """As above."""


def request_of(number: int, rows: int = 100, kind: Kind = "generate") -> Request:
    ids = np.full(rows, number, np.uint32)
    params = SamplingParams(10) if kind == "generate" else None
    return Request(number, kind, ids, 1, params, asked=rows)


def admit(schedule: Schedule, tree: KvTree) -> list[int]:
    admitted = schedule.admit()
    for request in admitted:
        request.path = tree.open(request.ids)
    return [request.id for request in admitted]


def decode(request: Request) -> None:
    """Let a request stand before the row of its last token."""
    assert request.path is not None
    request.prefilled = True
    request.path.reserve()
    request.path.append(request.ids[:-1])
    assert request.decodes


def test_requests_run_in_their_order_up_to_the_limit() -> None:
    schedule, tree = Schedule(MANY), KvTree(NoSlots())
    requests = [request_of(number) for number in range(REPLIES_MAX + 2)]
    for request in requests:
        schedule.add(request)
    assert admit(schedule, tree) == list(range(REPLIES_MAX))
    assert admit(schedule, tree) == []
    assert len(schedule) == REPLIES_MAX + 2
    schedule.remove(requests[3])
    assert admit(schedule, tree) == [REPLIES_MAX]


def test_what_is_computed_ahead_waits_for_the_replies() -> None:
    schedule, tree = Schedule(MANY), KvTree(NoSlots())
    for number in range(AHEAD_MAX + 1):
        schedule.add(request_of(number, kind="warm"))
    assert admit(schedule, tree) == list(range(AHEAD_MAX))
    reply = request_of(99)
    schedule.add(reply)
    assert admit(schedule, tree) == [99]
    step = schedule.next()
    assert (step.prefilling, step.decoding) == (reply, ())
    schedule.remove(reply)
    assert schedule.next().prefilling in schedule.ahead.running


def test_prompts_take_turns_and_replies_are_in_every_step() -> None:
    schedule, tree = Schedule(MANY), KvTree(NoSlots())
    for number in range(4):
        schedule.add(request_of(number))
    admit(schedule, tree)
    assert schedule.next().rows_max == CHUNK_ROWS_MAX
    decoding = schedule.replies.running[:2]
    for request in decoding:
        decode(request)
    steps = [schedule.next() for _ in range(4)]
    assert all(step.decoding == tuple(decoding) for step in steps)
    assert all(step.rows_max == SHARED_CHUNK_ROWS_MAX for step in steps)
    turns = [step.prefilling.id for step in steps if step.prefilling is not None]
    assert sorted(turns[:2]) == sorted(turns[2:]) == [2, 3]


def test_nobody_runs_for_whom_there_is_no_memory() -> None:
    schedule, tree = Schedule(5), KvTree(NoSlots())
    for number in range(3):
        schedule.add(request_of(number, rows=300))  # two tiles, and one for a copy
    assert admit(schedule, tree) == [0]
    schedule.remove(schedule.replies.running[0])
    assert admit(schedule, tree) == [1]


def test_the_last_one_gives_way_and_the_oldest_never() -> None:
    schedule, tree = Schedule(MANY), KvTree(NoSlots())
    for number in (1, 2):
        schedule.add(request_of(number, kind="warm"))
    admit(schedule, tree)
    for number in (3, 4, 5):
        schedule.add(request_of(number))
    admit(schedule, tree)
    gone = [request.id for _ in range(9) if (request := schedule.give_way()) is not None]
    assert gone == [2, 1, 5, 4]
    assert [request.id for request in schedule.replies.waiting] == [4, 5]
    assert [request.id for request in schedule.replies.running] == [3]
