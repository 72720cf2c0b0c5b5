"""What the node does next, as one pure function of what it sees.

The node never reacts to single updates: updates change the situation, and then, at the node's own
pace, :func:`evaluate` names the one next action. It reads and decides; it writes nothing, awaits
nothing and knows no engine.

The invariants that its branches cite:

I1. Nothing is written without a lease, and none is taken before there is something to write.
I2. Stop wins: a reply whose stop was asked for, or which was redacted, ends before anything else
    is done in the conversation.
I3. Every placed reply ends with a proof: one that streams is running, is resumed, or is ended.
I4. An entry is admitted behind ``up(e)`` only, and only once that is admitted and has ended. So
    what the model has read never changes: the KV cache only grows along a path.
I5. Of a line's pending slots the last is answered. The ones before it become ``superseded`` in the
    very update that admits it.
I6. A slot is admitted when its prompt is fixed and an engine can start on it; until then it waits
    without a place, so that it can still be stopped or superseded.
I7. What was admitted and not yet read is prefilled when nothing else is to do.
I8. What was withdrawn leaves nothing behind. As soon as no reply runs that read it, the engine
    forgets it; what was written beside the withdrawal is deleted; a summary of it is withdrawn too.
I9. A draft is read when nothing else is to do, in the whole node.
I10. What the relay does not let be admitted yet waits, and so does what hangs behind it; the other
    lines go on.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from crdt_llm.document.schema import Policy, State

if TYPE_CHECKING:
    from collections.abc import Mapping

    from crdt_llm.document.tree import Tree

ADMIT_MAX: Final = 64  # entries in one update: a long offline merge stays interruptible


@dataclass(frozen=True, slots=True)
class Situation:
    """All that a decision depends on.

    Attributes:
        tree: the conversation's tree; not changed while a decision is made.
        policy: the conversation's policy.
        leased: whether our lease is in the document.
        open: placed replies that have not ended, and whether each is to end now (stop, redacted).
        unmarked: unplaced slots that were stopped or redacted and have no ended state yet.
        running: the replies that an engine works on.
        capacity: how many more replies may be started now.
        unanswered: with ``reply = auto``, admitted entries that want a slot and have none.
        cold: an admitted entry whose path should be in the KV cache and is not; or ``None``.
        withdrawn: whether there is something that an engine is to forget, and can be told to.
        leftovers: withdrawn entries that hold what they should not hold any more.
        spoiled: summaries of ours that stand for something that was withdrawn.
        dropped: whether an engine is to forget what was read of drafts, and can be told to.
        draft: whether a draft can be read now.
        preparing: slots whose prompt is being made shorter; they are not admitted yet.
        held: pending entries that the relay does not let be admitted yet.
    """

    tree: Tree
    policy: Policy = field(default_factory=Policy)
    leased: bool = True
    open: Mapping[str, bool] = field(default_factory=dict)
    unmarked: tuple[str, ...] = ()
    running: frozenset[str] = frozenset()
    capacity: int = 1
    unanswered: tuple[str, ...] = ()
    cold: str | None = None
    withdrawn: bool = False
    leftovers: tuple[str, ...] = ()
    spoiled: tuple[str, ...] = ()
    dropped: bool = False
    draft: bool = False
    preparing: frozenset[str] = frozenset()
    held: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Nothing:
    """Wait for the next change."""


@dataclass(frozen=True, slots=True)
class TakeLease:
    """Write the lease that proofs will count under."""


@dataclass(frozen=True, slots=True)
class End:
    """End a placed reply with what it has."""

    slot: str
    state: State = State.STOPPED


@dataclass(frozen=True, slots=True)
class Mark:
    """Say of slots that never got a place that they ended."""

    slots: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Resume:
    """Go on with a placed reply that nobody works on, at the token where it is."""

    slot: str


@dataclass(frozen=True, slots=True)
class Admit:
    """Give places: a run of author's entries, and the slot behind them if it can start now.

    Attributes:
        parent: where the first one goes.
        entries: author's entries, each behind the one before it.
        slot: the slot behind the last of them, or ``None``.
        superseded: slots that this one takes over from.
    """

    parent: str
    entries: tuple[str, ...]
    slot: str | None = None
    superseded: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Request:
    """Add the slot that ``policy.reply = auto`` asks for."""

    after: str


@dataclass(frozen=True, slots=True)
class Warm:
    """Bring the path to an admitted entry into the KV cache."""

    entry: str


@dataclass(frozen=True, slots=True)
class Forget:
    """Have the engine forget what was withdrawn, and what was read of drafts in vain."""


@dataclass(frozen=True, slots=True)
class ReadDraft:
    """Read what somebody is typing."""


@dataclass(frozen=True, slots=True)
class Clear:
    """Delete what was written beside a withdrawal."""

    entries: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Withdraw:
    """Withdraw summaries of what was withdrawn."""

    summaries: tuple[str, ...]


Action = (
    Nothing
    | TakeLease
    | End
    | Mark
    | Resume
    | Admit
    | Request
    | Warm
    | Forget
    | Clear
    | Withdraw
    | ReadDraft
)


def evaluate(situation: Situation) -> Action:  # noqa: C901, PLR0911 - one branch an invariant
    """The next action. Pure and total; costs what is pending, not what was said before."""
    waiting = _waits(situation)
    if situation.withdrawn and not _is_misread(situation):  # I8
        return Forget()
    if not situation.leased:  # I1
        if waiting or _has_something_to_write(situation):
            return TakeLease()
        return _to_read(situation)
    if (ending := _to_end(situation)) is not None:  # I2
        return End(ending)
    if situation.leftovers:  # I8
        return Clear(situation.leftovers)
    if situation.spoiled:
        return Withdraw(situation.spoiled)
    if situation.unmarked:
        return Mark(situation.unmarked)
    if situation.capacity:
        for slot in situation.open:
            if slot not in situation.running:  # I3
                return Resume(slot)
    if waiting and (admit := _to_admit(situation)) is not None:
        return admit
    if situation.unanswered:
        return Request(situation.unanswered[0])
    return _to_read(situation)


def _to_read(situation: Situation) -> Action:
    if situation.dropped:
        return Forget()
    if situation.cold is not None:  # I7
        return Warm(situation.cold)
    return ReadDraft() if situation.draft else Nothing()  # I9


def _waits(situation: Situation) -> bool:
    """Whether anything pending may be admitted, now or when there is room for it."""
    if not situation.held:
        return bool(situation.tree.pending)
    return _to_admit(replace(situation, capacity=1, preparing=frozenset())) is not None


def _has_something_to_write(situation: Situation) -> bool:
    return bool(
        situation.open
        or situation.unmarked
        or situation.unanswered
        or situation.leftovers
        or situation.spoiled
    )


def _is_misread(situation: Situation) -> bool:
    """Whether a reply runs that is to end: it may have read what an engine is to forget."""
    return any(asked and slot in situation.running for slot, asked in situation.open.items())


def _to_end(situation: Situation) -> str | None:
    tree = situation.tree
    for slot, asked in situation.open.items():
        if asked:
            return slot
        interrupted = situation.policy.on_new_entry == "interrupt" and tree.last(slot) != slot
        if interrupted and tree.tip(slot) == slot:
            return slot
    return None


def _to_admit(situation: Situation) -> Admit | None:
    """The first run of pending entries whose parent is ready (I4)."""
    tree = situation.tree
    taken: set[str] = set()
    for first in tree.pending:
        parent = tree.up(first)
        if first in taken or not tree.is_admitted(parent) or parent in situation.open:
            continue
        entries: list[str] = []
        for entry in _run(tree, first):
            if entry in situation.held:  # I10
                break
            taken.add(entry)
            if tree.facts(entry).slot:
                if situation.capacity and entry not in situation.preparing:  # I6
                    return Admit(parent, tuple(entries), entry, _superseded(tree, entry))
                break
            entries.append(entry)
            if len(entries) == ADMIT_MAX:
                break
        if entries:
            return Admit(parent, tuple(entries))
    return None


def _run(tree: Tree, first: str) -> tuple[str, ...]:
    """``first`` and the pending entries that follow it in its line."""
    queue = tree.queue(tree.line(first))
    return queue[queue.index(first) :]


def _superseded(tree: Tree, slot: str) -> tuple[str, ...]:
    line = tree.line(slot)
    return tuple(sorted(entry for entry in tree.superseded if tree.line(entry) == line))  # I5


__all__ = [
    "Action",
    "Admit",
    "Clear",
    "End",
    "Forget",
    "Mark",
    "Nothing",
    "ReadDraft",
    "Request",
    "Resume",
    "Situation",
    "TakeLease",
    "Warm",
    "Withdraw",
    "evaluate",
]
