from __future__ import annotations

import stat
from typing import TYPE_CHECKING

import pytest

from crdt_llm.errors import Corrupt, StoreFailed
from crdt_llm.store.archive import Archive

if TYPE_CHECKING:
    from pathlib import Path


async def test_what_was_put_away_stays_so_for_that_principal(tmp_path: Path) -> None:
    path = tmp_path / "archive.db"
    archive = Archive.open(path)
    await archive.put("ada", "one", archived=True)
    await archive.put("ada", "one", archived=True)
    await archive.put("ada", "two", archived=True)
    await archive.put("ada", "two", archived=False)
    await archive.put("bob", "three", archived=True)
    archive.close()
    archive = Archive.open(path)
    assert archive.of("ada") == {"one"}
    assert archive.of("nobody") == frozenset()
    archive.close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


async def test_memory_will_do() -> None:
    archive = Archive.open(None)
    await archive.put("ada", "one", archived=True)
    assert archive.of("ada") == {"one"}
    archive.close()


@pytest.mark.parametrize("content", [b"no database at all, but long enough" * 100])
def test_another_file_is_not_touched(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "archive.db"
    path.write_bytes(content)
    with pytest.raises(Corrupt):
        Archive.open(path)
    assert path.read_bytes() == content


def test_a_folder_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(StoreFailed, match="check its rights"):
        Archive.open(tmp_path / "none" / "archive.db")
