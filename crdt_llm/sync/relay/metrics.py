"""What a relay counts, for Prometheus.

This module owns the names and the registry, and it is the one doorway of ``prometheus_client``. It
must not know sockets, rooms or documents. No label says who somebody is, which conversation it was,
or what was written: whoever may read the counters may not therefore read along.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector

from crdt_llm.sync.wire.verdict import Committed, Denied, Known, Lacking, Postponed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from prometheus_client.core import Metric

    from crdt_llm.store.log import Loaded, Status, Stored, UpdateLog
    from crdt_llm.sync.wire.verdict import Verdict

Dialect: TypeAlias = Literal["plain", "native"]

CONTENT_TYPE: Final = CONTENT_TYPE_PLAIN_0_0_4
"""Of what :meth:`Metrics.render` gives."""

_COMMIT_BUCKETS_S: Final = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
"""A commit takes a millisecond on a usual disk; what is above a second keeps people waiting."""

_VERDICTS: Final = {
    Committed: "committed",
    Known: "known",
    Lacking: "gap",
    Denied: "refused",
    Postponed: "postponed",
}


class Metrics:
    """The counters of one relay.

    Args:
        registry: Where they are registered; one of its own by default.
        rooms: How many rooms are open.
    """

    def __init__(
        self,
        registry: CollectorRegistry | None = None,
        *,
        rooms: Callable[[], int] = lambda: 0,
    ) -> None:
        self._registry = CollectorRegistry() if registry is None else registry
        self._connections = Gauge(
            "crdt_llm_connections",
            "Open websockets.",
            ["dialect"],
            registry=self._registry,
        )
        self._updates = Counter(
            "crdt_llm_updates",
            "Updates of peers, by what became of them.",
            ["dialect", "verdict"],
            registry=self._registry,
        )
        self._refusals = Counter(
            "crdt_llm_refusals",
            "Updates, channels and connections that were refused, by code.",
            ["code"],
            registry=self._registry,
        )
        self._resyncs = Counter(
            "crdt_llm_resyncs",
            "Readers who got everything at once, for they were slow or lacked something.",
            ["dialect"],
            registry=self._registry,
        )
        self._bytes = Counter(
            "crdt_llm_frame_bytes",
            "Bytes of websocket messages.",
            ["direction"],
            registry=self._registry,
        )
        self._received = self._bytes.labels("in")
        self._sent = self._bytes.labels("out")
        self._commits = Histogram(
            "crdt_llm_commit_seconds",
            "From an append to its durability.",
            buckets=_COMMIT_BUCKETS_S,
            registry=self._registry,
        )
        Gauge("crdt_llm_rooms", "Conversations in memory.", registry=self._registry).set_function(
            lambda: float(rooms())
        )

    def show(
        self, name: str, documentation: str, read: Callable[[], float], *, grows: bool = False
    ) -> None:
        """Show a number of somebody else's, such as a node in this process.

        Args:
            name: What it is called, without ``crdt_llm_``; of what only grows, without ``_total``.
            documentation: One line.
            read: Its value now. It has no labels: a number says nothing about who.
            grows: Whether it only grows, from 0, while this process lives.
        """
        self._registry.register(_Shown(f"crdt_llm_{name}", documentation, read, grows=grows))

    def opened(self, dialect: Dialect) -> None:
        """A connection is there."""
        self._connections.labels(dialect).inc()

    def closed(self, dialect: Dialect) -> None:
        """It is gone."""
        self._connections.labels(dialect).dec()

    def judged(self, dialect: Dialect, verdict: Verdict) -> None:
        """An update has a verdict."""
        self._updates.labels(dialect, _VERDICTS[type(verdict)]).inc()

    def refused(self, code: str) -> None:
        """Something was refused; ``code`` is one of a fixed set."""
        self._refusals.labels(code).inc()

    def resynced(self, dialect: Dialect) -> None:
        """A reader is owed everything that it lacks."""
        self._resyncs.labels(dialect).inc()

    def received(self, size: int) -> None:
        """So many bytes came."""
        self._received.inc(size)

    def sent(self, size: int) -> None:
        """So many bytes went."""
        self._sent.inc(size)

    def committed(self, seconds: float) -> None:
        """A commit took so long."""
        self._commits.observe(seconds)

    def render(self) -> bytes:
        """All of it, in Prometheus' text format."""
        rendered: bytes = generate_latest(self._registry)
        return rendered


class _Shown(Collector):
    """A number that is read when it is asked for."""

    def __init__(
        self, name: str, documentation: str, read: Callable[[], float], *, grows: bool
    ) -> None:
        self._family = CounterMetricFamily if grows else GaugeMetricFamily
        self._name = name
        self._documentation = documentation
        self._read = read

    def collect(self) -> Iterable[Metric]:
        yield self._family(self._name, self._documentation, value=float(self._read()))


class MeasuredLog:
    """A log whose commits are measured.

    Args:
        log: The log.
        observe: Called with the seconds of every append that became durable.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        log: UpdateLog,
        observe: Callable[[float], None],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._log = log
        self._observe = observe
        self._clock = clock

    @property
    def log_id(self) -> str:
        """See :class:`~crdt_llm.store.log.UpdateLog`."""
        return self._log.log_id

    @property
    def status(self) -> Status:
        """See :class:`~crdt_llm.store.log.UpdateLog`."""
        return self._log.status

    async def append(self, conversation: str, updates: Sequence[bytes]) -> int:
        """See :class:`~crdt_llm.store.log.UpdateLog`."""
        began = self._clock()
        lsn = await self._log.append(conversation, updates)
        self._observe(self._clock() - began)
        return lsn

    async def load(self, conversation: str) -> Loaded:
        """See :class:`~crdt_llm.store.log.UpdateLog`."""
        return await self._log.load(conversation)

    async def compact(self, conversation: str, snapshot: bytes, through: int) -> None:
        """See :class:`~crdt_llm.store.log.UpdateLog`."""
        await self._log.compact(conversation, snapshot, through)

    async def conversations(self) -> tuple[Stored, ...]:
        """See :class:`~crdt_llm.store.log.UpdateLog`."""
        return await self._log.conversations()

    async def delete(self, conversation: str) -> None:
        """See :class:`~crdt_llm.store.log.UpdateLog`."""
        await self._log.delete(conversation)

    async def scrub(self) -> None:
        """See :class:`~crdt_llm.store.log.UpdateLog`."""
        await self._log.scrub()

    async def probe(self) -> Status:
        """See :class:`~crdt_llm.store.log.UpdateLog`."""
        return await self._log.probe()

    async def close(self) -> None:
        """See :class:`~crdt_llm.store.log.UpdateLog`."""
        await self._log.close()
