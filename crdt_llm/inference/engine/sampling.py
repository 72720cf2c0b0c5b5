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

    from crdt_llm.inference.contract import SamplingParams

    Floats = npt.NDArray[np.float64]

LIKELY = 1e-3
"""The probability of ids that are looked at first: no more than a thousand can have it, and what
they leave is seldom of use."""

WIDER = 16
"""By how much that is lowered when they are not enough: two or three times, if all are alike."""

ROUNDING = 2.0**-50
"""More than a product and a quotient of float64 can be off, in relation to their value."""


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
    if params.temperature == 0:
        chosen = int(logits.argmax())  # the first of equals
    else:
        weights = _from_the_largest(logits)
        weights /= params.temperature
        chosen = _draw(weights, params, uniform(params.seed, position))
    return chosen, logprob(logits, chosen)


def logprob(logits: npt.NDArray[np.float32], chosen: int) -> float:
    """The log-probability that :func:`sample` gives an id, for one that was chosen before."""
    values = _from_the_largest(logits)
    value = values[chosen]
    return float(np.float32(value - np.log(np.exp(values, out=values).sum())))


def _from_the_largest(logits: npt.NDArray[np.float32]) -> Floats:
    values: Floats = np.subtract(logits, logits.max(), dtype=np.float64)
    return values


def _draw(values: Floats, params: SamplingParams, number: float) -> int:
    """Invert the cumulative distribution of what top-k and top-p leave, in the order of ids.

    ``values`` is used up.
    """
    ids: npt.NDArray[np.intp] | None = None  # all of them
    if 0 < params.top_k < len(values):
        ids = _top_k(values, params.top_k)
        values = values[ids]
    weights = np.exp(values, out=values)
    if params.top_p < 1:
        kept = _nucleus(weights, params.top_p)
        ids, weights = kept if ids is None else ids[kept], weights[kept]
    cumulative = weights.cumsum()
    # side="right": a number that falls on an edge belongs to the interval that begins there, and
    # an id of weight 0 has an empty interval.
    index = int(np.searchsorted(cumulative, number * cumulative[-1], side="right"))
    if index == len(weights):
        # number < 1, but the product may round up to the end: the last id with any weight.
        index = int(np.flatnonzero(weights)[-1])
    return index if ids is None else int(ids[index])


def _top_k(values: Floats, top_k: int) -> npt.NDArray[np.intp]:
    """The ids of the ``top_k`` largest values, smaller ids first among equals, sorted by id."""
    threshold = np.partition(values, len(values) - top_k)[len(values) - top_k]
    above = np.flatnonzero(values > threshold)
    level = np.flatnonzero(values == threshold)[: top_k - len(above)]
    return np.sort(np.concatenate([above, level]))


def _nucleus(weights: Floats, top_p: float) -> npt.NDArray[np.intp]:
    """The smallest set of most likely entries with at least ``top_p`` together, sorted by index."""
    total = weights.sum()
    # Everything below this bound has less than 1 - top_p together, so the nucleus is full before
    # it is reached.
    lowest = (1 - top_p) / len(weights)
    bound = max(lowest, LIKELY)
    while True:
        # Nearly always it is full long before: a sort of some dozens instead of thousands. What is
        # taken is whole down to the bound, so it begins as the order of all does.
        ids = np.flatnonzero(weights >= bound * total * (1 - ROUNDING))
        probabilities = weights[ids] / total
        taken = probabilities >= bound
        ids, probabilities = ids[taken], probabilities[taken]
        order = np.argsort(-probabilities, kind="stable")
        reached = probabilities[order].cumsum()
        count = int(np.searchsorted(reached, top_p, side="left")) + 1
        if count <= len(ids) or bound == lowest:
            return np.sort(ids[order[:count]])
        bound = max(lowest, bound / WIDER)
