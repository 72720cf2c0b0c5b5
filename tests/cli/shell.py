"""Command lines in a process of their own, as a shell starts them."""

from __future__ import annotations

import asyncio
import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from asyncio.subprocess import Process

HEAVY = ("torch", "transformers", "tokenizers", "numpy", "jinja2", "rich")
"""Libraries that a client must not load: seconds of waiting, or not even installed."""

_PROGRAM = f"""
import sys
from crdt_llm.cli.app import run
code = run(sys.argv[1:])
loaded = [name for name in {HEAVY!r} if name in sys.modules]
if loaded:
    sys.exit(f"loaded {{loaded}}")
sys.exit(code)
"""


@dataclass(frozen=True, slots=True)
class Outcome:
    code: int
    out: str
    err: str

    @property
    def complaint(self) -> str:
        """The one line on standard error."""
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        return lines[0]


async def start(*words: str, light: bool = False) -> Process:
    """Start a command line; ``light``: it fails if it loads one of :data:`HEAVY`."""
    program = ("-c", _PROGRAM) if light else ("-m", "crdt_llm")
    return await asyncio.create_subprocess_exec(
        sys.executable,
        *program,
        *words,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=os.environ | {"PYTHONWARNINGS": "error", "HF_HUB_OFFLINE": "1"},
    )


async def finish(process: Process, stdin: bytes = b"") -> Outcome:
    """Give it its standard input, and wait for its end."""
    out, err = await process.communicate(stdin)
    assert process.returncode is not None
    return Outcome(process.returncode, out.decode(), err.decode())


async def run(*words: str, stdin: bytes = b"", light: bool = False) -> Outcome:
    """Run a command line to its end."""
    return await finish(await start(*words, light=light), stdin)
