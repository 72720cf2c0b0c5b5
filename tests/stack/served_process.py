"""``crdt-llm serve`` as a user runs it: a process, and a data folder that outlives it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Self

from stack.command_process import CommandProcess

from crdt_llm.cli.folders import DataFolder, read_token
from crdt_llm.cli.stored import load_stored
from crdt_llm.document.keys import load_or_create_secret
from crdt_llm.document.seal import Sealer, place_of

if TYPE_CHECKING:
    from pathlib import Path

    from crdt_llm.document.conversation import Conversation
    from crdt_llm.document.schema import Entry


class ServedProcess(CommandProcess):
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
        super().__init__(folder / "serve.log")
        self.folder = DataFolder(folder / "data")
        self.url = ""
        self._model_dir = model_dir
        self._node = node
        self._lease_ttl_s = lease_ttl_s
        self._environment = os.environ | ({} if native else {"CXX": "no-compiler"})
        self._port = 0

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
        line = await self.run(words, self._environment)
        assert line.startswith("ready "), self.messages
        self.url = line.split()[1]
        self._port = int(self.url.rstrip("/").rsplit(":", 1)[1])

    # -- what it leaves ------------------------------------------------------------------------

    def stored(self, conversation: str) -> Conversation:
        """What is in its log."""
        return load_stored(self.folder.log, conversation)

    def sampled_ids(self, document: Conversation, reply: Entry) -> tuple[int, ...]:
        """The exact ids of a reply, opened with the key from the data folder."""
        sealer = Sealer(load_or_create_secret(self.folder.key("master")), os.urandom)
        return sealer.open_reply(reply.sealed, place_of(document, reply, 0)).sampled
