"""How replies are stopped, and how they go on after whatever stopped them died."""

from __future__ import annotations

import asyncio
import os
import signal
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from lent_engine import assert_text_is_of_its_ids, forget_all, hidden_of, running
from local_room import LocalRoom, make_node

from crdt_llm.document.chain import verify_path
from crdt_llm.document.conversation import Conversation
from crdt_llm.document.schema import Params, State
from crdt_llm.errors import EngineDied
from crdt_llm.inference.contract import Capabilities
from crdt_llm.inference.engine.process import EngineProcess
from crdt_llm.inference.node import generation, replies

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


pytestmark = pytest.mark.asyncio(loop_scope="module")

GREEDY = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True}


async def test_what_hidden_fields_are_written_in_is_kept_for_the_next_turn_and_no_longer(
    tiny_model_dir: Path, engine: EngineProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    released = asyncio.Event()
    make, release = Conversation._second, Conversation.release_seal

    def second(self: Conversation) -> Any:
        made.append("made")
        return make(self)

    def let_go(self: Conversation) -> None:
        release(self)
        released.set()

    monkeypatch.setattr(Conversation, "_second", second)
    monkeypatch.setattr(Conversation, "release_seal", let_go)
    room = LocalRoom()
    async with running(room, tiny_model_dir, engine):
        for text in ("hello", "and then?", "go on"):
            await room.ended(room.ask(text, **GREEDY))
        assert made == ["made"]
        monkeypatch.setattr(replies, "SEAL_KEPT_S", 0.0)
        await room.ended(room.ask("that is all", **GREEDY))
        async with asyncio.timeout(10):
            await released.wait()
        await room.ended(room.ask("one thing more", **GREEDY))
        assert made == ["made", "made"]


async def test_stop_ends_a_reply_with_what_it_has(
    tiny_model_dir: Path, engine: EngineProcess
) -> None:
    room = LocalRoom()
    async with running(room, tiny_model_dir, engine) as node:
        slot = room.ask("tell me everything", temperature=0.0, max_tokens=1500, ignore_eos=True)
        await room.until(lambda: bool(room.replica.entry(slot).sealed))  # type: ignore[union-attr]
        room.set(slot, "stop", "owner")
        reply = await room.ended(slot)
        assert reply.state is State.STOPPED
        assert reply.usage is not None
        assert 0 < reply.usage.sampled < 1500
        assert_text_is_of_its_ids(room, node, reply)
        after = await room.ended(room.ask("and now?", **GREEDY))
        assert after.place is not None
        assert after.state is State.DONE


async def test_stop_ends_a_reply_while_there_is_no_engine(tiny_model_dir: Path) -> None:
    """I2 needs no engine: the first one dies before it made a token, the second never starts."""
    room, engines = LocalRoom(), [NoEngine(dies=True)]
    never = asyncio.Event()

    async def start() -> NoEngine:
        if not engines:
            await never.wait()
        return engines.pop()

    node = make_node(room, tiny_model_dir, start)
    await node.start()
    node.notice(room.id)
    try:
        slot = room.ask("hello", **GREEDY)
        await room.until(lambda: room.replica.state(slot) is State.STREAMING)
        room.set(slot, "stop", "owner")
        reply = await room.ended(slot)
        assert reply.state is State.STOPPED
        assert reply.proof is not None
    finally:
        await node.close()


class NoEngine:
    """An engine whose process ends whenever it is asked for anything."""

    def __init__(self, *, dies: bool) -> None:
        assert dies
        self.capabilities = Capabilities("none", 2, 2048, 1000, "none")

    async def warm(self, _ids: object) -> None:
        raise EngineDied("gone")

    async def generate(self, *_: object) -> AsyncIterator[None]:
        nothing: tuple[None, ...] = ()
        for one in nothing:
            yield one
        raise EngineDied("gone")

    async def close(self) -> None:
        """Nothing is open."""


async def test_redaction_stops_a_reply_and_hides_it_from_the_model(
    tiny_model_dir: Path, engine: EngineProcess
) -> None:
    room = LocalRoom()
    async with running(room, tiny_model_dir, engine):
        slot = room.ask("a secret", temperature=0.0, max_tokens=1500, ignore_eos=True)
        await room.until(lambda: bool(room.replica.entry(slot).sealed))  # type: ignore[union-attr]
        since = room.replica.state_vector()
        entries = room.replica._roots["entries"]
        with room.replica.writing() as writer:
            writer.set(slot, "redacted", {"by": "owner", "at": 1})
            for key in ("content", "sealed"):
                del entries[slot][key]
        room._tell(room.replica, since)
        reply = await room.ended(slot)
        assert reply.state is State.STOPPED
        assert (reply.content, reply.sealed, reply.salt) == ("", (), None)
        assert [v.problem for v in verify_path(room.replica, room.replica.view())] == [None, None]
        assert (await room.ended(room.ask("next", **GREEDY))).state is State.DONE


async def test_extend_goes_on_where_the_reply_was_cut(
    tiny_model_dir: Path, engine: EngineProcess
) -> None:
    room, whole = LocalRoom(), LocalRoom()
    async with running(room, tiny_model_dir, engine) as node:
        params = {"temperature": 0.0, "ignore_eos": True}
        cut = await room.ended(room.ask("hello", max_tokens=6, **params))
        more = room.write(None, after=cut.id, params=Params(max_tokens=6, extend=True, **params))  # type: ignore[arg-type]
        rest = await room.ended(more)
        first, second = hidden_of(room, node, cut), hidden_of(room, node, rest)
        assert second.injected == ()
    async with running(whole, tiny_model_dir, engine) as node:
        reply = await whole.ended(whole.ask("hello", max_tokens=12, **params))
        assert hidden_of(whole, node, reply).sampled == first.sampled + second.sampled


def is_sealed_in(room: LocalRoom, slot: str) -> bool:
    entry = room.replica.entry(slot)
    return entry is not None and bool(entry.sealed)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
async def test_a_killed_engine_changes_no_token(tiny_model_dir: Path, temperature: float) -> None:
    params = {"temperature": temperature, "max_tokens": 60, "seed": 5, "ignore_eos": True}
    texts = []
    for kill in (False, True):
        room = LocalRoom()
        async with running(room, tiny_model_dir) as node:
            slot = room.ask("a long story", **params)
            await room.until(partial(is_sealed_in, room, slot))
            if kill:
                assert isinstance(node.engine, EngineProcess)
                os.kill(node.engine.process_id, signal.SIGKILL)
            reply = await room.ended(slot)
            assert reply.state is State.DONE
            assert_text_is_of_its_ids(room, node, reply)
            texts.append(hidden_of(room, node, reply).sampled)
    assert texts[0] == texts[1]


async def test_a_new_node_goes_on_at_the_token_where_the_old_one_stopped(
    tiny_model_dir: Path, engine: EngineProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Written often, and long enough that it is still being written after a second time.
    monkeypatch.setattr(generation, "window_s", lambda _: 0.0)
    params = {"temperature": 0.7, "max_tokens": 1500, "seed": 3, "ignore_eos": True}
    alone = LocalRoom()
    async with running(alone, tiny_model_dir, engine) as node:
        reply = await alone.ended(alone.ask("a long story", **params))
        expected = hidden_of(alone, node, reply).sampled
    room = LocalRoom()
    slot = room.ask("a long story", **params)
    async with running(room, tiny_model_dir, engine):
        await room.until(lambda: len(room.replica.entry(slot).sealed) > 1)  # type: ignore[union-attr]
    assert room.replica.state(slot) is State.STREAMING
    await forget_all(engine, tiny_model_dir)
    async with running(room, tiny_model_dir, engine) as node:
        reply = await room.ended(slot)
        assert hidden_of(room, node, reply).sampled == expected
        assert reply.usage is not None
        assert reply.usage.prefilled == reply.usage.prompt  # one replay, and nothing more
