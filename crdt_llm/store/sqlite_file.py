"""What an update log looks like as an SQLite file, and how it is read without trusting it.

It owns the schema, the checksums, the checks at opening and the statements. Everything here is
synchronous and works on a connection that somebody else owns. It must not know threads, the event
loop, or who may call when: that is :mod:`crdt_llm.store.sqlite`.

A file is five tables. ``heads`` says per conversation where its log begins and ends, so that a
lost row at either end is noticed; ``updates`` and ``snapshots`` hold the bytes; ``deleted`` says
where the numbering goes on if a deleted conversation comes back, under a hash of its name;
``store`` is one row about the file itself. Every row carries a BLAKE2b-128 checksum over its key
and its contents, because SQLite has none: a flipped bit in a value is otherwise handed out as if it
were true.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import stat
import struct
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Final

from crdt_llm.errors import Corrupt, CrdtLlmError, StoreFailed
from crdt_llm.store.log import Loaded, Stored

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    Connect = Callable[[Path], sqlite3.Connection]

APPLICATION_ID: Final = 0x43524C4C
"""In the file's header, "CRLL": tells our files from other programs' databases."""

SCHEMA_VERSION: Final = 1
"""In the file's header as ``user_version``."""

FILE_MODE: Final = 0o600
"""Conversations are private: nobody but the owner reads them. SQLite gives its WAL the same."""

BUSY_TIMEOUT_MS: Final = 5_000
"""How long to wait for another connection's lock. A read takes milliseconds; longer than seconds
means that something hangs, and then an error is of more use than a hung room."""

PAGE_BYTES: Final = 4096
"""SQLite's default, and the block of the file systems below it."""

WAL_BYTES_KEPT: Final = 16 * 1024 * 1024
"""After a burst the WAL file is cut back to this. Reusing its blocks is faster than growing it."""

ROWS_PER_STATEMENT_MAX: Final = 64
"""Rows of one ``INSERT``. The interpreter's lock is let go once per statement, not once per row: a
writer that asks for it back per row waits for a busy event loop as many times. 64 rows of seven
values stay below 999 parameters, the smallest limit of any SQLite in use."""

LSN_MAX: Final = 2**53 - 1
"""The largest whole number that JavaScript peers hold exactly."""

LSN_LEAP: Final = 2**32
"""How far the numbering leaps when a conversation is deleted whose end is unknown: by more updates
than a conversation can lose. Two million such leaps fit below ``LSN_MAX``."""

_CHECKSUM_BYTES: Final = 16
_NUMBER: Final = struct.Struct(">q")

_SCHEMA: Final = (
    """CREATE TABLE store (
  id INTEGER PRIMARY KEY CHECK (id = 1),
  log_id TEXT NOT NULL,
  checksum BLOB NOT NULL
)""",
    """CREATE TABLE deleted (
  name_hash BLOB PRIMARY KEY NOT NULL,
  floor INTEGER NOT NULL,
  checksum BLOB NOT NULL
) WITHOUT ROWID""",
    """CREATE TABLE heads (
  conversation TEXT PRIMARY KEY NOT NULL,
  lsn INTEGER NOT NULL,
  snapshot_lsn INTEGER NOT NULL,
  log_bytes INTEGER NOT NULL,
  snapshot_bytes INTEGER,
  changed_at INTEGER NOT NULL,
  checksum BLOB NOT NULL
) WITHOUT ROWID""",
    """CREATE TABLE snapshots (
  conversation TEXT PRIMARY KEY NOT NULL,
  lsn INTEGER NOT NULL,
  bytes BLOB NOT NULL,
  checksum BLOB NOT NULL
)""",
    # Without rowid the updates of a conversation lie side by side: one range to read, one range to
    # wipe.
    """CREATE TABLE updates (
  conversation TEXT NOT NULL,
  lsn INTEGER NOT NULL,
  bytes BLOB NOT NULL,
  checksum BLOB NOT NULL,
  PRIMARY KEY (conversation, lsn)
) WITHOUT ROWID""",
)

_BRING_BACK: Final = (
    "restore the file from a backup, or move it away and let the clients' replicas bring the"
    " conversations back"
)


@dataclass(frozen=True, slots=True)
class Head:
    """Where one conversation's log begins and ends.

    ``snapshot_bytes`` is None while there is no snapshot. ``updates`` holds exactly the LSNs
    ``snapshot_lsn + 1`` to ``lsn``, ``log_bytes`` in all.
    """

    conversation: str
    lsn: int
    snapshot_lsn: int
    log_bytes: int
    snapshot_bytes: int | None
    changed_at: int


# --- checksums ---------------------------------------------------------------------------------


def _checksum(purpose: bytes, text: str, numbers: tuple[int, ...], data: bytes = b"") -> bytes:
    """BLAKE2b-128 (RFC 7693) over a purpose, a text, some numbers and some bytes.

    The numbers are as many as the purpose says, the text is preceded by its length: no two
    different rows hash the same bytes.
    """
    name = text.encode("utf-8", "surrogateescape")
    digest = blake2b(digest_size=_CHECKSUM_BYTES, person=purpose)
    digest.update(_NUMBER.pack(len(name)) + name + b"".join(map(_NUMBER.pack, numbers)))
    digest.update(data)
    return digest.digest()


def update_checksum(conversation: str, lsn: int, update: bytes) -> bytes:
    """Return the checksum of a row of ``updates``, 16 bytes."""
    return _checksum(b"crll-update", conversation, (lsn,), update)


def snapshot_checksum(conversation: str, lsn: int, snapshot: bytes) -> bytes:
    """Return the checksum of a row of ``snapshots``, 16 bytes."""
    return _checksum(b"crll-snapshot", conversation, (lsn,), snapshot)


def head_checksum(head: Head) -> bytes:
    """Return the checksum of a row of ``heads``, 16 bytes."""
    snapshot_bytes = -1 if head.snapshot_bytes is None else head.snapshot_bytes
    numbers = (head.lsn, head.snapshot_lsn, head.log_bytes, snapshot_bytes, head.changed_at)
    return _checksum(b"crll-head", head.conversation, numbers)


def store_checksum(log_id: str) -> bytes:
    """Return the checksum of the row of ``store``, 16 bytes."""
    return _checksum(b"crll-store", log_id, ())


def name_hash(conversation: str) -> bytes:
    """Return what is kept of the name of a deleted conversation, 16 bytes."""
    return _checksum(b"crll-name", conversation, ())


def floor_checksum(conversation: str, floor: int) -> bytes:
    """Return the checksum of a row of ``deleted``, 16 bytes."""
    return _checksum(b"crll-deleted", conversation, (floor,))


# --- errors ------------------------------------------------------------------------------------

# The generic SQLITE_ERROR is among them: our statements never change and have been tested, so if
# one does not fit the file (an unsupported format, a table that is gone), it is the file's fault.
_DAMAGE_CODES: Final = frozenset(
    {
        sqlite3.SQLITE_CORRUPT,
        sqlite3.SQLITE_NOTADB,
        sqlite3.SQLITE_FORMAT,
        sqlite3.SQLITE_ERROR,
    }
)
_PRIMARY_CODE_MASK: Final = 0xFF


def explain(error: Exception, path: Path) -> CrdtLlmError:
    """Turn whatever went wrong into an error of ours: one line that names the file.

    What shows damage becomes ``Corrupt``, an error of ours stays, everything else is
    ``StoreFailed``. The caller raises it ``from`` the original.
    """
    if isinstance(error, CrdtLlmError):
        return error
    # sqlite3 sets the attribute on errors of the library, not on those of its own.
    code = getattr(error, "sqlite_errorcode", None)
    shows_damage = code is not None and (
        code & _PRIMARY_CODE_MASK in _DAMAGE_CODES or code == sqlite3.SQLITE_IOERR_CORRUPTFS
    )
    # A message of SQLite that is no text quotes a schema that is none.
    if shows_damage or isinstance(error, UnicodeDecodeError):
        return Corrupt(f"{path} is damaged ({error}): {_BRING_BACK}")
    if isinstance(error, sqlite3.Error | OSError):
        return StoreFailed(f"{path} cannot be used now ({error}): check the disk, then try again")
    return StoreFailed(f"{path} was not written because of a bug ({error!r}): please report it")


def printable(name: str) -> str:
    """Return a name as one line that can be printed, whatever is in it."""
    return name if name.isprintable() else ascii(name)


def damaged(path: Path, conversation: str, what: str) -> Corrupt:
    """Return the error for one conversation that cannot be trusted."""
    return Corrupt(
        f"{path}: conversation {printable(conversation)} is damaged ({what}): delete it from this"
        " file so that a client's replica can bring it back, or restore the file from a backup"
    )


# --- opening -----------------------------------------------------------------------------------


def connect_file(path: Path) -> sqlite3.Connection:
    """Connect to an existing file. It never creates one, and never begins a transaction itself."""
    return sqlite3.connect(
        f"{path.absolute().as_uri()}?mode=rw",
        uri=True,
        isolation_level=None,
        timeout=BUSY_TIMEOUT_MS / 1000,
        # Inserts into two tables of every length, and the rest.
        cached_statements=2 * ROWS_PER_STATEMENT_MAX + 64,
    )


def create(path: Path, log_id: str, connect: Connect) -> None:
    """Create an empty log at ``path``, whole or not at all.

    It is written beside the place and then linked into it: so a short or empty file in that place
    is always damage, never a creation that was interrupted.

    Raises:
        Corrupt: a WAL lies there without its file; SQLite would play it into the new one.
        OSError, sqlite3.Error: it could not be created.
    """
    for suffix in ("-wal", "-journal"):
        if path.with_name(path.name + suffix).exists():
            raise Corrupt(
                f"{path} is missing but {path.name}{suffix} is there: put the file back, or move"
                " the rest away to begin an empty log"
            )
    draft = path.with_name(f"{path.name}.{log_id}.new")
    os.close(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, FILE_MODE))
    try:
        connection = connect(draft)
        try:
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute(f"PRAGMA page_size = {PAGE_BYTES}")
            connection.execute("BEGIN IMMEDIATE")
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            for statement in _SCHEMA:
                connection.execute(statement)
            connection.execute(
                "INSERT INTO store VALUES (1, ?, ?)", (log_id, store_checksum(log_id))
            )
            connection.execute("COMMIT")
        finally:
            connection.close()
        # Unlike a rename, a link never replaces: if another process was faster, its file stays.
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)
    finally:
        draft.unlink()
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def open_checked(path: Path, connect: Connect) -> tuple[sqlite3.Connection, str]:
    """Connect to a log, refuse anything that is not exactly one of ours, and set it up.

    Return the connection and the log's random name.

    Nothing is written before the checks have passed.

    Raises:
        Corrupt: another program's file, a newer version's, or a damaged one.
        OSError, sqlite3.Error: it could not be opened; to be explained by the caller.
    """
    if path.stat().st_size == 0:
        raise Corrupt(f"{path} is empty, which a log never is: {_BRING_BACK}")
    if stat.S_IMODE(path.stat().st_mode) != FILE_MODE:
        # By path: closing a descriptor of our own would drop the locks that SQLite holds for other
        # connections of this process.
        path.chmod(FILE_MODE)
    connection = connect(path)
    try:
        # Names with broken UTF-8 must come out, so that their checksum can be found wrong.
        connection.text_factory = lambda raw: raw.decode("utf-8", "surrogateescape")
        connection.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
        connection.execute("PRAGMA trusted_schema = OFF")
        connection.execute("PRAGMA cell_size_check = ON")
        log_id = _check_identity(connection, path)
        _use_wal(connection, path)
        connection.execute("PRAGMA synchronous = FULL")
        # Only macOS knows the difference; there a plain fsync stops at the drive's cache.
        connection.execute("PRAGMA fullfsync = ON")
        connection.execute("PRAGMA secure_delete = ON")
        # Checkpoints are made between commits, not inside one that somebody waits for.
        connection.execute("PRAGMA wal_autocheckpoint = 0")
        connection.execute(f"PRAGMA journal_size_limit = {WAL_BYTES_KEPT}")
    except BaseException:
        connection.close()
        raise
    return connection, log_id


def _use_wal(connection: sqlite3.Connection, path: Path) -> None:
    mode = connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
    if mode != "wal":
        raise StoreFailed(f"{path} cannot have a write-ahead log there: put it on a local disk")


def _check_identity(connection: sqlite3.Connection, path: Path) -> str:
    if connection.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
        raise Corrupt(f"{path} belongs to another program: name another file, or move it away")
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version > SCHEMA_VERSION:
        raise Corrupt(
            f"{path} was written by a newer version (schema {version}, this one knows"
            f" {SCHEMA_VERSION}): update crdt-llm, or name another file"
        )
    found = {sql for (sql,) in connection.execute("SELECT sql FROM sqlite_schema") if sql}
    if version != SCHEMA_VERSION or found != set(_SCHEMA):
        raise Corrupt(f"{path} has an unknown layout (schema {version}): {_BRING_BACK}")
    return _read_log_id(connection, path)


# --- statements --------------------------------------------------------------------------------


def _insert(
    connection: sqlite3.Connection, table: str, rows: Sequence[tuple[Any, ...]], tail: str = ""
) -> None:
    """Insert rows in as few statements as possible; those of one length are prepared once."""
    for start in range(0, len(rows), ROWS_PER_STATEMENT_MAX):
        chunk = rows[start : start + ROWS_PER_STATEMENT_MAX]
        group = f"({', '.join('?' * len(chunk[0]))})"
        values = ", ".join([group] * len(chunk))
        connection.execute(
            f"INSERT INTO {table} VALUES {values}{tail}",  # noqa: S608 - no value is spliced in
            [value for row in chunk for value in row],
        )


def insert_updates(connection: sqlite3.Connection, rows: Iterable[tuple[str, int, bytes]]) -> None:
    """Insert ``(conversation, LSN, update)``; an LSN that is taken is an error of the database."""
    _insert(
        connection,
        "updates",
        [(name, lsn, update, update_checksum(name, lsn, update)) for name, lsn, update in rows],
    )


def put_heads(connection: sqlite3.Connection, heads: Iterable[Head]) -> None:
    """Insert or replace heads, one per conversation."""
    _insert(
        connection,
        "heads",
        [
            (
                head.conversation,
                head.lsn,
                head.snapshot_lsn,
                head.log_bytes,
                head.snapshot_bytes,
                head.changed_at,
                head_checksum(head),
            )
            for head in heads
        ],
        # With a VALUES list the parser needs no "WHERE true" before the upsert.
        " ON CONFLICT (conversation) DO UPDATE SET lsn = excluded.lsn,"
        " snapshot_lsn = excluded.snapshot_lsn, log_bytes = excluded.log_bytes,"
        " snapshot_bytes = excluded.snapshot_bytes, changed_at = excluded.changed_at,"
        " checksum = excluded.checksum",
    )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and 0 <= value <= LSN_MAX


def _parse_head(row: tuple[Any, ...]) -> Head | None:
    """Return the head in a row of ``_HEAD_COLUMNS``, or None if it is not what was written."""
    conversation, lsn, snapshot_lsn, log_bytes, snapshot_bytes, changed_at, checksum = row
    well_formed = (
        isinstance(conversation, str)
        and all(map(_is_count, (lsn, snapshot_lsn, log_bytes)))
        and (snapshot_bytes is None or _is_count(snapshot_bytes))
        and isinstance(changed_at, int)
    )
    if not well_formed:
        return None
    head = Head(conversation, lsn, snapshot_lsn, log_bytes, snapshot_bytes, changed_at)
    return head if checksum == head_checksum(head) else None


_HEAD_COLUMNS: Final = (
    "conversation, lsn, snapshot_lsn, log_bytes, snapshot_bytes, changed_at, checksum"
)


def read_head(connection: sqlite3.Connection, path: Path, conversation: str) -> Head | None:
    """Return the head of a conversation, None if it is unknown.

    Raises:
        Corrupt: it is not what was written, or it is missing while its updates are there.
    """
    row = connection.execute(
        f"SELECT {_HEAD_COLUMNS} FROM heads WHERE conversation = ?",  # noqa: S608 - a constant
        (conversation,),
    ).fetchone()
    if row is None:
        orphaned = connection.execute(
            "SELECT EXISTS (SELECT 1 FROM updates WHERE conversation = ?1)"
            " OR EXISTS (SELECT 1 FROM snapshots WHERE conversation = ?1)",
            (conversation,),
        ).fetchone()[0]
        if orphaned:
            raise damaged(path, conversation, "its head is missing")
        return None
    head = _parse_head(row)
    if head is None:
        raise damaged(path, conversation, "its head does not match its checksum")
    return head


def _read_log_id(connection: sqlite3.Connection, path: Path) -> str:
    rows = connection.execute("SELECT log_id, checksum FROM store").fetchall()
    if len(rows) == 1:
        log_id, checksum = rows[0]
        if isinstance(log_id, str) and checksum == store_checksum(log_id):
            return log_id
    raise Corrupt(f"{path} is damaged (its own row does not match its checksum): {_BRING_BACK}")


def read_floor(connection: sqlite3.Connection, path: Path, conversation: str) -> int:
    """Return where the numbering of an unknown conversation begins: at 0, unless it was deleted.

    Raises:
        Corrupt: its row is not what was written.
    """
    row = connection.execute(
        "SELECT floor, checksum FROM deleted WHERE name_hash = ?", (name_hash(conversation),)
    ).fetchone()
    if row is None:
        return 0
    floor, checksum = row
    if not _is_count(floor) or checksum != floor_checksum(conversation, floor):
        raise Corrupt(
            f"{path}: where the deleted conversation {printable(conversation)} ended is damaged:"
            f" {_BRING_BACK}"
        )
    return int(floor)


def read_list(connection: sqlite3.Connection) -> tuple[Stored, ...]:
    """Return all heads, the most recently changed first; damaged ones are marked, not left out."""
    stored = []
    for row in connection.execute(f"SELECT {_HEAD_COLUMNS} FROM heads"):  # noqa: S608 - as above
        head = _parse_head(row)
        if head is None:
            name = row[0] if isinstance(row[0], str) else repr(row[0])
            stored.append(Stored(name, 0, 0, 0, 0, damage="its head does not match its checksum"))
        else:
            stored.append(
                Stored(
                    head.conversation,
                    head.lsn,
                    head.log_bytes,
                    head.snapshot_bytes or 0,
                    head.changed_at,
                )
            )
    return tuple(sorted(stored, key=lambda item: (-item.changed_at, item.conversation)))


def read_conversation(connection: sqlite3.Connection, path: Path, conversation: str) -> Loaded:
    """Return all of a conversation, every byte of it checked.

    It must run inside one transaction, else it mixes two states.

    Raises:
        Corrupt: anything is missing, in surplus, or not what was written.
    """
    head = read_head(connection, path, conversation)
    if head is None:
        return Loaded(None, read_floor(connection, path, conversation), ())
    snapshot = _read_snapshot(connection, path, head)
    expected = head.snapshot_lsn
    log_bytes = 0
    updates = []
    for lsn, update, checksum in connection.execute(
        "SELECT lsn, bytes, checksum FROM updates WHERE conversation = ? ORDER BY lsn",
        (conversation,),
    ):
        expected += 1
        if lsn != expected:
            raise damaged(path, conversation, f"update {expected} is missing")
        if not isinstance(update, bytes) or checksum != update_checksum(conversation, lsn, update):
            raise damaged(path, conversation, f"update {lsn} does not match its checksum")
        log_bytes += len(update)
        updates.append((lsn, update))
    if expected != head.lsn or log_bytes != head.log_bytes:
        raise damaged(path, conversation, f"its log ends at {expected} instead of {head.lsn}")
    return Loaded(snapshot, head.snapshot_lsn, tuple(updates))


def _read_snapshot(connection: sqlite3.Connection, path: Path, head: Head) -> bytes | None:
    row = connection.execute(
        "SELECT lsn, bytes, checksum FROM snapshots WHERE conversation = ?", (head.conversation,)
    ).fetchone()
    if row is None and head.snapshot_bytes is None:
        return None
    if row is None or head.snapshot_bytes is None:
        raise damaged(path, head.conversation, "its snapshot is missing or in surplus")
    lsn, snapshot, checksum = row
    if (
        lsn != head.snapshot_lsn
        or not isinstance(snapshot, bytes)
        or len(snapshot) != head.snapshot_bytes
        or checksum != snapshot_checksum(head.conversation, lsn, snapshot)
    ):
        raise damaged(path, head.conversation, "its snapshot does not match its checksum")
    return snapshot


def put_snapshot(
    connection: sqlite3.Connection, conversation: str, lsn: int, snapshot: bytes
) -> None:
    """Insert or replace the snapshot of a conversation."""
    connection.execute(
        "INSERT INTO snapshots VALUES (?, ?, ?, ?) ON CONFLICT (conversation) DO UPDATE SET"
        " lsn = excluded.lsn, bytes = excluded.bytes, checksum = excluded.checksum",
        (conversation, lsn, snapshot, snapshot_checksum(conversation, lsn, snapshot)),
    )


def drop_updates(connection: sqlite3.Connection, path: Path, head: Head, through: int) -> Head:
    """Delete the updates up to and including ``through``; return the head without them.

    Raises:
        Corrupt: there were not as many as the head says.
    """
    dropped, dropped_bytes = connection.execute(
        "SELECT count(*), coalesce(sum(length(bytes)), 0) FROM updates"
        " WHERE conversation = ? AND lsn <= ?",
        (head.conversation, through),
    ).fetchone()
    if dropped != through - head.snapshot_lsn or dropped_bytes > head.log_bytes:
        raise damaged(path, head.conversation, "updates are missing or in surplus")
    connection.execute(
        "DELETE FROM updates WHERE conversation = ? AND lsn <= ?", (head.conversation, through)
    )
    return replace(head, snapshot_lsn=through, log_bytes=head.log_bytes - dropped_bytes)


def delete_conversation(connection: sqlite3.Connection, path: Path, conversation: str) -> None:
    """Delete every row of a conversation, damaged or not, but for where its numbering goes on."""
    last = _last_lsn(connection, path, conversation)
    if last is None:
        return
    for table in ("heads", "snapshots", "updates"):
        connection.execute(
            f"DELETE FROM {table} WHERE conversation = ?",  # noqa: S608 - a constant
            (conversation,),
        )
    # One above: no position in the deleted log equals one in a new log of the same name.
    floor = last + 1
    connection.execute(
        "INSERT INTO deleted VALUES (?, ?, ?) ON CONFLICT (name_hash) DO UPDATE SET"
        " floor = excluded.floor, checksum = excluded.checksum",
        (name_hash(conversation), floor, floor_checksum(conversation, floor)),
    )


def _last_lsn(connection: sqlite3.Connection, path: Path, conversation: str) -> int | None:
    """Return an LSN that no LSN of the conversation exceeds, None if there is no row of it."""
    try:
        head = read_head(connection, path, conversation)
    except Corrupt:
        # The head is lost, and with it the knowledge whether rows at the end are lost too.
        proven = [0]
        for lsn, update, checksum in connection.execute(
            "SELECT lsn, bytes, checksum FROM updates WHERE conversation = ?", (conversation,)
        ):
            if (
                _is_count(lsn)
                and isinstance(update, bytes)
                and checksum == update_checksum(conversation, lsn, update)
            ):
                proven.append(lsn)
        return max(proven) + LSN_LEAP
    return None if head is None else head.lsn


def touch(connection: sqlite3.Connection) -> None:
    """Write a page without changing anything."""
    connection.execute("UPDATE store SET log_id = log_id")
