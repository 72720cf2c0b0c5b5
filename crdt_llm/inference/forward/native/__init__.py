"""The native kernels: C++ beside this file, built for this CPU when they are first needed.

Owns finding a compiler, building, and the folder of what was built. What the kernels compute stands
in ``step.cpp`` and the headers that it names; how they are called in
:mod:`~crdt_llm.inference.forward.native_step`.

A build takes some seconds, once for each version of the sources, compiler and CPU. Those of other
versions stay while they are in use: several may run at once. Code is loaded only from a folder that
nobody else can write to.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

import platformdirs

from crdt_llm.inference.forward.cpu import cpu_features

if TYPE_CHECKING:
    from collections.abc import Mapping

logger = logging.getLogger("crdt_llm.inference")

_SOURCES: Final = Path(__file__).parent
_FEATURES: Final = frozenset(
    {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "avx512_bf16"}
)
_COMPILERS: Final = ("g++", "clang++", "c++")
_FLAGS: Final = (
    *("-std=c++20", "-O3", "-march=native", "-fPIC", "-shared", "-pthread"),
    "-ffp-contract=off",  # a product and a sum are fused where the source says so, and nowhere else
    "-Wno-ignored-attributes",  # vector types as template arguments, which is harmless
)
_BUILD_S_MAX: Final = 300.0
"""A build takes 3 to 30 s of one core; after so long the compiler hangs."""

_UNUSED_S_MAX: Final = 30 * 24 * 3600.0
"""A build that was not loaded for so long before another one was made is removed. Each has some
hundred KB; whoever comes back to it waits some seconds for it to be built again."""

_MESSAGE_CHARACTERS_MAX: Final = 300
"""Of what a compiler said: its first error."""


class KernelsUnavailable(Exception):  # noqa: N818 - an answer between modules, no error of ours
    """The kernels cannot be used here; the message says why.

    No :exc:`~crdt_llm.errors.CrdtLlmError`, for no program sees it: whoever asked for the kernels
    goes on in torch, or raises :exc:`~crdt_llm.errors.ModelUnusable` with this reason.
    """


class Library:
    """The kernels, loaded.

    Args:
        code: the shared library.
        build: a digest over everything that decides about its instructions.
    """

    def __init__(self, code: ctypes.CDLL, build: str) -> None:
        self.code = code
        self.build = build


@functools.cache
def library(folder: Path | None = None) -> Library:
    """The kernels, built if need be.

    Args:
        folder: where builds are kept; one of this user's by default.

    Raises:
        KernelsUnavailable: this CPU lacks instructions, or there is no compiler, or it failed.
    """
    missing = _FEATURES.difference(cpu_features().split())
    if missing:
        raise KernelsUnavailable(f"this CPU has no {min(missing)}")
    compiler = _compiler()
    sources = {file.name: file.read_bytes() for file in sorted(_SOURCES.glob("*.[ch]pp"))}
    build = _build_digest(compiler, sources)
    try:
        kept = _own_folder(folder or platformdirs.user_cache_path("crdt-llm") / "kernels")
        file = kept / f"{build}.so"
        code = _load(file)
        if code is None:
            _compile(compiler, sources, file)
            _remove_unused(file)
            code = ctypes.CDLL(str(file))
        return Library(code, build)
    except OSError as error:
        raise KernelsUnavailable(f"the built kernels cannot be kept or loaded: {error}") from error


def _compiler() -> str:
    named = os.environ.get("CXX")
    for name in (named,) if named else _COMPILERS:
        found = shutil.which(name)
        if found:
            return found
    missing = f"{named} is not" if named else f"none of {', '.join(_COMPILERS)} is"
    raise KernelsUnavailable(f"there is no C++ compiler ({missing} installed)")


def _build_digest(compiler: str, sources: Mapping[str, bytes]) -> str:
    state = hashlib.sha256()
    version = _run(compiler, "--version").stdout
    parts = version, " ".join(_FLAGS), cpu_features()
    for part in (*(part.encode() for part in parts), *sources.values()):
        state.update(len(part).to_bytes(8, "little") + part)
    return state.hexdigest()[:32]


def _run(compiler: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(  # noqa: S603 - the compiler that the user has or names
            [compiler, *arguments],
            capture_output=True,
            check=False,
            text=True,
            errors="replace",
            timeout=_BUILD_S_MAX,
        )
    except subprocess.TimeoutExpired as error:
        raise KernelsUnavailable(f"{compiler} did not end in {_BUILD_S_MAX:.0f} s") from error
    except OSError as error:
        raise KernelsUnavailable(f"{compiler} cannot be run: {error.strerror}") from error


def _own_folder(folder: Path) -> Path:
    if not folder.is_absolute():  # nobody knows where home is
        raise KernelsUnavailable(f"there is no home to keep them in (only {folder})")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not _only_mine(folder):
        raise KernelsUnavailable(f"others can write to {folder}: make it yours, mode 0700")
    return folder


def _only_mine(path: Path) -> bool:
    state = path.stat()
    return state.st_uid == os.getuid() and not state.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _load(file: Path) -> ctypes.CDLL | None:
    """Load a build and note that it was used; None if there is none, or no longer."""
    try:
        if not _only_mine(file):
            raise KernelsUnavailable(f"others can write to {file}: remove it")
        with contextlib.suppress(OSError):  # a folder that is only read loses nothing either
            os.utime(file)
        return ctypes.CDLL(str(file))
    except OSError:
        if file.exists():
            raise
        return None  # somebody else may have removed it just now


def _remove_unused(made: Path) -> None:
    """Remove the builds that nobody loaded for long before this one was made.

    A process that has loaded one keeps it: what is mapped outlives its name.
    """
    try:
        oldest = made.stat().st_mtime - _UNUSED_S_MAX
        for file in made.parent.glob("*.so"):
            if file.stat().st_mtime < oldest:
                file.unlink()
                logger.info("removed old native kernels: %s", file.name)
    except OSError as error:  # another process may be at it too; the next build tries again
        logger.info("old native kernels stay where they are: %s", error)


def _compile(compiler: str, sources: Mapping[str, bytes], file: Path) -> None:
    """Build into a temporary file and rename it: several processes may be at it.

    What is built is a copy of the sources whose digest was taken: they may be replaced meanwhile.
    """
    logger.info("building the native kernels, once: this takes some seconds")
    with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
        for name, source in sources.items():
            (Path(scratch) / name).write_bytes(source)
        made = Path(scratch) / file.name
        done = _run(compiler, *_FLAGS, "-o", str(made), str(Path(scratch) / "step.cpp"))
        if done.returncode or not made.exists():
            errors = [line for line in done.stderr.splitlines() if "error" in line]
            said = (errors or done.stderr.splitlines() or ["no reason given"])[0]
            said = said.removeprefix(f"{scratch}/")
            raise KernelsUnavailable(f"{compiler} failed: {said[:_MESSAGE_CHARACTERS_MAX]}")
        made.chmod(0o700)
        with made.open("rb") as stream:
            os.fsync(stream.fileno())  # half a file would be there for ever
        made.replace(file)
