"""The view: which entries stand in which order, as a pure, total function of the document.

This module owns the tree of admitted entries, the order of pending ones, and what a line, a tip
and a view are. It knows nothing of CRDTs, texts or time: it is fed :class:`Facts` about entries and
answers the same on every replica, whatever the order in which the facts came.

The rules, numbered so that code and tests can cite them:

R1. ``""`` is a virtual admitted root. A ``place`` counts only if its parents lead to the root; an
    entry with any other place counts as ended.
R2. ``after`` counts only if it names a present entry with a smaller clock; else it is the root.
R3. An entry is an *unplaced end* if its place does not count and it has ended (ended state,
    redacted, or a slot with ``stop``), or is a ``continue`` slot followed by another pending slot
    of its line. A ``fork`` slot is never superseded.
R4. ``base(e)`` follows ``after`` past unplaced ends.
R5. Of several admitted ``continue`` children of one parent the smallest (epoch, id) continues the
    line; the others start lines of their own, as forks do. Following the line leads to its *tip*.
R6. A pending fork's line is its own; a pending ``continue``'s is its base's.
R7. ``up(e)`` is the place's parent; for a pending fork ``base(e)``; for a pending ``continue`` the
    previous pending entry of its line by (clock, id), else that line's tip.
R8. ``head`` stands for the line it lies on (if it is an unplaced end, its base's line; if it is
    missing, the root's). The view is the ``up`` chain of that line's last entry.

What is admitted is kept incrementally, because it only ever grows; what is pending is few and is
worked out anew after a change, in (clock, id) order, so nothing here recurses.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from crdt_llm.document.schema import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterable


@dataclass(frozen=True, slots=True)
class Facts:
    """What the tree needs to know of one well-formed entry."""

    id: str
    clock: int
    slot: bool = False
    fork: bool = False
    after: str = ROOT
    parent: str | None = None  # of its place; None without one
    epoch: int = 0
    ended: bool = False  # an ended state, redacted, or a slot with `stop`


@dataclass(frozen=True, slots=True)
class _Pending:
    """What follows from the unplaced entries; rebuilt whole after a change."""

    line: dict[str, str]  # every unplaced entry -> the name of its line
    base: dict[str, str]  # every unplaced entry -> base(e)
    queue: dict[str, list[str]]  # line -> its pending entries by (clock, id)
    before: dict[str, str]  # pending entry -> the previous pending entry of its line
    ends: frozenset[str]  # unplaced ends
    superseded: frozenset[str]  # those of them that are ends only because a later slot follows


@dataclass(slots=True)
class _Admitted:
    """The admitted tree. A line is named by its first entry; the main line by the root."""

    line: dict[str, str] = field(default_factory=lambda: {ROOT: ROOT})
    tip: dict[str, str] = field(default_factory=lambda: {ROOT: ROOT})
    parent: dict[str, str] = field(default_factory=dict)
    next: dict[str, str] = field(default_factory=dict)  # the child that continues the line
    children: defaultdict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    waiting: defaultdict[str, set[str]] = field(default_factory=lambda: defaultdict(set))


class Tree:
    """The tree of one conversation's entries.

    Feed it with :meth:`put`; every answer is a function of the facts put last for each id, not of
    their order.
    """

    def __init__(self, facts: Iterable[Facts] = ()) -> None:
        self._facts: dict[str, Facts] = {}
        self._unplaced: set[str] = set()
        self._admitted = _Admitted()
        self._pending: _Pending | None = None
        self._clock = 0
        for item in facts:
            self.put(item)

    # -- feeding -------------------------------------------------------------------------------

    def put(self, facts: Facts) -> None:
        """Learn of an entry, or of a change in its facts.

        O(1), unless an admitted place moved or a clock was set back (only hostile documents do).
        """
        old = self._facts.get(facts.id)
        if old == facts:
            return
        self._facts[facts.id] = facts
        self._pending = None
        self._clock = max(self._clock, facts.clock)
        if old is not None and facts.clock < old.clock == self._clock:
            self._clock = max(known.clock for known in self._facts.values())
        if old is not None and old.parent is not None:
            if (old.parent, old.epoch, old.fork) != (facts.parent, facts.epoch, facts.fork):
                self._rebuild()
            return
        self._unplaced.add(facts.id)
        if facts.parent is not None:
            self._admit(facts)

    def drop(self, entry: str) -> None:
        """Forget an entry that became malformed, was deleted, or was refused.

        It costs the number of entries only if it had a place, or the greatest clock.
        """
        facts = self._facts.pop(entry, None)
        if facts is None:
            return
        if facts.clock == self._clock:
            self._clock = max((known.clock for known in self._facts.values()), default=0)
        if facts.parent is None:
            self._unplaced.discard(entry)
            self._pending = None
        else:
            self._rebuild()

    def _admit(self, first: Facts) -> None:
        """Give an entry its place if it leads to the root, then those that waited for it."""
        tree, queue = self._admitted, [first]
        while queue:
            facts = queue.pop()
            parent = facts.parent or ROOT
            if parent not in tree.line:
                tree.waiting[parent].add(facts.id)
                continue
            rival = None if facts.fork else tree.next.get(parent)
            if rival is not None and (facts.epoch, facts.id) < (self._facts[rival].epoch, rival):
                # It continues the line in place of one that we already followed: everything
                # behind the rival changes its line. Two nodes at once; rare enough to start over.
                self._rebuild()
                return
            self._place(facts, parent, continues=not facts.fork and rival is None)
            queue.extend(self._facts[child] for child in tree.waiting.pop(facts.id, ()))

    def _place(self, facts: Facts, parent: str, *, continues: bool) -> None:
        tree = self._admitted
        line = tree.line[parent] if continues else facts.id
        tree.line[facts.id] = line
        tree.tip[line] = facts.id
        tree.parent[facts.id] = parent
        tree.children[parent].append(facts.id)
        if continues:
            tree.next[parent] = facts.id
        self._unplaced.discard(facts.id)

    def _rebuild(self) -> None:
        """Rebuild with siblings in (epoch, id) order, so that no rival appears on the way."""
        by_rank = sorted(self._facts.values(), key=lambda facts: (facts.epoch, facts.id))
        self._admitted, self._pending = _Admitted(), None
        self._unplaced = set(self._facts)
        children: defaultdict[str, list[Facts]] = defaultdict(list)
        for facts in by_rank:
            if facts.parent is not None:
                children[facts.parent].append(facts)
        queue = [ROOT]
        while queue:
            parent = queue.pop()
            for facts in children.pop(parent, ()):
                continues = not facts.fork and parent not in self._admitted.next
                self._place(facts, parent, continues=continues)
                queue.append(facts.id)
        for parent, orphans in children.items():
            self._admitted.waiting[parent].update(facts.id for facts in orphans)

    # -- the pending part ----------------------------------------------------------------------

    def _after(self, facts: Facts) -> str:
        """R2."""
        named = self._facts.get(facts.after)
        return named.id if named is not None and named.clock < facts.clock else ROOT

    def _work_out_pending(self) -> _Pending:
        if self._pending is not None:
            return self._pending
        order = sorted(
            (self._facts[entry] for entry in self._unplaced), key=lambda f: (f.clock, f.id)
        )
        admitted = self._admitted.line
        line: dict[str, str] = {}
        queue: defaultdict[str, list[str]] = defaultdict(list)
        ends: set[str] = set()
        for facts in order:  # R6; `after` has a smaller clock, so its line is known already
            ended = facts.ended or facts.parent is not None  # R1: a place that does not count
            after = self._after(facts)
            named = admitted[after] if after in admitted else line[after]
            line[facts.id] = facts.id if facts.fork and not ended else named
            if ended:
                ends.add(facts.id)
            else:
                queue[line[facts.id]].append(facts.id)
        superseded: set[str] = set()
        for entries in queue.values():  # R3
            slots = [entry for entry in entries if self._facts[entry].slot]
            superseded.update(entry for entry in slots[:-1] if not self._facts[entry].fork)
        ends |= superseded
        base: dict[str, str] = {}
        for facts in order:  # R4
            after = self._after(facts)
            base[facts.id] = base[after] if after in ends else after
        before: dict[str, str] = {}
        left: dict[str, list[str]] = {}
        for name, entries in queue.items():
            kept = [entry for entry in entries if entry not in superseded]
            left[name] = kept
            before.update(zip(kept[1:], kept, strict=False))
        self._pending = _Pending(line, base, left, before, frozenset(ends), frozenset(superseded))
        return self._pending

    # -- answers -------------------------------------------------------------------------------

    def __contains__(self, entry: str) -> bool:
        return entry in self._facts

    def __len__(self) -> int:
        return len(self._facts)

    @property
    def entries(self) -> Iterable[str]:
        """All entries known, in no particular order."""
        return self._facts.keys()

    def facts(self, entry: str) -> Facts:
        """What was put last for an entry. Raises ``KeyError`` for an unknown one."""
        return self._facts[entry]

    @property
    def clock(self) -> int:
        """The greatest clock of any entry; 0 in an empty conversation."""
        return self._clock

    def is_admitted(self, entry: str) -> bool:
        """Whether an entry has a place that counts; the root always has."""
        return entry in self._admitted.line

    def is_end(self, entry: str) -> bool:
        """Whether an entry is an unplaced end (R3)."""
        return entry in self._work_out_pending().ends

    @property
    def superseded(self) -> frozenset[str]:
        """Pending slots that a later slot of their line took over."""
        return self._work_out_pending().superseded

    @property
    def pending(self) -> tuple[str, ...]:
        """The pending entries, by (clock, id). Unplaced ends are not among them."""
        queue = self._work_out_pending().queue
        entries = [entry for line in queue.values() for entry in line]
        return tuple(sorted(entries, key=lambda entry: (self._facts[entry].clock, entry)))

    def queue(self, line: str) -> tuple[str, ...]:
        """The pending entries of a line, by (clock, id)."""
        return tuple(self._work_out_pending().queue.get(line, ()))

    @property
    def unplaced(self) -> tuple[Facts, ...]:
        """The entries without a place that counts, unplaced ends included, in no order."""
        return tuple(self._facts[entry] for entry in self._unplaced)

    def base(self, entry: str) -> str:
        """R4, for an entry without a place that counts."""
        return self._work_out_pending().base[entry]

    def up(self, entry: str) -> str:
        """R7: what stands before an entry in its path. An unplaced end hangs at its base."""
        if (parent := self._admitted.parent.get(entry)) is not None:
            return parent
        pending = self._work_out_pending()
        if entry in pending.ends or self._facts[entry].fork:
            return pending.base[entry]
        previous = pending.before.get(entry)
        if previous is not None:
            return previous
        line = pending.line[entry]
        # A continue entry of a pending fork's line always has that fork before it, so the line is
        # an admitted one here.
        return self._admitted.tip[line]

    def line(self, entry: str) -> str:
        """The name of the line that an entry lies on (R5, R6); the root's for an unknown entry."""
        if entry in self._admitted.line:
            return self._admitted.line[entry]
        return self._work_out_pending().line.get(entry, ROOT)

    def tip(self, entry: str) -> str:
        """The last admitted entry of the line that an admitted entry lies on."""
        return self._admitted.tip[self._admitted.line[entry]]

    def last(self, entry: str) -> str:
        """The last entry, pending ones included, of the line that an entry lies on."""
        line = self.line(entry)
        queue = self._work_out_pending().queue.get(line)
        return queue[-1] if queue else self._admitted.tip[line]

    def path(self, entry: str) -> tuple[str, ...]:
        """The ``up`` chain of an entry from the first one to itself; empty for the root."""
        chain: list[str] = []
        while entry != ROOT:
            chain.append(entry)
            entry = self.up(entry)
        return tuple(reversed(chain))

    def view(self, head: str = ROOT) -> tuple[str, ...]:
        """R8: what a reader sees, in order."""
        return self.path(self.last(head))

    def children(self, entry: str) -> tuple[str, ...]:
        """The entries that stand directly behind one: admitted by (epoch, id), then pending.

        Unplaced ends are listed behind their base, so that a stopped request stays findable.
        """
        admitted = sorted(
            self._admitted.children.get(entry, ()), key=lambda c: (self._facts[c].epoch, c)
        )
        waiting = sorted(
            (child for child in self._unplaced if self.up(child) == entry),
            key=lambda c: (self._facts[c].clock, c),
        )
        return (*admitted, *waiting)

    def tips(self) -> tuple[str, ...]:
        """The last entry of every line, the main line's first, then by name of the line."""
        queue = self._work_out_pending().queue
        names = sorted({*self._admitted.tip, *(line for line, q in queue.items() if q)})
        return tuple(last for name in names if (last := self.last(name)) != ROOT)
