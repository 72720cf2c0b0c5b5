"""evaluate(): the numbered invariants, one by one, and on random trees."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from crdt_llm.document.schema import Policy
from crdt_llm.document.tree import Facts, Tree
from crdt_llm.inference.node.evaluate import (
    ADMIT_MAX,
    Admit,
    Clear,
    End,
    Forget,
    Mark,
    Nothing,
    ReadDraft,
    Request,
    Resume,
    Situation,
    TakeLease,
    Warm,
    Withdraw,
    evaluate,
)

A, B, C, D = (letter * 26 for letter in "ABCD")


def tree(*facts: Facts) -> Tree:
    return Tree(facts)


def test_an_empty_conversation_needs_nothing() -> None:
    assert evaluate(Situation(tree())) == Nothing()


def test_i1_nothing_is_admitted_without_a_lease() -> None:
    pending = tree(Facts(A, 1))
    assert evaluate(Situation(pending, leased=False)) == TakeLease()
    assert evaluate(Situation(pending)) == Admit("", (A,))


def test_i1_a_lease_is_not_taken_before_it_is_needed() -> None:
    assert evaluate(Situation(tree(), leased=False)) == Nothing()


def test_i1_without_a_lease_not_even_a_stop_is_carried_out() -> None:
    """Another node may be about to do it."""
    streaming = tree(Facts(A, 1, slot=True, parent="", epoch=1))
    assert evaluate(Situation(streaming, leased=False, open={A: True})) == TakeLease()
    stopped = tree(Facts(A, 1, slot=True, ended=True))
    assert evaluate(Situation(stopped, leased=False, unmarked=(A,))) == TakeLease()
    admitted = tree(Facts(A, 1, parent="", epoch=1))
    assert evaluate(Situation(admitted, leased=False, unanswered=(A,))) == TakeLease()


def test_i2_stop_wins_over_admission_and_resumption() -> None:
    facts = tree(Facts(A, 1, slot=True, parent="", epoch=1), Facts(B, 2, after=A))
    situation = Situation(facts, open={A: True}, running=frozenset({A}))
    assert evaluate(situation) == End(A)


def test_i2_a_request_that_was_stopped_before_it_was_admitted_is_marked() -> None:
    facts = tree(Facts(A, 1, slot=True, ended=True))
    assert evaluate(Situation(facts, unmarked=(A,))) == Mark((A,))


def test_interrupt_ends_a_reply_when_something_new_waits_behind_it() -> None:
    facts = tree(Facts(A, 1, slot=True, parent="", epoch=1), Facts(B, 2, after=A))
    running = {"open": {A: False}, "running": frozenset({A})}
    queue, interrupt = Policy(), Policy(on_new_entry="interrupt")
    assert evaluate(Situation(facts, queue, **running)) == Nothing()  # type: ignore[arg-type]
    assert evaluate(Situation(facts, interrupt, **running)) == End(A)  # type: ignore[arg-type]


def test_interrupt_leaves_other_branches_alone() -> None:
    facts = tree(
        Facts(A, 1, parent="", epoch=1),
        Facts(B, 2, slot=True, after=A, parent=A, epoch=1),
        Facts(C, 3, fork=True, after=A),
    )
    situation = Situation(
        facts, Policy(on_new_entry="interrupt"), open={B: False}, running=frozenset({B})
    )
    assert evaluate(situation) == Admit(A, (C,))


def test_i3_a_streaming_reply_that_nobody_works_on_is_resumed() -> None:
    facts = tree(Facts(A, 1, slot=True, parent="", epoch=1))
    assert evaluate(Situation(facts, open={A: False})) == Resume(A)
    assert evaluate(Situation(facts, open={A: False}, capacity=0)) == Nothing()
    assert evaluate(Situation(facts, open={A: False}, running=frozenset({A}))) == Nothing()


def test_i4_nothing_is_admitted_behind_a_reply_that_has_not_ended() -> None:
    facts = tree(Facts(A, 1, slot=True, parent="", epoch=1), Facts(B, 2, after=A))
    streaming = Situation(facts, open={A: False}, running=frozenset({A}))
    assert evaluate(streaming) == Nothing()
    assert evaluate(Situation(facts)) == Admit(A, (B,))


def test_i5_the_last_pending_slot_is_answered_and_supersedes_the_others() -> None:
    facts = tree(
        Facts(A, 1),
        Facts(B, 2, slot=True, after=A),
        Facts(C, 3, after=A),
        Facts(D, 4, slot=True, after=C),
    )
    assert evaluate(Situation(facts)) == Admit("", (A, C), D, (B,))


def test_i10_what_is_held_waits_with_what_hangs_behind_it_and_other_lines_go_on() -> None:
    facts = tree(
        Facts(A, 1, parent="", epoch=1),
        Facts(B, 2, after=A),
        Facts(C, 3, slot=True, after=B),
        Facts(D, 4, fork=True, after=A),
    )
    held = frozenset({B})
    assert evaluate(Situation(facts, held=held)) == Admit(A, (D,))
    assert evaluate(Situation(facts, held=frozenset({C}))) == Admit(A, (B,))
    assert evaluate(Situation(facts, held=held, leased=False)) == TakeLease()
    alone = tree(Facts(A, 1), Facts(B, 2, slot=True, after=A))
    assert evaluate(Situation(alone, held=frozenset({A}))) == Nothing()
    assert evaluate(Situation(alone, held=frozenset({A}), leased=False)) == Nothing()
    assert evaluate(Situation(alone, leased=False, capacity=0, held=frozenset({B}))) == TakeLease()


def test_i6_a_slot_waits_for_an_engine_and_what_is_before_it_does_not() -> None:
    facts = tree(Facts(A, 1), Facts(B, 2, slot=True, after=A))
    assert evaluate(Situation(facts, capacity=0)) == Admit("", (A,))
    admitted = tree(Facts(A, 1, parent="", epoch=1), Facts(B, 2, slot=True, after=A))
    assert evaluate(Situation(admitted, capacity=0)) == Nothing()
    assert evaluate(Situation(admitted)) == Admit(A, (), B)


def test_i6_a_slot_whose_prompt_is_made_shorter_waits_and_what_is_before_it_does_not() -> None:
    facts = tree(Facts(A, 1), Facts(B, 2, slot=True, after=A))
    assert evaluate(Situation(facts, preparing=frozenset({B}))) == Admit("", (A,))


def test_i9_a_draft_is_read_when_nothing_else_is_to_do() -> None:
    facts = tree(Facts(A, 1, parent="", epoch=1))
    assert evaluate(Situation(facts, draft=True)) == ReadDraft()
    assert evaluate(Situation(facts, draft=True, leased=False)) == ReadDraft()
    assert evaluate(Situation(facts, draft=True, cold=A)) == Warm(A)
    assert evaluate(Situation(facts, draft=True, dropped=True)) == Forget()
    pending = tree(Facts(A, 1, parent="", epoch=1), Facts(B, 2, after=A))
    assert evaluate(Situation(pending, draft=True, dropped=True)) == Admit(A, (B,))


def test_a_long_offline_merge_is_admitted_in_pieces() -> None:
    names = [f"{n:026}" for n in range(ADMIT_MAX + 5)]
    facts = tree(*(Facts(name, n + 1) for n, name in enumerate(names)))
    action = evaluate(Situation(facts))
    assert action == Admit("", tuple(names[:ADMIT_MAX]))


def test_auto_replies_and_i7_come_when_nothing_waits() -> None:
    facts = tree(Facts(A, 1, parent="", epoch=1))
    assert evaluate(Situation(facts, unanswered=(A,), cold=A)) == Request(A)
    assert evaluate(Situation(facts, cold=A)) == Warm(A)
    pending = tree(Facts(A, 1, parent="", epoch=1), Facts(B, 2, after=A))
    assert evaluate(Situation(pending, cold=A)) == Admit(A, (B,))


@st.composite
def pending_trees(draw: st.DrawFn) -> Tree:
    count = draw(st.integers(1, 12))
    names = [f"{n:026}" for n in range(count)]
    facts = []
    for n, name in enumerate(names):
        after = draw(st.sampled_from(["", *names[:n]]))
        slot, fork = draw(st.booleans()), draw(st.booleans())
        facts.append(Facts(name, n + 1, slot=slot, fork=fork, after=after))
    return Tree(facts)


@given(pending_trees())
def test_following_evaluate_admits_everything_pending_each_behind_its_up(facts: Tree) -> None:
    """I4, I5: a node that does what it says ends with nothing pending, in bounded steps."""
    for _ in range(100):
        action = evaluate(Situation(facts))
        if isinstance(action, Nothing):
            break
        assert isinstance(action, Admit)
        parent = action.parent
        slots = () if action.slot is None else (action.slot,)
        for entry in (*action.entries, *slots):
            assert facts.up(entry) == parent
            old = facts.facts(entry)
            facts.put(
                Facts(
                    entry,
                    old.clock,
                    old.slot,
                    old.fork,
                    old.after,
                    parent=parent,
                    epoch=1,
                    ended=old.slot,
                )
            )
            parent = entry
        for entry in action.superseded:
            old = facts.facts(entry)
            facts.put(Facts(entry, old.clock, old.slot, old.fork, old.after, ended=True))
    assert facts.pending == ()
    for entry in facts.entries:
        assert facts.is_admitted(entry) or facts.facts(entry).slot


def test_i8_the_engine_forgets_as_soon_as_nothing_runs_that_read_it() -> None:
    facts = tree(Facts(A, 1, slot=True, parent="", epoch=1), Facts(B, 2, after=A))
    running = Situation(facts, open={A: True}, running=frozenset({A}), withdrawn=True)
    assert evaluate(running) == End(A)
    assert evaluate(Situation(facts, open={A: True}, withdrawn=True)) == Forget()
    other = Situation(facts, open={A: False}, running=frozenset({A}), withdrawn=True)
    assert evaluate(other) == Forget()
    assert evaluate(Situation(facts, withdrawn=True, leased=False)) == Forget()


def test_i8_what_was_written_beside_a_withdrawal_goes_before_anything_is_admitted() -> None:
    facts = tree(Facts(A, 1, parent="", epoch=1, ended=True), Facts(B, 2, after=A))
    assert evaluate(Situation(facts, leftovers=(A,))) == Clear((A,))
    assert evaluate(Situation(facts, spoiled=(A,))) == Withdraw((A,))
    admitted = tree(Facts(A, 1, parent="", epoch=1, ended=True))
    assert evaluate(Situation(admitted, leftovers=(A,), leased=False)) == TakeLease()
    assert evaluate(Situation(admitted, spoiled=(A,), leased=False)) == TakeLease()
