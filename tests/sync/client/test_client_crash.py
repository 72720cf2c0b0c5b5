"""kill -9 of a client process: what ``send`` and ``ask`` returned for is in the file."""

from __future__ import annotations

import asyncio
import random
import re
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from sync.client import client_child
from sync.relay_partner import Partner

from crdt_llm import Client
from crdt_llm.sync.wire.frames import Code

if TYPE_CHECKING:
    from pathlib import Path

    from crdt_llm.sync.wire.frames import Restore, Update

NOBODY = "ws://127.0.0.1:9/"  # the discard port: a relay that is never there


def write_until_killed(url: str, folder: Path, acknowledged: int) -> list[str]:
    """Run a client until it has acknowledged so many writes, kill it, and return all of them."""
    command = [sys.executable, client_child.__file__, url, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:  # noqa: S603 - ours
        assert child.stdout is not None
        lines = [child.stdout.readline().strip() for _ in range(acknowledged + 1)]
        child.send_signal(signal.SIGKILL)
        rest = child.stdout.read().splitlines(keepends=True)
        # The last line may be cut off; a whole one was acknowledged.
        lines += [line.strip() for line in rest if line.endswith("\n")]
    assert child.returncode == -signal.SIGKILL
    assert all(lines)
    return lines


@pytest.mark.parametrize("seed", range(3))
async def test_everything_acknowledged_survives_sigkill(tmp_path: Path, seed: int) -> None:
    drawn = random.Random(seed)
    acknowledged: list[str] = []
    for _ in range(2):  # the second start goes on in what the first one left
        conversation, *written = write_until_killed(NOBODY, tmp_path, drawn.randrange(1, 40))
        acknowledged += written
    async with (
        Partner(token=None) as relay,
        Client(relay.url, data=tmp_path) as client,  # the lock went with the process
    ):
        assert await client.conversations() == (conversation,)
        opened = await client.open(conversation)
        for slot in acknowledged:
            asked = opened.entry(slot)
            assert opened.entry(asked.born.after).content.endswith("x" * 100)  # both or none
        await opened.synced_once()
        assert set(acknowledged) <= set(relay.document(conversation).tree.entries)
        await opened.send("and on it goes")


def refuse_some(message: Update | Restore) -> tuple[Code, str, str] | None:
    """Refuse every message with a number that ends with 3 or 7."""
    offends = re.search(rb"\d{5}[37] x", message.update)
    return None if offends is None else (Code.INVALID, "content", "not that number")


@pytest.mark.parametrize("seed", range(3))
async def test_what_was_refused_around_sigkill_is_a_draft_or_still_to_be_refused(
    tmp_path: Path, seed: int
) -> None:
    drawn = random.Random(f"refused {seed}")
    acknowledged: list[str] = []
    async with Partner(token=None) as relay:
        relay.judge = refuse_some
        for _ in range(2):
            conversation, *written = await asyncio.to_thread(
                write_until_killed, relay.url, tmp_path, drawn.randrange(5, 40)
            )
            acknowledged += written
        async with Client(relay.url, data=tmp_path) as client:
            opened = await client.open(conversation)
            for slot in acknowledged:  # before the relay is asked once more
                assert (slot in opened.document.tree) != (opened.refusal_of(slot) is not None)
            await opened.synced_once()
            kept = relay.document(conversation)
            assert opened.document.tree.entries == kept.tree.entries
            refused = 0
            for slot in acknowledged:
                draft = opened.refusal_of(slot)
                if draft is None:
                    text = kept.text(opened.entry(slot).born.after)
                    assert text == opened.entry(opened.entry(slot).born.after).content
                else:
                    text = draft.text
                    assert slot not in kept.tree
                    refused += 1
                assert text.endswith("x" * 100)
                assert (draft is not None) == (text[5] in "37")
            assert refused > 0
            drafts = [entry for one in opened.refused_writes for entry in one.entries]
            assert len(drafts) == len(set(drafts))  # none of them twice
