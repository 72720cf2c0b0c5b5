"""A connection in the native dialect: one session, one outbox, and a room's peer for each channel.

This module carries a session's events to the rooms and the rooms' calls to the session. It must not
know sockets: whoever holds one gives frames in and takes frames out.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Final, assert_never

from crdt_llm.document.conversation import EMPTY_STATE_VECTOR
from crdt_llm.document.rules import Author
from crdt_llm.document.schema import Grant
from crdt_llm.errors import AuthenticationFailed, CrdtLlmError, Forbidden, MalformedMessage
from crdt_llm.sync import frames
from crdt_llm.sync.drafts import DRAFT_INTERVAL_S, DRAFTS_PER_CONNECTION_MAX, NOTHING
from crdt_llm.sync.frames import Change, Draft, Presence, Pull, Renew, Request, WantLease, Watch
from crdt_llm.sync.frames import encode as encode_frame
from crdt_llm.sync.native_session import (
    LEFT,
    Close,
    Enter,
    Exit,
    Greet,
    NativeSession,
    Send,
    Submit,
)
from crdt_llm.sync.outbox import WAITING_BYTES_MAX, Lanes
from crdt_llm.sync.room import Peer, Submission
from crdt_llm.sync.verdict import (
    CLOSE_REASON_BYTES_MAX,
    CloseCode,
    Lacking,
    close_code,
    one_line,
    reason_of,
    shorten,
)
from crdt_llm.sync.wire import UPDATE_BYTES_MAX
from crdt_llm.sync.work import WorkList

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from crdt_llm.sync.access import Pass
    from crdt_llm.sync.conversation_list import ConversationLists, Lines
    from crdt_llm.sync.drafts import Drafts, Said
    from crdt_llm.sync.frames import Open
    from crdt_llm.sync.hub import Hub
    from crdt_llm.sync.leases import Granted, LeaseOffice
    from crdt_llm.sync.metrics import Metrics
    from crdt_llm.sync.native_session import Event
    from crdt_llm.sync.requests import Requests
    from crdt_llm.sync.room import Delivery, Room
    from crdt_llm.sync.verdict import Verdict
    from crdt_llm.sync.wire import AwarenessState

logger = logging.getLogger("crdt_llm.sync")

ENTERING_MAX: Final = 4
"""Rooms that one connection enters at a time: each answer may be a whole document."""

_ANSWERS_WAIT_FOR_BYTES: Final = WAITING_BYTES_MAX // 2
"""What is owed to a slow reader is made once so little waits: it may be a whole document."""


NODE: Final = "node"
"""Who a node is in a conversation, whatever its token calls it: its lease's key says which one."""

NO_LEASES_RETRY_MS: Final = 60_000
"""When a node may ask again a relay that gives no leases: after its next restart it may."""


@dataclass(frozen=True, slots=True)
class RelayIdentity:
    """What a relay says of itself.

    Attributes:
        key: Its Ed25519 public key.
        log: The name of its log.
    """

    key: bytes
    log: str


@dataclass(slots=True)
class _Draft:
    """What a client types in one channel."""

    source: int
    conversation: str
    says: Said = NOTHING


def _other_conversations() -> Forbidden:
    return Forbidden("forbidden", "this token is for other conversations")


def _ms(seconds: float) -> int:
    return max(0, round(seconds * 1000))


def _presence_frame(channel: int, states: tuple[AwarenessState, ...]) -> bytes:
    return encode_frame(Presence(channel, states))


class NativeConnection:
    """One connection.

    Args:
        hub: The rooms.
        identity: Of this relay.
        admit: What a token proves; raises if that is nothing.
        came_with: The token of the handshake, if there was one.
        address: Where it comes from, if that is known.
        leases: Where nodes get theirs; ``None`` if there are none to be had.
        lists: Where lists of conversations are watched; ``None`` if they are empty for ever.
        requests: What else may be asked for.
        metrics: What is counted; ``None`` counts nothing.
        clock: Seconds, monotonic.
        wake: Called when :meth:`take` may have something, or it is time to close. It must not wait.
    """

    def __init__(  # noqa: PLR0913 - everything outside is an argument
        self,
        hub: Hub,
        identity: RelayIdentity,
        *,
        admit: Callable[[str | None], Pass],
        came_with: str | None,
        address: str | None = None,
        wake: Callable[[], None],
        leases: LeaseOffice | None = None,
        lists: ConversationLists | None = None,
        requests: Requests | None = None,
        metrics: Metrics | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.close_code: CloseCode | None = None
        self.close_reason = ""
        self.found: Pass | None = None
        self.node_key: bytes | None = None
        self._hub = hub
        self._identity = identity
        self._admit = admit
        self._came_with = came_with
        self.address = address
        self._wake = wake
        self._session = NativeSession()
        self._outbox = Lanes(_presence_frame)
        self._has_room = asyncio.Event()
        self._channels: dict[int, ChannelPeer] = {}
        self._entering: dict[ChannelPeer, asyncio.Task[None]] = {}
        self._doors = asyncio.Semaphore(ENTERING_MAX)
        self._owed: dict[int, ChannelPeer] = {}  # who lacks something; the first is served first
        self._is_asking = False  # the first of them asked its room
        self._metrics = metrics
        self._lists = lists
        self._requests = requests
        self._stop_watching: Callable[[], None] | None = None
        self._leases = leases
        self._leasing: dict[str, ChannelPeer] = {}  # conversation -> who asked for its lease last
        self._drafts: dict[int, _Draft] = {}  # by channel
        self._drafts_waiting: dict[int, None] = {}
        self._drafts_pause: asyncio.TimerHandle | None = None
        self._work: WorkList | None = None
        self._clock = clock

    # -- for whoever holds the socket ----------------------------------------------------------

    @property
    def is_authenticated(self) -> bool:
        """Whether it is known who this is."""
        return self.found is not None

    async def receive(self, frame: bytes) -> None:
        """Take one frame; waits while too much waits for the reader, or for a verdict."""
        await self._room_to_answer()
        for event in self._session.receive(frame):
            if isinstance(event, Submit):
                channel = self._channels.get(event.channel)
                if channel is not None:
                    await channel.submit(event)
            elif isinstance(event, Request):
                await self._answer(event)
            else:
                self._follow(event)

    def take(self) -> bytes | None:
        """The next frame to send, or ``None`` while there is none."""
        frame = self._outbox.take()
        if frame is None and self._work is not None:
            conversations = self._work.take()
            frame = encode_frame(frames.Work(conversations)) if conversations else None
        if self._outbox.has_room:
            self._has_room.set()
        self._serve_owed()
        return frame

    def tick(self) -> None:
        """Say what waited for its time; call it every second or so."""
        if self._work is not None and self._work.tick():
            self._wake()

    def refuse(self, error: CrdtLlmError) -> None:
        """End the connection, saying why."""
        self._follow_all(self._session.close(close_code(error), reason_of(error)))

    def leave(self) -> None:
        """The socket is gone."""
        self._session.close(CloseCode.INTERNAL_ERROR, "the socket is gone")
        if self._stop_watching is not None:
            self._stop_watching()
            self._stop_watching = None
        if self._work is not None:
            self._work.stop()
            self._work = None
        if self._leases is not None and self.node_key is not None:
            self._leases.lost(self)
        self._leasing.clear()
        for number in tuple(self._drafts):
            self._drop_draft(number)
        if self._drafts_pause is not None:
            self._drafts_pause.cancel()
        for task in self._entering.values():
            task.cancel()
        channels, self._channels = tuple(self._channels.values()), {}
        for channel in channels:
            channel.leave()
        self._owed.clear()
        self._outbox.drop_all()
        self._has_room.set()

    # -- for the channels ----------------------------------------------------------------------

    @property
    def drafts(self) -> Drafts:
        """What is being typed in this relay's conversations."""
        return self._hub.drafts

    @property
    def log(self) -> str:
        """The name of the relay's log."""
        return self._identity.log

    def opened(self, opened: frames.Opened) -> None:
        """A channel's room let it in."""
        self._follow_all(self._session.opened(opened))

    def settle(self, submit: Submit, verdict: Verdict, lsn: int, state_vector: bytes) -> None:
        """A channel's room has judged an update."""
        if self._metrics is not None:
            self._metrics.judged("native", verdict)
        self._follow_all(self._session.settle(submit, verdict, lsn=lsn, state_vector=state_vector))

    def change(self, channel: ChannelPeer, change: Change) -> None:
        """Others wrote in a channel's conversation."""
        dropped = self._outbox.put_change(channel.number, encode_frame(change))
        if dropped is not None:
            self._owed[dropped] = self._channels[dropped]
            self._count_resync()
        self._wake()

    def owe(self, channel: ChannelPeer) -> None:
        """A channel is to get all that it lacks, as soon as there is room for it."""
        self._outbox.owe(channel.number)
        self._owed[channel.number] = channel
        self._count_resync()
        self._serve_owed()
        self._wake()

    def _count_resync(self) -> None:
        if self._metrics is not None:
            self._metrics.resynced("native")

    def is_owed(self, channel: ChannelPeer) -> bool:
        """Whether changes need not be sent to a channel: what it is owed will hold them."""
        return channel.number in self._owed

    def pay(self, channel: ChannelPeer, state: frames.State) -> None:
        """Send a channel what it lacks."""
        if self._owed.pop(channel.number, None) is not None:
            self._is_asking = False
            self._outbox.put_state(channel.number, encode_frame(state))
            self._wake()

    def presence(self, channel: ChannelPeer, states: Iterable[AwarenessState]) -> None:
        """Who is in a channel's conversation, or went."""
        self._outbox.put_presence(channel.number, states)
        self._wake()

    def end(self, channel: ChannelPeer, error: CrdtLlmError) -> None:
        """A channel's room does not have it any more, or did not take it."""
        if self._forget(channel):
            code, reason = close_code(error), reason_of(error)
            self._follow_all(self._session.end(channel.number, code, reason))

    # -- between the two -----------------------------------------------------------------------

    def _follow_all(self, events: Iterable[Event]) -> None:
        for event in events:
            self._follow(event)

    def _follow(self, event: Event) -> None:  # noqa: C901, PLR0912 - a table of events
        match event:
            case Send(frame):
                self._send(frame)
            case Greet(hello):
                self._greet(hello)
            case Enter(wish):
                self._enter(wish)
            case Exit(number):
                if number in self._channels:
                    channel = self._channels[number]
                    self._forget(channel)
                    channel.leave()
            case Pull(number, state_vector):
                self._channels[number].pull(state_vector)
            case Presence(number, states):
                self._channels[number].say(states)
            case Draft():
                self._draft(event)
            case WantLease(number, hold):
                self._want_lease(self._channels[number], hold=hold)
            case Renew():
                ttl_s = 0.0 if self._leases is None else self._leases.renew(self)
                self._send(frames.Renewed(_ms(ttl_s)))
            case Watch(on):
                self._watch(on=on)
            case Close(code, reason):
                self._close(code, reason)
            case Submit() | Request():
                raise AssertionError("these are carried out where waiting is possible")
            case _:
                assert_never(event)
        self._wake()

    def _send(self, frame: frames.FromRelay) -> None:
        encoded = encode_frame(frame)
        self._count_refusal(frame)
        match frame:
            case frames.Ack():
                self._outbox.put_ack(frame.channel, encoded)
            case frames.Opened():
                self._outbox.put(frame.channel, encoded, opens=True)
            case frames.Closed():
                self._outbox.end(frame.channel, encoded)
            case frames.Nack() | frames.Leased() | frames.Hint():
                self._outbox.put(frame.channel, encoded)
            case _:
                self._outbox.put_first(encoded)

    def _count_refusal(self, frame: frames.FromRelay) -> None:
        if self._metrics is None:
            return
        match frame:
            case frames.Nack(code=code):
                self._metrics.refused(str(code))
            case frames.Closed(code=closed) if closed != LEFT:
                self._metrics.refused(str(closed))

    def _greet(self, hello: frames.Hello) -> None:
        token = self._came_with if hello.token is None else hello.token
        try:
            found = self._admit(token)
        except CrdtLlmError as error:
            self.refuse(error)
            return
        if hello.node is not None and not found.node:
            self.refuse(AuthenticationFailed("not-a-node", "that token is no node's"))
            return
        welcome = frames.Welcome(
            frames.VERSION,
            found.principal,
            self._identity.key,
            found.expires_at,
            self._identity.log,
        )
        self._follow_all(self._session.accept(welcome, node=hello.node is not None))
        if self.close_code is None:
            for channel in tuple(self._channels.values()):
                self._bound_anew(channel, found)
            is_new_node = hello.node is not None and self.node_key is None
            self.found, self.node_key = found, hello.node
            if is_new_node:
                self._work = WorkList(self._hub, self._clock, self._is_of_use, self._wake)

    def _bound_anew(self, channel: ChannelPeer, found: Pass) -> None:
        """A renewed token may allow less than the one before, or more."""
        if found.may_enter(channel.conversation):
            channel.author = replace(channel.author, cap=found.cap(channel.conversation))
        else:
            channel.leave()
            self.end(channel, _other_conversations())

    def _enter(self, wish: Open) -> None:
        if self.found is None:
            raise AssertionError("nobody enters a room before it is known who that is")
        channel = self._channels[wish.channel] = ChannelPeer(self, wish, self.found)
        if not self.found.may_enter(wish.conversation):
            self.end(channel, _other_conversations())
            return
        entering = self._enter_when_possible(channel, wish.conversation)
        task = asyncio.get_running_loop().create_task(entering, name=f"enter {wish.conversation}")
        self._entering[channel] = task
        task.add_done_callback(lambda _: self._entering.pop(channel, None))

    async def _enter_when_possible(self, channel: ChannelPeer, conversation: str) -> None:
        try:
            async with self._doors:
                await self._room_to_answer()
                await self._hub.enter(conversation, channel)
        except CrdtLlmError as error:
            self.end(channel, error)
        except Exception as failure:  # noqa: BLE001 - a fault of ours must not go unheard
            logger.error("conversation %s: %s", conversation, one_line(failure))  # noqa: TRY400 - one line an error
            self.end(channel, CrdtLlmError("something went wrong here: try again later"))

    def _is_of_use(self, conversation: str) -> bool:
        """Whether a node may want to hear that a conversation changed."""
        takes_part = any(one.conversation == conversation for one in self._channels.values())
        return not takes_part and self.found is not None and self.found.may_enter(conversation)

    # -- the list ------------------------------------------------------------------------------

    def _watch(self, *, on: bool) -> None:
        if self._stop_watching is not None:
            self._stop_watching()
            self._stop_watching = None
        if not on or self.found is None:
            return
        if self._lists is None:
            self._send(frames.Listed(whole=True, end=True, conversations=()))
        else:
            self._stop_watching = self._lists.watch(self.found, self._tell_lines)

    def _tell_lines(self, lines: Lines, whole: bool) -> bool:  # noqa: FBT001 - called by place
        if not whole and not self._outbox.has_room:
            return False
        parts = [
            lines[at : at + frames.LISTED_MAX]
            for at in range(0, max(1, len(lines)), frames.LISTED_MAX)
        ]
        for part in parts:
            self._send(frames.Listed(whole, part is parts[-1], part))
        self._wake()
        return True

    async def _answer(self, request: Request) -> None:
        if self.found is None:
            raise AssertionError("nobody asks before it is known who that is")
        if self._requests is None:
            answer = frames.Answer(request.id, None, "unknown", "this relay answers no requests")
        else:
            answer = await self._requests.answer(self.found, request)
        if self.close_code is None:
            self._send(answer)
            self._wake()

    # -- leases --------------------------------------------------------------------------------

    @property
    def node(self) -> bytes:
        """See :class:`~crdt_llm.sync.leases.LeaseHolder`."""
        if self.node_key is None:
            raise AssertionError("only a node has to do with leases")
        return self.node_key

    @property
    def embedded(self) -> bool:
        """See :class:`~crdt_llm.sync.leases.LeaseHolder`."""
        return False

    def leased(self, lease: Granted) -> None:
        """See :class:`~crdt_llm.sync.leases.LeaseHolder`."""
        channel = self._leasing.get(lease.conversation)
        if channel is None:
            return
        self._send(
            frames.Leased(channel.number, lease.epoch, lease.signature, _ms(lease.ttl_s), "")
        )
        channel.hold(lease.epoch)
        self._wake()

    def unleased(self, conversation: str, retry_s: float, reason: str) -> None:
        """See :class:`~crdt_llm.sync.leases.LeaseHolder`."""
        channel = self._leasing.get(conversation)
        if channel is None:
            return
        channel.hold(None)
        line = shorten(reason, frames.REASON_BYTES_MAX)
        self._send(frames.Leased(channel.number, None, b"", _ms(retry_s), line))
        self._wake()

    def _want_lease(self, channel: ChannelPeer, *, hold: bool) -> None:
        if self._leases is None:
            reason = "this relay gives no leases"
            self._send(frames.Leased(channel.number, None, b"", NO_LEASES_RETRY_MS, reason))
        elif hold:
            before = self._leasing.get(channel.conversation)
            if before is not None and before is not channel:
                before.hold(None)
            self._leasing[channel.conversation] = channel
            self._leases.want(channel.conversation, self)
        else:
            self._leases.give_back(channel.conversation, self)

    # -- drafts --------------------------------------------------------------------------------

    def hint(self, number: int, source: int, after: str | None, keep: int, text: str) -> bool:
        """Tell the node at the other end of a draft; whether there was room for that."""
        if after is not None and not self._outbox.has_room:
            return False
        self._send(frames.Hint(number, source, after, keep, text))
        self._wake()
        return True

    def _draft(self, frame: frames.Draft) -> None:
        channel = self._channels[frame.channel]
        draft = self._drafts.get(frame.channel)
        if draft is None:
            if frame.after is None or not channel.may_write:
                return
            if len(self._drafts) >= DRAFTS_PER_CONNECTION_MAX:
                self._drop_draft(next(iter(self._drafts)))
            source = self._hub.drafts.new_source()
            draft = self._drafts[frame.channel] = _Draft(source, channel.conversation)
        try:
            draft.says = draft.says.then(frame.after, frame.keep, frame.text)
        except MalformedMessage:  # some of it was lost on the way; the next whole one counts
            self._drop_draft(frame.channel)
            return
        if len(draft.says.text) > frames.DRAFT_BYTES_MAX or draft.says == NOTHING:
            self._drop_draft(frame.channel)
            return
        self._drafts_waiting[frame.channel] = None
        if self._drafts_pause is None:
            self._pass_draft_on()

    def _pass_draft_on(self) -> None:
        """At most one in a while; of each only how it is now."""
        self._drafts_pause = None
        if not self._drafts_waiting:
            return
        number = next(iter(self._drafts_waiting))
        del self._drafts_waiting[number]
        draft = self._drafts[number]
        self._hub.drafts.say(draft.source, draft.conversation, draft.says)
        loop = asyncio.get_running_loop()
        self._drafts_pause = loop.call_later(DRAFT_INTERVAL_S, self._pass_draft_on)

    def _drop_draft(self, number: int) -> None:
        self._drafts_waiting.pop(number, None)
        draft = self._drafts.pop(number, None)
        if draft is not None:
            self._hub.drafts.say(draft.source, draft.conversation, NOTHING)

    # -- space ---------------------------------------------------------------------------------

    async def _room_to_answer(self) -> None:
        while not self._outbox.has_room and self.close_code is None:
            self._has_room.clear()
            await self._has_room.wait()

    def _serve_owed(self) -> None:
        waits_little = self._outbox.waiting_bytes <= _ANSWERS_WAIT_FOR_BYTES
        if self._owed and waits_little and not self._is_asking:
            self._is_asking = True
            next(iter(self._owed.values())).ask()

    def _forget(self, channel: ChannelPeer) -> bool:
        """Let go of a channel; whether it was there."""
        if self._channels.get(channel.number) is not channel:
            return False
        del self._channels[channel.number]
        channel.hold(None)
        if self._leasing.get(channel.conversation) is channel:
            del self._leasing[channel.conversation]
            if self._leases is not None:
                self._leases.give_back(channel.conversation, self)
        self._drop_draft(channel.number)
        if self._owed and next(iter(self._owed.values())) is channel:
            self._is_asking = False
        self._owed.pop(channel.number, None)
        task = self._entering.pop(channel, None)
        if task is not None and task is not asyncio.current_task():
            task.cancel()
        return True

    def _close(self, code: CloseCode, reason: str) -> None:
        if self._metrics is not None and code.is_final:
            self._metrics.refused(str(code.value))
        self.close_code = code
        self.close_reason = shorten(reason, CLOSE_REASON_BYTES_MAX)
        self.leave()


class ChannelPeer(Peer):
    """What a room sees of one channel.

    Args:
        connection: Whose.
        wish: What was asked for.
        found: What the connection's token proves.
    """

    survives_refusal = True

    def __init__(self, connection: NativeConnection, wish: Open, found: Pass) -> None:
        is_node = connection.node_key is not None
        super().__init__(found.principal, node=is_node)
        principal = NODE if is_node else found.principal
        self.author = Author(principal, is_node, cap=found.cap(wish.conversation))
        self.address = connection.address
        self.number = wish.channel
        self.conversation = wish.conversation
        self.may_write = False
        self._stop_listening: Callable[[], None] | None = None
        self._connection = connection
        self._wish: Open | None = wish
        self._room: Room | None = None
        # Of what the client has for certain, once all frames for it are sent: the end of the log
        # that it knew, and a state vector, for when the log does not reach back so far.
        self._lsn = 0
        self._has = EMPTY_STATE_VECTOR
        self._pulled: bytes | None = None
        self._is_speaking = False

    async def submit(self, submit: Submit) -> None:
        """Hand over an update; waits while too many have no verdict."""
        if self._room is not None:
            await self._room.submit(
                Submission(
                    self,
                    submit.update,
                    is_document=submit.is_document,
                    restore=submit.is_restore,
                    tag=submit,
                )
            )

    def pull(self, state_vector: bytes) -> None:
        """Owe everything that is not in a state vector."""
        self._pulled = state_vector
        self._connection.owe(self)

    def say(self, states: tuple[AwarenessState, ...]) -> None:
        """Show others who is here. The client itself knows."""
        if self._room is not None:
            self._is_speaking = True
            self._room.say(self, states)
            self._is_speaking = False

    def ask(self) -> None:
        """Have :meth:`answer` called."""
        if self._room is not None:
            self._room.ask(self)

    def leave(self) -> None:
        """Take no part any more."""
        self.hold(None)
        if self._room is not None:
            self._room.leave(self)

    def hold(self, epoch: int | None) -> None:
        """From now on it writes as the node under an epoch, and hears of drafts; or no more."""
        self.author = replace(self.author, epoch=epoch)
        if self._stop_listening is not None:
            self._stop_listening()
            self._stop_listening = None
        if epoch is not None:
            hint = partial(self._connection.hint, self.number)
            self._stop_listening = self._connection.drafts.listen(self.conversation, hint)

    # -- for the room --------------------------------------------------------------------------

    def entered(self, room: Room) -> None:
        """See :class:`~crdt_llm.sync.room.Peer`."""
        wish, self._room, self._wish = self._wish, room, None
        if wish is None:
            raise AssertionError("a channel enters one room, once")
        follows = room.since(wish.lsn) if wish.log == self._connection.log else None
        self._lsn, self._has = room.lsn, room.state_vector()
        grant = room.grant_of(self.author)
        self.may_write = grant is not None and grant is not Grant.READER
        self._connection.opened(
            frames.Opened(
                self.number,
                self._connection.log,
                room.lsn,
                room.diff(wish.state_vector) if follows is None else follows,
                room.state_vector(self.author),
                grant,
                behind=bool(room.behind),
            )
        )
        self.presence(room.awareness.states)

    def settle(self, submission: Submission, verdict: Verdict, room: Room) -> None:
        """See :class:`~crdt_llm.sync.room.Peer`."""
        asked = isinstance(verdict, Lacking)  # of all verdicts only this one says what is here
        state_vector = room.state_vector(self.author) if asked else EMPTY_STATE_VECTOR
        self._connection.settle(submission.tag, verdict, room.lsn, state_vector)

    def deliver(self, delivery: Delivery) -> None:
        """See :class:`~crdt_llm.sync.room.Peer`."""
        if self._room is None or self._connection.is_owed(self):
            return
        if len(delivery.update) <= UPDATE_BYTES_MAX:
            self._connection.change(self, Change(self.number, self._room.lsn, delivery.update))
        else:  # what one commit joins may be larger than the updates in it
            self._connection.owe(self)

    def answer(self, room: Room) -> None:
        """See :class:`~crdt_llm.sync.room.Peer`."""
        pulled, self._pulled = self._pulled, None
        follows = room.since(self._lsn) if pulled is None else None
        if follows is None:
            follows = room.diff(self._has if pulled is None else pulled)
        self._lsn, self._has = room.lsn, room.state_vector()
        self._connection.pay(self, frames.State(self.number, room.lsn, follows))

    def presence(self, states: Iterable[AwarenessState]) -> None:
        """See :class:`~crdt_llm.sync.room.Peer`."""
        if not self._is_speaking:
            self._connection.presence(self, states)

    def dismiss(self, error: CrdtLlmError) -> None:
        """See :class:`~crdt_llm.sync.room.Peer`."""
        self._connection.end(self, error)
