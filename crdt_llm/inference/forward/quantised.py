"""Linear layers in whole numbers: one result for one row, whatever stands beside it.

Owns the weight format ``int8``: weights rounded to 8 bits with one scale per output channel, and
the product of such a weight with float32 rows. It knows no model, no attention and no KV.

A float product depends on the order of its additions, and a library picks another order for one
row than for many. Here a row is first rounded to 16 bits, which are two planes of 8, and the
products are sums of integers, which are exact in any order, on any number of threads. What remains
in floating point is element by element. So equal rows give equal results by construction, and the
fastest kernel may be chosen: oneDNN's with the weight laid out for it once, or, where a CPU or a
torch build has none, ``torch._int_mm``. Both give the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from crdt_llm.errors import ModelUnusable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

LEVEL_MAX = 127
"""Of a weight; symmetric, so that no weight needs a zero point."""

PLANE = 256
"""One step of the high plane is so many steps of the low one."""

ZERO = 128
"""The byte that stands for 0 in a plane: a byte is unsigned, what it stands for is not."""

STEPS_MAX = 127 * PLANE
"""Of a row's largest value. A step more or less (the low plane reaches half a high step to either
side) still fits two bytes."""

# 1.5 * 2**23: what is added to it is rounded to a whole number, and stands in its last 22 bits as
# a two's complement. Above it the zeros of the two planes, so that its last bytes are the planes.
_MARK = 1.5 * 2**23 + ZERO * PLANE + ZERO

# Far below any activation, so that a row of zeros is divided by something.
PEAK_MIN = 1e-30

ACCUMULATOR_MAX = 2**31 - 1
PRODUCT_MAX = 255 * LEVEL_MAX  # of an unsigned byte and a weight, before the zero is taken off

_STEPS_MAX = torch.tensor(float(STEPS_MAX))


class Rows(NamedTuple):
    """Rows rounded to two planes: ``row = (high * PLANE + low) * scale``.

    Args:
        planes: uint8, ``(2 * rows, width)``: all low planes, then all high ones, each value above
            ``ZERO``.
        scale: float32, ``(rows, 1)``: what one low step of a row is worth.
    """

    planes: Tensor
    scale: Tensor

    @classmethod
    def round(cls, rows: Tensor, factor: Tensor | None = None) -> Rows:
        """Round float32 rows ``(rows, width)`` to planes, each row by its own largest value.

        Args:
            rows: finite values.
            factor: ``(rows, 1)``: each row stands for this many times itself.
        """
        count, width = rows.shape
        peak = rows.abs().amax(-1, keepdim=True).clamp_min_(PEAK_MIN)
        marked = rows.mul(torch.div(_STEPS_MAX, peak)).add_(_MARK)
        planes = marked.view(torch.uint8).view(count, width, 4)[..., :2].permute(2, 0, 1)
        if factor is not None:
            peak.mul_(factor)
        return cls(planes=planes.reshape(2 * count, width), scale=peak.mul_(1 / STEPS_MAX))


@dataclass(frozen=True, slots=True)
class Int8Linear:
    """``y = x W^T + b`` with ``W`` in 8 bits.

    Args:
        weight: int8, ``(outputs, inputs)``; in oneDNN's own layout if ``prepacked``.
        scale: float32, ``(outputs,)``.
        zeros: int32, ``(outputs,)``: the zero points that the kernel wants to hear of.
        bias: float32, ``(outputs,)``, or None.
        prepacked: which kernel.
    """

    weight: Tensor
    scale: Tensor
    zeros: Tensor
    bias: Tensor | None
    prepacked: bool

    @classmethod
    def quantise(
        cls,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        *,
        prepacked: bool = False,
    ) -> Int8Linear:
        """Round float weights ``(outputs, inputs)`` to 8 bits; several are stacked by output.

        Args:
            weights: of one width.
            biases: one for each of them.
            prepacked: whether to lay them out for oneDNN; see :func:`prepacked_product_is_exact`.

        Raises:
            ModelUnusable: a weight is not finite, or rows are too wide for exact 32-bit sums.
        """
        weight = torch.cat([part.float() for part in weights])
        if not torch.isfinite(weight).all():
            raise ModelUnusable("a weight of the model is not a finite number: fetch it again")
        if weight.shape[1] * PRODUCT_MAX > ACCUMULATOR_MAX:
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
        rounded = (weight / scale).round_().to(torch.int8)
        return cls(
            weight=torch.ops.onednn.qlinear_prepack(rounded, None) if prepacked else rounded,
            scale=scale[:, 0].contiguous(),
            zeros=torch.zeros(len(rounded), dtype=torch.int32),
            bias=bias,
            prepacked=prepacked,
        )

    def __call__(self, rows: Rows) -> Tensor:
        """Multiply; gives float32 ``(rows, outputs)``."""
        if self.prepacked:
            products = torch.ops.onednn.qlinear_pointwise.default(
                *(rows.planes, 1.0, ZERO),
                *(self.weight, self.scale, self.zeros),
                *(None, 1.0, 0, torch.float32, "none", [], ""),
            )
        else:
            signed = rows.planes.bitwise_xor(ZERO).view(torch.int8)
            products = torch._int_mm(signed, self.weight.t()) * self.scale  # noqa: SLF001 - the one integer product there is
        low, high = products.view(2, len(rows.scale), -1).unbind()
        # A library may fuse this multiplication with the addition, or not, depending on where an
        # element lies in a vector register. By a power of two both are the same.
        result = torch.add(low, high, alpha=PLANE).mul_(rows.scale)
        return result if self.bias is None else result.add_(self.bias)


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
            for level in (-ZERO, LEVEL_MAX):
                left = torch.full((rows, width), level, dtype=torch.int8)
                right = torch.full((48, width), sign * LEVEL_MAX, dtype=torch.int8)
                product = torch._int_mm(left, right.t())  # noqa: SLF001 - the call that is checked
                if not bool((product == level * sign * LEVEL_MAX * width).all()):
                    raise ModelUnusable(
                        "8-bit products are not exact with this CPU and torch build: "
                        "use a machine with AVX-512 VNNI or AVX-VNNI"
                    )


def prepacked_product_is_exact() -> bool:
    """Whether oneDNN's product with prepacked weights is there, and has the bits of the plain one.

    Two to three times as fast: the plain product lays the weight out anew in each call. The shapes
    are those at which kernels differ: few rows and many, widths with and without a remainder; the
    values include the largest, which would saturate where a CPU has no 8-bit dot product.
    """
    if not torch.cpu._is_vnni_supported():  # noqa: SLF001 - without, oneDNN falls back to a loop
        return False
    generator = torch.Generator().manual_seed(1)
    try:
        for outputs, inputs in ((48, 1024), (130, 75)):
            weight = torch.randn(outputs, inputs, generator=generator)
            weight[:8] = 1.0
            plain = Int8Linear.quantise([weight], [None])
            packed = Int8Linear.quantise([weight], [None], prepacked=True)
            for count in (1, 2, 3, 17, 64):
                values = torch.randn(count, inputs, generator=generator)
                values[0] = 1.0
                rows = Rows.round(values)
                if not torch.equal(packed(rows), plain(rows)):
                    return False
    except (AttributeError, RuntimeError):  # another build: no such operation, or no kernel for it
        return False
    return True
