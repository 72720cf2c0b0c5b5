"""The engine's process, for real: how it serves, how it is cancelled, and how it ends."""

from __future__ import annotations

import asyncio
import io
import os
import select
import signal
import subprocess
import sys
import textwrap
import threading
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from crdt_llm.errors import EngineDied, LocalMisuse, ModelUnusable, PromptTooLong
from crdt_llm.inference.contract import Finished, Prefilled, Sampled, SamplingParams
from crdt_llm.inference.engine import pipe, worker
from crdt_llm.inference.engine.process import EngineProcess
from crdt_llm.inference.engine.schedule import CHUNK_ROWS_MAX

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence
    from typing import BinaryIO

    from crdt_llm.inference.contract import Engine, GenerationEvent

KV_BYTES = 1 << 24
END_SECONDS_MAX = 60  # of patience with a busy machine, before a process counts as hanging
PROMPT = [(7 * index) % 256 for index in range(90)]
LONG = [(11 * index) % 251 for index in range(2040)]


async def start(model: Path) -> EngineProcess:
    return await EngineProcess.start(model, threads=1, kv_memory_bytes=KV_BYTES)


@pytest.fixture
async def engine(tiny_model_dir: Path) -> AsyncIterator[EngineProcess]:
    async with await start(tiny_model_dir) as running:
        yield running


async def collect(
    engine: Engine, ids: Sequence[int], params: SamplingParams, start: int
) -> list[GenerationEvent]:
    return [event async for event in engine.generate(ids, params, start)]


def sampled(events: Sequence[GenerationEvent]) -> list[int]:
    return [event.id for event in events if isinstance(event, Sampled)]


async def idle(engine: EngineProcess) -> pipe.Measured:
    """Wait until nothing runs in the worker; each question is answered between two steps."""
    while (measured := await engine.measure()).requests:
        pass
    return measured


async def test_a_process_serves_replies_prefills_and_digests(engine: EngineProcess) -> None:
    assert await engine.warm(PROMPT[:80]) == Prefilled(80, 0, 80)
    params = SamplingParams(5, 0.7, seed=3, ignore_eos=True)
    events = await collect(engine, PROMPT, params, len(PROMPT))
    assert events[0] == Prefilled(90, 80, 10)
    assert len(sampled(events)) == 5
    assert events[-1] == Finished("length")
    assert await engine.digest(PROMPT) == await engine.digest(PROMPT)
    await engine.forget(PROMPT)
    assert await engine.warm(PROMPT) == Prefilled(90, 0, 90)


async def test_a_kill_in_mid_reply_and_a_restart_change_nothing(tiny_model_dir: Path) -> None:
    asks = [SamplingParams(24, heat, seed=5, ignore_eos=True) for heat in (0.0, 0.7)]
    async with await start(tiny_model_dir) as engine:
        uncut = [await collect(engine, PROMPT, params, len(PROMPT)) for params in asks]
        digests = [await engine.digest(PROMPT + sampled(events)) for events in uncut]
        fingerprint = engine.capabilities.fingerprint
    so_far: list[list[int]] = [[], []]
    async with await start(tiny_model_dir) as engine:

        async def read_until_it_dies(number: int) -> None:
            endless = replace(asks[number], max_tokens=1900)
            async for event in engine.generate(PROMPT, endless, len(PROMPT)):
                if isinstance(event, Sampled):
                    so_far[number].append(event.id)
                if min(map(len, so_far)) == 8:
                    os.kill(engine.process_id, signal.SIGKILL)

        ends = await asyncio.gather(*map(read_until_it_dies, (0, 1)), return_exceptions=True)
        assert [type(end) for end in ends] == [EngineDied, EngineDied]
    async with await start(tiny_model_dir) as engine:
        assert engine.capabilities.fingerprint == fingerprint
        for params, events, read, digest in zip(asks, uncut, so_far, digests, strict=True):
            seen = read[:20]  # on a busy machine more of it had crossed the pipe
            assert seen == sampled(events)[: len(seen)]
            resumed = await collect(engine, PROMPT + seen, params, len(PROMPT))
            assert resumed[1:] == events[1 + len(seen) :]
            assert await engine.digest(PROMPT + sampled(events)) == digest
    assert sampled(uncut[0]) != sampled(uncut[1])


async def test_replies_side_by_side_are_those_made_alone(engine: EngineProcess) -> None:
    asks = [(PROMPT[: 30 + 7 * n], SamplingParams(15, 0.7, seed=n)) for n in range(4)]
    together = await asyncio.gather(
        *(collect(engine, ids, params, len(ids)) for ids, params in asks)
    )
    for (ids, params), events in zip(asks, together, strict=True):
        await engine.forget(ids[:1])
        assert (await collect(engine, ids, params, len(ids)))[1:] == events[1:]


@pytest.fixture
def command_pipe() -> Iterator[tuple[int, BinaryIO]]:
    """The reading end, as a descriptor, and the writing end."""
    source, sink = os.pipe()
    with os.fdopen(source, "rb"), os.fdopen(sink, "wb", buffering=0) as writing:
        yield source, writing


def test_what_lies_in_the_pipe_is_taken_though_the_reading_thread_has_no_turn(
    command_pipe: tuple[int, BinaryIO],
) -> None:
    source, sink = command_pipe
    commands = worker.Commands(source)  # of which no thread follows the pipe
    assert commands.take() is None
    first, second = pipe.encode(pipe.Cancel(1)), pipe.encode(pipe.Cancel(2))
    sink.write(first + second[:3])
    assert [commands.take(), commands.take()] == [pipe.Cancel(1), None]
    sink.write(second[3:])
    assert commands.take() == pipe.Cancel(2)
    sink.close()
    assert [commands.take(), commands.take()] == [worker.END_OF_INPUT, None]


def test_commands_beyond_the_limit_wait_in_the_pipe_and_none_is_lost(
    command_pipe: tuple[int, BinaryIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[int] = []
    monkeypatch.setattr(worker, "COMMANDS_WAITING_MAX", 3)
    monkeypatch.setattr(worker, "SAVE_S_MAX", 0)
    monkeypatch.setattr(worker, "_leave", left.append)
    source, sink = command_pipe
    commands = worker.Commands(source)
    monkeypatch.setattr(worker, "READ_BYTES_MAX", len(pipe.encode(pipe.Cancel(0))))
    following = threading.Thread(target=commands.follow, daemon=True)
    following.start()
    cancels = [pipe.Cancel(number) for number in range(100)]
    for cancel in cancels:  # all of them fit the pipe
        sink.write(pipe.encode(cancel))
    sink.close()
    taken = [commands.wait(END_SECONDS_MAX) for _ in cancels[:50]]
    assert select.select([source], [], [], 0)[0]  # nobody was far ahead
    taken += [commands.wait(END_SECONDS_MAX) for _ in cancels[50:]]
    assert taken == cancels
    assert commands.wait(END_SECONDS_MAX) is worker.END_OF_INPUT
    following.join(END_SECONDS_MAX)
    assert left == [worker.EXIT_INPUT_CLOSED]


async def test_closing_the_iterator_in_mid_reply_cancels(engine: EngineProcess) -> None:
    events = engine.generate(PROMPT, SamplingParams(1900, ignore_eos=True), len(PROMPT))
    async for event in events:
        if isinstance(event, Sampled):
            break
    await events.aclose()
    measured = await idle(engine)
    assert measured.resident_tokens < len(PROMPT) + 1900


async def test_cancelling_in_mid_prefill_keeps_what_was_computed(engine: EngineProcess) -> None:
    warming = asyncio.create_task(engine.warm(LONG))
    # Others take turns with it, so that the prefill lasts however slowly this process is run.
    others = [asyncio.create_task(engine.warm([first, *LONG])) for first in range(200, 206)]
    while (await engine.measure()).resident_tokens < CHUNK_ROWS_MAX:
        pass
    warming.cancel()
    with pytest.raises(asyncio.CancelledError):
        await warming
    await asyncio.gather(*others)
    measured = await idle(engine)
    resident = measured.resident_tokens - 6 * (len(LONG) + 1)
    assert CHUNK_ROWS_MAX <= resident < len(LONG)
    assert resident % CHUNK_ROWS_MAX == 0
    assert await engine.warm(LONG) == Prefilled(len(LONG), resident, len(LONG) - resident)


async def test_death_raises_for_every_pending_call(engine: EngineProcess) -> None:
    endless = SamplingParams(1900, ignore_eos=True)
    calls = [
        asyncio.create_task(collect(engine, PROMPT, endless, len(PROMPT))),
        asyncio.create_task(collect(engine, PROMPT[:50], endless, 50)),
        asyncio.create_task(engine.warm(LONG)),
    ]
    while (await engine.measure()).requests < 3:
        pass
    os.kill(engine.process_id, signal.SIGKILL)
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(result) for result in results] == [EngineDied] * 3
    with pytest.raises(EngineDied):
        await engine.warm(PROMPT)
    with pytest.raises(EngineDied):
        await collect(engine, PROMPT, SamplingParams(1), 90)


async def test_closing_raises_for_pending_calls_and_closes_once(tiny_model_dir: Path) -> None:
    engine = await start(tiny_model_dir)
    endless = SamplingParams(1900, ignore_eos=True)
    pending = asyncio.create_task(collect(engine, PROMPT, endless, len(PROMPT)))
    while not (await engine.measure()).requests:
        pass
    await engine.close()
    await engine.close()
    with pytest.raises(EngineDied):
        await pending
    assert str(engine.process_id) not in children()


async def test_a_wrong_request_fails_alone(engine: EngineProcess) -> None:
    with pytest.raises(LocalMisuse):
        await engine.warm([])
    with pytest.raises(LocalMisuse):
        await engine.warm([1, 100_000])
    with pytest.raises(LocalMisuse):
        await engine.warm([-1])
    with pytest.raises(LocalMisuse):
        await engine.forget(PROMPT, keep=90)
    with pytest.raises(LocalMisuse):
        await collect(engine, PROMPT, SamplingParams(1), 91)
    with pytest.raises(PromptTooLong):
        await engine.warm([1] * 2049)
    assert (await engine.warm(PROMPT)).prompt == 90


async def test_an_interrupt_of_the_terminal_is_not_for_the_engine(engine: EngineProcess) -> None:
    os.kill(engine.process_id, signal.SIGINT)
    assert (await engine.warm(PROMPT)).prompt == 90


async def test_a_model_that_cannot_be_used_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ModelUnusable, match=r"config\.json is missing") as caught:
        await start(tmp_path)
    assert "\n" not in str(caught.value)


def children() -> set[str]:
    """Process ids of the children that this thread has started."""
    return set(Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text().split())


async def test_a_start_that_is_cancelled_leaves_no_process(tiny_model_dir: Path) -> None:
    before = children()
    starting = asyncio.create_task(start(tiny_model_dir))
    turn = asyncio.Event()
    while children() <= before:
        asyncio.get_running_loop().call_soon(turn.set)
        await turn.wait()
        turn.clear()
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert children() <= before


def spawn_worker(model: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(  # noqa: S603 - our own module, our own argument
        [sys.executable, "-m", "crdt_llm.inference.engine.worker", str(model), "--threads", "1"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def read_report(worker: subprocess.Popen[bytes]) -> pipe.Report:
    assert worker.stdout is not None
    return pipe.decode_report(worker.stdout.read(pipe.decode_length(worker.stdout.read(4))))


def test_the_worker_ends_when_its_input_closes_even_while_it_computes(
    tiny_model_dir: Path,
) -> None:
    with spawn_worker(tiny_model_dir) as worker:
        assert worker.stdin is not None
        assert isinstance(read_report(worker), pipe.Ready)
        endless = SamplingParams(1900, ignore_eos=True)
        worker.stdin.write(pipe.encode(pipe.Generate(0, pipe.pack_ids(PROMPT), 90, endless)))
        worker.stdin.flush()
        assert isinstance(read_report(worker), pipe.Event)
        worker.stdin.close()
        assert worker.wait(END_SECONDS_MAX) == 0


def test_the_worker_ends_when_its_input_closes_while_it_loads(tiny_model_dir: Path) -> None:
    with spawn_worker(tiny_model_dir) as worker:
        assert worker.stdin is not None
        worker.stdin.close()
        assert worker.wait(END_SECONDS_MAX) == 0


def test_bytes_that_are_no_command_end_the_worker_with_a_word(tiny_model_dir: Path) -> None:
    with spawn_worker(tiny_model_dir) as worker:
        assert worker.stdin is not None
        assert worker.stderr is not None
        worker.stdin.write(b"\x02\x00\x00\x00\xc1\xc1")
        worker.stdin.flush()
        assert worker.wait(END_SECONDS_MAX) == 3
        assert b"no message" in worker.stderr.read()


def test_the_worker_ends_though_nobody_reads_its_log(tiny_model_dir: Path) -> None:
    with spawn_worker(tiny_model_dir) as worker:
        assert worker.stdin is not None
        assert worker.stderr is not None
        worker.stderr.close()
        worker.stdin.write(b"\x02\x00\x00\x00\xc1\xc1")
        worker.stdin.flush()
        assert worker.wait(END_SECONDS_MAX) == 3


PARENT = """
    import asyncio, sys
    from pathlib import Path
    from crdt_llm.inference.engine.process import EngineProcess

    async def main() -> None:
        engine = await EngineProcess.start(
            Path(sys.argv[1]), threads=1, kv_memory_bytes=int(sys.argv[2])
        )
        warming = asyncio.create_task(engine.warm([index % 251 for index in range(2040)]))
        while not (await engine.measure()).requests:
            pass
        print(engine.process_id, flush=True)
        await warming

    asyncio.run(main())
"""


def test_the_worker_ends_when_its_parent_is_killed_in_mid_prefill(tiny_model_dir: Path) -> None:
    with subprocess.Popen(  # noqa: S603 - the program above
        [sys.executable, "-c", textwrap.dedent(PARENT), str(tiny_model_dir), str(KV_BYTES)],
        stdout=subprocess.PIPE,
    ) as parent:
        assert parent.stdout is not None
        worker = os.pidfd_open(int(parent.stdout.readline()))
        parent.kill()
        parent.wait(END_SECONDS_MAX)
        # The descriptor of a process becomes readable when the process has ended.
        ended, _, _ = select.select([worker], [], [], END_SECONDS_MAX)
        os.close(worker)
        assert ended


def open_files(process: str) -> set[Path]:
    """What a process has open. The descriptor that lists them is gone when it is looked at."""
    files = set()
    for link in Path(f"/proc/{process}/fd").iterdir():
        with suppress(FileNotFoundError):
            files.add(link.readlink())
    return files


async def test_the_worker_inherits_nothing_but_its_pipes(tiny_model_dir: Path) -> None:
    lock, other_end = os.pipe()
    os.set_inheritable(lock, True)
    before = open_files("self")
    async with await start(tiny_model_dir) as engine:
        standard_error = Path("/proc/self/fd/2").readlink()  # noqa: ASYNC240 - no disk is behind it
        assert open_files(str(engine.process_id)) & before <= {standard_error}
    os.close(lock)
    os.close(other_end)


async def start_with_folder(model: Path, folder: Path) -> EngineProcess:
    return await EngineProcess.start(
        model, threads=1, kv_memory_bytes=KV_BYTES, kv_folder=folder, kv_disk_bytes=KV_BYTES
    )


REPLY = SamplingParams(20, 0.7, seed=3, ignore_eos=True)


async def test_a_closed_engine_leaves_its_kv_to_the_next_one(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "kv"
    async with await start_with_folder(tiny_model_dir, folder) as first:
        events = await collect(first, LONG[:700], REPLY, 700)
        expected = await first.digest(LONG[:700] + sampled(events))
    async with await start_with_folder(tiny_model_dir, folder) as second:
        path = LONG[:700] + sampled(events)
        assert await second.warm(path) == Prefilled(720, 720, 0)
        assert await second.digest(path) == expected
        await second.forget(path, 300)
        assert (await second.measure()).disk_bytes > 0
        await second.forget(path)
        assert (await second.measure()).disk_bytes == 0


async def test_an_idle_engine_writes_its_kv_before_it_is_killed(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "kv"
    async with await start_with_folder(tiny_model_dir, folder) as first:
        events = await collect(first, LONG[:100], REPLY, 100)
        while not any(folder.glob("*.safetensors")):  # noqa: ASYNC110 - another process writes it
            await asyncio.sleep(0)
        os.kill(first.process_id, signal.SIGKILL)
    async with await start_with_folder(tiny_model_dir, folder) as second:
        path = LONG[:100] + sampled(events)
        assert await second.warm(path) == Prefilled(120, 120, 0)


class Wire:
    """The writing side of a pipe, and a clock to set."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.sink = io.BytesIO()
        self.reports = worker.Reports(self.sink, lambda: self.now_s)

    def step(self, took_s: float, *events: Sampled | Prefilled | Finished) -> None:
        """One step with these events at its end."""
        self.now_s += took_s
        for event in events:
            self.reports.event(1, event)
        self.reports.step_ended(took_s)

    def arrived(self) -> list[object]:
        """What was written since the last call."""
        bodies = pipe.Frames().feed(self.sink.getvalue())
        self.sink.seek(0)
        self.sink.truncate()
        reports = [pipe.decode_report(body) for body in bodies]
        return [report.event for report in reports if isinstance(report, pipe.Event)]


def test_the_first_token_goes_out_at_once_and_the_next_ones_together() -> None:
    wire, tokens = Wire(), [Sampled(number, -0.5) for number in range(9)]
    wire.step(0.06, Prefilled(3, 0, 3), tokens[0])
    assert wire.arrived() == [Prefilled(3, 0, 3), tokens[0]]
    for token in tokens[1:4]:
        wire.step(0.005, token)
        assert wire.arrived() == []
    wire.step(0.0055, tokens[4])
    assert wire.arrived() == tokens[1:5]


def test_a_token_does_not_wait_for_a_step_that_takes_long() -> None:
    wire = Wire()
    for number in range(3):
        wire.step(worker.TOKENS_WAIT_S_MAX + 0.001, Sampled(number, -0.5))
        assert wire.arrived() == [Sampled(number, -0.5)]


def test_the_end_of_a_reply_takes_along_what_waits() -> None:
    wire = Wire()
    wire.step(0.005, Sampled(1, -0.5))
    wire.step(0.005, Sampled(2, -0.5), Finished("end"))
    assert wire.arrived() == [Sampled(1, -0.5), Sampled(2, -0.5), Finished("end")]


def test_an_answer_between_two_steps_keeps_the_order() -> None:
    wire = Wire()
    wire.step(0.005, Sampled(1, -0.5))
    wire.reports.write(pipe.Event(7, pipe.Forgotten()))
    assert wire.arrived() == [Sampled(1, -0.5), pipe.Forgotten()]
    wire.step(0.005)
    wire.reports.flush()
    assert wire.arrived() == []
