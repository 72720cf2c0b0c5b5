"""``crdt-llm serve`` as a user runs it: a process, and a data folder that outlives it."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from typing import TYPE_CHECKING, Final, Self

from crdt_llm.cli.folders import DataFolder, read_token
from crdt_llm.cli.stored import load_stored
from crdt_llm.document.keys import load_or_create_secret
from crdt_llm.document.seal import Sealer, place_of

if TYPE_CHECKING:
    from pathlib import Path

    from crdt_llm.document.conversation import Conversation
    from crdt_llm.document.schema import Entry

READY_S_MAX: Final = 120.0
"""A process that is not ready by then hangs; usually it takes a few seconds."""


class ServedProcess:
    """A server that may die, and comes back on the same folder and port.

    Args:
        folder: where its data folder and its log of messages lie.
        model_dir: the model.
        node: whether it has a node of its own.
        lease_ttl_s: how long a lease goes on that is not renewed; as usual by default.
        native: whether the engine may use its native kernels; a tiny model's reply is over in no
            time with them.
    """

    def __init__(
        self,
        folder: Path,
        model_dir: Path,
        *,
        node: bool = True,
        lease_ttl_s: float | None = None,
        native: bool = True,
    ) -> None:
        self.folder = DataFolder(folder / "data")
        self.url = ""
        self._messages = folder / "serve.log"
        self._model_dir = model_dir
        self._node = node
        self._lease_ttl_s = lease_ttl_s
        self._environment = os.environ | ({} if native else {"CXX": "no-compiler"})
        self._port = 0
        self._process: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    @property
    def token(self) -> str:
        return read_token(self.folder.token)

    async def start(self) -> None:
        words = ["serve", "--data", str(self.folder.path), "--port", str(self._port)]
        words += ["--model", str(self._model_dir)] if self._node else ["--no-node"]
        if self._lease_ttl_s is not None:
            words += ["--lease-ttl", str(self._lease_ttl_s)]
        with self._messages.open("ab") as messages:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "crdt_llm",
                *words,
                stdout=asyncio.subprocess.PIPE,
                stderr=messages,
                env=self._environment,
            )
        assert self._process.stdout is not None
        async with asyncio.timeout(READY_S_MAX):
            line = (await self._process.stdout.readline()).decode()
        assert line.startswith("ready "), self._messages.read_text(encoding="utf-8")
        self.url = line.split()[1]
        self._port = int(self.url.rstrip("/").rsplit(":", 1)[1])

    async def kill(self) -> None:
        """SIGKILL; returns when it is gone."""
        assert self._process is not None
        self._process.send_signal(signal.SIGKILL)
        assert await self._process.wait() == -signal.SIGKILL, "it had ended before"

    async def stop(self) -> None:
        """End it as an operator does; a clean end is part of the contract."""
        assert self._process is not None
        if self._process.returncode is None:
            self._process.terminate()
            assert await self._process.wait() == 0, self._messages.read_text(encoding="utf-8")

    # -- what it leaves ------------------------------------------------------------------------

    def stored(self, conversation: str) -> Conversation:
        """What is in its log."""
        return load_stored(self.folder.log, conversation)

    def sampled_ids(self, document: Conversation, reply: Entry) -> tuple[int, ...]:
        """The exact ids of a reply, opened with the key from the data folder."""
        sealer = Sealer(load_or_create_secret(self.folder.key("master")), os.urandom)
        return sealer.open_reply(reply.sealed, place_of(document, reply, 0)).sampled
