"""What no reader of the document would see is refused, by a room that knows nothing else of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from sync.device import AT_MS, CONVERSATION
from sync.leased_node import LeasedNode, ask
from sync.rooms import Place, born
from sync.update_writer import Pen

from crdt_llm.document.conversation import Conversation
from crdt_llm.document.schema import entry_id
from crdt_llm.errors import MalformedMessage, Refused
from crdt_llm.sync.update.structure import (
    Format,
    Id,
    Kind,
    SharedType,
    Subdocument,
    TypeRef,
    read_update,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    Write = Callable[["Pen", "Known"], object]

NEW = entry_id(AT_MS, b"\xee" * 10)
CLIENT = 4242


class Known:
    """The ids of what the conversation has."""

    def __init__(self, document: bytes, slot: str, question: str) -> None:
        self.slot = self.question = self.text = self.chunks = self.title = Id(0, 0)
        named = {slot: "slot", question: "question"}
        types: dict[Id, str] = {}
        for structs in read_update(document).structs.values():
            for item in structs:
                where = Id(item.client, item.clock)
                if item.parent == "entries":
                    setattr(self, named[str(item.parent_sub)], where)
                elif item.parent == "meta" and item.parent_sub == "title":
                    self.title = where
                elif isinstance(item.content, SharedType):
                    types[where] = str(item.parent_sub)
        for where, key in types.items():
            setattr(self, {"content": "text", "sealed": "chunks"}[key], where)


def a_born() -> dict[str, Any]:
    return {
        "role": "user",
        "author": "owner",
        "device": "d",
        "at": AT_MS,
        "clock": 50,
        "mode": "continue",
    }


def entry(pen: Pen, name: str = NEW) -> Id:
    made = pen.type(TypeRef.MAP, "entries", name)
    pen.value(made, "born", a_born())
    pen.value(made, "content", "text")
    return made


HONEST: dict[str, Write] = {
    "an entry": lambda pen, _: entry(pen),
    "a title": lambda pen, known: pen.put(Kind.ANY, ("t",), origin=known.title),
    "a stop": lambda pen, known: pen.value(known.slot, "stop", "owner"),
    "what it deleted before": lambda pen, _: (
        pen.put(Kind.DELETED, parent="entries", key=NEW),
        pen.put(Kind.GC, length=2),
    ),
}

# With the code of the refusal; none where it is no update at all.
HIDDEN: dict[str, tuple[Write, str]] = {
    "a root": (lambda pen, _: pen.value("elsewhere", "x", 1), "schema"),
    "a list in a root": (lambda pen, _: pen.value("meta", None, "x" * 99), "schema"),
    "a text in a root": (lambda pen, _: pen.put(Kind.STRING, "x", parent="entries"), "schema"),
    "a key of meta": (lambda pen, _: pen.value("meta", "x", 1), "schema"),
    "a key that was deleted at once": (
        lambda pen, _: pen.put(Kind.DELETED, parent="meta", key="x" * 999),
        "schema",
    ),
    "a long name": (lambda pen, _: pen.value("access", "x" * 201, "reader"), "schema"),
    "a long id": (lambda pen, _: pen.type(TypeRef.MAP, "entries", NEW + "X"), "schema"),
    "a list in an entry": (lambda pen, _: pen.value(entry(pen), None, "x"), "schema"),
    "a list in a known entry": (lambda pen, k: pen.value(k.question, None, "x"), "node-field"),
    "a field of a text": (lambda pen, k: pen.value(k.text, "stop", "owner"), "node-field"),
    "a field of a list": (lambda pen, k: pen.value(k.chunks, "redacted", "x"), "node-field"),
    "a field of a title": (lambda pen, k: pen.value(k.title, "stop", "x"), ""),
    "a field of a text that comes along": (
        lambda pen, _: pen.value(pen.type(TypeRef.TEXT, "meta", "title"), "stop", "x"),
        "schema",
    ),
    "a field of an entry": (lambda pen, k: pen.value(k.slot, "x", 1), "schema"),
    "a run under a key": (
        lambda pen, _: pen.put(Kind.ANY, ("x", "title"), parent="meta", key="title"),
        "schema",
    ),
    "a run behind a key": (
        lambda pen, k: pen.put(Kind.ANY, ("x", "title"), origin=k.title),
        "schema",
    ),
    "letters under a key": (
        lambda pen, _: pen.put(Kind.STRING, "title", parent="meta", key="title"),
        "schema",
    ),
    "letters behind a key": (lambda pen, k: pen.put(Kind.STRING, "xyz", origin=k.title), "schema"),
    "JSON": (lambda pen, _: pen.put(Kind.JSON, ("x",), parent="meta", key="title"), "schema"),
    "half a character in JSON": (
        lambda pen, _: pen.put(Kind.JSON, ("\ud800",), parent="meta", key="title"),
        "",
    ),
    "an embed": (lambda pen, k: pen.put(Kind.EMBED, ("x",), parent=k.text), "schema"),
    "a mark": (lambda pen, k: pen.put(Kind.FORMAT, Format("b", 1), parent=k.text), "schema"),
    "a document": (
        lambda pen, _: pen.put(Kind.DOC, Subdocument("g", {}), parent="meta", key="title"),
        "schema",
    ),
    "XML": (lambda pen, _: pen.type(TypeRef.XML_ELEMENT, "meta", "title"), "schema"),
    "XML text": (lambda pen, _: pen.type(TypeRef.XML_TEXT, "entries", NEW), "schema"),
}


async def a_room() -> tuple[Place, Any, Known]:
    place = Place(leased=True)
    owner, device = await born(place)
    await owner.membership.submit(device.entitle("a title"))
    question, slot = await ask(device, owner)
    node = await LeasedNode.sit(place)
    await node.admit(question)
    await node.start(slot)
    document = place.hub._rooms[CONVERSATION].diff()
    return place, owner, Known(document, slot, question)


@pytest.mark.parametrize("what", HONEST)
async def test_what_a_reader_sees_is_taken(what: str) -> None:
    place, owner, known = await a_room()
    before = place.durable
    pen = Pen(CLIENT)
    HONEST[what](pen, known)
    await owner.membership.submit(pen.update())
    assert place.durable == before + 1


@pytest.mark.parametrize("what", HIDDEN)
async def test_what_no_reader_sees_is_refused(what: str) -> None:
    place, owner, known = await a_room()
    before = place.durable
    pen = Pen(CLIENT)
    write, code = HIDDEN[what]
    write(pen, known)
    with pytest.raises((Refused, MalformedMessage)) as refused:
        await owner.membership.submit(pen.update())
    assert getattr(refused.value, "code", "") == code
    assert place.durable == before


async def test_a_value_that_lost_is_no_offence() -> None:
    """Two people stop a reply at the same time: one of the two values is never seen."""
    place, owner, known = await a_room()
    clients = (CLIENT, CLIENT + 1)
    pens = [Pen(client) for client in clients]
    for pen in pens:
        pen.value(known.slot, "stop", "owner")
    for pen in (*pens, *reversed(pens)):
        await owner.membership.submit(pen.update())
    replica = Conversation(1, update=place.hub._rooms[CONVERSATION].diff())
    assert [replica.tree.facts(entry).ended for entry in replica.tree.entries].count(True) == 1


async def test_lone_surrogates_are_no_text() -> None:
    place, owner, _ = await a_room()
    pen = Pen(CLIENT)
    pen.value("meta", "title", "?" * 3)
    update = pen.update().replace(b"???", b"\xed\xa0\x80")
    before = place.durable
    with pytest.raises(Exception, match="no UTF-8"):
        await owner.membership.submit(update)
    assert place.durable == before
