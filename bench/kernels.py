"""What the native kernels are worth: the same steps with them and in torch's operations.

For each length of the cache a prompt of 64 rows is computed behind it, and then 30 tokens one at a
time, each with the logits that follow: once by the kernels, once as on a machine that cannot build
them. Both are in this process and take turns, so that what else the machine does meets both. It is
CPU time that counts, of one thread unless more are asked for, and of several rounds the best: with
more threads CPU time holds what they wait for each other too. What one reply takes at best is in
``limits.py``.

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
from verdicts import rounded

from crdt_llm.inference.forward.llama import Llama
from crdt_llm.inference.forward.weights import INT8
from crdt_llm.inference.kv.pool import Chunk
from crdt_llm.inference.kv.tree import TILE
from crdt_llm.inference.models.folders import DEFAULT_MODEL, resolve

if TYPE_CHECKING:
    from torch import Tensor

CONTEXTS = (0, 1024)
PROMPT_ROWS = 64
TOKENS = 30
ROUNDS = 8  # of which the best counts: a neighbour only ever adds
SEED = 1  # of the ids, which do not change what a step costs


@dataclass(frozen=True, slots=True)
class Cost:
    """CPU time of one round, or of the best.

    Attributes:
        prefill_ms: Of the prompt.
        decode_ms: Of a token, the median.
    """

    prefill_ms: float
    decode_ms: float

    @classmethod
    def best(cls, rounds: list[Cost]) -> Cost:
        """The least of each."""
        prefill, decode = (
            min(one.prefill_ms for one in rounds),
            min(one.decode_ms for one in rounds),
        )
        return cls(prefill, decode)


class Steps:
    """One conversation, as a model steps through it.

    Args:
        model: Computes.
        ids: Its tokens, those before the prompt included.
    """

    def __init__(self, model: Llama, ids: Tensor) -> None:
        self._model = model
        self._ids = ids
        self._slots = range(-(-len(ids) // TILE))
        self._pool = model.new_pool((len(self._slots) + 1) * model.slot_bytes)

    def compute(self, start: int, end: int) -> None:
        """The rows of some positions, tile by tile, and the logits that follow the last one."""
        while start < end:
            rows = min(end, start - start % TILE + TILE) - start
            slots = self._slots[: start // TILE + 1]
            chunk = Chunk(start, rows, slots)
            self._model.forward(self._ids[start : start + rows], [chunk], self._pool)
            start += rows
        self._model.logits(self._pool, [(slots[-1], (end - 1) % TILE)])

    def round(self, context: int) -> Cost:
        """A prompt behind so many tokens that were computed before, and the tokens after it."""
        prompt_end = context + PROMPT_ROWS
        prefill = self._took_ms(context, prompt_end)
        tokens = [self._took_ms(at, at + 1) for at in range(prompt_end, prompt_end + TOKENS)]
        return Cost(prefill, statistics.median(tokens))

    def _took_ms(self, start: int, end: int) -> float:
        before = time.process_time()
        self.compute(start, end)
        return 1000 * (time.process_time() - before)


def measure(models: dict[str, Llama], context: int) -> dict[str, Cost]:
    """Each model's cost at one length of the cache."""
    vocabulary = next(iter(models.values())).vocabulary
    drawn = torch.Generator().manual_seed(SEED)
    ids = torch.randint(vocabulary, (context + PROMPT_ROWS + TOKENS,), generator=drawn)
    steps = {name: Steps(model, ids) for name, model in models.items()}
    for one in steps.values():
        if context:
            one.compute(0, context)
        one.round(context)  # the first rows of a place in memory cost more
    rounds = [{name: one.round(context) for name, one in steps.items()} for _ in range(ROUNDS)]
    return {name: Cost.best([each[name] for each in rounds]) for name in steps}


def main() -> None:
    """Measure, print the table and the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    folder = resolve(options.model, fetch=True)
    models = {
        "native": Llama(folder, INT8, native=True),
        "torch": Llama(folder, INT8, native=False),
    }
    found = {}
    print(f"{'context':>7} {'':8} {f'{PROMPT_ROWS} rows':>10} {'a token':>10}")
    with torch.inference_mode():
        for context in options.contexts:
            costs = found[str(context)] = measure(models, context)
            for name, cost in costs.items():
                prefill, decode = cost.prefill_ms, cost.decode_ms
                print(f"{context:7} {name:8} {prefill:7.1f} ms {decode:7.1f} ms")
            native, plain = costs["native"], costs["torch"]
            prefill = plain.prefill_ms / native.prefill_ms
            decode = plain.decode_ms / native.decode_ms
            print(f"{'':7} {'ratio':8} {prefill:8.1f} x {decode:8.1f} x", flush=True)
    facts = {
        at: {name: asdict(cost) for name, cost in costs.items()} for at, costs in found.items()
    }
    result = {"bench": "kernels", "threads": options.threads, "contexts": facts}
    print(json.dumps(rounded(result)))


if __name__ == "__main__":
    main()
