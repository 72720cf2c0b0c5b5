"""Which access tokens were issued and which were revoked, as an SQLite file of its own.

This module owns the file. It must not know what a token says or how it is signed: an issued token
is a line for people, a revoked one an id that counts no more. The relay reads it while the command
line writes it, which is why it is neither in the log nor in memory: SQLite's own locking lets both
have it open.

Calls are synchronous: a row is a few hundred bytes, and nothing here is called per message.
"""

from __future__ import annotations

import os
import sqlite3
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self, TypeVar

from crdt_llm.errors import Corrupt, StoreFailed

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_Result = TypeVar("_Result")

BUSY_TIMEOUT_S: Final = 2.0
"""How long to wait for the other process; a write takes milliseconds."""

_APPLICATION_ID: Final = 0x43524C54
"""In the file's header, "CRLT": tells our files from other programs' databases."""

_FILE_MODE: Final = 0o600

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS issued (
  id TEXT PRIMARY KEY,
  principal TEXT NOT NULL,
  scope TEXT NOT NULL,
  issued_at INTEGER NOT NULL,
  expires_at INTEGER
) STRICT;
CREATE TABLE IF NOT EXISTS revoked (
  id TEXT PRIMARY KEY,
  revoked_at INTEGER NOT NULL
) STRICT;
"""


@dataclass(frozen=True, slots=True)
class Issued:
    """A token that was given out. The token itself is kept nowhere.

    Attributes:
        id: Its name, by which it can be revoked.
        principal: Whom it stands for.
        scope: What it allows, for people.
        issued_at: ms since 1970.
        expires_at: ms since 1970, or ``None``.
        revoked_at: ms since 1970, or ``None``.
    """

    id: str
    principal: str
    scope: str
    issued_at: int
    expires_at: int | None
    revoked_at: int | None = None


class TokenLedger:
    """The file. Use it from one thread.

    Args:
        connection: See :meth:`open`.
        path: For errors.
    """

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self._connection = connection
        self._path = path
        self._version: tuple[int, int] | None = None
        self._revoked: frozenset[str] = frozenset()

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open the file, or make one.

        Raises:
            Corrupt: It is no such file.
            StoreFailed: It cannot be opened now.
        """
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, _FILE_MODE)
            os.close(handle)
            connection = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None)
        except (OSError, sqlite3.Error) as error:
            raise StoreFailed(f"{path} cannot be opened ({error}): check its rights") from error
        try:
            _check_identity(connection, path)
            connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
            connection.execute("PRAGMA synchronous = FULL")
            connection.executescript(_SCHEMA)
        except (sqlite3.Error, Corrupt) as error:
            connection.close()
            raise _explained(error, path) from error
        return cls(connection, path)

    def record(self, issued: Issued) -> None:
        """Note a token, durably, before it is given out.

        Raises:
            StoreFailed: It is not noted.
        """
        self._run(
            lambda: self._connection.execute(
                "INSERT INTO issued VALUES (?, ?, ?, ?, ?)",
                (
                    issued.id,
                    issued.principal,
                    issued.scope,
                    issued.issued_at,
                    issued.expires_at,
                ),
            )
        )

    def revoke(self, token_id: str, at: int) -> None:
        """Note, durably, that a token counts no more; again is the same.

        Raises:
            StoreFailed: It is not noted.
        """
        self._run(
            lambda: self._connection.execute(
                "INSERT OR IGNORE INTO revoked VALUES (?, ?)", (token_id, at)
            )
        )

    def issued(self) -> tuple[Issued, ...]:
        """Every token that was given out, the latest first.

        Raises:
            StoreFailed: They cannot be read now.
        """
        rows = self._run(
            lambda: self._connection.execute(
                "SELECT id, principal, scope, issued_at, expires_at, revoked_at"
                " FROM issued LEFT JOIN revoked USING (id) ORDER BY issued_at DESC, id"
            ).fetchall()
        )
        return tuple(Issued(*row) for row in rows)

    def is_revoked(self, token_id: str) -> bool:
        """Whether a token counts no more, by this process or another.

        Costs one statement that reads a counter, and the list only after it changed.

        Raises:
            StoreFailed: That cannot be read now.
        """

        def read() -> None:
            # The one counts what other connections committed, the other what this one wrote.
            (version,) = self._connection.execute("PRAGMA data_version").fetchone()
            (count,) = self._connection.execute("SELECT total_changes()").fetchone()
            if (version, count) != self._version:
                rows = self._connection.execute("SELECT id FROM revoked").fetchall()
                self._revoked = frozenset(row[0] for row in rows)
                self._version = version, count

        self._run(read)
        return token_id in self._revoked

    def close(self) -> None:
        """Let go of the file."""
        self._connection.close()

    def _run(self, work: Callable[[], _Result]) -> _Result:
        try:
            return work()
        except sqlite3.Error as error:
            raise _explained(error, self._path) from error


def _check_identity(connection: sqlite3.Connection, path: Path) -> None:
    (found,) = connection.execute("PRAGMA application_id").fetchone()
    if found not in {0, _APPLICATION_ID}:
        raise Corrupt(f"{path} is not a list of tokens: move it away")


def _explained(error: Exception, path: Path) -> Exception:
    if isinstance(error, sqlite3.DatabaseError) and not isinstance(error, sqlite3.OperationalError):
        return Corrupt(
            f"{path} is damaged ({error}): move it away, and revoke again what was revoked"
        )
    if isinstance(error, sqlite3.Error):
        return StoreFailed(f"{path} cannot be used now ({error})")
    return error
