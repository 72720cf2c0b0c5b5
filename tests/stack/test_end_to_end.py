"""The served process from outside: two devices chat with it, and ``kill -9`` changes no token."""

from __future__ import annotations

from contextlib import asynccontextmanager
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Final

import pytest
import pytest_asyncio
from stack.served_process import ServedProcess

from crdt_llm import Client
from crdt_llm.document.chain import verify_path
from crdt_llm.document.schema import State
from crdt_llm.sync.wire.y_websocket import decode_state_vector

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from crdt_llm.document.conversation import Conversation
    from crdt_llm.document.schema import Entry
    from crdt_llm.sync.client.client import OpenConversation, Sampling

pytestmark = pytest.mark.asyncio(loop_scope="module")

KILLS: Final = 3  # within one reply; each costs the start of an engine
TINY_TOKENS: Final = 900  # about a second of the tiny model in torch's operations
REAL_TOKENS: Final = 160  # about a second of the real model


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def tiny_server(
    tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path
) -> AsyncIterator[ServedProcess]:
    async with ServedProcess(
        tmp_path_factory.mktemp("tiny"), tiny_model_dir, native=False
    ) as server:
        yield server


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def real_server(
    tmp_path_factory: pytest.TempPathFactory, real_model_dir: Path
) -> AsyncIterator[ServedProcess]:
    async with ServedProcess(tmp_path_factory.mktemp("real"), real_model_dir) as server:
        yield server


@dataclass(frozen=True, slots=True)
class Devices:
    """One conversation on two devices."""

    phone: OpenConversation
    laptop: OpenConversation

    @property
    def both(self) -> tuple[OpenConversation, OpenConversation]:
        return self.phone, self.laptop


@asynccontextmanager
async def two_devices(server: ServedProcess, folder: Path) -> AsyncIterator[Devices]:
    def client(name: str) -> Client:
        return Client(server.url, token=server.token, data=folder / name, device=name)

    async with client("phone") as phone, client("laptop") as laptop:
        first = await phone.create()
        await first.synced_once()
        second = await laptop.open(first.id)
        await second.synced_once()
        yield Devices(first, second)


async def until(conversation: OpenConversation, holds: Callable[[], bool]) -> None:
    """Wait for something to hold on a device; every change is looked at, nothing is polled."""
    feed = conversation.changes()
    while not holds():
        await conversation.next_of(feed, lambda _: True)


def check_nothing_lost(stored: Conversation, device: OpenConversation) -> None:
    """What a device has of others' is in the log, to the last character and sealed token."""
    durable = decode_state_vector(stored.state_vector())
    document = device.document
    for client, clock in decode_state_vector(document.state_vector()).items():
        assert client == document.client_id or durable.get(client, 0) >= clock
    for name in document.tree.entries:
        had, kept = document.entry(name), stored.entry(name)
        assert had is not None
        if kept is None:
            assert had.place is None, "an admitted entry was lost"
            continue
        assert had.place in (None, kept.place)
        assert kept.content.startswith(had.content)
        if not kept.ended or had.ended:
            assert kept.sealed[: len(had.sealed)] == had.sealed


async def die_and_come_back(server: ServedProcess, devices: Devices, slot: str) -> None:
    """Kill it in mid-reply. The phone writes while there is no server."""
    await server.kill()
    for device in devices.both:
        await until(device, lambda d=device: not d.online)  # type: ignore[misc]
    stored = server.stored(devices.phone.id)
    for device in devices.both:
        check_nothing_lost(stored, device)
    assert stored.state(slot) not in {State.DONE, State.FAILED, State.STOPPED}, "it was too late"
    devices.phone.look(slot)
    await devices.phone.send("is anybody there?")
    await server.start()
    for device in devices.both:
        device.pause()
        device.resume()  # at once, and not after a wait that grew while nobody answered


async def check_kills_change_no_token(
    server: ServedProcess, folder: Path, sampling: Sampling, *, kills: int, seed: int
) -> None:
    random = Random(seed)
    async with two_devices(server, folder) as devices:
        phone, laptop = devices.both
        whole = await (await phone.ask("Write about the river.", **sampling)).entry()
        assert whole.state is State.DONE
        again = await laptop.regenerate(whole.id, **sampling)
        moments = sorted(random.sample(range(len(whole.content) // 2), kills))
        for moment in moments:
            await until(laptop, lambda m=moment: len(laptop.entry(again.id).content) >= m)  # type: ignore[misc]
            await die_and_come_back(server, devices, again.id)
        reply = await again.entry()
        ids = server.sampled_ids(laptop.document, reply)
        assert ids == server.sampled_ids(phone.document, whole)
        assert len(ids) == sampling["max_tokens"]
        assert (reply.state, reply.content) == (State.DONE, whole.content)
        assert reply.usage is not None
        # One replay in this life; none if the engine had the time to write the prompt's KV to disk.
        assert reply.usage.prefilled in {0, reply.usage.prompt}
        await check_all_agree(server, devices, said_meanwhile=kills)


async def check_all_agree(server: ServedProcess, devices: Devices, *, said_meanwhile: int) -> None:
    """What was written while there was no server is admitted, and the chain holds everywhere."""
    views = []
    for device in devices.both:
        await until(device, lambda d=device: is_settled(d.document, said_meanwhile))  # type: ignore[misc]
        device.look(None)
        tree = device.document.tree
        views.append((device.path(), tree.tips()))
        for tip in tree.tips():
            path = tree.path(tip)
            problems = [verdict.problem for verdict in verify_path(device.document, path)]
            assert problems == [None] * len(path)
    assert views[0] == views[1]
    stored = server.stored(devices.phone.id)
    assert stored.view() == devices.phone.path()
    for name in stored.tree.entries:
        assert stored.entry(name) == devices.phone.entry(name) == devices.laptop.entry(name)


def is_settled(document: Conversation, said_meanwhile: int) -> bool:
    texts = [document.text(entry) for entry in document.tree.entries]
    return not document.tree.pending and texts.count("is anybody there?") == said_meanwhile


def exactly(tokens: int, temperature: float) -> Sampling:
    """The same reply each time, and no shorter."""
    return {"max_tokens": tokens, "temperature": temperature, "seed": 7, "ignore_eos": True}


@pytest.mark.parametrize("temperature", [0.0, 0.7])
async def test_many_kills_within_one_reply_change_no_token(
    tiny_server: ServedProcess, tmp_path: Path, temperature: float
) -> None:
    sampling = exactly(TINY_TOKENS, temperature)
    seed = int(temperature * 10)
    await check_kills_change_no_token(tiny_server, tmp_path, sampling, kills=KILLS, seed=seed)


@pytest.mark.real_model
@pytest.mark.parametrize("temperature", [0.0, 0.7])
async def test_a_kill_changes_no_word_of_the_real_model(
    real_server: ServedProcess, tmp_path: Path, temperature: float
) -> None:
    sampling = exactly(REAL_TOKENS, temperature)
    seed = int(temperature * 10)
    await check_kills_change_no_token(real_server, tmp_path, sampling, kills=1, seed=seed)


@pytest.mark.real_model
async def test_two_devices_chat_with_the_real_model(
    real_server: ServedProcess, tmp_path: Path
) -> None:
    async with two_devices(real_server, tmp_path) as devices:
        phone, laptop = devices.both
        replies: list[Entry] = []
        for device, text in (
            (phone, "What is the capital of France? Answer in one sentence."),
            (laptop, "And of Italy?"),
        ):
            reply = await device.ask(text, temperature=0.0, max_tokens=40)
            heard = "".join([delta async for delta in reply])
            entry = await reply.entry()
            assert entry.state is State.DONE
            assert heard == entry.content
            for other in devices.both:
                await until(other, lambda o=other, r=reply: o.reply(r.id).ended)  # type: ignore[misc]
                assert other.entry(reply.id) == entry
            replies.append(entry)
        assert "Paris" in replies[0].content
        assert "Rome" in replies[1].content
        first, second = (reply.usage for reply in replies)
        assert first is not None
        assert second is not None
        assert second.reused == first.prompt + first.sampled - 1
        await check_all_agree(real_server, devices, said_meanwhile=0)
