"""Any causal model of transformers: its own code computes, and the engine's pool keeps its KV.

Owns the loading, a cache of transformers' kind whose rows lie in the slots of a path, and the
probe: whether the model can be cut into chunks and its logits be made of its hidden states is not
read off a list of names but tried, once, with random ids. It knows slots, but not which ids they
hold, nor requests, nor sampling.

Exactness is level 1. A library's kernels sum in an order that depends on how many rows they get, so
the same text cut in another way has other last bits, and where two ids are almost equally likely
the other one may be chosen. The log of ids is canonical all the same: a reply that was cut short
goes on behind the ids that are recorded.

What is refused is what the pool cannot hold, or what would silently be other words: windows and
recurrent states, encoders, layers that keep no KV or KV of different sizes, logits that are not
those of the model, code that came with a folder.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

import numpy as np
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.utils import logging as transformers_logging

from crdt_llm.errors import ModelUnusable
from crdt_llm.inference.contract import TOKEN_LOG_EXACT
from crdt_llm.inference.forward.cpu import cpu_features
from crdt_llm.inference.forward.llama import parse_config
from crdt_llm.inference.forward.weights import BF16, FLOAT32, weight_files
from crdt_llm.inference.kv.pool import HOST, SLOTS_MIN, Chunk, KvPool, RowShape

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from torch import Tensor

logger = logging.getLogger("crdt_llm.inference")

DTYPES: Final = {BF16: torch.bfloat16, FLOAT32: torch.float32}
"""By weight format; the first is the default."""

POSITIONS_UNSAID: Final = 2048
"""Where a configuration names no longest text (ALiBi needs none): what such models were trained
with."""

PROBE_CHUNKS: Final = (8, 2, 1, 1, 1, 1, 2)
"""Rows of the chunks that a probe is cut into: single ones, which decoding has, and several."""

DEVIATION_MAX: Final = {BF16: 0.1, FLOAT32: 0.01}
"""Of the logits of a row from the model's own, relative to how large those are. Rounding stays far
below, and a row that was computed from something else is as far away as a row can be."""

OUTLIERS_MAX: Final = 2
"""Rows of the probe that may deviate by more: a near tie of two experts may fall the other way."""

# Rotations that are others behind so many positions, so that the KV of the first n tokens would
# not be one value; up to there they are like any other.
_ROPES_BY_LENGTH: Final = ("dynamic", "longrope")

_Result = TypeVar("_Result")


class TransformersModel:
    """A causal model as transformers computes it.

    Args:
        folder: config.json and safetensors.
        weight_format: ``bf16`` or ``float32``; None is ``bf16``.
        device: where it computes.

    Raises:
        ModelUnusable: the model cannot be used, and why.
    """

    exactness: int = TOKEN_LOG_EXACT

    def __init__(
        self, folder: Path, weight_format: str | None = None, device: torch.device = HOST
    ) -> None:
        self.weight_format = BF16 if weight_format is None else weight_format
        if self.weight_format not in DTYPES:
            raise ModelUnusable(
                f"the weight format {weight_format} is for a Llama on the cpu alone: "
                f"transformers computes this model, use {' or '.join(DTYPES)}"
            )
        self._device = device
        _quieten()
        config = _read_config(folder)
        self._kind = config.model_type
        files = weight_files(folder)
        model = self._attempt(self._load, folder)
        self._check_model(model)
        self._model = model
        self._backbone = model.base_model
        self._head = model.get_output_embeddings()
        self._finish = _Finish.of(model.config.get_text_config(decoder=True))
        self._rows, self.vocabulary = self._attempt(self._probe)
        self.positions = _count_positions(config.get_text_config(decoder=True))
        self.fingerprint = self._digest(folder / "config.json", files)
        logger.info("transformers computes the model (type %s) on %s", self._kind, device)

    @property
    def slot_bytes(self) -> int:
        """See :class:`~crdt_llm.inference.forward.model.Model`."""
        return self._rows.slot_bytes

    def new_pool(self, memory_bytes: int) -> KvPool:
        """See :class:`~crdt_llm.inference.forward.model.Model`."""
        return self._attempt(KvPool.within, memory_bytes, self._rows, self._device)

    def forward(self, ids: Tensor, chunks: Sequence[Chunk], pool: KvPool) -> None:
        """See :class:`~crdt_llm.inference.forward.model.Model`: one call of the model a chunk."""
        parts = torch.split(ids.to(self._device), [chunk.rows for chunk in chunks])
        for part, chunk in zip(parts, chunks, strict=True):
            state = self._backbone(
                part[None], past_key_values=_PathCache(pool, chunk), use_cache=True
            ).last_hidden_state[0]
            rows = slice(chunk.offset, chunk.offset + chunk.rows)
            pool.hidden[chunk.slots[-1], rows] = state.to(pool.hidden.dtype)
        if self._device.type != HOST.type:
            # Else a cancellation waits behind many steps, and their pace is not what is measured.
            torch.accelerator.synchronize(self._device)

    def logits(self, pool: KvPool, places: Sequence[tuple[int, int]]) -> Tensor:
        """See :class:`~crdt_llm.inference.forward.model.Model`."""
        hidden = torch.stack([pool.hidden[slot, row] for slot, row in places])
        return self._finish(self._head(hidden)).float().to(HOST)

    # -- inside --------------------------------------------------------------------------------

    def _attempt(self, run: Callable[..., _Result], *words: object) -> _Result:
        """Do what runs the code of a model or of a device: nobody knows what it raises."""
        try:
            return run(*words)
        except ModelUnusable:
            raise
        except Exception as error:
            said = (str(error).strip().splitlines() or [type(error).__name__])[0]
            message = f"transformers cannot run the model (type {self._kind}): {said}"
            raise ModelUnusable(message) from error

    def _load(self, folder: Path) -> Any:
        """The model itself. Attention is PyTorch's own where the model's code can call it."""
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=DTYPES[self.weight_format],
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # else its message does not name them
        )
        model, info = loaded
        unfit = {*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])}
        if unfit:
            raise ModelUnusable(
                f"the model (type {self._kind}) has no fitting weight {min(unfit)}: its "
                "configuration and its weights disagree, fetch it again"
            )
        return model.eval().to(self._device)

    def _check_model(self, model: Any) -> None:
        """Refuse what a look at the model tells; the probe tells the rest."""
        if getattr(model, "_is_stateful", False):
            raise self._refusal("has a recurrent state")
        if model.base_model is model or model.get_output_embeddings() is None:
            raise self._refusal("has no head over its hidden states")

    @torch.inference_mode()
    def _probe(self) -> tuple[RowShape, int]:
        """Try the model on a short random text, whole and as the engine runs it.

        Returns:
            what a row of it is, and the size of its vocabulary.

        Raises:
            ModelUnusable: the two differ, or it is no model that the pool can hold.
        """
        embedded = self._model.get_input_embeddings().weight.shape[0]
        ids = torch.randint(
            embedded, (sum(PROBE_CHUNKS),), generator=torch.Generator().manual_seed(1)
        )
        cache = DynamicCache()
        whole = self._model(ids[None].to(self._device), past_key_values=cache, use_cache=True)
        expected = whole.logits[0].float().to(HOST)
        if not torch.isfinite(expected).all():
            raise self._refusal("gives logits that are not finite numbers: fetch it again")
        vocabulary = expected.shape[-1]
        if vocabulary > embedded:
            raise self._refusal("gives logits of ids that it cannot read")
        hidden = self._backbone(ids[None].to(self._device), use_cache=False).last_hidden_state[0]
        own = self._finish(self._head(hidden)).float().to(HOST)
        if own.shape != expected.shape or not self._agree(own, expected):
            raise self._refusal("makes its logits in another way than from its last hidden state")
        rows = self._measure(cache, hidden.shape[-1])
        pool = KvPool(SLOTS_MIN, rows, self._device)
        for chunk in _probe_chunks():
            self.forward(ids[chunk.position : chunk.position + chunk.rows], [chunk], pool)
        cut = self.logits(pool, [(0, row) for row in range(len(ids))])
        if not self._agree(cut, expected):
            raise self._refusal("gives other logits when a text is computed in several parts")
        return rows, vocabulary

    def _measure(self, cache: DynamicCache, hidden: int) -> RowShape:
        """What a row is, by what the model put into a cache."""
        layers = [
            (layer.keys, layer.values)
            for layer in cache.layers
            if isinstance(layer, CacheLayerMixin)
            and layer.keys is not None
            and layer.values is not None
        ]
        if not layers or len(layers) < len(cache.layers):
            raise self._refusal("has layers that keep no keys and values")
        kinds = {(*keys.shape, *values.shape, keys.dtype, values.dtype) for keys, values in layers}
        (keys, values), *_ = layers
        _, kv_heads, length, width = keys.shape
        alike = len(kinds) == 1 and keys.shape[:3] == values.shape[:3]
        if not alike or keys.dtype != values.dtype or length != sum(PROBE_CHUNKS):
            raise self._refusal("has layers with keys and values of different sizes")
        return RowShape(len(layers), kv_heads, max(width, values.shape[-1]), hidden, keys.dtype)

    def _agree(self, found: Tensor, expected: Tensor) -> bool:
        deviations = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
        outliers = ~(deviations <= DEVIATION_MAX[self.weight_format])
        return int(outliers.sum()) <= OUTLIERS_MAX

    def _refusal(self, reason: str) -> ModelUnusable:
        return _refusal(self._kind, reason)

    def _digest(self, config: Path, files: Sequence[Path]) -> str:
        """A digest over all that the numbers depend on, as far as anybody can tell."""
        state = hashlib.sha256()
        for part in (
            "crdt-llm/1/transformers/1",  # raise the last number when what is done here changes
            self.weight_format,
            str(self._rows),
            torch.__version__,
            transformers.__version__,
            np.__version__,  # it draws the samples
            str(self._model.config._attn_implementation),  # noqa: SLF001 - it has no other name
            _describe(self._device),
        ):
            state.update(len(part).to_bytes(4, "little") + part.encode())
        for file in (config, *files):
            with file.open("rb") as stream:
                state.update(hashlib.file_digest(stream, "sha256").digest())
        return state.hexdigest()[:32]


class _PathLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]  # of the library
    """One layer's keys and values of a path, in the slots of a pool.

    Where keys and values have different widths (DeepSeek), the pool has the larger one for both.
    """

    is_sliding = False

    def __init__(self, pool: KvPool, chunk: Chunk, layer: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # of the library
        self._keys, self._values = pool.keys[layer], pool.values[layer]
        self._chunk = chunk
        self._length = chunk.position

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the pool is there."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """Put new rows, ``(1, kv_heads, rows, head_dim)``, into the last slot.

        Returns:
            keys and values of the whole path, ``(1, kv_heads, positions, head_dim)``.
        """
        self._length = self._chunk.position + self._chunk.rows
        return self._extend(self._keys, key_states), self._extend(self._values, value_states)

    def get_mask_sizes(self, *_: object, **__: object) -> tuple[int, int]:
        """How many positions are attended to, and the first of them.

        The rows that ask are told by their number or by their positions, as the release has it;
        they are those of the chunk.
        """
        return self._chunk.position + self._chunk.rows, 0

    def get_seq_length(self) -> int:
        """How many positions are there."""
        return self._length

    def get_max_length(self) -> int:
        """No bound of its own."""
        return -1

    def get_max_cache_shape(self) -> int:
        """As :meth:`get_max_length`, which earlier releases of transformers call so."""
        return -1

    def _extend(self, pool: Tensor, rows: Tensor) -> Tensor:
        pool = pool[..., : rows.shape[-1]]
        *before, last = self._chunk.slots
        end = self._chunk.offset + self._chunk.rows
        pool[last, :, self._chunk.offset : end] = rows[0]
        parts = [pool[slot] for slot in before]
        return torch.cat([*parts, pool[last, :, :end]], dim=1)[None]


class _PathCache(Cache):
    """The KV before a chunk, and room for its own."""

    def __init__(self, pool: KvPool, chunk: Chunk) -> None:
        super().__init__(layers=[_PathLayer(pool, chunk, n) for n in range(len(pool.keys))])


@dataclass(frozen=True, slots=True)
class _Finish:
    """What some models do with the product of their head, by their configuration.

    Args:
        factor: of every logit (Cohere multiplies, Granite divides).
        cap: no logit is larger than this, by a hyperbolic tangent (Gemma); None caps nothing.
    """

    factor: float
    cap: float | None

    @classmethod
    def of(cls, config: Any) -> _Finish:
        scale = getattr(config, "logit_scale", None)
        divisor = getattr(config, "logits_scaling", None)
        factor = (1.0 if scale is None else scale) / (1.0 if divisor is None else divisor)
        return cls(factor, getattr(config, "final_logit_softcapping", None))

    def __call__(self, logits: Tensor) -> Tensor:
        if self.factor != 1:
            logits = logits * self.factor
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap


def _read_config(folder: Path) -> Any:
    """The configuration of a model that may be run, as transformers reads it."""
    kind = str(parse_config(folder).get("model_type"))
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # each class of configuration checks itself in its own way
        message = (
            f"transformers {transformers.__version__} does not know the model (type {kind}), or "
            "not its configuration; code that comes with a model is never run"
        )
        raise ModelUnusable(message) from error
    text = config.get_text_config(decoder=True)
    if config.is_encoder_decoder:
        raise _refusal(kind, "is an encoder-decoder")
    if getattr(config, "quantization_config", None) is not None:
        raise _refusal(kind, "is stored quantised")
    try:
        layers = DynamicCache(config=text).layers
    except (KeyError, AttributeError, TypeError) as error:
        raise _refusal(kind, "has layers without full attention") from error
    if any(getattr(layer, "is_sliding", False) for layer in layers):
        raise _refusal(kind, "has layers with a sliding window")
    if any(not isinstance(layer, CacheLayerMixin) for layer in layers):
        raise _refusal(kind, "has layers without attention")
    return config


def _quieten() -> None:
    """Let transformers say nothing where somebody waits for a line of ours.

    It draws bars and tables, and has words about settings that nobody here can change.
    """
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # of the library
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # as above


def _refusal(kind: str, reason: str) -> ModelUnusable:
    return ModelUnusable(
        f"the model (type {kind}) {reason}: use a decoder whose layers all have full attention"
    )


def _count_positions(config: Any) -> int:
    """How long a text may be."""
    positions = getattr(config, "max_position_embeddings", None) or getattr(
        config, "max_seq_len", None
    )
    if positions is None:
        logger.warning("the model names no longest text: %d positions are used", POSITIONS_UNSAID)
        positions = POSITIONS_UNSAID
    rope = getattr(config, "rope_parameters", None) or {}
    by_layer_type = [each for each in rope.values() if isinstance(each, dict)]
    for each in (rope, *by_layer_type):
        if each.get("rope_type") in _ROPES_BY_LENGTH:
            originals = (
                each.get("original_max_position_embeddings"),
                getattr(config, "original_max_position_embeddings", None),
            )
            positions = min([positions, *(one for one in originals if one is not None)])
    return int(positions)


def _probe_chunks() -> Iterator[Chunk]:
    position = 0
    for rows in PROBE_CHUNKS:
        yield Chunk(position, rows, [0])
        position += rows


def _describe(device: torch.device) -> str:
    """What of a device selects its kernels."""
    if device.type == HOST.type:
        return cpu_features()
    if device.type == "cuda":
        return f"{torch.version.cuda} {torch.version.hip} {torch.cuda.get_device_name(device)}"
    return device.type
