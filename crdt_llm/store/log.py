"""The contract of the append-only update log that every store keeps.

It owns the words (LSN, snapshot, append, load, compact, delete, scrub), the limits and the checks
of arguments, which are the same for every implementation. It must not know what an update means:
to a log, updates and snapshots are opaque bytes and a conversation is a name. It knows no CRDT, no
socket and no database.

The rules, which ``tests/store/contract.py`` checks for every implementation:

1. ``append`` returns only when the updates are durable, and returns the LSN of the last of them.
   It is all or nothing. When it raises, none of its updates is in the log.
2. LSNs are whole numbers per conversation. Those of one append are consecutive, and the next
   append goes on where the last one ended. No LSN of a conversation is ever given out twice: not
   after a compaction, not after a restart, and not after a deletion, after which the numbering goes
   on above everything that was deleted.
3. ``load`` returns a snapshot and every later update, without a gap, or raises ``Corrupt``. It
   never returns a part. Damage in one conversation does not hide another.
4. ``compact`` replaces all updates up to an LSN by a snapshot, at once or not at all.
5. Cancelling a caller never leaves half of anything: what was handed over is carried out whole,
   what was not is withdrawn whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence  # noqa: TC003 - `Clock` is evaluated at run time
from dataclasses import dataclass
from typing import Protocol

from crdt_llm.errors import LocalMisuse

MEBIBYTE = 1024 * 1024

Clock = Callable[[], int]
"""Milliseconds since 1970."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a log accepts. All of it is checked before anything is queued.

    Attributes:
        conversation_bytes_max: length of a conversation's name in UTF-8. Ours are 22 characters;
            the rest is room for other naming schemes, short enough to stay a cheap key.
        update_bytes_max: one update. The largest is a whole document sent by a peer that comes
            back after a long time; a conversation of 5,000 entries is 1.5 MB.
        snapshot_bytes_max: one snapshot, which is a whole document with its history of deletions.
            Four of the largest updates, so that whatever was accepted can also be compacted.
        append_updates_max: updates in one append. A room hands over what came in during one
            commit; 4,096 is 80 times what the busiest room collects in a second.
        append_bytes_max: one append, which has to fit into one transaction.
        commit_updates_max: updates that share one commit. Bounds how long a commit holds the
            writer, and with it the latency of what is queued behind it.
        commit_bytes_max: bytes that share one commit, for the same reason. A single append above
            it is committed alone.
        queued_bytes_max: bytes handed over and not yet committed. Beyond it callers wait, so that
            a slow disk slows the senders down instead of filling memory.
    """

    conversation_bytes_max: int = 128
    update_bytes_max: int = 16 * MEBIBYTE
    snapshot_bytes_max: int = 64 * MEBIBYTE
    append_updates_max: int = 4096
    append_bytes_max: int = 32 * MEBIBYTE
    commit_updates_max: int = 1024
    commit_bytes_max: int = 4 * MEBIBYTE
    queued_bytes_max: int = 64 * MEBIBYTE

    def __post_init__(self) -> None:
        """Refuse limits under which something accepted could never be carried out."""
        if max(self.append_bytes_max, self.snapshot_bytes_max) > self.queued_bytes_max:
            raise LocalMisuse(
                "queued_bytes_max must hold the largest append and the largest snapshot"
            )
        if self.update_bytes_max > self.append_bytes_max:
            raise LocalMisuse("append_bytes_max must hold the largest update")

    def check_conversation(self, conversation: str) -> None:
        """Raise ``LocalMisuse`` unless this is a usable name of a conversation."""
        try:
            length = len(conversation.encode())
        except UnicodeEncodeError:
            raise LocalMisuse("a conversation's name must be valid text") from None
        if not 1 <= length <= self.conversation_bytes_max:
            raise LocalMisuse(
                f"a conversation's name has 1 to {self.conversation_bytes_max} bytes, not {length}"
            )

    def check_append(self, conversation: str, updates: Sequence[bytes]) -> None:
        """Raise ``LocalMisuse`` unless these updates may be appended in one go."""
        self.check_conversation(conversation)
        if not 1 <= len(updates) <= self.append_updates_max:
            raise LocalMisuse(
                f"an append has 1 to {self.append_updates_max} updates, not {len(updates)}"
            )
        largest = max(len(update) for update in updates)
        if largest > self.update_bytes_max:
            raise LocalMisuse(f"an update has at most {self.update_bytes_max} bytes, not {largest}")
        total = sum(len(update) for update in updates)
        if total > self.append_bytes_max:
            raise LocalMisuse(f"an append has at most {self.append_bytes_max} bytes, not {total}")

    def check_snapshot(self, conversation: str, snapshot: bytes) -> None:
        """Raise ``LocalMisuse`` unless this snapshot may be stored."""
        self.check_conversation(conversation)
        if len(snapshot) > self.snapshot_bytes_max:
            raise LocalMisuse(
                f"a snapshot has at most {self.snapshot_bytes_max} bytes, not {len(snapshot)}"
            )


@dataclass(frozen=True, slots=True)
class Loaded:
    """Everything the log holds of one conversation.

    Attributes:
        snapshot: the state up to and including ``snapshot_lsn``; None if there is none yet.
        snapshot_lsn: where ``updates`` begin: the first of them is ``snapshot_lsn + 1``. Without a
            snapshot it is 0, or above every LSN that the conversation had before it was deleted.
        updates: ``(LSN, update)`` in order, without a gap.
    """

    snapshot: bytes | None
    snapshot_lsn: int
    updates: tuple[tuple[int, bytes], ...]

    @property
    def lsn(self) -> int:
        """The LSN of the last thing in the log."""
        return self.updates[-1][0] if self.updates else self.snapshot_lsn


@dataclass(frozen=True, slots=True)
class Stored:
    """One line of the list of conversations.

    Attributes:
        conversation: its name.
        lsn: the LSN of the last update.
        log_bytes: bytes of the updates after the snapshot.
        snapshot_bytes: bytes of the snapshot, 0 without one.
        changed_at: milliseconds since 1970, when the last update was appended.
        damage: None, or one line saying why the other fields cannot be trusted. Listing does not
            read the updates: only ``load`` proves that a conversation is whole.
    """

    conversation: str
    lsn: int
    log_bytes: int
    snapshot_bytes: int
    changed_at: int
    damage: str | None = None


@dataclass(frozen=True, slots=True)
class Status:
    """Whether the last write worked. ``reason`` is None if it did, else one line for people."""

    reason: str | None = None

    @property
    def healthy(self) -> bool:
        """True if the log takes writes, as far as is known."""
        return self.reason is None


def check_compaction(
    conversation: str,
    *,
    through: int,
    snapshot_lsn: int,
    lsn: int,
    has_snapshot: bool,
) -> None:
    """Raise ``LocalMisuse`` unless the log may be compacted up to and including ``through``.

    A snapshot may be replaced by another one at the same LSN: that is how redacted text leaves it.
    """
    if through > lsn:
        raise LocalMisuse(
            f"a snapshot of {conversation} through {through} is beyond the log's end at {lsn}"
        )
    if through < snapshot_lsn or (through == snapshot_lsn and not has_snapshot):
        raise LocalMisuse(
            f"a snapshot of {conversation} through {through} is older than the log's start"
            f" at {snapshot_lsn}"
        )


class UpdateLog(Protocol):
    """An append-only log of opaque updates per conversation, with snapshots.

    An instance belongs to the event loop it was opened in. Every method but ``close`` raises
    ``LocalMisuse`` after ``close``.
    """

    @property
    def log_id(self) -> str:
        """A random name, made once per log. LSNs of logs with different names do not compare."""

    @property
    def status(self) -> Status:
        """How the last write went. It becomes healthy again with the next write that works."""

    async def append(self, conversation: str, updates: Sequence[bytes]) -> int:
        """Make updates durable, all or none, and return the LSN of the last one.

        Appends that wait at the same time share one commit. Appends to one conversation get their
        LSNs in the order in which ``append`` was called. A cancelled append is either withdrawn
        whole (it was still waiting for room in the queue) or carried out whole.

        Raises:
            StoreFailed: nothing of it is durable.
            Corrupt: the conversation is damaged; nothing was appended.
            LocalMisuse: no updates, or over a limit.
        """

    async def load(self, conversation: str) -> Loaded:
        """Return everything the log holds of a conversation; of an unknown one, nothing.

        Raises:
            Corrupt: what is stored is not what was written.
            StoreFailed: it could not be read now.
        """

    async def compact(self, conversation: str, snapshot: bytes, through: int) -> None:
        """Replace everything up to and including LSN ``through`` by a snapshot, atomically.

        Raises:
            LocalMisuse: ``through`` is beyond the log's end or before the present snapshot, or the
                snapshot is over its limit.
            StoreFailed: nothing has changed.
            Corrupt: the conversation is damaged; nothing has changed.
        """

    async def conversations(self) -> tuple[Stored, ...]:
        """Return what is stored, the most recently changed first.

        Raises:
            StoreFailed: it could not be read now.
            Corrupt: the list itself is damaged.
        """

    async def delete(self, conversation: str) -> None:
        """Remove a conversation, damaged or not; one that is unknown is removed already.

        Traces may stay in the slack of pages until ``scrub``.

        Raises:
            StoreFailed: it is still there.
            Corrupt: the file is damaged so that it cannot be removed.
        """

    async def scrub(self) -> None:
        """Leave no byte on disk of what ``delete`` and ``compact`` removed before this call.

        It may rewrite everything that is stored, and writers wait meanwhile: call it after a
        redaction or a deletion, once for many of them.

        Raises:
            StoreFailed: traces may be left; call it again.
            Corrupt: the file is damaged.
        """

    async def probe(self) -> Status:
        """Try a write that changes nothing, and return the ``status`` after it."""

    async def close(self) -> None:
        """Finish what was handed over, then let go of the file. Safe to call twice."""
