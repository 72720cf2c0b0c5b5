"""``crdt-llm serve``: relay, node and page in one process, the engine in another.

This module owns the wiring: which file is what in the data folder, in which order things start and
stop, and the in-process seat that the node takes in the relay's rooms. It decides nothing else.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import time
from contextlib import AsyncExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final

from filelock import FileLock, Timeout

from crdt_llm.cli.folders import DataFolder
from crdt_llm.document.chain import lease_message
from crdt_llm.document.keys import SigningKey, load_or_create_secret
from crdt_llm.document.seal import Sealer
from crdt_llm.errors import Corrupt, DataFolderBusy, ModelUnusable, Unavailable
from crdt_llm.inference.models import resolve
from crdt_llm.inference.node import Node
from crdt_llm.inference.process import EngineProcess
from crdt_llm.inference.prompt import Renderer
from crdt_llm.inference.reply import Identity
from crdt_llm.inference.seat import Lease, Surroundings
from crdt_llm.inference.tokens import Vocabulary
from crdt_llm.store.sqlite import SqliteLog
from crdt_llm.sync.access import TokenAccess, load_or_create_token
from crdt_llm.sync.hub import Hub
from crdt_llm.sync.relay import Relay

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from crdt_llm.inference.engine import Engine
    from crdt_llm.sync.hub import Membership

logger = logging.getLogger("crdt_llm.cli")

# The writer of the log is a thread: it gets the interpreter back from a busy event loop this soon.
SWITCH_INTERVAL_S: Final = 0.001
EPOCH: Final = 1  # one node for good: nobody else can hold the lease of an embedded one
NODE: Final = "node"
KEYS: Final = ("relay", "node", "master")
ENGINE_RETRY_FIRST_S: Final = 0.2  # whatever ended its start may be over in a moment
ENGINE_RETRY_MAX_S: Final = 10.0  # soon enough for whoever has made room for it


def lock_folder(folder: DataFolder) -> FileLock:
    """Hold a data folder for as long as it is served.

    Raises:
        DataFolderBusy: another process serves it.
    """
    folder.path.mkdir(parents=True, exist_ok=True, mode=0o700)
    lock = FileLock(folder.path / "serve.lock", mode=0o600)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise DataFolderBusy(
            f"another crdt-llm serves {folder.path}: stop it, or name another folder with --data"
        ) from error
    return lock


class _Seat:
    """The node's seat in a room of this process."""

    def __init__(self, membership: Membership) -> None:
        self._membership = membership

    @property
    def state(self) -> bytes:
        return self._membership.state

    async def submit(self, update: bytes) -> None:
        await self._membership.submit(update)

    async def leave(self) -> None:
        self._membership.leave()


def _check_keys(folder: DataFolder) -> None:
    """Make the keys of a new folder; of one that is in use, none may be missing.

    A key made anew would lock everyone out of what was sealed and signed with the old one.

    Raises:
        Corrupt: conversations are there and a key is not.
    """
    paths = [folder.key(name) for name in KEYS]
    missing = [path for path in paths if not path.exists()]
    if missing and folder.log.exists():
        raise Corrupt(
            f"the key {missing[0]} is missing beside the conversations in {folder.log}: put it "
            "back, or begin anew with another folder (--data)"
        )
    for path in paths:
        load_or_create_secret(path)


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
    ) -> _Seat:
        membership = await hub.join(
            conversation, NODE, node=True, deliver=deliver, lost=lambda _: lost()
        )
        return _Seat(membership)

    def grant_lease(conversation: str, node: bytes) -> Lease:
        return Lease(EPOCH, node, relay_key.sign(lease_message(conversation, EPOCH, node)))

    async def start_engine() -> Engine:
        return await EngineProcess.start(model_dir)

    surroundings = Surroundings(take_seat, grant_lease, start_engine, now_ms, os.urandom)
    sealer = Sealer(master, os.urandom)
    identity = Identity(node_key, sealer, os.urandom, str(model_dir.name), renderer.id)
    return Node(surroundings, renderer, vocabulary, identity)


def _line(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def _loopback_url(host: str, port: int) -> str:
    shown = "127.0.0.1" if host in {"", "0.0.0.0", "::"} else host  # noqa: S104 - shown, not bound
    return f"http://[{shown}]:{port}/" if ":" in shown else f"http://{shown}:{port}/"


@contextmanager
def _naming(model_dir: Path) -> Iterator[None]:
    """Say which model it is that cannot be used, if the error does not."""
    try:
        yield
    except ModelUnusable as error:
        if str(model_dir) in str(error):
            raise
        raise ModelUnusable(f"{model_dir}: {error}") from error


async def _start_engine(node: Node) -> None:
    """Start the engine. A process that dies is started again: the relay serves meanwhile."""
    wait_s = ENGINE_RETRY_FIRST_S
    while True:
        try:
            await node.start()
        except Unavailable as error:
            node.problem = f"the engine does not start: {error}"
            logger.warning("%s; next attempt in %.1f s", node.problem, wait_s)
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, ENGINE_RETRY_MAX_S)
        else:
            logger.info("the engine is ready")
            return


async def _start_node(node: Node, hub: Hub, model_dir: Path) -> None:
    """Start the engine, then look at every conversation: a crash may have cut replies short."""
    with _naming(model_dir):
        await _start_engine(node)
    hub.subscribe(node.notice)
    for stored in await hub.conversations():
        await node.visit(stored.conversation)


async def serve(folder: DataFolder, *, host: str, port: int, model_dir: Path | None) -> None:
    """Serve until a signal asks for the end.

    Args:
        folder: the data folder, locked by the caller.
        host: the address to bind.
        port: the port; 0 takes a free one.
        model_dir: the model's folder, or ``None`` for a relay without a node.

    Raises:
        OSError: the address is taken.
        ModelUnusable: the model cannot be used.
        Corrupt: a key, the token or the log is damaged.
    """
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for name in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(name, stopping.set)
    async with AsyncExitStack() as stack:
        _check_keys(folder)
        token = load_or_create_token(folder.token)
        log = await SqliteLog.open(folder.log)
        stack.push_async_callback(log.close)
        hub = Hub(log)
        node = None
        if model_dir is not None:
            with _naming(model_dir):
                node = make_node(folder, hub, model_dir)
        relay = Relay(
            hub,
            authenticate=TokenAccess(token).authenticate,
            node_problem=None if node is None else lambda: node.problem,
        )
        # Last in, first out: the node leaves its seats before the rooms close behind it.
        stack.push_async_callback(relay.stop)
        await relay.start(host, port)
        signalled = loop.create_task(stopping.wait(), name="until a signal")
        waiting: set[asyncio.Task[Any]] = {signalled}
        if node is not None and model_dir is not None:
            stack.push_async_callback(node.close)
            starting = _start_node(node, hub, model_dir)
            waiting.add(loop.create_task(starting, name="node start"))
        url = _loopback_url(*relay.address)
        secret = f"?token={token}" if sys.stdout.isatty() else ""
        sys.stdout.write(f"ready {url}{secret}\n")
        sys.stdout.flush()
        await _until_stopped(stopping, waiting)
        _line("stopping")


async def _until_stopped(stopping: asyncio.Event, tasks: set[asyncio.Task[Any]]) -> None:
    """Wait for the signal; a task that fails before it ends the wait with its error."""
    try:
        while not stopping.is_set():
            done, tasks = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
    finally:
        for task in tasks:
            task.cancel()
        with suppress(asyncio.CancelledError):
            await asyncio.gather(*tasks)


def run_serve(  # noqa: PLR0913 - the options of a command
    *, host: str, port: int, data: Path | None, model: str, node: bool, verbose: bool
) -> None:
    """The command; see :func:`serve`.

    Raises:
        DataFolderBusy: another process serves the folder.
    """
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.INFO,
        stream=sys.stderr,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    folder = DataFolder.named(data)
    lock = lock_folder(folder)
    try:
        model_dir = resolve(model, fetch=True, report=_line) if node else None
        asyncio.run(serve(folder, host=host, port=port, model_dir=model_dir))
    finally:
        lock.release()
