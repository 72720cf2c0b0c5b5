from __future__ import annotations

import itertools

import pytest

from crdt_llm.document.conversation import Conversation
from crdt_llm.document.updates import merge
from crdt_llm.errors import MalformedMessage


def written(client_id: int, titles: list[str]) -> list[bytes]:
    replica, updates = Conversation(client_id), []
    for title in titles:
        with replica.writing() as writer:
            writer.set_meta("title", title)
        assert writer.change is not None
        updates.append(writer.change.update)
    return updates


def test_a_joined_update_does_what_its_parts_do_in_any_order() -> None:
    parts = [*written(7, ["a", "b"]), *written(8, ["c"])]
    apart = Conversation(1)
    for part in parts:
        apart.apply(part)
    for order in itertools.permutations(parts):
        joined = Conversation(2, update=merge(order))
        assert joined.meta == apart.meta
        assert Conversation(3, update=joined.diff()).state_vector() == joined.state_vector()


def test_one_update_stays_as_it_is() -> None:
    (update,) = written(7, ["a"])
    assert merge([update]) is update


def test_what_is_no_update_is_not_joined() -> None:
    with pytest.raises(MalformedMessage):
        merge([b"\1\2\3", b"\1"])
