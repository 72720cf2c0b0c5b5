"""kill -9 of a client process: what ``send`` and ``ask`` returned for is in the file."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from sync import client_child
from sync.relay_partner import Partner

from crdt_llm import Client

if TYPE_CHECKING:
    from pathlib import Path

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
            assert opened.entry(asked.born.after).content == "x" * 100  # both or none
        await opened.synced_once()
        assert set(acknowledged) <= set(relay.document(conversation).tree.entries)
        await opened.send("and on it goes")
