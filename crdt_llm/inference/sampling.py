"""Sampling: from logits to one token id.

Owns how temperature, top-k and top-p choose, and where the random number comes from. It is a pure
function of (logits, params, position): it keeps no state, knows no model and no KV, and the same
arguments give the same id in any process and after any restart.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    from crdt_llm.inference.engine import SamplingParams

    Floats = npt.NDArray[np.float64]


def uniform(seed: int, position: int) -> float:
    """The random number of a position, in ``[0, 1)``.

    Philox 4x64 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) with the seed
    as key and the position as counter: it has no state to keep or to restore.

    Args:
        seed: 64 bits.
        position: of the token to choose.
    """
    generator = np.random.Generator(np.random.Philox(key=seed, counter=[position, 0, 0, 0]))
    return float(generator.random())


def sample(
    logits: npt.NDArray[np.float32], params: SamplingParams, position: int
) -> tuple[int, float]:
    """Choose the token of ``position``.

    Equal logits are ordered by id, the smaller first, so a choice never depends on how a sort
    treats ties.

    Args:
        logits: one row, ``(vocabulary,)``.
        params: temperature, top-k, top-p and seed.
        position: of the token to choose.

    Returns:
        The id and its natural log-probability under the raw distribution (temperature 1, nothing
        cut), rounded to float32.
    """
    values = _from_the_largest(logits)
    if params.temperature == 0:
        chosen = int(values.argmax())  # the first of equals
    else:
        chosen = _draw(values / params.temperature, params, uniform(params.seed, position))
    return chosen, _logprob(values, chosen)


def logprob(logits: npt.NDArray[np.float32], chosen: int) -> float:
    """The log-probability that :func:`sample` gives an id, for one that was chosen before."""
    return _logprob(_from_the_largest(logits), chosen)


def _from_the_largest(logits: npt.NDArray[np.float32]) -> Floats:
    values = logits.astype(np.float64)
    values -= values.max()
    return values


def _logprob(values: Floats, chosen: int) -> float:
    return float(np.float32(values[chosen] - np.log(np.exp(values).sum())))


def _draw(values: Floats, params: SamplingParams, number: float) -> int:
    """Invert the cumulative distribution of what top-k and top-p leave, in the order of ids."""
    ids = np.arange(len(values))
    if 0 < params.top_k < len(values):
        ids = _top_k(values, params.top_k)
    weights = np.exp(values[ids])
    if params.top_p < 1:
        kept = _nucleus(weights / weights.sum(), params.top_p)
        ids, weights = ids[kept], weights[kept]
    cumulative = weights.cumsum()
    # side="right": a number that falls on an edge belongs to the interval that begins there, and
    # an id of weight 0 has an empty interval.
    index = int(np.searchsorted(cumulative, number * cumulative[-1], side="right"))
    # number < 1, but the product may round up to the end: then it is the last id with any weight.
    return int(ids[min(index, int(np.flatnonzero(weights)[-1]))])


def _top_k(values: Floats, top_k: int) -> npt.NDArray[np.intp]:
    """The ids of the ``top_k`` largest values, smaller ids first among equals, sorted by id."""
    threshold = np.partition(values, len(values) - top_k)[len(values) - top_k]
    above = np.flatnonzero(values > threshold)
    level = np.flatnonzero(values == threshold)[: top_k - len(above)]
    return np.sort(np.concatenate([above, level]))


def _nucleus(probabilities: Floats, top_p: float) -> npt.NDArray[np.intp]:
    """The smallest set of most likely entries with at least ``top_p`` together, sorted by index."""
    # Everything below this bound has less than 1 - top_p together, so the nucleus is full before
    # it is reached: a sort of some dozens instead of the whole vocabulary.
    bound = (1 - top_p) / len(probabilities)
    candidates = np.flatnonzero(probabilities >= bound)
    order = candidates[np.argsort(-probabilities[candidates], kind="stable")]
    reached = probabilities[order].cumsum()
    count = int(np.searchsorted(reached, top_p, side="left")) + 1
    return np.sort(order[:count])
