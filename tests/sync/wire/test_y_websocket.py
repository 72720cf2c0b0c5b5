from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crdt_llm.errors import LocalMisuse, MalformedMessage
from crdt_llm.sync.wire import y_websocket as plain
from crdt_llm.sync.wire.y_websocket import (
    AuthDenied,
    AwarenessState,
    AwarenessUpdate,
    QueryAwareness,
    SyncStep1,
    SyncStep2,
    SyncUpdate,
    decode,
    decode_state_vector,
    encode,
    encode_state_vector,
    parse_json,
    read_var_uint,
    write_var_uint,
)

if TYPE_CHECKING:
    from crdt_llm.sync.wire.y_websocket import Message

VECTORS = json.loads(
    (Path(__file__).parents[3] / "protocol" / "vectors" / "wire.json").read_text(encoding="utf-8")
)


# One table for both directions: what is written is what is read.
CASES: list[tuple[str, Message, str]] = [
    ("step 1 of nothing", SyncStep1(b"\0"), "00 00 01 00"),
    ("step 1", SyncStep1(encode_state_vector({7: 300})), "00 00 04 01 07 ac02"),
    ("step 2 of nothing", SyncStep2(b"\0\0"), "00 01 02 0000"),
    ("update", SyncUpdate(b"\1\2\3"), "00 02 03 010203"),
    ("update of 128 bytes", SyncUpdate(b"x" * 128), "00 02 8001" + "78" * 128),
    ("awareness of nobody", AwarenessUpdate(()), "01 01 00"),
    (
        "awareness",
        AwarenessUpdate((AwarenessState(7, 1, '{"a":1}'), AwarenessState(300, 2, None))),
        "01 13 02 07 01 07 7b2261223a317d ac02 02 04 6e756c6c",
    ),
    ("auth refused", AuthDenied("nö"), "02 00 03 6ec3b6"),
    ("auth refused without a word", AuthDenied(""), "02 00 00"),
    ("query awareness", QueryAwareness(), "03"),
]


@pytest.mark.parametrize(
    ("message", "frame"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_a_message_is_one_frame_in_both_directions(message: Message, frame: str) -> None:
    assert encode(message) == bytes.fromhex(frame)
    assert decode(bytes.fromhex(frame)) == message


def meaning(message: Message) -> dict[str, Any]:
    """Say a message as the vectors do."""
    match message:
        case SyncStep1(state_vector):
            clocks = {str(c): n for c, n in decode_state_vector(state_vector).items()}
            return {
                "type": "sync-step-1",
                "state_vector": state_vector.hex(),
                "clocks": clocks,
            }
        case SyncStep2(update):
            return {"type": "sync-step-2", "update": update.hex()}
        case SyncUpdate(update):
            return {"type": "sync-update", "update": update.hex()}
        case AwarenessUpdate(states):
            return {
                "type": "awareness",
                "states": [
                    {
                        "client": state.client,
                        "clock": state.clock,
                        "state": None if state.state_json is None else json.loads(state.state_json),
                    }
                    for state in states
                ],
            }
        case AuthDenied(reason):
            return {"type": "auth-denied", "reason": reason}
        case QueryAwareness():
            return {"type": "query-awareness"}


@pytest.mark.parametrize("case", VECTORS["cases"], ids=lambda case: case["name"])
def test_frames_of_the_real_packages_are_read_and_written_alike(case: dict[str, Any]) -> None:
    frame = bytes.fromhex(case["frame"])
    message = decode(frame)
    assert meaning(message) == case["message"]
    assert encode(message) == frame


@pytest.mark.parametrize("case", VECTORS["refused"], ids=lambda case: case["name"])
def test_malformed_frames_are_refused_in_one_line(case: dict[str, Any]) -> None:
    with pytest.raises(MalformedMessage) as caught:
        decode(bytes.fromhex(case["frame"]))
    assert str(caught.value)
    assert "\n" not in str(caught.value)


def varbytes(payload: bytes) -> bytes:
    return write_var_uint(len(payload)) + payload


def awareness(state: str, count: int = 1) -> bytes:
    one = b"\x07\x01" + varbytes(state.encode())
    return b"\x01" + varbytes(write_var_uint(count) + one * count)


@pytest.mark.parametrize(
    "frame",
    [
        pytest.param(bytes(plain.FRAME_BYTES_MAX + 1), id="frame"),
        pytest.param(
            b"\0\2" + varbytes(bytes(plain.UPDATE_BYTES_MAX + 1)),
            id="update",
        ),
        pytest.param(
            b"\0\0" + varbytes(write_var_uint(plain.STATE_VECTOR_CLIENTS_MAX + 1)),
            id="state vector",
        ),
        pytest.param(awareness("0", plain.AWARENESS_STATES_MAX + 1), id="states"),
        pytest.param(
            awareness(json.dumps("x" * plain.AWARENESS_STATE_BYTES_MAX)),
            id="bytes of a state",
        ),
        pytest.param(
            awareness(json.dumps("é" * 10_000, ensure_ascii=False)), id="bytes, not characters"
        ),
        pytest.param(awareness(json.dumps("x" * 2_000), 1_000), id="bytes of all states"),
        pytest.param(
            b"\2\0" + varbytes(b"x" * (plain.AUTH_REASON_BYTES_MAX + 1)), id="auth reason"
        ),
    ],
)
def test_over_a_limit_is_refused(frame: bytes) -> None:
    with pytest.raises(MalformedMessage, match="over"):
        decode(frame)


@pytest.mark.parametrize(
    "message",
    [
        SyncUpdate(bytes(plain.UPDATE_BYTES_MAX + 1)),
        SyncStep1(b"\1"),
        SyncStep1(b""),
        AuthDenied("x" * (plain.AUTH_REASON_BYTES_MAX + 1)),
        AuthDenied("\ud800"),
        AwarenessUpdate((AwarenessState(7, 1, "null"),)),
        AwarenessUpdate((AwarenessState(7, 1, "{"),)),
        AwarenessUpdate((AwarenessState(7, 1, '"\ud800"'),)),
        AwarenessUpdate((AwarenessState(-1, 1, "{}"),)),
        AwarenessUpdate((AwarenessState(2**32, 1, "{}"),)),
        AwarenessUpdate((AwarenessState(7, 2**53, "{}"),)),
        AwarenessUpdate((AwarenessState(7, 1, "{}"),) * (plain.AWARENESS_STATES_MAX + 1)),
        AwarenessUpdate((AwarenessState(7, 1, json.dumps("x" * 2_000)),) * 1_000),
    ],
    ids=lambda message: repr(message)[:60],
)
def test_what_a_peer_would_refuse_is_not_written(message: Message) -> None:
    with pytest.raises(LocalMisuse):
        encode(message)


def test_the_largest_update_fits_in_a_frame() -> None:
    frame = encode(SyncStep2(bytes(plain.UPDATE_BYTES_MAX)))
    assert len(frame) <= plain.FRAME_BYTES_MAX
    assert len(decode(frame).update) == plain.UPDATE_BYTES_MAX  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("text", "accepted"),
    [
        ('"[[[[[[[[[[[[[[[[[[[["', True),
        ('"\\"[[[[[[[[[[[[[[[[[[[["', True),
        ("[" * 16 + "]" * 16, True),
        (",".join(["[]"] * 20).join("[]"), True),
        ("[" * 17 + "]" * 17, False),
        ('{"a":' * 17 + "0" + "}" * 17, False),
        ("[" * 100_000, False),
        ('"\\' + '"' * 100_000 + "[" * 100_000, False),
        ("1" * 5_000, False),
        ("Infinity", False),
        ("[1,]", False),
        ("\ufeff{}", False),
        ('"\\ud83d\\ude00"', True),
        ('{"\\udc00":0}', False),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_json_is_as_strict_as_in_javascript_and_bounded_in_depth(
    text: str, *, accepted: bool
) -> None:
    if accepted:
        assert parse_json(text) == json.loads(text)
    else:
        with pytest.raises(MalformedMessage):
            parse_json(text)


@pytest.mark.parametrize(
    ("number", "written"),
    [
        (0, "00"),
        (127, "7f"),
        (128, "8001"),
        (2**32 - 1, "ffffffff0f"),
        (2**53 - 1, "ffffffffffffff0f"),
    ],
)
def test_numbers_are_seven_bits_a_byte_from_the_lowest(number: int, written: str) -> None:
    assert write_var_uint(number).hex() == written
    assert read_var_uint(b"\xff" + bytes.fromhex(written) + b"\xff", 1) == (
        number,
        1 + len(written) // 2,
    )


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ("80808080808080 10", "over"),
        ("80808080808080 8001", "over"),
        ("8000", "longer than needed"),
        ("80808080808080 00", "longer than needed"),
        ("80", "truncated"),
        ("", "truncated"),
    ],
)
def test_numbers_that_no_peer_writes_are_refused(data: str, reason: str) -> None:
    with pytest.raises(MalformedMessage, match=reason):
        read_var_uint(bytes.fromhex(data), 0)


@pytest.mark.parametrize("frame", ["00 02 05 0000", "01 02 01 07", "02 00 03 61"])
def test_a_length_beyond_the_end_is_told_as_truncated(frame: str) -> None:
    with pytest.raises(MalformedMessage, match="truncated"):
        decode(bytes.fromhex(frame))


unhurried = settings(deadline=None)
clients = st.integers(0, plain.CLIENT_ID_MAX)
clocks = st.integers(0, plain.CLOCK_MAX)
state_vectors = st.dictionaries(clients, clocks, max_size=20)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=100)
json_values = st.recursive(
    st.booleans() | st.integers(-(2**53), 2**53) | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=8,
)
states = st.builds(
    AwarenessState,
    clients,
    st.integers(0, plain.VAR_UINT_MAX),
    st.none() | st.builds(json.dumps, json_values, ensure_ascii=st.booleans()),
)
messages: st.SearchStrategy[Message] = st.one_of(
    st.builds(SyncStep1, state_vectors.map(encode_state_vector)),
    st.builds(SyncStep2, st.binary(max_size=400)),
    st.builds(SyncUpdate, st.binary(max_size=400)),
    st.builds(AwarenessUpdate, st.lists(states, max_size=5).map(tuple)),
    st.builds(AuthDenied, texts),
    st.just(QueryAwareness()),
)


@unhurried
@given(messages)
def test_what_is_written_is_read_back(message: Message) -> None:
    assert decode(encode(message)) == message


@unhurried
@given(state_vectors)
def test_a_state_vector_is_read_back_and_equal_ones_are_equal_bytes(
    vector: dict[int, int],
) -> None:
    assert decode_state_vector(encode_state_vector(vector)) == vector
    assert encode_state_vector(dict(reversed(vector.items()))) == encode_state_vector(vector)


def holds(frame: bytes) -> None:
    """Whatever decodes is a message that encodes; equal meaning may have other JSON bytes only."""
    try:
        message = decode(frame)
    except MalformedMessage:
        return
    assert decode(encode(message)) == message
    if not isinstance(message, AwarenessUpdate | SyncStep1):
        assert encode(message) == frame


@unhurried
@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_malformed(frame: bytes) -> None:
    holds(frame)


@unhurried
@given(st.integers(0, 3), st.integers(0, 3), st.binary(max_size=60))
def test_any_body_behind_a_true_header_is_a_message_or_malformed(
    kind: int, step: int, body: bytes
) -> None:
    holds(bytes((kind, step)) + varbytes(body))
    holds(bytes((kind,)) + varbytes(body))


@unhurried
@given(messages)
def test_no_prefix_of_a_frame_is_a_message(message: Message) -> None:
    frame = encode(message)
    for length in range(len(frame)):
        with pytest.raises(MalformedMessage):
            decode(frame[:length])


@unhurried
@given(messages, messages)
def test_two_messages_in_a_frame_are_refused(first: Message, second: Message) -> None:
    with pytest.raises(MalformedMessage):
        decode(encode(first) + encode(second))


@unhurried
@given(messages, st.data())
def test_a_frame_with_one_byte_changed_is_a_message_or_malformed(
    message: Message, data: st.DataObject
) -> None:
    frame = bytearray(encode(message))
    frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    holds(bytes(frame))
