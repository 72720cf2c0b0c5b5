from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from engine_runs import Run, ids_in, reply, text_of, warm
from transformers import AutoConfig, AutoModelForCausalLM, T5ForConditionalGeneration
from transformers.models.gpt2 import modeling_gpt2

from crdt_llm.errors import ModelUnusable
from crdt_llm.inference.contract import TOKEN_LOG_EXACT, Prefilled, SamplingParams
from crdt_llm.inference.engine.process import EngineProcess
from crdt_llm.inference.engine.torch_engine import TorchEngine
from crdt_llm.inference.forward.llama import Llama
from crdt_llm.inference.forward.model import load_model
from crdt_llm.inference.forward.transformers_model import POSITIONS_UNSAID, TransformersModel
from crdt_llm.inference.forward.weights import BF16, FLOAT32, INT8
from crdt_llm.inference.kv.pool import Chunk

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

KV_BYTES = 1 << 24
VOCABULARY = 320
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,  # wide enough that greedy decoding meets no ties
    "tie_word_embeddings": False,  # a random tied head repeats its input for ever
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 48,
}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 2,
}

# What is particular about each. The sizes above that a family does not have are ignored by it.
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {},  # learned positions, biases, weights that stand on their side
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},  # positions with an offset
    "gpt_neox": {},  # attention beside the MLP, a part of each head rotated
    "phi": {},  # a head with a bias
    "gemma": {"head_dim": 32},  # scaled embeddings, wide heads
    "gemma2": {  # capped logits
        "head_dim": 16,
        "layer_types": ["full_attention", "full_attention"],
        "final_logit_softcapping": 5.0,
        "attn_logit_softcapping": None,
    },
    "olmo": {},  # norms without weights
    "stablelm": {},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 4.0},
    "mixtral": {"sliding_window": None} | EXPERTS,
    "qwen2_moe": EXPERTS,
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "bloom": {},  # ALiBi, attention of its own
    "deepseek_v3": LATENT,  # values narrower than keys
    "llama": {},
}


def build(folder: Path, family: str, **changes: object) -> Any:
    """A random model of a family, written to a folder; and the model itself."""
    torch.manual_seed(3)
    config = AutoConfig.for_model(family, **SIZES | changes)
    if family == "t5":
        model: Any = T5ForConditionalGeneration(config)  # type: ignore[arg-type]  # it is one
    else:
        model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]  # of the library
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                weight.normal_(0.0, 0.2)  # transformers begins with zeros
    model.save_pretrained(folder)
    return model.eval()


class Pair:
    """A model as the engine runs it, and as transformers does."""

    def __init__(self, folder: Path, family: str) -> None:
        self.reference = build(folder, family, **FAMILIES[family])
        self.model = TransformersModel(folder, FLOAT32)

    def engine(self, kv_bytes: int = KV_BYTES, kv_folder: Path | None = None) -> TorchEngine:
        return TorchEngine(self.model, kv_bytes, kv_folder)

    def expected(self, ids: Sequence[int], tokens: int) -> list[int]:
        """What transformers samples greedily, in one piece and with a cache of its own."""
        text = torch.tensor([list(ids)])
        with torch.inference_mode():
            whole = self.reference.generate(
                text,
                attention_mask=torch.ones_like(text),
                do_sample=False,
                max_new_tokens=tokens,
                eos_token_id=None,
                pad_token_id=0,
            )
        sampled: list[int] = whole[0, len(ids) :].tolist()
        return sampled


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(tmp_path_factory.mktemp(request.param), request.param)


def greedy(tokens: int) -> SamplingParams:
    return SamplingParams(tokens, ignore_eos=True)


TEXT = text_of(1, 300)  # more than a tile, and several chunks
FORKS = ([*TEXT[:280], *text_of(2, 30)], [*TEXT[:100], *text_of(3, 200)])


def test_a_reply_and_its_forks_are_those_of_transformers(pair: Pair) -> None:
    engine = pair.engine()
    for text, shared in ((TEXT, 0), (FORKS[0], 280), (FORKS[1], 100)):
        prefilled, *events = reply(engine, text, greedy(16))
        assert prefilled == Prefilled(len(text), shared, len(text) - shared)
        assert ids_in(events) == pair.expected(text, 16)
    # The longer path behind the fork is as it was.
    assert ids_in(reply(engine, TEXT, greedy(16))) == pair.expected(TEXT, 16)


def test_replies_beside_each_other_are_those_of_transformers(pair: Pair) -> None:
    run = Run(pair.engine())
    texts = (TEXT, FORKS[0], text_of(4, 7))
    for number, text in enumerate(texts):
        run.engine.generate(number, text, greedy(12), len(text))
    run.finish()
    for number, text in enumerate(texts):
        assert ids_in(run.events[number]) == pair.expected(text, 12)


def test_a_reply_that_was_cut_goes_on_behind_its_ids(pair: Pair) -> None:
    whole = pair.expected(TEXT[:250], 20)
    path = TEXT[:250] + whole[:9]
    assert ids_in(reply(pair.engine(), path, greedy(20), start=250)) == whole[9:]


def test_kv_from_disk_goes_on_as_if_it_had_stayed(pair: Pair, tmp_path: Path) -> None:
    before = pair.engine(kv_folder=tmp_path / "kv")
    sampled = ids_in(reply(before, TEXT, greedy(10)))
    while before.save_one():
        pass
    after = pair.engine(kv_folder=tmp_path / "kv")
    path = TEXT + sampled
    assert warm(after, path).prefilled == 0
    assert ids_in(reply(after, path, greedy(20), start=300)) == pair.expected(TEXT, 20)[10:]
    after.forget(path, 0)
    assert warm(after, path) == Prefilled(310, 0, 310)
    assert after.load.disk_bytes == 0


def test_what_left_memory_is_computed_again(pair: Pair) -> None:
    engine = pair.engine(4 * pair.model.slot_bytes)
    for text in (TEXT, FORKS[1], text_of(5, 300), TEXT):
        assert ids_in(reply(engine, text, greedy(6))) == pair.expected(text, 6)


def test_capabilities_say_what_transformers_computes(pair: Pair) -> None:
    capabilities = pair.engine(1 << 27).capabilities
    assert capabilities.exactness == TOKEN_LOG_EXACT
    assert capabilities.vocabulary == VOCABULARY
    assert capabilities.weight_format == FLOAT32
    said = getattr(pair.reference.config, "max_position_embeddings", POSITIONS_UNSAID)
    assert capabilities.positions == said


@pytest.mark.parametrize("family", ["gpt2", "gemma", "mixtral"])
def test_bf16_is_the_default_and_close(family: str, tmp_path: Path) -> None:
    build(tmp_path, family, **FAMILIES[family])
    engines = {
        weights: TorchEngine(TransformersModel(tmp_path, weights), KV_BYTES)
        for weights in (None, FLOAT32)
    }
    found = {}
    for weights, engine in engines.items():
        warm(engine, TEXT)
        found[weights] = torch.from_numpy(engine.logits(TEXT))
    assert engines[None].capabilities.weight_format == BF16
    assert engines[None].capabilities.fingerprint != engines[FLOAT32].capabilities.fingerprint
    deviations = (found[None] - found[FLOAT32]).norm(dim=-1) / found[FLOAT32].norm(dim=-1)
    assert 0 < deviations.median() < 0.1


DYNAMIC_ROPE = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [4.0] * 8,
}


@pytest.mark.parametrize(
    ("family", "changes", "positions"),
    [
        ("llama", {"rope_parameters": DYNAMIC_ROPE}, 1024),
        ("phi3", {"rope_parameters": LONG_ROPE, "original_max_position_embeddings": 256}, 256),
    ],
)
def test_a_text_ends_before_the_rotation_of_its_beginning_would_change(
    family: str, changes: dict[str, Any], positions: int, tmp_path: Path
) -> None:
    build(tmp_path, family, **changes)
    assert TransformersModel(tmp_path, FLOAT32).positions == positions


# -- refusals --------------------------------------------------------------------------------------


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "mistral": ({"sliding_window": 128}, "sliding window"),
    "gemma2": ({"head_dim": 16}, "sliding window"),
    "mamba": ({}, "without attention"),
    "rwkv": ({}, "recurrent state"),
    "t5": ({"d_model": 64, "d_kv": 16, "num_layers": 2}, "encoder-decoder"),
    "bert": ({}, "in another way"),  # it reads backwards
}


@pytest.mark.parametrize("family", REFUSED)
def test_what_a_path_of_kv_cannot_hold_is_refused_in_one_line(family: str, tmp_path: Path) -> None:
    changes, reason = REFUSED[family]
    build(tmp_path, family, **changes)
    with pytest.raises(ModelUnusable, match=reason) as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value)


def change_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def _drop_weight(folder: Path, name: str) -> None:
    from safetensors.torch import load_file, save_file  # noqa: PLC0415 - for one test alone

    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _spoil_weight(folder: Path, name: str) -> None:
    from safetensors.torch import load_file, save_file  # noqa: PLC0415 - for one test alone

    tensors = load_file(folder / "model.safetensors")
    tensors[name][3] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a model of nobody": (lambda f: change_config(f, model_type="nothing"), "does not know"),
    "code of its own": (
        lambda f: change_config(
            f, model_type="own", auto_map={"AutoModelForCausalLM": "own.Model", "AutoConfig": "o.C"}
        ),
        "never run",
    ),
    "quantised": (
        lambda f: change_config(f, quantization_config={"quant_method": "gptq", "bits": 4}),
        "stored quantised",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "is missing"),
    "a weight missing": (lambda f: _drop_weight(f, "transformer.h.1.mlp.c_fc.weight"), "c_fc"),
    "a weight too small": (lambda f: change_config(f, n_inner=100), "no fitting weight"),
    "no number": (lambda f: _spoil_weight(f, "transformer.ln_f.bias"), "not finite"),
    "cut short": (
        lambda f: (f / "model.safetensors").write_bytes(
            (f / "model.safetensors").read_bytes()[:-9]
        ),
        "cannot run",
    ),
    "no configuration": (lambda f: (f / "config.json").write_text("{"), "is damaged"),
    "sizes that cannot be": (lambda f: change_config(f, n_head=3), "gpt2"),
}


@pytest.fixture(scope="module")
def gpt2_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpt2")
    build(folder, "gpt2")
    return folder


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_folder_that_is_no_whole_model_is_refused_in_one_line(
    damage: str, gpt2_dir: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(gpt2_dir, tmp_path / "model")
    harm, reason = DAMAGES[damage]
    harm(folder)
    with pytest.raises(ModelUnusable, match=reason) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


def test_int8_is_refused_where_transformers_computes(gpt2_dir: Path) -> None:
    with pytest.raises(ModelUnusable, match="use bf16 or float32"):
        load_model(gpt2_dir, INT8)


def test_logits_that_are_not_made_of_the_last_hidden_state_are_refused(
    gpt2_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = modeling_gpt2.GPT2LMHeadModel.forward

    def scaled(*words: Any, **options: Any) -> Any:
        found = forward(*words, **options)
        found.logits = 2 * found.logits
        return found

    monkeypatch.setattr(modeling_gpt2.GPT2LMHeadModel, "forward", scaled)
    with pytest.raises(ModelUnusable, match="in another way than from its last hidden state"):
        TransformersModel(gpt2_dir)


def test_rows_that_read_their_neighbours_without_kv_are_refused(
    gpt2_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = modeling_gpt2.GPT2Model.forward

    def shifted(*words: Any, **options: Any) -> Any:
        found = forward(*words, **options)
        state = found.last_hidden_state
        found.last_hidden_state = state + torch.roll(state, 1, dims=1)
        return found

    monkeypatch.setattr(modeling_gpt2.GPT2Model, "forward", shifted)
    with pytest.raises(ModelUnusable, match="computed in several parts"):
        TransformersModel(gpt2_dir)


# -- the choice, and devices -----------------------------------------------------------------------


def test_a_llama_on_the_cpu_has_a_step_of_our_own(tiny_model_dir: Path) -> None:
    assert isinstance(load_model(tiny_model_dir), Llama)
    assert isinstance(load_model(tiny_model_dir, INT8, "cpu"), Llama)


def test_every_other_model_and_weight_format_goes_to_transformers(
    tiny_model_dir: Path, gpt2_dir: Path, tmp_path: Path
) -> None:
    assert isinstance(load_model(gpt2_dir), TransformersModel)
    assert isinstance(load_model(tiny_model_dir, FLOAT32), TransformersModel)
    partly = shutil.copytree(tiny_model_dir, tmp_path / "model")
    change_config(partly, hidden_act="gelu")  # of the family, but nothing that we compute
    assert isinstance(load_model(partly), TransformersModel)


def test_every_other_device_goes_to_transformers(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def made(*words: object) -> object:
        asked.append(words)
        return object()

    monkeypatch.setattr("crdt_llm.inference.forward.model.find_device", torch.device)
    monkeypatch.setattr("crdt_llm.inference.forward.transformers_model.TransformersModel", made)
    load_model(tiny_model_dir, None, "cuda:1")
    load_model(tiny_model_dir, BF16, "mps")
    assert asked == [
        (tiny_model_dir, None, torch.device("cuda:1")),
        (tiny_model_dir, BF16, torch.device("mps")),
    ]


@pytest.mark.parametrize("device", ["cuda:63", "meta", "nonsense", "", "cpu:x"])
def test_a_device_that_is_not_there_is_refused_in_one_line(
    device: str, tiny_model_dir: Path
) -> None:
    with pytest.raises(ModelUnusable, match=r"there is no device .*: --device takes cpu") as caught:
        load_model(tiny_model_dir, device=device)
    assert "\n" not in str(caught.value)


async def test_the_engine_process_says_that_a_device_is_not_there(tiny_model_dir: Path) -> None:
    with pytest.raises(ModelUnusable, match="there is no device cuda:63"):
        await EngineProcess.start(tiny_model_dir, device="cuda:63")


async def test_the_engine_process_runs_what_is_no_llama(gpt2_dir: Path) -> None:
    async with await EngineProcess.start(gpt2_dir, weights=FLOAT32) as engine:
        assert engine.capabilities.exactness == TOKEN_LOG_EXACT
        assert (await engine.warm(TEXT)).prefilled == 300


def test_a_step_on_a_device_touches_no_memory_of_the_host(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # "meta" has shapes and no values: to mix its tensors with ours, or to read them, is an error.
    model = TransformersModel(tiny_model_dir, BF16)
    device = torch.device("meta")
    model._model.to(device)
    model._device = device
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    read: list[torch.device] = []
    embedding = model._model.get_input_embeddings()
    embedding.register_forward_pre_hook(lambda _, words: read.append(words[0].device))
    pool = model.new_pool(4 * model.slot_bytes)
    assert pool.kv.device == pool.hidden.device == device
    chunks = [Chunk(300, 19, [3, 1]), Chunk(5, 1, [2])]
    with torch.inference_mode():
        model.forward(torch.zeros(20, dtype=torch.int64), chunks, pool)
        assert read == [device, device]
        pool.copy_rows(1, 0, 9)
        pool.wipe(0, 3)
        host = model._rows
        kv = torch.ones(host.layers, 2 * host.kv_heads, 7, host.head_dim, dtype=host.dtype)
        pool.write(2, 4, kv, torch.ones(7, host.hidden, dtype=host.dtype))
        assert waited == [device]
        with pytest.raises(NotImplementedError, match="no data"):  # the way to the host
            pool.read(1, 5)
        with pytest.raises(NotImplementedError, match="no data"):
            model.logits(pool, [(1, 50), (2, 5)])
