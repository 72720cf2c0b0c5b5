"""The suite holds for our relay, and says so of an endpoint that breaks a promise."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from conformance.endpoints import behind, relay

from crdt_llm.conformance.case import Need
from crdt_llm.conformance.run import CASES, run
from crdt_llm.errors import CrdtLlmError
from crdt_llm.sync.wire.frames import (
    Ack,
    Change,
    Closed,
    Nack,
    Open,
    Opened,
    Presence,
    Update,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from crdt_llm.conformance.connection import Endpoint
    from crdt_llm.sync.wire.frames import FromClient, FromRelay

PAGE = Path(__file__).parents[2] / "protocol" / "CONFORMANCE.md"
WITHOUT_A_NODE = [case for case in CASES if not case.needs]


async def outcome(endpoint: Endpoint, case: str) -> tuple[str, str]:
    results = [result async for result in run(endpoint, only=[case])]
    (result,) = results
    return result.outcome, result.detail


@pytest.mark.parametrize("case", [case.id for case in WITHOUT_A_NODE])
async def test_our_relay_keeps_its_promise(case: str, tmp_path: Path) -> None:
    async with relay(tmp_path) as endpoint:
        assert await outcome(endpoint, case) == ("pass", "")


# -- endpoints that break a promise ---------------------------------------------------------------


def acknowledges_what_it_drops(frame: FromClient) -> list[FromClient]:
    """Together with :func:`says_yes`: an update goes nowhere and is confirmed all the same."""
    return [replace(frame, update=b"\x00\x00")] if isinstance(frame, Update) else [frame]


def says_yes(frame: FromRelay) -> list[FromRelay]:
    return [Ack(frame.channel, frame.id, 1)] if isinstance(frame, Nack) else [frame]


def tells_twice(frame: FromRelay) -> list[FromRelay]:
    return [frame, frame] if isinstance(frame, Change) else [frame]


def tells_nobody(frame: FromRelay) -> list[FromRelay]:
    return [] if isinstance(frame, Change) else [frame]


def forgets_who_went(frame: FromRelay) -> list[FromRelay]:
    if not isinstance(frame, Presence):
        return [frame]
    here = tuple(state for state in frame.states if state.state_json is not None)
    return [replace(frame, states=here)]


def begins_at_nothing(frame: FromClient) -> list[FromClient]:
    """As if every client had lost everything: the whole document is sent each time."""
    if isinstance(frame, Open):
        return [replace(frame, log=None, lsn=0, state_vector=b"\x00")]
    return [frame]


def opens_empty(frame: FromRelay) -> list[FromRelay]:
    return [replace(frame, update=b"\x00\x00")] if isinstance(frame, Opened) else [frame]


def lets_everybody_stay(frame: FromRelay) -> list[FromRelay]:
    return [] if isinstance(frame, Closed) else [frame]


@pytest.mark.parametrize(
    ("case", "up", "down"),
    [
        ("durable-ack", acknowledges_what_it_drops, says_yes),
        ("lost-ack", acknowledges_what_it_drops, says_yes),
        ("expired-id", acknowledges_what_it_drops, says_yes),
        ("stale-tab", None, tells_nobody),
        ("offline-merge", None, opens_empty),
        ("old-replica", None, tells_nobody),
        ("duplicate", None, tells_twice),
        ("gap", None, says_yes),
        ("oversized", None, says_yes),
        ("locked", None, tells_nobody),
        ("channels", None, tells_nobody),
        ("presence", None, forgets_who_went),
        ("resume-cost", begins_at_nothing, None),
        ("forged-author", None, says_yes),
        ("forged-reply", None, says_yes),
        ("frozen", None, says_yes),
        ("reader", None, says_yes),
        ("whole-refusal", None, says_yes),
        ("birth", None, says_yes),
        ("guest", None, lets_everybody_stay),
        ("redaction", acknowledges_what_it_drops, says_yes),
    ],
)
async def test_a_broken_promise_is_seen(
    case: str,
    up: Callable[[FromClient], list[FromClient]] | None,
    down: Callable[[FromRelay], list[FromRelay]] | None,
    tmp_path: Path,
) -> None:
    same = lambda frame: [frame]  # noqa: E731 - shorter than two functions
    async with (
        relay(tmp_path) as honest,
        behind(honest, up=up or same, down=down or same) as endpoint,
    ):
        result, detail = await outcome(endpoint, case)
    assert result == "fail"
    assert detail


async def test_an_endpoint_without_a_node_is_not_blamed_for_its_silence(tmp_path: Path) -> None:
    async with relay(tmp_path) as endpoint:
        patient = replace(endpoint, deadline_s=0.5)
        asked = ["reply", "crash", "crash-reply", "lost-log", "lost-log-reply"]
        results = [result async for result in run(patient, only=asked)]
    assert {result.outcome for result in results} == {"skip"}
    assert all(result.detail.startswith("needs ") for result in results)


async def test_nobody_there_is_an_error_and_no_result(tmp_path: Path) -> None:
    async with relay(tmp_path) as endpoint:
        pass
    with pytest.raises(CrdtLlmError, match="no connection"):
        _ = [result async for result in run(endpoint)]


def test_cases_have_ids_of_their_own_and_say_what_they_need() -> None:
    ids = [case.id for case in CASES]
    assert len(set(ids)) == len(ids)
    for case in CASES:
        assert re.fullmatch(r"[a-z]+(-[a-z]+)*", case.id)
        assert case.promise
        assert case.report
        assert case.needs <= set(Need)


def test_the_page_lists_every_case() -> None:
    row = re.compile(r"^\| `([a-z-]+)` \| (.+?) \| (.+?) \| (.*?) \|$", re.MULTILINE)
    rows = row.findall(PAGE.read_text())
    described = {(name, promise, report) for name, promise, report, _ in rows}
    assert described == {(case.id, case.promise, case.report) for case in CASES}
