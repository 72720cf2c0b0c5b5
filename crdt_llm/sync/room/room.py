"""A room: one conversation's replica, its log, and everyone who takes part.

This module owns the order in a conversation: what is checked when, that nothing leaves before it
is durable, and what happens when something goes wrong. It must not know frames, sockets or models;
whoever takes part is a :class:`~crdt_llm.sync.room.peer.Peer`, whatever wire it hangs on.

The sequence is here; each step is carried out by a part of the room: its ``seats`` (who is here,
whose turn it is, who is told what), its ``judge`` (a write before the replica and after), its
``replica`` (the document, and the way back), ``registered`` (its row and its epochs), ``restoring``
(what a loss leaves) and its ``upkeep`` (the log).

A room is one actor: one task, and turns. A turn is

    take a batch -> check each update -> one commit -> the register -> deliver, settle
    -> grant leases -> let in -> answer

Invariants:

I1. Between turns the replica holds exactly what is committed. Everything that a peer may see
    (updates of others, verdicts, answers to "what do I lack") is handed out there. Only presence
    is not durable and therefore not bound to this.
I2. The order of the log is the order of delivery, for every peer.
I3. A peer's updates are judged, and their verdicts handed out, in the order of its sending.
I4. An update is checked by its structure before the replica sees it, and by its meaning after. On
    a violation, or any exception, the replica goes back to what it was: a copy that nobody reads
    follows it for that, or is made from the log and from what this turn had accepted before.
I5. If a commit fails, the replica is made anew from the log, and whoever wrote is told to try
    again; who only listens notices nothing. If the log cannot be read, or the register not written,
    the room ends: every peer is told to try again, and whoever comes next gets a room that was
    loaded anew.
I6. The register follows the log: what a commit changed of its facts is durable there before
    anything of the turn is handed out. A token of a reply changes none.
I7. After a loss of the log what the register says counts: rights, what was withdrawn, what was
    admitted. Until the first lease that is granted after it, a peer's document may bring back what
    proves itself (:mod:`crdt_llm.sync.room.restore`); where it contradicts the register this room
    writes the correction in the same commit, so that what was withdrawn never reaches the log.
I8. An epoch is durable in the register before anybody hears of it, and it changes between turns:
    what a node wrote before it lost the lease and what it wrote after are told apart by nothing
    but the order of this room.
I9. What was withdrawn leaves the log's file too. That it is owed stands in the register before
    the withdrawal is acknowledged, and until the file was rewritten: a crash in between is made
    good by the next start.

Backpressure: a peer has a bounded number of updates without a verdict and waits for room beyond.
Peers take turns within a batch, so that one that floods does not keep the others of its
conversation waiting; between turns the room yields, so that other conversations go on.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any, Final

from crdt_llm.document.conversation import (
    ACCESS,
    EMPTY_STATE_VECTOR,
    EMPTY_UPDATE,
    META,
)
from crdt_llm.document.updates import merge
from crdt_llm.errors import (
    CrdtLlmError,
    LocalMisuse,
    MalformedMessage,
    Refused,
    Stopping,
    StoreFailed,
)
from crdt_llm.sync.room.awareness import Awareness
from crdt_llm.sync.room.judge import Judge
from crdt_llm.sync.room.registered import Registered
from crdt_llm.sync.room.replica import Dirty, Replica
from crdt_llm.sync.room.restoring import Restoring
from crdt_llm.sync.room.rights import right_of
from crdt_llm.sync.room.seats import ACCEPTED, Batch, Seat, Seats
from crdt_llm.sync.room.upkeep import Upkeep
from crdt_llm.sync.wire.verdict import (
    Denied,
    Known,
    Lacking,
    Postponed,
    one_line,
    reason_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from crdt_llm.document.conversation import Change, Conversation
    from crdt_llm.document.rules import Author
    from crdt_llm.document.schema import Grant
    from crdt_llm.store.log import UpdateLog
    from crdt_llm.store.register import Register
    from crdt_llm.sync.room.peer import Peer, Submission
    from crdt_llm.sync.room.refusal_rate import RefusalRate
    from crdt_llm.sync.room.scrubbing import Scrubber
    from crdt_llm.sync.wire.verdict import Verdict
    from crdt_llm.sync.wire.y_websocket import AwarenessState

logger = logging.getLogger("crdt_llm.sync")

BATCH_UPDATES_MAX: Final = 64
"""Updates in one turn: enough that a commit's cost is shared, few enough that a turn is short."""

BATCH_BYTES_MAX: Final = 1 << 20
"""Bytes after which a turn takes no further update; its cost grows with them."""

TURN_S_MAX: Final = 0.005
"""Seconds of checking after which a turn takes no further update: others wait for this thread."""

STORE_PAUSE_FIRST_S: Final = 0.25
STORE_PAUSE_MAX_S: Final = 4.0
"""Seconds without a write to the log after a second commit failed, and each time twice as many:
every attempt costs reading the document anew."""


class Room:
    """One conversation. Made and ended by a :class:`~crdt_llm.sync.relay.hub.Hub`.

    Args:
        conversation: Its id.
        log: Where it is durable.
        clock: Seconds, monotonic.
        random: Random bytes, for the replica's client id.
        committed: Called after every commit.
        ended: Called once, with the reason, when the room takes nobody in any more.
        register: Where its facts are durable beside the log.
        scrubber: Wipes the log's file.
        refusals: How often somebody may be refused before it waits.
        keeps_leases: Whether a node must hold the lease to write.
        relay_key: The relay's public key, that leases are signed with; ``None`` to believe any.
    """

    def __init__(  # noqa: PLR0913 - everything outside is an argument
        self,
        conversation: str,
        log: UpdateLog,
        *,
        clock: Callable[[], float],
        random: Callable[[int], bytes],
        committed: Callable[[str], None],
        ended: Callable[[Room, CrdtLlmError], None],
        register: Register,
        scrubber: Scrubber,
        refusals: RefusalRate,
        keeps_leases: bool = False,
        relay_key: bytes | None = None,
    ) -> None:
        self.id = conversation
        self.awareness = Awareness(clock)
        self._clock = clock
        self._committed = committed
        self._ended = ended
        self._wake = asyncio.Event()
        self._seats = Seats(
            self, conversation, self.awareness, refusals, wake=self._wake.set, clock=clock
        )
        self._upkeep = Upkeep(conversation, log, scrubber, self._wake.set)
        self._replica = Replica(conversation, self._upkeep, random)
        clients: dict[int, str] = {}
        self._restoring = Restoring(conversation, relay_key, clients)
        self._registered = Registered(
            conversation,
            register,
            log.log_id,
            replica=self._replica,
            upkeep=self._upkeep,
            restoring=self._restoring,
            clients=clients,
        )
        self._judge = Judge(
            conversation,
            self._replica,
            self._registered,
            self._restoring,
            keeps_leases=keeps_leases,
            relay_key=relay_key,
        )
        self._failed_commits = 0  # in a row
        self._commits_again_at = clock()  # the log is not written to before that
        self._in_turn = False  # the replica holds something that is not durable yet
        self._is_resting = False  # the actor waits for something to do
        self._stopping = False
        self._over: CrdtLlmError | None = None
        self._task = asyncio.get_running_loop().create_task(self._run(), name=f"room {self.id}")

    # -- for peers -----------------------------------------------------------------------------

    async def enter(self, peer: Peer) -> None:
        """Let a peer in, once the room is loaded and between two turns.

        Raises:
            Forbidden: It has no right here.
            Corrupt: What is stored of the conversation is damaged.
            Unavailable: The room cannot be loaded now, or is about to end.
        """
        self._check_open()
        await self._seats.enter(peer)

    def leave(self, peer: Peer) -> None:
        """Let a peer go. What it handed over before is still carried out. Safe to call twice."""
        self._seats.leave(peer)

    async def submit(self, submission: Submission) -> None:
        """Hand over an update; waits while the peer has too many without a verdict.

        If the peer was let go meanwhile, or the room is about to end, nothing happens: the peer
        was dismissed, or is about to be.
        """
        seat = await self._seats.space_for(submission)
        if seat is not None and not self._stopping:
            self._seats.put(seat, submission)

    def ask(self, peer: Peer) -> None:
        """Have :meth:`Peer.answer` called between two turns."""
        self._seats.ask(peer)

    def say(self, peer: Peer, states: Iterable[AwarenessState]) -> None:
        """Take a peer's presence, and share what is new in it with everyone, the peer included."""
        if peer in self._seats:
            self.share_presence(self.awareness.receive(peer, states))

    def share_presence(self, states: tuple[AwarenessState, ...]) -> None:
        """Tell everyone who is here, or went."""
        self._seats.share_presence(states)

    def state_vector(self, author: Author | None = None) -> bytes:
        """What is committed, as a state vector. Only between turns (I1).

        Args:
            author: Whom it is for. Of its own entries that somebody else brought back it says
                nothing, so that it sends them and thereby confirms them.
        """
        committed = self._settled_document().state_vector()
        return committed if author is None else self._restoring.asking(committed, author)

    def diff(self, state_vector: bytes = EMPTY_STATE_VECTOR) -> bytes:
        """What is committed and not in ``state_vector``. Only between turns (I1)."""
        return self._settled_document().diff(state_vector)

    def since(self, lsn: int) -> bytes | None:
        """What was committed after ``lsn``; ``None`` if not all of it is at hand (see ``diff``)."""
        updates = self._upkeep.since(lsn)
        if updates is None:
            return None
        return merge(updates) if updates else EMPTY_UPDATE

    def grant_of(self, author: Author) -> Grant | None:
        """What somebody may do here as things are. Only between turns (I1)."""
        self._settled_document()
        return right_of(self._registered.rights, author)

    def read(self, question: Callable[[Conversation], Any]) -> Any:
        """What a pure function of the replica says. Only between turns (I1)."""
        return question(self._settled_document())

    @property
    def lsn(self) -> int:
        """The place of what was committed last in the log."""
        return self._upkeep.lsn

    @property
    def epoch(self) -> int:
        """The epoch of the lease that was granted last; 0 before the first one."""
        return self._registered.epoch

    @property
    def behind(self) -> tuple[str, ...]:
        """Admitted entries that were lost; while there are any, no lease is granted."""
        return self._registered.behind

    async def grant_epoch(self, node_key: bytes) -> int:
        """Give a node the right to act here, and fence off the one before.

        Whoever is granted the lease is another's to say; here it gets its number. The number stays
        as long as the holder does; it grows with every other one, and with the first one after a
        loss of the log. It is durable before this returns, and every update that is checked
        afterwards must have been written under it.

        Args:
            node_key: The node's public key, 32 bytes.

        Raises:
            Behind: Something that was admitted is lost, and a replica that has it must come first.
            Unavailable: There is no birth yet, the register failed, or the room ended meanwhile.
        """
        self._check_open()
        granting = self._registered.ask(node_key)
        self._wake.set()
        return await granting

    def _check_open(self) -> None:
        if self._over is not None:
            raise self._over.with_traceback(None)
        if self._stopping:
            raise Stopping("the conversation is being closed: come back soon")

    def _settled_document(self) -> Conversation:
        if self._in_turn:
            raise LocalMisuse("a room's state was read while some of it was not durable")
        return self._replica.document

    # -- for the hub ---------------------------------------------------------------------------

    @property
    def idle_since(self) -> float:
        """When somebody went last, or the room was made."""
        return self._seats.left_at

    @property
    def is_idle(self) -> bool:
        """Whether nobody is here and nothing is going on."""
        expected = not self._seats.are_empty or self._wake.is_set()
        return self._is_resting and not expected and not self._upkeep.is_scrubbing

    def nudge(self) -> None:
        """Have another look at what is owed; called every few seconds."""
        row = self._registered.row
        if row is not None and row.scrub_owed:
            self._wake.set()

    async def stop(self) -> None:
        """Carry out what was handed over, then end."""
        self._stopping = True
        self._wake.set()
        await asyncio.wait([self._task])

    # -- the actor -----------------------------------------------------------------------------

    async def _run(self) -> None:
        error: CrdtLlmError = Stopping("the server is restarting: come back soon")
        try:
            await self._load()
            while self._seats.have_writes or not self._stopping:
                self._is_resting = True
                await self._wake.wait()
                self._is_resting = False
                self._wake.clear()
                await self._turn()
                if self._wake.is_set():
                    # A room that always has something to do must not keep the thread.
                    await asyncio.sleep(0)
        except CrdtLlmError as failure:
            logger.error("conversation %s: %s", self.id, one_line(failure))  # noqa: TRY400 - one line an error
            error = failure
        except (asyncio.CancelledError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as failure:  # noqa: BLE001 - ours or the library's: it ends this room
            logger.critical("conversation %s: %s", self.id, one_line(failure))
            error = CrdtLlmError("something went wrong here: try again later")
            error.__cause__ = failure
        finally:
            self._end(error)

    async def _load(self) -> None:
        self._in_turn = True
        row = await self._registered.read()
        await self._replica.load()
        await self._registered.reconcile(row)
        self._in_turn = False
        self._wake.set()

    def _end(self, error: CrdtLlmError) -> None:
        self._over, self._stopping = error, True
        self._replica.unload()
        self._ended(self, error)
        self._registered.end(error)
        self._seats.end(error)

    async def _turn(self) -> None:
        self._in_turn = True
        batch = Batch()
        registered = self._registered
        try:
            was_noteworthy = registered.is_noteworthy
            self._seats.take_late(batch)
            await self._check_batch(batch)
            if batch.accepted:
                try:
                    await self._upkeep.append(batch.updates)
                    self._failed_commits = 0
                except StoreFailed as error:
                    await self._give_up(batch, error)
                    registered.is_noteworthy = was_noteworthy
            was_noteworthy = registered.is_noteworthy
            if batch.accepted or was_noteworthy:
                await self._note(batch)
        finally:
            self._in_turn = False
        self._hand_out(batch)
        if registered.is_asked:
            await registered.grant_asked()
        self._seats.let_in(self._may_be_here)
        self._seats.give_answers()
        if batch.accepted or was_noteworthy:
            self._committed(self.id)
        if batch.accepted and self._upkeep.is_compaction_due:
            await self._compact()
        await self._wipe_if_owed()
        self._replica.make_spare()
        if self._seats.have_writes or self._seats.are_asking:
            self._wake.set()

    # -- checking ------------------------------------------------------------------------------

    async def _check_batch(self, batch: Batch) -> None:
        until = self._clock() + TURN_S_MAX
        taken_bytes = 0
        while (taken := self._seats.take()) is not None:
            seat, submission, author = taken
            verdict = None
            if seat not in batch.refused:
                verdict = await self._decide(seat, submission, author, batch)
            if isinstance(verdict, Denied):
                principal, why = submission.peer.author.principal, reason_of(verdict.error)
                logger.info("conversation %s: %s was refused: %s", self.id, principal, why)
                if self._seats.hold_answer(seat, submission, verdict):
                    continue
                if not submission.peer.survives_refusal:
                    batch.refused[seat] = None
            batch.settled.append((seat, submission, verdict))
            taken_bytes += len(submission.update)
            if (
                len(batch.settled) >= BATCH_UPDATES_MAX
                or taken_bytes >= BATCH_BYTES_MAX
                or self._clock() >= until
            ):
                break

    async def _decide(  # noqa: PLR0911 - one each
        self, seat: Seat, submission: Submission, author: Author, batch: Batch
    ) -> Verdict:
        """I4. ``Committed`` is promised here and true after the commit."""
        judge, replica, registered = self._judge, self._replica, self._registered
        is_restore = judge.is_restore(submission, author)
        try:
            look = await judge.look(submission, author, is_restore=is_restore)
        except (Refused, MalformedMessage) as error:
            return Denied(error)
        if look.missing is not None:
            return Lacking(str(look.missing))
        if self._restoring.confirm(look.structure, author, registered.rights):
            registered.is_noteworthy = batch.restored = True
        mends = is_restore and self._restoring.may_mend(registered.row, replica.document)
        if not look.brings and not mends:
            return Known()
        pause_s = self._commits_again_at - self._clock()
        if pause_s > 0:
            return Postponed("the store does not take writes now", pause_s)
        try:
            if is_restore:
                batch.restored = True
                change = await judge.restore(submission, look, author)
            else:
                change = await judge.apply(submission, look, author)
        except Dirty as dirty:
            await replica.take_back(dirty.touched, batch.updates)
            return dirty.verdict
        replica.learn(look)
        if change.is_empty:
            return Known()
        replica.accept(change, look)
        if not is_restore:  # it has said whose the client ids are that it brought
            registered.bind(look.fresh, author)
        # A restore may have been corrected: then its sender has to hear of it like everyone else.
        batch.accepted.append((Seat(seat.peer) if is_restore else seat, change))
        return ACCEPTED

    # -- the log and the register --------------------------------------------------------------

    async def _give_up(self, batch: Batch, error: StoreFailed) -> None:
        """I5. Nothing of a batch is durable, and every verdict in it may rest on the rest of it.

        Raises:
            StoreFailed: The room cannot go on: the log does not say what it has, or has more than
                it said; or what a restore has left in memory cannot be told from what was there.
        """
        lsn = self.lsn
        if batch.restored or self._restoring.is_going_on:
            raise error
        await self._replica.load()
        if self.lsn != lsn:
            raise error
        logger.error("conversation %s: %s", self.id, one_line(error))
        self._registered.unbind()
        self._failed_commits += 1
        pause_s = min(STORE_PAUSE_FIRST_S * 2 ** (self._failed_commits - 1), STORE_PAUSE_MAX_S)
        if self._failed_commits > 1:  # the first may have been an accident
            self._commits_again_at = self._clock() + pause_s
        postponed = Postponed(reason_of(error), pause_s)
        batch.settled[batch.late :] = [
            (seat, submission, postponed) for seat, submission, _ in batch.settled[batch.late :]
        ]
        batch.accepted.clear()

    async def _note(self, batch: Batch) -> None:
        """I6."""
        await self._registered.follow(change for _, change in batch.accepted)

    async def _compact(self) -> None:
        snapshot = self.diff()
        if await self._upkeep.compact(snapshot):
            self._replica.compacted(len(snapshot))

    async def _wipe_if_owed(self) -> None:
        """I9. The mark goes only when all that it stands for is wiped."""
        row = self._registered.row
        if row is not None and row.scrub_owed and await self._upkeep.wipe(self.diff):
            await self._registered.wiped()

    # -- handing out ---------------------------------------------------------------------------

    def _hand_out(self, batch: Batch) -> None:
        # Whoever just lost the right must not hear what came with or after that.
        if any(_touches_rights(change) for _, change in batch.accepted):
            self._seats.dismiss_all_but(self._may_be_here)
        if batch.accepted:
            self._seats.deliver(batch.accepted)
        self._seats.settle(batch, self.lsn)

    def _may_be_here(self, peer: Peer) -> bool:
        """Nobody has a right in a conversation without a birth, so anybody may give it one."""
        author = peer.author
        if author.node or peer.is_operator:
            return True
        if self._replica.document.id is None and self._registered.row is None:
            return True
        return right_of(self._registered.rights, author) is not None


def _touches_rights(change: Change) -> bool:
    return any(
        edit.root == ACCESS or (edit.root == META and edit.key == "birth") for edit in change.edits
    )
