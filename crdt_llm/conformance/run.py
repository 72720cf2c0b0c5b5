"""Running the cases, one after another, and what came of each.

This module owns the order, what is skipped and why, and that one case's failure does not end the
run. It must not know a case, nor how results are printed.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from crdt_llm.conformance import reply_cases, sync_cases, trust_cases
from crdt_llm.conformance.case import Need, World, ended
from crdt_llm.conformance.connection import Broken, Native
from crdt_llm.errors import CrdtLlmError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Collection

    from crdt_llm.conformance.case import Case
    from crdt_llm.conformance.connection import Endpoint

CASES: Final = (*sync_cases.CASES, *trust_cases.CASES, *reply_cases.CASES)
"""Every case, in the order of running."""

CASE_STEPS_MAX: Final = 12
"""How many times the deadline one case may take: the longest waits for a dozen things."""


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a case.

    Attributes:
        case: Which.
        outcome: ``pass``, ``fail`` or ``skip``.
        detail: Why not; empty after a pass.
        seconds: How long it took.
    """

    case: Case
    outcome: str
    detail: str
    seconds: float


async def run(
    endpoint: Endpoint,
    *,
    crash: Callable[[], Awaitable[None]] | None = None,
    wipe: Callable[[], Awaitable[None]] | None = None,
    only: Collection[str] = (),
) -> AsyncIterator[Result]:
    """Run the cases against an endpoint.

    Args:
        endpoint: Where, as whom, and how long anything may take.
        crash: Kills the endpoint and starts it again, if that can be done.
        wipe: Makes the endpoint lose its log and keep its register, if that can be done.
        only: The ids of the cases to run; empty is all.

    Yields:
        What came of each case, as it ends.

    Raises:
        Broken: The endpoint cannot be reached, or does not know the token.
    """
    wire = await Native.connect(endpoint)
    try:
        welcome = await wire.hello(endpoint.token)
    finally:
        await wire.close()

    def world() -> World:
        return World(endpoint, welcome.principal, welcome.relay, crash, wipe)

    ways = {Need.CRASH: crash, Need.WIPE: wipe}
    missing = {need: need.value for need, way in ways.items() if way is None}
    chosen = [case for case in CASES if not only or case.id in only]
    if any(Need.NODE in case.needs for case in chosen) and not await _has_node(world()):
        missing[Need.NODE] = Need.NODE.value
    for case in chosen:
        lacking = [missing[need] for need in case.needs if need in missing]
        if lacking:
            yield Result(case, "skip", f"needs {lacking[0]}", 0.0)
            continue
        began = time.monotonic()
        detail = await _carry_out(case, world())
        seconds = time.monotonic() - began
        yield Result(case, "fail" if detail else "pass", detail, seconds)


async def _carry_out(case: Case, world: World) -> str:
    """Run one case; the answer says what did not hold."""
    try:
        async with asyncio.timeout(CASE_STEPS_MAX * world.endpoint.deadline_s):
            await case.run(world)
    except TimeoutError:
        return "it did not come to an end"
    except CrdtLlmError as error:
        return str(error) or type(error).__name__
    except OSError as error:
        return f"the connection failed: {error}"
    finally:
        await world.close()
    return ""


async def _has_node(world: World) -> bool:
    device = world.device("probe")
    try:
        await device.connect()
        _, slot, update = device.ask("Are you there?", max_tokens=1)
        await device.send(update)
        await device.until(ended(slot), "a reply")
    except Broken:
        return False  # no node answers: that is what was asked
    finally:
        await world.close()
    return True
