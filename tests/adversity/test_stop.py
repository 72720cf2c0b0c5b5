"""A stop is felt within two decode steps of the moment at which it is durable.

Everything is as `serve` runs it, but in this process, so that the moment can be seen. A loaded
machine may give the engine's process any number of steps while this one waits for its turn, which
says nothing of what is to be shown. So the engine's process is held at the moment of the commit and
let go when the stop is on its way to it: what it samples then is what a stop costs. The stop lies
in its pipe by then, and it looks there after every step, so the load has no part in the answer.
"""

from __future__ import annotations

import os
import signal
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import pytest
from adversity.serving import sampled

from crdt_llm import Client
from crdt_llm.cli.embedded_node import make_node
from crdt_llm.cli.folders import DataFolder
from crdt_llm.document.conversation import Conversation
from crdt_llm.document.keys import SigningKey
from crdt_llm.document.schema import State
from crdt_llm.inference.contract import Sampled
from crdt_llm.inference.engine import pipe
from crdt_llm.inference.engine.process import EngineProcess
from crdt_llm.store.sqlite import SqliteLog
from crdt_llm.sync.relay.access import TokenAccess
from crdt_llm.sync.relay.hub import Hub
from crdt_llm.sync.relay.leases import LeaseOffice
from crdt_llm.sync.relay.native_peer import RelayIdentity
from crdt_llm.sync.relay.server import Relay

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

DECODE_STEPS_MAX = 2


@dataclass(slots=True)
class Counter:
    """Counts the tokens that the engine's process reports, whoever still wants to hear of them."""

    tokens: int = 0

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        hand_on = EngineProcess._hand_on

        def count(engine: EngineProcess, report: pipe.Report) -> None:
            if isinstance(report, pipe.Event) and isinstance(report.event, Sampled):
                self.tokens += 1
            hand_on(engine, report)

        monkeypatch.setattr(EngineProcess, "_hand_on", count)


@asynccontextmanager
async def serving(
    folder: DataFolder, model_dir: Path
) -> AsyncIterator[tuple[Hub, EngineProcess, Client]]:
    """Relay, node and engine on one data folder, and a device."""
    # Each token is told as soon as it is sampled, so that those can be counted which came later.
    engine = await EngineProcess.start(model_dir, threads=1, tokens_wait_s=0)
    folder.path.mkdir()
    async with await SqliteLog.open(folder.log) as log:
        hub = Hub(log)
        office = LeaseOffice(hub.grant_epoch, SigningKey(bytes(32)).sign, clock=time.monotonic)
        node = make_node(folder, hub, model_dir, office)

        async def start_engine() -> EngineProcess:
            return engine

        node.surroundings = replace(node.surroundings, start_engine=start_engine)
        relay = Relay(
            hub,
            authenticate=TokenAccess("token").authenticate,
            identity=RelayIdentity(bytes(32), log.log_id),
        )
        await relay.start()
        await node.start()
        hub.subscribe(node.notice)
        try:
            url = f"http://127.0.0.1:{relay.address[1]}/"
            async with Client(url, token="token") as client:  # noqa: S106 - the test's own
                yield hub, engine, client
        finally:
            await node.close()
            await relay.stop()


async def stop_a_reply(
    tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    counter = Counter()
    counter.install(monkeypatch)
    folder = DataFolder(tmp_path / "data")
    async with serving(folder, model_dir) as (hub, engine, client):
        conversation = await client.create()
        reply = await conversation.ask(text, max_tokens=1500, temperature=0.0, ignore_eos=True)
        await sampled(conversation, reply.id, chunks=2)
        witness = Conversation(1)
        held = False

        def hear(update: bytes) -> None:
            """Called with what others wrote, when it is durable."""
            nonlocal held
            witness.apply(update)
            if witness.has(reply.id, "stop") and not held:
                held = True
                os.kill(engine.process_id, signal.SIGSTOP)
                os.waitid(os.P_PID, engine.process_id, os.WSTOPPED)

        member = await hub.join(conversation.id, "owner", deliver=hear)
        witness.apply(member.state)
        assert not witness.has(reply.id, "stop")
        try:
            await conversation.stop()
            entry = await reply.entry()  # it ends though the engine cannot say a word
        finally:
            os.kill(engine.process_id, signal.SIGCONT)
        assert held
        assert entry.state is State.STOPPED
        assert entry.usage is not None
        before = counter.tokens  # all that was sampled before the stop was durable
        assert 0 < (entry.usage.sampled or 0) <= before < 1500
        measured = await engine.measure()  # its answer comes behind all that was sampled
        assert measured.requests == 0
        assert counter.tokens - before <= DECODE_STEPS_MAX
        assert conversation.entry(reply.id).content == entry.content
        again = await conversation.ask("and now?", max_tokens=4, temperature=0.0)
        assert (await again.entry()).state is State.DONE


async def test_a_stop_is_felt_within_two_decode_steps(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In torch's operations: with native kernels a tiny model would be at the end of its positions
    # before anybody can stop it.
    monkeypatch.setenv("CXX", "no-compiler")
    await stop_a_reply(tmp_path, tiny_model_dir, monkeypatch, "a long story")


@pytest.mark.real_model
async def test_a_stop_is_felt_within_two_decode_steps_of_the_default_model(
    tmp_path: Path, real_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await stop_a_reply(tmp_path, real_model_dir, monkeypatch, "Tell me a long story.")
