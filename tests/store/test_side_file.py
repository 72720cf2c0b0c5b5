from __future__ import annotations

import asyncio
import sqlite3
import threading
from functools import partial
from typing import TYPE_CHECKING

import pytest

from crdt_llm.errors import Corrupt, StoreFailed
from crdt_llm.store import side_file as side_file_module
from crdt_llm.store.side_file import Kind, SideFile

if TYPE_CHECKING:
    from pathlib import Path

KIND = Kind(7, "CREATE TABLE IF NOT EXISTS words (word TEXT PRIMARY KEY) STRICT;", "is no", "move")


def words(file: SideFile) -> list[str]:
    rows = file.read(lambda one: one.execute("SELECT word FROM words ORDER BY word").fetchall())
    return [row[0] for row in rows]


def test_a_write_that_fails_leaves_nothing_and_the_next_one_works(tmp_path: Path) -> None:
    file = SideFile.open(tmp_path / "x.db", KIND)

    def half(one: sqlite3.Connection) -> None:
        one.execute("INSERT INTO words VALUES ('half')")
        raise LookupError("in the middle")

    with pytest.raises(LookupError):
        file.write(half)
    file.write(lambda one: one.execute("INSERT INTO words VALUES ('whole')"))
    assert words(file) == ["whole"]
    file.close()
    again = SideFile.open(tmp_path / "x.db", KIND)
    assert words(again) == ["whole"]
    again.close()


async def test_reading_does_not_wait_for_a_writer_and_writes_wait_in_order(tmp_path: Path) -> None:
    file = SideFile.open(tmp_path / "x.db", KIND)
    other = sqlite3.connect(tmp_path / "x.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")

    def put(word: str) -> None:
        file.write(lambda one: one.execute("INSERT INTO words VALUES (?)", (word,)))

    writing = [asyncio.ensure_future(file.aside(partial(put, word))) for word in "ab"]
    await asyncio.sleep(0)
    assert words(file) == []
    assert not any(one.done() for one in writing)
    other.execute("COMMIT")
    other.close()
    await asyncio.gather(*writing)
    assert words(file) == ["a", "b"]
    file.close()


async def test_few_wait_for_the_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_file_module, "WAITING_MAX", 1)
    file = SideFile.open(None, KIND)
    gate = threading.Event()
    waiting = asyncio.ensure_future(file.aside(gate.wait))
    await asyncio.sleep(0)
    with pytest.raises(StoreFailed, match="too many"):
        await file.aside(lambda: None)
    gate.set()
    assert await waiting
    await asyncio.sleep(0)
    assert await file.aside(lambda: "again") == "again"
    file.close()


async def test_who_gave_up_waiting_stops_nothing() -> None:
    file = SideFile.open(None, KIND)
    gate = threading.Event()

    def put() -> None:
        gate.wait()
        file.write(lambda one: one.execute("INSERT INTO words VALUES ('kept')"))

    waiting = asyncio.ensure_future(file.aside(put))
    await asyncio.sleep(0)
    waiting.cancel()
    gate.set()
    await file.aside(lambda: None)
    assert words(file) == ["kept"]
    file.close()


def test_a_lock_that_stays_is_an_error_that_says_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(side_file_module, "BUSY_TIMEOUT_S", 0.0)
    file = SideFile.open(tmp_path / "x.db", KIND)
    other = sqlite3.connect(tmp_path / "x.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreFailed, match="cannot be used now"):
        file.write(lambda one: one.execute("INSERT INTO words VALUES ('x')"))
    other.close()
    file.close()


def test_a_file_of_another_kind_is_left_alone(tmp_path: Path) -> None:
    SideFile.open(tmp_path / "x.db", KIND).close()
    with pytest.raises(Corrupt, match="is not it"):
        SideFile.open(tmp_path / "x.db", Kind(8, KIND.schema, "is not it", "move"))
