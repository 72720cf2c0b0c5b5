"""``crdt-llm serve``: relay, node and page in one process, the engine in another.

This module owns the wiring: which file is what in the data folder, and in which order things start
and stop. It decides nothing else. What the node needs is loaded only if there is one, so that a
relay runs without it.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import sys
import time
from contextlib import AsyncExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from filelock import FileLock, Timeout

from crdt_llm.cli.engine_options import DEFAULTS
from crdt_llm.cli.folders import DataFolder
from crdt_llm.document.keys import SigningKey, load_or_create_secret
from crdt_llm.errors import Corrupt, DataFolderBusy, ModelUnusable
from crdt_llm.store.archive import Archive
from crdt_llm.store.register import SqliteRegister
from crdt_llm.store.sqlite import SqliteLog
from crdt_llm.store.token_ledger import TokenLedger
from crdt_llm.sync.relay.access import Authority, load_or_create_token
from crdt_llm.sync.relay.conversation_list import ConversationLists
from crdt_llm.sync.relay.hub import Hub
from crdt_llm.sync.relay.leases import TTL_S, LeaseOffice
from crdt_llm.sync.relay.metrics import Metrics
from crdt_llm.sync.relay.native_peer import RelayIdentity
from crdt_llm.sync.relay.requests import Requests
from crdt_llm.sync.relay.server import Relay
from crdt_llm.sync.relay.static_page import StaticPage

if TYPE_CHECKING:
    from collections.abc import Iterator

    from crdt_llm.cli.engine_options import EngineOptions
    from crdt_llm.inference.node.node import Node


logger = logging.getLogger("crdt_llm.cli")

# The writer of the log is a thread: it gets the interpreter back from a busy event loop this soon.
SWITCH_INTERVAL_S: Final = 0.001
BUILT_PAGE: Final = Path(__file__).parent.parent / "web"
KEYS: Final = ("relay", "node", "master")


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


def _model_folder(model: str) -> Path:
    from crdt_llm.inference.models.folders import resolve  # noqa: PLC0415 - see the module's docstring

    return resolve(model, fetch=True, report=_line)


def _line(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def now_ms() -> int:
    """Wall time, ms since 1970."""
    return time.time_ns() // 1_000_000


def built_page(folder: Path = BUILT_PAGE) -> StaticPage | None:
    """The page that came with the package; a source tree where nobody had npm has none."""
    if (folder / "index.html").exists():
        return StaticPage(folder)
    _line("the page is not built (`make install` does, with npm): a plain one is served")
    return None


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


def _spare_what_is_loaded() -> None:
    """Keep the collection of garbage out of what stays until the end.

    To go through all of it takes some 50 ms, in which the relay would hear nobody.
    """
    gc.collect()
    gc.freeze()


async def _start_node(node: Node, hub: Hub, model_dir: Path) -> None:
    """Start the engine, then look at every conversation: a crash may have cut replies short."""
    with _naming(model_dir):
        await node.start_at_last()
    _spare_what_is_loaded()
    logger.info("the engine is ready")
    hub.subscribe(node.notice)
    for stored in await hub.conversations():
        await node.visit(stored.conversation)


async def serve(  # noqa: PLR0913 - what an operator may choose
    folder: DataFolder,
    *,
    host: str,
    port: int,
    model_dir: Path | None,
    engine: EngineOptions = DEFAULTS,
    lease_ttl_s: float = TTL_S,
) -> None:
    """Serve until a signal asks for the end.

    Args:
        folder: the data folder, locked by the caller.
        host: the address to bind.
        port: the port; 0 takes a free one.
        model_dir: the model's folder, or ``None`` for a relay without a node.
        engine: what was chosen of it.
        lease_ttl_s: how long a node's lease goes on that it does not renew.

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
        tokens = TokenLedger.open(folder.tokens)
        stack.callback(tokens.close)
        token_key = load_or_create_secret(folder.key("token"))
        authority = Authority(token, token_key, tokens, clock=now_ms)
        log = await SqliteLog.open(folder.log)
        stack.push_async_callback(log.close)
        register = await SqliteRegister.open(folder.register)
        stack.push_async_callback(register.close)
        relay_key = SigningKey(load_or_create_secret(folder.key("relay")))
        metrics = Metrics(rooms=lambda: hub.open_rooms)
        hub = Hub(log, register=register, relay_key=relay_key.public, metrics=metrics)
        office = LeaseOffice(
            hub.grant_epoch, relay_key.sign, clock=time.monotonic, ttl_s=lease_ttl_s
        )
        stack.push_async_callback(office.close)
        archive = Archive.open(folder.archive)
        stack.callback(archive.close)
        lists = ConversationLists(hub, archive, clock=now_ms)
        node = None
        if model_dir is not None:
            with _naming(model_dir):
                from crdt_llm.cli.embedded_node import (  # noqa: PLC0415 - see the docstring
                    make_node,
                    show_figures,
                )

                node = make_node(folder, hub, model_dir, office, engine=engine)
        relay = Relay(
            hub,
            authenticate=authority.authenticate,
            is_valid=authority.is_valid,
            admit_node=authority.admit_node,
            identity=RelayIdentity(relay_key.public, log.log_id),
            leases=office,
            lists=lists,
            requests=Requests(lists, authority),
            built_page=built_page(),
            metrics=metrics,
            node_keys=() if node is None else (node.identity.key.public,),
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
            waiting.add(loop.create_task(show_figures(node, metrics), name="figures of the node"))
        else:
            _spare_what_is_loaded()  # with a node it is done once that is loaded too
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
    *,
    host: str,
    port: int,
    data: Path | None,
    model: str,
    node: bool,
    engine: EngineOptions,
    lease_ttl_s: float,
    verbose: bool,
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
        model_dir = _model_folder(model) if node else None
        asyncio.run(
            serve(
                folder,
                host=host,
                port=port,
                model_dir=model_dir,
                engine=engine,
                lease_ttl_s=lease_ttl_s,
            )
        )
    finally:
        lock.release()
