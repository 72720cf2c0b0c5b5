"""Everything that goes when a seat goes: a replica, what was derived from it, and its outbox.

This module owns what the node knows of one conversation between two decisions, and the order in
which its writes leave. It decides nothing and knows no engine.

Whatever anyone writes goes through one outbox, so updates leave in the order in which they were
made, also when the writer was cancelled meanwhile: an update that a replica has and nobody else
would be a gap for ever.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from crdt_llm.document.schema import ENDED, Role
from crdt_llm.errors import BadProof, LocalMisuse
from crdt_llm.inference.accounting import PrefillAccount
from crdt_llm.inference.evaluate import Situation

if TYPE_CHECKING:
    from collections.abc import Callable

    from crdt_llm.document.conversation import Change, Conversation, Writer
    from crdt_llm.document.schema import Entry
    from crdt_llm.inference.seat import Lease, Seat
    from crdt_llm.inference.transcript import Transcript


@dataclass(slots=True)
class _Marks:
    """What is kept of the slots, change by change."""

    open: dict[str, bool] = field(default_factory=dict)  # placed, not ended -> to end now
    unmarked: dict[str, None] = field(default_factory=dict)  # to end, never placed
    seen_at_ms: dict[str, int] = field(default_factory=dict)  # waiting for a place


class Workplace:
    """A replica of one conversation that the node works on.

    Args:
        conversation: the replica; empty, so that everything in it is heard of.
        transcript: its entries as token ids.
        seat: where its writes go.
        clock_ms: wall time.
    """

    def __init__(
        self,
        conversation: Conversation,
        transcript: Transcript,
        seat: Seat,
        clock_ms: Callable[[], int],
    ) -> None:
        self.conversation = conversation
        self.transcript = transcript
        self.seat = seat
        self.account = PrefillAccount()
        self._on_its_way: asyncio.Future[None] | None = None
        self.was_of_use = False  # whether anything became durable from here
        self._clock_ms = clock_ms
        self._marks = _Marks()
        self._epoch: int | None = None
        # Bounded by its writers: each waits for its own update before it makes another.
        self._outbox: asyncio.Queue[tuple[bytes, asyncio.Future[None]]] = asyncio.Queue()
        conversation.subscribe(self._note)

    # -- writing -------------------------------------------------------------------------------

    def write(self, write: Callable[[Writer], None]) -> asyncio.Future[None]:
        """Write in one transaction; the future is done once it is durable."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        with self.conversation.writing() as writer:
            write(writer)
        change = writer.change
        if change is None or change.is_empty:
            done.set_result(None)
        else:
            self._outbox.put_nowait((change.update, done))
        return done

    async def send(self, lost: Callable[[], None]) -> None:
        """Submit what was written, one update after the other, until cancelled.

        The first failure loses the seat: everyone who waits hears of it.
        """
        failure: Exception | None = None
        while True:
            update, done = await self._outbox.get()
            if failure is None:
                self._on_its_way = asyncio.ensure_future(self.seat.submit(update))
                try:
                    await asyncio.shield(self._on_its_way)
                    self.was_of_use = True
                except Exception as error:  # noqa: BLE001 - whoever waits for the update hears of it
                    failure = error
                    lost()
            if done.cancelled():
                continue
            if failure is None:
                done.set_result(None)
            else:
                done.set_exception(failure)
                done.exception()  # whoever waits hears of it; if nobody does, that is no fault

    async def settle(self) -> None:
        """Wait for what is on its way; whether it becomes durable or not, it is decided then.

        Whoever sits here next must know of it. An admission that becomes durable behind its back
        would meet a second one of the same entry, and of two proofs that were written at the same
        time only one stays: what the other node placed behind its own would hang at nothing.
        """
        if self._on_its_way is not None:
            await asyncio.wait({self._on_its_way})
            if not self._on_its_way.cancelled():
                self._on_its_way.exception()  # whoever waited for it has heard of it

    # -- seeing --------------------------------------------------------------------------------

    def _note(self, change: Change) -> None:
        """Keep the marks current: costs what the change touched."""
        conversation, marks = self.conversation, self._marks
        if any(edit.key == "redacted" for edit in change.edits):
            self.transcript.forget()
        for name in change.structure:
            born = conversation.born(name)
            if born is None or born.role is not Role.ASSISTANT:
                continue
            asked = conversation.has(name, "stop") or conversation.has(name, "redacted")
            marks.open.pop(name, None)
            marks.unmarked.pop(name, None)
            if conversation.state(name) in ENDED:
                marks.seen_at_ms.pop(name, None)
            elif conversation.tree.is_admitted(name):
                marks.open[name] = asked
            elif asked:
                marks.unmarked[name] = None
            else:
                marks.seen_at_ms.setdefault(name, self._clock_ms())

    def situation(self, *, running: frozenset[str], capacity: int, cold: str | None) -> Situation:
        """What a decision depends on, now."""
        policy = self.conversation.meta.policy
        return Situation(
            tree=self.conversation.tree,
            policy=policy,
            leased=self.leased,
            open=self._marks.open,
            unmarked=tuple(self._marks.unmarked),
            running=running,
            capacity=capacity,
            unanswered=self._unanswered() if policy.reply == "auto" else (),
            cold=cold,
        )

    def _unanswered(self) -> tuple[str, ...]:
        """Tips that a user or a tool wrote and after which nobody ever asked for a reply."""
        conversation, tree = self.conversation, self.conversation.tree
        asked = {facts.after for facts in tree.unplaced if facts.slot}
        tips = (tip for tip in tree.tips() if tree.is_admitted(tip) and tip not in asked)
        roles = {tip: born.role for tip in tips if (born := conversation.born(tip)) is not None}
        return tuple(
            tip
            for tip, role in roles.items()
            if role in (Role.USER, Role.TOOL) and not tree.children(tip)
        )

    @property
    def has_open(self) -> bool:
        """Whether a placed reply has not ended."""
        return bool(self._marks.open)

    def to_end(self, slot: str) -> bool:
        """Whether a placed reply is to be ended now."""
        return self._marks.open.get(slot, True)

    def seen_at_ms(self, slot: str) -> int | None:
        """When the node first saw that a slot waits; ``None`` for one that was placed before."""
        return self._marks.seen_at_ms.get(slot)

    # -- the lease -----------------------------------------------------------------------------

    @property
    def leased(self) -> bool:
        """Whether our lease is known to be in the document."""
        return self._epoch is not None

    def find_lease(self, lease: Lease) -> None:
        """Note whether our lease is in the document."""
        granted = self.conversation.lease(lease.epoch)
        self._epoch = lease.epoch if granted == (lease.node, lease.signature) else None

    @property
    def epoch(self) -> int:
        """The epoch of our lease.

        Raises:
            LocalMisuse: there is none; nothing may be admitted.
        """
        if self._epoch is None:
            raise LocalMisuse("something was to be admitted without a lease")
        return self._epoch

    # -- reading -------------------------------------------------------------------------------

    def present(self, name: str) -> Entry:
        """An entry.

        Raises:
            BadProof: it cannot be read any more.
        """
        entry = self.conversation.entry(name)
        if entry is None:
            raise BadProof(f"entry {name} cannot be read any more")
        return entry

    def path(self, entry: str) -> tuple[tuple[str, int], ...]:
        """The entries of a path with the number of their tokens, from the root."""
        path = self.conversation.tree.path(entry)
        return tuple((name, len(self.transcript.segment(name))) for name in path)
