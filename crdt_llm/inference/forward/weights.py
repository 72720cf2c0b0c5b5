"""The weights of a model folder, as a forward step takes them.

Owns the safetensors files and what a layer consists of. It knows no configuration file, no weight
format and no arithmetic.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open

from crdt_llm.errors import ModelUnusable

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

INT8 = "int8"
"""8 bits and a scale for each output: half the memory and, for one row, half the time of bf16."""

BF16 = "bf16"
"""The weights as most models are published."""

FLOAT32 = "float32"
"""Twice the memory of bf16: for models that are published so, and for whoever compares."""


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a model, read from its configuration."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    positions: int
    norm_epsilon: float
    tied_head: bool


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """What a layer consists of, in float32. Linear layers are ``(outputs, inputs)``.

    Args:
        attention_norm: ``(hidden,)``.
        queries_keys_values: side by side, ``((heads + 2 * kv_heads) * head_dim, hidden)``.
        queries_keys_values_bias: or None.
        head_norm: ``(heads + kv_heads, head_dim)``, gains of queries and keys (Qwen3), or None.
        output: ``(hidden, heads * head_dim)``.
        output_bias: or None.
        mlp_norm: ``(hidden,)``.
        gate_up: gates, then ups, ``(2 * intermediate, hidden)``.
        gate_up_bias: or None.
        down: ``(hidden, intermediate)``.
        down_bias: or None.
    """

    attention_norm: Tensor
    queries_keys_values: Tensor
    queries_keys_values_bias: Tensor | None
    head_norm: Tensor | None
    output: Tensor
    output_bias: Tensor | None
    mlp_norm: Tensor
    gate_up: Tensor
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None


class Weights:
    """The tensors of a model folder, each taken once.

    Args:
        folder: with ``model.safetensors`` or its shards and their index.

    Raises:
        ModelUnusable: a file is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._tensors: dict[str, Tensor] = {}
        for file in weight_files(folder):
            try:
                with safe_open(file, framework="pt") as shard:
                    for name in shard.keys():  # noqa: SIM118 - not a mapping
                        self._tensors[name] = shard.get_tensor(name)
            except (SafetensorError, OSError) as error:
                message = f"{file} is damaged ({error}): fetch the model again"
                raise ModelUnusable(message) from error

    def take(self, name: str, *shape: int) -> Tensor:
        """The tensor of this name, with exactly this shape."""
        tensor = self.take_if_there(name, *shape)
        if tensor is None:
            message = f"the model has no weight {name}: its configuration and its weights disagree"
            raise ModelUnusable(message)
        return tensor

    def take_if_there(self, name: str, *shape: int) -> Tensor | None:
        """As :meth:`take`, or None."""
        tensor = self._tensors.pop(name, None)
        if tensor is not None and tuple(tensor.shape) != shape:
            message = (
                f"weight {name} has shape {tuple(tensor.shape)}, but the configuration says {shape}"
            )
            raise ModelUnusable(message)
        return tensor

    def check_empty(self) -> None:
        """Refuse what nobody took: a part of the model that would be ignored.

        Raises:
            ModelUnusable: there is such a part.
        """
        if self._tensors:
            message = (
                f"this engine does not know the weight {min(self._tensors)} and would compute "
                "something else than the model: use another model or another engine"
            )
            raise ModelUnusable(message)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, in the order of their names.

    Raises:
        ModelUnusable: there are none.
    """
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            names = sorted(
                set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            )
        except (ValueError, KeyError, AttributeError) as error:
            raise ModelUnusable(f"{index} is damaged: fetch the model again") from error
        files = [folder / name for name in names]
    else:
        files = [folder / "model.safetensors"]
    for file in files:
        if not file.is_file():
            raise ModelUnusable(f"{file} is missing: fetch the model again")
    return files


def finite(matrix: Tensor) -> Tensor:
    """The matrix itself.

    Raises:
        ModelUnusable: a weight is infinite or not a number.
    """
    if not torch.isfinite(matrix).all():
        raise ModelUnusable("a weight of the model is not a finite number: fetch it again")
    return matrix


def read_layer(weights: Weights, shape: Shape, index: int) -> LayerWeights:
    """Take the weights of a layer.

    Raises:
        ModelUnusable: one is missing, or has another shape, or is not finite.
    """
    prefix = f"model.layers.{index}."
    attention, mlp = prefix + "self_attn.", prefix + "mlp."
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim

    def side_by_side(*parts: tuple[str, int], inputs: int) -> tuple[Tensor, Tensor | None]:
        matrices = [weights.take(f"{name}.weight", outputs, inputs) for name, outputs in parts]
        biases = [weights.take_if_there(f"{name}.bias", outputs) for name, outputs in parts]
        matrix = finite(torch.cat([matrix.float() for matrix in matrices]))
        if all(bias is None for bias in biases):
            return matrix, None
        each = [
            torch.zeros(outputs) if bias is None else bias.float()
            for bias, (_, outputs) in zip(biases, parts, strict=True)
        ]
        return matrix, torch.cat(each)

    head_norm = None
    query_norm = weights.take_if_there(attention + "q_norm.weight", shape.head_dim)
    if query_norm is not None:
        key_norm = weights.take(attention + "k_norm.weight", shape.head_dim)
        gains = (
            query_norm.float().expand(shape.heads, -1),
            key_norm.float().expand(shape.kv_heads, -1),
        )
        head_norm = torch.cat(gains)
    weights.take_if_there(attention + "rotary_emb.inv_freq", shape.head_dim // 2)
    vectors, vectors_bias = side_by_side(
        (attention + "q_proj", queries),
        (attention + "k_proj", keys),
        (attention + "v_proj", keys),
        inputs=shape.hidden,
    )
    output, output_bias = side_by_side((attention + "o_proj", shape.hidden), inputs=queries)
    gate_up, gate_up_bias = side_by_side(
        (mlp + "gate_proj", shape.intermediate),
        (mlp + "up_proj", shape.intermediate),
        inputs=shape.hidden,
    )
    down, down_bias = side_by_side((mlp + "down_proj", shape.hidden), inputs=shape.intermediate)
    return LayerWeights(
        attention_norm=weights.take(prefix + "input_layernorm.weight", shape.hidden).float(),
        queries_keys_values=vectors,
        queries_keys_values_bias=vectors_bias,
        head_norm=head_norm,
        output=output,
        output_bias=output_bias,
        mlp_norm=weights.take(prefix + "post_attention_layernorm.weight", shape.hidden).float(),
        gate_up=gate_up,
        gate_up_bias=gate_up_bias,
        down=down,
        down_bias=down_bias,
    )
