"""Drives the engine's synchronous core to the end of its requests."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from crdt_llm.inference.contract import KvDigest, Prefilled, Sampled
from crdt_llm.inference.engine.torch_engine import TorchEngine

if TYPE_CHECKING:
    from collections.abc import Sequence

    from crdt_llm.inference.contract import SamplingParams
    from crdt_llm.inference.engine import torch_engine
    from crdt_llm.inference.kv.checkpoint import Checkpoints

KV_BYTES = 1 << 24  # 64 tiles of the tiny model


class Run:
    """Drives an engine to the end and sorts the events by request."""

    def __init__(self, engine: TorchEngine) -> None:
        self.engine = engine
        self.events: dict[int, list[torch_engine.Event]] = {}

    def step(self) -> None:
        self.engine.step(lambda request, event: self.events.setdefault(request, []).append(event))

    def finish(self) -> None:
        while self.engine.busy:
            self.step()


def text_of(seed: int, length: int) -> list[int]:
    """Random ids; the same seed gives the same beginning."""
    generator = np.random.Generator(np.random.PCG64(seed))
    return [int(value) for value in generator.integers(0, 256, length)]


def digest(engine: TorchEngine, ids: Sequence[int]) -> KvDigest:
    run = Run(engine)
    engine.digest(0, ids)
    run.finish()
    (event,) = run.events[0]
    assert isinstance(event, KvDigest)
    return event


def warm(engine: TorchEngine, ids: Sequence[int]) -> Prefilled:
    run = Run(engine)
    engine.warm(0, ids)
    run.finish()
    (event,) = run.events[0]
    assert isinstance(event, Prefilled)
    return event


def reply(
    engine: TorchEngine, ids: Sequence[int], params: SamplingParams, start: int | None = None
) -> list[torch_engine.Event]:
    run = Run(engine)
    engine.generate(0, ids, params, len(ids) if start is None else start)
    run.finish()
    return run.events[0]


def ids_in(events: Sequence[torch_engine.Event]) -> list[int]:
    return [event.id for event in events if isinstance(event, Sampled)]


def fresh(
    engine: TorchEngine, kv_bytes: int = KV_BYTES, checkpoints: Checkpoints | None = None
) -> TorchEngine:
    """The same model with an empty KV tree, as after a restart (the weights are not read again)."""
    anew = object.__new__(TorchEngine)
    anew.__dict__.update(engine.__dict__)
    anew._kv_memory_bytes = kv_bytes
    anew._begin(checkpoints)
    return anew
