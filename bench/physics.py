"""What this machine can do, measured: memory, matrix products, and the attention of a model.

``physics.py machine`` reads a buffer far beyond any cache, and multiplies large matrices in each
weight format's product, all with torch's threads, one for each core; the best of several tries is
the peak.

``physics.py attention MODEL ROWS EARLY LATE`` times what a prefill of so many rows cannot do
without, at two lengths of the cache: the matrices of all layers (once: they do not depend on the
length) and the head for one row, and attention at either length by torch's own
``scaled_dot_product_attention``; everything in bf16, with the model's heads and layers, every layer
with memory of its own. Nothing else of a layer is timed. The median of several rounds counts.

The last line is the result as JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import linear, scaled_dot_product_attention

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

PROBE_BYTES = 1 << 30  # 32 times the largest cache of such machines
PRODUCT_SIDE = 2048  # large enough that a product is all arithmetic
TRIES = 7  # of which the best counts
ROUNDS = 15  # of which the median counts
ZERO = 128  # the zero point of unsigned activations


def _took_s(work: Callable[[], object]) -> float:
    before = time.perf_counter()
    work()
    return time.perf_counter() - before


def _best_s(work: Callable[[], object]) -> float:
    work()  # the first call may choose a kernel
    return min(_took_s(work) for _ in range(TRIES))


def read_bytes_per_s() -> float:
    """How fast memory is read that is in no cache."""
    data = torch.ones(PROBE_BYTES // 4)
    readers: tuple[Callable[[], Tensor], ...] = (data.sum, data.amax, lambda: torch.dot(data, data))
    return PROBE_BYTES / min(_best_s(reader) for reader in readers)


def macs_per_s() -> dict[str, float]:
    """Multiplications with addition, by weight format, in a product of large matrices."""
    side = PRODUCT_SIDE
    left, right = torch.randn(2, side, side, dtype=torch.bfloat16).unbind()
    eights = torch.randint(-128, 128, (2, side, side), dtype=torch.int8)
    products: dict[str, list[Callable[[], object]]] = {
        "bf16": [lambda: left @ right.t()],
        "int8": [lambda: torch._int_mm(eights[0], eights[1].t()), *_prepacked(eights)],  # noqa: SLF001 - the one integer product there is
    }
    return {
        name: side**3 / min(_best_s(product) for product in those)
        for name, those in products.items()
    }


def _prepacked(eights: Tensor) -> list[Callable[[], object]]:
    """OneDNN's product with weights that were laid out before, where this CPU has it."""
    if not torch.cpu._is_vnni_supported():  # noqa: SLF001 - without, oneDNN falls back to a loop
        return []
    rows, weight = eights.view(torch.uint8)[0], torch.ops.onednn.qlinear_prepack(eights[1], None)
    scale = torch.ones(len(weight))
    zeros = torch.zeros(len(weight), dtype=torch.int32)
    product = torch.ops.onednn.qlinear_pointwise.default
    plain: tuple[Any, ...] = (None, 1.0, 0, torch.float32, "none", [], "")
    return [lambda: product(rows, 1.0, ZERO, weight, scale, zeros, *plain)]


class Prefill:
    """What a prefill of some rows cannot do without.

    Args:
        config: The model's, as transformers writes it.
        rows: How many new tokens.
    """

    def __init__(self, config: dict[str, Any], rows: int) -> None:
        self._layers: int = config["num_hidden_layers"]
        self._heads: int = config["num_attention_heads"]
        self._kv_heads: int = config.get("num_key_value_heads") or self._heads
        hidden, inner = config["hidden_size"], config["intermediate_size"]
        self._width: int = config.get("head_dim") or hidden // self._heads
        self._rows = rows
        queries = self._heads * self._width
        shapes = (
            (queries + 2 * self._kv_heads * self._width, hidden),
            (hidden, queries),
            (2 * inner, hidden),
            (hidden, inner),
        )
        self._matrices = [_bf16(*shape) for _ in range(self._layers) for shape in shapes]
        self._inputs = {width: _bf16(rows, width) for _, width in shapes}
        self._head = _bf16(config["vocab_size"], hidden)
        self._last = _bf16(1, hidden)

    def linear(self) -> None:
        """The matrices of all layers for all rows, and the head for one."""
        for matrix in self._matrices:
            linear(self._inputs[matrix.shape[1]], matrix)
        linear(self._last, self._head)

    def attention(self, context: int) -> Callable[[], None]:
        """The attention of all layers, to so many tokens in the cache and the rows themselves.

        The heads of a group stand as further rows of the one they share keys with, which is the
        fast way to say it; which of the new rows sees which other one does not change the time.
        """
        group = self._heads // self._kv_heads
        queries = _bf16(1, self._kv_heads, group * self._rows, self._width)
        length = context + self._rows
        cache = [_bf16(2, 1, self._kv_heads, length, self._width) for _ in range(self._layers)]

        def all_layers() -> None:
            for layer in cache:
                scaled_dot_product_attention(queries, layer[0], layer[1])

        return all_layers


def _bf16(*shape: int) -> Tensor:
    return torch.randn(shape).bfloat16()


def attention(model: Path, rows: int, contexts: tuple[int, int]) -> dict[str, float]:
    """The parts of a prefill at two lengths of the cache, in ms."""
    prefill = Prefill(json.loads((model / "config.json").read_text()), rows)
    early, late = map(prefill.attention, contexts)
    parts = {"linear_ms": prefill.linear, "early_ms": early, "late_ms": late}
    for work in parts.values():
        work()
    rounds = [{name: 1000 * _took_s(work) for name, work in parts.items()} for _ in range(ROUNDS)]
    return {name: statistics.median(one[name] for one in rounds) for name in parts}


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parts = parser.add_subparsers(dest="what", required=True)
    parts.add_parser("machine")
    one = parts.add_parser("attention")
    one.add_argument("model", type=Path)
    for number in ("rows", "early", "late"):
        one.add_argument(number, type=int)
    options = parser.parse_args()
    with torch.inference_mode():
        if options.what == "machine":
            found: dict[str, Any] = {
                "read_bytes_per_s": read_bytes_per_s(),
                "macs_per_s": macs_per_s(),
            }
        else:
            found = attention(options.model, options.rows, (options.early, options.late))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
