"""One sitting of the node at a conversation: what was decided is done here.

This module owns the actions: the lease, admission with proofs, starting, resuming and ending
replies, prefill ahead of the request. What to do next is decided in
:mod:`crdt_llm.inference.node.evaluate`. It must not know sockets, stores, or why a sitting ends.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from crdt_llm.document.chain import Link, commit_content, parent_digest, prove, sign
from crdt_llm.document.schema import SALT_BYTES, Born, Place, Role, State, Usage, entry_id
from crdt_llm.document.seal import Where, place_of
from crdt_llm.errors import (
    BadProof,
    EngineDied,
    LeaseLost,
    PromptTooLong,
    Refused,
    RemoteMisuse,
    Unavailable,
)
from crdt_llm.inference.node.ahead import Ahead
from crdt_llm.inference.node.evaluate import (
    Admit,
    Clear,
    End,
    Forget,
    Mark,
    Nothing,
    ReadDraft,
    Request,
    Resume,
    TakeLease,
    Warm,
    Withdraw,
    evaluate,
)
from crdt_llm.inference.node.generation import Generation, Outcome
from crdt_llm.inference.node.held import is_unconfirmed
from crdt_llm.inference.node.overflow import Overflow
from crdt_llm.inference.node.presence import Doing, NodeState, Presence
from crdt_llm.inference.node.reply import Reply, describe
from crdt_llm.inference.node.withdrawals import Withdrawals
from crdt_llm.inference.node.workplace import PRINCIPAL

if TYPE_CHECKING:
    from collections.abc import Callable

    from crdt_llm.document.conversation import Writer
    from crdt_llm.document.schema import Entry
    from crdt_llm.inference.contract import Engine
    from crdt_llm.inference.node.evaluate import (
        Action,
        Situation,
    )
    from crdt_llm.inference.node.held import Held
    from crdt_llm.inference.node.overflow import Summary
    from crdt_llm.inference.node.seat import Lease
    from crdt_llm.inference.node.shared import Shared
    from crdt_llm.inference.node.workplace import Workplace

logger = logging.getLogger("crdt_llm.inference")

TROUBLES_MAX: Final = 3  # a reply that kills its engine, or is refused, this often has failed
SEAL_KEPT_S: Final = 60.0
"""How long behind a reply the second replica is kept that hidden fields are written in. It costs
what the document has grown to, in memory while it is there and in time when it is made; who goes on
with a conversation mostly does so within a minute."""

BUSY_S: Final = 0.2  # before a reply asks an engine again that had no room

_DIED: Final = "the engine died several times on this reply; ask again, or use another model"


@dataclass(frozen=True, slots=True)
class Trouble:
    """What went wrong with a reply that was begun: how often, and what people are told of it."""

    count: int
    code: str
    message: str


class Sitting:
    """The node at work in one conversation, from taking a seat to losing it.

    Args:
        shared: what the node's desks share.
        conversation: the conversation's id.
        work: the replica to work on.
        wake: asks for another look.
        troubles: what went wrong with replies that were begun; outlives a sitting.
        held: what is not admitted for now; outlives a sitting.
    """

    def __init__(  # noqa: PLR0913, PLR0917 - what outlives a sitting is an argument
        self,
        shared: Shared,
        conversation: str,
        work: Workplace,
        wake: Callable[[], None],
        troubles: dict[str, Trouble],
        held: Held,
    ) -> None:
        self.work = work
        self._shared = shared
        self._id = conversation
        self._wake = wake
        self._troubles = troubles
        self._held = held
        self._fed = shared.fed(conversation)
        self._overflow = Overflow(shared, conversation, work, wake)
        self._ahead = Ahead(shared, conversation, work, self._fed, wake)
        self._withdrawals = Withdrawals(shared, conversation, work, self._fed, self._ahead)
        self._lease: Lease | None = None
        self._asking: asyncio.Task[None] | None = None  # for the lease
        self._presence = Presence(work.seat, work.conversation.client_id, self._look)
        work.conversation.subscribe(lambda _: self._presence.changed())
        self._releasing: asyncio.TimerHandle | None = None  # what hidden fields are written in
        self._running: dict[str, Generation] = {}
        self._outcomes: dict[str, Outcome | None] = {}  # None: to be resumed

    @property
    def idle(self) -> bool:
        """Whether nothing runs and nothing waits."""
        pending = self.work.conversation.tree.pending
        return not (self._running or self._ahead.busy or pending or self.work.has_open)

    @property
    def is_needless(self) -> bool:
        """Whether nothing is lost by giving the seat back, now that there is nothing to do.

        With what is held, a seat would be in the way: whoever has one is not told to look.
        """
        if not self._held and not (self._shared.surroundings.gives_back and self._lease is None):
            return False
        busy = self._running or self._outcomes or self._asking or self._ahead.busy
        owed = self._ahead.cold is not None or self._overflow.preparing or self._fed.drops
        drafts = self._shared.drafts(self._id)
        ready = self._shared.engine is not None  # else it may have something to forget
        return ready and not (busy or owed or drafts.waiting or drafts.drops)

    async def act(self) -> bool:
        """Do the one next thing. Says whether there was one."""
        acted = await self._act()
        self._stand_in_line()
        self._presence.changed()
        return acted

    async def _act(self) -> bool:
        if self._outcomes:
            slot, outcome = self._outcomes.popitem()
            await self._finish(slot, outcome)
            return True
        await self._overflow.drop_stale()
        if (ready := self._overflow.pop_ready()) is not None:
            await self._write_summary(*ready)
            return True
        action = evaluate(self._situation())
        if isinstance(action, TakeLease) and self._lease is None:
            self._ask_for_lease()
            return False
        if self._asking is not None and isinstance(action, Nothing):
            self._asking.cancel()  # whoever has the lease did what there was to do
        await self._do(action)
        return not isinstance(action, Nothing)

    async def end(self) -> None:
        """Leave everything as it is: replies that stream go on after the next sitting began."""
        tasks = [one.task for one in self._running.values() if one.task is not None]
        if self._asking is not None:
            tasks.append(self._asking)
        for task in tasks:
            task.cancel()
        self._presence.close()
        self._keep_seal()
        self._shared.stand_in_line(self._id, waits=False)
        tidying = (self._ahead.stop(), self._overflow.stop())
        await asyncio.gather(*tasks, *tidying, return_exceptions=True)
        self._shared.occupy(-len(self._running))
        self._running.clear()

    def _look(self) -> NodeState | None:
        """What to show of this node; nothing while another one may be the conversation's."""
        if not self.work.leased:
            return None
        generations = self._running.values()
        replies = [generation.reply for generation in generations]
        places = [one.place for one in self._running.values() if one.place is not None]
        unasked = self._stand_in_line()
        queue = min(places) + 1 if places else unasked
        if any(one.place is None and one.reply.first_at_ms is not None for one in generations):
            doing = Doing.GENERATING
        elif len(places) < len(generations) or self._ahead.busy or self._overflow.preparing:
            doing = Doing.PREFILLING
        else:
            doing = Doing.QUEUED if queue else Doing.IDLE
        warm, tokens = self.work.measure({reply.slot: len(reply.own_ids) for reply in replies})
        return NodeState(self._shared.identity.model, doing, warm, tokens, queue)

    def _stand_in_line(self) -> int:
        """Where this conversation stands in the node's line for room; 0 if it needs none."""
        waits = any(self.work.conversation.tree.facts(one).slot for one in self._pending)
        waits = waits and self.work.leased and not self._shared.capacity
        return self._shared.stand_in_line(self._id, waits=waits)

    @property
    def _pending(self) -> tuple[str, ...]:
        return self.work.conversation.tree.pending

    def _situation(self) -> Situation:
        shared = self._shared
        if not self.work.leased and self._lease is not None:
            self.work.find_lease(self._lease)
        ready = shared.engine is not None
        # One path at a time: two that interrupt each other would never come to an end.
        at_rest = ready and not self._running and not self._ahead.busy
        situation = self.work.situation(
            running=frozenset(self._running),
            capacity=shared.capacity if ready else 0,
            cold=self._ahead.cold if at_rest else None,
        )
        withdrawn = situation.withdrawn or bool(self._fed.drops)
        return replace(
            situation,
            withdrawn=ready and withdrawn,
            # Not beside a reply: it may stand on rows that a draft shares with it.
            dropped=at_rest and bool(shared.drafts(self._id).drops),
            draft=at_rest and self._ahead.draft,
            preparing=self._overflow.preparing,
            held=self._held.entries(at_rest=not self._running),
        )

    async def _do(self, action: Action) -> None:
        match action:
            case Nothing():
                pass
            case TakeLease():
                await self._record_lease()
            case End(slot):
                await self._stop(slot)
            case Resume(slot):
                await self._resume(slot)
            case Admit():
                await self._try_to_admit(action)
            case Warm(entry):
                self._ahead.start(entry)
            case ReadDraft():
                self._ahead.start_draft()
            case Forget():
                await self._forget()
            case Mark() | Request() | Clear() | Withdraw():
                await self.work.write(lambda writer: self._note_down(writer, action))

    async def _forget(self) -> None:
        """Have the engine forget what was withdrawn, and what was computed from it (I8)."""
        await self._ahead.stop()  # it may be just reading it
        if self.work.conversation.tree.pending:
            await self._overflow.stop()
        await self._withdrawals.forget()

    def _note_down(self, writer: Writer, action: Mark | Request | Clear | Withdraw) -> None:
        match action:
            case Mark(slots):
                _mark(writer, slots, State.STOPPED)
            case Request(after):
                self._request(writer, after)
            case Clear(entries):
                for entry in entries:
                    writer.clear(entry)
            case Withdraw(summaries):
                now = self._shared.surroundings.clock_ms()
                for summary in summaries:
                    writer.redact(summary, PRINCIPAL, now)

    def _ask_for_lease(self) -> None:
        if self._asking is None:
            asking = self._await_lease()
            self._asking = asyncio.create_task(asking, name=f"lease of {self._id}")

    async def _await_lease(self) -> None:
        try:
            self._lease = await self.work.seat.lease()
        except Unavailable as error:
            logger.info("conversation %s: no lease: %s", self._id, error)
        finally:
            self._asking = None
            self._wake()

    async def _record_lease(self) -> None:
        lease = self._lease
        if lease is not None:
            await self.work.write(lambda w: w.add_lease(lease.epoch, lease.node, lease.signature))

    def _request(self, writer: Writer, after: str) -> None:
        outside = self._shared.surroundings
        now, clock = outside.clock_ms(), self.work.conversation.tree.clock + 1
        born = Born(Role.ASSISTANT, PRINCIPAL, PRINCIPAL, now, clock, after=after)
        writer.add(entry_id(now, outside.random(10)), born)

    # -- admission -----------------------------------------------------------------------------

    async def _try_to_admit(self, action: Admit) -> None:
        run = action.entries if action.slot is None else (*action.entries, action.slot)
        try:
            await self._admit(action)
        except Refused as error:
            if is_unconfirmed(error):
                logger.info("conversation %s: %s", self._id, error)
                self._held.hold(run, error)
            raise
        if self._held and self.work.conversation.tree.is_admitted(run[-1]):
            self._held.admitted(run)

    async def _admit(self, action: Admit) -> None:
        last = action.entries[-1] if action.entries else action.parent
        slot = action.slot
        if await self._ahead.give_way(action.parent, last, to_reply=slot is not None):
            return  # others were let go on: decide anew
        if slot is None:
            self._ahead.admitted(action.parent, action.entries)
            self._ahead.plan(last)
            await self.work.write(self._place(action)[1])
            return
        try:
            reading = await self._overflow.choose(self.work.present(slot), last, self._positions())
            if reading is None:
                return  # as above
            digest, place_entries = self._place(action)
            # Later replies go on from what was recorded, so it is recorded where it changes.
            is_path = reading == self.work.transcript.reading(last) and self._overflow.implied(last)
            reads = None if is_path else tuple(reading)
            where = Where(self._id, slot, digest, self.work.epoch, 0, reads)
            generation = self._prepare(slot, last, where, reading)
            self._check_fits(generation.reply)
        except (PromptTooLong, BadProof) as error:
            await self._refuse(action, slot, _failure(*describe(error)))
            return

        def write(writer: Writer) -> None:
            place_entries(writer)
            writer.place(slot, Place(last, where.epoch))
            writer.open_reply(slot)
            writer.state(slot, State.STREAMING)
            if reads is not None:
                writer.set(slot, "reads", list(reads))
            _mark(writer, action.superseded, State.SUPERSEDED)

        self._ahead.admitted(action.parent, action.entries)
        generation.reply.asked_at_ms = self.work.seen_at_ms(slot)
        decided_at = self.work.revision
        # The engine need not wait for signatures, nor for the disk: behind the task's first step it
        # has its command.
        generation.hold()
        await self._start(generation)
        await asyncio.sleep(0)
        if self.work.revision != decided_at:
            await self._abandon(slot)  # somebody wrote meanwhile: decide anew
            return
        durable = self.work.write(write)
        generation.let_go()
        await durable

    async def _write_summary(self, slot: str, summary: Summary) -> None:
        """Write what stands for entries that are not read any more, and admit it at once."""
        outside, conversation = self._shared.surroundings, self.work.conversation
        identity, epoch = self._shared.identity, self.work.epoch
        parent = conversation.tree.up(slot)
        now, clock = outside.clock_ms(), conversation.tree.clock + 1
        born = Born(
            Role.SYSTEM, PRINCIPAL, PRINCIPAL, now, clock, after=parent, covers=summary.covers
        )
        name, salt = entry_id(now, outside.random(10)), identity.random(SALT_BYTES)
        proof = prove(
            Link(name, born.plain(), commit_content(salt, summary.text)),
            parent=parent_digest(conversation, parent),
            conversation=self._id,
            epoch=epoch,
            key=identity.key,
        )

        def write(writer: Writer) -> None:
            writer.add(name, born, summary.text)
            writer.place(name, Place(parent, epoch))
            writer.proof(name, salt, proof)

        self._shared.drafts(self._id).admitted(parent, ())
        await self.work.write(write)

    async def _refuse(self, action: Admit, slot: str, failure: Usage) -> None:
        """Admit what stands before a slot that cannot be begun; the slot fails without a place."""
        self._shared.drafts(self._id).admitted(action.parent, ())
        _, place_entries = self._place(action)

        def write(writer: Writer) -> None:
            place_entries(writer)
            _fail(writer, slot, failure)
            _mark(writer, action.superseded, State.SUPERSEDED)

        await self.work.write(write)

    def _place(self, action: Admit) -> tuple[bytes, Callable[[Writer], None]]:
        """Places and proofs for a run of author's entries.

        Returns:
            The digest that comes behind them, and what writes them.
        """
        conversation, identity = self.work.conversation, self._shared.identity
        epoch = self.work.epoch
        digest = parent_digest(conversation, action.parent)
        placed: list[tuple[str, Place, bytes, Link, bytes]] = []
        parent = action.parent
        for name in action.entries:
            salt = identity.random(SALT_BYTES)
            content = commit_content(salt, conversation.text(name))
            link = Link(name, conversation.born_plain(name), content)
            digest = link.digest(digest)
            placed.append((name, Place(parent, epoch), salt, link, digest))
            parent = name

        def write(writer: Writer) -> None:
            for name, place, salt, link, at in placed:
                proof = sign(link, at, conversation=self._id, epoch=epoch, key=identity.key)
                writer.place(name, place)
                writer.proof(name, salt, proof)

        return digest, write

    def _prepare(
        self, slot: str, parent: str, where: Where, reading: tuple[str, ...]
    ) -> Generation:
        """A reply behind ``parent`` that reads some entries, ready to run.

        Raises:
            BadProof: something on the path cannot be read.
        """
        entry, transcript = self.work.present(slot), self.work.transcript
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
        positions = self._positions()
        if len(reply.prompt) >= positions:
            raise PromptTooLong(
                f"the conversation has {len(reply.prompt)} tokens here and the model has "
                f"{positions} positions: fork from an earlier entry or begin a new conversation"
            )

    def _generation(self, reply: Reply, reading: tuple[str, ...]) -> Generation:
        shared = self._shared
        segments = self.work.transcript.segments(reading)
        clock_ms, placed = shared.surroundings.clock_ms, self._presence.changed
        return Generation(
            self.work,
            reply,
            segments,
            shared.identity,
            clock_ms,
            placed,
            lambda: shared.running,
        )

    def _positions(self) -> int:
        engine = self._shared.engine
        if engine is None:
            raise Unavailable("the engine is being restarted")
        return engine.capabilities.positions

    # -- replies -------------------------------------------------------------------------------

    async def _start(self, generation: Generation) -> None:
        slot = generation.reply.slot
        self._running[slot] = generation
        self._fed.note(generation.fed)
        self._shared.occupy(1)  # before anyone else gets to run: the last place is taken once
        await self._ahead.stop()
        generation.task = asyncio.create_task(self._run(generation), name=f"reply {slot}")
        # Behind the task's first step, with which the engine has its command: while it computes.
        asyncio.get_running_loop().call_soon(self.work.conversation.hold_seal)

    async def _abandon(self, slot: str) -> None:
        """Take a reply back that was begun and has no place: nobody has seen anything of it."""
        generation = self._running.pop(slot)
        self._shared.occupy(-1)
        if generation.task is not None:
            generation.task.cancel()
            await asyncio.gather(generation.task, return_exceptions=True)
        self._outcomes.pop(slot, None)

    async def _run(self, generation: Generation) -> None:
        """Run a reply; what became of it is looked at by :meth:`act`."""
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

    async def _resume(self, slot: str) -> None:
        """Go on with a reply that the document says is streaming (I3)."""
        try:
            parent = self.work.conversation.tree.up(slot)
            reading = self.work.transcript.reading_of(slot, parent)
            if await self.work.transcript.load_reading(reading, self._positions()):
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
            await self._start(generation)

    def _reopen(self, slot: str) -> Generation:
        entry, transcript = self.work.present(slot), self.work.transcript
        where = self._where(entry)
        parent = self.work.conversation.tree.up(slot)
        if not entry.sealed:  # nothing was flushed yet
            return self._prepare(slot, parent, where, transcript.reading_of(slot, parent))
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
        return replace(place_of(self.work.conversation, reply), epoch=self.work.epoch)

    async def _finish(self, slot: str, outcome: Outcome | None) -> None:
        """A reply's task has ended: write its end, or let it be resumed."""
        generation = self._running.pop(slot, None)
        if generation is None:
            return
        self._shared.occupy(-1)
        if outcome is not None:
            await self._write_end(generation, outcome)
            self._held.release()  # whatever was not heard of meanwhile

    async def _stop(self, slot: str) -> None:
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
                parent = self.work.conversation.tree.up(slot)
                reading = self.work.transcript.reading_of(slot, parent)
                if await self.work.transcript.load_reading(reading, sys.maxsize):
                    return  # others were let go on: decide anew
                generation = self._reopen(slot)
            except BadProof as error:
                await self._give_up(slot, *describe(error))
                return
        withdrawn = self.work.is_misled(slot) or self.work.conversation.is_redacted(slot)
        finish = "redacted" if withdrawn or generation.reply.misled else "stopped"
        await self._write_end(generation, Outcome(State.STOPPED, finish))

    async def _write_end(self, generation: Generation, outcome: Outcome) -> None:
        reply = generation.reply
        conversation, identity = self.work.conversation, self._shared.identity
        now = self._shared.surroundings.clock_ms()
        resident = len(reply.hidden.injected) + max(reply.sampled - 1, 0)
        durable = self.work.write(
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
            self.work.transcript.keep(reply.slot, reply.hidden)
            self.work.account.sampled(reply.slot, resident)
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
        if not self.work.has_open:
            self.work.conversation.release_seal()

    def _keep_seal(self) -> None:
        if self._releasing is not None:
            self._releasing.cancel()
            self._releasing = None

    async def _give_up(self, slot: str, code: str, message: str) -> None:
        """End a placed reply of which nothing but its text can be read."""
        entry, identity = self.work.present(slot), self._shared.identity
        where = self._where(entry)
        salt = identity.random(SALT_BYTES)
        link = Link(
            slot,
            self.work.conversation.born_plain(slot),
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
            _fail(writer, slot, _failure(code, message))

        await self.work.write(write)


def _mark(writer: Writer, slots: tuple[str, ...], state: State) -> None:
    for slot in slots:
        writer.state(slot, state)


def _fail(writer: Writer, slot: str, usage: Usage) -> None:
    writer.state(slot, State.FAILED)
    writer.usage(slot, usage)


def _failure(code: str, message: str) -> Usage:
    return Usage(finish="error", error_code=code, error_message=message)
