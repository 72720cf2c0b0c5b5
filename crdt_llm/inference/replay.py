"""Replay: every reply of a path made anew from the document alone, and compared.

This module owns the comparison. It needs a replica, a model and the key of the sealed fields, no
relay and no KV cache: if the engine is exact, the ids come out as they were recorded.
"""

from __future__ import annotations

from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from crdt_llm.errors import BadProof
from crdt_llm.inference.engine import Sampled
from crdt_llm.inference.reply import sampling

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from crdt_llm.document.conversation import Conversation
    from crdt_llm.inference.engine import Engine
    from crdt_llm.inference.prompt import Renderer
    from crdt_llm.inference.transcript import Transcript


@dataclass(frozen=True, slots=True)
class Replayed:
    """What became of one reply.

    Attributes:
        entry: its id.
        prompt: tokens before it.
        recorded: how many ids the document says were sampled.
        equal: how many of them, from the first on, came out again.
        same_model: whether the fingerprint that made it is the one of this engine.
        problem: why it could not be replayed, or ``None``.
    """

    entry: str
    prompt: int = 0
    recorded: int = 0
    equal: int = 0
    same_model: bool = False
    problem: str | None = None

    @property
    def exact(self) -> bool:
        """Whether it came out token for token."""
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
        try:
            hidden = transcript.hidden(entry)
            before = transcript.ids(entry.place.parent)
        except BadProof as error:
            yield Replayed(name, problem=str(error))
            continue
        if hidden is None or not hidden.sampled:
            yield Replayed(name, problem="no ids of this model are sealed in it")
            continue
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
        yield Replayed(name, len(prompt), len(recorded), equal, same)
