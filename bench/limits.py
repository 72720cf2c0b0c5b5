"""How fast it could be: what a model's size and a machine's peaks allow, computed.

This module owns the arithmetic, and knows no torch; :mod:`physics` measures the peaks, in a process
of its own, so that nothing else runs then.

* A token of a prompt multiplies every weight of the layers once; only the last one needs the head
  too. The attention to what is in the cache comes on top and is left out here, so the limit is
  below what can be reached, and the more so the longer the context is.
* The first token of a reply then comes out of a step, and a step reads every weight once. So TTFT
  is at least ``new tokens x MACs / peak of the product + weights / bandwidth``.
* One reply's decode rate is at most ``bandwidth / weights``, the KV left out likewise.

The product is the one of the weight format: of 8 bits for int8 weights, of bf16 for bf16.
"""

from __future__ import annotations

import json
import math
import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

MEASURE_S_MAX = 300  # of one measurement: seconds on a quiet machine
HEADER_BYTES_MAX = 100_000_000  # of a safetensors file: the format's own limit
BYTES_OF_WEIGHT = {"int8": 1, "bf16": 2}
WEIGHTS_A_SCALE, BYTES_OF_SCALE = 64, 2  # of an int8 matrix: bf16
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True, slots=True)
class Matrices:
    """The matrices that a token is multiplied with.

    Attributes:
        layers: Weights in all layers together.
        head: Weights of the output head.
    """

    layers: int
    head: int

    @classmethod
    def of(cls, model: Path) -> Matrices:
        """Read the shapes of a model's folder."""
        shapes = dict(_shapes(model))
        # A tied head is the embedding; an embedding that is not the head is only looked up.
        head = shapes.pop(HEAD, None)
        embedding = shapes.pop(EMBEDDING)
        head = head or embedding
        layers = [shape for shape in shapes.values() if len(shape) == 2]
        return cls(layers=sum(math.prod(shape) for shape in layers), head=math.prod(head))

    def read_bytes(self, weights: str) -> int:
        """What a step reads of them in a weight format."""
        count = self.layers + self.head
        scales = count // WEIGHTS_A_SCALE * BYTES_OF_SCALE if weights == "int8" else 0
        return count * BYTES_OF_WEIGHT[weights] + scales


def _shapes(model: Path) -> Iterator[tuple[str, list[int]]]:
    """Names and shapes of all tensors: https://huggingface.co/docs/safetensors, "Format"."""
    for path in sorted(model.glob("*.safetensors")):
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > HEADER_BYTES_MAX:
                raise SystemExit(f"{path} is no safetensors file")
            header: dict[str, Any] = json.loads(file.read(length))
        yield from ((k, v["shape"]) for k, v in header.items() if k != "__metadata__")


@dataclass(frozen=True, slots=True)
class Machine:
    """Peaks, measured with all cores.

    Attributes:
        read_bytes_per_s: Memory that is in no cache.
        macs_per_s: By weight format: multiplications with addition in a large matrix product.
    """

    read_bytes_per_s: float
    macs_per_s: dict[str, float]

    @classmethod
    def measured(cls) -> Machine:
        """Measure them now."""
        return cls(**measure("machine"))

    def __str__(self) -> str:
        products = ", ".join(
            f"{kind} {rate / 1e9:,.0f} GMAC/s" for kind, rate in self.macs_per_s.items()
        )
        return f"memory read at {self.read_bytes_per_s / 1e9:.0f} GB/s; products in {products}"


@dataclass(frozen=True, slots=True)
class Limit:
    """What is left to gain in a row.

    Attributes:
        ttft_ms: The least that the first token can take.
        tokens_per_s: The most that one reply can come with.
        ttft_by_limit: How many times the least was measured.
        rate_by_limit: Which part of the most was measured.
    """

    ttft_ms: float
    tokens_per_s: float
    ttft_by_limit: float
    rate_by_limit: float

    @classmethod
    def of(  # noqa: PLR0913 - two peaks against two measurements
        cls,
        matrices: Matrices,
        machine: Machine,
        weights: str,
        *,
        new_tokens: float,
        ttft_ms: float,
        tokens_per_s: float,
    ) -> Limit:
        """Compare what was measured with what could be.

        Args:
            matrices: Of the model.
            machine: Its peaks.
            weights: The weight format, ``int8`` or ``bf16``.
            new_tokens: Of a prompt that were computed for the first token.
            ttft_ms: As measured.
            tokens_per_s: As measured.
        """
        step_s = matrices.read_bytes(weights) / machine.read_bytes_per_s
        macs = new_tokens * matrices.layers + matrices.head
        least_ms = 1000 * (macs / machine.macs_per_s[weights] + step_s)
        return cls(least_ms, 1 / step_s, ttft_ms / least_ms, tokens_per_s * step_s)

    def __str__(self) -> str:
        return (
            f"TTFT at least {self.ttft_ms:.1f} ms, is {self.ttft_by_limit:.1f} x that;"
            f" tokens/s at most {self.tokens_per_s:,.0f}, is {self.rate_by_limit:.2f} x that"
        )


def measure(*words: str) -> dict[str, Any]:
    """What :mod:`physics` says, asked in its words."""
    program = Path(__file__).with_name("physics.py")
    done = subprocess.run(  # noqa: S603 - our own words
        [sys.executable, str(program), *words],
        check=True,
        stdout=subprocess.PIPE,
        timeout=MEASURE_S_MAX,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found
