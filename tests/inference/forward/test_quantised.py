"""Linear layers in whole numbers: exact sums, and one result for a row in any company."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crdt_llm.errors import ModelUnusable
from crdt_llm.inference.forward import quantised
from crdt_llm.inference.forward.quantised import (
    PLANE,
    PRODUCT_MAX,
    STEPS_MAX,
    ZERO,
    Int8Linear,
    Rows,
    prepacked_product_is_exact,
)

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


@settings(deadline=None)
@given(
    seed=st.integers(0, 1000),
    scale=st.sampled_from([1e-20, 1e-3, 1.0, 1e4, 1e20]),
    width=st.integers(1, 70),
)
def test_a_row_is_kept_to_half_a_step(seed: int, scale: float, width: int) -> None:
    row = normal(1, width, seed=seed, scale=scale)
    rows = Rows.round(row)
    assert rows.planes.dtype == torch.uint8
    low, high = rows.planes.double().sub(ZERO).unbind()
    kept = (high * PLANE + low) * rows.scale.double()
    step = row.abs().max().double() / STEPS_MAX
    assert ((kept - row.double()).abs() <= step * 0.51).all()


def test_the_largest_values_fit_the_planes() -> None:
    row = torch.tensor([[1.0, -1.0, 0.5, 1 - 0.5 / STEPS_MAX, 0.0]])
    low, high = Rows.round(row).planes.int().sub(ZERO).unbind()
    steps = (high * PLANE + low).tolist()
    assert steps == [STEPS_MAX, -STEPS_MAX, STEPS_MAX // 2, STEPS_MAX, 0]


def test_a_factor_of_a_row_joins_its_scale() -> None:
    row, factor = normal(3, 32), torch.tensor([[2.0], [0.5], [4.0]])
    alone, joined = Rows.round(row), Rows.round(row, factor)
    assert torch.equal(joined.planes, alone.planes)
    assert torch.equal(joined.scale, alone.scale * factor)


def test_a_row_of_zeros_stays_zeros() -> None:
    layer = Int8Linear.quantise([normal(8, 16)], [None])
    assert torch.equal(layer(Rows.round(torch.zeros(1, 16))), torch.zeros(1, 8))


@pytest.mark.parametrize("prepacked", [False, True])
@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize(("outputs", "inputs"), [(7, 5), (96, 64), (320, 75), (1000, 640)])
def test_a_row_has_one_result_in_any_company_and_by_either_kernel(
    threads: int, outputs: int, inputs: int, *, prepacked: bool
) -> None:
    if prepacked and not prepacked_product_is_exact():
        pytest.skip("this machine has no such kernel, so the engine does not use it")
    weight, bias = normal(outputs, inputs, seed=1), normal(outputs, seed=2)
    layer = Int8Linear.quantise([weight], [bias])
    rows = normal(65, inputs, seed=3)
    torch.set_num_threads(1)
    alone = torch.cat([layer(Rows.round(rows[index : index + 1])) for index in range(65)])
    torch.set_num_threads(threads)
    layer = Int8Linear.quantise([weight], [bias], prepacked=prepacked)
    for start, end in ((0, 65), (0, 2), (1, 4), (5, 21), (40, 64)):
        assert torch.equal(layer(Rows.round(rows[start:end])), alone[start:end])


def test_a_prepacked_kernel_that_disagrees_or_is_missing_is_not_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not prepacked_product_is_exact():
        pytest.skip("this machine has no such kernel")
    call = Int8Linear.__call__

    def saturating(layer: Int8Linear, rows: Rows) -> torch.Tensor:
        result = call(layer, rows)
        return result.clamp(-1.0, 1.0) if layer.prepacked else result

    with monkeypatch.context() as patch:
        patch.setattr(Int8Linear, "__call__", saturating)
        assert not prepacked_product_is_exact()

    def no_kernel(layer: Int8Linear, rows: Rows) -> torch.Tensor:
        if layer.prepacked:
            raise RuntimeError("could not create a primitive")
        return call(layer, rows)

    monkeypatch.setattr(Int8Linear, "__call__", no_kernel)
    assert not prepacked_product_is_exact()


def test_products_are_those_of_the_rounded_weights() -> None:
    weight, bias, rows = normal(40, 64, seed=1), normal(40, seed=2), normal(9, 64, seed=3)
    layer = Int8Linear.quantise([weight[:10], weight[10:]], [bias[:10], None])
    rounded = layer.weight.double() * layer.scale.double()[:, None]
    assert ((rounded - weight).abs() <= weight.abs().amax(1, keepdim=True) / 250).all()
    padded = torch.cat((bias[:10], torch.zeros(30))).double()
    expected = rows.double() @ rounded.T + padded
    assert torch.allclose(layer(Rows.round(rows)).double(), expected, atol=2e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(value: float) -> None:
    weight = normal(4, 4)
    weight[2, 3] = value
    with pytest.raises(ModelUnusable):
        Int8Linear.quantise([weight], [None])


def test_rows_too_wide_for_exact_sums_are_refused() -> None:
    with pytest.raises(ModelUnusable):
        Int8Linear.quantise([torch.ones(1, 2**31 // PRODUCT_MAX + 1)], [None])


def test_a_cpu_whose_products_saturate_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    quantised.check_integer_product()

    def saturating(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return (left.int() @ right.int()).clamp(-(2**15), 2**15 - 1)

    monkeypatch.setattr(torch, "_int_mm", saturating)
    with pytest.raises(ModelUnusable):
        quantised.check_integer_product()
