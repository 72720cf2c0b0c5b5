"""Makes ``protocol/vectors/chain.json``: documents with a chain, and which of its entries hold.

Keys and ids are fixed, so that making it twice gives equal verdicts and digests. Run it after a
change of what is hashed or signed: ``python tests/document/make_chain_vectors.py``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crdt_llm.document.chain import (
    Link,
    commit_calls,
    commit_content,
    commit_tokens,
    lease_message,
    parent_digest,
    prove,
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

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from crdt_llm.document.conversation import Writer

FILE = Path(__file__).resolve().parents[2] / "protocol" / "vectors" / "chain.json"
ABOUT = (
    "Documents with a chain. `path` is the view; `holds` says of each entry that the walk comes to"
    " whether it holds, and ends with the first that does not; `digests` are those written along"
    " the path, right or wrong."
)

BIRTH = Birth("olga", b"n" * 16)
CONVERSATION = conversation_id(BIRTH)
NODE, OTHER, RELAY = (SigningKey(seed * 32) for seed in (b"k", b"s", b"r"))
USER, SLOT, NEXT, LATER = (entry_id(number, b"\xab" * 10) for number in range(4))
BORN = {
    USER: Born(Role.USER, "olga", "phone", 1, 1),
    SLOT: Born(
        Role.ASSISTANT,
        "olga",
        "phone",
        1 << 41,
        2,
        after=USER,
        params=Params(temperature=0.7, top_p=1.0, seed=2**53 - 1, stop=("a", "\U0001f30d")),
    ),
    NEXT: Born(Role.USER, "olga", "phone", 1, 3, after=SLOT),
    LATER: Born(Role.USER, "olga", "phone", 1, 4, after=NEXT),
}
TEXT = {USER: "hello", SLOT: "Grüße \U0001f30d", NEXT: "x" * 300, LATER: "later"}
CALLS = [
    {"id": "1", "arguments": {"z": 1.0, "a": [0.5, None, -40_000], "\ue000": 1, "\U0001f30d": 2}}
]


def proved(*, taken_over: bool = False) -> Conversation:
    """Three proved entries and a pending one; a second node may have ended the reply."""
    conversation = Conversation(1)
    with conversation.writing() as writer:
        writer.give_birth(BIRTH, 1)
        for epoch, node in ((1, NODE), (2, OTHER)):
            message = lease_message(CONVERSATION, epoch, node.public)
            writer.add_lease(epoch, node.public, RELAY.sign(message))
        for entry, born in BORN.items():
            writer.add(entry, born, None if entry == SLOT else TEXT[entry])
        writer.open_reply(SLOT)
    with conversation.writing() as writer:
        writer.append_text(SLOT, TEXT[SLOT])
    parent = ROOT
    for entry in (USER, SLOT, NEXT):
        slot, salt = entry == SLOT, entry.encode()[-16:]
        link = Link(
            entry,
            conversation.born_plain(entry),
            commit_content(salt, TEXT[entry]),
            tokens=commit_tokens(salt, (1, 70_000)) if slot else None,
            calls=commit_calls(salt, CALLS) if slot else None,
            reads=(USER,) if slot else None,
            state=State.DONE if slot else None,
        )
        key, epoch = (OTHER, 2) if taken_over and entry != USER else (NODE, 1)
        proof = prove(
            link,
            parent=parent_digest(conversation, parent),
            conversation=CONVERSATION,
            epoch=epoch,
            key=key,
        )
        with conversation.writing() as writer:
            writer.place(entry, Place(parent, 1 if slot else epoch))
            writer.proof(entry, salt, proof)
            if slot:
                writer.state(entry, State.DONE)
                writer.set(entry, "calls", CALLS)
                writer.set(entry, "reads", [USER])
        parent = entry
    return conversation


def changed(write: Callable[[Writer], object], *, taken_over: bool = False) -> Conversation:
    """The same with something else written over it."""
    conversation = Conversation(2, update=proved(taken_over=taken_over).diff())
    with conversation.writing() as writer:
        write(writer)
    return conversation


def withdraw(writer: Writer, entry: str) -> None:
    """As an author does; the commitments stay."""
    writer.set(entry, "redacted", {"by": "olga", "at": 1})
    fields = writer._entries[entry]  # the writer has no method for deletions
    for key in ("content", "salt"):
        del fields[key]


CASES: dict[str, Conversation] = {
    "as the node made it": proved(),
    "a reply that another node ended": proved(taken_over=True),
    "an entry that was withdrawn": changed(lambda writer: withdraw(writer, USER)),
    "another text": changed(lambda writer: writer.set(NEXT, "content", "no")),
    "another author": changed(
        lambda writer: writer.set(NEXT, "born", BORN[NEXT].plain() | {"author": "eve"})
    ),
    "another salt": changed(lambda writer: writer.set(USER, "salt", b"z" * 16)),
    "another state": changed(lambda writer: writer.set(SLOT, "state", "stopped")),
    "other reads": changed(lambda writer: writer.set(SLOT, "reads", [])),
    "a lease that the relay did not sign": changed(
        lambda writer: writer.add_lease(1, NODE.public, b"\1" * 64)
    ),
    "a lease of somebody else": changed(
        lambda writer: writer.add_lease(1, RELAY.public, b"\1" * 64)
    ),
    "an author's entry under a later lease": changed(
        lambda writer: writer.place(NEXT, Place(SLOT, 1)), taken_over=True
    ),
}


def digests(conversation: Conversation, path: Sequence[str]) -> list[bytes]:
    """The digests that are written along a path, whether they hold or not."""
    entries = (conversation.entry(entry) for entry in path)
    return [
        entry.proof.digest for entry in entries if entry is not None and entry.proof is not None
    ]


def vectors() -> str:
    """The whole file."""
    cases: list[dict[str, Any]] = []
    for about, conversation in CASES.items():
        path = conversation.tree.path(LATER)
        cases.append(
            {
                "about": about,
                "document": conversation.diff().hex(),
                "path": path,
                "holds": [
                    [verdict.entry, verdict.problem is None]
                    for verdict in verify_path(conversation, path, RELAY.public)
                ],
                "digests": [digest.hex() for digest in digests(conversation, path)],
            }
        )
    made = {
        "about": ABOUT,
        "conversation": CONVERSATION,
        "relay": RELAY.public.hex(),
        "cases": cases,
    }
    return json.dumps(made, indent=1) + "\n"


if __name__ == "__main__":
    FILE.write_text(vectors(), encoding="utf-8")
