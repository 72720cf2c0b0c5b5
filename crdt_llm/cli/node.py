"""``crdt-llm node``: an inference node as a program of its own, for a relay that is elsewhere.

This module owns the wiring: which file is what in the node's folder, in which order things start
and stop, and how many conversations are looked at at once. It decides nothing else.

The folder holds what makes it this node: its signing key, the master key that opens hidden fields
(the same one as every other node of the relay has: without it no reply could be taken over), and
the keys of relays as they were seen first. Two programs never share a folder: they would be one
node for the relay, and end each other's leases.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import platform
import signal
import sys
from base64 import urlsafe_b64encode
from contextlib import contextmanager
from dataclasses import dataclass
from random import SystemRandom
from typing import TYPE_CHECKING, Any, Final

from filelock import FileLock, Timeout

from crdt_llm.cli.embedded_node import DIGESTS, engine_starter, now_ms
from crdt_llm.cli.folders import default_data_folder, read_token
from crdt_llm.document.keys import (
    SigningKey,
    load_or_create_secret,
    read_or_make,
    written_key,
)
from crdt_llm.document.seal import Sealer
from crdt_llm.errors import Corrupt, DataFolderBusy, Refused
from crdt_llm.inference.models.folders import resolve
from crdt_llm.inference.node.digests import Digests
from crdt_llm.inference.node.figures import keep_measuring
from crdt_llm.inference.node.node import Node
from crdt_llm.inference.node.reply import Identity
from crdt_llm.inference.node.seat import Lease, Surroundings
from crdt_llm.inference.prompt.renderer import Renderer
from crdt_llm.inference.prompt.tokens import Vocabulary
from crdt_llm.sync.node.link import SEATS_MAX, Calls, NodeLink
from crdt_llm.sync.transport.dial import Address, native_dial
from crdt_llm.sync.wire.frames import NAME_CHARACTERS_MAX

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
    from pathlib import Path

    from crdt_llm.cli.engine_options import EngineOptions
    from crdt_llm.inference.contract import Engine
    from crdt_llm.sync.node.link import NodeSeat

logger = logging.getLogger("crdt_llm.cli")

LOOKS_MAX: Final = 4
"""Conversations that are looked at for the first time at once: after a start it may be all of them,
and each is loaded whole."""

_PIN_CHARACTERS: Final = 22


@dataclass(frozen=True, slots=True)
class NodeFolder:
    """The files of a node.

    Attributes:
        path: the folder.
    """

    path: Path

    @classmethod
    def named(cls, path: Path | None) -> NodeFolder:
        """The folder that was asked for, else ``node`` in this user's data."""
        return cls(default_data_folder() / "node" if path is None else path.expanduser())

    @property
    def key(self) -> Path:
        """The node's signing key; made by the first run."""
        return self.path / "node.key"

    @property
    def token(self) -> Path:
        """Who it is to the relay."""
        return self.path / "node.token"

    @property
    def master(self) -> Path:
        """The master key: a copy of the relay's ``keys/master.key``."""
        return self.path / "master.key"

    @property
    def kv(self) -> Path:
        """What the engine wrote of its KV cache."""
        return self.path / "kv"

    def pin(self, address: str) -> Path:
        """The public key that the relay at an address showed first."""
        digest = hashlib.sha256(address.encode()).digest()
        return self.path / "relays" / urlsafe_b64encode(digest).decode()[:_PIN_CHARACTERS]

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for as long as the node runs.

        Raises:
            DataFolderBusy: another node does.
        """
        self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = FileLock(self.path / "node.lock", mode=0o600)
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise DataFolderBusy(
                f"another node runs on {self.path}: stop it, or give this one a folder of its own"
                " with --data"
            ) from error
        try:
            yield
        finally:
            lock.release()


def read_master_key(path: Path) -> bytes:
    """The master key. It is never made here: one of its own could open nothing.

    Raises:
        Corrupt: there is none, it is damaged, or others may read it.
    """
    if not path.exists():
        raise Corrupt(
            f"there is no master key in {path}: copy keys/master.key of the relay's data folder"
            " there (mode 0600), or name another file with --master-key"
        )
    return load_or_create_secret(path)


def pinned(folder: NodeFolder, address: str) -> Callable[[bytes], None]:
    """Holds a relay to the key that it showed first."""

    def check(relay: bytes) -> None:
        path = folder.pin(address)
        known = read_or_make(path, lambda: relay, os.urandom)
        if known != relay:
            raise Refused(
                "relay-key",
                f"the relay at {address} has another key than before: somebody else may be"
                f" answering; if it was set up anew, delete {path}",
            )

    return check


class RemoteSeat:
    """The node's seat in a room of a relay that is elsewhere."""

    def __init__(self, seat: NodeSeat) -> None:
        self._seat = seat

    @property
    def state(self) -> bytes:
        """See :class:`~crdt_llm.inference.node.seat.Seat`.

        It is given once: what is withdrawn later must not stay here.
        """
        state, self._seat.state = self._seat.state, b""
        return state

    async def lease(self) -> Lease:
        """See :class:`~crdt_llm.inference.node.seat.Seat`."""
        granted = await self._seat.lease()
        return Lease(granted.epoch, granted.node, granted.signature)

    async def submit(self, update: bytes) -> None:
        """See :class:`~crdt_llm.inference.node.seat.Seat`."""
        await self._seat.submit(update)

    def show(self, client: int, clock: int, state: dict[str, Any]) -> None:
        """See :class:`~crdt_llm.inference.node.presence.Shows`."""
        self._seat.say(client, clock, json.dumps(state, separators=(",", ":")))

    async def leave(self) -> None:
        """See :class:`~crdt_llm.inference.node.seat.Seat`."""
        await self._seat.leave()


class Looks:
    """Conversations to look at, each named once however often it changed."""

    def __init__(self) -> None:
        self._waiting: dict[str, None] = {}
        self._more = asyncio.Event()

    def add(self, conversation: str) -> None:
        """Have a look at a conversation, soon."""
        self._waiting[conversation] = None
        self._more.set()

    async def carry_out(self, node: Node) -> None:
        """Look at one after the other until cancelled."""
        while True:
            while self._waiting:
                conversation = next(iter(self._waiting))
                del self._waiting[conversation]
                await node.visit(conversation)
            self._more.clear()
            await self._more.wait()


@dataclass(frozen=True, slots=True)
class Secrets:
    """What a node signs and opens with.

    Attributes:
        key: its own key.
        master: the key that hidden fields are sealed with.
    """

    key: SigningKey
    master: bytes


def make_node(
    link: NodeLink, secrets: Secrets, model_dir: Path, start_engine: Callable[[], Awaitable[Engine]]
) -> Node:
    """A node whose seats are taken over a link.

    Raises:
        ModelUnusable: the model's tokenizer or template cannot be used.
    """
    vocabulary = Vocabulary.load(model_dir)
    renderer = Renderer.learn(model_dir, vocabulary)

    async def take_seat(
        conversation: str, deliver: Callable[[bytes], None], lost: Callable[[], None]
    ) -> RemoteSeat:
        def hint(source: int, after: str | None, keep: int, text: str) -> None:
            node.hint(conversation, source, after=after, keep=keep, text=text)

        return RemoteSeat(await link.take_seat(conversation, Calls(deliver, lost, hint)))

    # A relay names what changed where this node has no seat.
    surroundings = Surroundings(
        take_seat, start_engine, now_ms, os.urandom, seats_max=SEATS_MAX, gives_back=True
    )
    sealer = Sealer(secrets.master, os.urandom)
    identity = Identity(secrets.key, sealer, os.urandom, model_dir.name, renderer.id)
    node = Node(surroundings, renderer, vocabulary, identity)
    return node


async def serve_node(
    link: NodeLink, looks: Looks, node: Node, *, stopping: asyncio.Event, ready: Callable[[], None]
) -> None:
    """Run a node on a link until it is to stop.

    Raises:
        Refused: the relay does not want this node.
        ModelUnusable: the model cannot be used.
    """
    loop = asyncio.get_running_loop()
    tasks = [loop.create_task(node.start_at_last(), name="node start")]
    until = loop.create_task(stopping.wait(), name="until a signal")
    try:
        # First the engine: what the relay tells of is looked at by a node that can do it.
        if not await _first(tasks[0], until):
            return
        tasks = [loop.create_task(link.run(), name="node link")]
        tasks += [
            loop.create_task(looks.carry_out(node), name=f"look {number}")
            for number in range(LOOKS_MAX)
        ]
        online = loop.create_task(link.connected(), name="until connected")
        tasks.append(online)
        if logger.isEnabledFor(logging.DEBUG):
            counting = keep_measuring(node, _Teller(node).tell)
            tasks.append(loop.create_task(counting, name="figures of the node"))
        await asyncio.wait((tasks[0], online, until), return_when=asyncio.FIRST_COMPLETED)
        if online.done():
            ready()
        await asyncio.wait((tasks[0], until), return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            tasks[0].result()
    finally:
        await node.close()  # gives its seats back, and the leases with them
        await link.flush()
        for task in (*tasks, until):
            task.cancel()
        await asyncio.gather(*tasks, until, return_exceptions=True)


class _Teller:
    """Logs a node's figures when they are others than before."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._told = ""

    def tell(self) -> None:
        figures = str(self._node.figures)
        if figures != self._told:
            self._told = figures
            logger.debug("%s", figures)


async def _first(task: asyncio.Task[None], until: asyncio.Task[bool]) -> bool:
    """Whether a task ends well before the end is asked for."""
    await asyncio.wait((task, until), return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        task.result()
    return task.done()


def run_node(  # noqa: PLR0913 - the options of a command
    *,
    url: str,
    token_file: Path,
    data: Path | None,
    model: str,
    key: Path | None,
    master_key: Path | None,
    engine: EngineOptions,
    verbose: bool,
) -> None:
    """The command.

    Raises:
        DataFolderBusy: another node runs on the folder.
        AuthenticationFailed: there is no token in the file.
        Corrupt: a key is damaged, or there is no master key.
        Refused: the relay does not want this node.
        ModelUnusable: the model cannot be used.
    """
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.INFO,
        stream=sys.stderr,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    address, folder = Address.parse(url), NodeFolder.named(data)
    read_token(token_file)
    with folder.locked():
        secrets = Secrets(
            SigningKey(load_or_create_secret(folder.key if key is None else key)),
            read_master_key(folder.master if master_key is None else master_key),
        )
        model_dir = resolve(model, fetch=True, report=_line)

        start_engine = engine_starter(model_dir, folder.kv, engine)
        asyncio.run(_run(address, token_file, folder, secrets, model_dir, start_engine))


async def _run(  # noqa: PLR0913, PLR0917 - what a node is made of
    address: Address,
    token_file: Path,
    folder: NodeFolder,
    secrets: Secrets,
    model_dir: Path,
    start_engine: Callable[[], Awaitable[Engine]],
) -> None:
    stopping = asyncio.Event()
    for name in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(name, stopping.set)
    looks = Looks()
    link = NodeLink(
        native_dial(address),
        token=lambda: read_token(token_file),
        name=platform.node()[:NAME_CHARACTERS_MAX],
        node=secrets.key.public,
        pin=pinned(folder, address.base),
        work=looks.add,
        random=SystemRandom(),
    )

    def ready() -> None:
        sys.stdout.write(f"ready {written_key(secrets.key.public)}\n")
        sys.stdout.flush()

    node = make_node(link, secrets, model_dir, start_engine)
    node.digests = Digests(folder.kv / DIGESTS)
    await serve_node(link, looks, node, stopping=stopping, ready=ready)


def _line(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
