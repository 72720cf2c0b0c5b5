"""The Llama family: from a model folder to something that computes rows.

Owns which configurations can be run, the fingerprint of a model, and the choice of the forward
step: :mod:`~crdt_llm.inference.forward.native_step` where the CPU and a compiler allow it, else
:mod:`~crdt_llm.inference.forward.torch_step`. It knows slots, but not which ids they hold, nor
requests, nor sampling.

What is run: decoder-only models whose every layer is full causal attention and a SiLU-gated MLP
behind RMS norms (Llama, SmolLM, Mistral without a window, Qwen2, Qwen3), recognised by their
configuration and by the names of their weights. Anything else is refused with the reason: a
configuration key or a weight that is ignored would be a model that silently says other words.
"""

from __future__ import annotations

import hashlib
import json
import logging
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from crdt_llm.errors import ModelUnusable
from crdt_llm.inference.contract import BIT_EXACT
from crdt_llm.inference.forward.cpu import cpu_features
from crdt_llm.inference.forward.native import KernelsUnavailable
from crdt_llm.inference.forward.native_step import NativeStep
from crdt_llm.inference.forward.torch_step import TorchStep
from crdt_llm.inference.forward.weights import (
    BF16,
    INT8,
    Shape,
    Weights,
    finite,
    read_layer,
    weight_files,
)
from crdt_llm.inference.kv.pool import KV_DTYPE, KvPool, RowShape

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor

    from crdt_llm.inference.forward.weights import LayerWeights
    from crdt_llm.inference.kv.pool import Chunk, Layout

logger = logging.getLogger("crdt_llm.inference")

WEIGHT_FORMATS = (INT8, BF16)
"""The first is the default."""

MODEL_TYPES = frozenset({"llama", "mistral", "qwen2", "qwen3"})

# Rotations that are a function of the position alone. "dynamic" and "longrope" change with the
# length of the prompt, so the KV of the first n tokens would not be one value.
ROPE_TYPES = frozenset({"default", "linear", "llama3", "yarn"})
ROPE_THETA = 10000.0  # where a configuration says nothing


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration of a model folder, as it is written there.

    Raises:
        ModelUnusable: it is missing, damaged, or describes what is not computed here.
    """
    config = parse_config(folder)
    reason = _find_refusal(config)
    if reason is not None:
        message = (
            f"the model (type {config.get('model_type')}) {reason}, which the torch engine cannot "
            f"run exactly: it runs {', '.join(sorted(MODEL_TYPES))} with full attention"
        )
        raise ModelUnusable(message)
    return config


def is_of_the_family(folder: Path) -> bool:
    """Whether the configuration of a model folder describes what is computed here.

    Raises:
        ModelUnusable: it is missing or damaged.
    """
    return _find_refusal(parse_config(folder)) is None


def parse_config(folder: Path) -> dict[str, Any]:
    """The configuration of any model folder, as it is written there.

    Raises:
        ModelUnusable: it is missing or damaged.
    """
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelUnusable(f"{file} is missing: this is no model folder") from error
    except ValueError as error:
        raise ModelUnusable(f"{file} is damaged: fetch the model again") from error
    if not isinstance(config, dict):
        raise ModelUnusable(f"{file} is damaged: fetch the model again")
    if not isinstance(config.get("model_type"), str):
        raise ModelUnusable(f"{file} names no model_type: is this the folder of a model?")
    return config


def _find_refusal(config: dict[str, Any]) -> str | None:
    """Why a model is not computed here, or None if it is."""
    kind = config.get("model_type")
    # Mistral's window is on unless it is written as null; Qwen's is off unless it is switched on.
    window = config.get("sliding_window", 4096 if kind == "mistral" else None) is not None
    if kind in {"qwen2", "qwen3"}:
        window = window and bool(config.get("use_sliding_window", False))
    other_layers = set(config.get("layer_types") or ()) - {"full_attention"}
    caps = config.get("attn_logit_softcapping") or config.get("final_logit_softcapping")
    rope = read_rope(config)
    refusals = (
        (config.get("is_encoder_decoder") or kind in {"t5", "bart"}, "is an encoder-decoder"),
        (kind not in MODEL_TYPES, "is not of the Llama family"),
        (window or other_layers, "has layers without full attention"),
        (caps, "caps its logits"),
        (config.get("quantization_config"), "is stored quantised"),
        (config.get("hidden_act", "silu") != "silu", "has another activation than silu"),
        (rope["rope_type"] not in ROPE_TYPES, "has a rotation that changes with length"),
        (rope.get("partial_rotary_factor", 1) != 1, "rotates a part of each head only"),
    )
    return next((reason for refused, reason in refusals if refused), None)


def read_rope(config: dict[str, Any]) -> dict[str, Any]:
    """The parameters of the rotation, in today's form and with their defaults.

    Folders from before transformers 5 have ``rope_theta`` beside ``rope_scaling``.
    """
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    kind = rope.pop("type", "default")
    rope.setdefault("rope_type", kind)
    rope.setdefault("rope_theta", config.get("rope_theta", ROPE_THETA))
    return rope


def read_shape(config: dict[str, Any]) -> Shape:
    """The sizes in a configuration. What may be absent has the family's common default.

    Raises:
        ModelUnusable: a size is missing, or they do not fit together.
    """
    try:
        heads = int(config["num_attention_heads"])
        shape = Shape(
            layers=int(config["num_hidden_layers"]),
            hidden=int(config["hidden_size"]),
            intermediate=int(config["intermediate_size"]),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or config["hidden_size"] // heads),
            vocabulary=int(config["vocab_size"]),
            positions=int(config["max_position_embeddings"]),
            norm_epsilon=float(config["rms_norm_eps"]),
            tied_head=bool(config.get("tie_word_embeddings", False)),
        )
    except KeyError as error:
        message = f"the model's configuration has no {error.args[0]}: fetch the model again"
        raise ModelUnusable(message) from error
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ModelUnusable("the model's configuration has a size that is no number") from error
    sizes = (shape.layers, shape.hidden, shape.intermediate, shape.heads, shape.kv_heads)
    if min(*sizes, shape.head_dim, shape.vocabulary, shape.positions) < 1:
        raise ModelUnusable("the model's configuration has a size below 1")
    if shape.heads % shape.kv_heads or shape.head_dim % 2:
        raise ModelUnusable("the configuration has head counts or sizes that do not divide")
    return shape


def fingerprint(folder: Path, config: dict[str, Any], weight_format: str, build: str) -> str:
    """A digest over everything that the numbers depend on: 32 hexadecimal digits.

    Args:
        folder: the model.
        config: its configuration.
        weight_format: how the weights are held.
        build: of the forward step.
    """
    state = hashlib.sha256()
    for part in (
        "crdt-llm/1/torch-engine/3",  # raise the last number when the arithmetic here changes
        weight_format,
        build,
        str(KV_DTYPE),
        torch.__version__,
        np.__version__,  # it draws the samples
        cpu_features(),
        str(config["model_type"]),
        repr(read_shape(config)),
        json.dumps(read_rope(config), sort_keys=True),
    ):
        state.update(len(part).to_bytes(4, "little") + part.encode())
    for file in weight_files(folder):
        with file.open("rb") as stream:
            state.update(hashlib.file_digest(stream, "sha256").digest())
    return state.hexdigest()[:32]


class ForwardStep(Protocol):
    """The arithmetic of a model: rows in, KV rows and hidden states out.

    The result of a row depends on the row and on the KV before it alone, bit for bit: not on the
    rows computed with it, nor on threads.
    """

    @property
    def build(self) -> str:
        """What of it, beside the weights, its numbers depend on."""

    @property
    def layout(self) -> Layout:
        """Of the tiles that it reads and writes."""

    def add_layer(self, weights: LayerWeights) -> None:
        """The next layer."""

    def set_head(self, norm: Tensor, weights: Tensor) -> None:
        """What follows the last layer: its norm, and the vocabulary; both in float32."""

    def forward(self, state: Tensor, chunks: Sequence[Chunk], pool: KvPool) -> None:
        """Compute the rows of one or more chunks, each into the last of its slots.

        Args:
            state: float32, ``(rows, hidden)``: embeddings of the chunks in their order; used up.
            chunks: where the rows stand; no two of them in one slot. One that goes on where another
                one fills its tile stands behind it.
            pool: where the KV before them is, and theirs goes.
        """

    def logits(self, hidden: Tensor) -> Tensor:
        """The logits that follow rows of a pool: bfloat16 ``(rows, hidden)`` to float32."""


class Llama:
    """A model of the family, ready to run.

    Args:
        folder: config.json and safetensors.
        weight_format: how the weights are held, one of ``WEIGHT_FORMATS``.
        native: whether the native step computes: if it can by default; demanded or ruled out else.

    Raises:
        ModelUnusable: the model cannot be used, and why.
    """

    def __init__(
        self, folder: Path, weight_format: str = INT8, *, native: bool | None = None
    ) -> None:
        config = read_config(folder)
        shape = self.shape = read_shape(config)
        self._rows = RowShape(shape.layers, shape.kv_heads, shape.head_dim, shape.hidden)
        self.weight_format = weight_format
        tables = _rotations(folder, read_rope(config), shape)
        self._step = _choose_step(shape, tables, weight_format, native=native)
        self.fingerprint = fingerprint(folder, config, weight_format, self._step.build)
        weights = Weights(folder)
        table_shape = (shape.vocabulary, shape.hidden)
        self._embedding = finite(weights.take("model.embed_tokens.weight", *table_shape))
        for index in range(shape.layers):
            self._step.add_layer(read_layer(weights, shape, index))
        norm = weights.take("model.norm.weight", shape.hidden).float()
        if shape.tied_head:
            weights.take_if_there("lm_head.weight", *table_shape)  # a copy, if some writer left one
            head = self._embedding
        else:
            head = weights.take("lm_head.weight", *table_shape)
        self._step.set_head(norm, finite(head.float()))
        weights.check_empty()

    @property
    def exactness(self) -> int:
        """See :class:`~crdt_llm.inference.forward.model.Model`."""
        return BIT_EXACT

    @property
    def positions(self) -> int:
        """See :class:`~crdt_llm.inference.forward.model.Model`."""
        return self.shape.positions

    @property
    def vocabulary(self) -> int:
        """See :class:`~crdt_llm.inference.forward.model.Model`."""
        return self.shape.vocabulary

    @property
    def slot_bytes(self) -> int:
        """See :class:`~crdt_llm.inference.forward.model.Model`."""
        return self._rows.slot_bytes

    def new_pool(self, memory_bytes: int) -> KvPool:
        """See :class:`~crdt_llm.inference.forward.model.Model`."""
        return KvPool.within(memory_bytes, self._rows, layout=self._step.layout)

    def forward(self, ids: Tensor, chunks: Sequence[Chunk], pool: KvPool) -> None:
        """Compute the rows of one or more chunks, each into the last of its slots.

        Args:
            ids: int64, as many as the chunks have rows, in their order.
            chunks: where the rows stand; no two of them in one slot. One that goes on where another
                one fills its tile stands behind it.
            pool: where the KV before them is, and theirs goes.
        """
        self._step.forward(_rows_of(self._embedding, ids), chunks, pool)

    def logits(self, pool: KvPool, places: Sequence[tuple[int, int]]) -> Tensor:
        """The logits that follow resident rows.

        Args:
            pool: where the rows are.
            places: of each, its slot and its row there.

        Returns:
            float32, ``(places, vocabulary)``.
        """
        return self._step.logits(torch.stack([pool.hidden[slot, row] for slot, row in places]))


def _rows_of(table: Tensor, ids: Tensor) -> Tensor:
    """Rows of a table in float32, fetched by one thread.

    Of torch's operations on so few rows some would wake its own threads, which then look out for
    more work on the cores that the native step is about to use: it took twice as long.
    """
    if table.dtype == torch.bfloat16:
        halves = table.view(torch.uint16).numpy()[ids.numpy()]
        return torch.from_numpy((halves.astype(np.uint32) << 16).view(np.float32))
    return torch.from_numpy(table.numpy()[ids.numpy()].astype(np.float32))


def _choose_step(
    shape: Shape, tables: tuple[Tensor, Tensor], weight_format: str, *, native: bool | None
) -> ForwardStep:
    """The native step if this CPU, this shape and a compiler allow it, else that of torch."""
    if weight_format not in WEIGHT_FORMATS:
        formats = " or ".join(WEIGHT_FORMATS)
        raise ModelUnusable(f"there is no weight format {weight_format}: use {formats}")
    reason = "it was not asked for"
    if native is not False:
        try:
            return NativeStep(shape, *tables, weight_format)
        except KernelsUnavailable as error:
            reason = str(error)
    if native or weight_format != INT8:
        message = f"the native step cannot be used ({reason})"
        if weight_format != INT8:
            message += f": use the weight format {INT8}"
        raise ModelUnusable(message)
    if native is None:
        logger.warning("the native step cannot be used (%s): replies will be slower", reason)
    return TorchStep(shape, *tables)


def _rotations(folder: Path, rope: dict[str, Any], shape: Shape) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines of every position, ``(positions, head_dim)``.

    RoPE (Su et al., 2021) turns ``(a, b)`` to ``(a cos - b sin, b cos + a sin)``, where ``a`` and
    ``b`` are the halves of a head. With the sign in the table it is one rotation of the head by
    half its size, two products and a sum.
    """
    factor = 1.0
    if rope["rope_type"] == "default":
        exponents = torch.arange(0, shape.head_dim, 2).float() / shape.head_dim
        frequencies = 1.0 / (rope["rope_theta"] ** exponents)
    else:
        # The scaled kinds are transformers' own; it takes seconds to load, and most models scale
        # nothing.
        from transformers import AutoConfig  # noqa: PLC0415 - as above
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # noqa: PLC0415 - as above

        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        frequencies, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"))
    angles = torch.outer(torch.arange(shape.positions).float(), frequencies)
    cosines, sines = angles.cos() * factor, angles.sin() * factor
    return torch.cat((cosines, cosines), -1), torch.cat((-sines, sines), -1)
