"""Linear layers in whole numbers: one result for one row, whatever stands beside it.

Owns the weight format ``int8``: weights rounded to 8 bits with one scale per output channel, and
the product of such a weight with float32 rows. It knows no model, no attention and no KV.

A float product depends on the order of its additions, and a library picks another order for one
row than for many. Here a row is first rounded to a pair of 8-bit planes (about 15 bits), and the
products are sums of integers, which are exact in any order, on any number of threads. What remains
in floating point is element by element. So equal rows give equal results by construction, and the
fastest kernel may be chosen for each number of rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from crdt_llm.errors import ModelUnusable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

WEIGHT_FORMAT = "int8"

LEVEL_MAX = 127  # symmetric: -128 would need a ninth bit once negated
PLANE = 2 * LEVEL_MAX
"""One step of the high plane is so many steps of the low one. The remainder of a rounding to the
nearest is at most half a step, 127, so it fits the low plane with no clipping."""

SINGLE_ROWS_MAX = 2
"""Up to so many rows the planes go through the one-row kernel, one by one: measured, a call with
one row costs a quarter of a call with two to four."""

# Far below any activation, so that a row of zeros is divided by something.
PEAK_MIN = 1e-30

ACCUMULATOR_MAX = 2**31 - 1


class Rows(NamedTuple):
    """Rows rounded to two planes: ``row = (high * PLANE + low) * scale``.

    Args:
        planes: int8, ``(2 * rows, width)``: all high planes, then all low ones.
        scale: float32, ``(rows, 1)``: of a low step.
        high_scale: float32, ``(rows, 1)``: of a high step, ``PLANE`` low ones.
    """

    planes: Tensor
    scale: Tensor
    high_scale: Tensor

    @classmethod
    def round(cls, rows: Tensor) -> Rows:
        """Round float32 rows ``(rows, width)`` to planes, each row by its own largest value."""
        peak = torch.linalg.vector_norm(rows, float("inf"), -1, keepdim=True)
        scale = peak.clamp_min_(PEAK_MIN).mul_(1 / (LEVEL_MAX * PLANE))
        steps = rows / scale
        high = (steps * (1 / PLANE)).round_()
        low = steps.sub_(high, alpha=PLANE).round_()
        planes = torch.cat((high, low)).to(torch.int8)
        return cls(planes=planes, scale=scale, high_scale=scale * PLANE)


@dataclass(frozen=True, slots=True)
class Int8Linear:
    """``y = x W^T + b`` with ``W`` in 8 bits.

    Args:
        weight: int8, ``(outputs, inputs)``.
        scale: float32, ``(outputs,)``.
        bias: float32, ``(outputs,)``, or None.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    @classmethod
    def quantise(cls, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Int8Linear:
        """Round float weights ``(outputs, inputs)`` to 8 bits; several are stacked by output.

        Raises:
            ModelUnusable: a weight is not finite, or rows are too wide for exact 32-bit sums.
        """
        weight = torch.cat([part.float() for part in weights])
        if not torch.isfinite(weight).all():
            raise ModelUnusable("a weight of the model is not a finite number: fetch it again")
        if weight.shape[1] * LEVEL_MAX * LEVEL_MAX > ACCUMULATOR_MAX:
            message = f"rows of {weight.shape[1]} values are too wide for exact 8-bit products"
            raise ModelUnusable(message)
        peak = weight.abs().amax(dim=1, keepdim=True).clamp_min(PEAK_MIN)
        scale = peak / LEVEL_MAX
        bias = None
        if any(part is not None for part in biases):
            bias = torch.cat(
                [
                    torch.zeros(len(weight_part)) if part is None else part.float()
                    for weight_part, part in zip(weights, biases, strict=True)
                ]
            )
        return cls(
            weight=(weight / scale).round_().to(torch.int8),
            scale=scale[:, 0].contiguous(),
            bias=bias,
        )

    def __call__(self, rows: Rows) -> Tensor:
        """Multiply; gives float32 ``(rows, outputs)``."""
        count = len(rows.scale)
        planes = rows.planes
        if count == 1:
            high, low = self._product(planes[:1]), self._product(planes[1:])
        elif count <= SINGLE_ROWS_MAX:
            singles = [self._product(planes[row : row + 1]) for row in range(2 * count)]
            high, low = torch.cat(singles[:count]), torch.cat(singles[count:])
        else:
            product = self._product(planes)
            high, low = product[:count], product[count:]
        # In steps that round one by one: a fused multiply-add rounds once, and whether an element
        # meets one depends on where it lies in a vector register.
        result = torch.mul(high, rows.high_scale).add_(torch.mul(low, rows.scale))
        result.mul_(self.scale)
        return result if self.bias is None else result.add_(self.bias)

    def _product(self, planes: Tensor) -> Tensor:
        """int8 ``(n, inputs)`` to int32 ``(n, outputs)``, exact."""
        return torch._int_mm(planes, self.weight.t())  # noqa: SLF001 - the one integer product there is


def check_integer_product() -> None:
    """Make sure that the 8-bit product of this CPU and torch build is exact.

    Kernels for CPUs without 8-bit dot products may saturate in 16 bits; then nothing that this
    package promises about equality would hold.

    Raises:
        ModelUnusable: it is not.
    """
    width = 1024
    for rows in (1, 2, 3, 64):
        for sign in (1, -1):
            left = torch.full((rows, width), LEVEL_MAX, dtype=torch.int8)
            right = torch.full((48, width), sign * LEVEL_MAX, dtype=torch.int8)
            product = torch._int_mm(left, right.t())  # noqa: SLF001 - the call that is checked
            if not bool((product == sign * LEVEL_MAX * LEVEL_MAX * width).all()):
                raise ModelUnusable(
                    "8-bit products are not exact with this CPU and torch build: "
                    "use a machine with AVX-512 VNNI or AVX-VNNI"
                )
