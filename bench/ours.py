"""Our own peer: a client, the relay and the node with its engine, as ``crdt-llm serve`` runs them.

This module owns how it is started and what a turn of it costs: real processes and sockets, every
update durable before it is passed on.
"""

from __future__ import annotations

import asyncio
import os
import sys
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from peer import STARTUP_S_MAX, Stopwatch, Turn, line, process

from crdt_llm import Client

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

    from crdt_llm.sync.client import OpenConversation

TYPING_S = 0.15  # between two words: 80 words a minute and a half, faster than most people type


class CrdtLlm:
    """A conversation of ours.

    Args:
        conversation: It.
        name: What the table calls it.
        typing: Whether the text is typed word by word, with hints of the draft on the way.
    """

    def __init__(self, conversation: OpenConversation, name: str, *, typing: bool = False) -> None:
        self.name = name
        self.conversation = conversation
        self._typing = typing

    async def turn(self, text: str, tokens: int) -> Turn:
        """See :class:`~peer.Peer`."""
        sent = self.conversation.traffic.live.sent_bytes
        if self._typing:
            await self._type(text)
        watch = Stopwatch()
        reply = await self.conversation.ask(
            text, max_tokens=tokens, ignore_eos=True, temperature=0.0
        )
        async for _ in reply:
            watch.part()
        entry = await reply.entry()
        usage = entry.usage
        if usage is None or usage.sampled != tokens:
            raise SystemExit(f"a reply ended as {entry.state} with {usage}")
        return Turn(
            ttft_ms=watch.ttft_ms,
            tokens_per_s=watch.tokens_per_s(usage.sampled),
            sent_bytes=self.conversation.traffic.live.sent_bytes - sent,
            prefilled=usage.prefilled,
            prompt=usage.prompt,
            drafted=usage.drafted,
            gaps_ms=tuple(watch.gaps_ms),
        )

    async def _type(self, text: str) -> None:
        words = text.split(" ")
        for end in range(1, len(words) + 1):
            self.conversation.draft(" ".join(words[:end]))
            await asyncio.sleep(TYPING_S)  # a person's pace, which is what is measured here


@asynccontextmanager
async def serving(
    folder: Path, model: Path, options: Sequence[str] = (), name: str = "server"
) -> AsyncIterator[tuple[str, str]]:
    """``crdt-llm serve``; its address and the owner's token."""
    data = folder / name
    words = ["-m", "crdt_llm", "serve", "--port", "0", "--data", str(data), "--model", str(model)]
    log = folder / f"{name}.log"
    async with process(sys.executable, *words, *options, log=log, environment=os.environ) as child:
        ready = await line(child, STARTUP_S_MAX)
        yield ready.split()[1].decode(), (data / "owner.token").read_text().strip()


@asynccontextmanager
async def conversations(
    url: str, token: str, folder: Path, count: int
) -> AsyncIterator[list[OpenConversation]]:
    """A client with so many new conversations."""
    async with Client(url, token=token, data=folder / "client", device="bench") as client:
        made = [await client.create(f"bench {number}") for number in range(count)]
        for conversation in made:
            await conversation.synced_once()
        yield made
