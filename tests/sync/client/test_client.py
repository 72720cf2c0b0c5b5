"""The client against a real server: what a program may rely on."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from contextlib import asynccontextmanager
from random import Random
from typing import TYPE_CHECKING, Any

import pytest
from sync.relay_partner import TOKEN, Partner

from crdt_llm import Client
from crdt_llm.document.schema import Role, State, Usage
from crdt_llm.errors import (
    AuthenticationFailed,
    ConnectionLost,
    DataFolderBusy,
    LocalMisuse,
    Refused,
    ReplyFailed,
)
from crdt_llm.sync.client.local_replica import LocalReplica
from crdt_llm.sync.client.traffic import framed_bytes
from crdt_llm.sync.wire.frames import Answer, Code, Update
from crdt_llm.sync.wire.y_websocket import decode_state_vector

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, AsyncIterator, Callable
    from pathlib import Path

    from crdt_llm.document.conversation import Conversation
    from crdt_llm.sync.client.client import OpenConversation
    from crdt_llm.sync.wire.frames import Restore


@pytest.fixture
async def relay() -> AsyncIterator[Partner]:
    async with Partner() as partner:
        yield partner


@asynccontextmanager
async def client_of(
    relay: Partner, data: Path | None = None, device: str = "laptop", token: str = TOKEN
) -> AsyncIterator[Client]:
    async with Client(relay.url, token=token, data=data, device=device) as client:
        yield client


async def until(conversation: OpenConversation, condition: Callable[[], bool]) -> None:
    """Wait, on the conversation's own changes, until ``condition`` holds."""
    feed = conversation.changes()
    while not condition():
        await anext(feed)


def clocks(document: Conversation) -> dict[int, int]:
    """A state vector without the order of its bytes."""
    return decode_state_vector(document.state_vector())


def texts(conversation: OpenConversation) -> list[str]:
    return [entry.content for entry in conversation.view()]


async def answered(relay: Partner, conversation: OpenConversation, slot: str, text: str) -> None:
    """Let the node answer once the slot has reached it."""
    await relay.until(lambda: slot in relay.document(conversation.id).tree)
    relay.answer(conversation.id, slot, text)
    await until(conversation, lambda: conversation.entry(slot).state is State.DONE)


# -- asking and reading ----------------------------------------------------------------------------


async def test_a_reply_comes_as_deltas_and_ends_with_the_slot(relay: Partner) -> None:
    async with client_of(relay) as client:
        conversation = await client.create("Dinner")
        reply = await conversation.ask("What goes into a lasagne?", max_tokens=50, stop=["\n"])
        await relay.until(lambda: reply.id in relay.document(conversation.id).tree)
        asked = relay.document(conversation.id).entry(reply.id)
        assert asked is not None
        assert (asked.born.params.max_tokens, asked.born.params.stop) == (50, ("\n",))

        relay.start_reply(conversation.id, reply.id)
        deltas: list[str] = []
        for number, piece in enumerate(("Pasta", ", ", "béchamel 🧀")):
            relay.stream(conversation.id, reply.id, piece)
            if number == 0:
                stream = aiter(reply)
            deltas.append(await anext(stream))
        relay.end_reply(conversation.id, reply.id)
        with pytest.raises(StopAsyncIteration):
            await anext(stream)

        assert deltas == ["Pasta", ", ", "béchamel 🧀"]
        assert await reply.text() == "Pasta, béchamel 🧀"
        assert (await reply.entry()).state is State.DONE
        assert [entry.born.role for entry in conversation.view()] == [Role.USER, Role.ASSISTANT]
        assert [delta async for delta in reply] == ["Pasta, béchamel 🧀"]  # from the start again


async def test_ask_is_one_transaction(relay: Partner) -> None:
    async with client_of(relay) as client:
        conversation = await client.create()
        await conversation.synced_once()
        await conversation.ask("Hello")
        await relay.until(lambda: len(relay.document(conversation.id).tree) == 2)
        updates = [m for m in relay.heard[conversation.id] if isinstance(m, Update)]
        assert len(updates) == 2  # the birth, and this


async def test_a_failed_reply_keeps_its_text_and_says_why(relay: Partner) -> None:
    async with client_of(relay) as client:
        conversation = await client.create()
        reply = await conversation.ask("Hello")
        await relay.until(lambda: reply.id in relay.document(conversation.id).tree)
        relay.start_reply(conversation.id, reply.id)
        relay.stream(conversation.id, reply.id, "Half of it")
        error = Usage(error_code="prompt-too-long", error_message="The path does not fit.")
        relay.end_reply(conversation.id, reply.id, State.FAILED, error)

        entry = await reply.entry()
        assert (entry.state, entry.content) == (State.FAILED, "Half of it")
        assert [delta async for delta in reply] == ["Half of it"]
        with pytest.raises(ReplyFailed, match="does not fit") as caught:
            await reply.text()
        assert caught.value.code == "prompt-too-long"


async def test_a_continued_line_goes_on_after_its_last_entry(relay: Partner) -> None:
    async with client_of(relay) as client:
        conversation = await client.create()
        system = await conversation.send("Be brief.", role="system")
        reply = await conversation.ask("One?")
        await answered(relay, conversation, reply.id, "1")
        last = await conversation.send("Two?")
        born = conversation.entry(last).born
        assert (born.after, born.clock) == (reply.id, 4)
        assert conversation.path()[0] == system
        assert texts(conversation) == ["Be brief.", "One?", "1", "Two?"]
        again = await conversation.request(seed=7)
        assert conversation.entry(again.id).born.after == last


async def test_what_clients_may_not_write_is_refused_at_once(relay: Partner) -> None:
    async with client_of(relay) as client:
        conversation = await client.create()
        for wrong in (
            conversation.send("Sure!", role="assistant"),
            conversation.send("42", role="tool"),
            conversation.send("Hi", call="call-1"),
            conversation.send("\ud800"),
            conversation.send("x" * (2**20 + 1)),
            conversation.ask("Hi", temperature=-1.0),
            conversation.ask("Hi", max_tokens=0),
            conversation.ask("Hi", stop=[""]),
            conversation.ask("Hi", beams=4),  # type: ignore[call-arg]
            conversation.regenerate(),
            conversation.fork("01ARZ3NDEKTSV4RRFFQ69G5FAV", "Hi"),
            conversation.rename("x" * 501),
        ):
            with pytest.raises(LocalMisuse):
                await wrong
        assert conversation.view() == ()
        with pytest.raises(LocalMisuse, match="conversation's id"):
            await client.open("../../etc/passwd")


# -- branches --------------------------------------------------------------------------------------


async def test_regenerate_stands_beside_the_old_reply_without_its_seed(relay: Partner) -> None:
    async with client_of(relay) as client:
        conversation = await client.create()
        first = await conversation.ask("A joke?", seed=1, temperature=0.5)
        await answered(relay, conversation, first.id, "No.")
        second = await conversation.regenerate()
        await answered(relay, conversation, second.id, "Knock knock.")

        params = conversation.entry(second.id).born.params
        assert (params.seed, params.temperature) == (None, 0.5)
        assert texts(conversation) == ["A joke?", "Knock knock."]
        assert conversation.siblings(first.id) == (first.id, second.id)
        assert relay.document(conversation.id).meta.head == second.id  # in the same transaction
        main, other = conversation.branches()
        assert (main.tip, main.first, main.shown) == (first.id, "", False)
        assert (other.tip, other.first, other.shown) == (second.id, second.id, True)
        assert other.parent == conversation.path()[0]

        conversation.look(first.id)  # this device only
        assert texts(conversation) == ["A joke?", "No."]
        assert conversation.meta.head == second.id
        await conversation.set_head(first.id)
        await relay.until(lambda: relay.document(conversation.id).meta.head == first.id)


async def test_fork_edits_an_entry_and_asks_again(relay: Partner) -> None:
    async with client_of(relay) as client:
        conversation = await client.create()
        first = await conversation.ask("A joke?")
        await answered(relay, conversation, first.id, "No.")
        await conversation.send("Please.")
        edited = await conversation.fork(conversation.path()[0], "A poem?", max_tokens=9)
        await answered(relay, conversation, edited.id, "Roses.")
        assert texts(conversation) == ["A poem?", "Roses."]
        await conversation.send("More.")
        assert texts(conversation) == ["A poem?", "Roses.", "More."]
        conversation.look(first.id)
        assert texts(conversation) == ["A joke?", "No.", "Please."]
        with pytest.raises(LocalMisuse, match="model's words"):
            await conversation.fork(first.id, "Yes!")


async def test_a_fork_without_switching_leaves_everybody_where_they_are(relay: Partner) -> None:
    async with client_of(relay) as client:
        conversation = await client.create()
        first = await conversation.ask("A joke?")
        await answered(relay, conversation, first.id, "No.")
        await conversation.regenerate(switch=False)
        await conversation.fork(conversation.path()[0], "A poem?", switch=False)
        assert texts(conversation) == ["A joke?", "No."]
        assert conversation.meta.head == ""
        assert len(conversation.branches()) == 3


async def test_extend_goes_on_after_a_cut_reply(relay: Partner) -> None:
    async with client_of(relay) as client:
        conversation = await client.create()
        cut = await conversation.ask("Count.", max_tokens=2, temperature=0.25)
        with pytest.raises(LocalMisuse, match="not cut off"):
            await conversation.extend()
        await answered(relay, conversation, cut.id, "1 2")
        more = await conversation.extend(max_tokens=5)
        born = conversation.entry(more.id).born
        assert (born.after, born.fork, born.params.extend) == (cut.id, False, True)
        assert (born.params.max_tokens, born.params.temperature) == (5, 0.25)
        branch = await conversation.extend(cut.id)
        assert conversation.entry(branch.id).born.fork
        assert conversation.path()[-2:] == (cut.id, branch.id)


async def test_stop_names_the_running_reply_and_works_before_the_node_heard_of_it(
    relay: Partner,
) -> None:
    async with client_of(relay) as client:
        conversation = await client.create()
        assert await conversation.stop() is None
        await conversation.synced_once()
        reply = await conversation.ask("Count to a million.")
        await relay.until(lambda: reply.id in relay.document(conversation.id).tree)
        relay.start_reply(conversation.id, reply.id)
        relay.stream(conversation.id, reply.id, "1 2 3")
        await until(conversation, lambda: conversation.entry(reply.id).content == "1 2 3")
        assert await conversation.stop() == reply.id
        assert await conversation.stop() is None  # it was asked for already
        await relay.until(lambda: relay.document(conversation.id).has(reply.id, "stop"))
        relay.end_reply(conversation.id, reply.id, State.STOPPED)
        assert await reply.text() == "1 2 3"

        conversation.pause()
        unheard = await conversation.ask("Again.")
        assert await conversation.stop() == unheard.id
        assert await unheard.text() == ""


async def test_a_request_that_a_later_one_took_over_ends(relay: Partner) -> None:
    async with client_of(relay) as client:
        conversation = await client.create()
        conversation.pause()
        first = await conversation.ask("One?")
        waiting = asyncio.create_task(first.text())
        await conversation.ask("Two?")
        assert await waiting == ""


# -- offline first ---------------------------------------------------------------------------------


async def test_two_devices_that_wrote_offline_show_the_same(relay: Partner, tmp_path: Path) -> None:
    async with (
        client_of(relay, tmp_path / "a", "laptop") as laptop,
        client_of(relay, tmp_path / "b", "phone") as phone,
    ):
        here = await laptop.create("Trip")
        await here.send("Where to?")
        await here.synced_once()
        there = await phone.open(here.id)
        await there.synced_once()
        here.pause()
        there.pause()
        for number in range(5):
            await here.send(f"laptop {number}")
            await there.send(f"phone {number}")
        await there.rename("Journey")
        assert texts(here) != texts(there)
        here.resume()
        there.resume()
        await until(here, lambda: len(here.view()) == 11)
        await until(there, lambda: len(there.view()) == 11)
        assert here.path() == there.path()
        assert clocks(here.document) == clocks(there.document)
        assert here.title == there.title == "Journey"
        assert {entry.born.device for entry in here.view()} == {"laptop", "phone"}


async def test_days_offline_survive_restarts_of_the_device(relay: Partner, tmp_path: Path) -> None:
    async with client_of(relay, tmp_path) as client:
        conversation = await client.create("Diary")
        conversation.pause()
        await conversation.send("Day 0")
    for day in range(1, 4):
        async with client_of(relay, tmp_path) as client:
            (known,) = await client.conversations()
            conversation = await client.open(known)
            conversation.pause()
            await conversation.send(f"Day {day}")
    await relay.drop(known)
    relay.forget(known)  # whatever got through, the relay lost it
    async with client_of(relay, tmp_path) as client:
        conversation = await client.open(known)
        assert texts(conversation) == [f"Day {day}" for day in range(4)]
        await conversation.synced_once()
        assert len(relay.document(known).tree) == 4
        assert relay.document(known).meta.title == "Diary"


async def test_what_others_wrote_is_in_the_file_too(relay: Partner, tmp_path: Path) -> None:
    async with client_of(relay, tmp_path) as client:
        conversation = await client.create()
        reply = await conversation.ask("Hello")
        await answered(relay, conversation, reply.id, "Hi there")
    await relay.stop()
    async with client_of(relay, tmp_path) as client:
        again = await client.open(conversation.id)
        assert texts(again) == ["Hello", "Hi there"]
        assert not again.synced
        assert await again.reply(reply.id).text() == "Hi there"  # nothing to wait for


async def test_conversations_are_listed_last_used_first(relay: Partner, tmp_path: Path) -> None:
    now = 1_700_000_000_000

    def clock() -> int:
        nonlocal now
        now += 1000
        return now

    for data in (None, tmp_path):
        async with Client(relay.url, token=TOKEN, data=data, clock=clock) as client:
            first, second = await client.create("a"), await client.create("b")
            assert await client.conversations() == (second.id, first.id)
            await first.send("back here")
            assert await client.conversations() == (first.id, second.id)


async def test_what_is_saved_late_was_used_no_later(relay: Partner, tmp_path: Path) -> None:
    """What others write is saved some time after it came: another one may be used meanwhile."""
    async with client_of(relay, tmp_path) as client:
        first = await client.create("a")
        reply = await first.ask("Hello")
        await answered(relay, first, reply.id, "Hi there")
        second = await client.create("b")
        await first.close()  # saves what has waited
        assert await client.conversations() == (second.id, first.id)
        assert texts(await client.open(first.id)) == ["Hello", "Hi there"]
        assert await client.conversations() == (second.id, first.id)  # it was only looked at


async def test_a_data_folder_belongs_to_one_client(relay: Partner, tmp_path: Path) -> None:
    async with client_of(relay, tmp_path):
        with pytest.raises(DataFolderBusy, match="close it, or name another"):
            await Client(relay.url, data=tmp_path).__aenter__()
    async with client_of(relay, tmp_path):
        pass  # it was let go


async def test_opening_twice_gives_one_object_and_reopening_a_new_one(
    relay: Partner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with client_of(relay, tmp_path) as client:
        created = await client.create()
        one, two = await asyncio.gather(client.open(created.id), client.open(created.id))
        assert one is two is created
        await created.send("Hello")
        keepers = [created._replica._keeper]
        load = LocalReplica.open

        async def open_alone(*arguments: Any) -> LocalReplica:
            assert all(keeper is not None and keeper.done() for keeper in keepers)
            return await load(*arguments)

        monkeypatch.setattr(LocalReplica, "open", open_alone)  # two must never share a log
        closing = asyncio.create_task(created.close())
        for _ in range(5):
            await asyncio.sleep(0)  # it has begun, and waits for the network
        assert not closing.done()
        again = await client.open(created.id)
        assert again is not created
        assert texts(again) == ["Hello"]
        with pytest.raises(LocalMisuse, match="closed"):
            await created.send("too late")
        with pytest.raises(LocalMisuse, match="closed"):
            created.resume()


# -- the connection --------------------------------------------------------------------------------


async def test_it_comes_back_after_the_relay_restarted(relay: Partner) -> None:
    async with client_of(relay) as client:
        conversation = await client.create()
        await conversation.synced_once()
        await relay.stop()
        await until(conversation, lambda: not conversation.online)
        entry = await conversation.send("into the void")
        await relay.start()
        await conversation.synced_once()
        assert entry in relay.document(conversation.id).tree
        relay.abort(conversation.id)
        await until(conversation, lambda: not conversation.online)
        await conversation.synced_once()


async def test_pause_and_resume(relay: Partner) -> None:
    async with client_of(relay) as client:
        conversation = await client.create()
        await conversation.synced_once()
        conversation.pause()
        assert (conversation.online, conversation.synced) == (False, False)
        conversation.pause()
        for word in ("one", "two"):
            await conversation.send(word)
        conversation.resume()
        conversation.resume()
        conversation.pause()
        conversation.resume()
        await conversation.synced_once()
        assert len(relay.document(conversation.id).tree) == 2


async def test_a_wrong_token_is_refused_and_loses_nothing(relay: Partner, tmp_path: Path) -> None:
    async with client_of(relay, tmp_path, token="wrong") as client:  # noqa: S106 - meant to be
        conversation = await client.create()
        reply = await conversation.ask("Anyone?")
        with pytest.raises(AuthenticationFailed, match="who are you") as caught:
            await reply.text()
        assert caught.value.code == "unauthenticated"
        with pytest.raises(AuthenticationFailed):
            await conversation.synced_once()
        await conversation.send("still here")
        assert texts(conversation) == ["Anyone?", "", "still here"]
        connections = relay.connections
        relay.token = "wrong"  # noqa: S105 - meant to be
        conversation.resume()
        await conversation.synced_once()
        assert conversation.refused is None
        assert relay.connections == connections + 1  # it had not come back on its own


async def test_a_refusal_reaches_listeners_and_whoever_waits(relay: Partner) -> None:
    async with client_of(relay) as client:
        conversation = await client.create()
        await conversation.synced_once()
        reply = await conversation.ask("Anyone?")
        feed = conversation.changes()
        stream = asyncio.create_task(_drain(reply))
        await relay.until(lambda: reply.id in relay.document(conversation.id).tree)
        await relay.drop(conversation.id, 4422, "forged-author: that was not you")
        with pytest.raises(Refused, match="that was not you") as caught:
            await stream
        assert caught.value.code == "forged-author"
        while conversation.refused is None:
            assert (await anext(feed)).connection
        assert texts(conversation) == ["Anyone?", ""]


@pytest.mark.parametrize("code", [1000, 1001, 1011, 1012, 1013, 3000, 4500])
async def test_every_other_code_means_come_back(relay: Partner, code: int) -> None:
    async with client_of(relay) as client:
        conversation = await client.create()
        await conversation.synced_once()
        await relay.drop(conversation.id, code)
        await until(conversation, lambda: not conversation.online)
        await conversation.synced_once()
        assert relay.connections == 2


async def test_closing_ends_listeners_and_tells_whoever_waits(relay: Partner) -> None:
    async with client_of(relay) as client:
        conversation = await client.create()
        reply = await conversation.ask("Anyone?")
        feed = conversation.changes()
        waiting = asyncio.create_task(reply.text())
        listening = asyncio.create_task(_drain(feed))
        await conversation.synced_once()
    with pytest.raises(ConnectionLost, match="closed on this device"):
        await waiting
    await listening
    assert [change async for change in conversation.changes()] == []


async def _drain(feed: AsyncIterable[object]) -> None:
    async for _ in feed:
        pass


async def test_the_last_write_before_closing_reaches_the_relay(relay: Partner) -> None:
    async with client_of(relay) as client:
        conversation = await client.create()
        await conversation.synced_once()
        entry = await conversation.send("goodbye")
    assert entry in relay.document(conversation.id).tree


async def test_the_token_never_stands_in_an_address(relay: Partner) -> None:
    async with Client(f"{relay.url}?token={TOKEN.replace(' ', '%20')}") as client:
        conversation = await client.create()
        await conversation.synced_once()
    assert relay.paths == ["/"]
    assert [hello.token for hello in relay.hellos] == [TOKEN]


async def test_devices_see_each_other(relay: Partner) -> None:
    async with (
        client_of(relay, device="laptop") as laptop,
        client_of(relay, device="phone") as phone,
    ):
        here = await laptop.create()
        await here.synced_once()
        there = await phone.open(here.id)
        await until(here, lambda: here.devices == ("phone",))
        assert "laptop" not in here.devices
        assert there.devices in {(), ("laptop",)}


async def test_garbage_from_the_relay_costs_the_connection_and_nothing_else(
    relay: Partner,
) -> None:
    async with client_of(relay) as client:
        conversation = await client.create()
        await conversation.send("Hello")
        await conversation.synced_once()
        relay.change(conversation.id, b"\x01\x01\x01garbage")
        await until(conversation, lambda: not conversation.online)
        await conversation.synced_once()
        assert texts(conversation) == ["Hello"]


async def test_an_update_with_a_gap_is_left_out_and_asked_for(relay: Partner) -> None:
    async with client_of(relay) as client:
        conversation = await client.create()
        first = await conversation.ask("Hello")
        await conversation.synced_once()
        document = relay.document(conversation.id)
        with document.writing() as writer:
            writer.open_reply(first.id)  # nobody is told
        relay.stream(conversation.id, first.id, "a reply out of nowhere")
        await until(
            conversation,
            lambda: conversation.entry(first.id).content == "a reply out of nowhere",
        )
        assert clocks(conversation.document) == clocks(document)
        await conversation.synced_once()
        assert relay.connections == 1


# -- listeners -------------------------------------------------------------------------------------


async def test_a_slow_listener_gets_one_change_for_all_it_missed(relay: Partner) -> None:
    async with client_of(relay) as client:
        conversation = await client.create()
        conversation.pause()
        slow = conversation.changes()
        entries = [await conversation.send(str(number)) for number in range(20)]
        await conversation.rename("Numbers")
        changed = await anext(slow)
        assert changed.entries == frozenset(entries)
        assert changed.meta
        assert not changed.everything
        for number in range(300):
            await conversation.send(str(number))
        changed = await anext(slow)
        assert changed.everything  # it is told to read anew, and holds no list
        assert changed.entries == frozenset()
        assert changed.touches(entries[0])


# -- the price -------------------------------------------------------------------------------------


async def _turn_bytes(entries: int, text: str) -> int:
    """The bytes of a question after so many entries, with the same ids and time each time."""
    async with (
        Partner() as relay,
        Client(relay.url, token=TOKEN, clock=lambda: 1_700_000_000_000, random=Random(1)) as client,
    ):
        conversation = await client.create()
        conversation.pause()
        for number in range(entries):
            await conversation.send(f"entry {number}")
        conversation.resume()
        await conversation.synced_once()
        frames = len(relay.frames[conversation.id])
        before = conversation.traffic.live.sent_bytes + conversation.traffic.sync.sent_bytes
        reply = await conversation.ask(text, max_tokens=200, temperature=0.7)
        await relay.until(lambda: reply.id in relay.document(conversation.id).tree)
        after = conversation.traffic.live.sent_bytes + conversation.traffic.sync.sent_bytes
        arrived = relay.frames[conversation.id][frames:]
        assert after - before == sum(framed_bytes(frame, masked=True) for frame in arrived)
        assert conversation.document.client_id >= 2**28  # 15 of 16 ids: their varint has 5 bytes
        return after - before


@pytest.mark.parametrize("text", ["", "What goes into a lasagne? " * 40])
async def test_a_turn_costs_what_is_new_and_not_the_history(text: str) -> None:
    short, long = await _turn_bytes(5, text), await _turn_bytes(500, text)
    assert long < 600 + 1.2 * len(text.encode())
    clocks_bytes = 4  # a Yjs clock from 2**7 on has one byte more: the first one's, three parents'
    number_bytes = 2  # and so has the number of an update in msgpack, 7 or 502: 1 byte, or 3
    assert long - short == clocks_bytes + number_bytes


async def test_traffic_tells_sync_from_turns(relay: Partner) -> None:
    async with client_of(relay) as client:
        conversation = await client.create()
        await conversation.synced_once()
        traffic = conversation.traffic
        assert traffic.live.sent_frames == 1  # the birth
        assert traffic.sync.sent_bytes > 0
        assert traffic.sync.received_bytes > 0
        sent = traffic.sync.sent_bytes
        reply = await conversation.ask("Hello")
        await answered(relay, conversation, reply.id, "Hi")
        assert traffic.live.sent_frames == 2
        assert traffic.live.received_frames > 0
        assert traffic.sync.sent_bytes == sent


async def test_a_reconnect_carries_only_the_difference(relay: Partner) -> None:
    async with client_of(relay) as client:
        conversation = await client.create()
        for number in range(50):
            await conversation.send(f"entry {number}")
        await conversation.synced_once()
        conversation.pause()
        before = len(relay.frames[conversation.id])
        await conversation.send("the only new one")
        conversation.resume()
        await conversation.synced_once()
        sent = relay.frames[conversation.id][before:]
        assert sum(sent) < 500  # the opening, presence, and the only new one


# -- the package -----------------------------------------------------------------------------------


def test_importing_the_client_loads_neither_models_nor_more_than_it_needs() -> None:
    script = (
        "import sys, crdt_llm\n"
        "heavy = {'torch', 'transformers', 'tokenizers', 'pycrdt', 'websockets'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "from crdt_llm import Client\n"
        "heavy -= {'pycrdt', 'websockets'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)  # noqa: S603 - our own script


async def test_a_client_that_was_not_opened_says_so(relay: Partner) -> None:
    client = Client(relay.url)
    with pytest.raises(LocalMisuse, match="async with"):
        await client.create()
    with pytest.raises(LocalMisuse, match="async with"):
        await client.conversations()


async def test_what_the_relay_would_refuse_is_not_written(relay: Partner) -> None:
    """It would be sent again on each connection, and with it all else would be refused."""
    async with client_of(relay) as client:
        conversation = await client.create()
        conversation.pause()
        with pytest.raises(LocalMisuse, match="would refuse"):
            await conversation.ask("42", role="tool")  # an answer to no call
        for call in ("", "x" * 201):
            with pytest.raises(LocalMisuse, match="call"):
                await conversation.send("42", role="tool", call=call)
        assert conversation.view() == ()
        await conversation.send("42", role="tool", call="x" * 200)
        conversation.resume()
        await conversation.synced_once()
        await relay.until(lambda: len(relay.document(conversation.id).tree) == 1)


async def test_one_may_write_before_the_conversation_has_come(relay: Partner) -> None:
    async with client_of(relay) as client:
        conversation = await client.create()
        await conversation.synced_once()
        await relay.until(lambda: conversation.id in relay.heard)
        async with client_of(relay, device="phone") as other:
            early = await other.open(conversation.id)
            early.pause()
            await early.send("Hello")
            early.resume()
            await until(conversation, lambda: texts(conversation) == ["Hello"])


# -- what the relay says to what was written -------------------------------------------------------


def refuses(text: str) -> Callable[[Update | Restore], tuple[Code, str, str] | None]:
    def judge(message: Update | Restore) -> tuple[Code, str, str] | None:
        offends = text.encode() in message.update
        return (Code.INVALID, "content", "not that") if offends else None

    return judge


async def test_one_sees_what_the_relay_has_not_acknowledged(relay: Partner) -> None:
    async with client_of(relay) as client:
        conversation = await client.create()
        await conversation.synced_once()
        conversation.pause()
        entry = await conversation.send("Hello")
        assert conversation.unacknowledged == {entry}
        assert not conversation.acknowledged(entry)
        conversation.resume()
        await until(conversation, lambda: conversation.acknowledged(entry))
        assert not conversation.unacknowledged


async def test_a_refused_message_is_a_draft_and_the_rest_goes_on(
    relay: Partner, tmp_path: Path
) -> None:
    relay.judge = refuses("bad word")
    async with client_of(relay, tmp_path) as client:
        conversation = await client.create()
        conversation.pause()
        await conversation.send("one")
        reply = await conversation.ask("a bad word")
        await conversation.send("two")
        waiting = asyncio.create_task(reply.text())
        conversation.resume()
        await conversation.synced_once()
        assert conversation.refused is None
        assert texts(conversation) == ["one", "two"]
        (refused,) = conversation.refused_writes
        assert (refused.text, refused.code, refused.reason) == ("a bad word", "invalid", "not that")
        with pytest.raises(Refused, match="not that"):
            await waiting
        assert [relay.document(conversation.id).text(entry) for entry in conversation.path()] == [
            "one",
            "two",
        ]
        await conversation.send("three")
        await conversation.synced_once()
    relay.judge = lambda _: None
    async with client_of(relay, tmp_path) as client:
        again = await client.open(conversation.id)
        (refused,) = again.refused_writes
        entry = await again.resend(refused)
        await again.synced_once()
        assert texts(again) == ["one", "two", "three", "a bad word", ""]
        assert entry in relay.document(again.id).tree
        assert again.refused_writes == ()
        with pytest.raises(LocalMisuse, match="not here any more"):
            await again.resend(refused)


async def test_not_now_means_the_same_again(relay: Partner) -> None:
    busy = iter((True, True))
    answer = (Code.UNAVAILABLE, "", "the disk is full")
    relay.judge = lambda _: answer if next(busy, False) else None
    async with client_of(relay) as client:
        conversation = await client.create()
        for number in range(3):
            await conversation.send(str(number))
        await conversation.synced_once()
        assert len(relay.document(conversation.id).tree) == 3
        assert conversation.refused_writes == ()
        assert relay.connections == 1


async def test_a_withdrawn_entry_is_gone_here_and_there(relay: Partner) -> None:
    async with client_of(relay) as client:
        conversation = await client.create()
        entry = await conversation.send("a secret")
        await conversation.synced_once()
        await conversation.redact(entry)
        await conversation.synced_once()
        assert conversation.entry(entry).redacted
        assert b"a secret" not in relay.document(conversation.id).diff()


# -- the relay, and others -------------------------------------------------------------------------


async def test_a_relay_with_another_key_is_not_spoken_to(relay: Partner, tmp_path: Path) -> None:
    async with client_of(relay, tmp_path) as client:
        conversation = await client.create()
        await conversation.synced_once()
    relay.key = b"m" * 32
    heard = len(relay.heard[conversation.id])
    async with client_of(relay, tmp_path) as client:
        again = await client.open(conversation.id)
        with pytest.raises(Refused, match=r"another key.*relays\.json") as caught:
            await again.synced_once()
        assert caught.value.code == "relay-key"
        assert len(relay.heard[conversation.id]) == heard
        await again.send("still here")
    (tmp_path / "relays.json").unlink()
    async with client_of(relay, tmp_path) as client:
        await (await client.open(conversation.id)).synced_once()


async def test_who_one_is_the_relay_says(relay: Partner, tmp_path: Path) -> None:
    relay.principal = "ada"
    async with client_of(relay, tmp_path) as client:
        assert client.principal == "owner"
        await client.list()
        assert client.principal == "ada"
    await relay.stop()
    async with client_of(relay, tmp_path) as client:
        conversation = await client.create()
        assert conversation.members() == {"ada": "owner"}


async def test_the_list_is_the_relays_and_goes_on(relay: Partner) -> None:
    one, two = "A" * 22, "B" * 22
    relay.listed = (
        (one, {"title": "Old", "role": "owner", "owner": "owner", "changed_at": 1}),
        (two, {"title": "New", "role": "reader", "owner": "ada", "changed_at": 2}),
    )
    async with client_of(relay) as client:
        listed = await client.list()
        assert [(line.id, line.title, line.role) for line in listed] == [
            (two, "New", "reader"),
            (one, "Old", "owner"),
        ]
        watch = client.watch()
        assert await anext(watch) == listed
        await relay.list_more((one, None), (two, {"title": "New", "archived": True}))
        (line,) = await anext(watch)
        assert (line.id, line.archived) == (two, True)


async def test_an_invitation_is_a_link_and_a_right(relay: Partner) -> None:
    values = {"principal": "guest:1", "token": "a token", "id": "jti"}
    relay.answers["invite"] = Answer(0, values, "", "")
    async with client_of(relay) as client:
        conversation = await client.create()
        invitation = await conversation.invite("reader", expires_at=5)
        assert invitation.link.endswith(f"/#c={conversation.id}&token=a+token")
        assert conversation.members()["guest:1"] == "reader"
        assert relay.requests[0].arguments["expires_at"] == 5
        with pytest.raises(LocalMisuse):
            await conversation.invite("owner")
        with pytest.raises(Refused, match="no such thing"):
            await conversation.archive()
        with pytest.raises(LocalMisuse, match="archive"):
            await conversation.leave()
