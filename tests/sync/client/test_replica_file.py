"""The folder that keeps a device's replicas."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

import pytest

from crdt_llm.errors import Corrupt, DataFolderBusy, StoreFailed
from crdt_llm.sync.client.replica_file import LOG_NAME, ReplicaFile

if TYPE_CHECKING:
    from pathlib import Path


def clock() -> int:
    return 0


async def test_the_folder_is_made_for_its_owner_alone(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    file = await ReplicaFile.open(folder, clock)
    await file.log.append("conversation", [b"update"])
    assert await file.conversations() == ("conversation",)
    await file.close()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}


async def test_it_is_locked_until_closed(tmp_path: Path) -> None:
    file = await ReplicaFile.open(tmp_path, clock)
    with pytest.raises(DataFolderBusy) as caught:
        await ReplicaFile.open(tmp_path, clock)
    assert str(tmp_path) in str(caught.value)
    await file.close()
    await (await ReplicaFile.open(tmp_path, clock)).close()


async def test_a_damaged_file_is_said_and_leaves_no_lock(tmp_path: Path) -> None:
    (tmp_path / LOG_NAME).write_bytes(b"no database at all" * 100)
    for _ in range(2):
        with pytest.raises(Corrupt):
            await ReplicaFile.open(tmp_path, clock)
    os.unlink(tmp_path / LOG_NAME)  # noqa: PTH108 - a Path's method would block as well
    await (await ReplicaFile.open(tmp_path, clock)).close()


async def test_a_folder_that_cannot_be_used_is_said_in_one_line(tmp_path: Path) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("not a folder")
    with pytest.raises(StoreFailed, match="cannot be used") as caught:
        await ReplicaFile.open(in_the_way, clock)
    assert "\n" not in str(caught.value)


async def test_memory_keeps_nothing() -> None:
    file = await ReplicaFile.open(None, clock)
    await file.log.append("conversation", [b"update"])
    assert await file.conversations() == ("conversation",)
    await file.close()
    again = await ReplicaFile.open(None, clock)
    assert await again.conversations() == ()
    await again.close()
