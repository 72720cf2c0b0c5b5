"""A ``crdt-llm`` command that says when it is ready, as a process that may die."""

from __future__ import annotations

import asyncio
import signal
import sys
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

READY_S_MAX: Final = 120.0
"""A process that is not ready by then hangs; usually it takes a few seconds."""


class CommandProcess:
    """A command; once it has ended it can be started again.

    Args:
        log: where its messages go, behind those of the last time.
    """

    def __init__(self, log: Path) -> None:
        self._log = log
        self._process: asyncio.subprocess.Process | None = None

    @property
    def messages(self) -> str:
        """What it said on standard error."""
        return self._log.read_text(encoding="utf-8")

    @property
    def process_id(self) -> int:
        assert self._process is not None
        return self._process.pid

    async def run(self, words: Sequence[str], environment: Mapping[str, str]) -> str:
        """Start it; the first line that it says, or nothing if it has ended without one."""
        with self._log.open("ab") as messages:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "crdt_llm",
                *words,
                stdout=asyncio.subprocess.PIPE,
                stderr=messages,
                env=environment,
            )
        assert self._process.stdout is not None
        async with asyncio.timeout(READY_S_MAX):
            return (await self._process.stdout.readline()).decode()

    async def rest_of_output(self) -> bytes:
        """What it said on standard output behind the first line, once it has ended."""
        assert self._process is not None
        assert self._process.stdout is not None
        return await self._process.stdout.read()

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
            assert await self._process.wait() == 0, self.messages
