"""Replay: every reply of a path made anew from the document alone, and compared.

This module owns the comparison. It needs a replica, a model and the key of the sealed fields, no
relay and no KV cache: if the engine is exact, the ids come out as they were recorded.
"""

from __future__ import annotations

from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from crdt_llm.errors import BadProof
from crdt_llm.inference.contract import Sampled
from crdt_llm.inference.node.reply import sampling

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from crdt_llm.document.conversation import Conversation
    from crdt_llm.document.schema import Entry
    from crdt_llm.inference.contract import Engine
    from crdt_llm.inference.prompt.renderer import Renderer
    from crdt_llm.inference.prompt.transcript import Transcript


@dataclass(frozen=True, slots=True)
class Replayed:
    """What became of one reply.

    Attributes:
        entry: its id.
        prompt: tokens before it.
        recorded: how many ids the document says were sampled.
        equal: how many of them, from the first on, came out again.
        same_model: whether the fingerprint that made it is the one of this engine.
        skipped: why there is nothing to replay, or ``None``.
        problem: why what was recorded could not be read, or ``None``.
    """

    entry: str
    prompt: int = 0
    recorded: int = 0
    equal: int = 0
    same_model: bool = False
    skipped: str | None = None
    problem: str | None = None

    @property
    def exact(self) -> bool:
        """Whether it came out token for token, as far as there was anything to come out."""
        return self.problem is None and self.equal == self.recorded


async def replay(
    conversation: Conversation,
    path: Sequence[str],
    transcript: Transcript,
    renderer: Renderer,
    engine: Engine,
) -> AsyncIterator[Replayed]:
    """Make every reply on a path anew, each behind the recorded ids of those before it.

    Args:
        conversation: the replica.
        path: the entries, from the root.
        transcript: reads its ids.
        renderer: the model's.
        engine: makes the ids.
    """
    for name in path:
        entry = conversation.entry(name)
        if entry is None or not entry.is_slot or entry.place is None:
            continue
        yield await _replay_one(entry, entry.place.parent, transcript, renderer, engine)


async def _replay_one(
    entry: Entry, parent: str, transcript: Transcript, renderer: Renderer, engine: Engine
) -> Replayed:
    if not entry.sealed:
        return Replayed(entry.id, skipped="nothing was recorded")
    try:
        hidden = transcript.hidden(entry)
        reading = transcript.reading_of(entry.id, parent)
        before = transcript.ids_of(reading)
    except BadProof as error:
        return Replayed(entry.id, problem=str(error))
    if hidden is None:
        return Replayed(entry.id, skipped="made with another tokenizer or template")
    if transcript.count_withdrawn(reading) > hidden.params.get("withdrawn", 0):
        return Replayed(entry.id, skipped="something that it read was withdrawn")
    if not hidden.sampled:
        return Replayed(entry.id, skipped="it ended before its first token")
    prompt, recorded = before + hidden.injected, hidden.sampled
    params = replace(sampling(hidden.params, renderer.end_ids), max_tokens=len(recorded))
    equal = 0
    async with aclosing(engine.generate(prompt, params, len(prompt))) as events:
        async for event in events:
            if isinstance(event, Sampled):
                if event.id != recorded[equal]:
                    break
                equal += 1
    same = hidden.model == engine.capabilities.fingerprint
    return Replayed(entry.id, len(prompt), len(recorded), equal, same_model=same)
