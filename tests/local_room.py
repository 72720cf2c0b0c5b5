"""A conversation that devices and a node share in one process: checked, ordered, never lost.

Not a stand-in for the relay's rooms (those have tests of their own) but the least thing that keeps
the node honest: every update passes the same checks by meaning before anyone sees it.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from crdt_llm.document.chain import lease_message
from crdt_llm.document.conversation import Conversation
from crdt_llm.document.keys import SigningKey
from crdt_llm.document.rules import Author, check
from crdt_llm.document.schema import (
    ENDED,
    SCHEMA_VERSION,
    Birth,
    Born,
    Params,
    Role,
    conversation_id,
    entry_id,
)
from crdt_llm.document.seal import Sealer
from crdt_llm.inference.node.desk import Desk  # noqa: F401 - so that a broken import fails here first
from crdt_llm.inference.node.node import Node
from crdt_llm.inference.node.reply import Identity
from crdt_llm.inference.node.seat import Lease, Surroundings
from crdt_llm.inference.prompt.renderer import Renderer
from crdt_llm.inference.prompt.tokens import Vocabulary

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from crdt_llm.document.schema import (
        Entry,
    )
    from crdt_llm.inference.contract import Engine

OWNER = "owner"


@dataclass(slots=True)
class LocalSeat:
    room: LocalRoom
    author: Author
    deliver: Callable[[bytes], None]
    lost: Callable[[], None]
    state: bytes
    node: bytes

    async def lease(self) -> Lease:
        await asyncio.sleep(0)  # as a register would
        return self.lease_of(1)

    def lease_of(self, epoch: int) -> Lease:
        signature = RELAY_KEY.sign(lease_message(self.room.id, epoch, self.node))
        return Lease(epoch, self.node, signature)

    async def submit(self, update: bytes) -> None:
        await asyncio.sleep(0)  # as a commit would: others run meanwhile
        self.room.accept(update, self)

    async def leave(self) -> None:
        self.room.seats.remove(self)


@dataclass(slots=True)
class LocalRoom:
    """Room, owner's device and clock in one."""

    seed: int = 0
    now_ms: int = 1_700_000_000_000
    seats: list[LocalSeat] = field(default_factory=list)
    updates: list[bytes] = field(default_factory=list)
    rng: random.Random = field(init=False)
    replica: Conversation = field(init=False)
    birth: Birth = field(init=False)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    node: bytes = bytes(32)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.replica = Conversation(self.rng.getrandbits(31) + 1)
        self.birth = Birth(OWNER, self.rng.randbytes(16))
        with self.replica.writing() as writer:
            writer.give_birth(self.birth, SCHEMA_VERSION)

    @property
    def id(self) -> str:
        return conversation_id(self.birth)

    # -- the node's side -----------------------------------------------------------------------

    async def take_seat(
        self, conversation: str, deliver: Callable[[bytes], None], lost: Callable[[], None]
    ) -> LocalSeat:
        assert conversation == self.id
        author = Author("node", node=True)
        seat = LocalSeat(self, author, deliver, lost, self.replica.diff(), self.node)
        self.seats.append(seat)
        return seat

    def accept(self, update: bytes, seat: LocalSeat | None) -> None:
        change = self.replica.apply(update)
        author = seat.author if seat is not None else Author(OWNER, node=False)
        check(change, self.replica, conversation_id=self.id, author=author)
        self.updates.append(update)
        for other in self.seats:
            if other is not seat:
                other.deliver(update)
        self.changed.set()

    # -- the owner's side ----------------------------------------------------------------------

    def new_id(self) -> str:
        self.now_ms += 1
        return entry_id(self.now_ms, self.rng.randbytes(10))

    def _tell(self, replica: Conversation, since: bytes) -> None:
        update = replica.diff(since)
        self.updates.append(update)
        for seat in self.seats:
            seat.deliver(update)
        self.changed.set()

    def write(
        self,
        text: str | None,
        *,
        role: Role = Role.USER,
        after: str | None = None,
        fork: bool = False,
        params: Params = Params(),  # noqa: B008 - frozen
        author: str = OWNER,
    ) -> str:
        """An entry of the owner's, as a device would write it; a slot if ``text`` is ``None``."""
        tree = self.replica.tree
        born = Born(
            role=role if text is not None else Role.ASSISTANT,
            author=author,
            device="phone",
            at=self.now_ms,
            clock=tree.clock + 1,
            fork=fork,
            after=tree.last("") if after is None else after,
            params=params,
        )
        name, since = self.new_id(), self.replica.state_vector()
        with self.replica.writing() as writer:
            writer.add(name, born, text)
        self._tell(self.replica, since)
        return name

    def ask(self, text: str, **params: object) -> str:
        """A user entry and its slot; the slot's id."""
        after = self.write(text)
        return self.write(None, after=after, params=Params(**params))  # type: ignore[arg-type]

    def set(self, entry: str, key: str, value: object) -> None:
        since = self.replica.state_vector()
        with self.replica.writing() as writer:
            writer.set(entry, key, value)
        self._tell(self.replica, since)

    def entry(self, name: str) -> Entry:
        entry = self.replica.entry(name)
        assert entry is not None
        return entry

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait for a state of the document; every change is looked at, nothing is polled."""
        while not holds():
            self.changed.clear()
            await self.changed.wait()

    async def ended(self, slot: str) -> Entry:
        await self.until(lambda: self.replica.state(slot) in ENDED)
        return self.entry(slot)


def identity_of(renderer: Renderer, model: str, seed: int = 0) -> Identity:
    rng = random.Random(f"keys {seed}")
    return Identity(
        key=SigningKey(rng.randbytes(32)),
        sealer=Sealer(rng.randbytes(32), rng.randbytes),
        random=rng.randbytes,
        model=model,
        renderer=renderer.id,
    )


RELAY_KEY = SigningKey(b"r" * 32)


def make_node(
    room: LocalRoom,
    model_dir: Path,
    start_engine: Callable[[], object],
    *,
    model: str = "tiny",
) -> Node:
    vocabulary = Vocabulary.load(model_dir)
    renderer = Renderer.learn(model_dir, vocabulary)

    async def start() -> Engine:
        return await start_engine()  # type: ignore[misc, no-any-return]

    def clock() -> int:
        room.now_ms += 1
        return room.now_ms

    surroundings = Surroundings(
        take_seat=room.take_seat,
        start_engine=start,
        clock_ms=clock,
        random=room.rng.randbytes,
        sleep=lambda _: asyncio.sleep(0),
    )
    identity = identity_of(renderer, model)
    room.node = identity.key.public
    return Node(surroundings, renderer, vocabulary, identity)
