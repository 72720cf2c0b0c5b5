"""How writes come about: from what a person wants to a function that writes it into a document.

This module owns the form of new entries, which way they hang, and which writes belong into one
transaction. It must not know disks, sockets, or what happens to a write. Whether a write is
possible is asked of the document as it is when it is written.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, TypeAlias

from crdt_llm.document import rules
from crdt_llm.document.conversation import Conversation, Writer
from crdt_llm.document.schema import SCHEMA_VERSION, Born, Role, entry_id
from crdt_llm.errors import LocalMisuse
from crdt_llm.sync.client import intents
from crdt_llm.sync.client.wording import checked_text

if TYPE_CHECKING:
    from random import Random

    from crdt_llm.document.schema import Birth, Entry, Grant, Params
    from crdt_llm.sync.client.intents import Intent

_ULID_RANDOM_BYTES: Final = 10

Compose: TypeAlias = Callable[[Conversation, Writer], None]
"""Writes into an open transaction; it is given the document as it is at that moment."""

Head: TypeAlias = Callable[[Conversation], str]
"""The entry whose line a device looks at."""


@dataclass(frozen=True, slots=True)
class Pen:
    """Who writes, where and when.

    Attributes:
        author: the principal.
        device: this device's name.
        clock: milliseconds since 1970.
        random: draws ids.
    """

    author: Callable[[], str]
    device: str
    clock: Callable[[], int]
    random: Random

    def birth(self, birth: Birth, title: str | None) -> Compose:
        """Begin a conversation."""

        def compose(_: Conversation, writer: Writer) -> None:
            writer.give_birth(birth, SCHEMA_VERSION)
            writer.set_meta("created_at", self.clock())
            if title:
                writer.set_meta("title", title)

        return compose

    def message(
        self, head: Head, role: Role, text: str, call: str | None = None
    ) -> tuple[str, Compose]:
        """An entry at the end of the line; the answer begins with its id.

        Raises:
            LocalMisuse: it cannot be written so.
        """
        if (role is Role.TOOL) != (call is not None):
            raise LocalMisuse("an entry with the role tool needs the call it answers, others none")
        if call is not None and not checked_text(
            call, "the call", characters_max=rules.CALL_CHARACTERS_MAX
        ):
            raise LocalMisuse("a call has an id")
        checked_text(text, "the text")
        entry = self._new_id()

        def compose(document: Conversation, writer: Writer) -> None:
            born = self._born(document, role, document.tree.last(head(document)))
            writer.add(entry, replace(born, call=call), text)

        return entry, compose

    def question(self, head: Head, role: Role, text: str, params: Params) -> tuple[str, Compose]:
        """An entry and the slot for a reply to it, in one transaction; the slot's id."""
        checked_text(text, "the text")
        entry, slot = self._new_id(), self._new_id()

        def compose(document: Conversation, writer: Writer) -> None:
            born = self._born(document, role, document.tree.last(head(document)))
            writer.add(entry, born, text)
            writer.add(slot, _slot(born, entry, params))

        return slot, compose

    def request(self, head: Head, params: Params) -> tuple[str, Compose]:
        """A slot after the last entry of the line."""
        slot = self._new_id()

        def compose(document: Conversation, writer: Writer) -> None:
            born = self._born(document, Role.ASSISTANT, document.tree.last(head(document)))
            writer.add(slot, replace(born, params=params))

        return slot, compose

    def another(self, old: str, params: Params, *, switch: bool) -> tuple[str, Compose]:
        """A slot beside another one."""
        slot = self._new_id()

        def compose(document: Conversation, writer: Writer) -> None:
            born = self._born(document, Role.ASSISTANT, document.tree.up(old))
            writer.add(slot, replace(born, fork=True, params=params))
            if switch:
                writer.set_meta("head", slot)

        return slot, compose

    def instead(
        self, old: Entry, text: str, params: Params, *, switch: bool
    ) -> tuple[str, Compose]:
        """Another entry in the place of one, and the slot for a reply to it; the slot's id."""
        checked_text(text, "the text")
        new, slot = self._new_id(), self._new_id()

        def compose(document: Conversation, writer: Writer) -> None:
            born = self._born(document, old.born.role, document.tree.up(old.id))
            born = replace(born, fork=True, call=old.born.call)
            writer.add(new, born, text)
            writer.add(slot, _slot(born, new, params))
            if switch:
                writer.set_meta("head", slot)

        return slot, compose

    def continuation(self, cut: str, params: Params, *, fork: bool) -> tuple[str, Compose]:
        """A slot that goes on where another one ended."""
        slot = self._new_id()

        def compose(document: Conversation, writer: Writer) -> None:
            born = self._born(document, Role.ASSISTANT, cut)
            writer.add(slot, replace(born, fork=fork, params=params))
            if fork:
                writer.set_meta("head", slot)

        return slot, compose

    def once_more(self, head: Head, intent: Intent) -> Compose:
        """What was refused, said now, at the end of the line as it is."""

        def compose(document: Conversation, writer: Writer) -> None:
            now = intents.anew(
                intent,
                after=document.tree.last(head(document)),
                clock=document.tree.clock,
                at=self.clock(),
                author=self.author(),
                is_there=document.tree.__contains__,
            )
            intents.write(now, document, writer)

        return compose

    def redaction(self, entry: str) -> Compose:
        """Withdraw an entry."""
        return lambda _, writer: writer.redact(entry, self.author(), self.clock())

    def stop(self, slot: str) -> Compose:
        """Ask for the end of a reply."""
        return lambda _, writer: writer.stop(slot, self.author())

    def right(self, principal: str, grant: Grant | None) -> Compose:
        """Give a principal a right, or take it away."""
        return lambda _, writer: writer.grant(principal, grant)

    def _new_id(self) -> str:
        return entry_id(self.clock(), self.random.randbytes(_ULID_RANDOM_BYTES))

    def _born(self, document: Conversation, role: Role, after: str) -> Born:
        return Born(
            role=role,
            author=self.author(),
            device=self.device,
            at=self.clock(),
            clock=document.tree.clock + 1,
            after=after,
        )


def _slot(born: Born, after: str, params: Params) -> Born:
    """A slot that follows a new entry in the same transaction."""
    return replace(
        born,
        role=Role.ASSISTANT,
        clock=born.clock + 1,
        after=after,
        fork=False,
        call=None,
        params=params,
    )
