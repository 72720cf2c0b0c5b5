from __future__ import annotations

from crdt_llm.sync.relay.drafts import Drafts
from crdt_llm.sync.wire.draft import NOTHING, Said

AFTER = "01HF7YAT00AAAAAAAAAAAAAAAA"


class Listening:
    """A listener that puts the drafts together again."""

    def __init__(self) -> None:
        self.drafts: dict[int, Said] = {}
        self.has_room = True

    def __call__(self, source: int, after: str | None, keep: int, text: str) -> bool:
        if not self.has_room:
            return False
        before = self.drafts.get(source, NOTHING)
        self.drafts[source] = before.then(after, keep, text)
        return True


def test_what_is_said_is_what_the_listener_puts_together() -> None:
    drafts, node = Drafts(), Listening()
    drafts.listen("c", node)
    drafts.say(1, "c", Said(AFTER, b"hello"))
    drafts.say(1, "c", Said(AFTER, "hällo".encode()))
    drafts.say(2, "c", Said("", b"another"))
    assert node.drafts == {1: Said(AFTER, "hällo".encode()), 2: Said("", b"another")}
    drafts.say(1, "c", NOTHING)
    assert node.drafts[1] == NOTHING


def test_only_the_conversations_own_listener_hears() -> None:
    drafts, node, other = Drafts(), Listening(), Listening()
    drafts.listen("c", node)
    drafts.listen("d", other)
    drafts.say(1, "d", Said("", b"x"))
    assert node.drafts == {}
    assert other.drafts == {1: Said("", b"x")}


def test_a_new_listener_is_told_from_the_beginning_and_the_old_one_again_after_it() -> None:
    drafts, one, two = Drafts(), Listening(), Listening()
    drafts.say(1, "c", Said("", b"before anybody listened"))
    drafts.listen("c", one)
    release = drafts.listen("c", two)
    assert one.drafts == two.drafts
    drafts.say(1, "c", Said("", b"before"))
    assert one.drafts != two.drafts
    release()
    release()
    assert one.drafts == two.drafts


def test_what_had_no_room_comes_with_the_next() -> None:
    drafts, node = Drafts(), Listening()
    drafts.listen("c", node)
    drafts.say(1, "c", Said("", b"one"))
    node.has_room = False
    drafts.say(1, "c", Said("", b"one two"))
    node.has_room = True
    drafts.say(1, "c", Said("", b"one two three"))
    assert node.drafts == {1: Said("", b"one two three")}


def test_nothing_is_kept_of_drafts_that_ended() -> None:
    drafts = Drafts()
    release = drafts.listen("c", Listening())
    drafts.say(1, "c", Said("", b"x"))
    drafts.say(1, "c", NOTHING)
    release()
    assert [drafts._drafts, drafts._of, drafts._listeners] == [{}, {}, {}]
