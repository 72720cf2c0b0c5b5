"""A relay as `serve` wires it, without an engine: for tests of the client against the real one.

Owns the relay's stores, which outlive it, and a node that says what a test tells it to. It must not
know what is tested.
"""

from __future__ import annotations

import time
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Self

from crdt_llm.document.chain import lease_message
from crdt_llm.document.conversation import Conversation
from crdt_llm.document.keys import SigningKey
from crdt_llm.document.schema import SALT_BYTES, Place, Proof, State, Usage
from crdt_llm.store.archive import Archive
from crdt_llm.store.register import SqliteRegister
from crdt_llm.store.sqlite import SqliteLog
from crdt_llm.store.token_ledger import TokenLedger
from crdt_llm.sync.relay.access import Authority
from crdt_llm.sync.relay.conversation_list import ConversationLists
from crdt_llm.sync.relay.hub import Hub
from crdt_llm.sync.relay.native_peer import RelayIdentity
from crdt_llm.sync.relay.requests import Requests
from crdt_llm.sync.relay.server import Relay

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from crdt_llm.document.conversation import Writer
    from crdt_llm.sync.relay.hub import Membership

TOKEN = "a token"  # noqa: S105 - the key to a server that lives for one test
RELAY = SigningKey(bytes(32))
NODE = SigningKey(b"n" * 32)
PROOF = Proof(bytes(32), None, None, bytes(32), bytes(64))  # well-formed is all that a relay asks


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


class House:
    """A relay with its store, which can stop and start again."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._running = AsyncExitStack()
        self._port = 0
        self.hub: Hub
        self.relay: Relay

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}/"

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Listen, on the port of the last time."""
        ledger = TokenLedger.open(self._folder / "tokens.db")
        self._running.callback(ledger.close)
        archive = Archive.open(self._folder / "archive.db")
        self._running.callback(archive.close)
        register = await SqliteRegister.open(self._folder / "register.db")
        self._running.push_async_callback(register.close)
        log = await SqliteLog.open(self._folder / "log.db")
        self._running.push_async_callback(log.close)
        authority = Authority(TOKEN, bytes(32), ledger, clock=_now_ms)
        self.hub = Hub(log, register=register, relay_key=RELAY.public)
        lists = ConversationLists(self.hub, archive, clock=_now_ms)
        self.relay = Relay(
            self.hub,
            authenticate=authority.authenticate,
            is_valid=authority.is_valid,
            identity=RelayIdentity(RELAY.public, log.log_id),
            lists=lists,
            requests=Requests(lists, authority),
        )
        await self.relay.start(port=self._port)
        self._running.push_async_callback(self.relay.stop)
        self._port = self.relay.address[1]

    def lose(self, *stores: str) -> None:
        """Lose some of its files while it does not run."""
        for store in stores:
            for file in self._folder.glob(f"{store}.db*"):
                file.unlink()

    def look_at_tokens(self) -> None:
        """Do at once what it does every few seconds: end the connections of tokens that ended."""
        self.relay._end_expired()

    async def stop(self) -> None:
        await self._running.aclose()


class Node:
    """A node that says what a test tells it to; its proofs are empty forms."""

    def __init__(self, identity: str) -> None:
        self.replica = Conversation(77, seal_client_id=78)
        self._identity = identity
        self._membership: Membership
        self._epoch = 0

    async def join(self, hub: Hub) -> Self:
        self._membership = await hub.join(self._identity, "node", node=True, deliver=self._hear)
        self.replica.apply(self._membership.state)
        self._epoch = await hub.grant_epoch(self._identity, NODE.public)
        self._membership.author = replace(self._membership.author, epoch=self._epoch)
        if self.replica.lease(self._epoch) is None:
            signed = RELAY.sign(lease_message(self._identity, self._epoch, NODE.public))
            await self._write(lambda writer: writer.add_lease(self._epoch, NODE.public, signed))
        return self

    def _hear(self, update: bytes) -> None:
        self.replica.apply(update)

    async def _write(self, compose: Callable[[Writer], None]) -> None:
        with self.replica.writing() as writer:
            compose(writer)
        assert writer.change is not None
        await self._membership.submit(writer.change.update)

    async def admit(self, slot: str) -> None:
        """Place what stands before a slot, and begin to answer it."""
        tree = self.replica.tree
        for entry in tree.path(slot):
            if tree.is_admitted(entry):
                continue

            def compose(writer: Writer, entry: str = entry, parent: str = tree.up(entry)) -> None:
                writer.place(entry, Place(parent, self._epoch))
                if entry == slot:
                    writer.open_reply(slot)
                    writer.state(slot, State.STREAMING)
                else:
                    writer.proof(entry, bytes(SALT_BYTES), PROOF)

            await self._write(compose)

    async def say(self, slot: str, text: str) -> None:
        await self._write(lambda writer: writer.append_text(slot, text))

    async def end(self, slot: str, state: State = State.DONE) -> None:
        def compose(writer: Writer) -> None:
            writer.state(slot, state)
            writer.usage(slot, Usage(prompt=9, prefilled=4, sampled=3, finish="end"))
            writer.proof(slot, bytes(SALT_BYTES), PROOF)

        await self._write(compose)

    async def answer(self, slot: str, text: str) -> None:
        await self.admit(slot)
        await self.say(slot, text)
        await self.end(slot)
