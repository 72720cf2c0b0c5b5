"""Typed readings of plain values: total, strict about forms, and inverse to the writing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crdt_llm.document import schema
from crdt_llm.document.schema import (
    MAX_TOKENS_MAX,
    PARAMS_STOP_CHARACTERS_MAX,
    PARAMS_STOP_MAX,
    PRINCIPAL_CHARACTERS_MAX,
    ROOT,
    WHOLE_MAX,
    Birth,
    Born,
    Entry,
    Params,
    Place,
    Proof,
    Role,
    State,
    Usage,
    conversation_id,
    entry_id,
    is_conversation_id,
    is_entry_id,
    normalise,
    seed_of,
)

VECTORS = Path(__file__).resolve().parents[2] / "protocol" / "vectors" / "documents.json"
READERS = (
    schema.read_params,
    schema.read_born,
    schema.read_place,
    schema.read_state,
    schema.read_proof,
    schema.read_usage,
    schema.read_birth,
    schema.read_policy,
    schema.read_strings,
)

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=6),
    st.binary(max_size=20),
    st.binary(max_size=20).map(bytearray),
    st.sampled_from((*Role, *State, "fork", "ask", "auto")).map(str),
    st.builds(object),
)
KEYS = st.sampled_from(
    [
        "role",
        "author",
        "device",
        "at",
        "clock",
        "mode",
        "after",
        "params",
        "call",
        "covers",
        "max_tokens",
        "temperature",
        "top_p",
        "top_k",
        "seed",
        "stop",
        "ignore_eos",
        "extend",
        "parent",
        "epoch",
        "content",
        "tokens",
        "calls",
        "digest",
        "signature",
        "prompt",
        "prefilled",
        "drafted",
        "sampled",
        "ttft_ms",
        "total_ms",
        "finish",
        "error",
        "code",
        "message",
        "owner",
        "nonce",
        "reply",
        "overflow",
        "reasoning",
        "title",
        "created_at",
        "head",
        "model",
        "policy",
        "birth",
    ]
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(KEYS, inner, max_size=6), st.tuples(inner)
    ),
    max_leaves=16,
)
NAMES = st.text(max_size=PRINCIPAL_CHARACTERS_MAX)
WHOLE = st.integers(0, WHOLE_MAX)
IDS = st.binary(min_size=16, max_size=16).map(
    lambda raw: entry_id(int.from_bytes(raw[:6]), raw[6:])
)

PARAMS = st.builds(
    Params,
    max_tokens=st.none() | st.integers(1, MAX_TOKENS_MAX),
    temperature=st.none() | st.floats(0, 100),
    top_p=st.none() | st.floats(0, 1),
    top_k=st.none() | WHOLE,
    seed=st.none() | WHOLE,
    stop=st.lists(
        st.text(min_size=1, max_size=PARAMS_STOP_CHARACTERS_MAX), max_size=PARAMS_STOP_MAX
    ).map(tuple),
    ignore_eos=st.booleans(),
    extend=st.booleans(),
)
BORN = st.builds(
    Born,
    role=st.sampled_from(Role),
    author=NAMES,
    device=NAMES,
    at=WHOLE,
    clock=st.integers(1, WHOLE_MAX),
    fork=st.booleans(),
    after=st.just(ROOT) | IDS,
    params=PARAMS,
    call=st.none() | st.text(),
    covers=st.none() | st.tuples(IDS, IDS),
)
DIGEST = st.binary(min_size=32, max_size=32)
PROOF = st.builds(
    Proof,
    content=st.none() | DIGEST,
    tokens=st.none() | DIGEST,
    calls=st.none() | DIGEST,
    digest=DIGEST,
    signature=st.binary(min_size=64, max_size=64),
)
USAGE = st.builds(
    Usage,
    prompt=WHOLE,
    prefilled=st.just(0),
    drafted=WHOLE,
    sampled=WHOLE,
    ttft_ms=st.none() | WHOLE,
    total_ms=st.none() | WHOLE,
    finish=st.none() | st.text(),
    error_code=st.just("code"),
    error_message=st.text(),
)


def as_written(value: Any) -> Any:
    return value


def as_javascript(value: Any) -> Any:
    """The same plain value as JavaScript may hand it over."""
    match value:
        case bool() | str() | None:
            return value
        case int():
            return float(value)
        case bytes():
            return bytearray(value)
        case dict():
            return {key: as_javascript(item) for key, item in value.items()}
        case list():
            return [as_javascript(item) for item in value]
        case _:
            return value


@pytest.mark.parametrize("read", READERS, ids=lambda read: read.__name__)
def test_every_reader_takes_any_value(read: Any) -> None:
    @given(VALUES)
    @settings(max_examples=100, deadline=None)
    def takes(value: Any) -> None:
        read(value)
        read(normalise(value))

    takes()


@given(st.dictionaries(KEYS, VALUES))
@settings(deadline=None)
def test_meta_takes_any_values(value: dict[str, Any]) -> None:
    meta = schema.read_meta(value)
    assert meta.conversation is None or is_conversation_id(meta.conversation)


@given(VALUES)
@settings(deadline=None)
def test_other_readings_take_any_value(value: Any) -> None:
    schema.whole(value, 0)
    schema.text(value, 5)
    is_entry_id(value)
    if isinstance(value, list):
        assert all(isinstance(item, bytes) for item in schema.read_chunks(value))


@given(VALUES)
@settings(deadline=None)
def test_what_is_normal_stays_so(value: Any) -> None:
    once = normalise(value)
    assert repr(normalise(once)) == repr(once)


@given(BORN, PROOF, USAGE, WHOLE)
@settings(deadline=None)
def test_what_is_written_is_read(born: Born, proof: Proof, usage: Usage, epoch: int) -> None:
    birth, place = Birth("o", b"n" * 16), {"parent": "", "epoch": epoch}
    for through in (as_written, as_javascript):
        assert schema.read_born(through(born.plain())) == born
        assert schema.read_params(through(born.params.plain())) == born.params
        assert schema.read_proof(through(proof.plain())) == proof
        assert schema.read_usage(through(usage.plain())) == usage
        assert schema.read_birth(through(birth.plain())) == birth
        assert schema.read_place(through(place)) == Place(ROOT, epoch)


@pytest.mark.parametrize(
    "value",
    [
        None,
        {},
        {"role": "user"},
        {"clock": 1},
        {"role": "poet", "clock": 1},
        {"role": ["user"], "clock": 1},
        *({"role": "user", "clock": clock} for clock in (0, -1, 1.5, True, "1", 2**53, None)),
    ],
    ids=repr,
)
def test_without_a_known_role_and_a_clock_nothing_is_born(value: Any) -> None:
    assert schema.read_born(value) is None


def test_what_else_is_malformed_counts_as_absent_one_by_one() -> None:
    wrong = {"author": 1, "at": -1, "mode": "branch", "after": 7, "call": 1, "covers": ["a"]}
    asked = {"max_tokens": 0, "temperature": "hot", "stop": ["", "x", 5], "extend": 1, "seed": 3}
    read = schema.read_born({"role": "user", "clock": 1.0, "params": asked} | wrong)
    assert read == Born(Role.USER, "", "", 0, 1, params=Params(stop=("x",), seed=3))
    assert schema.read_policy({"reply": "never", "overflow": "summarise"}).reply == "ask"
    assert schema.read_policy({"reply": "never", "overflow": "summarise"}).overflow == "summarise"
    assert schema.read_state("tired") is None
    assert schema.read_strings(["a", 1]) is None
    assert schema.read_chunks([b"a", "b", bytearray(b"c")]) == (b"a", b"c")


# -- ids and seeds -----------------------------------------------------------------------------


def test_conversation_ids_are_those_of_javascript() -> None:
    births = json.loads(VECTORS.read_text(encoding="utf-8"))["births"]
    assert births
    for birth in births:
        assert conversation_id(Birth(birth["owner"], bytes.fromhex(birth["nonce"]))) == birth["id"]


@given(NAMES, st.binary(min_size=16, max_size=16))
@settings(deadline=None)
def test_a_conversation_id_has_its_form(owner: str, nonce: bytes) -> None:
    assert is_conversation_id(conversation_id(Birth(owner, nonce)))


@pytest.mark.parametrize("text", ["", "a" * 21, "a" * 23, "a" * 21 + "+", "a" * 22 + "\n"])
def test_what_is_no_conversation_id(text: str) -> None:
    assert not is_conversation_id(text)


def test_an_entry_id_is_a_ulid() -> None:
    # The example of the ULID specification's own time, 48 bits of ms, then 80 bits of randomness.
    assert entry_id(1_469_918_176_385, bytes(10)) == "01ARYZ6S410000000000000000"
    assert entry_id(2**48 - 1, b"\xff" * 10) == "7" + "Z" * 25


@given(IDS, IDS)
@settings(deadline=None)
def test_entry_ids_sort_as_their_bits(one: str, other: str) -> None:
    assert is_entry_id(one)
    assert (one[:10] < other[:10]) <= (one < other)


@pytest.mark.parametrize(
    "value",
    ["", "0" * 25, "0" * 27, "8" + "0" * 25, "0" * 25 + "u", "0" * 25 + "I", "0" * 26 + "\n", 7],
)
def test_what_is_no_entry_id(value: object) -> None:
    assert not is_entry_id(value)


@given(st.text())
@settings(deadline=None)
def test_a_seed_is_a_number_that_javascript_holds(entry: str) -> None:
    assert 0 <= seed_of(entry) <= WHOLE_MAX
    assert seed_of(entry) == seed_of(entry)
    assert seed_of(entry) != seed_of(entry + "x")


def test_seeds_use_all_53_bits() -> None:
    seeds = [seed_of(str(number)) for number in range(64)]
    assert max(seeds).bit_length() == 53
    assert len({seed % 2 for seed in seeds}) == 2


# -- derived facts -----------------------------------------------------------------------------


@pytest.mark.parametrize("state", [None, *State])
def test_a_slot_has_ended_with_its_state(state: State | None) -> None:
    slot = Entry("x", Born(Role.ASSISTANT, "o", "d", 1, 1), state=state)
    assert slot.is_slot
    assert slot.ended == (state not in (None, State.STREAMING))
    said = Entry("x", Born(Role.USER, "o", "d", 1, 1), state=state)
    assert (said.is_slot, said.ended) == (False, True)


def test_reused_is_what_was_not_computed() -> None:
    assert Usage(prompt=9, prefilled=4).reused == 5
