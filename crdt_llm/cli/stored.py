"""Conversations as they lie in a log file, read without disturbing whoever writes it.

This module owns the reading of a relay's or a device's file from beside: it works while another
process serves the folder (SQLite's write-ahead log lets readers in) and when none does. It changes
no content; after a kill SQLite folds what waits in the write-ahead log into the file. It must not
know sockets or terminals.
"""

from __future__ import annotations

import random
import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING, TypeVar

from crdt_llm.document.conversation import CLIENT_ID_BITS, Conversation
from crdt_llm.errors import Corrupt, LocalMisuse, MalformedMessage, StoreFailed
from crdt_llm.store import sqlite_file
from crdt_llm.sync.client.journal import Kept

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from crdt_llm.store.log import Loaded, Stored

Result = TypeVar("Result")


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite_file.connect_file(path)
    # Not `mode=ro`: a reader that may not write leaves the files of the write-ahead log behind.
    connection.execute("PRAGMA query_only = ON")
    return connection


def _read(path: Path, read: Callable[[sqlite3.Connection], Result]) -> Result:
    try:
        connection, _ = sqlite_file.open_checked(path, _connect)
        with closing(connection):
            connection.execute("BEGIN")  # one state, whatever is committed meanwhile
            return read(connection)
    except (OSError, sqlite3.Error) as error:
        raise sqlite_file.explain(error, path) from error


def list_stored(path: Path) -> tuple[Stored, ...]:
    """What a log file holds, the most recently changed first; nothing if there is no file.

    Raises:
        Corrupt: it is no intact log.
        StoreFailed: it cannot be read now.
    """
    return _read(path, sqlite_file.read_list) if path.exists() else ()


def load_stored(path: Path, conversation: str) -> Conversation:
    """One conversation of a log file, as a replica of its own.

    Raises:
        StoreFailed: there is no such file, it has no such conversation, or cannot be read now.
        Corrupt: what is stored is not what was written.
    """
    if not path.exists():
        raise StoreFailed(f"there is no log at {path}: name the data folder with --data")
    loaded = _read(
        path, lambda connection: sqlite_file.read_conversation(connection, path, conversation)
    )
    if loaded.snapshot is None and not loaded.updates:
        raise StoreFailed(f"{path} has no conversation {conversation}")
    return _replica(loaded, path, conversation)


def _replica(loaded: Loaded, path: Path, conversation: str) -> Conversation:
    replica = Conversation(fresh_client_id())
    try:
        # A device's file keeps apart what the relay has not acknowledged; a relay's has no such.
        for update in Kept.of(loaded).updates:
            replica.apply(update)
    except (Corrupt, MalformedMessage) as error:
        raise Corrupt(
            f"{path}: what is stored of conversation {conversation} is no document: delete it there"
            " so that a client's replica can bring it back"
        ) from error
    return replica


def fresh_client_id() -> int:
    """For a replica that is only read, so that it never gets into any document."""
    return random.SystemRandom().randint(1, 2**CLIENT_ID_BITS - 1)


def complete_id(beginning: str, known: Iterable[str]) -> str | None:
    """The one known id that begins so; ``None`` if there is none.

    Raises:
        LocalMisuse: several do.
    """
    found = [identity for identity in known if identity.startswith(beginning)]
    if beginning in found:
        return beginning
    if len(found) > 1:
        raise LocalMisuse(f"{len(found)} conversations begin with {beginning!r}: give more of it")
    return found[0] if found else None
