"""What a turn costs, on the wired stack with real sockets: bytes sent and rows of prefill."""

from __future__ import annotations

import time
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, Self

import pytest
import pytest_asyncio
import tiny_model

from crdt_llm import Client
from crdt_llm.cli.embedded_node import make_node
from crdt_llm.cli.folders import DataFolder
from crdt_llm.document.keys import SigningKey, load_or_create_secret
from crdt_llm.document.schema import State
from crdt_llm.inference.contract import Prefilled, Sampled
from crdt_llm.inference.engine.process import EngineProcess
from crdt_llm.inference.node import generation
from crdt_llm.inference.prompt.renderer import ParentTail
from crdt_llm.store.register import SqliteRegister
from crdt_llm.store.sqlite import SqliteLog
from crdt_llm.sync.relay.access import TokenAccess, load_or_create_token
from crdt_llm.sync.relay.hub import Hub
from crdt_llm.sync.relay.leases import LeaseOffice
from crdt_llm.sync.relay.native_peer import RelayIdentity
from crdt_llm.sync.relay.server import Relay

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
    from pathlib import Path

    from crdt_llm.document.schema import Entry
    from crdt_llm.inference.contract import Capabilities, Engine, GenerationEvent, SamplingParams
    from crdt_llm.inference.node.node import Node
    from crdt_llm.sync.client.client import OpenConversation, Reply, Sampling

pytestmark = pytest.mark.asyncio(loop_scope="module")

POSITIONS: Final = 8192  # 300 entries of a few tokens each need more than the tiny model's 2,048
TURN_BYTES_MAX: Final = 600
BYTES_A_BYTE_OF_TEXT_MAX: Final = 1.2
GREEDY: Final[Sampling] = {"max_tokens": 12, "temperature": 0.0, "ignore_eos": True}


@dataclass
class CountedEngine:
    """A lent engine process that counts the rows it computes; it outlives the node."""

    process: EngineProcess
    prefilled: int = 0
    sampled: int = 0
    capabilities: Capabilities = field(init=False)

    def __post_init__(self) -> None:
        self.capabilities = self.process.capabilities

    async def warm(self, ids: Sequence[int]) -> Prefilled:
        done = await self.process.warm(ids)
        self.prefilled += done.prefilled
        return done

    async def generate(
        self, ids: Sequence[int], params: SamplingParams, start: int
    ) -> AsyncGenerator[GenerationEvent, None]:
        async with aclosing(self.process.generate(ids, params, start)) as events:
            async for event in events:
                match event:
                    case Prefilled(_, _, computed):
                        self.prefilled += computed
                    case Sampled():
                        self.sampled += 1
                    case _:
                        pass
                yield event

    async def forget(self, ids: Sequence[int], keep: int = 0) -> None:
        await self.process.forget(ids, keep)

    async def close(self) -> None:
        """It was only lent."""


class Stack:
    """Relay, log and node as ``serve`` wires them, in this process."""

    def __init__(self, folder: Path, model_dir: Path, process: EngineProcess) -> None:
        self.folder = DataFolder(folder / "data")
        self.folder.path.mkdir()
        self.engine = CountedEngine(process)
        self._model_dir = model_dir
        self._exit = AsyncExitStack()
        self._unsubscribe: Callable[[], None]
        self.hub: Hub
        self.office: LeaseOffice
        self.node: Node
        self.url = ""

    async def __aenter__(self) -> Self:
        self.token = load_or_create_token(self.folder.token)
        log = await SqliteLog.open(self.folder.log)
        self._exit.push_async_callback(log.close)
        register = await SqliteRegister.open(self.folder.register)
        self._exit.push_async_callback(register.close)
        relay_key = SigningKey(load_or_create_secret(self.folder.key("relay")))
        self.hub = Hub(log, register=register, relay_key=relay_key.public)
        self.office = LeaseOffice(self.hub.grant_epoch, relay_key.sign, clock=time.monotonic)
        self._exit.push_async_callback(self.office.close)
        relay = Relay(
            self.hub,
            authenticate=TokenAccess(self.token).authenticate,
            identity=RelayIdentity(relay_key.public, log.log_id),
        )
        await relay.start("127.0.0.1", 0)
        self._exit.push_async_callback(relay.stop)
        host, port = relay.address
        self.url = f"ws://{host}:{port}/"
        await self.start_node()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop_node()
        await self._exit.aclose()

    async def start_node(self) -> None:
        self.node = make_node(self.folder, self.hub, self._model_dir, self.office)
        await self.forget_everything()

        async def lend() -> Engine:
            return self.engine

        self.node.surroundings = replace(self.node.surroundings, start_engine=lend)
        await self.node.start()
        self._unsubscribe = self.hub.subscribe(self.node.notice)
        for stored in await self.hub.conversations():
            await self.node.visit(stored.conversation)

    async def stop_node(self) -> None:
        self._unsubscribe()
        await self.node.close()

    async def forget_everything(self) -> None:
        """A new engine has an empty cache; every conversation begins with the same token."""
        beginning = self.node.renderer.segment(
            role="user", content="", is_root=True, root_at_ms=0, parent=ParentTail()
        )
        await self.engine.forget(beginning[:1])

    def client(self, name: str) -> Client:
        return Client(self.url, token=self.token, device=name)


@pytest.fixture(scope="module")
def long_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with more positions."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_model, "POSITIONS", POSITIONS)
        return tiny_model.build_tiny_model(tmp_path_factory.mktemp("long") / "tiny-long-model")


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def process(long_model_dir: Path) -> AsyncIterator[EngineProcess]:
    async with await EngineProcess.start(long_model_dir, threads=1) as process:
        yield process


@pytest_asyncio.fixture(loop_scope="module")
async def stack(
    tmp_path: Path, long_model_dir: Path, process: EngineProcess
) -> AsyncIterator[Stack]:
    async with Stack(tmp_path, long_model_dir, process) as stack:
        yield stack


@asynccontextmanager
async def two_devices(stack: Stack) -> AsyncIterator[tuple[OpenConversation, OpenConversation]]:
    async with stack.client("phone") as phone, stack.client("laptop") as laptop:
        first = await phone.create()
        await first.synced_once()
        second = await laptop.open(first.id)
        await second.synced_once()
        yield first, second


async def until(conversation: OpenConversation, holds: Callable[[], bool]) -> None:
    feed = conversation.changes()
    while not holds():
        await conversation.next_of(feed, lambda _: True)


async def admitted(conversation: OpenConversation, entry: str) -> None:
    await until(conversation, lambda: conversation.document.tree.is_admitted(entry))


async def done(reply: Reply) -> Entry:
    entry = await reply.entry()
    assert entry.state is State.DONE
    return entry


def known_after(reply: Entry) -> int:
    """Tokens whose KV is there when a reply has ended: all but the last one, at least."""
    assert reply.usage is not None
    return reply.usage.prompt + reply.usage.sampled - 1


def prefilled_again(reply: Entry, before: Entry) -> int:
    """Tokens that were known when the earlier reply on the path ended, and were computed again."""
    assert reply.usage is not None
    return known_after(before) - reply.usage.reused


# -- bytes ---------------------------------------------------------------------------------------


def sent(conversation: OpenConversation) -> int:
    """Everything that a device has sent: entries, presence, and the frames around them."""
    traffic = conversation.traffic
    return traffic.live.sent_bytes + traffic.sync.sent_bytes


async def bytes_of_a_turn(stack: Stack, text: str, *, entries: int) -> tuple[int, int]:
    """What the phone sends for a turn behind so many entries: all of it, and without presence."""
    async with two_devices(stack) as (phone, laptop):
        for number in range(entries):
            last = await (phone, laptop)[number % 2].send(f"{number:03}")
        for device in (phone, laptop):
            await until(device, lambda d=device: len(d.path()) == entries)  # type: ignore[misc]
        await admitted(phone, last)
        all_before, live_before = sent(phone), phone.traffic.live.sent_bytes
        await done(await phone.ask(text, **GREEDY))
        return sent(phone) - all_before, phone.traffic.live.sent_bytes - live_before


@pytest.mark.parametrize("text", ["?", "é🧀 and so on, " * 100])
async def test_a_turn_costs_the_same_bytes_in_a_short_and_a_long_conversation(
    stack: Stack, text: str
) -> None:
    short, short_live = await bytes_of_a_turn(stack, text, entries=5)
    long, long_live = await bytes_of_a_turn(stack, text, entries=300)
    limit = TURN_BYTES_MAX + BYTES_A_BYTE_OF_TEXT_MAX * len(text.encode())
    assert max(short, long) < limit
    # Numbers grow with what they count: clocks and the like, by a byte or two each.
    assert abs(long_live - short_live) <= 16


# -- prefill -------------------------------------------------------------------------------------


async def test_an_appended_turn_prefills_nothing_again(stack: Stack) -> None:
    async with two_devices(stack) as devices:
        before = await done(await devices[0].ask("a question", **GREEDY))
        for number in range(1, 6):
            device, other = devices[number % 2], devices[(number + 1) % 2]
            await until(device, lambda d=device, b=before: d.reply(b.id).ended)  # type: ignore[misc]
            reply = await done(await device.ask(f"question {number}", **GREEDY))
            assert prefilled_again(reply, before) == 0
            await until(other, lambda o=other, r=reply: o.reply(r.id).ended)  # type: ignore[misc]
            before = reply


async def test_an_offline_merge_prefills_nothing_again(stack: Stack) -> None:
    async with two_devices(stack) as (phone, laptop):
        first = await done(await phone.ask("a question", **GREEDY))
        await until(laptop, lambda: laptop.reply(first.id).ended)
        laptop.pause()
        for number in range(3):
            await laptop.send(f"written on a train, {number}")
        offline = await laptop.ask("and asked on a train", **GREEDY)
        second = await done(await phone.ask("meanwhile", **GREEDY))
        assert prefilled_again(second, first) == 0
        laptop.resume()
        third = await done(offline)
        assert prefilled_again(third, second) == 0
        path = phone.document.tree.path(third.id)
        assert path.index(second.id) < path.index(third.id)
        fourth = await done(await laptop.ask("and on", **GREEDY))
        assert prefilled_again(fourth, third) == 0


async def test_every_token_of_a_conversation_is_computed_once(stack: Stack) -> None:
    """What the engine says, and not what the node charges: the sum over a whole conversation."""
    async with two_devices(stack) as (phone, _):
        computed, last = stack.engine.prefilled, None
        for number in range(4):
            last = await done(await phone.ask(f"question {number}", **GREEDY))
        assert last is not None
        assert last.usage is not None
        sampled_before = 3 * int(GREEDY["max_tokens"])
        # A reply's last token may be computed with its reply or with what follows it.
        least = last.usage.prompt - sampled_before
        assert least <= stack.engine.prefilled - computed <= least + 3


async def test_a_new_node_replays_the_path_exactly_once(stack: Stack) -> None:
    async with two_devices(stack) as (phone, _):
        await done(await phone.ask("a question", **GREEDY))
        before = await done(await phone.ask("another", **GREEDY))
        await stack.stop_node()
        await stack.start_node()
        computed = stack.engine.prefilled
        after = await done(await phone.ask("and now?", **GREEDY))
        assert after.usage is not None
        assert after.usage.prefilled == after.usage.prompt > known_after(before)
        assert stack.engine.prefilled - computed == after.usage.prompt
        later = await done(await phone.ask("and then?", **GREEDY))
        assert prefilled_again(later, after) == 0


async def test_a_new_node_replays_a_reply_that_was_cut_exactly_once(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "window_s", lambda _: 0.0)
    sampling: Sampling = {"max_tokens": 1200, "temperature": 0.7, "ignore_eos": True}
    async with two_devices(stack) as (phone, _):
        reply = await phone.ask("a long story", **sampling)
        await until(phone, lambda: len(phone.entry(reply.id).sealed) > 2)
        await stack.stop_node()
        cut = stack.engine.sampled
        computed = stack.engine.prefilled
        await stack.start_node()
        ended = await done(reply)
        assert ended.usage is not None
        assert ended.usage.sampled == 1200
        assert ended.usage.prefilled == ended.usage.prompt
        again = stack.engine.sampled - cut  # tokens that the second node sampled
        assert stack.engine.prefilled - computed == ended.usage.prompt + 1200 - again
