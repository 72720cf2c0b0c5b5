"""The native kernels: how they are built and chosen, their numbers, and whose company shows."""

from __future__ import annotations

import ctypes
import errno
import gc
import logging
import os
import random
import signal
import subprocess
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import platformdirs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crdt_llm.errors import LocalMisuse, ModelUnusable
from crdt_llm.inference.forward import native, native_step
from crdt_llm.inference.forward.cpu import cpu_features
from crdt_llm.inference.forward.llama import Llama
from crdt_llm.inference.forward.native import KernelsUnavailable, library
from crdt_llm.inference.forward.native_step import NativeStep
from crdt_llm.inference.forward.torch_step import TorchStep
from crdt_llm.inference.forward.weights import BF16, INT8, LayerWeights, Shape
from crdt_llm.inference.kv.pool import Chunk, KvPool, RowShape
from crdt_llm.inference.kv.tree import TILE

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

MISSING = native._FEATURES.difference(cpu_features().split())
needs_kernels = pytest.mark.skipif(bool(MISSING), reason=f"this CPU has no {', '.join(MISSING)}")

THREADS = 5

FORMATS = pytest.mark.parametrize("weight_format", [INT8, BF16])


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    """A step has as many threads as it could be asked for when it was made."""
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


# -- building --------------------------------------------------------------------------------------

SMALL = b'#include "seven.hpp"\nextern "C" int answer() { return SEVEN; }\n'


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sources that are built in a moment, with a CPU that has all that is asked for."""
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "step.cpp").write_bytes(SMALL)
    (folder / "seven.hpp").write_bytes(b"#define SEVEN 7\n")
    monkeypatch.setattr(native, "_SOURCES", folder)
    monkeypatch.setattr(native, "cpu_features", lambda: " ".join(sorted(native._FEATURES)))
    return folder


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    return tmp_path / "kernels"


def build(folder: Path | None) -> native.Library:
    """As a process that was just started."""
    return library.__wrapped__(folder)


def refusal(folder: Path | None) -> str:
    with pytest.raises(KernelsUnavailable) as caught:
        build(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert message
    return message


def script(path: Path, text: str) -> str:
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


@pytest.mark.usefixtures("sources")
def test_what_was_built_is_loaded_and_not_built_again(
    kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[list[str]] = []
    really = subprocess.run

    def spy(command: list[str], **options: Any) -> Any:
        ran.append(command[1:])
        return really(command, **options)

    monkeypatch.setattr(subprocess, "run", spy)
    first = build(kept)
    assert first.code.answer() == 7
    assert [command[0] for command in ran] == ["--version", native._FLAGS[0]]
    assert [file.name for file in kept.iterdir()] == [f"{first.build}.so"]
    ran.clear()
    second = build(kept)
    assert second.build == first.build
    assert ran == [["--version"]]


@pytest.mark.usefixtures("sources")
def test_a_process_builds_once(kept: Path) -> None:
    assert library(kept) is library(kept)


@pytest.mark.usefixtures("sources")
def test_what_is_built_belongs_to_its_maker_alone(kept: Path) -> None:
    before = os.umask(0)
    try:
        file = kept / f"{build(kept).build}.so"
    finally:
        os.umask(before)
    assert kept.stat().st_mode & 0o777 == 0o700
    assert file.stat().st_mode & 0o777 == 0o700


@pytest.mark.usefixtures("sources")
def test_two_builds_at_once_end_with_one_file(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both = threading.Barrier(2, timeout=60)
    compiled = native._compile

    def together(*arguments: Any) -> None:
        both.wait()
        compiled(*arguments)

    monkeypatch.setattr(native, "_compile", together)
    with ThreadPoolExecutor(2) as pool:
        libraries = list(pool.map(build, [kept, kept]))
    assert [each.code.answer() for each in libraries] == [7, 7]
    assert [file.name for file in kept.iterdir()] == [f"{libraries[0].build}.so"]


def test_sources_that_are_replaced_during_a_build_are_not_built(
    sources: Path, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = native._run

    def replacing(*arguments: str) -> Any:
        (sources / "seven.hpp").write_bytes(b"#define SEVEN 8\n")
        return run(*arguments)

    monkeypatch.setattr(native, "_run", replacing)
    assert build(kept).code.answer() == 7


def test_the_digest_follows_all_that_decides_about_instructions(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def digest() -> str:
        texts = {file.name: file.read_bytes() for file in sorted(sources.iterdir())}
        return native._build_digest(native._compiler(), texts)

    found = [digest()]
    assert digest() == found[0]
    (sources / "seven.hpp").write_bytes(b"#define SEVEN (7)\n")
    found.append(digest())
    with monkeypatch.context() as other:
        other.setattr(native, "_FLAGS", (*native._FLAGS, "-DOTHER"))
        found.append(digest())
    with monkeypatch.context() as other:
        other.setattr(native, "cpu_features", lambda: "other")
        found.append(digest())
    monkeypatch.setenv("CXX", script(tmp_path / "c++", "#!/bin/sh\necho 'other 1.0'\n"))
    found.append(digest())
    script(tmp_path / "c++", "#!/bin/sh\necho 'other 1.1'\n")
    found.append(digest())
    assert len(set(found)) == len(found)


@pytest.mark.usefixtures("sources")
def test_a_cpu_that_lacks_a_feature_is_named(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    features = sorted(native._FEATURES - {"avx512_vnni"})
    monkeypatch.setattr(native, "cpu_features", lambda: " ".join(features))
    assert refusal(kept) == "this CPU has no avx512_vnni"
    assert not kept.exists()


@pytest.mark.usefixtures("sources")
def test_no_compiler(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    assert refusal(kept) == "there is no C++ compiler (none of g++, clang++, c++ is installed)"


@pytest.mark.usefixtures("sources")
def test_a_named_compiler_that_is_not_there(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no-such-compiler is not installed" in refusal(kept)


@pytest.mark.usefixtures("sources")
def test_a_compiler_that_is_no_program(
    kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", script(tmp_path / "c++", "no program\n"))
    assert "Exec format error" in refusal(kept)


@pytest.mark.usefixtures("sources")
def test_a_compiler_that_builds_nothing(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "true")
    assert refusal(kept).endswith("failed: no reason given")
    assert not list(kept.iterdir())


@pytest.mark.usefixtures("sources")
def test_a_compiler_that_does_not_end(
    kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", script(tmp_path / "c++", "#!/bin/sh\nexec sleep 600\n"))
    monkeypatch.setattr(native, "_BUILD_S_MAX", 0.05)
    assert "did not end" in refusal(kept)


def test_a_build_that_fails_says_its_first_error(sources: Path, kept: Path) -> None:
    (sources / "step.cpp").write_bytes(b"#warning careful\nint a = none;\nint b = nothing;\n")
    message = refusal(kept)
    assert "failed: step.cpp:2:" in message
    assert "none" in message
    assert len(message) < 400
    assert not list(kept.iterdir())


@pytest.mark.usefixtures("sources")
def test_a_folder_that_others_can_write_to_is_refused(kept: Path) -> None:
    kept.mkdir()
    for mode in (0o770, 0o707):
        kept.chmod(mode)
        assert refusal(kept) == f"others can write to {kept}: make it yours, mode 0700"
    assert not list(kept.iterdir())


@pytest.mark.usefixtures("sources")
def test_code_that_others_can_write_to_is_not_loaded(
    kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = kept / f"{build(kept).build}.so"
    file.chmod(0o720)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: pytest.fail(f"{name} was loaded"))
    assert refusal(kept) == f"others can write to {file}: remove it"


@pytest.mark.usefixtures("sources")
def test_code_of_somebody_else_is_not_loaded(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(kept)
    mine = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: mine + 1)
    assert refusal(kept).startswith(f"others can write to {kept}")


@pytest.mark.usefixtures("sources")
def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "cannot be kept or loaded" in refusal(tmp_path / "file" / "kernels")


def test_code_that_is_damaged(sources: Path, kept: Path) -> None:
    kept.mkdir(mode=0o700)
    texts = {file.name: file.read_bytes() for file in sorted(sources.iterdir())}
    file = kept / f"{native._build_digest(native._compiler(), texts)}.so"
    file.write_bytes(b"\x7fELF")
    file.chmod(0o700)
    assert "cannot be kept or loaded" in refusal(kept)


@pytest.mark.usefixtures("sources")
def test_a_user_without_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: Path("~/.cache") / name)
    assert "there is no home" in refusal(None)
    assert not (tmp_path / "~").exists()


# -- what was built before -------------------------------------------------------------------------


def used_before(file: Path, other: Path, seconds: float) -> None:
    """Make the last use of a file so much earlier than another's."""
    at = other.stat().st_mtime - seconds
    os.utime(file, (at, at))


def rebuilt(sources: Path, kept: Path, number: int) -> tuple[native.Library, Path]:
    """Another version of the sources, built."""
    (sources / "seven.hpp").write_bytes(b"#define SEVEN %d\n" % number)
    library = build(kept)
    return library, kept / f"{library.build}.so"


def test_a_build_that_nobody_used_for_long_goes_when_another_one_is_made(
    sources: Path, kept: Path
) -> None:
    old, unused = rebuilt(sources, kept, 1)
    _, used = rebuilt(sources, kept, 2)
    (kept / "notes").touch()
    used_before(unused, used, native._UNUSED_S_MAX + 60)
    used_before(kept / "notes", used, native._UNUSED_S_MAX + 60)  # not ours
    assert rebuilt(sources, kept, 2)[1].exists()
    assert unused.exists()  # nothing was made
    used_before(used, used, native._UNUSED_S_MAX - 60)
    _, made = rebuilt(sources, kept, 3)
    assert set(kept.iterdir()) == {used, made, kept / "notes"}
    assert old.code.answer() == 1  # whoever has it keeps it
    assert rebuilt(sources, kept, 1)[0].code.answer() == 1  # and whoever wants it has it again
    assert unused.exists()


def test_to_load_a_build_is_to_use_it(sources: Path, kept: Path) -> None:
    _, first = rebuilt(sources, kept, 1)
    used_before(first, first, 2 * native._UNUSED_S_MAX)
    rebuilt(sources, kept, 1)
    rebuilt(sources, kept, 2)
    assert first.exists()


def test_a_build_that_goes_while_it_is_loaded_is_made_again(
    sources: Path, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as other:  # another process, for what is loaded stays here
        other.setattr(ctypes, "CDLL", lambda _: None)
        _, file = rebuilt(sources, kept, 1)
    gone: list[Path] = []

    def too_late(path: Path) -> None:
        path.unlink()
        gone.append(path)

    monkeypatch.setattr(os, "utime", too_late)
    assert rebuilt(sources, kept, 1)[0].code.answer() == 1
    assert gone == [file]
    assert file.exists()


def test_a_build_is_loaded_from_a_disk_that_is_only_read(
    sources: Path, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rebuilt(sources, kept, 1)

    def refused(path: Path) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(os, "utime", refused)
    monkeypatch.setattr(native, "_compile", lambda *_: pytest.fail("built again"))
    assert rebuilt(sources, kept, 1)[0].code.answer() == 1


def test_an_old_build_that_cannot_be_removed_stays(
    sources: Path, kept: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, first = rebuilt(sources, kept, 1)
    first.unlink()
    first.mkdir()  # `unlink` fails, whoever asks
    used_before(first, kept, 2 * native._UNUSED_S_MAX)
    with caplog.at_level(logging.INFO):
        assert rebuilt(sources, kept, 2)[0].code.answer() == 2
    assert first.exists()
    assert "old native kernels stay" in caplog.text


# -- the choice ------------------------------------------------------------------------------------


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> str:
    """There are none; the reason."""
    reason = "there is no compiler here"

    def unavailable() -> native.Library:
        raise KernelsUnavailable(reason)

    monkeypatch.setattr(native_step, "library", unavailable)
    return reason


def test_without_kernels_torch_computes_with_one_warning(
    without_kernels: str, tiny_model_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        model = Llama(tiny_model_dir)
    assert isinstance(model._step, TorchStep)
    [record] = caplog.records
    assert without_kernels in record.getMessage()
    assert "\n" not in record.getMessage()


def test_whoever_rules_the_kernels_out_is_not_warned(
    without_kernels: str, tiny_model_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert without_kernels
    with caplog.at_level(logging.WARNING):
        assert isinstance(Llama(tiny_model_dir, native=False)._step, TorchStep)
    assert not caplog.records


def test_kernels_that_are_demanded_but_not_there(
    without_kernels: str, tiny_model_dir: Path
) -> None:
    with pytest.raises(ModelUnusable, match=without_kernels):
        Llama(tiny_model_dir, native=True)


@pytest.mark.parametrize("demanded", [None, True])
def test_bf16_needs_kernels(
    without_kernels: str, tiny_model_dir: Path, *, demanded: bool | None
) -> None:
    with pytest.raises(ModelUnusable, match=without_kernels) as caught:
        Llama(tiny_model_dir, BF16, native=demanded)
    assert "use the weight format int8" in str(caught.value)


def test_bf16_without_kernels_by_choice(tiny_model_dir: Path) -> None:
    with pytest.raises(ModelUnusable, match="not asked for"):
        Llama(tiny_model_dir, BF16, native=False)


@pytest.mark.parametrize("native", [None, True, False])
def test_a_weight_format_that_there_is_not(tiny_model_dir: Path, *, native: bool | None) -> None:
    with pytest.raises(ModelUnusable, match="no weight format int4: use int8 or bf16"):
        Llama(tiny_model_dir, "int4", native=native)


@needs_kernels
def test_kernels_compute_where_they_can(
    tiny_model_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert isinstance(Llama(tiny_model_dir)._step, NativeStep)
    assert not caplog.records


# -- numbers ---------------------------------------------------------------------------------------

SHAPE = Shape(
    layers=2,
    hidden=40,
    intermediate=72,
    heads=4,
    kv_heads=2,
    head_dim=16,
    vocabulary=50,
    positions=600,
    norm_epsilon=1e-5,
    tied_head=False,
)

SHAPES = {
    "head-16": SHAPE,
    "head-48, 8 rows a key": replace(SHAPE, heads=8, kv_heads=1, head_dim=48, hidden=65),
    "head-64, 3 rows a key": replace(SHAPE, heads=9, kv_heads=3, head_dim=64, hidden=100),
    "head-80": replace(SHAPE, heads=2, kv_heads=2, head_dim=80, vocabulary=3),
    "head-96, 5 rows a key": replace(SHAPE, heads=5, kv_heads=1, head_dim=96, intermediate=5),
    "head-128, 7 rows a key": replace(SHAPE, heads=7, kv_heads=1, head_dim=128, vocabulary=321),
    "hidden is the widest": replace(SHAPE, hidden=520, intermediate=17, heads=1, kv_heads=1),
    "whole registers": replace(SHAPE, hidden=64, intermediate=128, vocabulary=64),
    "less than a register": replace(SHAPE, layers=1, hidden=3, intermediate=1, vocabulary=1),
}


@dataclass(frozen=True, slots=True)
class Model:
    """A step and what it was made of."""

    step: NativeStep
    shape: Shape
    weight_format: str
    layers: list[LayerWeights]
    norm: Tensor
    head: Tensor
    cosines: Tensor
    sines: Tensor

    def pool(self, slots: int) -> KvPool:
        """One that holds rubbish, as one in use does."""
        shape = self.shape
        pool = KvPool(slots, RowShape(shape.layers, shape.kv_heads, shape.head_dim, shape.hidden))
        generator = torch.Generator().manual_seed(slots)
        pool.kv.copy_(torch.randn(pool.kv.shape, generator=generator) * 9)
        return pool


def new_model(
    shape: Shape, weight_format: str, *, biases: bool = False, head_norm: bool = False
) -> Model:
    """With weights that leave the spread of a row about as it was."""
    generator = torch.Generator().manual_seed(7)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    def linear(outputs: int, inputs: int) -> tuple[Tensor, Tensor | None]:
        return randn(outputs, inputs) / inputs**0.5, randn(outputs) if biases else None

    heads = shape.heads + shape.kv_heads
    angles = torch.outer(torch.arange(shape.positions), randn(shape.head_dim // 2))
    cosines = torch.cat((angles.cos(), angles.cos()), -1)
    sines = torch.cat((-angles.sin(), angles.sin()), -1)
    step = NativeStep(shape, cosines, sines, weight_format)
    layers = []
    for _ in range(shape.layers):
        vectors = linear((heads + shape.kv_heads) * shape.head_dim, shape.hidden)
        output = linear(shape.hidden, shape.heads * shape.head_dim)
        gate_up = linear(2 * shape.intermediate, shape.hidden)
        down = linear(shape.hidden, shape.intermediate)
        layer = LayerWeights(
            attention_norm=1 + randn(shape.hidden) / 4,
            queries_keys_values=vectors[0],
            queries_keys_values_bias=vectors[1],
            head_norm=1 + randn(heads, shape.head_dim) / 4 if head_norm else None,
            output=output[0],
            output_bias=output[1],
            mlp_norm=1 + randn(shape.hidden) / 4,
            gate_up=gate_up[0],
            gate_up_bias=gate_up[1],
            down=down[0],
            down_bias=down[1],
        )
        step.add_layer(layer)
        layers.append(layer)
    norm, head = 1 + randn(shape.hidden) / 4, randn(shape.vocabulary, shape.hidden)
    step.set_head(norm, head)
    return Model(step, shape, weight_format, layers, norm, head, cosines, sines)


def as_held(matrix: Tensor, weight_format: str) -> Tensor:
    """What of a weight matrix remains, in float64."""
    if weight_format == BF16:
        return matrix.bfloat16().double()
    groups = [
        (group / scale).round().clamp(-127, 127).double() * scale.double()
        for group in torch.split(matrix, 64, -1)
        for scale in [(group.abs().amax(-1, keepdim=True) / 127).bfloat16().float()]
    ]
    return torch.cat(groups, -1)


def reference(model: Model, rows: Tensor) -> Tensor:
    """The logits of every row of a path, by the textbook in float64."""
    shape = model.shape

    def linear(x: Tensor, weights: Tensor, biases: Tensor | None) -> Tensor:
        y = x @ as_held(weights, model.weight_format).T
        return y if biases is None else y + biases.double()

    def normed(x: Tensor, gain: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + shape.norm_epsilon).sqrt() * gain.double()

    count, state = len(rows), rows.double()
    cosines, sines = (table[:count, None].double() for table in (model.cosines, model.sines))
    mask = torch.ones(count, count, dtype=torch.bool).triu(1)
    for layer in model.layers:
        vectors = linear(
            normed(state, layer.attention_norm),
            layer.queries_keys_values,
            layer.queries_keys_values_bias,
        ).view(count, -1, shape.head_dim)
        turning, values = torch.split(vectors, [shape.heads + shape.kv_heads, shape.kv_heads], 1)
        if layer.head_norm is not None:
            turning = normed(turning, layer.head_norm)
        turning = turning * cosines + turning.roll(shape.head_dim // 2, -1) * sines
        queries, keys = torch.split(turning, [shape.heads, shape.kv_heads], 1)
        group = shape.heads // shape.kv_heads
        keys, values = (each.repeat_interleave(group, 1) for each in (keys, values))
        scores = torch.einsum("qhd,khd->hqk", queries, keys) / shape.head_dim**0.5
        shares = scores.masked_fill(mask, -torch.inf).softmax(-1)
        attended = torch.einsum("hqk,khd->qhd", shares, values).flatten(1)
        state = state + linear(attended, layer.output, layer.output_bias)
        both = linear(normed(state, layer.mlp_norm), layer.gate_up, layer.gate_up_bias)
        gates, ups = both.chunk(2, -1)
        gated = gates / (1 + (-gates).exp()) * ups
        state = state + linear(gated, layer.down, layer.down_bias)
    return linear(normed(state, model.norm), model.head, None)


def embeddings(model: Model, count: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, model.shape.hidden, generator=generator)


def run_path(
    model: Model, pool: KvPool, rows: Tensor, slots: Sequence[int], cuts: Sequence[int] = ()
) -> None:
    """Compute a path from its beginning, a tile at a time and cut here and there."""
    ends = sorted({*cuts, *range(TILE, len(rows), TILE), len(rows)} - {0})
    for start, end in zip([0, *ends], ends, strict=False):
        chunk = Chunk(start, end - start, slots[: start // TILE + 1])
        model.step.forward(rows[start:end].clone(), [chunk], pool)


def hidden_of(pool: KvPool, slots: Sequence[int], count: int) -> Tensor:
    return pool.hidden[list(slots)].flatten(0, 1)[:count]


@needs_kernels
@FORMATS
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("extras", [False, True], ids=["plain", "biases and head norms"])
def test_the_numbers_are_those_of_the_textbook(
    shape: Shape, weight_format: str, *, extras: bool
) -> None:
    model = new_model(shape, weight_format, biases=extras, head_norm=extras)
    pool = model.pool(2)
    rows = embeddings(model, 300)
    run_path(model, pool, rows, [1, 0], cuts=(1, 37, 41, 257, 258))
    found = model.step.logits(hidden_of(pool, [1, 0], 300)).double()
    expected = reference(model, rows)
    error = (found - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert error < {INT8: 0.015, BF16: 0.006}[weight_format]


@needs_kernels
def test_products_of_whole_numbers_are_exact() -> None:
    shape = replace(SHAPE, hidden=300, vocabulary=77)
    model = new_model(shape, INT8)
    choice = random.Random(1)
    levels = torch.tensor([[choice.randint(-127, 127) for _ in range(300)] for _ in range(77)])
    levels[:, ::64] = 127
    # Of 8 bits, as bfloat16 has them; the largest of each group of 32 makes a level worth 1 or 2.
    steps = torch.tensor([[choice.randint(-126, 126) for _ in range(300)] for _ in range(9)])
    steps[:, ::32] = 127
    steps[:, 64:96] *= 2
    model.step.set_head(model.norm, levels.float())
    found = model.step.logits(steps.bfloat16()).double()
    assert torch.allclose(found, (steps @ levels.T).double(), rtol=4e-7, atol=1e-3)


@needs_kernels
def test_a_row_of_the_head_keeps_16_bits() -> None:
    model = new_model(replace(SHAPE, hidden=300, vocabulary=77), INT8)
    hidden = embeddings(model, 9).bfloat16()
    hidden[:, ::7] *= 40  # beside which others are small
    weights = as_held(model.head, INT8)
    found = model.step.logits(hidden).double()
    off = hidden.double().abs().amax(-1, keepdim=True) / (2 * 127 * 254)
    assert ((found - hidden.double() @ weights.T).abs() <= off * weights.abs().sum(-1)).all()


@needs_kernels
def test_products_in_bf16_lose_no_more_than_their_sums_round() -> None:
    model = new_model(replace(SHAPE, hidden=1000, vocabulary=77), BF16)
    hidden = embeddings(model, 9).bfloat16()
    weights = model.head.bfloat16().double()
    found = model.step.logits(hidden).double()
    most = hidden.double().abs() @ weights.abs().T
    assert ((found - hidden.double() @ weights.T).abs() <= 2e-6 * most).all()


@needs_kernels
def test_silu_and_its_exponential_are_as_accurate_as_float32() -> None:
    """Each layer adds silu of one number to a component of the state, less what it should be.

    What remains is seen beside a component of known size: only eight bits of it leave the step,
    but they are those of the error.
    """
    numbers = torch.cat(
        [torch.linspace(-90, 90, 61), torch.linspace(-3, 3, 61), torch.tensor([1e-6, -1e-6, 0.0])]
    )
    count = len(numbers)
    shape = replace(SHAPE, layers=count, hidden=count + 1, intermediate=1, heads=1, kv_heads=1)
    tables = torch.zeros(shape.positions, shape.head_dim)
    step = NativeStep(shape, tables, tables, INT8)
    truth = (numbers.double() / (1 + (-numbers.double()).exp())).float()
    whole = 127 / 128  # a weight that int8 holds as it is
    for index, number in enumerate(numbers):
        down, down_bias = torch.zeros(shape.hidden, 1), torch.zeros(shape.hidden)
        down[index], down_bias[index] = whole, -truth[index].double() * whole
        step.add_layer(
            LayerWeights(
                attention_norm=torch.ones(shape.hidden),
                queries_keys_values=torch.zeros(3 * shape.head_dim, shape.hidden),
                queries_keys_values_bias=None,
                head_norm=None,
                output=torch.zeros(shape.hidden, shape.head_dim),
                output_bias=None,
                mlp_norm=torch.ones(shape.hidden),
                gate_up=torch.zeros(2, shape.hidden),
                gate_up_bias=torch.tensor([float(number), 1.0]),
                down=down,
                down_bias=down_bias,
            )
        )
    step.set_head(torch.ones(shape.hidden), torch.zeros(shape.vocabulary, shape.hidden))
    rows = shape.layers, shape.kv_heads, shape.head_dim, shape.hidden
    pool = KvPool(1, RowShape(*rows))
    state = torch.zeros(1, shape.hidden)
    known = state[0, -1] = 2.0**-10
    step.forward(state, [Chunk(0, 1, [0])], pool)
    hidden = pool.hidden[0, 0].double()
    errors = (hidden[:-1] / hidden[-1] * known).abs()
    # What is below the least peak that a group may have is rounded coarsely.
    assert (errors <= 6e-7 * truth.abs() + 1e-32).all()


@needs_kernels
@FORMATS
def test_what_is_no_number_stays_so_and_where_it_is(weight_format: str) -> None:
    model = new_model(SHAPE, weight_format)
    rows = embeddings(model, 2)
    alone = model.pool(2)
    run_path(model, alone, rows[:1], [0])
    pool = model.pool(2)
    rows[1, 3] = torch.nan
    chunks = [Chunk(0, 1, [0]), Chunk(0, 1, [1])]
    model.step.forward(rows.clone(), chunks, pool)
    assert torch.equal(pool.hidden[0, 0], alone.hidden[0, 0])
    assert pool.hidden[1, 0].isnan().all()
    logits = model.step.logits(pool.hidden[:, 0])
    assert logits[0].isfinite().all()
    assert logits[1].isnan().all()
    beside_numbers = pool.hidden[:1, 0].clone()
    beside_numbers[0, 0] = torch.nan
    assert model.step.logits(beside_numbers).isnan().all()


@needs_kernels
@pytest.mark.parametrize(
    ("shape", "weight_format", "reason"),
    [
        (replace(SHAPE, head_dim=24), BF16, "no multiple of 16"),
        (replace(SHAPE, heads=-2, kv_heads=-1), INT8, "a size that is none"),
        (replace(SHAPE, hidden=0), BF16, "a size that is none"),
        (replace(SHAPE, vocabulary=2**31), BF16, "a size that is none"),
    ],
)
def test_a_shape_that_the_kernels_do_not_serve(
    shape: Shape, weight_format: str, reason: str
) -> None:
    tables = torch.zeros(8, SHAPE.head_dim)
    with pytest.raises(KernelsUnavailable, match=reason):
        NativeStep(shape, tables, tables, weight_format)


@needs_kernels
@pytest.mark.parametrize(
    ("rows", "chunk"),
    [
        (1, Chunk(0, 2, [0])),
        (1, Chunk(0, 1, [2])),
        (1, Chunk(0, 1, [-1])),
        (1, Chunk(SHAPE.positions, 1, [0, 1, 0])),
    ],
    ids=["too few rows", "a slot too far", "a slot before the first", "a position too far"],
)
def test_what_would_lie_outside_of_memory_is_refused(rows: int, chunk: Chunk) -> None:
    model = new_model(SHAPE, INT8)
    with pytest.raises(LocalMisuse):
        model.step.forward(torch.zeros(rows, SHAPE.hidden), [chunk], model.pool(2))


# -- company ---------------------------------------------------------------------------------------

PATHS = 3

COMPANIES = st.lists(
    st.tuples(
        st.sets(st.integers(0, PATHS - 1), min_size=1),
        st.lists(st.sampled_from([1, 2, 3, 4, 5, 7, 23, 25, 33, 70, 256]), min_size=3, max_size=3),
        st.integers(1, THREADS),
    ),
    min_size=1,
    max_size=8,
)
"""Steps: of which paths, how many rows of each at most, on how many threads."""


@needs_kernels
@FORMATS
@settings(max_examples=30)
@given(
    steps=COMPANIES,
    lengths=st.lists(st.integers(1, 590), min_size=PATHS, max_size=PATHS),
    starts=st.lists(st.integers(0, 589), min_size=PATHS, max_size=PATHS),
    head=st.sampled_from([16, 48, 64, 80, 128]),
    group=st.integers(1, 8),
    extras=st.booleans(),
)
def test_no_company_cut_or_thread_leaves_a_trace(
    *,
    weight_format: str,
    steps: list[tuple[set[int], list[int], int]],
    lengths: list[int],
    starts: list[int],
    head: int,
    group: int,
    extras: bool,
) -> None:
    shape = replace(SHAPE, layers=3, heads=2 * group, head_dim=head)
    torch.set_num_threads(THREADS)
    model = new_model(shape, weight_format, biases=extras, head_norm=extras)
    paths = [embeddings(model, length, seed) for seed, length in enumerate(lengths)]
    tiles = [list(range(path, 3 * PATHS, PATHS)) for path in range(PATHS)]
    torch.set_num_threads(1)
    alone, pool = model.pool(3 * PATHS), model.pool(3 * PATHS)
    done = [min(each) for each in zip(starts, lengths, strict=True)]
    for path, slots in enumerate(tiles):
        run_path(model, alone, paths[path], slots)
        run_path(model, pool, paths[path][: done[path]], slots)
    turn = 0
    while done != lengths:
        chosen, most, threads = steps[turn % len(steps)]
        left = [path for path in range(PATHS) if done[path] < lengths[path]]
        chunks, parts = [], []
        for path in sorted(chosen.intersection(left)) or left[:1]:
            start = done[path]
            room = min(lengths[path] - start, TILE - start % TILE)
            rows = min(room, most[path] if turn < 40 else TILE)
            chunks.append(Chunk(start, rows, tiles[path][: start // TILE + 1]))
            parts.append(paths[path][start : start + rows])
            done[path] += rows
        torch.set_num_threads(threads)
        model.step.forward(torch.cat(parts), chunks, pool)
        turn += 1
    assert torch.equal(pool.kv, alone.kv)
    assert torch.equal(pool.hidden, alone.hidden)
    together = torch.cat([hidden_of(pool, *each) for each in zip(tiles, lengths, strict=True)])
    every = range(0, len(together), 37)
    logits = model.step.logits(together)
    torch.set_num_threads(1)
    for row in every:
        assert torch.equal(model.step.logits(together[row : row + 1])[0], logits[row])


@needs_kernels
@FORMATS
@pytest.mark.parametrize("start", [TILE - 1, TILE - 30, TILE - 64])
def test_a_chunk_may_go_on_where_another_one_fills_its_tile(weight_format: str, start: int) -> None:
    model = new_model(SHAPES["head-64, 3 rows a key"], weight_format)
    rows = embeddings(model, start + 80)
    one, other = model.pool(2), model.pool(2)
    run_path(model, one, rows, [1, 0], cuts=(start,))
    run_path(model, other, rows[:start], [1, 0])
    chunks = [Chunk(start, TILE - start, [1]), Chunk(TILE, len(rows) - TILE, [1, 0])]
    model.step.forward(rows[start:].clone(), chunks, other)
    assert torch.equal(hidden_of(one, [1, 0], len(rows)), hidden_of(other, [1, 0], len(rows)))


@needs_kernels
def test_calls_on_more_and_fewer_threads_in_quick_succession() -> None:
    model = new_model(SHAPE, INT8)
    rows = embeddings(model, 3)
    pool = model.pool(1)
    run_path(model, pool, rows, [0])
    expected = pool.hidden[0, :3].clone()
    choice = random.Random(1)
    for _ in range(150):
        torch.set_num_threads(choice.randint(1, THREADS + 3))
        pool.hidden[0, :3] = 0
        run_path(model, pool, rows, [0], cuts=(choice.randint(1, 2),))
        assert torch.equal(pool.hidden[0, :3], expected)


@needs_kernels
def test_two_threads_that_call_one_step_wait_for_each_other() -> None:
    model = new_model(SHAPE, INT8)
    rows = [embeddings(model, 70, seed) for seed in range(2)]
    expected = []
    for path in rows:
        pool = model.pool(1)
        run_path(model, pool, path, [0])
        expected.append(pool.kv.clone())
    start = threading.Barrier(2, timeout=60)

    def caller(path: int) -> None:
        start.wait()
        for _ in range(20):
            pool = model.pool(1)
            run_path(model, pool, rows[path], [0], cuts=(1, 2, 30))
            assert torch.equal(pool.kv, expected[path])

    with ThreadPoolExecutor(2) as callers:
        list(callers.map(caller, [0, 1]))


@needs_kernels
def test_how_the_calling_thread_rounds_leaves_no_trace() -> None:
    model = new_model(replace(SHAPE, layers=1), INT8)
    rows = torch.full((1, SHAPE.hidden), 1e-40)
    for name in ("output", "down"):
        getattr(model.layers[0], name).zero_()
    model.step.add_layer(model.layers[0])
    quiet = NativeStep(model.shape, model.cosines, model.sines, INT8)
    quiet.add_layer(model.layers[0])
    quiet.set_head(torch.ones(SHAPE.hidden), model.head)
    quietly = replace(model, step=quiet)
    pools = [model.pool(1), model.pool(1)]
    run_path(quietly, pools[0], rows, [0])
    assert pools[0].hidden[0, 0].float().view(torch.int32).all()  # smaller than 1e-37, but not zero
    state = rows.clone()
    assert torch.set_flush_denormal(True)
    try:
        quiet.forward(state, [Chunk(0, 1, [0])], pools[1])
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(pools[0].hidden.view(torch.int16), pools[1].hidden.view(torch.int16))


# -- memory, and the end ---------------------------------------------------------------------------


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@needs_kernels
def test_a_model_that_nobody_has_is_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(2)
    freed: list[int | None] = []
    free = native_step._free

    def counting(code: ctypes.CDLL, model: ctypes.c_void_p, process: int) -> None:
        free(code, model, process)
        freed.append(model.value)

    monkeypatch.setattr(native_step, "_free", counting)
    shape = replace(SHAPE, layers=1, hidden=512, intermediate=512)
    layer = new_model(shape, BF16).layers[0]
    tables = torch.zeros(shape.positions, shape.head_dim)
    model_bytes = 2 * 512 * 3 * 512
    freed.clear()
    before = 0
    for turn in range(200):
        if turn == 20:  # what is allocated once is
            before = resident_bytes()
        NativeStep(shape, tables, tables, BF16).add_layer(layer)
        if turn % 50 == 0:
            gc.collect()
    assert len(freed) == 200
    assert resident_bytes() - before < 20 * model_bytes


@needs_kernels
@FORMATS
def test_steps_that_grow_and_shrink_take_no_more_memory(weight_format: str) -> None:
    torch.set_num_threads(2)
    model = new_model(replace(SHAPE, hidden=256, intermediate=512, heads=16), weight_format)
    pool = model.pool(3)
    rows = embeddings(model, TILE)

    def steps() -> None:
        for count in (1, 200, 3, TILE, 2, 64, 1):
            model.step.forward(rows[:count].clone(), [Chunk(0, count, [0])], pool)
            model.step.forward(rows[:count].clone(), [Chunk(TILE, count, [0, 1])], pool)
            model.step.logits(pool.hidden[0, :count])

    for _ in range(3):
        steps()
    before = resident_bytes()
    for _ in range(12):
        steps()
    assert resident_bytes() - before < 2**22


@needs_kernels
def test_a_fork_computes_alone_and_ends() -> None:
    """It has none of the threads of the process that it came from."""
    model = new_model(SHAPE, INT8)
    rows = embeddings(model, 1)
    pool = model.pool(1)
    run_path(model, pool, rows, [0])
    expected = pool.hidden[0, 0].clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons warn of any fork
        child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(60)  # who waits for a thread that is not there is ended
        run_path(model, pool, rows, [0])
        same = torch.equal(pool.hidden[0, 0], expected)
        del model
        os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
