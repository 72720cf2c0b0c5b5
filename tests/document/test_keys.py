"""Secrets at rest: made once, private, and checked when they are read."""

from __future__ import annotations

import os
import stat
import threading
from typing import TYPE_CHECKING

import pytest

from crdt_llm.document.keys import SECRET_BYTES, SigningKey, load_or_create_secret, verify
from crdt_llm.errors import BadProof, Corrupt

if TYPE_CHECKING:
    from pathlib import Path


def test_a_secret_is_made_once(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "node"
    secret = load_or_create_secret(path)
    assert len(secret) == SECRET_BYTES
    assert load_or_create_secret(path) == secret
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in path.parent.iterdir()] == ["node"]


def test_who_starts_at_once_gets_the_same(tmp_path: Path) -> None:
    path, found = tmp_path / "node", list[bytes]()
    together = threading.Barrier(8)

    def start() -> None:
        together.wait()
        found.append(load_or_create_secret(path))

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert set(found) == {path.read_bytes()}
    assert list(tmp_path.iterdir()) == [path]


def test_who_is_slower_reads_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "node"

    def random(count: int) -> bytes:
        if count == SECRET_BYTES:  # another process finishes just before this one
            path.write_bytes(b"o" * SECRET_BYTES)
            path.chmod(0o600)
        return os.urandom(count)

    assert load_or_create_secret(path, random) == b"o" * SECRET_BYTES
    assert list(tmp_path.iterdir()) == [path]


def test_a_new_secret_outlives_the_power(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders: list[bool] = []
    fsync = os.fsync

    def note(handle: int) -> None:
        fsync(handle)
        folders.append(stat.S_ISDIR(os.fstat(handle).st_mode))

    monkeypatch.setattr(os, "fsync", note)
    load_or_create_secret(tmp_path / "node")
    assert folders == [False, True]  # the bytes, and then the name
    load_or_create_secret(tmp_path / "node")
    assert len(folders) == 2


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    def random(count: int) -> bytes:
        if count == SECRET_BYTES:
            raise OSError("no randomness")
        return os.urandom(count)

    with pytest.raises(OSError, match="no randomness"):
        load_or_create_secret(tmp_path / "node", random)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("length", "mode"), [(31, 0o600), (0, 0o600), (32, 0o644), (32, 0o640)])
def test_a_file_that_is_no_secret(length: int, mode: int, tmp_path: Path) -> None:
    path = tmp_path / "node"
    path.write_bytes(bytes(length))
    path.chmod(mode)
    with pytest.raises(Corrupt, match=str(path)):
        load_or_create_secret(path)


def test_signatures_are_those_of_rfc_8032() -> None:
    # RFC 8032, section 7.1, test 2.
    key = SigningKey(
        bytes.fromhex("4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb")
    )
    assert key.public.hex() == "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c"
    signature = key.sign(b"\x72")
    assert signature.hex() == (
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
        "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00"
    )
    verify(key.public, signature, b"\x72")
    for public, given, message in (
        (key.public, signature, b"\x73"),
        (key.public, signature[:-1], b"\x72"),
        (SigningKey(b"x" * 32).public, signature, b"\x72"),
        (b"short", signature, b"\x72"),
    ):
        with pytest.raises(BadProof):
            verify(public, given, message)


def test_a_key_does_not_show_itself() -> None:
    assert "sesame" not in repr(SigningKey(b"sesame".ljust(32)))
