"""What a chat costs, turn by turn: a replicated conversation against resending the history.

One chat of 20 turns, about 75 new prompt tokens and 64 reply tokens a turn, streaming, greedy, on
one model; with ``--short`` one of 100 turns of at most 75 tokens each, the reply included. The
peers take turns within one run, with the same texts, so that whatever else the machine does hits
them alike:

* ``crdt-llm``: a client, the relay and the node with its engine, as ``crdt-llm serve`` runs them;
  once as it is, and once typed word by word with hints of the draft on the way.
* ``llama.cpp`` and ``vLLM``: their servers, tuned as their documentation advises, with prefix
  caching; their client sends all messages with every request. Their environments are made by
  themselves, once; a peer that cannot be had here is skipped, with the reason.
* ``transformers``: ``generate`` in bf16; its KV cache lives as long as one request.

Each goes on with its own replies. TTFT is what the client sees: from handing over the text until
the first characters of the reply are there. The first turn warms up and does not count.

The limits: TTFT cannot be below the prefill of the *new* tokens and one step, however long the
history is; a decode step must read every weight once, so tokens/s cannot be above memory bandwidth
by the size of the weights, both of which are printed. What a client must send is the text that was
typed.

    python bench/chat.py [--turns 20] [--short] [--without vllm …] [--plots DIR]

The last line is the result as JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
from contextlib import AsyncExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ours import CrdtLlm, conversations, serving
from peer import LAST, TURN_S_MAX, Skipped, Summary
from theirs import llama_cpp, transformers, vllm

from crdt_llm.inference.models import DEFAULT_MODEL, resolve

if TYPE_CHECKING:
    from collections.abc import Sequence

    from peer import Peer, Turn

REPLY_TOKENS = 64
SHORT_TURNS = 100
SHORT_REPLY_TOKENS = 32
EARLY, LATE = slice(5, 15), slice(-10, None)  # turns around the 10th, and the last ones of 100
OURS = "crdt-llm (int8)"
TYPED = "crdt-llm, typed"

OPENINGS = (
    "I have been thinking about our last point, and I would like to go one step further.",
    "Thank you, that was useful; let me change the subject a little before we go back to it.",
    "A friend who read your answer over my shoulder does not agree with all of it.",
    "Let us stay with the practical side for a moment, because I have to decide this week.",
)
DETAILS = (
    "There are two of us, we have about three hours in the afternoon, and it may well rain.",
    "My budget is small, the kitchen is smaller still, and the neighbours go to bed early.",
    "I learned some of this at school, but it has been twenty years and most of it is gone.",
    "Keep in mind that my daughter is seven, curious about everything, and quickly bored.",
    "I would rather have one good reason than ten weak ones, so please be strict with me.",
)
QUESTIONS = (
    "Which museum in Lisbon should we see first, and what would you leave out without regret?",
    "How do I cook a vegetable soup that tastes as good on the second day as on the first?",
    "Why does the moon look larger near the horizon, and how could we measure that at home?",
    "What makes an old bicycle worth repairing, and which parts would you replace at once?",
    "How would you explain to a child why the sea is salty while the rivers are not?",
)


def said(turn: int, *, short: bool) -> str:
    """What the user says in a turn: some 70 tokens, or 25 in a short one; each time others."""
    question = QUESTIONS[turn % len(QUESTIONS)]
    if short:
        return f"Turn {turn + 1}. {question}"
    opening, detail = OPENINGS[turn % len(OPENINGS)], DETAILS[(turn // 4) % len(DETAILS)]
    return f"Turn {turn + 1}. {opening} {detail} {question}"


def table(summaries: dict[str, Summary]) -> None:
    """Print the rows, and how many times better the first one is compared to each other."""
    print(
        f"\n{'':20} {'TTFT ms':>8} {f'last {LAST}':>8} {'tokens/s':>9} {f'last {LAST}':>8}"
        f" {'bytes sent':>11} {'prefilled':>10} {'drafted':>8}"
    )
    for name, one in summaries.items():
        print(
            f"{name:20} {one.ttft_ms:8.0f} {one.ttft_last_ms:8.0f} {one.tokens_per_s:9.1f}"
            f" {one.tokens_per_s_last:8.1f} {one.sent_bytes:11,} {one.prefilled:10,}"
            f" {one.drafted:8,}"
        )
    for name, by in ratios(summaries).items():
        print(
            f"  {name:18} TTFT {by['ttft_ms']:.2f} x, last {by['ttft_last_ms']:.2f} x,"
            f" tokens/s {by['tokens_per_s']:.2f} x, last {by['tokens_per_s_last']:.2f} x,"
            f" bytes {by['sent_bytes']:.3f} x"
        )


def ratios(summaries: dict[str, Summary]) -> dict[str, dict[str, float]]:
    """Ours by theirs, for each of our rows and each of the others."""
    mine = {name: one for name, one in summaries.items() if name.startswith("crdt-llm")}
    return {
        f"{name} / {other}": {
            key: value / its if (its := asdict(theirs)[key]) else 0.0
            for key, value in asdict(one).items()
        }
        for name, one in mine.items()
        for other, theirs in summaries.items()
        if other not in mine
    }


def _weights_bytes(model: Path) -> int:
    return sum(file.stat().st_size for file in model.glob("*.safetensors"))


async def chat(
    options: argparse.Namespace, model: Path, folder: Path
) -> tuple[dict[str, list[Turn]], dict[str, str]]:
    """All turns with all peers, alternating; who goes first changes from turn to turn.

    Returns:
        The turns of each peer, and why others were skipped.
    """
    tokens = SHORT_REPLY_TOKENS if options.short else REPLY_TOKENS
    async with AsyncExitStack() as stack:
        peers, skipped = await _peers(stack, options, model, folder)
        had: dict[str, list[Turn]] = {peer.name: [] for peer in peers}
        for number in range(options.turns):
            first = number % len(peers)
            for peer in (*peers[first:], *peers[:first]):
                async with asyncio.timeout(TURN_S_MAX):
                    turn = await peer.turn(said(number, short=options.short), tokens)
                had[peer.name].append(turn)
                print(
                    f"turn {number + 1:3} {peer.name:20} TTFT {turn.ttft_ms:6.0f} ms,"
                    f" {turn.tokens_per_s:5.1f} tokens/s, sent {turn.sent_bytes:6,} B,"
                    f" prefilled {turn.prefilled:5,} of {turn.prompt:5,}",
                    flush=True,
                )
    return had, skipped


async def _peers(
    stack: AsyncExitStack, options: argparse.Namespace, model: Path, folder: Path
) -> tuple[list[Peer], dict[str, str]]:
    peers: list[Peer] = []
    skipped: dict[str, str] = {}
    url, token = await stack.enter_async_context(serving(folder, model))
    mine, typed = await stack.enter_async_context(conversations(url, token, folder, 2))
    peers.append(CrdtLlm(mine, OURS))
    if not options.short:  # a hundred turns at a typist's pace take half an hour
        peers.append(CrdtLlm(typed, TYPED, typing=True))
    servers = {"llama.cpp": llama_cpp(folder), "vllm": vllm(folder, model)}
    for name, server in servers.items():
        if name in options.without:
            skipped[name] = "as asked"
            continue
        try:
            peers += await stack.enter_async_context(server)
        except Skipped as why:
            skipped[name] = str(why)
    if "transformers" in options.without:
        skipped["transformers"] = "as asked"
    else:
        theirs, bytes_per_s = await stack.enter_async_context(transformers(folder, model))
        peers.append(theirs)
        weights = _weights_bytes(model)
        print(
            f"{weights / 1e6:,.0f} MB of bf16 weights, memory read at {bytes_per_s / 1e9:.0f} GB/s:"
            f" at most {bytes_per_s / weights:,.0f} tokens/s with them as they are"
        )
    for name, reason in skipped.items():
        print(f"{name} is skipped: {reason}")
    return peers, skipped


def growth(turns: Sequence[Turn]) -> float | None:
    """How much longer the first token takes at the end of 100 turns than around the tenth."""
    if len(turns) < SHORT_TURNS:
        return None
    early = statistics.median(turn.ttft_ms for turn in turns[EARLY])
    return statistics.median(turn.ttft_ms for turn in turns[LATE]) / early


def main() -> int:
    """Chat, print the table and the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--turns", type=int, help="at least 2: the first warms up")
    parser.add_argument("--short", action="store_true", help="100 short turns")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--without", nargs="*", default=[], help="peers to leave out")
    parser.add_argument("--plots", type=Path, help="a folder for plots")
    options = parser.parse_args()
    options.turns = options.turns or (SHORT_TURNS if options.short else 20)
    if options.turns < 2:
        parser.error("--turns is at least 2: the first one warms up")
    model = resolve(options.model, fetch=True, report=lambda line: print(line, file=sys.stderr))
    with tempfile.TemporaryDirectory(prefix="crdt-llm-chat-") as folder:
        turns, skipped = asyncio.run(chat(options, model, Path(folder)))
    summaries = {name: Summary.of(had) for name, had in turns.items()}
    table(summaries)
    grown = {name: growth(had) for name, had in turns.items()}
    if options.plots is not None:
        from plots import draw  # noqa: PLC0415 - a drawing library only where something is drawn

        draw(turns, options.plots, "short" if options.short else "chat")
    result = {
        "bench": "chat",
        "turns": options.turns,
        "short": options.short,
        "model": options.model,
        "peers": {name: asdict(summary) for name, summary in summaries.items()},
        "ratios": ratios(summaries),
        "ttft_growth": grown,
        "skipped": skipped,
    }
    print(json.dumps(_rounded(result)))
    return 0


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return round(value, 3) if isinstance(value, float) else value


if __name__ == "__main__":
    sys.exit(main())
