"""Sampling is a pure function of (logits, params, position)."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from crdt_llm.errors import LocalMisuse
from crdt_llm.inference.contract import SamplingParams
from crdt_llm.inference.engine.sampling import sample, uniform

# Coarse values, so that ties are common.
LOGITS = arrays(np.float32, st.integers(1, 40), elements=st.integers(-6, 6).map(np.float32))
SEEDS = st.integers(0, 2**64 - 1)
POSITIONS = st.integers(0, 1 << 20)


def ranked(logits: np.ndarray) -> list[int]:
    """All ids, likely ones first, equals by id: the naive reading of the rule."""
    return sorted(range(len(logits)), key=lambda index: (-float(logits[index]), index))


def probabilities(logits: np.ndarray, temperature: float) -> np.ndarray:
    values = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    return np.asarray(values / values.sum())


def test_the_random_number_of_a_position_is_fixed_for_ever() -> None:
    # Written down once: other numbers would change every reply that is resumed.
    assert uniform(0, 0) == 0.011546754286331562
    assert uniform(1, 7) == 0.3458819940993094
    assert uniform(2**64 - 1, 8191) == 0.27645601336032455


def test_random_numbers_fill_the_unit_interval_evenly() -> None:
    numbers = [uniform(seed, position) for seed in range(20) for position in range(100)]
    counts, _ = np.histogram(numbers, bins=10, range=(0, 1))
    assert counts.sum() == 2000
    assert counts.min() > 150
    assert counts.max() < 250


@given(LOGITS, SEEDS, POSITIONS)
def test_greedy_takes_the_first_of_the_largest(
    logits: np.ndarray, seed: int, position: int
) -> None:
    params = SamplingParams(max_tokens=1, temperature=0, seed=seed)
    assert sample(logits, params, position)[0] == ranked(logits)[0]


@given(LOGITS, SEEDS, POSITIONS, st.sampled_from([0.0, 0.7, 3.0]))
def test_the_logprob_is_that_of_the_raw_distribution(
    logits: np.ndarray, seed: int, position: int, temperature: float
) -> None:
    params = SamplingParams(1, temperature=temperature, seed=seed, top_k=3, top_p=0.5)
    chosen, logprob = sample(logits, params, position)
    assert logprob == pytest.approx(np.log(probabilities(logits, 1.0)[chosen]), abs=1e-5)
    assert logprob == float(np.float32(logprob))


@given(LOGITS, SEEDS, POSITIONS, st.integers(1, 45))
def test_top_k_leaves_the_k_first_ranks(
    logits: np.ndarray, seed: int, position: int, top_k: int
) -> None:
    params = SamplingParams(1, temperature=1.5, seed=seed, top_k=top_k)
    assert sample(logits, params, position)[0] in ranked(logits)[:top_k]


@given(LOGITS, SEEDS, POSITIONS, st.floats(0.01, 0.99))
def test_top_p_leaves_the_smallest_set_of_ranks_that_reaches_it(
    logits: np.ndarray, seed: int, position: int, top_p: float
) -> None:
    params = SamplingParams(1, temperature=1.5, seed=seed, top_p=top_p)
    chosen = sample(logits, params, position)[0]
    order = ranked(logits)
    shares = probabilities(logits, 1.5)
    before = sum(shares[index] for index in order[: order.index(chosen)])
    assert before < top_p + 1e-9


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.01, 1.0, 3.0, 9.0]),
    st.sampled_from([1e-6, 0.5, 0.95, 0.999999]),
)
def test_of_a_large_vocabulary_the_choice_is_that_of_one_sort(
    seed: int, spread: float, top_p: float
) -> None:
    # Large and flat, so that the likeliest ids are not enough, and coarse, so that ties are common.
    drawn = np.random.default_rng(seed).standard_normal(3000) * spread
    logits = np.round(drawn, 2).astype(np.float32)
    params = SamplingParams(1, 0.7, top_p, seed=seed)
    values = (logits.astype(np.float64) - logits.max()) / 0.7
    weights = np.exp(values)
    order = np.argsort(-weights, kind="stable")
    reached = (weights / weights.sum())[order].cumsum()
    nucleus = np.sort(order[: int(np.searchsorted(reached, top_p)) + 1])
    cumulative = weights[nucleus].cumsum()
    place = np.searchsorted(cumulative, uniform(seed, 5) * cumulative[-1], side="right")
    assert sample(logits, params, 5)[0] == nucleus[min(int(place), len(nucleus) - 1)]


def test_frequencies_follow_the_distribution_over_seeds() -> None:
    logits = np.array([2.0, 1.0, 0.0, 1.0], np.float32)
    shares = probabilities(logits, 0.7)
    drawn = [sample(logits, SamplingParams(1, 0.7, seed=seed), 5)[0] for seed in range(4000)]
    counts = np.bincount(drawn, minlength=4) / len(drawn)
    assert np.abs(counts - shares).max() < 0.03


def test_what_is_cut_is_never_drawn_and_the_rest_keeps_its_proportions() -> None:
    logits = np.array([0.0, 3.0, 2.0, 2.0, -1.0], np.float32)
    params = [SamplingParams(1, 1.0, seed=seed, top_k=3) for seed in range(3000)]
    drawn = np.array([sample(logits, each, 0)[0] for each in params])
    assert set(drawn) == {1, 2, 3}
    expected = probabilities(logits[[1, 2, 3]], 1.0)
    counts = np.array([(drawn == index).mean() for index in (1, 2, 3)])
    assert np.abs(counts - expected).max() < 0.03


def test_a_tie_at_the_edge_of_top_k_goes_to_the_smaller_id() -> None:
    logits = np.array([1.0, 5.0, 1.0, 1.0], np.float32)
    drawn = {sample(logits, SamplingParams(1, 9.0, seed=s, top_k=2), 0)[0] for s in range(200)}
    assert drawn == {0, 1}


def test_the_logits_are_not_changed() -> None:
    logits = np.array([1.0, 5.0, 2.0], np.float32)
    sample(logits, SamplingParams(1, 0.7, 0.9, 2, 3), 4)
    assert logits.tolist() == [1.0, 5.0, 2.0]


def test_a_seed_of_64_bits_counts_in_full() -> None:
    numbers = {uniform(seed, 3) for seed in (0, 1, 1 << 32, 1 << 63, (1 << 64) - 1)}
    assert len(numbers) == 5


def test_positions_give_independent_numbers() -> None:
    numbers = [uniform(9, position) for position in range(1000)]
    assert len(set(numbers)) == 1000
    pairs = [left < right for left, right in itertools.pairwise(numbers)]
    assert 400 < sum(pairs) < 600


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": 0},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"seed": -1},
        {"seed": 1 << 64},
    ],
)
def test_params_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(LocalMisuse):
        SamplingParams(**({"max_tokens": 1} | wrong))  # type: ignore[arg-type]  # what is tested
