"""The suite against a served process: relay, node and engine, and ``kill -9`` in between.

Cases that need no node run here too: they must hold while one admits what they write.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest
import pytest_asyncio
from stack.served_process import ServedProcess

from crdt_llm.conformance.connection import Endpoint
from crdt_llm.conformance.run import CASES, run

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

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


@pytest.mark.parametrize("case", [case.id for case in CASES])
async def test_the_served_process_keeps_its_promise(case: str, server: ServedProcess) -> None:
    async def crash() -> None:
        await server.kill()
        await server.start()

    endpoint = Endpoint(f"ws://{urlsplit(server.url).netloc}", server.token, DEADLINE_S)
    (result,) = [result async for result in run(endpoint, crash=crash, only=[case])]
    assert (result.outcome, result.detail) == ("pass", "")


async def test_what_a_node_remembers_of_an_earlier_run_is_not_held_against_it(
    server: ServedProcess,
) -> None:
    endpoint = Endpoint(f"ws://{urlsplit(server.url).netloc}", server.token, DEADLINE_S)
    for _ in range(2):
        (result,) = [result async for result in run(endpoint, only=["prefill"])]
        assert (result.outcome, result.detail) == ("pass", "")
