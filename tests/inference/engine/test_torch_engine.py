"""Exactness level 2 and the life of a request, on the engine's synchronous core."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from engine_runs import (
    KV_BYTES,
    Run,
    digest,
    fresh,
    ids_in,
    reply,
    text_of,
    warm,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_model import HEAD_DIM, POSITIONS

from crdt_llm.errors import (
    EngineBusy,
    LocalMisuse,
    ModelUnusable,
    PromptTooLong,
)
from crdt_llm.inference.contract import (
    BIT_EXACT,
    Finished,
    Prefilled,
    Queued,
    Sampled,
    SamplingParams,
)
from crdt_llm.inference.engine import schedule
from crdt_llm.inference.engine.schedule import CHUNK_ROWS_MAX, REPLIES_MAX
from crdt_llm.inference.engine.torch_engine import REQUESTS_MAX, TorchEngine
from crdt_llm.inference.forward.llama import Llama, fingerprint, read_config, read_rope, read_shape
from crdt_llm.inference.forward.native_step import NativeStep
from crdt_llm.inference.forward.weights import BF16, INT8
from crdt_llm.inference.kv.tree import TILE

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from crdt_llm.inference.contract import KvDigest


END = 317  # <|im_end|> of the tiny tokenizer


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The suite runs in parallel processes; threads inside of them would wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


STEPS = {"native": (INT8, True), "native-bf16": (BF16, True), "torch": (INT8, False)}
"""Every arithmetic that there is."""


@pytest.fixture(scope="module", params=STEPS)
def engine(request: pytest.FixtureRequest, tiny_model_dir: Path) -> TorchEngine:
    weight_format, native = STEPS[request.param]
    return TorchEngine(Llama(tiny_model_dir, weight_format, native=native), KV_BYTES)


def with_slots(engine: TorchEngine, slots: int) -> TorchEngine:
    """An engine whose KV memory holds so many tiles and a half of the model of ``engine``."""
    slot_bytes = KV_BYTES // engine._pool.count
    return TorchEngine(engine._model, slots * slot_bytes + slot_bytes // 2)


@pytest.fixture
def empty(engine: TorchEngine) -> TorchEngine:
    return fresh(engine)


# -- exactness -------------------------------------------------------------------------------------

TEXT = text_of(1, 700)


@pytest.fixture(scope="module")
def whole(engine: TorchEngine) -> dict[int, KvDigest]:
    """The digests of one uncut prefill (chunks of the usual size) of an otherwise empty engine."""
    return {
        length: digest(fresh(engine), TEXT[:length])
        for length in (1, 2, 3, 63, 64, 65, 255, 256, 257, 300, 511, 512, 600, 700)
    }


@pytest.mark.parametrize("rows", [1, 3, 4, 16, 61, 64, 200, 256])
def test_the_size_of_a_chunk_leaves_no_trace(
    empty: TorchEngine,
    whole: dict[int, KvDigest],
    rows: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(schedule, "CHUNK_ROWS_MAX", rows)
    assert digest(empty, TEXT[:600]) == whole[600]
    assert digest(empty, TEXT[:300]) == whole[300]


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(cuts=st.lists(st.integers(1, 699), max_size=12))
def test_no_way_of_cutting_a_text_leaves_a_trace(
    engine: TorchEngine, whole: dict[int, KvDigest], cuts: list[int]
) -> None:
    cut = fresh(engine)
    for length in sorted(cuts):
        warm(cut, TEXT[:length])
    for length, expected in whole.items():
        assert digest(cut, TEXT[:length]) == expected


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    forks=st.lists(
        st.tuples(st.integers(1, 650), st.integers(2, 9), st.integers(1, 80)),
        min_size=1,
        max_size=8,
    ),
    forgotten=st.integers(0, 600),
)
def test_forks_and_forgetting_leave_no_trace(
    engine: TorchEngine,
    whole: dict[int, KvDigest],
    forks: list[tuple[int, int, int]],
    forgotten: int,
) -> None:
    forked = fresh(engine)
    for at, seed, length in forks:
        warm(forked, TEXT[:at] + text_of(seed, length))
    forked.forget(TEXT[: forgotten + 1], forgotten)
    for at, seed, length in forks:
        path = TEXT[:at] + text_of(seed, length)
        assert digest(forked, path) == digest(fresh(engine), path)
    for length, expected in whole.items():
        assert digest(forked, TEXT[:length]) == expected


@pytest.mark.parametrize("threads", [2, 3, 5])
def test_the_number_of_threads_leaves_no_trace(
    empty: TorchEngine, whole: dict[int, KvDigest], threads: int
) -> None:
    torch.set_num_threads(threads)
    try:
        assert digest(empty, TEXT[:300]) == whole[300]
        params = SamplingParams(max_tokens=12, temperature=0.7, seed=4, ignore_eos=True)
        threaded = reply(empty, TEXT[:300], params)
    finally:
        torch.set_num_threads(1)
    assert threaded[1:] == reply(empty, TEXT[:300], params)[1:]


def test_evicted_kv_comes_back_the_same(engine: TorchEngine, whole: dict[int, KvDigest]) -> None:
    small = with_slots(engine, 4)
    assert digest(small, TEXT[:700]) == whole[700]
    for seed in range(2, 8):
        warm(small, text_of(seed, 400))
    assert digest(small, TEXT[:700]) == whole[700]


def test_decoding_and_prefilling_give_the_same_kv_and_logits(empty: TorchEngine) -> None:
    params = SamplingParams(max_tokens=90, temperature=0.9, seed=5, ignore_eos=True)
    sampled = ids_in(reply(empty, TEXT[:230], params))
    path = TEXT[:230] + sampled
    assert digest(empty, path) == digest(fresh(empty), path)


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.5])
@pytest.mark.parametrize("cut", [1, 7, 39])
def test_a_reply_that_is_resumed_goes_on_as_if_nothing_had_happened(
    empty: TorchEngine, temperature: float, cut: int
) -> None:
    params = SamplingParams(max_tokens=40, temperature=temperature, seed=11, ignore_eos=True)
    uncut = reply(empty, TEXT[:100], params)
    sampled = ids_in(uncut)
    resumed = reply(fresh(empty), TEXT[:100] + sampled[:cut], params, start=100)
    assert resumed[1:] == uncut[1 + cut :]


def test_neighbours_leave_no_trace(empty: TorchEngine) -> None:
    asks = [
        (TEXT[:90], SamplingParams(30, 0.7, seed=1, ignore_eos=True)),
        (TEXT[:90], SamplingParams(30, 0.7, seed=2, ignore_eos=True)),
        (text_of(3, 280), SamplingParams(30, 0.0, ignore_eos=True)),
        (TEXT[:40] + text_of(4, 10), SamplingParams(25, 1.2, seed=4, ignore_eos=True)),
    ]
    alone = [reply(fresh(empty), ids, params)[1:] for ids, params in asks]
    run = Run(empty)
    for number, (ids, params) in enumerate(asks):
        empty.generate(number, ids, params, len(ids))
    empty.warm(99, text_of(5, 300))
    run.finish()
    assert [run.events[number][1:] for number in range(len(asks))] == alone


def test_a_cancelled_neighbour_leaves_no_trace(empty: TorchEngine) -> None:
    params = SamplingParams(20, 0.7, seed=1, ignore_eos=True)
    alone = reply(fresh(empty), TEXT[:90], params)[1:]
    run = Run(empty)
    empty.generate(1, TEXT[:90], params, 90)
    empty.generate(2, TEXT[:60] + text_of(6, 500), params, 560)
    for _ in range(5):
        run.step()
    empty.cancel(2)
    run.finish()
    assert run.events[1][1:] == alone
    assert 2 not in run.events


@pytest.mark.parametrize("heads", [(4, 1, 64), (1, 1, 16), (2, 2, 32), (8, 2, 8)])
def test_other_shapes_of_heads_are_exact_too(
    tiny_model_dir: Path, tmp_path: Path, heads: tuple[int, int, int]
) -> None:
    folder = reshaped_model(tiny_model_dir, tmp_path / "model", heads)
    other = TorchEngine(Llama(folder), KV_BYTES)
    expected = digest(other, TEXT[:300])
    for threads in (1, 3):  # with three the matrix library splits what one head asks for
        torch.set_num_threads(threads)
        try:
            stepwise = fresh(other)
            for length in (1, 2, 9, 40, 41, 255, 256, 299):
                warm(stepwise, TEXT[:length])
            assert digest(stepwise, TEXT[:300]) == expected
        finally:
            torch.set_num_threads(1)


# -- what is computed ------------------------------------------------------------------------------


def test_an_appended_turn_prefills_what_is_new_and_nothing_else(empty: TorchEngine) -> None:
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    first = reply(empty, TEXT[:100], params)
    assert first[0] == Prefilled(prompt=100, reused=0, prefilled=100)
    path = TEXT[:100] + ids_in(first) + [1, 2, 3]
    assert reply(empty, path, params)[0] == Prefilled(prompt=123, reused=120, prefilled=3)


def test_regenerating_and_forking_prefill_no_earlier_token(empty: TorchEngine) -> None:
    params = SamplingParams(max_tokens=20, temperature=0.7, seed=1, ignore_eos=True)
    first = reply(empty, TEXT[:300], params)
    other = SamplingParams(max_tokens=20, temperature=0.7, seed=2, ignore_eos=True)
    second = reply(empty, TEXT[:300], other)
    assert second[0] == Prefilled(prompt=300, reused=300, prefilled=0)
    assert ids_in(first) != ids_in(second)
    assert reply(empty, TEXT[:300], params)[1:] == first[1:]
    for at in (1, 2, 150, 256, 257, 299):
        fork = [*TEXT[:at], 300, 301]
        assert warm(empty, fork) == Prefilled(prompt=at + 2, reused=at, prefilled=2)
    for at in (1, 150, 256, 299):
        assert reply(empty, TEXT[:at], params)[0] == Prefilled(at, reused=at, prefilled=0)


def test_a_warmed_prompt_is_not_computed_again(empty: TorchEngine) -> None:
    assert warm(empty, TEXT[:200]) == Prefilled(200, 0, 200)
    events = reply(empty, TEXT[:210], SamplingParams(1))
    assert events[0] == Prefilled(210, 200, 10)


def test_a_cancelled_prefill_keeps_what_it_computed(empty: TorchEngine) -> None:
    run = Run(empty)
    empty.warm(1, TEXT[:600])
    run.step()
    run.step()
    empty.cancel(1)
    assert not empty.busy
    assert run.events == {}
    assert warm(empty, TEXT[:600]) == Prefilled(600, 2 * CHUNK_ROWS_MAX, 600 - 2 * CHUNK_ROWS_MAX)


def test_two_requests_with_one_prompt_compute_it_once(empty: TorchEngine) -> None:
    run = Run(empty)
    empty.warm(1, TEXT[:600])
    empty.warm(2, TEXT[:600])
    run.finish()
    computed = [event.prefilled for (event,) in run.events.values() if isinstance(event, Prefilled)]
    assert sum(computed) == 600


def test_forgotten_kv_is_computed_anew(empty: TorchEngine) -> None:
    warm(empty, TEXT[:300])
    empty.forget(TEXT[:120], 100)
    assert warm(empty, TEXT[:300]) == Prefilled(300, 100, 200)


# -- the life of a request -------------------------------------------------------------------------


def test_events_come_in_order_and_logprobs_are_of_probabilities(empty: TorchEngine) -> None:
    events = reply(empty, TEXT[:50], SamplingParams(12, 0.7, seed=3, ignore_eos=True))
    assert isinstance(events[0], Prefilled)
    assert all(isinstance(event, Sampled) and event.logprob <= 0 for event in events[1:-1])
    assert events[-1] == Finished("length")
    assert len(events) == 14


def test_an_end_id_ends_the_reply_and_is_part_of_it(empty: TorchEngine) -> None:
    sampled = ids_in(reply(empty, TEXT[:50], SamplingParams(12, ignore_eos=True)))
    end = sampled[5]
    first = sampled.index(end)
    ended = reply(empty, TEXT[:50], SamplingParams(12, end_ids=frozenset({end})))
    assert ids_in(ended) == sampled[: first + 1]
    assert ended[-1] == Finished("end")
    ignored = SamplingParams(12, end_ids=frozenset({end}), ignore_eos=True)
    assert ids_in(reply(empty, TEXT[:50], ignored)) == sampled


def test_an_end_id_that_ends_the_prompt_ends_no_reply(empty: TorchEngine) -> None:
    params = SamplingParams(3, end_ids=frozenset({END}))
    assert len(ids_in(reply(empty, [*TEXT[:50], END], params))) >= 1


def test_a_reply_that_had_ended_is_finished_at_once(empty: TorchEngine) -> None:
    long_enough = SamplingParams(5, ignore_eos=True)
    assert reply(empty, TEXT[:55], long_enough, start=50)[1:] == [Finished("length")]
    at_end = SamplingParams(9, end_ids=frozenset({END}))
    assert reply(empty, [*TEXT[:50], END], at_end, start=50)[1:] == [Finished("end")]


def test_a_reply_stops_at_the_last_position(empty: TorchEngine) -> None:
    prompt = text_of(8, POSITIONS - 3)
    events = reply(empty, prompt, SamplingParams(10, ignore_eos=True))
    assert len(ids_in(events)) == 3
    assert events[-1] == Finished("positions")
    full = reply(empty, prompt + ids_in(events), SamplingParams(10, ignore_eos=True))
    assert full[1:] == [Finished("positions")]


def test_a_path_above_the_positions_is_too_long(empty: TorchEngine) -> None:
    with pytest.raises(PromptTooLong):
        empty.warm(1, text_of(8, POSITIONS + 1))
    assert not empty.busy


@pytest.mark.parametrize("ids", [[], [320], [-1], [5, 100000]])
def test_ids_outside_of_the_vocabulary_are_refused(empty: TorchEngine, ids: list[int]) -> None:
    with pytest.raises(LocalMisuse):
        empty.warm(1, ids)
    assert not empty.busy


@pytest.mark.parametrize("start", [0, 4, -1])
def test_start_must_lie_in_the_ids(empty: TorchEngine, start: int) -> None:
    with pytest.raises(LocalMisuse):
        empty.generate(1, [1, 2, 3], SamplingParams(1), start)
    assert not empty.busy


def test_a_number_names_one_running_request(empty: TorchEngine) -> None:
    empty.warm(1, [1])
    with pytest.raises(LocalMisuse):
        empty.warm(1, [2])


def test_requests_are_limited(empty: TorchEngine) -> None:
    for number in range(REQUESTS_MAX):
        empty.warm(number, [1, 2, number])
    with pytest.raises(EngineBusy):
        empty.warm(REQUESTS_MAX, [1])
    Run(empty).finish()
    empty.warm(REQUESTS_MAX, [1])


def test_cancelling_what_has_ended_is_no_error(empty: TorchEngine) -> None:
    warm(empty, [1, 2])
    empty.cancel(0)
    empty.cancel(12345)


def test_replies_run_side_by_side_and_warming_waits_for_them(empty: TorchEngine) -> None:
    run = Run(empty)
    empty.warm(1, TEXT[:64])
    empty.generate(2, text_of(2, 10), SamplingParams(4, ignore_eos=True), 10)
    empty.generate(3, text_of(3, 10), SamplingParams(4, ignore_eos=True), 10)
    steps: list[list[int]] = []
    while empty.busy:
        steps.append([])
        run.engine.step(lambda request, event: steps[-1].append(request))  # noqa: ARG005 - who is enough
    assert [2, 3] in steps
    assert steps[-1] == [1]
    assert not any(1 in step for step in steps[:-1])


def test_a_core_is_left_to_whoever_passes_a_first_token_on(empty: TorchEngine) -> None:
    empty.generate(1, TEXT[:70], SamplingParams(6, ignore_eos=True), 70)
    passing_on = []
    while empty.busy:
        passing_on.append(empty.is_passing_on)
        empty.step(lambda *_: None)
    # The prompt's step, two behind the first token, and the rest.
    assert passing_on[:4] == [False, True, True, False]
    assert not any(passing_on[4:])


def test_no_core_is_left_to_others_while_somebody_waits_for_a_prompt(empty: TorchEngine) -> None:
    empty.generate(1, TEXT[:70], SamplingParams(6, ignore_eos=True), 70)
    empty.step(lambda *_: None)
    passing_on = [empty.is_passing_on]
    empty.generate(2, text_of(2, 200), SamplingParams(6, ignore_eos=True), 200)
    passing_on.append(empty.is_passing_on)  # it has not been admitted yet
    empty.step(lambda *_: None)
    passing_on.append(empty.is_passing_on)
    assert passing_on == [True, False, False]


def test_a_long_prompt_stalls_no_stream(empty: TorchEngine) -> None:
    run = Run(empty)
    empty.generate(1, text_of(2, 10), SamplingParams(40, ignore_eos=True), 10)
    run.step()
    empty.generate(2, TEXT[:600], SamplingParams(2, ignore_eos=True), 600)
    empty.generate(3, text_of(3, 20), SamplingParams(2, ignore_eos=True), 20)
    while 2 not in run.events:
        before = len(run.events[1])
        run.step()
        assert len(run.events[1]) == before + 1  # a token in every step
        if len(run.events.get(3, [])) < 4:
            assert 2 not in run.events  # the short prompt had its turn in between
    run.finish()
    assert run.events[3][-1] == Finished("length")


def test_replies_beyond_the_limit_wait_in_their_order_and_hear_of_it(empty: TorchEngine) -> None:
    run = Run(empty)
    params = SamplingParams(3, 0.8, ignore_eos=True)
    for number in range(REPLIES_MAX + 3):
        empty.generate(number, text_of(number, 12), params, 12)
    run.step()
    waiting = {
        number: events for number, events in run.events.items() if Queued in map(type, events)
    }
    assert waiting == {REPLIES_MAX + place: [Queued(place)] for place in range(3)}
    assert empty.load.waiting == 3
    run.finish()
    for number, events in run.events.items():
        alone = reply(fresh(empty), text_of(number, 12), params)
        assert [event for event in events if not isinstance(event, Queued)] == alone
    places = [event.place for event in run.events[REPLIES_MAX + 2] if isinstance(event, Queued)]
    assert places == sorted(places, reverse=True)


def test_without_room_replies_take_turns_and_lose_nothing(engine: TorchEngine) -> None:
    small = with_slots(engine, 3)
    run = Run(small)
    asks = {
        1: (TEXT[:200], SamplingParams(300, 0.8, seed=1, ignore_eos=True)),
        2: (text_of(2, 300), SamplingParams(200, 0.8, seed=2, ignore_eos=True)),
        3: (text_of(3, 30), SamplingParams(250, 0.8, seed=3, ignore_eos=True)),
    }
    for number, (ids, params) in asks.items():
        small.generate(number, ids, params, len(ids))
    run.finish()
    assert any(isinstance(event, Queued) for events in run.events.values() for event in events)
    for number, (ids, params) in asks.items():
        alone = reply(fresh(engine), ids, params)
        assert [event for event in run.events[number] if not isinstance(event, Queued)] == alone
    assert warm(small, text_of(3, 500)).prefilled <= 500


def test_what_is_computed_ahead_gives_way_to_a_reply(engine: TorchEngine) -> None:
    small = with_slots(engine, 3)
    run = Run(small)
    small.warm(1, TEXT[:500])
    for _ in range(6):
        run.step()
    small.generate(2, text_of(2, 300), SamplingParams(100, ignore_eos=True), 300)
    run.finish()
    assert run.events[2][-1] == Finished("length")
    assert isinstance(run.events[1][0], Prefilled)
    assert digest(small, TEXT[:500]) == digest(fresh(engine), TEXT[:500])


def test_a_path_that_the_memory_could_never_hold_is_too_long(engine: TorchEngine) -> None:
    small = with_slots(engine, 3)
    room = small.capabilities.positions
    assert room == 2 * TILE
    with pytest.raises(PromptTooLong, match=f"has {room + 1} tokens and this engine room for"):
        small.warm(0, text_of(1, room + 1))
    # Whatever is admitted runs, once it is alone: a fork in the last tile of another path too.
    assert warm(small, text_of(1, room)).prefilled == room
    fork = [*text_of(1, room - 20), *text_of(2, 20)]
    assert warm(small, fork) == Prefilled(room, room - 20, 20)
    events = reply(small, text_of(3, room - 5), SamplingParams(300, ignore_eos=True))
    assert len(ids_in(events)) == 5
    assert events[-1] == Finished("positions")


# -- the model -------------------------------------------------------------------------------------


def test_capabilities_say_what_the_model_is(engine: TorchEngine) -> None:
    capabilities = engine.capabilities
    assert capabilities.exactness == BIT_EXACT
    assert capabilities.positions == POSITIONS
    assert capabilities.vocabulary == 320
    assert capabilities.weight_format == engine._model.weight_format
    assert len(capabilities.fingerprint) == 32


def test_the_fingerprint_follows_the_weights(
    engine: TorchEngine, tiny_model_dir: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(tiny_model_dir, tmp_path / "copy")
    assert isinstance(engine._model, Llama)
    like = engine._model.weight_format, isinstance(engine._model._step, NativeStep)

    def found() -> str:
        return Llama(copy, like[0], native=like[1]).fingerprint

    assert found() == engine.capabilities.fingerprint
    change_config(copy, rms_norm_eps=2e-5)
    assert found() != engine.capabilities.fingerprint


def test_each_arithmetic_has_a_fingerprint_of_its_own(tiny_model_dir: Path) -> None:
    found = {
        Llama(tiny_model_dir, weight_format, native=native).fingerprint
        for weight_format, native in STEPS.values()
    }
    assert len(found) == len(STEPS)


@pytest.mark.parametrize("library", ["torch", "numpy"])
def test_the_fingerprint_follows_the_libraries_that_compute(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    config = read_config(tiny_model_dir)
    before = fingerprint(tiny_model_dir, config, INT8, "torch")
    assert fingerprint(tiny_model_dir, config, INT8, "torch") == before
    monkeypatch.setattr(f"{library}.__version__", "0.0.0")
    assert fingerprint(tiny_model_dir, config, INT8, "torch") != before


def reference_logits(folder: Path, ids: Sequence[int]) -> torch.Tensor:
    from transformers import AutoModelForCausalLM  # noqa: PLC0415 - slow to load

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([list(ids)])).logits[0]
    return logits


def all_logits(engine: TorchEngine, ids: Sequence[int]) -> torch.Tensor:
    warm(engine, ids)
    path = engine._tree.open(np.asarray(ids, np.uint32))
    slots = [tile.slot for tile in path.tiles]
    places = [(slots[index // TILE], index % TILE) for index in range(len(ids))]
    with torch.inference_mode():
        logits = engine._model.logits(engine._pool, places)
    path.close()
    return logits


def divergence(reference: torch.Tensor, logits: torch.Tensor) -> float:
    """Mean Kullback-Leibler divergence over the positions, in nats."""
    left, right = reference.double().log_softmax(-1), logits.double().log_softmax(-1)
    return float((left.exp() * (left - right)).sum(-1).mean())


def reshaped_model(source: Path, target: Path, sizes: tuple[int, int, int]) -> Path:
    """A random Llama of another shape, made by transformers, with the tiny model's vocabulary."""
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415 - slow to load

    torch.manual_seed(5)
    heads, kv_heads, head_dim = sizes
    config = LlamaConfig(
        **json.loads((source / "config.json").read_text())
        | {
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": head_dim,
            "intermediate_size": 75,  # no multiple of a vector register
            "initializer_range": 0.3,
        }
    )
    LlamaForCausalLM(config).save_pretrained(target)
    return target


def change_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_logits_are_those_of_transformers_up_to_the_weight_format(
    empty: TorchEngine, tiny_model_dir: Path
) -> None:
    ids = TEXT[:600]
    assert divergence(reference_logits(tiny_model_dir, ids), all_logits(empty, ids)) < 0.01


ROPES = [
    {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
    {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    },
    {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 512,
    },
]


@pytest.mark.parametrize("rope", ROPES, ids=[str(rope["rope_type"]) for rope in ROPES])
def test_every_supported_rotation_is_that_of_transformers(
    tiny_model_dir: Path, tmp_path: Path, rope: dict[str, object]
) -> None:
    folder = shutil.copytree(tiny_model_dir, tmp_path / "model")
    change_config(folder, rope_parameters=rope)
    ids = TEXT[:400]
    logits = all_logits(TorchEngine(Llama(folder), KV_BYTES), ids)
    assert divergence(reference_logits(folder, ids), logits) < 0.01
    change_config(folder, rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    assert divergence(reference_logits(folder, ids), logits) > 0.03


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_relatives_of_llama_run_as_in_transformers(
    tiny_model_dir: Path, tmp_path: Path, family: str
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM  # noqa: PLC0415 - slow to load

    values = json.loads((tiny_model_dir / "config.json").read_text())
    values |= {"initializer_range": 0.3, "sliding_window": None, "tie_word_embeddings": True}
    del values["model_type"], values["architectures"]
    torch.manual_seed(6)
    config = AutoConfig.for_model(family, **values)
    model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]  # of the library
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("bias", "q_norm.weight", "k_norm.weight")):
                weight.normal_(1.0, 0.3)  # transformers begins with zeros and ones
    model.save_pretrained(tmp_path / "model")
    ids = TEXT[:300]
    relative = TorchEngine(Llama(tmp_path / "model"), KV_BYTES)
    reference = reference_logits(tmp_path / "model", ids)
    assert divergence(reference, all_logits(relative, ids)) < 0.02  # so wide weights round coarsely
    expected = digest(relative, ids)
    stepwise = fresh(relative)
    for length in (1, 5, 70, 256, 290):
        warm(stepwise, ids[:length])
    assert digest(stepwise, ids) == expected


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"num_key_value_heads": 4, "tie_word_embeddings": True},
        {"rope_theta": 5e5, "rope_scaling": None},
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}},
    ],
)
def test_a_configuration_means_what_transformers_reads_in_it(
    tiny_model_dir: Path, tmp_path: Path, family: str, change: dict[str, object]
) -> None:
    from transformers import AutoConfig  # noqa: PLC0415 - slow to load

    values = json.loads((tiny_model_dir / "config.json").read_text())
    if "rope_theta" in change:
        del values["rope_parameters"]
    values |= {"model_type": family, "sliding_window": None} | change
    (tmp_path / "config.json").write_text(json.dumps(values))
    theirs = AutoConfig.from_pretrained(tmp_path)
    config = read_config(tmp_path)
    shape, rope = read_shape(config), read_rope(config)
    assert shape.kv_heads == theirs.num_key_value_heads
    assert shape.head_dim == getattr(theirs, "head_dim", HEAD_DIM)
    assert shape.tied_head == theirs.tie_word_embeddings
    assert shape.positions == theirs.max_position_embeddings
    assert rope["rope_type"] == theirs.rope_parameters["rope_type"]
    assert rope["rope_theta"] == theirs.rope_parameters["rope_theta"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model_type": "gpt2"}, "not of the Llama family"),
        ({"model_type": "mistral", "sliding_window": 128}, "without full attention"),
        ({"model_type": "no-such-model"}, "not of the Llama family"),
        ({"num_attention_heads": None}, "no number"),
        ({"model_type": "t5"}, "encoder-decoder"),
        ({"model_type": "gemma2"}, "not of the Llama family"),
        ({"model_type": "mamba"}, "not of the Llama family"),
        ({"hidden_act": "gelu"}, "another activation"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "changes with length",
        ),
        ({"num_hidden_layers": 1}, "does not know the weight"),
        ({"num_hidden_layers": 3}, "has no weight"),
        ({"hidden_size": 32}, "has shape"),
        ({"num_key_value_heads": 3}, "do not divide"),
    ],
)
def test_a_model_that_would_be_computed_wrongly_is_refused(
    tiny_model_dir: Path, tmp_path: Path, change: dict[str, object], reason: str
) -> None:
    folder = shutil.copytree(tiny_model_dir, tmp_path / "model")
    change_config(folder, **change)
    with pytest.raises(ModelUnusable, match=reason) as caught:
        TorchEngine(Llama(folder), KV_BYTES)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", ["truncated", "missing", "not finite", "no json"])
def test_a_damaged_model_folder_is_refused_in_one_line(
    tiny_model_dir: Path, tmp_path: Path, damage: str
) -> None:
    from safetensors.torch import load_file, save_file  # noqa: PLC0415 - for this test alone

    folder = shutil.copytree(tiny_model_dir, tmp_path / "model")
    weights = folder / "model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "missing":
        weights.unlink()
    elif damage == "not finite":
        tensors = load_file(weights)
        tensors["lm_head.weight"][3, 4] = float("nan")
        save_file(tensors, weights)
    else:
        (folder / "config.json").write_text("{")
    with pytest.raises(ModelUnusable) as caught:
        TorchEngine(Llama(folder), KV_BYTES)
    assert "\n" not in str(caught.value)


REAL_TEXT = text_of(9, 330)


@pytest.fixture(scope="module")
def real_engine(real_model_dir: Path) -> TorchEngine:
    return TorchEngine(Llama(real_model_dir), 1 << 28)


def real_fresh(engine: TorchEngine) -> TorchEngine:
    return fresh(engine, 1 << 28)


@pytest.mark.real_model
def test_the_default_model_is_exact_for_every_cut_and_thread(real_engine: TorchEngine) -> None:
    lengths = (40, 257, 330)
    whole = real_fresh(real_engine)
    digest(whole, REAL_TEXT)
    expected = {length: digest(whole, REAL_TEXT[:length]) for length in lengths}
    cut = real_fresh(real_engine)
    for length in (1, 2, 3, 19, 83, 84, 150, 213, 255, 256, 258, 300, 301, 302, 330):
        warm(cut, REAL_TEXT[:length])
    assert {length: digest(cut, REAL_TEXT[:length]) for length in lengths} == expected
    torch.set_num_threads(2)
    try:
        assert digest(real_fresh(real_engine), REAL_TEXT[:40]) == expected[40]
    finally:
        torch.set_num_threads(1)
    params = SamplingParams(10, 0.7, seed=2, ignore_eos=True)
    sampled = ids_in(reply(cut, REAL_TEXT[:250], params))
    path = REAL_TEXT[:250] + sampled
    assert digest(cut, path) == digest(real_fresh(real_engine), path)
    assert ids_in(reply(whole, path[:253], params, start=250)) == sampled[3:]


@pytest.mark.real_model
def test_the_default_model_stays_close_to_float32(
    real_engine: TorchEngine, real_model_dir: Path
) -> None:
    from tokenizers import Tokenizer  # noqa: PLC0415 - for this test alone

    tokenizer = Tokenizer.from_file(str(real_model_dir / "tokenizer.json"))
    ids = tokenizer.encode(PASSAGE).ids
    reference = reference_logits(real_model_dir, ids)
    logits = all_logits(real_engine, ids)
    assert divergence(reference, logits) < 0.01
    assert (reference.argmax(-1) == logits.argmax(-1)).float().mean() > 0.85


PASSAGE = """A conversation is a document that several people and a model write together. Some write
from a train without a network, some from two devices at once, and nobody waits for the others.
When the devices meet again, everything that was written is there, in the same order everywhere, and
the model has read each part exactly once. What it keeps in memory while it writes is a cache of the
document and nothing else: throw it away, and it can be computed again, token by token, to the last
bit. That is why a reply that was cut in the middle of a sentence goes on where it stopped, on
another day and another process, as if nothing had happened in between."""


def test_sharded_weights_are_one_model(tiny_model_dir: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file  # noqa: PLC0415 - for this test alone

    folder = shutil.copytree(tiny_model_dir, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    sharded = TorchEngine(Llama(folder), KV_BYTES)
    assert digest(sharded, TEXT[:50]) == digest(
        TorchEngine(Llama(tiny_model_dir), KV_BYTES), TEXT[:50]
    )


def test_the_embedding_is_the_head_only_where_the_configuration_says_so(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file  # noqa: PLC0415 - for this test alone

    folder = shutil.copytree(tiny_model_dir, tmp_path / "model")
    change_config(folder, tie_word_embeddings=True)
    tied = digest(TorchEngine(Llama(folder), KV_BYTES), TEXT[:50])
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors")
    assert digest(TorchEngine(Llama(folder), KV_BYTES), TEXT[:50]) == tied
    change_config(folder, tie_word_embeddings=False)
    with pytest.raises(ModelUnusable, match=r"no weight lm_head\.weight"):
        TorchEngine(Llama(folder), KV_BYTES)


def test_a_kv_memory_without_room_is_refused(tiny_model_dir: Path) -> None:
    with pytest.raises(ModelUnusable, match="too small"):
        TorchEngine(Llama(tiny_model_dir), 1000)
