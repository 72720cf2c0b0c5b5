"""A replica and its log: what is durable when, in which order, and what a failing disk leaves."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from copy import deepcopy
from random import Random
from typing import TYPE_CHECKING

import pytest

from crdt_llm.document.conversation import Conversation
from crdt_llm.document.schema import Born, Role, entry_id
from crdt_llm.errors import Corrupt, LocalMisuse, MalformedMessage, StoreFailed
from crdt_llm.store.memory import MemoryDisk, MemoryLog
from crdt_llm.sync.client import local_replica
from crdt_llm.sync.client.intents import entries_of
from crdt_llm.sync.client.journal import Kept, decode
from crdt_llm.sync.client.local_replica import COMPACT_BYTES_MIN, LocalReplica
from crdt_llm.sync.wire.y_websocket import decode_state_vector

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from crdt_llm.document.conversation import Change, Writer
    from crdt_llm.store.log import Loaded
    from crdt_llm.store.memory import MemorySeam
    from crdt_llm.sync.client.local_replica import Written

    Task = asyncio.Task[None]

NAME = "conversation"


class Disk:
    """A disk that can be held up, and can fail at once or after some commits."""

    def __init__(self) -> None:
        self.disk = MemoryDisk("disk")
        self.commits = 0
        self.failing = False
        self.good_commits_left: int | None = None
        self.released = asyncio.Event()
        self.released.set()
        self.reached = asyncio.Event()

    async def seam(self, seam: MemorySeam) -> None:
        if seam == "before-commit":
            self.reached.set()
            await self.released.wait()
            if self.good_commits_left is not None:
                self.failing = self.good_commits_left == 0
                self.good_commits_left -= 1
            if self.failing:
                raise StoreFailed("the disk is full")
        else:
            self.commits += 1

    def hold(self) -> None:
        self.released.clear()
        self.reached.clear()

    @property
    def updates(self) -> tuple[bytes, ...]:
        stored = self.disk.conversations.get(NAME)
        return () if stored is None else stored.updates

    def kept(self) -> Kept:
        """What a restart after a crash at this moment would find."""
        kept = Kept()
        stored = self.disk.conversations.get(NAME)
        if stored is not None:
            snapshots = () if stored.snapshot is None else (stored.snapshot,)
            for record in (*snapshots, *stored.updates):
                kept.take(decode(record))
        return kept

    def document(self) -> Conversation:
        """The document in it."""
        document = Conversation(99)
        for update in self.kept().updates:
            document.apply(update)
        return document


@asynccontextmanager
async def replica_on(disk: Disk, seed: int = 1) -> AsyncIterator[LocalReplica]:
    log = MemoryLog(disk.disk, clock=lambda: 0, faults=disk.seam)
    replica = await LocalReplica.open(NAME, log, Random(seed))
    try:
        yield replica
    finally:
        disk.released.set()
        await replica.close()
        await log.close()


def clocks(document: Conversation) -> dict[int, int]:
    """A state vector without the order of its bytes."""
    return decode_state_vector(document.state_vector())


def entry(number: int) -> str:
    return entry_id(number, bytes(10))


def adds(number: int, text: str = "text") -> Callable[[Conversation, Writer], None]:
    def compose(document: Conversation, writer: Writer) -> None:
        born = Born(Role.USER, "owner", "laptop", 0, document.tree.clock + 1)
        writer.add(entry(number), born, text)

    return compose


class Elsewhere:
    """Another replica; each of its writes is an update to merge."""

    def __init__(self, client: int = 1_000) -> None:
        self.document = Conversation(client)

    def write(self, number: int, text: str = "from elsewhere") -> bytes:
        with self.document.writing() as writer:
            adds(number, text)(self.document, writer)
        assert writer.change is not None
        return writer.change.update


async def test_a_write_returns_when_it_is_on_disk_and_goes_out_meanwhile() -> None:
    disk = Disk()
    async with replica_on(disk) as replica:
        heard: list[tuple[frozenset[str] | None, int]] = []
        replica.on_outbox(lambda entries: heard.append((entries, len(disk.updates))))
        sendable: list[Written | None] = []
        replica.on_write(lambda: sendable.append(replica.next_to_send(0)))
        disk.hold()
        writing = asyncio.create_task(replica.write(adds(1)))
        await disk.reached.wait()
        assert entry(1) in replica.document.tree  # shown at once
        assert (writing.done(), heard, disk.updates) == (False, [], ())
        (written,) = sendable
        assert written is not None
        assert (written.number, written.durable) == (1, False)
        disk.released.set()
        await writing
        assert heard == [(frozenset({entry(1)}), 1)]
        assert written.durable
        assert disk.kept().outbox == {written.number: written.update}
        assert replica.next_to_send(written.number) is None


@asynccontextmanager
async def sent_to_a_disk_that_fails(disk: Disk) -> AsyncIterator[tuple[LocalReplica, Task, bytes]]:
    """A replica of which a write was sent; its disk did not take that, and its call waits."""
    async with replica_on(disk) as replica:
        await replica.write(adds(1))
        replica.acknowledge([1])
        replica.settle("log", 7)
        disk.failing = True
        writing = asyncio.create_task(replica.write(adds(2)))
        await asyncio.sleep(0)
        written = replica.next_to_send(0)
        assert written is not None
        await replica.merge(Elsewhere().write(3), 9)  # the relay says: all up to there is here
        with pytest.raises(StoreFailed):
            await replica.write(adds(9))  # which was not sent: it never happened
        assert not writing.done()
        yield replica, writing, written.update


async def test_what_the_relay_took_and_the_disk_did_not_has_happened() -> None:
    disk = Disk()
    async with sent_to_a_disk_that_fails(disk) as (replica, writing, _):
        client = replica.document.client_id
        replica.acknowledge([2])
        await writing
        assert replica.document.client_id == client
        replica.part()
        assert set(replica.document.tree.entries) == {entry(1), entry(2), entry(3)}
        disk.failing = False
        await replica.write(adds(4))
        everything = {entry(1), entry(2), entry(3), entry(4)}
        assert set(disk.document().tree.entries) == everything
        assert (disk.kept().log, disk.kept().lsn) == ("log", 9)
        assert numbers(replica) == [4]


async def test_what_was_sent_without_an_answer_and_is_not_on_disk_is_asked_for_again() -> None:
    disk = Disk()
    async with sent_to_a_disk_that_fails(disk) as (replica, writing, update):
        client = replica.document.client_id
        replica.part()
        with pytest.raises(StoreFailed, match="full"):
            await writing
        assert set(replica.document.tree.entries) == {entry(1), entry(3)}
        assert replica.document.client_id != client
        assert replica.position[0] is None  # or the relay would take it for known here
        disk.failing = False
        assert await replica.merge(update, 8) is None  # it took it after all
        await replica.write(adds(4))
        assert set(disk.document().tree.entries) == {entry(1), entry(2), entry(3), entry(4)}
        assert disk.kept().log is None


async def test_what_was_sent_is_not_lost_by_a_disk_that_fails_behind_the_connection() -> None:
    disk = Disk()
    async with replica_on(disk) as replica:
        replica.settle("log", 7)
        disk.hold()
        writing = asyncio.create_task(replica.write(adds(1)))
        await disk.reached.wait()
        assert replica.next_to_send(0) is not None
        replica.part()
        disk.failing = True
        disk.released.set()
        with pytest.raises(StoreFailed):
            await writing
        assert replica.position[0] is None
        assert not replica.document.tree.entries


async def test_closing_waits_for_no_answer() -> None:
    disk = Disk()
    async with sent_to_a_disk_that_fails(disk) as (replica, writing, _):
        await replica.close()
        with pytest.raises(StoreFailed):
            await writing


async def test_what_was_sent_and_refused_and_is_not_on_disk_never_happened() -> None:
    disk = Disk()
    async with sent_to_a_disk_that_fails(disk) as (replica, writing, _):
        await replica.refuse([2], "invalid", "content", "no")
        with pytest.raises(StoreFailed):
            await writing
        assert set(replica.document.tree.entries) == {entry(1), entry(3)}
        assert replica.refused_writes == ()  # its caller was told that it is nowhere
        disk.failing = False
        await replica.write(adds(4))
        assert set(disk.document().tree.entries) == {entry(1), entry(3), entry(4)}
        assert disk.kept().refused == {}
        assert replica.refused_writes == ()


async def test_what_was_sent_and_refused_is_a_draft_if_the_disk_takes_it_then() -> None:
    disk = Disk()
    async with sent_to_a_disk_that_fails(disk) as (replica, writing, _):
        disk.failing = False
        await replica.refuse([2], "invalid", "content", "no")
        await writing
        assert [one.entry for one in disk.kept().refused.values()] == [entry(2)]
        assert [one.entry for one in replica.refused_writes] == [entry(2)]
        assert set(disk.document().tree.entries) == {entry(1), entry(3)}


async def test_of_what_was_sent_as_one_and_refused_nothing_lives_that_is_not_on_disk() -> None:
    disk = Disk()
    async with sent_to_a_disk_that_fails(disk) as (replica, writing, _):
        late = asyncio.create_task(replica.write(adds(4)))
        await asyncio.sleep(0)
        _, sent = await replica.diff()
        assert len(sent) == 2
        await replica.refuse(sent, "invalid", "content", "one of them")
        for call in (writing, late):
            with pytest.raises(StoreFailed):
                await call
        assert replica.outbox == ()
        disk.failing = False
        await replica.write(adds(5))
        assert set(replica.document.tree.entries) == {entry(1), entry(3), entry(5)}
        assert set(disk.document().tree.entries) == {entry(1), entry(3), entry(5)}
        assert replica.refused_writes == ()


@pytest.mark.parametrize("fails", [False, True])
async def test_two_refusals_before_the_disk_has_either_write(*, fails: bool) -> None:
    disk = Disk()
    async with replica_on(disk) as replica:
        disk.hold()
        first = asyncio.create_task(replica.write(adds(1)))
        await disk.reached.wait()
        late = [asyncio.create_task(replica.write(adds(n, f"text {n}"))) for n in (2, 3)]
        await asyncio.sleep(0)
        # The disk's turn comes after both. The first again is the fourth, the draft the fifth, and
        # the third again the sixth.
        refusals = [
            asyncio.create_task(replica.refuse([number], "invalid", "content", "no"))
            for number in (2, 6)
        ]
        await asyncio.sleep(0)
        disk.good_commits_left = 1 if fails else None
        disk.released.set()
        await asyncio.gather(first, *refusals)
        results = await asyncio.gather(*late, return_exceptions=True)
        assert [isinstance(one, StoreFailed) for one in results] == [fails, fails]
        texts = [] if fails else ["text 2", "text 3"]
        disk.good_commits_left, disk.failing = None, False
        await replica.write(adds(4))
        assert [one.text for one in replica.refused_writes] == texts
        assert [one.text for one in disk.kept().refused.values()] == texts
        assert set(disk.document().tree.entries) == {entry(1), entry(4)}


async def test_a_kill_between_sending_and_saving_leaves_nothing_twice() -> None:
    disk = Disk()
    async with replica_on(disk) as replica:
        replica.settle("log", 7)
        await replica.write(adds(1))
        disk.hold()
        writing = asyncio.create_task(replica.write(adds(2)))
        await disk.reached.wait()
        written = replica.next_to_send(1)
        assert written is not None
        killed = deepcopy(disk.disk)
        client = replica.document.client_id
        disk.released.set()
        await writing
    found = Disk()
    found.disk = killed
    async with replica_on(found, seed=2) as replica:
        assert set(replica.document.tree.entries) == {entry(1)}
        assert replica.position == ("log", 7)  # and from there the relay goes on
        assert replica.document.client_id != client
        (outbox,) = replica.outbox
        assert await replica.merge(outbox.update, 8) is None
        assert await replica.merge(written.update, 9) is None
        await replica.write(adds(3))
        assert set(found.document().tree.entries) == {entry(1), entry(2), entry(3)}
        assert numbers(replica) == [2]


async def test_what_is_written_again_after_a_refusal_waits_for_the_disk() -> None:
    disk = Disk()
    async with replica_on(disk) as replica:
        await replica.write(adds(1))
        await replica.write(adds(2))
        disk.hold()
        await replica.refuse([1], "invalid", "content", "no")
        writing = asyncio.create_task(replica.write(adds(3)))
        asking = asyncio.create_task(replica.diff())
        await disk.reached.wait()
        # A log that still has the second in its first form would have it written once more.
        assert replica.next_to_send(0) is None
        assert not asking.done()
        disk.released.set()
        await writing
        assert (await asking)[1] == tuple(numbers(replica))
        again = replica.next_to_send(0)
        assert again is not None
        assert disk.kept().outbox[again.number] == again.update


async def test_what_is_written_again_goes_out_though_the_disk_failed_and_nothing_follows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(local_replica, "RETRY_S", 0.0)
    disk = Disk()
    async with replica_on(disk) as replica:
        await replica.write(adds(1))
        await replica.write(adds(2))
        disk.good_commits_left = 0  # the next one fails, and no other
        await replica.refuse([1], "invalid", "content", "no")
        _, sent = await replica.diff()  # which waits for the disk
        assert disk.good_commits_left < 0
        assert list(disk.kept().outbox) == list(sent) == numbers(replica)
        assert set(disk.document().tree.entries) == {entry(2)}


async def test_what_was_merged_goes_to_disk_before_a_write_that_may_build_on_it() -> None:
    disk, elsewhere = Disk(), Elsewhere()
    async with replica_on(disk) as replica:
        assert await replica.merge(elsewhere.write(1)) is None
        assert not disk.updates  # it waits for company
        await replica.write(lambda _, writer: writer.set(entry(1), "stop", "owner"))
        assert len(disk.updates) == 2
        assert disk.document().has(entry(1), "stop")


async def test_merged_updates_share_commits() -> None:
    disk, elsewhere = Disk(), Elsewhere()
    async with replica_on(disk) as replica:
        for number in range(1, 50):
            await replica.merge(elsewhere.write(number))
            await asyncio.sleep(0)
        disk.hold()
        await disk.reached.wait()  # the window has passed
        disk.released.set()
    assert len(disk.updates) == 49
    assert disk.commits == 1
    assert clocks(disk.document()) == clocks(elsewhere.document)


async def test_closing_saves_what_waits() -> None:
    disk, elsewhere = Disk(), Elsewhere()
    async with replica_on(disk) as replica:
        await replica.merge(elsewhere.write(1))
    assert entry(1) in disk.document().tree
    with pytest.raises(LocalMisuse, match="closed"):
        await replica.write(adds(2))
    with pytest.raises(LocalMisuse, match="closed"):
        await replica.merge(elsewhere.write(3))


async def test_an_update_with_a_gap_is_not_merged() -> None:
    disk, elsewhere = Disk(), Elsewhere()
    first, second = elsewhere.write(1), elsewhere.write(2)
    async with replica_on(disk) as replica:
        assert await replica.merge(second) is not None
        assert replica.is_empty
        assert await replica.merge(first) is None
        assert await replica.merge(second) is None
        assert await replica.merge(second) is None  # known already
        assert clocks(replica.document) == clocks(elsewhere.document)
    assert len(disk.updates) == 2


async def test_garbage_is_refused_and_changes_nothing() -> None:
    disk = Disk()
    async with replica_on(disk) as replica:
        await replica.write(adds(1))
        before = clocks(replica.document)
        with pytest.raises(MalformedMessage):
            await replica.merge(b"\x01\x01\x01\x01\x01")
        assert clocks(replica.document) == before


async def test_a_write_that_the_disk_refuses_never_happened() -> None:
    disk, elsewhere = Disk(), Elsewhere()
    changes: list[Change | None] = []
    async with replica_on(disk) as replica:
        replica.on_change(changes.append)
        await replica.write(adds(1))
        await replica.merge(elsewhere.write(2))
        client = replica.document.client_id
        disk.failing = True
        results = await asyncio.gather(
            replica.write(adds(3)), replica.write(adds(4)), return_exceptions=True
        )
        assert [type(result) for result in results] == [StoreFailed, StoreFailed]
        assert set(replica.document.tree.entries) == {entry(1), entry(2)}  # merged ones stay
        assert changes[-1] is None  # listeners are told to read anew
        assert replica.document.client_id != client  # its clocks 3 and 4 must never come twice
        disk.failing = False
        await replica.write(adds(5))
        assert set(disk.document().tree.entries) == {entry(1), entry(2), entry(5)}
        assert len(replica.outbox) == 2


async def test_a_disk_that_stays_broken_is_said_every_time_and_heals() -> None:
    disk = Disk()
    async with replica_on(disk) as replica:
        disk.failing = True
        for number in (1, 2):
            with pytest.raises(StoreFailed, match="full"):
                await replica.write(adds(number))
        disk.failing = False
        await replica.write(adds(3))
        assert set(replica.document.tree.entries) == {entry(3)}


async def test_too_much_that_waits_for_a_slow_disk_holds_up_the_merge(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(local_replica, "WAITING_BYTES_MAX", 100)
    disk, elsewhere = Disk(), Elsewhere()
    async with replica_on(disk) as replica:
        disk.hold()
        merging = asyncio.create_task(replica.merge(elsewhere.write(1, "x" * 200)))
        await disk.reached.wait()
        assert not merging.done()
        disk.failing = True
        disk.released.set()
        with pytest.raises(StoreFailed):
            await merging
        assert entry(1) in replica.document.tree  # it is here, and waits for another try
        disk.failing = False
        await replica.merge(elsewhere.write(2, "x" * 200))
        assert set(disk.document().tree.entries) == {entry(1), entry(2)}


async def cancelled_write(replica: LocalReplica, disk: Disk) -> None:
    """Give a write up while the disk is at it, which waits to be released."""
    disk.hold()
    writing = asyncio.create_task(replica.write(adds(1)))
    await disk.reached.wait()
    writing.cancel()
    await asyncio.wait({writing})


async def test_a_cancelled_writer_leaves_the_write_whole() -> None:
    disk = Disk()
    async with replica_on(disk) as replica:
        await cancelled_write(replica, disk)
        disk.released.set()
        await replica.write(adds(2))
        assert len(replica.outbox) == 2
        assert set(disk.document().tree.entries) == {entry(1), entry(2)}


async def test_a_cancelled_writer_and_a_failing_disk_complain_to_nobody() -> None:
    disk = Disk()
    async with replica_on(disk) as replica:
        await cancelled_write(replica, disk)
        disk.failing = True
        disk.released.set()
        with pytest.raises(StoreFailed):
            await replica.write(adds(2))
        assert replica.is_empty


async def test_a_write_that_raises_half_way_leaves_no_half() -> None:
    disk = Disk()
    async with replica_on(disk) as replica:
        await replica.write(adds(1))

        def compose(document: Conversation, writer: Writer) -> None:
            adds(2)(document, writer)
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await replica.write(compose)
        assert set(replica.document.tree.entries) == {entry(1)}
        await replica.write(adds(3))
        assert set(disk.document().tree.entries) == {entry(1), entry(3)}


async def test_a_restart_finds_everything_and_takes_a_fresh_client_id() -> None:
    disk, clients = Disk(), set()
    for number in range(1, 6):
        async with replica_on(disk) as replica:  # the same seed draws the same ids
            clients.add(replica.document.client_id)
            await replica.write(adds(number))
            assert set(replica.document.tree.entries) == {entry(n) for n in range(1, number + 1)}
    assert len(clients) == 5


async def test_a_client_id_that_was_drawn_once_is_never_taken_again() -> None:
    class Repetitive(Random):
        drawn = iter((5, 5, 5, 6, 6, 7, 7))

        def randint(self, _low: int, _high: int) -> int:
            return next(self.drawn)

    disk = Disk()
    log = MemoryLog(disk.disk, clock=lambda: 0, faults=disk.seam)
    replica = await LocalReplica.open(NAME, log, Repetitive())
    assert replica.document.client_id == 6  # 5 was drawn for the empty one before
    disk.failing = True
    with pytest.raises(StoreFailed):
        await replica.write(adds(1))
    assert replica.document.client_id == 7
    await replica.close()


async def test_the_log_stays_bounded_relative_to_the_document() -> None:
    disk = Disk()
    text = "x" * 1_000
    async with replica_on(disk) as replica:
        for number in range(1, 500):
            await replica.write(adds(number, text))
            stored = disk.disk.conversations[NAME]
            snapshot = len(stored.snapshot or b"")
            log = sum(len(update) for update in stored.updates)
            assert log <= max(COMPACT_BYTES_MIN, snapshot) + 2 * len(text)
    assert set(disk.document().tree.entries) == {entry(n) for n in range(1, 500)}
    async with replica_on(disk) as replica:
        assert len(replica.document.tree) == 499


async def test_a_snapshot_never_holds_a_write_that_is_not_on_disk() -> None:
    disk = Disk()
    async with replica_on(disk) as replica:
        # The second write comes while the first, which makes the log due, is being committed.
        disk.hold()
        first = asyncio.create_task(replica.write(adds(1, "x" * COMPACT_BYTES_MIN)))
        await disk.reached.wait()
        second = asyncio.create_task(replica.write(adds(2)))
        await asyncio.sleep(0)
        assert entry(2) in replica.document.tree
        disk.good_commits_left = 1
        disk.released.set()
        await first
        with pytest.raises(StoreFailed):
            await second
        assert set(disk.document().tree.entries) == {entry(1)}


async def test_withdrawn_text_leaves_the_disk() -> None:
    disk, elsewhere = Disk(), Elsewhere()
    async with replica_on(disk) as replica:
        await replica.merge(elsewhere.write(1, "a secret"))
        await replica.write(adds(2))
        assert any(b"a secret" in update for update in disk.updates)
        fields = elsewhere.document._roots["entries"][entry(1)]
        with elsewhere.document.writing() as writer:
            writer.set(entry(1), "redacted", {"by": "owner", "at": 1})
            del fields["content"]
        assert writer.change is not None
        await replica.merge(writer.change.update)
    stored = disk.disk.conversations[NAME]
    assert not stored.updates
    assert stored.snapshot is not None
    assert b"a secret" not in stored.snapshot


class ScrubbedLog(MemoryLog):
    """A log that counts how often it was scrubbed."""

    scrubs = 0

    async def scrub(self) -> None:
        self.scrubs += 1
        await super().scrub()


class GatedLog(MemoryLog):
    """A log whose readers hear late of what they saw."""

    gate: asyncio.Event | None = None

    async def load(self, conversation: str) -> Loaded:
        loaded = await super().load(conversation)
        if self.gate is not None:
            await self.gate.wait()
        return loaded


async def test_a_write_that_the_disk_refused_does_not_go_out_any_more() -> None:
    disk = Disk()
    log = GatedLog(disk.disk, clock=lambda: 0, faults=disk.seam)
    replica = await LocalReplica.open(NAME, log, Random(1))
    log.gate = asyncio.Event()
    disk.failing = True
    writing = asyncio.create_task(replica.write(adds(1)))
    await disk.reached.wait()
    async with asyncio.timeout(5):
        while replica.outbox:  # noqa: ASYNC110 - nobody is told when the log is being read
            await asyncio.sleep(0)
    assert not writing.done()
    assert replica.next_to_send(0) is None
    log.gate.set()
    with pytest.raises(StoreFailed):
        await writing
    await replica.close()


async def test_a_write_that_is_committed_while_the_replica_is_built_anew_stays() -> None:
    disk = Disk()
    log = GatedLog(disk.disk, clock=lambda: 0, faults=disk.seam)
    replica = await LocalReplica.open(NAME, log, Random(1))
    log.gate = asyncio.Event()
    disk.hold()
    good = asyncio.create_task(replica.write(adds(1)))
    await disk.reached.wait()  # neither in the log nor to be found there soon

    def compose(_document: Conversation, _writer: Writer) -> None:
        raise ZeroDivisionError

    bad = asyncio.create_task(replica.write(compose))
    for _ in range(10):
        await asyncio.sleep(0)  # it gets as far as it can
    disk.released.set()
    await good
    log.gate.set()
    with pytest.raises(ZeroDivisionError):
        await bad
    assert set(replica.document.tree.entries) == {entry(1)}
    await replica.write(adds(2, "x" * COMPACT_BYTES_MIN))  # and the log is folded
    await replica.close()
    assert disk.disk.conversations[NAME].snapshot is not None
    assert set(disk.document().tree.entries) == {entry(1), entry(2)}


async def test_withdrawn_text_leaves_the_disk_after_a_kill_too() -> None:
    disk, elsewhere = Disk(), Elsewhere()
    async with MemoryLog(disk.disk, clock=lambda: 0) as log:
        await log.append(NAME, [elsewhere.write(1, "a secret")])
        with elsewhere.document.writing() as writer:
            writer.set(entry(1), "redacted", {"by": "owner", "at": 1})
            del elsewhere.document._roots["entries"][entry(1)]["content"]
        assert writer.change is not None
        await log.append(NAME, [writer.change.update])
    log = ScrubbedLog(disk.disk, clock=lambda: 0)
    replica = await LocalReplica.open(NAME, log, Random(1))
    await replica.close()
    stored = disk.disk.conversations[NAME]
    assert not stored.updates
    assert stored.snapshot is not None
    assert b"a secret" not in stored.snapshot
    assert log.scrubs == 1


async def test_what_the_check_refuses_never_happened() -> None:
    disk = Disk()
    async with replica_on(disk) as replica:

        def check(change: Change, document: Conversation) -> None:
            assert change.entries == {entry(1)}
            assert entry(1) in document.tree
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await replica.write(adds(1), check)
        assert replica.is_empty
        await replica.write(adds(2))
    assert set(disk.document().tree.entries) == {entry(2)}


async def test_a_damaged_copy_is_said_to_be_damaged() -> None:
    disk = Disk()
    async with MemoryLog(disk.disk, clock=lambda: 0) as log:
        await log.append(NAME, [b"no update at all"])
    with pytest.raises(Corrupt, match="comes back from the relay"):
        async with replica_on(disk):
            raise AssertionError("it opened")


# -- what the relay says to it ---------------------------------------------------------------------


def numbers(replica: LocalReplica) -> list[int]:
    return [written.number for written in replica.outbox]


async def test_what_is_acknowledged_leaves_the_outbox_and_stays_acknowledged() -> None:
    disk = Disk()
    async with replica_on(disk) as replica:
        for number in (1, 2, 3):
            await replica.write(adds(number))
        first, second, third = numbers(replica)
        replica.acknowledge((first, second))
        assert numbers(replica) == [third]
        assert replica.acknowledged == {replica.document.client_id: 6}  # three clocks an entry
    assert list(disk.kept().outbox) == [third]
    async with replica_on(disk) as replica:
        assert numbers(replica) == [third]
        assert set(replica.document.tree.entries) == {entry(1), entry(2), entry(3)}


async def test_a_refused_write_becomes_a_draft_and_the_rest_is_written_again() -> None:
    disk = Disk()
    async with replica_on(disk) as replica:
        for number in (1, 2, 3):
            await replica.write(adds(number, f"text {number}"))
        client = replica.document.client_id
        rewritten: list[frozenset[str] | None] = []
        replica.on_outbox(rewritten.append)
        _, second, _ = numbers(replica)
        await replica.refuse([second], "denied", "forged-author", "that was not you")
        assert set(replica.document.tree.entries) == {entry(1), entry(3)}
        assert replica.document.client_id != client
        assert rewritten[0] is None
        assert len(replica.outbox) == 2
        assert all(client not in written.ends for written in replica.outbox)
        (refused,) = replica.refused_writes
        assert (refused.code, refused.rule, refused.reason) == (
            "denied",
            "forged-author",
            "that was not you",
        )
        assert (refused.text, refused.entry) == ("text 2", entry(2))
    async with replica_on(disk) as replica:  # all of that is on disk
        assert set(replica.document.tree.entries) == {entry(1), entry(3)}
        assert [one.text for one in replica.refused_writes] == ["text 2"]
        await replica.discard(replica.refused_writes[0].id)
        assert replica.refused_writes == ()
    assert not disk.kept().refused


async def test_what_was_written_after_a_refused_entry_moves_to_what_stays() -> None:
    disk = Disk()

    def after(number: int, predecessor: str) -> Callable[[Conversation, Writer], None]:
        def compose(document: Conversation, writer: Writer) -> None:
            born = Born(Role.USER, "owner", "laptop", 0, document.tree.clock + 1, after=predecessor)
            writer.add(entry(number), born, "text")
            writer.set_meta("head", entry(number))

        return compose

    async with replica_on(disk) as replica:
        await replica.write(after(1, ""))
        await replica.write(after(2, entry(1)))
        await replica.write(after(3, entry(2)))
        await replica.write(lambda _, writer: writer.stop(entry(2), "owner"))
        await replica.write(lambda _, writer: writer.set_meta("title", "kept"))
        await replica.refuse([numbers(replica)[1]], "invalid", "clock", "no")
        moved = replica.document.born(entry(3))
        assert moved is not None
        assert moved.after == entry(1)
        assert replica.document.meta.head == entry(3)
        assert replica.document.meta.title == "kept"
        assert len(replica.outbox) == 3  # the stop was about what is not there


async def test_several_writes_that_were_sent_as_one_are_written_again_one_by_one() -> None:
    disk = Disk()
    async with replica_on(disk) as replica:
        for number in (1, 2, 3):
            await replica.write(adds(number))
        await replica.refuse(numbers(replica), "invalid", "clock", "one of them")
        assert set(replica.document.tree.entries) == {entry(1), entry(2), entry(3)}
        assert len(replica.outbox) == 3
        assert replica.refused_writes == ()


async def test_who_may_write_nothing_any_more_keeps_all_of_it_as_drafts() -> None:
    disk = Disk()
    async with replica_on(disk) as replica:
        for number in (1, 2, 3):
            await replica.write(adds(number, f"text {number}"))
        await replica.refuse(numbers(replica)[:1], "denied", "forbidden", "you may not write")
        assert replica.is_empty
        assert [one.text for one in replica.refused_writes] == ["text 1", "text 2", "text 3"]


async def test_a_write_that_waits_for_the_disk_survives_a_refusal_before_it() -> None:
    disk = Disk()
    async with replica_on(disk) as replica:
        await replica.write(adds(1))
        disk.hold()
        writing = asyncio.create_task(replica.write(adds(2)))
        await disk.reached.wait()
        disk.released.set()
        await writing
        disk.hold()
        late = asyncio.create_task(replica.write(adds(3)))
        refusing = asyncio.create_task(
            replica.refuse(numbers(replica)[:1], "invalid", "clock", "no")
        )
        await disk.reached.wait()
        disk.released.set()
        await asyncio.gather(late, refusing)
        assert set(replica.document.tree.entries) == {entry(2), entry(3)}
        await replica.write(adds(4))
    assert set(disk.document().tree.entries) == {entry(2), entry(3), entry(4)}


@pytest.mark.parametrize("commits", range(4))
async def test_a_refusal_loses_nothing_at_whatever_moment_the_disk_fails(commits: int) -> None:
    """The text is in the outbox or among the refused, at any time, and never in neither."""
    disk = Disk()
    async with replica_on(disk) as replica:
        for number in (1, 2):
            await replica.write(adds(number, f"text {number}"))
        disk.good_commits_left = commits
        await replica.refuse(numbers(replica)[:1], "invalid", "clock", "no")
        late = replica.write(adds(3, "text 3"))
        results = await asyncio.gather(late, return_exceptions=True)
        kept = disk.kept()
        drafts = [one.text for one in kept.refused.values()]
        document = disk.document()
        texts = [document.text(name) for name in document.tree.entries]
        assert sorted(drafts + texts) == (
            ["text 1", "text 2"] if results[0] else ["text 1", "text 2", "text 3"]
        )
        disk.good_commits_left, disk.failing = None, False
        await replica.write(adds(4, "text 4"))
        assert [one.text for one in replica.refused_writes] == ["text 1"]
        assert entry(2) in replica.document.tree


async def test_a_change_that_builds_on_a_write_acknowledges_it() -> None:
    """An acknowledgement may be lost with a connection; what others made of the write is not."""
    disk, elsewhere = Disk(), Elsewhere()
    async with replica_on(disk) as replica:
        await replica.write(adds(1))
        await replica.write(adds(2))
        elsewhere.document.apply(replica.outbox[0].update)
        with elsewhere.document.writing() as writer:
            writer.stop(entry(1), "owner")
        assert writer.change is not None
        assert await replica.merge(writer.change.update, 7) is None
        assert [entry for one in replica.outbox for entry in entries_of(one.intent)] == [entry(2)]
        await replica.refuse(numbers(replica), "invalid", "clock", "no")
        assert set(replica.document.tree.entries) == {entry(1)}
        assert replica.document.has(entry(1), "stop")


async def test_what_comes_back_from_the_relay_is_acknowledged() -> None:
    disk = Disk()
    async with replica_on(disk) as replica:
        await replica.write(adds(1))
        (written,) = replica.outbox
        assert await replica.merge(written.update, 3) is None
        assert replica.outbox == ()
        replica.settle("log", 3)
    assert (disk.kept().log, disk.kept().lsn) == ("log", 3)
    async with replica_on(disk) as replica:
        assert replica.position == ("log", 3)


async def test_the_acknowledged_part_can_be_given_back_without_the_outbox() -> None:
    disk, elsewhere = Disk(), Elsewhere()
    async with replica_on(disk) as replica:
        await replica.merge(elsewhere.write(1))
        await replica.write(adds(2))
        document = Conversation(5)
        document.apply(await replica.acknowledged_diff(b"\x00"))
        assert set(document.tree.entries) == {entry(1)}
        replica.acknowledge(numbers(replica))
        document.apply(await replica.acknowledged_diff(document.state_vector()))
        assert set(document.tree.entries) == {entry(1), entry(2)}


# -- withdrawn text --------------------------------------------------------------------------------


def redact(number: int) -> Callable[[Conversation, Writer], None]:
    return lambda _, writer: writer.redact(entry(number), "owner", 1)


@pytest.mark.parametrize("acknowledged", [True, False])
async def test_withdrawn_text_leaves_the_disk_while_the_relay_is_away(
    *, acknowledged: bool
) -> None:
    disk = Disk()
    async with replica_on(disk) as replica:
        await replica.write(adds(1, "a secret"))
        if acknowledged:
            replica.acknowledge(numbers(replica))
        await replica.write(adds(2))
        await replica.write(redact(1))
        sent = replica.outbox
    stored = disk.disk.conversations[NAME]
    assert stored.snapshot is not None
    for kept in (stored.snapshot, *stored.updates, *(written.update for written in sent)):
        assert b"a secret" not in kept
    async with replica_on(disk) as replica:
        assert replica.document.has(entry(1), "redacted")
        assert entry(2) in replica.document.tree
        fresh = Conversation(5)
        fresh.apply(await replica.acknowledged_diff(b"\x00"))
        for written in replica.outbox:
            fresh.apply(written.update)
        assert clocks(fresh) == clocks(replica.document)
        assert fresh.has(entry(1), "redacted")
        assert not fresh.has(entry(1), "content")


async def test_withdrawn_text_that_was_sent_already_can_still_be_refused() -> None:
    disk = Disk()
    async with replica_on(disk) as replica:
        await replica.write(adds(1, "a secret"))
        await replica.write(adds(2, "text 2"))
        await replica.write(redact(1))
        await replica.refuse(numbers(replica), "invalid", "clock", "one of them")
        assert len(replica.outbox) == 2  # the withdrawn entry, and the other
        assert replica.document.has(entry(1), "redacted")
        assert replica.document.text(entry(2)) == "text 2"
        assert b"a secret" not in replica.document.diff()


async def test_what_a_withdrawal_met_on_its_way_leaves_the_disk_when_it_is_cleared() -> None:
    """Until then it lies beside the commitment, and a short secret could be guessed."""
    disk, salt = Disk(), b"salt of a secret"
    node = Conversation(7)
    changes: list[bytes] = []
    for write in (
        lambda writer: adds(1, "a secret")(node, writer),
        lambda writer: writer.set(entry(1), "salt", salt),
        lambda writer: (
            writer.set(entry(1), "redacted", {"by": "owner", "at": 1}),
            writer.remove(entry(1), "content"),
        ),
        lambda writer: writer.remove(entry(1), "salt"),
    ):
        with node.writing() as writer:
            write(writer)
        assert writer.change is not None
        changes.append(writer.change.update)
    async with replica_on(disk) as replica:
        for update in changes[:-1]:
            assert await replica.merge(update) is None
    assert salt in b"".join(_stored(disk))  # nobody has cleared it yet
    async with replica_on(disk) as replica:
        assert await replica.merge(changes[-1]) is None
    assert salt not in b"".join(_stored(disk))
    assert b"a secret" not in b"".join(_stored(disk))


def _stored(disk: Disk) -> list[bytes]:
    kept = disk.disk.conversations[NAME]
    return [kept.snapshot or b"", *kept.updates]
