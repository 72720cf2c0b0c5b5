"""The relay's side of one connection in the native dialect, without any I/O.

This module owns the order of the conversation: what may be sent when, which numbers are in use, and
what answers what. It must not know sockets, rooms, documents or tokens: frames and decisions come
in, events come out, and whoever holds the session carries them out in order.

* The first frame is a Hello. Nothing else is understood before its token was accepted; later Hellos
  renew the token, for the same principal.
* An Open is answered by Opened or Closed, and in the end there is exactly one Closed for each Open,
  unless the connection ends first. What comes for a channel that is not open is ignored: the client
  may have sent it before it heard of the end.
* A conversation is open on one channel of a connection at most.
* Within a channel the ids of updates grow, and every update gets exactly one Ack or Nack, in the
  order of the ids, as long as the channel is open.

The transitions are two tables. Blame: what a table does not list raises ``LocalMisuse`` (a bug of
ours) if it came from our side; what a peer does wrong ends in :class:`Close`, or in ``Closed`` if
it concerns one channel.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, TypeAlias, assert_never

from crdt_llm.errors import Forbidden, LocalMisuse, MalformedMessage, Refused, TooLarge
from crdt_llm.sync.wire.frames import (
    REASON_BYTES_MAX,
    VERSION,
    Ack,
    Closed,
    Code,
    Draft,
    Hello,
    Leave,
    Nack,
    Open,
    Presence,
    Pull,
    Renew,
    Request,
    Restore,
    Update,
    WantLease,
    Watch,
    decode_from_client,
)
from crdt_llm.sync.wire.verdict import (
    CloseCode,
    Committed,
    Denied,
    Known,
    Lacking,
    Postponed,
    close_code,
    reason_of,
    shorten,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from crdt_llm.sync.wire.frames import FromClient, FromRelay, Opened, Welcome
    from crdt_llm.sync.wire.verdict import Verdict

CHANNELS_MAX: Final = 256
"""Open channels of one connection: a node has one for each conversation that is being answered, an
application a few for those on its screen. Each keeps a room in memory."""

LEFT: Final = 1000
"""The code of a channel that ended because its client left (RFC 6455: normal closure)."""


class Phase(enum.Enum):
    """Where a connection stands."""

    NEW = "new"
    GREETING = "greeting"  # its token is being looked at
    LIVE = "live"
    RENEWING = "renewing"
    CLOSED = "closed"


class Stage(enum.Enum):
    """Where a channel stands."""

    ABSENT = "absent"
    OPENING = "opening"
    OPEN = "open"


class Input(enum.Enum):
    """What moves a connection."""

    HELLO = "Hello came"
    ACCEPTED = "the token was accepted"


class ChannelInput(enum.Enum):
    """What moves a channel."""

    OPEN = "Open came"
    OPENED = "the room let it in"
    USE = "something of it came"
    LEAVE = "Leave came"
    END = "the room ended it"


_PHASES: Final[Mapping[tuple[Phase, Input], Phase]] = {
    (Phase.NEW, Input.HELLO): Phase.GREETING,
    (Phase.GREETING, Input.ACCEPTED): Phase.LIVE,
    (Phase.LIVE, Input.HELLO): Phase.RENEWING,
    (Phase.RENEWING, Input.ACCEPTED): Phase.LIVE,
}

_STAGES: Final[Mapping[tuple[Stage, ChannelInput], Stage]] = {
    (Stage.ABSENT, ChannelInput.OPEN): Stage.OPENING,
    # Sent before its sender heard of the end.
    (Stage.ABSENT, ChannelInput.USE): Stage.ABSENT,
    (Stage.ABSENT, ChannelInput.LEAVE): Stage.ABSENT,
    (Stage.OPENING, ChannelInput.OPENED): Stage.OPEN,
    (Stage.OPENING, ChannelInput.LEAVE): Stage.ABSENT,
    (Stage.OPENING, ChannelInput.END): Stage.ABSENT,
    (Stage.OPEN, ChannelInput.USE): Stage.OPEN,
    (Stage.OPEN, ChannelInput.LEAVE): Stage.ABSENT,
    (Stage.OPEN, ChannelInput.END): Stage.ABSENT,
}


@dataclass(frozen=True, slots=True)
class Greet:
    """Look at a token, then :meth:`NativeSession.accept` or :meth:`NativeSession.close`.

    Attributes:
        hello: What came.
    """

    hello: Hello


@dataclass(frozen=True, slots=True)
class Enter:
    """Enter the room, then :meth:`NativeSession.opened` or :meth:`NativeSession.end`."""

    open: Open


@dataclass(frozen=True, slots=True)
class Exit:
    """Leave the room; nothing more is heard of this channel."""

    channel: int


@dataclass(frozen=True, slots=True)
class Submit:
    """Check an update and make it durable, then :meth:`NativeSession.settle` this.

    Attributes:
        channel: Whose.
        id: The client's number for it.
        update: What it wrote.
        is_restore: It is what the relay lost.
        is_document: It may be as large as a document.
    """

    channel: int
    id: int
    update: bytes
    is_restore: bool
    is_document: bool


@dataclass(frozen=True, slots=True)
class Send:
    """Send a frame; those of one channel in this order."""

    frame: FromRelay


@dataclass(frozen=True, slots=True)
class Close:
    """End the connection."""

    code: CloseCode
    reason: str


Wish: TypeAlias = Pull | Presence | Draft | Watch | Request | WantLease | Renew
"""Frames that ask for something which the session itself has no part in."""

Event: TypeAlias = Greet | Enter | Exit | Submit | Send | Close | Wish


@dataclass(slots=True)
class _Channel:
    stage: Stage
    conversation: str = ""
    last_id: int = 0
    had_gap: bool = False  # and nothing was accepted since: what mends it may be a document


class NativeSession:
    """One connection. Every method returns what to do, in order."""

    def __init__(self) -> None:
        self.phase = Phase.NEW
        self._principal: str | None = None
        self._is_node = False
        self._channels: dict[int, _Channel] = {}

    def receive(self, frame: bytes) -> tuple[Event, ...]:
        """Take one frame. Any bytes will do; after the end they are ignored."""
        if self.phase is Phase.CLOSED:
            return ()
        try:
            return self._understood(decode_from_client(frame))
        except (Refused, MalformedMessage) as error:
            return self.close(close_code(error), reason_of(error))

    def accept(self, welcome: Welcome, *, node: bool) -> tuple[Event, ...]:
        """The token of the last :class:`Greet` counts. A connection never changes its principal."""
        if self._principal not in (None, welcome.principal):
            return self.close(CloseCode.UNAUTHENTICATED, "that token is somebody else's")
        self._move(Input.ACCEPTED)
        self._principal, self._is_node = welcome.principal, node
        return (Send(welcome),)

    def opened(self, opened: Opened) -> tuple[Event, ...]:
        """The room let the client in."""
        self._step(opened.channel, ChannelInput.OPENED)
        return (Send(opened),)

    def end(self, channel: int, code: int, reason: str) -> tuple[Event, ...]:
        """The room ended a channel, or did not let it in."""
        self._step(channel, ChannelInput.END)
        return (Send(Closed(channel, code, shorten(reason, REASON_BYTES_MAX))),)

    def settle(
        self, submit: Submit, verdict: Verdict, *, lsn: int, state_vector: bytes
    ) -> tuple[Event, ...]:
        """Hear what became of an update. Verdicts come in the order of the submits.

        Args:
            submit: Which.
            verdict: What.
            lsn: Where the room's log ends.
            state_vector: What the room has.
        """
        channel = self._channels.get(submit.channel)
        if channel is None or channel.stage is not Stage.OPEN:
            raise LocalMisuse("a verdict for a channel that is not open")
        match verdict:
            case Committed() | Known():
                channel.had_gap = False
                return (Send(Ack(submit.channel, submit.id, lsn)),)
            case Lacking(reason):
                channel.had_gap = True
                nack = _nack(submit, Code.GAP, "", reason, state_vector=state_vector)
            case Denied(error):
                rule = error.code if isinstance(error, Refused) else "malformed"
                reason = error.reason if isinstance(error, Refused) else str(error)
                nack = _nack(submit, code_of(error), rule, reason)
            case Postponed(reason, retry_s):
                nack = _nack(submit, Code.UNAVAILABLE, "", reason)
                nack = replace(nack, retry_ms=round(1000 * retry_s))
            case _:
                assert_never(verdict)
        return (Send(nack),)

    def put_off(self, submit: Submit, retry_ms: int) -> tuple[Event, ...]:
        """Hear that an update was not even looked at; in the order of the submits, like verdicts.

        Args:
            submit: Which.
            retry_ms: When it may come again.
        """
        channel = self._channels.get(submit.channel)
        if channel is None or channel.stage is not Stage.OPEN:
            raise LocalMisuse("a verdict for a channel that is not open")
        reason = "too much waits for a verdict: send it again later"
        nack = _nack(submit, Code.RATE_LIMITED, "", reason)
        return (Send(replace(nack, retry_ms=retry_ms)),)

    def close(self, code: CloseCode, reason: str) -> tuple[Event, ...]:
        """End it from our side."""
        if self.phase is Phase.CLOSED:
            return ()
        self.phase = Phase.CLOSED
        self._channels.clear()
        return (Close(code, reason),)

    # -- what came -----------------------------------------------------------------------------

    def _understood(self, frame: FromClient) -> tuple[Event, ...]:  # noqa: PLR0911 - one each
        if isinstance(frame, Hello):
            return self._greet(frame)
        if self.phase is not Phase.LIVE:
            raise MalformedMessage("the first frame is a Hello, and the next waits for its Welcome")
        match frame:
            case Open():
                return self._open(frame)
            case Leave(channel):
                if self._step(channel, ChannelInput.LEAVE) is Stage.ABSENT:
                    return ()
                return (Exit(channel), Send(Closed(channel, LEFT, "left")))
            case Watch() | Request():
                return (frame,)
            case Renew():
                self._only_nodes()
                return (frame,)
            case WantLease():
                self._only_nodes()
                return self._use(frame)
            case Update() | Restore() | Pull() | Presence() | Draft():
                return self._use(frame)
            case _:
                assert_never(frame)

    def _greet(self, hello: Hello) -> tuple[Event, ...]:
        if (self.phase, Input.HELLO) not in _PHASES:
            raise MalformedMessage("one Hello at a time: wait for its Welcome")
        self._move(Input.HELLO)
        if hello.version != VERSION:
            raise Refused("version", f"this relay speaks version {VERSION} of the dialect")
        return (Greet(hello),)

    def _open(self, frame: Open) -> tuple[Event, ...]:
        if frame.channel in self._channels:
            raise MalformedMessage(f"channel {frame.channel} is open: leave it first")
        if len(self._channels) >= CHANNELS_MAX:
            reason = f"a connection has at most {CHANNELS_MAX} channels: leave one first"
            return (Send(Closed(frame.channel, CloseCode.TRY_AGAIN, reason)),)
        if any(one.conversation == frame.conversation for one in self._channels.values()):
            reason = "malformed: that conversation is open on another channel of this connection"
            return (Send(Closed(frame.channel, CloseCode.MALFORMED, reason)),)
        self._step(frame.channel, ChannelInput.OPEN)
        self._channels[frame.channel].conversation = frame.conversation
        return (Enter(frame),)

    def _use(
        self, frame: Update | Restore | Pull | Presence | Draft | WantLease
    ) -> tuple[Event, ...]:
        channel = self._channels.get(frame.channel)
        if channel is None:
            return ()
        if (channel.stage, ChannelInput.USE) not in _STAGES:
            return self._offence(frame.channel, "wait for Opened before you use a channel")
        if not isinstance(frame, Update | Restore):
            return (frame,)
        if frame.id <= channel.last_id:
            return self._offence(frame.channel, "the ids of a channel's updates grow from 1")
        channel.last_id = frame.id
        restores = isinstance(frame, Restore)
        return (
            Submit(frame.channel, frame.id, frame.update, restores, restores or channel.had_gap),
        )

    def _offence(self, channel: int, reason: str) -> tuple[Event, ...]:
        return (Exit(channel), *self.end(channel, CloseCode.MALFORMED, f"malformed: {reason}"))

    def _only_nodes(self) -> None:
        if not self._is_node:
            raise Forbidden("not-a-node", "only a node asks for leases")

    # -- the tables ----------------------------------------------------------------------------

    def _move(self, given: Input) -> None:
        try:
            self.phase = _PHASES[self.phase, given]
        except KeyError:
            was = self.phase.value
            raise LocalMisuse(f"a connection that is {was}, but {given.value}") from None

    def _step(self, channel: int, given: ChannelInput) -> Stage:
        """Move a channel; the answer is where it was."""
        known = self._channels.get(channel)
        before = Stage.ABSENT if known is None else known.stage
        try:
            after = _STAGES[before, given]
        except KeyError:
            raise LocalMisuse(f"a channel that is {before.value}, but {given.value}") from None
        if after is Stage.ABSENT:
            self._channels.pop(channel, None)
        elif known is None:
            self._channels[channel] = _Channel(after)
        else:
            known.stage = after
        return before


def code_of(error: Refused | MalformedMessage) -> Code:
    """What a client does about a refusal."""
    match error:
        case Refused(code=Code.STALE_EPOCH):
            return Code.STALE_EPOCH
        case TooLarge():
            return Code.TOO_LARGE
        case Forbidden():
            return Code.DENIED
        case _:
            return Code.INVALID


def _nack(
    submit: Submit, code: Code, rule: str, reason: str, *, state_vector: bytes | None = None
) -> Nack:
    line = shorten(" ".join(reason.split()), REASON_BYTES_MAX)
    return Nack(submit.channel, submit.id, code, rule, line, None, state_vector)
