"""A room: one conversation's replica, its log, and everyone who takes part.

This module owns the order in a conversation: what is checked when, that nothing leaves before it
is durable, and what happens when something goes wrong. It must not know frames, sockets or models;
whoever takes part is a :class:`Peer`, whatever wire it hangs on.

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
import functools
import logging
from abc import ABC, abstractmethod
from collections import deque
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from crdt_llm.document import rules
from crdt_llm.document.chain import lease_message
from crdt_llm.document.conversation import (
    ACCESS,
    EMPTY_STATE_VECTOR,
    EMPTY_UPDATE,
    LEASES,
    META,
    Shadow,
)
from crdt_llm.document.keys import verify
from crdt_llm.document.rules import Author
from crdt_llm.document.schema import Grant
from crdt_llm.document.updates import merge
from crdt_llm.errors import (
    BadProof,
    Behind,
    CrdtLlmError,
    Forbidden,
    Gap,
    LocalMisuse,
    MalformedMessage,
    Refused,
    Stopping,
    StoreFailed,
    TooLarge,
    Unavailable,
)
from crdt_llm.sync.room import ledger
from crdt_llm.sync.room.awareness import Awareness
from crdt_llm.sync.room.offload import offload
from crdt_llm.sync.room.restoring import Restoring
from crdt_llm.sync.room.rights import WRITERS, right_of
from crdt_llm.sync.room.upkeep import Upkeep
from crdt_llm.sync.update.growth import read_growth
from crdt_llm.sync.update.shape import Places, check_shape, fresh, hides
from crdt_llm.sync.update.structure import (
    DOCUMENT_LIMITS,
    HELD_LIMITS,
    TRANSACTION_LIMITS,
    UpdateStructure,
    brings,
    find_gap,
    find_rewrite,
    read_update,
)
from crdt_llm.sync.wire.verdict import (
    Committed,
    Denied,
    Known,
    Lacking,
    Postponed,
    one_line,
    reason_of,
)
from crdt_llm.sync.wire.y_websocket import (
    UPDATE_BYTES_MAX,
    decode_state_vector,
    encode_state_vector,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from crdt_llm.document.conversation import Change, Conversation
    from crdt_llm.store.log import UpdateLog
    from crdt_llm.store.register import Register, Row
    from crdt_llm.sync.room.refusal_rate import RefusalRate
    from crdt_llm.sync.room.scrubbing import Scrubber
    from crdt_llm.sync.update.structure import Id, Limits, Missing, Struct
    from crdt_llm.sync.wire.verdict import Verdict
    from crdt_llm.sync.wire.y_websocket import AwarenessState

logger = logging.getLogger("crdt_llm.sync")

BATCH_UPDATES_MAX: Final = 64
"""Updates in one turn: enough that a commit's cost is shared, few enough that a turn is short."""

BATCH_BYTES_MAX: Final = 1 << 20
"""Bytes after which a turn takes no further update; its cost grows with them."""

TURN_S_MAX: Final = 0.005
"""Seconds of checking after which a turn takes no further update: others wait for this thread."""

UNSETTLED_MAX: Final = 64
"""Updates of one peer that wait for a verdict: one turn's worth. Beyond it the peer waits."""

UNSETTLED_BYTES_MAX: Final = 1 << 20
"""Bytes of them; one larger update is taken alone."""

ANSWERS_PER_TURN_MAX: Final = 8
"""Answers may be whole documents: after a restart of the relay everyone asks at once."""

STORE_PAUSE_FIRST_S: Final = 0.25
STORE_PAUSE_MAX_S: Final = 4.0
"""Seconds without a write to the log after a second commit failed, and each time twice as many:
every attempt costs reading the document anew."""

DOCUMENT_BYTES_MAX: Final = UPDATE_BYTES_MAX - (64 << 10)
"""The largest document: it must fit one Step2, or nobody new could ever be brought up to date."""

NODE_RESERVE_BYTES: Final = 1 << 20
"""What of it only the node may fill: a reply that has begun must be able to end."""

DOCUMENT_SLACK_BYTES: Final = 64 << 10
"""How far below the limit the exact size must be found to go on without measuring each update."""

SPARE_BEHIND_MAX: Final = 64
"""Updates that the spare copy of a room's document may lag behind: joined, they cost like one."""


OWN_CLIENTS_FROM: Final = 0xFF000000
"""A room's client ids are among the greatest. Of values that were written at the same place the one
under the greatest id counts; so what a room puts right counts in every replica, also in one that
has something at the clocks that a forgery took here."""


@dataclass(frozen=True, slots=True, eq=False)
class Submission:
    """One update on its way through a room.

    Attributes:
        peer: Whose it is.
        update: A Yjs v1 update, unchecked.
        is_large: It may be as large as a document, not just as a transaction.
        may_restore: After a loss of the log it is taken as a restore: its peer was asked for all
            that it has, or offers what was acknowledged. Before one it is an update like any.
        tag: Whatever the peer wants to see again with the verdict.
        doubts: Believe a conversation that the register does not know, and say in this list what
            in it could not be verified. For an operator's import, never for a client.
    """

    peer: Peer
    update: bytes
    is_large: bool = False
    may_restore: bool = False
    tag: Any = None
    doubts: list[str] | None = None


class Delivery:
    """What one commit brought, as one update; frames made of it are made once for all peers."""

    __slots__ = ("_frames", "update")

    def __init__(self, update: bytes) -> None:
        self.update = update
        self._frames: dict[Callable[[bytes], bytes], bytes] = {}

    def frame(self, encode: Callable[[bytes], bytes]) -> bytes:
        """The update as a frame of some dialect."""
        frame = self._frames.get(encode)
        if frame is None:
            frame = self._frames[encode] = encode(self.update)
        return frame


class Peer(ABC):
    """Someone who takes part in a room. The room calls; every call returns at once.

    Args:
        principal: The authenticated name.
        node: Whether it acts as the conversation's node.
    """

    survives_refusal = False
    """Whether it may go on after a refusal. If not, what it sent after is never looked at."""

    survives_failure = False
    """Whether it may go on when what it wrote did not become durable. If not, it is dismissed."""

    address: str | None = None
    """Where it comes from; ``None`` inside this process."""

    is_operator = False
    """Whether it acts for whoever runs this relay: it may be in any room, without a right."""

    def __init__(self, principal: str, *, node: bool = False) -> None:
        self.author = Author(principal, node)

    @abstractmethod
    def entered(self, room: Room) -> None:
        """It is let in; the room's state may be read now."""

    @abstractmethod
    def settle(self, submission: Submission, verdict: Verdict, room: Room) -> None:
        """What became of an update; the room's state may be read now."""

    @abstractmethod
    def deliver(self, delivery: Delivery) -> None:
        """What others wrote is durable; all that one commit brought."""

    @abstractmethod
    def answer(self, room: Room) -> None:
        """The room's state may be read now, as the peer wished with :meth:`Room.ask`."""

    @abstractmethod
    def presence(self, states: tuple[AwarenessState, ...]) -> None:
        """Who is here, or went."""

    @abstractmethod
    def dismiss(self, error: CrdtLlmError) -> None:
        """The room is over for this peer. Nothing else is called after this."""


@dataclass(slots=True, eq=False)
class _Seat:
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
class _Batch:
    """What a turn has decided so far."""

    settled: list[tuple[_Seat, Submission, Verdict | None]] = field(default_factory=list)
    accepted: list[tuple[_Seat, Change]] = field(default_factory=list)
    refused: dict[_Seat, None] = field(default_factory=dict)  # in order: a seed must replay
    late: int = 0  # of what is settled, those that were judged in an earlier turn
    restored: bool = False  # something in it is a restore, or confirms one

    @property
    def updates(self) -> list[bytes]:
        return [change.update for _, change in self.accepted]


_ACCEPTED: Final = Committed(0)  # a promise; what is handed out names the LSN of the commit


@dataclass(frozen=True, slots=True)
class _Look:
    """What an update's structure says, given what is known.

    Attributes:
        structure: All of it.
        fresh: The clients that it has new clocks of, and the first clock after those.
        repeated: The clients that it has known clocks of, and the first of these.
        missing: What it builds on that is not known.
        brings: Whether it may change anything.
    """

    structure: UpdateStructure

    fresh: Mapping[int, int]
    repeated: Mapping[int, int]
    missing: Missing | None
    brings: bool


def _look_at(update: bytes, limits: Limits, known: Mapping[int, int], *, node: bool) -> _Look:
    """All that is asked of an update before the replica sees it; pure, so any thread may do it.

    Raises:
        MalformedMessage: No update.
        TooLarge: Over one of ``limits``.
        Refused: It writes where no reader of the document looks, so that no rule would see it.
    """
    structure = read_update(update, limits)
    check_shape(structure, known, node=node)
    fresh = {client: end for client, end in structure.ends.items() if end > known.get(client, 0)}
    repeated = {
        client: structs[0].clock
        for client, structs in structure.structs.items()
        if structs[0].clock < known.get(client, 0)
    }
    missing = find_gap(structure, known)
    return _Look(structure, fresh, repeated, missing, missing is None and brings(structure, known))


def _glance_at(update: bytes, known: Mapping[int, int]) -> _Look | None:
    """The same as :func:`_look_at`, of a reply's next words; ``None`` if an update is not that."""
    structure = read_growth(update, known)
    return _Look(structure, structure.ends, {}, None, brings=True) if structure else None


def _find_rewrite(structure: UpdateStructure, held: bytes) -> Id | None:
    return find_rewrite(structure, read_update(held, HELD_LIMITS))


class _Dirty(Exception):  # noqa: N818 - a signal inside this module
    """The replica holds something that was not accepted.

    Attributes:
        verdict: What its sender hears.
        touched: The entries that may have changed; ``None`` if nobody knows.
    """

    def __init__(self, verdict: Verdict, touched: frozenset[str] | None) -> None:
        super().__init__()
        self.verdict = verdict
        self.touched = touched


class _Undoing:
    """Whatever goes wrong inside, the replica is to be taken back; what else may end, ends.

    Args:
        conversation: Whose replica it is, for the log.
        change: What was done to it; ``None`` if nobody knows.
    """

    __slots__ = ("_change", "_conversation")

    def __init__(self, conversation: str, change: Change | None) -> None:
        self._conversation = conversation
        self._change = change

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: object
    ) -> None:
        if error is None or isinstance(error, _PASSING):
            return
        touched = self._change.entries if self._change is not None else None
        match error:
            case Gap():
                raise _Dirty(Lacking(str(error)), touched) from error
            case Refused() | MalformedMessage():
                raise _Dirty(Denied(error), touched) from error
            case _:  # the CRDT library panics with one of its own
                # An update that our checks cannot cope with: it would fail again each time.
                logger.error("conversation %s: %s", self._conversation, one_line(error))
                reason = Refused("unreadable", "this cannot be checked")
                raise _Dirty(Denied(reason), touched) from error


_PASSING: Final = (_Dirty, asyncio.CancelledError, KeyboardInterrupt, SystemExit)


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
        self.idle_since = clock()
        self._log_id = log.log_id
        self._clock = clock
        self._random = random
        self._committed = committed
        self._ended = ended
        self._register = register
        self._refusals = refusals
        self._keeps_leases = keeps_leases
        self._relay_key = relay_key
        self._row: Row | None = None  # as it is durable; None before there is a birth
        self._clients: dict[int, str] = {}  # client id -> whose it is, what is accepted included
        self._failed_commits = 0  # in a row
        self._commits_again_at = clock()  # the log is not written to before that
        self._is_noteworthy = False  # something beside the document changed since the row was saved
        self._behind: tuple[str, ...] = ()  # tips that the register has and the document lacks
        self._restoring = Restoring(conversation, relay_key, self._clients)
        self._late: deque[tuple[_Seat, Submission, Denied]] = deque()  # refusals that waited
        self._granting: deque[tuple[bytes, asyncio.Future[int]]] = deque()
        self._replica: Conversation | None = None
        self._known: dict[int, int] = {}  # the replica's state vector
        self._deletions: Mapping[int, Sequence[range]] | None = (
            None  # the replica's, when asked for
        )
        self._document_bytes = 0  # at least the size of the document
        self._spare: Shadow | None = None  # a copy of the replica, from the first refusal on
        # Every struct of the document, from the first time on that it has to be searched.
        self._index: dict[int, list[Struct]] | None = None
        self._is_index_ahead = False  # it holds the update that is being checked
        self._ahead: list[bytes] = []  # what the replica has and the copy lacks
        self._wants_spare = False
        self._seats: dict[Peer, _Seat] = {}
        self._entering: dict[Peer, asyncio.Future[None]] = {}
        self._asking: dict[Peer, None] = {}
        self._line: deque[_Seat] = deque()  # seats with something to check, each once
        self._wake = asyncio.Event()
        self._upkeep = Upkeep(conversation, log, scrubber, self._wake.set)
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
        if self._over is not None:
            raise self._over.with_traceback(None)
        if self._stopping:
            raise Stopping("the conversation is being closed: come back soon")
        entering: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._entering[peer] = entering
        self._wake.set()
        try:
            await entering
        except BaseException:
            self.leave(peer)
            raise

    def leave(self, peer: Peer) -> None:
        """Let a peer go. What it handed over before is still carried out. Safe to call twice."""
        self._entering.pop(peer, None)
        self._asking.pop(peer, None)
        seat = self._seats.pop(peer, None)
        if seat is None:
            return
        logger.debug("conversation %s: %s went", self.id, peer.author.principal)
        seat.is_gone = True
        seat.has_space.set()
        self.share_presence(self.awareness.leave(peer))
        self.idle_since = self._clock()

    async def submit(self, submission: Submission) -> None:
        """Hand over an update; waits while the peer has too many without a verdict.

        If the peer was let go meanwhile, or the room is about to end, nothing happens: the peer
        was dismissed, or is about to be.
        """
        seat = self._seats.get(submission.peer)
        size = len(submission.update)
        while seat is not None and seat.unsettled > 0:
            fits = seat.unsettled_bytes + size <= UNSETTLED_BYTES_MAX
            if seat.is_gone or (seat.unsettled < UNSETTLED_MAX and fits):
                break
            seat.has_space.clear()
            await seat.has_space.wait()
        if seat is None or seat.is_gone or self._stopping:
            return
        seat.unsettled += 1
        seat.unsettled_bytes += size
        seat.queue.append((submission, submission.peer.author))
        self._stand_in_line(seat)

    def ask(self, peer: Peer) -> None:
        """Have :meth:`Peer.answer` called between two turns."""
        if peer in self._seats:
            self._asking[peer] = None
            self._wake.set()

    def say(self, peer: Peer, states: Iterable[AwarenessState]) -> None:
        """Take a peer's presence, and share what is new in it with everyone, the peer included."""
        if peer in self._seats:
            self.share_presence(self.awareness.receive(peer, states))

    def share_presence(self, states: tuple[AwarenessState, ...]) -> None:
        """Tell everyone who is here, or went."""
        if states:
            for seat in tuple(self._seats.values()):
                self._call(seat, seat.peer.presence, states)

    def state_vector(self, author: Author | None = None) -> bytes:
        """What is committed, as a state vector. Only between turns (I1).

        Args:
            author: Whom it is for. Of its own entries that somebody else brought back it says
                nothing, so that it sends them and thereby confirms them.
        """
        committed = self._settled_replica().state_vector()
        return committed if author is None else self._restoring.asking(committed, author)

    def diff(self, state_vector: bytes = EMPTY_STATE_VECTOR) -> bytes:
        """What is committed and not in ``state_vector``. Only between turns (I1)."""
        return self._settled_replica().diff(state_vector)

    def since(self, lsn: int) -> bytes | None:
        """What was committed after ``lsn``; ``None`` if not all of it is at hand (see ``diff``)."""
        updates = self._upkeep.since(lsn)
        if updates is None:
            return None
        return merge(updates) if updates else EMPTY_UPDATE

    def grant_of(self, author: Author) -> Grant | None:
        """What somebody may do here as things are. Only between turns (I1)."""
        self._settled_replica()
        return right_of(self._rights, author)

    def read(self, question: Callable[[Conversation], Any]) -> Any:
        """What a pure function of the replica says. Only between turns (I1)."""
        return question(self._settled_replica())

    @property
    def lsn(self) -> int:
        """The place of what was committed last in the log."""
        return self._upkeep.lsn

    @property
    def epoch(self) -> int:
        """The epoch of the lease that was granted last; 0 before the first one."""
        return self._row.epoch if self._row is not None else 0

    @property
    def behind(self) -> tuple[str, ...]:
        """Admitted entries that were lost; while there are any, no lease is granted."""
        return self._behind

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
        if self._over is not None:
            raise self._over.with_traceback(None)
        if self._stopping:
            raise Stopping("the conversation is being closed: come back soon")
        granting: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._granting.append((node_key, granting))
        self._wake.set()
        return await granting

    # -- for the hub ---------------------------------------------------------------------------

    @property
    def is_idle(self) -> bool:
        """Whether nobody is here and nothing is going on."""
        expected = self._seats or self._entering or self._wake.is_set()
        return self._is_resting and not expected and not self._upkeep.is_scrubbing

    def nudge(self) -> None:
        """Have another look at what is owed; called every few seconds."""
        if self._row is not None and self._row.scrub_owed:
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
            while self._line or not self._stopping:
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

    def _end(self, error: CrdtLlmError) -> None:
        self._over, self._stopping, self._replica = error, True, None
        self._ended(self, error)
        for entering in self._entering.values():
            if not entering.done():
                entering.set_exception(error)
        self._entering.clear()
        for _, granting in self._granting:
            if not granting.done():
                granting.set_exception(error)
                granting.exception()  # whoever waits hears of it
        self._granting.clear()
        seats, self._seats = tuple(self._seats.values()), {}
        for seat in seats:
            self._let_go(seat, error)

    async def _turn(self) -> None:
        self._in_turn = True
        batch = _Batch()
        try:
            was_noteworthy = self._is_noteworthy
            self._take_late(batch)
            await self._check_batch(batch)
            if batch.accepted:
                try:
                    await self._upkeep.append(batch.updates)
                    self._failed_commits = 0
                except StoreFailed as error:
                    await self._give_up(batch, error)
                    self._is_noteworthy = was_noteworthy
            was_noteworthy = self._is_noteworthy
            if batch.accepted or was_noteworthy:
                await self._note(batch)
        finally:
            self._in_turn = False
        self._hand_out(batch)
        if self._granting:
            await self._grant_epochs()
        self._let_in()
        self._give_answers()
        if batch.accepted or was_noteworthy:
            self._committed(self.id)
        if batch.accepted and self._upkeep.is_compaction_due:
            await self._compact()
        await self._wipe_if_owed()
        self._make_spare()
        if self._line or self._asking:
            self._wake.set()

    def _stand_in_line(self, seat: _Seat) -> None:
        if not seat.is_ready and not seat.is_held:
            seat.is_ready = True
            self._line.append(seat)
            self._wake.set()

    # -- checking ------------------------------------------------------------------------------

    async def _check_batch(self, batch: _Batch) -> None:
        until = self._clock() + TURN_S_MAX
        taken_bytes = 0
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
            verdict = None
            if seat not in batch.refused:
                verdict = await self._judge(seat, submission, author, batch)
            if isinstance(verdict, Denied):
                principal, why = submission.peer.author.principal, reason_of(verdict.error)
                logger.info("conversation %s: %s was refused: %s", self.id, principal, why)
                if self._hold_answer(seat, submission, verdict):
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

    def _hold_debtor(self, seat: _Seat) -> bool:
        """Let whoever was refused too often wait before it is listened to again."""
        peer = seat.peer
        wait = 0.0 if peer.author.node else self._refusals.debt(peer.author.principal, peer.address)
        if wait > 0:
            seat.is_held = True
            self._refusals.later(wait, functools.partial(self._release, seat))
        return wait > 0

    def _hold_answer(self, seat: _Seat, submission: Submission, verdict: Denied) -> bool:
        """Keep a refusal back, and with it all that its peer sent after."""
        peer = seat.peer
        if peer.author.node:  # one that lost its lease has done no wrong
            return False
        wait = self._refusals.refused(peer.author.principal, peer.address, self.id)
        if wait > 0:
            seat.is_held = True
            late = (seat, submission, verdict)
            self._refusals.later(wait, functools.partial(self._tell_late, *late))
        return wait > 0

    def _tell_late(self, seat: _Seat, submission: Submission, verdict: Denied) -> None:
        self._late.append((seat, submission, verdict))
        self._wake.set()

    def _release(self, seat: _Seat) -> None:
        seat.is_held = False
        if seat.queue:
            self._stand_in_line(seat)

    def _take_late(self, batch: _Batch) -> None:
        """The refusals that were kept back long enough."""
        while self._late:
            seat, submission, verdict = self._late.popleft()
            batch.settled.append((seat, submission, verdict))
            batch.late += 1
            if submission.peer.survives_refusal:
                self._release(seat)
            else:
                batch.refused[seat] = None

    async def _judge(  # noqa: PLR0911 - one each
        self, seat: _Seat, submission: Submission, author: Author, batch: _Batch
    ) -> Verdict:
        """I4. ``Committed`` is promised here and true after the commit."""
        is_restore = self._is_restore(submission, author)
        try:
            look = await self._look(submission, author, is_restore=is_restore)
        except (Refused, MalformedMessage) as error:
            return Denied(error)
        if look.missing is not None:
            return Lacking(str(look.missing))
        if self._restoring.confirm(look.structure, author, self._rights):
            self._is_noteworthy = batch.restored = True
        mends = is_restore and self._restoring.may_mend(self._row, self._loaded_replica())
        if not look.brings and not mends:
            return Known()
        pause_s = self._commits_again_at - self._clock()
        if pause_s > 0:
            return Postponed("the store does not take writes now", pause_s)
        try:
            if is_restore:
                batch.restored = True
                change = await self._restore(submission, look, author)
            else:
                change = await self._apply(submission, look, author)
        except _Dirty as dirty:
            await self._take_back(dirty.touched, batch.updates)
            return dirty.verdict
        self._extend_index(look, self._known)
        self._known.update(look.fresh)
        if change.is_empty:
            return Known()
        self._accept(change, look, None if is_restore else author)
        # A restore may have been corrected: then its sender has to hear of it like everyone else.
        batch.accepted.append((_Seat(seat.peer) if is_restore else seat, change))
        return _ACCEPTED

    def _accept(self, change: Change, look: _Look, author: Author | None) -> None:
        if self._spare is not None:
            self._ahead.append(change.update)
            if len(self._ahead) >= SPARE_BEHIND_MAX:
                self._follow()
        if look.structure.deleted:
            self._deletions = None
        for client in look.fresh:
            if client not in self._clients and author is not None:
                self._clients[client] = ledger.clients_of(author.principal, node=author.node)
                self._is_noteworthy = True
        self._document_bytes += len(change.update)

    def _is_restore(self, submission: Submission, author: Author) -> bool:
        if submission.doubts is not None and self._row is None:
            return True
        return self._restoring.is_going_on and submission.may_restore and not author.node

    async def _look(self, submission: Submission, author: Author, *, is_restore: bool) -> _Look:
        """The checks that need nothing applied. What is known does not change meanwhile.

        Raises:
            MalformedMessage: No update.
            Refused: It must not be applied.
        """
        update, known = submission.update, self._known
        look = _glance_at(update, known)
        if look is None:
            limits = DOCUMENT_LIMITS if submission.is_large else TRANSACTION_LIMITS
            node = author.node or is_restore
            look_at = functools.partial(_look_at, update, limits, known, node=node)
            look = await offload(len(update), look_at)
        if not is_restore:
            self._check_clients(look.fresh, author)
        if look.fresh and not is_restore and not self._may_write(author):
            raise Forbidden("forbidden", "you may not write in this conversation")
        if look.repeated:
            since = encode_state_vector({**known, **look.repeated})
            held = self._loaded_replica().diff(since)
            find = functools.partial(_find_rewrite, look.structure, held)
            rewritten = await offload(len(update) + len(held), find)
            if rewritten is not None:
                raise Refused(
                    "rewrite",
                    f"client {rewritten.client} wrote something else at clock {rewritten.clock}:"
                    " this replica must be discarded",
                )
        if look.brings and not look.fresh:
            deleted = await self._held_deletions()
            return replace(look, brings=brings(look.structure, known, deleted))
        return look

    async def _held_deletions(self) -> Mapping[int, Sequence[range]]:
        """What is known to be deleted; what an update overwrote since may be missing in it."""
        if self._deletions is None:
            replica = self._loaded_replica()
            held = replica.diff(replica.state_vector())
            read = functools.partial(read_update, held, HELD_LIMITS)
            self._deletions = (await offload(len(held), read)).deleted
        return self._deletions

    def _may_write(self, author: Author) -> bool:
        """Whether somebody's update is worth applying: the rules say the rest."""
        replica = self._loaded_replica()
        if author.node or replica.id is None:
            return True
        return right_of(self._rights, author) in WRITERS

    def _check_clients(self, fresh: Iterable[int], author: Author) -> None:
        """Whose a client id is was settled by its first accepted use."""
        own = ledger.clients_of(author.principal, node=author.node)
        for client in fresh:
            if self._clients.get(client, own) != own or client == self._loaded_replica().client_id:
                raise Refused("forged-client", f"client id {client} is somebody else's")

    def _merge(self, update: bytes) -> Change:
        """Apply an update; one that does not apply leaves the replica's readings as they were."""
        with self._undoing(None):
            try:
                return self._loaded_replica().apply(update)
            except MalformedMessage as error:
                raise _Dirty(Denied(error), frozenset()) from error

    def _undoing(self, change: Change | None) -> _Undoing:
        return _Undoing(self.id, change)

    async def _take_back(self, touched: frozenset[str] | None, accepted: Sequence[bytes]) -> None:
        """I4. Costs what was touched, while there is a spare copy."""
        if self._is_index_ahead:
            self._index, self._is_index_ahead = None, False
        if touched is None:
            await self._rebuild(accepted)
            return
        spare = self._spare
        if spare is None:
            spare = await self._upkeep.shadow(self._new_client_id(), accepted)
        else:
            self._follow()
        self._spare = None
        self._ahead.clear()
        self._loaded_replica().revert(spare, touched)
        self._wants_spare = True

    def _follow(self) -> None:
        if self._spare is not None and self._ahead:
            self._spare.apply(merge(self._ahead))
            self._ahead.clear()

    def _make_spare(self) -> None:
        """Have a copy at hand for the next refusal; rooms without one never have it."""
        if self._wants_spare:
            self._wants_spare = False
            self._spare = Shadow(self._new_client_id(), self.diff())

    def _new_client_id(self) -> int:
        return OWN_CLIENTS_FROM | int.from_bytes(self._random(3), "big")

    async def _apply(self, submission: Submission, look: _Look, author: Author) -> Change:
        replica = self._loaded_replica()
        epoch = self.epoch if self._keeps_leases else None
        change = self._merge(submission.update)
        with self._undoing(change):
            rules.check(change, replica, conversation_id=self.id, author=author, epoch=epoch)
            self._check_leases(change)
            self._restoring.check_confirmed(change)
            if not author.node and hides(look.structure, self._known, change):
                await self._check_places(look.structure, change, author)
            self._check_size(len(change.update), author)
        return change

    async def _restore(self, submission: Submission, look: _Look, author: Author) -> Change:
        """I7."""
        replica = self._loaded_replica()
        before = replica.state_vector()
        change = self._merge(submission.update)
        with self._undoing(change):
            claim = await self._restoring.judge(
                replica,
                change,
                look.structure,
                row=self._row,
                author=author,
                known=self._known,
                doubts=submission.doubts,
            )
        with self._undoing(None):
            fixed = self._restoring.correct(claim)
            if fixed:
                # Joined anew: what was withdrawn is collected, and reaches neither log nor peers.
                update = replica.diff(before)
                change = replace(change, update=update, edits=(*change.edits, *fixed))
                self._clients[replica.client_id] = ledger.ROOMS_OWN
            self._check_size(len(change.update), author)
        self._known = decode_state_vector(replica.state_vector())
        self._deletions = self._index = None
        self._clients.update(self._restoring.remember(claim))
        # Only what changes the register is worth a line there.
        self._is_noteworthy = True
        return change

    async def _check_places(
        self, structure: UpdateStructure, change: Change, author: Author
    ) -> None:
        replica = self._loaded_replica()
        if self._index is None:
            whole = replica.diff()
            read = functools.partial(read_update, whole, HELD_LIMITS)
            self._index = {
                client: list(structs)
                for client, structs in (await offload(len(whole), read)).structs.items()
            }
            self._is_index_ahead = True
        Places(
            structure=structure,
            known=self._known,
            held=UpdateStructure(self._index, {}),
            added={edit.key for edit in change.edits if not edit.path and edit.key is not None},
            is_entry=replica.tree.__contains__,
            meta=replica.meta_plain(),
            principal=author.principal,
            owner=right_of(replica, author) is Grant.OWNER,
        ).check()

    def _extend_index(self, look: _Look, before: Mapping[int, int]) -> None:
        """Follow what was accepted, so that the document is read once and not for each update."""
        if self._index is None or self._is_index_ahead:
            self._is_index_ahead = False
            return
        for item in fresh(look.structure, before):
            if item.clock < before.get(item.client, 0):  # in part known: rare enough to read anew
                self._index = None
                return
            self._index.setdefault(item.client, []).append(item)

    def _check_leases(self, change: Change) -> None:
        """A lease that is recorded is the one that was granted: others verify proofs by it."""
        if self._relay_key is None or not self._keeps_leases:
            return
        for edit in change.edits:
            if edit.root == LEASES and self._row is not None:
                node, signature = edit.new["node"], edit.new["signature"]
                try:
                    verify(
                        self._relay_key, signature, lease_message(self.id, int(edit.key or 0), node)
                    )
                except BadProof as error:
                    raise Refused("leases", "this relay has not signed that lease") from error
                if node != self._row.holder:
                    raise Refused("leases", "a node records the lease of its own key")

    def _check_size(self, added: int, author: Author) -> None:
        limit = DOCUMENT_BYTES_MAX - (0 if author.node else NODE_RESERVE_BYTES)
        if self._document_bytes + added <= limit:
            return
        # What was added up counts what has since been deleted or collected: measure.
        exact = len(self._loaded_replica().diff())
        if exact + DOCUMENT_SLACK_BYTES > limit:
            raise TooLarge("document-too-large", f"a conversation has at most {limit} bytes")
        self._document_bytes = exact - added

    # -- the log -------------------------------------------------------------------------------

    async def _give_up(self, batch: _Batch, error: StoreFailed) -> None:
        """I5. Nothing of a batch is durable, and every verdict in it may rest on the rest of it.

        Raises:
            StoreFailed: The room cannot go on: the log does not say what it has, or has more than
                it said; or what a restore has left in memory cannot be told from what was there.
        """
        lsn = self.lsn
        if batch.restored or self._restoring.is_going_on:
            raise error
        await self._rebuild([])
        if self.lsn != lsn:
            raise error
        logger.error("conversation %s: %s", self.id, one_line(error))
        self._clients.clear()
        if self._row is not None:
            self._clients.update(self._row.clients)
        self._failed_commits += 1
        pause_s = min(STORE_PAUSE_FIRST_S * 2 ** (self._failed_commits - 1), STORE_PAUSE_MAX_S)
        if self._failed_commits > 1:  # the first may have been an accident
            self._commits_again_at = self._clock() + pause_s
        postponed = Postponed(reason_of(error), pause_s)
        batch.settled[batch.late :] = [
            (seat, submission, postponed) for seat, submission, _ in batch.settled[batch.late :]
        ]
        batch.accepted.clear()

    async def _load(self) -> None:
        self._in_turn = True
        row = await self._register.load(self.id)
        await self._rebuild([])
        replica = self._loaded_replica()
        if row is None:
            # The log is the relay's own, so it may be believed.
            current = ledger.first_row(replica)
        else:
            self._clients.update(row.clients)
            self._behind = ledger.missing_tips(row, replica)
            # A log that ends before what it is known to have held has lost its end.
            cut = row.log_id != self._log_id or self.lsn < row.lsn
            self._restoring.is_going_on = cut or bool(self._behind) or replica.id is None
            await self._restoring.load(row, replica)
            current = row if self._restoring.is_going_on else ledger.reconciled(row, replica)
        if current is not None and current.scrub_owed:
            self._upkeep.owe()
        if current is not None and current is not row:
            current = replace(current, log_id=self._log_id, lsn=self.lsn)
            await self._register.save(current)
        self._row = current
        self._in_turn = False
        self._wake.set()

    async def _note(self, batch: _Batch) -> None:
        """I6."""
        replica, row = self._loaded_replica(), self._row
        if row is None:
            row = ledger.first_row(replica)
        else:
            for _, change in batch.accepted:
                if not ledger.concerns(change):
                    continue
                row = ledger.follow(row, change, replica)
                if ledger.withdraws(change):
                    row = replace(row, scrub_owed=True)
                    self._upkeep.owe()
        if row is None or (row is self._row and not self._is_noteworthy):
            return
        waiting = MappingProxyType(self._restoring.waiting)
        clients = MappingProxyType(dict(self._clients))
        await self._save(replace(row, clients=clients, unconfirmed=waiting))
        self._is_noteworthy = False
        if self._behind:
            self._behind = ledger.missing_tips(row, replica)

    async def _save(self, row: Row) -> None:
        if not self._restoring.is_going_on:
            row = replace(row, log_id=self._log_id, lsn=self.lsn)
        await self._register.save(row)
        self._row = row

    async def _grant_epochs(self) -> None:
        """I8."""
        while self._granting:
            node_key, granting = self._granting[0]
            row = self._row
            if granting.done():  # nobody waits for it any more
                pass
            elif row is None or self._loaded_replica().id is None:
                granting.set_exception(Unavailable("this conversation has no birth yet"))
            elif self._behind:
                granting.set_exception(Behind("a replica with what was lost must come first"))
            else:
                if row.holder != node_key or row.epoch == 0 or self._restoring.is_going_on:
                    self._restoring.is_going_on = False
                    await self._save(replace(row, epoch=row.epoch + 1, holder=node_key))
                if not granting.done():
                    granting.set_result(self.epoch)
            self._granting.popleft()

    async def _rebuild(self, accepted: Sequence[bytes]) -> None:
        """Make the replica anew from the log and what this turn has accepted."""
        replica = await self._upkeep.load(self._new_client_id(), accepted)
        self._replica, self._deletions, self._spare = replica, None, None
        self._ahead.clear()
        self._index, self._is_index_ahead = None, False
        self._known = decode_state_vector(replica.state_vector())
        self._document_bytes = self._upkeep.stored_bytes + sum(len(update) for update in accepted)

    async def _compact(self) -> None:
        snapshot = self.diff()
        if await self._upkeep.compact(snapshot):
            self._document_bytes = len(snapshot)

    async def _wipe_if_owed(self) -> None:
        """I9. The mark goes only when all that it stands for is wiped."""
        row = self._row
        if row is not None and row.scrub_owed and await self._upkeep.wipe(self.diff):
            await self._save(replace(row, scrub_owed=False))

    # -- handing out ---------------------------------------------------------------------------

    def _hand_out(self, batch: _Batch) -> None:
        # Whoever just lost the right must not hear what came with or after that.
        if any(_touches_rights(change) for _, change in batch.accepted):
            self._check_rights()
        if batch.accepted:
            self._deliver(batch)
        for seat, submission, verdict in batch.settled:
            seat.unsettled -= 1
            seat.unsettled_bytes -= len(submission.update)
            seat.has_space.set()
            if isinstance(verdict, Postponed) and not seat.peer.survives_failure:
                if not seat.is_gone:
                    self._dismiss(seat, StoreFailed(verdict.reason))
                batch.refused[seat] = None
            elif verdict is not None:
                final = Committed(self.lsn) if verdict is _ACCEPTED else verdict
                self._call(seat, seat.peer.settle, submission, final, self)
        for seat in batch.refused:
            self.leave(seat.peer)
            seat.queue.clear()
            if seat.is_ready:
                self._line.remove(seat)

    def _deliver(self, batch: _Batch) -> None:
        authors = {seat for seat, _ in batch.accepted}
        for_readers = Delivery(merge(batch.updates))
        for seat in tuple(self._seats.values()):
            if seat not in authors:
                self._call(seat, seat.peer.deliver, for_readers)
            elif len(authors) > 1:
                others = [change.update for author, change in batch.accepted if author is not seat]
                self._call(seat, seat.peer.deliver, Delivery(merge(others)))

    def _let_in(self) -> None:
        entering, self._entering = self._entering, {}
        for peer, waiter in entering.items():
            if waiter.done():
                continue
            if not self._may_be_here(peer):
                waiter.set_exception(_stranger())
                continue
            seat = self._seats[peer] = _Seat(peer)
            logger.debug("conversation %s: %s came", self.id, peer.author.principal)
            self._call(seat, peer.entered, self)
            waiter.set_result(None)

    def _give_answers(self) -> None:
        for _ in range(min(ANSWERS_PER_TURN_MAX, len(self._asking))):
            peer = next(iter(self._asking))
            del self._asking[peer]
            self._call(self._seats[peer], peer.answer, self)

    def _may_be_here(self, peer: Peer) -> bool:
        """Nobody has a right in a conversation without a birth, so anybody may give it one."""
        replica, author = self._loaded_replica(), peer.author
        if author.node or peer.is_operator:
            return True
        if replica.id is None and self._row is None:
            return True
        return right_of(self._rights, author) is not None

    def _check_rights(self) -> None:
        for seat in tuple(self._seats.values()):
            if not self._may_be_here(seat.peer):
                self._dismiss(seat, _stranger())

    def _call(self, seat: _Seat, call: Callable[..., None], *arguments: Any) -> None:
        """Call a peer; one that fails is let go, and nobody else notices."""
        if seat.is_gone:
            return
        try:
            call(*arguments)
        except Exception as failure:  # noqa: BLE001 - one peer's fault must not be the others'
            self._report(seat, failure)
            self._dismiss(seat, CrdtLlmError("something went wrong here: try again later"))

    def _dismiss(self, seat: _Seat, error: CrdtLlmError) -> None:
        self.leave(seat.peer)
        self._let_go(seat, error)

    def _let_go(self, seat: _Seat, error: CrdtLlmError) -> None:
        seat.is_gone = True
        seat.has_space.set()
        try:
            seat.peer.dismiss(error)
        except Exception as failure:  # noqa: BLE001 - as above
            self._report(seat, failure)

    def _report(self, seat: _Seat, failure: Exception) -> None:
        principal = seat.peer.author.principal
        logger.error("conversation %s, a peer of %s: %s", self.id, principal, one_line(failure))

    @property
    def _rights(self) -> Conversation | Row:
        """What says who may do what: the document, or the register until it is whole (I7)."""
        if self._restoring.is_going_on and self._row is not None:
            return self._row
        return self._loaded_replica()

    def _loaded_replica(self) -> Conversation:
        if self._replica is None:
            raise LocalMisuse(f"the room of {self.id} is not loaded")
        return self._replica

    def _settled_replica(self) -> Conversation:
        if self._in_turn:
            raise LocalMisuse("a room's state was read while some of it was not durable")
        return self._loaded_replica()


def _touches_rights(change: Change) -> bool:
    return any(
        edit.root == ACCESS or (edit.root == META and edit.key == "birth") for edit in change.edits
    )


def _stranger() -> Forbidden:
    return Forbidden("forbidden", "you have no right in this conversation")
