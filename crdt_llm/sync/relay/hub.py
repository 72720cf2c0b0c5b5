"""The rooms of one process, by conversation id.

This module owns which rooms are open, who is told of commits, and the peers that live in this
process. It must not know sockets or frames.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Final, TypeVar, assert_never
from weakref import WeakKeyDictionary

from crdt_llm.document.schema import is_conversation_id
from crdt_llm.errors import (
    ConnectionLost,
    Corrupt,
    CrdtLlmError,
    Gap,
    LocalMisuse,
    Refused,
    Stopping,
    StoreFailed,
    Unavailable,
)
from crdt_llm.store.register import MemoryRegister
from crdt_llm.sync.relay.drafts import Drafts
from crdt_llm.sync.relay.metrics import MeasuredLog
from crdt_llm.sync.room.peer import Peer, Submission
from crdt_llm.sync.room.refusal_rate import RefusalRate
from crdt_llm.sync.room.room import Room
from crdt_llm.sync.room.scrubbing import Scrubber
from crdt_llm.sync.room.upkeep import replica_of
from crdt_llm.sync.wire.verdict import (
    NO_SUCH_CONVERSATION,
    Committed,
    Denied,
    Known,
    Lacking,
    Postponed,
    one_line,
)
from crdt_llm.sync.wire.y_websocket import AwarenessState

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from crdt_llm.document.conversation import Conversation
    from crdt_llm.store.log import Stored, UpdateLog
    from crdt_llm.store.register import Register, Row
    from crdt_llm.sync.relay.drafts import Listener
    from crdt_llm.sync.relay.metrics import Metrics
    from crdt_llm.sync.room.peer import Delivery
    from crdt_llm.sync.wire.verdict import Verdict

Result = TypeVar("Result")

logger = logging.getLogger("crdt_llm.sync")

ROOMS_MAX: Final = 1024
"""Rooms in memory; a usual document takes a few MB. Beyond it idle rooms go first,
then those that have no birth, with whoever is in them. If there are none, whoever comes is told to
try again."""

UNBORN_MAX: Final = 16
"""Rooms without a birth that one principal keeps open. Anybody may be in one, under a name that was
made up a moment ago; whoever creates a conversation needs it for as long as a round trip takes."""

IDLE_S: Final = 60.0
"""A room that nobody is in stays this long: a page that reloads is back within seconds."""


def _ignore(_: CrdtLlmError) -> None:
    """Nobody asked to hear of it."""


def _ignore_update(_: bytes) -> None:
    """Nobody asked to hear of it."""


class Membership(Peer):
    """A peer in this process, such as a node. Made by :meth:`Hub.join`.

    A refused update is refused whole, but the membership goes on; only the caller's own replica
    then holds what nobody else has, and must be made anew. When the commit of a write of its own
    failed, or the room ends (the process stops), every waiting :meth:`submit` raises, ``lost`` is
    called once with the same error, and the way on is to join again: ``state`` is then what
    survived.

    Attributes:
        state: The committed document at the moment of joining; ``deliver`` is called for all that
            comes after.
    """

    survives_refusal = True

    def __init__(
        self,
        principal: str,
        *,
        node: bool,
        deliver: Callable[[bytes], None],
        lost: Callable[[CrdtLlmError], None],
        drafts: Callable[[], Callable[[], None]] | None = None,
    ) -> None:
        super().__init__(principal, node=node)
        self.state = b""
        self._listen = drafts
        self._stop_listening: Callable[[], None] | None = None
        self._deliver = deliver
        self._lost = lost
        self._room: Room | None = None
        self._over: CrdtLlmError | None = None
        self._waiting: dict[asyncio.Future[Verdict], None] = {}

    async def submit(
        self, update: bytes, *, restore: bool = False, doubts: list[str] | None = None
    ) -> None:
        """Write. Returns when the update is durable (or was already); cancelling stops nothing.

        Args:
            update: What was written.
            restore: It is all that this peer had acknowledged.
            doubts: See :class:`~crdt_llm.sync.room.peer.Submission`.

        Raises:
            Refused: Against a rule; nothing of it is stored.
            MalformedMessage: No update.
            Gap: It builds on something that is not here: join again for the whole state.
            Unavailable: It is not durable: the commit failed (``StoreFailed``), the process stops
                (``Stopping``), or this membership is over (``ConnectionLost``).
        """
        if self._over is not None:
            raise self._over.with_traceback(None)
        if self._room is None:
            raise ConnectionLost("this membership was left")
        waiting: asyncio.Future[Verdict] = asyncio.get_running_loop().create_future()
        self._waiting[waiting] = None
        waiting.add_done_callback(lambda done: self._waiting.pop(done, None))
        submission = Submission(
            self, update, is_large=True, may_restore=restore, tag=waiting, doubts=doubts
        )
        await self._room.submit(submission)
        verdict = await asyncio.shield(waiting)
        match verdict:
            case Committed() | Known():
                return
            case Lacking(reason):
                raise Gap(reason)
            case Denied(error):
                raise error
            case Postponed(reason):
                raise StoreFailed(reason)
            case _:
                assert_never(verdict)

    def say(self, client: int, clock: int, state_json: str) -> None:
        """Show a state to everyone in the room, under a client id of this peer's own."""
        if self._room is not None:
            self._room.say(self, (AwarenessState(client, clock, state_json),))

    def leave(self) -> None:
        """Take no part any more. What was submitted is still carried out, unheard."""
        if self._room is not None:
            self._room.leave(self)
        self._end(ConnectionLost("this membership was left"))

    # -- for the room --------------------------------------------------------------------------

    def entered(self, room: Room) -> None:
        """See :class:`~crdt_llm.sync.room.peer.Peer`."""
        self._room = room
        self.state = room.diff()
        if self._listen is not None:
            self._stop_listening = self._listen()

    def settle(self, submission: Submission, verdict: Verdict, room: Room) -> None:
        """See :class:`~crdt_llm.sync.room.peer.Peer`."""
        del room  # known since it was entered
        waiting: asyncio.Future[Verdict] = submission.tag
        if not waiting.done():
            waiting.set_result(verdict)

    def deliver(self, delivery: Delivery) -> None:
        """See :class:`~crdt_llm.sync.room.peer.Peer`."""
        self._deliver(delivery.update)

    def answer(self, room: Room) -> None:
        """See :class:`~crdt_llm.sync.room.peer.Peer`; nothing is asked for here."""

    def presence(self, states: tuple[AwarenessState, ...]) -> None:
        """See :class:`~crdt_llm.sync.room.peer.Peer`; a node does not look who is here."""

    def dismiss(self, error: CrdtLlmError) -> None:
        """See :class:`~crdt_llm.sync.room.peer.Peer`."""
        self._end(error)
        self._lost(error)

    def _end(self, error: CrdtLlmError) -> None:
        if self._over is None:
            self._over = error
        if self._stop_listening is not None:
            self._stop_listening()
            self._stop_listening = None
        for waiting in tuple(self._waiting):
            if not waiting.done():
                waiting.set_exception(error)
                waiting.exception()  # whoever waits hears of it; if nobody does, that is no fault


@dataclass(frozen=True, slots=True)
class Health:
    """Whether the relay can serve.

    Attributes:
        store: ``None``, or why the store does not take writes.
        damaged: Conversations that could not be read, with the reason.
    """

    store: str | None
    damaged: Mapping[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class _Unborn:
    """A room that is not known to have a birth.

    Attributes:
        opened_by: Who entered it first.
        peers: Who entered it, as far as they are still there; in order.
    """

    opened_by: str = ""
    peers: WeakKeyDictionary[Peer, None] = field(default_factory=WeakKeyDictionary)


class Hub:
    """All rooms.

    Attributes:
        drafts: What is being typed, and who is told of it.

    Args:
        log: Where conversations are durable. It stays open; closing it is the caller's.
        clock: Seconds, monotonic.
        random: Random bytes.
        register: Where what must outlive the log is durable; it stays open too. ``None`` keeps it
            in memory, and then whoever is let in as a node may write as one.
        relay_key: The relay's public key, that leases are signed with.
        refusals: How often somebody may be refused before it waits; of this process alone without.
        metrics: What is counted; ``None`` counts nothing.
    """

    def __init__(  # noqa: PLR0913 - everything outside is an argument
        self,
        log: UpdateLog,
        *,
        register: Register | None = None,
        relay_key: bytes | None = None,
        refusals: RefusalRate | None = None,
        metrics: Metrics | None = None,
        clock: Callable[[], float] = time.monotonic,
        random: Callable[[int], bytes] = os.urandom,
    ) -> None:
        self.drafts = Drafts()
        self._log: UpdateLog = log if metrics is None else MeasuredLog(log, metrics.committed)
        self._clock = clock
        self._random = random
        self._register: Register = MemoryRegister() if register is None else register
        self._keeps_leases = register is not None
        self._relay_key = relay_key
        self._scrubber = Scrubber(self._log)
        self._refusals = RefusalRate(clock) if refusals is None else refusals
        self._debts: asyncio.Task[None] | None = None
        self._rooms: dict[str, Room] = {}  # the least recently entered first
        self._unborn: dict[str, _Unborn] = {}  # rooms that are not known to have a birth
        self._ending: set[asyncio.Task[None]] = set()
        self._damaged: dict[str, str] = {}
        self._unregistered: frozenset[str] | None = None  # stored, and without a row when looked
        self._listeners: list[Callable[[str], None]] = []
        self._closed = False

    async def enter(self, conversation: str, peer: Peer) -> None:
        """Let a peer into a room, opening it if need be.

        Raises:
            Refused: ``conversation`` is no conversation id.
            Forbidden: The peer has no right there.
            Corrupt: What is stored of it is damaged.
            Unavailable: Not now.
        """
        if not is_conversation_id(conversation):
            raise Refused(
                NO_SUCH_CONVERSATION, "a conversation id is 22 characters of A-Z a-z 0-9 - _"
            )
        if conversation not in self._rooms and not peer.is_operator:
            await self._bound_unborn(peer.author.principal, conversation)
        room = self._room(conversation)
        unborn = self._unborn.get(conversation)
        if unborn is not None:
            unborn.opened_by = unborn.opened_by or peer.author.principal
            unborn.peers[peer] = None
        await room.enter(peer)
        self._damaged.pop(conversation, None)
        self._is_unborn(room)

    async def _bound_unborn(self, principal: str, conversation: str) -> None:
        opened = [
            room
            for name, room in tuple(self._rooms.items())
            if name in self._unborn and self._unborn[name].opened_by == principal
        ]
        if sum(self._is_unborn(room) for room in opened) < UNBORN_MAX:
            return
        if await self._register.load(conversation) is not None:
            return
        stored = await self._log.load(conversation)
        if stored.snapshot is None and not stored.updates:
            raise Unavailable("too many conversations of yours are open that do not exist yet")

    def _is_unborn(self, room: Room, *, for_certain: bool = False) -> bool:
        """Whether a room has no birth; one that is in a turn, or being loaded, may have none."""
        if room.id not in self._unborn:
            return False
        with suppress(LocalMisuse):  # it is in the middle of a turn, or not loaded yet
            if room.read(lambda replica: replica.id) is None:
                return True
            del self._unborn[room.id]
            return False
        return not for_certain

    async def join(  # noqa: PLR0913 - three of them are for whoever listens
        self,
        conversation: str,
        principal: str,
        *,
        node: bool = False,
        deliver: Callable[[bytes], None],
        lost: Callable[[CrdtLlmError], None] = _ignore,
        hint: Listener | None = None,
    ) -> Membership:
        """Take part in a conversation from inside this process.

        Args:
            conversation: Its id.
            principal: Who; for a node its own name.
            node: Whether as the conversation's node.
            deliver: Called right after every commit with what others wrote in it, as one update,
                in the order of the log. It must not wait.
            lost: Called once if the membership ends from the room's side.
            hint: Told of what is being typed; see :data:`~crdt_llm.sync.relay.drafts.Listener`.

        Raises:
            CrdtLlmError: As :meth:`enter`.
        """
        listen = None if hint is None else partial(self.drafts.listen, conversation, hint)
        membership = Membership(principal, node=node, deliver=deliver, lost=lost, drafts=listen)
        await self.enter(conversation, membership)
        return membership

    async def grant_epoch(self, conversation: str, node: bytes) -> int:
        """Make a node's epoch current in a conversation; see :meth:`Room.grant_epoch`.

        Raises:
            Corrupt: What is stored of it is damaged.
            Unavailable: There can be no lease now.
        """
        return await self._room(conversation).grant_epoch(node)

    async def import_trusted(self, conversation: str, update: bytes) -> tuple[str, ...]:
        """Take a conversation that neither log nor register know, on an operator's word.

        Its facts become the register's: whose it is, who may do what, what was admitted. Where the
        register knows it, nothing is believed that does not prove itself.

        Args:
            conversation: Its id.
            update: All of a replica.

        Returns:
            What could not be verified and was taken all the same, one line each.

        Raises:
            Refused: It is no conversation of that id, malformed, or known and against its rules.
            CrdtLlmError: As :meth:`enter`.
        """
        doubts: list[str] = []
        membership = Membership("", node=False, deliver=_ignore_update, lost=_ignore)
        membership.is_operator = True
        await self.enter(conversation, membership)
        try:
            await membership.submit(update, restore=True, doubts=doubts)
        finally:
            membership.leave()
        return tuple(dict.fromkeys(doubts))

    def subscribe(self, changed: Callable[[str], None]) -> Callable[[], None]:
        """Call ``changed`` with the conversation's id after every commit; the answer ends that."""
        self._listeners.append(changed)
        return lambda: self._listeners.remove(changed)

    def notice(self, conversation: str) -> None:
        """Have everybody who subscribed look at a conversation, though nothing was committed."""
        self._tell(conversation)

    async def conversations(self) -> tuple[Stored, ...]:
        """What is stored, the most recently changed first; see :class:`UpdateLog`."""
        return await self._log.conversations()

    async def conversations_of(self, principal: str) -> dict[str, int]:
        """Where a principal may have a right -> when that was changed last, ms since 1970, or 0.

        The register knows; conversations that have no row there yet are named to everybody, and
        whoever asks looks into them.

        Raises:
            Unavailable: It could not be read now.
            Corrupt: It is damaged.
        """
        changed_at = {one.conversation: one.changed_at for one in await self._log.conversations()}
        if self._unregistered is None:
            rows = {name: await self._register.load(name) for name in changed_at}
            self._unregistered = frozenset(name for name, row in rows.items() if row is None)
        names = {*await self._register.conversations_of(principal), *self._unregistered}
        return {name: changed_at.get(name, 0) for name in names}

    async def row(self, conversation: str) -> Row | None:
        """What the register has of a conversation.

        Raises:
            Unavailable: It could not be read now.
            Corrupt: It is damaged.
        """
        return await self._register.load(conversation)

    async def read(self, conversation: str, question: Callable[[Conversation], Result]) -> Result:
        """What a pure function of the committed document says, whether its room is open or not.

        Raises:
            Unavailable: It could not be read now.
            Corrupt: It is damaged.
        """
        room = self._rooms.get(conversation)
        if room is not None:
            with suppress(LocalMisuse):  # it is in the middle of a turn, or not loaded yet
                answer: Result = room.read(question)
                return answer
        loaded = await self._log.load(conversation)
        return question(await replica_of(loaded, conversation, client_id=1))  # it writes nothing

    @property
    def open_rooms(self) -> int:
        """How many conversations are in memory."""
        return len(self._rooms)

    @property
    def health(self) -> Health:
        """How the store is, and which conversations are damaged as far as is known."""
        return Health(self._log.status.reason, dict(self._damaged))

    def tick(self) -> None:
        """Let go of presence that expired and of rooms that are idle. Call it every few seconds."""
        now = self._clock()
        if self._debts is None and not self._closed:
            self._debts = asyncio.get_running_loop().create_task(self._open_debtors(), name="debts")
        for room in tuple(self._rooms.values()):
            room.share_presence(room.awareness.expire())
            room.nudge()
            if room.is_idle and now - room.idle_since >= IDLE_S:
                self._evict(room)

    async def close(self) -> None:
        """Finish what was handed over, then dismiss everyone with ``Stopping``."""
        self._closed = True
        for room in tuple(self._rooms.values()):
            self._evict(room)
        if self._ending:
            await asyncio.wait(self._ending)

    def _room(self, conversation: str) -> Room:
        if self._closed:
            raise Stopping("the server is restarting: come back soon")
        room = self._rooms.pop(conversation, None)
        if room is None:
            self._make_space()
            room = Room(
                conversation,
                self._log,
                clock=self._clock,
                random=self._random,
                committed=self._tell,
                ended=self._forget,
                register=self._register,
                keeps_leases=self._keeps_leases,
                relay_key=self._relay_key,
                scrubber=self._scrubber,
                refusals=self._refusals,
            )
            self._unborn[conversation] = _Unborn()
        self._rooms[conversation] = room
        return room

    async def _open_debtors(self) -> None:
        """Open what a process before this one withdrew and did not wipe from the log."""
        try:
            for conversation in await self._register.owed():
                if not self._closed and conversation not in self._rooms:
                    self._room(conversation)
        except CrdtLlmError as error:
            logger.warning("what is owed a scrub is not known: %s", error)
            self._debts = None  # the next tick tries again

    def _make_space(self) -> None:
        if len(self._rooms) < ROOMS_MAX:
            return
        rooms = tuple(self._rooms.values())
        idle = next((room for room in rooms if room.is_idle), None)
        if idle is None:
            idle = next((room for room in rooms if self._is_unborn(room, for_certain=True)), None)
        too_many = Unavailable("too many conversations are open: try again later")
        if idle is None:
            raise too_many
        unborn = self._unborn.get(idle.id)
        self._evict(idle)
        for peer in () if unborn is None else tuple(unborn.peers):
            idle.leave(peer)
            peer.dismiss(too_many)

    def _evict(self, room: Room) -> None:
        self._rooms.pop(room.id, None)
        self._unborn.pop(room.id, None)
        task = asyncio.get_running_loop().create_task(room.stop(), name=f"stop {room.id}")
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    def _forget(self, room: Room, error: CrdtLlmError) -> None:
        if self._rooms.get(room.id) is room:
            del self._rooms[room.id]
            self._unborn.pop(room.id, None)
        if isinstance(error, Corrupt):
            self._damaged[room.id] = str(error)

    def _tell(self, conversation: str) -> None:
        for changed in tuple(self._listeners):
            try:
                changed(conversation)
            except Exception as failure:  # noqa: BLE001 - a listener's fault must not end a room
                logger.error("a listener failed on %s: %s", conversation, one_line(failure))  # noqa: TRY400 - one line
