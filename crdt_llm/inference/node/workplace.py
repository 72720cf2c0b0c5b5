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
from typing import TYPE_CHECKING, Final

from crdt_llm.document.reading import is_summary, is_withdrawn
from crdt_llm.document.schema import ENDED, REDACTION_DELETES, ROOT, Role
from crdt_llm.errors import BadProof, LocalMisuse
from crdt_llm.inference.node.accounting import PrefillAccount
from crdt_llm.inference.node.evaluate import Situation

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from crdt_llm.document.conversation import Change, Conversation, Writer
    from crdt_llm.document.schema import Entry
    from crdt_llm.inference.node.figures import Computed
    from crdt_llm.inference.node.seat import Lease, Seat
    from crdt_llm.inference.prompt.transcript import Transcript

PRINCIPAL: Final = "node"  # who the node is in `born.author` of the entries that it writes


@dataclass(slots=True)
class _Marks:
    """What is kept of the slots, change by change."""

    open: dict[str, bool] = field(default_factory=dict)  # placed, not ended -> to end now
    unmarked: dict[str, None] = field(default_factory=dict)  # to end, never placed
    seen_at_ms: dict[str, int] = field(default_factory=dict)  # waiting for a place
    misled: set[str] = field(default_factory=set)  # open, and read what was withdrawn since


@dataclass(slots=True)
class _Redactions:
    """What was withdrawn, and what is to be done about it."""

    seen: set[str] = field(default_factory=set)
    fed: dict[str, None] = field(default_factory=dict)  # the engine may have read it
    leftovers: dict[str, None] = field(default_factory=dict)  # redacted, and something is left
    summaries: set[str] = field(default_factory=set)  # every entry that covers others
    spoiled: dict[str, None] = field(default_factory=dict)  # ours, to be withdrawn too


class Workplace:
    """A replica of one conversation that the node works on.

    Args:
        conversation: the replica; empty, so that everything in it is heard of.
        transcript: its entries as token ids.
        seat: where its writes go.
        clock_ms: wall time.
        computed: where tokens are counted.
    """

    def __init__(
        self,
        conversation: Conversation,
        transcript: Transcript,
        seat: Seat,
        clock_ms: Callable[[], int],
        computed: Computed,
    ) -> None:
        self.conversation = conversation
        self.transcript = transcript
        self.seat = seat
        self.account = PrefillAccount()
        self.computed = computed
        self._on_its_way: asyncio.Future[None] | None = None
        self.was_of_use = False  # whether anything became durable from here
        self.revision = 0  # another one after each change of the replica
        self._clock_ms = clock_ms
        self._marks = _Marks()
        self._redactions = _Redactions()
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
        self.revision += 1
        conversation, marks = self.conversation, self._marks
        self._note_redactions(change)
        for name in change.structure:
            born = conversation.born(name)
            if born is None or born.role is not Role.ASSISTANT:
                continue
            asked = conversation.has(name, "stop") or conversation.is_redacted(name)
            marks.open.pop(name, None)
            marks.unmarked.pop(name, None)
            if conversation.state(name) in ENDED:
                marks.seen_at_ms.pop(name, None)
                marks.misled.discard(name)
            elif conversation.tree.is_admitted(name):
                marks.open[name] = asked or name in marks.misled
            elif asked:
                marks.unmarked[name] = None
            else:
                marks.seen_at_ms.setdefault(name, self._clock_ms())

    def _note_redactions(self, change: Change) -> None:
        conversation, redactions = self.conversation, self._redactions
        for name in change.structure:
            if is_summary(conversation, name):
                redactions.summaries.add(name)
        touched = [name for name in change.entries if conversation.is_redacted(name)]
        for name in touched:
            if any(conversation.has(name, key) for key in REDACTION_DELETES):
                redactions.leftovers[name] = None
            else:
                redactions.leftovers.pop(name, None)
            redactions.spoiled.pop(name, None)
        fresh = {name for name in touched if name not in redactions.seen}
        if not fresh:
            return
        self.transcript.forget()
        for name in sorted(redactions.summaries - redactions.seen - fresh):
            if is_withdrawn(conversation, name):
                fresh.add(name)
                if conversation.has(name, "place") and self._is_ours(name):
                    redactions.spoiled[name] = None
        redactions.seen |= fresh
        redactions.fed |= dict.fromkeys(sorted(fresh))
        # What came withdrawn was never read. A reply that began before this replica was filled
        # says itself what it read.
        self._mislead({edit.entry for edit in change.edits if edit.path} & fresh)

    def _mislead(self, withdrawn: set[str | None]) -> None:
        """Replies that were begun from what is withdrawn now are to end."""
        tree, marks = self.conversation.tree, self._marks
        for slot in marks.open if withdrawn else ():
            if not withdrawn.isdisjoint(self.conversation.reads(slot) or tree.path(slot)):
                marks.misled.add(slot)
                marks.open[slot] = True

    def _is_ours(self, name: str) -> bool:
        born = self.conversation.born(name)
        return born is not None and born.author == PRINCIPAL

    # -- what was withdrawn --------------------------------------------------------------------

    def is_misled(self, slot: str) -> bool:
        """Whether a reply that is not at its end was begun from what is withdrawn now."""
        return slot in self._marks.misled

    def take_withdrawn(self) -> tuple[str, ...]:
        """What the engine has to forget; whoever asks sees to it."""
        withdrawn, self._redactions.fed = tuple(self._redactions.fed), {}
        return withdrawn

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
            withdrawn=bool(self._redactions.fed),
            leftovers=tuple(self._redactions.leftovers),
            spoiled=tuple(self._redactions.spoiled),
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

    def is_open(self, entry: str) -> bool:
        """Whether an entry is a placed reply that has not ended."""
        return entry in self._marks.open

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

    def measure(self, running: Mapping[str, int]) -> tuple[int, int]:
        """How much of the shown path is read.

        Args:
            running: replies at work, each with its tokens so far.

        Returns:
            Tokens whose KV is there, and all tokens, of what was rendered before; nothing is
            rendered for this.
        """
        tree, head = self.conversation.tree, self.conversation.meta.head
        tip = tree.tip(head if tree.is_admitted(head) else ROOT)
        sizes = self.transcript.known_sizes(self.transcript.reading(tip), running)
        warm = min(self.account.known(sizes), sum(tokens for _, tokens in sizes))
        return warm, sum(tokens for _, tokens in sizes)
