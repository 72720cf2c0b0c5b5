"""The judging of one write: what it says, what it does, and whether its author may.

This module owns which checks there are and what comes before the replica and what after. It must
not know peers' queues, turns or the log. The rules of the document itself are those of
:mod:`crdt_llm.document.rules`, and those of a restore :mod:`crdt_llm.sync.room.restore`'s.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import TYPE_CHECKING

from crdt_llm.document import rules
from crdt_llm.document.chain import lease_message
from crdt_llm.document.conversation import LEASES
from crdt_llm.document.keys import verify
from crdt_llm.errors import BadProof, Forbidden, Refused
from crdt_llm.sync.room import ledger
from crdt_llm.sync.room.look import find_rewritten, glance_at, look_at
from crdt_llm.sync.room.offload import offload
from crdt_llm.sync.room.rights import WRITERS, right_of
from crdt_llm.sync.update.shape import hides
from crdt_llm.sync.update.structure import DOCUMENT_LIMITS, TRANSACTION_LIMITS, brings
from crdt_llm.sync.wire.y_websocket import encode_state_vector

if TYPE_CHECKING:
    from collections.abc import Iterable

    from crdt_llm.document.conversation import Change
    from crdt_llm.document.rules import Author
    from crdt_llm.sync.room.look import Look
    from crdt_llm.sync.room.peer import Submission
    from crdt_llm.sync.room.registered import Registered
    from crdt_llm.sync.room.replica import Replica
    from crdt_llm.sync.room.restoring import Restoring


class Judge:
    """One room's.

    Args:
        conversation: Its id.
        replica: What is written to.
        registered: What the register says.
        restoring: What is known of a loss.
        keeps_leases: Whether a node must hold the lease to write.
        relay_key: The relay's public key, that leases are signed with; ``None`` to believe any.
    """

    def __init__(  # noqa: PLR0913 - what a write is judged by
        self,
        conversation: str,
        replica: Replica,
        registered: Registered,
        restoring: Restoring,
        *,
        keeps_leases: bool,
        relay_key: bytes | None,
    ) -> None:
        self._conversation = conversation
        self._replica = replica
        self._registered = registered
        self._restoring = restoring
        self._keeps_leases = keeps_leases
        self._relay_key = relay_key

    def is_restore(self, submission: Submission, author: Author) -> bool:
        """Whether a write is judged as a restore (I7 of :mod:`crdt_llm.sync.room.room`)."""
        if submission.doubts is not None and self._registered.row is None:
            return True
        return self._restoring.is_going_on and submission.may_restore and not author.node

    # -- before the replica sees it ------------------------------------------------------------

    async def look(self, submission: Submission, author: Author, *, is_restore: bool) -> Look:
        """The checks that need nothing applied. What is known does not change meanwhile.

        Raises:
            MalformedMessage: No update.
            Refused: It must not be applied.
        """
        update, known = submission.update, self._replica.known
        look = glance_at(update, known)
        if look is None:
            limits = DOCUMENT_LIMITS if submission.is_large else TRANSACTION_LIMITS
            node = author.node or is_restore
            reading = functools.partial(look_at, update, limits, known, node=node)
            look = await offload(len(update), reading)
        if not is_restore:
            self._check_clients(look.fresh, author)
        if look.fresh and not is_restore and not self._may_write(author):
            raise Forbidden("forbidden", "you may not write in this conversation")
        if look.repeated:
            since = encode_state_vector({**known, **look.repeated})
            held = self._replica.document.diff(since)
            find = functools.partial(find_rewritten, look.structure, held)
            rewritten = await offload(len(update) + len(held), find)
            if rewritten is not None:
                raise Refused(
                    "rewrite",
                    f"client {rewritten.client} wrote something else at clock {rewritten.clock}:"
                    " this replica must be discarded",
                )
        if look.brings and not look.fresh:
            deleted = await self._replica.deletions()
            return replace(look, brings=brings(look.structure, known, deleted))
        return look

    def _check_clients(self, fresh: Iterable[int], author: Author) -> None:
        """Whose a client id is was settled by its first accepted use."""
        own = ledger.clients_of(author.principal, node=author.node)
        clients, ours = self._registered.clients, self._replica.document.client_id
        for client in fresh:
            if clients.get(client, own) != own or client == ours:
                raise Refused("forged-client", f"client id {client} is somebody else's")

    def _may_write(self, author: Author) -> bool:
        """Whether somebody's update is worth applying: the rules say the rest."""
        if author.node or self._replica.document.id is None:
            return True
        return right_of(self._registered.rights, author) in WRITERS

    # -- and after -----------------------------------------------------------------------------

    async def apply(self, submission: Submission, look: Look, author: Author) -> Change:
        """Apply a write, and judge what it did.

        Raises:
            Dirty: It must be taken back.
        """
        replica = self._replica
        epoch = self._registered.epoch if self._keeps_leases else None
        change = replica.merge(submission.update)
        with replica.undoing(change):
            rules.check(
                change,
                replica.document,
                conversation_id=self._conversation,
                author=author,
                epoch=epoch,
            )
            self._check_leases(change)
            self._restoring.check_confirmed(change)
            if not author.node and hides(look.structure, replica.known, change):
                await replica.check_places(look.structure, change, author)
            replica.check_size(len(change.update), author)
        return change

    async def restore(self, submission: Submission, look: Look, author: Author) -> Change:
        """Apply a restore, judge it, and correct it where the register knows better.

        Raises:
            Dirty: It must be taken back.
        """
        replica, document = self._replica, self._replica.document
        before = document.state_vector()
        change = replica.merge(submission.update)
        with replica.undoing(change):
            claim = await self._restoring.judge(
                document,
                change,
                look.structure,
                row=self._registered.row,
                author=author,
                known=replica.known,
                doubts=submission.doubts,
            )
        with replica.undoing(None):
            fixed = self._restoring.correct(claim)
            if fixed:
                # Joined anew: what was withdrawn is collected, and reaches neither log nor peers.
                update = document.diff(before)
                change = replace(change, update=update, edits=(*change.edits, *fixed))
                self._registered.clients[document.client_id] = ledger.ROOMS_OWN
            replica.check_size(len(change.update), author)
        replica.relearn()
        self._registered.clients.update(self._restoring.remember(claim))
        # Only what changes the register is worth a line there.
        self._registered.is_noteworthy = True
        return change

    def _check_leases(self, change: Change) -> None:
        """A lease that is recorded is the one that was granted: others verify proofs by it."""
        if self._relay_key is None or not self._keeps_leases:
            return
        row = self._registered.row
        for edit in change.edits:
            if edit.root == LEASES and row is not None:
                node, signature = edit.new["node"], edit.new["signature"]
                message = lease_message(self._conversation, int(edit.key or 0), node)
                try:
                    verify(self._relay_key, signature, message)
                except BadProof as error:
                    raise Refused("leases", "this relay has not signed that lease") from error
                if node != row.holder:
                    raise Refused("leases", "a node records the lease of its own key")
