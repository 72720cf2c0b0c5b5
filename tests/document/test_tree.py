"""The view's rules R1 to R8: against a second writing of them, and as properties."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from document import make_view_vectors
from document.naive_view import NaiveView
from hypothesis import given, settings
from hypothesis import strategies as st

from crdt_llm.document.schema import ROOT
from crdt_llm.document.tree import Facts, Tree

IDS = tuple("abcdefgh")
NAMES = st.sampled_from((*IDS, ROOT, "missing"))


@st.composite
def _facts(draw: st.DrawFn, entry: str, *, placed: st.SearchStrategy[bool]) -> Facts:
    return Facts(
        id=entry,
        clock=draw(st.integers(1, 6)),
        slot=draw(st.booleans()),
        fork=draw(st.sampled_from((False, False, True))),
        after=draw(NAMES),
        parent=draw(NAMES) if draw(placed) else None,
        epoch=draw(st.integers(0, 2)),
        ended=draw(st.sampled_from((False, False, False, True))),
    )


@st.composite
def documents(draw: st.DrawFn, *, placed: st.SearchStrategy[bool] | None = None) -> list[Facts]:
    """Any facts about up to eight entries: cycles, missing names, rivals, lost places."""
    ids = draw(st.lists(st.sampled_from(IDS), unique=True))
    some = st.booleans() if placed is None else placed
    return [draw(_facts(entry, placed=some)) for entry in ids]


def answers(tree: Tree) -> dict[str, Any]:
    """Everything that a tree can say."""
    entries = sorted(tree.entries)
    return {
        "admitted": [entry for entry in entries if tree.is_admitted(entry)],
        "ends": [entry for entry in entries if tree.is_end(entry)],
        "superseded": tree.superseded,
        "pending": tree.pending,
        "clock": tree.clock,
        "up": {entry: tree.up(entry) for entry in entries},
        "line": {entry: tree.line(entry) for entry in (*entries, ROOT, "missing")},
        "last": {entry: tree.last(entry) for entry in (*entries, ROOT, "missing")},
        "path": {entry: tree.path(entry) for entry in (*entries, ROOT)},
        "view": {entry: tree.view(entry) for entry in (*entries, ROOT, "missing")},
        "children": {entry: tree.children(entry) for entry in (*entries, ROOT, "missing")},
        "tips": tree.tips(),
    }


@given(documents())
@settings(max_examples=400, deadline=None)
def test_agrees_with_a_second_writing_of_the_rules(facts: list[Facts]) -> None:
    tree, naive = Tree(facts), NaiveView(facts)
    for entry in (*(one.id for one in facts), ROOT, "missing"):
        assert tree.is_admitted(entry) == naive.is_admitted(entry)
        assert tree.is_end(entry) == naive.is_end(entry)
        assert tree.line(entry) == naive.line(entry)
        assert tree.last(entry) == naive.last(entry)
        assert tree.view(entry) == naive.view(entry)
    for one in facts:
        assert tree.up(one.id) == naive.up(one.id)
        assert tree.path(one.id) == naive.path(one.id)
        if tree.is_admitted(one.id):
            assert tree.tip(one.id) == naive.tip(naive.line(one.id))
        else:
            assert tree.base(one.id) == naive.base(one.id)
    assert tree.tip(ROOT) == naive.tip(ROOT)
    assert tree.pending == naive.pending()
    assert tree.superseded == naive.superseded
    assert tree.clock == naive.clock()
    # The rest of what it says follows from these.
    for entry in (*(one.id for one in facts), ROOT):
        assert set(tree.children(entry)) == {one.id for one in facts if naive.up(one.id) == entry}
    lines = {naive.line(one.id) for one in facts} | {ROOT}
    assert set(tree.tips()) == {naive.last(line) for line in lines} - {ROOT}


@given(documents(), st.randoms(use_true_random=False))
@settings(deadline=None)
def test_is_the_same_in_any_order(facts: list[Facts], random: Any) -> None:
    shuffled = list(facts)
    random.shuffle(shuffled)
    assert answers(Tree(facts)) == answers(Tree(shuffled))


@given(st.lists(st.tuples(documents(), st.sets(st.sampled_from(IDS)), st.booleans()), max_size=4))
@settings(deadline=None)
def test_incremental_equals_rebuilt(steps: list[tuple[list[Facts], set[str], bool]]) -> None:
    tree, known = Tree(), dict[str, Facts]()
    for facts, dropped, asked in steps:
        for one in facts:
            tree.put(one)
            known[one.id] = one
        for entry in sorted(dropped):
            tree.drop(entry)
            known.pop(entry, None)
        if asked:  # what was worked out for an answer must not outlive the next change
            answers(tree)
    assert answers(tree) == answers(Tree(known.values()))
    assert {entry: tree.facts(entry) for entry in tree.entries} == known
    assert len(tree) == len(known)


def _admit_next(tree: Tree) -> str | None:
    """What a node does: give the first pending entry that stands on the admitted tree its place."""
    for entry in tree.superseded:
        tree.put(replace(tree.facts(entry), ended=True))
    for entry in tree.pending:
        if tree.is_admitted(parent := tree.up(entry)):
            tree.put(replace(tree.facts(entry), parent=parent, epoch=3))  # above every other
            return entry
    return None


def _admitted_paths(tree: Tree) -> dict[str, tuple[str, ...]]:
    return {entry: tree.path(entry) for entry in tree.entries if tree.is_admitted(entry)}


def _admit(tree: Tree, limit: int, *, clean: bool) -> None:
    """Admit up to ``limit`` entries, looking at what must not change."""
    for _ in range(limit):
        paths = _admitted_paths(tree)
        pending = {entry: (tree.path(entry), tree.line(entry)) for entry in tree.pending}
        entry = _admit_next(tree)
        assert paths.items() <= _admitted_paths(tree).items()
        if entry is None:
            return
        if clean:
            # Where a reader saw it pending is where it is, and so is everybody behind it.
            assert pending == {one: (tree.path(one), tree.line(one)) for one in pending}
            assert tree.tip(entry) == entry


@given(documents(), st.lists(documents(placed=st.just(False)), max_size=4), st.integers(0, 3))
@settings(max_examples=300, deadline=None)
def test_every_pending_entry_gets_admitted_and_what_is_admitted_never_moves(
    facts: list[Facts], later: list[list[Facts]], steps: int
) -> None:
    tree = Tree(facts)
    # Unless a hostile place waits for a parent: it comes to count once that is admitted.
    clean = all(one.parent is None or tree.is_admitted(one.id) for one in facts)
    for merged in later:
        _admit(tree, steps, clean=clean)
        paths = _admitted_paths(tree)
        for one in merged:
            if one.id not in tree:
                tree.put(one)
        assert paths == _admitted_paths(tree)
    _admit(tree, len(tree) + 1, clean=clean)
    assert tree.pending == ()


@given(documents(placed=st.just(False)))
@settings(deadline=None)
def test_an_end_stays_out_of_every_path(facts: list[Facts]) -> None:
    tree = Tree(facts)
    for entry in (*tree.entries, ROOT):
        assert not any(tree.is_end(one) for one in tree.view(entry))


# -- each rule by example ----------------------------------------------------------------------


def line_of(*entries: Facts, head: str = ROOT) -> str:
    return "".join(Tree(entries).view(head))


def placed(entry: str, parent: str, **more: Any) -> Facts:
    return Facts(
        entry, clock=more.pop("clock", 1), parent=parent, epoch=more.pop("epoch", 1), **more
    )


EXAMPLES = {
    "R1 a place in a cycle counts as ended": (
        line_of(placed("a", "b"), placed("b", "a"), Facts("c", clock=1)),
        "c",
    ),
    "R1 a place whose parent comes later counts from then on": (
        line_of(placed("b", "a"), placed("a", ROOT)),
        "ab",
    ),
    "R2 an after with a greater clock is the root": (
        line_of(Facts("a", clock=5), Facts("b", clock=2, after="a", fork=True), head="b"),
        "b",
    ),
    "R3 of two pending slots the last is answered": (
        line_of(
            Facts("u", clock=1),
            Facts("s", clock=2, slot=True, after="u"),
            Facts("t", clock=3, slot=True, after="u"),
        ),
        "ut",
    ),
    "R3 a fork slot is never superseded": (
        line_of(
            placed("u", ROOT),
            Facts("s", clock=2, slot=True, fork=True, after="u"),
            Facts("t", clock=3, slot=True, after="u"),
            head="s",
        ),
        "us",
    ),
    "R4 an entry after a stopped request stands at its base": (
        line_of(
            placed("u", ROOT),
            Facts("s", clock=2, slot=True, after="u", ended=True),
            Facts("v", clock=3, after="s"),
        ),
        "uv",
    ),
    "R5 the smallest (epoch, id) continues the line": (
        line_of(placed("z", ROOT, epoch=1), placed("a", ROOT, epoch=2)),
        "z",
    ),
    "R5 the others are lines of their own": (
        line_of(placed("z", ROOT, epoch=1), placed("a", ROOT, epoch=2), head="a"),
        "a",
    ),
    "R6 a pending continue of a pending fork is on the fork's line": (
        line_of(
            placed("u", ROOT),
            Facts("f", clock=2, fork=True, after="u"),
            Facts("g", clock=3, after="f"),
            head="f",
        ),
        "ufg",
    ),
    "R7 what was written offline comes after what has happened since": (
        line_of(placed("a", ROOT), placed("b", "a", clock=9), Facts("x", clock=2, after="a")),
        "abx",
    ),
    "R7 an edit forks at the edited entry's parent": (
        line_of(
            placed("a", ROOT),
            placed("b", "a", clock=2),
            Facts("e", clock=3, after="a", fork=True),
            head="e",
        ),
        "ae",
    ),
    "R8 a head that is missing is the main line": (line_of(placed("a", ROOT), head="gone"), "a"),
    "R8 a head inside a line shows the whole line": (
        line_of(placed("a", ROOT), placed("b", "a"), head="a"),
        "ab",
    ),
}


@pytest.mark.parametrize("rule", EXAMPLES)
def test_example(rule: str) -> None:
    seen, expected = EXAMPLES[rule]
    assert seen == expected


def test_every_rule_has_an_example() -> None:
    assert {name.split()[0] for name in EXAMPLES} == {f"R{number}" for number in range(1, 9)}


def test_the_vectors_for_other_languages() -> None:
    assert make_view_vectors.FILE.read_text(encoding="utf-8") == make_view_vectors.vectors()
    cases = json.loads(make_view_vectors.vectors())["cases"]
    assert len(cases) == make_view_vectors.CASES
    for case in cases:
        tree = Tree(
            Facts(
                id=one["id"],
                clock=one["clock"],
                slot=one["slot"],
                fork=one["mode"] == "fork",
                after=one["after"],
                parent=one["place"] and one["place"]["parent"],
                epoch=one["place"]["epoch"] if one["place"] else 0,
                ended=one["ended"],
            )
            for one in case["entries"]
        )
        assert {head: list(tree.view(head)) for head in case["views"]} == case["views"]
        assert list(tree.pending) == case["pending"]
        assert [entry for entry in sorted(tree.entries) if tree.is_end(entry)] == case["ends"]
        admitted = [entry for entry in sorted(tree.entries) if tree.is_admitted(entry)]
        assert admitted == case["admitted"]


# -- size --------------------------------------------------------------------------------------

LONG = 10_000


@pytest.mark.parametrize("backwards", [False, True])
def test_a_long_admitted_chain_needs_no_recursion(backwards: bool) -> None:  # noqa: FBT001 - parameter
    names = [f"{number:05}" for number in range(LONG)]
    chain = [
        placed(name, parent, clock=clock)
        for clock, (name, parent) in enumerate(zip(names, [ROOT, *names], strict=False), 1)
    ]
    tree = Tree(reversed(chain) if backwards else chain)
    assert tree.view() == tuple(names)
    tree.drop(names[LONG // 2])
    assert tree.view() == tuple(names[: LONG // 2])


def test_a_long_pending_chain_needs_no_recursion() -> None:
    names = [f"{number:05}" for number in range(LONG)]
    tree = Tree(
        Facts(name, clock=clock, after=after, slot=True)
        for clock, (name, after) in enumerate(zip(names, [ROOT, *names], strict=False), 1)
    )
    assert tree.view() == (names[-1],)
    assert len(tree.superseded) == LONG - 1
