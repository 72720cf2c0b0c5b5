"""Whose the struct is that stands under a key."""

from __future__ import annotations

from random import Random
from typing import Any

from pycrdt import Doc, Map
from sync.device import Device

from crdt_llm.document.conversation import Conversation
from crdt_llm.sync.update.provenance import Provenance, client_of

OTHER = 4_000_000_000


def test_each_value_is_found_under_the_client_id_that_wrote_it_last() -> None:
    one, two = Device(Random(1)), Device(Random(2))
    one.give_birth()
    one.say("said")
    one.entitle("first")
    (entry,) = one.replica.view()
    two.merge(one.replica.diff())
    for number in range(5):
        two.entitle(str(number))
    with two.replica.writing() as writer:
        writer.redact(entry, "owner", 1)
    sources = Provenance.of(two.replica.diff())
    clients = {one.replica.client_id: "one", two.replica.client_id: "two"}
    assert client_of(sources.meta("title"), clients) == "two"
    assert client_of(sources.meta("birth"), clients) == "one"
    assert client_of(sources.entry(entry), clients) == "one"
    assert client_of(sources.field(entry, "born"), clients) == "one"
    assert client_of(sources.field(entry, "redacted"), clients) == "two"
    assert sources.field(entry, "content") is None  # it was withdrawn
    assert sources.entry("nobody") is None
    assert client_of(sources.meta("title"), {}) is None


def test_what_takes_the_place_of_a_value_without_saying_where_is_found_too() -> None:
    """A struct with an origin names neither parent nor key; a chain of them leads to the first."""
    device = Device(Random(1))
    device.give_birth()
    device.say("said")
    (entry,) = device.replica.view()
    doc: Doc[Any] = Doc(client_id=OTHER)
    entries = doc.get("entries", type=Map)
    doc.apply_update(device.replica.diff())
    for text in ("written", "over", "thrice"):
        entries[entry]["content"] = text
    sources = Provenance.of(Conversation(1, update=doc.get_update()).diff())
    found = sources.field(entry, "content")
    assert found is not None
    assert found.client == OTHER
    assert found.content in ("thrice", ("thrice",))


def test_a_value_that_was_written_over_thousands_of_times_is_followed_to_its_key() -> None:
    doc: Doc[Any] = Doc(client_id=OTHER)
    entries = doc.get("entries", type=Map)
    entries["one"] = Map({"content": "x"})
    for number in range(2_000):
        entries["one"]["content"] = str(number)
    found = Provenance.of(doc.get_update()).field("one", "content")
    assert found is not None
    assert found.content in ("1999", ("1999",))
