"""Nodes in a room, and one engine for many of them: starting one takes seconds."""

from __future__ import annotations

from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from local_room import make_node

from crdt_llm.inference.engine.process import EngineProcess
from crdt_llm.inference.prompt.renderer import ParentTail, Renderer
from crdt_llm.inference.prompt.tokens import Vocabulary
from crdt_llm.inference.prompt.transcript import Transcript

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from local_room import LocalRoom

    from crdt_llm.document.schema import Entry
    from crdt_llm.document.seal import Hidden
    from crdt_llm.inference.node.node import Node


class Lent:
    """An engine that outlives the node which borrows it."""

    def __init__(self, engine: EngineProcess) -> None:
        self.generate, self.warm, self.digest = engine.generate, engine.warm, engine.digest
        self.forget, self.capabilities = engine.forget, engine.capabilities

    async def close(self) -> None:
        """It was only lent."""


async def start_node(
    room: LocalRoom, model_dir: Path, engine: EngineProcess | None = None, **surroundings: Any
) -> Node:
    """A node that sits in a room, with other surroundings where they are given.

    An engine that is lent goes on after it; else it has one of its own.
    """

    async def start() -> EngineProcess | Lent:
        return await EngineProcess.start(model_dir, threads=1) if engine is None else Lent(engine)

    node = make_node(room, model_dir, start)
    node.surroundings = replace(node.surroundings, **surroundings)
    await node.start()
    node.notice(room.id)
    return node


@asynccontextmanager
async def running(
    room: LocalRoom, model_dir: Path, engine: EngineProcess | None = None
) -> AsyncIterator[Node]:
    """A node of :func:`start_node`, closed at the end."""
    node = await start_node(room, model_dir, engine)
    try:
        yield node
    finally:
        await node.close()


async def forget_all(engine: EngineProcess, model_dir: Path) -> None:
    """Every conversation begins with the same token."""
    renderer = Renderer.learn(model_dir, Vocabulary.load(model_dir))
    beginning = renderer.segment(
        role="user", content="", is_root=True, root_at_ms=0, parent=ParentTail()
    )
    await engine.forget(beginning[:1])


def hidden_of(room: LocalRoom, node: Node, entry: Entry) -> Hidden:
    identity = node.identity
    transcript = Transcript(room.replica, node.renderer, identity.sealer)
    hidden = transcript.hidden(entry)
    assert hidden is not None
    return hidden


def assert_text_is_of_its_ids(room: LocalRoom, node: Node, entry: Entry) -> None:
    hidden = hidden_of(room, node, entry)
    stop = hidden.params["stop"]
    assert entry.content == node.vocabulary.text_of(hidden.ids, hidden.kinds, stop)
