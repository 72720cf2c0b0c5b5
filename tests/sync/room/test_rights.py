"""A right is the same whoever says so, and a token allows at most that."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING

import pytest
from sync.device import Device

from crdt_llm.document.rules import Author
from crdt_llm.document.schema import Grant
from crdt_llm.sync.relay.conversation_list import summarise
from crdt_llm.sync.room import ledger
from crdt_llm.sync.room.rights import right_of

if TYPE_CHECKING:
    from crdt_llm.document.conversation import Conversation
    from crdt_llm.sync.room.rights import Record

RIGHTS = (Grant.OWNER, Grant.WRITER, Grant.READER)  # the most first


def sources() -> list[Conversation | Record]:
    device = Device(Random(1))
    device.give_birth()
    for grant in Grant:
        device.grant(f"a {grant}", grant)
    with device.replica.writing() as writer:
        writer._roots["access"]["king"] = "king"
    row, summary = ledger.first_row(device.replica), summarise(device.replica)
    assert row is not None
    assert summary is not None
    return [device.replica, row, summary]


@pytest.mark.parametrize("cap", [None, *Grant])
@pytest.mark.parametrize(
    ("principal", "right"),
    [
        ("owner", Grant.OWNER),
        *((f"a {grant}", grant) for grant in Grant),
        ("king", None),
        ("a stranger", None),
        ("", None),
    ],
)
def test_everybody_says_the_same(principal: str, right: Grant | None, cap: Grant | None) -> None:
    expected = right
    if right is not None and cap is not None:
        expected = RIGHTS[max(RIGHTS.index(right), RIGHTS.index(cap))]
    author = Author(principal, cap=cap)
    assert [right_of(source, author) for source in sources()] == [expected] * 3
