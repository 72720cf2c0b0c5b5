"""Audit: a reply's log is given to a model again, id by id, and compared with what was recorded.

Exactness level 3: whoever holds the document, the key of its hidden fields and some build of the
model can say how far that build agrees with the one that made a reply. Nothing is sampled: each
recorded id is scored behind the recorded ones before it. This module owns the comparison.

A recorded log-probability is a float16, so the new one is rounded the same way before it is
compared: the same build differs by nothing at all.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from crdt_llm.errors import BadProof

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from crdt_llm.document.conversation import Conversation
    from crdt_llm.document.schema import Entry
    from crdt_llm.inference.contract import Capabilities, Scored
    from crdt_llm.inference.prompt.transcript import Transcript

CERTAIN: Final = math.log(0.5)
"""What was recorded as more likely than this was the most likely id, whatever the others were."""


class Scorer(Protocol):
    """An engine that can score ids which it did not choose."""

    @property
    def capabilities(self) -> Capabilities:
        """What this engine is."""
        ...

    async def score(self, ids: Sequence[int], start: int) -> Scored:
        """Score the ids from ``start`` on."""
        ...


@dataclass(frozen=True, slots=True)
class ArgmaxChange:
    """An id that was the most likely one when it was sampled and is not any more.

    Attributes:
        position: in the reply, from 0.
        recorded: the id.
        now: the id that is the most likely one there now.
    """

    position: int
    recorded: int
    now: int


@dataclass(frozen=True, slots=True)
class Audited:
    """What became of one reply.

    Attributes:
        entry: its id.
        prompt: tokens before it.
        tokens: how many recorded ids were scored.
        difference: the largest difference of a log-probability, in nats.
        changes: every id that would not be the most likely one any more, where that is known: in a
            greedy reply, and where the recorded probability was above one half.
        same_model: whether the fingerprint that made it is the one of this engine.
        skipped: why there is nothing to audit, or ``None``.
        problem: why what was recorded could not be read, or ``None``.
    """

    entry: str
    prompt: int = 0
    tokens: int = 0
    difference: float = 0.0
    changes: tuple[ArgmaxChange, ...] = ()
    same_model: bool = False
    skipped: str | None = None
    problem: str | None = None

    def agrees(self, tolerance: float) -> bool:
        """Whether nothing differs by more than ``tolerance`` nats, and no choice would change."""
        return self.problem is None and not self.changes and self.difference <= tolerance


async def audit(
    conversation: Conversation, path: Sequence[str], transcript: Transcript, engine: Scorer
) -> AsyncIterator[Audited]:
    """Score every reply on a path, each behind what it was answered from.

    Args:
        conversation: the replica.
        path: the entries, from the root.
        transcript: reads its ids.
        engine: scores them.
    """
    for name in path:
        entry = conversation.entry(name)
        if entry is not None and entry.is_slot and entry.place is not None:
            yield await _audit_one(entry, entry.place.parent, transcript, engine)


async def _audit_one(  # noqa: PLR0911 - one return a reason why there is nothing to audit
    entry: Entry, parent: str, transcript: Transcript, engine: Scorer
) -> Audited:
    if not entry.sealed:
        return Audited(entry.id, skipped="nothing was recorded")
    try:
        hidden = transcript.hidden(entry)
        reading = transcript.reading_of(entry.id, parent)
        before = transcript.ids_of(reading)
    except BadProof as error:
        return Audited(entry.id, problem=str(error))
    if hidden is None:
        return Audited(entry.id, skipped="made with another tokenizer or template")
    if transcript.count_withdrawn(reading) > hidden.params.get("withdrawn", 0):
        return Audited(entry.id, skipped="something that it read was withdrawn")
    sampled = hidden.sampled
    if not sampled:
        return Audited(entry.id, skipped="it ended before its first token")
    prompt = before + hidden.injected
    if len(hidden.logprobs) != len(sampled) or hidden.ids != hidden.injected + sampled:
        return Audited(entry.id, problem="what was recorded is not one log-probability an id")
    scored = await engine.score(prompt + sampled, len(prompt))
    now = struct.unpack(f"<{len(sampled)}f", scored.logprobs)
    likeliest = struct.unpack(f"<{len(sampled)}I", scored.likeliest)
    greedy = hidden.params.get("temperature") == 0
    differences = (
        _difference(recorded, again) for recorded, again in zip(hidden.logprobs, now, strict=True)
    )
    return Audited(
        entry.id,
        len(prompt),
        len(sampled),
        max(differences),
        tuple(
            ArgmaxChange(position, token, best)
            for position, (token, best, recorded) in enumerate(
                zip(sampled, likeliest, hidden.logprobs, strict=True)
            )
            if token != best and (greedy or recorded > CERTAIN)
        ),
        same_model=hidden.model == engine.capabilities.fingerprint,
    )


def _difference(recorded: float, again: float) -> float:
    rounded: float = struct.unpack("<e", struct.pack("<e", again))[0]
    return 0.0 if recorded == rounded else abs(recorded - rounded)
