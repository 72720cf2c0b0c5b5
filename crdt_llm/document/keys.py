"""Secrets at rest: 32 bytes in a file of mode 0600, made once.

This module owns the files and the Ed25519 key; what is sealed or signed with them is said in
:mod:`crdt_llm.document.seal` and :mod:`crdt_llm.document.chain`.
"""

from __future__ import annotations

import os
from base64 import urlsafe_b64encode
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from crdt_llm.errors import BadProof, Corrupt

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SECRET_BYTES: Final = 32  # Ed25519 seeds and ChaCha20 keys alike
_PRIVATE: Final = 0o600
_OTHERS: Final = 0o077


def read_or_make(path: Path, make: Callable[[], bytes], random: Callable[[int], bytes]) -> bytes:
    """Read a private file, or make it, mode 0600, if there is none; durable either way.

    Two processes that start at once end with the same bytes: the file is written whole under
    another name and then linked, which fails if somebody was faster.

    Args:
        path: the file.
        make: its content.
        random: random bytes, for the other name.

    Raises:
        Corrupt: others may read it.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        fresh = path.with_name(f"{path.name}.{random(8).hex()}")
        handle = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _PRIVATE)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(make())
                file.flush()
                os.fsync(file.fileno())
            # Somebody may have been faster: theirs counts, and is read below.
            with suppress(FileExistsError):
                os.link(fresh, path)
        finally:
            fresh.unlink()
        # The name too: what is sealed or signed with a key must not outlive it.
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    if path.stat().st_mode & _OTHERS:
        raise Corrupt(f"the secret file {path} can be read by others: run chmod 600 on it")
    return path.read_bytes()


def load_or_create_secret(path: Path, random: Callable[[int], bytes] = os.urandom) -> bytes:
    """Read the secret in ``path``, or make one if there is no such file.

    Raises:
        Corrupt: the file has another length, or others may read it.
    """
    secret = read_or_make(path, lambda: random(SECRET_BYTES), random)
    if len(secret) != SECRET_BYTES:
        raise Corrupt(f"the key file {path} is damaged: it has {len(secret)} bytes, not 32")
    return secret


@dataclass(frozen=True, slots=True)
class SigningKey:
    """An Ed25519 key (RFC 8032) of a node or a relay; ``repr`` never shows the secret."""

    secret: bytes = field(repr=False)
    _key: Ed25519PrivateKey = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Parse it once: a node signs each chunk of a reply."""
        object.__setattr__(self, "_key", Ed25519PrivateKey.from_private_bytes(self.secret))

    @property
    def public(self) -> bytes:
        """The public key, 32 bytes."""
        return self._key.public_key().public_bytes_raw()

    def sign(self, message: bytes) -> bytes:
        """A signature of 64 bytes."""
        return self._key.sign(message)


def verify(public: bytes, signature: bytes, message: bytes) -> None:
    """Check an Ed25519 signature.

    Raises:
        BadProof: it does not hold, or the key is none.
    """
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, message)
    except (InvalidSignature, ValueError) as error:
        raise BadProof("a signature does not hold") from error


def written_key(public: bytes) -> str:
    """A public key as people and commands name it: base64url without padding."""
    return urlsafe_b64encode(public).decode().rstrip("=")
