"""Which conversations a principal has put away, as an SQLite file of its own.

This module owns what is in the file. It must not know documents or who may see what: a conversation
that was put away is a name beside a name. It is no part of the document, for it is one person's
view of their list, and no part of the register, for nothing is lost that matters if this is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Self

from crdt_llm.store.side_file import Kind, SideFile

if TYPE_CHECKING:
    from pathlib import Path

_KIND: Final = Kind(
    application_id=0x43524C41,  # "CRLA"
    schema="""
CREATE TABLE IF NOT EXISTS archived (
  principal TEXT NOT NULL,
  conversation TEXT NOT NULL,
  PRIMARY KEY (principal, conversation)
) STRICT, WITHOUT ROWID;
""",
    is_no="is no archive",
    if_damaged="move it away",
)


class Archive:
    """What principals have put away.

    Args:
        file: See :meth:`open`.
    """

    def __init__(self, file: SideFile) -> None:
        self._file = file

    @classmethod
    def open(cls, path: Path | None) -> Self:
        """Open the file, or make one; ``None`` keeps everything in memory.

        Raises:
            Corrupt: It is no such file.
            StoreFailed: It cannot be opened now.
        """
        return cls(SideFile.open(path, _KIND))

    async def put(self, principal: str, conversation: str, *, archived: bool) -> None:
        """Put a conversation away, or take it back, durably; again is the same.

        Raises:
            StoreFailed: It is as it was.
        """
        statement = (
            "INSERT OR IGNORE INTO archived VALUES (?, ?)"
            if archived
            else "DELETE FROM archived WHERE principal = ? AND conversation = ?"
        )

        def put() -> None:
            self._file.write(lambda file: file.execute(statement, (principal, conversation)))

        await self._file.aside(put)

    def of(self, principal: str) -> frozenset[str]:
        """What a principal has put away; at once.

        Raises:
            StoreFailed: It cannot be read now.
        """
        statement = "SELECT conversation FROM archived WHERE principal = ?"
        rows = self._file.read(lambda file: file.execute(statement, (principal,)).fetchall())
        return frozenset(row[0] for row in rows)

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()
