"""Entries and slots get their places here, with the proofs that they are given under.

This module owns what an admission writes: places, salts and proofs, for authors' entries, for the
slot behind them and for summaries. What is admitted next is decided in
:mod:`crdt_llm.inference.node.evaluate`; how the reply in a slot goes on is
:mod:`crdt_llm.inference.node.replies`' business.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from crdt_llm.document.chain import Link, commit_content, parent_digest, prove, sign
from crdt_llm.document.schema import SALT_BYTES, Born, Place, Role, State, entry_id
from crdt_llm.document.seal import Where
from crdt_llm.errors import BadProof, PromptTooLong, Refused
from crdt_llm.inference.node.held import is_unconfirmed
from crdt_llm.inference.node.reply import describe, fail
from crdt_llm.inference.node.shared import positions_of
from crdt_llm.inference.node.workplace import PRINCIPAL

if TYPE_CHECKING:
    from collections.abc import Callable

    from crdt_llm.document.conversation import Writer
    from crdt_llm.inference.node.ahead import Ahead
    from crdt_llm.inference.node.evaluate import Admit
    from crdt_llm.inference.node.held import Held
    from crdt_llm.inference.node.overflow import Overflow, Summary
    from crdt_llm.inference.node.replies import Replies
    from crdt_llm.inference.node.shared import Shared
    from crdt_llm.inference.node.workplace import Workplace

logger = logging.getLogger("crdt_llm.inference")


class Admission:
    """What is admitted in one conversation, during one sitting.

    Args:
        shared: what the node's desks share.
        conversation: the conversation's id.
        work: the replica to work on.
        ahead: what is read before anybody asks for it; it gives way.
        overflow: what is read of a path that is too long.
        replies: the replies that slots are admitted for.
        held: what is not admitted for now; outlives a sitting.
    """

    def __init__(  # noqa: PLR0913, PLR0917 - whoever an admission meets
        self,
        shared: Shared,
        conversation: str,
        work: Workplace,
        ahead: Ahead,
        overflow: Overflow,
        replies: Replies,
        held: Held,
    ) -> None:
        self._shared = shared
        self._id = conversation
        self._work = work
        self._ahead = ahead
        self._overflow = overflow
        self._replies = replies
        self._held = held

    async def admit(self, action: Admit) -> None:
        """Give places to a run of entries, and begin the reply of the slot behind them.

        Raises:
            Refused: the relay does not let it; what waits for its author is held back then.
            Unavailable: there is no engine just now, or it did not become durable.
        """
        run = action.entries if action.slot is None else (*action.entries, action.slot)
        try:
            await self._admit(action)
        except Refused as error:
            if is_unconfirmed(error):
                logger.info("conversation %s: %s", self._id, error)
                self._held.hold(run, error)
            raise
        if self._held and self._work.conversation.tree.is_admitted(run[-1]):
            self._held.admitted(run)

    async def _admit(self, action: Admit) -> None:
        last = action.entries[-1] if action.entries else action.parent
        slot = action.slot
        if await self._ahead.give_way(action.parent, last, to_reply=slot is not None):
            return  # others were let go on: decide anew
        if slot is None:
            self._ahead.admitted(action.parent, action.entries)
            self._ahead.plan(last)
            await self._work.write(self._place(action)[1])
            return
        try:
            entry, positions = self._work.present(slot), positions_of(self._shared)
            reading = await self._overflow.choose(entry, last, positions)
            if reading is None:
                return  # as above
            digest, place_entries = self._place(action)
            # Later replies go on from what was recorded, so it is recorded where it changes.
            path = self._work.transcript.reading(last)
            is_path = reading == path and self._overflow.implied(last)
            reads = None if is_path else tuple(reading)
            where = Where(self._id, slot, digest, self._work.epoch, 0, reads)
            generation = self._replies.prepare(slot, last, where, reading)
        except (PromptTooLong, BadProof) as error:
            await self._refuse(action, slot, *describe(error))
            return

        def write(writer: Writer) -> None:
            place_entries(writer)
            writer.place(slot, Place(last, where.epoch))
            writer.open_reply(slot)
            writer.state(slot, State.STREAMING)
            if reads is not None:
                writer.set(slot, "reads", list(reads))
            _supersede(writer, action.superseded)

        self._ahead.admitted(action.parent, action.entries)
        generation.reply.asked_at_ms = self._work.seen_at_ms(slot)
        decided_at = self._work.revision
        # The engine need not wait for signatures, nor for the disk: behind the task's first step it
        # has its command.
        generation.hold()
        await self._replies.start(generation)
        await asyncio.sleep(0)
        if self._work.revision != decided_at:
            await self._replies.abandon(slot)  # somebody wrote meanwhile: decide anew
            return
        durable = self._work.write(write)
        generation.let_go()
        await durable

    async def write_summary(self, slot: str, summary: Summary) -> None:
        """Write what stands for entries that are not read any more, and admit it at once."""
        outside, conversation = self._shared.surroundings, self._work.conversation
        identity, epoch = self._shared.identity, self._work.epoch
        parent = conversation.tree.up(slot)
        now, clock = outside.clock_ms(), conversation.tree.clock + 1
        born = Born(
            Role.SYSTEM, PRINCIPAL, PRINCIPAL, now, clock, after=parent, covers=summary.covers
        )
        name, salt = entry_id(now, outside.random(10)), identity.random(SALT_BYTES)
        proof = prove(
            Link(name, born.plain(), commit_content(salt, summary.text)),
            parent=parent_digest(conversation, parent),
            conversation=self._id,
            epoch=epoch,
            key=identity.key,
        )

        def write(writer: Writer) -> None:
            writer.add(name, born, summary.text)
            writer.place(name, Place(parent, epoch))
            writer.proof(name, salt, proof)

        self._shared.drafts(self._id).admitted(parent, ())
        await self._work.write(write)

    async def _refuse(self, action: Admit, slot: str, code: str, message: str) -> None:
        """Admit what stands before a slot that cannot be begun; the slot fails without a place."""
        self._shared.drafts(self._id).admitted(action.parent, ())
        _, place_entries = self._place(action)

        def write(writer: Writer) -> None:
            place_entries(writer)
            fail(writer, slot, code, message)
            _supersede(writer, action.superseded)

        await self._work.write(write)

    def _place(self, action: Admit) -> tuple[bytes, Callable[[Writer], None]]:
        """Places and proofs for a run of author's entries.

        Returns:
            The digest that comes behind them, and what writes them.
        """
        conversation, identity = self._work.conversation, self._shared.identity
        epoch = self._work.epoch
        digest = parent_digest(conversation, action.parent)
        placed: list[tuple[str, Place, bytes, Link, bytes]] = []
        parent = action.parent
        for name in action.entries:
            salt = identity.random(SALT_BYTES)
            content = commit_content(salt, conversation.text(name))
            link = Link(name, conversation.born_plain(name), content)
            digest = link.digest(digest)
            placed.append((name, Place(parent, epoch), salt, link, digest))
            parent = name

        def write(writer: Writer) -> None:
            for name, place, salt, link, at in placed:
                proof = sign(link, at, conversation=self._id, epoch=epoch, key=identity.key)
                writer.place(name, place)
                writer.proof(name, salt, proof)

        return digest, write


def _supersede(writer: Writer, slots: tuple[str, ...]) -> None:
    for slot in slots:
        writer.state(slot, State.SUPERSEDED)
