"""A conversation that a program has open: what it reads, writes and hears there.

This module owns what a program does with one conversation. It must not know sockets, frames, disks
or models. A write is on this device's disk when the call returns, and travels when there is a
connection. Nothing here waits for the network but what says so.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol, Unpack

from crdt_llm.document import rules
from crdt_llm.document.schema import (
    PRINCIPAL_CHARACTERS_MAX,
    ROOT,
    TITLE_CHARACTERS_MAX,
    Grant,
    is_entry_id,
)
from crdt_llm.errors import ConnectionLost, Gap, LocalMisuse, Refused
from crdt_llm.sync.client import intents
from crdt_llm.sync.client.asked_reply import Reply
from crdt_llm.sync.client.changes import Changed, Feeds
from crdt_llm.sync.client.connection import DRAIN_S_MAX
from crdt_llm.sync.client.uplink import Uplink
from crdt_llm.sync.client.wording import author_role, checked_text, params_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from random import Random

    from crdt_llm.document.conversation import Change, Conversation
    from crdt_llm.document.schema import Entry, Meta
    from crdt_llm.sync.client.changes import Feed
    from crdt_llm.sync.client.connection import Connection
    from crdt_llm.sync.client.journal import RefusedWrite
    from crdt_llm.sync.client.local_replica import LocalReplica
    from crdt_llm.sync.client.pen import Compose, Pen
    from crdt_llm.sync.client.presence import NodePresence
    from crdt_llm.sync.client.traffic import Traffic
    from crdt_llm.sync.client.wording import Sampling


@dataclass(frozen=True, slots=True)
class Branch:
    """One line of a conversation's tree.

    Attributes:
        tip: its last entry; give it to :meth:`OpenConversation.look` or ``set_head``.
        first: the entry that it begins with; ``""`` for the main line.
        parent: the entry that it leaves another line after; ``""`` for the main line.
        shown: whether this device looks at it.
    """

    tip: str
    first: str
    parent: str
    shown: bool


@dataclass(frozen=True, slots=True)
class Invitation:
    """A way in for one person.

    Attributes:
        link: what to give them; whoever has it is let in.
        principal: who they will be.
        id: names the invitation, to take it back.
        token: what the link carries.
    """

    link: str
    principal: str
    id: str
    token: str = field(repr=False)


class Household(Protocol):
    """What an open conversation needs of the client that has it open."""

    device: str
    random: Random
    drafts: bool
    pen: Pen
    connection: Connection

    @property
    def principal(self) -> str:
        """Who one is to the relay."""

    async def archive(self, conversation: str, *, archived: bool = True) -> None:
        """Put a conversation away in our own list, or take it out again."""

    def link_to(self, conversation: str, token: str) -> str:
        """A link that a browser opens a conversation with."""

    def forget(self, conversation: OpenConversation) -> None:
        """It was closed."""


class OpenConversation:
    """A conversation that this device has open.

    Args:
        client: whose it is.
        replica: what this device has of it.
    """

    def __init__(self, client: Household, replica: LocalReplica) -> None:
        self._client = client
        self._replica = replica
        self._feeds = Feeds()
        self._look: str | None = None  # None: where the shared head is
        self._closing: asyncio.Task[None] | None = None
        self._uplink = Uplink(
            replica,
            client.connection,
            device=client.device,
            random=client.random,
            announce=lambda: self._feeds.announce(Changed(connection=True)),
        )
        replica.on_change(self._changed)
        replica.on_outbox(self._outbox_changed)

    # -- reading -------------------------------------------------------------------------------

    @property
    def id(self) -> str:
        """The conversation's id."""
        return self._replica.conversation_id

    @property
    def document(self) -> Conversation:
        """The replica, for reading. Ask again after every ``await``: it may be built anew."""
        return self._replica.document

    @property
    def meta(self) -> Meta:
        """Title, shared head, policy and the like."""
        return self.document.meta

    @property
    def title(self) -> str:
        """The title, or ``""``."""
        return self.meta.title

    def entry(self, entry: str) -> Entry:
        """One entry as it is now.

        Raises:
            LocalMisuse: there is none by that id (here, yet).
        """
        found = self.document.entry(entry)
        if found is None:
            raise LocalMisuse(f"conversation {self.id} has no entry {entry}")
        return found

    def path(self) -> tuple[str, ...]:
        """The ids of what this device shows, in order."""
        return self.document.view(self._head())

    def view(self) -> tuple[Entry, ...]:
        """What this device shows, in order: the line it looks at, pending entries included."""
        document = self.document
        entries = (document.entry(entry) for entry in document.view(self._head()))
        return tuple(entry for entry in entries if entry is not None)

    def branches(self) -> tuple[Branch, ...]:
        """Every line of the conversation, the main line first."""
        tree = self.document.tree
        shown = tree.line(self._head())
        return tuple(
            Branch(
                tip=tip,
                first=line,
                parent=tree.up(line) if line != ROOT else ROOT,
                shown=line == shown,
            )
            for tip in tree.tips()
            for line in (tree.line(tip),)
        )

    def siblings(self, entry: str) -> tuple[str, ...]:
        """The alternatives that stand in the same place as an entry, itself included, in order."""
        tree = self.document.tree
        if entry not in tree:
            raise LocalMisuse(f"conversation {self.id} has no entry {entry}")
        beside = tree.children(tree.up(entry))
        return tuple(other for other in beside if other == entry or not tree.is_end(other))

    def reply(self, slot: str) -> Reply:
        """The reply in a slot that another device asked for, even before it has come here.

        Raises:
            LocalMisuse: that is no entry's id, or the entry is no reply.
        """
        found = self.document.entry(slot)
        if not is_entry_id(slot) or (found is not None and not found.is_slot):
            raise LocalMisuse(f"entry {slot} is no reply")
        return Reply(self, slot)

    def changes(self) -> Feed:
        """What happens from now on, as an asynchronous iterator.

        A slow listener gets what it missed as one change. Ends when the conversation is closed.
        """
        return self._feeds.open()

    async def next_of(self, feed: Feed, wanted: Callable[[Changed], bool]) -> Changed:
        """The next change of a feed that is ``wanted``; for those who wait for the relay.

        Raises:
            Refused: the relay does not let this conversation in, so nothing more will come.
            ConnectionLost: the conversation was closed on this device.
        """
        while True:
            if self._uplink.refused is not None:
                raise _again(self._uplink.refused)
            try:
                changed = await anext(feed)
            except StopAsyncIteration:
                raise ConnectionLost(
                    f"conversation {self.id} was closed on this device; a reply goes on without it"
                ) from None
            if wanted(changed):
                return changed

    # -- writing -------------------------------------------------------------------------------

    async def send(self, text: str, *, role: str = "user", call: str | None = None) -> str:
        """Add an entry to the line that this device looks at, without asking for a reply.

        Args:
            text: what it says.
            role: ``user``, ``system`` or ``tool``.
            call: the id of the tool call that a ``tool`` entry answers.

        Returns:
            The entry's id, once it is on this device's disk, or if that fails, at the relay.

        Raises:
            LocalMisuse: the model's words are not ours to write; the text is too long or no text.
            StoreFailed: the disk did not take it; it was not written, unless the relay got it just
                as the connection ended.
        """
        entry, compose = self._client.pen.message(self._head, author_role(role), text, call)
        await self._write(compose)
        return entry

    async def ask(self, text: str, *, role: str = "user", **sampling: Unpack[Sampling]) -> Reply:
        """Add an entry and ask for a reply to it, in one transaction.

        Returns:
            The reply, once the request is on this device's disk, or if that fails, at the relay.

        Raises:
            LocalMisuse: the text or a parameter is out of bounds.
            StoreFailed: the disk did not take it; it was not written, unless the relay got it just
                as the connection ended.
        """
        pen = self._client.pen
        asked = pen.question(self._head, author_role(role), text, params_of(sampling))
        return await self._asked(*asked)

    async def request(self, **sampling: Unpack[Sampling]) -> Reply:
        """Ask for a reply to what is there: a slot after the last entry of the line."""
        return await self._asked(*self._client.pen.request(self._head, params_of(sampling)))

    async def regenerate(
        self, slot: str | None = None, *, switch: bool = True, **sampling: Unpack[Sampling]
    ) -> Reply:
        """Ask for another reply in the place of one; the old one stays as a branch.

        Args:
            slot: the reply to have an alternative to; the last one shown by default.
            switch: look at the new branch, and move the shared head there.
            **sampling: replace the old reply's parameters, of which the seed is dropped.
        """
        old = self._slot_or_last(slot)
        params = params_of(sampling, replace(old.born.params, seed=None))
        asked = self._client.pen.another(old.id, params, switch=switch)
        return await self._asked(*asked, look=switch)

    async def fork(
        self, entry: str, text: str, *, switch: bool = True, **sampling: Unpack[Sampling]
    ) -> Reply:
        """Edit an entry: say something else in its place, and ask for a reply to that.

        Args:
            entry: the entry to edit, not a reply; it stays as a branch.
            text: what the new one says.
            switch: look at the new branch, and move the shared head there.
            **sampling: parameters of the reply.
        """
        old = self.entry(entry)
        if old.is_slot:
            raise LocalMisuse("the model's words cannot be edited; regenerate the reply instead")
        asked = self._client.pen.instead(old, text, params_of(sampling), switch=switch)
        return await self._asked(*asked, look=switch)

    async def extend(self, slot: str | None = None, **sampling: Unpack[Sampling]) -> Reply:
        """Go on where a reply was cut off (by its token limit, a stop, or a failure).

        Args:
            slot: the reply to go on with; the last one shown by default. If something stands
                after it already, the continuation is a branch, which this device then looks at.
            **sampling: replace the cut reply's parameters.

        Raises:
            LocalMisuse: the reply has not ended, or the model never began it.
        """
        cut = self._slot_or_last(slot)
        if not cut.ended or not self.document.tree.is_admitted(cut.id):
            raise LocalMisuse(f"reply {cut.id} was not cut off: there is nothing to go on from")
        params = params_of(sampling, replace(cut.born.params, extend=True))
        fork = self.document.tree.last(cut.id) != cut.id
        return await self._asked(
            *self._client.pen.continuation(cut.id, params, fork=fork), look=fork
        )

    async def stop(self, slot: str | None = None) -> str | None:
        """Ask for the end of a reply. Works offline, and takes effect when the node hears of it.

        Args:
            slot: the reply to stop; by default the one shown that has not ended.

        Returns:
            The slot that was stopped, or ``None`` if none was running.
        """
        if slot is None:
            running = (entry for entry in reversed(self.view()) if not entry.ended)
            slot = next((entry.id for entry in running if entry.stop is None), None)
            if slot is None:
                return None
        stopped = self._slot_or_last(slot).id
        await self._write(self._client.pen.stop(stopped))
        return stopped

    async def redact(self, entry: str) -> None:
        """Withdraw an entry, for everybody and for good; its place in the conversation stays.

        Its text leaves this device's disk with the next commit, and the relay's and every other
        device's as they hear of it.

        Raises:
            LocalMisuse: it is not there, or neither yours nor are you an owner.
        """
        self.entry(entry)
        await self._write(self._client.pen.redaction(entry))

    async def rename(self, title: str) -> None:
        """Give the conversation a title."""
        checked_text(title, "the title", characters_max=TITLE_CHARACTERS_MAX)
        await self._write(lambda _, writer: writer.set_meta("title", title))

    async def set_head(self, entry: str) -> None:
        """Show the line of an entry on every device that does not look elsewhere."""
        self.entry(entry)
        await self._write(lambda _, writer: writer.set_meta("head", entry))
        self.look(None)

    def draft(self, text: str) -> None:
        """Let the node know what is being typed, so that it can read ahead; ``""`` takes it back.

        It is a hint: nobody else sees it, it is never stored, and nothing depends on it. Does
        nothing in a client without ``drafts``.

        Raises:
            LocalMisuse: that is no text.
        """
        if self._client.drafts:
            checked_text(text, "the draft")
            self._uplink.draft(self.document.tree.last(self._head()), text)

    # -- others --------------------------------------------------------------------------------

    async def share(self, principal: str, role: str | None) -> None:
        """Give somebody whom the relay knows a right here, or take it away.

        Args:
            principal: their name.
            role: ``owner``, ``writer`` or ``reader``; ``None`` for nothing any more.

        Raises:
            LocalMisuse: there is no such right, or it is not yours to give.
        """
        checked_text(principal, "a principal", characters_max=PRINCIPAL_CHARACTERS_MAX)
        if not principal or (role is not None and role not in Grant.__members__.values()):
            raise LocalMisuse("share with a name, as owner, writer or reader, or None to end it")
        await self._write(self._client.pen.right(principal, None if role is None else Grant(role)))

    def members(self) -> dict[str, str]:
        """Who may do what here: principals and their rights."""
        birth = self.meta.birth
        first = {} if birth is None else {birth.owner: Grant.OWNER.value}
        return first | dict(self.document.access())

    async def invite(
        self, role: str = "writer", *, expires_at: int | None = None, name: str | None = None
    ) -> Invitation:
        """Make a link that lets one person in. Waits until the relay has what was written here.

        Args:
            role: ``writer`` or ``reader``.
            expires_at: until when the link is good, ms since 1970; ``None`` leaves it to the
                relay, which takes a year.
            name: what to call them; by default the relay draws a name.

        Raises:
            LocalMisuse: that is no right to invite with.
            Refused: you may not invite here.
            ConnectionLost: the connection ended before the answer.
        """
        if role not in {Grant.WRITER, Grant.READER}:
            raise LocalMisuse("one invites a writer or a reader")
        arguments = {
            "conversation": self.id,
            "role": role,
            "expires_at": expires_at,
            "name": name,
        }
        await self._known()
        answer = await self._client.connection.request("invite", arguments)
        principal, token, identity = (str(answer[key]) for key in ("principal", "token", "id"))
        await self.share(principal, role)
        return Invitation(self._client.link_to(self.id, token), principal, identity, token)

    async def revoke(self, invitation: str) -> None:
        """Take an invitation back, by its id. What the person may do here is :meth:`share`'s."""
        await self._client.connection.request("revoke", {"id": invitation})

    async def archive(self, *, archived: bool = True) -> None:
        """Put the conversation away in your own list, or take it out again.

        Waits until the relay has what was written here.
        """
        await self._known()
        await self._client.archive(self.id, archived=archived)

    async def leave(self) -> None:
        """Give up your right here. Whoever made a conversation cannot leave it.

        Raises:
            LocalMisuse: you are its owner, or have no right to give up.
        """
        principal = self._client.principal
        if principal not in self.document.access():
            raise LocalMisuse("who made a conversation stays its owner; archive it instead")
        await self._write(self._client.pen.right(principal, None))

    # -- what the relay says to what was written -----------------------------------------------

    @property
    def unacknowledged(self) -> frozenset[str]:
        """The entries that are on this device's disk and that the relay has not acknowledged."""
        waiting = self._replica.outbox
        return frozenset(entry for one in waiting for entry in intents.entries_of(one.intent))

    def acknowledged(self, entry: str) -> bool:
        """Whether the relay has an entry: what this device loses, it does not lose with it."""
        return entry in self.document.tree and entry not in self.unacknowledged

    @property
    def refused_writes(self) -> tuple[RefusedWrite, ...]:
        """What the relay refused: drafts on this device alone, until discarded or sent again."""
        return self._replica.refused_writes

    def refusal_of(self, entry: str) -> RefusedWrite | None:
        """The refused write that an entry was part of."""
        refused = self._replica.refused_writes
        return next((one for one in refused if entry in one.entries), None)

    async def discard(self, refused: RefusedWrite) -> None:
        """Forget a refused write."""
        await self._replica.discard(refused.id)

    async def resend(self, refused: RefusedWrite) -> str:
        """Write once more what was refused, at the end of the line as it is now.

        Returns:
            The id of its first entry; ``""`` if it has none.

        Raises:
            LocalMisuse: it was discarded, or would be refused again.
            StoreFailed: the disk did not take it; it stays a refused write.
        """
        if refused.id not in {one.id for one in self._replica.refused_writes}:
            raise LocalMisuse("that refused write is not here any more")
        await self._write(self._client.pen.once_more(self._head, refused.intent))
        await self._replica.discard(refused.id)
        return refused.entry

    def look(self, entry: str | None) -> None:
        """Look at the line of an entry on this device only; ``None`` follows the shared head."""
        if entry is not None:
            self.entry(entry)
        if entry != self._look:
            self._look = entry
            self._feeds.announce(Changed(look=True))

    async def _write(self, compose: Compose) -> None:
        """Write what the relay will take, as far as this device can tell."""
        try:
            await self._replica.write(compose, self._check)
        except Refused as refused:
            raise LocalMisuse(f"the relay would refuse this: {refused}") from refused

    def _check(self, change: Change, document: Conversation) -> None:
        # What has not come here yet is no offence: the relay has it, or asks for it.
        with suppress(Gap):
            rules.check(
                change,
                document,
                conversation_id=self.id,
                author=rules.Author(self._client.principal),
            )

    async def _asked(self, slot: str, compose: Compose, *, look: bool = False) -> Reply:
        await self._write(compose)
        if look:
            self.look(slot)
        return Reply(self, slot)

    # -- connection ----------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """Whether this device has let go of it, or is about to."""
        return self._closing is not None

    @property
    def online(self) -> bool:
        """Whether there is a connection to the relay now."""
        return self._uplink.online

    @property
    def synced(self) -> bool:
        """Whether this device has everything that the relay had when they connected, and since."""
        return self._uplink.synced

    @property
    def refused(self) -> Refused | None:
        """Why the relay does not let this conversation in, if so; :meth:`resume` asks once more."""
        return self._uplink.refused

    @property
    def stalled(self) -> Refused | None:
        """Why nothing can be written to the relay now, though it lets this conversation in.

        It lost something of the conversation and did not take it back from this device: another
        replica that has it must come.
        """
        return self._uplink.stalled

    @property
    def grant(self) -> str | None:
        """What the relay lets us do here, as it last said."""
        return self._uplink.grant

    @property
    def node(self) -> NodePresence | None:
        """What the conversation's node says of itself, while it is there."""
        return self._uplink.node

    @property
    def devices(self) -> tuple[str, ...]:
        """The names of the other devices that are connected now."""
        return self._uplink.devices

    @property
    def traffic(self) -> Traffic:
        """What this conversation cost on the wire since it was opened; a live count."""
        return self._uplink.traffic

    async def synced_once(self) -> None:
        """Wait until this device and the relay have the same.

        That is: what the relay had is here, and what was written here is acknowledged or refused.
        Returns at once if it is so now.

        Raises:
            Refused: the relay does not let this conversation in, or does not take back what it
                lost of it.
            ConnectionLost: the conversation was closed on this device.
        """
        feed = self.changes()
        while not self._uplink.settled:
            if self.stalled is not None:
                raise _again(self.stalled)
            await self.next_of(feed, lambda _: True)

    def pause(self) -> None:
        """Go offline on purpose. Everything but the network goes on."""
        self._uplink.pause()

    def resume(self) -> None:
        """Go online again, also after a refusal."""
        if self.closed:
            raise LocalMisuse(f"conversation {self.id} is closed on this device")
        self._uplink.resume()

    async def close(self) -> None:
        """Send and save what waits for that, and let go of the conversation on this device."""
        if self._closing is None:
            self._closing = asyncio.create_task(self._close(), name=f"close {self.id}")
        # One caller's cancellation must not leave the file with half a close.
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        try:
            await self._uplink.close(DRAIN_S_MAX)
            await self._replica.close()
        finally:
            self._feeds.end()
            # Only now: two replicas of one conversation must never share a log.
            self._client.forget(self)

    # -- parts ---------------------------------------------------------------------------------

    async def _known(self) -> None:
        """Wait for the relay if it does not know yet what we are here: who begins is the owner."""
        if self._replica.outbox:
            await self.synced_once()

    def _head(self, document: Conversation | None = None) -> str:
        """The entry whose line this device looks at."""
        document = self.document if document is None else document
        if self._look is not None and self._look in document.tree:
            return self._look
        return document.meta.head

    def _slot_or_last(self, slot: str | None) -> Entry:
        if slot is not None:
            if not self.entry(slot).is_slot:
                raise LocalMisuse(f"entry {slot} is no reply")
            return self.entry(slot)
        last = next((entry for entry in reversed(self.view()) if entry.is_slot), None)
        if last is None:
            raise LocalMisuse(f"conversation {self.id} shows no reply yet")
        return last

    def _changed(self, change: Change | None) -> None:
        if change is None:
            self._feeds.announce(Changed(everything=True))
            return
        entries = change.entries
        if change.structure:
            # A new place or slot can end or revive other requests of its line.
            entries |= frozenset(self.document.tree.pending) | self.document.tree.superseded
        meta = any(edit.root != "entries" for edit in change.edits)
        self._feeds.announce(Changed() | Changed(entries=entries, meta=meta))

    def _outbox_changed(self, entries: frozenset[str] | None) -> None:
        if entries is None:
            self._feeds.announce(Changed(everything=True))
        elif entries:
            self._feeds.announce(Changed() | Changed(entries=entries))
        else:
            self._feeds.announce(Changed(meta=True))


def _again(refused: Refused) -> Refused:
    """A copy to raise: every waiter gets a traceback of its own."""
    return type(refused)(refused.code, refused.reason)
