"""The node that ``crdt-llm serve`` runs beside the relay, in the same process.

This module owns its keys, its one lease, and the seat that it takes in the relay's rooms.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Final

from crdt_llm.document.chain import lease_message
from crdt_llm.document.keys import SigningKey, load_or_create_secret
from crdt_llm.document.seal import Sealer
from crdt_llm.inference.node import Node
from crdt_llm.inference.process import EngineProcess
from crdt_llm.inference.prompt import Renderer
from crdt_llm.inference.reply import Identity
from crdt_llm.inference.seat import Lease, Surroundings
from crdt_llm.inference.tokens import Vocabulary

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from crdt_llm.cli.folders import DataFolder
    from crdt_llm.inference.engine import Engine
    from crdt_llm.sync.hub import Hub, Membership

EPOCH: Final = 1  # one node for good: nobody else can hold the lease of an embedded one
NODE: Final = "node"


class RoomSeat:
    """The node's seat in a room of this process."""

    def __init__(self, membership: Membership, lease: Lease) -> None:
        self._membership = membership
        self._lease = lease

    @property
    def state(self) -> bytes:
        """See :class:`~crdt_llm.inference.seat.Seat`."""
        return self._membership.state

    async def lease(self) -> Lease:
        """See :class:`~crdt_llm.inference.seat.Seat`."""
        return self._lease

    async def submit(self, update: bytes) -> None:
        """See :class:`~crdt_llm.inference.seat.Seat`."""
        await self._membership.submit(update)

    async def leave(self) -> None:
        """See :class:`~crdt_llm.inference.seat.Seat`."""
        self._membership.leave()


def now_ms() -> int:
    """Wall time, ms since 1970."""
    return time.time_ns() // 1_000_000


def make_node(folder: DataFolder, hub: Hub, model_dir: Path) -> Node:
    """A node that sits in the hub's rooms.

    Raises:
        ModelUnusable: the model's tokenizer or template cannot be used.
    """
    relay_key = SigningKey(load_or_create_secret(folder.key("relay")))
    node_key = SigningKey(load_or_create_secret(folder.key("node")))
    master = load_or_create_secret(folder.key("master"))
    vocabulary = Vocabulary.load(model_dir)
    renderer = Renderer.learn(model_dir, vocabulary)

    async def take_seat(
        conversation: str, deliver: Callable[[bytes], None], lost: Callable[[], None]
    ) -> RoomSeat:
        membership = await hub.join(
            conversation, NODE, node=True, deliver=deliver, lost=lambda _: lost()
        )
        node = node_key.public
        signature = relay_key.sign(lease_message(conversation, EPOCH, node))
        return RoomSeat(membership, Lease(EPOCH, node, signature))

    async def start_engine() -> Engine:
        return await EngineProcess.start(model_dir)

    surroundings = Surroundings(take_seat, start_engine, now_ms, os.urandom)
    sealer = Sealer(master, os.urandom)
    identity = Identity(node_key, sealer, os.urandom, str(model_dir.name), renderer.id)
    return Node(surroundings, renderer, vocabulary, identity)
