from __future__ import annotations

import json
import math
import random
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycrdt import Array, Doc, Map, Text, merge_updates

from crdt_llm.errors import MalformedMessage, TooLarge
from crdt_llm.sync.update.structure import (
    DOCUMENT_LIMITS,
    TRANSACTION_LIMITS,
    Format,
    Id,
    Kind,
    Lack,
    Limits,
    Missing,
    SharedType,
    Struct,
    Subdocument,
    TypeRef,
    Undefined,
    UpdateStructure,
    brings,
    find_gap,
    find_rewrite,
    read_update,
)
from crdt_llm.sync.wire.y_websocket import decode_state_vector, write_var_string, write_var_uint

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

VECTORS = json.loads(
    (Path(__file__).parents[3] / "protocol" / "vectors" / "yjs-updates.json").read_text(
        encoding="utf-8"
    )
)
CASES = {case["name"]: case for case in VECTORS["cases"]}
WITHOUT_GAP = [case for case in VECTORS["cases"] if case["gap"] is None]

unhurried = settings(deadline=None)


# --------------------------------------------------------------- what real Yjs reads in an update


def plain(value: Any) -> Any:
    """Say a value as the vectors do."""
    match value:
        case Undefined.UNDEFINED:
            return {"$": "undefined"}
        case bytes():
            return {"$": "bytes", "value": value.hex()}
        case float() if not math.isfinite(value):
            names = {math.inf: "Infinity", -math.inf: "-Infinity"}
            return {"$": "number", "value": names.get(value, "NaN")}
        case list() | tuple():
            return [plain(each) for each in value]
        case dict():
            return {key: plain(each) for key, each in value.items()}
    return value


def bigints(value: Any) -> Any:
    """Python has one kind of whole number: the vectors' bigints are that."""
    match value:
        case {"$": "bigint", "value": digits}:
            return int(digits)
        case list():
            return [bigints(each) for each in value]
        case dict():
            return {key: bigints(each) for key, each in value.items()}
    return value


def content(item: Struct) -> Any:
    match item.content:
        case SharedType(ref, name):
            return {"type": ref.name.lower().replace("_", "-"), "name": name}
        case Format(key, value):
            return {"key": key, "value": plain(value)}
        case Subdocument(guid, options):
            return {"guid": guid, "options": plain(options)}
        case bytes() as raw:
            return raw.hex()
    return plain(item.content)


def as_vector(item: Struct) -> dict[str, Any]:
    said: dict[str, Any] = {
        "client": item.client,
        "clock": item.clock,
        "length": item.length,
        "kind": item.kind.name.lower(),
    }
    if item.kind not in (Kind.GC, Kind.SKIP):
        said["origin"] = item.origin and list(item.origin)
        said["right_origin"] = item.right_origin and list(item.right_origin)
        said["parent"] = list(item.parent) if isinstance(item.parent, Id) else item.parent
        said["parent_sub"] = item.parent_sub
        if item.kind is not Kind.DELETED:
            said["content"] = content(item)
    return said


def structure_of(case: dict[str, Any]) -> UpdateStructure:
    return read_update(bytes.fromhex(case["update"]))


def known_after(updates: Sequence[str]) -> dict[int, int]:
    known: dict[int, int] = {}
    for update in updates:
        structure = read_update(bytes.fromhex(update))
        assert find_gap(structure, known) is None
        known.update({c: max(end, known.get(c, 0)) for c, end in structure.ends.items()})
    return known


@pytest.mark.parametrize("case", VECTORS["cases"], ids=lambda case: case["name"])
def test_an_update_says_what_real_yjs_reads_in_it(case: dict[str, Any]) -> None:
    structure = structure_of(case)
    structs = [as_vector(item) for items in structure.structs.values() for item in items]
    assert structs == bigints(case["structs"])
    deleted = {(each["client"], each["clock"], each["length"]) for each in case["deleted"]}
    assert {
        (client, clocks.start, len(clocks))
        for client, ranges in structure.deleted.items()
        for clocks in ranges
    } == deleted


@pytest.mark.parametrize("case", VECTORS["cases"], ids=lambda case: case["name"])
def test_a_gap_is_what_real_yjs_holds_back(case: dict[str, Any]) -> None:
    missing = find_gap(structure_of(case), known_after(case["requires"]))
    assert (missing and missing.what.name.lower()) == case["gap"]


@pytest.mark.parametrize("case", WITHOUT_GAP, ids=lambda case: case["name"])
def test_known_clocks_are_those_of_a_real_document(case: dict[str, Any]) -> None:
    known = known_after([*case["requires"], case["update"]])
    assert known == {int(client): clock for client, clock in case["clocks"].items()}


@pytest.mark.parametrize("case", VECTORS["refused"], ids=lambda case: case["name"])
def test_what_no_writer_makes_is_refused_in_one_line(case: dict[str, Any]) -> None:
    with pytest.raises((MalformedMessage, TooLarge)) as caught:
        read_update(bytes.fromhex(case["update"]))
    assert str(caught.value)
    assert "\n" not in str(caught.value)


def test_plain_values_keep_their_types() -> None:
    (item,) = structure_of(CASES["a plain value of every kind"]).structs[2**32 - 1]
    assert isinstance(item.content, tuple)
    (values,) = item.content
    assert isinstance(values, list)
    assert values[:4] == [Undefined.UNDEFINED, None, True, False]
    assert [type(value) for value in values[7:10]] == [int, int, int]
    assert [type(value) for value in values[20:23]] == [float, float, float]
    assert values[26] == 10
    assert values[27] == -(2**63)
    assert values[28] == b"\x00\xff"


# ------------------------------------------------------------------------- updates of our replicas


class Replicas:
    """Three replicas that write and hear of each other at random; ``log`` keeps what each wrote."""

    def __init__(self, choices: random.Random) -> None:
        self.choices = choices
        self.docs: list[Doc[Any]] = []
        self.log: list[list[bytes]] = []
        for client in (1, 2**31, 2**32 - 1):
            doc: Doc[Any] = Doc(client_id=client)
            doc.get("t", type=Text)
            doc.get("m", type=Map)
            doc.get("a", type=Array)
            self.docs.append(doc)
            self.log.append([])

    def step(self) -> None:
        index = self.choices.randrange(3)
        doc = self.docs[index]
        if self.choices.random() < 0.25:
            other = self.docs[self.choices.randrange(3)]
            if other is not doc:
                doc.apply_update(other.get_update(doc.get_state()))
            return
        made: list[bytes] = []
        subscription = doc.observe(lambda event: made.append(event.update))
        with doc.transaction():
            for _ in range(self.choices.randrange(1, 3)):
                self.write(doc["t"], doc["m"], doc["a"])
        doc.unobserve(subscription)
        self.log[index].extend(update for update in made if update != b"\0\0")

    def write(self, text: Text, members: Map[Any], array: Array[Any]) -> None:
        choose = self.choices.choice
        key = choose("xyz")
        action = self.choices.randrange(8)
        here = self.choices.randrange(len(str(text)) + 1)
        before = len(str(text)[:here].encode())
        if action == 0:
            text.insert(before, choose(["a", "bc", "é", "🎈x", "日本"]))
        elif action == 1 and here < len(str(text)):
            del text[before : before + len(str(text)[here].encode())]
        elif action == 2:
            members[key] = choose(
                [1, None, True, "s", 2.5, b"zz", {"a": [1, {"b": None}]}, [1, "x"]]
            )
        elif action == 3:
            members[key] = choose(
                [Map({"k": Text("in"), "l": Array([1])}), Text("hi"), Array([1, 2])]
            )
        elif action == 4 and key in members:
            del members[key]
        elif action == 5:
            array.insert(self.choices.randrange(len(array) + 1), choose([1, "q", [1]]))
        elif action == 6 and len(array):
            del array[self.choices.randrange(len(array))]
        elif action == 7 and isinstance(members.get(key), Map):
            members[key]["n"] = choose([7, Text("n")])

    def run(self) -> Replicas:
        for _ in range(self.choices.randrange(2, 40)):
            self.step()
        return self


seeds = st.integers(0, 2**32).map(random.Random)


@unhurried
@given(seeds)
def test_a_document_says_its_own_state_vector_and_has_no_gap(choices: random.Random) -> None:
    for doc in Replicas(choices).run().docs:
        structure = read_update(doc.get_update())
        assert structure.ends == decode_state_vector(doc.get_state())
        assert find_gap(structure, {}) is None
        assert find_rewrite(structure, structure) is None


@unhurried
@given(seeds)
def test_what_one_replica_sends_another_has_no_gap_there(choices: random.Random) -> None:
    docs = Replicas(choices).run().docs
    for sender in docs:
        for receiver in docs:
            known = decode_state_vector(receiver.get_state())
            update = read_update(sender.get_update(receiver.get_state()))
            assert find_gap(update, known) is None
            assert find_rewrite(update, read_update(receiver.get_update())) is None
            receiver_knows = all(
                known.get(client, 0) >= end
                for client, end in decode_state_vector(sender.get_state()).items()
            )
            deleted = read_update(receiver.get_update()).deleted
            was = receiver.get_update()
            receiver.apply_update(sender.get_update())
            changed = read_update(receiver.get_update()) != read_update(was)
            assert brings(update, known) or not changed
            assert brings(update, known, deleted) == changed
            assert receiver_knows or changed


@unhurried
@given(seeds)
def test_without_any_one_earlier_update_of_a_writer_the_later_ones_have_a_gap(
    choices: random.Random,
) -> None:
    for log in Replicas(choices).run().log:
        for left_out in range(len(log)):
            if not read_update(log[left_out]).structs:
                continue  # a deletion alone: nothing builds on it
            before = merge_updates(*log[:left_out]) if left_out else b"\0\0"
            known = read_update(before).ends
            for later in log[left_out + 1 :]:
                structure = read_update(later)
                if structure.structs:
                    assert find_gap(structure, known) is not None
                    merged = read_update(merge_updates(before, later))
                    assert find_gap(merged, {}) is not None


# --------------------------------------------------------------------- the gap, by another writing


def naive_gap(structure: UpdateStructure, known: Mapping[int, int]) -> bool:
    """Grow the set of known clocks until nothing more fits; a gap is what stays outside."""
    clocks = {(client, clock) for client, end in known.items() for clock in range(end)}
    items = [item for items in structure.structs.values() for item in items]
    grew = True
    while grew:
        grew = False
        for item in items:
            own = {(item.client, clock) for clock in range(item.clock, item.end)}
            earlier = {(item.client, clock) for clock in range(item.clock)}
            needs = {
                tuple(target)
                for target in (item.origin, item.right_origin, item.parent)
                if isinstance(target, Id)
            }
            if item.kind is not Kind.SKIP and not own <= clocks and earlier | needs <= clocks:
                clocks |= own
                grew = True
    wanted = {(item.client, clock) for item in items for clock in range(item.end)}
    wanted |= {
        (client, clock)
        for client, ranges in structure.deleted.items()
        for clocks_ in ranges
        for clock in clocks_
    }
    return not wanted <= clocks


@st.composite
def structures(draw: st.DrawFn) -> UpdateStructure:
    """Small updates with any references: honest, dangling and circular ones."""
    small = st.integers(0, 3)
    structs = {}
    for client in draw(st.lists(st.integers(1, 3), unique=True)):
        clock = draw(small)
        run = []
        for _ in range(draw(st.integers(1, 4))):
            length = draw(st.integers(1, 2))
            kind = draw(st.sampled_from([Kind.STRING, Kind.STRING, Kind.GC, Kind.SKIP]))
            references: st.SearchStrategy[Id | None] = st.none()
            if kind is Kind.STRING:
                # A client's own clocks are earlier ones: others do not get past the reader.
                others = [each for each in (1, 2, 3) if each != client]
                references |= st.builds(Id, st.sampled_from(others), small)
                if clock:
                    references |= st.builds(Id, st.just(client), st.integers(0, clock - 1))
            origin, right_origin, parent = (draw(references) for _ in range(3))
            run.append(
                Struct(
                    kind, client, clock, length, origin, right_origin, parent, None, "x" * length
                )
            )
            clock += length
        structs[client] = tuple(run)
    deleted = {
        client: (range(start, start + draw(st.integers(1, 2))),)
        for client, start in draw(st.dictionaries(st.integers(1, 3), small, max_size=2)).items()
    }
    return UpdateStructure(structs, deleted)


@settings(deadline=None, max_examples=500)
@given(structures(), st.dictionaries(st.integers(1, 3), st.integers(0, 4)))
def test_a_gap_is_found_exactly_when_not_all_can_be_integrated(
    structure: UpdateStructure, known: dict[int, int]
) -> None:
    assert (find_gap(structure, known) is not None) == naive_gap(structure, known)


def text_struct(client: int, clock: int, *, origin: Id | None = None, text: str = "x") -> Struct:
    parent = "t" if origin is None else None
    return Struct(Kind.STRING, client, clock, len(text), origin, None, parent, None, text)


def update_of(*items: Struct, deleted: dict[int, Sequence[range]] | None = None) -> UpdateStructure:
    structs: dict[int, list[Struct]] = {}
    for item in items:
        structs.setdefault(item.client, []).append(item)
    return UpdateStructure(structs, deleted or {})


def test_structs_that_wait_for_each_other_are_a_gap() -> None:
    circle = update_of(text_struct(1, 0, origin=Id(2, 0)), text_struct(2, 0, origin=Id(1, 0)))
    missing = find_gap(circle, {})
    assert missing is not None
    assert missing.what is Lack.CYCLE
    assert find_gap(circle, {1: 1, 2: 1}) is None


def test_what_a_known_struct_builds_on_is_not_asked_again() -> None:
    held = update_of(text_struct(1, 0, origin=Id(2, 5)), text_struct(1, 1, origin=Id(1, 0)))
    assert find_gap(held, {1: 1}) is None
    assert find_gap(held, {}) == Missing(Lack.ORIGIN, Id(2, 5))


def test_a_deletion_of_clocks_that_do_not_exist_yet_is_a_gap() -> None:
    deletion = update_of(deleted={1: (range(1), range(5, 9))})
    assert find_gap(deletion, {1: 9}) is None
    assert find_gap(deletion, {1: 7}) == Missing(Lack.DELETED, Id(1, 7))
    assert find_gap(deletion, {}) == Missing(Lack.DELETED, Id(1, 5))


def test_a_deletion_of_what_the_same_update_brings_is_no_gap() -> None:
    assert find_gap(update_of(text_struct(1, 0), deleted={1: (range(1),)}), {}) is None


def test_a_gap_is_told_in_one_line() -> None:
    assert (
        str(Missing(Lack.EARLIER, Id(7, 3))) == "waits for the clocks before it: client 7, clock 3"
    )


def test_many_clients_that_take_turns_are_searched_in_turn() -> None:
    # Each struct of two clients waits for the other's last one, and a crowd waits for the end.
    steps = 2_000
    turns = [
        text_struct(client, clock, origin=Id(3 - client, clock - (client == 1)))
        for clock in range(1, steps)
        for client in (1, 2)
    ]
    crowd = [text_struct(client, 0, origin=Id(2, steps - 1)) for client in range(3, steps)]
    update = update_of(text_struct(1, 0), text_struct(2, 0, origin=Id(1, 0)), *turns, *crowd)
    assert find_gap(update, {}) is None


# ------------------------------------------------------------------------------- what it may change


def test_a_known_update_brings_nothing_and_a_deletion_may() -> None:
    update = read_update(bytes.fromhex(CASES["a key set in a map"]["update"]))
    assert brings(update, {})
    assert not brings(update, {1: 1})
    deletion = structure_of(CASES["a key deleted: a delete set alone"])
    assert brings(deletion, {1: 2})
    assert brings(deletion, {1: 2}, {1: (range(1),)})
    assert not brings(deletion, {1: 2}, {1: (range(2),)})


@unhurried
@given(
    st.lists(st.tuples(st.integers(0, 20), st.integers(1, 5)), min_size=1, max_size=6),
    st.lists(st.tuples(st.integers(0, 20), st.integers(1, 5)), min_size=1, max_size=6),
)
def test_deletions_are_merged_and_compared_as_sets_of_clocks(
    one: list[tuple[int, int]], other: list[tuple[int, int]]
) -> None:
    def read(ranges: list[tuple[int, int]]) -> UpdateStructure:
        body = bytes((0, 1, 7, len(ranges)))
        return read_update(body + bytes(number for each in ranges for number in each))

    def clocks(ranges: list[tuple[int, int]]) -> set[int]:
        return {clock for start, length in ranges for clock in range(start, start + length)}

    merged = read(one).deleted[7]
    assert [clock for each in merged for clock in each] == sorted(clocks(one))
    assert all(left.stop < right.start for left, right in pairwise(merged))
    assert brings(read(other), {7: 99}, {7: merged}) == (not clocks(other) <= clocks(one))


# ----------------------------------------------------------------------------------------- rewrites

HELD = update_of(
    text_struct(1, 0, text="ab🎈"),
    Struct(Kind.ANY, 1, 4, 3, None, None, "a", None, (1, True, "x")),
    Struct(Kind.DELETED, 1, 7, 2, Id(1, 6), None, None, None, None),
    Struct(Kind.BINARY, 1, 9, 1, None, None, "m", "k", b"\xfd\xff"),
    Struct(Kind.TYPE, 1, 10, 1, None, None, "m", "t", SharedType(TypeRef.TEXT, None)),
    Struct(Kind.FORMAT, 1, 11, 1, None, None, "t", None, Format("bold", True)),
    Struct(Kind.DOC, 1, 12, 1, None, None, "m", "d", Subdocument("guid", {"autoLoad": True})),
)


@pytest.mark.parametrize(
    "item",
    [
        text_struct(1, 0, text="a"),
        text_struct(1, 1, origin=Id(1, 0), text="b🎈"),
        text_struct(1, 0, text="ab\ufffd\ufffd"),
        Struct(Kind.GC, 1, 0, 11, None, None, None, None, None),
        Struct(Kind.SKIP, 1, 0, 11, None, None, None, None, None),
        Struct(Kind.DELETED, 1, 4, 3, None, None, "a", None, None),
        Struct(Kind.ANY, 1, 4, 3, None, None, "a", None, (1.0, True, "x")),
        Struct(Kind.ANY, 1, 5, 2, Id(1, 4), None, None, None, (True, "x")),
        text_struct(1, 7, origin=Id(1, 2), text="zz"),
        Struct(Kind.DOC, 1, 12, 1, None, None, "m", "d", Subdocument("guid", {})),
        text_struct(1, 13, text="new"),
        text_struct(2, 0, text="new"),
    ],
    ids=repr,
)
def test_the_honest_forms_of_a_known_struct_are_no_rewrite(item: Struct) -> None:
    assert find_rewrite(update_of(item), HELD) is None


@pytest.mark.parametrize(
    ("item", "clock"),
    [
        (text_struct(1, 0, text="x"), 0),
        (text_struct(1, 0, text="aX🎈"), 0),
        (text_struct(1, 0, text="\ufffdb🎈"), 0),
        (text_struct(1, 1, text="b🎈"), 1),
        (text_struct(1, 1, origin=Id(2, 0), text="b"), 1),
        (Struct(Kind.STRING, 1, 0, 4, None, Id(2, 0), "t", None, "ab🎈"), 0),
        (Struct(Kind.STRING, 1, 0, 4, None, None, "u", None, "ab🎈"), 0),
        (text_struct(1, 2, origin=Id(1, 1), text="🎈later"), 4),
        (Struct(Kind.ANY, 1, 4, 3, None, None, "a", None, (1, 1, "x")), 4),
        (Struct(Kind.ANY, 1, 4, 3, None, None, "a", None, (True, True, "x")), 4),
        (Struct(Kind.ANY, 1, 4, 3, None, None, "a", None, (1, True, b"x")), 4),
        (Struct(Kind.BINARY, 1, 9, 1, None, None, "m", "k", b"\x00\xd8"), 9),
        (Struct(Kind.BINARY, 1, 9, 1, None, None, "m", "other", b"\xfd\xff"), 9),
        (Struct(Kind.TYPE, 1, 10, 1, None, None, "m", "t", SharedType(TypeRef.MAP, None)), 10),
        (Struct(Kind.FORMAT, 1, 11, 1, None, None, "t", None, Format("bold", 1)), 11),
        (Struct(Kind.FORMAT, 1, 11, 1, None, None, "t", None, Format("b", True)), 11),
        (Struct(Kind.DOC, 1, 12, 1, None, None, "m", "d", Subdocument("other", None)), 12),
    ],
    ids=repr,
)
def test_another_value_for_a_known_clock_is_a_rewrite(item: Struct, clock: int) -> None:
    assert find_rewrite(update_of(item), HELD) == Id(1, clock)


def test_a_replica_that_collected_what_another_holds_rewrites_nothing() -> None:
    held: Doc[Any] = Doc(client_id=1)
    held.get("m", type=Map)["x"] = Map({"k": Text("secret"), "n": [1, 2.0]})
    before = read_update(held.get_update())
    del held["m"]["x"]
    after = read_update(held.get_update())
    assert any(item.kind is Kind.GC for item in after.structs[1])
    assert find_rewrite(before, after) is None
    assert find_rewrite(after, before) is None


# What the library of our replicas reads in another way than Yjs. No schema of ours has these kinds,
# and only the node, which never cuts a character, writes text that can be edited.
READ_OTHERWISE = {
    "half of a surrogate pair deleted": "it loses a clock, and its state vector goes back",
    "XML types": "it reads no name behind a hook",
    "a subdocument": "it comes after the XML types",
    "values in the old JSON form": "it does not read them",
}


@pytest.mark.parametrize(
    "case",
    [case for case in WITHOUT_GAP if case["name"] not in READ_OTHERWISE],
    ids=lambda case: case["name"],
)
def test_real_updates_that_passed_through_another_library_are_no_rewrite(
    case: dict[str, Any],
) -> None:
    doc: Doc[Any] = Doc(client_id=99)
    for update in [*case["requires"], case["update"]]:
        doc.apply_update(bytes.fromhex(update))
    held = read_update(doc.get_update())
    for update in [*case["requires"], case["update"]]:
        assert find_rewrite(read_update(bytes.fromhex(update)), held) is None


# -------------------------------------------------------------------------- totality and the limits


def holds(update: bytes) -> None:
    """Whatever bytes are read, every question about the result has an answer."""
    try:
        structure = read_update(update, TRANSACTION_LIMITS)
    except (MalformedMessage, TooLarge):
        return
    for known in ({}, structure.ends, dict.fromkeys(structure.structs, 1)):
        find_gap(structure, known)
        brings(structure, known, structure.deleted)
    assert find_rewrite(structure, structure) is None
    assert not brings(structure, structure.ends, structure.deleted)


@unhurried
@given(st.binary(max_size=200))
def test_any_bytes_are_an_update_or_refused(update: bytes) -> None:
    holds(update)


@unhurried
@given(st.sampled_from(list(Kind)), st.integers(0, 7), st.binary(max_size=40))
def test_any_body_of_a_struct_is_an_update_or_refused(kind: Kind, flags: int, body: bytes) -> None:
    holds(bytes((1, 1, 7, 0, kind | flags << 5)) + body + b"\0")
    holds(bytes((1, 1, 7, 0, kind, 1, 1, 116)) + body + b"\0")


@pytest.mark.parametrize("case", VECTORS["cases"], ids=lambda case: case["name"])
def test_no_prefix_of_an_update_is_an_update(case: dict[str, Any]) -> None:
    update = bytes.fromhex(case["update"])
    for length in range(len(update)):
        with pytest.raises((MalformedMessage, TooLarge)):
            read_update(update[:length])


@pytest.mark.parametrize("case", VECTORS["cases"], ids=lambda case: case["name"])
def test_an_update_with_one_byte_changed_is_an_update_or_refused(case: dict[str, Any]) -> None:
    update = bytes.fromhex(case["update"])
    for position in range(len(update)):
        for flipped in (0x00, 0x01, 0x7F, 0x80, 0xFF, update[position] ^ 0x40):
            holds(update[:position] + bytes((flipped,)) + update[position + 1 :])


def value_update(value: bytes) -> bytes:
    return bytes((1, 1, 7, 0, Kind.ANY, 1)) + write_var_string("a") + b"\1" + value + b"\0"


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(b"\x75\x01" * 20_000 + b"\x7e", id="arrays"),
        pytest.param(b"\x76\x01\x01k" * 20_000 + b"\x7e", id="objects"),
        pytest.param(b"\x75\x01\x76\x01\x01k" * 10_000 + b"\x7e", id="both"),
    ],
)
def test_a_value_nested_20_000_deep_is_too_large(value: bytes) -> None:
    with pytest.raises(TooLarge, match="deeper than 16"):
        read_update(value_update(value))


def test_json_nested_20_000_deep_is_malformed() -> None:
    embed = bytes((1, 1, 7, 0, Kind.EMBED, 1)) + write_var_string("t")
    with pytest.raises(MalformedMessage, match="deeper than 16"):
        read_update(embed + write_var_string("[" * 20_000 + "]" * 20_000) + b"\0")


@pytest.mark.parametrize(
    ("limits", "code"),
    [
        (Limits(10, 9, 9, 9, 9), "update-too-large"),
        (Limits(99, 1, 9, 9, 9), "too-many-structs"),
        (Limits(99, 9, 2, 9, 9), "too-many-values"),
        (Limits(99, 9, 9, 1, 9), "too-many-deletions"),
    ],
    ids=str,
)
def test_over_a_limit_is_too_large(limits: Limits, code: str) -> None:
    update = bytes((1, 2, 7, 0, Kind.ANY, 1, 1, 97, 1, 117, 2, 126, 126, 0, 1, 1, 7, 2, 0, 1, 2, 1))
    read_update(update, Limits(99, 2, 3, 2, 9))
    with pytest.raises(TooLarge) as caught:
        read_update(update, limits)
    assert caught.value.code == code


@pytest.mark.parametrize("kind", [Kind.GC, Kind.DELETED, Kind.SKIP])
def test_structs_that_hold_nothing_have_a_limit_of_their_own(kind: Kind) -> None:
    root = b"" if kind is not Kind.DELETED else b"\1" + write_var_string("t")
    update = bytes((1, 3, 7, 0)) + (bytes((kind,)) + root + b"\1") * 3 + b"\0"
    read_update(update, Limits(99, 9, 9, 9, 3))
    with pytest.raises(TooLarge, match="collected") as caught:
        read_update(update, Limits(99, 9, 9, 9, 2))
    assert caught.value.code == "too-many-structs"


def test_json_counts_as_the_values_it_becomes() -> None:
    embed = bytes((1, 1, 7, 0, Kind.EMBED, 1)) + write_var_string("t")
    update = embed + write_var_string('[1,{"a":2}]') + b"\0"
    read_update(update, Limits(99, 1, 4, 1, 9))
    with pytest.raises(TooLarge, match="too many values"):
        read_update(update, Limits(99, 1, 3, 1, 9))


def test_a_count_that_promises_more_than_the_limit_costs_nothing() -> None:
    for update in (
        write_var_uint(2**40),
        b"\x00" + write_var_uint(2**40),
        b"\x01" + write_var_uint(2**40) + b"\7\0",
        value_update(b"\x75" + write_var_uint(2**40)),
        value_update(b"\x76" + write_var_uint(2**40)),
        b"\x00\x01\x07" + write_var_uint(2**40),
    ):
        with pytest.raises(TooLarge):
            read_update(update)


def test_the_last_clock_is_readable_and_the_next_is_not() -> None:
    # The replica counts in 32 bits: clock 2^32 would come out as clock 0, on somebody's first word.
    last = bytes((1, 1, 7)) + write_var_uint(2**32 - 2) + bytes((Kind.GC, 1, 0))
    assert read_update(last).ends == {7: 2**32 - 1}
    beyond = bytes((1, 1, 7)) + write_var_uint(2**32 - 1) + bytes((Kind.GC, 1, 0))
    with pytest.raises(TooLarge, match="32 bits"):
        read_update(beyond)


def test_a_whole_document_is_within_its_limits() -> None:
    doc: Doc[Any] = Doc(client_id=1)
    entries = doc.get("entries", type=Map)
    with doc.transaction():
        for number in range(5_000):
            entries[f"{number:026}"] = Map({"born": {"role": "user"}, "content": "word " * 20})
    structure = read_update(doc.get_update(), DOCUMENT_LIMITS)
    assert sum(map(len, structure.structs.values())) == 15_000
    assert find_gap(structure, {}) is None
