"""``crdt-llm node`` as a user runs it: a process, and a folder that outlives it."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from base64 import urlsafe_b64encode
from typing import TYPE_CHECKING, Protocol, Self

from stack.command_process import CommandProcess

from crdt_llm.document.keys import SigningKey

if TYPE_CHECKING:
    from pathlib import Path

    from crdt_llm.cli.folders import DataFolder

PRIVATE = 0o600


class Relay(Protocol):
    """A relay's process, as far as a node needs to know it."""

    @property
    def folder(self) -> DataFolder: ...

    @property
    def url(self) -> str: ...


async def node_token(server: Relay, file: Path) -> Path:
    """Issue a token for nodes as an operator does."""
    words = ["token", "issue", "node", "--node", "--data", str(server.folder.path)]
    issuing = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "crdt_llm", *words, stdout=asyncio.subprocess.PIPE
    )
    said, _ = await issuing.communicate()
    assert issuing.returncode == 0
    return keep_secret(file, said)


def keep_secret(file: Path, secret: bytes) -> Path:
    file.touch(PRIVATE)
    file.write_bytes(secret)
    return file


class NodeProcess(CommandProcess):
    """A node that may die, and comes back on the same folder.

    Args:
        server: the relay that it serves.
        token: a file with a token for nodes.
        folder: its own folder.
        model_dir: the model.
        words: further words of the command line.
    """

    def __init__(
        self,
        server: Relay,
        token: Path,
        folder: Path,
        model_dir: Path,
        words: tuple[str, ...] = (),
    ) -> None:
        super().__init__(folder / "node.log")
        self.folder = folder
        self._words = words
        self._server = server
        self._token = token
        self._model_dir = model_dir
        folder.mkdir(parents=True, mode=0o700)
        # The one thing that an operator must bring to every node.
        shutil.copy2(server.folder.key("master"), folder / "master.key")

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    @property
    def public(self) -> bytes:
        return SigningKey((self.folder / "node.key").read_bytes()).public

    async def start(self) -> None:
        words = ["node", "--url", self._server.url, "--token-file", str(self._token)]
        words += ["--data", str(self.folder), "--model", str(self._model_dir), *self._words]
        # In torch's operations, lest a tiny model's reply is over before it is cut.
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CXX": "no-compiler"}
        line = await self.run(words, environment)
        shown = urlsafe_b64encode(self.public).rstrip(b"=").decode() if line else ""
        assert line == f"ready {shown}\n", self.messages
