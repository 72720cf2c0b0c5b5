from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest

from crdt_llm.errors import StoreFailed
from crdt_llm.sync.node.lease_wish import LeaseWish
from crdt_llm.sync.wire.lease import Granted

HERE = "c" * 22
TTL_S = 10.0


async def settle() -> None:
    """Let every task that can go on go on."""
    for _ in range(10):
        await asyncio.sleep(0)


@dataclass
class Wisher:
    """A wish, and what it did."""

    did: list[str] = field(default_factory=list)
    asked: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.wish = LeaseWish(self.ask, lambda: self.did.append("withdrew"), self.did.append)

    def ask(self) -> None:
        self.did.append("asked")
        self.asked.set()


LEASE = Granted(HERE, 3, bytes(32), bytes(64), TTL_S)


async def test_a_wish_is_asked_once_and_again_when_told_to() -> None:
    wisher = Wisher()
    waiting = asyncio.create_task(wisher.wish.wait())
    await settle()
    assert wisher.did == ["asked"]
    wisher.asked.clear()
    wisher.wish.unleased(0.0, "another node has the lease")
    await wisher.asked.wait()
    wisher.wish.leased(LEASE)
    assert await waiting == LEASE
    assert await wisher.wish.wait() == LEASE
    assert wisher.did == ["asked", "asked"]


async def test_a_lease_that_ends_is_told_once() -> None:
    wisher = Wisher()
    wisher.wish.leased(LEASE)
    wisher.wish.unleased(1.0, "taken over")
    wisher.wish.unleased(1.0, "taken over")
    assert wisher.did == ["taken over"]
    assert wisher.wish.granted is None


async def test_a_cancelled_wish_is_withdrawn() -> None:
    wisher = Wisher()
    waiting = asyncio.create_task(wisher.wish.wait())
    await settle()
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert wisher.did == ["asked", "withdrew"]


async def test_a_wish_that_cannot_come_true_says_so() -> None:
    wisher = Wisher()
    waiting = asyncio.create_task(wisher.wish.wait())
    await settle()
    wisher.wish.fail(StoreFailed("gone"))
    with pytest.raises(StoreFailed):
        await waiting
