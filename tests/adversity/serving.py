"""A `crdt-llm serve` process for tests that do bad things to it, and what they look at afterwards.

Owns the process, its data folder and its standard error. It must not know what is done to it.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlsplit

import psutil  # type: ignore[import-untyped]
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from crdt_llm import Client
from crdt_llm.cli.folders import DataFolder
from crdt_llm.sync.wire.y_websocket import decode, decode_state_vector

if TYPE_CHECKING:
    from pathlib import Path

    from websockets.asyncio.client import ClientConnection

    from crdt_llm.document.schema import Entry
    from crdt_llm.sync.client.client import OpenConversation
    from crdt_llm.sync.wire.y_websocket import Message

LONG: dict[str, Any] = {"temperature": 0.0, "max_tokens": 400, "ignore_eos": True}
"""A greedy reply that is still running when whatever is done to it has happened."""

SHORT: dict[str, Any] = {"temperature": 0.0, "max_tokens": 8, "ignore_eos": True}

ENVIRONMENT = os.environ | {
    "HF_HUB_OFFLINE": "1",
    # Two engines on the cores of one test machine: threads that wait for each other cost more.
    "OMP_NUM_THREADS": "1",
    # In torch's operations: with native kernels a tiny model's reply is over before anything can
    # be done to it.
    "CXX": "no-compiler",
}

START_S_MAX = 120.0
"""Until a start has hung. Far beyond what a loaded machine takes; no test depends on it."""


@dataclass(slots=True)
class Serving:
    """One server on one data folder; started, stopped, killed and started again.

    Attributes:
        root: a folder of its own.
        model_dir: the model; ``None`` runs a relay without a node.
        words: further words of the command line.
        limits: file size limits and the like, set in the process before it starts.
    """

    root: Path
    model_dir: Path | None
    words: tuple[str, ...] = ()
    folder: DataFolder = field(init=False)
    port: int = 0  # a free one; after a restart the same
    process: subprocess.Popen[bytes] | None = None
    said: bytes = b""  # on standard output, over all its lives

    def __post_init__(self) -> None:
        self.folder = DataFolder(self.root / "data")

    # -- life ----------------------------------------------------------------------------------

    @property
    def command(self) -> list[str]:
        model = ["--no-node"] if self.model_dir is None else ["--model", str(self.model_dir)]
        serve = [sys.executable, "-m", "crdt_llm", "serve", "--data", str(self.folder.path)]
        return [*serve, "--port", str(self.port), *model, *self.words]

    def start(self) -> Self:
        self.root.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(  # noqa: S603 - our own program
                self.command, stdout=subprocess.PIPE, stderr=log, env=ENVIRONMENT
            )
        assert self.process.stdout is not None
        self.said += (first := self.process.stdout.readline())
        line = first.decode()
        assert line.startswith("ready http://"), self.errors
        port = urlsplit(line.split()[1]).port
        assert port is not None
        self.port = port
        return self

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        """End it; a test that did its work has nothing left to save."""
        if self.running.poll() is None:
            self.running.kill()
        self.running.wait()
        assert self.running.stdout is not None
        self.running.stdout.close()

    @property
    def running(self) -> subprocess.Popen[bytes]:
        assert self.process is not None
        return self.process

    async def ended(self) -> int:
        """Wait for its end; the exit code."""
        code = await asyncio.to_thread(self.running.wait)
        assert self.running.stdout is not None
        self.said += self.running.stdout.read()
        self.running.stdout.close()
        return code

    async def stop(self) -> int:
        """Ask for its end, as a service manager does; the exit code."""
        self.running.send_signal(signal.SIGTERM)
        return await self.ended()

    # -- looking -------------------------------------------------------------------------------

    @property
    def log(self) -> Path:
        return self.root / "stderr"

    @property
    def errors(self) -> str:
        """What it has said on standard error."""
        return self.log.read_text()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    @property
    def token(self) -> str:
        return self.folder.token.read_text().strip()

    @property
    def workers(self) -> list[int]:
        """The process ids of its engine: one, or none between a death and a new start."""
        return [child.pid for child in psutil.Process(self.running.pid).children()]

    def client(self, device: str = "phone", **options: Any) -> Client:
        return Client(self.url, token=self.token, device=device, **options)

    def socket(
        self,
        conversation: str,
        *,
        token: str | None = "",
        **options: Any,
    ) -> connect:
        """A raw websocket; the owner's token by default, none for ``None``."""
        token = self.token if token == "" else token
        query = "" if token is None else f"?token={token}"
        address = f"ws://127.0.0.1:{self.port}/{conversation}{query}"
        return connect(address, compression=None, max_size=None, **options)

    async def get(self, path: str, headers: str = "") -> tuple[int, str]:
        """The status and the body of a plain request."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n{headers}\r\n".encode())
        head, _, body = (await reader.read()).decode().partition("\r\n\r\n")
        writer.close()
        return int(head.split()[1]), body


async def end_of(socket: ClientConnection) -> tuple[int, str, list[Message]]:
    """The close code, its reason, and what came before."""
    messages: list[Message] = []
    try:
        async for frame in socket:
            assert isinstance(frame, bytes)
            messages.append(decode(frame))
    except ConnectionClosed:
        pass  # its code is looked at below
    assert socket.close_code is not None
    return socket.close_code, socket.close_reason or "", messages


async def sampled(conversation: OpenConversation, slot: str, chunks: int = 1) -> Entry:
    """Wait until a reply has so many sealed chunks, or has ended."""
    feed = conversation.changes()
    while True:
        entry = conversation.document.entry(slot)
        if entry is not None and (len(entry.sealed) >= chunks or entry.ended):
            return entry
        await conversation.next_of(feed, lambda _: True)


async def known_to_the_relay(conversation: OpenConversation, serving: Serving) -> None:
    """Wait until the relay has all that this device has: another device reads it there."""
    wanted = decode_state_vector(conversation.document.state_vector())
    async with serving.client("witness") as client:
        witness = await client.open(conversation.id)
        feed = witness.changes()
        while True:
            have = decode_state_vector(witness.document.state_vector())
            if all(have.get(author, 0) >= clock for author, clock in wanted.items()):
                return
            await witness.next_of(feed, lambda _: True)
