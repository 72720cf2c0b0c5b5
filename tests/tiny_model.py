"""A Llama folder of a few hundred kilobytes with random weights, made on the spot.

Owns the shape, the weights and the tokenizer of the model that tests use wherever the words do
not matter. It writes the files that a model from a hub has (config, weights, tokenizer, template,
generation config) and knows nothing of the code that will read them. Weights come from one seed,
so every process builds the same model.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

WEIGHTS_SEED = 20240229
VOCABULARY_TARGET = 320  # 256 bytes, a few merges, the added tokens
POSITIONS = 2048
LAYERS = 2
HIDDEN = 64
HEADS = 4
KV_HEADS = 2
HEAD_DIM = 16
INTERMEDIATE = 160
END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
THINK_OPEN = "<think>"
THINK_CLOSE = "</think>"

# The head is not tied (a random tied one repeats its input for ever), and this wide the logits have
# a standard deviation of about 2.4: sampling varies, and greedy decoding meets no ties.
HEAD_STD = 0.3
EMBEDDING_STD = 1.0

CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a tiny model.<|im_end|>\\n' }}"
    "{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

_TRAINING_TEXT = (
    "the model reads the conversation and the conversation remembers the model",
    "a user asks, the assistant answers, the system says how",
    "what was said stays said; what is new is read once",
)


def _build_tokenizer() -> Tokenizer:
    """A byte-level BPE with all 256 bytes, a few merges, and special and ordinary added tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_TARGET - 5,
        min_frequency=1,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(_TRAINING_TEXT, trainer=trainer)
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True) for token in (END_OF_TEXT, TURN_START, TURN_END)]
    )
    # Qwen's way: control tokens in all but name.
    tokenizer.add_tokens([AddedToken(token, special=False) for token in (THINK_OPEN, THINK_CLOSE)])
    return tokenizer


def _build_weights(vocabulary: int) -> dict[str, torch.Tensor]:
    """Random tensors under the names that transformers gives to a Llama."""
    generator = torch.Generator().manual_seed(WEIGHTS_SEED)

    def normal(rows: int, columns: int, std: float) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) * std).to(torch.bfloat16)

    def linear(rows: int, columns: int) -> torch.Tensor:
        return normal(rows, columns, columns**-0.5)

    def gain() -> torch.Tensor:
        noise = torch.randn(HIDDEN, generator=generator) * 0.1
        return (1 + noise).to(torch.bfloat16)

    weights = {"model.embed_tokens.weight": normal(vocabulary, HIDDEN, EMBEDDING_STD)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        weights |= {
            prefix + "self_attn.q_proj.weight": linear(HEADS * HEAD_DIM, HIDDEN),
            prefix + "self_attn.k_proj.weight": linear(KV_HEADS * HEAD_DIM, HIDDEN),
            prefix + "self_attn.v_proj.weight": linear(KV_HEADS * HEAD_DIM, HIDDEN),
            prefix + "self_attn.o_proj.weight": linear(HIDDEN, HEADS * HEAD_DIM),
            prefix + "mlp.gate_proj.weight": linear(INTERMEDIATE, HIDDEN),
            prefix + "mlp.up_proj.weight": linear(INTERMEDIATE, HIDDEN),
            prefix + "mlp.down_proj.weight": linear(HIDDEN, INTERMEDIATE),
            prefix + "input_layernorm.weight": gain(),
            prefix + "post_attention_layernorm.weight": gain(),
        }
    weights["model.norm.weight"] = gain()
    weights["lm_head.weight"] = normal(vocabulary, HIDDEN, HEAD_STD)
    return weights


def _write_model(folder: Path) -> None:
    tokenizer = _build_tokenizer()
    vocabulary = tokenizer.get_vocab_size()
    end_of_turn = tokenizer.token_to_id(TURN_END)
    end_of_text = tokenizer.token_to_id(END_OF_TEXT)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": vocabulary,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "max_position_embeddings": POSITIONS,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_turn,
        "pad_token_id": end_of_text,
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": TURN_END,
        "pad_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "model_max_length": POSITIONS,
    }
    generation_config = {"bos_token_id": end_of_text, "eos_token_id": end_of_turn}
    save_file(_build_weights(vocabulary), folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    for name, value in (
        ("config.json", config),
        ("tokenizer_config.json", tokenizer_config),
        ("generation_config.json", generation_config),
    ):
        (folder / name).write_text(json.dumps(value, indent=2), encoding="utf-8")


def build_tiny_model(folder: Path) -> Path:
    """Put the tiny model into ``folder`` unless it is there already.

    Safe when several processes build the same folder at once: each builds its own copy beside it,
    the first rename wins and the others drop theirs (the files are the same anyway).

    Args:
        folder: the model folder; its parent is made if missing.

    Returns:
        ``folder``, complete.
    """
    if (folder / "config.json").exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _write_model(staging)
        try:
            staging.rename(folder)
        except OSError:
            if not (folder / "config.json").exists():
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder
