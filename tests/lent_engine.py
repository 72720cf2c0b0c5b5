"""One engine for many nodes: starting one takes seconds."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from local_room import make_node

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from local_room import LocalRoom

    from crdt_llm.inference.node import Node
    from crdt_llm.inference.process import EngineProcess


class Lent:
    """An engine that outlives the node which borrows it."""

    def __init__(self, engine: EngineProcess) -> None:
        self.generate, self.warm, self.digest = engine.generate, engine.warm, engine.digest
        self.forget, self.capabilities = engine.forget, engine.capabilities

    async def close(self) -> None:
        """It was only lent."""


@asynccontextmanager
async def running(room: LocalRoom, model_dir: Path, engine: EngineProcess) -> AsyncIterator[Node]:
    """A node that sits in a room, with an engine that goes on after it."""

    async def start() -> Lent:
        return Lent(engine)

    node = make_node(room, model_dir, start)
    await node.start()
    node.notice(room.id)
    try:
        yield node
    finally:
        await node.close()
