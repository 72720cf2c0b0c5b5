"""The document's words: ids, roles, states, limits, and typed readings of plain values.

This module owns what a value in the document *means*. It is pure: it knows neither the CRDT
library, nor sockets, nor models. Every ``read_*`` function is total: it takes any value that a
replica could hold and returns a typed one, or ``None`` where the value is malformed, because in a
replicated document what is malformed counts as absent, on every replica alike.
"""

from __future__ import annotations

import hashlib
import math
import re
from base64 import urlsafe_b64encode
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final

from ulid import ULID

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

SCHEMA_VERSION: Final = 1

# Limits. Each is a bound on what one writer can make every replica carry.
TEXT_BYTES_MAX: Final = 1 << 20  # one entry: longer than any context window we can serve
TITLE_CHARACTERS_MAX: Final = 500  # a line in a list
ENTRIES_MAX: Final = 100_000  # the tree stays in memory on every replica
PRINCIPAL_CHARACTERS_MAX: Final = 200  # a name, not a payload
NESTING_MAX: Final = 16  # deeper plain values have crashed CRDT libraries
PARAMS_STOP_MAX: Final = 16  # each stop string is searched for at every token
PARAMS_STOP_CHARACTERS_MAX: Final = 200  # and held back while it may still begin
MAX_TOKENS_MAX: Final = 1_000_000  # above any model's positions
WHOLE_MAX: Final = 2**53 - 1  # what a JavaScript number holds exactly

NONCE_BYTES: Final = 16
SALT_BYTES: Final = 16
ID_CHARACTERS: Final = 22
ROOT: Final = ""  # the virtual admitted entry that every path starts at

_CONVERSATION_ID = re.compile(r"[A-Za-z0-9_-]{22}\Z")
_ENTRY_ID = re.compile(r"[0-7][0-9A-HJKMNP-TV-Z]{25}\Z")

ENTRY_FIELDS: Final = frozenset(
    {
        "born",
        "content",
        "stop",
        "place",
        "state",
        "calls",
        "reads",
        "sealed",
        "usage",
        "salt",
        "proof",
        "redacted",
    }
)
REDACTION_DELETES: Final = frozenset({"content", "salt", "sealed", "calls"})


class Role(StrEnum):
    """Who speaks in an entry."""

    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"
    TOOL = "tool"


class State(StrEnum):
    """Where a slot stands. A slot without one is requested."""

    STREAMING = "streaming"
    DONE = "done"
    STOPPED = "stopped"
    FAILED = "failed"
    SUPERSEDED = "superseded"


ENDED: Final = frozenset({State.DONE, State.STOPPED, State.FAILED, State.SUPERSEDED})


class Grant(StrEnum):
    """What a principal may do in a conversation."""

    OWNER = "owner"
    WRITER = "writer"
    READER = "reader"


@dataclass(frozen=True, slots=True)
class Params:
    """What a slot asks of the sampler; ``None`` means the node's default."""

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    extend: bool = False

    def plain(self) -> dict[str, Any]:
        """The document's form: only what was asked for."""
        out: dict[str, Any] = {
            name: value
            for name in ("max_tokens", "temperature", "top_p", "top_k", "seed")
            if (value := getattr(self, name)) is not None
        }
        if self.stop:
            out["stop"] = list(self.stop)
        if self.ignore_eos:
            out["ignore_eos"] = True
        if self.extend:
            out["extend"] = True
        return out


@dataclass(frozen=True, slots=True)
class Born:
    """What an author says of an entry, once."""

    role: Role
    author: str
    device: str
    at: int  # ms since the epoch, by the author's clock
    clock: int  # Lamport: 1 + the greatest clock the author could see
    fork: bool = False
    after: str = ROOT
    params: Params = Params()
    call: str | None = None
    covers: tuple[str, str] | None = None

    def plain(self) -> dict[str, Any]:
        """The document's form."""
        out: dict[str, Any] = {
            "role": self.role.value,
            "author": self.author,
            "device": self.device,
            "at": self.at,
            "clock": self.clock,
            "mode": "fork" if self.fork else "continue",
        }
        if self.after:
            out["after"] = self.after
        if params := self.params.plain():
            out["params"] = params
        if self.call is not None:
            out["call"] = self.call
        if self.covers is not None:
            out["covers"] = list(self.covers)
        return out


@dataclass(frozen=True, slots=True)
class Place:
    """Where the node admitted an entry, and under which lease."""

    parent: str
    epoch: int


@dataclass(frozen=True, slots=True)
class Proof:
    """The commitments and the signed chain digest of an admitted entry."""

    content: bytes | None
    tokens: bytes | None
    calls: bytes | None
    digest: bytes
    signature: bytes

    def plain(self) -> dict[str, Any]:
        """The document's form."""
        named = {"content": self.content, "tokens": self.tokens, "calls": self.calls}
        out: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
        return out | {"digest": self.digest, "signature": self.signature}


@dataclass(frozen=True, slots=True)
class Usage:
    """What a reply cost. Tokens and milliseconds."""

    prompt: int = 0
    prefilled: int = 0
    drafted: int = 0
    sampled: int = 0
    ttft_ms: int | None = None
    total_ms: int | None = None
    finish: str | None = None
    error_code: str | None = None
    error_message: str | None = None

    @property
    def reused(self) -> int:
        """Prompt tokens that were not computed since the last reply on the path ended."""
        return self.prompt - self.prefilled

    def plain(self) -> dict[str, Any]:
        """The document's form."""
        out: dict[str, Any] = {
            "prompt": self.prompt,
            "prefilled": self.prefilled,
            "reused": self.reused,
            "drafted": self.drafted,
            "sampled": self.sampled,
        }
        for name in ("ttft_ms", "total_ms", "finish"):
            if (value := getattr(self, name)) is not None:
                out[name] = value
        if self.error_code is not None:
            out["error"] = {"code": self.error_code, "message": self.error_message or ""}
        return out


@dataclass(frozen=True, slots=True)
class Entry:
    """One contribution, as a replica reads it at one moment."""

    id: str
    born: Born
    content: str = ""
    stop: str | None = None
    place: Place | None = None
    state: State | None = None
    calls: tuple[Any, ...] | None = None
    reads: tuple[str, ...] | None = None
    sealed: tuple[bytes, ...] = ()
    usage: Usage | None = None
    salt: bytes | None = None
    proof: Proof | None = None
    redacted: bool = False

    @property
    def is_slot(self) -> bool:
        """Whether this entry asks for a reply (and holds it, once answered)."""
        return self.born.role is Role.ASSISTANT

    @property
    def ended(self) -> bool:
        """Whether nothing more will be added to this entry's text."""
        return not self.is_slot or self.state in ENDED


@dataclass(frozen=True, slots=True)
class Policy:
    """How the node treats a conversation; the first value of each is the default."""

    reply: str = "ask"
    on_new_entry: str = "queue"
    overflow: str = "refuse"
    reasoning: str = "hidden"


POLICY_VALUES: Final[Mapping[str, tuple[str, ...]]] = {
    "reply": ("ask", "auto"),
    "on_new_entry": ("queue", "interrupt"),
    "overflow": ("refuse", "drop_oldest", "summarise"),
    "reasoning": ("hidden", "visible"),
}


@dataclass(frozen=True, slots=True)
class Birth:
    """Who made the conversation, and the nonce that makes its id unguessable."""

    owner: str
    nonce: bytes

    def plain(self) -> dict[str, Any]:
        """The document's form."""
        return {"owner": self.owner, "nonce": self.nonce}


@dataclass(frozen=True, slots=True)
class Meta:
    """The conversation's own facts."""

    birth: Birth | None = None
    title: str = ""
    created_at: int | None = None
    head: str = ROOT
    model: str | None = None
    policy: Policy = Policy()

    @property
    def conversation(self) -> str | None:
        """The conversation's id, or ``None`` while nobody gave it a birth."""
        return conversation_id(self.birth) if self.birth else None


def conversation_id(birth: Birth) -> str:
    """The id that a birth stands for: 22 characters of base64url(SHA-256(owner, nonce))."""
    digest = hashlib.sha256(birth.owner.encode() + birth.nonce).digest()
    return urlsafe_b64encode(digest)[:ID_CHARACTERS].decode()


def is_conversation_id(text: str) -> bool:
    """Whether ``text`` has the form of a conversation id."""
    return _CONVERSATION_ID.match(text) is not None


def is_entry_id(text: object) -> bool:
    """Whether ``text`` is a ULID in canonical form (26 characters of Crockford's base32)."""
    return isinstance(text, str) and _ENTRY_ID.match(text) is not None


def entry_id(at_ms: int, random: bytes) -> str:
    """A ULID from a time in ms (48 bits) and 10 random bytes."""
    return str(ULID.from_bytes(at_ms.to_bytes(6, "big") + random))


def seed_of(entry: str) -> int:
    """The seed of a slot that names none: 53 bits drawn from its id."""
    return int.from_bytes(hashlib.sha256(b"crdt-llm/1/seed" + entry.encode()).digest()[:8]) >> 11


def normalise(value: Any) -> Any:
    """A plain value as every replica agrees on it.

    JavaScript has one number type and its own byte arrays: whole floats become ``int``, byte
    arrays ``bytes``, tuples ``list``. The depth of the value was bounded when it came in.
    """
    match value:
        case bool() | str() | int() | bytes() | None:
            return value
        case float():
            whole = math.isfinite(value) and value.is_integer() and abs(value) <= WHOLE_MAX
            return int(value) if whole else value
        case bytearray() | memoryview():
            return bytes(value)
        case dict():
            return {str(key): normalise(item) for key, item in value.items()}
        case list() | tuple():
            return [normalise(item) for item in value]
        case _:
            return None


def whole(value: Any, low: int, high: int = WHOLE_MAX) -> int | None:
    """``value`` if it is a whole number within [low, high]."""
    if isinstance(value, float):
        value = normalise(value)
    if isinstance(value, bool) or not isinstance(value, int):
        return None
    return value if low <= value <= high else None


def text(value: Any, characters_max: int) -> str | None:
    """``value`` if it is text of at most ``characters_max`` characters."""
    return value if isinstance(value, str) and len(value) <= characters_max else None


def _real(value: Any, low: float, high: float) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if low <= value <= high else None


def read_params(value: Any) -> Params:
    """A slot's parameters; what is malformed counts as absent, one by one."""
    if not isinstance(value, dict):
        return Params()
    stop = value.get("stop")
    strings = tuple(
        item
        for item in (stop if isinstance(stop, list) else ())
        if isinstance(item, str) and 0 < len(item) <= PARAMS_STOP_CHARACTERS_MAX
    )
    return Params(
        max_tokens=whole(value.get("max_tokens"), 1, MAX_TOKENS_MAX),
        temperature=_real(value.get("temperature"), 0.0, 100.0),
        top_p=_real(value.get("top_p"), 0.0, 1.0),
        top_k=whole(value.get("top_k"), 0),
        seed=whole(value.get("seed"), 0),
        stop=strings[:PARAMS_STOP_MAX],
        ignore_eos=value.get("ignore_eos") is True,
        extend=value.get("extend") is True,
    )


def read_born(value: Any) -> Born | None:
    """``born``, or ``None``: a known role and a whole clock of at least 1 make it well-formed."""
    if not isinstance(value, dict):
        return None
    role, clock = value.get("role"), whole(value.get("clock"), 1)
    if not isinstance(role, str) or role not in Role.__members__.values() or clock is None:
        return None
    after = value.get("after")
    return Born(
        role=Role(role),
        author=text(value.get("author"), PRINCIPAL_CHARACTERS_MAX) or "",
        device=text(value.get("device"), PRINCIPAL_CHARACTERS_MAX) or "",
        at=whole(value.get("at"), 0) or 0,
        clock=clock,
        fork=value.get("mode") == "fork",
        after=after if isinstance(after, str) else ROOT,
        params=read_params(value.get("params")),
        call=call if isinstance(call := value.get("call"), str) else None,
        covers=_read_covers(value.get("covers")),
    )


def _read_covers(value: Any) -> tuple[str, str] | None:
    match value:
        case [str(first), str(last)]:
            return first, last
        case _:
            return None


def read_place(value: Any) -> Place | None:
    """``place``, or ``None``."""
    if not isinstance(value, dict):
        return None
    parent, epoch = value.get("parent"), whole(value.get("epoch"), 0)
    return Place(parent, epoch) if isinstance(parent, str) and epoch is not None else None


def read_state(value: Any) -> State | None:
    """``state``, or ``None``."""
    known = isinstance(value, str) and value in State.__members__.values()
    return State(value) if known else None


def _optional_bytes(value: Any) -> bytes | None:
    return bytes(value) if isinstance(value, bytes | bytearray) else None


def read_proof(value: Any) -> Proof | None:
    """``proof``, or ``None``."""
    if not isinstance(value, dict):
        return None
    digest = _optional_bytes(value.get("digest"))
    signature = _optional_bytes(value.get("signature"))
    if digest is None or signature is None:
        return None
    return Proof(
        content=_optional_bytes(value.get("content")),
        tokens=_optional_bytes(value.get("tokens")),
        calls=_optional_bytes(value.get("calls")),
        digest=digest,
        signature=signature,
    )


def read_usage(value: Any) -> Usage | None:
    """``usage``, or ``None``."""
    if not isinstance(value, dict):
        return None
    error = value.get("error")
    error = error if isinstance(error, dict) else {}
    return Usage(
        prompt=whole(value.get("prompt"), 0) or 0,
        prefilled=whole(value.get("prefilled"), 0) or 0,
        drafted=whole(value.get("drafted"), 0) or 0,
        sampled=whole(value.get("sampled"), 0) or 0,
        ttft_ms=whole(value.get("ttft_ms"), 0),
        total_ms=whole(value.get("total_ms"), 0),
        finish=finish if isinstance(finish := value.get("finish"), str) else None,
        error_code=code if isinstance(code := error.get("code"), str) else None,
        error_message=said if isinstance(said := error.get("message"), str) else None,
    )


def read_birth(value: Any) -> Birth | None:
    """``birth``, or ``None``."""
    if not isinstance(value, dict):
        return None
    owner = text(value.get("owner"), PRINCIPAL_CHARACTERS_MAX)
    nonce = _optional_bytes(value.get("nonce"))
    return Birth(owner, nonce) if owner and nonce and len(nonce) == NONCE_BYTES else None


def read_policy(value: Any) -> Policy:
    """The policy; what is malformed or unknown counts as the default."""
    given: Mapping[str, Any] = value if isinstance(value, dict) else {}
    return Policy(
        **{
            name: given[name]
            for name, values in POLICY_VALUES.items()
            if isinstance(given.get(name), str) and given[name] in values
        }
    )


def read_meta(value: Mapping[str, Any]) -> Meta:
    """The root ``meta``, field by field; what is malformed counts as absent."""
    head, model = value.get("head"), value.get("model")
    return Meta(
        birth=read_birth(value.get("birth")),
        title=text(value.get("title"), TITLE_CHARACTERS_MAX) or "",
        created_at=whole(value.get("created_at"), 0),
        head=head if isinstance(head, str) else ROOT,
        model=model if isinstance(model, str) else None,
        policy=read_policy(value.get("policy")),
    )


def read_strings(value: Any) -> tuple[str, ...] | None:
    """A list of texts (``reads``), or ``None``."""
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        return None
    return tuple(value)


def read_chunks(value: Sequence[Any] | None) -> tuple[bytes, ...]:
    """The blobs of ``sealed``; what is no bytes counts as absent."""
    return tuple(bytes(item) for item in value or () if isinstance(item, bytes | bytearray))
