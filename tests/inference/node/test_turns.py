from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import pytest

from crdt_llm.inference.node.turns import Turns


class Party:
    """Guests that say when they come in and go out, and go when they are told."""

    def __init__(self) -> None:
        self.turns = Turns()
        self.inside: list[str] = []
        self.leaving: dict[str, asyncio.Event] = {}

    async def come(self, name: str, *, alone: bool = False) -> asyncio.Task[None]:
        self.leaving[name] = asyncio.Event()
        guest = asyncio.create_task(self._stay(name, alone=alone))
        await settle()
        return guest

    async def _stay(self, name: str, *, alone: bool) -> None:
        async with self.turns.taken(alone=alone):
            self.inside.append(name)
            try:
                await self.leaving[name].wait()
            finally:
                self.inside.remove(name)

    async def leave(self, name: str) -> None:
        self.leaving[name].set()
        await settle()


async def settle() -> None:
    """Let everyone who can go on go on; nobody here waits for anything but each other."""
    for _ in range(10):
        await asyncio.sleep(0)


async def test_all_are_inside_together() -> None:
    party = Party()
    guests = [await party.come(name) for name in "abc"]
    assert party.inside == ["a", "b", "c"]
    for name in "abc":
        await party.leave(name)
    await asyncio.gather(*guests)


async def test_who_wants_to_be_alone_waits_for_the_others_and_goes_before_later_ones() -> None:
    party = Party()
    guests = [await party.come("a"), await party.come("b")]
    guests += [await party.come("c", alone=True), await party.come("d")]
    assert party.inside == ["a", "b"]
    await party.leave("a")
    assert party.inside == ["b"]
    await party.leave("b")
    assert party.inside == ["c"]
    guests.append(await party.come("e", alone=True))
    assert party.inside == ["c"]
    await party.leave("c")
    assert party.inside == ["e"]
    await party.leave("e")
    assert party.inside == ["d"]
    await party.leave("d")
    await asyncio.gather(*guests)


async def test_who_gives_up_waiting_holds_nobody_up() -> None:
    party = Party()
    first, second = await party.come("a"), await party.come("b", alone=True)
    third = await party.come("c")
    second.cancel()
    await settle()
    assert party.inside == ["a", "c"]
    for name in "ac":
        await party.leave(name)
    await asyncio.gather(first, third)


@pytest.mark.parametrize("alone", [True, False])
async def test_a_turn_ends_with_an_error_too(*, alone: bool) -> None:
    turns = Turns()
    with pytest.raises(ZeroDivisionError):
        async with turns.taken(alone=alone):
            raise ZeroDivisionError
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(turns.taken(alone=True))
