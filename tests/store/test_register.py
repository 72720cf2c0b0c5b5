"""The contract of a register, for the file and for the one without a disk."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import stat
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crdt_llm.errors import Corrupt, LocalMisuse, StoreFailed
from crdt_llm.store import register as register_module
from crdt_llm.store.register import MemoryRegister, Row, SqliteRegister, check_row

if TYPE_CHECKING:
    from collections.abc import Callable

    from crdt_llm.store.register import Register

    Open = Callable[[], "Opening"]
    from collections.abc import Awaitable

    Opening = Awaitable[Register]

ROW = Row(
    conversation="c" * 22,
    owner="olga",
    nonce=b"n" * 16,
    access={"will": "writer", "rita": "reader"},
    access_version=3,
    epoch=2,
    holder=b"k" * 32,
    tips={"A": b"d" * 32, "B": b""},
    redacted={"G": ("olga", 12)},
    unconfirmed={"P": "will"},
    clients={7: "p:olga", 2**32 - 1: "n:node"},
    log_id="log",
    lsn=44,
    scrub_owed=True,
    facts={"title": b"t" * 32},
    former={"title": (b"u" * 32, b""), "": (b"",)},
    stops={"S": ("will", "olga")},
    ends={"E": ("failed", b"e" * 32), "F": ("superseded", b"")},
)


@pytest.fixture(params=["memory", "file"])
def open_register(request: pytest.FixtureRequest, tmp_path: Path) -> Open:
    disk: dict[str, Row] = {}

    async def opening() -> Register:
        if request.param == "memory":
            return MemoryRegister(disk)
        return await SqliteRegister.open(tmp_path / "register.db")

    return opening


async def test_a_row_comes_back_as_it_was_saved(open_register: Open) -> None:
    register = await open_register()
    assert await register.load(ROW.conversation) is None
    await register.save(ROW)
    assert await register.load(ROW.conversation) == ROW
    await register.close()
    again = await open_register()
    assert await again.load(ROW.conversation) == ROW
    await again.close()


async def test_the_last_save_counts(open_register: Open) -> None:
    register = await open_register()
    saves = [replace(ROW, epoch=epoch, access={}) for epoch in range(50)]
    await asyncio.gather(*(register.save(row) for row in saves))
    assert await register.load(ROW.conversation) == saves[-1]
    await register.close()


async def test_conversations_do_not_touch_each_other(open_register: Open) -> None:
    register = await open_register()
    rows = [replace(ROW, conversation=f"{number:022}", epoch=number) for number in range(20)]
    await asyncio.gather(*(register.save(row) for row in rows))
    for row in rows:
        assert await register.load(row.conversation) == row
    await register.close()


async def test_whose_conversations_there_are_follows_the_rows(open_register: Open) -> None:
    register = await open_register()
    other = replace(ROW, conversation="d" * 22, owner="will", access={})
    await register.save(ROW)
    await register.save(other)
    assert await register.conversations_of("will") == (ROW.conversation, other.conversation)
    assert await register.conversations_of("rita") == (ROW.conversation,)
    await register.save(replace(ROW, access={"stan": "reader"}))
    assert await register.conversations_of("rita") == ()
    assert await register.conversations_of("stan") == (ROW.conversation,)
    assert await register.conversations_of("olga") == (ROW.conversation,)
    assert await register.conversations_of("nobody") == ()
    await register.close()


async def test_what_owes_a_scrub_is_found(open_register: Open) -> None:
    register = await open_register()
    other = replace(ROW, conversation="d" * 22, scrub_owed=False)
    await register.save(other)
    await register.save(ROW)
    assert await register.owed() == (ROW.conversation,)
    await register.save(replace(ROW, scrub_owed=False))
    assert await register.owed() == ()
    await register.close()


async def test_a_closed_register_says_so(open_register: Open) -> None:
    register = await open_register()
    saving = asyncio.ensure_future(register.save(ROW))
    await asyncio.sleep(0)
    await register.close()
    await register.close()
    await saving  # what was handed over before is carried out
    with pytest.raises(LocalMisuse):
        await register.load(ROW.conversation)
    with pytest.raises(LocalMisuse):
        await register.save(ROW)
    again = await open_register()
    assert await again.load(ROW.conversation) == ROW
    await again.close()


async def test_a_cancelled_save_is_carried_out(open_register: Open) -> None:
    register = await open_register()
    saving = asyncio.ensure_future(register.save(ROW))
    await asyncio.sleep(0)
    saving.cancel()
    await asyncio.gather(saving, return_exceptions=True)
    await register.save(replace(ROW, conversation="d" * 22))
    assert await register.load(ROW.conversation) == ROW
    await register.close()


@pytest.mark.parametrize("name", ["", "x" * 129])
async def test_a_name_has_a_limit(open_register: Open, name: str) -> None:
    register = await open_register()
    with pytest.raises(LocalMisuse):
        await register.save(replace(ROW, conversation=name))
    await register.close()


def test_a_row_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_row(ROW) == ROW.encode()
    monkeypatch.setattr(register_module, "ROW_BYTES_MAX", len(ROW.encode()) - 1)
    with pytest.raises(LocalMisuse):
        check_row(ROW)


def test_rows_say_the_same_in_any_order() -> None:
    turned = replace(ROW, access=dict(sorted(ROW.access.items(), reverse=True)))
    assert turned.encode() == ROW.encode()


def test_a_row_from_before_facts_were_kept_knows_none() -> None:
    old = replace(ROW, facts=None, former={}, stops={}, ends={})
    values = msgpack.unpackb(ROW.encode(), strict_map_key=False)
    assert old.encode() == msgpack.packb(values[:12])
    assert Row.decode(ROW.conversation, old.encode(), scrub_owed=True) == old
    assert Row.decode(ROW.conversation, ROW.encode(), scrub_owed=True) == ROW


@given(st.binary(max_size=80))
def test_bytes_that_are_no_row_are_noticed(packed: bytes) -> None:
    try:
        row = Row.decode("c", packed, scrub_owed=False)
    except (ValueError, TypeError, AttributeError, IndexError):
        return
    assert isinstance(row, Row)


# -- what only the file has -------------------------------------------------------------------


async def test_the_file_is_private(tmp_path: Path) -> None:
    async with await SqliteRegister.open(tmp_path / "register.db") as register:
        await register.save(ROW)
        for file in tmp_path.iterdir():  # noqa: ASYNC240 - nothing else runs here
            assert stat.S_IMODE(file.stat().st_mode) == 0o600, file


async def test_a_commit_that_fails_leaves_the_row_before(tmp_path: Path) -> None:
    failing = False

    def fault(seam: str) -> None:
        if failing and seam == "register-before-commit":
            raise OSError("no space")

    async with await SqliteRegister.open(tmp_path / "register.db", faults=fault) as register:
        await register.save(ROW)
        failing = True
        with pytest.raises(StoreFailed, match="no space"):
            await register.save(replace(ROW, epoch=9))
        failing = False
        assert await register.load(ROW.conversation) == ROW
        await register.save(replace(ROW, epoch=10))


async def test_rows_that_wait_share_a_commit(tmp_path: Path) -> None:
    may_commit, commits = threading.Event(), 0

    def fault(seam: str) -> None:
        nonlocal commits
        if seam == "register-before-commit":
            may_commit.wait(20)
            commits += 1

    async with await SqliteRegister.open(tmp_path / "register.db", faults=fault) as register:
        first = asyncio.ensure_future(register.save(ROW))
        await asyncio.sleep(0)
        others = [
            asyncio.ensure_future(register.save(replace(ROW, conversation=f"{number}")))
            for number in range(20)
        ]
        await asyncio.sleep(0)
        may_commit.set()
        await asyncio.gather(first, *others)
        assert commits <= 3


async def test_a_changed_row_is_noticed_and_the_others_are_read(tmp_path: Path) -> None:
    path = tmp_path / "register.db"
    other = replace(ROW, conversation="d" * 22)
    async with await SqliteRegister.open(path) as register:
        await register.save(ROW)
        await register.save(other)
    connection = sqlite3.connect(path)
    connection.execute(
        "UPDATE rows SET bytes = CAST(replace(bytes, x'6f6c6761', x'6f6c6762') AS BLOB)"
        " WHERE conversation = ?",
        (ROW.conversation,),
    )
    connection.commit()
    connection.close()
    async with await SqliteRegister.open(path) as register:
        with pytest.raises(Corrupt, match="was changed"):
            await register.load(ROW.conversation)
        assert await register.load(other.conversation) == other


async def test_another_programs_file_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "register.db"
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE theirs (x)")
    connection.commit()
    connection.close()
    before = path.read_bytes()
    with pytest.raises(Corrupt, match="another program"):
        await SqliteRegister.open(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"not a database" * 100])
async def test_what_is_no_register_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "register.db"
    path.write_bytes(content)
    with pytest.raises(Corrupt):
        await SqliteRegister.open(path)


async def test_a_newer_versions_file_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "register.db"
    await (await SqliteRegister.open(path)).close()
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 2")
    connection.close()
    with pytest.raises(Corrupt, match="newer version"):
        await SqliteRegister.open(path)


CHILD = """
import asyncio, os, signal, sys
from dataclasses import replace
from pathlib import Path
from crdt_llm.store.register import Row, SqliteRegister

def fault(seam):
    global left
    if seam == sys.argv[2]:
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

left = int(sys.argv[3])

async def main():
    register = await SqliteRegister.open(Path(sys.argv[1]), faults=fault)
    for epoch in range(1, 100):
        await register.save(Row("c", "olga", b"n" * 16, epoch=epoch))
        print(epoch, flush=True)

asyncio.run(main())
"""


@pytest.mark.parametrize("seam", ["register-before-commit", "register-after-commit"])
@pytest.mark.parametrize("after", [1, 7])
def test_a_killed_process_keeps_what_it_said_was_saved(
    tmp_path: Path, seam: str, after: int
) -> None:
    path = tmp_path / "register.db"
    child = subprocess.run(  # noqa: S603 - our own program
        [sys.executable, "-c", CHILD, str(path), seam, str(after)],
        capture_output=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        timeout=60,
    )
    assert child.returncode == -9, child.stderr.decode()
    said = [int(line) for line in child.stdout.split()]
    assert said == list(range(1, after))

    async def saved() -> int:
        async with await SqliteRegister.open(path) as register:
            row = await register.load("c")
        return row.epoch if row is not None else 0

    assert asyncio.run(saved()) == (after if seam == "register-after-commit" else after - 1)
