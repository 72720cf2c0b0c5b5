"""One conversation on a connection to the relay, without the connection and without a document.

This module owns what is said when: when a device is in sync, which writes are on their way and what
an answer to one of them means, what is sent again, and in which pace. It must not know sockets,
tasks or documents: frames go in and come out, updates and state vectors stay opaque, and time is an
argument. What has to be done about a frame is an event, and whoever does it says how it went.

    open -> Opened -> (the update is merged) -> [restore ->] live <-> pulling

Invariants:

K1. A write goes out under a number of the outbox, in order; at most :data:`WINDOW` wait for an
    answer. After a refusal, one: what follows may be refused for the same reason.
K2. When a write has to be sent again, what was sent behind it is forgotten as sent too, and
    refusals of that which still come are not listened to: nothing is lost by sending twice.
K3. What the relay lacks is sent once as a whole. If it still lacks something then, there is no
    sense in going on.
K4. A refusal is told once everything that was sent behind it is answered: some of it may have been
    taken, if it did not build on what was refused, and must then not be written anew.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import TYPE_CHECKING, Final, TypeAlias

from crdt_llm.errors import LocalMisuse, MalformedMessage, TooLarge
from crdt_llm.sync.wire.draft import common
from crdt_llm.sync.wire.frames import (
    DRAFT_BYTES_MAX,
    Ack,
    Change,
    Closed,
    Code,
    Draft,
    Leave,
    Nack,
    Open,
    Opened,
    Presence,
    Pull,
    Restore,
    State,
    Update,
)
from crdt_llm.sync.wire.verdict import shorten
from crdt_llm.sync.wire.y_websocket import UPDATE_BYTES_MAX

if TYPE_CHECKING:
    from collections.abc import Callable

    from crdt_llm.sync.client.local_replica import Written
    from crdt_llm.sync.client.presence import Company
    from crdt_llm.sync.wire.frames import FromClient

WINDOW: Final = 64
"""Writes that wait for an answer: a relay takes so many into one turn."""

RENEW_S: Final = 15.0
"""How often presence is announced anew; relays and Yjs clients forget it after 30 s."""

DROP_DRAFT_S: Final = 1.0
"""How long after a draft is taken back the node hears of it; saving the message takes less."""

PAUSE_MS: Final = 1000
"""How long to wait before the same is sent again, where the relay does not say."""

PAUSE_MS_MAX: Final = 60_000
"""The longest pause that a relay is believed."""

_REFUSED: Final = frozenset({Code.DENIED, Code.INVALID, Code.TOO_LARGE, Code.STALE_EPOCH})
_NOT_NOW: Final = frozenset({Code.RATE_LIMITED, Code.UNAVAILABLE})


class Phase(Enum):
    """Where a channel stands."""

    NEW = auto()
    OPENING = auto()  # we asked
    MERGING = auto()  # the relay said what we lack; it is being merged
    RESTORING = auto()  # the relay has lost something; it is on its way
    STALLED = auto()  # and did not want it: nothing can be written until it has
    LIVE = auto()
    PULLING = auto()  # something came that we cannot place; the rest was asked for
    CLOSED = auto()


# What may arrive in which phase. The rest is the relay's fault.
_TAKES: Final = {
    Opened: frozenset({Phase.OPENING}),
    State: frozenset({Phase.LIVE, Phase.PULLING, Phase.RESTORING, Phase.STALLED}),
    Change: frozenset({Phase.LIVE, Phase.PULLING, Phase.RESTORING, Phase.STALLED}),
}


@dataclass(frozen=True, slots=True)
class Settled:
    """The relay has these writes."""

    numbers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Rejected:
    """The relay will never take a write.

    Attributes:
        numbers: which; several came as one update.
        code: why, for programs.
        rule: the rule that was broken.
        reason: why, for people.
        settled: writes that were sent behind it, and that the relay has since the last answer.
    """

    numbers: tuple[int, ...]
    code: str
    rule: str
    reason: str
    settled: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Lacks:
    """The relay lacks something that a write builds on: :meth:`Channel.catch_up`."""

    state_vector: bytes


@dataclass(frozen=True, slots=True)
class NotRestored:
    """The relay did not take what it had lost; nothing can be written here until it does."""

    code: str
    reason: str


@dataclass(frozen=True, slots=True)
class CompanyChanged:
    """Another device or the node came, went, or says something else."""


Event: TypeAlias = (
    Opened | Change | State | Settled | Rejected | Lacks | NotRestored | CompanyChanged | Closed
)


class Channel:
    """The client side of one conversation on one connection.

    Args:
        number: which channel.
        company: who else is there.
        next_to_send: the first write of the outbox after a number, if it may be sent.
    """

    def __init__(
        self, number: int, company: Company, next_to_send: Callable[[int], Written | None]
    ) -> None:
        self.number = number
        self.company = company
        self.phase = Phase.NEW
        self._next_to_send = next_to_send
        self._frames: deque[FromClient] = deque()
        self._last_id = 0
        self._sent_through = 0  # number of the last write that went out
        self._in_flight: dict[int, tuple[int, ...]] = {}  # id -> numbers, in order
        self._window = WINDOW
        self._is_held = False  # an answer asks for something else first
        self._rejected: Rejected | None = None  # to be told (K4)
        self._restore: tuple[int, bytes] | None = None  # the id it went out under, and what
        self._restore_again: bytes | None = None  # after the pause
        self._catching_up = 0  # the id of the update with all that the relay lacked
        self._pause_until_s = 0.0
        self._renew_at_s = 0.0
        self._draft: tuple[str, str] | None = None
        self._drop_draft_at_s = float("inf")
        self._draft_sent: tuple[str, str] | None = None

    @property
    def is_synced(self) -> bool:
        """Whether everything that the relay had is here."""
        return self.phase in {Phase.LIVE, Phase.RESTORING, Phase.STALLED}

    @property
    def is_writable(self) -> bool:
        """Whether writes go out."""
        return self.phase in {Phase.LIVE, Phase.PULLING}

    # -- what the application says -------------------------------------------------------------

    def open(self, conversation: str, log: str | None, lsn: int, state_vector: bytes) -> None:
        """Take part, saying what is here already."""
        if self.phase is not Phase.NEW:
            raise LocalMisuse("a channel is opened once")
        self.phase = Phase.OPENING
        self._frames.append(Open(self.number, conversation, log, lsn, state_vector))

    def opened(self, restore: bytes | None) -> None:
        """What the relay sent on opening is merged.

        Args:
            restore: what the relay has lost of the acknowledged document, if anything.

        Raises:
            TooLarge: that does not fit a frame.
        """
        if restore is None:
            self.phase = Phase.LIVE
            return
        self.phase = Phase.RESTORING
        self._send_restore(restore)

    def _send_restore(self, update: bytes) -> None:
        _check_size(update)
        self._last_id += 1
        self._restore = (self._last_id, update)
        self._frames.append(Restore(self.number, self._last_id, update))

    def merged(self, frame: Change | State, *, gap: bool, state_vector: bytes) -> None:
        """Say how the merge of something that came went.

        Args:
            frame: what came.
            gap: it builds on something that is not here, and was left out.
            state_vector: what is here now.

        Raises:
            MalformedMessage: the relay leaves out what we said that we lack.
        """
        if isinstance(frame, State):
            if gap:
                raise MalformedMessage("the relay left out something that this device lacks")
            if self.phase is Phase.PULLING:
                self.phase = Phase.LIVE
        elif gap and self.phase is not Phase.PULLING:
            if self.phase is Phase.LIVE:
                self.phase = Phase.PULLING
            self._frames.append(Pull(self.number, state_vector))

    def catch_up(self, update: bytes, numbers: tuple[int, ...]) -> None:
        """Send what the relay lacks, with these writes in it.

        Raises:
            TooLarge: it does not fit a frame.
        """
        _check_size(update)
        self._is_held = False
        self._catching_up = self._send(numbers)
        self._frames.append(Update(self.number, self._catching_up, update))

    def restart(self, *, carefully: bool) -> None:
        """The outbox was written anew: send it from its beginning.

        Args:
            carefully: one by one, until one is taken.
        """
        self._is_held = False
        self._rejected = None
        self._in_flight.clear()
        self._sent_through = 0
        self._catching_up = 0
        self._frames = deque(one for one in self._frames if not isinstance(one, Update))
        if carefully:
            self._window = 1

    def leave(self) -> None:
        """Take no part any more."""
        self._frames.clear()
        if self.phase not in {Phase.NEW, Phase.CLOSED}:
            self._frames.append(Leave(self.number))
        self.phase = Phase.CLOSED

    def draft(self, after: str, text: str) -> None:
        """Say what is being typed; an empty text drops the hint."""
        self._draft = (after, shorten(text, DRAFT_BYTES_MAX)) if text else None

    # -- what goes out -------------------------------------------------------------------------

    def take(self, now_s: float) -> FromClient | None:
        """The next frame to send, or ``None``. Drafts are :meth:`take_draft`'s."""
        if self._restore_again is not None and now_s >= self._pause_until_s:
            update, self._restore_again = self._restore_again, None
            self._send_restore(update)
        if self._frames:
            return self._frames.popleft()
        if not self.is_writable and self.phase not in {Phase.RESTORING, Phase.STALLED}:
            return None
        if now_s >= self._renew_at_s:
            self._renew_at_s = now_s + RENEW_S
            return Presence(self.number, self.company.announcement())
        return self._take_write(now_s)

    def _take_write(self, now_s: float) -> Update | None:
        """K1."""
        is_full = len(self._in_flight) >= self._window
        if not self.is_writable or self._is_held or is_full or now_s < self._pause_until_s:
            return None
        written = self._next_to_send(self._sent_through)
        if written is None:
            return None
        return Update(self.number, self._send((written.number,)), written.update)

    def _send(self, numbers: tuple[int, ...]) -> int:
        self._last_id += 1
        self._in_flight[self._last_id] = numbers
        self._sent_through = max(self._sent_through, *numbers, 0)
        return self._last_id

    def due_s(self, now_s: float) -> float:
        """When :meth:`take` has something again without anything else happening."""
        if self.phase in {Phase.NEW, Phase.OPENING, Phase.MERGING, Phase.CLOSED}:
            return float("inf")
        if self._pause_until_s > now_s:
            return min(self._pause_until_s, self._renew_at_s)
        return self._renew_at_s

    def draft_due_s(self, now_s: float) -> float:
        """When the node is to hear of the draft as it is; infinity if it has.

        A draft that is taken back was usually sent as a message, which has to get there first: the
        node goes on from what it has read ahead.
        """
        if self.phase is not Phase.LIVE or self._draft == self._draft_sent:
            self._drop_draft_at_s = float("inf")
            return float("inf")
        if self._draft is not None:
            return now_s
        self._drop_draft_at_s = min(self._drop_draft_at_s, now_s + DROP_DRAFT_S)
        return self._drop_draft_at_s

    def take_draft(self) -> Draft:
        """The draft as it is now, as a difference to what was sent of it."""
        before, self._draft_sent = self._draft_sent, self._draft
        if self._draft is None:
            return Draft(self.number, None, 0, "")
        after, text = self._draft
        same_place = before is not None and before[0] == after
        now = text.encode()
        keep = common(before[1].encode(), now) if before is not None and same_place else 0
        return Draft(self.number, after, keep, now[keep:].decode())

    # -- what comes in -------------------------------------------------------------------------

    def receive(
        self, frame: Opened | Change | State | Ack | Nack | Presence | Closed, now_s: float
    ) -> Event | None:
        """Take a frame in; the answer says what is to be done about it, if anything.

        Raises:
            MalformedMessage: the relay says what it must not say now.
        """
        if self.phase is Phase.CLOSED:
            return frame if isinstance(frame, Closed) else None  # it crossed our leaving
        allowed = _TAKES.get(type(frame))
        if allowed is not None and self.phase not in allowed:
            raise MalformedMessage(f"the relay sent {type(frame).__name__} while {self.phase.name}")
        match frame:
            case Opened() | Change() | State():
                self.phase = Phase.MERGING if isinstance(frame, Opened) else self.phase
                return frame
            case Ack(_, identity, _):
                return self._acknowledged(identity)
            case Nack():
                return self._not_taken(frame, now_s)
            case Presence(_, states):
                return CompanyChanged() if self.company.hear(states) else None
            case Closed():
                self.phase = Phase.CLOSED
                self._frames.clear()
                return frame

    def _acknowledged(self, identity: int) -> Settled | Rejected | None:
        is_restored = self._restore is not None and identity >= self._restore[0]
        if is_restored:
            self._restore = None
            self.phase = Phase.LIVE
        taken = [known for known in self._in_flight if known <= identity]
        numbers = tuple(number for known in taken for number in self._in_flight.pop(known))
        if not taken:
            return Settled(()) if is_restored else None
        self._window = WINDOW
        if identity >= self._catching_up:
            self._catching_up = 0
        if self._rejected is not None and not self._in_flight:
            return replace(self._rejected, settled=numbers)
        return Settled(numbers)

    def _not_taken(self, nack: Nack, now_s: float) -> Event | None:
        if self._restore is not None and nack.id == self._restore[0]:
            return self._not_restored(nack, self._restore[1], now_s)
        if nack.id not in self._in_flight:
            return None  # about what is sent again anyway (K2)
        numbers = self._in_flight[nack.id]
        if self._rejected is not None or nack.code in _REFUSED:
            return self._refused(nack, numbers)
        self._forget_from(nack.id, numbers)
        if nack.code in _NOT_NOW:
            self._pause(nack, now_s)
            return None
        if nack.id == self._catching_up or nack.state_vector is None:  # K3
            raise MalformedMessage("the relay lacks what it was sent")
        self._is_held = True
        return Lacks(nack.state_vector)

    def _refused(self, nack: Nack, numbers: tuple[int, ...]) -> Rejected | None:
        """K4. What is refused behind the first will be written anew, and judged once more."""
        del self._in_flight[nack.id]
        self._is_held = True
        if self._rejected is None:
            self._rejected = Rejected(numbers, nack.code.value, nack.rule, nack.reason)
        return None if self._in_flight else self._rejected

    def _forget_from(self, identity: int, numbers: tuple[int, ...]) -> None:
        """K2."""
        for known in [known for known in self._in_flight if known >= identity]:
            del self._in_flight[known]
        self._sent_through = min(numbers, default=1) - 1

    def _not_restored(self, nack: Nack, update: bytes, now_s: float) -> Event | None:
        self._restore = None
        if nack.code in _NOT_NOW:
            self._pause(nack, now_s)
            self._restore_again = update
            return None
        self.phase = Phase.STALLED
        return NotRestored(nack.code.value, nack.reason)

    def _pause(self, nack: Nack, now_s: float) -> None:
        pause_ms = PAUSE_MS if nack.retry_ms is None else min(nack.retry_ms, PAUSE_MS_MAX)
        self._pause_until_s = now_s + pause_ms / 1000


def _check_size(update: bytes) -> None:
    if len(update) > UPDATE_BYTES_MAX:
        raise TooLarge(
            "document-too-large",
            f"the relay lacks {len(update)} bytes of this conversation, over the limit of"
            f" {UPDATE_BYTES_MAX}",
        )
