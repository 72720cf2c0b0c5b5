"""A client process for the crash test: writes for ever, and says what was acknowledged."""

from __future__ import annotations

import asyncio
import itertools
import sys
from pathlib import Path

from crdt_llm import Client


def text(number: int) -> str:
    """What it says in its nth message."""
    return f"{number:06} {'x' * 100}"


async def main(url: str, folder: str) -> None:
    """Print the conversation's id, then the id of each entry once ``send`` has returned."""
    async with Client(url, data=Path(folder)) as client:
        known = await client.conversations()
        conversation = await client.open(known[0]) if known else await client.create()
        print(conversation.id, flush=True)  # noqa: T201 - this is how it talks to the test
        for number in itertools.count():
            reply = await conversation.ask(text(number))
            print(reply.id, flush=True)  # noqa: T201 - as above


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
