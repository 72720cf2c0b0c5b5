"""One replica: what is written is read, replicas converge, and hostile values are total to read."""

from __future__ import annotations

import gc
import json
import random
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from pycrdt import Array, Doc, Map, Text

from crdt_llm.document import conversation as conversation_module
from crdt_llm.document.conversation import (
    EMPTY_UPDATE,
    ROOTS,
    Change,
    Conversation,
)
from crdt_llm.document.rules import Author, check
from crdt_llm.document.schema import (
    ENTRY_FIELDS,
    ROOT,
    Birth,
    Born,
    Entry,
    Grant,
    Meta,
    Params,
    Place,
    Policy,
    Proof,
    Role,
    State,
    Usage,
    conversation_id,
    entry_id,
)
from crdt_llm.errors import LocalMisuse, MalformedMessage
from crdt_llm.sync.update.structure import find_gap, read_update

VECTORS = Path(__file__).resolve().parents[2] / "protocol" / "vectors" / "documents.json"
BIRTH = Birth("olga", b"n" * 16)
USER, SLOT, OTHER = (entry_id(number, b"\xab" * 10) for number in range(3))
SALT = b"-" * 16
PROOF = Proof(content=b"c" * 32, tokens=None, calls=None, digest=b"d" * 32, signature=b"s" * 64)


def asked(client_id: int = 1, *, seal_client_id: int | None = 2) -> Conversation:
    """A question, admitted, and a slot that streams."""
    conversation = Conversation(client_id, seal_client_id=seal_client_id)
    with conversation.writing() as writer:
        writer.give_birth(BIRTH, 1)
        writer.add(USER, Born(Role.USER, "olga", "phone", 1, 1), "hello")
        writer.add(SLOT, Born(Role.ASSISTANT, "olga", "phone", 1, 2, after=USER))
        writer.place(USER, Place(ROOT, 1))
        writer.place(SLOT, Place(USER, 1))
        writer.state(SLOT, State.STREAMING)
        writer.open_reply(SLOT)
    return conversation


def contents(conversation: Conversation) -> dict[str, Any]:
    """All that a replica can be asked."""
    tree = conversation.tree
    return {
        "meta": conversation.meta,
        "plain meta": conversation.meta_plain(),
        "access": conversation.access(),
        "grants": {name: conversation.grant_of(name) for name in ("olga", "will", "stan")},
        "leases": {epoch: conversation.lease(epoch) for epoch in range(3)},
        "entries": {entry: conversation.entry(entry) for entry in sorted(tree.entries)},
        "born": {entry: conversation.born_plain(entry) for entry in sorted(tree.entries)},
        "view": conversation.view(),
        "views": {entry: conversation.view(entry) for entry in sorted(tree.entries)},
        "pending": tree.pending,
        "superseded": tree.superseded,
        "clock": tree.clock,
    }


def ordered(value: Any) -> str:
    """A value as text, whatever the order of keys; a NaN equals itself only so."""
    if isinstance(value, dict):
        pairs = sorted((repr(key), ordered(item)) for key, item in value.items())
        return f"{{{', '.join(f'{key}: {item}' for key, item in pairs)}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(ordered, value))}]"
    if is_dataclass(value):
        return ordered({one.name: getattr(value, one.name) for one in fields(value)})
    return repr(value)


def clocks(state_vector: bytes) -> dict[int, int]:
    """A state vector as client -> clock: its encoding leaves the order open."""
    numbers, number, shift = list[int](), 0, 0
    for byte in state_vector:
        number |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            numbers.append(number)
            number, shift = 0, 0
    assert len(numbers) == 1 + 2 * numbers[0]
    return dict(zip(numbers[1::2], numbers[2::2], strict=True))


# -- what is written is read -------------------------------------------------------------------

PARAMS = Params(5, 0.5, 1.0, 0, 2**53 - 1, ("\n",), ignore_eos=True, extend=True)
FULL = {
    USER: Entry(
        USER,
        Born(Role.SYSTEM, "olga", "phone", 1, 1, covers=(USER, SLOT)),
        content="Grüße 🌍",
        place=Place(ROOT, 1),
        salt=SALT,
        proof=PROOF,
    ),
    OTHER: Entry(
        OTHER,
        Born(Role.TOOL, "olga", "phone", 2, 2, fork=True, after=USER, call="call_1"),
        content="",
        redacted=True,
    ),
    SLOT: Entry(
        SLOT,
        Born(Role.ASSISTANT, "olga", "phone", 3, 2, after=USER, params=PARAMS),
        content="Grüße zurück 🌍!",
        stop="will",
        place=Place(USER, 1),
        state=State.DONE,
        calls=({"id": "1", "arguments": {"x": 1}},),
        reads=(USER,),
        sealed=(b"one", b"two"),
        usage=Usage(9, 4, 1, 3, 12, 34, "stop", "code", "message"),
        salt=SALT,
        proof=Proof(b"c" * 32, b"t" * 32, b"l" * 32, b"d" * 32, b"s" * 64),
    ),
}


def write_everything(conversation: Conversation) -> None:
    with conversation.writing() as writer:
        writer.give_birth(BIRTH, 1)
        writer.set_meta("title", "A title")
        writer.set_meta("created_at", 7)
        writer.set_meta("head", SLOT)
        writer.set_meta("model", "m")
        writer.set_meta("policy", {"reply": "auto", "reasoning": "visible"})
        writer.grant("will", Grant.WRITER)
        writer.grant("stan", Grant.READER)
        writer.add_lease(1, b"k" * 32, b"s" * 64)
        for entry in FULL.values():
            writer.add(entry.id, entry.born, None if entry.is_slot else entry.content)
        writer.open_reply(SLOT)
        writer.append_sealed(SLOT, b"one")
    with conversation.writing() as writer:
        writer.grant("stan", None)
        for delta in ("Grüße ", "zurück 🌍", "!"):
            writer.append_text(SLOT, delta)
        writer.append_sealed(SLOT, b"two")
        writer.stop(SLOT, "will")
        writer.set(OTHER, "redacted", {"by": "olga", "at": 3})
        writer.set(SLOT, "calls", [{"id": "1", "arguments": {"x": 1.0}}])
        writer.set(SLOT, "reads", [USER])
        for entry in FULL.values():
            if entry.place:
                writer.place(entry.id, entry.place)
            if entry.state:
                writer.state(entry.id, entry.state)
            if entry.usage:
                writer.usage(entry.id, entry.usage)
            if entry.salt and entry.proof:
                writer.proof(entry.id, entry.salt, entry.proof)


def test_what_is_written_is_read_here_and_elsewhere() -> None:
    here = Conversation(1, seal_client_id=2)
    write_everything(here)
    assert here.meta == Meta(
        BIRTH, "A title", 7, SLOT, "m", Policy(reply="auto", reasoning="visible")
    )
    assert here.id == conversation_id(BIRTH)
    assert here.access() == {"will": "writer"}
    assert [here.grant_of(name) for name in ("olga", "will", "stan")] == ["owner", "writer", None]
    assert (here.lease(1), here.lease(2)) == ((b"k" * 32, b"s" * 64), None)
    assert {entry: here.entry(entry) for entry in FULL} == FULL
    assert here.born_plain(SLOT) == FULL[SLOT].born.plain()
    assert here.view() == (USER, SLOT)
    for entry in FULL.values():
        assert here.text(entry.id) == entry.content
        assert here.text_bytes(entry.id) == len(entry.content.encode())
        assert here.state(entry.id) == entry.state
        assert here.born(entry.id) == entry.born
    assert [here.kind(SLOT, field) for field in ("content", "sealed", "born", "salt", "x")] == [
        "text",
        "array",
        "",
        "",
        None,
    ]
    assert here.entry("missing") is None
    there = Conversation(3, update=here.diff())
    assert contents(there) == contents(here)
    assert clocks(there.state_vector()) == clocks(here.state_vector())
    assert there.apply(here.diff(there.state_vector())).is_empty


def test_answers_that_are_kept_do_not_outlive_a_change() -> None:
    here, raw = asked(), Doc[Any](client_id=7)
    assert (here.meta.title, here.text(USER), here.view()) == ("", "hello", (USER, SLOT))
    with here.writing() as writer:
        writer.set_meta("title", "x")
        assert here.meta.title == "x"  # at once, for the writer itself
    assert here.meta.title == "x"
    raw.apply_update(here.diff())
    raw.get("meta", type=Map)["title"] = "y"
    raw.get("entries", type=Map)[USER] = Map({"born": {"role": "user", "clock": 1}, "content": "z"})
    here.apply(raw.get_update())
    assert (here.meta.title, here.text(USER)) == ("y", "z")
    del raw.get("entries", type=Map)[USER]
    here.apply(raw.get_update())
    assert (here.text(USER), here.entry(USER)) == ("", None)


def test_what_is_kept_of_a_reply_does_not_outlive_a_change() -> None:
    """Its state and where its text is; the old text's place may be another's by then."""
    here, raw = asked(), Doc[Any](client_id=7)

    def read() -> tuple[State | None, int]:
        entry = here.entry(SLOT)
        assert here.text_bytes(SLOT) == len(here.text(SLOT).encode())
        assert here.state(SLOT) == (entry.state if entry is not None else None)
        return here.state(SLOT), here.text_bytes(SLOT)

    assert read() == (State.STREAMING, 0)
    with here.writing() as writer:
        writer.state(SLOT, State.FAILED)
        writer.open_reply(SLOT)
        writer.append_text(SLOT, "é")
        assert here.state(SLOT) is State.FAILED  # at once, for the writer itself
        assert here.text_bytes(SLOT) == 2
    assert read() == (State.FAILED, 2)
    with here.writing() as writer:
        writer.state(SLOT, State.STREAMING)
        writer.append_text(SLOT, "!")
        assert here.text_bytes(SLOT) == 3
    assert read() == (State.STREAMING, 3)
    before = here.diff()
    raw.apply_update(before)
    entries = raw.get("entries", type=Map)
    born = {"role": "assistant", "clock": 2}
    steps: list[tuple[dict[str, Any] | None, tuple[State | None, int]]] = [
        ({"content": Text("other")}, (State.STREAMING, 5)),
        ({"content": "plain", "state": "done"}, (State.DONE, 5)),
        ({"content": Text("z"), "state": "no state"}, (None, 1)),
        ({"state": "failed"}, (State.FAILED, 1)),
        (None, (None, 0)),
        ({"born": born, "content": Text("anew")}, (None, 4)),
        ({"state": "stopped", "content": None}, (State.STOPPED, 0)),
        ({"content": Text("at last")}, (State.STOPPED, 7)),
    ]
    for fields_then, then in steps:
        if fields_then is None:
            del entries[SLOT]
        elif SLOT in entries:
            entries[SLOT].update(fields_then)
        else:
            entries[SLOT] = Map(fields_then)
        here.apply(raw.get_update(here.state_vector()))
        assert read() == then
    here.revert(conversation_module.Shadow(3, before), {SLOT})
    assert read() == (State.STREAMING, 3)


@pytest.mark.parametrize("kept", [1, 2])
def test_any_number_of_kept_entries_will_do(kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversation_module, "HANDLES_MAX", kept)
    here = Conversation(1, seal_client_id=2)
    write_everything(here)
    assert {entry: here.entry(entry) for entry in FULL} == FULL
    assert [here.text_bytes(entry) for entry in FULL] == [
        len(here.text(entry).encode()) for entry in FULL
    ]
    assert len(here._handles) <= kept
    assert len(here._texts) <= kept


def test_meta_is_taken_away_again() -> None:
    conversation = Conversation(1)
    with conversation.writing() as writer:
        writer.set_meta("title", "x")
        writer.set_meta("model", None)
        writer.grant("will", None)
    with conversation.writing() as writer:
        writer.set_meta("title", None)
    assert conversation.meta_plain() == {}


# -- what happened -----------------------------------------------------------------------------


def test_a_transaction_is_one_change_and_one_update() -> None:
    here, there = asked(), Conversation(3)
    there.apply(here.diff())
    heard: list[Change] = []
    unsubscribe = there.subscribe(heard.append)
    with here.writing(origin="me") as writer:
        writer.append_text(SLOT, "Hi")
        writer.append_sealed(SLOT, b"1")
        writer.set_meta("title", "x")
    written = writer.change
    assert written is not None
    applied = there.apply(written.update, origin="you")
    assert contents(there) == contents(here)
    for change, origin in ((written, "me"), (applied, "you")):
        assert change.origin == origin
        assert change.texts == {SLOT}
        assert change.structure == frozenset()
        assert change.entries == {SLOT}
        assert sorted(edit.root for edit in change.edits) == ["entries", "entries", "meta"]
    assert heard == [applied]
    assert there.apply(written.update).is_empty  # a duplicate
    unsubscribe()
    with here.writing() as writer:
        writer.state(SLOT, State.DONE)
    assert writer.change is not None
    assert there.apply(writer.change.update).structure == {SLOT}
    assert heard == [applied]


def test_a_listener_may_read() -> None:
    here, seen = asked(), list[tuple[str, ...]]()
    here.subscribe(lambda _: seen.append(here.view()))
    with here.writing() as writer:
        writer.add(OTHER, Born(Role.USER, "olga", "phone", 1, 3, after=SLOT), "and?")
    assert seen == [(USER, SLOT, OTHER)]


def test_nothing_written_is_an_empty_change() -> None:
    here = asked()
    heard: list[Change] = []
    here.subscribe(heard.append)
    with here.writing() as writer:
        pass
    assert writer.change is not None
    assert writer.change.is_empty
    assert here.apply(EMPTY_UPDATE).is_empty
    assert heard == []


def test_what_was_written_before_an_exception_is_told() -> None:
    here, heard = asked(), list[Change]()
    here.subscribe(heard.append)

    def fail() -> None:
        with here.writing() as writer:
            writer.state(SLOT, State.FAILED)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    there = Conversation(3, update=here.diff())
    assert contents(there) == contents(here)
    assert [change.structure for change in heard] == [{SLOT}]
    assert not here.tree.pending


# -- misuse ------------------------------------------------------------------------------------


@pytest.mark.parametrize("client_id", [0, -1, 2**32])
def test_client_ids_have_32_bits(client_id: int) -> None:
    with pytest.raises(LocalMisuse):
        Conversation(client_id)
    with pytest.raises(LocalMisuse):
        Conversation(1, seal_client_id=client_id)


def test_a_replica_is_left_alone_while_it_is_written() -> None:
    here = asked()
    update = here.diff()
    with here.writing():
        with pytest.raises(LocalMisuse):
            here.apply(update)
        with pytest.raises(LocalMisuse):
            here.diff()
        with pytest.raises(LocalMisuse), here.writing():
            pass
    assert here.apply(update).is_empty  # and is well afterwards


def test_a_seal_that_is_held_before_it_is_needed_follows_what_comes_meanwhile() -> None:
    held, plain = asked(), asked()
    held.hold_seal()
    held.hold_seal()
    for conversation in (held, plain):
        with conversation.writing() as writer:
            writer.set_meta("title", "meanwhile")
        with conversation.writing() as writer:
            writer.append_text(SLOT, "so")
            writer.append_sealed(SLOT, b"one")
        conversation.release_seal()
        with conversation.writing() as writer:
            writer.append_sealed(SLOT, b"two")
    assert contents(held) == contents(plain)
    assert contents(Conversation(9, update=held.diff())) == contents(held)
    entry = held.entry(SLOT)
    assert entry is not None
    assert (entry.content, entry.sealed) == ("so", (b"one", b"two"))


def test_sealing_needs_a_client_id_and_an_open_reply() -> None:
    plain = asked(seal_client_id=None)
    with pytest.raises(LocalMisuse):
        plain.hold_seal()
    with pytest.raises(LocalMisuse), plain.writing() as writer:
        writer.append_sealed(SLOT, b"1")
    node = asked()
    with node.writing() as writer:
        writer.set(SLOT, "sealed", "no list")
    with pytest.raises(LocalMisuse), node.writing() as writer:
        writer.append_sealed(SLOT, b"1")


@pytest.mark.parametrize("garbage", [b"", b"\x01", b"\x01\x01\x01", b"\x00\x01", b"hello"])
def test_what_is_no_update_is_refused(garbage: bytes) -> None:
    with pytest.raises(MalformedMessage) as refused:
        Conversation(1).apply(garbage)
    assert "\n" not in str(refused.value)


class PanicException(BaseException):
    """As the library raises it; its own cannot be imported."""


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        (PanicException(), MalformedMessage),
        (RecursionError(), MalformedMessage),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_a_panic_of_the_library_is_an_error_of_the_update(
    raised: BaseException, told: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: bytes) -> None:
        raise raised

    here = asked()
    monkeypatch.setattr(here._doc, "apply_update", fail)
    with pytest.raises(told):
        here.apply(EMPTY_UPDATE)


@pytest.mark.parametrize("garbage", [b"", b"\x02\x01\x01", b"\xff"])
def test_what_is_no_state_vector_is_refused(garbage: bytes) -> None:
    with pytest.raises(MalformedMessage):
        asked().diff(garbage)


# -- hostile values ----------------------------------------------------------------------------

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**53), 2**53),
    st.floats(),
    st.text(max_size=8),
    st.binary(max_size=8),
    st.sampled_from((USER, SLOT, ROOT, "user", "assistant", "streaming", "done", "fork", "owner")),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.one_of(
                st.text(max_size=4),
                st.sampled_from(("role", "clock", "after", "parent", "epoch", "owner", "by", "at")),
            ),
            inner,
            max_size=3,
        ),
    ),
    max_leaves=8,
)
HALF_BORN = st.fixed_dictionaries(
    {"role": st.sampled_from(("user", "assistant", "tool")), "clock": st.integers(1, 4)},
    optional={
        "after": st.one_of(st.sampled_from((USER, SLOT, OTHER)), VALUES),
        "mode": st.one_of(st.just("fork"), VALUES),
        "params": VALUES,
        "at": VALUES,
        "covers": VALUES,
        "author": VALUES,
    },
)
SHARED = st.one_of(
    st.text(max_size=8).map(Text),
    st.lists(SCALARS, max_size=3).map(Array),
    st.dictionaries(st.text(max_size=4), SCALARS, max_size=3).map(Map),
)
FIELDS = st.fixed_dictionaries(
    {"born": st.one_of(HALF_BORN, HALF_BORN, VALUES, SHARED)},
    optional={
        field: st.one_of(VALUES, SHARED) for field in sorted(ENTRY_FIELDS - {"born"} | {"unknown"})
    },
)


@given(
    entries=st.dictionaries(st.sampled_from((USER, SLOT, OTHER, "no id")), FIELDS),
    others=st.dictionaries(
        st.tuples(
            st.sampled_from(ROOTS),
            st.sampled_from(("title", "birth", "policy", "head", "olga", "will", "1", USER)),
        ),
        st.one_of(VALUES, SHARED),
    ),
)
@settings(max_examples=100, deadline=None)
def test_any_values_are_read_alike_on_every_replica(
    entries: dict[str, dict[str, Any]], others: dict[tuple[str, str], Any]
) -> None:
    raw: Doc[Any] = Doc(client_id=7)
    roots = {root: raw.get(root, type=Map) for root in ROOTS}
    updates: list[bytes] = []
    subscription = raw.observe(lambda event: updates.append(bytes(event.update)))
    for entry, given_fields in entries.items():
        roots["entries"][entry] = Map({})
        for field, value in given_fields.items():
            roots["entries"][entry][field] = value
    for (root, key), value in others.items():
        roots[root][key] = value
    raw.unobserve(subscription)
    step_by_step, at_once = Conversation(1), Conversation(2)
    for update in updates:
        step_by_step.apply(update)
    at_once.apply(raw.get_update())
    assert ordered(contents(step_by_step)) == ordered(contents(at_once))
    for entry in (USER, SLOT, OTHER, "no id"):
        for field in ENTRY_FIELDS:
            assert step_by_step.has(entry, field) == at_once.has(entry, field)
            assert step_by_step.kind(entry, field) == at_once.kind(entry, field)
        assert step_by_step.text(entry) == at_once.text(entry)
        assert step_by_step.text_bytes(entry) == len(at_once.text(entry).encode())
        assert step_by_step.state(entry) == at_once.state(entry)


def test_values_as_javascript_writes_them() -> None:
    """JavaScript has floats for whole numbers."""
    raw: Doc[Any] = Doc(client_id=7)
    entries, meta = raw.get("entries", type=Map), raw.get("meta", type=Map)
    born = Born(Role.USER, "olga", "web", 1_700_000_000_000, 1)
    floats = {key: float(v) if isinstance(v, int) else v for key, v in born.plain().items()}
    with raw.transaction():
        meta["birth"] = {"owner": "olga", "nonce": b"n" * 16}
        meta["created_at"] = 7.0
        entries[USER] = Map(
            {"born": floats, "content": "hi", "place": {"parent": "", "epoch": 1.0}}
        )
    conversation = Conversation(1, update=raw.get_update())
    assert conversation.born(USER) == born
    assert conversation.born_plain(USER) == born.plain()
    assert repr(conversation.born_plain(USER)["at"]) == "1700000000000"
    assert conversation.meta == Meta(BIRTH, created_at=7)
    entry = conversation.entry(USER)
    assert entry is not None
    assert entry.place == Place(ROOT, 1)


def test_a_conversation_that_real_yjs_wrote_is_accepted_and_read() -> None:
    vector = json.loads(VECTORS.read_text(encoding="utf-8"))
    owner, question, slot = vector["owner"], vector["ids"]["question"], vector["ids"]["slot"]
    author = Author(owner)
    conversation, said = Conversation(1), []
    for step in vector["steps"]:
        change = conversation.apply(bytes.fromhex(step["update"]))
        check(change, conversation, conversation_id=vector["conversation"], author=author)
        said.append(conversation.text(question))
    at_once = Conversation(2)
    change = at_once.apply(bytes.fromhex(vector["document"]))
    check(change, at_once, conversation_id=vector["conversation"], author=author)
    assert ordered(contents(conversation)) == ordered(contents(at_once))
    assert clocks(conversation.state_vector()) == clocks(at_once.state_vector())

    assert conversation.id == vector["conversation"]
    assert conversation.meta.title == "Grüße 🌍"
    assert conversation.meta.created_at == 1_700_000_000_000
    assert conversation.meta.policy == Policy(overflow="drop_oldest")
    assert conversation.access() == {"will": "writer"}
    assert said == ["", "", "What is 6 · 7? 🤔", "What is 6 · 7? 🤔", ""]
    params = Params(64, 0.7, 1.0, seed=2**53 - 1, stop=("\n",))
    born = Born(
        Role.ASSISTANT, owner, "a browser", 1_700_000_000_001, 2, after=question, params=params
    )
    assert conversation.entry(slot) == Entry(slot, born, stop=owner)
    entry = conversation.entry(question)
    assert entry is not None
    assert entry.redacted
    assert conversation.view() == ()


# -- size --------------------------------------------------------------------------------------

TOKENS, WINDOWS = 200, 40
RATIO_MAX = 1.45  # of a streamed document to its plain text, before the sealed blobs are counted


def stream(conversation: Conversation, *, sealed: bool) -> str:
    """A reply of 200 tokens in 40 windows; the text it makes."""
    words = random.Random(7)
    tokens = ["".join(words.choices("abcdefghij", k=4)) + " " for _ in range(TOKENS)]
    step = TOKENS // WINDOWS
    for start in range(0, TOKENS, step):
        with conversation.writing() as writer:
            writer.append_text(SLOT, "".join(tokens[start : start + step]))
            if sealed:
                writer.append_sealed(SLOT, b"s" * 100)
    return "".join(tokens)


def test_hidden_fields_leave_the_text_one_run() -> None:
    empty = len(asked().diff())
    plain, sealing = asked(), asked()
    said = stream(plain, sealed=False)
    assert stream(sealing, sealed=True) == said
    assert plain.text(SLOT) == sealing.text(SLOT) == said
    assert len(plain.diff()) - empty <= 1.1 * len(said)
    blobs = 100 * WINDOWS
    assert len(sealing.diff()) - empty - blobs <= RATIO_MAX * len(said)
    with sealing.writing() as writer:
        writer.replace_sealed(SLOT, b"s" * 500)
    assert len(sealing.diff()) - empty <= 1.1 * len(said) + 500
    assert contents(Conversation(3, update=sealing.diff())) == contents(sealing)


def test_a_token_in_a_long_conversation_does_not_touch_the_tree(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here = asked()
    with here.writing() as writer:
        before = SLOT
        for number in range(10_000):
            entry = entry_id(100 + number, bytes(10))
            writer.add(entry, Born(Role.USER, "olga", "p", 1, 3 + number, after=before), "x")
            before = entry
    there = Conversation(3, update=here.diff())
    assert len(there.view()) == 10_002
    puts: list[object] = []
    for conversation in (here, there):
        monkeypatch.setattr(conversation.tree, "put", puts.append)
    worked_out = [conversation.tree._work_out_pending() for conversation in (here, there)]
    with here.writing() as writer:
        writer.append_text(SLOT, "token")
        writer.append_sealed(SLOT, b"1")
    assert writer.change is not None
    there.apply(writer.change.update)
    assert there.text(SLOT) == "token"
    assert puts == []
    assert all(
        c.tree._work_out_pending() is pending
        for c, pending in zip((here, there), worked_out, strict=True)
    )


# -- convergence -------------------------------------------------------------------------------

NAMES = ("olga", "will", "node")
WHO = st.integers(0, 2)


class Mesh(RuleBasedStateMachine):
    """Three replicas that write whenever they like, over links that drop, repeat and reorder."""

    def __init__(self) -> None:
        super().__init__()
        self.replicas = [Conversation(10 + n, seal_client_id=20 + n) for n in range(3)]
        self.links: dict[tuple[int, int], list[bytes]] = {
            (source, target): [] for source in range(3) for target in range(3) if source != target
        }
        self.ids = 0
        self.paths: dict[str, tuple[str, ...]] = {}  # of what the node admitted

    def id(self) -> str:
        self.ids += 1
        return entry_id(1_000 - self.ids, b"\xab" * 10)  # ids need not follow the clocks

    def write(self, who: int, write: Any) -> None:
        with self.replicas[who].writing() as writer:
            write(writer)
        change = writer.change
        assert change is not None
        for (source, _), link in self.links.items():
            if source == who and not change.is_empty:
                link.append(change.update)

    def some(self, who: int, pick: int, *, slot: bool | None = None) -> str | None:
        tree = self.replicas[who].tree
        found = sorted(e for e in tree.entries if slot is None or tree.facts(e).slot == slot)
        return found[pick % len(found)] if found else None

    @initialize()
    def be_born_offline_together(self) -> None:
        for who in range(2):
            self.write(who, lambda writer: writer.give_birth(BIRTH, 1))

    @rule(who=WHO, pick=st.integers(0, 99), slot=st.booleans(), fork=st.booleans())
    def add(self, who: int, pick: int, slot: bool, fork: bool) -> None:  # noqa: FBT001 - drawn
        tree = self.replicas[who].tree
        after = (self.some(who, pick) if fork else tree.last(ROOT)) or ROOT
        role = Role.ASSISTANT if slot else Role.USER
        born = Born(role, NAMES[who], "d", 1, tree.clock + 1, fork, after)
        entry = self.id()
        self.write(who, lambda w: w.add(entry, born, None if slot else f"said {entry}"))

    @rule(who=WHO, pick=st.integers(0, 99))
    def stop(self, who: int, pick: int) -> None:
        if slot := self.some(who, pick, slot=True):
            self.write(who, lambda writer: writer.stop(slot, NAMES[who]))

    @rule(who=WHO, pick=st.integers(0, 99))
    def redact(self, who: int, pick: int) -> None:
        entry = self.some(who, pick)
        if entry is None:
            return
        replica = self.replicas[who]

        def withdraw(writer: Any) -> None:
            writer.set(entry, "redacted", {"by": NAMES[who], "at": 1})
            for field in ("content", "salt", "sealed"):
                if replica.has(entry, field):
                    del writer._entries[entry][field]

        self.write(who, withdraw)

    @rule(who=WHO, pick=st.integers(0, 99), key=st.sampled_from(("title", "head", "grant")))
    def set(self, who: int, pick: int, key: str) -> None:
        grants = (Grant.READER, Grant.WRITER, None)
        if key == "grant":
            self.write(who, lambda writer: writer.grant("stan", grants[pick % 3]))
        elif key == "title":
            self.write(who, lambda writer: writer.set_meta(key, f"title {pick}"))
        else:
            self.write(who, lambda writer: writer.set_meta(key, self.some(who, pick)))

    @rule(text=st.sampled_from(("é", "to ", "ken", "🌍")), pick=st.integers(0, 99))
    def node(self, text: str, pick: int) -> None:
        """Admit what comes next; or let a reply grow, or end."""
        node = self.replicas[2]
        streaming = [e for e in sorted(node.tree.entries) if node.state(e) is State.STREAMING]
        growing = [e for e in streaming if node.has(e, "content") and node.has(e, "sealed")]
        if growing and pick % 3:
            slot = growing[pick % len(growing)]

            def grow(writer: Any) -> None:
                writer.append_text(slot, text)
                writer.append_sealed(slot, text.encode())

            self.write(2, grow)
        elif streaming:
            slot = streaming[pick % len(streaming)]

            def end(writer: Any) -> None:
                if slot in growing:
                    writer.replace_sealed(slot, b"all")
                writer.state(slot, State.DONE)
                writer.usage(slot, Usage(sampled=1))
                writer.proof(slot, SALT, PROOF)

            self.write(2, end)
        else:
            self._admit(node)

    def _admit(self, node: Conversation) -> None:
        for entry in node.tree.pending:
            parent = node.tree.up(entry)
            if not node.tree.is_admitted(parent):
                continue

            def admit(writer: Any, entry: str = entry, parent: str = parent) -> None:
                writer.place(entry, Place(parent, 1))
                if node.tree.facts(entry).slot:
                    writer.state(entry, State.STREAMING)
                    writer.open_reply(entry)
                    for slot in node.tree.superseded:
                        writer.state(slot, State.SUPERSEDED)

            self.paths[entry] = node.tree.path(entry)
            self.write(2, admit)
            return

    @rule(data=st.data())
    def deliver(self, data: st.DataObject) -> None:
        """Any update, in any order; perhaps once more later."""
        busy = sorted(link for link, updates in self.links.items() if updates)
        if not busy:
            return
        source, target = data.draw(st.sampled_from(busy))
        updates = self.links[source, target]
        position = data.draw(st.integers(0, len(updates) - 1))
        update = updates[position]
        if data.draw(st.booleans()):
            updates.append(update)
        del updates[position]
        replica = self.replicas[target]
        # As at every replica's door: what builds on something unknown waits for a catch-up.
        if find_gap(read_update(update), clocks(replica.state_vector())) is None:
            replica.apply(update, origin=source)

    @rule(source=WHO, to=WHO)
    def lose(self, source: int, to: int) -> None:
        if source != to:
            self.links[source, to].clear()

    @rule(source=WHO, to=WHO)
    def catch_up(self, source: int, to: int) -> None:
        missing = self.replicas[source].diff(self.replicas[to].state_vector())
        self.replicas[to].apply(missing)

    @invariant()
    def what_the_node_admitted_never_moves(self) -> None:
        tree = self.replicas[2].tree
        assert {entry: tree.path(entry) for entry in self.paths} == self.paths

    def teardown(self) -> None:
        for _ in range(2):
            for source, target in self.links:
                self.catch_up(source, target)
        first, *others = self.replicas
        for other in (*others, Conversation(99, update=first.diff())):
            assert clocks(other.state_vector()) == clocks(first.state_vector())
            assert contents(other) == contents(first)
        assert {entry: first.tree.path(entry) for entry in self.paths} == self.paths


Mesh.TestCase.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
TestMesh = Mesh.TestCase


def test_a_replica_that_nobody_holds_is_gone_with_its_document() -> None:
    """A relay replaces replicas for as long as it runs."""
    gc.collect()
    before = sum(issubclass(type(one), Doc) for one in gc.get_objects())
    replica = Conversation(1)
    with replica.writing() as writer:
        writer.set_meta("title", "gone soon")
    assert replica.meta.title == "gone soon"
    heard: list[object] = [replica]  # a reader that holds what it reads
    replica.subscribe(heard.append)
    del replica, writer, heard
    gc.collect()
    assert sum(issubclass(type(one), Doc) for one in gc.get_objects()) <= before
