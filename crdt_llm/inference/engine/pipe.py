"""What crosses the pipe between the node and the engine's process.

Owns the messages, their one encoding and decoding, and the framing. It knows neither torch nor
asyncio, so both ends import it. Ids, cancellations and tokens cross the pipe; KV never does.

A frame is a length (four bytes, little-endian) and one msgpack array: a kind, then the fields of
the message in the order of its class. Ids are packed as uint32 little-endian.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Final

import msgpack
import numpy as np

from crdt_llm.errors import (
    CrdtLlmError,
    EngineBusy,
    LocalMisuse,
    MalformedMessage,
    ModelUnusable,
    PromptTooLong,
)
from crdt_llm.inference.contract import (
    Capabilities,
    Finished,
    KvDigest,
    Prefilled,
    Queued,
    Sampled,
    SamplingParams,
    Scored,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy.typing as npt

FRAME_BYTES_MAX: Final = 64 << 20
"""Sixteen million ids: far above any model's positions, and far below what memory would mind."""

LENGTH: Final = struct.Struct("<I")
IDS_DTYPE: Final = np.dtype("<u4")


@dataclass(frozen=True, slots=True)
class Warm:
    """To the engine: bring the KV of these ids."""

    request: int
    ids: bytes


@dataclass(frozen=True, slots=True)
class Generate:
    """To the engine: sample a reply."""

    request: int
    ids: bytes
    start: int
    params: SamplingParams


@dataclass(frozen=True, slots=True)
class Digest:
    """To the engine: hash the KV of these ids."""

    request: int
    ids: bytes


@dataclass(frozen=True, slots=True)
class Score:
    """To the engine: say what the model makes of the ids from ``start`` on."""

    request: int
    ids: bytes
    start: int


@dataclass(frozen=True, slots=True)
class Cancel:
    """To the engine: this request is not wanted any more. Nothing is answered."""

    request: int


@dataclass(frozen=True, slots=True)
class Forget:
    """To the engine: drop resident KV. Answered with :class:`Forgotten`."""

    request: int
    ids: bytes
    keep: int


@dataclass(frozen=True, slots=True)
class Measure:
    """To the engine: say how full it is. Answered with :class:`Measured`."""

    request: int


@dataclass(frozen=True, slots=True)
class Forgotten:
    """From the engine: a :class:`Forget` is done."""


@dataclass(frozen=True, slots=True)
class Measured:
    """From the engine: all requests, those of them that wait, and what KV takes."""

    requests: int
    waiting: int
    resident_tokens: int
    kv_bytes: int
    disk_bytes: int


@dataclass(frozen=True, slots=True)
class Ready:
    """From the engine, first: the model is loaded."""

    capabilities: Capabilities


@dataclass(frozen=True, slots=True)
class Failed:
    """From the engine: a request failed, or (request -1) the engine could not start."""

    code: str
    message: str

    @classmethod
    def of(cls, error: CrdtLlmError) -> Failed:
        """The error as it crosses the pipe."""
        return cls(code=type(error).__name__, message=str(error))

    def to_error(self) -> CrdtLlmError:
        """The error on the other side."""
        return _ERRORS.get(self.code, CrdtLlmError)(self.message)


@dataclass(frozen=True, slots=True)
class Event:
    """From the engine: something about one request."""

    request: int
    event: (
        Queued | Prefilled | Sampled | Finished | KvDigest | Scored | Forgotten | Measured | Failed
    )


Command = Warm | Generate | Digest | Score | Cancel | Forget | Measure
Report = Ready | Event

NO_REQUEST: Final = -1
"""The request of a failure that belongs to none: the engine could not start."""

_ERRORS: Final[dict[str, Callable[[str], CrdtLlmError]]] = {
    error.__name__: error for error in (EngineBusy, LocalMisuse, ModelUnusable, PromptTooLong)
}

_KINDS: Final[dict[str, type[Any]]] = {
    kind.__name__: kind
    for kind in (
        Warm,
        Generate,
        Digest,
        Score,
        Cancel,
        Forget,
        Measure,
        Ready,
        Event,
        Queued,
        Prefilled,
        Sampled,
        Finished,
        KvDigest,
        Scored,
        Forgotten,
        Measured,
        Failed,
        Capabilities,
        SamplingParams,
    )
}


# In the order of the class. Looked up once: a token of a reply is a message.
_FIELDS: Final = {kind: tuple(field.name for field in fields(kind)) for kind in _KINDS.values()}


def pack_ids(ids: Sequence[int]) -> bytes:
    """Token ids as bytes.

    Raises:
        LocalMisuse: an id is negative or above 32 bits.
    """
    try:
        return np.asarray(ids, dtype=IDS_DTYPE).tobytes()
    except OverflowError as error:
        raise LocalMisuse("a token id must be a whole number from 0 and below 2**32") from error


def unpack_ids(data: bytes) -> npt.NDArray[np.uint32]:
    """The way back from :func:`pack_ids`."""
    return np.frombuffer(data, IDS_DTYPE)


def encode(message: Command | Report) -> bytes:
    """One frame, its length included.

    Raises:
        LocalMisuse: the message is larger than ``FRAME_BYTES_MAX``.
    """
    body: bytes = msgpack.packb(_to_plain(message))
    if len(body) > FRAME_BYTES_MAX:
        raise LocalMisuse(f"a message of {len(body)} bytes is over the limit {FRAME_BYTES_MAX}")
    return LENGTH.pack(len(body)) + body


class Frames:
    """Divides a stream of bytes into frames, however it comes in pieces."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """Take what came next.

        Returns:
            The bodies of the frames that are complete now, in order.

        Raises:
            MalformedMessage: a frame is over the limit.
        """
        self._bytes += data
        bodies, begin = [], 0
        while len(self._bytes) >= begin + LENGTH.size:
            first = begin + LENGTH.size
            end = first + decode_length(self._bytes[begin:first])
            if len(self._bytes) < end:
                break
            bodies.append(bytes(self._bytes[first:end]))
            begin = end
        del self._bytes[:begin]
        return bodies


def decode_length(head: bytes | bytearray) -> int:
    """The length of the body that follows a frame's first four bytes.

    Raises:
        MalformedMessage: over the limit.
    """
    (length,) = LENGTH.unpack(head)
    if length > FRAME_BYTES_MAX:
        raise MalformedMessage(f"a frame of {length} bytes is over the limit {FRAME_BYTES_MAX}")
    return int(length)


def decode_command(body: bytes) -> Command:
    """The command in a frame's body.

    Raises:
        MalformedMessage: it is none.
    """
    message = _decode(body)
    if not isinstance(message, Command):
        raise MalformedMessage("a frame to the engine is no command")
    return message


def decode_report(body: bytes) -> Report:
    """The report in a frame's body.

    Raises:
        MalformedMessage: it is none.
    """
    message = _decode(body)
    if not isinstance(message, Report):
        raise MalformedMessage("a frame from the engine is no report")
    return message


def _decode(body: bytes) -> object:
    try:
        return _from_plain(msgpack.unpackb(body))
    except (ValueError, TypeError, KeyError, CrdtLlmError) as error:
        raise MalformedMessage("a frame of the engine's pipe is no message") from error


def _to_plain(value: Any) -> Any:
    names = _FIELDS.get(type(value))
    if names is not None:
        return [type(value).__name__, *[_to_plain(getattr(value, name)) for name in names]]
    return sorted(value) if isinstance(value, frozenset) else value


def _from_plain(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    if value and isinstance(value[0], str):
        # Most parts of most messages are numbers: a call for each costs more than all the rest.
        parts = [_from_plain(part) if isinstance(part, list) else part for part in value[1:]]
        return _KINDS[value[0]](*parts)
    return frozenset(value)
