"""The native dialect ``crdt-llm.v1``: one frame of bytes, one message, and back.

This module owns the grammar of frames and their limits. It must not know sockets, rooms or
documents: updates and state vectors are opaque here, and whether a message is allowed is for
others.

A frame is one binary websocket message: a MessagePack array, a number for its kind first, then its
fields in the order of the classes below. :data:`FROM_CLIENT` and :data:`FROM_RELAY` are the tables
of kinds; both :func:`encode` and :func:`decode` read them. A frame with a kind, a number of fields
or a value that the table does not have is malformed. There are no optional fields: what is absent
is nil, so that a frame says all that it means.

Many conversations share one socket. Each is opened under a *channel*, a number that the client
chooses and that stands for the conversation until either side closes it. *Update ids* are numbers
of the client's own; within a channel they grow.

``protocol/vectors/frames.json`` holds one frame of each kind, read by every implementation.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import msgpack

from crdt_llm.document.schema import is_conversation_id, is_entry_id
from crdt_llm.errors import LocalMisuse, MalformedMessage
from crdt_llm.sync.wire.y_websocket import (
    AWARENESS_STATE_BYTES_MAX,
    AWARENESS_STATES_MAX,
    CLIENT_ID_MAX,
    UPDATE_BYTES_MAX,
    VAR_UINT_MAX,
    AwarenessState,
    decode_state_vector,
    parse_json,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

SUBPROTOCOL: Final = "crdt-llm.v1"
"""What a client offers in the websocket handshake."""

VERSION: Final = 1
"""The version that both sides name in their first frame; the subprotocol names it too."""

CHANNEL_MAX: Final = 2**16 - 1
"""The largest number of a channel; how many may be open at once is the relay's to say."""

NAME_CHARACTERS_MAX: Final = 200
"""Characters of a principal, a device, a code, or the name of a request."""

TOKEN_CHARACTERS_MAX: Final = 8 << 10
"""Characters of a token; one with a hundred scopes takes 6 KiB."""

REASON_BYTES_MAX: Final = 1 << 10
"""Bytes of a reason: one line for people."""

DRAFT_BYTES_MAX: Final = 64 << 10
"""UTF-8 bytes of a draft hint: a long letter. Longer drafts are prefilled once they are sent."""

LISTED_MAX: Final = 1000
"""Conversations in one frame of the list, or of work; more take several."""

REQUEST_BYTES_MAX: Final = 16 << 10
"""Bytes of what a request or an answer carries."""

FRAME_BYTES_MAX: Final = UPDATE_BYTES_MAX + (2 << 20)
"""The largest frame: an update, a state vector of 65,536 clients, and its header."""

VALUES_MAX: Final = 1 << 16
"""Values of one frame, lists and their elements alike, before any of them is made: an empty list
takes one byte of a frame and sixty of memory. A thousand lines of a list have 15,000."""

HELLO_BYTES_MAX: Final = 16 << 10
"""The largest first frame: nobody is known before it, so nobody may make the relay read more."""

_PUBLIC_KEY_BYTES: Final = 32  # Ed25519
_SIGNATURE_BYTES: Final = 64  # Ed25519
_NESTING_MAX: Final = 8  # of what a request carries; nothing here needs more
_LOG_CHARACTERS_MAX: Final = 64


class Code(StrEnum):
    """Why an update was not taken, for programs. The finer rule is beside it."""

    DENIED = "denied"  # this principal may not write that
    INVALID = "invalid"  # against a rule of the document, or no update at all
    GAP = "gap"  # builds on what is not here: send what the state vector lacks
    TOO_LARGE = "too-large"
    RATE_LIMITED = "rate-limited"  # the same again, after the pause
    STALE_EPOCH = "stale-epoch"  # a node whose lease is over
    UNAVAILABLE = "unavailable"  # not durable: the same again, after the pause


# -- from a client (or a node) to the relay ----------------------------------------------------


@dataclass(frozen=True, slots=True)
class Hello:
    """Who is there. The first frame; sent again it renews the token on a live connection.

    Attributes:
        version: :data:`VERSION`.
        token: Who it is; ``None`` if it came in the handshake.
        device: The name of this device, for people.
        node: The Ed25519 public key of a node; ``None`` for everyone else.
    """

    version: int
    token: str | None = field(repr=False)
    device: str
    node: bytes | None


@dataclass(frozen=True, slots=True)
class Open:
    """Take part in a conversation.

    Attributes:
        channel: A number that is not in use on this connection.
        conversation: Its id.
        log: The relay's log that ``lsn`` speaks of; ``None`` if there was none.
        lsn: Up to where in it the client has everything.
        state_vector: What the client has, where ``log`` and ``lsn`` do not tell.
    """

    channel: int
    conversation: str
    log: str | None
    lsn: int
    state_vector: bytes


@dataclass(frozen=True, slots=True)
class Update:
    """A change. Sent again until it is acknowledged or refused."""

    channel: int
    id: int
    update: bytes


@dataclass(frozen=True, slots=True)
class Restore:
    """Everything that a client had acknowledged, for a relay that has lost it."""

    channel: int
    id: int
    update: bytes


@dataclass(frozen=True, slots=True)
class Pull:
    """Ask for everything that is not in ``state_vector``."""

    channel: int
    state_vector: bytes


@dataclass(frozen=True, slots=True)
class Presence:
    """Who is here, or went. A client speaks of itself only; both directions."""

    channel: int
    states: tuple[AwarenessState, ...]


@dataclass(frozen=True, slots=True)
class Draft:
    """What is being typed, for the node alone: it is never stored and never passed to others.

    Attributes:
        channel: The conversation's.
        after: The entry that it will be written after, ``""`` for none; ``None`` drops the draft.
        keep: How many UTF-8 bytes of the draft before stay; 0 after a new connection.
        text: What follows them.
    """

    channel: int
    after: str | None
    keep: int
    text: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Leave:
    """Take no part any more; answered by :class:`Closed`, unless the relay closed it before."""

    channel: int


@dataclass(frozen=True, slots=True)
class Watch:
    """Hear of one's own list of conversations from now on, or no more."""

    on: bool


@dataclass(frozen=True, slots=True)
class Request:
    """Ask the relay to do something that is not a write in a document.

    Attributes:
        id: A number of the client's own, which the answer repeats.
        name: What: see ``protocol/PROTOCOL.md``.
        arguments: Plain values by name.
    """

    id: int
    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class WantLease:
    """A node asks for the lease of a conversation, or gives it back."""

    channel: int
    hold: bool


@dataclass(frozen=True, slots=True)
class Renew:
    """A node is alive: all leases of this connection go on."""


# -- from the relay ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Welcome:
    """The answer to :class:`Hello`.

    Attributes:
        version: :data:`VERSION`.
        principal: Who the token stands for.
        relay: The relay's Ed25519 public key, to be pinned.
        expires_at: When the token ends, ms since 1970; ``None`` if it does not.
        log: The name of the relay's log.
    """

    version: int
    principal: str
    relay: bytes
    expires_at: int | None
    log: str


@dataclass(frozen=True, slots=True)
class Opened:
    """The conversation, as far as the client lacked it: it is in sync with this frame.

    Attributes:
        channel: As asked.
        log: The log that ``lsn`` speaks of.
        lsn: Up to where the client now has everything.
        update: What it lacked.
        state_vector: What the relay has: whatever the client has beyond it was never acknowledged,
            or was lost.
        grant: ``owner``, ``writer`` or ``reader``; ``None`` before there is a birth.
        behind: The relay lacks something that was admitted, and waits for a replica that has it.
    """

    channel: int
    log: str
    lsn: int
    update: bytes
    state_vector: bytes
    grant: str | None
    behind: bool


@dataclass(frozen=True, slots=True)
class Change:
    """What others wrote, durable; in the order of the log."""

    channel: int
    lsn: int
    update: bytes


@dataclass(frozen=True, slots=True)
class Ack:
    """This update, and every earlier one of the channel that was not refused, is durable.

    Attributes:
        channel: The conversation's.
        id: The update's.
        lsn: Where in the log, or before.
    """

    channel: int
    id: int
    lsn: int


@dataclass(frozen=True, slots=True)
class Nack:
    """This update was not taken, as a whole.

    Attributes:
        channel: The conversation's.
        id: The update's.
        code: For programs; decides what a client does next.
        rule: The rule that was broken, as ``protocol/SCHEMA.md`` names it; may be empty.
        reason: One line for people.
        retry_ms: Wait this long before the same is sent again; ``None`` if that is of no use.
        state_vector: With ``gap`` what the relay has.
    """

    channel: int
    id: int
    code: Code
    rule: str
    reason: str
    retry_ms: int | None
    state_vector: bytes | None


@dataclass(frozen=True, slots=True)
class State:
    """Everything that the client lacked: the answer to :class:`Pull`, or after slow reading."""

    channel: int
    lsn: int
    update: bytes


@dataclass(frozen=True, slots=True)
class Hint:
    """A :class:`Draft` on its way to the node; ``source`` tells drafts of one channel apart."""

    channel: int
    source: int
    after: str | None
    keep: int
    text: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Closed:
    """A channel ends, and its number is free again; each :class:`Open` leads to one of these.

    Attributes:
        channel: Which.
        code: As for the close of a connection; 1000 after :class:`Leave`.
        reason: One line for people.
    """

    channel: int
    code: int
    reason: str


@dataclass(frozen=True, slots=True)
class Listed:
    """Conversations of this principal.

    Attributes:
        whole: These are all, together with the frames that follow until one that is ``end``.
        end: No frame of the same list follows.
        conversations: ``(id, facts)``; facts are ``None`` for one that is gone.
    """

    whole: bool
    end: bool
    conversations: tuple[tuple[str, Mapping[str, Any] | None], ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of a :class:`Request`: values, or a code and a reason."""

    id: int
    values: Mapping[str, Any] | None
    code: str
    reason: str


@dataclass(frozen=True, slots=True)
class Leased:
    """The lease of a conversation.

    Attributes:
        channel: The conversation's.
        epoch: Its epoch; ``None`` if the node does not hold it (any more).
        signature: The relay's, over the lease; empty without an epoch.
        ttl_ms: How long it goes on without :class:`Renew`; without an epoch, when to ask again.
        reason: Without an epoch, why.
    """

    channel: int
    epoch: int | None
    signature: bytes
    ttl_ms: int
    reason: str


@dataclass(frozen=True, slots=True)
class Renewed:
    """All leases of the connection go on for this long."""

    ttl_ms: int


@dataclass(frozen=True, slots=True)
class Work:
    """Conversations that changed and that the node does not take part in now."""

    conversations: tuple[str, ...]


FromClient: TypeAlias = (
    Hello
    | Open
    | Update
    | Restore
    | Pull
    | Presence
    | Draft
    | Leave
    | Watch
    | Request
    | WantLease
    | Renew
)
FromRelay: TypeAlias = (
    Welcome
    | Opened
    | Change
    | Ack
    | Nack
    | State
    | Presence
    | Hint
    | Closed
    | Listed
    | Answer
    | Leased
    | Renewed
    | Work
)
Frame: TypeAlias = FromClient | FromRelay


# -- forms of fields: each takes what MessagePack gave and answers the value, or raises ----------


def _whole(largest: int, least: int = 0) -> Callable[[Any], int]:
    def form(value: Any) -> int:
        if type(value) is not int or not least <= value <= largest:
            raise MalformedMessage(f"a whole number from {least} to {largest} was expected")
        return value

    return form


def _text(bytes_max: int, bytes_min: int = 0) -> Callable[[Any], str]:
    def form(value: Any) -> str:
        if not isinstance(value, str):
            raise MalformedMessage("text was expected")
        if not bytes_min <= len(value.encode()) <= bytes_max:
            raise MalformedMessage(f"text of {bytes_min} to {bytes_max} bytes was expected")
        return value

    return form


def _bytes(most: int, least: int = 0) -> Callable[[Any], bytes]:
    def form(value: Any) -> bytes:
        if not isinstance(value, bytes) or not least <= len(value) <= most:
            raise MalformedMessage(f"{least} to {most} bytes were expected")
        return value

    return form


def _maybe(form: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else form(value)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise MalformedMessage("true or false was expected")
    return value


def _conversation(value: Any) -> str:
    if not isinstance(value, str) or not is_conversation_id(value):
        raise MalformedMessage("that is no conversation id")
    return value


def _after(value: Any) -> str | None:
    if value is None or value == "":
        return None if value is None else ""
    if not isinstance(value, str) or not is_entry_id(value):
        raise MalformedMessage("that is no entry id")
    return value


def _state_vector(value: Any) -> bytes:
    if not isinstance(value, bytes):
        raise MalformedMessage("a state vector was expected")
    decode_state_vector(value)
    return value


def _list(value: Any, most: int) -> list[Any]:
    if not isinstance(value, list) or len(value) > most:
        raise MalformedMessage(f"a list of at most {most} was expected")
    return value


def _states(value: Any) -> tuple[AwarenessState, ...]:
    return tuple(_awareness_state(one) for one in _list(value, AWARENESS_STATES_MAX))


def _awareness_state(value: Any) -> AwarenessState:
    if not isinstance(value, list) or len(value) != 3:  # noqa: PLR2004 - its three fields
        raise MalformedMessage("a state is a client, a clock and JSON")
    client, clock, state = value
    checked = _maybe(_text(AWARENESS_STATE_BYTES_MAX))(state)
    if checked is not None and parse_json(checked) is None:
        raise MalformedMessage("who went is nil, not the JSON null")
    return AwarenessState(_whole(CLIENT_ID_MAX)(client), _whole(VAR_UINT_MAX)(clock), checked)


def _plain(value: Any, depth: int = 0) -> Any:
    """Plain values with text as keys, not nested too deep."""
    if depth > _NESTING_MAX:
        raise MalformedMessage(f"values are nested at most {_NESTING_MAX} deep")
    match value:
        case dict():
            if not all(isinstance(key, str) for key in value):
                raise MalformedMessage("names are text")
            return {key: _plain(one, depth + 1) for key, one in value.items()}
        case list():
            return [_plain(one, depth + 1) for one in value]
        case None | bool() | int() | float() | str() | bytes():
            return value
        case _:
            raise MalformedMessage("only plain values were expected")


def _map(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise MalformedMessage("a map was expected")
    if len(_pack(value)) > REQUEST_BYTES_MAX:
        raise MalformedMessage(f"a map has at most {REQUEST_BYTES_MAX} bytes")
    checked: dict[str, Any] = _plain(value)
    return checked


def _listed(value: Any) -> tuple[tuple[str, dict[str, Any] | None], ...]:
    pairs = _list(value, LISTED_MAX)
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):  # noqa: PLR2004
        raise MalformedMessage("a line of the list is an id and its facts")
    return tuple((_conversation(one), _maybe(_map)(facts)) for one, facts in pairs)


def _conversations(value: Any) -> tuple[str, ...]:
    return tuple(_conversation(one) for one in _list(value, LISTED_MAX))


def _code(value: Any) -> Code:
    try:
        return Code(_name(value))
    except ValueError as error:
        raise MalformedMessage("that is no code of a refusal") from error


_channel = _whole(CHANNEL_MAX)
_number = _whole(VAR_UINT_MAX)
_name = _text(4 * NAME_CHARACTERS_MAX)
_reason = _text(REASON_BYTES_MAX)
_log = _text(_LOG_CHARACTERS_MAX, 1)
_update = _bytes(UPDATE_BYTES_MAX)
_draft = _text(DRAFT_BYTES_MAX)
_keep = _whole(DRAFT_BYTES_MAX)
_key = _bytes(_PUBLIC_KEY_BYTES, _PUBLIC_KEY_BYTES)

_Forms: TypeAlias = "tuple[Callable[[Any], Any], ...]"
_Table: TypeAlias = "Mapping[int, tuple[type[Frame], _Forms]]"

FROM_CLIENT: Final[_Table] = {
    0: (Hello, (_number, _maybe(_text(TOKEN_CHARACTERS_MAX)), _name, _maybe(_key))),
    1: (Open, (_channel, _conversation, _maybe(_log), _number, _state_vector)),
    2: (Update, (_channel, _number, _update)),
    3: (Restore, (_channel, _number, _update)),
    4: (Pull, (_channel, _state_vector)),
    5: (Presence, (_channel, _states)),
    6: (Draft, (_channel, _after, _keep, _draft)),
    7: (Leave, (_channel,)),
    8: (Watch, (_flag,)),
    9: (Request, (_number, _name, _map)),
    10: (WantLease, (_channel, _flag)),
    11: (Renew, ()),
}
"""The kinds of frames that clients and nodes send, with the forms of their fields."""

FROM_RELAY: Final[_Table] = {
    5: (Presence, (_channel, _states)),
    32: (Welcome, (_number, _name, _key, _maybe(_number), _log)),
    33: (Opened, (_channel, _log, _number, _update, _state_vector, _maybe(_name), _flag)),
    34: (Change, (_channel, _number, _update)),
    35: (Ack, (_channel, _number, _number)),
    36: (
        Nack,
        (_channel, _number, _code, _name, _reason, _maybe(_number), _maybe(_state_vector)),
    ),
    37: (State, (_channel, _number, _update)),
    38: (Hint, (_channel, _number, _after, _keep, _draft)),
    39: (Closed, (_channel, _whole(4999, 1000), _reason)),
    40: (Listed, (_flag, _flag, _listed)),
    41: (Answer, (_number, _maybe(_map), _name, _reason)),
    42: (Leased, (_channel, _maybe(_number), _bytes(_SIGNATURE_BYTES), _number, _reason)),
    43: (Renewed, (_number,)),
    44: (Work, (_conversations,)),
}
"""The kinds of frames that a relay sends."""

_KINDS: Final[Mapping[type[Frame], int]] = {
    kind: number for table in (FROM_CLIENT, FROM_RELAY) for number, (kind, _) in table.items()
}
_FIELDS: Final[Mapping[type[Frame], tuple[str, ...]]] = {
    kind: tuple(one.name for one in fields(kind)) for kind in _KINDS
}


def encode(frame: Frame) -> bytes:
    """The bytes of a frame.

    Raises:
        LocalMisuse: It does not fit the grammar, or its limits.
    """
    kind = type(frame)
    values = [_bare(getattr(frame, name)) for name in _FIELDS[kind]]
    try:
        encoded = _pack([_KINDS[kind], *values])
    except (ValueError, TypeError, OverflowError) as error:
        raise LocalMisuse(f"a {kind.__name__} holds what no frame can carry") from error
    if len(encoded) > FRAME_BYTES_MAX:
        raise LocalMisuse(f"a frame has at most {FRAME_BYTES_MAX} bytes, not {len(encoded)}")
    return encoded


def decode_from_client(frame: bytes) -> FromClient:
    """The message that a client or a node sent.

    Raises:
        MalformedMessage: The bytes are no such frame.
    """
    message: FromClient = _decode(frame, FROM_CLIENT)
    return message


def decode_from_relay(frame: bytes) -> FromRelay:
    """The message that a relay sent.

    Raises:
        MalformedMessage: The bytes are no such frame.
    """
    message: FromRelay = _decode(frame, FROM_RELAY)
    return message


def _decode(frame: bytes, table: _Table) -> Any:
    if len(frame) > FRAME_BYTES_MAX:
        raise MalformedMessage(f"a frame has at most {FRAME_BYTES_MAX} bytes")
    # A value takes a byte at least, so most frames need not be counted.
    if len(frame) > VALUES_MAX and not _are_few(frame):
        raise MalformedMessage(f"a frame has at most {VALUES_MAX} values")
    try:
        parts = msgpack.unpackb(frame)
    except (ValueError, msgpack.UnpackException, RecursionError) as error:
        raise MalformedMessage("a frame is one MessagePack value") from error
    if not isinstance(parts, list) or not parts or type(parts[0]) is not int:
        raise MalformedMessage("a frame is a list that begins with its kind")
    known = table.get(parts[0])
    if known is None:
        raise MalformedMessage(f"there is no frame of kind {parts[0]} in this direction")
    kind, forms = known
    if len(parts) != 1 + len(forms):
        raise MalformedMessage(f"a frame of kind {parts[0]} has {len(forms)} fields")
    try:
        return kind(*(form(value) for form, value in zip(forms, parts[1:], strict=True)))
    except UnicodeEncodeError as error:  # lone surrogates cannot be encoded
        raise MalformedMessage("text is not valid Unicode") from error


_FIXED: Final = {
    **dict.fromkeys(range(0x80), 0),
    **{0xA0 + length: length for length in range(32)},
    **dict.fromkeys((0xC0, 0xC1, 0xC2, 0xC3), 0),
    0xCA: 4,
    0xCB: 8,
    0xCC: 1,
    0xCD: 2,
    0xCE: 4,
    0xCF: 8,
    0xD0: 1,
    0xD1: 2,
    0xD2: 4,
    0xD3: 8,
    **{0xD4 + power: 1 + 2**power for power in range(5)},
    **dict.fromkeys(range(0xE0, 0x100), 0),
}
"""First byte of a MessagePack value -> bytes behind it, where the byte says how many."""

_COUNTED: Final = {
    0xC4: (1, 0),
    0xC5: (2, 0),
    0xC6: (4, 0),
    0xC7: (1, 1),
    0xC8: (2, 1),
    0xC9: (4, 1),
    0xD9: (1, 0),
    0xDA: (2, 0),
    0xDB: (4, 0),
}
"""First byte -> bytes of the length behind it, and bytes that the length does not count."""

_CONTAINERS: Final = {0xDC: (2, 1), 0xDD: (4, 1), 0xDE: (2, 2), 0xDF: (4, 2)}
"""First byte -> bytes of the count behind it, and values to each that is counted."""

_SHORT_MAPS: Final = range(0x80, 0x90)
_SHORT_LISTS: Final = range(0x90, 0xA0)


def _are_few(frame: bytes) -> bool:
    """Whether a frame has no more than :data:`VALUES_MAX` values, without making one of them.

    What is cut off or no MessagePack is not noticed here.
    """
    at, expected, seen = 0, 1, 0
    while seen < expected and at < len(frame):
        seen += 1
        first = frame[at]
        at += 1
        if (more := _FIXED.get(first)) is not None:
            at += more
        elif first in _SHORT_MAPS:
            expected += 2 * (first - _SHORT_MAPS.start)
        elif first in _SHORT_LISTS:
            expected += first - _SHORT_LISTS.start
        elif first in _COUNTED:
            size, uncounted = _COUNTED[first]
            at += size + uncounted + int.from_bytes(frame[at : at + size])
        else:
            size, each = _CONTAINERS[first]
            expected += each * int.from_bytes(frame[at : at + size])
            at += size
        if expected > VALUES_MAX:
            return False
    return True


def _bare(value: Any) -> Any:
    if isinstance(value, AwarenessState):
        return [value.client, value.clock, value.state_json]
    if isinstance(value, tuple):
        return [_bare(one) for one in value]
    return str(value) if isinstance(value, StrEnum) else value


def _pack(value: Any) -> bytes:
    packed: bytes = msgpack.packb(value, use_bin_type=True)
    return packed
