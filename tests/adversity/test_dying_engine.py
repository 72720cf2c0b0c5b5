"""The engine's process is killed under a real server's hands."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, Any

from adversity.serving import LONG, SHORT, sampled

from crdt_llm.document.schema import State

if TYPE_CHECKING:
    from adversity.serving import Serving

    from crdt_llm.sync.client.client import OpenConversation

VERY_LONG: dict[str, Any] = LONG | {"max_tokens": 800}


async def text_undisturbed(serving: Serving, text: str, params: dict[str, Any]) -> str:
    async with serving.client("undisturbed") as client:
        conversation = await client.create()
        return await (await conversation.ask(text, **params)).text()


async def test_a_reply_goes_on_where_its_engine_was_killed_and_ends_as_it_would_have(
    serving: Serving,
) -> None:
    params = LONG | {"max_tokens": 200, "temperature": 0.8, "seed": 11}
    expected = await text_undisturbed(serving, "a long story", params)
    async with serving.client() as client:
        conversation = await client.create()
        reply = await conversation.ask("a long story", **params)
        assert not (await sampled(conversation, reply.id)).ended
        (killed,) = serving.workers
        os.kill(killed, signal.SIGKILL)
        entry = await reply.entry()
        assert entry.state is State.DONE
        assert entry.content == expected
        assert killed not in serving.workers


async def kill_whenever_it_grows(
    serving: Serving, conversation: OpenConversation, slot: str
) -> int:
    """Kill the engine whenever it has added to a reply, until the reply ends; how often it was."""
    killed: set[int] = set()
    chunks = 1
    while True:
        entry = await sampled(conversation, slot, chunks)
        if entry.ended:
            return len(killed)
        chunks = len(entry.sealed) + 1
        for worker in serving.workers:  # none, if this was the last word of a killed one
            if worker not in killed:
                os.kill(worker, signal.SIGKILL)
                killed.add(worker)


async def test_a_reply_that_its_engine_dies_of_fails_alone(serving: Serving) -> None:
    """Both are at work when it dies first, and nobody can tell of which one it died."""
    async with serving.client() as client:
        guilty, innocent = await client.create(), await client.create()
        params = LONG | {"max_tokens": 150}
        other = await innocent.ask("a long story", **params)
        deadly = await guilty.ask("a deadly story", **VERY_LONG)
        assert await kill_whenever_it_grows(serving, guilty, deadly.id) == 3
        entry = await deadly.entry()
        assert entry.state is State.FAILED
        assert entry.usage is not None
        assert entry.usage.error_code == "engine-died"
        assert "engine died" in (entry.usage.error_message or "")
        assert entry.content  # what it got to stays
        spared = await other.entry()
        assert (spared.state, spared.usage and spared.usage.sampled) == (State.DONE, 150)
        assert spared.content == await text_undisturbed(serving, "a long story", params)
        after = await (await guilty.ask("and now?", **SHORT)).entry()
        assert after.state is State.DONE
        assert after.place is not None
        assert after.place.parent in guilty.path()
        assert deadly.id in guilty.path()
    assert "died" in serving.errors
