"""What a room knows of a loss: whether it goes on, and which entries wait for their author.

A room whose log lost something takes restores until the first lease that is granted afterwards.
This module owns what is remembered in that time and beyond it, and how one restore is carried
through once it was applied: judged, corrected, remembered. The rules themselves are those of
:mod:`crdt_llm.sync.room.restore`. It must not know the log, peers or turns.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Final

from crdt_llm.errors import Gap, Refused
from crdt_llm.sync.room import ledger
from crdt_llm.sync.room.offload import offload
from crdt_llm.sync.room.restore import (
    Claim,
    bindings,
    in_doubt,
    judge,
    leftovers,
    told_again,
    unconfirmed,
    unearned,
    unproved_readings,
    wrong_ends,
    wrong_rights,
    wrong_stops,
)
from crdt_llm.sync.room.rights import WRITERS, right_of
from crdt_llm.sync.update.provenance import Provenance
from crdt_llm.sync.update.shape import check_parents
from crdt_llm.sync.wire.y_websocket import decode_state_vector, encode_state_vector

if TYPE_CHECKING:
    from collections.abc import Mapping

    from crdt_llm.document.conversation import Change, Conversation, Edit
    from crdt_llm.document.rules import Author
    from crdt_llm.store.register import Row
    from crdt_llm.sync.room.restore import InDoubt
    from crdt_llm.sync.update.structure import UpdateStructure

JUDGED_AT_ONCE: Final = 4
"""Steps of judging a restore before others get the thread: 0.3 ms each."""


class Restoring:
    """One conversation's.

    Args:
        conversation: Its id.
        relay_key: The relay's public key, that leases are signed with; ``None`` to believe any.
        clients: Client id -> whose it is; the room's, and read only here.

    Attributes:
        is_going_on: The log lost something, and no lease was granted since.
    """

    def __init__(
        self, conversation: str, relay_key: bytes | None, clients: Mapping[int, str]
    ) -> None:
        self.is_going_on = False
        self._conversation = conversation
        self._relay_key = relay_key
        self._clients = clients
        self._in_doubt: dict[str, InDoubt] = {}
        self._lost: Mapping[str, bytes] = {}  # the facts that were registered at first

    # -- who waits -----------------------------------------------------------------------------

    @property
    def waiting(self) -> dict[str, str]:
        """The entries that wait, and for whom."""
        return {name: one.author for name, one in self._in_doubt.items()}

    async def load(self, row: Row, replica: Conversation) -> None:
        """Take up what a row remembers."""
        self._lost = row.facts or {}
        waiting = {name: whose for name, whose in row.unconfirmed.items() if name in replica.tree}
        if waiting:
            sources = await _sources_of(replica)
            self._in_doubt = {
                name: in_doubt(sources, name, whose) for name, whose in waiting.items()
            }

    def asking(self, state_vector: bytes, author: Author) -> bytes:
        """A state vector that says nothing of what waits for somebody, so that it is sent."""
        if not self._in_doubt or author.node:
            return state_vector
        clocks = decode_state_vector(state_vector)
        for one in self._in_doubt.values():
            if one.author == author.principal:
                clocks[one.client] = min(one.clocks.start, clocks.get(one.client, 0))
        return encode_state_vector({client: clock for client, clock in clocks.items() if clock})

    def confirm(
        self, structure: UpdateStructure, author: Author, source: Conversation | Row
    ) -> bool:
        """Hear of an update whose known clocks are equal to what is here, or it was refused.

        Whoever sends what it wrote itself confirms it: all that stands in the entry, under a client
        id that was known as its own before. It must be somebody who may write.

        Args:
            structure: What the update says.
            author: Who sent it.
            source: What says who may write.

        Returns:
            Whether something waits no longer.
        """
        mine = [
            (name, one) for name, one in self._in_doubt.items() if one.author == author.principal
        ]
        if author.node or not mine or right_of(source, author) not in WRITERS:
            return False
        own, found = ledger.clients_of(author.principal), False
        for name, one in mine:
            structs = structure.structs.get(one.client)
            if structs is None or self._clients.get(one.client) != own:
                continue
            if structs[0].clock <= one.clocks.start and structs[-1].end >= one.clocks.stop:
                del self._in_doubt[name]
                found = True
        return found

    def check_confirmed(self, change: Change) -> None:
        """A node admits nothing that waits for its author.

        Raises:
            Refused: It did.
        """
        for edit in change.edits:
            if edit.key == "place" and edit.entry in self._in_doubt:
                whose = self._in_doubt[edit.entry].author
                raise Refused(
                    "unconfirmed", f"entry {edit.entry} waits until {whose} was here with it"
                )

    def may_mend(self, row: Row | None, replica: Conversation) -> bool:
        """Whether an update may be of use that brings nothing new.

        A registered fact is missing, and whoever sends all that it has may have its value.
        """
        return (
            self.is_going_on
            and row is not None
            and replica.id is not None
            and bool(ledger.missing_facts(row, replica))
        )

    # -- one restore ---------------------------------------------------------------------------

    def row_of(self, replica: Conversation, row: Row | None) -> Row:
        """What a restore is measured by; of an import what the document itself says.

        Raises:
            Gap: There is no birth yet.
            Refused: It is another conversation's.
        """
        found = ledger.first_row(replica) if row is None else row
        if found is None:
            raise Gap("this conversation has no schema and birth yet")
        if found.conversation != self._conversation:
            raise Refused("birth", "this birth belongs to another conversation id")
        return found

    async def judge(  # noqa: PLR0913 - what a restore is judged by
        self,
        replica: Conversation,
        change: Change,
        structure: UpdateStructure,
        *,
        row: Row | None,
        author: Author,
        known: Mapping[int, int],
        doubts: list[str] | None,
    ) -> Claim:
        """Check a restore that was applied; others get the thread now and then.

        Args:
            replica: After it.
            change: What it did.
            structure: What it says.
            row: What the register says; ``None`` if it knows nothing of the conversation.
            author: Who brings it.
            known: The state vector from before.
            doubts: Where to say what is believed without a proof; counts only without a row.

        Raises:
            Refused: A rule is broken.
            Gap: Something that it builds on is not here.
        """
        measure, document = self.row_of(replica, row), replica.diff()
        lacking = ledger.missing_facts(measure, replica)
        claim = Claim(
            replica,
            change,
            measure,
            author,
            self._relay_key,
            self._clients,
            known,
            await offload(len(document), partial(Provenance.of, document)),
            doubts if row is None else None,
            await offload(len(document), partial(told_again, lacking, structure)),
            self._lost,
        )
        for number, _ in enumerate(judge(claim), 1):
            if number % JUDGED_AT_ONCE == 0:
                await asyncio.sleep(0)
        check_parents(structure, structure)
        return claim

    def correct(self, claim: Claim) -> tuple[Edit, ...]:
        """Write what the register knows better, and what its bringer may not change."""
        replica, row = claim.conversation, claim.row
        rights, left, facts = wrong_rights(replica, row), leftovers(replica, row), unearned(claim)
        stops, ends = wrong_stops(claim), wrong_ends(claim)
        readings = unproved_readings(claim)
        if not (rights or left or facts or stops or ends or readings):
            return ()
        with replica.writing() as writer:
            for principal, grant in rights.items():
                writer.grant(principal, grant)
            for entry in left:
                if replica.is_redacted(entry):
                    writer.clear(entry)
                else:
                    writer.redact(entry, *row.redacted[entry])
            for key, value in facts.items():
                writer.set_meta(key, value)
            for slot, who in stops.items():
                writer.remove(slot, "stop") if who is None else writer.stop(slot, who)
            for slot, fields in ends.items():
                for key, said in fields.items():
                    writer.remove(slot, key) if said is None else writer.set(slot, key, said)
            for slot in readings:
                writer.remove(slot, "reads")
        return writer.change.edits if writer.change is not None else ()

    def remember(self, claim: Claim) -> dict[int, str]:
        """Take note of what waits now; and say whose the client ids are that are new."""
        if claim.doubts is None:
            self._in_doubt.update(unconfirmed(claim))
        return bindings(claim)


async def _sources_of(replica: Conversation) -> Provenance:
    document = replica.diff()
    return await offload(len(document), partial(Provenance.of, document))
