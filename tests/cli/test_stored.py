from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING

import pytest

from crdt_llm.cli.stored import complete_id, list_stored, load_stored
from crdt_llm.document.conversation import Conversation
from crdt_llm.document.schema import Birth, conversation_id
from crdt_llm.errors import Corrupt, LocalMisuse, StoreFailed
from crdt_llm.store.sqlite import SqliteLog

if TYPE_CHECKING:
    from pathlib import Path


def born(nonce: int) -> tuple[str, Conversation]:
    birth = Birth("owner", nonce.to_bytes(16))
    replica = Conversation(Random(nonce).randrange(1, 2**32))
    with replica.writing() as writer:
        writer.give_birth(birth, 1)
    return conversation_id(birth), replica


async def test_it_reads_beside_a_writer(tmp_path: Path) -> None:
    path = tmp_path / "log.db"
    name, replica = born(1)
    async with await SqliteLog.open(path) as log:
        await log.append(name, [replica.diff()])
        assert load_stored(path, name).state_vector() == replica.state_vector()
        before = replica.state_vector()
        with replica.writing() as writer:
            writer.set_meta("title", "x")
        await log.append(name, [replica.diff(before)])  # the reader is not in the way
        assert load_stored(path, name).meta.title == "x"
        await log.compact(name, replica.diff(), 2)
        assert load_stored(path, name).meta.title == "x"


async def test_the_list_has_the_last_changed_first(tmp_path: Path) -> None:
    path = tmp_path / "log.db"
    times = iter((1, 2, 3))
    async with await SqliteLog.open(path, clock=lambda: next(times)) as log:
        names = [born(number)[0] for number in range(2)]
        for number in (0, 1, 0):
            await log.append(names[number], [born(number)[1].diff()])
    assert [stored.conversation for stored in list_stored(path)] == names


def test_without_a_file_there_is_nothing_and_none_is_made(tmp_path: Path) -> None:
    path = tmp_path / "log.db"
    assert list_stored(path) == ()
    with pytest.raises(StoreFailed, match="--data"):
        load_stored(path, "A" * 22)
    assert list(tmp_path.iterdir()) == []


async def test_a_conversation_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "log.db"
    name, replica = born(1)
    async with await SqliteLog.open(path) as log:
        await log.append(name, [replica.diff()])
        await log.delete(name)
    for missing in (name, "A" * 22):
        with pytest.raises(StoreFailed, match=missing):
            load_stored(path, missing)


async def test_what_is_stored_but_no_document_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "log.db"
    async with await SqliteLog.open(path) as log:
        await log.append("A" * 22, [b"no update"])
    with pytest.raises(Corrupt, match="no document"):
        load_stored(path, "A" * 22)


def test_another_file_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "log.db"
    path.write_bytes(b"no database at all" * 100)
    with pytest.raises(Corrupt, match=r"log\.db"):
        list_stored(path)


def test_an_id_is_named_by_its_beginning() -> None:
    known = ["abc", "abd", "x", "xy"]
    assert complete_id("abc", known) == "abc"
    assert complete_id("abd"[:3], known) == "abd"
    assert complete_id("x", known) == "x"  # whole, although another one begins so
    assert complete_id("q", known) is None
    with pytest.raises(LocalMisuse, match="2 conversations"):
        complete_id("ab", known)
