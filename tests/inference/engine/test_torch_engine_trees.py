"""Whatever happens to a tree of paths, its KV is that of one fresh prefill, bit for bit."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from engine_runs import KV_BYTES, Run, digest, fresh, ids_in, reply, text_of, warm
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from crdt_llm.inference.contract import Prefilled, Queued, SamplingParams
from crdt_llm.inference.engine.torch_engine import TorchEngine
from crdt_llm.inference.forward.llama import Llama
from crdt_llm.inference.kv.checkpoint import Checkpoints
from crdt_llm.inference.kv.tree import TILE, common_prefix

if TYPE_CHECKING:
    from collections.abc import Iterator

    from crdt_llm.inference.contract import KvDigest
    from crdt_llm.inference.engine.torch_engine import Event

TEXT = text_of(1, 700)
PARAMS = SamplingParams(8, 0.8, seed=3, ignore_eos=True)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def engine(tiny_model_dir: Path) -> TorchEngine:
    return TorchEngine(Llama(tiny_model_dir), KV_BYTES)


def on_disk(engine: TorchEngine, folder: Path, slots: int = 64) -> TorchEngine:
    """An engine over a folder of checkpoints, as after a restart."""
    checkpoints = Checkpoints(folder, engine.capabilities.fingerprint)
    made = fresh(engine, slots * engine._model.slot_bytes, checkpoints)
    made._clock = lambda: 0.0  # reading is never slower, though a tiny model computes in no time
    return made


def save_all(engine: TorchEngine) -> None:
    while engine.save_one():
        pass


# -- restoring -------------------------------------------------------------------------------------


def test_a_restarted_engine_computes_nothing_again(engine: TorchEngine, tmp_path: Path) -> None:
    first = on_disk(engine, tmp_path)
    path = TEXT[:600] + ids_in(reply(first, TEXT[:600], PARAMS))
    save_all(first)
    second = on_disk(engine, tmp_path)
    assert warm(second, path) == Prefilled(608, reused=608, prefilled=0)
    assert digest(second, path) == digest(fresh(engine), path)
    assert reply(second, TEXT[:600], PARAMS)[1:] == reply(first, TEXT[:600], PARAMS)[1:]


def test_a_fork_restores_what_it_shares(engine: TorchEngine, tmp_path: Path) -> None:
    first = on_disk(engine, tmp_path)
    reply(first, TEXT[:600], PARAMS)
    save_all(first)
    fork = TEXT[:300] + text_of(2, 50)
    second = on_disk(engine, tmp_path)
    assert warm(second, fork) == Prefilled(350, reused=300, prefilled=50)
    assert digest(second, fork) == digest(fresh(engine), fork)


def test_what_was_evicted_comes_back_from_disk(engine: TorchEngine, tmp_path: Path) -> None:
    small = on_disk(engine, tmp_path, slots=4)
    reply(small, TEXT[:600], PARAMS)
    for seed in range(2, 6):
        reply(small, text_of(seed, 500), PARAMS)
    done = reply(small, TEXT[:600], PARAMS)[0]
    assert done == Prefilled(600, reused=600, prefilled=0)
    assert digest(small, TEXT[:600]) == digest(fresh(engine), TEXT[:600])


def test_what_no_reply_was_made_from_is_never_written(engine: TorchEngine, tmp_path: Path) -> None:
    first = on_disk(engine, tmp_path, slots=4)
    reply(first, TEXT[:300], PARAMS)
    draft = TEXT[:300] + text_of(2, 150)
    warm(first, draft)
    for seed in range(3, 6):
        warm(first, text_of(seed, 500))  # evicts
    save_all(first)
    second = on_disk(engine, tmp_path)
    assert warm(second, draft) == Prefilled(450, reused=300, prefilled=150)
    for seed in range(3, 6):
        assert warm(second, text_of(seed, 500)).reused == 0


def test_a_damaged_file_is_computed_again(
    engine: TorchEngine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = on_disk(engine, tmp_path)
    reply(first, TEXT[:700], PARAMS)
    save_all(first)
    second = on_disk(engine, tmp_path)
    for file in tmp_path.iterdir():
        content = bytearray(file.read_bytes())
        content[-1] ^= 4
        file.write_bytes(content)
    assert warm(second, TEXT[:700]).prefilled == 700
    assert len(caplog.records) == 1
    assert digest(second, TEXT[:700]) == digest(fresh(engine), TEXT[:700])


def test_reading_gives_way_where_computing_is_faster(engine: TorchEngine, tmp_path: Path) -> None:
    first = on_disk(engine, tmp_path)
    reply(first, TEXT[:600], PARAMS)
    save_all(first)
    second = on_disk(engine, tmp_path)
    second._row_pace.note(0.001)
    second._load_pace.note(0.3)  # as long as 300 rows: more than a tile has
    assert warm(second, TEXT[:600]).prefilled == 600
    second._load_pace.seconds = 0.2
    third = on_disk(engine, tmp_path)
    third._row_pace.note(0.001)
    third._load_pace.note(0.0001)
    assert warm(third, TEXT[:600]).prefilled == 0


def test_forgetting_reaches_the_disk(engine: TorchEngine, tmp_path: Path) -> None:
    first = on_disk(engine, tmp_path)
    reply(first, TEXT[:600], PARAMS)
    save_all(first)
    first.forget(TEXT[:300], 280)
    second = on_disk(engine, tmp_path)
    assert warm(second, TEXT[:600]).reused == TILE
    assert warm(first, TEXT[:600]).reused == 280


def test_the_load_says_what_kv_takes(engine: TorchEngine, tmp_path: Path) -> None:
    loaded = on_disk(engine, tmp_path, slots=8)
    assert loaded.load.kv_bytes == loaded.load.disk_bytes == 0
    reply(loaded, TEXT[:300], PARAMS)
    save_all(loaded)
    assert loaded.load.resident_tokens == 308
    assert loaded.load.kv_bytes == 2 * engine._model.slot_bytes
    assert loaded.load.disk_bytes == sum(file.stat().st_size for file in tmp_path.iterdir())


# -- trees -----------------------------------------------------------------------------------------


def shared(left: list[int], right: list[int]) -> tuple[int, bool]:
    """How many ids two paths share, and whether one of them begins with the other."""
    many = common_prefix(np.array(left, np.uint32), np.array(right, np.uint32))
    return many, many == min(len(left), len(right))


PATH_MAX = 640
SLOTS = 6


class Trees(RuleBasedStateMachine):
    """Appends, forks, drafts, batch mates, evictions, restarts, damage and forgetting."""

    engine: TorchEngine
    expected: dict[bytes, tuple[KvDigest, list[Event]]]

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.paths: list[list[int]] = [TEXT[:250]]
        self.seen = [*self.paths]
        self.subject = on_disk(self.engine, Path(self.folder.name), SLOTS)

    def teardown(self) -> None:
        self.folder.cleanup()

    def alone(self, path: list[int]) -> tuple[KvDigest, list[Event]]:
        """The digest of a path and the reply to it, from an engine that never saw another."""
        key = torch.tensor(path, dtype=torch.int32).numpy().tobytes()
        if key not in self.expected:
            anew = fresh(self.engine)
            found = digest(anew, path)
            self.expected[key] = (found, reply(anew, path, PARAMS)[1:])
        return self.expected[key]

    @initialize()
    def first_reply(self) -> None:
        self.run_together([0], [])

    @rule(
        base=st.integers(0, 99),
        share=st.floats(0, 1),
        seed=st.integers(2, 4),
        rows=st.sampled_from([1, 5, 70, 256]),
    )
    def write(self, base: int, share: float, seed: int, rows: int) -> None:
        """A path goes on, or forks."""
        path = self.paths[base % len(self.paths)]
        cut = len(path) if share > 0.5 else max(1, int(2 * share * len(path)))
        self.paths.append((path[:cut] + text_of(seed, rows))[:PATH_MAX])
        self.seen.append(self.paths[-1])

    @rule(
        replies=st.lists(st.integers(0, 99), min_size=1, max_size=4),
        drafts=st.lists(st.tuples(st.integers(0, 99), st.integers(0, 6)), max_size=2),
    )
    def run_together(self, replies: list[int], drafts: list[tuple[int, int]]) -> None:
        """Replies side by side, and drafts that are cancelled after some steps."""
        run = Run(self.subject)
        asked = {number: self.paths[at % len(self.paths)] for number, at in enumerate(replies)}
        for number, path in asked.items():
            self.subject.generate(number, path, PARAMS, len(path))
        for number, (at, _) in enumerate(drafts, 100):
            self.subject.warm(
                number, (self.paths[at % len(self.paths)] + text_of(9, 60))[:PATH_MAX]
            )
        steps = 0
        while self.subject.busy:
            for number, (_, patience) in enumerate(drafts, 100):
                if steps == patience:
                    self.subject.cancel(number)
            run.step()
            steps += 1
        for number, path in asked.items():
            got = [one for one in run.events[number] if not isinstance(one, Queued | Prefilled)]
            assert got == self.alone(path)[1]
            self.seen.append(path + ids_in(got))
            self.paths.append(self.seen[-1][:PATH_MAX])

    @rule(at=st.integers(0, 99))
    def check(self, at: int) -> None:
        path = self.paths[at % len(self.paths)]
        assert digest(self.subject, path) == self.alone(path)[0]

    @rule(at=st.integers(0, 99), share=st.floats(0, 0.99))
    def forget(self, at: int, share: float) -> None:
        path = self.paths[at % len(self.paths)]
        keep = int(share * len(path))
        self.subject.forget(path, keep)
        # What is left behind it, another text is built on.
        others = [shared(path, other) for other in self.seen]
        left = max((many for many, agrees in others if not agrees), default=0)
        assert warm(self.subject, path).reused <= max(keep, left)
        self.subject.forget(path, keep)

    @rule(saved=st.booleans())
    def restart(self, *, saved: bool) -> None:
        if saved:
            save_all(self.subject)
        self.subject = on_disk(self.engine, Path(self.folder.name), SLOTS)

    @rule(which=st.integers(0, 99), at=st.floats(0, 0.999))
    def damage(self, which: int, at: float) -> None:
        save_all(self.subject)
        files = sorted(Path(self.folder.name).iterdir())
        if files:
            file = files[which % len(files)]
            content = bytearray(file.read_bytes())
            content[int(at * len(content))] ^= 16
            file.write_bytes(content)


def test_no_history_leaves_a_trace(engine: TorchEngine) -> None:
    from hypothesis.stateful import run_state_machine_as_test  # noqa: PLC0415 - for this test alone

    machine = type("TreesOfOneModel", (Trees,), {"engine": engine, "expected": {}})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=12,
            stateful_step_count=12,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
