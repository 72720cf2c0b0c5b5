"""The engine's contract: token ids in, token ids out.

Owns the words that the node and every engine share: what an engine can do, how a reply is sampled,
and the events that a generation gives. It knows token ids alone: no text, no tokenizer, no
document, no tree. An engine may be a process of ours or a server over HTTP; how it keeps its KV
cache is its own affair.

A position counts from 0 along one path of ids. ``[a, b)`` is half open, as everywhere in this
package: the KV *of the first n tokens* is the KV of the positions ``[0, n)``, and the logits *at n*
are the ones that choose the token of position ``n``; they come from the row of position ``n - 1``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from crdt_llm.errors import LocalMisuse

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

SEED_BITS = 64  # the width of the key of the random number generator

TOKEN_LOG_EXACT = 1
"""Exactness level 1: the log of token ids is exact, the numbers behind it are not claimed."""

BIT_EXACT = 2
"""Exactness level 2: for one fingerprint the KV of the first n tokens and the logits at n are one
value, bit for bit, whatever the chunks, neighbours, forks, threads and restarts."""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What an engine is and what it promises.

    Args:
        fingerprint: a digest over weights, weight format, dtype, torch build and the CPU features
            that select kernels. Equal fingerprints give equal numbers (at level 2).
        exactness: the level that the engine declares.
        positions: how many tokens a path may have.
        vocabulary: ids are in ``[0, vocabulary)``.
        weight_format: how the weights are held, e.g. ``int8``.
    """

    fingerprint: str
    exactness: int
    positions: int
    vocabulary: int
    weight_format: str


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How a reply is sampled. Every value is resolved: nothing is absent here.

    Args:
        max_tokens: the longest reply, counted from ``start``, so that a resumed reply ends where it
            would have ended.
        temperature: 0 is greedy; else the logits are divided by it.
        top_p: the nucleus, the smallest set of most likely ids with this probability; 1 is all.
        top_k: so many most likely ids; 0 is all.
        seed: 64 bits; with the position it gives the random number.
        end_ids: sampling one of them ends the reply. The id itself is emitted.
        ignore_eos: ``end_ids`` do not end the reply.

    Raises:
        LocalMisuse: a value is out of range.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    end_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        checks = (
            (self.max_tokens >= 1, "max_tokens must be at least 1"),
            (
                math.isfinite(self.temperature) and self.temperature >= 0,
                "temperature must be a finite number, 0 or more",
            ),
            (0 < self.top_p <= 1, "top_p must be above 0 and at most 1"),
            (self.top_k >= 0, "top_k must be 0 (all) or more"),
            (0 <= self.seed < 1 << SEED_BITS, "seed must fit 64 bits"),
        )
        for holds, message in checks:
            if not holds:
                raise LocalMisuse(message)


@dataclass(frozen=True, slots=True)
class Queued:
    """The request waits for room. Given again when its place changes.

    A reply that runs may have to wait again, when memory is full; then it stands among its tokens.

    Args:
        place: how many requests run before it, of those that wait; 0 is next.
    """

    place: int


@dataclass(frozen=True, slots=True)
class Prefilled:
    """The KV of the prompt is there.

    Args:
        prompt: tokens asked for.
        reused: tokens whose KV was resident already.
        prefilled: tokens that were computed for this request: ``prompt - reused``.
    """

    prompt: int
    reused: int
    prefilled: int


@dataclass(frozen=True, slots=True)
class Sampled:
    """One token of the reply.

    Args:
        id: the token id.
        logprob: its natural logarithm of probability under the model's raw distribution (before
            temperature, top-k and top-p).
    """

    id: int
    logprob: float


FinishReason = Literal["end", "length", "positions"]


@dataclass(frozen=True, slots=True)
class Finished:
    """The reply ended by itself; nothing follows.

    Args:
        reason: ``end`` an end id was sampled, ``length`` ``max_tokens`` were sampled, ``positions``
            the model has no further position.
    """

    reason: FinishReason


@dataclass(frozen=True, slots=True)
class KvDigest:
    """What exactness level 2 makes comparable: two processes that agree here agree everywhere.

    Args:
        kv: SHA-256 of the KV of the first n tokens, in an order of the engine's own.
        logits: SHA-256 of the logits at n, float32 little-endian.
    """

    kv: bytes
    logits: bytes


@dataclass(frozen=True, slots=True)
class Scored:
    """What a model makes of ids that are given to it, each behind the ones before it.

    Args:
        logprobs: for each id its natural log-probability under the model's raw distribution,
            float32 little-endian; as in :class:`Sampled`.
        likeliest: for each the id that is the most likely there, uint32 little-endian; the smallest
            of equals.
    """

    logprobs: bytes
    likeliest: bytes


GenerationEvent = Queued | Prefilled | Sampled | Finished
"""One :class:`Prefilled`, then :class:`Sampled` ..., then one :class:`Finished`; in between, and
before, a :class:`Queued` each time that the request's place among those that wait changes."""


class Engine(Protocol):
    """Whatever computes tokens from tokens."""

    @property
    def capabilities(self) -> Capabilities:
        """What this engine is; it never changes while the engine lives."""
        ...

    async def warm(self, ids: Sequence[int]) -> Prefilled:
        """Bring the KV of ``ids``, so that a later :meth:`generate` has little left to do.

        Yields to every :meth:`generate`. Cancelling the call stops the work within 96 rows; what
        was computed stays resident.

        Raises:
            PromptTooLong: more ids than positions.
            LocalMisuse: no ids, or an id outside the vocabulary.
            EngineBusy: no room for another request or its KV.
            EngineDied: the engine's process ended.
        """
        ...

    def generate(
        self, ids: Sequence[int], params: SamplingParams, start: int
    ) -> AsyncGenerator[GenerationEvent, None]:
        """Sample a reply, token by token as they are made.

        The random number of a token depends on ``params.seed`` and its position alone, and
        ``max_tokens`` counts from ``start``: to resume a reply, pass the prompt with what was
        sampled so far and the same ``start`` and ``params``. A reply that had ended already gives
        its :class:`Prefilled` and :class:`Finished`.

        Closing the iterator cancels: seen before the next decode step and every 96 prefill rows.

        Args:
            ids: the prompt, and after it what this reply has sampled already.
            params: how to sample.
            start: how many of ``ids`` are the prompt.

        Raises:
            PromptTooLong: more ids than positions.
            LocalMisuse: no ids, an id outside the vocabulary, or ``start`` outside
                ``[1, len(ids)]``.
            EngineBusy: no room for another request or its KV.
            EngineDied: the engine's process ended.
        """
        ...

    async def forget(self, ids: Sequence[int], keep: int = 0) -> None:
        """Drop the KV from position ``keep`` on, of every path that agrees with ``ids``.

        A path agrees if one of the two begins with the other. What was computed *after* a dropped
        position goes too, and so do rows of a request that is still running, once it ends.

        Args:
            ids: the path.
            keep: positions ``[0, keep)`` may stay; ``keep < len(ids)``.

        Raises:
            LocalMisuse: ``keep`` outside ``[0, len(ids))``.
            EngineDied: the engine's process ended.
        """
        ...

    async def close(self) -> None:
        """End the engine and free what it holds. Closing twice is closing once."""
        ...
