"""The forward step of the Llama family: rows of token ids in, KV rows and hidden states out.

Owns the model: which configurations it can run, how a folder of weights becomes layers, and the
arithmetic of one chunk. It knows slots, but not which ids they hold, nor requests, nor sampling.

What is run: decoder-only models whose every layer is full causal attention and a SiLU-gated MLP
behind RMS norms (Llama, SmolLM, Mistral without a window, Qwen2, Qwen3), recognised by their
configuration and by the names of their weights. Anything else is refused with the reason: a
configuration key or a weight that is ignored would be a model that silently says other words.

The result of a row depends on the row and on the KV before it alone, bit for bit: linear layers by
:mod:`~crdt_llm.inference.quantised`, attention by :mod:`~crdt_llm.inference.attention`, and here by
keeping to operations that treat each row or each element alike. Two habits of the library need
care: it splits large element-wise operations over threads, and the elements at the end of such a
part go through scalar code, whose ``exp`` rounds differently; and it may fuse a multiplication with
an addition in one of the two. So rows go through SiLU in parts that are not split, whose width has
no such end, and products are added in a step of their own.
"""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch.nn import functional

from crdt_llm.errors import ModelUnusable
from crdt_llm.inference.attention import (
    KV_DTYPE,
    WIDE_BLOCK,
    WIDE_ROWS_MIN,
    KvPool,
    TiledAttention,
    small_block,
    wide_blocks_agree,
)
from crdt_llm.inference.quantised import (
    WEIGHT_FORMAT,
    Int8Linear,
    Rows,
    check_integer_product,
    prepacked_product_is_exact,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from torch import Tensor

    from crdt_llm.inference.attention import Chunk

MODEL_TYPES = frozenset({"llama", "mistral", "qwen2", "qwen3"})

# Rotations that are a function of the position alone. "dynamic" and "longrope" change with the
# length of the prompt, so the KV of the first n tokens would not be one value.
ROPE_TYPES = frozenset({"default", "linear", "llama3", "yarn"})
ROPE_THETA = 10000.0  # where a configuration says nothing

ELEMENTS_MAX_PER_THREAD = 32768
"""Up to so many elements torch does not split an element-wise operation over threads
(``at::internal::GRAIN_SIZE``)."""

VECTOR_ELEMENTS = 32
"""A multiple of this many float32 has no end that goes through scalar code: two AVX-512 registers,
which is what the vectorised loop takes at a time."""


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
class Layer:
    """The weights of one layer; ``query_norm`` and ``key_norm`` are Qwen3's."""

    attention_norm: Tensor
    queries_keys_values: Int8Linear
    head_norm: Tensor | None
    output: Int8Linear
    mlp_norm: Tensor
    gate_up: Int8Linear
    down: Int8Linear


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


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration of a model folder, as it is written there.

    Raises:
        ModelUnusable: it is missing, damaged, or describes what this engine does not compute.
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
    _check_supported(config)
    return config


def _check_supported(config: dict[str, Any]) -> None:
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
    for refused, reason in refusals:
        if refused:
            message = (
                f"the model (type {kind}) {reason}, which the torch engine cannot "
                f"run exactly: it runs {', '.join(sorted(MODEL_TYPES))} with full attention"
            )
            raise ModelUnusable(message)


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
    if shape.heads % shape.kv_heads or shape.head_dim % 2:
        raise ModelUnusable("the configuration has head counts or sizes that do not divide")
    return shape


def cpu_features() -> str:
    """What of this CPU selects kernels: vendor and vector extensions, as the system names them."""
    features = {platform.machine(), torch.backends.cpu.get_cpu_capability()}
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:  # noqa: PTH123 - a stream of the kernel, not a file
            for line in file:
                key, _, value = line.partition(":")
                if key.strip() == "vendor_id":
                    features.add(value.strip())
                elif key.strip() in {"flags", "Features"}:
                    prefixes = ("avx", "fma", "amx", "sse4", "asimd", "sve", "i8mm", "bf16")
                    features.update(flag for flag in value.split() if flag.startswith(prefixes))
                elif not line.strip():
                    break  # the first processor speaks for all
    except FileNotFoundError:  # not Linux: torch's own word for the CPU has to do
        features.add(platform.processor())
    return " ".join(sorted(features))


def fingerprint(folder: Path, config: dict[str, Any]) -> str:
    """A digest over everything that the numbers depend on: 32 hexadecimal digits."""
    state = hashlib.sha256()
    for part in (
        "crdt-llm/1/torch-engine/2",  # raise the last number when the arithmetic here changes
        WEIGHT_FORMAT,
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


class Llama:
    """A model of the family, ready to run.

    Args:
        folder: config.json and safetensors.

    Raises:
        ModelUnusable: the model cannot be used, and why.
    """

    def __init__(self, folder: Path) -> None:
        config = read_config(folder)
        check_integer_product()
        prepacked = self._prepacked = prepacked_product_is_exact()
        self.shape = read_shape(config)
        self.fingerprint = fingerprint(folder, config)
        weights = Weights(folder)
        shape = self.shape
        self._small_block = small_block(shape.heads, shape.kv_heads)
        wide = wide_blocks_agree(shape.heads, shape.kv_heads, shape.head_dim)
        self._wide_block = WIDE_BLOCK if wide else self._small_block
        table_shape = (shape.vocabulary, shape.hidden)
        self._embedding = weights.take("model.embed_tokens.weight", *table_shape)
        self._layers = [
            self._read_layer(weights, f"model.layers.{index}.") for index in range(shape.layers)
        ]
        self._norm = weights.take("model.norm.weight", shape.hidden).float()
        if shape.tied_head:
            weights.take_if_there("lm_head.weight", *table_shape)  # a copy, if some writer left one
            head = self._embedding
        else:
            head = weights.take("lm_head.weight", *table_shape)
        self._head = Int8Linear.quantise([head], [None], prepacked=prepacked)
        weights.check_empty()
        self._cosines, self._sines = _rotations(folder, read_rope(config), shape)

    @property
    def slot_bytes(self) -> int:
        """Memory that a tile of KV takes."""
        shape = self.shape
        return KvPool.slot_bytes(shape.layers, shape.kv_heads, shape.head_dim, shape.hidden)

    def new_pool(self, memory_bytes: int) -> KvPool:
        """A pool of as many slots as fit the memory.

        Raises:
            ModelUnusable: not even two slots fit.
        """
        shape, slot_bytes = self.shape, self.slot_bytes
        count = memory_bytes // slot_bytes
        if count < SLOTS_MIN:
            message = (
                f"a KV memory of {memory_bytes} bytes is too small for this model: "
                f"give it at least {SLOTS_MIN * slot_bytes}"
            )
            raise ModelUnusable(message)
        return KvPool(count, shape.layers, shape.kv_heads, shape.head_dim, shape.hidden)

    def forward(self, ids: Tensor, chunks: Sequence[Chunk], pool: KvPool) -> None:
        """Compute the rows of one or more chunks, each into the last of its slots.

        Products see the rows of all chunks at once; attention sees one path at a time.

        Args:
            ids: int64, as many as the chunks have rows, in their order.
            chunks: where the rows stand; no two of them in one slot.
            pool: where the KV before them is, and theirs goes.
        """
        shape = self.shape
        rows = len(ids)
        parts = [
            TiledAttention(pool, chunk, shape.heads, self._block(chunk.rows)) for chunk in chunks
        ]
        sizes = [chunk.rows for chunk in chunks]
        cosines = self._rotation(self._cosines, chunks)
        sines = self._rotation(self._sines, chunks)
        rotated_heads = shape.heads + shape.kv_heads
        all_heads = rotated_heads + shape.kv_heads
        epsilon = shape.norm_epsilon
        state = self._embedding[ids].float()
        for index, layer in enumerate(self._layers):
            vectors = layer.queries_keys_values(_normed(state, layer.attention_norm, epsilon))
            vectors = vectors.view(rows, all_heads, shape.head_dim)
            rotated = vectors[:, :rotated_heads]
            if layer.head_norm is not None:
                rotated.mul_(_inverse_norm(rotated, epsilon)).mul_(layer.head_norm)
            turned = rotated.roll(shape.head_dim // 2, -1).mul_(sines)
            rotated.mul_(cosines).add_(turned)
            queries, keys_values = vectors[:, : shape.heads], vectors[:, shape.heads :]
            if len(parts) == 1:
                attended = parts[0](index, queries, keys_values)
            else:
                each = zip(
                    parts, torch.split(queries, sizes), torch.split(keys_values, sizes), strict=True
                )
                attended = torch.cat([part(index, *theirs) for part, *theirs in each])
            state += layer.output(Rows.round(attended))
            gates = layer.gate_up(_normed(state, layer.mlp_norm, epsilon))
            state += layer.down(Rows.round(_gated(gates)))
        state *= _inverse_norm(state, epsilon)
        state *= self._norm
        for chunk, hidden in zip(chunks, torch.split(state, sizes), strict=True):
            pool.hidden[chunk.slots[-1], chunk.offset : chunk.offset + chunk.rows] = hidden

    def logits(self, pool: KvPool, places: Sequence[tuple[int, int]]) -> Tensor:
        """The logits that follow resident rows.

        Args:
            pool: where the rows are.
            places: of each, its slot and its row there.

        Returns:
            float32, ``(places, vocabulary)``.
        """
        hidden = torch.stack([pool.hidden[slot, row] for slot, row in places])
        return self._head(Rows.round(hidden.float()))

    # -- inside --------------------------------------------------------------------------------

    def _block(self, rows: int) -> int:
        return self._wide_block if rows >= WIDE_ROWS_MIN else self._small_block

    @staticmethod
    def _rotation(table: Tensor, chunks: Sequence[Chunk]) -> Tensor:
        parts = [table[chunk.position : chunk.position + chunk.rows] for chunk in chunks]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _read_layer(self, weights: Weights, prefix: str) -> Layer:
        shape = self.shape
        attention, mlp = prefix + "self_attn.", prefix + "mlp."
        query_width = shape.heads * shape.head_dim
        kv_width = shape.kv_heads * shape.head_dim

        def linear(*parts: tuple[str, int, int], pad: int = 0) -> Int8Linear:
            matrices, biases = [], []
            for name, outputs, inputs in parts:
                matrix = weights.take(name + ".weight", outputs, inputs)
                bias = weights.take_if_there(name + ".bias", outputs)
                matrices.append(functional.pad(matrix, (0, 0, 0, pad)))
                biases.append(None if bias is None else functional.pad(bias, (0, pad)))
            return Int8Linear.quantise(matrices, biases, prepacked=self._prepacked)

        head_norm = None
        query_norm = weights.take_if_there(attention + "q_norm.weight", shape.head_dim)
        if query_norm is not None:
            key_norm = weights.take(attention + "k_norm.weight", shape.head_dim)
            head_norm = torch.cat(
                [
                    query_norm.float().expand(shape.heads, -1),
                    key_norm.float().expand(shape.kv_heads, -1),
                ]
            )
        weights.take_if_there(attention + "rotary_emb.inv_freq", shape.head_dim // 2)
        pad = -shape.intermediate % VECTOR_ELEMENTS
        down = weights.take(mlp + "down_proj.weight", shape.hidden, shape.intermediate)
        down_bias = weights.take_if_there(mlp + "down_proj.bias", shape.hidden)
        return Layer(
            attention_norm=weights.take(prefix + "input_layernorm.weight", shape.hidden).float(),
            queries_keys_values=linear(
                (attention + "q_proj", query_width, shape.hidden),
                (attention + "k_proj", kv_width, shape.hidden),
                (attention + "v_proj", kv_width, shape.hidden),
            ),
            head_norm=head_norm,
            output=linear((attention + "o_proj", shape.hidden, query_width)),
            mlp_norm=weights.take(prefix + "post_attention_layernorm.weight", shape.hidden).float(),
            gate_up=linear(
                (mlp + "gate_proj", shape.intermediate, shape.hidden),
                (mlp + "up_proj", shape.intermediate, shape.hidden),
                pad=pad,
            ),
            down=Int8Linear.quantise(
                [functional.pad(down, (0, pad))], [down_bias], prepacked=self._prepacked
            ),
        )


SLOTS_MIN = 2
"""A path that leaves a tile in the middle needs the tile and its copy."""


def _inverse_norm(state: Tensor, epsilon: float) -> Tensor:
    """One over the root of the mean square (RMS norm, Zhang and Sennrich, 2019), by row."""
    return state.square().mean(-1, keepdim=True).add_(epsilon).rsqrt_()


def _normed(state: Tensor, gain: Tensor, epsilon: float) -> Rows:
    """RMS norm of each row, rounded. Rounding sees no factor of a row: it joins the row's scale."""
    return Rows.round(state * gain, _inverse_norm(state, epsilon))


def _gated(gates: Tensor) -> Tensor:
    """``silu(gate) * up`` of ``(rows, 2 * width)``, in parts that torch splits harmlessly."""
    width = gates.shape[1] // 2
    rows_max = len(gates)
    if not _splits_into_registers(rows_max * width):
        rows_max = max(1, ELEMENTS_MAX_PER_THREAD // width)
    parts = [
        functional.silu(part[:, :width]).mul_(part[:, width:]) for part in _in_rows(gates, rows_max)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _splits_into_registers(elements: int) -> bool:
    """Whether no part that a thread is given ends within a vector register."""
    threads = min(torch.get_num_threads(), -(-elements // ELEMENTS_MAX_PER_THREAD))
    return -(-elements // threads) % VECTOR_ELEMENTS == 0


def _in_rows(rows: Tensor, count_max: int) -> Iterator[Tensor]:
    for start in range(0, len(rows), count_max):
        yield rows[start : start + count_max]


def _rotations(folder: Path, rope: dict[str, Any], shape: Shape) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines of every position, ``(positions, 1, head_dim)``.

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
    return (
        torch.cat((cosines, cosines), -1).unsqueeze(1),
        torch.cat((-sines, sines), -1).unsqueeze(1),
    )
