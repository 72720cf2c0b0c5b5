"""What is read before anybody asks for it: the paths of entries that were admitted.

This module owns the order of such reading, one path at a time, and that it gives way. When it is
time to read ahead is decided in :mod:`crdt_llm.inference.evaluate`. It must not know how a document
is written.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Protocol

from crdt_llm.errors import BadProof, EngineBusy, EngineDied, PromptTooLong

if TYPE_CHECKING:
    from collections.abc import Callable

    from crdt_llm.inference.engine import Engine
    from crdt_llm.inference.fed import Fed
    from crdt_llm.inference.workplace import Workplace

logger = logging.getLogger("crdt_llm.inference")


class Reader(Protocol):
    """What reading ahead needs of the node."""

    engine: Engine | None

    def lost_engine(self, engine: Engine) -> None:
        """An engine died under somebody's hands."""
        ...


class Ahead:
    """The reading ahead in one conversation.

    Args:
        shared: the node.
        conversation: the conversation's id.
        work: the replica to read.
        fed: what the engine was given.
        wake: asks for another look.
    """

    def __init__(
        self,
        shared: Reader,
        conversation: str,
        work: Workplace,
        fed: Fed,
        wake: Callable[[], None],
    ) -> None:
        self._shared = shared
        self._id = conversation
        self._work = work
        self._fed = fed
        self._wake = wake
        self._cold: dict[str, None] = {}  # ends of paths to be read ahead, the oldest first
        self._task: asyncio.Task[None] | None = None
        self._entry = ""  # that the task reads up to

    @property
    def busy(self) -> bool:
        """Whether something is being read."""
        return self._task is not None

    @property
    def cold(self) -> str | None:
        """The entry whose path is to be read next."""
        return next(iter(self._cold), None)

    def plan(self, entry: str) -> None:
        """Have a path read when nothing else is to do; it includes what its line has before it."""
        tree = self._work.conversation.tree
        for other in [one for one in self._cold if tree.line(one) == tree.line(entry)]:
            del self._cold[other]
        self._cold[entry] = None

    def start(self, entry: str) -> None:
        """Read the path to an entry."""
        self._cold.pop(entry, None)
        self._entry = entry
        self._task = asyncio.create_task(self._run(entry), name=f"warm {entry}")

    async def stop(self) -> None:
        """Interrupt what is being read; what was computed stays, the rest is done later."""
        task, self._task = self._task, None
        if task is None or task.done():
            return
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        if self._work.conversation.tree.tip(self._entry) == self._entry:
            self.plan(self._entry)

    async def _run(self, entry: str) -> None:
        engine = self._shared.engine
        if engine is None:
            return
        try:
            await self._warm(engine, entry)
        except EngineDied:
            self._shared.lost_engine(engine)
        except (EngineBusy, PromptTooLong, BadProof) as error:
            logger.info("conversation %s is not prefilled ahead: %s", self._id, error)
        finally:
            if self._task is asyncio.current_task():
                self._task = None
            self._wake()

    async def _warm(self, engine: Engine, entry: str) -> None:
        transcript = self._work.transcript
        while await transcript.load(entry, engine.capabilities.positions):
            pass
        segments = transcript.segments(transcript.reading(entry))
        ids = tuple(token for _, part in segments for token in part)
        if not ids:
            return
        self._fed.note(segments)
        done = await engine.warm(ids)
        spans = tuple((name, len(part)) for name, part in segments)
        self._work.account.computed(spans, reused=done.reused, prompt=done.prompt)
