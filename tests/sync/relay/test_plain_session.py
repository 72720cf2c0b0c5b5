from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sync.device import Device

from crdt_llm.errors import Forbidden, LocalMisuse, MalformedMessage, Refused, TooLarge
from crdt_llm.sync.relay.plain_session import (
    _TABLE,
    Answer,
    Ask,
    Close,
    GoLive,
    Input,
    Presence,
    PresenceAsked,
    Session,
    State,
    Submit,
    Then,
)
from crdt_llm.sync.update.structure import find_gap, read_update
from crdt_llm.sync.wire.verdict import (
    CloseCode,
    Committed,
    Denied,
    Known,
    Lacking,
    Postponed,
    close_code,
    reason_of,
    shorten,
)
from crdt_llm.sync.wire.y_websocket import (
    FRAME_BYTES_MAX,
    AuthDenied,
    AwarenessState,
    AwarenessUpdate,
    QueryAwareness,
    SyncStep1,
    SyncStep2,
    SyncUpdate,
    decode,
    decode_state_vector,
    encode,
)

if TYPE_CHECKING:
    from crdt_llm.sync.relay.plain_session import Event
    from crdt_llm.sync.wire.verdict import Verdict

NOTHING = b"\0\0"
STEP1 = encode(SyncStep1(b"\0"))
STEP2 = encode(SyncStep2(NOTHING))
UPDATE = encode(SyncUpdate(NOTHING))
FIRST = Submit(NOTHING, answers=True)
LIVE = Submit(NOTHING, answers=False)
GAP = Lacking("waits for something")


def opened() -> Session:
    session = Session()
    assert session.open() == (Ask(),)
    return session


def live() -> Session:
    session = opened()
    assert session.receive(STEP2) == (FIRST,)
    assert session.settle(FIRST, Known()) == (GoLive(),)
    return session


def test_the_server_asks_first() -> None:
    assert opened().state is State.ASKED


def test_a_question_waits_until_the_clients_own_step2_is_durable() -> None:
    session = opened()
    assert session.receive(STEP1) == ()
    assert session.receive(STEP2) == (FIRST,)
    assert session.settle(FIRST, Committed(1)) == (GoLive(), Answer(b"\0"))


def test_of_several_questions_the_last_is_answered() -> None:
    session = opened()
    session.receive(STEP1)
    session.receive(encode(SyncStep1(b"\1\7\5")))
    session.receive(STEP2)
    assert session.settle(FIRST, Known()) == (GoLive(), Answer(b"\1\7\5"))


def test_a_question_while_live_is_answered_at_once() -> None:
    assert live().receive(STEP1) == (Answer(b"\0"),)


def test_what_a_client_types_before_its_step2_is_taken() -> None:
    session = opened()
    assert session.receive(UPDATE) == (LIVE,)
    assert session.settle(LIVE, Committed(1)) == ()
    assert session.state is State.ASKED


def test_a_gap_asks_for_the_rest_and_the_rest_mends_it() -> None:
    session = live()
    session.receive(UPDATE)
    assert session.settle(LIVE, GAP) == (Ask(),)
    assert session.receive(STEP2) == (FIRST,)
    assert session.settle(FIRST, Committed(2)) == (GoLive(),)
    assert session.state is State.LIVE


def test_a_gap_before_the_first_step2_needs_no_second_question() -> None:
    session = opened()
    session.receive(UPDATE)
    assert session.settle(LIVE, GAP) == ()
    session.receive(STEP2)
    assert session.settle(FIRST, Known()) == (GoLive(),)


def test_a_gap_heard_of_while_the_step2_is_checked_is_covered_by_it() -> None:
    session = opened()
    session.receive(UPDATE)
    session.receive(STEP2)
    assert session.settle(LIVE, GAP) == ()
    assert session.settle(FIRST, Known()) == (GoLive(),)


def test_several_gaps_are_one_question() -> None:
    session = live()
    assert session.settle(LIVE, GAP) == (Ask(),)
    assert session.settle(LIVE, GAP) == ()
    session.receive(STEP2)
    assert session.settle(LIVE, GAP) == ()
    assert session.settle(FIRST, Known()) == (GoLive(),)


def test_a_question_waits_while_a_gap_is_mended() -> None:
    session = live()
    session.settle(LIVE, GAP)
    assert session.receive(STEP1) == ()
    session.receive(STEP2)
    assert session.settle(FIRST, Known()) == (GoLive(), Answer(b"\0"))


def test_a_step2_that_still_has_the_gap_ends_with_a_retry_code() -> None:
    session = live()
    session.settle(LIVE, GAP)
    session.receive(STEP2)
    (close,) = session.settle(FIRST, GAP)
    assert isinstance(close, Close)
    assert close.code == CloseCode.TRY_AGAIN
    assert not close.code.is_final
    assert not close.deny
    assert session.receive(UPDATE) == ()
    assert session.settle(LIVE, Known()) == ()


def test_a_first_step2_with_a_gap_is_asked_for_once_more() -> None:
    session = opened()
    session.receive(STEP2)
    assert session.settle(FIRST, GAP) == (Ask(),)
    session.receive(STEP2)
    (close,) = session.settle(FIRST, GAP)
    assert isinstance(close, Close)
    assert close.code == CloseCode.TRY_AGAIN


def test_a_step2_that_nobody_asked_for_is_an_update() -> None:
    session = live()
    assert session.receive(STEP2) == (LIVE,)  # and has no more room than any other
    assert session.settle(LIVE, GAP) == (Ask(),)


REFUSALS = [
    (Refused("clock", "a clock leaps"), CloseCode.REFUSED, "clock: a clock leaps"),
    (Forbidden("forbidden", "not you"), CloseCode.FORBIDDEN, "forbidden: not you"),
    (TooLarge("too-large", "over\na limit"), CloseCode.TOO_LARGE, "too-large: over a limit"),
    (MalformedMessage("no update"), CloseCode.MALFORMED, "malformed: no update"),
]


@pytest.mark.parametrize(("error", "code", "reason"), REFUSALS)
def test_a_refusal_says_why_and_not_to_come_back(
    error: Refused | MalformedMessage, code: CloseCode, reason: str
) -> None:
    session = live()
    assert session.settle(LIVE, Denied(error)) == (Close(code, reason, deny=True),)
    assert code.is_final
    assert session.close(CloseCode.RESTART, "stop") == ()


def test_what_was_put_off_says_come_back() -> None:
    session = live()
    close = Close(CloseCode.TRY_AGAIN, "no space", deny=False)
    assert session.settle(LIVE, Postponed("no space", 1.0)) == (close,)
    assert session.close(CloseCode.RESTART, "stop") == ()


def test_closing_with_a_retry_code_denies_nothing() -> None:
    assert live().close(CloseCode.RESTART, "stop") == (
        Close(CloseCode.RESTART, "stop", deny=False),
    )


def test_presence_passes_in_every_state() -> None:
    states = (AwarenessState(7, 1, "{}"),)
    for session in (opened(), live()):
        assert session.receive(encode(AwarenessUpdate(states))) == (Presence(states),)
        assert session.receive(encode(QueryAwareness())) == (PresenceAsked(),)


def test_a_client_has_nothing_to_deny() -> None:
    (close,) = live().receive(encode(AuthDenied("no")))
    assert isinstance(close, Close)
    assert close.code == CloseCode.MALFORMED


@pytest.mark.parametrize(
    "frame",
    [b"", b"\4", b"\0\3\0", STEP2[:-1], STEP2 + b"\0", bytes(FRAME_BYTES_MAX + 1)],
    ids=["empty", "unknown type", "unknown sync type", "truncated", "two in one", "oversize"],
)
def test_a_malformed_frame_is_final(frame: bytes) -> None:
    session = live()
    (close,) = session.receive(frame)
    assert isinstance(close, Close)
    assert (close.code, close.deny) == (CloseCode.MALFORMED, True)
    assert session.state is State.CLOSED


@given(st.lists(st.binary(max_size=60) | st.sampled_from([STEP1, STEP2, UPDATE])))
def test_any_frames_give_events(frames: list[bytes]) -> None:
    session = opened()
    for frame in frames:
        closed_before = session.state is State.CLOSED
        events = session.receive(frame)
        assert not (closed_before and events)
        assert sum(isinstance(event, Close) for event in events) <= 1
        assert not any(isinstance(event, Close) for event in events[:-1])


def test_a_session_opens_once() -> None:
    with pytest.raises(LocalMisuse, match="asked, but open"):
        opened().open()


def test_the_table_leads_everywhere_and_leaves_only_the_end() -> None:
    reached = {State.NEW} | {state for state, _ in _TABLE.values()}
    assert reached == set(State)
    assert {state for state, _ in _TABLE} == set(State) - {State.CLOSED}
    gives_up = [state for (_, given), (state, then) in _TABLE.items() if then is Then.GIVE_UP]
    assert gives_up == [State.CLOSED]
    # Whoever is asked answers with a Step2, whose verdict is always expected.
    for state in (State.ASKED, State.ASKED_AGAIN):
        checking, _ = _TABLE[state, Input.STEP2]
        assert {Input.DONE, Input.STEP2_GAP} <= {given for at, given in _TABLE if at is checking}


@given(st.data())
def test_no_order_of_honest_frames_and_verdicts_is_a_bug_of_ours(data: st.DataObject) -> None:
    """The room settles in order, at any time; verdicts are what a room could say."""
    session = opened()
    submitted: list[Submit] = []
    live_once = False
    for _ in range(data.draw(st.integers(0, 30))):
        settles = submitted and data.draw(st.sampled_from([True, False]))
        if settles:
            verdicts: list[Verdict] = [Committed(1), Known(), GAP]
            verdict = data.draw(st.sampled_from(verdicts))
            events = session.settle(submitted.pop(0), verdict)
        else:
            events = session.receive(data.draw(st.sampled_from([STEP1, STEP2, UPDATE])))
        for event in events:
            live_once |= isinstance(event, GoLive)
            if isinstance(event, Answer):
                assert live_once
            if isinstance(event, Submit):
                submitted.append(event)


class FakeLink:
    """A client core and the server's session, with a replica where the room would be."""

    def __init__(self, seed: int) -> None:
        random = Random(seed)
        self.device, self.server = Device(random), Device(random)
        self.session = Session()
        self.to_server: list[bytes] = []
        self.closed: Close | None = None

    def open(self) -> None:
        self.device.connect()
        self.follow(self.session.open())

    def follow(self, events: tuple[Event, ...]) -> None:
        for event in events:
            match event:
                case Submit(update):
                    gap = find_gap(read_update(update), decode_state_vector(self.state_vector))
                    if gap is None:
                        self.server.replica.apply(update)
                    verdict = Committed(1) if gap is None else Lacking(str(gap))
                    self.follow(self.session.settle(event, verdict))
                case Ask():
                    self.device.take(encode(SyncStep1(self.state_vector)))
                case Answer(state_vector):
                    self.device.take(encode(SyncStep2(self.server.replica.diff(state_vector))))
                case Close():
                    self.closed = event
                case _:
                    pass

    @property
    def state_vector(self) -> bytes:
        return self.server.replica.state_vector()

    def run(self, drop: Random | None = None) -> None:
        while frames := self.device.frames():
            for frame in frames:
                lossy = drop is not None and isinstance(decode(frame), SyncUpdate)
                if drop is None or not lossy or drop.random() < 0.6:
                    self.follow(self.session.receive(frame))


@pytest.mark.parametrize("seed", range(20))
def test_two_cores_end_equal_also_over_a_link_that_loses_updates(seed: int) -> None:
    link = FakeLink(seed)
    link.server.give_birth()
    link.device.merge(link.server.replica.diff())
    link.server.say("from elsewhere")
    link.open()
    link.run()
    drop = Random(seed)
    for number in range(10):
        link.device.say(f"line {number}")
        link.run(drop)
    if link.closed is None:
        # A gap was mended on the way; what was lost last shows with the next write.
        link.device.say("the last")
        link.run()
        assert link.device.texts == link.server.texts
    else:
        assert link.closed.code == CloseCode.TRY_AGAIN


def test_close_codes_and_reasons_fit_a_close_frame() -> None:
    assert shorten("ä" * 100, 123) == "ä" * 61
    assert shorten("short", 123) == "short"
    assert close_code(LocalMisuse("a bug")) == CloseCode.INTERNAL_ERROR
    assert reason_of(LocalMisuse("two\nlines")) == "two lines"
