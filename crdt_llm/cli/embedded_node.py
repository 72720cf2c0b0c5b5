"""The node that ``crdt-llm serve`` runs beside the relay, in the same process.

This module owns its keys, the seats that it takes in the relay's rooms, and its leases, which it
gets at the same desk as every other node.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from crdt_llm.cli.engine_options import DEFAULTS
from crdt_llm.document.keys import SigningKey, load_or_create_secret
from crdt_llm.document.seal import Sealer
from crdt_llm.errors import ConnectionLost, LeaseLost, Refused
from crdt_llm.inference.engine.process import EngineProcess
from crdt_llm.inference.node.digests import Digests
from crdt_llm.inference.node.figures import keep_measuring
from crdt_llm.inference.node.node import Node
from crdt_llm.inference.node.reply import Identity
from crdt_llm.inference.node.seat import Lease, Surroundings
from crdt_llm.inference.prompt.renderer import Renderer
from crdt_llm.inference.prompt.tokens import Vocabulary
from crdt_llm.sync.node.lease_wish import LeaseWish
from crdt_llm.sync.wire.frames import Code

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Hashable
    from pathlib import Path

    from crdt_llm.cli.engine_options import EngineOptions
    from crdt_llm.cli.folders import DataFolder
    from crdt_llm.errors import CrdtLlmError
    from crdt_llm.inference.node.seat import TakeHint
    from crdt_llm.sync.relay.hub import Hub, Membership
    from crdt_llm.sync.relay.leases import LeaseOffice
    from crdt_llm.sync.relay.metrics import Metrics
    from crdt_llm.sync.wire.lease import Granted

NODE: Final = "node"
DIGESTS: Final = "digests"  # beside the KV cache, whose digests they are


def _ignore_hint(
    conversation: str, source: Hashable, *, after: str | None, keep: int, text: str
) -> None:
    """Nobody reads drafts yet."""


class EmbeddedSeats:
    """The seats of a node in this process's rooms, and its place at the lease desk.

    Args:
        hub: the rooms.
        node: the node's public key.
        office: where leases are had.
    """

    embedded = True

    def __init__(self, hub: Hub, node: bytes, office: LeaseOffice) -> None:
        self.node = node
        self._hub = hub
        self._office = office
        self._seats: dict[str, RoomSeat] = {}
        self.hint: TakeHint = _ignore_hint  # until there is a node

    async def take(
        self, conversation: str, deliver: Callable[[bytes], None], lost: Callable[[], None]
    ) -> RoomSeat:
        """See :class:`~crdt_llm.inference.node.seat.TakeSeat`."""
        wish = LeaseWish(
            lambda: self._office.want(conversation, self),
            lambda: self._office.give_back(conversation, self),
            lambda _: lost(),
        )

        def over(error: CrdtLlmError) -> None:
            wish.fail(error)
            lost()

        def hint(source: int, after: str | None, keep: int, text: str) -> bool:
            self.hint(conversation, source, after=after, keep=keep, text=text)
            return True

        membership = await self._hub.join(
            conversation, NODE, node=True, deliver=deliver, lost=over, hint=hint
        )
        seat = RoomSeat(membership, wish, lambda: self._leave(conversation))
        self._seats[conversation] = seat
        return seat

    def _leave(self, conversation: str) -> None:
        self._seats.pop(conversation, None)
        self._office.give_back(conversation, self)

    # -- for the office ------------------------------------------------------------------------

    def leased(self, lease: Granted) -> None:
        """See :class:`~crdt_llm.sync.relay.leases.LeaseHolder`."""
        seat = self._seats.get(lease.conversation)
        if seat is not None:
            seat.leased(lease)

    def unleased(self, conversation: str, retry_s: float, reason: str) -> None:
        """See :class:`~crdt_llm.sync.relay.leases.LeaseHolder`."""
        seat = self._seats.get(conversation)
        if seat is not None:
            seat.unleased(retry_s, reason)


class RoomSeat:
    """The node's seat in a room of this process.

    Args:
        membership: its place in the room.
        wish: its wish for the lease.
        left: called when it is given back.
    """

    def __init__(self, membership: Membership, wish: LeaseWish, left: Callable[[], None]) -> None:
        self._membership = membership
        self._wish = wish
        self._left = left

    @property
    def state(self) -> bytes:
        """See :class:`~crdt_llm.inference.node.seat.Seat`.

        It is given once: what is withdrawn later must not stay here.
        """
        state, self._membership.state = self._membership.state, b""
        return state

    async def lease(self) -> Lease:
        """See :class:`~crdt_llm.inference.node.seat.Seat`."""
        granted = await self._wish.wait()
        return Lease(granted.epoch, granted.node, granted.signature)

    async def submit(self, update: bytes) -> None:
        """See :class:`~crdt_llm.inference.node.seat.Seat`."""
        try:
            await self._membership.submit(update)
        except Refused as error:
            if error.code == Code.STALE_EPOCH:
                raise LeaseLost(str(error)) from error
            raise

    def show(self, client: int, clock: int, state: dict[str, Any]) -> None:
        """See :class:`~crdt_llm.inference.node.presence.Shows`."""
        self._membership.say(client, clock, json.dumps(state, separators=(",", ":")))

    async def leave(self) -> None:
        """See :class:`~crdt_llm.inference.node.seat.Seat`."""
        self._membership.leave()
        self._wish.fail(ConnectionLost("this seat was left"))
        self._left()

    def leased(self, lease: Granted) -> None:
        """Write under this lease from now on."""
        self._membership.author = replace(self._membership.author, epoch=lease.epoch)
        self._wish.leased(lease)

    def unleased(self, retry_s: float, reason: str) -> None:
        """Write under no lease from now on."""
        self._membership.author = replace(self._membership.author, epoch=None)
        self._wish.unleased(retry_s, reason)


def engine_starter(
    model_dir: Path, kv_folder: Path | None, engine: EngineOptions
) -> Callable[[], Awaitable[EngineProcess]]:
    """What starts the engine of a command, and another one when it died.

    Args:
        model_dir: the model's folder.
        kv_folder: where its KV goes that leaves memory; None keeps none.
        engine: what was chosen of it.
    """

    async def start_engine() -> EngineProcess:
        return await EngineProcess.start(
            model_dir,
            weights=engine.weights,
            device=engine.device,
            kv_memory_bytes=engine.kv_memory_bytes,
            kv_folder=kv_folder,
        )

    return start_engine


def now_ms() -> int:
    """Wall time, ms since 1970."""
    return time.time_ns() // 1_000_000


def make_node(
    folder: DataFolder,
    hub: Hub,
    model_dir: Path,
    office: LeaseOffice,
    *,
    engine: EngineOptions = DEFAULTS,
) -> Node:
    """A node that sits in the hub's rooms.

    Args:
        folder: where its keys are, and where its KV goes that leaves memory.
        hub: the rooms.
        model_dir: the model's folder.
        office: where leases are had.
        engine: what was chosen of it.

    Raises:
        ModelUnusable: the model's tokenizer or template cannot be used.
    """
    node_key = SigningKey(load_or_create_secret(folder.key("node")))
    master = load_or_create_secret(folder.key("master"))
    vocabulary = Vocabulary.load(model_dir)
    renderer = Renderer.learn(model_dir, vocabulary)

    start_engine = engine_starter(model_dir, folder.kv, engine)
    seats = EmbeddedSeats(hub, node_key.public, office)
    surroundings = Surroundings(seats.take, start_engine, now_ms, os.urandom)
    sealer = Sealer(master, os.urandom)
    identity = Identity(node_key, sealer, os.urandom, str(model_dir.name), renderer.id)
    node = Node(surroundings, renderer, vocabulary, identity)
    node.digests = Digests(folder.kv / DIGESTS)
    seats.hint = node.hint
    return node


async def show_figures(node: Node, metrics: Metrics) -> None:
    """Show a node's figures among a relay's, and keep them current until cancelled."""
    for figure in node.figures.all:
        metrics.show(figure.name, figure.help, figure.read, grows=figure.grows)
    await keep_measuring(node)
