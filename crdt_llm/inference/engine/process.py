"""The parent's side of the engine's process: an :class:`~crdt_llm.inference.contract.Engine`.

Owns the child process, the numbering of requests, and the way from a report to whoever waits for
it. It loads no torch and computes nothing: a caller's event loop never feels a prefill.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import sys
from typing import TYPE_CHECKING, Final, Self, TypeVar

from crdt_llm.errors import EngineDied, LocalMisuse, MalformedMessage
from crdt_llm.inference.contract import Finished, KvDigest, Prefilled, Queued, Sampled, Scored
from crdt_llm.inference.engine import pipe

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence
    from pathlib import Path
    from types import TracebackType

    from crdt_llm.inference.contract import Capabilities, GenerationEvent, SamplingParams

CLOSE_SECONDS_MAX: Final = 5.0
"""The worker ends as soon as its input closes; one that does not is killed."""

READ_BYTES_MAX: Final = 64 << 10
"""Of reports at once: some thousand tokens, more than ever wait."""

_Kind = TypeVar("_Kind")
_Answer = (
    Queued
    | Prefilled
    | Sampled
    | Finished
    | KvDigest
    | Scored
    | pipe.Forgotten
    | pipe.Measured
    | pipe.Failed
)


class EngineProcess:
    """An engine in a process of its own. Make one with :meth:`start`.

    Belongs to one event loop. When the process dies, every pending call raises
    :exc:`~crdt_llm.errors.EngineDied`, and so does every later one: start another.
    """

    def __init__(self, process: asyncio.subprocess.Process, capabilities: Capabilities) -> None:
        self._process = process
        self._capabilities = capabilities
        self._numbers = itertools.count()
        # Unbounded, but a request gives at most one event a position, and its reader is waiting.
        self._waiting: dict[int, asyncio.Queue[_Answer | EngineDied]] = {}
        self._died: EngineDied | None = None
        self._closing = False
        self._reader = asyncio.create_task(self._read(), name="engine reports")

    @classmethod
    async def start(  # noqa: PLR0913 - the options of a program
        cls,
        model: Path,
        *,
        threads: int | None = None,
        weights: str | None = None,
        device: str | None = None,
        kv_memory_bytes: int | None = None,
        kv_folder: Path | None = None,
        kv_disk_bytes: int | None = None,
        tokens_wait_s: float | None = None,
    ) -> Self:
        """Start the process and wait until the model is loaded.

        Args:
            model: the model's folder.
            threads: of a computation; torch's own choice by default.
            weights: how they are held, ``int8``, ``bf16`` or ``float32``; what suits the model and
                the device if None.
            device: where to compute, ``cuda`` for example; the CPU if None.
            kv_memory_bytes: the most memory that KV may take; the engine's default if None.
            kv_folder: where KV is written that leaves memory, or that should outlive the process;
                it belongs to this engine alone. None writes nothing.
            kv_disk_bytes: the most that this folder may take; the engine's default if None.
            tokens_wait_s: how long a token may wait for the next ones to cross the pipe with them;
                the engine's default if None.

        Raises:
            ModelUnusable: the model or the device cannot be used; one line says why.
            EngineDied: the process ended before it was ready.
        """
        arguments = [str(model)]
        for name, value in (
            ("--threads", threads),
            ("--weights", weights),
            ("--device", device),
            ("--kv-memory-bytes", kv_memory_bytes),
            ("--kv-folder", kv_folder),
            ("--kv-disk-bytes", kv_disk_bytes),
            ("--tokens-wait-s", tokens_wait_s),
        ):
            if value is not None:
                arguments += [name, str(value)]
        # Nothing but the two pipes is inherited: no socket, no lock.
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",  # else `-m` imports from the current folder first: any numpy.py there would run
            "-m",
            "crdt_llm.inference.engine.worker",
            *arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            close_fds=True,
        )
        try:
            report = await _read_report(process)
        except BaseException:  # a cancellation too: nobody else would end the process
            await _end(process)
            raise
        if isinstance(report, pipe.Ready):
            return cls(process, report.capabilities)
        await _end(process)
        if isinstance(report, pipe.Event) and isinstance(report.event, pipe.Failed):
            raise report.event.to_error()
        code = process.returncode
        raise EngineDied(f"the engine's process ended with code {code} while it started")

    @property
    def capabilities(self) -> Capabilities:
        """What this engine is."""
        return self._capabilities

    @property
    def process_id(self) -> int:
        """Of the child process."""
        return self._process.pid

    async def warm(self, ids: Sequence[int]) -> Prefilled:
        """Bring the KV of ``ids``; see :meth:`crdt_llm.inference.contract.Engine.warm`."""
        answer = await self._ask(pipe.Warm(next(self._numbers), pipe.pack_ids(ids)))
        return _expect(answer, Prefilled)

    async def digest(self, ids: Sequence[int]) -> KvDigest:
        """Bring the KV of ``ids`` and hash it: what makes exactness visible from outside."""
        answer = await self._ask(pipe.Digest(next(self._numbers), pipe.pack_ids(ids)))
        return _expect(answer, KvDigest)

    async def score(self, ids: Sequence[int], start: int) -> Scored:
        """What the model makes of the ids from ``start`` on, each behind the ones before it."""
        command = pipe.Score(next(self._numbers), pipe.pack_ids(ids), start)
        return _expect(await self._ask(command), Scored)

    async def measure(self) -> pipe.Measured:
        """How full the engine is: requests that run and wait, and what KV takes."""
        return _expect(await self._ask(pipe.Measure(next(self._numbers))), pipe.Measured)

    async def forget(self, ids: Sequence[int], keep: int = 0) -> None:
        """Drop resident KV; see :meth:`crdt_llm.inference.contract.Engine.forget`."""
        command = pipe.Forget(next(self._numbers), pipe.pack_ids(ids), keep)
        _expect(await self._ask(command), pipe.Forgotten)

    async def generate(
        self, ids: Sequence[int], params: SamplingParams, start: int
    ) -> AsyncGenerator[GenerationEvent, None]:
        """Sample a reply; see :meth:`crdt_llm.inference.contract.Engine.generate`."""
        number = next(self._numbers)
        answers = self._send(pipe.Generate(number, pipe.pack_ids(ids), start, params))
        try:
            while True:
                event = await self._next(answers)
                if not isinstance(event, Queued | Prefilled | Sampled | Finished):
                    raise EngineDied(
                        f"the engine answered a generation with {type(event).__name__}"
                    )
                if isinstance(event, Finished):
                    self._waiting.pop(number, None)
                yield event
                if isinstance(event, Finished):
                    return
        finally:
            self._abandon(number)

    async def close(self) -> None:
        """End the process; pending calls raise :exc:`~crdt_llm.errors.EngineDied`. Idempotent."""
        self._closing = True
        await _end(self._process)
        await self._reader

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    # -- inside --------------------------------------------------------------------------------

    async def _ask(self, command: pipe.Command) -> _Answer:
        """Send a command that has one answer, and wait for it."""
        answers = self._send(command)
        try:
            answer = await self._next(answers)
            self._waiting.pop(command.request, None)
            return answer
        finally:
            self._abandon(command.request)

    def _send(self, command: pipe.Command) -> asyncio.Queue[_Answer | EngineDied]:
        if self._died is not None:
            raise self._death()
        frame = pipe.encode(command)
        answers: asyncio.Queue[_Answer | EngineDied] = asyncio.Queue()
        self._waiting[command.request] = answers
        self._write(frame)
        return answers

    def _write(self, frame: bytes) -> None:
        # Never awaited: what waits in the transport is bounded by the callers' own requests, each
        # of which waits for its answer, and a cancellation must get out of a cancelled task.
        if self._process.stdin is not None:
            self._process.stdin.write(frame)

    async def _next(self, answers: asyncio.Queue[_Answer | EngineDied]) -> _Answer:
        # Several come together: who has one at hand need not be waited for.
        answer = answers.get_nowait() if answers.qsize() else await answers.get()
        if isinstance(answer, EngineDied):
            raise self._death()
        if isinstance(answer, pipe.Failed):
            raise answer.to_error()
        return answer

    def _death(self) -> EngineDied:
        """A fresh exception for each caller, so that none carries another's traceback."""
        return EngineDied(str(self._died))

    def _abandon(self, request: int) -> None:
        """Cancel a request unless its last answer was seen."""
        if self._waiting.pop(request, None) is not None and self._died is None:
            self._write(pipe.encode(pipe.Cancel(request)))

    async def _read(self) -> None:
        """Hand reports to who waits for them, until the process ends."""
        reason = ""
        stream, frames = _output(self._process), pipe.Frames()
        try:
            # All that is there at once: tokens come several at a time.
            while data := await _read_some(stream):
                for body in frames.feed(data):
                    self._hand_on(pipe.decode_report(body))
        except MalformedMessage as error:
            reason = f": {error}"
        if reason:
            self._process.kill()
        if self._closing:
            self._died = EngineDied("the engine was closed")
        else:
            self._died = EngineDied(f"the engine's process ended{reason}; start another one")
        for answers in self._waiting.values():
            answers.put_nowait(self._died)
        await self._process.wait()

    def _hand_on(self, report: pipe.Report) -> None:
        if not isinstance(report, pipe.Event):
            raise MalformedMessage("it sent a report that nobody asked for")
        answers = self._waiting.get(report.request)
        if answers is not None:  # else it was cancelled
            answers.put_nowait(report.event)


def _output(process: asyncio.subprocess.Process) -> asyncio.StreamReader:
    if process.stdout is None:
        raise LocalMisuse("the process was started without its pipes")
    return process.stdout


async def _read_some(stream: asyncio.StreamReader) -> bytes:
    """What came, as much as there is; nothing when the process has closed its end."""
    try:
        return await stream.read(READ_BYTES_MAX)
    except ConnectionError:
        return b""  # it died; that is found by its end


async def _read_report(process: asyncio.subprocess.Process) -> pipe.Report | None:
    """The first report, or None when the process has closed its end."""
    stream = _output(process)
    try:
        head = await stream.readexactly(pipe.LENGTH.size)
        body = await stream.readexactly(pipe.decode_length(head))
    except (asyncio.IncompleteReadError, ConnectionError):
        return None  # whoever asked says how the process ended
    return pipe.decode_report(body)


async def _end(process: asyncio.subprocess.Process) -> None:
    """Close the input of the process, which ends it; kill it if that does not."""
    if process.stdin is not None:
        process.stdin.close()
    try:
        async with asyncio.timeout(CLOSE_SECONDS_MAX):
            await process.wait()
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def _expect(answer: _Answer, kind: type[_Kind]) -> _Kind:
    if not isinstance(answer, kind):
        raise EngineDied(f"the engine answered with {type(answer).__name__}")
    return answer
