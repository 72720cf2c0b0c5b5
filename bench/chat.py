"""What a chat costs, turn by turn: a replicated conversation against resending the history.

One chat of 20 turns, about 75 new prompt tokens and 64 reply tokens a turn, streaming, greedy, on
one model folder. The peers take turns within one run, with the same texts, so that whatever else
the machine does hits them alike:

* ``crdt-llm``: a client, the relay and the node with its engine, as ``crdt-llm serve`` runs them;
  real processes and sockets, every update durable before it is passed on.
* ``transformers``: ``generate`` in bf16 in a process of its own; its client sends all messages with
  every request, over a pipe, and gets a line per token. Its KV cache lives as long as one request.

Each goes on with its own replies. TTFT is what the client sees: from handing over the text until
the first characters of the reply are there. The first turn warms up and does not count.

The limits: TTFT cannot be below the prefill of the *new* tokens and one step, however long the
history is; a decode step must read every weight once, so tokens/s cannot be above memory bandwidth
by the size of the weights, both of which are printed. What a client must send is the text that was
typed.

    python bench/chat.py [--turns 20] [--model smollm2-135m]

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
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from crdt_llm import Client
from crdt_llm.inference.models import DEFAULT_MODEL, resolve

if TYPE_CHECKING:
    from asyncio.subprocess import Process
    from collections.abc import AsyncIterator, Sequence

    from crdt_llm.sync.client import OpenConversation

REPLY_TOKENS = 64
STARTUP_S_MAX = 180  # a cold disk and two busy cores
TURN_S_MAX = 180  # no single reply takes longer, or something hangs
LAST = 5  # turns whose median shows what a long history costs
PROBE_BYTES = 256 << 20  # read to measure the memory's bandwidth: far beyond any cache
LOG_CHARACTERS_SHOWN = 2000  # of a process that failed: its last stack
LINE_BYTES_MAX = 1 << 20  # a request with its whole history

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


def said(turn: int) -> str:
    """What the user says in a turn: some 70 tokens, each time others."""
    opening, detail = OPENINGS[turn % len(OPENINGS)], DETAILS[(turn // 4) % len(DETAILS)]
    return f"Turn {turn + 1}. {opening} {detail} {QUESTIONS[turn % len(QUESTIONS)]}"


@dataclass(frozen=True, slots=True)
class Turn:
    """What one turn cost, as its client saw it.

    Attributes:
        ttft_ms: From the text until the first characters of the reply.
        tokens_per_s: Of the reply, after its first token.
        sent_bytes: What the client sent.
        prefilled: Prompt tokens that were computed.
        prompt: Prompt tokens in all.
    """

    ttft_ms: float
    tokens_per_s: float
    sent_bytes: int
    prefilled: int
    prompt: int


class Peer(Protocol):
    """Someone to chat with, who remembers the chat or has a client that does."""

    @property
    def name(self) -> str:
        """What the table calls it."""

    async def turn(self, text: str) -> Turn:
        """Say something, and take the whole of a reply of :data:`REPLY_TOKENS` tokens."""


class Stopwatch:
    """When the parts of one reply came."""

    def __init__(self) -> None:
        self._start = self._first = self._last = time.perf_counter()
        self._parts = 0

    def part(self) -> None:
        """Something of the reply is there."""
        self._last = time.perf_counter()
        if not self._parts:
            self._first = self._last
        self._parts += 1

    @property
    def ttft_ms(self) -> float:
        """From the making of this watch until the first part."""
        return 1000 * (self._first - self._start)

    def tokens_per_s(self, tokens: int) -> float:
        """The rate at which the tokens after the first came."""
        took_s = self._last - self._first
        if self._parts < 2 or took_s <= 0:
            raise SystemExit("a reply came in one piece: there is no rate to measure")
        return (tokens - 1) / took_s


# --- ours --------------------------------------------------------------------------------------


class CrdtLlm:
    """A conversation of ours."""

    name = "crdt-llm"

    def __init__(self, conversation: OpenConversation) -> None:
        self._conversation = conversation

    async def turn(self, text: str) -> Turn:
        """See :class:`Peer`."""
        sent = self._conversation.traffic.live.sent_bytes
        watch = Stopwatch()
        reply = await self._conversation.ask(
            text, max_tokens=REPLY_TOKENS, ignore_eos=True, temperature=0.0
        )
        async for _ in reply:
            watch.part()
        entry = await reply.entry()
        usage = entry.usage
        if usage is None or usage.sampled != REPLY_TOKENS:
            raise SystemExit(f"a reply ended as {entry.state} with {usage}")
        return Turn(
            ttft_ms=watch.ttft_ms,
            tokens_per_s=watch.tokens_per_s(usage.sampled),
            sent_bytes=self._conversation.traffic.live.sent_bytes - sent,
            prefilled=usage.prefilled,
            prompt=usage.prompt,
        )


@asynccontextmanager
async def crdt_llm(folder: Path, model: Path) -> AsyncIterator[Peer]:
    """``crdt-llm serve`` and a client of it."""
    data = folder / "server"
    arguments = ["-m", "crdt_llm", "serve", "--port", "0", "--data", str(data)]
    async with _process(*arguments, "--model", str(model), log=folder / "serve.log") as process:
        ready = await _line(process, STARTUP_S_MAX)
        url = ready.split()[1].decode()
        token = (data / "owner.token").read_text().strip()
        async with Client(url, token=token, data=folder / "client", device="bench") as client:
            conversation = await client.create("bench")
            await conversation.synced_once()
            yield CrdtLlm(conversation)


# --- transformers ------------------------------------------------------------------------------


class Transformers:
    """A client that keeps the messages and sends all of them with each request."""

    name = "transformers"

    def __init__(self, process: Process) -> None:
        self._process = process
        self._messages: list[dict[str, str]] = []

    async def turn(self, text: str) -> Turn:
        """See :class:`Peer`."""
        self._messages.append({"role": "user", "content": text})
        watch = Stopwatch()
        request = json.dumps({"messages": self._messages, "max_tokens": REPLY_TOKENS})
        sent = request.encode() + b"\n"
        _input(self._process).write(sent)
        reply: list[str] = []
        while True:
            said_back: dict[str, Any] = json.loads(await _line(self._process, TURN_S_MAX))
            if "prompt" in said_back:
                break
            watch.part()
            reply.append(said_back["text"])
        self._messages.append({"role": "assistant", "content": "".join(reply)})
        prompt: int = said_back["prompt"]
        return Turn(
            ttft_ms=watch.ttft_ms,
            tokens_per_s=watch.tokens_per_s(len(reply)),
            sent_bytes=len(sent),
            prefilled=prompt,
            prompt=prompt,
        )


@asynccontextmanager
async def transformers(folder: Path, model: Path) -> AsyncIterator[tuple[Peer, float]]:
    """A process that generates, and the bandwidth that it measured, in bytes per second."""
    arguments = [__file__, "--generate", str(model)]
    async with _process(*arguments, log=folder / "transformers.log") as process:
        ready = json.loads(await _line(process, STARTUP_S_MAX))
        yield Transformers(process), ready["bytes_per_s"]


def generate(model_dir: Path) -> None:
    """The other process: answer requests on stdin, a line a token, until it is closed."""
    import torch  # noqa: PLC0415 - only this process pays for it
    from transformers import (  # noqa: PLC0415 - as above
        AutoModelForCausalLM,
        AutoTokenizer,
    )
    from transformers.generation.streamers import BaseStreamer  # noqa: PLC0415 - as above

    # The library's annotations cover every tokenizer and model there is; ours is one.
    tokenizer: Any = AutoTokenizer.from_pretrained(model_dir)
    model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16)
    model.eval()

    def say(fact: dict[str, Any]) -> None:
        sys.stdout.write(json.dumps(fact) + "\n")
        sys.stdout.flush()

    class Lines(BaseStreamer):
        """Says each token as it comes; the first call brings the prompt."""

        def __init__(self) -> None:
            self._in_prompt = True

        def put(self, value: Any) -> None:
            if not self._in_prompt:
                say({"text": tokenizer.decode(value.tolist())})
            self._in_prompt = False

        def end(self) -> None:
            """The request's last line says it."""

    say({"bytes_per_s": _bytes_per_s(torch)})
    for line in sys.stdin:
        request = json.loads(line)
        prompt = tokenizer.apply_chat_template(
            request["messages"], add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        tokens = request["max_tokens"]
        with torch.inference_mode():
            model.generate(
                **prompt,
                do_sample=False,
                min_new_tokens=tokens,
                max_new_tokens=tokens,
                streamer=Lines(),
            )
        say({"prompt": prompt["input_ids"].shape[1]})


def _bytes_per_s(torch: Any) -> float:
    """How fast this machine reads memory that is in no cache; the best of a few tries."""
    data = torch.ones(PROBE_BYTES // 4)
    best_s = float("inf")
    for _ in range(5):
        before = time.perf_counter()
        data.sum()
        best_s = min(best_s, time.perf_counter() - before)
    return PROBE_BYTES / best_s


# --- processes ---------------------------------------------------------------------------------


@asynccontextmanager
async def _process(*arguments: str, log: Path) -> AsyncIterator[Process]:
    """A Python process with pipes, ended with the block."""
    with log.open("wb") as errors:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=errors,
            limit=LINE_BYTES_MAX,
        )
    try:
        yield process
    except BaseException:
        _show_end(log)
        raise
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


def _show_end(log: Path) -> None:
    sys.stderr.write(log.read_text(errors="replace")[-LOG_CHARACTERS_SHOWN:])


async def _line(process: Process, seconds: float) -> bytes:
    if process.stdout is None:
        raise RuntimeError("the process was started without a pipe for its output")
    async with asyncio.timeout(seconds):
        line = await process.stdout.readline()
    if not line:
        raise SystemExit("a process ended: see above")
    return line


def _input(process: Process) -> asyncio.StreamWriter:
    if process.stdin is None:
        raise RuntimeError("the process was started without a pipe for its input")
    return process.stdin


# --- the table ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Summary:
    """A peer's row. Medians over the turns after the first; sums over all."""

    ttft_ms: float
    ttft_last_ms: float
    tokens_per_s: float
    tokens_per_s_last: float
    sent_bytes: int
    prefilled: int

    @classmethod
    def of(cls, turns: Sequence[Turn]) -> Summary:
        """Of one peer's turns."""
        warm = turns[1:]
        return cls(
            ttft_ms=statistics.median(turn.ttft_ms for turn in warm),
            ttft_last_ms=statistics.median(turn.ttft_ms for turn in warm[-LAST:]),
            tokens_per_s=statistics.median(turn.tokens_per_s for turn in warm),
            tokens_per_s_last=statistics.median(turn.tokens_per_s for turn in warm[-LAST:]),
            sent_bytes=sum(turn.sent_bytes for turn in turns),
            prefilled=sum(turn.prefilled for turn in turns),
        )


def table(summaries: dict[str, Summary]) -> None:
    """Print the rows, and how many times better the first one is compared to each other."""
    print(
        f"\n{'':16} {'TTFT ms':>8} {f'last {LAST}':>8} {'tokens/s':>9} {f'last {LAST}':>8}"
        f" {'bytes sent':>11} {'prefilled':>10}"
    )
    for name, one in summaries.items():
        print(
            f"{name:16} {one.ttft_ms:8.0f} {one.ttft_last_ms:8.0f} {one.tokens_per_s:9.1f}"
            f" {one.tokens_per_s_last:8.1f} {one.sent_bytes:11,} {one.prefilled:10,}"
        )
    for name, by in ratios(summaries).items():
        print(
            f"  to {name:11} {by['ttft_ms']:7.1f}x"
            f" {by['ttft_last_ms']:7.1f}x {by['tokens_per_s']:8.1f}x"
            f" {by['tokens_per_s_last']:7.1f}x {by['sent_bytes']:10.1f}x {by['prefilled']:9.1f}x"
        )


def ratios(summaries: dict[str, Summary]) -> dict[str, dict[str, float]]:
    """How many times better the first peer is than each of the others; above 1 is better."""
    (_, ours), *others = summaries.items()
    found: dict[str, dict[str, float]] = {}
    for name, theirs in others:
        mine, its = asdict(ours), asdict(theirs)
        found[name] = {
            key: mine[key] / its[key] if key.startswith("tokens_per_s") else its[key] / mine[key]
            for key in mine
        }
    return found


def _weights_bytes(model: Path) -> int:
    return sum(file.stat().st_size for file in model.glob("*.safetensors"))


async def chat(turns: int, model: Path, folder: Path) -> dict[str, Summary]:
    """All turns with all peers, alternating; who goes first changes from turn to turn."""
    async with AsyncExitStack() as stack:
        theirs, bytes_per_s = await stack.enter_async_context(transformers(folder, model))
        peers = [await stack.enter_async_context(crdt_llm(folder, model)), theirs]
        weights = _weights_bytes(model)
        print(
            f"{weights / 1e6:,.0f} MB of bf16 weights, memory read at {bytes_per_s / 1e9:.0f} GB/s:"
            f" at most {bytes_per_s / weights:,.0f} tokens/s with them as they are\n"
        )
        had: dict[str, list[Turn]] = {peer.name: [] for peer in peers}
        for number in range(turns):
            for peer in peers if number % 2 == 0 else reversed(peers):
                async with asyncio.timeout(TURN_S_MAX):
                    turn = await peer.turn(said(number))
                had[peer.name].append(turn)
                print(
                    f"turn {number + 1:2} {peer.name:14} TTFT {turn.ttft_ms:6.0f} ms,"
                    f" {turn.tokens_per_s:5.1f} tokens/s, sent {turn.sent_bytes:6,} B,"
                    f" prefilled {turn.prefilled:5,} of {turn.prompt:5,}",
                    flush=True,
                )
    return {name: Summary.of(turns) for name, turns in had.items()}


def main() -> int:
    """Chat, print the table and the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--turns", type=int, default=20, help="at least 2: the first warms up")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--generate", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.generate is not None:
        generate(options.generate)
        return 0
    if options.turns < 2:
        parser.error("--turns is at least 2: the first one warms up")
    model = resolve(options.model, fetch=True, report=lambda line: print(line, file=sys.stderr))
    with tempfile.TemporaryDirectory(prefix="crdt-llm-chat-") as folder:
        summaries = asyncio.run(chat(options.turns, model, Path(folder)))
    table(summaries)
    result = {
        "bench": "chat",
        "turns": options.turns,
        "model": options.model,
        "peers": {name: asdict(summary) for name, summary in summaries.items()},
        "ratios": ratios(summaries),
    }
    print(json.dumps(_rounded(result)))
    return 0


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return round(value, 3) if isinstance(value, float) else value


if __name__ == "__main__":
    sys.exit(main())
