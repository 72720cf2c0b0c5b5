"""What a restart costs with the KV that lies on disk, and what 200 conversations take of memory.

A server makes one conversation of each length, ends, and is started again, in turns with its KV
files and without them, each time on a copy of the same data. Then each conversation is asked
something short. With the files the KV is read, verified and used; without, the whole path is
computed anew from the document. The bar: at 2,000 tokens the first token comes within 0.2 x of the
time that it takes without files. The limit is the disk: some 24 KB a token, read and hashed.

Then a server with a small KV budget answers in 200 conversations, eight at a time. Each of them has
a tile of KV of its own (256 rows, 6 MB with this model), so most leave memory for the disk. The
bar: the engine's process grows by no more than the budget and some working memory (the rows of a
step, what is kept of 200 paths) over what it had with the weights loaded and one reply given. What
KV takes of it is printed, as the engine counts it.

    python bench/disk.py [--lengths 250 500 1000 2000 4000] [--conversations 200] [--plots DIR]

The last line is the result as JSON; ``must`` holds the bars.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil  # type: ignore[import-untyped]  # ships no types
from ours import conversations, fill, serving, whole
from peer import TURN_S_MAX, Stopwatch
from verdicts import Verdict, rounded, show

from crdt_llm import Client
from crdt_llm.inference.models.folders import DEFAULT_MODEL, resolve

if TYPE_CHECKING:
    from crdt_llm.document.schema import Usage
    from crdt_llm.sync.client.client import OpenConversation, Sampling

LENGTHS = (250, 500, 1000, 2000, 4000)
BAR_LENGTH = 2000
RESTORE_BAR = 0.2
REPLY_TOKENS = 4
GREEDY: Sampling = {"max_tokens": REPLY_TOKENS, "temperature": 0.0, "ignore_eos": True}
AT_ONCE = 8  # conversations that are answered together
KV = "kv"  # in a data folder
KV_BYTES = "crdt_llm_engine_kv_memory_bytes"
WORKING_MIB = 4  # a step of 96 rows and 8 replies takes some 2 MiB, the bookkeeping less


async def _ask(conversation: OpenConversation, text: str) -> tuple[float, Usage]:
    """Ask something; when the first token came, in ms, and what the reply cost."""
    watch = Stopwatch()
    async with asyncio.timeout(TURN_S_MAX):
        usage = await whole(await conversation.ask(text, **GREEDY), watch, REPLY_TOKENS)
    return watch.ttft_ms, usage


# -- restarting ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Restart:
    """One length, medians over rounds.

    Attributes:
        tokens: Of the prompt, the new question included.
        restored_ms: First token with files.
        replayed_ms: First token without.
        computed_restored: Tokens of the prompt that were computed, with files.
        computed_replayed: The same without.
    """

    tokens: int
    restored_ms: float
    replayed_ms: float
    computed_restored: int
    computed_replayed: int

    @property
    def ratio(self) -> float:
        """Restoring by replaying."""
        return self.restored_ms / self.replayed_ms


async def _build(folder: Path, model: Path, lengths: list[int]) -> list[str]:
    """Make the conversations on a server of their own, which then ends; their ids."""
    async with (
        serving(folder, model, name="built") as server,
        conversations(server, folder / "builder", len(lengths)) as made,
    ):
        for number, (conversation, length) in enumerate(zip(made, lengths, strict=True)):
            # Another beginning each, or they would share their KV.
            await conversation.send(f"{number}: a text of {length} tokens.")
            await fill(conversation, length)
            await _ask(conversation, "Is that all?")
        return [conversation.id for conversation in made]


async def _after_restart(
    folder: Path, model: Path, ids: list[str], *, files: bool
) -> list[tuple[float, Usage]]:
    """Start a copy of the server anew; what a question costs in each conversation."""
    name = "restored" if files else "replayed"
    ignored = shutil.ignore_patterns() if files else shutil.ignore_patterns(KV)
    await asyncio.to_thread(shutil.copytree, folder / "built", folder / name, ignore=ignored)
    client_folder = folder / f"{name}-client"
    async with serving(folder, model, name=name) as server:
        async with conversations(server, client_folder, 1) as (other,):
            await _ask(other, "Hello: are you there, and is everything warm?")
        async with Client(server.url, token=server.token, data=client_folder) as client:
            had = []
            for one in ids:
                conversation = await client.open(one)
                await conversation.synced_once()
                had.append(await _ask(conversation, "And what was it about?"))
    for leftover in (folder / name, client_folder):
        await asyncio.to_thread(shutil.rmtree, leftover)
    return had


async def restarts(folder: Path, model: Path, lengths: list[int], rounds: int) -> list[Restart]:
    """Restart so many times with files and without, in turns."""
    ids = await _build(folder, model, lengths)
    restored, replayed = [], []
    for _ in range(rounds):
        restored.append(await _after_restart(folder, model, ids, files=True))
        replayed.append(await _after_restart(folder, model, ids, files=False))
    found = []
    for number in range(len(lengths)):
        with_files, without = ([one[number] for one in had] for had in (restored, replayed))
        found.append(
            Restart(
                tokens=without[0][1].prompt,
                restored_ms=statistics.median(ttft_ms for ttft_ms, _ in with_files),
                replayed_ms=statistics.median(ttft_ms for ttft_ms, _ in without),
                computed_restored=with_files[0][1].prefilled,
                computed_replayed=without[0][1].prefilled,
            )
        )
    return found


# -- memory --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Memory:
    """What the engine's process took.

    Attributes:
        before_bytes: With the weights loaded and one reply given.
        most_bytes: The most that was seen while it answered in many conversations.
        kv_bytes: The most that KV took behind any batch of them, as the engine counts it.
        disk_bytes: What lay on disk in the end.
    """

    before_bytes: int
    most_bytes: int
    kv_bytes: int
    disk_bytes: int

    @property
    def grown_bytes(self) -> int:
        """What the conversations took."""
        return self.most_bytes - self.before_bytes


def _engine_bytes(server: int) -> int:
    """Resident memory of the engine: the largest process below the server's."""
    processes = psutil.Process(server).children(recursive=True)
    return max(int(process.memory_info().rss) for process in processes)


async def memory(folder: Path, model: Path, count: int, budget_mib: int) -> Memory:
    """Answer in so many conversations within a budget, as many at once as a few people would."""
    options = ("--kv-memory", str(budget_mib))
    async with serving(folder, model, options, name="small") as server:
        async with conversations(server, folder / "first", 1) as (one,):
            await _ask(one, "What is a tile?")
        before = most = _engine_bytes(server.pid)
        kv = 0.0
        for first in range(0, count, AT_ONCE):
            some = min(AT_ONCE, count - first)
            async with conversations(server, folder / f"client-{first}", some) as made:
                questions = (
                    _ask(one, f"{first + number}: what is the number in front of this, and why?")
                    for number, one in enumerate(made)
                )
                await asyncio.gather(*questions)
            most = max(most, _engine_bytes(server.pid))
            kv = max(kv, (await server.counts())[KV_BYTES])
    files = (folder / "small" / KV).iterdir()
    return Memory(before, most, round(kv), sum(file.stat().st_size for file in files))


def main() -> int:
    """Measure, print the rows and the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--rounds", type=int, default=3, help="restarts of either kind")
    parser.add_argument("--conversations", type=int, default=200)
    parser.add_argument("--kv-memory", type=int, default=128, metavar="MIB")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--plots", type=Path, help="a folder for plots")
    options = parser.parse_args()
    model = resolve(options.model, fetch=True, report=lambda line: print(line, file=sys.stderr))
    must = []
    with tempfile.TemporaryDirectory(prefix="crdt-llm-disk-") as name:
        folder = Path(name)
        curve = asyncio.run(restarts(folder, model, options.lengths, options.rounds))
        for length, one in zip(options.lengths, curve, strict=True):
            print(
                f"{one.tokens:6,} tokens after a restart: first token"
                f" {one.restored_ms:6.0f} ms with files ({one.computed_restored:,} computed),"
                f" {one.replayed_ms:7.0f} ms without ({one.computed_replayed:,} computed),"
                f" {one.ratio:.3f} x",
                flush=True,
            )
            if length == BAR_LENGTH:
                what = f"first token after a restart at {length:,} tokens, by a replay's"
                must.append(Verdict("checkpoints", what, one.ratio, RESTORE_BAR))
        taken = asyncio.run(memory(folder, model, options.conversations, options.kv_memory))
    print(
        f"{options.conversations} conversations: the engine had {taken.before_bytes >> 20} MiB,"
        f" grew by {taken.grown_bytes >> 20} MiB, {taken.kv_bytes >> 20} of them KV, and wrote"
        f" {taken.disk_bytes >> 20} MiB to disk"
    )
    what = f"growth under {options.conversations} conversations"
    grown_mib, bar = taken.grown_bytes / (1 << 20), options.kv_memory + WORKING_MIB
    must.append(Verdict("memory", what, grown_mib, bar, unit="MiB"))
    show(must)
    if options.plots is not None:
        from plots import draw_restore  # noqa: PLC0415 - a drawing library only if it draws

        draw_restore(
            [one.tokens for one in curve],
            [one.restored_ms for one in curve],
            [one.replayed_ms for one in curve],
            options.plots,
        )
    result = {
        "bench": "disk",
        "restarts": [asdict(one) | {"ratio": one.ratio} for one in curve],
        "memory": asdict(taken) | {"grown_bytes": taken.grown_bytes},
        "must": [one.plain() for one in must],
    }
    print(json.dumps(rounded(result)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
