"""What the weight format costs in quality: the engine's logits against float32.

Both read the same windows of real English text that comes with Python and its packages: the
language reference (``pydoc_data.topics``) and the licences of what is installed. Printed are the
mean negative log-likelihood of the text under each, the Kullback-Leibler divergence of the engine's
distribution from that of float32, and how often the most likely token is the same. The reference is
transformers in float32; beside the engine stands transformers in bfloat16, which is what most
people run.

The bar is an NLL within 0.01 of float32 and a KL of at most 0.01 nats; the exit code says whether
it holds. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
from dataclasses import asdict, dataclass
from pydoc_data import topics
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer

from crdt_llm.inference.engine.torch_engine import TorchEngine
from crdt_llm.inference.forward.llama import WEIGHT_FORMATS, Llama
from crdt_llm.inference.models.folders import DEFAULT_MODEL, resolve

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from torch import Tensor

    Logits = Callable[[list[int]], Tensor]

TOKENS = 20_000
WINDOW = 1000  # positions that each token is predicted from, at most
ROWS = 100  # logits that are compared at once: a vocabulary's width in float64 each
NLL_MAX = 0.01
KL_MAX = 0.01


@dataclass(slots=True)
class Quality:
    """Sums over tokens; means once divided."""

    tokens: int = 0
    nll: float = 0.0
    reference_nll: float = 0.0
    kl: float = 0.0
    same_top: float = 0.0

    def add(self, reference: Tensor, logits: Tensor, targets: Tensor) -> None:
        """Take rows of logits into account, each with the token that came next."""
        left, right = reference.double().log_softmax(-1), logits.double().log_softmax(-1)
        self.tokens += len(targets)
        self.reference_nll -= float(left.gather(1, targets[:, None]).sum())
        self.nll -= float(right.gather(1, targets[:, None]).sum())
        self.kl += float((left.exp() * (left - right)).sum())
        self.same_top += float((left.argmax(-1) == right.argmax(-1)).sum())

    def means(self) -> Quality:
        """Per token."""
        sums = asdict(self)
        count = sums.pop("tokens")
        return Quality(count, **{name: value / count for name, value in sums.items()})


def texts() -> Iterator[str]:
    """Prose that is on every machine that runs this, in turns."""
    reference = [topics.topics[name] for name in sorted(topics.topics)]
    licences = []
    for distribution in sorted(
        importlib.metadata.distributions(), key=lambda one: one.name.lower()
    ):
        for file in distribution.files or ():
            if file.name.upper().startswith(("LICENSE", "LICENCE", "COPYING")):
                text = file.locate().read_text(encoding="utf-8", errors="replace")  # type: ignore[attr-defined]  # a path
                if text not in licences:
                    licences.append(text)
    yield "\n\n".join(licences)
    yield "\n\n".join(reference)


def windows(tokenizer: Tokenizer, tokens: int) -> Iterator[list[int]]:
    """So many tokens of text, in windows, half from each source."""
    sources = [tokenizer.encode(text).ids for text in texts()]
    each = tokens // WINDOW // len(sources)
    for ids in sources:
        stride = max(WINDOW, len(ids) // max(1, each))
        starts = list(range(0, len(ids) - WINDOW, stride))[:each]
        if len(starts) < each:
            raise SystemExit(f"a source has only {len(ids)} tokens: ask for fewer")
        for start in starts:
            yield ids[start : start + WINDOW]


def of_transformers(folder: Path, dtype: torch.dtype) -> Logits:
    """The logits of a window in one pass of transformers."""
    from transformers import AutoModelForCausalLM  # noqa: PLC0415 - slow to load

    # The library's annotations cover every model there is; ours is one.
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)

    def logits(ids: list[int]) -> Tensor:
        found: Tensor = model(torch.tensor([ids])).logits[0]
        return found

    return logits


def of_engine(engine: TorchEngine) -> Logits:
    """The logits of a window, computed as for a conversation."""

    def logits(ids: list[int]) -> Tensor:
        engine.warm(0, ids)
        while engine.busy:
            engine.step(lambda _request, _event: None)
        found = engine.logits(ids)
        engine.forget(ids, 0)
        return torch.from_numpy(found)

    return logits


@torch.inference_mode()
def measure(folder: Path, tokens: int) -> dict[str, Quality]:
    """Every candidate against float32, window by window."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    reference = of_transformers(folder, torch.float32)
    candidates = {
        **{
            f"engine ({weights})": of_engine(TorchEngine(Llama(folder, weights), 1 << 28))
            for weights in WEIGHT_FORMATS
        },
        "transformers bf16": of_transformers(folder, torch.bfloat16),
    }
    found = {name: Quality() for name in candidates}
    for number, ids in enumerate(windows(tokenizer, tokens)):
        expected = reference(ids)
        targets = torch.tensor(ids[1:])
        for name, logits in candidates.items():
            rows = logits(ids)
            for start in range(0, len(targets), ROWS):
                part = slice(start, min(start + ROWS, len(targets)))
                found[name].add(expected[part], rows[part], targets[part])
        print(f"window {number + 1}", file=sys.stderr)
    return {name: quality.means() for name, quality in found.items()}


def main() -> int:
    """Measure, print the table and the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    options = parser.parse_args()
    folder = resolve(options.model, fetch=True)
    found = measure(folder, options.tokens)
    print(f"{'':18} {'NLL':>8} {'- float32':>10} {'KL':>8} {'same top':>9}")
    for name, one in found.items():
        difference = one.nll - one.reference_nll
        print(f"{name:18} {one.nll:8.4f} {difference:+10.4f} {one.kl:8.4f} {one.same_top:9.1%}")
    ours = found["engine (int8)"]
    holds = ours.nll - ours.reference_nll <= NLL_MAX and ours.kl <= KL_MAX
    print(
        json.dumps({"bench": "quality", "holds": holds} | {k: asdict(v) for k, v in found.items()})
    )
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
