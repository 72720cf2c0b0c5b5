from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sync.native import open_frame, update_frame

from crdt_llm.errors import Forbidden, LocalMisuse, MalformedMessage, Refused, TooLarge
from crdt_llm.sync.relay import native_session as native_session_module
from crdt_llm.sync.relay.native_session import (
    _PHASES,
    _STAGES,
    LEFT,
    ChannelInput,
    Close,
    Enter,
    Exit,
    Greet,
    NativeSession,
    Phase,
    Send,
    Stage,
    Submit,
    code_of,
)
from crdt_llm.sync.wire.frames import (
    Ack,
    Closed,
    Code,
    Draft,
    Hello,
    Leave,
    Nack,
    Opened,
    Presence,
    Pull,
    Renew,
    Request,
    Restore,
    WantLease,
    Watch,
    Welcome,
    encode,
)
from crdt_llm.sync.wire.verdict import CloseCode, Committed, Denied, Known, Lacking, Postponed

if TYPE_CHECKING:
    from crdt_llm.sync.relay.native_session import Event
    from crdt_llm.sync.wire.frames import FromClient
    from crdt_llm.sync.wire.verdict import Verdict

HELLO = Hello(1, "token", "phone", None)
WELCOME = Welcome(1, "owner", b"k" * 32, None, "log")
OPENED = Opened(1, "log", 0, b"\0\0", b"\0", "owner", behind=False)


def take(session: NativeSession, frame: FromClient) -> tuple[Event, ...]:
    return session.receive(encode(frame))


def live(*, node: bool = False) -> NativeSession:
    session = NativeSession()
    take(session, HELLO)
    session.accept(WELCOME, node=node)
    return session


def with_channel(*, node: bool = False) -> NativeSession:
    session = live(node=node)
    take(session, open_frame())
    session.opened(OPENED)
    return session


def settle(session: NativeSession, number: int, verdict: Verdict) -> tuple[Event, ...]:
    submit = Submit(1, number, b"", is_restore=False, is_document=False)
    return session.settle(submit, verdict, lsn=9, state_vector=b"\0")


def test_a_hello_is_looked_at_and_answered() -> None:
    session = NativeSession()
    assert take(session, HELLO) == (Greet(HELLO),)
    assert session.accept(WELCOME, node=False) == (Send(WELCOME),)
    assert take(session, HELLO) == (Greet(HELLO),)
    assert session.accept(WELCOME, node=False) == (Send(WELCOME),)


@pytest.mark.parametrize(
    "frame", [open_frame(), update_frame(1, b""), Leave(1), Watch(on=True), Renew()]
)
def test_nothing_is_understood_before_a_hello(frame: FromClient) -> None:
    session = NativeSession()
    (close,) = take(session, frame)
    assert isinstance(close, Close)
    assert close.code is CloseCode.MALFORMED
    assert take(session, HELLO) == ()


def test_one_hello_at_a_time() -> None:
    session = NativeSession()
    take(session, HELLO)
    (close,) = take(session, HELLO)
    assert isinstance(close, Close)


def test_another_version_is_refused() -> None:
    (close,) = take(NativeSession(), Hello(2, "token", "phone", None))
    assert isinstance(close, Close)
    assert "version 1" in close.reason


def test_a_connection_keeps_its_principal() -> None:
    session = live()
    take(session, HELLO)
    (close,) = session.accept(Welcome(1, "friend", b"k" * 32, None, "log"), node=False)
    assert isinstance(close, Close)
    assert close.code is CloseCode.UNAUTHENTICATED


@pytest.mark.parametrize(
    "frame",
    [
        update_frame(1, b"x"),
        Restore(1, 1, b"x"),
        Pull(1, b"\0"),
        Presence(1, ()),
        Draft(1, "", 0, "x"),
    ],
)
def test_a_channel_is_used_once_it_is_open(frame: FromClient) -> None:
    session = live()
    assert take(session, frame) == ()
    assert take(session, open_frame()) == (Enter(open_frame()),)
    exited, closed = take(session, frame)
    assert exited == Exit(1)
    assert isinstance(closed, Send)
    assert isinstance(closed.frame, Closed)
    assert closed.frame.code == CloseCode.MALFORMED
    assert take(session, frame) == ()
    take(session, open_frame())
    session.opened(OPENED)
    (passed,) = take(session, frame)
    assert isinstance(passed, Submit) or passed == frame


def test_a_number_in_use_is_not_opened_again() -> None:
    (close,) = take(with_channel(), open_frame())
    assert isinstance(close, Close)


def test_a_conversation_is_open_on_one_channel_at_most() -> None:
    session = with_channel()
    (refused,) = take(session, open_frame(2))
    assert isinstance(refused, Send)
    assert isinstance(refused.frame, Closed)
    assert (refused.frame.channel, refused.frame.code) == (2, CloseCode.MALFORMED)
    assert session.phase is Phase.LIVE
    assert take(session, update_frame(1, b"", 2)) == ()
    take(session, Leave(1))
    assert take(session, open_frame(2)) == (Enter(open_frame(2)),)


def test_channels_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_session_module, "CHANNELS_MAX", 1)
    (refused,) = take(with_channel(), open_frame(2))
    assert isinstance(refused, Send)
    assert isinstance(refused.frame, Closed)
    assert refused.frame.code == CloseCode.TRY_AGAIN


def test_leaving_is_answered_once() -> None:
    session = with_channel()
    assert take(session, Leave(1)) == (Exit(1), Send(Closed(1, LEFT, "left")))
    assert take(session, Leave(1)) == ()


def test_ids_grow() -> None:
    session = with_channel()
    assert take(session, update_frame(5, b"x")) == (Submit(1, 5, b"x", False, False),)
    exited, _ = take(session, update_frame(5, b"x"))
    assert exited == Exit(1)


def test_an_id_of_nothing_is_not_taken() -> None:
    exited, _ = take(with_channel(), update_frame(0, b"x"))
    assert exited == Exit(1)


@pytest.mark.parametrize("verdict", [Committed(9), Known()])
def test_what_is_durable_is_acknowledged(verdict: Verdict) -> None:
    assert settle(with_channel(), 3, verdict) == (Send(Ack(1, 3, 9)),)


def test_a_gap_says_what_there_is_and_what_mends_it_may_be_large() -> None:
    session = with_channel()
    gap = Nack(1, 1, Code.GAP, "", "an origin is missing", None, b"\0")
    assert settle(session, 1, Lacking("an origin is missing")) == (Send(gap),)
    (mends,) = take(session, update_frame(2, b"x"))
    assert isinstance(mends, Submit)
    assert mends.is_document
    settle(session, 2, Committed(9))
    (usual,) = take(session, update_frame(3, b"x"))
    assert isinstance(usual, Submit)
    assert not usual.is_document


def test_what_was_put_off_may_come_again_after_a_pause() -> None:
    nack = Nack(1, 1, Code.UNAVAILABLE, "", "no space", 250, None)
    session = with_channel()
    assert settle(session, 1, Postponed("no\nspace", 0.25)) == (Send(nack),)
    (same,) = take(session, update_frame(2, b"x"))
    assert isinstance(same, Submit)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (Refused("born", "x"), Code.INVALID),
        (Forbidden("forbidden", "x"), Code.DENIED),
        (TooLarge("too-large", "x"), Code.TOO_LARGE),
        (Refused("stale-epoch", "x"), Code.STALE_EPOCH),
        (Forbidden("stale-epoch", "x"), Code.STALE_EPOCH),
        (MalformedMessage("x"), Code.INVALID),
    ],
)
def test_a_refusal_says_what_to_do(error: Refused | MalformedMessage, code: Code) -> None:
    assert code_of(error) is code
    (sent,) = settle(with_channel(), 1, Denied(error))
    assert isinstance(sent, Send)
    assert isinstance(sent.frame, Nack)
    assert sent.frame.code is code
    assert sent.frame.reason == "x"


def test_a_long_reason_fits_its_frame() -> None:
    (sent,) = settle(with_channel(), 1, Denied(Refused("born", "ä\n" * 5_000)))
    assert isinstance(sent, Send)
    encode(sent.frame)
    (closed,) = with_channel().end(1, CloseCode.FORBIDDEN, "ä" * 5_000)
    assert isinstance(closed, Send)
    encode(closed.frame)


def test_only_nodes_speak_of_leases() -> None:
    for frame in (WantLease(1, hold=True), Renew()):
        (close,) = take(with_channel(), frame)
        assert isinstance(close, Close)
        assert close.code is CloseCode.FORBIDDEN
        assert take(with_channel(node=True), frame) == (frame,)


def test_what_the_session_has_no_part_in_is_passed_on() -> None:
    for frame in (Watch(on=True), Request(1, "archive", {})):
        assert take(live(), frame) == (frame,)


def test_after_the_end_nothing_happens() -> None:
    session = with_channel()
    assert session.close(CloseCode.RESTART, "x") == (Close(CloseCode.RESTART, "x"),)
    assert session.close(CloseCode.RESTART, "x") == ()
    assert take(session, update_frame(1, b"x")) == ()


def test_our_own_mistakes_are_ours() -> None:
    with pytest.raises(LocalMisuse):
        NativeSession().accept(WELCOME, node=False)
    with pytest.raises(LocalMisuse):
        live().opened(OPENED)
    with pytest.raises(LocalMisuse):
        live().end(1, CloseCode.FORBIDDEN, "x")
    with pytest.raises(LocalMisuse):
        settle(live(), 1, Known())


def test_the_tables_lead_everywhere() -> None:
    assert {Phase.NEW, *_PHASES.values()} == set(Phase) - {Phase.CLOSED}
    assert set(_STAGES.values()) == set(Stage)
    assert {given for _, given in _STAGES} == set(ChannelInput)


@given(st.lists(st.binary(max_size=40), max_size=10))
def test_any_bytes_lead_to_an_orderly_end(frames: list[bytes]) -> None:
    session = NativeSession()
    for frame in frames:
        for event in session.receive(frame):
            assert isinstance(event, Close | Greet)
