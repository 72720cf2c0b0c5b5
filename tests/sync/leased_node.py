"""A node of a test: it holds the lease of a room, admits what is pending, and streams replies."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import TYPE_CHECKING, Any

from sync.device import AT_MS, BIRTH
from sync.rooms import RELAY_KEY

from crdt_llm.document.chain import (
    Link,
    commit_content,
    commit_tokens,
    lease_message,
    parent_digest,
    prove,
)
from crdt_llm.document.conversation import Conversation
from crdt_llm.document.keys import SigningKey
from crdt_llm.document.schema import (
    Born,
    Place,
    Role,
    State,
    Usage,
    conversation_id,
    entry_id,
)
from crdt_llm.document.seal import FINAL_CHUNK, Hidden, Kind, Sealer, place_of

if TYPE_CHECKING:
    from sync.device import Device
    from sync.rooms import Member
    from sync.rooms import Place as Room_

CONVERSATION = conversation_id(BIRTH)
MASTER = b"m" * 32


class LeasedNode:
    """One node's part in :data:`CONVERSATION`.

    Args:
        member: its seat.
        seed: of its key, its client ids and its salts.
    """

    def __init__(self, member: Member, seed: int = 0) -> None:
        rng = self.rng = Random(f"node {seed}")
        self.member = member
        self.key = SigningKey(rng.randbytes(32))
        self.sealer = Sealer(MASTER, rng.randbytes)
        self.replica = Conversation(
            rng.randrange(1, 2**32),
            seal_client_id=rng.randrange(1, 2**32),
            update=member.membership.state,
        )
        self.heard = 0
        self.epoch = 0
        self.written: list[bytes] = []

    @classmethod
    async def sit(cls, place: Room_, seed: int = 0) -> LeasedNode:
        """Take a seat and the lease."""
        node = cls(await place.join("node", node=True), seed)
        await node.take_lease(place)
        return node

    async def take_lease(self, place: Room_) -> None:
        self.epoch = await place.hub._rooms[CONVERSATION].grant_epoch(self.key.public)
        membership = self.member.membership
        membership.author = replace(membership.author, epoch=self.epoch)

    def catch_up(self) -> None:
        for update in self.member.heard[self.heard :]:
            self.replica.apply(update)
        self.heard = len(self.member.heard)

    async def submit(self, change: Any) -> bytes:
        self.written.append(change.update)
        await self.member.membership.submit(change.update)
        return bytes(change.update)

    def _record_lease(self, writer: Any) -> None:
        if self.replica.lease(self.epoch) is None:
            message = lease_message(CONVERSATION, self.epoch, self.key.public)
            writer.add_lease(self.epoch, self.key.public, RELAY_KEY.sign(message))

    def _prove(self, writer: Any, name: str, parent: str, **more: Any) -> None:
        salt = self.rng.randbytes(16)
        content = commit_content(salt, more.pop("text", self.replica.text(name)))
        link = Link(name, self.replica.born_plain(name), content, **more)
        proof = prove(
            link,
            parent=parent_digest(self.replica, parent),
            conversation=CONVERSATION,
            epoch=self.epoch,
            key=self.key,
        )
        writer.proof(name, salt, proof)

    async def admit(self, name: str) -> None:
        """Give an author's entry its place at the tip."""
        self.catch_up()
        parent = self.replica.tree.tip("")
        with self.replica.writing() as writer:
            self._record_lease(writer)
            writer.place(name, Place(parent, self.epoch))
            self._prove(writer, name, parent)
        await self.submit(writer.change)

    async def start(self, slot: str) -> None:
        """Admit a slot and open its reply."""
        self.catch_up()
        with self.replica.writing() as writer:
            self._record_lease(writer)
            writer.place(slot, Place(self.replica.tree.tip(""), self.epoch))
            writer.state(slot, State.STREAMING)
            writer.open_reply(slot)
        await self.submit(writer.change)

    async def say(self, slot: str, text: str) -> None:
        """Stream a few words of a reply, with their sealed ids."""
        self.catch_up()
        entry = self.replica.entry(slot)
        assert entry is not None
        where = replace(place_of(self.replica, entry, len(entry.sealed)), epoch=self.epoch)
        hidden = Hidden(tuple(text.encode()), (Kind.SAMPLED,) * len(text.encode()))
        blob = self.sealer.seal(hidden, where, entry.content + text, self.key)
        with self.replica.writing() as writer:
            writer.append_text(slot, text)
            writer.append_sealed(slot, blob)
        await self.submit(writer.change)

    async def finish(self, slot: str) -> None:
        """End a reply."""
        self.catch_up()
        entry = self.replica.entry(slot)
        assert entry is not None
        assert entry.place is not None
        hidden = self.sealer.open_reply(entry.sealed, place_of(self.replica, entry))
        where = replace(place_of(self.replica, entry, FINAL_CHUNK), epoch=self.epoch)
        blob = self.sealer.seal(hidden, where, entry.content, self.key)
        with self.replica.writing() as writer:
            writer.state(slot, State.DONE)
            writer.replace_sealed(slot, blob)
            writer.usage(slot, Usage(prompt=1, prefilled=1, sampled=len(hidden.ids)))
            salt = self.rng.randbytes(16)
            link = Link(
                slot,
                self.replica.born_plain(slot),
                commit_content(salt, entry.content),
                commit_tokens(salt, hidden.ids),
                state=State.DONE,
            )
            parent = parent_digest(self.replica, entry.place.parent)
            proof = prove(
                link, parent=parent, conversation=CONVERSATION, epoch=self.epoch, key=self.key
            )
            writer.proof(slot, salt, proof)
        await self.submit(writer.change)


async def ask(device: Device, member: Member, text: str = "why?") -> tuple[str, str]:
    """An entry and its slot, written by a device and committed; their ids."""
    tree = device.replica.tree
    question, slot = (entry_id(AT_MS, device.random.randbytes(10)) for _ in range(2))
    with device.replica.writing() as writer:
        clock, after = tree.clock, tree.last("")
        author = device.principal
        writer.add(question, Born(Role.USER, author, "t", AT_MS, clock + 1, after=after), text)
        writer.add(slot, Born(Role.ASSISTANT, author, "t", AT_MS, clock + 2, after=question))
    assert writer.change is not None
    device.written.append(writer.change.update)
    await member.membership.submit(writer.change.update)
    return question, slot
