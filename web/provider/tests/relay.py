"""A relay for the provider's tests: the real one, where a token is the name of its principal.

    relay.py FOLDER PORT

It prints ``ready PORT`` once it accepts connections, and stops when its standard input ends.
"""

# ruff: noqa: INP001 - a program beside the tests that start it, no package

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from crdt_llm.store.sqlite import SqliteLog
from crdt_llm.sync.relay.access import Pass
from crdt_llm.sync.relay.hub import Hub
from crdt_llm.sync.relay.native_peer import RelayIdentity
from crdt_llm.sync.relay.server import Relay


async def main(folder: str, port: str) -> None:
    """Serve until nobody is there any more."""
    log = await SqliteLog.open(Path(folder) / "log.db")
    relay = Relay(
        Hub(log),
        authenticate=lambda token: Pass(token) if token else None,
        identity=RelayIdentity(key=b"K" * 32, log=log.log_id),
    )
    await relay.start(port=int(port))
    print("ready", relay.address[1], flush=True)  # noqa: T201 - that is how it says so
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await relay.stop()
    await log.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
