"""One reply at work: an engine's events become flushes of text and sealed ids.

This module owns the pace: the first token goes out at once, then windows of time, each one update,
and never a second one before the first is durable. It says how the reply ended and leaves it to the
desk to write that down. It must not decide what else happens in the conversation.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from crdt_llm.document.schema import State
from crdt_llm.errors import EngineDied, LocalMisuse, PromptTooLong
from crdt_llm.inference.contract import Finished, Prefilled, Queued, Sampled
from crdt_llm.inference.node.reply import describe, sampling

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from crdt_llm.inference.contract import Engine, GenerationEvent
    from crdt_llm.inference.node.reply import Identity, Reply
    from crdt_llm.inference.node.workplace import Workplace

logger = logging.getLogger("crdt_llm.inference")

FLUSH_WINDOW_S: Final = 0.08
"""Of text and ids per update: twelve a second look like a flow. Each costs the relay, the disk and
every reader some milliseconds, on the cores that the engine computes with."""

FLUSHES_PER_S_MAX: Final = 60
"""Of all replies of a node: with more of them at once each has longer windows."""


def window_s(replies: int) -> float:
    """How long text and ids are collected for one update.

    Args:
        replies: how many the node makes at once.
    """
    return max(FLUSH_WINDOW_S, replies / FLUSHES_PER_S_MAX)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a reply is to be ended."""

    state: State
    finish: str
    error: tuple[str, str] | None = None


class Generation:
    """A reply that an engine works on.

    Args:
        work: the workplace that it is written to.
        reply: the reply.
        segments: the entries that it is answered from, each with its ids.
        identity: what it is sealed and signed with.
        clock_ms: wall time.
        placed: called when its place in the engine's queue is another one.
        replies: how many the node makes at once, now.

    Attributes:
        place: how many replies the engine takes up before this one; ``None`` while it is at work.
    """

    def __init__(  # noqa: PLR0913, PLR0917 - what a reply is made of
        self,
        work: Workplace,
        reply: Reply,
        segments: tuple[tuple[str, tuple[int, ...]], ...],
        identity: Identity,
        clock_ms: Callable[[], int],
        placed: Callable[[], None] = lambda: None,
        replies: Callable[[], int] = lambda: 1,
    ) -> None:
        self.reply = reply
        self.place: int | None = None
        self._placed = placed
        self._replies = replies
        self.task: asyncio.Task[None] | None = None
        self._work = work
        self._segments = segments
        self._identity = identity
        self._clock_ms = clock_ms
        self._durable: asyncio.Future[None] | None = None
        self._window: asyncio.TimerHandle | None = None
        self._held: asyncio.Event | None = None

    def hold(self) -> None:
        """Write nothing before :meth:`let_go`: the engine may begin, the slot has no place yet."""
        self._held = asyncio.Event()

    def let_go(self) -> None:
        """The slot has its place."""
        if self._held is not None:
            self._held.set()

    @property
    def fed(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """What the engine was given: the entries in order, and this reply as far as it got."""
        return (*self._segments, (self.reply.slot, self.reply.own_ids))

    async def run(self, engine: Engine, end_ids: frozenset[int]) -> Outcome:
        """Sample until the reply ends by itself.

        What does not fit the last flush waits in the reply for its end. Cancelling stops the
        engine within a step.

        Raises:
            EngineDied: it can be resumed with another engine.
            Unavailable: not now.
        """
        reply = self.reply
        params = sampling(reply.params, end_ids)
        events = engine.generate(reply.ids, params, len(reply.prompt))
        try:
            async with aclosing(events):
                return await self._follow(events)
        except (PromptTooLong, LocalMisuse) as error:
            return Outcome(State.FAILED, "error", describe(error))
        finally:
            if self._window is not None:
                self._window.cancel()

    async def _follow(self, events: AsyncGenerator[GenerationEvent, None]) -> Outcome:
        async for event in events:
            if self._held is not None:
                await self._held.wait()
            self._note_place(event)
            match event:
                case Prefilled(prompt, reused, _):
                    self._work.computed.note(event)
                    self._charge(prompt, reused)
                case Sampled(token, logprob):
                    self._work.computed.sampled += 1
                    if self.reply.feed(token, logprob, self._clock_ms()):
                        return Outcome(State.DONE, "stop")
                    if self._window is None:
                        self._flush()
                case Finished(reason):
                    return Outcome(State.DONE, "context" if reason == "positions" else reason)
            if self._durable is not None and self._durable.done():
                self._durable.result()  # a lost seat ends the reply here
        raise EngineDied("the engine ended a reply without a reason")

    def _note_place(self, event: GenerationEvent) -> None:
        place = event.place if isinstance(event, Queued) else None
        if place != self.place:
            self.place = place
            self._placed()

    def _charge(self, prompt: int, reused: int) -> None:
        # Every reply behind one parent has the same opening.
        spans = tuple((name, len(ids)) for name, ids in self._segments)
        parent = spans[-1][0] if spans else ""
        opening = (f"{parent}/opening", len(self.reply.hidden.injected))
        path = (*spans, opening)
        self._work.account.computed(path, reused=reused, prompt=prompt)
        prefilled, drafted = self._work.account.charge(name for name, _ in path)
        self.reply.prefilled += prefilled
        self.reply.drafted += drafted

    def _flush(self) -> None:
        """Write what waits, unless the last flush is still on its way; again after a window."""
        if self._durable is None or self._durable.done():
            if not self.reply.waiting:
                self._window = None  # the next token goes out at once
                return
            if not self._work.to_end(self.reply.slot):  # else the desk is about to end it
                self._durable = self._work.write(
                    lambda writer: self.reply.flush(writer, self._identity)
                )
        loop = asyncio.get_running_loop()
        self._window = loop.call_later(window_s(self._replies()), self._flush)
