"""What every peer of a chat has in common: turns, a stopwatch, and processes with pipes.

This module owns the measures. It must not know who is measured.
"""

from __future__ import annotations

import asyncio
import re
import statistics
import sys
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from asyncio.subprocess import Process
    from collections.abc import AsyncIterator, Mapping, Sequence
    from pathlib import Path

TURN_S_MAX = 180  # no single reply takes longer, or something hangs
STARTUP_S_MAX = 600  # a peer that compiles its kernels first takes minutes on two cores
# Behind every turn, before whoever is next: vLLM's worker looks out for more work for a second,
# which takes a whole core from others; the same for all, since cores that were idle begin slower.
REST_S = 1.2
LAST = 5  # turns whose median shows what a long history costs
LOG_CHARACTERS_SHOWN = 2000  # of a process that failed: its last stack
LINE_BYTES_MAX = 1 << 20  # a request with its whole history
CAUSE_CHARACTERS_MAX = 300  # of an error, in one line of the output

# What a server's logger puts before a line: "(Worker pid=7) ERROR 11-22 05:43:06 [core.py:15] ".
_PREFIX = re.compile(r"^(\(.*?pid=\d+\) )?((ERROR|CRITICAL) [\d-]+ [\d:]+ \[[^\]]*\] )?")
# "ValueError: …", also of a module ("torch.OutOfMemoryError: …"), and pip's "ERROR: …".
_RAISED = re.compile(r"^([A-Za-z_][\w.]*(Error|Exception|Exit|Interrupt)|ERROR): \S")


class Skipped(Exception):  # noqa: N818 - it says what happened to the peer
    """A peer cannot be had here; the message says why."""


@dataclass(frozen=True, slots=True)
class Turn:
    """What one turn cost, as its client saw it.

    Attributes:
        ttft_ms: From the text until the first characters of the reply.
        tokens_per_s: Of the reply, after its first token.
        sent_bytes: What the client sent: bodies or frames, without headers of HTTP and TCP.
        prefilled: Prompt tokens that were computed.
        prompt: Prompt tokens in all.
        drafted: Prompt tokens that were computed while the text was being typed.
        wasted: Tokens that were computed of what was being typed, and dropped again.
        gaps_ms: Between the parts of the reply.
    """

    ttft_ms: float
    tokens_per_s: float
    sent_bytes: int
    prefilled: int
    prompt: int
    drafted: int = 0
    wasted: int = 0
    gaps_ms: tuple[float, ...] = ()


class Peer(Protocol):
    """Someone to chat with, who remembers the chat or has a client that does."""

    @property
    def name(self) -> str:
        """What the table calls it, with its weight format."""

    async def turn(self, text: str, tokens: int) -> Turn:
        """Say something, and take the whole of a reply of so many tokens."""


class Stopwatch:
    """When the parts of one reply came."""

    def __init__(self) -> None:
        self._start = self._first = self._last = time.perf_counter()
        self._parts = 0
        self.gaps_ms: list[float] = []

    def part(self) -> None:
        """Something of the reply is there."""
        now = time.perf_counter()
        if self._parts:
            self.gaps_ms.append(1000 * (now - self._last))
        else:
            self._first = now
        self._last = now
        self._parts += 1

    @property
    def ttft_ms(self) -> float:
        """From the making of this watch until the first part."""
        return 1000 * (self._first - self._start)

    def tokens_per_s(self, tokens: int) -> float:
        """The rate at which the tokens after the first came."""
        took_s = self._last - self._first
        if self._parts < 2 or took_s <= 0:
            raise SystemExit("a reply came in one piece: there is no rate to measure")
        return (tokens - 1) / took_s


@dataclass(frozen=True, slots=True)
class Summary:
    """A peer's row. Medians over the turns after the first; sums over all."""

    ttft_ms: float
    ttft_last_ms: float
    tokens_per_s: float
    tokens_per_s_last: float
    sent_bytes: int
    prefilled: int
    drafted: int
    wasted: int

    @classmethod
    def of(cls, turns: Sequence[Turn]) -> Summary:
        """Of one peer's turns."""
        warm = turns[1:]
        return cls(
            ttft_ms=statistics.median(turn.ttft_ms for turn in warm),
            ttft_last_ms=statistics.median(turn.ttft_ms for turn in warm[-LAST:]),
            tokens_per_s=statistics.median(turn.tokens_per_s for turn in warm),
            tokens_per_s_last=statistics.median(turn.tokens_per_s for turn in warm[-LAST:]),
            sent_bytes=sum(turn.sent_bytes for turn in turns),
            prefilled=sum(turn.prefilled for turn in turns),
            drafted=sum(turn.drafted for turn in turns),
            wasted=sum(turn.wasted for turn in turns),
        )


@asynccontextmanager
async def process(
    program: Path | str,
    *arguments: str,
    log: Path,
    environment: Mapping[str, str] | None = None,
) -> AsyncIterator[Process]:
    """A process with pipes, ended with the block; if that fails, the end of its log is shown.

    A peer that is skipped says why by itself.
    """
    with log.open("wb") as errors:
        child = await asyncio.create_subprocess_exec(
            program,
            *arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=errors,
            limit=LINE_BYTES_MAX,
            env=environment,
        )
    try:
        yield child
    except Skipped:
        raise
    except BaseException:
        _show_end(log)
        raise
    finally:
        if child.returncode is None:
            child.terminate()
        await child.wait()


def root_cause(log: str) -> str:
    """What went wrong first in the log of a process that failed.

    An error wraps the one that caused it, and Python prints the cause first; a server of several
    processes tells it once more in each. So it is the first line that ends a traceback, or that pip
    marks as an error; without one, the last line that says something.
    """
    lines = [said for line in log.splitlines() if (said := _PREFIX.sub("", line).strip())]
    raised = next((line for line in lines if _RAISED.match(line)), None)
    return (raised or (lines or ["it said nothing"])[-1])[:CAUSE_CHARACTERS_MAX]


def _show_end(log: Path) -> None:
    sys.stderr.write(log.read_text(errors="replace")[-LOG_CHARACTERS_SHOWN:])


async def line(child: Process, seconds: float) -> bytes:
    """The next line that a process prints."""
    if child.stdout is None:
        raise RuntimeError("the process was started without a pipe for its output")
    async with asyncio.timeout(seconds):
        said = await child.stdout.readline()
    if not said:
        raise SystemExit("a process ended: see above")
    return said


def pipe_to(child: Process) -> asyncio.StreamWriter:
    """A process's standard input."""
    if child.stdin is None:
        raise RuntimeError("the process was started without a pipe for its input")
    return child.stdin
