"""``crdt-llm import``: bring a conversation back from a file.

This module owns the reading of the file and what is said of what it could not prove. What is
believed of it, and why, is :mod:`crdt_llm.sync.room.restore`'s. It works on a data folder that no
relay serves, because it may do what no client may: take a conversation at the operator's word.
"""

from __future__ import annotations

import asyncio
import json as json_format
import sys
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Final

from crdt_llm.cli.printable import one_line
from crdt_llm.cli.serve import lock_folder
from crdt_llm.cli.stored import fresh_client_id
from crdt_llm.document.conversation import Conversation
from crdt_llm.document.keys import SigningKey, load_or_create_secret
from crdt_llm.errors import LocalMisuse, MalformedMessage, Refused, StoreFailed
from crdt_llm.store.register import SqliteRegister
from crdt_llm.store.sqlite import SqliteLog
from crdt_llm.sync.relay.hub import Hub
from crdt_llm.sync.relay.replacement import replace_stored
from crdt_llm.sync.update.structure import DOCUMENT_LIMITS, read_update
from crdt_llm.sync.wire.y_websocket import UPDATE_BYTES_MAX

if TYPE_CHECKING:
    from pathlib import Path

    from crdt_llm.cli.folders import DataFolder

_UNKNOWABLE: Final = (
    "whether this is the conversation's newest state",
    "whose it is and who may do what in it, and its title and settings",
)
"""What no document proves of itself, and only the register would have known."""


def run_import(path: Path, *, folder: DataFolder, trust: bool, replace: bool, json: bool) -> None:
    """Bring a conversation back, and say what was taken without proof.

    Raises:
        LocalMisuse: the file holds no conversation, nothing here vouches for it, or it would
            replace what lacks nothing.
        Behind: it would replace what lacks something, and lacks something itself.
        Refused: what it says does not prove itself.
        DataFolderBusy: a relay serves the folder.
        StoreFailed: the file cannot be read, or the folder not be written.
    """
    update = _read(path.expanduser())
    identity = _identity(path, update)
    if not folder.key("relay").exists():
        raise StoreFailed(
            f"{folder.path} has no keys: run `crdt-llm serve` once, or name another with --data"
        )
    lock = lock_folder(folder)
    try:
        told = asyncio.run(_import(folder, identity, update, trust=trust, replace=replace))
    finally:
        lock.release()
    what = "dropped" if replace else "unverified"
    if json:
        print(json_format.dumps({"conversation": identity, what: list(told)}))  # noqa: T201 - the terminal
        return
    print(identity)  # noqa: T201 - as above
    for line in told:
        print(f"{what}: {one_line(line)}", file=sys.stderr)  # noqa: T201 - as above


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(UPDATE_BYTES_MAX + 1)
    except OSError as error:
        raise StoreFailed(f"{path} cannot be read ({error.strerror})") from error
    if len(content) > UPDATE_BYTES_MAX:
        raise LocalMisuse(f"{path} is larger than any conversation ({UPDATE_BYTES_MAX} bytes)")
    return content


def _identity(path: Path, update: bytes) -> str:
    """Which conversation a file holds."""
    try:
        read_update(update, DOCUMENT_LIMITS)  # before it is applied: it may be anything
        identity = Conversation(fresh_client_id(), update=update).id
    except (MalformedMessage, Refused) as error:
        raise LocalMisuse(
            f"{path} is no conversation: export one with --format document"
        ) from error
    if identity is None:
        raise LocalMisuse(f"{path} holds a document, but no conversation: it has no birth")
    return identity


async def _import(
    folder: DataFolder, identity: str, update: bytes, *, trust: bool, replace: bool
) -> tuple[str, ...]:
    async with AsyncExitStack() as stack:
        log = await SqliteLog.open(folder.log)
        stack.push_async_callback(log.close)
        register = await SqliteRegister.open(folder.register)
        stack.push_async_callback(register.close)
        known = await register.load(identity) is not None
        if not known and not trust:
            raise LocalMisuse(
                f"this relay has never known {identity}: --trust takes whose it is, and who may do"
                " what, from the file"
            )
        relay = SigningKey(load_or_create_secret(folder.key("relay")))
        if replace:
            return await replace_stored(
                identity, update, log=log, register=register, relay_key=relay.public
            )
        hub = Hub(log, register=register, relay_key=relay.public)
        stack.push_async_callback(hub.close)
        doubts = await hub.import_trusted(identity, update)
        return doubts if known else (*_UNKNOWABLE, *doubts)
