"""Which conversations a principal has put away, as an SQLite file of its own.

This module owns the file. It must not know documents or who may see what: a conversation that was
put away is a name beside a name. It is no part of the document, for it is one person's view of
their list, and no part of the register, for nothing is lost that matters if this is.

Calls are synchronous: a row is some fifty bytes, and people put conversations away by hand.
"""

from __future__ import annotations

import os
import sqlite3
from typing import TYPE_CHECKING, Final, Self, TypeVar

from crdt_llm.errors import Corrupt, StoreFailed

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_Result = TypeVar("_Result")

_APPLICATION_ID: Final = 0x43524C41
"""In the file's header, "CRLA": tells our files from other programs' databases."""

_FILE_MODE: Final = 0o600

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS archived (
  principal TEXT NOT NULL,
  conversation TEXT NOT NULL,
  PRIMARY KEY (principal, conversation)
) STRICT, WITHOUT ROWID;
"""


class Archive:
    """The file, or a table in memory. Use it from one thread.

    Args:
        connection: See :meth:`open`.
        name: For errors.
    """

    def __init__(self, connection: sqlite3.Connection, name: str) -> None:
        self._connection = connection
        self._name = name

    @classmethod
    def open(cls, path: Path | None) -> Self:
        """Open the file, or make one; ``None`` keeps everything in memory.

        Raises:
            Corrupt: It is no such file.
            StoreFailed: It cannot be opened now.
        """
        name = ":memory:" if path is None else str(path)
        try:
            if path is not None:
                os.close(os.open(path, os.O_RDWR | os.O_CREAT, _FILE_MODE))
            connection = sqlite3.connect(name, isolation_level=None)
        except (OSError, sqlite3.Error) as error:
            raise StoreFailed(f"{name} cannot be opened ({error}): check its rights") from error
        archive = cls(connection, name)
        try:
            archive._run(archive._prepare)
        except BaseException:
            connection.close()
            raise
        return archive

    def _prepare(self) -> None:
        (found,) = self._connection.execute("PRAGMA application_id").fetchone()
        if found not in {0, _APPLICATION_ID}:
            raise Corrupt(f"{self._name} is no archive: move it away")
        self._connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
        self._connection.executescript(_SCHEMA)

    def put(self, principal: str, conversation: str, *, archived: bool) -> None:
        """Put a conversation away, or take it back, durably; again is the same.

        Raises:
            StoreFailed: It is as it was.
        """
        statement = (
            "INSERT OR IGNORE INTO archived VALUES (?, ?)"
            if archived
            else "DELETE FROM archived WHERE principal = ? AND conversation = ?"
        )
        self._run(lambda: self._connection.execute(statement, (principal, conversation)))

    def of(self, principal: str) -> frozenset[str]:
        """What a principal has put away.

        Raises:
            StoreFailed: It cannot be read now.
        """
        rows = self._run(
            lambda: self._connection.execute(
                "SELECT conversation FROM archived WHERE principal = ?", (principal,)
            ).fetchall()
        )
        return frozenset(row[0] for row in rows)

    def close(self) -> None:
        """Let go of the file."""
        self._connection.close()

    def _run(self, work: Callable[[], _Result]) -> _Result:
        try:
            return work()
        except sqlite3.OperationalError as error:
            raise StoreFailed(f"{self._name} cannot be used now ({error})") from error
        except sqlite3.DatabaseError as error:
            raise Corrupt(f"{self._name} is damaged ({error}): move it away") from error
