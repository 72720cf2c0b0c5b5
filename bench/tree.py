"""What of a conversation's tree is computed twice, and what a fork costs.

Through ``crdt-llm serve`` and the Python client, with the real model. Tokens that were known and
are computed again must be 0 in each of: a turn that is appended, a fork (an edited question),
another reply in the place of one, a turn after the client was closed and came back, and the merge
of what two devices wrote while one was offline. Counted twice, and the larger number is shown: by
what the reply says of itself, and by what the engine computed meanwhile beyond the tokens that are
new.

Then a path of 2,000 tokens is forked at its last question, several times. The bar: the first token
comes within two decode steps and the prefill of the new tokens. What those take is measured in the
same run, in turns with the forks, on an engine of its own without a server: as many new tokens
behind as many known ones, and single steps there. That is the limit as well: it leaves two steps
for the way to the server and back, the log, the document, and sampling.

    python bench/tree.py [--tokens 2000] [--forks 9]

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

from ours import conversations, fill, serving, whole
from peer import TURN_S_MAX, Stopwatch
from verdicts import Verdict, rounded, show

from crdt_llm import Client
from crdt_llm.inference.contract import Sampled, SamplingParams
from crdt_llm.inference.engine.process import EngineProcess
from crdt_llm.inference.models.folders import DEFAULT_MODEL, resolve

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from ours import Server

    from crdt_llm.document.schema import Usage
    from crdt_llm.sync.client.client import OpenConversation, Reply, Sampling

PREFILLED = "crdt_llm_node_prefilled_tokens_total"
REPLY_TOKENS = 16
GREEDY: Sampling = {"max_tokens": REPLY_TOKENS, "temperature": 0.0, "ignore_eos": True}
STEPS = 16  # decode steps that are timed beside each fork
STEPS_BESIDE = 2  # that a fork may take in addition to its prefill
FIRST_ID, IDS = 100, 10_000  # for paths of the bare engine: any ids are as good as others


def known_after(usage: Usage) -> int:
    """Tokens that were read when a reply ended: all but its last one, at least."""
    return usage.prompt + usage.sampled - 1


async def taken(reply: Reply) -> Usage:
    """Take a whole reply."""
    async with asyncio.timeout(TURN_S_MAX):
        return await whole(reply, Stopwatch(), REPLY_TOKENS)


async def again(server: Server, known: int, play: Callable[[], Awaitable[Usage]]) -> int:
    """How many of the known tokens are computed again.

    Args:
        server: Whose engine it is; it does nothing else meanwhile.
        known: Tokens of the prompt that were read before.
        play: What may compute them again.
    """
    before = (await server.counts()).get(PREFILLED, 0)
    usage = await play()
    computed = round((await server.counts())[PREFILLED] - before)
    return max(known - usage.reused, computed - (usage.prompt - known), 0)


async def reuse(server: Server, folder: Path) -> dict[str, int]:
    """Play every way in which a path goes on; tokens computed again, by way."""
    found: dict[str, int] = {}
    async with conversations(server, folder / "phone", 1) as (phone,):
        first = await taken(await phone.ask("What is a tide, and who noticed it first?", **GREEDY))
        second: list[Usage] = []

        async def append() -> Usage:
            second.append(await taken(await phone.ask("And how often does it come?", **GREEDY)))
            return second[0]

        found["append"] = await again(server, known_after(first), append)
        question = phone.path()[-2]
        forked: list[Usage] = []

        async def fork() -> Usage:
            text = "And why is there hardly any in a lake?"
            forked.append(await taken(await phone.fork(question, text, **GREEDY)))
            return forked[0]

        found["fork"] = await again(server, known_after(first), fork)

        async def regenerate() -> Usage:
            forked.append(await taken(await phone.regenerate(**GREEDY)))
            return forked[1]

        found["regenerate"] = await again(server, forked[0].prompt, regenerate)
        name = phone.id

    back: list[Usage] = []

    async def reconnect() -> Usage:
        async with _device(server, folder, "phone") as client:
            phone = await client.open(name)
            back.append(await taken(await phone.ask("Good to be back. Go on?", **GREEDY)))
            return back[0]

    found["reconnect"] = await again(server, known_after(forked[1]), reconnect)
    async with _device(server, folder, "phone") as one, _device(server, folder, "tablet") as other:
        phone, tablet = await one.open(name), await other.open(name)
        await phone.synced_once()
        await tablet.synced_once()
        tablet.pause()
        for number in range(3):
            await tablet.send(f"Written on a train, in a tunnel, number {number}.")
        offline = await tablet.ask("And asked on a train: what do you make of it?", **GREEDY)
        meanwhile = await taken(await phone.ask("Meanwhile, at home: and the moon?", **GREEDY))

        async def merge() -> Usage:
            tablet.resume()
            return await taken(offline)

        found["offline merge"] = await again(server, known_after(meanwhile), merge)
    return found


def _device(server: Server, folder: Path, name: str) -> Client:
    return Client(server.url, token=server.token, data=folder / name, device=name)


@dataclass(frozen=True, slots=True)
class Fork:
    """Medians over forks of one path.

    Attributes:
        context: Tokens that the forks share.
        new_tokens: Of each fork.
        ttft_ms: As the client sees it.
        prefill_ms: Of so many tokens behind so many, by the engine alone.
        step_ms: Of decoding there, by the engine alone.
    """

    context: int
    new_tokens: int
    ttft_ms: float
    prefill_ms: float
    step_ms: float

    @property
    def bar_ms(self) -> float:
        """What the first token may take."""
        return self.prefill_ms + STEPS_BESIDE * self.step_ms


async def fork_costs(
    conversation: OpenConversation, engine: EngineProcess, tokens: int, forks: int
) -> Fork:
    """Fork a path of so many tokens, in turns with the same work on a bare engine."""
    await fill(conversation, tokens)
    await taken(await conversation.ask("Which of these words did you like best?", **GREEDY))
    question = conversation.path()[-2]
    ttfts_ms, prefills_ms, steps_ms = [], [], []
    usage: Usage | None = None
    for number in range(forks + 1):  # the first one warms up
        watch = Stopwatch()
        text = f"{number} times I read it; which of these words did you like least?"
        async with asyncio.timeout(TURN_S_MAX):
            reply = await conversation.fork(question, text, **GREEDY)
            usage = await whole(reply, watch, REPLY_TOKENS)
        known = [FIRST_ID + place % IDS for place in range(usage.reused)]
        await engine.warm(known)
        before = time.perf_counter()
        await engine.warm([*known, *[FIRST_ID + IDS + number] * usage.prefilled])
        if number:
            ttfts_ms.append(watch.ttft_ms)
            prefills_ms.append(1000 * (time.perf_counter() - before))
            steps_ms.append(await _step_ms(engine, known))
    if usage is None:
        raise SystemExit("at least one fork is needed")
    return Fork(
        context=usage.reused,
        new_tokens=usage.prefilled,
        ttft_ms=statistics.median(ttfts_ms),
        prefill_ms=statistics.median(prefills_ms),
        step_ms=statistics.median(steps_ms),
    )


async def _step_ms(engine: EngineProcess, ids: list[int]) -> float:
    """A decode step behind these ids, the mean of some: they are reported several at a time."""
    params = SamplingParams(max_tokens=STEPS + 1, ignore_eos=True)
    times = [
        time.perf_counter()
        async for event in engine.generate(ids, params, len(ids))
        if isinstance(event, Sampled)
    ]
    return 1000 * (times[-1] - times[0]) / STEPS


async def run(
    options: argparse.Namespace, model: Path, folder: Path
) -> tuple[dict[str, int], Fork]:
    """Both parts on one server."""
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(serving(folder, model))
        found = await reuse(server, folder)
        engine = await stack.enter_async_context(await EngineProcess.start(model))
        (long,) = await stack.enter_async_context(conversations(server, folder / "fork", 1))
        return found, await fork_costs(long, engine, options.tokens, options.forks)


def main() -> int:
    """Measure, print the rows and the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2000, help="of the path that is forked")
    parser.add_argument("--forks", type=int, default=9)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    options = parser.parse_args()
    if options.forks < 1:
        parser.error("--forks is at least 1")
    model = resolve(options.model, fetch=True, report=lambda line: print(line, file=sys.stderr))
    with tempfile.TemporaryDirectory(prefix="crdt-llm-tree-") as folder:
        found, fork = asyncio.run(run(options, model, Path(folder)))
    print(
        f"fork at {fork.context:,} tokens, {fork.new_tokens} new ones: first token"
        f" {fork.ttft_ms:.0f} ms; prefill alone {fork.prefill_ms:.0f} ms,"
        f" a step {fork.step_ms:.1f} ms"
    )
    must = [
        Verdict(way, "known tokens computed again", tokens, 0, unit="tokens")
        for way, tokens in found.items()
    ]
    what = f"first token behind {fork.context:,} known ones"
    must.append(Verdict("fork", what, fork.ttft_ms, fork.bar_ms, unit="ms"))
    show(must)
    result = {
        "bench": "tree",
        "computed_again": found,
        "fork": asdict(fork),
        "must": [one.plain() for one in must],
    }
    print(json.dumps(rounded(result)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
