"""The node's place in one conversation: *change -> situation -> action*, over and over.

This module owns a replica, the replies that run in it and the order in which their writes leave.
What to do is decided in :mod:`crdt_llm.inference.evaluate`; here it is done. It must not know
sockets or stores: updates cross a :class:`~crdt_llm.inference.seat.Seat` in both directions.

Updates only mark the desk dirty. Replies run beside the desk as tasks; whatever anyone writes goes
through one outbox, so updates leave in the order in which they were made, also when the writer was
cancelled meanwhile: an update that a replica has and nobody else would be a gap for ever.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol

from crdt_llm.document.chain import Link, commit_content, parent_digest, prove
from crdt_llm.document.conversation import Conversation
from crdt_llm.document.schema import (
    ENDED,
    SALT_BYTES,
    Born,
    Place,
    Role,
    State,
    Usage,
    entry_id,
)
from crdt_llm.document.seal import Where
from crdt_llm.errors import (
    BadProof,
    Corrupt,
    CrdtLlmError,
    EngineBusy,
    EngineDied,
    Forbidden,
    LocalMisuse,
    PromptTooLong,
    Unavailable,
)
from crdt_llm.inference.accounting import PrefillAccount
from crdt_llm.inference.engine import Finished, Prefilled, Sampled
from crdt_llm.inference.evaluate import (
    Admit,
    End,
    Mark,
    Nothing,
    Request,
    Resume,
    Situation,
    TakeLease,
    Warm,
    evaluate,
)
from crdt_llm.inference.reply import Reply, sampling
from crdt_llm.inference.transcript import Transcript

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Sequence

    from crdt_llm.document.conversation import Change, Writer
    from crdt_llm.document.schema import (
        Entry,
        Proof,
    )
    from crdt_llm.inference.engine import Engine, GenerationEvent
    from crdt_llm.inference.evaluate import (
        Action,
    )
    from crdt_llm.inference.prompt import Renderer
    from crdt_llm.inference.reply import Identity
    from crdt_llm.inference.seat import Seat, Surroundings
    from crdt_llm.inference.tokens import Vocabulary

logger = logging.getLogger("crdt_llm.inference")

PRINCIPAL: Final = "node"  # who the node is in `born.author` of the slots that it adds
FLUSH_WINDOW_MS: Final = 50  # of text and ids per update; the first token goes out at once
ENGINE_DEATHS_MAX: Final = 3  # a reply that kills its engine this often has failed
RETRY_FIRST_S: Final = 0.2  # after a seat was lost
RETRY_MAX_S: Final = 10.0


class Shared(Protocol):
    """What the desks of one node share."""

    surroundings: Surroundings
    renderer: Renderer
    vocabulary: Vocabulary
    identity: Identity
    engine: Engine | None

    @property
    def capacity(self) -> int:
        """How many more replies may be started now."""
        ...

    def occupy(self, change: int) -> None:
        """So many more (or fewer) replies run."""
        ...

    def lost_engine(self, engine: Engine) -> None:
        """An engine died under somebody's hands."""
        ...


@dataclass(frozen=True, slots=True)
class _Outcome:
    """How a reply is to be ended."""

    state: State
    finish: str
    error: tuple[str, str] | None = None


@dataclass(slots=True)
class _Running:
    reply: Reply
    path: tuple[tuple[str, int], ...]  # the entries before it with the number of their tokens
    task: asyncio.Task[None] | None = None


@dataclass(slots=True)
class _Marks:
    """What a desk keeps of its conversation between decisions, updated change by change."""

    open: dict[str, bool] = field(default_factory=dict)  # placed, not ended -> to end now
    unmarked: dict[str, None] = field(default_factory=dict)  # to end, never placed
    seen_at_ms: dict[str, int] = field(default_factory=dict)  # waiting for a place


class _Work:
    """Everything that goes when the seat goes: a replica and what was derived from it."""

    def __init__(self, conversation: Conversation, transcript: Transcript, seat: Seat) -> None:
        self.conversation = conversation
        self.transcript = transcript
        self.seat = seat
        self.marks = _Marks()
        self.account = PrefillAccount()
        self.epoch: int | None = None
        self.cold: str | None = None
        self.warming: asyncio.Task[None] | None = None
        self.running: dict[str, _Running] = {}
        self.outcomes: dict[str, _Outcome | None] = {}  # None: to be resumed
        # Bounded by its writers: each waits for its own update before it makes another.
        self.outbox: asyncio.Queue[tuple[bytes, asyncio.Future[None]]] = asyncio.Queue()


class Desk:
    """The node's place in one conversation.

    Args:
        shared: what the node's desks share.
        conversation: the conversation's id.
    """

    def __init__(self, shared: Shared, conversation: str) -> None:
        self._shared = shared
        self._id = conversation
        self.settled = asyncio.Event()  # at least once there was nothing to do but to wait
        self._dirty = asyncio.Event()
        self._lost = False
        self._early: list[bytes] = []
        self._current: _Work | None = None
        self._deaths: dict[str, int] = {}

    # -- life ----------------------------------------------------------------------------------

    @property
    def idle(self) -> bool:
        """Whether nothing runs here and nothing is left to look at."""
        work = self._current
        return work is not None and not (
            self._dirty.is_set() or work.running or work.warming or work.conversation.tree.pending
        )

    def wake(self) -> None:
        """Ask for a look."""
        self._dirty.set()

    async def run(self) -> None:
        """Sit at the conversation until cancelled; take the seat anew whenever it is lost.

        Ends by itself where trying again cannot help: the conversation is damaged, or not ours.
        """
        wait = RETRY_FIRST_S
        while True:
            try:
                await self._sit()
            except (Corrupt, Forbidden) as error:
                logger.warning("conversation %s: %s; left alone", self._id, error)
                self.settled.set()
                return
            except CrdtLlmError as error:
                logger.warning("conversation %s: %s; again in %.1f s", self._id, error, wait)
            except Exception:
                logger.exception("conversation %s: a bug; again in %.1f s", self._id, wait)
            else:
                wait = RETRY_FIRST_S
            self.settled.set()
            await self._shared.surroundings.sleep(wait)
            wait = min(2 * wait, RETRY_MAX_S)

    async def _sit(self) -> None:
        shared, outside = self._shared, self._shared.surroundings
        self._lost, self._early = False, []
        seat = await outside.take_seat(self._id, self._deliver, self._lose)
        conversation = Conversation(
            _client_id(outside.random), seal_client_id=_client_id(outside.random)
        )
        sealer = shared.identity.sealer
        transcript = Transcript(conversation, shared.renderer, sealer)
        work = _Work(conversation, transcript, seat)
        conversation.subscribe(lambda change: self._note(work, change))
        sender = asyncio.create_task(self._send(work), name=f"outbox {self._id}")
        try:
            for update in (seat.state, *self._early):
                conversation.apply(update)
            self._current = work
            self._dirty.set()
            while not self._lost:
                await self._dirty.wait()
                self._dirty.clear()
                await self._work(work)
        finally:
            self._current = None
            await self._abandon(work, sender)
            await seat.leave()

    async def _abandon(self, work: _Work, sender: asyncio.Task[None]) -> None:
        tasks = [running.task for running in work.running.values() if running.task is not None]
        tasks += [task for task in (work.warming, sender) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._shared.occupy(-len(work.running))
        work.running.clear()

    def _deliver(self, update: bytes) -> None:
        if self._current is None:
            self._early.append(update)
        else:
            self._current.conversation.apply(update)
            self._dirty.set()

    def _lose(self) -> None:
        self._lost = True
        self._dirty.set()

    async def _work(self, work: _Work) -> None:
        while not self._lost:
            while work.outcomes:
                slot, outcome = work.outcomes.popitem()
                await self._finish(work, slot, outcome)
            action = evaluate(self._situation(work))
            if isinstance(action, Nothing):
                self.settled.set()
                return
            await self._act(work, action)

    # -- writing -------------------------------------------------------------------------------

    def _write(self, work: _Work, write: Callable[[Writer], None]) -> asyncio.Future[None]:
        """Write in one transaction; the future is done once it is durable."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        with work.conversation.writing() as writer:
            write(writer)
        change = writer.change
        if change is None or change.is_empty:
            done.set_result(None)
        else:
            work.outbox.put_nowait((change.update, done))
        return done

    async def _send(self, work: _Work) -> None:
        """Submit what was written, one update after the other. The first failure loses the seat."""
        failure: CrdtLlmError | None = None
        while True:
            update, done = await work.outbox.get()
            if failure is None:
                try:
                    await work.seat.submit(update)
                except CrdtLlmError as error:
                    failure = error
                    self._lose()
            if done.cancelled():
                continue
            if failure is None:
                done.set_result(None)
            else:
                done.set_exception(failure)

    # -- seeing --------------------------------------------------------------------------------

    def _note(self, work: _Work, change: Change) -> None:
        """Keep the marks current: costs what the change touched."""
        conversation, marks = work.conversation, work.marks
        if any(edit.key == "redacted" for edit in change.edits):
            work.transcript.forget()
        for name in change.structure:
            born = conversation.born(name)
            if born is None or born.role is not Role.ASSISTANT:
                continue
            state = conversation.state(name)
            asked = conversation.has(name, "stop") or conversation.has(name, "redacted")
            marks.open.pop(name, None)
            marks.unmarked.pop(name, None)
            if state in ENDED:
                marks.seen_at_ms.pop(name, None)
            elif conversation.tree.is_admitted(name):
                marks.open[name] = asked
            elif asked:
                marks.unmarked[name] = None
            else:
                marks.seen_at_ms.setdefault(name, self._shared.surroundings.clock_ms())

    def _situation(self, work: _Work) -> Situation:
        conversation, shared = work.conversation, self._shared
        policy = conversation.meta.policy
        if work.epoch is None:
            lease = shared.surroundings.grant_lease(self._id, shared.identity.key.public)
            granted = conversation.lease(lease.epoch)
            work.epoch = lease.epoch if granted == (lease.node, lease.signature) else None
        ready = shared.engine is not None
        return Situation(
            tree=conversation.tree,
            policy=policy,
            leased=work.epoch is not None,
            open=work.marks.open,
            unmarked=tuple(work.marks.unmarked),
            running=frozenset(work.running),
            capacity=shared.capacity if ready else 0,
            unanswered=_unanswered(work) if policy.reply == "auto" else (),
            cold=work.cold if ready and not work.running else None,
        )

    # -- acting --------------------------------------------------------------------------------

    async def _act(self, work: _Work, action: Action) -> None:
        match action:
            case TakeLease():
                outside, key = self._shared.surroundings, self._shared.identity.key
                lease = outside.grant_lease(self._id, key.public)
                await self._write(
                    work, lambda w: w.add_lease(lease.epoch, lease.node, lease.signature)
                )
            case End(slot):
                await self._end(work, slot)
            case Mark(slots):
                await self._write(work, lambda w: _mark(w, slots, State.STOPPED))
            case Resume(slot):
                await self._resume(work, slot)
            case Admit():
                await self._admit(work, action)
            case Request(after):
                await self._write(work, lambda w: self._request(work, w, after))
            case Warm(entry):
                await self._warm(work, entry)

    def _request(self, work: _Work, writer: Writer, after: str) -> None:
        outside = self._shared.surroundings
        now = outside.clock_ms()
        clock = work.conversation.tree.clock + 1
        born = Born(Role.ASSISTANT, PRINCIPAL, PRINCIPAL, now, clock, after=after)
        writer.add(entry_id(now, outside.random(10)), born)

    # -- admission -----------------------------------------------------------------------------

    async def _admit(self, work: _Work, action: Admit) -> None:
        digest, proofs = self._prove(work, action)
        last = action.entries[-1] if action.entries else action.parent
        epoch = _epoch(work)
        parents = (action.parent, *action.entries)

        def write_entries(writer: Writer) -> None:
            pairs = zip(action.entries, parents, proofs, strict=False)
            for name, parent, (salt, proof) in pairs:
                writer.place(name, Place(parent, epoch))
                writer.proof(name, salt, proof)

        slot = action.slot
        if slot is None:
            work.cold = last
            await self._write(work, write_entries)
            return

        def write_failed(writer: Writer, usage: Usage) -> None:
            write_entries(writer)
            _fail(writer, slot, usage)

        where = Where(self._id, slot, digest, epoch, 0)
        try:
            running = self._prepare(work, slot, last, where)
        except (PromptTooLong, BadProof) as error:
            work.cold, failure = last, _failure(*_describe(error))
            await self._write(work, lambda w: write_failed(w, failure))
            return

        def write(writer: Writer) -> None:
            write_entries(writer)
            writer.place(slot, Place(last, epoch))
            writer.open_reply(slot)
            writer.state(slot, State.STREAMING)
            _mark(writer, action.superseded, State.SUPERSEDED)

        running.reply.asked_at_ms = work.marks.seen_at_ms.get(slot)
        durable = self._write(work, write)
        await self._start(work, running)  # the engine need not wait for the disk
        await durable

    def _prove(self, work: _Work, action: Admit) -> tuple[bytes, list[tuple[bytes, Proof]]]:
        """Proofs for a run of author's entries; also the digest that comes behind them."""
        conversation, identity = work.conversation, self._shared.identity
        digest = parent_digest(conversation, action.parent)
        proofs: list[tuple[bytes, Proof]] = []
        for name in action.entries:
            salt = identity.random(SALT_BYTES)
            link = Link(
                name, conversation.born_plain(name), commit_content(salt, conversation.text(name))
            )
            proof = prove(
                link,
                parent=digest,
                conversation=self._id,
                epoch=_epoch(work),
                key=identity.key,
            )
            proofs.append((salt, proof))
            digest = proof.digest
        return digest, proofs

    def _prepare(self, work: _Work, slot: str, parent: str, where: Where) -> _Running:
        """A reply behind ``parent``, ready to run.

        Raises:
            PromptTooLong: there is no position left for a single token.
            BadProof: something on the path cannot be read.
        """
        entry = _present(work.conversation, slot)
        path = self._path(work, parent)
        before = work.transcript.ids(parent)
        opened = work.transcript.opened(entry, parent)
        reply = Reply.begin(entry, where, before, opened, self._shared.vocabulary)
        positions = self._positions()
        if len(reply.prompt) >= positions:
            raise PromptTooLong(
                f"the conversation has {len(reply.prompt)} tokens here and the model has "
                f"{positions} positions: fork from an earlier entry or begin a new conversation"
            )
        return _Running(reply, path)

    def _path(self, work: _Work, entry: str) -> tuple[tuple[str, int], ...]:
        path = work.conversation.tree.path(entry)
        return tuple((name, len(work.transcript.segment(name))) for name in path)

    def _positions(self) -> int:
        engine = self._shared.engine
        if engine is None:
            raise Unavailable("the engine is being restarted")
        return engine.capabilities.positions

    # -- replies -------------------------------------------------------------------------------

    async def _start(self, work: _Work, running: _Running) -> None:
        await self._stop_warming(work)
        work.running[running.reply.slot] = running
        self._shared.occupy(1)
        running.task = asyncio.create_task(
            self._generate(work, running), name=f"reply {running.reply.slot}"
        )

    async def _resume(self, work: _Work, slot: str) -> None:
        """Go on with a reply that the document says is streaming (I3)."""
        try:
            running = self._reopen(work, slot)
        except (PromptTooLong, BadProof) as error:
            await self._give_up(work, slot, *_describe(error))
            return
        finish = _ended(running.reply, self._shared.renderer.end_ids)
        if finish is not None:
            await self._write_end(work, running, _Outcome(State.DONE, finish))
        elif self._deaths.get(slot, 0) >= ENGINE_DEATHS_MAX:
            died = _Outcome(State.FAILED, "error", ("engine-died", _DIED))
            await self._write_end(work, running, died)
        else:
            await self._start(work, running)

    def _reopen(self, work: _Work, slot: str) -> _Running:
        entry = _present(work.conversation, slot)
        where = work.transcript.where(entry)
        parent = work.conversation.tree.up(slot)
        if not entry.sealed:  # nothing was flushed yet
            return self._prepare(work, slot, parent, where)
        hidden = work.transcript.hidden(entry)
        if hidden is None:
            raise BadProof("the reply was begun with another model and cannot go on with this one")
        before = work.transcript.ids(parent)
        reply = Reply.resume(entry, where, before, hidden, self._shared.vocabulary)
        return _Running(reply, self._path(work, parent))

    async def _generate(self, work: _Work, running: _Running) -> None:
        reply, shared = running.reply, self._shared
        outcome: _Outcome | None = None
        try:
            outcome = await self._sample(work, running)
        except EngineDied:
            self._deaths[reply.slot] = self._deaths.get(reply.slot, 0) + 1
        except Unavailable as error:
            logger.warning("reply %s waits: %s", reply.slot, error)
            await shared.surroundings.sleep(RETRY_FIRST_S)
        except (PromptTooLong, LocalMisuse) as error:
            outcome = _Outcome(State.FAILED, "error", _describe(error))
        except Exception:
            logger.exception("reply %s: a bug", reply.slot)
            outcome = _Outcome(State.FAILED, "error", ("failed", "a bug; see the node's log"))
        work.outcomes[reply.slot] = outcome
        self._dirty.set()

    async def _sample(self, work: _Work, running: _Running) -> _Outcome:
        reply, shared, engine = running.reply, self._shared, self._shared.engine
        if engine is None:
            raise Unavailable("the engine is being restarted")
        params = sampling(reply.params, shared.renderer.end_ids)
        events = engine.generate(reply.ids, params, len(reply.prompt))
        try:
            async with aclosing(events):
                return await self._follow(work, running, events)
        except EngineDied:
            shared.lost_engine(engine)
            raise

    async def _follow(
        self, work: _Work, running: _Running, events: AsyncGenerator[GenerationEvent, None]
    ) -> _Outcome:
        reply, clock_ms = running.reply, self._shared.surroundings.clock_ms
        flushed_at_ms: int | None = None
        async for event in events:
            match event:
                case Prefilled(prompt, reused, _):
                    path = (*running.path, _opening(running))
                    work.account.computed(path, reused=reused, prompt=prompt)
                    reply.prefilled += work.account.charge(name for name, _ in path)
                case Sampled(token, logprob):
                    now = clock_ms()
                    if reply.feed(token, logprob, now):
                        return _Outcome(State.DONE, "stop")
                    if flushed_at_ms is None or now - flushed_at_ms >= FLUSH_WINDOW_MS:
                        flushed_at_ms = now
                        await self._flush(work, reply)
                case Finished(reason):
                    return _Outcome(State.DONE, "context" if reason == "positions" else reason)
        raise EngineDied("the engine ended a reply without a reason")

    async def _flush(self, work: _Work, reply: Reply) -> None:
        if not work.marks.open.get(reply.slot, True):  # else it is about to be ended
            await self._write(work, lambda w: reply.flush(w, self._shared.identity))

    async def _finish(self, work: _Work, slot: str, outcome: _Outcome | None) -> None:
        """A reply's task has ended: write its end, or let it be resumed."""
        running = work.running.pop(slot, None)
        if running is None:
            return
        self._shared.occupy(-1)
        if outcome is not None:
            await self._write_end(work, running, outcome)

    async def _end(self, work: _Work, slot: str) -> None:
        """End a reply that somebody stopped, with what it has (I2)."""
        running = work.running.pop(slot, None)
        if running is not None:
            self._shared.occupy(-1)
            if running.task is not None:
                running.task.cancel()
                await asyncio.gather(running.task, return_exceptions=True)
            work.outcomes.pop(slot, None)
        else:
            try:
                running = self._reopen(work, slot)
            except (CrdtLlmError, LookupError) as error:
                await self._give_up(work, slot, *_describe(error))
                return
        await self._write_end(work, running, _Outcome(State.STOPPED, "stopped"))

    async def _write_end(self, work: _Work, running: _Running, outcome: _Outcome) -> None:
        reply, now = running.reply, self._shared.surroundings.clock_ms()
        kept = len(reply.hidden.injected) + max(reply.sampled - 1, 0)
        durable = self._write(
            work,
            lambda w: reply.end(
                w,
                work.conversation,
                self._shared.identity,
                state=outcome.state,
                finish=outcome.finish,
                now_ms=now,
                error=outcome.error,
            ),
        )
        if not work.conversation.has(reply.slot, "redacted"):
            work.transcript.keep(reply.slot, reply.hidden)
            work.account.sampled(reply.slot, kept)
        self._deaths.pop(reply.slot, None)
        work.cold = reply.slot
        await durable

    async def _give_up(self, work: _Work, slot: str, code: str, message: str) -> None:
        """End a placed reply of which nothing but its text can be read."""
        entry, identity = _present(work.conversation, slot), self._shared.identity
        where = work.transcript.where(entry)
        salt = identity.random(SALT_BYTES)
        link = Link(
            slot,
            work.conversation.born_plain(slot),
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
            if entry.redacted:
                writer.set(slot, "proof", proof.plain())
            else:
                writer.proof(slot, salt, proof)
            _fail(writer, slot, _failure(code, message))

        await self._write(work, write)

    # -- prefill on merge ----------------------------------------------------------------------

    async def _warm(self, work: _Work, entry: str) -> None:
        await self._stop_warming(work)
        work.cold = None
        work.warming = asyncio.create_task(self._prefill(work, entry), name=f"warm {entry}")

    async def _stop_warming(self, work: _Work) -> None:
        if work.warming is not None:
            work.warming.cancel()
            await asyncio.gather(work.warming, return_exceptions=True)
            work.warming = None

    async def _prefill(self, work: _Work, entry: str) -> None:
        engine = self._shared.engine
        if engine is None:
            return
        try:
            ids = work.transcript.ids(entry)
            if not ids or len(ids) > engine.capabilities.positions:
                return  # nothing to read, or a slot behind it will say that it is too long
            done = await engine.warm(ids)
            path = self._path(work, entry)
            work.account.computed(path, reused=done.reused, prompt=done.prompt)
        except EngineDied:
            self._shared.lost_engine(engine)
        except (EngineBusy, PromptTooLong, BadProof) as error:
            logger.info("conversation %s is not prefilled ahead: %s", self._id, error)
        finally:
            if work.warming is asyncio.current_task():
                work.warming = None
            self._dirty.set()


_DIED: Final = "the engine died several times on this reply; ask again, or use another model"


def _client_id(random: Callable[[int], bytes]) -> int:
    return int.from_bytes(random(4)) or 1


def _epoch(work: _Work) -> int:
    if work.epoch is None:
        raise LocalMisuse("something was to be admitted without a lease")
    return work.epoch


def _present(conversation: Conversation, name: str) -> Entry:
    entry = conversation.entry(name)
    if entry is None:
        raise BadProof(f"entry {name} cannot be read any more")
    return entry


def _mark(writer: Writer, slots: Sequence[str], state: State) -> None:
    for slot in slots:
        writer.state(slot, state)


def _fail(writer: Writer, slot: str, usage: Usage) -> None:
    writer.state(slot, State.FAILED)
    writer.usage(slot, usage)


def _failure(code: str, message: str) -> Usage:
    return Usage(finish="error", error_code=code, error_message=message)


def _describe(error: Exception) -> tuple[str, str]:
    codes: dict[type[Exception], str] = {
        PromptTooLong: "context-full",
        BadProof: "unreadable",
        LocalMisuse: "bad-request",
    }
    return codes.get(type(error), "failed"), str(error)


def _opening(running: _Running) -> tuple[str, int]:
    """A reply's opening as a part of a path: every reply behind one parent has the same."""
    parent = running.path[-1][0] if running.path else ""
    return f"{parent}/opening", len(running.reply.hidden.injected)


def _ended(reply: Reply, end_ids: frozenset[int]) -> str | None:
    """Why a reply that is to be resumed has in truth ended already, if it has."""
    sampled = reply.hidden.sampled
    if reply.stream.stopped:
        return "stop"
    if sampled and sampled[-1] in end_ids and not reply.params["ignore_eos"]:
        return "end"
    return "length" if len(sampled) >= reply.params["max_tokens"] else None


def _unanswered(work: _Work) -> tuple[str, ...]:
    """Tips that a user or a tool wrote and after which nobody ever asked for a reply."""
    conversation, tree = work.conversation, work.conversation.tree
    asked = {facts.after for facts in tree.unplaced if facts.slot}
    tips = (tip for tip in tree.tips() if tree.is_admitted(tip) and tip not in asked)
    roles = {tip: born.role for tip in tips if (born := conversation.born(tip)) is not None}
    return tuple(
        tip
        for tip, role in roles.items()
        if role in (Role.USER, Role.TOOL) and not tree.children(tip)
    )
