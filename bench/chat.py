"""What a chat costs, turn by turn: a replicated conversation against resending the history.

One chat of 20 turns, about 75 new prompt tokens and 64 reply tokens a turn, streaming, greedy, on
one model; with ``--short`` one of 100 turns of at most 75 tokens each, the reply included. The
peers take turns within one run, with the same texts and the same pause before each, so that
whatever else the machine does hits them alike:

* ``crdt-llm``: a client, the relay and the node with its engine, as ``crdt-llm serve`` runs them;
  once in each weight format, and once typed word by word with hints of the draft on the way.
* ``llama.cpp`` and ``vLLM``: their servers, tuned as their documentation advises, with prefix
  caching; their client sends all messages with every request. Their environments are made by
  themselves, once; a peer that cannot be had here is skipped, with the reason.
* ``transformers``: ``generate`` in bf16; its KV cache lives as long as one request.

Each goes on with its own replies. TTFT is what the client sees: from handing over the text until
the first characters of the reply are there. The first turn warms up and does not count: figures are
medians over the turns 2 to 20 (or 100), sums are over all.

The bars, each against the best of the other peers: TTFT at most 0.6 x (0.3 x with hints), decode at
least 1.0 x (and 2 x ``transformers.generate``), bytes that the client sends at most 0.15 x over the
20 turns, and 0.04 x over the 100 short ones.

A longer history makes attention slower, and nothing else may grow with it. So the 100 short turns
have one more bar: the growth of TTFT from around turn 10 to around turn 100 is at most 1.3 x the
growth of a pure attention baseline, ``(L + A(c100)) / (L + A(c10))``. ``L`` is the time of all
linear layers for the new rows of a turn, and of the head for one; ``A(c)`` the time of torch's
``scaled_dot_product_attention`` of these rows to ``c`` cached tokens, with the model's heads, in
all layers; both in bf16. Rows and contexts are the medians of our own turns there. :mod:`physics`
measures it once the peers are gone.

The limits: TTFT cannot be below the prefill of the *new* tokens and one step, however long the
history is; a decode step must read every weight once, so tokens/s cannot be above memory bandwidth
by the size of the weights. Both are computed from measured peaks (:mod:`limits`), and the distance
from them is printed. What a client must send is the text that was typed.

    python bench/chat.py [--turns 20] [--short] [--without vllm …] [--plots DIR]

The last line is the result as JSON; ``must`` holds the bars.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from limits import Limit, Machine, Matrices, measure
from ours import CrdtLlm, conversations, serving
from peer import LAST, REST_S, TURN_S_MAX, Skipped, Summary
from theirs import GENERATE, llama_cpp, transformers, vllm
from verdicts import Verdict, rounded, show

from crdt_llm.inference.models.folders import DEFAULT_MODEL, resolve

if TYPE_CHECKING:
    from collections.abc import Sequence

    from peer import Peer, Turn

REPLY_TOKENS = 64
SHORT_TURNS = 100
SHORT_REPLY_TOKENS = 32
EARLY, LATE = slice(5, 15), slice(-10, None)  # turns around the 10th, and the last ones of 100
OURS = "crdt-llm (int8)"
TYPED = "crdt-llm, typed"
ROWS = {OURS: "int8", "crdt-llm (bf16)": "bf16"}  # ours, and their weight formats

TTFT_BAR, TYPED_TTFT_BAR = 0.6, 0.3
RATE_BAR, GENERATE_RATE_BAR = 1.0, 2.0
BYTES_BAR, SHORT_BYTES_BAR = 0.15, 0.04
GROWTH_BAR = 1.3

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
        f" {'bytes sent':>11} {'prefilled':>10} {'drafted':>8} {'wasted':>7}"
    )
    for name, one in summaries.items():
        print(
            f"{name:20} {one.ttft_ms:8.0f} {one.ttft_last_ms:8.0f} {one.tokens_per_s:9.1f}"
            f" {one.tokens_per_s_last:8.1f} {one.sent_bytes:11,} {one.prefilled:10,}"
            f" {one.drafted:8,} {one.wasted:7,}"
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
                await asyncio.sleep(REST_S)
    return had, skipped


async def _peers(
    stack: AsyncExitStack, options: argparse.Namespace, model: Path, folder: Path
) -> tuple[list[Peer], dict[str, str]]:
    peers: list[Peer] = []
    skipped: dict[str, str] = {}
    # A server each: conversations that say the same share their KV, and the second one would be
    # spared its prefill.
    rows = ROWS if options.short else ROWS | {TYPED: ROWS[OURS]}  # 100 typed turns: half an hour
    for name, weights in rows.items():
        place = folder / name
        place.mkdir()
        server = await stack.enter_async_context(serving(place, model, ("--weights", weights)))
        (one,) = await stack.enter_async_context(conversations(server, place / "client", 1))
        peers.append(CrdtLlm(one, name, typing=server if name == TYPED else None))
    servers = {"llama.cpp": llama_cpp(folder), "vllm": vllm(folder, model)}
    for name, other in servers.items():
        if name in options.without:
            skipped[name] = "as asked"
            continue
        try:
            chats = await stack.enter_async_context(other)
            peers += chats(1)
        except Skipped as why:
            skipped[name] = str(why)
    if "transformers" in options.without:
        skipped["transformers"] = "as asked"
    else:
        peers.append(await stack.enter_async_context(transformers(folder, model)))
    for name, reason in skipped.items():
        print(f"{name} is skipped: {reason}")
    return peers, skipped


@dataclass(frozen=True, slots=True)
class Growth:
    """How much longer the first token takes at the end of 100 turns than around the tenth.

    Attributes:
        measured: By the client.
        rows: New tokens of a turn.
        early: Tokens in the cache around turn 10.
        late: Tokens in the cache at the end.
    """

    measured: float
    rows: int
    early: int
    late: int

    @classmethod
    def of(cls, turns: Sequence[Turn]) -> Growth | None:
        """Of one peer's turns, if there are enough."""
        if len(turns) < SHORT_TURNS:
            return None
        early, late = turns[EARLY], turns[LATE]

        def ttft_ms(had: Sequence[Turn]) -> float:
            return statistics.median(turn.ttft_ms for turn in had)

        def cached(had: Sequence[Turn]) -> int:
            return round(statistics.median(turn.prompt - turn.prefilled for turn in had))

        rows = statistics.median(turn.prefilled for turn in (*early, *late))
        return cls(ttft_ms(late) / ttft_ms(early), round(rows), cached(early), cached(late))

    def expected(self, model: Path) -> float:
        """What the attention alone makes of it; measured now."""
        parts = measure(
            "attention", str(model), *(str(number) for number in (self.rows, self.early, self.late))
        )
        linear_ms = parts["linear_ms"]
        by_attention: float = (linear_ms + parts["late_ms"]) / (linear_ms + parts["early_ms"])
        return by_attention


def verdicts(summaries: dict[str, Summary], *, short: bool) -> list[Verdict]:
    """The bars of a chat: ours against the best of the others, whoever that is in each figure."""
    others = [one for name, one in summaries.items() if not name.startswith("crdt-llm")]
    if not others:
        return []
    found = []
    least_bytes = min(one.sent_bytes for one in others)
    for name in (name for name in ROWS if name in summaries):
        mine = summaries[name]
        part = mine.sent_bytes / least_bytes
        bar = SHORT_BYTES_BAR if short else BYTES_BAR
        found.append(Verdict(name, "bytes sent by the best peer's", part, bar))
        if short:
            continue
        part = mine.ttft_ms / min(one.ttft_ms for one in others)
        found.append(Verdict(name, "TTFT by the best peer's", part, TTFT_BAR))
        part = mine.tokens_per_s / max(one.tokens_per_s for one in others)
        found.append(Verdict(name, "decode by the best peer's", part, RATE_BAR, at_most=False))
        if GENERATE in summaries:
            part = mine.tokens_per_s / summaries[GENERATE].tokens_per_s
            what = "decode by transformers.generate's"
            found.append(Verdict(name, what, part, GENERATE_RATE_BAR, at_most=False))
    if TYPED in summaries:
        part = summaries[TYPED].ttft_ms / min(one.ttft_ms for one in others)
        found.append(Verdict(TYPED, "TTFT by the best peer's", part, TYPED_TTFT_BAR))
    return found


def limits(
    turns: dict[str, list[Turn]], summaries: dict[str, Summary], machine: Machine, model: Path
) -> dict[str, Limit]:
    """How far our rows are from what the machine allows; also printed."""
    matrices = Matrices.of(model)
    print(f"\n{machine}")
    found = {}
    for name, weights in ROWS.items():
        if name not in turns:
            continue
        found[name] = Limit.of(
            matrices,
            machine,
            weights,
            new_tokens=statistics.median(turn.prefilled for turn in turns[name][1:]),
            ttft_ms=summaries[name].ttft_ms,
            tokens_per_s=summaries[name].tokens_per_s,
        )
        megabytes = matrices.read_bytes(weights) / 1e6
        print(f"{name}, {megabytes:,.0f} MB of weights: {found[name]}")
    return found


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
    machine = Machine.measured()
    with tempfile.TemporaryDirectory(prefix="crdt-llm-chat-") as folder:
        turns, skipped = asyncio.run(chat(options, model, Path(folder)))
    summaries = {name: Summary.of(had) for name, had in turns.items()}
    table(summaries)
    distance = limits(turns, summaries, machine, model)
    must = verdicts(summaries, short=options.short)
    grown = {name: growth for name, had in turns.items() if (growth := Growth.of(had)) is not None}
    expected = {name: grown[name].expected(model) for name in ROWS if name in grown}
    for name, by_attention in expected.items():
        what = f"growth of TTFT {grown[name].measured:.2f} by that of attention {by_attention:.2f}:"
        must.append(Verdict(name, what, grown[name].measured / by_attention, GROWTH_BAR))
    show(must)
    if options.plots is not None:
        from plots import draw_chat  # noqa: PLC0415 - a drawing library only if something is drawn

        draw_chat(turns, options.plots, "short" if options.short else "chat")
    result = {
        "bench": "chat",
        "turns": options.turns,
        "short": options.short,
        "model": options.model,
        "peers": {name: asdict(summary) for name, summary in summaries.items()},
        "ratios": ratios(summaries),
        "must": [one.plain() for one in must],
        "machine": asdict(machine),
        "limits": {name: asdict(limit) for name, limit in distance.items()},
        "ttft_growth": {name: asdict(growth) for name, growth in grown.items()},
        "ttft_growth_by_attention": expected,
        "skipped": skipped,
    }
    print(json.dumps(rounded(result)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
