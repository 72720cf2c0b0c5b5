"""A peer of a room that hangs on a wire: a session, an outbox, and what ties them to the room.

This module carries a session's events to the room and the room's calls to the session. It must not
know sockets: whoever holds one gives frames in and takes frames out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, assert_never

from crdt_llm.document.conversation import EMPTY_STATE_VECTOR
from crdt_llm.document.rules import Author
from crdt_llm.sync.relay.outbox import Outbox
from crdt_llm.sync.relay.plain_session import (
    Answer,
    Ask,
    Close,
    GoLive,
    Presence,
    PresenceAsked,
    Session,
    Submit,
)
from crdt_llm.sync.room.peer import Peer, Submission
from crdt_llm.sync.wire.verdict import CLOSE_REASON_BYTES_MAX, close_code, reason_of, shorten
from crdt_llm.sync.wire.y_websocket import (
    AUTH_REASON_BYTES_MAX,
    UPDATE_BYTES_MAX,
    AuthDenied,
    SyncStep1,
    SyncStep2,
    SyncUpdate,
)
from crdt_llm.sync.wire.y_websocket import encode as encode_frame

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from crdt_llm.document.schema import Grant
    from crdt_llm.errors import CrdtLlmError
    from crdt_llm.sync.relay.metrics import Metrics
    from crdt_llm.sync.relay.plain_session import Event
    from crdt_llm.sync.room.peer import Delivery
    from crdt_llm.sync.room.room import Room
    from crdt_llm.sync.wire.verdict import CloseCode, Verdict
    from crdt_llm.sync.wire.y_websocket import AwarenessState

_DENIED_BYTES_MAX: Final = AUTH_REASON_BYTES_MAX - 2  # its length takes two bytes


def _update_frame(update: bytes) -> bytes:
    return encode_frame(SyncUpdate(update))


class RemotePeer(Peer):
    """One connection in the plain dialect.

    Args:
        principal: The authenticated name; empty for a connection that is only to be refused.
        wake: Called when :meth:`take` may have something, or it is time to close. It must not wait.
        cap: The most that its token allows in the conversation; ``None`` narrows nothing.
        metrics: What is counted; ``None`` counts nothing.
    """

    def __init__(
        self,
        principal: str,
        wake: Callable[[], None],
        *,
        cap: Grant | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        super().__init__(principal)
        self._metrics = metrics
        self.author = Author(principal, cap=cap)
        self.close_code: CloseCode | None = None
        self.close_reason = ""
        self._session = Session()
        self._outbox = Outbox()
        self._wake = wake
        self._room: Room | None = None
        self._is_live = False
        # What the client has for certain, as it said or as it was sent...
        self._has = EMPTY_STATE_VECTOR
        # ...will have, once the outbox is empty...
        self._will_have: bytes | None = None
        # ...and had, when it came to lack something: a Step2 with the difference is owed.
        self._owed: bytes | None = None

    # -- for whoever holds the socket ----------------------------------------------------------

    async def receive(self, frame: bytes) -> None:
        """Take one frame; waits while the room has too many of this peer's updates."""
        for event in self._session.receive(frame):
            if isinstance(event, Submit) and self._room is not None:
                # A stock client has no other way to bring back what was lost.
                answers = event.answers
                submission = Submission(
                    self, event.update, is_large=answers, may_restore=answers, tag=event
                )
                await self._room.submit(submission)
            else:
                self._follow(event)

    def take(self) -> bytes | None:
        """The next frame to send, or ``None`` while there is none.

        When there is none any more, what was taken before must be on its way in order.
        """
        frame = self._outbox.take()
        if frame is None:
            if self._will_have is not None:
                self._has, self._will_have = self._will_have, None
            if self._owed is not None and self._room is not None:
                self._room.ask(self)
        return frame

    def refuse(self, error: CrdtLlmError) -> None:
        """End the connection, saying why."""
        self._follow_all(self._session.close(close_code(error), reason_of(error)))

    def leave(self) -> None:
        """The socket is gone."""
        if self._room is not None:
            self._room.leave(self)

    # -- for the room --------------------------------------------------------------------------

    def entered(self, room: Room) -> None:
        """See :class:`~crdt_llm.sync.room.peer.Peer`."""
        self._room = room
        self._follow_all(self._session.open())
        self.presence(room.awareness.states)

    def settle(self, submission: Submission, verdict: Verdict, room: Room) -> None:
        """See :class:`~crdt_llm.sync.room.peer.Peer`."""
        del room  # known since it was entered
        if self._metrics is not None:
            self._metrics.judged("plain", verdict)
        self._follow_all(self._session.settle(submission.tag, verdict))

    def deliver(self, delivery: Delivery) -> None:
        """See :class:`~crdt_llm.sync.room.peer.Peer`."""
        if not self._is_live or self._owed is not None:
            return  # the Step2 to come holds it
        fits = len(delivery.update) <= UPDATE_BYTES_MAX  # what one commit joins may not
        if not fits or not self._outbox.put_update(delivery.frame(_update_frame)):
            self._outbox.drop_document()
            self._will_have = None
            self._owed = self._has
            if self._metrics is not None:
                self._metrics.resynced("plain")
        self._wake()

    def answer(self, room: Room) -> None:
        """See :class:`~crdt_llm.sync.room.peer.Peer`."""
        if self._owed is None:
            return
        owed, self._owed = self._owed, None
        self._will_have = room.state_vector()
        self._outbox.put_document(encode_frame(SyncStep2(room.diff(owed))))
        self._wake()

    def presence(self, states: Iterable[AwarenessState]) -> None:
        """See :class:`~crdt_llm.sync.room.peer.Peer`."""
        self._outbox.put_presence(states)
        self._wake()

    def dismiss(self, error: CrdtLlmError) -> None:
        """See :class:`~crdt_llm.sync.room.peer.Peer`."""
        self.refuse(error)

    # -- between the two -----------------------------------------------------------------------

    def _follow_all(self, events: Iterable[Event]) -> None:
        for event in events:
            self._follow(event)

    def _follow(self, event: Event) -> None:  # noqa: C901 - a table of events
        match event:
            case Ask():
                if self._room is not None:
                    self._outbox.put_first(
                        encode_frame(SyncStep1(self._room.state_vector(self.author)))
                    )
            case GoLive():
                self._is_live = True
            case Answer(state_vector):
                self._owed = self._has = state_vector
                self._will_have = None
                self._outbox.drop_document()
            case Presence(states):
                if self._room is not None:
                    self._room.say(self, states)
            case PresenceAsked():
                if self._room is not None:
                    self.presence(self._room.awareness.states)
            case Close(code, reason, deny):
                self._close(code, reason, deny=deny)
            case Submit():
                raise AssertionError("updates are handed over where waiting is possible")
            case _:
                assert_never(event)
        self._wake()

    def _close(self, code: CloseCode, reason: str, *, deny: bool) -> None:
        if self._metrics is not None and code.is_final:
            self._metrics.refused(str(code.value))
        self._outbox.drop_all()
        self._is_live = False
        self._owed = None
        if deny:
            text = shorten(reason, _DENIED_BYTES_MAX)
            self._outbox.put_first(encode_frame(AuthDenied(text)))
        self.close_code = code
        self.close_reason = shorten(reason, CLOSE_REASON_BYTES_MAX)
        self.leave()
