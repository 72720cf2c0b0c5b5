"""A room's part of the log: reading it, adding to it, folding it, and wiping what was withdrawn.

This module owns when a conversation's log is folded into a snapshot and when its file is scrubbed,
how a document is made from it without keeping the thread, and which end of it stays in memory. It
must not know rules, rights, peers or rows of the register: whoever holds it says what is owed.

What was withdrawn is served from here no more from the moment that :meth:`Upkeep.owe` was called,
whatever the file still holds.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any, Final

from crdt_llm.document.conversation import EMPTY_UPDATE, Conversation, Shadow
from crdt_llm.errors import Corrupt, MalformedMessage, StoreFailed
from crdt_llm.sync.room.tail import Tail

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from crdt_llm.store.log import Loaded, UpdateLog
    from crdt_llm.sync.room.scrubbing import Scrubber

logger = logging.getLogger("crdt_llm.sync")

COMPACT_RATIO: Final = 1
"""A log this many times as large as its snapshot is folded into a new one: the store stays within
twice the document, and each byte is rewritten a bounded number of times."""

COMPACT_BYTES_MIN: Final = 64 << 10
"""Below this a snapshot is not worth its commit."""

COMPACT_UPDATES_MAX: Final = 4096
"""Updates after which the log is folded in any case: loading applies them one by one, in 50 us."""

REPLAY_CHUNK: Final = 64
"""Updates that are replayed before others get the thread: some 3 ms."""


async def replay(updates: Iterable[bytes], apply: Callable[[bytes], Any]) -> None:
    """Apply one update after the other; others get the thread now and then.

    Raises:
        Exception: whatever ``apply`` does.
    """
    for number, update in enumerate(updates, 1):
        apply(update)
        if number % REPLAY_CHUNK == 0:
            await asyncio.sleep(0)


async def replica_of(
    loaded: Loaded, conversation: str, client_id: int, accepted: Sequence[bytes] = ()
) -> Conversation:
    """The document that a log holds, and what was accepted since; others get the thread meanwhile.

    Raises:
        Corrupt: It does not read.
    """
    replica = Conversation(client_id)
    try:
        await replay(_all_of(loaded, accepted), replica.apply)
    except MalformedMessage as error:
        raise Corrupt(
            f"conversation {conversation} cannot be read from the log: restore it from a replica"
        ) from error
    return replica


def _all_of(loaded: Loaded, accepted: Sequence[bytes]) -> Iterable[bytes]:
    if loaded.snapshot is not None:
        yield loaded.snapshot
    for _, update in loaded.updates:
        yield update
    yield from accepted


class Upkeep:
    """One conversation's.

    Args:
        conversation: Its id.
        log: Where it is durable.
        scrubber: Wipes the log's file.
        wiped: Called when a scrub is done, so that :meth:`wipe` is asked again.

    Attributes:
        lsn: The last one committed.
        snapshot_bytes: The size of the last snapshot, and of what could not be folded into it.
    """

    def __init__(
        self, conversation: str, log: UpdateLog, scrubber: Scrubber, wiped: Callable[[], None]
    ) -> None:
        self.lsn = 0
        self.snapshot_bytes = 0
        self._conversation = conversation
        self._log = log
        self._scrubber = scrubber
        self._wiped = wiped
        self._log_bytes = 0  # since the snapshot
        self._log_updates = 0
        self._tail = Tail()
        self._withdrawals = 0  # since loading...
        self._scrubbed = 0  # ...and how many of them are wiped from the log's file
        self._scrubbing: asyncio.Task[None] | None = None

    # -- reading -------------------------------------------------------------------------------

    async def load(self, client_id: int, accepted: Sequence[bytes] = ()) -> Conversation:
        """Make a replica of what is committed, and of ``accepted``.

        Raises:
            Corrupt: What is stored does not read.
            StoreFailed: It could not be read now.
        """
        loaded = await self._log.load(self._conversation)
        replica = await replica_of(loaded, self._conversation, client_id, accepted)
        self.lsn = loaded.lsn
        self.snapshot_bytes = len(loaded.snapshot or b"")
        self._log_bytes = sum(len(update) for _, update in loaded.updates)
        self._log_updates = len(loaded.updates)
        self._tail.begin(loaded.lsn, () if self._is_owing else loaded.updates)
        return replica

    async def shadow(self, client_id: int, accepted: Sequence[bytes]) -> Shadow:
        """A copy that nobody reads, of the same."""
        loaded = await self._log.load(self._conversation)
        shadow = Shadow(client_id, EMPTY_UPDATE)
        await replay(_all_of(loaded, accepted), shadow.apply)
        return shadow

    def since(self, lsn: int) -> list[bytes] | None:
        """See :meth:`crdt_llm.sync.room.tail.Tail.since`."""
        return self._tail.since(lsn)

    @property
    def stored_bytes(self) -> int:
        """What is stored, in bytes: at least the size of the document."""
        return self.snapshot_bytes + self._log_bytes

    # -- writing -------------------------------------------------------------------------------

    async def append(self, updates: Sequence[bytes]) -> None:
        """Make updates durable.

        Raises:
            StoreFailed: They are not.
        """
        self.lsn = await self._log.append(self._conversation, updates)
        self._tail.append(self.lsn, updates)
        self._log_bytes += sum(len(update) for update in updates)
        self._log_updates += len(updates)

    @property
    def is_compaction_due(self) -> bool:
        """Whether the log has outgrown its snapshot."""
        due = self._log_bytes >= max(COMPACT_BYTES_MIN, COMPACT_RATIO * self.snapshot_bytes)
        return due or self._log_updates >= COMPACT_UPDATES_MAX

    async def compact(self, snapshot: bytes) -> bool:
        """Fold the log; whether that went well. If not, nothing is lost.

        Args:
            snapshot: The document as it is committed.
        """
        try:
            await self._log.compact(self._conversation, snapshot, self.lsn)
        except StoreFailed as error:
            # It is tried again when the log has doubled.
            logger.warning("conversation %s is not compacted: %s", self._conversation, error)
            self.snapshot_bytes += self._log_bytes
            is_done = False
        else:
            self.snapshot_bytes = len(snapshot)
            is_done = True
        self._log_bytes = self._log_updates = 0
        return is_done

    # -- wiping --------------------------------------------------------------------------------

    @property
    def is_scrubbing(self) -> bool:
        """Whether a scrub is under way."""
        return self._scrubbing is not None

    @property
    def _is_owing(self) -> bool:
        return self._scrubbed != self._withdrawals

    def owe(self) -> None:
        """Something was withdrawn: nobody who comes back gets it from memory any more."""
        self._withdrawals += 1
        self._tail.begin(self.lsn, ())

    async def wipe(self, document: Callable[[], bytes]) -> bool:
        """Go on with wiping; whether all that was owed when it last began is gone from the file.

        Args:
            document: All of the document as it is committed.
        """
        if self._scrubbing is not None:
            return False
        if not self._is_owing:
            return True
        is_empty = not self._log_updates and not self.snapshot_bytes
        if is_empty or await self.compact(document()):
            self._scrubbing = asyncio.get_running_loop().create_task(
                self._scrub(self._withdrawals), name=f"scrub {self._conversation}"
            )
        return False

    async def _scrub(self, withdrawals: int) -> None:
        try:
            await self._scrubber.scrub()
        except (StoreFailed, Corrupt) as error:
            # It is tried again with the next commit or tick, or after a restart.
            logger.warning("conversation %s is not scrubbed: %s", self._conversation, error)
        else:
            self._scrubbed = withdrawals
            self._wiped()
        finally:
            self._scrubbing = None
