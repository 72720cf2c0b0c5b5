"""The engine's process: reads commands, drives the engine, writes reports.

Owns the process: its pipe, its threads and how it ends. What the engine does with a request is the
engine's affair; what a conversation is, nobody here knows.

Run as ``python -m crdt_llm.inference.engine.worker MODEL``; standard input and output carry frames
of :mod:`crdt_llm.inference.engine.pipe`, and anything that prints goes to standard error. A process
of its own, because torch in a thread starves behind a busy event loop.

It ends when its input closes, in the middle of a computation too: a parent that was killed closes
the pipe without a word, and a thread that only reads sees it. On the way out KV is written to disk
for a moment; what is lost is derived from documents elsewhere.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import logging
import os
import select
import signal
import sys
import threading
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NoReturn

from crdt_llm.errors import CrdtLlmError, MalformedMessage, ModelUnusable
from crdt_llm.inference.contract import Sampled
from crdt_llm.inference.engine import pipe
from crdt_llm.inference.engine.team import Team

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from crdt_llm.inference.contract import Finished, KvDigest, Prefilled, Queued, Scored
    from crdt_llm.inference.engine.torch_engine import TorchEngine

EXIT_INPUT_CLOSED = 0
EXIT_UNUSABLE = 1
EXIT_MALFORMED = 3

SPINS = 20_000
"""How often a thread that waits for another one looks before it goes to sleep: some 20 us.
A step has hundreds of such waits. With none (``OMP_WAIT_POLICY=passive``) it takes twice as long,
measured, and with OpenMP's own 300,000 it takes several times as long as soon as another process
wants the same cores."""

COMMANDS_WAITING_MAX = 4096
"""Commands read but not yet taken, before more are read. The engine takes all of them between two
steps; beyond this the pipe fills up and the parent waits."""

READ_BYTES_MAX = 64 << 10
"""Of commands at once: what a pipe holds."""

IDLE_S = 1.0
"""After so long without a command KV goes to disk: not between the turns of a quick exchange."""

SAVE_S_MAX = 3.0
"""How long the process may live without an input, to write KV to disk: some gigabytes."""

TOKENS_WAIT_S_MAX = 0.02
"""How long a token may wait for the next ones, so that they cross the pipe together. Less than half
of the window in which a node collects text, and as much is computed in vain behind a stop string.
Steps that take longer than this send theirs one by one."""


class _EndOfInput:
    """What comes after the last command."""


END_OF_INPUT = _EndOfInput()
_Input = pipe.Command | _EndOfInput


def _leave(code: int, last_words: str = "") -> NoReturn:
    """End at once, whatever other threads compute and whether or not anybody reads the log."""
    try:
        sys.stderr.write(last_words)
        sys.stderr.flush()
    finally:
        os._exit(code)


class Commands:
    """The reading side of the pipe, in order.

    A thread waits for what comes, in the middle of a computation too. Between two steps whoever
    computes takes what lies in the pipe itself: on a busy machine the system may let one thread
    compute many steps before the other has its turn to read the cancellation of what is computed.

    Args:
        source: the descriptor of the pipe.
    """

    def __init__(self, source: int) -> None:
        self._source = source
        self._frames = pipe.Frames()
        self._commands: deque[_Input] = deque()
        self._has_ended = False
        # Held for moments only, never while waiting for the pipe.
        self._changed = threading.Condition()

    def follow(self) -> None:
        """Read until the end of input, and then end the process: what the thread does."""
        while True:
            select.select([self._source], [], [])  # the end of input can be read too
            with self._changed:
                self._changed.wait_for(lambda: len(self._commands) < COMMANDS_WAITING_MAX)
                self._read()
                if self._has_ended:
                    break
        time.sleep(SAVE_S_MAX)
        _leave(EXIT_INPUT_CLOSED)

    def take(self) -> _Input | None:
        """The next command, or None if there is none: what is in the pipe now is not overlooked."""
        with self._changed:
            if not self._commands:
                self._read()
            return self._pop()

    def wait(self, seconds: float | None = None) -> _Input | None:
        """The next command, or None if there is none for so long."""
        with self._changed:
            self._changed.wait_for(lambda: self._commands, seconds)
            return self._pop()

    def _pop(self) -> _Input | None:
        if not self._commands:
            return None
        self._changed.notify()
        return self._commands.popleft()

    def _read(self) -> None:
        """Take in what there is; the caller holds the lock."""
        if self._has_ended or not select.select([self._source], [], [], 0)[0]:
            return  # nothing came, or the other thread has it already
        data = os.read(self._source, READ_BYTES_MAX)
        try:
            self._commands += map(pipe.decode_command, self._frames.feed(data))
        except MalformedMessage as error:
            _leave(EXIT_MALFORMED, f"engine: {error}\n")
        if not data:
            self._has_ended = True
            self._commands.append(END_OF_INPUT)
        self._changed.notify()


class Reports:
    """The writing side of the pipe, in order.

    Tokens wait for each other for a moment: whoever reads them is another process on the same
    cores, and to wake it costs a good part of what a token may take. Everything else goes out at
    the end of its step, with what waits before it; the first token of a reply with it, since the
    word that its prompt was read comes in the same step.

    Args:
        sink: the pipe.
        clock: seconds, monotonic.
        tokens_wait_s: how long a token may wait.
    """

    def __init__(
        self,
        sink: BinaryIO,
        clock: Callable[[], float] = time.monotonic,
        tokens_wait_s: float = TOKENS_WAIT_S_MAX,
    ) -> None:
        self._sink = sink
        self._tokens_wait_s = tokens_wait_s
        self._clock = clock
        self._waiting = bytearray()
        self._since_s: float | None = None  # the oldest of what waits
        self._is_urgent = False

    def write(self, report: pipe.Report) -> None:
        """Write a report, and what waits before it, at once."""
        self._waiting += pipe.encode(report)
        self.flush()

    def event(
        self,
        request: int,
        event: Queued | Prefilled | Sampled | Finished | KvDigest | Scored | CrdtLlmError,
    ) -> None:
        """Take an event of a step; see :meth:`step_ended`."""
        if isinstance(event, CrdtLlmError):
            report = pipe.Event(request, pipe.Failed.of(event))
        else:
            report = pipe.Event(request, event)
        self._waiting += pipe.encode(report)
        self._is_urgent |= not isinstance(event, Sampled)
        if self._since_s is None:
            self._since_s = self._clock()

    def step_ended(self, took_s: float) -> None:
        """Write what must not wait for another step that takes as long as this one."""
        if self._since_s is None:
            return
        if self._is_urgent or self._clock() - self._since_s + took_s > self._tokens_wait_s:
            self.flush()

    def flush(self) -> None:
        """Write all that waits."""
        if not self._waiting:
            return
        try:
            self._sink.write(self._waiting)
            self._sink.flush()
        except BrokenPipeError:
            _leave(EXIT_INPUT_CLOSED)  # the parent is gone
        self._waiting = bytearray()
        self._since_s, self._is_urgent = None, False


def _load(options: argparse.Namespace) -> TorchEngine:
    # Unless somebody knows better. It has to be in place before torch is loaded.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))
    try:
        import torch  # noqa: PLC0415 - the pipe is watched before the long imports begin

        from crdt_llm.inference.engine import torch_engine  # noqa: PLC0415 - as above
        from crdt_llm.inference.forward import model  # noqa: PLC0415 - as above
    except ModuleNotFoundError as error:
        message = f"{error.name} is not installed: install crdt-llm[inference]"
        raise ModelUnusable(message) from error
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    budgets = {
        name: value
        for name in ("kv_memory_bytes", "kv_folder", "kv_disk_bytes")
        if (value := getattr(options, name)) is not None
    }
    loaded = model.load_model(options.model, options.weights, options.device)
    return torch_engine.TorchEngine(loaded, **budgets)


def _take(command: pipe.Command, engine: TorchEngine, reports: Reports) -> None:
    """Hand one command to the engine."""
    try:
        match command:
            case pipe.Warm():
                engine.warm(command.request, pipe.unpack_ids(command.ids))
            case pipe.Digest():
                engine.digest(command.request, pipe.unpack_ids(command.ids))
            case pipe.Score():
                engine.score(command.request, pipe.unpack_ids(command.ids), command.start)
            case pipe.Generate():
                ids = pipe.unpack_ids(command.ids)
                engine.generate(command.request, ids, command.params, command.start)
            case pipe.Cancel():
                engine.cancel(command.request)
            case pipe.Forget():
                engine.forget(pipe.unpack_ids(command.ids), command.keep)
                reports.write(pipe.Event(command.request, pipe.Forgotten()))
            case pipe.Measure():
                measured = pipe.Measured(*dataclasses.astuple(engine.load))
                reports.write(pipe.Event(command.request, measured))
    except CrdtLlmError as error:
        reports.event(command.request, error)


def _run(engine: TorchEngine, commands: Commands, reports: Reports) -> NoReturn:
    """Take every waiting command, then do one step; without work, write KV to disk, then wait."""
    import torch  # noqa: PLC0415 - it was loaded with the engine

    # What is loaded now stays: a collection that went through all of it would hold up a step.
    gc.collect()
    gc.freeze()
    team = Team(torch.get_num_threads())
    while True:
        if engine.busy:
            command = commands.take()
        else:
            reports.flush()  # of a reply that was cancelled: nobody waits for it, but it was made
            command = _wait(commands, engine)
        while command is not None:
            if isinstance(command, _EndOfInput):
                while engine.save_one():
                    pass
                _leave(EXIT_INPUT_CLOSED)
            _take(command, engine, reports)
            command = commands.take()
        _step(engine, team, reports)


def _step(engine: TorchEngine, team: Team, reports: Reports) -> None:
    """One step, by as many threads as are of use now."""
    import torch  # noqa: PLC0415 - it was loaded with the engine

    passing_on = engine.is_passing_on
    threads = 1 if passing_on else team.threads
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    engine.step(reports.event)
    took_s = time.perf_counter() - wall_s
    reports.step_ended(took_s)
    if not passing_on:
        team.note(took_s, time.process_time() - cpu_s)


def _wait(commands: Commands, engine: TorchEngine) -> _Input | None:
    """The next command. After a pause, KV that is only in memory is written to disk meanwhile."""
    command = commands.wait(IDLE_S)
    while command is None and engine.save_one():
        command = commands.take()
    return commands.wait() if command is None else command


def main(arguments: Sequence[str] | None = None) -> None:
    """Load a model and serve it until the input closes.

    Args:
        arguments: of the command line; those of the process by default.
    """
    parser = argparse.ArgumentParser(prog="crdt_llm.inference.engine.worker")
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--weights")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens-wait-s", type=float, default=TOKENS_WAIT_S_MAX)
    parser.add_argument("--kv-memory-bytes", type=int)
    parser.add_argument("--kv-folder", type=Path)
    parser.add_argument("--kv-disk-bytes", type=int)
    options = parser.parse_args(arguments)

    logging.basicConfig(
        level=logging.INFO,
        stream=sys.stderr,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    # The terminal's interrupt goes to the whole group; the node decides when the engine ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Frames keep the descriptor to themselves: whatever prints must not end up among them.
    reports = Reports(
        os.fdopen(os.dup(sys.stdout.fileno()), "wb"), tokens_wait_s=options.tokens_wait_s
    )
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    commands = Commands(sys.stdin.fileno())
    threading.Thread(target=commands.follow, name="commands", daemon=True).start()
    try:
        engine = _load(options)
    except CrdtLlmError as error:
        reports.write(pipe.Event(pipe.NO_REQUEST, pipe.Failed.of(error)))
        _leave(EXIT_UNUSABLE)
    reports.write(pipe.Ready(engine.capabilities))
    _run(engine, commands, reports)


if __name__ == "__main__":
    main()
