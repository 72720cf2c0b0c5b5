"""The rules of an update log as tests that every implementation runs.

An implementation gives a :class:`Place`, where logs live across crashes, and subclasses
:class:`Contract` (one test a rule) and :class:`LogMachine` (random histories against a model).
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from crdt_llm.errors import LocalMisuse
from crdt_llm.store.log import Limits, Loaded, Status

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

    from crdt_llm.store.log import UpdateLog

Result = TypeVar("Result")

A = "conversation-a"
B = "conversation-b"
SMALL = Limits(
    conversation_bytes_max=20,
    update_bytes_max=100,
    snapshot_bytes_max=300,
    append_updates_max=5,
    append_bytes_max=200,
    commit_updates_max=8,
    commit_bytes_max=250,
    queued_bytes_max=300,
)


class Ticks:
    """A clock that moves when it is told to."""

    def __init__(self) -> None:
        self.now_ms = 1_000

    def __call__(self) -> int:
        return self.now_ms


class Place(ABC):
    """Where logs live. At most one of them is open at a time."""

    def __init__(self) -> None:
        self.clock = Ticks()

    @abstractmethod
    async def open(self, limits: Limits | None = None) -> UpdateLog:
        """Open what is durable here."""

    @abstractmethod
    async def crash(self, log: UpdateLog) -> None:
        """End the log as a killed process ends: nothing is finished, nothing is closed."""

    @abstractmethod
    async def crash_within(
        self, log: UpdateLog, operation: Callable[[], Awaitable[object]], seam: int
    ) -> None:
        """Begin the operation and crash at the ``seam``-th point where that makes a difference."""


class Contract:
    """One test per rule. Subclasses give a fixture ``place``."""

    async def test_an_unknown_conversation_is_empty(self, place: Place) -> None:
        log = await place.open()
        assert await log.load(A) == Loaded(None, 0, ())
        assert (await log.load(A)).lsn == 0
        assert await log.conversations() == ()
        await log.close()

    async def test_an_append_returns_the_lsn_of_its_last_update(self, place: Place) -> None:
        log = await place.open()
        assert await log.append(A, [b"one", b"two"]) == 2
        assert await log.append(A, [b"three"]) == 3
        assert await log.append(B, [b""]) == 1
        assert await log.load(A) == Loaded(None, 0, ((1, b"one"), (2, b"two"), (3, b"three")))
        assert await log.load(B) == Loaded(None, 0, ((1, b""),))
        await log.close()

    async def test_what_was_acknowledged_survives_a_crash(self, place: Place) -> None:
        log = await place.open()
        log_id = log.log_id
        await log.append(A, [b"one", b"two"])
        await log.compact(A, b"state at 1", 1)
        await log.append(A, [b"three"])
        await place.crash(log)
        log = await place.open()
        assert log.log_id == log_id
        assert await log.load(A) == Loaded(b"state at 1", 1, ((2, b"two"), (3, b"three")))
        assert await log.append(A, [b"four"]) == 4
        await log.close()

    async def test_concurrent_appends_to_one_conversation_keep_their_order(
        self, place: Place
    ) -> None:
        log = await place.open()
        names = [str(n).encode() for n in range(50)]
        lsns = await asyncio.gather(*(log.append(A, [name]) for name in names))
        assert lsns == list(range(1, 51))
        assert (await log.load(A)).updates == tuple(enumerate(names, 1))
        await log.close()

    async def test_appends_keep_their_order_also_behind_a_full_queue(self, place: Place) -> None:
        log = await place.open(SMALL)
        sizes = [90, 1, 90, 1, 1, 90, 90, 1, 60, 90, 2, 90, 90, 3, 90] * 3
        updates = [bytes([n]) * size for n, size in enumerate(sizes)]
        lsns = await asyncio.gather(*(log.append(A, [update]) for update in updates))
        assert lsns == list(range(1, len(sizes) + 1))
        assert (await log.load(A)).updates == tuple(enumerate(updates, 1))
        await log.close()

    async def test_a_buffer_that_changes_after_the_call_changes_nothing(self, place: Place) -> None:
        log = await place.open()
        buffer = bytearray(b"before")
        appending = asyncio.ensure_future(log.append(A, [cast("bytes", buffer)]))
        await asyncio.sleep(0)
        buffer[:] = b"after!"
        await appending
        assert (await log.load(A)).updates == ((1, b"before"),)
        await log.close()

    async def test_a_compaction_keeps_what_came_later(self, place: Place) -> None:
        log = await place.open()
        await log.append(A, [b"one", b"two", b"three"])
        await log.compact(A, b"state at 2", 2)
        assert await log.load(A) == Loaded(b"state at 2", 2, ((3, b"three"),))
        await log.compact(A, b"state at 3", 3)
        assert await log.load(A) == Loaded(b"state at 3", 3, ())
        assert (await log.load(A)).lsn == 3
        assert await log.append(A, [b"four"]) == 4
        await log.close()

    async def test_a_snapshot_may_be_replaced_at_the_same_lsn(self, place: Place) -> None:
        log = await place.open()
        await log.append(A, [b"one", b"two"])
        await log.compact(A, b"with a secret", 1)
        await log.compact(A, b"redacted", 1)
        assert await log.load(A) == Loaded(b"redacted", 1, ((2, b"two"),))
        await log.close()

    async def test_a_compaction_outside_the_log_is_misuse(self, place: Place) -> None:
        log = await place.open()
        with pytest.raises(LocalMisuse, match="no log"):
            await log.compact(A, b"state", 0)
        await log.append(A, [b"one", b"two", b"three"])
        with pytest.raises(LocalMisuse, match="beyond the log's end"):
            await log.compact(A, b"state", 4)
        with pytest.raises(LocalMisuse, match="older"):
            await log.compact(A, b"state", 0)
        await log.compact(A, b"state at 2", 2)
        with pytest.raises(LocalMisuse, match="older"):
            await log.compact(A, b"state at 1", 1)
        assert await log.load(A) == Loaded(b"state at 2", 2, ((3, b"three"),))
        assert log.status.healthy
        await log.close()

    async def test_conversations_are_listed_by_their_last_change(self, place: Place) -> None:
        log = await place.open()
        for now_ms, name in ((10, A), (20, B), (30, "c"), (40, A)):
            place.clock.now_ms = now_ms
            await log.append(name, [b"12345"])
        place.clock.now_ms = 50
        await log.compact("c", b"123", 1)
        listed = await log.conversations()
        assert [
            (one.conversation, one.lsn, one.log_bytes, one.snapshot_bytes, one.changed_at)
            for one in listed
        ] == [(A, 2, 10, 0, 40), ("c", 1, 0, 3, 30), (B, 1, 5, 0, 20)]
        assert all(one.damage is None for one in listed)
        await log.close()

    async def test_a_deleted_conversation_is_gone_and_its_lsns_are_never_reused(
        self, place: Place
    ) -> None:
        log = await place.open()
        await log.append(A, [b"a"])
        await log.append(B, [b"one", b"two"])
        await log.compact(B, b"state at 1", 1)
        await log.delete(B)
        await log.delete("never there")
        assert [one.conversation for one in await log.conversations()] == [A]
        await place.crash(log)
        log = await place.open()
        empty = await log.load(B)
        assert (empty.snapshot, empty.updates) == (None, ())
        # Not even the position of the end is the same: a peer that stood at 2 must notice.
        assert empty.lsn > 2
        assert await log.append(B, [b"new"]) == empty.lsn + 1
        assert (await log.load(B)).updates == ((empty.lsn + 1, b"new"),)
        # Nobody else's numbers are touched.
        assert await log.append(A, [b"a"]) == 2
        assert await log.append("new", [b"x"]) == 1
        await log.delete(B)
        assert (await log.load(B)).lsn > empty.lsn + 1
        await log.close()

    async def test_scrubbing_changes_nothing_that_can_be_loaded(self, place: Place) -> None:
        log = await place.open()
        await log.append(A, [b"one", b"two"])
        await log.compact(A, b"state", 1)
        await log.append(B, [b"x"])
        await log.delete(B)
        await log.scrub()
        assert await log.load(A) == Loaded(b"state", 1, ((2, b"two"),))
        assert await log.append(A, [b"three"]) == 3
        await log.close()

    async def test_a_cancelled_append_is_carried_out_whole(self, place: Place) -> None:
        log = await place.open()
        first = asyncio.ensure_future(log.append(A, [b"one", b"two"]))
        second = asyncio.ensure_future(log.append(A, [b"three"]))
        await asyncio.sleep(0)
        first.cancel()
        assert await second == 3
        assert first.cancelled()
        assert (await log.load(A)).updates == ((1, b"one"), (2, b"two"), (3, b"three"))
        await log.close()

    async def test_an_append_cancelled_before_the_queue_had_room_is_withdrawn_whole(
        self, place: Place
    ) -> None:
        log = await place.open(SMALL)
        appends = [asyncio.ensure_future(log.append(A, [bytes([n]) * 100])) for n in range(30)]
        await asyncio.sleep(0)
        for append in appends[10:]:
            append.cancel()
        results = await asyncio.gather(*appends, return_exceptions=True)
        assert results[:10] == list(range(1, 11))
        loaded = await log.load(A)
        assert loaded.updates[:10] == tuple((n + 1, bytes([n]) * 100) for n in range(10))
        # The queue holds five at most; the others had not been handed over.
        assert len(loaded.updates) <= 15
        assert await log.append(A, [b"and room again"]) == loaded.lsn + 1
        await log.close()

    async def test_a_cancelled_compaction_is_carried_out_whole(self, place: Place) -> None:
        log = await place.open()
        await log.append(A, [b"one", b"two"])
        compaction = asyncio.ensure_future(log.compact(A, b"state at 1", 1))
        await asyncio.sleep(0)
        compaction.cancel()
        assert await log.append(A, [b"three"]) == 3
        assert compaction.cancelled()
        assert await log.load(A) == Loaded(b"state at 1", 1, ((2, b"two"), (3, b"three")))
        await log.close()

    async def test_a_full_queue_lets_everybody_through_in_the_end(self, place: Place) -> None:
        log = await place.open(SMALL)
        await log.append(A, [b"x"])
        await asyncio.gather(
            *(log.append(A, [bytes(100), bytes(100)]) for _ in range(10)),
            *(log.compact(A, bytes(300), 1) for _ in range(10)),
            *(log.append(B, [bytes(100), bytes(100)]) for _ in range(10)),
        )
        assert ((await log.load(A)).lsn, (await log.load(B)).lsn) == (21, 20)
        await log.close()

    @pytest.mark.parametrize(
        ("updates", "match"),
        [
            ([], "1 to 5 updates, not 0"),
            ([b""] * 6, "1 to 5 updates, not 6"),
            ([bytes(101)], "at most 100 bytes, not 101"),
            ([bytes(70)] * 3, "at most 200 bytes, not 210"),
        ],
    )
    async def test_an_append_over_a_limit_is_misuse(
        self, place: Place, updates: list[bytes], match: str
    ) -> None:
        log = await place.open(SMALL)
        with pytest.raises(LocalMisuse, match=match):
            await log.append(A, updates)
        assert await log.append(A, [bytes(100), bytes(100)]) == 2
        await log.close()

    @pytest.mark.parametrize("name", ["", "x" * 21, "ü" * 11, "\ud800"])
    async def test_a_name_that_cannot_be_one_is_misuse(self, place: Place, name: str) -> None:
        log = await place.open(SMALL)
        with pytest.raises(LocalMisuse, match="name"):
            await log.append(name, [b"x"])
        with pytest.raises(LocalMisuse, match="name"):
            await log.load(name)
        with pytest.raises(LocalMisuse, match="name"):
            await log.compact(name, b"", 0)
        with pytest.raises(LocalMisuse, match="name"):
            await log.delete(name)
        await log.close()

    async def test_a_snapshot_over_its_limit_is_misuse(self, place: Place) -> None:
        log = await place.open(SMALL)
        await log.append(A, [b"x"])
        with pytest.raises(LocalMisuse, match="at most 300 bytes, not 301"):
            await log.compact(A, bytes(301), 1)
        await log.compact(A, bytes(300), 1)
        await log.close()

    async def test_closing_finishes_what_was_handed_over(self, place: Place) -> None:
        log = await place.open()
        appends = [asyncio.ensure_future(log.append(A, [b"x"])) for _ in range(20)]
        await asyncio.sleep(0)
        await log.close()
        assert await asyncio.gather(*appends) == list(range(1, 21))
        await log.close()
        with pytest.raises(LocalMisuse, match="closed"):
            await log.append(A, [b"x"])
        with pytest.raises(LocalMisuse, match="closed"):
            await log.load(A)
        log = await place.open()
        assert (await log.load(A)).lsn == 20
        await log.close()

    async def test_a_probe_changes_nothing(self, place: Place) -> None:
        log = await place.open()
        await log.append(A, [b"x"])
        assert log.status == await log.probe() == Status()
        assert await log.load(A) == Loaded(None, 0, ((1, b"x"),))
        await log.close()


@dataclass
class Model:
    """What the log should hold of one conversation."""

    snapshot: bytes | None = None
    snapshot_lsn: int = 0
    updates: list[bytes] = field(default_factory=list)

    @property
    def lsn(self) -> int:
        return self.snapshot_lsn + len(self.updates)

    def loaded(self) -> Loaded:
        return Loaded(
            self.snapshot,
            self.snapshot_lsn,
            tuple(enumerate(self.updates, self.snapshot_lsn + 1)),
        )

    def compacted(self, snapshot: bytes, through: int) -> Model:
        return Model(snapshot, through, self.updates[through - self.snapshot_lsn :])


names = st.sampled_from(["a", "b", "ä\0c"])
# Some that fit into a page of a database and some that do not.
payloads = st.binary(max_size=9) | st.builds(bytes, st.integers(2_000, 9_000))
batches = st.lists(payloads, min_size=1, max_size=3)
seams = st.integers(0, 6)


class LogMachine(RuleBasedStateMachine):
    """Random histories with restarts and crashes. Subclasses say where their logs live."""

    make_place: ClassVar[Callable[[], Place]]

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.place = type(self).make_place()
        self.log = self.run(self.place.open())
        self.log_id = self.log.log_id
        self.models: dict[str, Model] = {}
        self.greatest: dict[str, int] = {}

    def run(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        return self.runner.run(coroutine)

    def teardown(self) -> None:
        self.run(self.log.close())
        self.runner.close()

    def appended(self, name: str, updates: list[bytes], lsn: int) -> None:
        """Note an append that is durable."""
        model = self.models.get(name)
        first = lsn - len(updates) + 1
        if model is None:
            assert first > self.greatest.get(name, 0), "an LSN was given out twice"
            model = self.models[name] = Model(snapshot_lsn=first - 1)
        assert first == model.lsn + 1, "LSNs of one conversation have a gap"
        model.updates += updates
        self.greatest[name] = lsn

    @rule(name=names, updates=batches)
    def append(self, name: str, updates: list[bytes]) -> None:
        self.appended(name, updates, self.run(self.log.append(name, updates)))

    @rule(requests=st.lists(st.tuples(names, batches), min_size=2, max_size=6))
    def append_at_once(self, requests: list[tuple[str, list[bytes]]]) -> None:
        async def all_of_them() -> list[int]:
            return await asyncio.gather(*(self.log.append(*request) for request in requests))

        for (name, updates), lsn in zip(requests, self.run(all_of_them()), strict=True):
            self.appended(name, updates, lsn)

    @rule(name=names, snapshot=payloads, back=st.integers(0, 3))
    def compact(self, name: str, snapshot: bytes, back: int) -> None:
        model = self.models.get(name)
        if model is None:
            with pytest.raises(LocalMisuse):
                self.run(self.log.compact(name, snapshot, 1))
            return
        through = model.lsn - back
        if through < model.snapshot_lsn or (
            through == model.snapshot_lsn and model.snapshot is None
        ):
            with pytest.raises(LocalMisuse):
                self.run(self.log.compact(name, snapshot, through))
            return
        self.run(self.log.compact(name, snapshot, through))
        self.models[name] = model.compacted(snapshot, through)

    @rule(name=names)
    def delete(self, name: str) -> None:
        self.run(self.log.delete(name))
        self.models.pop(name, None)

    @rule()
    def scrub(self) -> None:
        self.run(self.log.scrub())

    @rule()
    def restart(self) -> None:
        self.run(self.log.close())
        self.log = self.run(self.place.open())

    @rule()
    def crash(self) -> None:
        self.run(self.place.crash(self.log))
        self.log = self.run(self.place.open())

    @rule(name=names, updates=batches, seam=seams)
    def crash_within_an_append(self, name: str, updates: list[bytes], seam: int) -> None:
        before = self.run(self.log.load(name))
        self.crash_within(lambda: self.log.append(name, updates), seam)
        after = self.run(self.log.load(name))
        if after != before:
            self.appended(name, updates, after.lsn)

    @rule(name=names, snapshot=payloads, seam=seams)
    def crash_within_a_compaction(self, name: str, snapshot: bytes, seam: int) -> None:
        model = self.models.get(name)
        if model is None or model.lsn == 0:
            return
        self.crash_within(lambda: self.log.compact(name, snapshot, model.lsn), seam)
        if self.run(self.log.load(name)) != model.loaded():
            self.models[name] = model.compacted(snapshot, model.lsn)

    @rule(name=names, seam=seams)
    def crash_within_a_deletion(self, name: str, seam: int) -> None:
        self.crash_within(lambda: self.log.delete(name), seam)
        after = self.run(self.log.load(name))
        if after.snapshot is None and not after.updates:
            self.models.pop(name, None)

    def crash_within(self, operation: Callable[[], Awaitable[object]], seam: int) -> None:
        self.run(self.place.crash_within(self.log, operation, seam))
        self.log = self.run(self.place.open())

    @invariant()
    def it_holds_what_the_model_holds(self) -> None:
        assert self.log.log_id == self.log_id
        for name, model in self.models.items():
            assert self.run(self.log.load(name)) == model.loaded()
        listed = self.run(self.log.conversations())
        assert {one.conversation: (one.lsn, one.log_bytes) for one in listed} == {
            name: (model.lsn, sum(map(len, model.updates))) for name, model in self.models.items()
        }
