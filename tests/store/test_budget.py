from __future__ import annotations

import asyncio
import random

import pytest

from crdt_llm.store.budget import ByteBudget


async def settle() -> None:
    """Let everything run that can."""
    for _ in range(5):
        await asyncio.sleep(0)


async def test_who_finds_room_does_not_wait() -> None:
    budget = ByteBudget(10)
    await budget.acquire(4)
    await budget.acquire(6)
    assert budget.bytes_held == 10


async def test_who_finds_no_room_waits_until_there_is() -> None:
    budget = ByteBudget(10)
    await budget.acquire(8)
    waiting = asyncio.ensure_future(budget.acquire(5))
    await settle()
    assert not waiting.done()
    budget.release(2)
    await settle()
    assert not waiting.done()
    budget.release(1)
    await waiting
    assert budget.bytes_held == 10


async def test_nobody_overtakes() -> None:
    budget = ByteBudget(10)
    await budget.acquire(10)
    order: list[str] = []

    async def take(name: str, size: int) -> None:
        await budget.acquire(size)
        order.append(name)

    large = asyncio.ensure_future(take("large", 9))
    await settle()
    small = asyncio.ensure_future(take("small", 1))
    budget.release(5)  # room for the small one only
    await settle()
    assert order == []
    budget.release(5)
    # Comes in the very turn in which the first two have been granted theirs.
    late = asyncio.ensure_future(take("late", 0))
    await asyncio.gather(large, small, late)
    assert order == ["large", "small", "late"]


async def test_a_newcomer_does_not_overtake_one_who_was_just_granted() -> None:
    budget = ByteBudget(10)
    await budget.acquire(10)
    order: list[str] = []

    async def take(name: str) -> None:
        await budget.acquire(1)
        order.append(name)

    first = asyncio.ensure_future(take("first"))
    await settle()
    budget.release(10)
    # `first` has its bytes but has not run yet; this coroutine starts before it.
    await take("second")
    await first
    assert order == ["first", "second"]


async def test_a_cancelled_waiter_takes_nothing_and_makes_way() -> None:
    budget = ByteBudget(10)
    await budget.acquire(8)
    large = asyncio.ensure_future(budget.acquire(9))
    small = asyncio.ensure_future(budget.acquire(2))
    await settle()
    large.cancel()
    await small
    assert large.cancelled()
    assert budget.bytes_held == 10


async def test_one_cancelled_in_the_turn_of_its_grant_gives_back() -> None:
    budget = ByteBudget(10)
    await budget.acquire(10)
    waiting = asyncio.ensure_future(budget.acquire(3))
    await settle()
    budget.release(10)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert budget.bytes_held == 0


@pytest.mark.parametrize("seed", range(5))
async def test_it_never_holds_more_than_its_maximum_and_ends_empty(seed: int) -> None:
    rng = random.Random(seed)
    budget = ByteBudget(100)

    async def use() -> None:
        size = rng.randrange(101)
        await budget.acquire(size)
        try:
            assert 0 <= budget.bytes_held <= 100
            for _ in range(rng.randrange(4)):
                await asyncio.sleep(0)
        finally:
            budget.release(size)

    tasks = [asyncio.ensure_future(use()) for _ in range(200)]
    while not all(task.done() for task in tasks):
        await asyncio.sleep(0)
        rng.choice(tasks).cancel()
    for task in tasks:
        assert task.cancelled() or task.exception() is None
    assert budget.bytes_held == 0
