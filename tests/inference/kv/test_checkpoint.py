"""Files of KV: what comes back is what was written, or nothing."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from crdt_llm.inference.kv.checkpoint import Checkpoints, Rows
from crdt_llm.inference.kv.tree import TILE

if TYPE_CHECKING:
    from pathlib import Path

FINGERPRINT = "f" * 32


def rows_of(ids: np.ndarray, seed: int = 0) -> Rows:
    """Random rows of the last tile of a path."""
    count = (len(ids) - 1) % TILE + 1
    generator = torch.Generator().manual_seed(seed)
    kv = torch.randn(2, 4, count, 8, generator=generator).bfloat16()
    return Rows(ids, kv, torch.randn(count, 16, generator=generator).bfloat16())


def path_of(length: int, last: int | None = None) -> np.ndarray:
    ids = np.arange(length, dtype=np.uint32) % 7
    if last is not None:
        ids[-1] = last
    return ids


def found(checkpoints: Checkpoints, ids: np.ndarray, length: int = 0) -> Rows | None:
    one = checkpoints.find(ids, length)
    return None if one is None else checkpoints.load(one)


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path / "kv", FINGERPRINT)


def again(checkpoints: Checkpoints, **changes: object) -> Checkpoints:
    """The same folder in another process."""
    arguments = {"fingerprint": FINGERPRINT} | changes
    return Checkpoints(checkpoints._folder, **arguments)  # type: ignore[arg-type]  # names of the class


def files(checkpoints: Checkpoints) -> list[Path]:
    return sorted(checkpoints._folder.iterdir())


@pytest.mark.parametrize("length", [1, 100, TILE, TILE + 1, 2 * TILE])
@pytest.mark.parametrize("restarted", [False, True])
def test_rows_come_back_as_they_were(
    checkpoints: Checkpoints, length: int, *, restarted: bool
) -> None:
    rows = rows_of(path_of(length))
    checkpoints.save(rows)
    if restarted:
        checkpoints = again(checkpoints)
    start = (length - 1) // TILE * TILE
    back = found(checkpoints, path_of(length + 9), start)
    assert back is not None
    assert torch.equal(back.kv, rows.kv)
    assert torch.equal(back.hidden, rows.hidden)
    assert np.array_equal(back.ids, rows.ids)
    assert found(checkpoints, path_of(length), length) is None  # nothing more than is resident


def test_a_path_finds_what_it_shares_and_nothing_of_another(checkpoints: Checkpoints) -> None:
    checkpoints.save(rows_of(path_of(TILE)))
    checkpoints.save(rows_of(path_of(TILE + 40), seed=1))
    one = checkpoints.find(path_of(TILE + 20, last=99), TILE)
    assert one is not None
    assert len(one.ids) == TILE + 40
    other = path_of(TILE + 20)
    other[3] = 99  # in the tile before
    assert checkpoints.find(other, TILE) is None


def test_a_longer_tile_replaces_what_it_extends(checkpoints: Checkpoints) -> None:
    checkpoints.save(rows_of(path_of(10)))
    checkpoints.save(rows_of(path_of(30)))
    checkpoints.save(rows_of(path_of(20)))  # is there already
    checkpoints.save(rows_of(path_of(20, last=99)))
    assert len(files(checkpoints)) == 2
    assert checkpoints.bytes == sum(file.stat().st_size for file in files(checkpoints))


def flip(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    "damage", ["truncated", "empty", "gone", "flipped", "flipped id", "swapped"]
)
@pytest.mark.parametrize("restarted", [False, True])
def test_damage_is_noticed_and_said_once(
    checkpoints: Checkpoints, damage: str, caplog: pytest.LogCaptureFixture, *, restarted: bool
) -> None:
    ids = path_of(3 * TILE)
    for tiles in (1, 2, 3):
        checkpoints.save(rows_of(ids[: tiles * TILE], seed=tiles))
    checkpoints.save(rows_of(path_of(50, last=99), seed=9))
    names = {len(one.ids): one.file for one in checkpoints._all()}
    file = names[2 * TILE]
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "gone":
        file.unlink()
    elif damage == "flipped":
        flip(file, file.stat().st_size - 1000)
    elif damage == "flipped id":
        flip(file, file.read_bytes().index(ids[: 2 * TILE].tobytes()))
    else:
        file.write_bytes(names[50].read_bytes())
    with caplog.at_level(logging.WARNING):
        if restarted:
            checkpoints = again(checkpoints)
        assert found(checkpoints, ids, TILE) is None
        assert found(checkpoints, ids, TILE) is None
    silent = restarted and damage == "gone"  # a file that is not there was never written
    assert len(caplog.records) == (0 if silent else 1)
    assert not any(name.stem in caplog.text for name in names.values())
    first, other = found(checkpoints, ids), found(checkpoints, path_of(50, last=99))
    assert first is not None
    assert other is not None
    assert torch.equal(first.kv, rows_of(ids[:TILE], seed=1).kv)


def test_files_of_another_build_are_removed(checkpoints: Checkpoints) -> None:
    checkpoints.save(rows_of(path_of(30)))
    other = again(checkpoints, fingerprint="e" * 32)
    assert other.find(path_of(30), 0) is None
    assert files(checkpoints) == []


def test_what_a_crash_left_half_written_is_removed(checkpoints: Checkpoints) -> None:
    checkpoints.save(rows_of(path_of(30)))
    (file,) = files(checkpoints)
    file.rename(file.with_suffix(".part"))
    assert again(checkpoints).find(path_of(30), 0) is None
    assert files(checkpoints) == []


def test_only_the_owner_reads_them(checkpoints: Checkpoints) -> None:
    checkpoints.save(rows_of(path_of(30)))
    (file,) = files(checkpoints)
    assert file.stat().st_mode & 0o777 == 0o600
    assert checkpoints._folder.stat().st_mode & 0o777 == 0o700


def test_the_folder_stays_within_its_bound_and_keeps_what_was_used(
    checkpoints: Checkpoints,
) -> None:
    checkpoints.save(rows_of(path_of(TILE)))
    size = checkpoints.bytes
    small = again(checkpoints, bytes_max=4 * size)
    small.save(rows_of(path_of(2 * TILE)))
    for number in range(10, 20):
        small.save(rows_of(np.full(TILE, number, np.uint32)))
        assert found(small, path_of(2 * TILE), TILE) is not None  # and with it what it builds on
        assert small.bytes <= 4 * size
    assert found(small, path_of(TILE)) is not None
    assert small.find(np.full(TILE, 10, np.uint32), 0) is None
    assert again(small, bytes_max=size).bytes <= size


def test_forgetting_removes_every_file_that_was_computed_from_it(checkpoints: Checkpoints) -> None:
    ids = path_of(3 * TILE)
    for tiles in (1, 2, 3):
        checkpoints.save(rows_of(ids[: tiles * TILE]))
    fork = np.append(ids[: TILE + 10], np.full(20, 99, np.uint32))
    checkpoints.save(rows_of(fork))
    checkpoints.forget(ids[: TILE + 40], TILE + 20)
    left = {len(one.ids) for one in checkpoints._all()}
    assert left == {TILE, len(fork)}
    assert len(files(checkpoints)) == 2
    checkpoints.forget(ids[:10], 5)
    assert files(checkpoints) == []


def test_a_disk_that_fails_costs_a_warning(
    checkpoints: Checkpoints, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints._folder.rmdir()
    checkpoints.save(rows_of(path_of(30)))
    assert len(caplog.records) == 1
    # A digest of ids would let a short secret be guessed.
    assert hashlib.sha256(path_of(30).tobytes()).hexdigest()[:32] not in caplog.text
    assert checkpoints.find(path_of(30), 0) is None


def test_what_cannot_be_overwritten_is_removed_and_its_name_is_not_logged(
    checkpoints: Checkpoints, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints.save(rows_of(path_of(30)))
    (file,) = files(checkpoints)

    def fail(_: int) -> None:
        raise OSError(errno.EIO, "it broke", str(file))

    monkeypatch.setattr(os, "fsync", fail)
    checkpoints.forget(path_of(30), 0)
    assert files(checkpoints) == []
    assert len(caplog.records) == 1
    assert file.stem not in caplog.text
