"""What is read before anybody asks for it: the paths of entries that were admitted, and drafts.

This module owns how such reading is done, one path at a time, and that it gives way: a path to
replies, and a draft to everything that was admitted, in whatever conversation. When it is time to
read ahead is decided in :mod:`crdt_llm.inference.node.evaluate`. It must not know how a document is
written.
"""

from __future__ import annotations

import asyncio
import logging
import math
import sys
from functools import partial
from typing import TYPE_CHECKING, Final, Protocol

from crdt_llm.errors import BadProof, EngineBusy, EngineDied, PromptTooLong
from crdt_llm.inference.node.digests import Digesting
from crdt_llm.inference.node.drafts import common_prefix, settled
from crdt_llm.inference.prompt.transcript import OFFLOAD_CHARACTERS_MIN

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Hashable

    from crdt_llm.inference.contract import Engine
    from crdt_llm.inference.node.digests import Digests
    from crdt_llm.inference.node.drafts import Drafts
    from crdt_llm.inference.node.fed import Fed
    from crdt_llm.inference.node.workplace import Workplace

logger = logging.getLogger("crdt_llm.inference")

DRAFT_INTERVAL_S: Final = 0.15  # between two readings of drafts: as often as a word is typed
DRAFT_TOKENS_MAX: Final = 64
"""Tokens of a draft that are read at once: a step of the engine's. Admitted work waits for no more
than that."""


class Reader(Protocol):
    """What reading ahead needs of the node."""

    engine: Engine | None
    digests: Digests | None

    @property
    def is_at_work(self) -> bool:
        """Whether a reply runs or an admitted path is read, in any conversation."""
        ...

    def read_ahead(self, change: int) -> None:
        """So many more (or fewer) admitted paths are being read."""
        ...

    def call_at_rest(self, wake: Callable[[], None]) -> None:
        """Call ``wake`` once, when nothing admitted is at work any more."""
        ...

    def drafts(self, conversation: str) -> Drafts:
        """What is being typed in a conversation; outlives a sitting."""
        ...

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
        self._entry: str | None = None  # that the task reads up to; ``None`` for a draft
        self._drafts_at = -math.inf  # when one was last begun, by the loop's clock

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
        if self._entry is not None and self._work.conversation.tree.tip(self._entry) == self._entry:
            self.plan(self._entry)

    async def give_way(self, parent: str, last: str, *, to_reply: bool) -> bool:
        """Make way for what is about to be admitted: a draft always does, a path to replies.

        Args:
            parent: the entry that it is admitted behind.
            last: the last entry that is admitted.
            to_reply: whether a reply comes with it.

        Returns:
            Whether it waited. Then the document may have changed, and whoever decided something
            before should decide anew.
        """
        if self.busy and (to_reply or self._entry is None):
            await self.stop()
            return True
        if not self._drafts.is_read_behind(parent):
            return False
        try:
            return await self._work.transcript.load(last, sys.maxsize)
        except BadProof:
            return False  # whoever is about to read it finds out too

    async def _run(self, entry: str) -> None:
        self._shared.read_ahead(1)
        try:
            await self._guarded(lambda engine: self._warm(engine, entry))
        finally:
            self._shared.read_ahead(-1)

    async def _guarded(self, read: Callable[[Engine], Awaitable[None]]) -> None:
        engine = self._shared.engine
        if engine is None:
            return
        try:
            await read(engine)
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
        self._work.computed.note(done)
        spans = tuple((name, len(part)) for name, part in segments)
        self._work.account.computed(spans, reused=done.reused, prompt=done.prompt)
        if self._shared.digests is not None and isinstance(engine, Digesting):
            await self._shared.digests.record(self._id, segments, engine)

    # -- drafts --------------------------------------------------------------------------------

    @property
    def _drafts(self) -> Drafts:
        return self._shared.drafts(self._id)

    @property
    def draft(self) -> bool:
        """Whether a draft can be read now; if not yet, asks for another look when it can."""
        if self._next_draft() is None:
            return False
        if self._shared.is_at_work:
            self._shared.call_at_rest(self._wake)
            return False
        loop = asyncio.get_running_loop()
        wait = self._drafts_at + DRAFT_INTERVAL_S - loop.time()
        if wait > 0:
            loop.call_later(wait, self._wake)
        return wait <= 0

    def start_draft(self) -> None:
        """Read what can be read of the draft that was touched last."""
        self._drafts_at = asyncio.get_running_loop().time()
        self._entry = None
        reading = self._guarded(self._read_draft)
        self._task = asyncio.create_task(reading, name=f"draft in {self._id}")

    def admitted(self, parent: str, entries: tuple[str, ...]) -> None:
        """Entries are being admitted behind one: they take over what was read ahead of them."""
        if not self._drafts.is_read_behind(parent):
            return
        transcript, last = self._work.transcript, entries[-1] if entries else parent
        segments = transcript.segments(transcript.reading(last))
        ids = tuple(token for _, part in segments for token in part)
        taken = self._drafts.admitted(parent, ids)
        if taken is None:
            return
        first, upto = taken
        offset = 0
        for name, part in segments:
            if name in entries and first < offset + len(part) and upto > offset:
                self._work.account.claim(name, max(first - offset, 0), upto - offset)
            offset += len(part)

    async def drop_drafts(self, engine: Engine) -> None:
        """Have the engine forget what was read of drafts and is of no use any more."""
        drops = self._drafts.drops
        while drops:
            await engine.forget(drops[0].ids, drops[0].keep)
            drops.popleft()

    def _next_draft(self) -> tuple[Hashable, str] | None:
        """The draft that was touched last and can be read, and where it stands."""
        tips = ((source, self._tip_of(source)) for source in self._drafts.waiting)
        return next(((source, tip) for source, tip in tips if tip is not None), None)

    def _tip_of(self, source: Hashable) -> str | None:
        """The entry that a draft would come to stand behind; ``None`` while that is not known."""
        tree = self._work.conversation.tree
        after = self._drafts.after(source)
        if not tree.is_admitted(after):
            return None
        tip = tree.tip(after)
        if tree.queue(tree.line(after)) or self._work.is_open(tip):
            return None
        return tip

    async def _read_draft(self, engine: Engine) -> None:
        transcript = self._work.transcript
        found = self._next_draft()
        if found is None:
            return  # it changed, or something came before it
        source, tip = found
        text = self._drafts.take(source)
        while await transcript.load(tip, engine.capabilities.positions):
            pass
        reading = transcript.reading(tip)
        segments = transcript.segments(reading)
        path = tuple(token for _, part in segments for token in part)
        render = partial(_settled_ids, transcript.drafting(reading), text)
        ids = await asyncio.to_thread(render) if len(text) >= OFFLOAD_CHARACTERS_MIN else render()
        if self._work.conversation.tree.tip(tip) != tip:
            return  # somebody else was admitted meanwhile
        whole = (*path, *ids)[: engine.capabilities.positions - 1]
        scratch = self._drafts.branch(source, tip, len(path), whole)
        await self.drop_drafts(engine)
        if scratch is None:
            return
        spans = tuple((name, len(part)) for name, part in segments)
        self._fed.note(segments)
        while scratch.done < len(whole):
            if self._shared.is_at_work:
                self._drafts.touch(source)
                return
            done = await engine.warm(scratch.ask(DRAFT_TOKENS_MAX))
            self._work.computed.note(done)
            if done.reused < len(path):
                upto = min(done.prompt, len(path))
                self._work.account.computed(spans, reused=done.reused, prompt=upto)
            scratch.note(done.reused, done.prompt)


def _settled_ids(render: Callable[[str], tuple[int, ...]], text: str) -> tuple[int, ...]:
    """The ids of a draft that stay, whatever is typed at its end: as far as can be told."""
    whole = render(text)
    return whole[: common_prefix(render(text[: settled(text)]), whole)]
