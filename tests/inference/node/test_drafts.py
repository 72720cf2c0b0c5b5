"""Drafts: what may be read of them, what is taken over, and that no reply can tell."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from local_room import LocalRoom, make_node

from crdt_llm.document.schema import ENDED, State
from crdt_llm.inference.engine.process import EngineProcess
from crdt_llm.inference.node import ahead
from crdt_llm.inference.node.drafts import (
    HELD_CHARACTERS,
    SOURCES_MAX,
    TEXT_BYTES_MAX,
    Drafts,
    Tally,
    common_prefix,
    settled,
)
from crdt_llm.inference.node.fed import Drop
from crdt_llm.inference.prompt.renderer import ParentTail, Renderer
from crdt_llm.inference.prompt.tokens import Vocabulary
from crdt_llm.inference.prompt.transcript import Transcript

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Coroutine, Iterator, Sequence
    from pathlib import Path

    from crdt_llm.inference.contract import GenerationEvent, SamplingParams
    from crdt_llm.inference.node.drafts import Scratch
    from crdt_llm.inference.node.node import Node

# -- what may be read ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "finished"),
    [
        ("", ""),
        ("hel", ""),
        ("hello ", "hello"),
        ("hello wor", "hello"),
        ("hello world  ", "hello world"),
        ("one\ntwo", "one"),
        (
            "今日は良い天気ですね。散歩に行きましょうか、それとも",
            "今日は良い天気ですね。散歩に行きまし",
        ),
        ("a " + "x" * 30, "a " + "x" * (30 - HELD_CHARACTERS)),
    ],
)
def test_the_last_word_is_not_finished(text: str, finished: str) -> None:
    assert text[: settled(text)] == finished


@given(st.text())
def test_a_word_is_finished_when_the_next_one_begins(text: str) -> None:
    assert 0 <= settled(text) <= len(text)
    assert settled(text + " x") >= len(text.rstrip())


@given(st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)))
def test_common_prefix(left: list[int], right: list[int]) -> None:
    shared = common_prefix(left, right)
    assert left[:shared] == right[:shared]
    assert shared == min(len(left), len(right)) or left[shared] != right[shared]


# -- what people type ----------------------------------------------------------------------------


def test_a_draft_is_its_beginning_that_stays_and_what_follows() -> None:
    drafts = Drafts(Tally())
    drafts.hint(1, "a", 0, "grün")
    drafts.hint(1, "a", 5, "e Ast")  # ü has two bytes
    assert drafts.take(1) == "grüne Ast"
    assert drafts.waiting == ()
    drafts.hint(1, "b", 3, "")
    assert (drafts.after(1), drafts.take(1)) == ("b", "gr")  # a character cut in two is left out


def test_a_hint_that_builds_on_what_is_not_known_is_left_out() -> None:
    drafts = Drafts(Tally())
    drafts.hint(1, "a", 7, "more")
    drafts.hint(2, "a", 0, "x")
    drafts.hint(2, "a", -1, "y")
    assert drafts.waiting == ()


def test_only_so_many_drafts_and_so_much_text_are_kept() -> None:
    drafts = Drafts(Tally())
    for source in range(SOURCES_MAX + 2):
        drafts.hint(source, "", 0, "x" * 2 * TEXT_BYTES_MAX)
    assert drafts.waiting == tuple(reversed(range(2, SOURCES_MAX + 2)))
    assert len(drafts.take(SOURCES_MAX)) == TEXT_BYTES_MAX


# -- scratch branches ----------------------------------------------------------------------------


def reading(drafts: Drafts, *ids: int, base: int = 2, tip: str = "tip") -> Scratch:
    """A branch behind a path of two tokens, read to its end."""
    drafts.hint(1, tip, 0, "text")
    scratch = drafts.branch(1, tip, base, ids)
    assert scratch is not None
    scratch.tried = len(ids)
    scratch.note(max(base, scratch.done), len(ids))
    return scratch


def test_typing_on_keeps_what_was_read_and_editing_drops_what_follows() -> None:
    tally = Tally()
    drafts = Drafts(tally)
    reading(drafts, 8, 9, 1, 2, 3)
    assert not drafts.drops
    reading(drafts, 8, 9, 1, 2, 3, 4)
    assert not drafts.drops
    reading(drafts, 8, 9, 1, 7)
    assert list(drafts.drops) == [Drop((8, 9, 1, 2, 3, 4), 3)]
    assert tally.wasted == 3
    assert drafts.admitted("tip", (8, 9, 1, 7, 5)) == (2, 4)
    assert tally.adopted == 2


def test_an_admission_takes_over_the_longest_common_prefix_and_drops_the_rest() -> None:
    tally = Tally()
    drafts = Drafts(tally)
    reading(drafts, 8, 9, 1, 2, 3)
    assert drafts.is_read_behind("tip")
    assert drafts.admitted("elsewhere", (8, 9, 1)) is None
    assert drafts.admitted("tip", (8, 9, 1, 4)) == (2, 3)
    assert list(drafts.drops) == [Drop((8, 9, 1, 2, 3), 3)]
    assert (tally.adopted, tally.wasted) == (1, 2)
    assert not drafts.is_read_behind("tip")
    assert drafts.waiting == ()  # nobody types on, as far as is known


def test_what_was_there_before_the_draft_is_not_its_work() -> None:
    tally = Tally()
    drafts = Drafts(tally)
    drafts.hint(1, "tip", 0, "text")
    scratch = drafts.branch(1, "tip", 2, (8, 9, 1, 2, 3))
    assert scratch is not None
    scratch.tried = 5
    scratch.note(4, 5)
    assert drafts.admitted("tip", (8, 9, 1, 2, 3)) == (4, 5)
    assert (tally.adopted, tally.wasted) == (1, 0)


def test_a_draft_behind_a_tip_that_moved_is_dropped_whole() -> None:
    drafts = Drafts(Tally())
    reading(drafts, 8, 9, 1, 2)
    reading(drafts, 8, 9, 5, 1, base=3, tip="next")
    assert list(drafts.drops) == [Drop((8, 9, 1, 2), 2)]


def test_what_was_read_stays_when_somebody_stops_typing_because_it_may_have_been_sent() -> None:
    drafts = Drafts(Tally())
    reading(drafts, 8, 9, 1)
    drafts.hint(1, None, 0, "")
    assert not drafts.drops
    assert drafts.admitted("tip", (8, 9, 1, 3)) == (2, 3)
    reading(drafts, 8, 9, 1)
    drafts.hint(1, "tip", 0, "")
    drafts.drop(1, if_ended=True)
    assert list(drafts.drops) == [Drop((8, 9, 1), 2)]
    drafts.drops.clear()
    reading(drafts, 8, 9, 1)
    drafts.drop(1, if_ended=True)  # typed on meanwhile
    assert drafts.is_read_behind("tip")


def test_a_withdrawal_drops_every_text() -> None:
    drafts = Drafts(Tally())
    reading(drafts, 8, 9, 1)
    drafts.reset()
    assert list(drafts.drops) == [Drop((8, 9, 1), 2)]
    drafts.hint(1, "tip", 4, "more")  # of a text that is not there any more
    assert drafts.waiting == ()


def test_texts_do_not_show() -> None:
    drafts = Drafts(Tally())
    reading(drafts, 8, 9, 4711)
    assert "text" not in repr(drafts._drafts)
    assert "4711" not in repr(drafts._drafts)


# -- with an engine ------------------------------------------------------------------------------

TEXTS = (
    "the user asks what was said",
    "the user asks the assistant",
    "the user asks what was said, and how the model reads it",
    "so?",
    "今日は良い天気ですね。散歩に行きましょうか、それとも家で",
)


class Counting:
    """An engine that says what it computed."""

    def __init__(self, engine: EngineProcess) -> None:
        self._engine = engine
        self.capabilities, self.forget = engine.capabilities, engine.forget
        self.prefilled = 0

    async def warm(self, ids: Sequence[int]) -> Any:
        done = await self._engine.warm(ids)
        self.prefilled += done.prefilled
        return done

    async def generate(
        self, ids: Sequence[int], params: SamplingParams, start: int
    ) -> AsyncGenerator[GenerationEvent, None]:
        events = self._engine.generate(ids, params, start)
        try:
            async for event in events:
                self.prefilled += getattr(event, "prefilled", 0)
                yield event
        finally:
            await events.aclose()

    async def close(self) -> None:
        """It was only lent."""


@dataclass
class Lab:
    """One loop and one engine for all that is played here."""

    model_dir: Path
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.new_event_loop)
    engine: EngineProcess = field(init=False)
    beginning: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.engine = self.run(EngineProcess.start(self.model_dir, threads=1))
        renderer = Renderer.learn(self.model_dir, Vocabulary.load(self.model_dir))
        self.beginning = renderer.segment(
            role="user", content="", is_root=True, root_at_ms=0, parent=ParentTail()
        )[:1]

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(coroutine)

    def close(self) -> None:
        self.run(self.engine.close())
        self.loop.close()


@pytest.fixture(scope="module")
def lab(tiny_model_dir: Path) -> Iterator[Lab]:
    lab = Lab(tiny_model_dir)
    yield lab
    lab.close()


@dataclass(frozen=True)
class Result:
    """What a conversation came to."""

    sampled: tuple[tuple[int, ...], ...]
    kv: tuple[bytes, ...]
    costs: tuple[tuple[int, int], ...]  # prompt, prefilled
    drafted: int
    adopted: int
    wasted: int
    computed: int


class Play:
    """A conversation of two people, with or without hints of what they type."""

    def __init__(self, lab: Lab, *, hinting: bool) -> None:
        self.lab = lab
        self.hinting = hinting
        self.room = LocalRoom(9)
        self.counting = Counting(lab.engine)
        self.typed = {"olga": "", "will": ""}
        self.slots: list[str] = []
        self.node: Node

    async def begin(self) -> None:
        await self.lab.engine.forget(self.lab.beginning)

        async def start() -> Counting:
            return self.counting

        self.node = make_node(self.room, self.lab.model_dir, start)
        await self.node.start()
        self.node.notice(self.room.id)

    def type(self, who: str, text: str) -> None:
        before, self.typed[who] = self.typed[who].encode(), text
        keep = common_prefix(before, text.encode())
        if self.hinting:
            after = self.room.replica.tree.last("")
            rest = text.encode()[keep:].decode(errors="ignore")
            keep = len(text.encode()) - len(rest.encode())  # whole characters only
            self.node.hint(self.room.id, who, after=after, keep=keep, text=rest)

    def send(self, who: str, *, ask: bool) -> None:
        text, self.typed[who] = self.typed[who], ""
        if ask:
            self.slots.append(
                self.room.ask(text, temperature=0.7, max_tokens=4, ignore_eos=True, seed=3)
            )
        else:
            self.room.write(text)
        if self.hinting:
            self.node.hint(self.room.id, who, after=None, keep=0, text="")

    async def settle(self) -> None:
        """Until nothing runs and every draft was read."""
        desk, _ = self.node._desks[self.room.id]
        while True:
            await self.room.until(
                lambda: all(self.room.replica.state(slot) in ENDED for slot in self.slots)
            )
            await asyncio.sleep(0)
            sitting = desk._sitting
            drafts = self.node.drafts(self.room.id)
            if sitting is None or desk._dirty.is_set() or sitting._ahead.busy:
                continue
            if not sitting.idle or sitting._ahead.cold is not None or drafts.drops:
                desk.wake()
                continue
            if sitting._ahead._next_draft() is None:
                return
            desk.wake()

    async def end(self) -> Result:
        await self.settle()
        await self.node.close()
        replica, tally = self.room.replica, self.node.drafted
        transcript = Transcript(replica, self.node.renderer, self.node.identity.sealer)
        replies = [self.room.entry(slot) for slot in self.slots]
        answered = [reply for reply in replies if reply.state is State.DONE]
        usages = [reply.usage for reply in answered if reply.usage is not None]
        path = replica.view()[-1:]
        return Result(
            sampled=tuple(
                hidden.sampled if (hidden := transcript.hidden(one)) is not None else ()
                for one in answered
            ),
            kv=tuple([(await self.lab.engine.digest(transcript.ids(one))).kv for one in path]),
            costs=tuple((usage.prompt, usage.prefilled) for usage in usages),
            drafted=sum(usage.drafted for usage in usages),
            adopted=tally.adopted,
            wasted=tally.wasted,
            computed=self.counting.prefilled,
        )


Step = tuple[str, str, str]


async def play(lab: Lab, steps: Sequence[Step], *, hinting: bool) -> Result:
    conversation = Play(lab, hinting=hinting)
    await conversation.begin()
    for what, who, text in steps:
        match what:
            case "type":
                conversation.type(who, text)
            case "send" | "ask":
                conversation.send(who, ask=what == "ask")
            case "settle":
                await conversation.settle()
            case "pause":
                await asyncio.sleep(0)
    # Somebody asks at the end, so that everything admitted is paid for.
    await conversation.settle()
    conversation.type("olga", "and?")
    conversation.send("olga", ask=True)
    return await conversation.end()


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "DRAFT_INTERVAL_S", 0.0)


def test_a_draft_is_read_before_it_is_sent(lab: Lab) -> None:
    text = TEXTS[2]
    steps: list[Step] = [("type", "olga", text[:n]) for n in range(1, len(text) + 1)]
    steps += [("settle", "", ""), ("ask", "olga", "")]
    with_hints, without = (lab.run(play(lab, steps, hinting=hinting)) for hinting in (True, False))
    vocabulary = Vocabulary.load(lab.model_dir)
    words = len(vocabulary.encode_text(text[: text.rindex(" ")]))
    assert with_hints.drafted >= words
    assert without.drafted == 0
    assert with_hints.sampled == without.sampled
    assert with_hints.costs == without.costs
    assert with_hints.wasted == 0


def test_what_was_typed_in_vain_is_counted(lab: Lab) -> None:
    steps = [
        ("type", "olga", TEXTS[2] + " "),
        ("settle", "", ""),
        ("type", "olga", TEXTS[1] + " "),
        ("settle", "", ""),
        ("ask", "olga", ""),
    ]
    with_hints, without = (lab.run(play(lab, steps, hinting=hinting)) for hinting in (True, False))
    assert with_hints.wasted > 0
    assert with_hints.drafted == with_hints.adopted > 0
    assert with_hints.sampled == without.sampled
    assert with_hints.costs == without.costs
    # What was computed is what the replies say, and what was computed in vain.
    assert with_hints.computed == without.computed + with_hints.wasted


STEPS = st.lists(
    st.one_of(
        st.tuples(
            st.just("type"),
            st.sampled_from(["olga", "will"]),
            st.builds(
                lambda text, length: text[: int(len(text) * length)],
                st.sampled_from(TEXTS),
                st.floats(0, 1),
            ),
        ),
        st.tuples(st.sampled_from(["send", "ask"]), st.sampled_from(["olga", "will"]), st.just("")),
        st.tuples(st.sampled_from(["settle", "settle", "pause"]), st.just(""), st.just("")),
    ),
    max_size=12,
)


@settings(
    max_examples=25,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(steps=STEPS)
def test_no_reply_can_tell_whether_drafts_were_read(lab: Lab, steps: list[Step]) -> None:
    """Typing, deleting, other people's entries, sends at any moment: the same, bit for bit."""
    # What is sent while a reply runs is answered together or one by one, as time has it.
    steps = [
        step for one in steps for step in ([one, ("settle", "", "")] if one[0] == "ask" else [one])
    ]
    with_hints, without = (lab.run(play(lab, steps, hinting=hinting)) for hinting in (True, False))
    assert with_hints.sampled == without.sampled
    assert with_hints.kv == without.kv
    assert with_hints.costs == without.costs
    assert 0 <= with_hints.drafted <= sum(prefilled for _, prefilled in with_hints.costs)
    assert with_hints.drafted >= with_hints.adopted
