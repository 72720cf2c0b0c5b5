"""What a node counts, and how full its engine is.

This module owns the figures and what they are called. It must not know who shows them: a relay on
its page of metrics, or a log. None of them says which conversation it was, or who wrote there.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol, runtime_checkable

from crdt_llm.errors import CrdtLlmError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from crdt_llm.inference.contract import Prefilled
    from crdt_llm.inference.node.drafts import Tally

MEASURE_INTERVAL_S: Final = 5.0
"""Between two questions to the engine: more often than anybody collects metrics, and the answer
costs it next to nothing."""


class Fullness(Protocol):
    """How full an engine is, at one time."""

    @property
    def requests(self) -> int:
        """Requests that run or wait."""
        ...

    @property
    def waiting(self) -> int:
        """Those of them that wait."""
        ...

    @property
    def kv_bytes(self) -> int:
        """What KV takes in memory."""
        ...

    @property
    def disk_bytes(self) -> int:
        """What KV takes on disk."""
        ...


@runtime_checkable
class Measurable(Protocol):
    """An engine that says how full it is."""

    async def measure(self) -> Fullness:
        """How full it is now.

        Raises:
            EngineDied: the engine's process ended.
        """
        ...


@dataclass(slots=True)
class Computed:
    """Tokens that an engine computed or spared, over the life of a node.

    Attributes:
        sampled: those that were sampled.
        prefilled: those of prompts that were computed, whether for a reply or ahead of one.
        reused: those of prompts whose KV was there already.
    """

    sampled: int = 0
    prefilled: int = 0
    reused: int = 0

    def note(self, prompt: Prefilled) -> None:
        """A prompt was read."""
        self.prefilled += prompt.prefilled
        self.reused += prompt.reused


@dataclass(frozen=True, slots=True)
class Figure:
    """One number that can be read at any time.

    Attributes:
        name: what it is called, in Prometheus' words, without a prefix.
        help: one line for people.
        read: its value now.
        grows: whether it only grows while the node lives.
    """

    name: str
    help: str
    read: Callable[[], float]
    grows: bool = False


@dataclass(slots=True)
class Figures:
    """All figures of one node.

    Args:
        computed: by its engines.
        drafted: what drafts had computed.
    """

    computed: Computed
    drafted: Tally
    _engine: Fullness | None = field(default=None, init=False)

    @property
    def all(self) -> tuple[Figure, ...]:
        """Each of them, in the order in which they are shown."""
        computed, drafted = self.computed, self.drafted
        return (
            Figure("node_sampled_tokens", "Tokens sampled.", lambda: computed.sampled, grows=True),
            Figure(
                "node_prefilled_tokens",
                "Tokens of prompts that were computed.",
                lambda: computed.prefilled,
                grows=True,
            ),
            Figure(
                "node_reused_tokens",
                "Tokens of prompts that were in the KV cache.",
                lambda: computed.reused,
                grows=True,
            ),
            Figure(
                "node_drafts_adopted_tokens",
                "Tokens read of drafts that were then sent.",
                lambda: drafted.adopted,
                grows=True,
            ),
            Figure(
                "node_drafts_wasted_tokens",
                "Tokens read of drafts in vain.",
                lambda: drafted.wasted,
                grows=True,
            ),
            self._of_engine(
                "engine_requests", "Requests that run or wait.", lambda now: now.requests
            ),
            self._of_engine("engine_queue", "Requests that wait.", lambda now: now.waiting),
            self._of_engine(
                "engine_kv_memory_bytes", "KV in memory, bytes.", lambda now: now.kv_bytes
            ),
            self._of_engine(
                "engine_kv_disk_bytes", "KV on disk, bytes.", lambda now: now.disk_bytes
            ),
        )

    def _of_engine(self, name: str, words: str, read: Callable[[Fullness], int]) -> Figure:
        return Figure(name, words, lambda: 0 if self._engine is None else read(self._engine))

    def __str__(self) -> str:
        return ", ".join(f"{figure.name} {figure.read():g}" for figure in self.all)

    async def measure(self, engine: object) -> None:
        """Ask an engine how full it is; one that is away or cannot tell is shown as empty."""
        try:
            self._engine = await engine.measure() if isinstance(engine, Measurable) else None
        except CrdtLlmError:
            self._engine = None  # it died; the node says so, and starts another one


class Counted(Protocol):
    """A node, as far as its figures go."""

    @property
    def engine(self) -> object:
        """The engine that it has now, if it has one."""
        ...

    @property
    def figures(self) -> Figures:
        """Its figures."""
        ...


async def keep_measuring(
    node: Counted,
    measured: Callable[[], object] = lambda: None,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> None:
    """Keep a node's figures current until cancelled.

    Args:
        node: the node.
        measured: called each time.
        sleep: waits some seconds.
    """
    while True:
        await node.figures.measure(node.engine)
        measured()
        await sleep(MEASURE_INTERVAL_S)
