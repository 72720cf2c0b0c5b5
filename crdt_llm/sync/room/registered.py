"""What the register says of a room's conversation, and how it keeps step with the log.

This module owns the row while the room is open: what follows from what is committed, whose client
ids are, and which epoch is granted next. It must not know peers or turns; how a row follows from a
document is :mod:`crdt_llm.sync.room.ledger`'s.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING

from crdt_llm.errors import Behind, Unavailable
from crdt_llm.sync.room import ledger

if TYPE_CHECKING:
    from collections.abc import Iterable

    from crdt_llm.document.conversation import Change, Conversation
    from crdt_llm.document.rules import Author
    from crdt_llm.errors import CrdtLlmError
    from crdt_llm.store.register import Register, Row
    from crdt_llm.sync.room.replica import Replica
    from crdt_llm.sync.room.restoring import Restoring
    from crdt_llm.sync.room.upkeep import Upkeep


class Registered:
    """One conversation's.

    Args:
        conversation: Its id.
        register: Where its facts are durable beside the log.
        log_id: The log's.
        replica: What they follow from.
        upkeep: Where the log stands, and what is owed there.
        restoring: What is known of a loss.
        clients: Client id -> whose it is, what is accepted included; filled here.

    Attributes:
        row: As it is durable; ``None`` before there is a birth.
        clients: As above.
        behind: Admitted entries that the register has and the document lacks.
        is_noteworthy: Something beside the document changed since the row was saved.
    """

    def __init__(  # noqa: PLR0913 - everything outside is an argument
        self,
        conversation: str,
        register: Register,
        log_id: str,
        *,
        replica: Replica,
        upkeep: Upkeep,
        restoring: Restoring,
        clients: dict[int, str],
    ) -> None:
        self.row: Row | None = None
        self.clients = clients
        self.behind: tuple[str, ...] = ()
        self.is_noteworthy = False
        self._conversation = conversation
        self._register = register
        self._log_id = log_id
        self._replica = replica
        self._upkeep = upkeep
        self._restoring = restoring
        self._asked: deque[tuple[bytes, asyncio.Future[int]]] = deque()

    @property
    def epoch(self) -> int:
        """The epoch of the lease that was granted last; 0 before the first one."""
        return self.row.epoch if self.row is not None else 0

    @property
    def rights(self) -> Conversation | Row:
        """What says who may do what: the document, or the row until it is whole again."""
        if self._restoring.is_going_on and self.row is not None:
            return self.row
        return self._replica.document

    async def read(self) -> Row | None:
        """What is durable.

        Raises:
            StoreFailed: It could not be read.
        """
        return await self._register.load(self._conversation)

    async def reconcile(self, row: Row | None) -> None:
        """Compare the row that was read with the document, once, when both are loaded.

        Raises:
            StoreFailed: What follows could not be written.
        """
        document = self._replica.document
        if row is None:
            # The log is the relay's own, so it may be believed.
            current = ledger.first_row(document)
        else:
            self.clients.update(row.clients)
            self.behind = ledger.missing_tips(row, document)
            # A log that ends before what it is known to have held has lost its end.
            cut = row.log_id != self._log_id or self._upkeep.lsn < row.lsn
            self._restoring.is_going_on = cut or bool(self.behind) or document.id is None
            await self._restoring.load(row, document)
            current = row if self._restoring.is_going_on else ledger.reconciled(row, document)
        if current is not None and current.scrub_owed:
            self._upkeep.owe()
        if current is not None and current is not row:
            current = replace(current, log_id=self._log_id, lsn=self._upkeep.lsn)
            await self._register.save(current)
        self.row = current

    def bind(self, fresh: Iterable[int], author: Author) -> None:
        """An accepted write settles whose the client ids are that it was the first to use."""
        for client in fresh:
            if client not in self.clients:
                self.clients[client] = ledger.clients_of(author.principal, node=author.node)
                self.is_noteworthy = True

    def unbind(self) -> None:
        """What was accepted since the row was saved does not count."""
        self.clients.clear()
        if self.row is not None:
            self.clients.update(self.row.clients)

    async def follow(self, changes: Iterable[Change]) -> None:
        """Have durable what was committed, where the row says something of it.

        Raises:
            StoreFailed: It is not durable.
        """
        document, row = self._replica.document, self.row
        if row is None:
            row = ledger.first_row(document)
        else:
            for change in changes:
                if not ledger.concerns(change):
                    continue
                row = ledger.follow(row, change, document)
                if ledger.withdraws(change):
                    row = replace(row, scrub_owed=True)
                    self._upkeep.owe()
        if row is None or (row is self.row and not self.is_noteworthy):
            return
        waiting = MappingProxyType(self._restoring.waiting)
        clients = MappingProxyType(dict(self.clients))
        await self._save(replace(row, clients=clients, unconfirmed=waiting))
        self.is_noteworthy = False
        if self.behind:
            self.behind = ledger.missing_tips(row, document)

    async def wiped(self) -> None:
        """No scrub is owed any more.

        Raises:
            StoreFailed: The mark is still there.
        """
        if self.row is not None:
            await self._save(replace(self.row, scrub_owed=False))

    async def _save(self, row: Row) -> None:
        if not self._restoring.is_going_on:
            row = replace(row, log_id=self._log_id, lsn=self._upkeep.lsn)
        await self._register.save(row)
        self.row = row

    # -- epochs --------------------------------------------------------------------------------

    def ask(self, node_key: bytes) -> asyncio.Future[int]:
        """Ask for an epoch for a node; it is answered by :meth:`grant_asked` or :meth:`end`."""
        granting: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._asked.append((node_key, granting))
        return granting

    @property
    def is_asked(self) -> bool:
        """Whether somebody waits for an epoch."""
        return bool(self._asked)

    async def grant_asked(self) -> None:
        """Grant what was asked for: an epoch is durable before anybody hears of it.

        Raises:
            StoreFailed: It is not; whoever asked waits on.
        """
        while self._asked:
            node_key, granting = self._asked[0]
            row = self.row
            if granting.done():  # nobody waits for it any more
                pass
            elif row is None or self._replica.document.id is None:
                granting.set_exception(Unavailable("this conversation has no birth yet"))
            elif self.behind:
                granting.set_exception(Behind("a replica with what was lost must come first"))
            else:
                if row.holder != node_key or row.epoch == 0 or self._restoring.is_going_on:
                    self._restoring.is_going_on = False
                    await self._save(replace(row, epoch=row.epoch + 1, holder=node_key))
                if not granting.done():
                    granting.set_result(self.epoch)
            self._asked.popleft()

    def end(self, error: CrdtLlmError) -> None:
        """Nothing is granted any more."""
        for _, granting in self._asked:
            if not granting.done():
                granting.set_exception(error)
                granting.exception()  # whoever waits hears of it
        self._asked.clear()
