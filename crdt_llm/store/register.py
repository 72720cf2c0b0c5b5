"""The register: what a relay keeps of each conversation beside the log, in case the log is lost.

It owns one small row per conversation (who owns it, who may do what, its epoch and the lease's
holder, what was admitted, what was withdrawn, whose client ids are whose, its facts), the contract
of a store for such rows, and two of them: an SQLite file, and one without a disk for simulations.
It must not know what an entry or an epoch means, nor CRDTs or sockets: names are text, keys and
digests bytes.

The rules, which ``tests/store/test_register.py`` checks for both:

1. ``save`` returns only when the row is durable; it is all or nothing. Saves of one conversation
   take effect in the order of their calls.
2. ``load`` returns the row saved last, or ``None`` for an unknown conversation, or raises
   ``Corrupt``; it never guesses.
3. Cancelling a caller never leaves half a row: what was handed over is carried out whole.

Saves that wait at the same time share one commit, as in the log. A row is one blob with a checksum
(BLAKE2b-128, RFC 7693), because SQLite has none: it is small, and all of it changes together.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol, Self, TypeVar

import msgpack

from crdt_llm.errors import Corrupt, CrdtLlmError, LocalMisuse, StoreFailed

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence
    from pathlib import Path

    MemoryRegisterFaults = Callable[["RegisterSeam"], Awaitable[None]]
    RegisterFaults = Callable[["RegisterSeam"], None]

Result = TypeVar("Result")

RegisterSeam = Literal["register-before-commit", "register-after-commit"]
"""Where ``faults`` is called. What it raises at the first makes the commit fail; at the second the
rows are durable, and nobody has heard of it yet."""

FILE_NAME: Final = "register.db"

APPLICATION_ID: Final = 0x43524C52
"""In the file's header, "CRLR": tells a register from a log and from other programs' files."""

SCHEMA_VERSION: Final = 1
"""In the file's header as ``user_version``."""

FILE_MODE: Final = 0o600
"""It says who talks with whom."""

BUSY_TIMEOUT_MS: Final = 5_000
"""How long to wait for another connection's lock; beyond seconds something hangs."""

ROW_BYTES_MAX: Final = 8 << 20
"""One row. A client id takes some 30 bytes, and a state vector has at most 65,536 of them."""

COMMIT_ROWS_MAX: Final = 256
"""Rows that share one commit; it bounds how long the ones behind wait."""

CONVERSATION_BYTES_MAX: Final = 128
"""A conversation's name, as in the log."""

_CHECKSUM_BYTES: Final = 16
_ROW_FIELDS: Final = 16
_ROW_FIELDS_BEFORE: Final = 12
"""Of a row without facts, stops and ends, as they all were once."""

_SCHEMA: Final = (
    """CREATE TABLE rows (
  conversation TEXT PRIMARY KEY NOT NULL,
  scrub_owed INTEGER NOT NULL,
  bytes BLOB NOT NULL,
  checksum BLOB NOT NULL
) WITHOUT ROWID""",
    """CREATE TABLE members (
  principal TEXT NOT NULL,
  conversation TEXT NOT NULL,
  PRIMARY KEY (principal, conversation)
) WITHOUT ROWID""",
    "CREATE INDEX members_of ON members (conversation)",
)


def _empty() -> Mapping[Any, Any]:
    return MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Row:
    """What is kept of one conversation.

    Attributes:
        conversation: its id.
        owner: the principal in its birth.
        nonce: the other half of its birth.
        access: principal -> right, as the document's root ``access`` says it.
        access_version: how often that changed.
        epoch: the epoch of the last lease that was granted; 0 before the first one.
        holder: the public key of the node that it was granted to; empty before the first one.
        tips: the admitted entries that nothing admitted stands behind -> their chain digest, empty
            for a reply that has not ended.
        redacted: withdrawn entries -> by whom, and when (ms since 1970).
        unconfirmed: pending entries that somebody else than their author brought back -> author.
        clients: client id -> whose it is.
        log_id: the log that ``lsn`` speaks of.
        lsn: how far that log had come when the row was saved last.
        scrub_owed: something was withdrawn, and traces of it may still be in the log's file.
        facts: what the conversation says of itself: key -> SHA-256 of the value. ``None`` in a row
            from before they were kept, which then knows nothing of stops and ends either.
        former: keys of facts -> the digests of their values before, the last one first; an empty
            one stands for any. The key ``""`` stands for all: nothing is known of what was before.
        stops: replies whose end was asked for -> by whom, the last one first.
        ends: requests that ended without a place -> how, and the SHA-256 of what it cost, empty if
            nothing was said of that.
    """

    conversation: str
    owner: str
    nonce: bytes
    access: Mapping[str, str] = field(default_factory=_empty)
    access_version: int = 0
    epoch: int = 0
    holder: bytes = b""
    tips: Mapping[str, bytes] = field(default_factory=_empty)
    redacted: Mapping[str, tuple[str, int]] = field(default_factory=_empty)
    unconfirmed: Mapping[str, str] = field(default_factory=_empty)
    clients: Mapping[int, str] = field(default_factory=_empty)
    log_id: str = ""
    lsn: int = 0
    scrub_owed: bool = False
    facts: Mapping[str, bytes] | None = None
    former: Mapping[str, tuple[bytes, ...]] = field(default_factory=_empty)
    stops: Mapping[str, tuple[str, ...]] = field(default_factory=_empty)
    ends: Mapping[str, tuple[str, bytes]] = field(default_factory=_empty)

    def encode(self) -> bytes:
        """The row as MessagePack, without its name and its mark.

        Raises:
            LocalMisuse: it is over :data:`ROW_BYTES_MAX`.
        """
        values: list[Any] = [
            self.owner,
            self.nonce,
            dict(sorted(self.access.items())),
            self.access_version,
            self.epoch,
            self.holder,
            dict(sorted(self.tips.items())),
            {entry: list(said) for entry, said in sorted(self.redacted.items())},
            dict(sorted(self.unconfirmed.items())),
            dict(sorted(self.clients.items())),
            self.log_id,
            self.lsn,
        ]
        if self.facts is not None:
            values += [
                dict(sorted(self.facts.items())),
                {key: list(digests) for key, digests in sorted(self.former.items())},
                {entry: list(said) for entry, said in sorted(self.stops.items())},
                {entry: list(end) for entry, end in sorted(self.ends.items())},
            ]
        packed: bytes = msgpack.packb(values)
        if len(packed) > ROW_BYTES_MAX:
            raise LocalMisuse(f"a row has at most {ROW_BYTES_MAX} bytes, not {len(packed)}")
        return packed

    @classmethod
    def decode(cls, conversation: str, packed: bytes, *, scrub_owed: bool) -> Self:
        """The row that was encoded.

        Raises:
            ValueError: these bytes are no row.
        """
        values = msgpack.unpackb(packed, strict_map_key=False)
        if not isinstance(values, list) or len(values) not in (_ROW_FIELDS_BEFORE, _ROW_FIELDS):
            raise ValueError("not the fields of a row")
        values[7] = {entry: (by, at) for entry, (by, at) in values[7].items()}
        row = replace(cls(conversation, *values[:_ROW_FIELDS_BEFORE]), scrub_owed=scrub_owed)
        if len(values) == _ROW_FIELDS_BEFORE:
            return row
        facts, former, stops, ends = values[_ROW_FIELDS_BEFORE:]
        return replace(
            row,
            facts=dict(facts),
            former={key: tuple(digests) for key, digests in former.items()},
            stops={entry: tuple(said) for entry, said in stops.items()},
            ends={entry: (state, cost) for entry, (state, cost) in ends.items()},
        )


def check_row(row: Row) -> bytes:
    """The row's bytes, if it may be saved.

    Raises:
        LocalMisuse: its name or its size is over a limit.
    """
    length = len(row.conversation.encode(errors="replace"))
    if not 1 <= length <= CONVERSATION_BYTES_MAX:
        raise LocalMisuse(f"a conversation's name has 1 to {CONVERSATION_BYTES_MAX} bytes")
    return row.encode()


class Register(Protocol):
    """A store of rows. An instance belongs to the event loop that it was opened in."""

    async def load(self, conversation: str) -> Row | None:
        """The row saved last.

        Raises:
            Corrupt: what is stored is not what was saved.
            StoreFailed: it could not be read now.
        """

    async def save(self, row: Row) -> None:
        """Make a row durable in the place of the one before.

        Raises:
            StoreFailed: it is not durable.
            LocalMisuse: over a limit, or after ``close``.
        """

    async def conversations_of(self, principal: str) -> tuple[str, ...]:
        """The conversations that a principal owns or has a right in, by id."""

    async def owed(self) -> tuple[str, ...]:
        """The conversations with ``scrub_owed``, by id."""

    async def close(self) -> None:
        """Finish what was handed over, then let go of the file. Safe to call twice."""


# --- without a disk ----------------------------------------------------------------------------


async def _instant(_seam: RegisterSeam) -> None:
    """Take no time and never fail."""


class MemoryRegister:
    """A :class:`Register` whose disk is a dict, for simulations: a seed replays.

    Args:
        disk: what survives a crash: conversation -> row.
        faults: awaited at each :data:`RegisterSeam`.
    """

    def __init__(
        self, disk: dict[str, Row] | None = None, *, faults: MemoryRegisterFaults = _instant
    ) -> None:
        self.disk: dict[str, Row] = {} if disk is None else disk
        self._faults = faults
        self._turn = asyncio.Lock()  # saves take effect in order
        self._closed = False

    async def load(self, conversation: str) -> Row | None:
        """See :class:`Register`."""
        self._check_open()
        return self.disk.get(conversation)

    async def save(self, row: Row) -> None:
        """See :class:`Register`."""
        self._check_open()
        check_row(row)
        await asyncio.shield(asyncio.ensure_future(self._save(row)))

    async def _save(self, row: Row) -> None:
        async with self._turn:
            await self._faults("register-before-commit")
            self.disk[row.conversation] = row
            await self._faults("register-after-commit")

    async def conversations_of(self, principal: str) -> tuple[str, ...]:
        """See :class:`Register`."""
        self._check_open()
        return tuple(sorted(name for name, row in self.disk.items() if principal in _members(row)))

    async def owed(self) -> tuple[str, ...]:
        """See :class:`Register`."""
        self._check_open()
        return tuple(sorted(name for name, row in self.disk.items() if row.scrub_owed))

    async def close(self) -> None:
        """See :class:`Register`."""
        async with self._turn:
            self._closed = True

    def _check_open(self) -> None:
        if self._closed:
            raise LocalMisuse("this register is closed")


def _members(row: Row) -> set[str]:
    return {row.owner, *row.access} if row.owner else set(row.access)


# --- an SQLite file ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Save:
    row: Row
    packed: bytes
    done: asyncio.Future[None]


def _no_fault(_seam: RegisterSeam) -> None:
    """Never fail."""


class SqliteRegister:
    """A :class:`Register` in one SQLite file; see :meth:`open`.

    One writer thread runs every transaction; rows that wait while one is on its way to the disk
    share the next. ``journal_mode=WAL`` with ``synchronous=FULL``: a commit has been synced to the
    disk when it returns.
    """

    def __init__(self, path: Path, faults: RegisterFaults) -> None:
        self._path = path
        self._faults = faults
        self._loop = asyncio.get_running_loop()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="register")
        self._connection: sqlite3.Connection | None = None
        self._lock = threading.Lock()
        self._queue: deque[_Save] = deque()
        self._is_scheduled = False
        self._closing: asyncio.Task[None] | None = None

    @classmethod
    async def open(cls, path: Path, *, faults: RegisterFaults = _no_fault) -> Self:
        """Open a register; create an empty one where there is none.

        Args:
            path: the file, mode 0600.
            faults: called at each :data:`RegisterSeam`, in the writer's thread.

        Raises:
            Corrupt: the file is another program's, a newer version's, or damaged.
            StoreFailed: it cannot be opened or created now.
        """
        register = cls(path, faults)
        try:
            await register._run(register._open)
        except BaseException:
            register._thread.shutdown(wait=False)
            raise
        return register

    async def __aenter__(self) -> Self:
        """Return the register itself."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close it."""
        await self.close()

    async def load(self, conversation: str) -> Row | None:
        """See :class:`Register`."""
        self._check_open()
        return await self._run(lambda: self._read(conversation))

    async def save(self, row: Row) -> None:
        """See :class:`Register`."""
        self._check_open()
        save = _Save(row, check_row(row), self._loop.create_future())
        with self._lock:
            self._queue.append(save)
            if not self._is_scheduled:
                self._is_scheduled = True
                self._thread.submit(self._drain)
        await asyncio.shield(save.done)

    async def conversations_of(self, principal: str) -> tuple[str, ...]:
        """See :class:`Register`."""
        self._check_open()
        query = "SELECT conversation FROM members WHERE principal = ? ORDER BY conversation"
        return await self._run(lambda: self._names(query, principal))

    async def owed(self) -> tuple[str, ...]:
        """See :class:`Register`."""
        self._check_open()
        query = "SELECT conversation FROM rows WHERE scrub_owed = ? ORDER BY conversation"
        return await self._run(lambda: self._names(query, 1))

    async def close(self) -> None:
        """See :class:`Register`."""
        if self._closing is None:
            self._closing = self._loop.create_task(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        await self._loop.run_in_executor(self._thread, self._close_file)
        self._thread.shutdown(wait=False)

    def _check_open(self) -> None:
        if self._closing is not None:
            raise LocalMisuse(f"{self._path} is closed")

    async def _run(self, work: Callable[[], Result]) -> Result:
        """Run ``work`` in the writer's thread; its error becomes one of ours."""

        def explained() -> Result:
            try:
                return work()
            except Exception as error:
                raise self._explain(error) from error

        return await asyncio.shield(self._loop.run_in_executor(self._thread, explained))

    def _settle(self, saves: Sequence[_Save], error: CrdtLlmError | None) -> None:
        for save in saves:
            if save.done.done():
                continue
            if error is None:
                save.done.set_result(None)
            else:
                # One of its own for everyone: raising one object in several tasks would mix up
                # their tracebacks.
                own = type(error)(*error.args)
                own.__cause__ = error.__cause__
                save.done.set_exception(own)
                save.done.exception()  # a caller that was cancelled does not hear of it

    # --- in the writer's thread ----------------------------------------------------------------

    def _open(self) -> None:
        if not self._path.exists():
            _create(self._path)
        if self._path.stat().st_size == 0:
            raise Corrupt(f"{self._path} is empty, which a register never is: {_MEND}")
        connection = _connect(self._path)
        try:
            _check_identity(connection, self._path)
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA fullfsync = ON")
            connection.execute("PRAGMA secure_delete = ON")
        except BaseException:
            connection.close()
            raise
        self._connection = connection

    def _close_file(self) -> None:
        while self._queue:
            self._commit_some()
        if self._connection is not None:
            with contextlib.suppress(sqlite3.Error):  # then the WAL stays until the next opening
                self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
            self._connection.close()
            self._connection = None

    def _opened(self) -> sqlite3.Connection:
        if self._connection is None:
            raise LocalMisuse(f"{self._path} is closed")
        return self._connection

    def _read(self, conversation: str) -> Row | None:
        found = (
            self._opened()
            .execute(
                "SELECT scrub_owed, bytes, checksum FROM rows WHERE conversation = ?",
                (conversation,),
            )
            .fetchone()
        )
        if found is None:
            return None
        scrub_owed, packed, checksum = found
        if checksum != _checksum(conversation, scrub_owed, packed):
            raise Corrupt(f"{self._path}: the row of {conversation} was changed: {_MEND}")
        try:
            return Row.decode(conversation, packed, scrub_owed=bool(scrub_owed))
        except (ValueError, TypeError, AttributeError, IndexError) as error:
            raise Corrupt(
                f"{self._path}: the row of {conversation} is no row ({error}): {_MEND}"
            ) from error

    def _names(self, query: str, value: str | int) -> tuple[str, ...]:
        return tuple(name for (name,) in self._opened().execute(query, (value,)))

    def _drain(self) -> None:
        self._commit_some()
        with self._lock:
            self._is_scheduled = bool(self._queue)
            if self._is_scheduled:
                self._thread.submit(self._drain)

    def _commit_some(self) -> None:
        with self._lock:
            count = min(len(self._queue), COMMIT_ROWS_MAX)
            saves = [self._queue.popleft() for _ in range(count)]
        if not saves:
            return
        failure: CrdtLlmError | None = None
        try:
            self._write(saves)
            self._faults("register-after-commit")
        except Exception as error:  # noqa: BLE001 - every failure has to reach those who wait
            failure = self._explain(error)
            failure.__cause__ = error if error is not failure else None
        # If the loop is gone, so are all who waited.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._settle, saves, failure)

    def _write(self, saves: Sequence[_Save]) -> None:
        connection = self._opened()
        latest = {save.row.conversation: save for save in saves}  # the last one of each counts
        connection.execute("BEGIN IMMEDIATE")
        try:
            for name, save in latest.items():
                owed = int(save.row.scrub_owed)
                connection.execute(
                    "INSERT INTO rows VALUES (?, ?, ?, ?) ON CONFLICT (conversation) DO UPDATE SET"
                    " scrub_owed = excluded.scrub_owed, bytes = excluded.bytes,"
                    " checksum = excluded.checksum",
                    (name, owed, save.packed, _checksum(name, owed, save.packed)),
                )
                self._write_members(connection, name, _members(save.row))
            self._faults("register-before-commit")
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise

    @staticmethod
    def _write_members(connection: sqlite3.Connection, name: str, members: set[str]) -> None:
        rows = connection.execute("SELECT principal FROM members WHERE conversation = ?", (name,))
        known = {principal for (principal,) in rows}
        connection.executemany(
            "DELETE FROM members WHERE principal = ? AND conversation = ?",
            [(principal, name) for principal in sorted(known - members)],
        )
        connection.executemany(
            "INSERT INTO members VALUES (?, ?)",
            [(principal, name) for principal in sorted(members - known)],
        )

    def _explain(self, error: Exception) -> CrdtLlmError:
        if isinstance(error, CrdtLlmError):
            return error
        code = getattr(error, "sqlite_errorcode", None)
        if code is not None and code & 0xFF in _DAMAGE_CODES:
            return Corrupt(f"{self._path} is damaged ({error}): {_MEND}")
        if isinstance(error, sqlite3.Error | OSError):
            return StoreFailed(f"{self._path} cannot be used now ({error}): check the disk")
        return StoreFailed(f"{self._path} was not written because of a bug ({error!r})")


_DAMAGE_CODES: Final = frozenset(
    {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_FORMAT, sqlite3.SQLITE_ERROR}
)

_MEND: Final = (
    "restore the file from a backup, or move it away: the next start makes its rows again from the"
    " log, and without the log conversations come back with import --trust"
)


def _checksum(conversation: str, scrub_owed: int, packed: bytes) -> bytes:
    digest = blake2b(digest_size=_CHECKSUM_BYTES, person=b"crll-register")
    name = conversation.encode(errors="replace")
    digest.update(len(name).to_bytes(4) + name + bytes([scrub_owed & 1]) + packed)
    return digest.digest()


def _connect(path: Path) -> sqlite3.Connection:
    """Connect to an existing file; a transaction begins only where one is begun."""
    return sqlite3.connect(
        f"{path.absolute().as_uri()}?mode=rw",
        uri=True,
        isolation_level=None,
        timeout=BUSY_TIMEOUT_MS / 1000,
        check_same_thread=True,
    )


def _check_identity(connection: sqlite3.Connection, path: Path) -> None:
    """Refuse anything that is not exactly one of ours; nothing is written before."""
    if connection.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
        raise Corrupt(f"{path} belongs to another program: move it away")
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version > SCHEMA_VERSION:
        raise Corrupt(f"{path} was written by a newer version: update crdt-llm")
    layout = {sql for (sql,) in connection.execute("SELECT sql FROM sqlite_schema") if sql}
    if version != SCHEMA_VERSION or layout != set(_SCHEMA):
        raise Corrupt(f"{path} has an unknown layout: {_MEND}")
    if connection.execute("PRAGMA journal_mode = WAL").fetchone()[0] != "wal":
        raise StoreFailed(f"{path} cannot have a write-ahead log: use a local disk")


def _create(path: Path) -> None:
    """Create an empty register, whole or not at all: beside its place, then linked into it."""
    draft = path.with_name(f"{path.name}.{os.getpid()}.new")
    draft.unlink(missing_ok=True)  # of a process with our number that died here
    os.close(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, FILE_MODE))
    try:
        connection = _connect(draft)
        try:
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("BEGIN IMMEDIATE")
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            for statement in _SCHEMA:
                connection.execute(statement)
            connection.execute("COMMIT")
        finally:
            connection.close()
        with contextlib.suppress(FileExistsError):  # another process was faster: its file stays
            os.link(draft, path)
    finally:
        draft.unlink()
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
