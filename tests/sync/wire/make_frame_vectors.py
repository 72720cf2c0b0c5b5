"""Makes ``protocol/vectors/frames.json``: frames of the native dialect and what they mean.

Run it after a change of the grammar: ``python tests/sync/wire/make_frame_vectors.py``.
"""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgpack

from crdt_llm.sync.wire.frames import (
    FROM_CLIENT,
    FROM_RELAY,
    Ack,
    Answer,
    Change,
    Closed,
    Code,
    Draft,
    Hello,
    Hint,
    Leased,
    Leave,
    Listed,
    Nack,
    Open,
    Opened,
    Presence,
    Pull,
    Renew,
    Renewed,
    Request,
    Restore,
    State,
    Update,
    WantLease,
    Watch,
    Welcome,
    Work,
    encode,
)
from crdt_llm.sync.wire.y_websocket import AwarenessState

if TYPE_CHECKING:
    from crdt_llm.sync.wire.frames import Frame

FILE: Final = Path(__file__).resolve().parents[3] / "protocol" / "vectors" / "frames.json"
ABOUT: Final = (
    "Frames of the native dialect, PROTOCOL.md. `fields` are in the order of the frame, after its "
    "kind; bytes are {hex}, states of presence [client, clock, JSON or null]. Each frame is "
    "decoded to its fields and encoded to its hex. `malformed` frames are refused by every reader."
)
CONVERSATION: Final = "r7PHnu-rdBZO227PWP7dnH"
ENTRY: Final = "01HF7YAT00ABCDEFGHJKMNPQRS"
UPDATE: Final = b"\x01\x01\x4d\x00\x04\x01\x04text\x02hi\x00"
VECTOR: Final = b"\x01\x4d\x02"
PRESENT: Final = AwarenessState(77, 3, '{"device":"phone"}')
GONE: Final = AwarenessState(78, 2**40, None)
FACTS: Final = {
    "title": "On tea",
    "role": "owner",
    "owner": "owner",
    "created_at": 1_700_000_000_000,
    "changed_at": 1_700_000_000_001,
    "archived": False,
}

CASES: Final[tuple[tuple[str, Frame], ...]] = (
    ("a client with its token", Hello(1, "token", "phone", None)),
    ("a node whose token came in the handshake", Hello(1, None, "", b"n" * 32)),
    ("who is known, and where", Welcome(1, "owner", b"k" * 32, 1_800_000_000_000, "log")),
    ("a token without an end", Welcome(1, "guest:ä", b"k" * 32, None, "log")),
    ("for the first time", Open(0, CONVERSATION, None, 0, b"\x00")),
    ("again, from a place in the log", Open(65_535, CONVERSATION, "log", 2**40, VECTOR)),
    ("an owner's conversation", Opened(1, "log", 300, UPDATE, VECTOR, "owner", behind=False)),
    ("one without a birth", Opened(1, "log", 0, b"\x00\x00", b"\x00", None, behind=True)),
    ("a change", Update(1, 1, UPDATE)),
    ("what the relay lost", Restore(1, 2, UPDATE)),
    ("what others wrote", Change(1, 301, UPDATE)),
    ("durable", Ack(1, 2, 302)),
    (
        "builds on what is not there",
        Nack(1, 3, Code.GAP, "", "an origin is missing", None, VECTOR),
    ),
    (
        "later",
        Nack(1, 4, Code.RATE_LIMITED, "rate-limited", "too many writes", 2_000, None),
    ),
    ("against a rule", Nack(1, 5, Code.DENIED, "access", "only an owner may", None, None)),
    ("everything that lacks", Pull(1, VECTOR)),
    ("everything that lacked", State(1, 303, UPDATE)),
    ("who is here, and who went", Presence(1, (PRESENT, GONE))),
    ("what is typed, after no entry", Draft(1, "", 0, "What is")),
    ("how it goes on", Draft(1, ENTRY, 8, "tea?")),
    ("typed no more", Draft(1, None, 0, "")),
    ("to the node", Hint(1, 7, ENTRY, 8, "tea?")),
    ("leaving", Leave(1)),
    ("left", Closed(1, 1000, "left")),
    ("closed for ever", Closed(1, 4403, "forbidden: you have no right in this conversation")),
    ("watching one's list", Watch(on=True)),
    ("the whole list", Listed(whole=True, end=True, conversations=((CONVERSATION, FACTS),))),
    ("one is gone", Listed(whole=False, end=True, conversations=((CONVERSATION, None),))),
    (
        "an invitation",
        Request(9, "invite", {"conversation": CONVERSATION, "role": "reader", "expires_at": None}),
    ),
    ("done", Answer(9, {"principal": "guest:x", "token": "t", "id": "i"}, "", "")),
    ("not done", Answer(9, None, "denied", "only an owner of the conversation may do that")),
    ("a node wants to act", WantLease(1, hold=True)),
    ("it holds the lease", Leased(1, 3, b"s" * 64, 10_000, "")),
    ("it does not", Leased(1, None, b"", 4_000, "another node has the lease")),
    ("still alive", Renew()),
    ("for so long", Renewed(10_000)),
    ("something to look at", Work((CONVERSATION,))),
)

MALFORMED: Final[tuple[tuple[str, str, bytes], ...]] = (
    ("client", "no bytes", b""),
    ("client", "no MessagePack", b"\xc1"),
    ("client", "no array", msgpack.packb({"kind": 7})),
    ("client", "an empty array", msgpack.packb([])),
    ("client", "a kind that is no number", msgpack.packb(["7", 1])),
    ("client", "an unknown kind", msgpack.packb([99])),
    ("client", "a frame of the other side", encode(Renewed(1))),
    ("relay", "a frame of the other side", encode(Renew())),
    ("client", "a field too few", msgpack.packb([2, 1, 1])),
    ("client", "a field too many", msgpack.packb([11, 1])),
    ("client", "bytes after it", encode(Renew()) + b"\x00"),
    ("client", "cut short", encode(Leave(1))[:-1]),
    ("client", "a channel that is too large", msgpack.packb([7, 65_536])),
    ("client", "a channel below zero", msgpack.packb([7, -1])),
    ("client", "a channel that is a truth", msgpack.packb([7, True])),
    ("client", "a channel that is no whole number", msgpack.packb([7, 1.0])),
    ("client", "a number above 2^53 - 1", msgpack.packb([2, 1, 2**53, b""])),
    ("client", "an update that is text", msgpack.packb([2, 1, 1, "update"])),
    ("client", "an id of no conversation", msgpack.packb([1, 1, "short", None, 0, b"\x00"])),
    ("client", "no state vector", msgpack.packb([4, 1, b"\x01"])),
    ("client", "a state that is no JSON", msgpack.packb([5, 1, [[77, 1, "{"]]])),
    ("client", "who went is nil, not null", msgpack.packb([5, 1, [[77, 1, "null"]]])),
    ("client", "a key that is too short", msgpack.packb([0, 1, None, "", b"k" * 31])),
    ("client", "names that are no text", msgpack.packb([9, 1, "archive", {1: 2}])),
    ("relay", "a code that nobody knows", msgpack.packb([36, 1, 1, "maybe", "", "", None, None])),
    ("relay", "a close code below 1000", msgpack.packb([39, 1, 999, ""])),
)


def plain(value: Any) -> Any:
    """A field as JSON."""
    match value:
        case bytes():
            return {"hex": value.hex()}
        case AwarenessState():
            return [value.client, value.clock, value.state_json]
        case tuple():
            return [plain(one) for one in value]
        case _:
            return value


def vectors() -> dict[str, Any]:
    frames = []
    for meaning, frame in CASES:
        sides = [
            side
            for side, table in (("client", FROM_CLIENT), ("relay", FROM_RELAY))
            if any(kind is type(frame) for kind, _ in table.values())
        ]
        frames.append(
            {
                "meaning": meaning,
                "name": type(frame).__name__,
                "from": sides,
                "hex": encode(frame).hex(),
                "fields": {one.name: plain(getattr(frame, one.name)) for one in fields(frame)},
            }
        )
    malformed = [{"why": why, "from": side, "hex": raw.hex()} for side, why, raw in MALFORMED]
    return {"about": ABOUT, "frames": frames, "malformed": malformed}


def text() -> str:
    return json.dumps(vectors(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    FILE.write_text(text())
