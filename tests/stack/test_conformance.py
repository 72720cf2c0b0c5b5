"""The suite against a served process: relay, node and engine, and ``kill -9`` in between.

Cases that need no node run here too: they must hold while one admits what they write.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest
import pytest_asyncio
from conformance.endpoints import behind
from stack.served_process import ServedProcess

from crdt_llm.conformance.case import Need
from crdt_llm.conformance.connection import Endpoint
from crdt_llm.conformance.run import CASES, run
from crdt_llm.sync.wire.frames import Opened, Restore

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from crdt_llm.sync.wire.frames import FromClient, FromRelay

pytestmark = pytest.mark.asyncio(loop_scope="module")

DEADLINE_S = 60.0  # a crash costs the start of an engine, on a machine with other tests


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def server(
    tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path
) -> AsyncIterator[ServedProcess]:
    async with ServedProcess(
        tmp_path_factory.mktemp("conformance"), tiny_model_dir, native=False
    ) as server:
        yield server


async def lose_log(server: ServedProcess) -> None:
    await server.kill()
    for file in server.folder.path.glob("log.db*"):
        file.unlink()
    await server.start()


def endpoint_of(server: ServedProcess) -> Endpoint:
    return Endpoint(f"ws://{urlsplit(server.url).netloc}", server.token, DEADLINE_S)


@pytest.mark.parametrize("case", [case.id for case in CASES])
async def test_the_served_process_keeps_its_promise(case: str, server: ServedProcess) -> None:
    async def crash() -> None:
        await server.kill()
        await server.start()

    async def wipe() -> None:
        await lose_log(server)

    endpoint = endpoint_of(server)
    (result,) = [result async for result in run(endpoint, crash=crash, wipe=wipe, only=[case])]
    assert (result.outcome, result.detail) == ("pass", "")


# -- endpoints that do not get over a loss --------------------------------------------------------


def makes_everybody_an_owner(frame: FromRelay) -> list[FromRelay]:
    return [replace(frame, grant="owner")] if isinstance(frame, Opened) else [frame]


def misses_nothing(frame: FromRelay) -> list[FromRelay]:
    return [replace(frame, behind=False)] if isinstance(frame, Opened) else [frame]


def takes_nothing_back(frame: FromClient) -> list[FromClient]:
    return [replace(frame, update=b"\x00\x00")] if isinstance(frame, Restore) else [frame]


@pytest.mark.parametrize(
    ("case", "up", "down", "says"),
    [
        ("lost-log", None, makes_everybody_an_owner, "a reader was told to be owner"),
        ("lost-log-older", None, misses_nothing, "does not say that it lost something"),
        ("lost-log-reply", takes_nothing_back, None, "the endpoint misses"),
    ],
)
async def test_an_endpoint_that_does_not_get_over_a_loss_is_found_out(
    case: str,
    up: Callable[[FromClient], list[FromClient]] | None,
    down: Callable[[FromRelay], list[FromRelay]] | None,
    says: str,
    server: ServedProcess,
) -> None:
    async def wipe() -> None:
        await lose_log(server)

    same = lambda frame: [frame]  # noqa: E731 - shorter than two functions
    async with behind(endpoint_of(server), up=up or same, down=down or same) as endpoint:
        patient = replace(endpoint, deadline_s=DEADLINE_S)
        (result,) = [result async for result in run(patient, wipe=wipe, only=[case])]
    assert result.outcome == "fail"
    assert says in result.detail


@pytest.mark.parametrize("case", [case.id for case in CASES if Need.WIPE in case.needs])
async def test_a_command_that_loses_nothing_is_found_out(case: str, server: ServedProcess) -> None:
    async def wipe() -> None:
        await server.kill()
        await server.start()

    (result,) = [result async for result in run(endpoint_of(server), wipe=wipe, only=[case])]
    assert (result.outcome, result.detail) == ("fail", "the log is still there after --wipe")


async def test_what_a_node_remembers_of_an_earlier_run_is_not_held_against_it(
    server: ServedProcess,
) -> None:
    endpoint = endpoint_of(server)
    for _ in range(2):
        (result,) = [result async for result in run(endpoint, only=["prefill"])]
        assert (result.outcome, result.detail) == ("pass", "")
