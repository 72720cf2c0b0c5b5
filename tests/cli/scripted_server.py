"""What ``serve`` runs, in the test's own process, with an engine that says what it is told.

Relay, rooms, store, keys and node are the real ones; only the numbers are not computed. The model
folder has a tokenizer and a template, but no weights.
"""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Self

from chat_folders import FORMATS

from crdt_llm.cli.embedded_node import make_node
from crdt_llm.cli.folders import DataFolder
from crdt_llm.document.keys import SigningKey, load_or_create_secret
from crdt_llm.errors import PromptTooLong
from crdt_llm.inference.contract import Capabilities, Finished, Prefilled, Sampled
from crdt_llm.inference.prompt.tokens import Vocabulary
from crdt_llm.store.register import SqliteRegister
from crdt_llm.store.sqlite import SqliteLog
from crdt_llm.sync.client.client import Client
from crdt_llm.sync.relay.access import Pass, TokenAccess, load_or_create_token
from crdt_llm.sync.relay.hub import Hub
from crdt_llm.sync.relay.leases import LeaseOffice
from crdt_llm.sync.relay.native_peer import RelayIdentity
from crdt_llm.sync.relay.server import Relay

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence
    from pathlib import Path

    from crdt_llm.cli.connection import Door
    from crdt_llm.inference.contract import Engine, GenerationEvent, SamplingParams
    from crdt_llm.inference.node.node import Node

FORMAT = FORMATS["thinking"]
NODE_TOKEN = "a-node's-token"  # noqa: S105 - of this server alone
NODE_PASS = Pass("node", node=True)
FAIL = "fail"
"""A script that makes a reply fail."""


@dataclass(slots=True)
class ScriptedEngine:
    """Says its lines one after the other, then the last one for ever.

    Attributes:
        lines: what it says.
        go: cleared, a reply stops in the middle of its line until it is set.
        asked: the parameters of every reply.
    """

    vocabulary: Vocabulary
    end: int
    lines: list[str]
    go: asyncio.Event = field(default_factory=asyncio.Event)
    asked: list[SamplingParams] = field(default_factory=list)

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities("scripted", 1, 100_000, 1 << 20, "none")

    async def warm(self, ids: Sequence[int]) -> Prefilled:
        return Prefilled(len(ids), 0, len(ids))

    async def generate(
        self, ids: Sequence[int], params: SamplingParams, start: int
    ) -> AsyncGenerator[GenerationEvent, None]:
        self.asked.append(params)
        line = self.lines.pop(0) if len(self.lines) > 1 else self.lines[0]
        if line == FAIL:
            raise PromptTooLong("the script says so")
        said = [*self.vocabulary.encode_text(line), self.end]
        yield Prefilled(len(ids), 0, len(ids))
        for number, token in enumerate(said[len(ids) - start :], start=len(ids) - start):
            if number == params.max_tokens:
                yield Finished("length")
                return
            if number == len(said) // 2:
                await self.go.wait()
            yield Sampled(token, -0.5)
        yield Finished("end")

    async def forget(self, ids: Sequence[int], keep: int = 0) -> None:
        """It remembers nothing."""

    async def close(self) -> None:
        """It holds nothing."""


def _add_weights(model_dir: Path) -> None:
    """One number, so that the folder is complete: nothing here computes with it."""
    header = json.dumps({"one": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    file = len(header).to_bytes(8, "little") + header + bytes(4)
    (model_dir / "model.safetensors").write_bytes(file)


@dataclass(slots=True)
class Server:
    """A server on a folder; as a context it runs, and it can be stopped and started in between."""

    root: Path
    lines: list[str]
    with_node: bool = True
    folder: DataFolder = field(init=False)
    model_dir: Path = field(init=False)
    engine: ScriptedEngine = field(init=False)
    node: Node = field(init=False)
    port: int = 0  # a free one; after a restart the same
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    _stack: AsyncExitStack = field(init=False)

    def __post_init__(self) -> None:
        self.folder = DataFolder(self.root / "data")
        self.model_dir = FORMAT.build(self.root / "model")
        _add_weights(self.model_dir)
        vocabulary = Vocabulary.load(self.model_dir)
        end = vocabulary.encode_control(FORMAT.eos)[0]
        self.engine = ScriptedEngine(vocabulary, end, self.lines)
        self.engine.go.set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def device(self, name: str, door: Door) -> Client:
        """A device of this machine, which reaches the server by a door."""
        return Client(
            self.url,
            data=self.folder.device(name),
            device=name,
            token=door.token,
            dial=door.dial,
        )

    async def start(self) -> None:
        self._stack = AsyncExitStack()
        self.folder.path.mkdir(parents=True, exist_ok=True)
        token = load_or_create_token(self.folder.token)
        log = await SqliteLog.open(self.folder.log)
        self._stack.push_async_callback(log.close)
        register = await SqliteRegister.open(self.folder.register)
        self._stack.push_async_callback(register.close)
        relay_key = SigningKey(load_or_create_secret(self.folder.key("relay")))
        hub = Hub(log, register=register, relay_key=relay_key.public)
        office = LeaseOffice(hub.grant_epoch, relay_key.sign, clock=time.monotonic)
        hub.subscribe(lambda _: self.changed.set())
        access = TokenAccess(token).authenticate
        relay = Relay(
            hub,
            authenticate=lambda shown: NODE_PASS if shown == NODE_TOKEN else access(shown),
            identity=RelayIdentity(relay_key.public, log.log_id),
            leases=office,
        )
        self._stack.push_async_callback(relay.stop)
        if self.with_node:
            await self._start_node(hub, office)
        await relay.start("127.0.0.1", self.port)
        self.port = relay.address[1]

    async def _start_node(self, hub: Hub, office: LeaseOffice) -> None:
        async def start_engine() -> Engine:
            return self.engine

        node = make_node(self.folder, hub, self.model_dir, office)
        node.surroundings = replace(node.surroundings, start_engine=start_engine)
        self.node = node
        await node.start()
        self._stack.push_async_callback(node.close)
        hub.subscribe(node.notice)
        for stored in await hub.conversations():
            await node.visit(stored.conversation)

    async def stop(self) -> None:
        await self._stack.aclose()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()
