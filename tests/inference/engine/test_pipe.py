"""What crosses the engine's pipe comes out as it went in, and nothing else gets through."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crdt_llm.errors import (
    EngineBusy,
    LocalMisuse,
    MalformedMessage,
    ModelUnusable,
    PromptTooLong,
)
from crdt_llm.inference.contract import (
    Capabilities,
    Finished,
    KvDigest,
    Prefilled,
    Queued,
    Sampled,
    SamplingParams,
    Scored,
)
from crdt_llm.inference.engine import pipe

if TYPE_CHECKING:
    from crdt_llm.errors import (
        CrdtLlmError,
    )

IDS = pipe.pack_ids([0, 1, 2**32 - 1])
PARAMS = SamplingParams(9, 0.7, 0.9, 40, 2**64 - 1, frozenset({2, 1}), ignore_eos=True)

COMMANDS: list[pipe.Command] = [
    pipe.Warm(0, IDS),
    pipe.Generate(1, IDS, 2, PARAMS),
    pipe.Generate(1, IDS, 2, SamplingParams(1)),
    pipe.Digest(2, b""),
    pipe.Score(2, IDS, 1),
    pipe.Cancel(3),
    pipe.Forget(4, IDS, 1),
    pipe.Measure(5),
]
REPORTS: list[pipe.Report] = [
    pipe.Ready(Capabilities("f" * 32, 2, 8192, 49152, "int8")),
    pipe.Event(1, Prefilled(3, 1, 2)),
    pipe.Event(1, Sampled(7, -0.25)),
    pipe.Event(1, Finished("end")),
    pipe.Event(2, KvDigest(b"k" * 32, b"l" * 32)),
    pipe.Event(2, Scored(b"p" * 4, b"i" * 4)),
    pipe.Event(3, pipe.Forgotten()),
    pipe.Event(4, Queued(3)),
    pipe.Event(4, pipe.Measured(1, 2, 300, 4000, 50_000)),
    pipe.Event(pipe.NO_REQUEST, pipe.Failed("ModelUnusable", "no")),
]


def body_of(frame: bytes) -> bytes:
    assert pipe.decode_length(frame[:4]) == len(frame) - 4
    return frame[4:]


@pytest.mark.parametrize("command", COMMANDS, ids=repr)
def test_a_command_comes_out_as_it_went_in(command: pipe.Command) -> None:
    assert pipe.decode_command(body_of(pipe.encode(command))) == command
    with pytest.raises(MalformedMessage):
        pipe.decode_report(body_of(pipe.encode(command)))


@pytest.mark.parametrize("report", REPORTS, ids=repr)
def test_a_report_comes_out_as_it_went_in(report: pipe.Report) -> None:
    assert pipe.decode_report(body_of(pipe.encode(report))) == report
    with pytest.raises(MalformedMessage):
        pipe.decode_command(body_of(pipe.encode(report)))


@given(st.lists(st.integers(0, 2**32 - 1)))
def test_ids_come_out_as_they_went_in(ids: list[int]) -> None:
    assert pipe.unpack_ids(pipe.pack_ids(ids)).tolist() == ids


@pytest.mark.parametrize("ids", [[-1], [2**32]])
def test_ids_beyond_32_bits_are_refused(ids: list[int]) -> None:
    with pytest.raises(LocalMisuse):
        pipe.pack_ids(ids)


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.binary(max_size=8)
    | st.sampled_from([*pipe._KINDS, "", "end", "Nothing"]),
    lambda inner: st.lists(inner, max_size=8),
    max_leaves=20,
)


@given(st.binary(max_size=64) | PLAIN.map(msgpack.packb))
def test_decoding_is_total(body: bytes) -> None:
    for decode in (pipe.decode_command, pipe.decode_report):
        try:
            message = decode(body)
        except MalformedMessage:
            continue
        assert isinstance(message, pipe.Command | pipe.Report)


@pytest.mark.parametrize("error", [EngineBusy, LocalMisuse, ModelUnusable, PromptTooLong])
def test_an_error_keeps_its_class_and_its_sentence(error: type[CrdtLlmError]) -> None:
    arrived = pipe.Failed.of(error("what happened, and what to do")).to_error()
    assert type(arrived) is error
    assert str(arrived) == "what happened, and what to do"


def test_frames_are_limited() -> None:
    too_long = (pipe.FRAME_BYTES_MAX + 1).to_bytes(4, "little")
    with pytest.raises(MalformedMessage):
        pipe.decode_length(too_long)
    with pytest.raises(LocalMisuse):
        pipe.encode(pipe.Warm(0, bytes(pipe.FRAME_BYTES_MAX)))


@given(st.lists(st.sampled_from(REPORTS), max_size=6), st.data())
def test_frames_come_out_whole_however_they_are_cut(
    reports: list[pipe.Report], data: st.DataObject
) -> None:
    stream = b"".join(map(pipe.encode, reports))
    frames, bodies, begin = pipe.Frames(), [], 0
    while begin < len(stream):
        end = data.draw(st.integers(begin + 1, len(stream)))
        bodies += frames.feed(stream[begin:end])
        begin = end
    assert [pipe.decode_report(body) for body in bodies] == reports


def test_a_frame_over_the_limit_is_refused_at_its_head() -> None:
    with pytest.raises(MalformedMessage):
        pipe.Frames().feed((pipe.FRAME_BYTES_MAX + 1).to_bytes(4, "little"))
