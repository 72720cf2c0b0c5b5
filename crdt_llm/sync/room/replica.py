"""A room's replica: what is committed, what a turn has accepted since, and the way back.

This module owns what is derived from the document so that a write costs what it changes: its state
vector, its size, its structs, and a spare copy to go back by. It must not know peers, rights or
rows of the register; whether a write is allowed is said by :mod:`crdt_llm.sync.room.judge`.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from typing import TYPE_CHECKING, Final

from crdt_llm.document.conversation import Shadow
from crdt_llm.document.schema import Grant
from crdt_llm.document.updates import merge
from crdt_llm.errors import Gap, LocalMisuse, MalformedMessage, Refused, TooLarge
from crdt_llm.sync.room.offload import offload
from crdt_llm.sync.room.rights import right_of
from crdt_llm.sync.update.shape import Places, fresh
from crdt_llm.sync.update.structure import HELD_LIMITS, UpdateStructure, read_update
from crdt_llm.sync.wire.verdict import Denied, Lacking, one_line
from crdt_llm.sync.wire.y_websocket import UPDATE_BYTES_MAX, decode_state_vector

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from crdt_llm.document.conversation import Change, Conversation
    from crdt_llm.document.rules import Author
    from crdt_llm.sync.room.look import Look
    from crdt_llm.sync.room.upkeep import Upkeep
    from crdt_llm.sync.update.structure import Struct
    from crdt_llm.sync.wire.verdict import Verdict

logger = logging.getLogger("crdt_llm.sync")

DOCUMENT_BYTES_MAX: Final = UPDATE_BYTES_MAX - (64 << 10)
"""The largest document: it must fit one Step2, or nobody new could ever be brought up to date."""

NODE_RESERVE_BYTES: Final = 1 << 20
"""What of it only the node may fill: a reply that has begun must be able to end."""

DOCUMENT_SLACK_BYTES: Final = 64 << 10
"""How far below the limit the exact size must be found to go on without measuring each update."""

SPARE_BEHIND_MAX: Final = 64
"""Updates that the spare copy of a room's document may lag behind: joined, they cost like one."""

OWN_CLIENTS_FROM: Final = 0xFF000000
"""A room's client ids are among the greatest. Of values that were written at the same place the one
under the greatest id counts; so what a room puts right counts in every replica, also in one that
has something at the clocks that a forgery took here."""


class Dirty(Exception):  # noqa: N818 - a signal inside a turn
    """The replica holds something that was not accepted.

    Attributes:
        verdict: What its sender hears.
        touched: The entries that may have changed; ``None`` if nobody knows.
    """

    def __init__(self, verdict: Verdict, touched: frozenset[str] | None) -> None:
        super().__init__()
        self.verdict = verdict
        self.touched = touched


class Undoing:
    """Whatever goes wrong inside, the replica is to be taken back; what else may end, ends.

    Args:
        conversation: Whose replica it is, for the log.
        change: What was done to it; ``None`` if nobody knows.
    """

    __slots__ = ("_change", "_conversation")

    def __init__(self, conversation: str, change: Change | None) -> None:
        self._conversation = conversation
        self._change = change

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: object
    ) -> None:
        if error is None or isinstance(error, _PASSING):
            return
        touched = self._change.entries if self._change is not None else None
        match error:
            case Gap():
                raise Dirty(Lacking(str(error)), touched) from error
            case Refused() | MalformedMessage():
                raise Dirty(Denied(error), touched) from error
            case _:  # the CRDT library panics with one of its own
                # An update that our checks cannot cope with: it would fail again each time.
                logger.error("conversation %s: %s", self._conversation, one_line(error))
                reason = Refused("unreadable", "this cannot be checked")
                raise Dirty(Denied(reason), touched) from error


_PASSING: Final = (Dirty, asyncio.CancelledError, KeyboardInterrupt, SystemExit)


class Replica:
    """One room's.

    Args:
        conversation: Its id.
        upkeep: Where it is read from.
        random: Random bytes, for client ids.

    Attributes:
        known: The document's state vector.
    """

    def __init__(self, conversation: str, upkeep: Upkeep, random: Callable[[int], bytes]) -> None:
        self.known: dict[int, int] = {}
        self._conversation = conversation
        self._upkeep = upkeep
        self._random = random
        self._document: Conversation | None = None
        self._bytes = 0  # at least the size of the document
        # What is deleted in it, when asked for.
        self._deletions: Mapping[int, Sequence[range]] | None = None
        # Every struct of the document, from the first time on that it has to be searched.
        self._index: dict[int, list[Struct]] | None = None
        self._is_index_ahead = False  # it holds the update that is being checked
        self._spare: Shadow | None = None  # a copy of the document, from the first refusal on
        self._ahead: list[bytes] = []  # what the document has and the copy lacks
        self._wants_spare = False

    @property
    def document(self) -> Conversation:
        """The document.

        Raises:
            LocalMisuse: It is not loaded.
        """
        if self._document is None:
            raise LocalMisuse(f"the room of {self._conversation} is not loaded")
        return self._document

    async def load(self, accepted: Sequence[bytes] = ()) -> None:
        """Make the document anew from the log and what this turn has accepted.

        Raises:
            Corrupt: What is stored does not read.
            StoreFailed: It could not be read now.
        """
        self._document = await self._upkeep.load(self._new_client_id(), accepted)
        self._deletions, self._spare = None, None
        self._ahead.clear()
        self._index, self._is_index_ahead = None, False
        self.known = decode_state_vector(self._document.state_vector())
        self._bytes = self._upkeep.stored_bytes + sum(len(update) for update in accepted)

    def unload(self) -> None:
        """There is no document any more."""
        self._document = None

    def compacted(self, size: int) -> None:
        """It was measured."""
        self._bytes = size

    # -- one write -----------------------------------------------------------------------------

    def merge(self, update: bytes) -> Change:
        """Apply an update; one that does not apply leaves the document's readings as they were.

        Raises:
            Dirty: It did not go well.
        """
        with self.undoing(None):
            try:
                return self.document.apply(update)
            except MalformedMessage as error:
                raise Dirty(Denied(error), frozenset()) from error

    def undoing(self, change: Change | None) -> Undoing:
        """What is asked of a change belongs inside; see :class:`Undoing`."""
        return Undoing(self._conversation, change)

    async def check_places(
        self, structure: UpdateStructure, change: Change, author: Author
    ) -> None:
        """What an update wrote where no reader looks has a place in the document all the same.

        Raises:
            Refused: It has none.
        """
        document = self.document
        if self._index is None:
            whole = document.diff()
            read = functools.partial(read_update, whole, HELD_LIMITS)
            self._index = {
                client: list(structs)
                for client, structs in (await offload(len(whole), read)).structs.items()
            }
            self._is_index_ahead = True
        Places(
            structure=structure,
            known=self.known,
            held=UpdateStructure(self._index, {}),
            added={edit.key for edit in change.edits if not edit.path and edit.key is not None},
            is_entry=document.tree.__contains__,
            meta=document.meta_plain(),
            principal=author.principal,
            owner=right_of(document, author) is Grant.OWNER,
        ).check()

    def check_size(self, added: int, author: Author) -> None:
        """There is room for so many bytes more.

        Raises:
            TooLarge: There is not.
        """
        limit = DOCUMENT_BYTES_MAX - (0 if author.node else NODE_RESERVE_BYTES)
        if self._bytes + added <= limit:
            return
        # What was added up counts what has since been deleted or collected: measure.
        exact = len(self.document.diff())
        if exact + DOCUMENT_SLACK_BYTES > limit:
            raise TooLarge("document-too-large", f"a conversation has at most {limit} bytes")
        self._bytes = exact - added

    def learn(self, look: Look) -> None:
        """An update that was applied stays: its clocks are known from now on."""
        self._extend_index(look, self.known)
        self.known.update(look.fresh)

    def relearn(self) -> None:
        """Read anew what is known: more was written than an update's structure says."""
        self.known = decode_state_vector(self.document.state_vector())
        self._deletions = self._index = None

    def accept(self, change: Change, look: Look) -> None:
        """An update that stays changed something."""
        if self._spare is not None:
            self._ahead.append(change.update)
            if len(self._ahead) >= SPARE_BEHIND_MAX:
                self._follow()
        if look.structure.deleted:
            self._deletions = None
        self._bytes += len(change.update)

    async def deletions(self) -> Mapping[int, Sequence[range]]:
        """What is known to be deleted; what an update overwrote since may be missing in it."""
        if self._deletions is None:
            document = self.document
            held = document.diff(document.state_vector())
            read = functools.partial(read_update, held, HELD_LIMITS)
            self._deletions = (await offload(len(held), read)).deleted
        return self._deletions

    # -- the way back --------------------------------------------------------------------------

    async def take_back(self, touched: frozenset[str] | None, accepted: Sequence[bytes]) -> None:
        """Be as before the last merge. Costs what was touched, while there is a spare copy.

        Args:
            touched: The entries that may have changed; ``None`` if nobody knows.
            accepted: What this turn had accepted before.

        Raises:
            Corrupt: What is stored does not read.
            StoreFailed: It could not be read now.
        """
        if self._is_index_ahead:
            self._index, self._is_index_ahead = None, False
        if touched is None:
            await self.load(accepted)
            return
        spare = self._spare
        if spare is None:
            spare = await self._upkeep.shadow(self._new_client_id(), accepted)
        else:
            self._follow()
        self._spare = None
        self._ahead.clear()
        self.document.revert(spare, touched)
        self._wants_spare = True

    def make_spare(self) -> None:
        """Have a copy at hand for the next refusal; rooms without one never have it.

        Call it between turns: what is copied is committed.
        """
        if self._wants_spare:
            self._wants_spare = False
            self._spare = Shadow(self._new_client_id(), self.document.diff())

    def _follow(self) -> None:
        if self._spare is not None and self._ahead:
            self._spare.apply(merge(self._ahead))
            self._ahead.clear()

    def _extend_index(self, look: Look, before: Mapping[int, int]) -> None:
        """Follow what was accepted, so that the document is read once and not for each update."""
        if self._index is None or self._is_index_ahead:
            self._is_index_ahead = False
            return
        for item in fresh(look.structure, before):
            if item.clock < before.get(item.client, 0):  # in part known: rare enough to read anew
                self._index = None
                return
            self._index.setdefault(item.client, []).append(item)

    def _new_client_id(self) -> int:
        return OWN_CLIENTS_FROM | int.from_bytes(self._random(3), "big")
