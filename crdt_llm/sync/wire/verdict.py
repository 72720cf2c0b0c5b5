"""What a room says of a write, and the close codes that tell a peer whether to come back.

This module owns the words that rooms, sessions and sockets share. It must not know how a verdict is
reached or how it travels.

Close codes follow y-websocket 3: 4400 to 4499 mean "do not come back with the same request", every
other code means "try again later".
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias

from crdt_llm.errors import (
    AuthenticationFailed,
    Corrupt,
    Forbidden,
    MalformedMessage,
    Refused,
    Stopping,
    StoreFailed,
    TooLarge,
    Unavailable,
)

if TYPE_CHECKING:
    from crdt_llm.errors import CrdtLlmError

NO_SUCH_CONVERSATION: Final = "no-such-conversation"
"""The code of the refusal of a name that is no conversation id."""

CLOSE_REASON_BYTES_MAX: Final = 123
"""The longest reason that a close frame can carry (RFC 6455, 5.5: 125 bytes with the code)."""


class CloseCode(enum.IntEnum):
    """Why a connection ends."""

    INTERNAL_ERROR = 1011  # a fault of ours; come back
    RESTART = 1012  # this server stops; come back
    TRY_AGAIN = 1013  # not now: the store failed, or the peer's replica lacks something
    MALFORMED = 4400  # what was sent is no message of the protocol
    UNAUTHENTICATED = 4401  # no token, or not one we know
    FORBIDDEN = 4403  # known, but without a right in this conversation
    NO_SUCH_CONVERSATION = 4404  # that is no id of a conversation
    DAMAGED = 4410  # what is stored is damaged; it does not heal by asking again
    TOO_LARGE = 4413  # over a named limit
    REFUSED = 4422  # understood, and against a rule

    @property
    def is_final(self) -> bool:
        """Whether the peer must not come back with the same request."""
        return 4400 <= self <= 4499  # noqa: PLR2004 - the range that y-websocket honours


@dataclass(frozen=True, slots=True)
class Committed:
    """Durable, as part of the log up to ``lsn``."""

    lsn: int


@dataclass(frozen=True, slots=True)
class Known:
    """Nothing new in it; all of what it says is durable."""


@dataclass(frozen=True, slots=True)
class Lacking:
    """A gap: it builds on something unknown here. Not applied, and no offence."""

    reason: str


@dataclass(frozen=True, slots=True)
class Denied:
    """Against a rule, or no update at all. Nothing of it was stored or seen by others."""

    error: Refused | MalformedMessage


@dataclass(frozen=True, slots=True)
class Postponed:
    """Not durable, for the store takes no writes now. Nothing of it was seen by others.

    Attributes:
        reason: One line for people.
        retry_s: When it may be tried again.
    """

    reason: str
    retry_s: float


Verdict: TypeAlias = Committed | Known | Lacking | Denied | Postponed
"""What became of a write. If there is no verdict, the room ended, and the peer was told why."""


_CODES: Final[tuple[tuple[type[CrdtLlmError], CloseCode], ...]] = (  # the first that fits
    (AuthenticationFailed, CloseCode.UNAUTHENTICATED),
    (Forbidden, CloseCode.FORBIDDEN),
    (TooLarge, CloseCode.TOO_LARGE),
    (Refused, CloseCode.REFUSED),
    (MalformedMessage, CloseCode.MALFORMED),
    (Corrupt, CloseCode.DAMAGED),
    (Stopping, CloseCode.RESTART),
    (Unavailable, CloseCode.TRY_AGAIN),
)


def close_code(error: CrdtLlmError) -> CloseCode:
    """The close code that an error stands for on a socket."""
    if isinstance(error, Refused) and error.code == NO_SUCH_CONVERSATION:
        return CloseCode.NO_SUCH_CONVERSATION
    fitting = (code for kind, code in _CODES if isinstance(error, kind))
    return next(fitting, CloseCode.INTERNAL_ERROR)


def reason_of(error: CrdtLlmError) -> str:
    """One line for a peer; of a refusal its code comes first, for programs.

    What is the matter with a disk of ours is for our log alone: it names our files.
    """
    match error:
        case StoreFailed():
            return "the store cannot be used now"
        case Corrupt():
            return "what is stored of it is damaged: it can be restored from a replica"
        case Refused():
            text = f"{error.code}: {error.reason}"
        case MalformedMessage():
            text = f"malformed: {error}"
        case _:
            text = str(error)
    return " ".join(text.split())


def one_line(fault: BaseException) -> str:
    """A fault of ours for the log: its kind and what it says, without its stack."""
    return " ".join(f"{type(fault).__name__}: {fault}".split())


def shorten(text: str, bytes_max: int) -> str:
    """Cut text to a number of UTF-8 bytes, between characters."""
    raw = text.encode(errors="replace")
    return text if len(raw) <= bytes_max else raw[:bytes_max].decode(errors="ignore")
