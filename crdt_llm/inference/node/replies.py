"""The replies of one sitting: begun, gone on with, stopped, and ended.

This module owns which replies an engine works on, what is tried again after what went wrong, and
how a reply that is over is written down. Whose turn it is, is decided in
:mod:`crdt_llm.inference.node.evaluate`; the pace of a reply at work is
:mod:`crdt_llm.inference.node.generation`'s.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from crdt_llm.document.chain import Link, commit_content, prove
from crdt_llm.document.schema import SALT_BYTES, State
from crdt_llm.document.seal import place_of
from crdt_llm.errors import (
    BadProof,
    EngineDied,
    LeaseLost,
    PromptTooLong,
    RemoteMisuse,
    Unavailable,
)
from crdt_llm.inference.node.generation import Generation, Outcome
from crdt_llm.inference.node.held import is_unconfirmed
from crdt_llm.inference.node.reply import Reply, describe, fail
from crdt_llm.inference.node.shared import BUSY_S, positions_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from crdt_llm.document.conversation import Writer
    from crdt_llm.document.schema import Entry
    from crdt_llm.document.seal import Where
    from crdt_llm.inference.contract import Engine
    from crdt_llm.inference.node.ahead import Ahead
    from crdt_llm.inference.node.shared import Shared
    from crdt_llm.inference.node.workplace import Workplace

logger = logging.getLogger("crdt_llm.inference")

TROUBLES_MAX: Final = 3  # a reply that kills its engine, or is refused, this often has failed
SEAL_KEPT_S: Final = 60.0
"""How long behind a reply the second replica is kept that hidden fields are written in. It costs
what the document has grown to, in memory while it is there and in time when it is made; who goes on
with a conversation mostly does so within a minute."""


_DIED: Final = "the engine died several times on this reply; ask again, or use another model"


@dataclass(frozen=True, slots=True)
class Trouble:
    """What went wrong with a reply that was begun: how often, and what people are told of it."""

    count: int
    code: str
    message: str


class Replies:
    """The replies that are made in one conversation, during one sitting.

    Args:
        shared: what the node's desks share.
        conversation: the conversation's id.
        work: the replica to work on.
        ahead: what is read before anybody asks for it; it gives way.
        troubles: what went wrong with replies that were begun; outlives a sitting.
        wake: asks for another look.
        placed: called when a reply's place in the engine's queue is another one.
    """

    def __init__(  # noqa: PLR0913, PLR0917 - whoever a reply meets
        self,
        shared: Shared,
        conversation: str,
        work: Workplace,
        ahead: Ahead,
        troubles: dict[str, Trouble],
        wake: Callable[[], None],
        placed: Callable[[], None],
    ) -> None:
        self._shared = shared
        self._id = conversation
        self._work = work
        self._ahead = ahead
        self._fed = shared.fed(conversation)
        self._troubles = troubles
        self._wake = wake
        self._placed = placed
        self._running: dict[str, Generation] = {}
        self._outcomes: dict[str, Outcome | None] = {}  # None: to be resumed
        self._releasing: asyncio.TimerHandle | None = None  # what hidden fields are written in

    @property
    def running(self) -> frozenset[str]:
        """The slots whose replies are being made."""
        return frozenset(self._running)

    @property
    def generations(self) -> tuple[Generation, ...]:
        """What is made in them."""
        return tuple(self._running.values())

    @property
    def have_ended(self) -> bool:
        """Whether the task of one has ended, so that :meth:`finish` has something to do."""
        return bool(self._outcomes)

    # -- beginning -----------------------------------------------------------------------------

    def prepare(self, slot: str, parent: str, where: Where, reading: tuple[str, ...]) -> Generation:
        """A reply behind ``parent`` that reads some entries, ready to run.

        Raises:
            BadProof: something on the path cannot be read.
            PromptTooLong: the model cannot read so much.
            Unavailable: there is no engine just now.
        """
        generation = self._begin(slot, parent, where, reading)
        self._check_fits(generation.reply)
        return generation

    def _begin(self, slot: str, parent: str, where: Where, reading: tuple[str, ...]) -> Generation:
        entry, transcript = self._work.present(slot), self._work.transcript
        opened = transcript.opened(entry, parent, reading)
        reply = Reply.begin(
            entry,
            where,
            transcript.ids_of(reading),
            opened,
            self._shared.vocabulary,
            withdrawn=transcript.count_withdrawn(reading),
        )
        return self._generation(reply, reading)

    def _check_fits(self, reply: Reply) -> None:
        positions = positions_of(self._shared)
        if len(reply.prompt) >= positions:
            raise PromptTooLong(
                f"the conversation has {len(reply.prompt)} tokens here and the model has "
                f"{positions} positions: fork from an earlier entry or begin a new conversation"
            )

    def _generation(self, reply: Reply, reading: tuple[str, ...]) -> Generation:
        shared = self._shared
        segments = self._work.transcript.segments(reading)
        return Generation(
            self._work,
            reply,
            segments,
            shared.identity,
            shared.surroundings.clock_ms,
            self._placed,
            lambda: shared.running,
        )

    async def start(self, generation: Generation) -> None:
        """Set the engine to work on a reply; returns when nothing else is read here any more."""
        slot = generation.reply.slot
        self._running[slot] = generation
        self._fed.note(generation.fed)
        self._shared.occupy(1)  # before anyone else gets to run: the last place is taken once
        await self._ahead.stop()
        generation.task = asyncio.create_task(self._run(generation), name=f"reply {slot}")
        # Behind the task's first step, with which the engine has its command: while it computes.
        asyncio.get_running_loop().call_soon(self._work.conversation.hold_seal)

    async def abandon(self, slot: str) -> None:
        """Take a reply back that was begun and has no place: nobody has seen anything of it."""
        generation = self._running.pop(slot)
        self._shared.occupy(-1)
        if generation.task is not None:
            generation.task.cancel()
            await asyncio.gather(generation.task, return_exceptions=True)
        self._outcomes.pop(slot, None)

    async def _run(self, generation: Generation) -> None:
        """Run a reply; what became of it is looked at by :meth:`finish`."""
        slot, shared = generation.reply.slot, self._shared
        engine: Engine | None = None
        outcome: Outcome | None = None
        try:
            async with shared.turns.taken(alone=slot in self._troubles):
                engine = shared.engine
                if engine is not None:
                    outcome = await generation.run(engine, shared.renderer.end_ids)
        except EngineDied:
            self._trouble(slot, "engine-died", _DIED)
            if engine is not None:
                shared.lost_engine(engine)
        except LeaseLost as error:
            logger.info("reply %s is left to another node: %s", slot, error)
        except Unavailable as error:
            logger.warning("reply %s waits: %s", slot, error)
            await shared.surroundings.sleep(BUSY_S)
        except RemoteMisuse as error:  # a flush was refused, and the seat is lost with it
            logger.warning("reply %s: %s", slot, error)
            if not is_unconfirmed(error):  # that was not about the reply
                self._trouble(slot, "refused", str(error))
        except Exception:
            logger.exception("reply %s: a bug", slot)
            outcome = Outcome(State.FAILED, "error", ("failed", "a bug; see the node's log"))
        self._outcomes[slot] = outcome
        self._wake()

    def _trouble(self, slot: str, code: str, message: str) -> None:
        before = self._troubles.get(slot)
        self._troubles[slot] = Trouble(1 if before is None else before.count + 1, code, message)

    # -- going on ------------------------------------------------------------------------------

    async def resume(self, slot: str) -> None:
        """Go on with a reply that the document says is streaming (I3)."""
        try:
            parent = self._work.conversation.tree.up(slot)
            reading = self._work.transcript.reading_of(slot, parent)
            if await self._work.transcript.load_reading(reading, positions_of(self._shared)):
                return  # others were let go on: decide anew
            generation = self._reopen(slot)
            self._check_fits(generation.reply)
        except (PromptTooLong, BadProof) as error:
            await self._give_up(slot, *describe(error))
            return
        trouble = self._troubles.get(slot)
        finish = generation.reply.finished(self._shared.renderer.end_ids)
        if finish is not None:
            await self._write_end(generation, Outcome(State.DONE, finish))
        elif generation.reply.misled:
            await self._write_end(generation, Outcome(State.STOPPED, "redacted"))
        elif trouble is not None and trouble.count >= TROUBLES_MAX:
            failed = Outcome(State.FAILED, "error", (trouble.code, trouble.message))
            await self._write_end(generation, failed)
        else:
            await self.start(generation)

    def _reopen(self, slot: str) -> Generation:
        entry, transcript = self._work.present(slot), self._work.transcript
        where = self._where(entry)
        parent = self._work.conversation.tree.up(slot)
        if not entry.sealed:  # nothing was flushed yet
            return self._begin(slot, parent, where, transcript.reading_of(slot, parent))
        hidden = transcript.hidden(entry)
        if hidden is None:
            raise BadProof("the reply was begun with another model and cannot go on with this one")
        ours = self._shared.identity.model
        if hidden.model != ours:
            # Nobody may claim that one model made all of it.
            hidden = replace(hidden, model=f"{hidden.model}+{ours}")
        reading = transcript.reading_of(slot, parent)
        before = transcript.ids_of(reading)
        reply = Reply.resume(entry, where, before, hidden, self._shared.vocabulary)
        reply.misled = transcript.count_withdrawn(reading) > reply.withdrawn
        return self._generation(reply, reading)

    def _where(self, reply: Entry) -> Where:
        """The place of a reply, with the epoch under which it goes on: ours, whoever began it."""
        return replace(place_of(self._work.conversation, reply), epoch=self._work.epoch)

    # -- ending --------------------------------------------------------------------------------

    async def finish(self) -> bool:
        """Write the end of a reply whose task has ended, or let it be resumed.

        Returns:
            Whether an end was written.
        """
        slot, outcome = self._outcomes.popitem()
        generation = self._running.pop(slot, None)
        if generation is None:
            return False
        self._shared.occupy(-1)
        if outcome is None:
            return False
        await self._write_end(generation, outcome)
        return True

    async def stop(self, slot: str) -> None:
        """End a reply that somebody stopped, with what it has (I2)."""
        generation = self._running.pop(slot, None)
        if generation is not None:
            self._shared.occupy(-1)
            if generation.task is not None:
                generation.task.cancel()
                await asyncio.gather(generation.task, return_exceptions=True)
            self._outcomes.pop(slot, None)
        else:
            try:
                parent = self._work.conversation.tree.up(slot)
                reading = self._work.transcript.reading_of(slot, parent)
                if await self._work.transcript.load_reading(reading, sys.maxsize):
                    return  # others were let go on: decide anew
                generation = self._reopen(slot)
            except BadProof as error:
                await self._give_up(slot, *describe(error))
                return
        withdrawn = self._work.is_misled(slot) or self._work.conversation.is_redacted(slot)
        finish = "redacted" if withdrawn or generation.reply.misled else "stopped"
        await self._write_end(generation, Outcome(State.STOPPED, finish))

    async def _write_end(self, generation: Generation, outcome: Outcome) -> None:
        reply = generation.reply
        conversation, identity = self._work.conversation, self._shared.identity
        now = self._shared.surroundings.clock_ms()
        resident = len(reply.hidden.injected) + max(reply.sampled - 1, 0)
        durable = self._work.write(
            lambda writer: reply.end(
                writer,
                conversation,
                identity,
                state=outcome.state,
                finish=outcome.finish,
                now_ms=now,
                error=outcome.error,
            )
        )
        self._fed.note(generation.fed)
        if not conversation.has(reply.slot, "redacted"):
            self._work.transcript.keep(reply.slot, reply.hidden)
            self._work.account.sampled(reply.slot, resident)
        # What an engine dies of is not read ahead: whoever asks again takes that upon them.
        if self._troubles.pop(reply.slot, None) is None:
            self._ahead.plan(reply.slot)
        self._release_seal_later()
        await durable

    def _release_seal_later(self) -> None:
        self._keep_seal()
        loop = asyncio.get_running_loop()
        self._releasing = loop.call_later(SEAL_KEPT_S, self._release_seal)

    def _release_seal(self) -> None:
        self._releasing = None
        if not self._work.has_open:
            self._work.conversation.release_seal()

    def _keep_seal(self) -> None:
        if self._releasing is not None:
            self._releasing.cancel()
            self._releasing = None

    async def _give_up(self, slot: str, code: str, message: str) -> None:
        """End a placed reply of which nothing but its text can be read."""
        entry, identity = self._work.present(slot), self._shared.identity
        where = self._where(entry)
        salt = identity.random(SALT_BYTES)
        link = Link(
            slot,
            self._work.conversation.born_plain(slot),
            commit_content(salt, entry.content),
            reads=entry.reads,
            state=State.FAILED,
        )
        proof = prove(
            link,
            parent=where.parent,
            conversation=self._id,
            epoch=where.epoch,
            key=identity.key,
        )

        def write(writer: Writer) -> None:
            writer.proof(slot, None if entry.redacted else salt, proof)
            fail(writer, slot, code, message)

        await self._work.write(write)

    # -- leaving -------------------------------------------------------------------------------

    def cancel(self) -> tuple[asyncio.Task[None], ...]:
        """Leave everything as it is; returns whom to wait for before :meth:`clear`."""
        self._keep_seal()
        tasks = tuple(one.task for one in self._running.values() if one.task is not None)
        for task in tasks:
            task.cancel()
        return tasks

    def clear(self) -> None:
        """Nothing runs any more."""
        self._shared.occupy(-len(self._running))
        self._running.clear()
