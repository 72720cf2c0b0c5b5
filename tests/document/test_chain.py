"""The chain: anyone can recompute it, every change breaks it, and a redaction does not."""

from __future__ import annotations

import hashlib
import struct
from typing import TYPE_CHECKING, Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crdt_llm.document.chain import (
    Link,
    canonical,
    commit_calls,
    commit_content,
    commit_tokens,
    lease_message,
    parent_digest,
    prove,
    root_digest,
    verify_path,
)
from crdt_llm.document.conversation import Conversation
from crdt_llm.document.keys import SigningKey
from crdt_llm.document.schema import (
    ROOT,
    Birth,
    Born,
    Params,
    Place,
    Role,
    State,
    conversation_id,
    entry_id,
)
from crdt_llm.errors import BadProof

if TYPE_CHECKING:
    from collections.abc import Callable

    from crdt_llm.document.conversation import Writer

BIRTH = Birth("olga", b"n" * 16)
CONVERSATION = conversation_id(BIRTH)
NODE, RELAY = SigningKey(b"k" * 32), SigningKey(b"r" * 32)
USER, SLOT, NEXT, PENDING = (entry_id(number, b"\xab" * 10) for number in range(4))
BORN = {
    USER: Born(Role.USER, "olga", "phone", 1, 1),
    SLOT: Born(Role.ASSISTANT, "olga", "phone", 1, 2, after=USER, params=Params(temperature=0.7)),
    NEXT: Born(Role.USER, "olga", "phone", 1, 3, after=SLOT),
    PENDING: Born(Role.USER, "olga", "phone", 1, 4, after=NEXT),
}
TEXT = {USER: "hello", SLOT: "Grüße 🌍", NEXT: "go on", PENDING: "later"}
CALLS = [{"id": "1", "arguments": {"z": 1.0, "a": [0.5, None]}}]


SUCCESSOR = SigningKey(b"s" * 32)


def a_conversation(*, ended_by: SigningKey = NODE, ended_under: int = 1) -> Conversation:
    """Two answered entries, all proved, and one that is pending.

    The reply may have been ended by another node under its own lease, as all that follows.
    """
    conversation = Conversation(1)
    with conversation.writing() as writer:
        writer.give_birth(BIRTH, 1)
        writer.add_lease(1, NODE.public, RELAY.sign(lease_message(CONVERSATION, 1, NODE.public)))
        if ended_by is not NODE:
            granted = RELAY.sign(lease_message(CONVERSATION, 2, ended_by.public))
            writer.add_lease(2, ended_by.public, granted)
        for entry, born in BORN.items():
            writer.add(entry, born, TEXT[entry])
    parent = ROOT
    for entry in (USER, SLOT, NEXT):
        slot = entry == SLOT
        salt = entry.encode()[-16:]
        link = Link(
            entry,
            conversation.born_plain(entry),
            commit_content(salt, TEXT[entry]),
            tokens=commit_tokens(salt, (1, 70_000)) if slot else None,
            calls=commit_calls(salt, CALLS) if slot else None,
            reads=(USER,) if slot else None,
            state=State.DONE if slot else None,
        )
        before = parent_digest(conversation, parent)
        key, epoch = (NODE, 1) if entry == USER else (ended_by, ended_under)
        proof = prove(link, parent=before, conversation=CONVERSATION, epoch=epoch, key=key)
        with conversation.writing() as writer:
            writer.place(entry, Place(parent, 1 if slot else epoch))
            writer.proof(entry, salt, proof)
            if slot:
                writer.state(entry, State.DONE)
                writer.set(entry, "calls", CALLS)
                writer.set(entry, "reads", [USER])
        parent = entry
    return conversation


def problems(conversation: Conversation, relay: bytes | None = RELAY.public) -> dict[str, bool]:
    """Of each entry that the walk came to, whether it holds."""
    path = conversation.tree.path(PENDING)
    return {v.entry: v.problem is None for v in verify_path(conversation, path, relay)}


def changed(write: Callable[[Writer], object]) -> Conversation:
    conversation = Conversation(2, update=a_conversation().diff())
    with conversation.writing() as writer:
        write(writer)
    return conversation


def test_the_chain_is_what_its_description_says() -> None:
    """A second writing, from the description alone."""
    conversation = a_conversation()
    root = hashlib.sha256(b"crdt-llm/1/root" + CONVERSATION.encode()).digest()
    salt = USER.encode()[-16:]
    content = hashlib.sha256(salt + b"hello").digest()
    born = [
        ["at", 1],
        ["author", "olga"],
        ["clock", 1],
        ["device", "phone"],
        ["mode", "continue"],
        ["role", "user"],
    ]
    packed = msgpack.packb([USER, born, content, None, None, None, None])
    first = hashlib.sha256(b"crdt-llm/1/entry" + root + packed).digest()
    entry = conversation.entry(USER)
    assert entry is not None
    assert entry.proof is not None
    assert (entry.proof.content, entry.proof.digest) == (content, first)
    signed = b"crdt-llm/1/proof" + CONVERSATION.encode() + struct.pack(">Q", 1) + first
    assert entry.proof.signature == NODE.sign(signed)

    salt = SLOT.encode()[-16:]
    content = hashlib.sha256(salt + TEXT[SLOT].encode()).digest()
    tokens = hashlib.sha256(salt + struct.pack("<2I", 1, 70_000)).digest()
    said = msgpack.packb([[["arguments", [["a", [0.5, None]], ["z", 1]]], ["id", "1"]]])
    calls = hashlib.sha256(salt + said).digest()
    born = [
        ["after", USER],
        ["at", 1],
        ["author", "olga"],
        ["clock", 2],
        ["device", "phone"],
        ["mode", "continue"],
        ["params", [["temperature", 0.7]]],
        ["role", "assistant"],
    ]
    packed = msgpack.packb([SLOT, born, content, tokens, calls, [USER], "done"])
    second = hashlib.sha256(b"crdt-llm/1/entry" + first + packed).digest()
    assert parent_digest(conversation, SLOT) == second
    lease = b"crdt-llm/1/lease" + CONVERSATION.encode() + struct.pack(">Q", 1) + NODE.public
    assert conversation.lease(1) == (NODE.public, RELAY.sign(lease))


def test_an_untouched_path_holds_as_far_as_it_is_admitted() -> None:
    assert problems(a_conversation()) == {USER: True, SLOT: True, NEXT: True}
    assert problems(a_conversation(), relay=None) == {USER: True, SLOT: True, NEXT: True}
    elsewhere = Conversation(3, update=a_conversation().diff())
    assert problems(elsewhere) == {USER: True, SLOT: True, NEXT: True}


CHANGES: dict[str, Callable[[Writer], object]] = {
    "its text": lambda w: w.set(SLOT, "content", "another text"),
    "its salt": lambda w: w.set(SLOT, "salt", b"x" * 16),
    "its state": lambda w: w.set(SLOT, "state", "failed"),
    "what it read": lambda w: w.set(SLOT, "reads", [NEXT]),
    "its params": lambda w: w.set(SLOT, "born", BORN[SLOT].plain() | {"params": {"seed": 1}}),
    "an unknown key of its birth": lambda w: w.set(SLOT, "born", BORN[SLOT].plain() | {"x": 1}),
    "its proof": lambda w: w.set(SLOT, "proof", {"digest": bytes(32), "signature": bytes(64)}),
    "no proof": lambda w: w.set(SLOT, "proof", None),
    "its text, withdrawn without saying so": lambda w: w.set(SLOT, "content", None),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_is_noticed_at_its_entry(what: str) -> None:
    assert problems(changed(CHANGES[what])) == {USER: True, SLOT: False}


def test_a_change_of_the_first_entry_is_noticed_there() -> None:
    conversation = changed(lambda w: w.set(USER, "content", "bye"))
    assert problems(conversation) == {USER: False}


def test_a_key_that_the_relay_did_not_sign_for_proves_nothing() -> None:
    impostor = SigningKey(b"i" * 32)
    assert problems(a_conversation(), relay=impostor.public) == {USER: False}
    forged = impostor.sign(lease_message(CONVERSATION, 1, impostor.public))
    assert problems(changed(lambda w: w.add_lease(1, impostor.public, forged))) == {USER: False}
    # Without the relay's key a lease is taken at its word, but the proofs are not under this one.
    conversation = changed(lambda w: w.add_lease(1, impostor.public, forged))
    assert problems(conversation, relay=None) == {USER: False}


def test_an_epoch_without_a_lease_proves_nothing() -> None:
    conversation = changed(lambda w: w.place(USER, Place(ROOT, 2)))
    assert problems(conversation) == {USER: False}


def test_a_reply_that_was_taken_over_holds_under_the_later_lease() -> None:
    taken_over = a_conversation(ended_by=SUCCESSOR, ended_under=2)
    assert problems(taken_over) == {USER: True, SLOT: True, NEXT: True}
    earlier = a_conversation(ended_by=SUCCESSOR, ended_under=1)
    assert problems(earlier) == {USER: True, SLOT: False}, "it had no lease of that epoch"
    unsigned = Conversation(2, update=taken_over.diff())
    with unsigned.writing() as writer:
        writer.add_lease(2, SUCCESSOR.public, bytes(64))
    assert problems(unsigned) == {USER: True, SLOT: False}, "the relay made it no node"


def test_an_author_s_entry_is_proved_under_the_lease_of_its_place() -> None:
    conversation = a_conversation(ended_by=SUCCESSOR, ended_under=2)
    with conversation.writing() as writer:
        writer.place(NEXT, Place(SLOT, 1))
    assert problems(conversation) == {USER: True, SLOT: True, NEXT: False}


def test_the_chain_survives_a_redaction() -> None:
    def withdraw(writer: Writer) -> None:
        writer.set(SLOT, "redacted", {"by": "olga", "at": 5})
        for field in ("content", "salt", "calls"):
            del writer._entries[SLOT][field]

    conversation = changed(withdraw)
    assert conversation.text(SLOT) == ""
    assert problems(conversation) == {USER: True, SLOT: True, NEXT: True}


def test_nothing_builds_on_a_reply_that_has_not_ended() -> None:
    conversation = a_conversation()
    with pytest.raises(BadProof, match=PENDING):
        parent_digest(conversation, PENDING)
    with pytest.raises(BadProof):
        parent_digest(conversation, "missing")
    assert parent_digest(conversation, ROOT) == root_digest(CONVERSATION)


def test_a_streaming_reply_ends_the_walk() -> None:
    conversation = Conversation(1)
    with conversation.writing() as writer:
        writer.give_birth(BIRTH, 1)
        writer.add(SLOT, BORN[SLOT])
        writer.place(SLOT, Place(ROOT, 1))
        writer.state(SLOT, State.STREAMING)
    assert list(verify_path(conversation, (SLOT,))) == []


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


def reordered(value: Any) -> Any:
    """The same value with other key orders and other kinds of numbers and byte arrays."""
    if isinstance(value, dict):
        return {key: reordered(value[key]) for key in reversed(value)}
    if isinstance(value, list):
        return [reordered(item) for item in value]
    if isinstance(value, bytes):
        return bytearray(value)
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


@given(PLAIN)
@settings(deadline=None)
def test_equal_values_have_the_same_bytes(value: Any) -> None:
    assert msgpack.packb(canonical(reordered(value))) == msgpack.packb(canonical(value))


def test_numbers_are_integers_or_float64() -> None:
    assert msgpack.packb(canonical([7.0, -0.0, 0.5, True])).hex() == "940700cb3fe0000000000000c3"
