"""KV on disk: the rows of tiles that left memory, or that should outlive the process.

Owns the folder ``kv/``: one file a tile, an index of them in memory, a bound on their size, and the
checks before anything of them is believed. It knows token ids and rows, no tree and no model.

A file is safetensors: ``ids`` (every id of the path up to the tile's last row), ``kv`` and
``hidden`` (its rows), and as metadata the fingerprint of the model and build, and a SHA-256 over
all of these. Its name is a digest of the ids, for the convenience of whoever lists the folder;
what a file holds is what its inside says and proves. It appears whole or not at all, by renaming;
it is not forced to the medium, since a file that is torn by a power cut is noticed like any other
damage, and all that is lost is time.

KV tells what was said: files are readable by their owner alone, and what is forgotten is
overwritten before it is removed. A file of another fingerprint is removed when the folder is
opened: it is of no use here, and nobody would find it when its text is to be forgotten.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from crdt_llm.inference.kv.tree import TILE, common_prefix

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from crdt_llm.inference.kv.tree import Ids

logger = logging.getLogger("crdt_llm.inference")

DISK_BYTES: Final = 4 << 30
"""The default bound of the folder: twice the default of memory."""

_SUFFIX: Final = ".safetensors"
_UNFINISHED: Final = ".part"
_FORMAT: Final = "crdt-llm/1/kv"


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of one tile, from its first on.

    Args:
        ids: the ids of the path up to the last row.
        kv: as the pool keeps it, ``(layers, 2 * kv_heads, rows, head_dim)``.
        hidden: ``(rows, hidden)``.
    """

    ids: Ids
    kv: Tensor
    hidden: Tensor


@dataclass(eq=False, slots=True)
class Checkpoint:
    """A file that is believed to be there."""

    file: Path
    ids: Ids
    size: int
    used: tuple[int, int]

    @property
    def start(self) -> int:
        """The position of the tile's first row."""
        return (len(self.ids) - 1) // TILE * TILE


class Checkpoints:
    """The folder.

    Args:
        folder: made if it is missing; belongs to one process.
        fingerprint: of the model and whatever else the rows depend on.
        bytes_max: the most that the files may take together; the least recently used go first.
    """

    def __init__(self, folder: Path, fingerprint: str, bytes_max: int = DISK_BYTES) -> None:
        self._folder = folder
        self._fingerprint = fingerprint
        self._bytes_max = bytes_max
        self._clock = itertools.count()
        self._tiles: dict[tuple[int, bytes], list[Checkpoint]] = {}
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._read_folder()

    @property
    def bytes(self) -> int:
        """What the files take."""
        return sum(one.size for one in self._all())

    def find(self, ids: Ids, length: int) -> Checkpoint | None:
        """The file that has most of the rows of ``ids`` from ``length`` on, in the tile of it.

        Args:
            ids: the whole path.
            length: how many of its positions are resident.
        """
        start = length // TILE * TILE
        best, most = None, length
        for one in self._tiles.get(_key(ids, start), ()):
            shared = start + common_prefix(one.ids[start:], ids[start:])
            if shared > most:
                best, most = one, shared
        return best

    def load(self, one: Checkpoint) -> Rows | None:
        """The rows of a file, or None with one warning if it does not hold what it should.

        A file that is damaged is removed, and so are those of the tiles behind it.
        """
        rows = self._read(one.file)
        if rows is None or not np.array_equal(rows.ids, one.ids):
            self._give_up(one)
            return None
        self._use(one)
        return rows

    def save(self, rows: Rows) -> None:
        """Write the rows of a tile, unless they are there. What they extend is removed.

        A disk that is full or broken costs a warning and nothing else.
        """
        key = _key(rows.ids, (len(rows.ids) - 1) // TILE * TILE)
        siblings = self._tiles.setdefault(key, [])
        extended = []
        for one in siblings:
            shared = common_prefix(one.ids, rows.ids)
            if shared == len(rows.ids):
                self._use(one)
                return
            if shared == len(one.ids):
                extended.append(one)
        file = self._folder / _name(rows.ids)
        content = save(
            {"ids": torch.from_numpy(rows.ids), "kv": rows.kv, "hidden": rows.hidden},
            {"format": _FORMAT, "fingerprint": self._fingerprint, "sha256": self._digest(rows)},
        )
        unfinished = file.with_suffix(_UNFINISHED)
        try:
            _write(unfinished, content)
            unfinished.rename(file)
        except OSError as error:
            logger.warning(
                "KV was not written to disk (%s): it will be computed again", error.strerror
            )
            unfinished.unlink(missing_ok=True)
            return
        one = Checkpoint(file, rows.ids, len(content), (0, 0))
        siblings.append(one)
        self._use(one)
        for older in extended:
            self._remove(older)
        self._shrink()

    def forget(self, ids: Ids, keep: int) -> None:
        """Remove every file with a position from ``keep`` on of a path that agrees with ``ids``.

        A path agrees if one of the two begins with the other.
        """
        for one in self._all():
            agrees = common_prefix(one.ids, ids) == min(len(one.ids), len(ids))
            if agrees and len(one.ids) > keep:
                self._remove(one, wipe=True)

    # -- inside --------------------------------------------------------------------------------

    def _all(self) -> list[Checkpoint]:
        return [one for siblings in self._tiles.values() for one in siblings]

    def _digest(self, rows: Rows) -> str:
        state = hashlib.sha256(f"{_FORMAT} {self._fingerprint} {len(rows.ids)}".encode())
        state.update(rows.ids.tobytes())
        for tensor in (rows.kv, rows.hidden):
            state.update(tensor.view(torch.uint8).numpy().data)
        return state.hexdigest()

    def _read_folder(self) -> None:
        found = []
        damaged = 0
        for file in self._folder.iterdir():
            if file.suffix == _UNFINISHED:
                _wipe(file)
            elif file.suffix == _SUFFIX:
                ids = self._read_ids(file)
                if ids is None:
                    damaged += 1
                    _wipe(file)
                elif ids.size:
                    status = file.stat()
                    found.append(
                        (status.st_mtime_ns, Checkpoint(file, ids, status.st_size, (0, 0)))
                    )
                else:
                    _wipe(file)  # of another model or build
        if damaged:
            logger.warning("%d damaged files in %s were removed", damaged, self._folder)
        for _, one in sorted(found, key=lambda each: each[0]):
            self._tiles.setdefault(_key(one.ids, one.start), []).append(one)
            one.used = (next(self._clock), -one.start)
        self._shrink()

    def _read_ids(self, file: Path) -> Ids | None:
        """The ids of a file; none if it is of another fingerprint, None if it is damaged."""
        try:
            with safe_open(file, framework="np") as content:
                metadata = content.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    return None
                if metadata.get("fingerprint") != self._fingerprint:
                    return np.empty(0, np.uint32)
                ids: Ids = content.get_tensor("ids")
        except (SafetensorError, OSError):
            return None  # whoever asked removes it, and says so
        sound = ids.dtype == np.uint32 and ids.ndim == 1 and file.name == _name(ids)
        return ids if sound else None

    def _read(self, file: Path) -> Rows | None:
        try:
            with safe_open(file, framework="pt") as content:
                metadata = content.metadata() or {}
                rows = Rows(
                    content.get_tensor("ids").numpy(),
                    content.get_tensor("kv"),
                    content.get_tensor("hidden"),
                )
        except (SafetensorError, OSError):
            return None  # as above
        # The digest says the fingerprint too, and whoever wrote it knew the shapes.
        return rows if metadata.get("sha256") == self._digest(rows) else None

    def _use(self, one: Checkpoint) -> None:
        """Note that a file was of use; what it builds on counts as used a moment later."""
        now = next(self._clock)
        for start in range(0, one.start + 1, TILE):
            for each in self._tiles.get(_key(one.ids, start), ()):
                if common_prefix(each.ids, one.ids) == len(each.ids):
                    each.used = (now, -start)

    def _give_up(self, one: Checkpoint) -> None:
        logger.warning("a file in %s is damaged: its rows are computed again", self._folder)
        behind = [
            each
            for each in self._all()
            if each.start > one.start and common_prefix(each.ids, one.ids) == len(one.ids)
        ]
        for each in (one, *behind):
            self._remove(each)

    def _remove(self, one: Checkpoint, *, wipe: bool = False) -> None:
        key = _key(one.ids, one.start)
        self._tiles[key].remove(one)
        if not self._tiles[key]:
            del self._tiles[key]
        if wipe:
            _wipe(one.file)
        else:
            one.file.unlink(missing_ok=True)

    def _shrink(self) -> None:
        excess = self.bytes - self._bytes_max
        for one in sorted(self._all(), key=lambda each: each.used):
            if excess <= 0:
                break
            excess -= one.size
            self._remove(one)


def _key(ids: Ids, start: int) -> tuple[int, bytes]:
    """What a tile is found by: where it begins, and a digest of everything before it."""
    return start, hashlib.sha256(ids[:start].tobytes()).digest()


def _name(ids: Ids) -> str:
    return hashlib.sha256(ids.tobytes()).hexdigest()[:32] + _SUFFIX


def _write(file: Path, content: bytes) -> None:
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(content)


def _wipe(file: Path) -> None:
    """Overwrite and remove: as much as one can do from above a file system."""
    try:
        with file.open("r+b") as stream:
            stream.write(bytes(file.stat().st_size))
            stream.flush()
            os.fsync(stream.fileno())
    except FileNotFoundError:
        return
    except OSError as error:
        # Never its name, here and above: a digest of ids lets a short secret be guessed, and a log
        # stays where it is when the secret is withdrawn.
        reason = error.strerror
        logger.warning("a file in %s could not be overwritten (%s)", file.parent, reason)
    file.unlink(missing_ok=True)
