"""An engine on a tiny model for each test module: starting one takes seconds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest_asyncio
from lent_engine import forget_all

from crdt_llm.inference.engine.process import EngineProcess

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def started_engine(tiny_model_dir: Path) -> AsyncIterator[EngineProcess]:
    async with await EngineProcess.start(tiny_model_dir, threads=1) as engine:
        yield engine


@pytest_asyncio.fixture(loop_scope="module")
async def engine(started_engine: EngineProcess, tiny_model_dir: Path) -> EngineProcess:
    """The module's engine, with nothing in its cache."""
    await forget_all(started_engine, tiny_model_dir)
    return started_engine
