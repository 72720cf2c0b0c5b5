"""The server's side of one connection in the plain y-websocket dialect, without any I/O.

This module owns the order of the conversation: who asks for what, what a gap leads to, when a
client's question may be answered, and how a connection ends. It must not know sockets, rooms,
documents or tasks: frames and verdicts come in, events come out, and whoever holds the session
carries them out in order.

* The server asks first: Step1 at once. A stock client answers with Step2 and asks on its own.
* A client's Step1 is answered only when its own Step2 was checked and is durable, so nobody is
  brought up to date whose own writes are about to be refused. Until then the question waits; of
  several only the last counts, because a replica only grows.
* A gap is no offence. The update is not applied and the server asks again. The answer comes after
  the update on the same socket, so it holds everything the update built on: if it still has a gap,
  the client's replica lacks something itself. The connection then ends with a retry code.
* A refusal is whole and ends the connection: first the reason, as the dialect's auth message, then
  a close code that says "do not come back".

The transitions are a table. Blame: what the table does not list raises ``LocalMisuse`` (a bug of
ours); what a peer does wrong ends in :class:`Close`.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias, assert_never

from crdt_llm.errors import LocalMisuse, MalformedMessage
from crdt_llm.sync.wire.verdict import (
    CloseCode,
    Committed,
    Denied,
    Known,
    Lacking,
    Postponed,
    close_code,
    reason_of,
)
from crdt_llm.sync.wire.y_websocket import (
    AuthDenied,
    AwarenessUpdate,
    QueryAwareness,
    SyncStep1,
    SyncStep2,
    SyncUpdate,
    decode,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from crdt_llm.errors import Refused
    from crdt_llm.sync.wire.verdict import Verdict
    from crdt_llm.sync.wire.y_websocket import AwarenessState, Message


class State(enum.Enum):
    """Where a session stands."""

    NEW = "new"
    ASKED = "asked"  # Step1 is out
    CHECKING = "checking"  # its Step2 is being checked
    LIVE = "live"
    ASKED_AGAIN = "asked again"  # there was a gap; Step1 is out, and its Step2 decides
    CHECKING_AGAIN = "checking again"
    CLOSED = "closed"


class Input(enum.Enum):
    """What moves a session."""

    OPEN = "open"
    STEP2 = "Step2 came"
    DONE = "the Step2 is durable"
    STEP2_GAP = "the Step2 has a gap"
    UPDATE_GAP = "an update has a gap"


class Then(enum.Enum):
    """What follows from a transition."""

    NOTHING = "nothing"
    ASK = "ask"
    GO_LIVE = "go live"
    GIVE_UP = "give up"


_TABLE: Final[Mapping[tuple[State, Input], tuple[State, Then]]] = {
    (State.NEW, Input.OPEN): (State.ASKED, Then.ASK),
    (State.ASKED, Input.STEP2): (State.CHECKING, Then.NOTHING),
    # Step1 is out already; its answer will hold this update too.
    (State.ASKED, Input.UPDATE_GAP): (State.ASKED_AGAIN, Then.NOTHING),
    (State.CHECKING, Input.DONE): (State.LIVE, Then.GO_LIVE),
    (State.CHECKING, Input.STEP2_GAP): (State.ASKED_AGAIN, Then.ASK),
    # Verdicts keep the order of what was handed over: this update came before the Step2.
    (State.CHECKING, Input.UPDATE_GAP): (State.CHECKING_AGAIN, Then.NOTHING),
    (State.LIVE, Input.UPDATE_GAP): (State.ASKED_AGAIN, Then.ASK),
    (State.ASKED_AGAIN, Input.STEP2): (State.CHECKING_AGAIN, Then.NOTHING),
    (State.ASKED_AGAIN, Input.UPDATE_GAP): (State.ASKED_AGAIN, Then.NOTHING),
    (State.CHECKING_AGAIN, Input.DONE): (State.LIVE, Then.GO_LIVE),
    (State.CHECKING_AGAIN, Input.STEP2_GAP): (State.CLOSED, Then.GIVE_UP),
    (State.CHECKING_AGAIN, Input.UPDATE_GAP): (State.CHECKING_AGAIN, Then.NOTHING),
}


@dataclass(frozen=True, slots=True)
class Submit:
    """Check an update and make it durable, then :meth:`Session.settle` this.

    Attributes:
        update: What the client wrote.
        answers: It is the Step2 that the session waits for, so it may be as large as a document.
            Any other is one more transaction.
    """

    update: bytes
    answers: bool


@dataclass(frozen=True, slots=True)
class Ask:
    """Send a Step1 with what is durable now."""


@dataclass(frozen=True, slots=True)
class GoLive:
    """From now on the client hears of every change."""


@dataclass(frozen=True, slots=True)
class Answer:
    """Send a Step2 with all that is durable and not in ``state_vector``."""

    state_vector: bytes


@dataclass(frozen=True, slots=True)
class Presence:
    """The client said who is here."""

    states: tuple[AwarenessState, ...]


@dataclass(frozen=True, slots=True)
class PresenceAsked:
    """Send everything that is known of who is here."""


@dataclass(frozen=True, slots=True)
class Close:
    """End the connection.

    Attributes:
        code: The close code.
        reason: One line for people.
        deny: Say the reason in an auth message first, where stock clients look for it.
    """

    code: CloseCode
    reason: str
    deny: bool


Event: TypeAlias = Submit | Ask | GoLive | Answer | Presence | PresenceAsked | Close


class Session:
    """One connection. Every method returns what to do, in order."""

    def __init__(self) -> None:
        self.state = State.NEW
        self._wish: bytes | None = None  # the state vector of a Step1 that waits for its answer

    def open(self) -> tuple[Event, ...]:
        """Begin: the connection is there and its principal may be here."""
        return self._move(Input.OPEN)

    def receive(self, frame: bytes) -> tuple[Event, ...]:
        """Take one frame. Any bytes will do; after the end they are ignored."""
        if self.state is State.CLOSED:
            return ()
        try:
            message = decode(frame)
        except MalformedMessage as error:
            return self._deny(error)
        return self._understood(message)

    def _understood(self, message: Message) -> tuple[Event, ...]:  # noqa: PLR0911 - one each
        match message:
            case SyncUpdate(update):
                return (Submit(update, answers=False),)
            case SyncStep2(update):
                answers = self.state in (State.ASKED, State.ASKED_AGAIN)
                moved = self._move(Input.STEP2) if answers else ()
                return (*moved, Submit(update, answers=answers))
            case SyncStep1(state_vector):
                if self.state is State.LIVE:
                    return (Answer(state_vector),)
                self._wish = state_vector
                return ()
            case AwarenessUpdate(states):
                return (Presence(states),)
            case QueryAwareness():
                return (PresenceAsked(),)
            case AuthDenied():
                return self._deny(MalformedMessage("a client has nothing to deny"))
            case _:
                assert_never(message)

    def settle(self, submit: Submit, verdict: Verdict) -> tuple[Event, ...]:
        """Hear what became of an update. Verdicts come in the order of the submits."""
        if self.state is State.CLOSED:
            return ()
        match verdict:
            case Committed() | Known():
                return self._move(Input.DONE) if submit.answers else ()
            case Lacking():
                return self._move(Input.STEP2_GAP if submit.answers else Input.UPDATE_GAP)
            case Denied(error):
                return self._deny(error)
            case Postponed(reason):
                return self.close(CloseCode.TRY_AGAIN, reason)
            case _:
                assert_never(verdict)

    def close(self, code: CloseCode, reason: str) -> tuple[Event, ...]:
        """End it from our side."""
        if self.state is State.CLOSED:
            return ()
        self.state, self._wish = State.CLOSED, None
        return (Close(code, reason, deny=code.is_final),)

    def _deny(self, error: Refused | MalformedMessage) -> tuple[Event, ...]:
        return self.close(close_code(error), reason_of(error))

    def _move(self, given: Input) -> tuple[Event, ...]:
        try:
            self.state, then = _TABLE[self.state, given]
        except KeyError:
            raise LocalMisuse(f"a session that is {self.state.value}, but {given.value}") from None
        match then:
            case Then.NOTHING:
                return ()
            case Then.ASK:
                return (Ask(),)
            case Then.GO_LIVE:
                wish, self._wish = self._wish, None
                return (GoLive(),) if wish is None else (GoLive(), Answer(wish))
            case Then.GIVE_UP:
                reason = "your replica lacks something that it builds on: reload it and try again"
                return (Close(CloseCode.TRY_AGAIN, reason, deny=False),)
            case _:
                assert_never(then)
