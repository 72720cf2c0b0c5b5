"""Which access tokens were issued and which were revoked, as an SQLite file of its own.

This module owns what is in the file. It must not know what a token says or how it is signed: an
issued token is a line for people, a revoked one an id that counts no more, a node's key a name
beside the principal that came with it first. The relay reads it while the command line writes it,
which is why it is neither in the log nor in memory: SQLite's own locking lets both have it open.

Reading is at once. Writing waits for the disk and for the other process: in a relay it is called by
:meth:`TokenLedger.aside`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self, TypeVar

from crdt_llm.errors import TooLarge
from crdt_llm.store.side_file import Kind, SideFile

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable
    from pathlib import Path

_Result = TypeVar("_Result")

_KIND: Final = Kind(
    application_id=0x43524C54,  # "CRLT"
    schema="""
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
CREATE TABLE IF NOT EXISTS invitations (
  id TEXT PRIMARY KEY,
  inviter TEXT NOT NULL,
  name TEXT
) STRICT;
CREATE INDEX IF NOT EXISTS invitations_of ON invitations (inviter);
CREATE TABLE IF NOT EXISTS nodes (
  key BLOB PRIMARY KEY,
  principal TEXT NOT NULL,
  since INTEGER NOT NULL
) STRICT;
""",
    is_no="is not a list of tokens",
    if_damaged="move it away, and revoke again what was revoked",
)

_LINES: Final = (
    "SELECT id, principal, scope, issued_at, expires_at, revoked_at, inviter, name FROM issued"
    " LEFT JOIN revoked USING (id) LEFT JOIN invitations USING (id)"
)
_LIVE: Final = (
    "SELECT count(*) FROM invitations JOIN issued USING (id) LEFT JOIN revoked USING (id)"
    " WHERE inviter = ? AND revoked_at IS NULL AND (expires_at IS NULL OR expires_at > ?)"
)


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
        inviter: Whose invitation it is; ``None`` if it is none.
        name: Whom the inviter meant it for.
    """

    id: str
    principal: str
    scope: str
    issued_at: int
    expires_at: int | None
    revoked_at: int | None = None
    inviter: str | None = None
    name: str | None = None


@dataclass(frozen=True, slots=True)
class BoundNode:
    """A node's public key, and whose it is.

    Attributes:
        key: The Ed25519 public key, 32 bytes.
        principal: Who came with it first.
        since: When that was, ms since 1970.
    """

    key: bytes
    principal: str
    since: int


class TokenLedger:
    """The file. Opened and read in one thread.

    Args:
        file: See :meth:`open`.
    """

    def __init__(self, file: SideFile) -> None:
        self._file = file
        self._version: int | None = None
        self._revoked: frozenset[str] = frozenset()

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open the file, or make one.

        Raises:
            Corrupt: It is no such file.
            StoreFailed: It cannot be opened now.
        """
        return cls(SideFile.open(path, _KIND))

    def record(self, issued: Issued, *, invitations_max: int | None = None) -> None:
        """Note a token, durably, before it is given out.

        Args:
            issued: Which.
            invitations_max: How many of one inviter may count at a time.

        Raises:
            TooLarge: So many do.
            StoreFailed: It is not noted.
        """
        one = issued

        def write(file: sqlite3.Connection) -> None:
            if one.inviter is not None:
                (live,) = file.execute(_LIVE, (one.inviter, one.issued_at)).fetchone()
                if invitations_max is not None and live >= invitations_max:
                    reason = f"{live} invitations of yours count: revoke some"
                    raise TooLarge("too-many-invitations", reason)
                row = (one.id, one.inviter, one.name)
                file.execute("INSERT INTO invitations VALUES (?, ?, ?)", row)
            file.execute(
                "INSERT INTO issued VALUES (?, ?, ?, ?, ?)",
                (one.id, one.principal, one.scope, one.issued_at, one.expires_at),
            )

        self._file.write(write)

    def revoke(self, token_id: str, at: int) -> None:
        """Note, durably, that a token counts no more; again is the same.

        Raises:
            StoreFailed: It is not noted.
        """
        statement = "INSERT OR IGNORE INTO revoked VALUES (?, ?)"
        self._file.write(lambda file: file.execute(statement, (token_id, at)))

    def claim_node(self, key: bytes, principal: str, at: int) -> str:
        """Note, durably, whose a node's public key is, unless that is known already.

        Returns:
            Whose it is.

        Raises:
            StoreFailed: It is not noted.
        """

        def owner(file: sqlite3.Connection) -> str:
            file.execute("INSERT OR IGNORE INTO nodes VALUES (?, ?, ?)", (key, principal, at))
            row = file.execute("SELECT principal FROM nodes WHERE key = ?", (key,)).fetchone()
            return str(row[0])

        return self._file.write(owner)

    async def aside(self, call: Callable[[], _Result]) -> _Result:
        """Call something that writes here, without holding up the event loop.

        Raises:
            StoreFailed: Too many wait for that already.
        """
        return await self._file.aside(call)

    def issued(self) -> tuple[Issued, ...]:
        """Every token that was given out, the latest first.

        Raises:
            StoreFailed: They cannot be read now.
        """
        statement = f"{_LINES} ORDER BY issued_at DESC, id"
        rows = self._file.read(lambda file: file.execute(statement).fetchall())
        return tuple(Issued(*row) for row in rows)

    def find(self, token_id: str) -> Issued | None:
        """One token that was given out.

        Raises:
            StoreFailed: It cannot be read now.
        """
        statement = f"{_LINES} WHERE id = ?"
        row = self._file.read(lambda file: file.execute(statement, (token_id,)).fetchone())
        return None if row is None else Issued(*row)

    def node_owner(self, key: bytes) -> str | None:
        """Whose a node's public key is, if somebody came with it.

        Raises:
            StoreFailed: It cannot be read now.
        """
        statement = "SELECT principal FROM nodes WHERE key = ?"
        row = self._file.read(lambda file: file.execute(statement, (key,)).fetchone())
        return None if row is None else str(row[0])

    def nodes(self) -> tuple[BoundNode, ...]:
        """Every node's key that is somebody's, the latest first.

        Raises:
            StoreFailed: They cannot be read now.
        """
        statement = "SELECT key, principal, since FROM nodes ORDER BY since DESC, key"
        rows = self._file.read(lambda file: file.execute(statement).fetchall())
        return tuple(BoundNode(*row) for row in rows)

    def release_node(self, key: bytes) -> bool:
        """Forget, durably, whose a node's public key is.

        Returns:
            Whether it was anybody's.

        Raises:
            StoreFailed: That is not noted.
        """
        statement = "DELETE FROM nodes WHERE key = ?"
        return self._file.write(lambda file: file.execute(statement, (key,)).rowcount > 0)

    def is_revoked(self, token_id: str) -> bool:
        """Whether a token counts no more, by this process or another.

        Costs one statement that reads a counter, and the list only after it changed.

        Raises:
            StoreFailed: That cannot be read now.
        """

        def read(file: sqlite3.Connection) -> None:
            (version,) = file.execute("PRAGMA data_version").fetchone()  # what others committed
            if version != self._version:
                rows = file.execute("SELECT id FROM revoked").fetchall()
                self._revoked = frozenset(row[0] for row in rows)
                self._version = version

        self._file.read(read)
        return token_id in self._revoked

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()
