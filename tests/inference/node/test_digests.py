"""Digests of a live KV cache: what is recorded comes back, and what is withdrawn goes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from crdt_llm.document.tree import Facts, Tree
from crdt_llm.inference.node.digests import Border, Digests

if TYPE_CHECKING:
    from pathlib import Path

A, B, C, D = (letter * 26 for letter in "ABCD")
CONVERSATION = "c" * 22


def borders(*names: str) -> dict[Border, bytes]:
    return {Border(name, n + 1, "model"): bytes([n]) * 32 for n, name in enumerate(names)}


def recorded(folder: Path, *names: str) -> Digests:
    digests = Digests(folder)
    for border, kv in borders(*names).items():
        digests.note(CONVERSATION, border, kv)
    return digests


def test_what_is_recorded_comes_back_in_another_process(tmp_path: Path) -> None:
    recorded(tmp_path / "digests", A, B)
    assert Digests(tmp_path / "digests").load(CONVERSATION) == {
        border: kv.hex() for border, kv in borders(A, B).items()
    }
    assert Digests(tmp_path / "digests").load("d" * 22) == {}
    assert (tmp_path / "digests" / CONVERSATION).stat().st_mode & 0o077 == 0


def test_a_damaged_line_counts_as_absent(tmp_path: Path) -> None:
    digests = recorded(tmp_path, A)
    with (tmp_path / CONVERSATION).open("ab") as file:
        file.write(b"\xff\xfe nonsense\nA x y z\n\nshort")
    assert set(digests.load(CONVERSATION)) == set(borders(A))


def test_what_is_withdrawn_goes_with_everything_behind_it(tmp_path: Path) -> None:
    tree = Tree(
        [
            Facts(A, 1, parent="", epoch=1),
            Facts(B, 2, after=A, parent=A, epoch=1),
            Facts(C, 3, after=B, parent=B, epoch=1),
            Facts(D, 4, after=A, fork=True, parent=A, epoch=1),
        ]
    )
    digests = recorded(tmp_path, A, B, C, D)
    digests.drop(CONVERSATION, tree, [B])
    assert {border.entry for border in digests.load(CONVERSATION)} == {A, D}
    left = (tmp_path / CONVERSATION).read_bytes()
    assert (b"01" * 32) not in left
    digests.drop(CONVERSATION, tree, [A])
    assert digests.load(CONVERSATION) == {}
