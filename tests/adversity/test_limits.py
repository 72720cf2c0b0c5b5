"""Too much of everything: it fails clearly where it must, and holds where it says so."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from adversity.serving import SHORT, known_to_the_relay
from tiny_model import POSITIONS

from crdt_llm.document.schema import TEXT_BYTES_MAX, State
from crdt_llm.errors import LocalMisuse, ReplyFailed

if TYPE_CHECKING:
    from adversity.serving import Serving

GREEDY: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}
CONVERSATIONS = 200


async def test_a_prompt_longer_than_the_model_s_positions_fails_and_a_fork_goes_on(
    serving: Serving,
) -> None:
    async with serving.client() as client:
        conversation = await client.create()
        first = await (await conversation.ask("hello", **SHORT)).entry()
        reply = await conversation.ask("word " * POSITIONS, **SHORT)
        with pytest.raises(ReplyFailed, match=f"{POSITIONS} ") as failed:
            await reply.text()
        assert failed.value.code == "context-full"
        assert "\n" not in failed.value.reason
        entry = await reply.entry()
        assert entry.place is None
        again = await conversation.ask("short, but behind it", **SHORT)
        assert (await again.entry()).state is State.FAILED
        other = await conversation.fork(conversation.path()[0], "hello again", **SHORT)
        assert (await other.entry()).state is State.DONE
        assert first.state is State.DONE


async def test_more_tokens_than_positions_end_with_the_context(serving: Serving) -> None:
    async with serving.client() as client:
        conversation = await client.create()
        reply = await conversation.ask("word " * 350, max_tokens=1_000_000, **GREEDY)
        entry = await reply.entry()
        assert entry.state is State.DONE
        assert entry.usage is not None
        assert entry.usage.finish == "context"
        assert (entry.usage.prompt or 0) + (entry.usage.sampled or 0) == POSITIONS
        behind = await (await conversation.ask("go on", **SHORT)).entry()
        assert behind.usage is not None
        assert (behind.state, behind.usage.error_code) == (State.FAILED, "context-full")


async def test_a_stop_string_that_never_comes_costs_nothing(serving: Serving) -> None:
    never = ("\u2603 no model says this \u2603" * 3)[:64]
    async with serving.client() as client:
        one, two = await client.create(), await client.create()
        plain = await (await one.ask("hello", max_tokens=40, **GREEDY)).entry()
        watched = await (await two.ask("hello", max_tokens=40, stop=[never], **GREEDY)).entry()
        assert watched.content == plain.content
        assert watched.usage is not None
        assert (watched.usage.finish, watched.usage.sampled) == ("length", 40)


async def test_the_largest_entry_is_taken_and_a_larger_one_is_not(serving: Serving) -> None:
    largest = "x" * TEXT_BYTES_MAX
    async with serving.client() as client:
        conversation = await client.create()
        with pytest.raises(LocalMisuse, match=str(TEXT_BYTES_MAX)):
            await conversation.send(largest + "x")
        reply = await conversation.ask(largest, **SHORT)
        with pytest.raises(ReplyFailed) as failed:
            await reply.text()
        assert failed.value.code == "context-full"
        await known_to_the_relay(conversation, serving)
        elsewhere = await client.create()
        assert (await (await elsewhere.ask("hello", **SHORT)).entry()).state is State.DONE


async def test_hundreds_of_conversations_one_after_the_other(serving: Serving) -> None:
    names = []
    async with serving.client() as client:
        for number in range(CONVERSATIONS):
            conversation = await client.create()
            await conversation.send(f"number {number}")
            await conversation.synced_once()
            await conversation.close()
            names.append(conversation.id)
    async with serving.client("witness") as client:
        for number in range(0, CONVERSATIONS, CONVERSATIONS // 10):
            conversation = await client.open(names[number])
            await conversation.synced_once()
            assert conversation.view()[0].content == f"number {number}"
            assert (await (await conversation.ask("go on", **SHORT)).entry()).state is State.DONE
