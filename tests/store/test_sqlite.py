from __future__ import annotations

import asyncio
import contextlib
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings
from store import crash_child
from store.contract import A, B, Contract, LogMachine, Place

from crdt_llm.errors import Corrupt, LocalMisuse, StoreFailed
from crdt_llm.store import sqlite_file
from crdt_llm.store.log import Limits, Loaded
from crdt_llm.store.sqlite import CHECKPOINT_PAGES, SEAMS, SqliteLog

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from crdt_llm.store.log import UpdateLog
    from crdt_llm.store.sqlite import Seam

# --- the contract ------------------------------------------------------------------------------


def copy_as_a_crash_leaves_it(path: Path, copy: Path) -> None:
    """Copy the file and its WAL, but not the shared memory, which dies with its processes.

    Reading the file drops this process's locks on it, as closing any descriptor does; nobody else
    has it open.
    """
    copy.parent.mkdir()
    for suffix in ("", "-wal"):
        source = path.with_name(path.name + suffix)
        if source.exists():
            shutil.copyfile(source, copy.with_name(copy.name + suffix))


class SqlitePlace(Place):
    """A folder per life of the log: a crash leaves a copy of the files as they are on disk."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.lives = 0
        self.path = folder / "log.db"
        self.crash_after: int | None = None

    def faults(self, _seam: Seam) -> None:
        if self.crash_after is not None:
            self.crash_after -= 1
            if self.crash_after < 0:
                self.take_image()

    def take_image(self) -> None:
        self.crash_after = None
        self.lives += 1
        image = self.folder / f"life-{self.lives}" / "log.db"
        copy_as_a_crash_leaves_it(self.path, image)
        self.path = image

    async def open(self, limits: Limits | None = None) -> UpdateLog:
        return await SqliteLog.open(self.path, clock=self.clock, faults=self.faults, limits=limits)

    async def crash(self, log: UpdateLog) -> None:
        self.take_image()
        await log.close()

    async def crash_within(
        self, log: UpdateLog, operation: Callable[[], Awaitable[object]], seam: int
    ) -> None:
        self.crash_after = seam
        await operation()
        if self.crash_after is not None:
            self.take_image()
        await log.close()


def make_folder() -> Path:
    """Make a folder in memory where the system has it.

    A killed process leaves what it wrote, synced or not: these tests prove nothing about the disk,
    and should not wait for it.
    """
    memory = Path("/dev/shm")  # noqa: S108 - mkdtemp makes a private folder in it
    return Path(tempfile.mkdtemp(prefix="log-", dir=memory if memory.is_dir() else None))


@pytest.fixture
def folder() -> Iterator[Path]:
    folder = make_folder()
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def path(folder: Path) -> Path:
    return folder / "log.db"


class TestContract(Contract):
    @pytest.fixture
    def place(self, folder: Path) -> Place:
        return SqlitePlace(folder)


class SqliteMachine(LogMachine):
    @staticmethod
    def make_place() -> Place:
        return SqlitePlace(make_folder())

    def teardown(self) -> None:
        super().teardown()
        assert isinstance(self.place, SqlitePlace)
        shutil.rmtree(self.place.folder)


TestMachine = SqliteMachine.TestCase
TestMachine.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


# --- the file ----------------------------------------------------------------------------------


def files_of(path: Path) -> list[Path]:
    return sorted(path.parent.glob(f"{path.name}*"))


def modes_of(paths: list[Path]) -> set[int]:
    return {path.stat().st_mode & 0o777 for path in paths}


def content_of(*paths: Path) -> bytes:
    return b"".join(path.read_bytes() for path in paths)


def overwrite(path: Path, content: bytes | bytearray) -> None:
    path.write_bytes(content)


async def test_only_the_owner_may_read_the_files(path: Path) -> None:
    async with await SqliteLog.open(path) as log:
        await log.append(A, [b"private"])
        found = files_of(path)
        assert [file.name for file in found] == ["log.db", "log.db-shm", "log.db-wal"]
        assert modes_of(found) == {0o600}


async def test_a_file_that_others_may_read_is_closed_to_them(path: Path) -> None:
    overwrite(path, b"")
    await make_log(path.with_name("new.db"))
    overwrite(path, content_of(path.with_name("new.db")))
    assert modes_of([path]) != {0o600}
    async with await SqliteLog.open(path) as log:
        await log.append(A, [b"private"])
        assert modes_of(files_of(path)) == {0o600}


async def test_a_closed_log_is_one_file(path: Path) -> None:
    async with await SqliteLog.open(path) as log:
        await log.append(A, [b"x"])
    assert files_of(path) == [path]


async def test_a_log_keeps_the_random_name_it_was_made_with(path: Path) -> None:
    async with await SqliteLog.open(path) as log:
        first = log.log_id
    async with await SqliteLog.open(path) as log:
        assert log.log_id == first
    async with await SqliteLog.open(path.with_name("other.db")) as log:
        assert log.log_id != first
    assert re.fullmatch("[0-9a-f]{32}", first)


async def test_every_commit_is_synced(path: Path) -> None:
    async with await SqliteLog.open(path) as log:
        assert log._connection is not None

        def settings_of_the_writer() -> list[Any]:
            assert log._connection is not None
            names = ("journal_mode", "synchronous", "secure_delete")
            return [log._connection.execute(f"PRAGMA {name}").fetchone()[0] for name in names]

        values = await asyncio.get_running_loop().run_in_executor(
            log._writer, settings_of_the_writer
        )
        assert values == ["wal", 2, 1]


async def test_two_logs_on_one_file_never_give_out_an_lsn_twice(path: Path) -> None:
    async with await SqliteLog.open(path) as one, await SqliteLog.open(path) as two:
        lsns = await asyncio.gather(
            *(log.append(A, [b"x"]) for _ in range(20) for log in (one, two))
        )
        assert sorted(lsns) == list(range(1, 41))
        await one.delete(A)
        lsn = await two.append(A, [b"new"])
        assert lsn > 40
        assert (await one.load(A)).updates == ((lsn, b"new"),)


async def test_a_folder_that_is_missing_is_a_failure_and_not_damage(tmp_path: Path) -> None:
    with pytest.raises(StoreFailed, match="No such file"):
        await SqliteLog.open(tmp_path / "missing" / "log.db")


@pytest.mark.parametrize("seed", [14, 15, 32])
async def test_deleted_and_compacted_bytes_are_nowhere_on_disk_after_a_scrub(
    path: Path, seed: int
) -> None:
    # With these seeds secure_delete alone leaves copies in the gaps of rebalanced pages.
    rng = random.Random(seed)
    lsns = dict.fromkeys([f"conversation-{n}" for n in range(12)], 0)
    gone = list(lsns)[:6]
    async with await SqliteLog.open(path) as log:
        for _ in range(150):
            requests = [rng.choice(list(lsns)) for _ in range(rng.randrange(1, 8))]
            updates = [
                f"secret of {name};".encode() * rng.choice([1, 5, 20, 60, 200]) for name in requests
            ]
            results = await asyncio.gather(
                *(
                    log.append(name, [update])
                    for name, update in zip(requests, updates, strict=True)
                )
            )
            lsns.update(zip(requests, results, strict=True))
        for name in gone[:3]:
            await log.delete(name)
        for name in gone[3:]:
            await log.compact(name, b"redacted", lsns[name])
        await log.scrub()
        data = content_of(*files_of(path))
        found = {name for name in lsns if f"secret of {name};".encode() in data}
        assert found == set(lsns) - set(gone)
        assert (await log.load(gone[3])).snapshot == b"redacted"


# --- damage ------------------------------------------------------------------------------------


async def make_log(path: Path) -> dict[str, Loaded]:
    """Write a log with two conversations of all kinds of rows; return what is in it."""
    async with await SqliteLog.open(path) as log:
        for name in (A, B):
            await log.append(name, [f"{name} update {n};".encode() * 20 for n in range(1, 31)])
            await log.compact(name, f"{name} snapshot;".encode() * 200, 10)
            await log.append(name, [f"{name} long update;".encode() * 500])
        return {name: await log.load(name) for name in (A, B)}


def edit(path: Path, *statements: str) -> None:
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for statement in statements:
            connection.execute(statement.replace(":A", "WHERE conversation = 'conversation-a'"))


@pytest.mark.parametrize(
    ("statement", "what"),
    [
        ("UPDATE updates SET bytes = x'00' :A AND lsn = 12", "update 12"),
        ("UPDATE updates SET bytes = 'text' :A AND lsn = 12", "update 12"),
        ("UPDATE updates SET checksum = zeroblob(16) :A AND lsn = 31", "update 31"),
        ("DELETE FROM updates :A AND lsn = 11", "11 is missing"),
        ("DELETE FROM updates :A AND lsn = 15", "15 is missing"),
        ("DELETE FROM updates :A AND lsn = 31", "ends at 30"),
        ("DELETE FROM updates :A", "ends at 10"),
        ("UPDATE updates SET lsn = 32 :A AND lsn = 31", "31 is missing"),
        # The row of another conversation, and another row of the same one.
        (
            """UPDATE updates SET (bytes, checksum) = (SELECT bytes, checksum FROM updates
            WHERE conversation = 'conversation-b' AND lsn = 12) :A AND lsn = 12""",
            "update 12",
        ),
        (
            """UPDATE updates SET (bytes, checksum) = (SELECT bytes, checksum FROM updates
            :A AND lsn = 13) :A AND lsn = 12""",
            "update 12",
        ),
        ("DELETE FROM heads :A", "head is missing"),
        ("UPDATE heads SET conversation = 'x' :A", "head is missing"),
        ("UPDATE heads SET lsn = 30 :A", "head does not match"),
        ("UPDATE heads SET lsn = 'thirty' :A", "head does not match"),
        ("UPDATE heads SET changed_at = 0.5 :A", "head does not match"),
        ("DELETE FROM snapshots :A", "snapshot is missing"),
        ("UPDATE snapshots SET bytes = x'00' :A", "snapshot does not match"),
        (
            "UPDATE snapshots SET bytes = zeroblob(length(bytes)) :A",
            "snapshot does not match",
        ),
        ("UPDATE snapshots SET lsn = 9 :A", "snapshot does not match"),
    ],
)
async def test_a_damaged_conversation_is_refused_and_the_other_one_is_not(
    path: Path, statement: str, what: str
) -> None:
    intact = await make_log(path)
    edit(path, statement)
    async with await SqliteLog.open(path) as log:
        with pytest.raises(Corrupt) as caught:
            await log.load(A)
        message = str(caught.value)
        assert what in message
        assert str(path) in message
        assert "delete it" in message
        assert "\n" not in message
        assert await log.load(B) == intact[B]
        assert await log.append(B, [b"goes on"]) == 32
        assert {one.conversation for one in await log.conversations()} >= {B}
        # The way out: it can be deleted, and then written anew above all that was there.
        await log.delete(A)
        assert await log.append(A, [b"from a replica"]) > 31
        assert len((await log.load(A)).updates) == 1
        assert log.status.healthy


async def test_lsns_are_not_reused_even_if_the_end_of_a_deleted_log_was_lost(path: Path) -> None:
    await make_log(path)
    edit(path, "DELETE FROM updates :A AND lsn > 20", "UPDATE heads SET lsn = 20 :A")
    async with await SqliteLog.open(path) as log:
        await log.delete(A)
        assert await log.append(A, [b"from a replica"]) > 31


async def test_a_damaged_head_is_marked_in_the_list(path: Path) -> None:
    await make_log(path)
    edit(path, "UPDATE heads SET lsn = 30 :A")
    async with await SqliteLog.open(path) as log:
        damage = {one.conversation: one.damage for one in await log.conversations()}
    assert damage == {A: "its head does not match its checksum", B: None}


async def test_a_damaged_conversation_does_not_fail_what_shares_its_commit(path: Path) -> None:
    await make_log(path)
    edit(path, "UPDATE heads SET lsn = 30 :A")
    gate = Gate()
    async with await SqliteLog.open(path, faults=gate) as log:
        results = await gate.commit_together(
            log, [(B, b"one"), (A, b"lost"), ("c", b"two"), (A, b"lost"), (B, b"three")]
        )
        assert isinstance(results[1], Corrupt)
        assert isinstance(results[3], Corrupt)
        assert [results[0], results[2], results[4]] == [32, 1, 33]
        assert [update for _, update in (await log.load(B)).updates[-2:]] == [b"one", b"three"]
        with pytest.raises(Corrupt):
            await log.compact(A, b"state", 31)


async def test_damage_in_what_is_kept_of_a_deleted_conversation_stops_only_its_return(
    path: Path,
) -> None:
    intact = await make_log(path)
    async with await SqliteLog.open(path) as log:
        await log.delete(A)
    edit(path, "UPDATE deleted SET floor = 3")
    async with await SqliteLog.open(path) as log:
        with pytest.raises(Corrupt, match="where the deleted conversation"):
            await log.append(A, [b"x"])
        assert await log.load(B) == intact[B]


async def test_a_compaction_does_not_cover_up_lost_updates(path: Path) -> None:
    await make_log(path)
    edit(path, "DELETE FROM updates :A AND lsn = 15")
    async with await SqliteLog.open(path) as log:
        with pytest.raises(Corrupt, match="missing or in surplus"):
            await log.compact(A, b"state", 31)
        with pytest.raises(Corrupt, match="15 is missing"):
            await log.load(A)


async def whatever_loads(path: Path) -> dict[str, Loaded]:
    """Open a file that may be damaged; return the conversations that are said to be intact."""
    loaded = {}
    with contextlib.suppress(Corrupt):
        async with await SqliteLog.open(path) as log:
            for name in (A, B):
                with contextlib.suppress(Corrupt):
                    loaded[name] = await log.load(name)
    return loaded


async def test_with_any_byte_flipped_a_load_is_right_or_refused(path: Path) -> None:
    intact = await make_log(path)
    data = content_of(path)
    seed = 5
    rng = random.Random(seed)
    # All of the file's header and of the schema's page header, and samples of everything else.
    places = [*range(108), *(rng.randrange(108, len(data)) for _ in range(250))]
    refused = 0
    for place in places:
        broken = bytearray(data)
        broken[place] ^= 1 << rng.randrange(8)
        overwrite(path, broken)
        loaded = await whatever_loads(path)
        refused += len(loaded) < 2
        for name, found in loaded.items():
            assert found == intact[name], f"seed {seed}: a flip at {place} went unnoticed"
    assert refused > 50


async def test_a_truncated_file_is_right_or_refused(path: Path) -> None:
    intact = await make_log(path)
    data = content_of(path)
    refused = 0
    sizes = [*range(0, len(data), sqlite_file.PAGE_BYTES), 1, 99, 5000, len(data) - 1]
    for size in sizes:
        overwrite(path, data[:size])
        loaded = await whatever_loads(path)
        refused += len(loaded) < 2
        for name, found in loaded.items():
            assert found == intact[name], f"a file cut at {size} bytes went unnoticed"
    assert refused > len(sizes) // 2


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "is empty"),
        (b"Dear diary, this is no database.\n" * 200, "not a database"),
        (bytes(8192), "not a database"),
        (None, "belongs to another program"),
    ],
)
async def test_a_foreign_file_is_refused_and_left_as_it_is(
    path: Path, content: bytes | None, match: str
) -> None:
    if content is None:
        edit(path, "CREATE TABLE diary (page TEXT)")
        content = content_of(path)
    overwrite(path, content)
    with pytest.raises(Corrupt, match=match) as caught:
        await SqliteLog.open(path)
    assert str(path) in str(caught.value)
    assert content_of(path) == content
    assert files_of(path) == [path]


@pytest.mark.parametrize(
    ("statements", "match"),
    [
        (["PRAGMA user_version = 2"], "newer version"),
        (["PRAGMA user_version = 0"], "unknown layout"),
        (["CREATE TABLE more (x)"], "unknown layout"),
        (["CREATE TRIGGER t AFTER DELETE ON updates BEGIN SELECT 1; END"], "unknown layout"),
        (["DROP TABLE snapshots"], "unknown layout"),
        (["DELETE FROM store"], "own row"),
        (["UPDATE store SET log_id = 'other'"], "own row"),
        (["UPDATE store SET log_id = CAST(x'ff' AS TEXT)"], "own row"),
    ],
)
async def test_another_layout_is_refused(path: Path, statements: list[str], match: str) -> None:
    await make_log(path)
    edit(path, *statements)
    with pytest.raises(Corrupt, match=match) as caught:
        await SqliteLog.open(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


async def test_a_wal_without_its_file_is_not_played_into_a_new_one(path: Path) -> None:
    path.with_name("log.db-wal").write_bytes(b"the last updates of a log that was moved away")
    with pytest.raises(Corrupt, match="put the file back"):
        await SqliteLog.open(path)
    assert [file.name for file in files_of(path)] == ["log.db-wal"]


# --- commits -----------------------------------------------------------------------------------


class Gate:
    """Counts what passes the seams; holds or fails the next commit when told to."""

    def __init__(self) -> None:
        self.passed: list[Seam] = []
        self.fail_at: Seam | None = None
        self.error: Exception = sqlite3.OperationalError("disk I/O error")
        self._arrived = threading.Event()
        self._open = threading.Event()
        self._open.set()

    @property
    def commits(self) -> int:
        return self.passed.count("before-commit")

    def __call__(self, seam: Seam) -> None:
        self.passed.append(seam)
        if seam == "before-begin":
            self._arrived.set()
            assert self._open.wait(60)
        if seam == self.fail_at:
            raise self.error

    def shut(self) -> None:
        self._arrived.clear()
        self._open.clear()

    def open(self) -> None:
        self._open.set()

    async def arrival(self) -> None:
        """Wait until a commit stands at the gate."""
        assert await asyncio.to_thread(self._arrived.wait, 60)

    async def commit_together(
        self, log: SqliteLog, requests: list[tuple[str, bytes]]
    ) -> list[int | BaseException]:
        """Append while another commit is under way, so that all of them share the next one."""
        self.shut()
        ahead = asyncio.ensure_future(log.append("ahead", [b"x"]))
        await self.arrival()
        together = [asyncio.ensure_future(log.append(name, [data])) for name, data in requests]
        await asyncio.sleep(0)
        self.open()
        await ahead
        return await asyncio.gather(*together, return_exceptions=True)


async def test_appends_that_wait_together_share_one_commit(path: Path) -> None:
    gate = Gate()
    async with await SqliteLog.open(path, faults=gate) as log:
        lsns = await gate.commit_together(log, [(f"c{n % 100}", b"x") for n in range(500)])
        assert lsns == [1 + n // 100 for n in range(500)]
        assert gate.commits == 2


@pytest.mark.parametrize(
    ("limits", "commits"),
    [(Limits(), 1), (Limits(commit_updates_max=8), 3), (Limits(commit_bytes_max=250), 10)],
)
async def test_a_commit_takes_no_more_than_its_limits(
    path: Path, limits: Limits, commits: int
) -> None:
    gate = Gate()
    async with await SqliteLog.open(path, faults=gate, limits=limits) as log:
        lsns = await gate.commit_together(log, [(A, bytes(100))] * 20)
        assert lsns == list(range(1, 21))
        assert gate.commits == 1 + commits


@pytest.mark.parametrize("seam", ["before-begin", "after-insert", "before-commit"])
@pytest.mark.parametrize(
    "error", [sqlite3.OperationalError("disk I/O error"), OSError("gone"), ValueError("a bug")]
)
async def test_a_failed_commit_fails_exactly_its_appends(
    path: Path, seam: Seam, error: Exception
) -> None:
    gate = Gate()
    async with await SqliteLog.open(path, faults=gate) as log:
        assert await log.append(A, [b"one"]) == 1
        gate.fail_at, gate.error = seam, error
        with pytest.raises(StoreFailed) as caught:
            await log.append(A, [b"lost", b"lost"])
        assert caught.value.__cause__ is error
        assert str(path) in str(caught.value)
        assert log.status.reason == str(caught.value)
        with pytest.raises(StoreFailed):
            await log.append(B, [b"lost"])
        gate.fail_at = None
        assert await log.append(A, [b"two"]) == 2
        assert log.status.healthy
    async with await SqliteLog.open(path) as log:
        assert await log.load(A) == Loaded(None, 0, ((1, b"one"), (2, b"two")))
        assert await log.load(B) == Loaded(None, 0, ())


async def test_those_who_share_a_failed_commit_get_errors_of_their_own(path: Path) -> None:
    gate = Gate()
    async with await SqliteLog.open(path, faults=gate) as log:
        gate.shut()
        ahead = asyncio.ensure_future(log.append(A, [b"one"]))
        await gate.arrival()
        both = [asyncio.ensure_future(log.append(name, [b"lost"])) for name in (A, B)]
        await asyncio.sleep(0)
        gate.open()
        await ahead
        first, second = await asyncio.gather(*both, return_exceptions=True)
        assert (first, second) == (2, 1)
        gate.fail_at = "after-insert"
        first, second = await asyncio.gather(
            *(log.append(name, [b"lost"]) for name in (A, B)), return_exceptions=True
        )
        assert isinstance(first, StoreFailed)
        assert isinstance(second, StoreFailed)
        assert first is not second


async def test_a_fault_after_the_commit_does_not_turn_success_into_failure(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gate = Gate()
    async with await SqliteLog.open(path, faults=gate) as log:
        gate.fail_at = "after-commit"
        assert await log.append(A, [b"one"]) == 1
        assert "at after-commit" in caplog.text
        gate.fail_at = "compact-after-commit"
        await log.compact(A, b"state", 1)
        assert await log.load(A) == Loaded(b"state", 1, ())
        gate.fail_at = "delete-after-commit"
        await log.delete(A)
        assert await log.conversations() == ()
        assert log.status.healthy


@pytest.mark.parametrize(
    "seam",
    [
        "compact-before-begin",
        "compact-after-snapshot",
        "compact-after-drop",
        "compact-before-commit",
    ],
)
async def test_a_failed_compaction_changes_nothing(path: Path, seam: Seam) -> None:
    intact = await make_log(path)
    gate = Gate()
    async with await SqliteLog.open(path, faults=gate) as log:
        gate.fail_at = seam
        with pytest.raises(StoreFailed):
            await log.compact(A, b"state", 20)
        gate.fail_at = None
        assert await log.load(A) == intact[A]
        await log.compact(A, b"state", 31)
        assert await log.load(A) == Loaded(b"state", 31, ())


@pytest.mark.parametrize(
    "seam", ["delete-before-begin", "delete-after-rows", "delete-before-commit"]
)
async def test_a_failed_deletion_changes_nothing(path: Path, seam: Seam) -> None:
    intact = await make_log(path)
    gate = Gate()
    async with await SqliteLog.open(path, faults=gate) as log:
        gate.fail_at = seam
        with pytest.raises(StoreFailed):
            await log.delete(A)
        assert await log.load(A) == intact[A]


async def test_a_probe_heals_the_status(path: Path) -> None:
    gate = Gate()
    async with await SqliteLog.open(path, faults=gate) as log:
        gate.fail_at = "before-commit"
        with pytest.raises(StoreFailed):
            await log.append(A, [b"lost"])
        assert not log.status.healthy
        assert (await log.probe()).healthy
        assert log.status.healthy


class Faulty(sqlite3.Connection):
    """A connection on which some statements fail."""

    failing: frozenset[str] = frozenset()
    failures_left = 0

    def execute(self, sql: str, *arguments: Any) -> sqlite3.Cursor:
        if sql in self.failing and self.failures_left:
            self.failures_left -= 1
            raise sqlite3.OperationalError("disk I/O error")
        return super().execute(sql, *arguments)


class Connector:
    """Opens connections whose failures can be chosen later; the writer's is the first to stay."""

    def __init__(self) -> None:
        self.opened: list[Faulty] = []

    def __call__(self, path: Path) -> sqlite3.Connection:
        connection = sqlite3.connect(path, isolation_level=None, factory=Faulty)
        self.opened.append(connection)
        return connection

    @property
    def writer(self) -> Faulty:
        return self.opened[1]  # the first one created the file


@pytest.mark.parametrize(
    ("failing", "failures", "connections"),
    [
        # Another commit is written over the failed one.
        ({"COMMIT"}, 1, 1),
        # That one fails too, or nothing can be taken back: a new connection.
        ({"COMMIT"}, 2, 2),
        ({"COMMIT", "ROLLBACK"}, 2, 2),
    ],
)
async def test_a_commit_that_fails_itself_leaves_nothing_behind(
    path: Path, failing: set[str], failures: int, connections: int
) -> None:
    connector = Connector()
    async with await SqliteLog.open(path, connect=connector) as log:
        assert await log.append(A, [b"one"]) == 1
        others = len(connector.opened) - 1
        connector.writer.failing, connector.writer.failures_left = frozenset(failing), failures
        with pytest.raises(StoreFailed, match="disk I/O error"):
            await log.append(A, [b"lost"])
        assert await log.load(A) == Loaded(None, 0, ((1, b"one"),))
        assert connector.writer.failures_left == 0
        assert await log.append(A, [b"two"]) == 2
        assert len(connector.opened) == others + connections
        image = path.parent / "image" / "log.db"
        copy_as_a_crash_leaves_it(path, image)
    async with await SqliteLog.open(image) as log:
        assert await log.load(A) == Loaded(None, 0, ((1, b"one"), (2, b"two")))


async def test_a_log_goes_on_when_a_full_disk_has_room_again(path: Path) -> None:
    connector = Connector()
    # The writer's connection belongs to its thread; the seam is there.
    pages_max: list[int] = []

    def faults(seam: Seam) -> None:
        if seam == "before-begin" and pages_max:
            connector.writer.execute(f"PRAGMA max_page_count = {pages_max.pop()}")

    async with await SqliteLog.open(path, connect=connector, faults=faults) as log:
        assert await log.append(A, [b"one"]) == 1
        pages_max.append(20)
        results = await asyncio.gather(
            log.append(A, [bytes(50_000)] * 3), log.append(B, [b"lost"]), return_exceptions=True
        )
        assert isinstance(results[0], StoreFailed)
        assert "full" in str(results[0])
        assert log.status.reason is not None
        # A small one still fits, and it is as if the large one had never been.
        assert await log.append(A, [b"two"]) == 2
        assert log.status.healthy
        pages_max.append(1_000_000)
        assert await log.append(A, [bytes(50_000)] * 3) == 5
    async with await SqliteLog.open(path) as log:
        expected = [b"one", b"two", *[bytes(50_000)] * 3]
        assert (await log.load(A)).updates == tuple(enumerate(expected, 1))


FULL_DISK = """
import asyncio, resource, sys
from pathlib import Path
from crdt_llm.errors import StoreFailed
from crdt_llm.store.sqlite import SqliteLog

async def main(path):
    # Writing beyond it fails in the kernel, as it does on a full disk.
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    log = await SqliteLog.open(path)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
    acknowledged, failed = [], 0
    for number in range(60):
        try:
            acknowledged.append((await log.append("a", [b"%d" % number * 10_000]), number))
        except StoreFailed:
            failed += 1
            if failed == 3:
                resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert failed == 3, failed
    loaded = await log.load("a")
    assert loaded.updates == tuple((lsn, b"%d" % number * 10_000) for lsn, number in acknowledged)
    assert log.status.healthy
    print(len(acknowledged))
    sys.stdout.flush()
    import os, signal
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main(Path(sys.argv[1])))
"""


async def test_real_write_errors_fail_exactly_the_appends_they_hit(path: Path) -> None:
    child = subprocess.run(  # noqa: ASYNC221, S603 - nothing else runs in this loop
        [sys.executable, "-c", FULL_DISK, str(path)],
        capture_output=True,
        check=False,
        timeout=60,
    )
    assert child.returncode == -signal.SIGKILL, child.stderr.decode()
    assert int(child.stdout) == 57
    async with await SqliteLog.open(path) as log:
        assert (await log.load("a")).lsn == 57


async def test_the_wal_is_folded_back_and_does_not_grow_for_ever(path: Path) -> None:
    gate = Gate()
    page = bytes(sqlite_file.PAGE_BYTES)
    async with await SqliteLog.open(path, faults=gate) as log:
        for _ in range(5):
            await log.append(A, [page] * CHECKPOINT_PAGES)
        checkpoints = gate.passed.count("after-checkpoint")
        assert checkpoints >= 4
        wal_bytes = path.with_name("log.db-wal").stat().st_size
        assert wal_bytes < 3 * CHECKPOINT_PAGES * sqlite_file.PAGE_BYTES


async def test_a_failed_checkpoint_loses_nothing(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gate = Gate()
    page = bytes(sqlite_file.PAGE_BYTES)
    async with await SqliteLog.open(path, faults=gate) as log:
        gate.fail_at = "before-checkpoint"
        await log.append(A, [page] * CHECKPOINT_PAGES)
        assert await log.append(A, [b"next"]) == CHECKPOINT_PAGES + 1
        assert "could not be folded back" in caplog.text
        gate.fail_at = None
        assert (await log.load(A)).lsn == CHECKPOINT_PAGES + 1
        assert log.status.healthy


async def test_a_scrub_that_cannot_cut_the_wal_says_so(path: Path) -> None:
    gate = Gate()
    async with await SqliteLog.open(path, faults=gate) as log:
        await log.append(A, [b"secret"])
        await log.delete(A)
        gate.fail_at = "scrub-after-vacuum"
        with pytest.raises(StoreFailed):
            await log.scrub()
        gate.fail_at = None
        await log.scrub()


async def test_reading_goes_on_while_a_commit_is_under_way(path: Path) -> None:
    gate = Gate()
    async with await SqliteLog.open(path, faults=gate) as log:
        await log.append(A, [b"one"])
        gate.shut()
        append = asyncio.ensure_future(log.append(A, [b"two"]))
        await gate.arrival()
        assert await log.load(A) == Loaded(None, 0, ((1, b"one"),))
        gate.open()
        assert await append == 2


async def test_a_cancelled_opening_leaves_no_thread_behind(path: Path) -> None:
    before = threading.active_count()
    opening = asyncio.ensure_future(SqliteLog.open(path))
    await asyncio.sleep(0)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    async with await SqliteLog.open(path) as log:
        assert await log.append(A, [b"x"]) == 1
    for thread in threading.enumerate():
        if thread.name.startswith(("log-writer", "log-reader")):
            thread.join(60)
    assert threading.active_count() <= before + 1  # the loop's own executor may have begun one


async def test_closing_finishes_also_what_needs_many_commits(path: Path) -> None:
    gate = Gate()
    log = await SqliteLog.open(path, faults=gate, limits=Limits(commit_updates_max=1))
    gate.shut()
    appends = [asyncio.ensure_future(log.append(A, [b"x"])) for _ in range(20)]
    await gate.arrival()
    closing = asyncio.ensure_future(log.close())
    await asyncio.sleep(0)
    gate.open()
    await closing
    assert await asyncio.gather(*appends) == list(range(1, 21))
    assert files_of(path) == [path]


async def test_a_compaction_cancelled_behind_a_commit_is_carried_out(path: Path) -> None:
    gate = Gate()
    async with await SqliteLog.open(path, faults=gate) as log:
        await log.append(A, [b"one"])
        gate.shut()
        append = asyncio.ensure_future(log.append(A, [b"two"]))
        await gate.arrival()
        compaction = asyncio.ensure_future(log.compact(A, b"state at 1", 1))
        await asyncio.sleep(0)
        compaction.cancel()
        gate.open()
        await append
        assert await log.append(A, [b"three"]) == 3
        assert await log.load(A) == Loaded(b"state at 1", 1, ((2, b"two"), (3, b"three")))


async def test_a_closed_log_refuses_everything(path: Path) -> None:
    log = await SqliteLog.open(path)
    await log.close()
    for call in (
        log.append(A, [b"x"]),
        log.load(A),
        log.compact(A, b"", 1),
        log.conversations(),
        log.delete(A),
        log.scrub(),
        log.probe(),
    ):
        with pytest.raises(LocalMisuse, match="closed"):
            await call


# --- kill -9 -----------------------------------------------------------------------------------


def start_child(path: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(  # noqa: S603 - our own program
        [sys.executable, crash_child.__file__, str(path), *arguments],
        stdout=subprocess.PIPE,
        text=True,
    )


def acknowledged_in(lines: Iterator[str] | list[str], known: dict[tuple[str, str], int]) -> None:
    for line in lines:
        if line.endswith("\n"):  # the last one may be cut
            what, name, lsn = line.split()
            known[what, name] = int(lsn)


async def check_what_is_there(path: Path, acknowledged: dict[tuple[str, str], int]) -> None:
    """Every acknowledged LSN is there, nothing is half there, and the log goes on."""
    async with await SqliteLog.open(path) as log:
        for name in crash_child.CONVERSATIONS:
            loaded = await log.load(name)
            assert loaded.lsn >= acknowledged.get(("appended", name), 0)
            assert loaded.snapshot_lsn >= acknowledged.get(("compacted", name), 0)
            for lsn, update in loaded.updates:
                assert update == crash_child.update(name, lsn)
            if loaded.snapshot is not None:
                assert loaded.snapshot == crash_child.snapshot(name, loaded.snapshot_lsn)
            following = crash_child.update(name, loaded.lsn + 1)
            assert await log.append(name, [following]) == loaded.lsn + 1


@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_nothing_acknowledged_is_lost_by_kill_9(path: Path, seed: int) -> None:
    rng = random.Random(seed)
    acknowledged: dict[tuple[str, str], int] = {}
    for _ in range(3):  # the same file, killed again and again
        with start_child(path) as child:
            assert child.stdout is not None
            lines = [child.stdout.readline() for _ in range(rng.randrange(1, 150))]
            child.kill()
            lines += child.stdout.readlines()
        assert child.returncode == -signal.SIGKILL
        acknowledged_in(lines, acknowledged)
        await check_what_is_there(path, acknowledged)
    assert len(acknowledged) >= 1


# A checkpoint is due after more pages than this program writes; a scrub passes the same seams.
@pytest.mark.parametrize("seam", SEAMS)
async def test_nothing_acknowledged_is_lost_by_kill_9_at_any_seam(path: Path, seam: Seam) -> None:
    with start_child(path, seam, "2") as child:
        assert child.stdout is not None
        acknowledged: dict[tuple[str, str], int] = {}
        acknowledged_in(child.stdout, acknowledged)
    assert child.returncode == -signal.SIGKILL
    await check_what_is_there(path, acknowledged)
