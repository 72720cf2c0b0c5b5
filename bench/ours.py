"""Our own peer: a client, the relay and the node with its engine, as ``crdt-llm serve`` runs them.

This module owns how it is started and what a turn of it costs: real processes and sockets, every
update durable before it is passed on.
"""

from __future__ import annotations

import asyncio
import os
import sys
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import httpx
from peer import STARTUP_S_MAX, Stopwatch, Turn, line, process
from prometheus_client.parser import text_string_to_metric_families

from crdt_llm import Client

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

    from crdt_llm.document.schema import Usage
    from crdt_llm.sync.client.client import OpenConversation, Reply

TYPING_S = 0.15  # between two words: 80 words a minute and a half, faster than most people type
WORDS = (
    "The river rises in the hills, passes two towns and a mill, and meets the sea behind the dunes."
)
TOKENS_OF_WORDS = 21  # with the default model's tokenizer
WORDS_OF_ENTRY = 10  # of an entry that makes a conversation longer
WASTED = "crdt_llm_node_drafts_wasted_tokens_total"


@dataclass(frozen=True, slots=True)
class Server:
    """A ``crdt-llm serve`` that runs.

    Attributes:
        url: Its address.
        token: The owner's.
        pid: Of its process; the engine is a child of it.
    """

    url: str
    token: str = field(repr=False)
    pid: int

    async def counts(self) -> dict[str, float]:
        """What it counts, by name, as anybody may read it."""
        async with httpx.AsyncClient(base_url=self.url) as client:
            page = (await client.get("/metrics")).raise_for_status()
        families = text_string_to_metric_families(page.text)
        return {one.name: one.value for family in families for one in family.samples}


class CrdtLlm:
    """A conversation of ours.

    Args:
        conversation: It.
        name: What the table calls it.
        typing: The server, if the text is typed word by word, with hints of the draft on the way;
            nobody else may type there, since the server counts what was read in vain for all.
    """

    def __init__(
        self, conversation: OpenConversation, name: str, *, typing: Server | None = None
    ) -> None:
        self.name = name
        self.conversation = conversation
        self._typing = typing

    async def turn(self, text: str, tokens: int) -> Turn:
        """See :class:`~peer.Peer`."""
        sent = self.conversation.traffic.live.sent_bytes
        wasted = await self._wasted()
        if self._typing is not None:
            await self._type(text)
        watch = Stopwatch()
        reply = await self.conversation.ask(
            text, max_tokens=tokens, ignore_eos=True, temperature=0.0
        )
        usage = await whole(reply, watch, tokens)
        return Turn(
            ttft_ms=watch.ttft_ms,
            tokens_per_s=watch.tokens_per_s(usage.sampled),
            sent_bytes=self.conversation.traffic.live.sent_bytes - sent,
            prefilled=usage.prefilled,
            prompt=usage.prompt,
            drafted=usage.drafted,
            wasted=round(await self._wasted() - wasted),
            gaps_ms=tuple(watch.gaps_ms),
        )

    async def _wasted(self) -> float:
        return 0 if self._typing is None else (await self._typing.counts()).get(WASTED, 0)

    async def _type(self, text: str) -> None:
        words = text.split(" ")
        for end in range(1, len(words) + 1):
            self.conversation.draft(" ".join(words[:end]))
            await asyncio.sleep(TYPING_S)  # a person's pace, which is what is measured here


async def whole(reply: Reply, watch: Stopwatch, tokens: int) -> Usage:
    """Take a reply of so many tokens to its end; what it cost.

    Raises:
        SystemExit: It is another one: then there is nothing to measure.
    """
    async for _ in reply:
        watch.part()
    entry = await reply.entry()
    if entry.usage is None or entry.usage.sampled != tokens:
        raise SystemExit(f"a reply ended as {entry.state} with {entry.usage}")
    return entry.usage


async def fill(conversation: OpenConversation, tokens: int) -> None:
    """Make a conversation longer by about so many tokens, with entries that ask for no reply."""
    words = max(1, tokens // TOKENS_OF_WORDS)
    for first in range(0, words, WORDS_OF_ENTRY):
        count = min(WORDS_OF_ENTRY, words - first)
        await conversation.send(" ".join([WORDS] * count))


@asynccontextmanager
async def serving(
    folder: Path, model: Path, options: Sequence[str] = (), name: str = "server"
) -> AsyncIterator[Server]:
    """``crdt-llm serve`` with its data in a folder below, which it may find there."""
    data = folder / name
    words = ["-m", "crdt_llm", "serve", "--port", "0", "--data", str(data), "--model", str(model)]
    log = folder / f"{name}.log"
    async with process(sys.executable, *words, *options, log=log, environment=os.environ) as child:
        ready = await line(child, STARTUP_S_MAX)
        token = (data / "owner.token").read_text().strip()
        yield Server(ready.split()[1].decode(), token, child.pid)


@asynccontextmanager
async def conversations(
    server: Server, folder: Path, count: int
) -> AsyncIterator[list[OpenConversation]]:
    """A client, with its data in a folder of its own, and so many new conversations."""
    async with Client(server.url, token=server.token, data=folder, device="bench") as client:
        made = [await client.create(f"bench {number}") for number in range(count)]
        for conversation in made:
            await conversation.synced_once()
        yield made
