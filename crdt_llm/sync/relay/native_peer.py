"""A connection in the native dialect: one session, one outbox, and a room's peer for each channel.

This module carries a session's events to the rooms and the rooms' calls to the session. It must not
know sockets: whoever holds one gives frames in and takes frames out.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, assert_never

from crdt_llm.errors import AuthenticationFailed, CrdtLlmError, Forbidden
from crdt_llm.sync.relay.channel_peer import ChannelPeer, Standing
from crdt_llm.sync.relay.drafts import Typist
from crdt_llm.sync.relay.native_node import RemoteNode
from crdt_llm.sync.relay.native_session import (
    LEFT,
    Close,
    Enter,
    Exit,
    Greet,
    NativeSession,
    Phase,
    Send,
    Submit,
)
from crdt_llm.sync.relay.outbox import WAITING_BYTES_MAX, Lanes
from crdt_llm.sync.relay.work import WorkList
from crdt_llm.sync.wire import frames
from crdt_llm.sync.wire.frames import Draft, Presence, Pull, Renew, Request, WantLease, Watch
from crdt_llm.sync.wire.frames import encode as encode_frame
from crdt_llm.sync.wire.verdict import (
    CLOSE_REASON_BYTES_MAX,
    CloseCode,
    close_code,
    one_line,
    reason_of,
    shorten,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from crdt_llm.sync.relay.access import AdmitNode, Pass
    from crdt_llm.sync.relay.conversation_list import ConversationLists, Lines
    from crdt_llm.sync.relay.drafts import Drafts
    from crdt_llm.sync.relay.hub import Hub
    from crdt_llm.sync.relay.leases import LeaseOffice
    from crdt_llm.sync.relay.metrics import Metrics
    from crdt_llm.sync.relay.native_session import Event
    from crdt_llm.sync.relay.requests import Requests
    from crdt_llm.sync.wire.frames import Change, Open
    from crdt_llm.sync.wire.verdict import Verdict
    from crdt_llm.sync.wire.y_websocket import AwarenessState

logger = logging.getLogger("crdt_llm.sync")

ENTERING_MAX: Final = 4
"""Rooms that one connection enters at a time: each answer may be a whole document."""

_ANSWERS_WAIT_FOR_BYTES: Final = WAITING_BYTES_MAX // 2
"""What is owed to a slow reader is made once so little waits: it may be a whole document."""


@dataclass(frozen=True, slots=True)
class RelayIdentity:
    """What a relay says of itself.

    Attributes:
        key: Its Ed25519 public key.
        log: The name of its log.
    """

    key: bytes
    log: str


def _other_conversations() -> Forbidden:
    return Forbidden("forbidden", "this token is for other conversations")


def _later(seconds: float, call: Callable[[], None]) -> asyncio.TimerHandle:
    return asyncio.get_running_loop().call_later(seconds, call)


def _presence_frame(channel: int, states: tuple[AwarenessState, ...]) -> bytes:
    return encode_frame(Presence(channel, states))


class NativeConnection:
    """One connection.

    Args:
        hub: The rooms.
        identity: Of this relay.
        admit: What a token proves; raises if that is nothing.
        admit_node: Whether a node's key may come with what a token proves; raises if not.
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
        admit_node: AdmitNode | None = None,
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
        self._hub = hub
        self._identity = identity
        self._admit = admit
        self._admit_node = admit_node
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
        self._standing: Standing | None = None  # all that depends on the token
        self._node: RemoteNode | None = None
        self._typist = Typist(hub.drafts, self._may_write, _later)
        self._clock = clock

    # -- for whoever holds the socket ----------------------------------------------------------

    @property
    def node_key(self) -> bytes | None:
        """The public key of the node at the other end; ``None`` if there is none."""
        return None if self._node is None else self._node.node

    async def receive(self, frame: bytes) -> None:
        """Take one frame; waits while too much waits for the reader, and a moment for a room."""
        await self._room_to_answer()
        for event in self._session.receive(frame):
            if isinstance(event, Submit):
                channel = self._channels.get(event.channel)
                if channel is not None:
                    await channel.submit(event)
            elif isinstance(event, Request):
                await self._answer(event)
            elif isinstance(event, Greet):
                await self._greet(event.hello)
            else:
                self._follow(event)

    def take(self) -> bytes | None:
        """The next frame to send, or ``None`` while there is none."""
        frame = self._outbox.take()
        if frame is None and self._node is not None:
            work = self._node.take_work()
            frame = None if work is None else encode_frame(work)
        if self._outbox.has_room:
            self._has_room.set()
        self._serve_owed()
        return frame

    def tick(self) -> None:
        """Say what waited for its time; call it every second or so."""
        if self._node is not None and self._node.tick():
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
        if self._node is not None:
            self._node.leave()
            self._node = None
        self._typist.stop()
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

    def put_off(self, submit: Submit, retry_ms: int) -> None:
        """A channel's room did not take an update in time."""
        self._follow_all(self._session.put_off(submit, retry_ms))

    @property
    def now_s(self) -> float:
        """Seconds, monotonic."""
        return self._clock()

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
            case Draft(number, after, keep, text):
                conversation = self._channels[number].conversation
                self._typist.type(number, conversation, after, keep, text)
            case WantLease(number, hold):
                self._certain_node.want(self._channels[number], hold=hold)
            case Renew():
                self._certain_node.renew()
            case Watch(on):
                self._watch(on=on)
            case Close(code, reason):
                self._close(code, reason)
            case Submit() | Request() | Greet():
                raise AssertionError("these are carried out where waiting is possible")
            case _:
                assert_never(event)
        self._wake()

    @property
    def _certain_node(self) -> RemoteNode:
        if self._node is None:
            raise AssertionError("the session lets only nodes ask for leases")
        return self._node

    @property
    def _certain_standing(self) -> Standing:
        if self._standing is None:
            raise AssertionError("the session lets nobody do this before it is known who that is")
        return self._standing

    def _tell(self, frame: frames.FromRelay) -> None:
        self._send(frame)
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

    async def _greet(self, hello: frames.Hello) -> None:
        try:
            found = await self._proved_by(hello)
        except CrdtLlmError as error:
            self.refuse(error)
            return
        if self._session.phase is Phase.CLOSED:  # meanwhile
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
            self._stand(Standing(found, hello.node))

    async def _proved_by(self, hello: frames.Hello) -> Pass:
        found = self._admit(self._came_with if hello.token is None else hello.token)
        if hello.node is not None and not found.node:
            raise AuthenticationFailed("not-a-node", "that token is no node's")
        if self._standing is not None and hello.node != self._standing.node:
            other = "a connection stays that of one node, or of none"
            raise AuthenticationFailed("another-node", other)
        if hello.node is not None and self._standing is None and self._admit_node is not None:
            await self._admit_node(found, hello.node)
        return found

    def _stand(self, standing: Standing) -> None:
        """From now on this counts, and nothing of what a token proved before."""
        self._standing = standing
        if standing.node is not None and self._node is None:
            work = WorkList(self._hub, self._clock, self._is_of_use, self._wake)
            self._node = RemoteNode(standing.node, self._leases, work, self._tell)
        for channel in tuple(self._channels.values()):
            if standing.found.may_enter(channel.conversation):
                channel.stand(standing)
            else:
                channel.leave()
                self.end(channel, _other_conversations())
        self._typist.look_again()
        if self._stop_watching is not None:
            self._watch(on=True)

    def _enter(self, wish: Open) -> None:
        standing = self._certain_standing
        channel = self._channels[wish.channel] = ChannelPeer(self, wish, standing)
        if not standing.found.may_enter(wish.conversation):
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
        return not takes_part and self._certain_standing.found.may_enter(conversation)

    # -- the list ------------------------------------------------------------------------------

    def _watch(self, *, on: bool) -> None:
        if self._stop_watching is not None:
            self._stop_watching()
            self._stop_watching = None
        if not on:
            return
        if self._lists is None:
            self._send(frames.Listed(whole=True, end=True, conversations=()))
        else:
            self._stop_watching = self._lists.watch(self._certain_standing.found, self._tell_lines)

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
        if self._requests is None:
            answer = frames.Answer(request.id, None, "unknown", "this relay answers no requests")
        else:
            answer = await self._requests.answer(self._certain_standing.found, request)
        if self.close_code is None:
            self._tell(answer)

    # -- drafts --------------------------------------------------------------------------------

    def hint(self, number: int, source: int, after: str | None, keep: int, text: str) -> bool:
        """Tell the node at the other end of a draft; whether there was room for that."""
        if after is not None and not self._outbox.has_room:
            return False
        self._tell(frames.Hint(number, source, after, keep, text))
        return True

    def _may_write(self, number: int) -> bool | None:
        return self._channels[number].may_write

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
        if self._node is not None:
            self._node.forget(channel)
        self._typist.drop(channel.number)
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
