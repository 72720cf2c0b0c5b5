"""A conversation on a connection, frame by frame: phases, answers, refusals and pauses."""

from __future__ import annotations

from itertools import count
from random import Random
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crdt_llm.errors import LocalMisuse, MalformedMessage, TooLarge
from crdt_llm.sync.client.channel import (
    DROP_DRAFT_S,
    PAUSE_MS,
    PAUSE_MS_MAX,
    RENEW_S,
    WINDOW,
    Channel,
    CompanyChanged,
    Lacks,
    NotRestored,
    Phase,
    Rejected,
    Settled,
)
from crdt_llm.sync.client.local_replica import Written
from crdt_llm.sync.client.presence import Company
from crdt_llm.sync.wire.frames import (
    DRAFT_BYTES_MAX,
    Ack,
    Change,
    Closed,
    Code,
    Draft,
    Leave,
    Nack,
    Open,
    Opened,
    Presence,
    Pull,
    Restore,
    State,
    Update,
)
from crdt_llm.sync.wire.verdict import shorten
from crdt_llm.sync.wire.y_websocket import UPDATE_BYTES_MAX, AwarenessState

if TYPE_CHECKING:
    from crdt_llm.sync.client.channel import Event
    from crdt_llm.sync.wire.frames import FromClient

NUMBER = 3
SV = b"\x00"
OPENED = Opened(NUMBER, "log", 5, b"update", SV, "owner", False)
CHANGE = Change(NUMBER, 6, b"update")
STATE = State(NUMBER, 7, b"update")
CLOSED = Closed(NUMBER, 1013, "later")
SOMEBODY = Presence(NUMBER, (AwarenessState(9, 1, '{"device":"laptop"}'),))


def nack(identity: int, code: Code, retry_ms: int | None = None) -> Nack:
    state_vector = SV if code is Code.GAP else None
    return Nack(NUMBER, identity, code, "rule", "reason", retry_ms, state_vector)


class Desk:
    """A channel, its outbox, and a clock."""

    def __init__(self, *numbers: int) -> None:
        self.outbox = list(numbers)
        self.now_s = 0.0
        self.channel = Channel(NUMBER, Company(1, "phone"), self._next)

    def _next(self, after: int) -> Written | None:
        number = next((number for number in self.outbox if number > after), None)
        if number is None:
            return None
        return Written(number, f"write {number}".encode(), (), {}, deletes=False)

    def at(self, phase: Phase) -> Desk:
        """Bring the channel to a phase, with everything sent that there was to send."""
        channel = self.channel
        if phase is Phase.NEW:
            return self
        channel.open("conversation", "log", 4, SV)
        self.sent()
        if phase is Phase.OPENING:
            return self
        self.hear(OPENED)
        if phase is Phase.MERGING:
            return self
        channel.opened(b"lost" if phase in {Phase.RESTORING, Phase.STALLED} else None)
        self.sent()
        if phase is Phase.STALLED:
            self.hear(nack(1, Code.INVALID))
        if phase is Phase.PULLING:
            self.hear(CHANGE)
            channel.merged(CHANGE, gap=True, state_vector=SV)
            self.sent()
        if phase is Phase.CLOSED:
            channel.leave()
            self.sent()
        return self

    def hear(self, frame: Opened | Change | State | Ack | Nack | Presence | Closed) -> Event | None:
        return self.channel.receive(frame, self.now_s)

    def sent(self) -> list[FromClient]:
        """All that it sends now, but for who is here."""
        frames: list[FromClient] = []
        while (frame := self.channel.take(self.now_s)) is not None:
            if not isinstance(frame, Presence):
                frames.append(frame)
        return frames

    def written(self) -> list[tuple[int, bytes]]:
        """The updates that it sends now: their ids, and what they say."""
        sent = self.sent()
        assert all(isinstance(frame, Update) for frame in sent)
        return [(frame.id, frame.update) for frame in sent if isinstance(frame, Update)]


def write(identity: int, number: int) -> tuple[int, bytes]:
    return identity, f"write {number}".encode()


# -- phases ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", Phase)
def test_what_may_arrive_when(phase: Phase) -> None:
    online = {Phase.LIVE, Phase.PULLING, Phase.RESTORING, Phase.STALLED}
    for frame, allowed in ((OPENED, {Phase.OPENING}), (CHANGE, online), (STATE, online)):
        desk = Desk().at(phase)
        assert desk.channel.phase is phase
        if phase is Phase.CLOSED:  # it crossed our leaving
            assert desk.hear(frame) is None
        elif phase in allowed:
            assert desk.hear(frame) is frame
        else:
            with pytest.raises(MalformedMessage):
                desk.hear(frame)
    desk = Desk().at(phase)
    assert desk.hear(SOMEBODY) == (None if phase is Phase.CLOSED else CompanyChanged())
    assert desk.hear(CLOSED) is CLOSED
    assert desk.channel.phase is Phase.CLOSED
    assert desk.sent() == []


@pytest.mark.parametrize("phase", Phase)
def test_what_goes_out_when(phase: Phase) -> None:
    desk = Desk().at(phase)
    desk.now_s = 2 * RENEW_S
    desk.outbox.append(1)
    frames = [type(frame) for frame in iter(lambda: desk.channel.take(desk.now_s), None)]
    silent = phase in {Phase.NEW, Phase.OPENING, Phase.MERGING, Phase.CLOSED}
    assert frames == (
        [] if silent else [Presence, Update] if desk.channel.is_writable else [Presence]
    )
    assert desk.channel.is_writable == (phase in {Phase.LIVE, Phase.PULLING})
    assert desk.channel.is_synced == (phase in {Phase.LIVE, Phase.RESTORING, Phase.STALLED})
    due_s = desk.channel.due_s(desk.now_s)
    assert due_s == (float("inf") if silent else desk.now_s + RENEW_S)


@pytest.mark.parametrize("phase", Phase)
def test_leaving_is_said_once_if_it_was_opened(phase: Phase) -> None:
    desk = Desk(1).at(phase)
    desk.channel.leave()
    assert desk.sent() == ([] if phase in {Phase.NEW, Phase.CLOSED} else [Leave(NUMBER)])
    desk.channel.leave()
    assert desk.sent() == []


def test_a_channel_is_opened_once() -> None:
    channel = Desk().channel
    channel.open("conversation", None, 0, SV)
    assert channel.take(0.0) == Open(NUMBER, "conversation", None, 0, SV)
    with pytest.raises(LocalMisuse):
        channel.open("conversation", None, 0, SV)


def test_a_gap_is_asked_for_once() -> None:
    desk = Desk(1).at(Phase.LIVE)
    for _ in range(3):
        desk.hear(CHANGE)
        desk.channel.merged(CHANGE, gap=True, state_vector=b"have")
    assert desk.sent() == [Pull(NUMBER, b"have")]
    desk.hear(STATE)
    desk.channel.merged(STATE, gap=False, state_vector=b"have")
    assert desk.channel.phase is Phase.LIVE
    desk.hear(STATE)
    with pytest.raises(MalformedMessage):  # that was all that it has
        desk.channel.merged(STATE, gap=True, state_vector=b"have")


# -- writes ----------------------------------------------------------------------------------------


def test_only_so_many_wait_for_an_answer() -> None:
    desk = Desk(*range(10, 10 + 2 * WINDOW)).at(Phase.MERGING)
    desk.channel.opened(None)
    assert desk.written() == [write(n + 1, 10 + n) for n in range(WINDOW)]
    assert desk.hear(Ack(NUMBER, 2, 9)) == Settled((10, 11))
    assert desk.hear(Ack(NUMBER, 2, 9)) is None
    assert desk.written() == [write(WINDOW + n, 9 + WINDOW + n) for n in (1, 2)]


@pytest.mark.parametrize("code", [Code.UNAVAILABLE, Code.RATE_LIMITED])
def test_not_now_means_the_same_again_after_the_pause(code: Code) -> None:
    desk = Desk(1, 2, 3).at(Phase.LIVE)
    assert desk.hear(Ack(NUMBER, 1, 1)) == Settled((1,))
    assert desk.hear(nack(2, code, 500)) is None
    assert desk.hear(nack(3, Code.GAP)) is None  # it built on what was not taken
    assert desk.written() == []
    assert desk.channel.due_s(desk.now_s) == 0.5
    desk.now_s = 0.5
    assert desk.written() == [write(4, 2), write(5, 3)]
    assert desk.hear(Ack(NUMBER, 5, 3)) == Settled((2, 3))


@pytest.mark.parametrize(
    ("said", "pause_ms"), [(None, PAUSE_MS), (0, 0), (10**9, PAUSE_MS_MAX), (7, 7)]
)
def test_a_pause_is_believed_up_to_a_limit(said: int | None, pause_ms: int) -> None:
    desk = Desk(1).at(Phase.LIVE)
    desk.hear(nack(1, Code.UNAVAILABLE, said))
    desk.now_s = pause_ms / 1000 - 0.001
    assert pause_ms == 0 or desk.written() == []
    desk.now_s = pause_ms / 1000
    assert desk.written() == [write(2, 1)]


def test_what_the_relay_lacks_is_sent_once_as_a_whole() -> None:
    desk = Desk(1, 2).at(Phase.LIVE)
    assert desk.hear(nack(1, Code.GAP)) == Lacks(SV)
    assert desk.hear(nack(2, Code.GAP)) is None
    desk.outbox.append(3)
    assert desk.written() == []  # until it is known what is lacking
    desk.channel.catch_up(b"everything", (1, 2))
    assert desk.sent() == [Update(NUMBER, 3, b"everything"), Update(NUMBER, 4, b"write 3")]
    assert desk.hear(Ack(NUMBER, 3, 1)) == Settled((1, 2))
    assert desk.hear(nack(4, Code.GAP)) == Lacks(SV)  # another time is another matter
    desk.channel.catch_up(b"everything", (3,))
    desk.sent()
    with pytest.raises(MalformedMessage):
        desk.hear(nack(5, Code.GAP))


def test_a_gap_without_what_is_there_cannot_be_filled() -> None:
    desk = Desk(1).at(Phase.LIVE)
    with pytest.raises(MalformedMessage):
        desk.hear(Nack(NUMBER, 1, Code.GAP, "", "", None, None))


REFUSALS = (Code.DENIED, Code.INVALID, Code.TOO_LARGE, Code.STALE_EPOCH)


@pytest.mark.parametrize("code", REFUSALS)
def test_a_refusal_is_told_when_all_behind_it_is_answered(code: Code) -> None:
    desk = Desk(1, 2, 3, 4).at(Phase.LIVE)
    assert desk.hear(Ack(NUMBER, 1, 1)) == Settled((1,))
    assert desk.hear(nack(2, code)) is None
    desk.outbox.append(5)
    assert desk.written() == []
    assert desk.hear(nack(3, Code.GAP)) is None
    assert desk.hear(Ack(NUMBER, 4, 2)) == Rejected((2,), code, "rule", "reason", (4,))
    desk.outbox = [6, 7]  # what is left was written anew
    desk.channel.restart(carefully=True)
    assert desk.written() == [write(5, 6)]  # one by one
    assert desk.hear(Ack(NUMBER, 5, 3)) == Settled((6,))
    assert desk.written() == [write(6, 7)]


def test_a_refusal_of_the_last_is_told_at_once() -> None:
    desk = Desk(1).at(Phase.LIVE)
    assert desk.hear(nack(1, Code.DENIED)) == Rejected((1,), "denied", "rule", "reason")
    assert desk.hear(nack(1, Code.DENIED)) is None  # a second time is about nothing


def test_what_was_on_its_way_when_the_outbox_was_written_anew_is_not_listened_to() -> None:
    desk = Desk(1, 2).at(Phase.LIVE)
    desk.outbox = [3]
    desk.channel.restart(carefully=False)
    assert desk.hear(nack(1, Code.DENIED)) is None
    assert desk.written() == [write(3, 3)]
    assert desk.hear(nack(2, Code.GAP)) is None
    assert desk.hear(Ack(NUMBER, 3, 1)) == Settled((3,))


def test_too_much_for_a_frame_is_said() -> None:
    much = bytes(UPDATE_BYTES_MAX + 1)
    desk = Desk().at(Phase.MERGING)
    with pytest.raises(TooLarge):
        desk.channel.opened(much)
    desk = Desk(1).at(Phase.LIVE)
    desk.hear(nack(1, Code.GAP))
    with pytest.raises(TooLarge):
        desk.channel.catch_up(much, (1,))


class Play:
    """A relay that takes, refuses, lacks and is busy as it likes, and the client that hears of it.

    Each write has a meaning, which stays when it is written anew. A write builds on all earlier
    ones that are good.
    """

    def __init__(self, seed: int, writes: int, busy: int) -> None:
        self._random = Random(seed)
        self._busy = busy  # so often at most, so that it ends
        self._is_ever_busy = busy > 0
        self.meanings = range(1, writes + 1)
        self.bad = {meaning for meaning in self.meanings if self._random.random() < 0.1}
        self.taken: set[int] = set()
        self.settled: list[int] = []  # as the client was told
        self.refused: list[int] = []
        self.desk = Desk(*self.meanings).at(Phase.MERGING)
        self.desk.channel.opened(None)
        self._means = {number: number for number in self.meanings}
        self._fresh = count(writes + 1)
        self._wholes: dict[bytes, tuple[int, ...]] = {}
        self._merged: Ack | None = None  # an answer that waits for a later one
        self.waiting: list[tuple[int, tuple[int, ...]]] = []

    def send(self) -> None:
        for identity, update in self.desk.written():
            numbers = self._wholes.get(update) or (int(update.split()[1]),)
            self.waiting.append((identity, tuple(self._means[number] for number in numbers)))

    def answer(self) -> None:
        """Answer one; as many answers as there are Nacks, but several may share an Ack."""
        identity, meant = self.waiting.pop(0)
        verdict = self._judge(identity, meant)
        if isinstance(verdict, Ack):
            self.taken.update(meant)
            self._merged = verdict
            if self.waiting and self._random.random() < 0.5:
                return
        if self._merged is not None:
            self._hear(self._merged)
        self._merged = None
        if isinstance(verdict, Nack):
            self._hear(verdict)

    def _judge(self, identity: int, meant: tuple[int, ...]) -> Ack | Nack:
        if self._busy and self._random.random() < 0.1:
            self._busy -= 1
            return nack(identity, Code.UNAVAILABLE, 10)
        if set(range(1, min(meant))) - self.bad - self.taken:
            return nack(identity, Code.GAP)
        if self.bad.intersection(meant):
            return nack(identity, Code.INVALID)
        return Ack(NUMBER, identity, 1)

    def _hear(self, answer: Ack | Nack) -> None:
        match self.desk.hear(answer):
            case Settled(numbers):
                self._settle(numbers)
            case Rejected(numbers, _, _, _, settled):
                self._settle(settled)
                self._refuse(numbers)
            case Lacks():
                everything = f"all {answer.id}".encode()
                self._wholes[everything] = tuple(self.desk.outbox)
                self.desk.channel.catch_up(everything, self._wholes[everything])

    def _settle(self, numbers: tuple[int, ...]) -> None:
        self.settled += [self._means[number] for number in numbers]
        self.desk.outbox = [number for number in self.desk.outbox if number not in numbers]

    def _refuse(self, numbers: tuple[int, ...]) -> None:
        """What came as one comes apart again; the rest is written anew."""
        gone = {number for number in numbers if self._means[number] in self.bad}
        self.refused += [self._means[number] for number in gone]
        left = [self._means[number] for number in self.desk.outbox if number not in gone]
        if not self._is_ever_busy:  # else it may be sent twice (K2)
            assert not self.taken.intersection(left)
        self._means = {next(self._fresh): meaning for meaning in left}
        self.desk.outbox = list(self._means)
        self.desk.channel.restart(carefully=True)


@given(st.integers(0, 2**32), st.integers(1, 200), st.sampled_from((0, 60)))
def test_every_write_is_taken_or_refused_once_whatever_the_relay_answers(
    seed: int, writes: int, busy: int
) -> None:
    play = Play(seed, writes, busy)
    while play.desk.outbox:
        play.send()
        assert len(play.waiting) <= 2 * WINDOW + 1  # a window, and one that was forgotten
        if play.waiting:
            play.answer()
        else:
            play.desk.now_s = play.desk.channel.due_s(play.desk.now_s)
    assert sorted(play.settled) == sorted(set(play.meanings) - play.bad)
    assert sorted(play.refused) == sorted(play.bad)
    assert play.taken == set(play.settled)


# -- what the relay lost ---------------------------------------------------------------------------


def test_what_was_lost_goes_first_and_alone() -> None:
    desk = Desk(1).at(Phase.MERGING)
    desk.channel.opened(b"lost")
    assert desk.sent() == [Restore(NUMBER, 1, b"lost")]
    assert desk.hear(Ack(NUMBER, 1, 1)) == Settled(())
    assert desk.channel.phase is Phase.LIVE
    assert desk.written() == [write(2, 1)]


def test_a_restore_that_has_to_wait_is_sent_again() -> None:
    desk = Desk(1).at(Phase.RESTORING)
    assert desk.hear(nack(1, Code.UNAVAILABLE, 100)) is None
    assert desk.sent() == []
    desk.now_s = 0.1
    assert desk.sent() == [Restore(NUMBER, 2, b"lost")]
    assert desk.hear(Ack(NUMBER, 2, 1)) == Settled(())


@pytest.mark.parametrize("code", [*REFUSALS, Code.GAP])
def test_a_restore_that_is_refused_ends_writing_and_nothing_else(code: Code) -> None:
    desk = Desk(1).at(Phase.RESTORING)
    assert desk.hear(nack(1, code)) == NotRestored(code, "reason")
    assert desk.channel.phase is Phase.STALLED
    assert desk.written() == []
    assert desk.hear(CHANGE) is CHANGE
    desk.channel.merged(CHANGE, gap=True, state_vector=SV)
    assert desk.sent() == [Pull(NUMBER, SV)]


# -- drafts and presence ---------------------------------------------------------------------------


def test_presence_is_said_again_in_time() -> None:
    channel = Desk().at(Phase.LIVE).channel
    assert channel.take(RENEW_S - 1) is None
    assert isinstance(channel.take(RENEW_S), Presence)
    assert channel.take(RENEW_S) is None


def test_a_draft_is_dropped_only_after_the_message_had_time_to_come() -> None:
    desk = Desk().at(Phase.OPENING)
    channel = desk.channel
    channel.draft("entry", "Hello")
    assert channel.draft_due_s(0.0) == float("inf")  # not before the conversation is here
    desk.hear(OPENED)
    channel.opened(None)
    assert channel.draft_due_s(1.0) == 1.0
    assert channel.take_draft() == Draft(NUMBER, "entry", 0, "Hello")
    assert channel.draft_due_s(1.0) == float("inf")
    channel.draft("entry", "")
    assert channel.draft_due_s(2.0) == 2.0 + DROP_DRAFT_S
    assert channel.draft_due_s(2.5) == 2.0 + DROP_DRAFT_S
    channel.draft("entry", "Hello")  # back again before anybody noticed
    assert channel.draft_due_s(2.6) == float("inf")
    channel.draft("entry", "")
    assert channel.draft_due_s(5.0) == 5.0 + DROP_DRAFT_S
    assert channel.take_draft() == Draft(NUMBER, None, 0, "")


texts = st.text(st.sampled_from("aé€😀 "), max_size=12)  # one to four bytes each


@given(st.lists(st.tuples(st.sampled_from(("", "entry")), texts), max_size=12))
def test_differences_add_up_to_what_is_typed(typed: list[tuple[str, str]]) -> None:
    channel = Desk().at(Phase.LIVE).channel
    told: tuple[str, bytes] | None = None
    for after, text in typed:
        channel.draft(after, text)
        if channel.draft_due_s(0.0) == float("inf"):
            continue
        draft = channel.take_draft()
        if draft.after is None:
            told = None
            assert not text
            continue
        before = told[1] if told is not None and told[0] == draft.after else b""
        assert draft.keep <= len(before)
        told = (draft.after, before[: draft.keep] + draft.text.encode())
        assert told == (after, text.encode())


def test_a_letter_that_is_too_long_is_told_as_far_as_it_fits() -> None:
    channel = Desk().at(Phase.LIVE).channel
    text = "é" * DRAFT_BYTES_MAX
    channel.draft("", text)
    draft = channel.take_draft()
    assert draft.text == shorten(text, DRAFT_BYTES_MAX)
    assert len(draft.text.encode()) <= DRAFT_BYTES_MAX
