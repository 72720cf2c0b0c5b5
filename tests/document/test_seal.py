"""Hidden fields: they open in their own place with their own key, and nowhere else."""

from __future__ import annotations

import hashlib
import random
import struct
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import msgpack
import pytest
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given, settings
from hypothesis import strategies as st

from crdt_llm.document.chain import lease_message
from crdt_llm.document.conversation import Conversation
from crdt_llm.document.keys import SigningKey
from crdt_llm.document.seal import FINAL_CHUNK, Hidden, Kind, Sealer, Where, verify_chunk
from crdt_llm.errors import BadProof

if TYPE_CHECKING:
    from collections.abc import Callable

MASTER, NODE = b"m" * 32, SigningKey(b"k" * 32)
RELAY, SUCCESSOR = SigningKey(b"r" * 32), SigningKey(b"s" * 32)
WHERE = Where("conversation", "entry", b"p" * 32, 3, 0)
HIDDEN = Hidden(
    ids=(1, 2, 70_000, 4),
    kinds=(Kind.INJECTED, Kind.SAMPLED, Kind.SAMPLED, Kind.REASONING),
    logprobs=(-0.5, 0.0, -2.0),
    model="fingerprint",
    renderer="renderer",
    params={"seed": 7, "temperature": 0.5},
)


def sealer(master: bytes = MASTER) -> Sealer:
    return Sealer(master, random.Random(1).randbytes)


def leased(nodes: dict[int, SigningKey]) -> Conversation:
    """A replica with these leases."""
    conversation = Conversation(1)
    with conversation.writing() as writer:
        for epoch, node in nodes.items():
            message = lease_message(conversation.id or "", epoch, node.public)
            writer.add_lease(epoch, node.public, RELAY.sign(message))
    return conversation


LEASED = leased({3: NODE})


def final(where: Where = WHERE) -> Where:
    return replace(where, chunk=FINAL_CHUNK)


@st.composite
def hiddens(draw: st.DrawFn) -> Hidden:
    kinds = tuple(draw(st.lists(st.sampled_from(Kind))))
    made = sum(kind is not Kind.INJECTED for kind in kinds)
    ids = st.lists(st.integers(0, 2**32 - 1), min_size=len(kinds), max_size=len(kinds))
    floats = st.lists(st.floats(width=16, allow_nan=False), min_size=made, max_size=made)
    return Hidden(tuple(draw(ids)), kinds, tuple(draw(floats)))


@given(hiddens(), st.integers(0, FINAL_CHUNK), st.text(max_size=9))
@settings(deadline=None)
def test_what_is_sealed_opens(hidden: Hidden, chunk: int, text: str) -> None:
    where = replace(WHERE, chunk=chunk)
    blob = sealer().seal(hidden, where, text, NODE)
    assert sealer().open(blob, where) == hidden
    assert verify_chunk(LEASED, blob, where, text, RELAY.public) == 3


def test_a_blob_is_what_its_description_says() -> None:
    """A second writing, from the description alone."""
    blob = sealer().seal(HIDDEN, WHERE, "text", NODE)
    version, key_id, nonce, ciphertext, signature = msgpack.unpackb(blob)
    assert version == 1
    assert key_id == hashlib.sha256(b"crdt-llm/1/key" + MASTER).hexdigest()[:16]
    assert len(nonce) == 12
    info = b"crdt-llm/1/seal" + b"conversation"
    key = HKDF(algorithm=SHA256(), length=32, salt=None, info=info).derive(MASTER)
    associated = b"conversation" + b"entry" + struct.pack(">I", 0)
    plain = msgpack.unpackb(ChaCha20Poly1305(key).decrypt(nonce, ciphertext, associated))
    assert plain == {
        "ids": struct.pack("<4I", 1, 2, 70_000, 4),
        "kinds": [["injected", 1], ["sampled", 2], ["reasoning", 1]],
        "logprobs": struct.pack("<3e", -0.5, 0.0, -2.0),
        "model": "fingerprint",
        "renderer": "renderer",
        "params": {"seed": 7, "temperature": 0.5},
    }
    signed = b"conversation" + b"entry" + b"p" * 32
    signed += struct.pack(">QI", 3, 0) + hashlib.sha256(b"text").digest()
    sealed = hashlib.sha256(key_id.encode() + nonce + ciphertext).digest()
    nothing = hashlib.sha256(b"\xc0").digest()
    assert signature == NODE.sign(b"crdt-llm/1/chunk" + signed + nothing + sealed)


@pytest.mark.parametrize(
    "change",
    [
        lambda parts: [True, *parts[1:]],
        lambda parts: [2, *parts[1:]],
        lambda parts: [1, "0" * 16, *parts[2:]],
        lambda parts: [1, parts[1], bytes(12), *parts[3:]],
        lambda parts: [*parts[:3], bytes(len(parts[3])), parts[4]],
        lambda parts: [*parts[:2], parts[2] + parts[3][:1], parts[3][1:], parts[4]],
        lambda parts: [1, parts[1] + "a", parts[2][1:], *parts[3:]],
    ],
    ids=(
        "no form",
        "a form to come",
        "key id",
        "nonce",
        "ciphertext",
        "moved bytes",
        "moved characters",
    ),
)
def test_without_a_key_it_can_be_told_that_this_is_what_was_sealed(
    change: Callable[[list[Any]], list[Any]],
) -> None:
    blob = sealer().seal(HIDDEN, WHERE, "text", NODE)
    with pytest.raises(BadProof):
        verify_chunk(LEASED, msgpack.packb(change(msgpack.unpackb(blob))), WHERE, "text")


@pytest.mark.parametrize(
    "elsewhere", [{"conversation": "other"}, {"entry": "other"}, {"chunk": 1}], ids=str
)
def test_a_blob_does_not_open_elsewhere(elsewhere: dict[str, Any]) -> None:
    blob = sealer().seal(HIDDEN, WHERE, "", NODE)
    with pytest.raises(BadProof):
        sealer().open(blob, replace(WHERE, **elsewhere))


@pytest.mark.parametrize(
    "changed",
    [
        {"text": "other"},
        {"where": replace(WHERE, conversation="other")},
        {"where": replace(WHERE, entry="other")},
        {"where": replace(WHERE, parent=b"q" * 32)},
        {"where": replace(WHERE, epoch=4)},
        {"where": replace(WHERE, chunk=1)},
        {"where": replace(WHERE, reads=())},
        {"conversation": leased({3: SUCCESSOR})},
        {"conversation": leased({3: SUCCESSOR, 4: NODE})},
        {"conversation": leased({2: NODE})},
        {"relay": SUCCESSOR.public},
    ],
    ids=(
        "text",
        "conversation id",
        "entry",
        "parent",
        "epoch",
        "chunk",
        "reads",
        "lease of another node",
        "lease of another node beside it",
        "lease before",
        "relay",
    ),
)
def test_a_signature_covers_the_place_and_the_text(changed: dict[str, Any]) -> None:
    blob = sealer().seal(HIDDEN, WHERE, "text", NODE)
    right: dict[str, Any] = {"conversation": LEASED, "blob": blob, "where": WHERE, "text": "text"}
    verify_chunk(**right, relay=RELAY.public)
    with pytest.raises(BadProof):
        verify_chunk(**right | changed)


def test_a_reply_that_was_taken_over_is_sealed_under_the_later_lease() -> None:
    both = leased({3: NODE, 4: SUCCESSOR})
    later = sealer().seal(HIDDEN, replace(WHERE, chunk=1, epoch=4), "more", SUCCESSOR)
    where = replace(WHERE, chunk=1)
    assert verify_chunk(both, later, where, "more", RELAY.public) == 4
    earlier = sealer().seal(HIDDEN, where, "more", SUCCESSOR)
    with pytest.raises(BadProof):
        verify_chunk(both, earlier, where, "more")


def test_another_key_does_not_open_it() -> None:
    blob = sealer().seal(HIDDEN, WHERE, "", NODE)
    other = sealer(b"o" * 32)
    with pytest.raises(BadProof, match=other.key_id):
        other.open(blob, WHERE)
    assert MASTER.decode() not in repr(sealer())


def test_every_changed_byte_is_noticed() -> None:
    blob = sealer().seal(HIDDEN, WHERE, "text", NODE)

    def read(given: bytes) -> None:
        sealer().open(given, WHERE)
        verify_chunk(LEASED, given, WHERE, "text")

    read(blob)
    for position in range(len(blob)):
        changed = bytearray(blob)
        changed[position] ^= 1
        with pytest.raises(BadProof):
            read(bytes(changed))


@given(st.binary(max_size=40))
@settings(deadline=None)
def test_any_bytes_are_a_blob_or_an_error(garbage: bytes) -> None:
    with pytest.raises(BadProof):
        sealer().open(garbage, WHERE)
    with pytest.raises(BadProof):
        verify_chunk(LEASED, garbage, WHERE, "")


@pytest.mark.parametrize(
    "plain",
    [
        {},
        [],
        {"ids": b"123", "kinds": [], "logprobs": b""},
        {"ids": bytes(4), "kinds": [], "logprobs": b""},
        {"ids": bytes(4), "kinds": [["unknown", 1]], "logprobs": b""},
        {"ids": b"", "kinds": 5, "logprobs": b""},
        {"ids": b"", "kinds": [], "logprobs": b"1"},
    ],
    ids=str,
)
def test_a_plaintext_that_is_no_hidden_state(plain: Any) -> None:
    class Plain(Hidden):
        def plain(self) -> dict[str, Any]:
            given: dict[str, Any] = plain
            return given

    blob = sealer().seal(Plain(), WHERE, "", NODE)
    with pytest.raises(BadProof):
        sealer().open(blob, WHERE)


def test_chunks_joined_say_what_the_final_blob_says() -> None:
    opening = replace(HIDDEN, ids=HIDDEN.ids[:2], kinds=HIDDEN.kinds[:2], logprobs=(-0.5,))
    rest = Hidden(HIDDEN.ids[2:], HIDDEN.kinds[2:], HIDDEN.logprobs[1:])
    one = sealer()
    chunks = [
        one.seal(part, replace(WHERE, chunk=number), "", NODE)
        for number, part in enumerate((opening, rest))
    ]
    whole = one.seal(HIDDEN, final(), "", NODE)
    assert one.open_reply(chunks, WHERE) == one.open_reply([whole], WHERE) == HIDDEN
    assert one.open_reply(chunks[:1], WHERE) == opening
    for wrong in ([], chunks[::-1], chunks[1:], [*chunks, whole], [chunks[0], chunks[0]]):
        with pytest.raises(BadProof):
            one.open_reply(wrong, WHERE)


def test_what_is_printed_of_a_hidden_state_says_nothing_of_it() -> None:
    hidden = Hidden(
        (7_654_321,), (Kind.SAMPLED,), (-1.2345,), "model", "renderer", {"seed": 98_765}
    )
    printed = f"{hidden} {hidden!r} {[hidden]}"
    assert not any(secret in printed for secret in ("7654321", "1.2345", "98765", "SAMPLED"))


def test_what_the_model_made_and_what_was_put_before() -> None:
    assert HIDDEN.sampled == (2, 70_000, 4)
    assert HIDDEN.injected == (1,)
    assert Hidden((1, 2), (Kind.INJECTED,) * 2).injected == (1, 2)
    assert Hidden().injected == Hidden().sampled == ()
