"""The plain y-websocket dialect: one frame of bytes, one message, and back.

This module owns the frame's grammar and its limits. It must not know sockets, rooms or documents:
an update is opaque here (``update`` reads it), and whether a message is allowed is for others.

The grammar, as lib0 and y-protocols write it::

    frame      = 0 sync | 1 varBytes(awareness) | 2 auth | 3              ; 3 = query awareness
    sync       = 0 varBytes(stateVector) | 1 varBytes(update) | 2 varBytes(update)
    awareness  = n, n * (client, clock, varString(JSON))                  ; JSON null = went away
    auth       = 0 varString(reason)                                      ; refused
    stateVector= n, n * (client, clock)
    varBytes   = length, bytes
    varString  = varBytes, being UTF-8

Numbers are varUint: LEB128, least significant seven bits first, at most 2^53 - 1 (the largest
integer that JavaScript keeps exactly) and never longer than needed. A frame carries exactly **one**
message: y-websocket reads the first and ignores or misreads what follows, so bytes after it are
refused here and never written.

Sources: the formats of ``lib0/encoding``, ``y-protocols`` (``sync``, ``awareness``, ``auth``) and
``y-websocket`` 3; ``protocol/vectors/wire.json`` holds frames made by those packages.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeAlias, assert_never

from crdt_llm.errors import LocalMisuse, MalformedMessage

if TYPE_CHECKING:
    from collections.abc import Mapping

VAR_UINT_MAX: Final = 2**53 - 1
"""The largest number on the wire: above it JavaScript peers would silently round."""

CLIENT_ID_MAX: Final = 2**32 - 1
"""The largest client id: Yjs draws 32 bits; wider ids came out of a CRDT library as 0 in trials."""

CLOCK_MAX: Final = 2**32 - 1
"""The largest end of a client's clocks: the replica counts in 32 bits and wraps clock 2^32 to 0."""

UPDATE_BYTES_MAX: Final = 16 * 2**20
"""The largest update. A Step2 may be a whole document; one of 5,000 entries takes 1.5 MB."""

STATE_VECTOR_CLIENTS_MAX: Final = 2**16
"""Clients in one state vector: every process and page load takes a fresh id, for years."""

AWARENESS_STATES_MAX: Final = 1024
"""States in one awareness message: one per open device of a conversation, with room to spare."""

AWARENESS_STATE_BYTES_MAX: Final = 16 * 2**10
"""Bytes of one state: a name, a colour and a cursor. It is renewed every 15 s to every peer."""

NESTING_MAX: Final = 16
"""Arrays and objects within each other: readers recurse, and 20,000 deep crashed one in a trial."""

AWARENESS_BYTES_MAX: Final = 2**20
"""Bytes of one awareness message: a full room of usual states is a tenth of it."""

AUTH_REASON_BYTES_MAX: Final = 2**10
"""Bytes of the reason of a refusal: one line for people."""

FRAME_BYTES_MAX: Final = UPDATE_BYTES_MAX + 16
"""The largest frame: the largest update and its header. Give this to the socket as its limit."""

_SYNC: Final = 0
_AWARENESS: Final = 1
_AUTH: Final = 2
_QUERY_AWARENESS: Final = 3

_SYNC_STEP1: Final = 0
_SYNC_STEP2: Final = 1
_SYNC_UPDATE: Final = 2

_AUTH_DENIED: Final = 0


@dataclass(frozen=True, slots=True)
class SyncStep1:
    """What the sender has; the answer is a :class:`SyncStep2` with the rest.

    Attributes:
        state_vector: A well-formed encoded state vector (see :func:`decode_state_vector`).
    """

    state_vector: bytes


@dataclass(frozen=True, slots=True)
class SyncStep2:
    """Everything the receiver of a :class:`SyncStep1` says its sender lacks.

    Attributes:
        update: A Yjs v1 update, not looked into here.
    """

    update: bytes


@dataclass(frozen=True, slots=True)
class SyncUpdate:
    """A change as it happens.

    Attributes:
        update: A Yjs v1 update, not looked into here.
    """

    update: bytes


@dataclass(frozen=True, slots=True)
class AwarenessState:
    """What one client shows of itself, or that it went away.

    Attributes:
        client: The client id it speaks of.
        clock: Grows with each new state of this client; peers ignore clocks they have seen.
        state_json: The state as JSON text, never JSON ``null``; ``None`` when it went away.
    """

    client: int
    clock: int
    state_json: str | None


@dataclass(frozen=True, slots=True)
class AwarenessUpdate:
    """Presence: the states that changed, or all of them."""

    states: tuple[AwarenessState, ...]


@dataclass(frozen=True, slots=True)
class AuthDenied:
    """Access is refused; stock clients print the reason to their console."""

    reason: str


@dataclass(frozen=True, slots=True)
class QueryAwareness:
    """Asks for all awareness states."""


Message: TypeAlias = (
    SyncStep1 | SyncStep2 | SyncUpdate | AwarenessUpdate | AuthDenied | QueryAwareness
)
"""Every message of the dialect."""


def encode(message: Message) -> bytes:
    """Write one message as one frame.

    Args:
        message: What to say.

    Returns:
        The frame; ``decode`` gives the equal message back.

    Raises:
        LocalMisuse: The message is one that ``decode`` would refuse.
    """
    match message:
        case SyncUpdate(update):
            return _sync_frame(_SYNC_UPDATE, update)
        case SyncStep2(update):
            return _sync_frame(_SYNC_STEP2, update)
        case SyncStep1(state_vector):
            try:
                decode_state_vector(state_vector)
            except MalformedMessage as error:
                raise LocalMisuse(f"not sending this: {error}") from error
            return _sync_frame(_SYNC_STEP1, state_vector)
        case AwarenessUpdate(states):
            return _awareness_frame(states)
        case AuthDenied(reason):
            text = write_var_string(reason)
            if len(text) > AUTH_REASON_BYTES_MAX:
                raise LocalMisuse(f"the reason is over {AUTH_REASON_BYTES_MAX} bytes: shorten it")
            return bytes((_AUTH, _AUTH_DENIED)) + text
        case QueryAwareness():
            return bytes((_QUERY_AWARENESS,))
        case _:
            assert_never(message)


def decode(frame: bytes) -> Message:
    """Read one frame as one message. Total: any bytes give a message or the one error.

    Args:
        frame: The payload of one binary websocket message.

    Returns:
        The message. A Step1 holds a well-formed state vector, an awareness state well-formed JSON
        (no ``NaN``, no lone surrogate, nested at most :data:`NESTING_MAX` deep).

    Raises:
        MalformedMessage: Anything else: truncated, bytes left over, unknown types, numbers too
            large or longer than needed, text that is no UTF-8, over one of the limits above.
    """
    if len(frame) > FRAME_BYTES_MAX:
        raise MalformedMessage(f"a frame of {len(frame)} bytes is over {FRAME_BYTES_MAX}")
    kind, at = read_var_uint(frame, 0)
    message: Message
    if kind == _SYNC:
        message, at = _read_sync(frame, at)
    elif kind == _AWARENESS:
        body, at = read_var_bytes(frame, at)
        message = _read_awareness(body)
    elif kind == _AUTH:
        message, at = _read_auth(frame, at)
    elif kind == _QUERY_AWARENESS:
        message = QueryAwareness()
    else:
        raise MalformedMessage(f"message type {kind} is unknown")
    _expect_end(frame, at, "message (one message a frame)")
    return message


def encode_state_vector(clocks: Mapping[int, int]) -> bytes:
    """Write a state vector, highest client first as Yjs does, so that equal ones are equal bytes.

    Args:
        clocks: Client id -> the first clock of that client that is not known.

    Returns:
        The encoded state vector.

    Raises:
        LocalMisuse: Too many clients, or a client or clock out of range.
    """
    if len(clocks) > STATE_VECTOR_CLIENTS_MAX:
        raise LocalMisuse(f"a state vector of over {STATE_VECTOR_CLIENTS_MAX} clients")
    parts = [write_var_uint(len(clocks))]
    for client in sorted(clocks, reverse=True):
        parts.append(_write_client(client))
        parts.append(_write_clock(clocks[client]))
    return b"".join(parts)


def decode_state_vector(state_vector: bytes) -> dict[int, int]:
    """Read a state vector.

    Args:
        state_vector: The bytes of a Step1, or of a document's state.

    Returns:
        Client id -> the first clock of that client that is not known.

    Raises:
        MalformedMessage: No state vector, a client twice, or over a limit.
    """
    count, at = read_var_uint(state_vector, 0)
    if count > STATE_VECTOR_CLIENTS_MAX:
        raise MalformedMessage(f"a state vector of {count} clients is over the limit")
    clocks: dict[int, int] = {}
    for _ in range(count):
        client, at = _read_client(state_vector, at)
        clocks[client], at = _read_clock(state_vector, at)
    if len(clocks) != count:
        raise MalformedMessage("a state vector names a client twice")
    _expect_end(state_vector, at, "state vector")
    return clocks


def write_var_uint(value: int) -> bytes:
    """Write a number as varUint.

    Args:
        value: 0 to :data:`VAR_UINT_MAX`.

    Returns:
        One to eight bytes.

    Raises:
        LocalMisuse: Out of range.
    """
    if not 0 <= value <= VAR_UINT_MAX:
        raise LocalMisuse(f"{value} is no number from 0 to 2^53 - 1")
    out = bytearray()
    while value > 0x7F:  # noqa: PLR2004 - seven bits a byte
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def read_var_uint(data: bytes, at: int) -> tuple[int, int]:
    """Read a varUint.

    Args:
        data: The bytes to read from.
        at: Where it begins, >= 0.

    Returns:
        The number and the position behind it.

    Raises:
        MalformedMessage: Truncated, above 2^53 - 1, or longer than needed.
    """
    try:
        byte = data[at]
        if byte < 0x80:  # noqa: PLR2004 - the top bit says that another byte follows
            return byte, at + 1
        value = byte & 0x7F
        shift = 7
        while True:
            at += 1
            byte = data[at]
            value |= (byte & 0x7F) << shift
            if byte < 0x80:  # noqa: PLR2004 - as above
                break
            shift += 7
            # Eight bytes carry 56 bits; a ninth is over 2^53 - 1 or longer than needed.
            if shift > 49:  # noqa: PLR2004 - as said
                raise MalformedMessage("a number is over 2^53 - 1 or longer than needed")
    except IndexError:
        _truncated()
    if byte == 0:
        raise MalformedMessage("a number is written longer than needed")
    if value > VAR_UINT_MAX:
        raise MalformedMessage("a number is over 2^53 - 1")
    return value, at + 1


def write_var_bytes(payload: bytes) -> bytes:
    """Write bytes behind their length.

    Args:
        payload: Any bytes.

    Returns:
        The length as varUint, then the bytes.
    """
    return write_var_uint(len(payload)) + payload


def read_var_bytes(data: bytes, at: int) -> tuple[bytes, int]:
    """Read bytes behind their length.

    Args:
        data: The bytes to read from.
        at: Where the length begins, >= 0.

    Returns:
        The bytes and the position behind them.

    Raises:
        MalformedMessage: Truncated, or a bad length.
    """
    length, at = read_var_uint(data, at)
    end = at + length
    if end > len(data):
        _truncated()
    return data[at:end], end


def write_var_string(text: str) -> bytes:
    """Write text as UTF-8 behind its length in bytes.

    Args:
        text: Any text without lone surrogates.

    Returns:
        The length as varUint, then the UTF-8 bytes.

    Raises:
        LocalMisuse: The text has a lone surrogate.
    """
    try:
        return write_var_bytes(text.encode())
    except UnicodeEncodeError as error:
        raise LocalMisuse("text with a lone surrogate has no UTF-8") from error


def read_var_string(data: bytes, at: int) -> tuple[str, int]:
    """Read UTF-8 text behind its length in bytes.

    Args:
        data: The bytes to read from.
        at: Where the length begins, >= 0.

    Returns:
        The text and the position behind it.

    Raises:
        MalformedMessage: Truncated, or no UTF-8 (so never a lone surrogate).
    """
    raw, at = read_var_bytes(data, at)
    try:
        return raw.decode(), at
    except UnicodeDecodeError as error:
        raise MalformedMessage("text is no UTF-8") from error


# An unclosed string matches to the end of the text, so that hostile text takes linear time.
_JSON_STRING: Final = re.compile(r'"(?:[^"\\]|\\.)*+"?', re.DOTALL)


def parse_json(text: str) -> Any:
    """Parse JSON as strictly as JavaScript does, and no deeper than :data:`NESTING_MAX`.

    Args:
        text: JSON text; its length is for the caller to bound.

    Returns:
        The value.

    Raises:
        MalformedMessage: No JSON (``NaN`` is none), a lone surrogate, or nested too deep.
    """
    # Python's reader recurses, so the depth is known before it starts.
    if text.count("[") + text.count("{") > NESTING_MAX:
        _check_json_nesting(text)
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise MalformedMessage("JSON text holds a lone surrogate") from error
    except ValueError as error:  # also Python's limit on the digits of one number
        raise MalformedMessage("text is no JSON") from error
    return value


def _check_json_nesting(text: str) -> None:
    depth = 0
    for character in _JSON_STRING.sub("", text):
        if character in "[{":
            depth += 1
            if depth > NESTING_MAX:
                raise MalformedMessage(f"JSON nests deeper than {NESTING_MAX}")
        elif character in "]}":
            depth -= 1


def _refuse_constant(name: str) -> NoReturn:
    raise MalformedMessage(f"{name} is no JSON")


def _sync_frame(step: int, payload: bytes) -> bytes:
    if len(payload) > UPDATE_BYTES_MAX:
        raise LocalMisuse(f"an update of {len(payload)} bytes is over {UPDATE_BYTES_MAX}")
    return b"".join((bytes((_SYNC, step)), write_var_uint(len(payload)), payload))


def _read_sync(frame: bytes, at: int) -> tuple[SyncStep1 | SyncStep2 | SyncUpdate, int]:
    step, at = read_var_uint(frame, at)
    payload, at = read_var_bytes(frame, at)
    if len(payload) > UPDATE_BYTES_MAX:
        raise MalformedMessage(f"an update of {len(payload)} bytes is over {UPDATE_BYTES_MAX}")
    if step == _SYNC_UPDATE:
        return SyncUpdate(payload), at
    if step == _SYNC_STEP2:
        return SyncStep2(payload), at
    if step == _SYNC_STEP1:
        decode_state_vector(payload)
        return SyncStep1(payload), at
    raise MalformedMessage(f"sync message type {step} is unknown")


def _read_auth(frame: bytes, at: int) -> tuple[AuthDenied, int]:
    kind, at = read_var_uint(frame, at)
    if kind != _AUTH_DENIED:
        raise MalformedMessage(f"auth message type {kind} is unknown")
    reason, end = read_var_string(frame, at)
    if end - at > AUTH_REASON_BYTES_MAX:
        raise MalformedMessage(f"an auth reason is over {AUTH_REASON_BYTES_MAX} bytes")
    return AuthDenied(reason), end


def _awareness_frame(states: tuple[AwarenessState, ...]) -> bytes:
    if len(states) > AWARENESS_STATES_MAX:
        raise LocalMisuse(f"{len(states)} awareness states are over {AWARENESS_STATES_MAX}: split")
    parts = [write_var_uint(len(states))]
    for state in states:
        parts.append(_write_client(state.client))
        parts.append(write_var_uint(state.clock))
        if state.state_json is None:
            parts.append(write_var_string("null"))
        else:
            try:
                gone = _check_state(state.state_json)
            except MalformedMessage as error:
                raise LocalMisuse(f"not sending this: {error}") from error
            if gone:
                raise LocalMisuse("a client that went away is None, not JSON null")
            parts.append(write_var_string(state.state_json))
    body = b"".join(parts)
    if len(body) > AWARENESS_BYTES_MAX:
        raise LocalMisuse(f"an awareness message over {AWARENESS_BYTES_MAX} bytes: split it")
    return bytes((_AWARENESS,)) + write_var_bytes(body)


def _read_awareness(body: bytes) -> AwarenessUpdate:
    if len(body) > AWARENESS_BYTES_MAX:
        raise MalformedMessage(f"an awareness message of {len(body)} bytes is over the limit")
    count, at = read_var_uint(body, 0)
    if count > AWARENESS_STATES_MAX:
        raise MalformedMessage(f"{count} awareness states are over {AWARENESS_STATES_MAX}")
    states: list[AwarenessState] = []
    for _ in range(count):
        client, at = _read_client(body, at)
        clock, at = read_var_uint(body, at)
        text, at = read_var_string(body, at)
        gone = _check_state(text)
        states.append(AwarenessState(client, clock, None if gone else text))
    _expect_end(body, at, "awareness states")
    return AwarenessUpdate(tuple(states))


def _check_state(text: str) -> bool:
    """Hold one awareness state against JSON and the limits; whether it is ``null``."""
    if len(text.encode(errors="surrogatepass")) > AWARENESS_STATE_BYTES_MAX:
        raise MalformedMessage(f"an awareness state is over {AWARENESS_STATE_BYTES_MAX} bytes")
    return parse_json(text) is None


def _write_client(client: int) -> bytes:
    if client > CLIENT_ID_MAX:
        raise LocalMisuse(f"client id {client} is over 32 bits")
    return write_var_uint(client)


def _read_client(data: bytes, at: int) -> tuple[int, int]:
    client, at = read_var_uint(data, at)
    if client > CLIENT_ID_MAX:
        raise MalformedMessage(f"client id {client} is over 32 bits")
    return client, at


def _write_clock(clock: int) -> bytes:
    if clock > CLOCK_MAX:
        raise LocalMisuse(f"clock {clock} is over 32 bits")
    return write_var_uint(clock)


def _read_clock(data: bytes, at: int) -> tuple[int, int]:
    clock, at = read_var_uint(data, at)
    if clock > CLOCK_MAX:
        raise MalformedMessage(f"clock {clock} is over 32 bits")
    return clock, at


def _expect_end(data: bytes, at: int, what: str) -> None:
    if at != len(data):
        raise MalformedMessage(f"{len(data) - at} bytes follow the {what}")


def _truncated() -> NoReturn:
    raise MalformedMessage("truncated: the bytes end inside the message")
