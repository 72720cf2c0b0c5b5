"""The client against the real relay: what it writes passes every rule, and survives both ends."""

from __future__ import annotations

from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Self

import pytest

from crdt_llm import Client
from crdt_llm.document.conversation import Conversation
from crdt_llm.document.schema import SALT_BYTES, Place, Proof, State, Usage
from crdt_llm.errors import AuthenticationFailed, Refused
from crdt_llm.store.sqlite import SqliteLog
from crdt_llm.sync.access import TokenAccess
from crdt_llm.sync.hub import Hub
from crdt_llm.sync.native_peer import RelayIdentity
from crdt_llm.sync.relay import Relay
from crdt_llm.sync.wire import decode_state_vector

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from crdt_llm.document.conversation import Writer
    from crdt_llm.sync.client import OpenConversation
    from crdt_llm.sync.hub import Membership

TOKEN = "a token"  # noqa: S105 - the key to a server that lives for one test
EPOCH = 1
PROOF = Proof(bytes(32), None, None, bytes(32), bytes(64))  # well-formed is all that a relay asks


class House:
    """A relay with its store, which can stop and start again."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._running = AsyncExitStack()
        self._port = 0
        self.hub: Hub

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}/"

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        log = await SqliteLog.open(self._folder / "log.db")
        self._running.push_async_callback(log.close)
        self.hub = Hub(log)
        relay = Relay(
            self.hub,
            authenticate=TokenAccess(TOKEN).authenticate,
            identity=RelayIdentity(bytes(32), log.log_id),
        )
        await relay.start(port=self._port)
        self._running.push_async_callback(relay.stop)
        self._port = relay.address[1]

    async def stop(self) -> None:
        await self._running.aclose()


class Node:
    """A node that says what a test tells it to; its proofs are empty forms."""

    def __init__(self, identity: str) -> None:
        self.replica = Conversation(77, seal_client_id=78)
        self._identity = identity
        self._membership: Membership

    async def join(self, hub: Hub) -> Self:
        self._membership = await hub.join(self._identity, "node", node=True, deliver=self._hear)
        self.replica.apply(self._membership.state)
        if self.replica.lease(EPOCH) is None:
            await self._write(lambda writer: writer.add_lease(EPOCH, bytes(32), bytes(64)))
        return self

    def _hear(self, update: bytes) -> None:
        self.replica.apply(update)

    async def _write(self, compose: Callable[[Writer], None]) -> None:
        with self.replica.writing() as writer:
            compose(writer)
        assert writer.change is not None
        await self._membership.submit(writer.change.update)

    async def admit(self, slot: str) -> None:
        """Place what stands before a slot, and begin to answer it."""
        tree = self.replica.tree
        for entry in tree.path(slot):
            if tree.is_admitted(entry):
                continue

            def compose(writer: Writer, entry: str = entry, parent: str = tree.up(entry)) -> None:
                writer.place(entry, Place(parent, EPOCH))
                if entry == slot:
                    writer.open_reply(slot)
                    writer.state(slot, State.STREAMING)
                else:
                    writer.proof(entry, bytes(SALT_BYTES), PROOF)

            await self._write(compose)

    async def say(self, slot: str, text: str) -> None:
        await self._write(lambda writer: writer.append_text(slot, text))

    async def end(self, slot: str, state: State = State.DONE) -> None:
        def compose(writer: Writer) -> None:
            writer.state(slot, state)
            writer.usage(slot, Usage(prompt=9, prefilled=4, sampled=3, finish="end"))
            writer.proof(slot, bytes(SALT_BYTES), PROOF)

        await self._write(compose)

    async def answer(self, slot: str, text: str) -> None:
        await self.admit(slot)
        await self.say(slot, text)
        await self.end(slot)


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
        for file in (tmp_path / "house").iterdir():
            file.unlink()
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
