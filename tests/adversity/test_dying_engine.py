"""The engine's process is killed under a real server's hands."""

from __future__ import annotations

import json
import os
import shutil
import signal
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

import pytest
from adversity.serving import LONG, SHORT, Serving, sampled

from crdt_llm.document.schema import State

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from crdt_llm.document.schema import Entry
    from crdt_llm.sync.client.client import OpenConversation

LONGER: Final[dict[str, Any]] = LONG | {"max_tokens": 600}
"""About a second of computing, so that it is at work when its engine is killed."""

ENDLESS: Final[dict[str, Any]] = LONG | {"max_tokens": 60_000}
"""More than any engine computes before it is killed, however late that is."""

POSITIONS: Final = 1 << 16

IN_FLIGHT_MAX: Final = 1
"""Sealed chunks of a reply that have left the node and are not at the relay yet: it writes none
before the last one is durable."""


@pytest.fixture(scope="module")
def serving(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """A server on the tiny model, with room for a reply that does not end by itself."""
    root = tmp_path_factory.mktemp("dying")
    model_dir = shutil.copytree(tiny_model_dir, root / "model")
    config = json.loads((model_dir / "config.json").read_text())
    config["max_position_embeddings"] = POSITIONS
    (model_dir / "config.json").write_text(json.dumps(config))
    with Serving(root / "serving", model_dir) as served:
        yield served
        assert served.running.poll() is None, served.errors
        assert "Traceback" not in served.errors


def deaths(serving: Serving) -> int:
    """How often the server has found its engine dead under a reply."""
    return serving.errors.count("the engine died; starting another one")


async def kill(serving: Serving) -> int:
    """Kill the engine under a reply, and wait until the server has heard all of its last words.

    Returns:
        The number of its process.
    """
    before = deaths(serving)
    (worker,) = serving.workers
    os.kill(worker, signal.SIGKILL)
    while deaths(serving) == before:
        await serving.get("/healthz")  # gives it its turn
    assert deaths(serving) == before + 1
    return worker


async def at_the_relay(serving: Serving, conversation: str, slot: str) -> Entry:
    """A reply as it is at the relay now, whatever is still on the way to other devices."""
    async with serving.client("witness") as client:
        witness = await client.open(conversation)
        await witness.synced_once()
        return witness.entry(slot)


async def text_undisturbed(serving: Serving, text: str, params: dict[str, Any]) -> str:
    async with serving.client("undisturbed") as client:
        conversation = await client.create()
        return await (await conversation.ask(text, **params)).text()


async def test_a_reply_goes_on_where_its_engine_was_killed_and_ends_as_it_would_have(
    serving: Serving,
) -> None:
    params = LONGER | {"temperature": 0.8, "seed": 11}
    expected = await text_undisturbed(serving, "a long story", params)
    async with serving.client() as client:
        conversation = await client.create()
        reply = await conversation.ask("a long story", **params)
        assert not (await sampled(conversation, reply.id)).ended
        killed = await kill(serving)
        entry = await reply.entry()
        assert entry.state is State.DONE
        assert entry.content == expected
        assert killed not in serving.workers


async def kill_whenever_it_grows(
    serving: Serving, conversation: OpenConversation, slot: str
) -> list[Entry]:
    """Kill each engine that has added to a reply, until the reply ends.

    What a killed engine added may arrive when its successor is at work already, or still loads:
    that is no reason to kill that one too. So a successor is let live until there is more than its
    predecessors can have left.

    Returns:
        The reply as it was here before each of the kills.
    """
    found: list[Entry] = []
    left = 0
    while not (entry := await sampled(conversation, slot, left + 1)).ended:
        found.append(entry)
        await kill(serving)
        left = len((await at_the_relay(serving, conversation.id, slot)).sealed) + IN_FLIGHT_MAX
    return found


async def test_a_reply_that_its_engine_dies_of_fails_alone(serving: Serving) -> None:
    """Both are at work when it dies first, and nobody can tell of which one it died."""
    async with serving.client() as client:
        guilty, innocent = await client.create(), await client.create()
        deadly = await guilty.ask("a deadly story", **ENDLESS)
        other = await innocent.ask("a long story", **LONGER)
        await sampled(guilty, deadly.id)
        assert not (await sampled(innocent, other.id)).ended
        killed_at = await kill_whenever_it_grows(serving, guilty, deadly.id)
        assert len(killed_at) == 3
        entry = await deadly.entry()
        assert entry.state is State.FAILED
        assert entry.usage is not None
        assert entry.usage.error_code == "engine-died"
        assert "engine died" in (entry.usage.error_message or "")
        # What it got to stays, of each of its engines.
        texts = [one.content for one in (*killed_at, entry)]
        assert texts[0]
        for had, has in pairwise(texts):
            assert has.startswith(had)
        assert len(texts[0]) < len(texts[1]) < len(texts[2])
        spared = await other.entry()
        wanted = (State.DONE, LONGER["max_tokens"])
        assert (spared.state, spared.usage and spared.usage.sampled) == wanted
        assert spared.content == await text_undisturbed(serving, "a long story", LONGER)
        after = await (await guilty.ask("and now?", **SHORT)).entry()
        assert after.state is State.DONE
        assert after.place is not None
        assert after.place.parent in guilty.path()
        assert deadly.id in guilty.path()
