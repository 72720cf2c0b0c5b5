"""The vectors of the chain: what is kept reads as it says, and is what would be made now."""

import json
from typing import Any

import pytest
from document import make_chain_vectors as making

from crdt_llm.document.chain import verify_path
from crdt_llm.document.conversation import Conversation

VECTORS: dict[str, Any] = json.loads(making.FILE.read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", VECTORS["cases"], ids=lambda case: case["about"])
def test_entries_hold_as_the_vectors_say(case: dict[str, Any]) -> None:
    conversation = Conversation(99, update=bytes.fromhex(case["document"]))
    assert list(conversation.tree.path(case["path"][-1])) == case["path"]
    verdicts = verify_path(conversation, case["path"], bytes.fromhex(VECTORS["relay"]))
    assert [[one.entry, one.problem is None] for one in verdicts] == case["holds"]
    found = [digest.hex() for digest in making.digests(conversation, case["path"])]
    assert found == case["digests"]


def test_the_vectors_are_those_of_the_implementation() -> None:
    def judged(vectors: dict[str, Any]) -> dict[str, Any]:
        cases = [
            {key: value for key, value in case.items() if key != "document"}
            for case in vectors["cases"]
        ]
        return {**vectors, "cases": cases}

    # The bytes of a document depend on the order in which its maps were written down.
    made = json.loads(making.vectors())
    assert judged(made) == judged(VECTORS), "run tests/document/make_chain_vectors.py"


def test_there_are_chains_that_hold_and_chains_that_do_not() -> None:
    verdicts = {holds for case in VECTORS["cases"] for _, holds in case["holds"]}
    assert verdicts == {True, False}
