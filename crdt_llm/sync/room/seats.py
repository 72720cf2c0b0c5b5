"""Who is in a room: each one's seat, whose write is looked at next, and what everyone is told.

This module owns the bounds of what one peer may have waiting, that peers take turns, how long who
was refused too often waits, and that one peer's fault is not the others'. It must not know what a
write says or how it is judged, nor the log.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections import deque
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

from crdt_llm.document.updates import merge
from crdt_llm.errors import CrdtLlmError, Forbidden, StoreFailed
from crdt_llm.sync.room.peer import Delivery
from crdt_llm.sync.wire.verdict import Committed, Postponed, one_line

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from crdt_llm.document.conversation import Change
    from crdt_llm.document.rules import Author
    from crdt_llm.sync.room.awareness import Awareness
    from crdt_llm.sync.room.peer import Peer, Submission
    from crdt_llm.sync.room.refusal_rate import RefusalRate
    from crdt_llm.sync.room.room import Room
    from crdt_llm.sync.wire.verdict import Denied, Verdict
    from crdt_llm.sync.wire.y_websocket import AwarenessState

logger = logging.getLogger("crdt_llm.sync")

UNSETTLED_MAX: Final = 64
"""Updates of one peer that wait for a verdict: one turn's worth. Beyond it the peer waits."""

UNSETTLED_BYTES_MAX: Final = 1 << 20
"""Bytes of them; one larger update is taken alone."""

ANSWERS_PER_TURN_MAX: Final = 8
"""Answers may be whole documents: after a restart of the relay everyone asks at once."""

ACCEPTED: Final = Committed(0)
"""A promise; what is handed out names the LSN of the commit."""


@dataclass(slots=True, eq=False)
class Seat:
    """What a room keeps of a peer."""

    peer: Peer
    # With who the peer was at the time: what a node wrote under a lease stays written under it.
    queue: deque[tuple[Submission, Author]] = field(default_factory=deque)
    unsettled: int = 0
    unsettled_bytes: int = 0
    has_space: asyncio.Event = field(default_factory=asyncio.Event)
    is_ready: bool = False  # stands in the line of seats that have something to check
    is_held: bool = False  # waits, because it was refused too often; it keeps out of the line
    is_gone: bool = False


@dataclass(slots=True)
class Batch:
    """What a turn has decided so far."""

    settled: list[tuple[Seat, Submission, Verdict | None]] = field(default_factory=list)
    accepted: list[tuple[Seat, Change]] = field(default_factory=list)
    refused: dict[Seat, None] = field(default_factory=dict)  # in order: a seed must replay
    late: int = 0  # of what is settled, those that were judged in an earlier turn
    restored: bool = False  # something in it is a restore, or confirms one

    @property
    def updates(self) -> list[bytes]:
        """What was accepted."""
        return [change.update for _, change in self.accepted]


class Seats:
    """One room's.

    Args:
        room: What is given to peers in their calls.
        conversation: Its id.
        awareness: Who is here, as they say themselves.
        refusals: How often somebody may be refused before it waits.
        wake: Called when there is something to do for the room.
        clock: Seconds, monotonic.

    Attributes:
        left_at: When somebody went last, or the room was made.
    """

    def __init__(  # noqa: PLR0913 - everything outside is an argument
        self,
        room: Room,
        conversation: str,
        awareness: Awareness,
        refusals: RefusalRate,
        *,
        wake: Callable[[], None],
        clock: Callable[[], float],
    ) -> None:
        self._room = room
        self._conversation = conversation
        self._awareness = awareness
        self._refusals = refusals
        self._wake = wake
        self._clock = clock
        self.left_at = clock()
        self._seats: dict[Peer, Seat] = {}
        self._entering: dict[Peer, asyncio.Future[None]] = {}
        self._asking: dict[Peer, None] = {}
        self._line: deque[Seat] = deque()  # seats with something to check, each once
        self._late: deque[tuple[Seat, Submission, Denied]] = deque()  # refusals that waited

    # -- coming and going ----------------------------------------------------------------------

    @property
    def are_empty(self) -> bool:
        """Whether nobody is here or about to come in."""
        return not (self._seats or self._entering)

    async def enter(self, peer: Peer) -> None:
        """Wait to be let in."""
        entering: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._entering[peer] = entering
        self._wake()
        try:
            await entering
        except BaseException:
            self.leave(peer)
            raise

    def let_in(self, may_be_here: Callable[[Peer], bool]) -> None:
        """Give who waits a seat."""
        entering, self._entering = self._entering, {}
        for peer, waiter in entering.items():
            if waiter.done():
                continue
            if not may_be_here(peer):
                waiter.set_exception(_stranger())
                continue
            seat = self._seats[peer] = Seat(peer)
            logger.debug("conversation %s: %s came", self._conversation, peer.author.principal)
            self._call(seat, peer.entered, self._room)
            waiter.set_result(None)

    def leave(self, peer: Peer) -> None:
        """Let a peer go. What it handed over before is still looked at. Safe to call twice."""
        self._entering.pop(peer, None)
        self._asking.pop(peer, None)
        seat = self._seats.pop(peer, None)
        if seat is None:
            return
        logger.debug("conversation %s: %s went", self._conversation, peer.author.principal)
        seat.is_gone = True
        seat.has_space.set()
        self.share_presence(self._awareness.leave(peer))
        self.left_at = self._clock()

    def dismiss_all_but(self, may_be_here: Callable[[Peer], bool]) -> None:
        """Let everyone go who may not be here any more."""
        for seat in tuple(self._seats.values()):
            if not may_be_here(seat.peer):
                self._dismiss(seat, _stranger())

    def end(self, error: CrdtLlmError) -> None:
        """Let everyone go, and nobody in."""
        for entering in self._entering.values():
            if not entering.done():
                entering.set_exception(error)
        self._entering.clear()
        seats, self._seats = tuple(self._seats.values()), {}
        for seat in seats:
            self._let_go(seat, error)

    # -- writes on their way in ----------------------------------------------------------------

    async def space_for(self, submission: Submission) -> Seat | None:
        """Wait while a peer has too many writes without a verdict; ``None`` if it is gone."""
        seat = self._seats.get(submission.peer)
        size = len(submission.update)
        while seat is not None and seat.unsettled > 0:
            fits = seat.unsettled_bytes + size <= UNSETTLED_BYTES_MAX
            if seat.is_gone or (seat.unsettled < UNSETTLED_MAX and fits):
                break
            seat.has_space.clear()
            await seat.has_space.wait()
        return None if seat is None or seat.is_gone else seat

    def put(self, seat: Seat, submission: Submission) -> None:
        """Have a write looked at when it is its peer's turn."""
        seat.unsettled += 1
        seat.unsettled_bytes += len(submission.update)
        seat.queue.append((submission, submission.peer.author))
        self._stand_in_line(seat)

    @property
    def have_writes(self) -> bool:
        """Whether somebody stands in line."""
        return bool(self._line)

    def take(self) -> tuple[Seat, Submission, Author] | None:
        """The next write, and who its author counts as now; ``None`` if nobody stands in line."""
        while self._line:
            seat = self._line.popleft()
            seat.is_ready = False
            # A held seat stood in line when its answer was put off; it comes again with that.
            if seat.is_held or self._hold_debtor(seat):
                continue
            submission, author = seat.queue.popleft()
            if submission.peer.author.epoch != author.epoch:
                # Its lease has ended since. The epoch alone would not tell: the same node may have
                # come back under it on another connection, and must not meet its own late words.
                author = replace(author, epoch=None)
            if seat.queue:
                self._stand_in_line(seat)
            return seat, submission, author
        return None

    def _stand_in_line(self, seat: Seat) -> None:
        if not seat.is_ready and not seat.is_held:
            seat.is_ready = True
            self._line.append(seat)
            self._wake()

    # -- those who are refused too often -------------------------------------------------------

    def _hold_debtor(self, seat: Seat) -> bool:
        """Let whoever was refused too often wait before it is listened to again."""
        peer = seat.peer
        wait = 0.0 if peer.author.node else self._refusals.debt(peer.author.principal, peer.address)
        if wait > 0:
            seat.is_held = True
            self._refusals.later(wait, functools.partial(self._release, seat))
        return wait > 0

    def hold_answer(self, seat: Seat, submission: Submission, verdict: Denied) -> bool:
        """Count a refusal; of one too many keep it back, and with it all that its peer sent after.

        Returns:
            Whether it is kept back.
        """
        peer = seat.peer
        if peer.author.node:  # one that lost its lease has done no wrong
            return False
        wait = self._refusals.refused(peer.author.principal, peer.address, self._conversation)
        if wait > 0:
            seat.is_held = True
            late = (seat, submission, verdict)
            self._refusals.later(wait, functools.partial(self._tell_late, *late))
        return wait > 0

    def take_late(self, batch: Batch) -> None:
        """The refusals that were kept back long enough."""
        while self._late:
            seat, submission, verdict = self._late.popleft()
            batch.settled.append((seat, submission, verdict))
            batch.late += 1
            if submission.peer.survives_refusal:
                self._release(seat)
            else:
                batch.refused[seat] = None

    def _tell_late(self, seat: Seat, submission: Submission, verdict: Denied) -> None:
        self._late.append((seat, submission, verdict))
        self._wake()

    def _release(self, seat: Seat) -> None:
        seat.is_held = False
        if seat.queue:
            self._stand_in_line(seat)

    # -- telling -------------------------------------------------------------------------------

    def share_presence(self, states: tuple[AwarenessState, ...]) -> None:
        """Tell everyone who is here, or went."""
        if states:
            for seat in tuple(self._seats.values()):
                self._call(seat, seat.peer.presence, states)

    def deliver(self, accepted: Sequence[tuple[Seat, Change]]) -> None:
        """Tell everyone what others wrote, as it was committed."""
        authors = {seat for seat, _ in accepted}
        for_readers = Delivery(merge([change.update for _, change in accepted]))
        for seat in tuple(self._seats.values()):
            if seat not in authors:
                self._call(seat, seat.peer.deliver, for_readers)
            elif len(authors) > 1:
                others = [change.update for author, change in accepted if author is not seat]
                self._call(seat, seat.peer.deliver, Delivery(merge(others)))

    def settle(self, batch: Batch, lsn: int) -> None:
        """Tell everyone what became of their writes, and let go whom a refusal ends."""
        for seat, submission, verdict in batch.settled:
            seat.unsettled -= 1
            seat.unsettled_bytes -= len(submission.update)
            seat.has_space.set()
            if isinstance(verdict, Postponed) and not seat.peer.survives_failure:
                if not seat.is_gone:
                    self._dismiss(seat, StoreFailed(verdict.reason))
                batch.refused[seat] = None
            elif verdict is not None:
                final = Committed(lsn) if verdict is ACCEPTED else verdict
                self._call(seat, seat.peer.settle, submission, final, self._room)
        for seat in batch.refused:
            self.leave(seat.peer)
            seat.queue.clear()
            if seat.is_ready:
                self._line.remove(seat)

    def ask(self, peer: Peer) -> None:
        """Have :meth:`Peer.answer` called soon."""
        if peer in self._seats:
            self._asking[peer] = None
            self._wake()

    @property
    def are_asking(self) -> bool:
        """Whether somebody waits for an answer."""
        return bool(self._asking)

    def give_answers(self) -> None:
        """Answer some of those who asked."""
        for _ in range(min(ANSWERS_PER_TURN_MAX, len(self._asking))):
            peer = next(iter(self._asking))
            del self._asking[peer]
            self._call(self._seats[peer], peer.answer, self._room)

    def __contains__(self, peer: Peer) -> bool:
        return peer in self._seats

    def _call(self, seat: Seat, call: Callable[..., None], *arguments: Any) -> None:
        """Call a peer; one that fails is let go, and nobody else notices."""
        if seat.is_gone:
            return
        try:
            call(*arguments)
        except Exception as failure:  # noqa: BLE001 - one peer's fault must not be the others'
            self._report(seat, failure)
            self._dismiss(seat, CrdtLlmError("something went wrong here: try again later"))

    def _dismiss(self, seat: Seat, error: CrdtLlmError) -> None:
        self.leave(seat.peer)
        self._let_go(seat, error)

    def _let_go(self, seat: Seat, error: CrdtLlmError) -> None:
        seat.is_gone = True
        seat.has_space.set()
        try:
            seat.peer.dismiss(error)
        except Exception as failure:  # noqa: BLE001 - as above
            self._report(seat, failure)

    def _report(self, seat: Seat, failure: Exception) -> None:
        principal = seat.peer.author.principal
        logger.error(
            "conversation %s, a peer of %s: %s", self._conversation, principal, one_line(failure)
        )


def _stranger() -> Forbidden:
    return Forbidden("forbidden", "you have no right in this conversation")
