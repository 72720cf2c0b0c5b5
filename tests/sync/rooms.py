"""What the tests of rooms share: a log whose commits wait for the test, and a time that it sets."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING

from sync.device import CONVERSATION, Device

from crdt_llm.document.keys import SigningKey
from crdt_llm.errors import StoreFailed
from crdt_llm.store.memory import MemoryDisk, MemoryLog
from crdt_llm.store.register import MemoryRegister
from crdt_llm.sync.relay.hub import Hub
from crdt_llm.sync.room.refusal_rate import RefusalRate

if TYPE_CHECKING:
    from crdt_llm.errors import CrdtLlmError
    from crdt_llm.store.log import Loaded
    from crdt_llm.store.memory import MemorySeam
    from crdt_llm.store.register import RegisterSeam, Row
    from crdt_llm.sync.relay.hub import Membership


class CountingLog(MemoryLog):
    """A log that counts how often it was read."""

    loads = 0

    async def load(self, conversation: str) -> Loaded:
        self.loads += 1
        await asyncio.sleep(0)
        return await super().load(conversation)


RELAY_KEY = SigningKey(b"r" * 32)


class NoLimit(RefusalRate):
    """Nobody waits for a refusal, where that is not what is tested."""

    def refused(self, principal: str, address: str | None, conversation: str) -> float:
        del principal, address, conversation
        return 0.0


@dataclass(slots=True)
class Member:
    """Someone in a room, and what it heard."""

    membership: Membership
    heard: list[bytes]
    lost: list[CrdtLlmError]


@dataclass(slots=True)
class Place:
    """A hub on a simulated disk.

    Attributes:
        refusals: How often somebody may be refused; here nobody waits for that.
        leased: Whether it keeps its register on that disk, so that nodes need a lease.
    """

    disk: MemoryDisk = field(default_factory=lambda: MemoryDisk("log"))
    leased: bool = False
    rows: dict[str, Row] = field(default_factory=dict)
    refusals: RefusalRate = field(default_factory=lambda: NoLimit(lambda: 0.0))
    register_failing: RegisterSeam | None = None
    saves: int = 0
    now: float = 1000.0
    failing: bool = False
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    log: CountingLog = field(init=False)
    hub: Hub = field(init=False)

    def __post_init__(self) -> None:
        self.gate.set()
        self.open_hub()

    def open_hub(self, seed: int = 1) -> None:
        """Begin anew with what is on the disk, as a process that was started again does."""
        self.log = CountingLog(self.disk, clock=lambda: 0, faults=self._fault)
        register = MemoryRegister(self.rows, faults=self._register_fault)
        self.hub = Hub(
            self.log,
            register=register if self.leased else None,
            relay_key=RELAY_KEY.public,
            refusals=self.refusals,
            clock=lambda: self.now,
            random=Random(seed).randbytes,
        )

    async def _register_fault(self, seam: RegisterSeam) -> None:
        self.saves += seam == "register-before-commit"
        if seam == self.register_failing:
            raise StoreFailed(seam)

    async def _fault(self, seam: MemorySeam) -> None:
        if seam == "before-commit":
            await self.gate.wait()
            if self.failing:
                raise StoreFailed("no space")

    async def join(
        self, principal: str = "owner", *, node: bool = False, conversation: str = CONVERSATION
    ) -> Member:
        heard: list[bytes] = []
        lost: list[CrdtLlmError] = []
        membership = await self.hub.join(
            conversation, principal, node=node, deliver=heard.append, lost=lost.append
        )
        return Member(membership, heard, lost)

    @property
    def durable(self) -> int:
        """How many updates are on the disk."""
        stored = self.disk.conversations.get(CONVERSATION)
        return 0 if stored is None else stored.lsn


async def born(place: Place) -> tuple[Member, Device]:
    """A conversation with a birth, its owner, and the owner's device."""
    member, device = await place.join(), Device(Random(7))
    await member.membership.submit(device.give_birth())
    return member, device


async def turns(count: int = 20) -> None:
    """Let everything that can go on go on; a turn takes a few steps of the loop."""
    for _ in range(count):
        await asyncio.sleep(0)
