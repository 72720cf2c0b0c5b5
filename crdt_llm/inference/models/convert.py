"""One GGUF file of the default model becomes an ordinary model folder.

This module knows the GGUF layout of a Llama with a GPT-2 style tokenizer, and nothing else: where
the file came from, whether it is the right one and where the folder belongs is the business of
:mod:`.folders`. It needs neither torch nor transformers, so the same file gives the same bytes
whatever their versions are.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from crdt_llm.errors import ModelUnusable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

# GGUF's token types, from ggml-org/ggml `include/gguf.h` and llama.cpp `enum llama_token_type`.
_CONTROL_TOKEN = 3

# llama.cpp's name of a pre-tokenizer -> what it does before the byte-level split of GPT-2. "smollm"
# was trained on single digits; without the split a number after two spaces comes out in other ids.
_SPLITS_BEFORE_BYTES: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [],
    "smollm": [{"type": "Digits", "individual_digits": True}],
}

# GGUF's names of a layer's weights -> the names transformers gives them.
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_MODEL_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}


def convert(gguf_file: Path, folder: Path, report: Callable[[str], None]) -> None:
    """Write config, tokenizer, chat template and bf16 weights of a tied Llama into ``folder``.

    Args:
        gguf_file: a GGUF version 3 file, weights of any type that :mod:`gguf.quants` can
            dequantise.
        folder: an existing, empty folder.
        report: takes a line for people now and then.

    Raises:
        ModelUnusable: the file is not GGUF, or not a Llama with tied weights and a GPT-2 style
            tokenizer.
    """
    import gguf  # noqa: PLC0415 - half a second that only a conversion should cost

    try:
        reader = gguf.GGUFReader(gguf_file)
    except (ValueError, OSError, IndexError) as error:
        raise ModelUnusable(f"{gguf_file} is not a readable GGUF file: {error}") from error
    facts: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
    names = {tensor.name for tensor in reader.tensors}
    if facts.get("general.architecture") != "llama" or "output.weight" in names:
        raise ModelUnusable(f"{gguf_file} is not a Llama with tied weights; give --model a folder")
    if facts.get("tokenizer.ggml.model") != "gpt2":
        raise ModelUnusable(f"{gguf_file} has no GPT-2 style tokenizer; give --model a folder")

    _write_json(folder / "config.json", _config(facts))
    _write_json(
        folder / "generation_config.json",
        {
            "bos_token_id": facts["tokenizer.ggml.bos_token_id"],
            "eos_token_id": facts["tokenizer.ggml.eos_token_id"],
            "pad_token_id": facts["tokenizer.ggml.padding_token_id"],
        },
    )
    _write_json(folder / "tokenizer.json", _tokenizer(facts))
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(facts))
    (folder / "chat_template.jinja").write_text(facts["tokenizer.chat_template"], encoding="utf-8")
    report(f"converting {len(reader.tensors)} tensors to bf16")
    _write_weights(reader, facts, folder / "model.safetensors")


def _config(facts: dict[str, Any]) -> dict[str, Any]:
    heads = facts["llama.attention.head_count"]
    hidden = facts["llama.embedding_length"]
    theta = facts["llama.rope.freq_base"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "head_dim": hidden // heads,
        "intermediate_size": facts["llama.feed_forward_length"],
        "initializer_range": 0.02,
        "max_position_embeddings": facts["llama.context_length"],
        "num_attention_heads": heads,
        "num_hidden_layers": facts["llama.block_count"],
        "num_key_value_heads": facts["llama.attention.head_count_kv"],
        # GGUF keeps a float32: seven digits are what its author wrote.
        "rms_norm_eps": float(f"{facts['llama.attention.layer_norm_rms_epsilon']:.7g}"),
        "rope_theta": theta,
        "rope_parameters": {"rope_theta": theta, "rope_type": "default"},
        "tie_word_embeddings": True,
        "use_cache": True,
        "vocab_size": facts["llama.vocab_size"],
        "bos_token_id": facts["tokenizer.ggml.bos_token_id"],
        "eos_token_id": facts["tokenizer.ggml.eos_token_id"],
        "pad_token_id": facts["tokenizer.ggml.padding_token_id"],
    }


def _tokenizer(facts: dict[str, Any]) -> dict[str, Any]:
    """The ``tokenizer.json`` of a byte-level BPE, in the format of the tokenizers library."""
    kind = facts["tokenizer.ggml.pre"]
    if kind not in _SPLITS_BEFORE_BYTES:
        raise ModelUnusable(f"the pre-tokenizer {kind!r} is not known; give --model a folder")
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    tokens: list[str] = facts["tokenizer.ggml.tokens"]
    kinds: list[int] = facts["tokenizer.ggml.token_type"]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": token_id,
                "content": content,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for token_id, content in enumerate(tokens)
            if kinds[token_id] == _CONTROL_TOKEN
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [*_SPLITS_BEFORE_BYTES[kind], byte_level],
        },
        "post_processor": None,
        "decoder": {**byte_level, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {content: token_id for token_id, content in enumerate(tokens)},
            "merges": facts["tokenizer.ggml.merges"],
        },
    }


def _tokenizer_config(facts: dict[str, Any]) -> dict[str, Any]:
    tokens: list[str] = facts["tokenizer.ggml.tokens"]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[facts["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[facts["tokenizer.ggml.eos_token_id"]],
        "pad_token": tokens[facts["tokenizer.ggml.padding_token_id"]],
        "unk_token": tokens[facts["tokenizer.ggml.unknown_token_id"]],
        "clean_up_tokenization_spaces": False,
        "model_max_length": facts["llama.context_length"],
    }


def _write_weights(reader: Any, facts: dict[str, Any], path: Path) -> None:
    """Write a safetensors file: u64 little-endian header length, JSON header, tensors end to end.

    Format: huggingface/safetensors, README. Written here because the library's own writers take
    torch or numpy tensors, and numpy has no bfloat16.
    """
    tensors = dict(_weights(reader, facts))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, bits in tensors.items():
        begin, end = end, end + bits.nbytes
        header[name] = {"dtype": "BF16", "shape": bits.shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # readers map the file: tensors begin at a multiple of 8
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for bits in tensors.values():
            file.write(bits.astype("<u2", copy=False).tobytes())


def _weights(reader: Any, facts: dict[str, Any]) -> Iterator[tuple[str, NDArray[np.uint16]]]:
    """Every tensor under its transformers name, as the bit patterns of bfloat16."""
    from gguf.quants import dequantize  # noqa: PLC0415 - as above

    heads = {
        "attn_q": facts["llama.attention.head_count"],
        "attn_k": facts["llama.attention.head_count_kv"],
    }
    for tensor in reader.tensors:
        # "blk.3.attn_q.weight" or "token_embd.weight"
        parts = tensor.name.split(".")
        weights = dequantize(tensor.data, tensor.tensor_type)
        if parts[0] == "blk":
            if parts[2] in heads:
                weights = _rotate_half_order(weights, heads[parts[2]])
            name = f"model.layers.{parts[1]}.{_LAYER_NAMES[parts[2]]}.weight"
        else:
            name = f"{_MODEL_NAMES[parts[0]]}.weight"
        yield name, _bfloat16(weights)


def _rotate_half_order(weights: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Undo llama.cpp's reordering of query and key rows, ``(rows, columns)`` to the same shape.

    Its rotary embedding turns neighbouring rows of a head together, transformers' turns row i with
    row i + half; see ``permute`` in llama.cpp's ``convert_hf_to_gguf.py``.
    """
    rows, columns = weights.shape
    pairs = weights.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def _bfloat16(weights: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round to nearest, ties to even, as torch does. Weights are finite, so NaN needs no care."""
    import numpy as np  # noqa: PLC0415 - as above

    bits = np.ascontiguousarray(weights, dtype=np.float32).view(np.uint32)
    rounding = ((bits >> 16) & 1) + np.uint32(0x7FFF)
    return ((bits + rounding) >> 16).astype(np.uint16)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
