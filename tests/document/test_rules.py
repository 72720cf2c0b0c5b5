"""Who may write what: a table of accepted and refused writes for each rule; honest authors."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from pycrdt import Array, Doc, Map, Text, XmlFragment, merge_updates

from crdt_llm.document import rules
from crdt_llm.document.conversation import ROOTS, Conversation
from crdt_llm.document.rules import CLOCK_LEAD_MAX, Author, check, is_growth
from crdt_llm.document.schema import (
    ROOT,
    TEXT_BYTES_MAX,
    TITLE_CHARACTERS_MAX,
    Birth,
    Born,
    Grant,
    Place,
    Proof,
    Role,
    State,
    Usage,
    conversation_id,
    entry_id,
)
from crdt_llm.errors import Gap, Refused, TooLarge

if TYPE_CHECKING:
    from collections.abc import Callable

    from crdt_llm.document.conversation import Change, Writer

    Write = Callable[["Raw"], object]

OLGA, WILL, RITA, STAN = Author("olga"), Author("will"), Author("rita"), Author("stan")
NODE = Author("node", node=True)
CAPPED_WILL, CAPPED_OLGA = Author("will", cap=Grant.READER), Author("olga", cap=Grant.READER)
WRITING_OLGA = Author("olga", cap=Grant.WRITER)
HOLDER = Author("node", node=True, epoch=1)
BIRTH = Birth("olga", b"n" * 16)
CONVERSATION = conversation_id(BIRTH)
PROOF = Proof(content=b"c" * 32, tokens=None, calls=None, digest=b"d" * 32, signature=b"s" * 64)
REPLY_PROOF = Proof(b"c" * 32, b"t" * 32, b"l" * 32, b"d" * 32, b"s" * 64)
SALT = b"-" * 16
LEASE = {"node": b"k" * 32, "signature": b"s" * 64}

# The conversation that the table writes into: two answered turns, the second still streaming, and
# behind it a question with its request, both pending; a pending question that was withdrawn.
USER, REPLY, USER_2, OPEN, ASK, SLOT, GONE, NEW, NEW_2, ABSENT = (
    entry_id(number, b"\xab" * 10) for number in range(1, 11)
)


def admit(conversation: Conversation, entry: str, parent: str, *, until: State | None) -> None:
    with conversation.writing() as writer:
        writer.place(entry, Place(parent, 1))
        if until is None:
            writer.proof(entry, SALT, PROOF)
        else:
            writer.state(entry, State.STREAMING)
            writer.open_reply(entry)
            writer.append_text(entry, "Hi é")
            writer.append_sealed(entry, b"1")
    if until is not None and until is not State.STREAMING:
        with conversation.writing() as writer:
            writer.state(entry, until)
            writer.replace_sealed(entry, b"all")
            writer.usage(entry, Usage(prompt=3, prefilled=3, sampled=2, finish="stop"))
            writer.proof(entry, SALT, REPLY_PROOF)


def a_conversation() -> bytes:
    conversation = Conversation(1, seal_client_id=2)
    with conversation.writing() as writer:
        writer.give_birth(BIRTH, 1)
        writer.grant("will", Grant.WRITER)
        writer.grant("rita", Grant.READER)
        writer.add_lease(1, LEASE["node"], LEASE["signature"])
        writer.add(USER, Born(Role.USER, "will", "phone", 1, 1), "hello")
        writer.add(REPLY, Born(Role.ASSISTANT, "will", "phone", 1, 2, after=USER))
    admit(conversation, USER, "", until=None)
    admit(conversation, REPLY, USER, until=State.DONE)
    with conversation.writing() as writer:
        writer.add(USER_2, Born(Role.USER, "olga", "laptop", 1, 3, after=REPLY), "go on")
        writer.add(OPEN, Born(Role.ASSISTANT, "olga", "laptop", 1, 4, after=USER_2))
    admit(conversation, USER_2, REPLY, until=None)
    admit(conversation, OPEN, USER_2, until=State.STREAMING)
    with conversation.writing() as writer:
        writer.add(ASK, Born(Role.USER, "will", "phone", 1, 5, after=OPEN), "and then?")
        writer.add(SLOT, Born(Role.ASSISTANT, "will", "phone", 1, 6, after=ASK))
        writer.add(GONE, Born(Role.USER, "will", "phone", 1, 7, after=SLOT), "a secret")
    with conversation.writing() as writer:
        writer.set(GONE, "redacted", {"by": "will", "at": 2})
    return conversation.diff()


STATE = a_conversation()


NOTHING = b"\x00\x00"


class Raw:
    """A document that can be written in any way, as a stranger's program could."""

    def __init__(self, state: bytes, client_id: int = 77) -> None:
        self.doc: Doc[Any] = Doc(client_id=client_id)
        self.meta, self.access, self.leases, self.entries = (
            self.doc.get(root, type=Map) for root in ROOTS
        )
        self.doc.apply_update(state)

    def __getitem__(self, entry: str) -> Any:
        return self.entries[entry]

    def update(self, write: Write) -> bytes:
        written: list[bytes] = []
        subscription = self.doc.observe(lambda event: written.append(bytes(event.update)))
        with self.doc.transaction():
            write(self)
        self.doc.unobserve(subscription)
        return written[0] if written else NOTHING


def put(shared: Any, **values: Any) -> Any:
    for key, value in values.items():
        shared[key] = value
    return shared


def drop(shared: Any, *keys: str) -> Any:
    for key in keys:
        del shared[key]
    return shared


def born(
    author: str | None = "will", role: str = "user", clock: Any = 8, **more: Any
) -> dict[str, Any]:
    """A well-formed ``born``; an argument ``None`` leaves its key out."""
    plain = {"role": role, "author": author, "device": "d", "at": 1, "clock": clock}
    plain |= {"mode": "continue", "after": ASK} | more
    return {key: value for key, value in plain.items() if value is not None}


def add(raw: Raw, entry: str = NEW, *, said: Any = "text", **fields: Any) -> Raw:
    """A new entry; a user's by will unless the arguments say otherwise."""
    fields.setdefault("born", born())
    raw.entries[entry] = Map(fields if said is None else {**fields, "content": said})
    return raw


def slot(raw: Raw, entry: str = NEW, **more: Any) -> Raw:
    add(raw, entry, said=None, born=born(role="assistant", **more))
    return raw


def redact(raw: Raw, entry: str, by: str, *deleted: str) -> Raw:
    raw[entry]["redacted"] = {"by": by, "at": 3}
    drop(raw[entry], *deleted)
    return raw


def finish(raw: Raw, entry: str = OPEN, state: str = "done") -> Raw:
    put(raw[entry], state=state, usage={"prompt": 1}, salt=SALT, proof=REPLY_PROOF.plain())
    return raw


def grow(raw: Raw, said: str, at: int | None = None, entry: str = OPEN) -> Raw:
    text = raw[entry]["content"]
    text.insert(len(text) if at is None else at, said)
    return raw


def drop_all(array: Any) -> Any:
    return drop_at(array, 0, len(array))


def drop_at(sequence: Any, start: int, stop: int) -> Any:
    del sequence[start:stop]
    return sequence


def prove(raw: Raw, entry: str, parent: str, **proof: Any) -> Raw:
    place = {"parent": parent, "epoch": 1}
    put(raw[entry], place=place, salt=SALT, proof=PROOF.plain() | proof)
    return raw


def forked(raw: Raw, entry: str = NEW) -> Raw:
    """The node's own entry, so that the table may place it beside the streaming reply."""
    add(raw, entry, born=born("node", mode="fork", after=REPLY))
    return raw


def start(raw: Raw, entry: str = NEW, parent: str = USER) -> Raw:
    slot(raw, entry, author="node", mode="fork", after=USER)
    put(raw[entry], place={"parent": parent, "epoch": 1}, state="streaming")
    return raw


def meta(key: str, value: Any) -> Write:
    return lambda raw: put(raw.meta, **{key: value})


def sets(entry: str, key: str, value: Any) -> Write:
    return lambda raw: put(raw[entry], **{key: value})


def adds(**more: Any) -> Write:
    return lambda raw: add(raw, born=born(**more))


def asks(params: Any) -> Write:
    return lambda raw: slot(raw, params=params)


def ends(state: str) -> Write:
    return lambda raw: finish(raw, state=state)


@dataclass(frozen=True)
class Case:
    """One write: ``code`` is what it is refused with, ``gap``, or ``None`` where it is accepted."""

    name: str  # begins with the rule
    author: Author
    write: Write
    code: str | None = None
    state: bytes = STATE
    epoch: int | None = None  # the conversation's, where leases are kept

    def __str__(self) -> str:
        return self.name


def unborn(*, schema: Any = 1, birth: Any = BIRTH.plain(), **more: Any) -> Write:  # noqa: B008 - plain data, never changed
    given = {"schema": schema, "birth": birth, **more}
    return lambda raw: put(raw.meta, **{k: v for k, v in given.items() if v is not None})


BARE = merge_updates(STATE, Raw(STATE).update(lambda raw: drop(raw[GONE], "content")))
OWNED = merge_updates(STATE, Raw(STATE).update(lambda raw: put(raw.access, olga="owner")))
OTHERS = {"owner": "olga", "nonce": b"m" * 16}

WELL_BORN: list[dict[str, Any]] = [
    {},
    {"role": "system", "covers": [USER, REPLY]},
    {"role": "tool", "call": "call_1"},
    {"mode": "fork", "after": ""},
    {"after": None},
    {"at": 1.0, "clock": 8.0},
]

WELL_ASKED: list[dict[str, Any]] = [
    {},
    {"max_tokens": 5, "temperature": 0.7, "top_p": 1.0, "top_k": 0, "seed": 2**53 - 1},
    {"temperature": 0, "stop": ["\n"], "ignore_eos": True, "extend": True},
    {"stop": [], "ignore_eos": False, "extend": False},
]

ILL_BORN: list[dict[str, Any]] = [
    {"role": "poet"},
    {"role": None},
    {"role": "tool"},
    {"role": "tool", "call": ""},
    {"role": "tool", "call": "c" * 201},
    {"call": "call_1"},
    {"params": {}},
    {"clock": 0},
    {"clock": 1.5},
    {"clock": True},
    {"clock": 2**53},
    {"clock": "8"},
    {"at": -1},
    {"at": None},
    {"device": None},
    {"device": "d" * 201},
    {"mode": None},
    {"mode": "branch"},
    {"after": 7},
    {"after": "main"},
    {"after": ASK.lower()},
    {"covers": [USER]},
    {"covers": "all"},
    {"covers": [USER, "all"]},
    {"covers": {USER: 1, REPLY: 1}},
    {"colour": "red"},
]

ILL_ASKED: list[Any] = [
    [],
    {"max_tokens": 0},
    {"max_tokens": True},
    {"max_tokens": 1.5},
    {"temperature": -0.1},
    {"temperature": float("nan")},
    {"temperature": "hot"},
    {"top_p": 1.1},
    {"top_k": -1},
    {"seed": 2**53},
    {"stop": "\n"},
    {"stop": [""]},
    {"stop": ""},
    {"extend": 0},
    {"stop": ["x"] * 17},
    {"stop": ["x" * 201]},
    {"ignore_eos": 1},
    {"extend": "yes"},
    {"colour": "red"},
]

CASES = [
    # Rule C1, C2, birth
    Case("C1 its owner gives birth", OLGA, unborn(title="new"), state=NOTHING),
    Case("C1 nobody else does", WILL, unborn(), "birth", NOTHING),
    Case("C1 not even the node", NODE, unborn(), "birth", NOTHING),
    Case("C1 nothing comes before", OLGA, unborn(birth=None, title="x"), "gap", NOTHING),
    Case("C1 nor does birth without a schema", OLGA, unborn(schema=None), "gap", NOTHING),
    Case("C1 another schema", OLGA, unborn(schema=2), "birth", NOTHING),
    Case("C1 a schema that is true", OLGA, unborn(schema=True), "birth", NOTHING),
    Case("C1 another id's birth", OLGA, unborn(birth=OTHERS), "birth", NOTHING),
    Case("C1 a short nonce", OLGA, unborn(birth={"owner": "olga", "nonce": b""}), "birth", NOTHING),
    Case("C1 a birth with more", OLGA, unborn(birth=BIRTH.plain() | {"x": 1}), "birth", NOTHING),
    Case("C1 a shared birth", OLGA, unborn(birth=Map(BIRTH.plain())), "schema", NOTHING),
    Case("C1 not by a writer's token", WRITING_OLGA, unborn(), "birth", NOTHING),
    Case("C2 repeated by a writer", WILL, unborn()),
    Case("C2 repeated as JavaScript does", WILL, unborn(schema=1.0)),
    Case("C2 another schema", OLGA, unborn(schema=2), "birth"),
    Case("C2 another birth", OLGA, unborn(birth=OTHERS), "birth"),
    Case("C2 birth deleted", OLGA, lambda r: drop(r.meta, "birth"), "birth"),
    Case("C2 schema deleted", OLGA, lambda r: drop(r.meta, "schema"), "birth"),
    # Rule C3, who writes at all
    Case("C3 a writer writes", WILL, add),
    Case("C3 the node writes under its own name", NODE, lambda r: add(r, born=born("node"))),
    Case("C3 a reader does not", RITA, lambda r: add(r, born=born("rita")), "forbidden"),
    Case("C3 a stranger does not", STAN, lambda r: add(r, born=born("stan")), "forbidden"),
    Case("C3 a reader does not stop", RITA, lambda r: put(r[OPEN], stop="rita"), "forbidden"),
    Case(
        "C3 not what nobody sees either",
        RITA,
        lambda r: r.doc.get("elsewhere", type=Map).update({"x": 1}),
        "forbidden",
    ),
    Case(
        "C3 a right given to oneself comes too late",
        STAN,
        lambda r: put(r.access, stan="owner"),
        "forbidden",
    ),
    Case("C3 nor raised by a reader", RITA, lambda r: put(r.access, rita="writer"), "forbidden"),
    Case(
        "C3 nor anything beside its leaving",
        RITA,
        lambda r: (drop(r.access, "rita"), put(r[OPEN], stop="rita")),
        "forbidden",
    ),
    Case("C3 a token that allows it all", Author("will", cap=Grant.OWNER), add),
    Case("C3 a reader's token of a writer", CAPPED_WILL, add, "forbidden"),
    Case(
        "C3 a reader's token of the owner",
        CAPPED_OLGA,
        lambda r: put(r.meta, title="x"),
        "forbidden",
    ),
    Case("C3 a writer's token of a reader", Author("rita", cap=Grant.WRITER), add, "forbidden"),
    Case("C3 a writer's token of the owner", WRITING_OLGA, lambda r: put(r.meta, title="x")),
    Case(
        "C3 a token of a stranger",
        Author("stan", cap=Grant.OWNER),
        adds(author="stan"),
        "forbidden",
    ),
    # Rule C4, meta
    *(
        Case(f"C4 {key} {value!r:.20}", WILL, meta(key, value))
        for key, value in {
            "title": "t" * TITLE_CHARACTERS_MAX,
            "created_at": 1.0,
            "head": USER,
            "model": "m",
            "policy": {"reply": "auto", "overflow": "drop_oldest"},
        }.items()
    ),
    Case("C4 removed again", WILL, lambda r: (put(r.meta, head=USER), drop(r.meta, "head"))),
    *(
        Case(f"C4 {key} {value!r:.20}", WILL, meta(key, value), code)
        for key, value, code in (
            ("title", "t" * (TITLE_CHARACTERS_MAX + 1), "meta"),
            ("title", None, "meta"),
            ("created_at", -1, "meta"),
            ("created_at", "now", "meta"),
            ("head", "main", "meta"),
            ("model", 7, "meta"),
            ("policy", {"reply": "never"}, "meta"),
            ("policy", {"tone": "kind"}, "meta"),
            ("policy", {"reply": ["ask"]}, "meta"),
            ("policy", "ask", "meta"),
            ("colour", "red", "schema"),
            ("title", Text("t"), "schema"),
            ("policy", Map({"reply": "ask"}), "schema"),
        )
    ),
    Case("C4 not by the node", NODE, lambda r: put(r.meta, title="mine"), "meta"),
    # Rule C5, access
    Case("C5 an owner gives", OLGA, lambda r: put(r.access, stan="reader", will="owner")),
    Case("C5 an owner takes", OLGA, lambda r: drop(r.access, "will")),
    Case("C5 the birth's owner, spelled out", OLGA, lambda r: put(r.access, olga="owner")),
    Case("C5 a writer does not", WILL, lambda r: put(r.access, stan="reader"), "access"),
    Case("C5 nor raise itself", WILL, lambda r: put(r.access, will="owner"), "access"),
    Case("C5 nor does the node", NODE, lambda r: put(r.access, node="writer"), "access"),
    Case("C5 an unknown right", OLGA, lambda r: put(r.access, stan="king"), "access"),
    Case("C5 a right that is no text", OLGA, lambda r: put(r.access, stan=["owner"]), "access"),
    Case("C5 the birth's owner lowered", OLGA, lambda r: put(r.access, olga="reader"), "access"),
    Case("C5 a writer leaves", WILL, lambda r: drop(r.access, "will")),
    Case("C5 a reader leaves", RITA, lambda r: drop(r.access, "rita")),
    Case(
        "C5 with a token of its own",
        Author("rita", cap=Grant.READER),
        lambda r: drop(r.access, "rita"),
    ),
    Case("C5 not with a lesser token", CAPPED_WILL, lambda r: drop(r.access, "will"), "forbidden"),
    Case("C5 nor for others", RITA, lambda r: drop(r.access, "will"), "forbidden"),
    Case("C5 nor a writer for others", WILL, lambda r: drop(r.access, "rita"), "access"),
    Case(
        "C5 what it writes as it leaves is its own",
        WILL,
        lambda r: (drop(r.access, "will"), add(r)),
    ),
    Case(
        "C5 the birth's owner does not leave",
        OLGA,
        lambda r: drop(r.access, "olga"),
        "access",
        OWNED,
    ),
    Case(
        "C5 nor by a writer's token", WRITING_OLGA, lambda r: put(r.access, stan="reader"), "access"
    ),
    Case("C5 a name too long", OLGA, lambda r: put(r.access, **{"x" * 201: "reader"}), "access"),
    Case("C5 no name", OLGA, lambda r: put(r.access, **{"": "reader"}), "schema"),
    Case("C5 a shared right", OLGA, lambda r: put(r.access, stan=Text("reader")), "schema"),
    # Rule C6, leases
    Case("C6 the node records one", NODE, lambda r: put(r.leases, **{"2": LEASE})),
    Case("C6 a writer does not", WILL, lambda r: put(r.leases, **{"2": LEASE}), "leases"),
    Case("C6 nor an owner", OLGA, lambda r: put(r.leases, **{"2": LEASE}), "leases"),
    Case("C6 twice", NODE, lambda r: put(r.leases, **{"1": LEASE}), "leases"),
    Case("C6 deleted", NODE, lambda r: drop(r.leases, "1"), "leases"),
    Case(
        "C6 an epoch with a zero before", NODE, lambda r: put(r.leases, **{"02": LEASE}), "leases"
    ),
    Case("C6 an epoch out of reach", NODE, lambda r: put(r.leases, **{"9" * 16: LEASE}), "leases"),
    Case("C6 a short key", NODE, lambda r: put(r.leases, **{"2": LEASE | {"node": b""}}), "leases"),
    Case(
        "C6 a lease with more", NODE, lambda r: put(r.leases, **{"2": LEASE | {"x": 1}}), "leases"
    ),
    Case("C6 its own", Author("node", node=True, epoch=2), lambda r: put(r.leases, **{"2": LEASE})),
    Case("C6 another's", HOLDER, lambda r: put(r.leases, **{"2": LEASE}), "leases"),
    Case("C6 no map", NODE, lambda r: put(r.leases, **{"2": ["node", "signature"]}), "leases"),
    Case(
        "C6 a short signature",
        NODE,
        lambda r: put(r.leases, **{"2": LEASE | {"signature": b"s"}}),
        "leases",
    ),
    Case("C6 a shared lease", NODE, lambda r: put(r.leases, **{"2": Map(LEASE)}), "schema"),
    # Rule C7, nothing beside the schema
    Case("C7 a field", WILL, lambda r: put(r[ASK], stars=5), "schema"),
    Case("C7 a field in a new entry", WILL, lambda r: add(r, stars=5), "schema"),
    Case("C7 a field by the node", NODE, lambda r: put(r[ASK], stars=5), "schema"),
    Case(
        "C7 an entry that is a text", WILL, lambda r: put(r.entries, **{NEW: Text("x")}), "schema"
    ),
    Case("C7 an entry that is plain", WILL, lambda r: put(r.entries, **{NEW: born()}), "schema"),
    Case("C7 XML", NODE, lambda r: put(r[OPEN], calls=XmlFragment([])), "schema"),
    Case("C7 a shared place", NODE, lambda r: add(r, born=born("node"), place=Map({})), "schema"),
    Case("C7 a shared stop", WILL, lambda r: put(r[OPEN], stop=Text("will")), "schema"),
    Case("C7 what the schema has", WILL, lambda r: put(r[OPEN], stop="will")),
    # Rule E1, a true author
    Case("E1 under one's own name", OLGA, lambda r: add(r, born=born("olga"))),
    Case("E1 under another's", WILL, lambda r: add(r, born=born("olga")), "forged-author"),
    Case("E1 by an owner even", OLGA, lambda r: add(r, born=born("will")), "forged-author"),
    Case("E1 by the node even", NODE, lambda r: add(r, born=born("will")), "forged-author"),
    Case("E1 under none", WILL, lambda r: add(r, born=born(author=None)), "forged-author"),
    # Rule E2, a well-formed birth of an entry
    *(Case(f"E2 {more}", WILL, adds(**more)) for more in WELL_BORN),
    *(Case(f"E2 params {params}", WILL, asks(params)) for params in WELL_ASKED),
    *(Case(f"E2 {more} refused", WILL, adds(**more), "born") for more in ILL_BORN),
    *(Case(f"E2 params {params} refused", WILL, asks(params), "born") for params in ILL_ASKED),
    Case("E2 an id in small letters", WILL, lambda r: add(r, NEW.lower()), "born"),
    Case("E2 an id beyond its 128 bits", WILL, lambda r: add(r, "8" + NEW[1:]), "born"),
    Case("E2 an empty id", WILL, lambda r: add(r, ""), "born"),
    Case("E2 no born", WILL, lambda r: put(r.entries, **{NEW: Map({"content": "x"})}), "born"),
    Case("E2 a shared born", WILL, lambda r: add(r, born=Map(born())), "schema"),
    Case("E2 a born that is a list", WILL, lambda r: add(r, born=["user"]), "born"),
    # Rule E3, clocks and what came before
    Case(
        "E3 after one of the same update",
        WILL,
        lambda r: (add(r), slot(r, NEW_2, after=NEW, clock=9)),
    ),
    Case(
        "E3 far above its after, near the others",
        WILL,
        lambda r: add(r, born=born(after=USER, clock=7 + CLOCK_LEAD_MAX)),
    ),
    Case(
        "E3 a chain of leads",
        WILL,
        lambda r: (add(r, born=born(clock=1007)), slot(r, NEW_2, after=NEW, clock=2007)),
    ),
    Case(
        "E3 a lead beyond all", WILL, lambda r: add(r, born=born(clock=8 + CLOCK_LEAD_MAX)), "clock"
    ),
    Case("E3 a clock at its after's", WILL, lambda r: add(r, born=born(clock=5)), "clock"),
    Case("E3 a clock below its after's", WILL, lambda r: add(r, born=born(clock=1)), "clock"),
    Case("E3 after itself", WILL, lambda r: add(r, born=born(after=NEW)), "clock"),
    Case("E3 after one that is not here", WILL, lambda r: add(r, born=born(after=ABSENT)), "gap"),
    # Rule E4, content
    Case("E4 a text at its limit", WILL, lambda r: add(r, said="é" * (TEXT_BYTES_MAX // 2))),
    Case("E4 an empty text", WILL, lambda r: add(r, said="")),
    Case("E4 a slot has none", WILL, slot),
    Case(
        "E4 written and withdrawn at once",
        WILL,
        lambda r: add(r, said=None, redacted={"by": "will", "at": 2}),
    ),
    Case(
        "E4 a text beyond its limit",
        WILL,
        lambda r: add(r, said="é" * (TEXT_BYTES_MAX // 2) + "x"),
        "too-large",
    ),
    Case("E4 no text", WILL, lambda r: add(r, said=None), "content"),
    Case("E4 a text that is a number", WILL, lambda r: add(r, said=5), "content"),
    Case("E4 a text that grows", WILL, lambda r: add(r, said=Text("x")), "content"),
    Case(
        "E4 a slot with words",
        WILL,
        lambda r: add(r, born=born(role="assistant"), said=Text("I")),
        "node-field",
    ),
    Case(
        "E4 a slot with plain words",
        WILL,
        lambda r: add(r, born=born(role="assistant"), said="I"),
        "content",
    ),
    # Rule E5, once
    Case("E5 born again", WILL, lambda r: put(r[ASK], born=born(after=OPEN, clock=5)), "frozen"),
    Case("E5 an entry replaced", WILL, lambda r: add(r, ASK), "frozen"),
    Case("E5 a text replaced", WILL, lambda r: put(r[ASK], content="better"), "frozen"),
    Case(
        "E5 a text given back",
        WILL,
        lambda r: (redact(r, ASK, "will", "content"), put(r[ASK], content="x")),
        "frozen",
    ),
    Case(
        "E5 placed again", NODE, lambda r: put(r[USER], place={"parent": "", "epoch": 1}), "frozen"
    ),
    Case("E5 proved again", NODE, lambda r: put(r[USER], proof=PROOF.plain()), "frozen"),
    Case("E5 a text given back later", WILL, sets(GONE, "content", "x"), "frozen", BARE),
    Case("E5 salted again", NODE, lambda r: put(r[USER], salt=SALT), "frozen"),
    Case("E5 counted again", NODE, lambda r: put(r[REPLY], usage={}), "frozen"),
    Case("E5 a reply opened again", NODE, lambda r: put(r[OPEN], content=Text("Hi")), "frozen"),
    Case("E5 sealed anew", NODE, lambda r: put(r[OPEN], sealed=Array([])), "frozen"),
    Case("E5 stopped again", OLGA, lambda r: put(r[REPLY], stop="olga")),
    # Rule E6, E8, redaction
    Case("E6 with a redaction", WILL, lambda r: redact(r, USER, "will", "content", "salt")),
    Case("E6 after one", WILL, lambda r: drop(r[GONE], "content")),
    Case("E6 after one, by an owner", OLGA, lambda r: drop(r[GONE], "content")),
    Case(
        "E6 a reply and its ids",
        WILL,
        lambda r: redact(r, REPLY, "will", "content", "salt", "sealed"),
    ),
    Case("E6 a reply that streams", OLGA, lambda r: redact(r, OPEN, "olga", "content", "sealed")),
    Case("E6 without one", WILL, lambda r: drop(r[ASK], "content"), "frozen"),
    Case(
        "E6 more than a redaction withdraws",
        WILL,
        lambda r: redact(r, USER, "will", "proof"),
        "frozen",
    ),
    Case("E6 the redaction itself", WILL, lambda r: drop(r[GONE], "redacted"), "frozen"),
    Case("E6 an entry", OLGA, lambda r: drop(r.entries, ASK), "frozen"),
    Case("E6 a place, by the node", NODE, lambda r: drop(r[USER], "place"), "frozen"),
    Case("E6 what met a redaction, by the node", NODE, lambda r: drop(r[GONE], "content")),
    Case("E6 content, by the node", NODE, lambda r: drop(r[ASK], "content"), "frozen"),
    Case("E8 its author withdraws", WILL, lambda r: redact(r, ASK, "will")),
    Case("E8 an owner withdraws", OLGA, lambda r: redact(r, ASK, "olga")),
    Case("E8 again", OLGA, lambda r: redact(r, GONE, "olga")),
    Case("E8 another writer", WILL, lambda r: redact(r, USER_2, "will"), "redacted"),
    Case("E8 the node", NODE, lambda r: redact(r, ASK, "node"), "redacted"),
    Case(
        "E8 the node, and all of it", NODE, lambda r: redact(r, ASK, "node", "content"), "redacted"
    ),
    Case("E8 in another's name", WILL, lambda r: redact(r, ASK, "olga"), "redacted"),
    Case("E8 at no time", WILL, lambda r: put(r[ASK], redacted={"by": "will"}), "redacted"),
    Case(
        "E8 with a reason",
        WILL,
        lambda r: put(r[ASK], redacted={"by": "will", "at": 1, "why": "x"}),
        "redacted",
    ),
    Case("E8 at a wrong time", WILL, sets(ASK, "redacted", {"by": "will", "at": "x"}), "redacted"),
    Case("E8 a mere word", WILL, lambda r: put(r[ASK], redacted=True), "redacted"),
    # Rule E7, stop
    Case("E7 a running reply", WILL, lambda r: put(r[OPEN], stop="will")),
    Case("E7 a request", OLGA, lambda r: put(r[SLOT], stop="olga")),
    Case("E7 with the request", WILL, lambda r: (slot(r), put(r[NEW], stop="will"))),
    Case("E7 after the end", WILL, lambda r: put(r[REPLY], stop="will")),
    Case("E7 in another's name", WILL, lambda r: put(r[OPEN], stop="olga"), "stop"),
    Case("E7 with no name", WILL, lambda r: put(r[OPEN], stop=None), "stop"),
    Case("E7 what is no slot", WILL, lambda r: put(r[ASK], stop="will"), "schema"),
    # Rule N0, the lease
    Case("N0 the lease's holder", HOLDER, lambda r: grow(r, "!"), epoch=1),
    Case("N0 where no leases are kept", NODE, lambda r: grow(r, "!")),
    Case("N0 an earlier holder", HOLDER, lambda r: grow(r, "!"), "stale-epoch", epoch=2),
    Case("N0 a holder to come", HOLDER, lambda r: grow(r, "!"), "stale-epoch", epoch=0),
    Case("N0 a late proof", HOLDER, finish, "stale-epoch", epoch=2),
    Case("N0 a node without a lease", NODE, lambda r: grow(r, "!"), "stale-epoch", epoch=1),
    Case("N0 nobody else has one", WILL, add, epoch=1),
    # Rule N1, the node's fields
    *(
        Case(f"N1 {key}", OLGA, sets(SLOT, key, value), "node-field")
        for key, value in {
            "place": {"parent": "", "epoch": 1},
            "state": "stopped",
            "calls": [],
            "reads": [],
            "sealed": Array([]),
            "usage": {},
            "salt": SALT,
            "proof": PROOF.plain(),
            "content": Text("I say"),
        }.items()
    ),
    Case("N1 a reply's text", WILL, lambda r: grow(r, "!"), "node-field"),
    Case("N1 a reply's chunks", WILL, lambda r: r[OPEN]["sealed"].append(b"2"), "node-field"),
    Case("N1 born placed", WILL, lambda r: add(r, place={"parent": "", "epoch": 1}), "node-field"),
    Case("N1 the node's own", NODE, lambda r: put(r[SLOT], state="stopped")),
    # Rule N2, states
    *(
        Case(f"N2 a request is {state}", NODE, sets(SLOT, "state", state))
        for state in ("stopped", "failed", "superseded")
    ),
    *(Case(f"N2 a reply is {state}", NODE, ends(state)) for state in ("done", "stopped", "failed")),
    Case("N2 several steps in one", NODE, lambda r: (start(r), finish(r, NEW))),
    Case("N2 streaming without a place", NODE, lambda r: put(r[SLOT], state="streaming"), "state"),
    Case("N2 done without a place", NODE, lambda r: put(r[SLOT], state="done"), "state"),
    Case("N2 superseded in its stream", NODE, lambda r: finish(r, state="superseded"), "state"),
    Case("N2 backwards", NODE, lambda r: put(r[REPLY], state="streaming"), "state"),
    Case("N2 another end", NODE, lambda r: put(r[REPLY], state="failed"), "state"),
    Case("N2 streaming again", NODE, lambda r: put(r[OPEN], state="streaming"), "state"),
    Case("N2 an unknown state", NODE, lambda r: put(r[SLOT], state="tired"), "state"),
    Case("N2 what is no slot", NODE, lambda r: put(r[ASK], state="done"), "schema"),
    Case(
        "N2 placed and superseded",
        NODE,
        lambda r: (start(r), put(r[NEW], state="superseded")),
        "state",
    ),
    # Rule N3, places
    Case("N3 behind an ended reply", NODE, lambda r: (forked(r), prove(r, NEW, REPLY))),
    Case("N3 a slot behind its question", NODE, start),
    Case("N3 under its own lease", HOLDER, start),
    Case("N3 under another's lease", Author("node", node=True, epoch=2), start, "place"),
    Case(
        "N3 both at once",
        NODE,
        lambda r: (
            forked(r),
            prove(r, NEW, ""),
            slot(r, NEW_2, author="node", after=NEW, clock=9),
            put(r[NEW_2], place={"parent": NEW, "epoch": 1}, state="streaming"),
        ),
    ),
    Case("N3 behind a reply that ends just now", NODE, lambda r: (finish(r), prove(r, ASK, OPEN))),
    Case("N3 behind a reply that streams", NODE, lambda r: prove(r, ASK, OPEN), "place"),
    Case("N3 behind what is pending", NODE, lambda r: (forked(r), prove(r, NEW, ASK)), "place"),
    Case(
        "N3 behind what is not there", NODE, lambda r: (forked(r), prove(r, NEW, ABSENT)), "place"
    ),
    Case("N3 behind itself", NODE, lambda r: (forked(r), prove(r, NEW, NEW)), "place"),
    Case(
        "N3 in a circle",
        NODE,
        lambda r: (forked(r), forked(r, NEW_2), prove(r, NEW, NEW_2), prove(r, NEW_2, NEW)),
        "place",
    ),
    Case(
        "N3 an epoch without a lease",
        NODE,
        lambda r: (start(r), put(r[NEW], place={"parent": USER, "epoch": 2})),
        "place",
    ),
    Case(
        "N3 an epoch whose lease comes along",
        NODE,
        lambda r: (
            put(r.leases, **{"2": LEASE}),
            start(r),
            put(r[NEW], place={"parent": USER, "epoch": 2}),
        ),
    ),
    Case(
        "N3 a place with more",
        NODE,
        lambda r: (start(r), put(r[NEW], place={"parent": USER, "epoch": 1, "x": 1})),
        "place",
    ),
    Case("N3 no place at all", NODE, lambda r: (start(r), put(r[NEW], place="here")), "state"),
    Case(
        "N3 a question without proof",
        NODE,
        lambda r: (forked(r), put(r[NEW], place={"parent": REPLY, "epoch": 1})),
        "place",
    ),
    Case(
        "N3 a slot that does not start",
        NODE,
        lambda r: (finish(r), prove(r, ASK, OPEN), put(r[SLOT], place={"parent": ASK, "epoch": 1})),
        "place",
    ),
    # Rule N4, proofs
    Case("N4 a reply at its end", NODE, finish),
    Case(
        "N4 a withdrawn entry, without salt",
        NODE,
        lambda r: put(r[GONE], place={"parent": "", "epoch": 1}, proof=PROOF.plain()),
    ),
    Case("N4 a withdrawn entry, salted", NODE, lambda r: prove(r, GONE, ""), "proof"),
    Case("N4 a salt alone", NODE, lambda r: put(r[OPEN], salt=SALT), "proof"),
    Case("N4 a proof without salt", NODE, lambda r: (finish(r), drop(r[OPEN], "salt")), "proof"),
    Case("N4 a short salt", NODE, lambda r: (finish(r), put(r[OPEN], salt=b"")), "proof"),
    Case(
        "N4 before the end",
        NODE,
        lambda r: put(r[OPEN], salt=SALT, proof=REPLY_PROOF.plain()),
        "proof",
    ),
    Case("N4 an end without", NODE, lambda r: put(r[OPEN], state="done", usage={}), "proof"),
    Case(
        "N4 without a place", NODE, lambda r: put(r[ASK], salt=SALT, proof=PROOF.plain()), "proof"
    ),
    Case(
        "N4 a question's tokens",
        NODE,
        lambda r: (forked(r), prove(r, NEW, REPLY, tokens=b"t" * 32)),
        "proof",
    ),
    Case(
        "N4 a short digest", NODE, lambda r: (forked(r), prove(r, NEW, REPLY, digest=b"d")), "proof"
    ),
    Case(
        "N4 a short signature",
        NODE,
        lambda r: (forked(r), prove(r, NEW, REPLY, signature=b"s")),
        "proof",
    ),
    Case("N4 with more", NODE, lambda r: (forked(r), prove(r, NEW, REPLY, x=1)), "proof"),
    Case("N4 no map", NODE, lambda r: (finish(r), put(r[OPEN], proof=b"p")), "proof"),
    # Rule N5, growth
    Case("N5 at the end", NODE, lambda r: grow(r, "é!")),
    Case("N5 with the end", NODE, lambda r: (grow(r, "!"), finish(r))),
    Case("N5 a chunk", NODE, lambda r: r[OPEN]["sealed"].append(b"2")),
    Case(
        "N5 one blob with the end",
        NODE,
        lambda r: (drop_all(r[OPEN]["sealed"]), r[OPEN]["sealed"].append(b"2"), finish(r)),
    ),
    Case(
        "N5 opened and grown",
        NODE,
        lambda r: (
            start(r),
            put(r[NEW], content=Text("I"), sealed=Array([b"1"])),
            grow(r, "!", entry=NEW),
        ),
    ),
    Case("N5 in the middle", NODE, lambda r: grow(r, "!", 2), "growth"),
    Case("N5 at the start", NODE, lambda r: grow(r, "!", 0), "growth"),
    Case("N5 by a cut", NODE, lambda r: drop_at(r[OPEN]["content"], 0, 2), "growth"),
    Case("N5 in bold", NODE, lambda r: r[OPEN]["content"].insert(5, "!", {"bold": True}), "growth"),
    Case("N5 made bold", NODE, lambda r: r[OPEN]["content"].format(0, 2, {"bold": True}), "growth"),
    Case(
        "N5 a picture", NODE, lambda r: r[OPEN]["content"].insert_embed(5, {"image": "x"}), "growth"
    ),
    Case("N5 after the end", NODE, lambda r: grow(r, "!", entry=REPLY), "growth"),
    Case("N5 a chunk after the end", NODE, lambda r: r[REPLY]["sealed"].append(b"2"), "growth"),
    Case("N5 a chunk that is text", NODE, lambda r: r[OPEN]["sealed"].append("2"), "growth"),
    Case("N5 a chunk that is shared", NODE, lambda r: r[OPEN]["sealed"].append(Map({})), "growth"),
    Case(
        "N5 a first chunk that is text",
        NODE,
        lambda r: (start(r), put(r[NEW], sealed=Array(["1"]))),
        "growth",
    ),
    Case("N5 no chunks in mid-stream", NODE, lambda r: drop_all(r[OPEN]["sealed"]), "growth"),
    Case(
        "N5 one blob in mid-stream",
        NODE,
        lambda r: (drop_all(r[OPEN]["sealed"]), r[OPEN]["sealed"].append(b"2")),
        "growth",
    ),
    Case("N5 a request that speaks", NODE, lambda r: put(r[SLOT], content=Text("I")), "growth"),
    Case("N5 too long", NODE, lambda r: grow(r, "x" * TEXT_BYTES_MAX), "too-large"),
    Case(
        "N5 a withdrawn reply",
        NODE,
        lambda r: (start(r), put(r[NEW], content=Text("I"), redacted={"by": "node", "at": 1})),
        "growth",
    ),
    # Rule N6, calls, reads, usage
    Case("N6 until the end", NODE, lambda r: put(r[OPEN], calls=[{"id": "1"}], reads=[USER_2])),
    Case("N6 with the end", NODE, lambda r: (put(r[OPEN], calls=[]), finish(r))),
    Case(
        "N6 usage of a request that failed",
        NODE,
        lambda r: put(r[SLOT], state="failed", usage={"error": {"code": "x", "message": "y"}}),
    ),
    Case("N6 calls after the end", NODE, lambda r: put(r[REPLY], calls=[]), "node-field"),
    Case("N6 calls that are no list", NODE, lambda r: put(r[OPEN], calls={}), "node-field"),
    Case("N6 reads of no entries", NODE, lambda r: put(r[OPEN], reads=["all"]), "node-field"),
    Case("N6 usage before the end", NODE, lambda r: put(r[OPEN], usage={}), "node-field"),
    Case(
        "N6 usage that is no map", NODE, lambda r: (finish(r), put(r[OPEN], usage=5)), "node-field"
    ),
]


def judge(state: bytes, update: bytes, author: Author, epoch: int | None = None) -> None:
    conversation = Conversation(99, update=state)
    change = conversation.apply(update)
    check(change, conversation, conversation_id=CONVERSATION, author=author, epoch=epoch)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rule(case: Case) -> None:
    update = Raw(case.state).update(case.write)
    if case.code is None:
        judge(case.state, update, case.author, case.epoch)
    elif case.code == "gap":
        with pytest.raises(Gap):
            judge(case.state, update, case.author, case.epoch)
    else:
        with pytest.raises(Refused) as refused:
            judge(case.state, update, case.author, case.epoch)
        assert (refused.value.code, "\n" in refused.value.reason) == (case.code, False)
        assert isinstance(refused.value, TooLarge) == (case.code == "too-large")


def test_a_conversation_is_no_other_one() -> None:
    conversation = Conversation(99, update=STATE)
    change = conversation.apply(Raw(STATE).update(add))
    other = conversation_id(Birth("olga", b"m" * 16))
    with pytest.raises(Refused, match="another conversation"):
        check(change, conversation, conversation_id=other, author=WILL)


def test_a_conversation_has_so_many_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    update = Raw(STATE).update(add)
    monkeypatch.setattr(rules, "ENTRIES_MAX", 8)
    judge(STATE, update, WILL)
    monkeypatch.setattr(rules, "ENTRIES_MAX", 7)
    with pytest.raises(TooLarge):
        judge(STATE, update, WILL)


def test_every_rule_is_accepted_and_refused_by_some_case() -> None:
    stated = set(re.findall(r"^\* ([CEN][0-9])", rules.__doc__ or "", flags=re.MULTILINE))
    assert stated
    assert {case.name[:2] for case in CASES if case.code is None} == stated
    assert {case.name[:2] for case in CASES if case.code is not None} == stated


def test_every_code_is_in_the_rules() -> None:
    stated = set(re.findall(r"``([a-z-]+)`` -|\(``(too-large)``\)", rules.__doc__ or ""))
    assert {case.code for case in CASES} - {None, "gap"} == {"".join(pair) for pair in stated}


@pytest.mark.parametrize("author", [RITA, STAN, WILL], ids=lambda author: author.principal)
def test_what_is_known_already_is_no_offence_of_anybody(author: Author) -> None:
    judge(STATE, STATE, author)


# -- the short cut -----------------------------------------------------------------------------


def all_rules(change: Change, conversation: Conversation, conversation_id: str) -> str | None:
    """How a change of the node's is refused if all of the rules are gone through, if it is."""
    try:
        rules._Check(change, conversation, conversation_id, NODE).run()
    except Refused as refused:
        return refused.code
    except Gap:
        return "gap"
    return None


def takes_short_cut(state: bytes, update: bytes, conversation_id: str = CONVERSATION) -> bool:
    conversation = Conversation(99, update=state)
    change = conversation.apply(update)
    if not is_growth(change, conversation, conversation_id=conversation_id):
        return False
    assert all_rules(change, conversation, conversation_id) is None
    return True


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_short_cut_around_a_rule(case: Case) -> None:
    if takes_short_cut(case.state, Raw(case.state).update(case.write)):
        assert case.code in {None, "stale-epoch", "node-field", "forbidden"}  # as of others


NEXT_WORDS: list[Write] = [
    lambda r: grow(r, "é!"),
    lambda r: r[OPEN]["sealed"].append(b"2"),
    lambda r: (grow(r, "!"), r[OPEN]["sealed"].append(b"2")),
    lambda r: (grow(r, "!"), grow(r, "🦜")),
    lambda r: (r[OPEN]["sealed"].append(b"2"), r[OPEN]["sealed"].append(b"3")),
]


@pytest.mark.parametrize("write", NEXT_WORDS)
def test_the_next_words_take_the_short_cut(write: Write) -> None:
    update = Raw(STATE).update(write)
    assert takes_short_cut(STATE, update)
    assert not takes_short_cut(STATE, update, conversation_id(Birth("olga", b"m" * 16)))


def test_the_first_words_take_it_too() -> None:
    with_two = merge_updates(STATE, Raw(STATE).update(begin_empty))
    first = Raw(with_two).update(lambda r: (grow(r, "I", entry=NEW), grow(r, "!")))
    assert takes_short_cut(with_two, first)


def begin_empty(raw: Raw) -> Raw:
    """A second reply that streams, without a word as yet."""
    start(raw)
    put(raw[NEW], content=Text(), sealed=Array())
    return raw


@st.composite
def touches(draw: st.DrawFn) -> Write:
    """One thing that somebody does to a text or to its chunks."""
    entry = draw(st.sampled_from([OPEN, OPEN, OPEN, REPLY, NEW]))
    at_end = draw(st.integers(0, 7)) > 0
    words = draw(st.sampled_from(["!", "é", "🦜", "x" * 30]))
    item = draw(st.sampled_from([b"2", b""] * 3 + ["2", 2]))
    made = draw(st.sampled_from(["grow"] * 6 + ["chunk"] * 6 + ["bold", "cut", "swap", "embed"]))

    def touch(raw: Raw) -> None:
        content, sealed = raw[entry]["content"], raw[entry]["sealed"]
        end = len(content)
        where = end if at_end else 0
        match made:
            case "grow":
                content.insert(where, words)
            case "chunk":
                sealed.insert(len(sealed) if at_end else 0, item)
            case "bold":
                content.insert(where, words, {"bold": True})
            case "cut":
                drop_at(content, 0, len(str(content)[:1].encode()))
            case "embed":
                content.insert_embed(where, {"image": "x"})
            case "swap" if len(sealed):
                drop_at(sealed, 0, 1)

    return touch


TWO_STREAMS = merge_updates(STATE, Raw(STATE).update(begin_empty))
MEANWHILE: list[Write] = [
    lambda r: put(r[OPEN], redacted={"by": "olga", "at": 1}),
    finish,
    lambda r: put(r[OPEN], stop="olga"),
    lambda r: drop(r[OPEN], "state"),
    lambda r: put(r[OPEN], content=Text("other"), sealed=Array()),
    lambda r: put(r[OPEN], content="other", sealed=[b"1"]),
    lambda r: (grow(r, "🦜"), r[OPEN]["sealed"].append(b"3")),
    lambda r: drop(r.meta, "birth"),
]
BESIDES: list[Write] = [
    lambda r: put(r[OPEN], stop="node"),
    lambda r: put(r[OPEN], state="done"),
    finish,
    lambda r: put(r.meta, head=USER),
    lambda r: put(r[OPEN], content=Text("anew")),
    lambda r: put(r[OPEN], redacted={"by": "node", "at": 1}),
    lambda r: add(r, NEW_2),
]


@pytest.mark.parametrize("write", NEXT_WORDS)
@pytest.mark.parametrize("meanwhile", MEANWHILE)
def test_the_next_words_of_what_is_another_by_now(meanwhile: Write, write: Write) -> None:
    update = Raw(TWO_STREAMS).update(write)
    takes_short_cut(merge_updates(TWO_STREAMS, Raw(TWO_STREAMS, 78).update(meanwhile)), update)


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from([None] * 9 + MEANWHILE),
    st.lists(touches(), min_size=1, max_size=3),
    st.sampled_from([None] * 9 + BESIDES),
    st.sampled_from([TEXT_BYTES_MAX, TEXT_BYTES_MAX, 36, 6]),
)
def test_the_short_cut_leads_where_all_the_rules_lead(
    meanwhile: Write | None, written: list[Write], beside: Write | None, longest: int
) -> None:
    """Whatever is done to a reply, in a document where others did something meanwhile."""
    update = Raw(TWO_STREAMS).update(
        lambda raw: [write(raw) for write in (*written, beside) if write is not None]
    )
    state = TWO_STREAMS
    if meanwhile is not None:
        state = merge_updates(state, Raw(state, client_id=78).update(meanwhile))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rules, "TEXT_BYTES_MAX", longest)
        event("short cut" if takes_short_cut(state, update) else "all the rules")


# -- honest authors ----------------------------------------------------------------------------


class Honest(RuleBasedStateMachine):
    """Two people and a node who write only what they may, each on what it has seen so far.

    The relay applies their updates in the order in which they arrive, and asks the rules. Nothing
    is refused but what was overtaken by a withdrawal; then the node starts over, as it must.
    """

    def __init__(self) -> None:
        super().__init__()
        self.relay = Conversation(1)
        self.log: list[bytes] = []
        self.seen = dict.fromkeys((OLGA, WILL, NODE), 0)
        self.ids = 0  # of entries and of clients
        self.replicas = {author: self._replica() for author in self.seen}

    def _replica(self) -> Conversation:
        self.ids += 2
        return Conversation(100 + self.ids, seal_client_id=101 + self.ids)

    def write(self, author: Author, write: Callable[[Writer], None]) -> None:
        replica = self.replicas[author]
        with replica.writing() as writer:
            write(writer)
        change = writer.change
        assert change is not None
        # An author may ask before it sends.
        check(change, replica, conversation_id=CONVERSATION, author=author)
        self._submit(author, change.update)

    def _submit(self, author: Author, update: bytes) -> None:
        before = self.relay.diff()
        change = self.relay.apply(update)
        try:
            check(change, self.relay, conversation_id=CONVERSATION, author=author)
        except Refused:
            self.relay = Conversation(1, update=before)
            if author is not NODE or not any(
                self.relay.has(entry, "redacted") for entry in change.entries
            ):
                raise
            event("overtaken by a withdrawal")
            self.replicas[author] = self._replica()
            self.seen[author] = 0
            self.catch_up(author, len(self.log))
        else:
            self.log.append(update)

    def catch_up(self, author: Author, upto: int) -> None:
        while self.seen[author] < min(upto, len(self.log)):
            self.replicas[author].apply(self.log[self.seen[author]])
            self.seen[author] += 1

    @initialize()
    def begin(self) -> None:
        def give_birth(writer: Writer) -> None:
            writer.give_birth(BIRTH, 1)
            writer.grant("will", Grant.WRITER)

        self.write(OLGA, give_birth)
        for author in self.seen:
            self.catch_up(author, 1)
        self.write(NODE, lambda w: w.add_lease(1, LEASE["node"], LEASE["signature"]))

    @rule(author=st.sampled_from((OLGA, WILL, NODE)), some=st.integers(1, 5))
    def hear(self, author: Author, some: int) -> None:
        self.catch_up(author, self.seen[author] + some)

    @rule(
        author=st.sampled_from((OLGA, WILL)),
        pick=st.integers(0, 99),
        fork=st.booleans(),
        asks=st.booleans(),
    )
    def say(self, author: Author, pick: int, fork: bool, asks: bool) -> None:  # noqa: FBT001 - drawn
        tree = self.replicas[author].tree
        known = sorted(tree.entries)
        after = known[pick % len(known)] if known and fork else tree.last(ROOT)
        clock = tree.clock + 1
        self.ids += 2
        entry, request = (entry_id(9_999 - self.ids + n, b"\xab" * 10) for n in range(2))

        def write(writer: Writer) -> None:
            born = Born(Role.USER, author.principal, "d", 1, clock, fork=fork, after=after)
            writer.add(entry, born, "said")
            if asks:
                writer.add(
                    request,
                    Born(Role.ASSISTANT, author.principal, "d", 1, clock + 1, after=entry),
                )

        self.write(author, write)

    @rule(author=st.sampled_from((OLGA, WILL)), pick=st.integers(0, 99))
    def stop(self, author: Author, pick: int) -> None:
        tree = self.replicas[author].tree
        if slots := sorted(entry for entry in tree.entries if tree.facts(entry).slot):
            slot = slots[pick % len(slots)]
            self.write(author, lambda writer: writer.stop(slot, author.principal))

    @rule(author=st.sampled_from((OLGA, WILL)), pick=st.integers(0, 99))
    def withdraw(self, author: Author, pick: int) -> None:
        replica = self.replicas[author]
        own = [
            entry
            for entry in sorted(replica.tree.entries)
            if author is OLGA or ((b := replica.born(entry)) and b.author == author.principal)
        ]
        if not own:
            return
        entry = own[pick % len(own)]

        def write(writer: Writer) -> None:
            writer.set(entry, "redacted", {"by": author.principal, "at": 1})
            for field in ("content", "salt", "sealed", "calls"):
                if replica.has(entry, field):
                    del writer._entries[entry][field]

        self.write(author, write)

    @rule(pick=st.integers(0, 99), text=st.sampled_from(("é", "word ")))
    def node(self, pick: int, text: str) -> None:
        replica = self.replicas[NODE]
        streaming = [
            entry
            for entry in sorted(replica.tree.entries)
            if replica.state(entry) is State.STREAMING
        ]
        if not streaming:
            self._admit(replica)
            return
        slot = streaming[pick % len(streaming)]
        open_still = not replica.has(slot, "redacted")

        def grow(writer: Writer) -> None:
            writer.append_text(slot, text)
            writer.append_sealed(slot, text.encode())

        def end(writer: Writer) -> None:
            if open_still:
                writer.append_text(slot, text)
                writer.replace_sealed(slot, b"all")
                writer.proof(slot, SALT, REPLY_PROOF)
            else:
                writer.set(slot, "proof", REPLY_PROOF.plain())
            writer.state(slot, State.DONE)
            writer.usage(slot, Usage(sampled=1))

        self.write(NODE, grow if open_still and pick % 3 else end)

    def _admit(self, replica: Conversation) -> None:
        tree = replica.tree
        for entry in tree.pending:
            parent = tree.up(entry)
            if not tree.is_admitted(parent):
                continue

            def admit(writer: Writer, entry: str = entry, parent: str = parent) -> None:
                writer.place(entry, Place(parent, 1))
                if not tree.facts(entry).slot:
                    writer.proof(entry, SALT, PROOF)
                    return
                writer.state(entry, State.STREAMING)
                writer.open_reply(entry)
                for slot in tree.superseded:
                    writer.state(slot, State.SUPERSEDED)

            self.write(NODE, admit)
            return

    def teardown(self) -> None:
        for author in self.seen:
            self.catch_up(author, len(self.log))
            assert self.replicas[author].view() == self.relay.view()


Honest.TestCase.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
TestHonest = Honest.TestCase
