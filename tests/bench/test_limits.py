"""What a model reads and multiplies for a token, and the limits that follow."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from limits import EMBEDDING, HEAD, Limit, Machine, Matrices
from physics import Prefill
from safetensors.torch import load_file

if TYPE_CHECKING:
    from pathlib import Path


def test_matrices_are_those_of_the_layers_and_the_head(tiny_model_dir: Path) -> None:
    tensors = {
        name: tensor
        for file in tiny_model_dir.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }
    head = tensors.get(HEAD, tensors[EMBEDDING])
    layers = [
        tensor
        for name, tensor in tensors.items()
        if tensor.ndim == 2 and name not in {HEAD, EMBEDDING}
    ]
    found = Matrices.of(tiny_model_dir)
    assert found.head == head.numel()
    assert found.layers == sum(tensor.numel() for tensor in layers)
    assert found.read_bytes("bf16") == 2 * (found.layers + found.head)
    assert found.read_bytes("int8") == (found.layers + found.head) * (1 + 2 / 64)


def test_the_baseline_multiplies_the_matrices_of_the_model(tiny_model_dir: Path) -> None:
    config = json.loads((tiny_model_dir / "config.json").read_text())
    prefill = Prefill(config, rows=3)
    found = Matrices.of(tiny_model_dir)
    assert sum(matrix.numel() for matrix in prefill._matrices) == found.layers
    assert prefill._head.numel() == found.head
    prefill.linear()
    prefill.attention(context=5)()


@pytest.mark.parametrize(("weights", "bytes_of_weight"), [("bf16", 2), ("int8", 1 + 2 / 64)])
def test_a_first_token_costs_its_products_and_one_reading(
    weights: str, bytes_of_weight: float
) -> None:
    matrices = Matrices(layers=960_000, head=640_000)
    machine = Machine(read_bytes_per_s=3e9, macs_per_s={"bf16": 1e9, "int8": 1e9})
    step_ms = bytes_of_weight * 1.6 / 3
    least_ms = 9.6 + 0.64 + step_ms
    limit = Limit.of(
        matrices,
        machine,
        weights,
        new_tokens=10,
        ttft_ms=2 * least_ms,
        tokens_per_s=250 / step_ms,
    )
    assert limit.ttft_ms == pytest.approx(least_ms)
    assert limit.tokens_per_s == pytest.approx(1000 / step_ms)
    assert limit.ttft_by_limit == pytest.approx(2)
    assert limit.rate_by_limit == pytest.approx(0.25)
