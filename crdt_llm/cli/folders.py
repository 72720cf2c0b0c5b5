"""Which file is what in the data folder, and where that folder is.

This module owns the names. It must not know what is in the files, but for the token, which is one
line of text; everything else is read and written by the room that it belongs to.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import platformdirs

from crdt_llm.errors import AuthenticationFailed, LocalMisuse

if TYPE_CHECKING:
    from pathlib import Path

APPLICATION: Final = "crdt-llm"
TOKEN_BYTES_MAX: Final = 4096  # whatever is longer is another file that was named by mistake

# A device's name is a folder's name on every platform.
_DEVICE: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")


def default_data_folder() -> Path:
    """The platform's folder for a user's data of ours; it may not be there yet."""
    return platformdirs.user_data_path(APPLICATION, appauthor=False)


@dataclass(frozen=True, slots=True)
class DataFolder:
    """The files of one data folder.

    Attributes:
        path: the folder.
    """

    path: Path

    @classmethod
    def named(cls, path: Path | None) -> DataFolder:
        """The folder that was asked for, else the default one."""
        return cls(default_data_folder() if path is None else path.expanduser())

    @property
    def log(self) -> Path:
        """The relay's log: every conversation's updates."""
        return self.path / "log.db"

    @property
    def token(self) -> Path:
        """The owner's token."""
        return self.path / "owner.token"

    @property
    def archive(self) -> Path:
        """What principals have put away."""
        return self.path / "archive.db"

    @property
    def tokens(self) -> Path:
        """Which other tokens were issued and revoked."""
        return self.path / "tokens.db"

    @property
    def register(self) -> Path:
        """What a relay knows of its conversations even if it lost its log."""
        return self.path / "register.db"

    @property
    def kv(self) -> Path:
        """KV cache that was moved out of memory; derived, and safe to delete."""
        return self.path / "kv"

    def key(self, name: str) -> Path:
        """A secret: ``relay``, ``node`` and ``token`` sign, ``master`` seals."""
        return self.path / "keys" / f"{name}.key"

    def device(self, name: str) -> Path:
        """The folder of a device's own replicas; beside the relay's files, never among them.

        Raises:
            LocalMisuse: the name cannot be a folder's.
        """
        if not _DEVICE.match(name):
            raise LocalMisuse(
                f"{name!r} is no device name: use up to 64 letters, digits, dots and dashes"
            )
        return self.path / "devices" / name


def read_token(path: Path) -> str:
    """Read a token file: one line.

    Raises:
        AuthenticationFailed: there is no usable token in it.
    """
    try:
        with path.open("rb") as file:
            token = file.read(TOKEN_BYTES_MAX + 1).strip()
    except FileNotFoundError:
        raise AuthenticationFailed(
            "no-token",
            f"there is no token in {path}: run `crdt-llm serve` once, which makes one, or name the"
            " file with --token-file",
        ) from None
    except OSError as error:
        raise AuthenticationFailed(
            "no-token", f"the token file {path} cannot be read ({error.strerror}): check its rights"
        ) from error
    if not token or len(token) > TOKEN_BYTES_MAX or len(token.split()) != 1 or not token.isascii():
        raise AuthenticationFailed(
            "no-token", f"{path} holds no token: name another file with --token-file"
        )
    return token.decode()
