"""What a room sees of one channel of a native connection.

This module carries the calls of a room to its connection, and what came on the channel to the room.
It must not know sockets, nor the connection's other channels.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Final, Protocol

from crdt_llm.document.conversation import EMPTY_STATE_VECTOR
from crdt_llm.document.rules import Author
from crdt_llm.document.schema import Grant
from crdt_llm.errors import LocalMisuse, Unavailable
from crdt_llm.sync.room.peer import Peer, Submission
from crdt_llm.sync.wire import frames
from crdt_llm.sync.wire.frames import Change
from crdt_llm.sync.wire.verdict import Lacking
from crdt_llm.sync.wire.y_websocket import UPDATE_BYTES_MAX

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from crdt_llm.errors import CrdtLlmError
    from crdt_llm.sync.relay.access import Pass
    from crdt_llm.sync.relay.drafts import Drafts
    from crdt_llm.sync.relay.native_session import Submit
    from crdt_llm.sync.room.peer import Delivery
    from crdt_llm.sync.room.room import Room
    from crdt_llm.sync.wire.frames import Open
    from crdt_llm.sync.wire.verdict import Verdict
    from crdt_llm.sync.wire.y_websocket import AwarenessState

NODE: Final = "node"
"""Who a node is in a conversation, whatever its token calls it: its lease's key says which one."""


PATIENCE_S: Final = 2.0
"""How long an update may wait for its verdict before its connection does not wait any more for room
behind it: a turn takes milliseconds, and the other channels of the connection must go on."""

RETRY_MS: Final = 3000
"""When what found no room may come again: one refusal too many is forgiven in so long."""

PUT_OFF_MAX: Final = 1024
"""Updates of a channel that found no room and wait for their turn to be told so; their bytes are
dropped. Whoever sends on and on without an answer is closed out."""


@dataclass(frozen=True, slots=True)
class _Handed:
    """An update without a verdict."""

    submit: Submit
    came_s: float
    is_put_off: bool = False  # the room never saw it


@dataclass(frozen=True, slots=True)
class Standing:
    """What the last Hello of a connection proved. A renewal replaces it whole.

    Attributes:
        found: What its token proves.
        node: The public key of the node at the other end; ``None`` for a person's device.
    """

    found: Pass
    node: bytes | None

    def author_in(self, conversation: str) -> Author:
        """Who this is in a conversation, without a lease."""
        principal = self.found.principal if self.node is None else NODE
        return Author(principal, self.node is not None, cap=self.found.cap(conversation))


class Connection(Protocol):
    """What a channel needs of the connection that it shares with others."""

    address: str | None

    @property
    def log(self) -> str:
        """The relay's log, by its id."""

    @property
    def drafts(self) -> Drafts:
        """What is being typed."""

    @property
    def now_s(self) -> float:
        """Seconds, monotonic."""

    def opened(self, opened: frames.Opened) -> None:
        """A channel's room let it in."""

    def settle(self, submit: Submit, verdict: Verdict, lsn: int, state_vector: bytes) -> None:
        """A channel's room has judged an update."""

    def put_off(self, submit: Submit, retry_ms: int) -> None:
        """A channel's room did not take an update in time."""

    def change(self, channel: ChannelPeer, change: Change) -> None:
        """Others wrote in a channel's conversation."""

    def owe(self, channel: ChannelPeer) -> None:
        """A channel is to get all that it lacks: its room is asked when there is room for it."""

    def is_owed(self, channel: ChannelPeer) -> bool:
        """Whether changes need not be sent to a channel: what it is owed will hold them."""

    def pay(self, channel: ChannelPeer, state: frames.State) -> None:
        """Send a channel what it lacks."""

    def presence(self, channel: ChannelPeer, states: Iterable[AwarenessState]) -> None:
        """Who is in a channel's conversation, or went."""

    def hint(self, number: int, source: int, after: str | None, keep: int, text: str) -> bool:
        """Tell the node at the other end of a draft; whether there was room for that."""

    def end(self, channel: ChannelPeer, error: CrdtLlmError) -> None:
        """A channel's room does not have it any more, or did not take it."""


class ChannelPeer(Peer):
    """What a room sees of one channel.

    Args:
        connection: Whose.
        wish: What was asked for.
        standing: Who the client is.
    """

    survives_refusal = True
    survives_failure = True

    def __init__(self, connection: Connection, wish: Open, standing: Standing) -> None:
        super().__init__(standing.found.principal)
        self.author = standing.author_in(wish.conversation)
        self.address = connection.address
        self.number = wish.channel
        self.conversation = wish.conversation
        self._stop_listening: Callable[[], None] | None = None
        self._connection = connection
        self._wish: Open | None = wish
        self._room: Room | None = None
        # Of what the client has for certain, once all frames for it are sent: the end of the log
        # that it knew, and a state vector, for when the log does not reach back so far.
        self._lsn = 0
        self._has = EMPTY_STATE_VECTOR
        self._handed: deque[_Handed] = deque()  # in the order of their verdicts
        self._put_offs = 0  # of these
        self._pulled: bytes | None = None
        self._is_speaking = False

    @property
    def may_write(self) -> bool | None:
        """Whether what is written here would be taken; ``None`` if that cannot be said now."""
        if self._room is None:
            return False
        try:
            grant = self._room.grant_of(self.author)
        except LocalMisuse:  # in the middle of a turn, which may change it
            return None
        return grant in (Grant.OWNER, Grant.WRITER)

    def stand(self, standing: Standing) -> None:
        """A renewed token may allow less than the one before, or more."""
        self.author = replace(standing.author_in(self.conversation), epoch=self.author.epoch)

    async def submit(self, submit: Submit) -> None:
        """Hand over an update; waits a moment while too many have no verdict."""
        if self._room is None:
            return
        submission = Submission(
            self,
            submit.update,
            is_large=submit.is_document or submit.is_restore,
            # What mends a gap after a loss is what was lost.
            may_restore=submit.is_document or submit.is_restore,
            tag=submit,
        )
        now_s = self._connection.now_s
        came_s = self._handed[0].came_s if self._handed else now_s
        try:
            async with asyncio.timeout(max(0.0, came_s + PATIENCE_S - now_s)):
                await self._room.submit(submission)
        except TimeoutError:
            self._put_off(submit, now_s)
        else:
            self._handed.append(_Handed(submit, now_s))

    def _put_off(self, submit: Submit, now_s: float) -> None:
        handed = _Handed(replace(submit, update=b""), now_s, is_put_off=True)
        self._handed.append(handed)
        self._put_offs += 1
        if self._put_offs > PUT_OFF_MAX:
            self.leave()
            self._connection.end(self, Unavailable("too much waits for a verdict"))

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
        """See :class:`~crdt_llm.sync.room.peer.Peer`."""
        wish, self._room, self._wish = self._wish, room, None
        if wish is None:
            raise AssertionError("a channel enters one room, once")
        follows = room.since(wish.lsn) if wish.log == self._connection.log else None
        self._lsn, self._has = room.lsn, room.state_vector()
        self._connection.opened(
            frames.Opened(
                self.number,
                self._connection.log,
                room.lsn,
                room.diff(wish.state_vector) if follows is None else follows,
                room.state_vector(self.author),
                room.grant_of(self.author),
                behind=bool(room.behind),
            )
        )
        self.presence(room.awareness.states)

    def settle(self, submission: Submission, verdict: Verdict, room: Room) -> None:
        """See :class:`~crdt_llm.sync.room.peer.Peer`."""
        asked = isinstance(verdict, Lacking)  # of all verdicts only this one says what is here
        state_vector = room.state_vector(self.author) if asked else EMPTY_STATE_VECTOR
        self._handed.popleft()
        self._connection.settle(submission.tag, verdict, room.lsn, state_vector)
        while self._handed and self._handed[0].is_put_off:
            self._put_offs -= 1
            self._connection.put_off(self._handed.popleft().submit, RETRY_MS)

    def deliver(self, delivery: Delivery) -> None:
        """See :class:`~crdt_llm.sync.room.peer.Peer`."""
        if self._room is None or self._connection.is_owed(self):
            return
        if len(delivery.update) <= UPDATE_BYTES_MAX:
            self._connection.change(self, Change(self.number, self._room.lsn, delivery.update))
        else:  # what one commit joins may be larger than the updates in it
            self._connection.owe(self)

    def answer(self, room: Room) -> None:
        """See :class:`~crdt_llm.sync.room.peer.Peer`."""
        pulled, self._pulled = self._pulled, None
        follows = room.since(self._lsn) if pulled is None else None
        if follows is None:
            follows = room.diff(self._has if pulled is None else pulled)
        self._lsn, self._has = room.lsn, room.state_vector()
        self._connection.pay(self, frames.State(self.number, room.lsn, follows))

    def presence(self, states: Iterable[AwarenessState]) -> None:
        """See :class:`~crdt_llm.sync.room.peer.Peer`."""
        if not self._is_speaking:
            self._connection.presence(self, states)

    def dismiss(self, error: CrdtLlmError) -> None:
        """See :class:`~crdt_llm.sync.room.peer.Peer`."""
        self._connection.end(self, error)
