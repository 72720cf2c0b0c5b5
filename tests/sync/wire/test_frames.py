from __future__ import annotations

import json
import tracemalloc
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sync.wire.make_frame_vectors import CASES, CONVERSATION, FILE, MALFORMED, text

from crdt_llm.document.schema import Grant, entry_id
from crdt_llm.errors import LocalMisuse, MalformedMessage
from crdt_llm.sync.wire import frames
from crdt_llm.sync.wire.frames import (
    CHANNEL_MAX,
    DRAFT_BYTES_MAX,
    FRAME_BYTES_MAX,
    FROM_CLIENT,
    FROM_RELAY,
    LISTED_MAX,
    REASON_BYTES_MAX,
    REQUEST_BYTES_MAX,
    VALUES_MAX,
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
    decode_from_client,
    decode_from_relay,
    encode,
)
from crdt_llm.sync.wire.y_websocket import (
    AWARENESS_STATE_BYTES_MAX,
    UPDATE_BYTES_MAX,
    VAR_UINT_MAX,
    AwarenessState,
    encode_state_vector,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from crdt_llm.sync.wire.frames import Frame

DECODERS: dict[str, Callable[[bytes], Frame]] = {
    "client": decode_from_client,
    "relay": decode_from_relay,
}

channels = st.integers(0, CHANNEL_MAX)
numbers = st.integers(0, VAR_UINT_MAX)
words = st.text(max_size=50)
updates = st.binary(max_size=100)
keys = st.binary(min_size=32, max_size=32)
conversations = st.text(
    "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_", min_size=22, max_size=22
)
vectors = st.dictionaries(st.integers(1, 2**32 - 1), st.integers(1, 2**32 - 1), max_size=4).map(
    encode_state_vector
)
entries = st.builds(entry_id, st.integers(0, 2**48 - 1), st.binary(min_size=10, max_size=10))
afters = st.none() | st.just("") | entries
logs = st.text("abcdef0123456789", min_size=1, max_size=64)
presences = st.lists(
    st.builds(
        AwarenessState,
        st.integers(0, 2**32 - 1),
        numbers,
        st.none() | st.dictionaries(words, words, max_size=2).map(json.dumps),
    ),
    max_size=4,
).map(tuple)
maps = st.dictionaries(
    words,
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | words | updates,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
        max_leaves=5,
    ),
    max_size=3,
)
listed = st.lists(st.tuples(conversations, st.none() | maps), max_size=3).map(tuple)
drafts = (channels, afters, st.integers(0, DRAFT_BYTES_MAX), words)

frames_of: dict[type[Frame], st.SearchStrategy[Frame]] = {
    Hello: st.builds(Hello, numbers, st.none() | words, words, st.none() | keys),
    Open: st.builds(Open, channels, conversations, st.none() | logs, numbers, vectors),
    Update: st.builds(Update, channels, numbers, updates),
    Restore: st.builds(Restore, channels, numbers, updates),
    Pull: st.builds(Pull, channels, vectors),
    Presence: st.builds(Presence, channels, presences),
    Draft: st.builds(Draft, *drafts),
    Leave: st.builds(Leave, channels),
    Watch: st.builds(Watch, st.booleans()),
    Request: st.builds(Request, numbers, words, maps),
    WantLease: st.builds(WantLease, channels, st.booleans()),
    Renew: st.just(Renew()),
    Welcome: st.builds(Welcome, numbers, words, keys, st.none() | numbers, logs),
    Opened: st.builds(
        Opened,
        channels,
        logs,
        numbers,
        updates,
        vectors,
        st.none() | st.sampled_from([str(grant) for grant in Grant]),
        st.booleans(),
    ),
    Change: st.builds(Change, channels, numbers, updates),
    Ack: st.builds(Ack, channels, numbers, numbers),
    Nack: st.builds(
        Nack,
        channels,
        numbers,
        st.sampled_from(Code),
        words,
        words,
        st.none() | numbers,
        st.none() | vectors,
    ),
    State: st.builds(State, channels, numbers, updates),
    Hint: st.builds(Hint, channels, numbers, *drafts[1:]),
    Closed: st.builds(Closed, channels, st.integers(1000, 4999), words),
    Listed: st.builds(Listed, st.booleans(), st.booleans(), listed),
    Answer: st.builds(Answer, numbers, st.none() | maps, words, words),
    Leased: st.builds(
        Leased,
        channels,
        st.none() | numbers,
        st.binary(min_size=64, max_size=64) | st.just(b""),
        numbers,
        words,
    ),
    Renewed: st.builds(Renewed, numbers),
    Work: st.builds(Work, st.lists(conversations, max_size=3).map(tuple)),
}


def kinds_of(table: Any) -> list[type[Frame]]:
    return [kind for kind, _ in table.values()]


def test_every_kind_has_a_strategy_and_a_vector() -> None:
    every = {*kinds_of(FROM_CLIENT), *kinds_of(FROM_RELAY)}
    assert set(frames_of) == every
    assert {type(frame) for _, frame in CASES} == every


@given(st.one_of(*(frames_of[kind] for kind in kinds_of(FROM_CLIENT))))
def test_what_a_client_says_arrives(frame: Frame) -> None:
    assert decode_from_client(encode(frame)) == frame


@given(st.one_of(*(frames_of[kind] for kind in kinds_of(FROM_RELAY))))
def test_what_a_relay_says_arrives(frame: Frame) -> None:
    assert decode_from_relay(encode(frame)) == frame


@pytest.mark.parametrize("decode", DECODERS.values(), ids=DECODERS)
@given(raw=st.binary(max_size=200))
def test_any_bytes_are_a_frame_or_malformed(decode: Callable[[bytes], Frame], raw: bytes) -> None:
    try:
        frame = decode(raw)
    except MalformedMessage:
        return
    assert decode(encode(frame)) == frame


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | words
    | updates
    | vectors
    | conversations,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.integers() | words, inner),
    max_leaves=8,
)


@pytest.mark.parametrize("decode", DECODERS.values(), ids=DECODERS)
@given(
    kind=st.sampled_from([*FROM_CLIENT, *FROM_RELAY]), given_fields=st.lists(anything, max_size=8)
)
def test_any_values_are_a_frame_or_malformed(
    decode: Callable[[bytes], Frame], kind: int, given_fields: list[Any]
) -> None:
    try:
        raw = msgpack.packb([kind, *given_fields])
    except (OverflowError, UnicodeEncodeError):
        return
    try:
        frame = decode(raw)
    except MalformedMessage:
        return
    assert decode(encode(frame)) == frame


@given(st.one_of(*frames_of.values()), st.data())
def test_a_changed_byte_gives_a_frame_or_malformed(frame: Frame, data: st.DataObject) -> None:
    raw = bytearray(encode(frame))
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] = data.draw(st.integers(0, 255))
    for decode in DECODERS.values():
        try:
            decode(bytes(raw))
        except MalformedMessage:
            continue


@pytest.mark.parametrize(
    ("fits", "does_not"),
    [
        (Closed(1, 4400, "x" * REASON_BYTES_MAX), Closed(1, 4400, "x" * (REASON_BYTES_MAX + 1))),
        (Draft(1, "", 0, "x" * DRAFT_BYTES_MAX), Draft(1, "", 0, "x" * (DRAFT_BYTES_MAX + 1))),
        (
            Work((CONVERSATION,) * LISTED_MAX),
            Work((CONVERSATION,) * (LISTED_MAX + 1)),
        ),
        (
            Request(1, "r", {"a": b"x" * (REQUEST_BYTES_MAX - 6)}),
            Request(1, "r", {"a": b"x" * (REQUEST_BYTES_MAX - 5)}),
        ),
        (Update(1, 1, bytes(UPDATE_BYTES_MAX)), Update(1, 1, bytes(UPDATE_BYTES_MAX + 1))),
        (
            Presence(1, (AwarenessState(1, 1, '"' + "x" * (AWARENESS_STATE_BYTES_MAX - 2) + '"'),)),
            Presence(1, (AwarenessState(1, 1, '"' + "x" * (AWARENESS_STATE_BYTES_MAX - 1) + '"'),)),
        ),
    ],
    ids=lambda frame: type(frame).__name__,
)
def test_limits_are_where_they_are_said_to_be(fits: Frame, does_not: Frame) -> None:
    side = "client" if type(fits) in kinds_of(FROM_CLIENT) else "relay"
    assert DECODERS[side](encode(fits)) == fits
    with pytest.raises(MalformedMessage):
        DECODERS[side](encode(does_not))


MANY = FRAME_BYTES_MAX - 100


@pytest.mark.parametrize(
    "raw",
    [
        b"\x93\x05\x01\xdd" + MANY.to_bytes(4) + b"\x90" * MANY,
        b"\x93\x05\x01" + b"\x9f" * MANY,
        b"\x91" * MANY,
        b"\x94\x09\x01\xa1a\xdf" + (MANY // 2).to_bytes(4) + b"\xa0\xc0" * (MANY // 2),
        b"\x94\x09\x01\xa1a\xdd\xff\xff\xff\xff" + b"\xc0" * VALUES_MAX,
    ],
    ids=[
        "empty lists",
        "lists of lists",
        "a deep list",
        "a map of one key",
        "a list that is cut off",
    ],
)
def test_a_frame_full_of_small_values_is_refused_before_they_are_made(raw: bytes) -> None:
    """An empty list takes a byte of a frame and sixty of memory: a gigabyte, and ten seconds."""
    tracemalloc.start()
    try:
        with pytest.raises(MalformedMessage, match="values"):
            decode_from_client(raw)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 1 << 20


def count(value: Any) -> int:
    if isinstance(value, list):
        return 1 + sum(map(count, value))
    if isinstance(value, dict):
        return 1 + sum(count(key) + count(one) for key, one in value.items())
    return 1


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(2**63), 2**64 - 1)
        | st.floats()
        | st.text(max_size=300)
        | st.binary(max_size=300)
        | st.builds(msgpack.ExtType, st.integers(0, 127), st.binary(max_size=40)),
        lambda one: st.lists(one, max_size=40) | st.dictionaries(st.text(max_size=40), one),
    )
)
def test_values_are_counted_without_being_made(value: Any) -> None:
    raw = msgpack.packb(value)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frames, "VALUES_MAX", count(value))
        assert frames._are_few(raw)
        patch.setattr(frames, "VALUES_MAX", count(value) - 1)
        # That nothing at all may come is asked of nobody: the count begins with the first.
        assert not frames._are_few(raw) or count(value) == 1


@pytest.mark.parametrize("size", [0, 31, 32, 255, 256, 65_535, 65_536])
def test_long_values_are_counted_as_one(size: int) -> None:
    for value in ("x" * size, b"x" * size, msgpack.ExtType(1, b"x" * size)):
        assert frames._are_few(msgpack.packb([value, [None] * (VALUES_MAX - 3)]))
        assert not frames._are_few(msgpack.packb([value, [None] * (VALUES_MAX - 2)]))
    assert frames._are_few(msgpack.packb([None] * size)) == (size < VALUES_MAX)
    assert frames._are_few(msgpack.packb(dict.fromkeys(map(str, range(size // 2))))) == (
        size < VALUES_MAX
    )


def test_what_no_frame_can_carry_is_not_sent() -> None:
    with pytest.raises(LocalMisuse):
        encode(Ack(1, 2**70, 1))
    with pytest.raises(LocalMisuse):
        encode(Request(1, "r", {"a": object()}))
    with pytest.raises(LocalMisuse):
        encode(Update(1, 1, bytes(UPDATE_BYTES_MAX + (3 << 20))))


def test_a_state_is_held_to_the_rules_of_the_plain_dialect() -> None:
    for state in ("NaN", '{"a": Infinity}', "[" * 17 + "]" * 17, '"\\ud800"'):
        with pytest.raises(MalformedMessage):
            decode_from_client(encode(Presence(1, (AwarenessState(1, 1, state),))))


def test_no_secret_is_shown() -> None:
    assert "secret" not in repr(Hello(1, "secret", "phone", None))
    assert "secret" not in repr(Draft(1, "", 0, "secret")) + repr(Hint(1, 1, "", 0, "secret"))


# -- the vectors -------------------------------------------------------------------------------


def test_the_vectors_are_those_of_the_grammar() -> None:
    assert FILE.read_text() == text(), "run tests/sync/wire/make_frame_vectors.py"


def cases() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(FILE.read_text())["frames"]
    return found


@pytest.mark.parametrize("case", cases(), ids=lambda case: f"{case['name']}: {case['meaning']}")
def test_a_vector_is_read_and_written(case: dict[str, Any]) -> None:
    frame = next(one for meaning, one in CASES if meaning == case["meaning"])
    for side in case["from"]:
        assert DECODERS[side](bytes.fromhex(case["hex"])) == frame
    assert encode(frame).hex() == case["hex"]
    assert list(case["fields"]) == list(type(frame).__dataclass_fields__)
    assert replace(frame) == frame


@pytest.mark.parametrize(("side", "why", "raw"), MALFORMED, ids=[why for _, why, _ in MALFORMED])
def test_a_malformed_vector_is_refused(side: str, why: str, raw: bytes) -> None:
    del why
    with pytest.raises(MalformedMessage):
        DECODERS[side](raw)
