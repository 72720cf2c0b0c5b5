"""Eight conversations at once: what all of them get together, and how even each stream is.

For each context length, every peer first reads a text of that length in each of its conversations,
and answers a little; then all eight are asked at the same moment, and stream 64 tokens each. The
rate is all tokens by the time from the first token of any to the last token of all; the gap is the
longest pause between two parts of any stream, against the median pause.
A part is what a client gets at once: a token with most servers, and with ours the tokens of a
window of some 0.1 s, which makes the median pause longer.

The bars, for each context length: the total rate is at least that of the best other peer, and the
longest pause at most 4 times the median one.

The limit: eight rows share one reading of the weights, so the total rate can be eight times that of
one conversation only while reading the weights is what takes the time.

    python bench/many.py [--conversations 8] [--contexts 128 1024] [--without vllm …]

The last line is the result as JSON; ``must`` holds the bars.
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
from ours import TOKENS_OF_WORDS, WORDS, CrdtLlm, conversations, serving
from peer import REST_S, TURN_S_MAX, Skipped
from theirs import llama_cpp, vllm
from verdicts import Verdict, rounded, show

from crdt_llm.inference.models.folders import DEFAULT_MODEL, resolve

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ours import Server
    from peer import Peer
    from theirs import Chats

TOKENS = 64
WARM_TOKENS = 4
ROUNDS = 3  # of which the best counts: a neighbour only ever makes it worse
RATE_BAR, GAP_BAR = 1.0, 4.0


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


async def _servers(
    stack: AsyncExitStack, options: argparse.Namespace, model: Path, folder: Path
) -> tuple[Server, list[Chats], dict[str, str]]:
    """Ours, those of others that can be had here, and why not the rest."""
    server = await stack.enter_async_context(serving(folder, model))
    others: list[Chats] = []
    skipped: dict[str, str] = {}
    for name, other in {
        "llama.cpp": llama_cpp(folder, options.conversations),
        "vllm": vllm(folder, model),
    }.items():
        if name in options.without:
            skipped[name] = "as asked"
            continue
        try:
            others.append(await stack.enter_async_context(other))
        except Skipped as why:
            skipped[name] = str(why)
    for name, reason in skipped.items():
        print(f"{name} is skipped: {reason}")
    return server, others, skipped


async def _rounds(teams: Sequence[Sequence[Peer]], context: int) -> dict[str, Row]:
    """Every team reads a text of that length in each conversation, and answers some rounds."""
    rest = " ".join([WORDS] * max(1, context // TOKENS_OF_WORDS))
    for team in teams:
        for number, peer in enumerate(team):
            # Another beginning each: what is the same, some servers keep and read only once.
            await peer.turn(
                f"{number} of {len(team)} texts of {context} tokens. {rest}", WARM_TOKENS
            )
    rows: dict[str, Row] = {}
    for number in range(ROUNDS):
        for team in teams if number % 2 == 0 else reversed(teams):
            name = team[0].name
            row = await _at_once(team, f"Round {number}: what comes next, and why?")
            if name not in rows or row.tokens_per_s > rows[name].tokens_per_s:
                rows[name] = row
            await asyncio.sleep(REST_S)
    return rows


async def run(
    options: argparse.Namespace, model: Path, folder: Path
) -> tuple[dict[str, dict[str, Row]], dict[str, str]]:
    """Every peer at every context length, in new conversations for each.

    Returns:
        The rows by context length, then by peer; and why others were skipped.
    """
    found: dict[str, dict[str, Row]] = {}
    count = options.conversations
    async with AsyncExitStack() as stack:
        server, others, skipped = await _servers(stack, options, model, folder)
        for context in options.contexts:
            async with conversations(server, folder / f"client-{context}", count) as made:
                ours: list[Peer] = [CrdtLlm(one, OURS) for one in made]
                rows = await _rounds([ours, *(chats(count) for chats in others)], context)
            found[str(context)] = rows
            for name, row in rows.items():
                print(
                    f"context {context:5} {name:20} {row.tokens_per_s:7.1f} tokens/s in all,"
                    f" pause {row.gap_median_ms:6.1f} ms, longest {row.gap_longest_ms:7.1f} ms"
                    f" ({row.gap_ratio:.1f} x)",
                    flush=True,
                )
    return found, skipped


def verdicts(found: dict[str, dict[str, Row]]) -> list[Verdict]:
    """The bars at each context length; the pauses of the others are shown in the rows alone."""
    must = []
    for context, rows in found.items():
        mine = rows[OURS]
        others = [row.tokens_per_s for name, row in rows.items() if name != OURS]
        if others:
            part = mine.tokens_per_s / max(others)
            what = f"tokens/s at context {context} by the best peer's"
            must.append(Verdict(OURS, what, part, RATE_BAR, at_most=False))
        what = f"longest pause at context {context} by the median one"
        must.append(Verdict(OURS, what, mine.gap_ratio, GAP_BAR))
    return must


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
        found, skipped = asyncio.run(run(options, model, Path(folder)))
    must = verdicts(found)
    show(must)
    result = {
        "bench": "many",
        "conversations": options.conversations,
        "rows": {
            context: {
                name: asdict(row) | {"gap_ratio": row.gap_ratio} for name, row in rows.items()
            }
            for context, rows in found.items()
        },
        "must": [one.plain() for one in must],
        "skipped": skipped,
    }
    print(json.dumps(rounded(result)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
