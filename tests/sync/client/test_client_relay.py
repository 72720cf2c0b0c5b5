"""The client against the real relay: what it writes passes every rule, and survives both ends."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
from sync.relay_house import TOKEN, House, Node

from crdt_llm import Client
from crdt_llm.document.schema import State
from crdt_llm.errors import AuthenticationFailed, Refused
from crdt_llm.sync.wire.y_websocket import decode_state_vector

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from crdt_llm.sync.client.client import OpenConversation


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    folder = tmp_path / "house"
    folder.mkdir()
    async with House(folder) as house:
        yield house


@asynccontextmanager
async def client_of(
    house: House, *, token: str = TOKEN, data: Path | None = None, principal: str = "owner"
) -> AsyncIterator[Client]:
    async with Client(house.url, token=token, data=data, principal=principal) as client:
        yield client


async def until(conversation: OpenConversation, condition: Callable[[], bool]) -> None:
    feed = conversation.changes()
    while not condition():
        await conversation.next_of(feed, lambda _: True)


def clocks(conversation: OpenConversation) -> dict[int, int]:
    return decode_state_vector(conversation.document.state_vector())


async def test_everything_a_client_writes_passes_the_rules(house: House) -> None:
    async with client_of(house) as client, client_of(house) as elsewhere:
        here = await client.create("A trip")
        await here.synced_once()
        there = await elsewhere.open(here.id)
        node = await Node(here.id).join(house.hub)

        async def answered(slot: str, text: str) -> None:
            await until(there, lambda: slot in there.document.tree)  # so the node has it too
            await node.answer(slot, text)
            assert await here.reply(slot).text() == text
            assert await there.reply(slot).text() == text

        await here.send("Be brief.", role="system")
        first = await here.ask("Where to?", max_tokens=9, temperature=0.5, seed=1, stop=["\n"])
        await answered(first.id, "Lisbon.")
        second = await here.regenerate()
        await answered(second.id, "Porto.")
        third = await here.extend(ignore_eos=True)
        await answered(third.id, " Or Braga.")
        fork = await here.fork(here.path()[1], "When to?", top_k=5, top_p=0.9)
        await answered(fork.id, "In May.")
        await here.send("A result", role="tool", call="call-1")
        again = await here.request()
        await until(there, lambda: again.id in there.document.tree)
        await node.admit(again.id)
        await node.say(again.id, "1 2")
        await until(here, lambda: here.entry(again.id).content == "1 2")
        assert await here.stop() == again.id
        await until(there, lambda: there.entry(again.id).stop == "owner")
        await node.end(again.id, State.STOPPED)
        assert await again.text() == "1 2"
        await here.rename("Another trip")
        await here.set_head(first.id)
        await until(there, lambda: there.meta.head == first.id)

        assert here.refused is None
        assert there.title == "Another trip"
        assert clocks(here) == clocks(there)
        assert here.path() == there.path()
        assert len(here.branches()) == len(there.branches()) == 3
        entry = here.entry(first.id)
        assert entry.usage is not None
        assert entry.usage.reused == 5


async def test_offline_work_merges_after_both_ends_restarted(house: House, tmp_path: Path) -> None:
    laptop, phone = tmp_path / "laptop", tmp_path / "phone"
    async with client_of(house, data=laptop) as one, client_of(house, data=phone) as two:
        here = await one.create()
        await here.send("Hello")
        await here.synced_once()
        there = await two.open(here.id)
        await until(there, lambda: len(there.view()) == 1)
    await house.stop()
    for data, asks in ((laptop, 510), (phone, 5)):  # more entries than a clock may lead by
        async with client_of(house, data=data) as client:
            conversation = await client.open(here.id)
            for number in range(asks):
                await conversation.ask(f"{data.name} {number}")
    await house.start()
    async with client_of(house, data=laptop) as one, client_of(house, data=phone) as two:
        here, there = await one.open(here.id), await two.open(here.id)
        await until(here, lambda: len(here.document.tree) == 1_031)
        await until(there, lambda: len(there.document.tree) == 1_031)
        assert here.path() == there.path()
        assert clocks(here) == clocks(there)


async def test_a_wrong_token_is_said_and_not_tried_again(house: House) -> None:
    async with client_of(house, token="wrong") as client:  # noqa: S106 - meant to be
        conversation = await client.create()
        with pytest.raises(AuthenticationFailed, match="valid token"):
            await conversation.synced_once()


async def test_writing_under_another_name_is_refused(house: House) -> None:
    async with client_of(house, principal="mallory") as client:
        conversation = await client.create()
        await conversation.send("I am the owner")
        with pytest.raises(Refused) as caught:
            await conversation.synced_once()
        assert caught.value.code == "principal"
        assert [entry.content for entry in conversation.view()] == ["I am the owner"]


async def test_it_comes_back_when_the_relay_does(house: House) -> None:
    async with client_of(house) as client:
        conversation = await client.create()
        await conversation.synced_once()
        reply = await conversation.ask("Still there?")
        await house.stop()
        await until(conversation, lambda: not conversation.online)
        await conversation.send("Hello?")
        await house.start()
        await conversation.synced_once()
        node = await Node(conversation.id).join(house.hub)
        await node.answer(reply.id, "Yes.")
        assert await reply.text() == "Yes."


async def test_a_wiped_relay_gets_the_conversation_back_from_a_client(
    house: House, tmp_path: Path
) -> None:
    async with client_of(house, data=tmp_path / "laptop") as client:
        conversation = await client.create("Kept")
        await conversation.send("Remember me.")
        await conversation.synced_once()
        await house.stop()
        house.lose("log", "register")
        await until(conversation, lambda: not conversation.online)
        await house.start()
        await conversation.synced_once()
        node = await Node(conversation.id).join(house.hub)
        assert node.replica.meta.title == "Kept"
        assert [node.replica.text(entry) for entry in node.replica.view()] == ["Remember me."]


@pytest.mark.parametrize("entries", [5, 500])
async def test_a_turn_costs_what_is_new(house: House, entries: int) -> None:
    async with client_of(house) as client, client_of(house) as elsewhere:
        here = await client.create()
        for number in range(entries):
            await here.send(f"entry {number}")
        await here.synced_once()
        there = await elsewhere.open(here.id)
        await until(there, lambda: len(there.document.tree) == entries)
        before = here.traffic.live.sent_bytes + here.traffic.sync.sent_bytes
        text = "What goes into a lasagne? " * 20
        reply = await here.ask(text, max_tokens=200, temperature=0.7)
        await until(there, lambda: reply.id in there.document.tree)
        cost = here.traffic.live.sent_bytes + here.traffic.sync.sent_bytes - before
        assert 0 < cost < 600 + 1.2 * len(text)
