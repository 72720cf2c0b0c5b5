"""What this device remembers of relays: their keys, and who it is to them.

This module owns the file. The first key that a relay shows is kept; a relay that later shows
another is not the one that this device knows, or its keys were lost, and only a person can tell. It
must not know sockets.
"""

from __future__ import annotations

import json
import os
from base64 import urlsafe_b64encode
from typing import TYPE_CHECKING, Final

from crdt_llm.errors import Corrupt, Refused, StoreFailed

if TYPE_CHECKING:
    from pathlib import Path

FILE_NAME: Final = "relays.json"


class Acquaintances:
    """The relays that this device knows.

    Args:
        path: the file; ``None`` remembers as long as the object lives.

    Raises:
        StoreFailed: it cannot be read now.
        Corrupt: it is no such file.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._known: dict[str, dict[str, str]] = {} if path is None else _read(path)

    def principal(self, address: str) -> str | None:
        """Who this device is to a relay, as that said the last time."""
        return self._known.get(address, {}).get("principal")

    def meet(self, address: str, key: bytes, principal: str) -> None:
        """Check the key that a relay shows, or keep the first one.

        Raises:
            Refused: it is another one than before.
            StoreFailed: it could not be kept.
        """
        shown = urlsafe_b64encode(key).decode().rstrip("=")
        known = self._known.get(address)
        if known is not None and known["key"] != shown:
            where = "this device's memory" if self._path is None else str(self._path)
            raise Refused(
                "relay-key",
                f"the relay at {address} shows another key than before: if it was set up anew, take"
                f" its line out of {where} and come back; if not, somebody is in between",
            )
        now = {"key": shown, "principal": principal}
        if known != now:
            all_known = self._known | {address: now}
            if self._path is not None:
                _write(self._path, all_known)
            self._known = all_known


def _read(path: Path) -> dict[str, dict[str, str]]:
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}  # nobody is known yet
    except OSError as error:
        raise StoreFailed(f"{path} cannot be read: {error}") from error
    except (ValueError, RecursionError) as error:
        raise Corrupt(f"{path} is no list of relays: move it away") from error
    whole = isinstance(known, dict) and all(
        isinstance(one, dict)
        and isinstance(one.get("key"), str)
        and isinstance(one.get("principal"), str | None)
        for one in known.values()
    )
    if not whole:
        raise Corrupt(f"{path} is no list of relays: move it away")
    return dict(known)


def _write(path: Path, known: dict[str, dict[str, str]]) -> None:
    beside = path.with_suffix(".new")
    try:
        with beside.open("w", encoding="utf-8") as file:
            json.dump(known, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        raise StoreFailed(f"{path} cannot be written: {error}") from error
