"""Eight conversations at once: what all of them get together, and how even each stream is.

For each context length, every peer first reads a text of that length in each of its conversations,
and answers a little; then all eight are asked at the same moment, and stream 64 tokens each. The
rate is all tokens by the time from the first token of any to the last token of all; the gap is the
longest pause between two parts of any stream, against the median pause.

The limit: eight rows share one reading of the weights, so the total rate can be eight times that of
one conversation only while reading the weights is what takes the time.

    python bench/many.py [--conversations 8] [--contexts 128 1024] [--without vllm …]

The last line is the result as JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from chat import OURS
from ours import CrdtLlm, conversations, serving
from peer import TURN_S_MAX, Skipped
from theirs import llama_cpp, vllm

from crdt_llm.inference.models import DEFAULT_MODEL, resolve

if TYPE_CHECKING:
    from collections.abc import Sequence

    from peer import Peer

TOKENS = 64
WARM_TOKENS = 4
ROUNDS = 3  # of which the best counts: a neighbour only ever makes it worse
WORDS = (
    "The river rises in the hills, passes two towns and a mill, and meets the sea behind the dunes."
)
TOKENS_OF_WORDS = 21  # with the default model's tokenizer


@dataclass(frozen=True, slots=True)
class Row:
    """One peer at one context length.

    Attributes:
        tokens_per_s: Of all conversations together.
        gap_median_ms: Between two parts of a stream.
        gap_longest_ms: The longest of any stream.
    """

    tokens_per_s: float
    gap_median_ms: float
    gap_longest_ms: float

    @property
    def gap_ratio(self) -> float:
        """The longest pause by the median one."""
        return self.gap_longest_ms / self.gap_median_ms


async def _at_once(peers: Sequence[Peer], text: str) -> Row:
    began = time.perf_counter()
    async with asyncio.timeout(TURN_S_MAX):
        turns = await asyncio.gather(*(peer.turn(text, TOKENS) for peer in peers))
    took_s = time.perf_counter() - began - min(turn.ttft_ms for turn in turns) / 1000
    gaps = [gap for turn in turns for gap in turn.gaps_ms]
    return Row(len(turns) * TOKENS / took_s, statistics.median(gaps), max(gaps))


async def _teams(
    stack: AsyncExitStack, options: argparse.Namespace, model: Path, folder: Path
) -> list[list[Peer]]:
    """So many conversations with each peer that can be had here."""
    count = options.conversations
    url, token = await stack.enter_async_context(serving(folder, model))
    ours = await stack.enter_async_context(conversations(url, token, folder, count))
    teams: list[list[Peer]] = [[CrdtLlm(one, OURS) for one in ours]]
    for name, server in {
        "llama.cpp": llama_cpp(folder, count),
        "vllm": vllm(folder, model, count),
    }.items():
        if name in options.without:
            continue
        try:
            teams.append(await stack.enter_async_context(server))
        except Skipped as why:
            print(f"{name} is skipped: {why}")
    return teams


async def run(options: argparse.Namespace, model: Path, folder: Path) -> dict[str, dict[str, Row]]:
    """Every peer at every context length.

    Returns:
        By context length, then by peer.
    """
    found: dict[str, dict[str, Row]] = {}
    for context in options.contexts:
        rows = found[str(context)] = {}
        async with AsyncExitStack() as stack:
            here = folder / str(context)
            here.mkdir()
            teams = await _teams(stack, options, model, here)
            text = " ".join([WORDS] * max(1, context // TOKENS_OF_WORDS))
            for team in teams:
                for peer in team:
                    await peer.turn(text, WARM_TOKENS)
            for number in range(ROUNDS):
                for team in teams if number % 2 == 0 else reversed(teams):
                    row = await _at_once(team, f"Round {number}: what comes next, and why?")
                    name = team[0].name
                    if name not in rows or row.tokens_per_s > rows[name].tokens_per_s:
                        rows[name] = row
        for name, row in rows.items():
            print(
                f"context {context:5} {name:20} {row.tokens_per_s:7.1f} tokens/s in all,"
                f" pause {row.gap_median_ms:6.1f} ms, longest {row.gap_longest_ms:7.1f} ms"
                f" ({row.gap_ratio:.1f} x)",
                flush=True,
            )
    return found


def main() -> int:
    """Measure, print the rows and the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--conversations", type=int, default=8)
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 1024])
    parser.add_argument("--without", nargs="*", default=[], help="peers to leave out")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    options = parser.parse_args()
    model = resolve(options.model, fetch=True, report=lambda line: print(line, file=sys.stderr))
    with tempfile.TemporaryDirectory(prefix="crdt-llm-many-") as folder:
        found = asyncio.run(run(options, model, Path(folder)))
    ratios = {
        context: {
            name: rows[OURS].tokens_per_s / row.tokens_per_s
            for name, row in rows.items()
            if name != OURS
        }
        for context, rows in found.items()
    }
    result = {
        "bench": "many",
        "conversations": options.conversations,
        "rows": {
            context: {
                name: asdict(row) | {"gap_ratio": row.gap_ratio} for name, row in rows.items()
            }
            for context, rows in found.items()
        },
        "ratios": ratios,
    }
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
