"""What is read when a path has more tokens than the model positions.

This module owns the two ways out that a conversation's policy can name, ``drop_oldest`` and
``summarise``, and the making of a summary. Both leave the end of the path as it is, keep a system
entry at its beginning, and make room for half of the positions, so that the prompt is read anew
once and then goes on for a while. It must not write: what was decided is written by
:mod:`crdt_llm.inference.node.admission`, and from then on the document alone says what is read.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import aclosing
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Final

from crdt_llm.document.reading import is_summary, is_withdrawn
from crdt_llm.document.schema import Role
from crdt_llm.document.seal import Kind
from crdt_llm.errors import EngineDied, LocalMisuse, PromptTooLong, Unavailable
from crdt_llm.inference.contract import Prefilled, Sampled, SamplingParams
from crdt_llm.inference.node.shared import BUSY_S, positions_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from crdt_llm.document.schema import Entry
    from crdt_llm.inference.contract import Engine
    from crdt_llm.inference.node.shared import Shared
    from crdt_llm.inference.node.workplace import Workplace

logger = logging.getLogger("crdt_llm.inference")

REPLY_SHARE: Final = 8  # of the positions, so many parts: what stays free for a reply, at most
SUMMARY_SHARE: Final = 8  # and for a summary
SUMMARY_TOKENS_MAX: Final = 400  # a page
SUMMARIES_MAX: Final = 8  # for one slot: each stands for what fits, a long merge needs several

INSTRUCTION: Final = (
    "Summarise the conversation above for somebody who will carry it on without having read it. "
    "Keep names, numbers, decisions and open questions. Answer with the summary alone."
)
HEADING: Final = "Summary of the conversation so far:\n\n"


@dataclass(frozen=True, slots=True)
class Summary:
    """What a model made of a part of a conversation.

    Attributes:
        covers: the first and the last entry that it stands for.
        text: what it says.
    """

    covers: tuple[str, str]
    text: str


class Overflow:
    """The prompts of one conversation that are too long.

    Args:
        shared: what the node's desks share.
        conversation: the conversation's id.
        work: the replica to read.
        wake: asks for another look.
    """

    def __init__(
        self, shared: Shared, conversation: str, work: Workplace, wake: Callable[[], None]
    ) -> None:
        self._shared = shared
        self._id = conversation
        self._work = work
        self._wake = wake
        self._attempts: dict[str, int] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._made: dict[str, Summary] = {}

    @property
    def preparing(self) -> frozenset[str]:
        """The slots that wait for a summary."""
        return frozenset(self._tasks) | frozenset(self._made)

    def pop_ready(self) -> tuple[str, Summary] | None:
        """A summary that can be written now, and the slot that waits for it."""
        tree = self._work.conversation.tree
        for slot in self._made:
            parent = tree.up(slot)
            if tree.is_admitted(parent) and not self._work.is_open(parent):
                return slot, self._made.pop(slot)
        return None

    async def drop_stale(self) -> None:
        """Let go of what is made for slots that do not wait any more."""
        if self.preparing:
            await self.stop(self.preparing - set(self._work.conversation.tree.pending))

    async def stop(self, slots: frozenset[str] | None = None) -> None:
        """Stop making summaries, for some slots or for all."""
        gone = self.preparing if slots is None else slots
        tasks = [self._tasks.pop(slot) for slot in gone if slot in self._tasks]
        for slot in gone:
            self._made.pop(slot, None)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def choose(self, slot: Entry, last: str, limit: int) -> tuple[str, ...] | None:
        """What a slot behind ``last`` is to read.

        Args:
            slot: the slot.
            last: the entry that it will stand behind.
            limit: the model's positions.

        Returns:
            The entries in order; ``None`` if this waited, or a summary must be made first. Then
            whoever decided something before should decide anew.

        Raises:
            PromptTooLong: and the policy knows no way out, or there is none.
            BadProof: something on the path cannot be read.
        """
        transcript = self._work.transcript
        reading = transcript.reading_of(slot.id, last)
        policy = self._work.conversation.meta.policy.overflow
        asked = slot.born.params.max_tokens
        room = limit // REPLY_SHARE
        fits = (
            limit if policy == "refuse" else limit - (room if asked is None else min(room, asked))
        )
        try:
            waited = await transcript.load_reading(reading, fits)
        except PromptTooLong:
            if policy == "refuse":
                raise
        else:
            return None if waited else reading
        head = self._head(reading)
        begin = await self._begin_of_tail(reading, head, fits)
        if begin is None:
            return None
        if begin <= head:
            raise PromptTooLong(
                "the last entries alone are too long for the model: fork from an earlier entry"
            )
        if policy == "drop_oldest":
            return reading[:head] + reading[begin:]
        await self._summarise(slot.id, reading, head, begin)
        return None

    def implied(self, last: str) -> bool:
        """Whether the path up to an entry says itself what is read behind it.

        It does as long as nobody wrote a summary since the last reply.
        """
        conversation = self._work.conversation
        for name in reversed(conversation.tree.path(last)):
            if is_summary(conversation, name):
                return False
            born = conversation.born(name)
            if born is not None and born.role is Role.ASSISTANT:
                return True
        return True

    # -- what stays ----------------------------------------------------------------------------

    def _head(self, reading: tuple[str, ...]) -> int:
        """How many entries at the beginning stay in any case: what a system entry says holds."""
        conversation = self._work.conversation
        born = conversation.born(reading[0])
        is_head = born is not None and born.role is Role.SYSTEM
        return int(is_head and not is_summary(conversation, reading[0]))

    def _can_begin(self, name: str) -> bool:
        """Whether what stays can begin with an entry: a reply would answer nothing."""
        born = self._work.conversation.born(name)
        return born is not None and born.role is not Role.ASSISTANT

    async def _begin_of_tail(self, reading: tuple[str, ...], head: int, fits: int) -> int | None:
        """Where what stays begins: half of what fits, or at least the last author's entry.

        Returns:
            An index; ``head`` or less if nothing would have to go or nothing can stay; ``None`` if
            this waited.
        """
        transcript = self._work.transcript
        kept = sum(len(ids) for _, ids in transcript.segments(reading[:head]))
        half = await transcript.count_fitting(reading, (fits - kept) // 2, from_end=True)
        if half is None:
            return None
        for index in range(len(reading) - half, len(reading)):
            if self._can_begin(reading[index]):
                return index
        most = await transcript.count_fitting(reading, fits - kept, from_end=True)
        if most is None:
            return None
        for index in reversed(range(len(reading) - most, len(reading))):
            if self._can_begin(reading[index]):
                return index
        return 0

    # -- summaries -----------------------------------------------------------------------------

    async def _summarise(self, slot: str, reading: tuple[str, ...], head: int, begin: int) -> None:
        """Have the model sum up what would have to go, as much of it as it can read at once."""
        if slot in self.preparing:
            return
        attempts = self._attempts[slot] = self._attempts.get(slot, 0) + 1
        positions = positions_of(self._shared)
        reserve = min(SUMMARY_TOKENS_MAX, positions // SUMMARY_SHARE)
        transcript = self._work.transcript
        asking = len(transcript.asking(reading[:begin], INSTRUCTION))
        readable = await transcript.count_fitting(reading, positions - reserve - asking)
        if readable is None:
            self._attempts[slot] -= 1
            self._wake()
            return
        part = self._longest_run(reading, head, min(begin, readable))
        summed_up = len(part) == 1 and is_summary(self._work.conversation, reading[part.start])
        if attempts > SUMMARIES_MAX or not part or summed_up:
            raise PromptTooLong(
                "the conversation is too long for the model and could not be summed up: fork from "
                "an earlier entry"
            )
        read = reading[: part.stop]
        ids = transcript.ids_of(read) + transcript.asking(read, INSTRUCTION)
        covers = (reading[part.start], reading[part.stop - 1])
        self._shared.fed(self._id).note(transcript.segments(read))
        making = self._make(slot, ids, covers, reserve)
        self._tasks[slot] = asyncio.create_task(making, name=f"summary for {slot}")

    def _longest_run(self, reading: tuple[str, ...], start: int, stop: int) -> range:
        """The longest part without anything withdrawn: a summary must not outlive such an entry."""
        conversation = self._work.conversation
        runs = groupby(range(start, stop), lambda i: is_withdrawn(conversation, reading[i]))
        parts = [list(run) for withdrawn, run in runs if not withdrawn]
        longest = max(parts, key=len, default=[])
        return range(longest[0], longest[-1] + 1) if longest else range(0)

    async def _make(
        self, slot: str, ids: tuple[int, ...], covers: tuple[str, str], tokens_max: int
    ) -> None:
        shared = self._shared
        shared.occupy(1)
        engine: Engine | None = None
        try:
            async with shared.turns.taken(alone=False):
                engine = shared.engine
                if engine is not None:
                    text = await self._sum_up(engine, ids, tokens_max)
                    if text:
                        self._made[slot] = Summary(covers, HEADING + text)
        except EngineDied:
            if engine is not None:
                shared.lost_engine(engine)
        except Unavailable:
            await shared.surroundings.sleep(BUSY_S)
        except (PromptTooLong, LocalMisuse) as error:
            logger.warning("conversation %s could not be summed up: %s", self._id, error)
        finally:
            shared.occupy(-1)
            if self._tasks.get(slot) is asyncio.current_task():
                del self._tasks[slot]
            self._wake()

    async def _sum_up(self, engine: Engine, ids: tuple[int, ...], tokens_max: int) -> str:
        shared = self._shared
        params = SamplingParams(max_tokens=tokens_max, end_ids=shared.renderer.end_ids)
        async with aclosing(engine.generate(ids, params, len(ids))) as events:
            sampled = []
            async for event in events:
                if isinstance(event, Prefilled):
                    self._work.computed.note(event)
                elif isinstance(event, Sampled):
                    self._work.computed.sampled += 1
                    sampled.append(event.id)
        return shared.vocabulary.text_of(sampled, [Kind.SAMPLED] * len(sampled)).strip()
