"""Finds hidden values in bytes, in every spelling in which a program could give them away.

Owns the spellings: how numbers are packed, how bytes are written as text, and how long a run must
be before it is no accident. It must not know where the bytes come from. A single number is not
looked for: 12 is everywhere. Runs are, so what gives ids away one at a time, far apart, passes.
"""

from __future__ import annotations

import json
import re
import struct
from base64 import b64encode, urlsafe_b64encode
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import msgpack

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

RUN: Final = 4
"""Numbers in a row that are no accident, if at least three of them differ."""

DISTINCT_MIN: Final = 3

NEEDLE_BYTES_MIN: Final = 8
"""Shorter byte strings are found in ciphertext by chance: some millions of bytes are searched for
some ten thousands of runs."""

SEPARATOR_CHARACTERS_MAX: Final = 4
"""Between two numbers of a list as programs print them, white space aside: ``, `` or ``', '``."""

_NUMBER: Final = re.compile(rb"\d{1,20}(?:\.\d{1,30})?(?:e-?\d{1,3})?")
_WORD: Final = re.compile(rb"[0-9A-Za-z]")
_BACKSLASHES: Final = re.compile(rb"\\+")
_BEFORE_QUOTE: Final = re.compile(rb"\\(['\"])")
_SPACE: Final = re.compile(rb"\s+")
_NEAR: Final = 0.006  # the logprobs that are kept were rounded to float16, or are printed as %.2f


@dataclass(frozen=True, slots=True)
class Leak:
    """A hidden value that stands where it must not.

    Attributes:
        what: which hidden value, and in which spelling.
        place: what was searched.
        offset: where in it.
    """

    what: str
    place: str
    offset: int


# -- spellings ---------------------------------------------------------------------------------


def varint(number: int) -> bytes:
    """LEB128, as Yjs and protocol buffers write numbers."""
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes((*out, number))


def yjs_any(number: int) -> bytes:
    """A whole number as a plain value in a Yjs update (lib0, ``writeAny``)."""
    out = bytearray((125, (0x80 if number > 0x3F else 0) | number & 0x3F))
    number >>= 6
    while number > 0:
        out.append((0x80 if number > 0x7F else 0) | number & 0x7F)
        number >>= 7
    return bytes(out)


def _packed(form: str) -> Callable[[Any], bytes]:
    return lambda number: struct.pack(form, number)


PACKINGS: Final[Mapping[str, Callable[[int], bytes]]] = {
    "uint16 big-endian": _packed(">H"),
    "uint16 little-endian": _packed("<H"),
    "uint32 big-endian": _packed(">I"),
    "uint32 little-endian": _packed("<I"),
    "uint64 big-endian": _packed(">Q"),
    "uint64 little-endian": _packed("<Q"),
    "varint": varint,
    "yjs": yjs_any,
    "msgpack": msgpack.packb,
}
"""How an id becomes bytes. (The ids of a model of up to 65,535 tokens fit into each.)"""

FLOATS: Final[Mapping[str, Callable[[float], bytes]]] = {
    f"float{bits} {order}": _packed(sign + letter)
    for bits, letter in ((16, "e"), (32, "f"), (64, "d"))
    for order, sign in (("big-endian", ">"), ("little-endian", "<"))
}


def _plain_escapes(text: bytes) -> bytes:
    """What was escaped several times, or for other quotes, in one form."""
    return _BEFORE_QUOTE.sub(rb"\1", _BACKSLASHES.sub(rb"\\", text))


def _escaped(secret: bytes) -> bytes:
    return repr(secret)[2:-1].encode()


def _in_json(secret: bytes) -> bytes:
    return json.dumps(secret.decode("latin-1"))[1:-1].encode()


def _base64(skipped: int, encode: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
    """What is seen of a secret that begins so many bytes after a multiple of three."""

    def spell(secret: bytes) -> bytes:
        known = encode(b"\0" * skipped + secret)
        # What depends on its neighbours is left out: the characters that share bits with them.
        return known[-(-skipped * 8 // 6) : (skipped + len(secret)) * 8 // 6]

    return spell


SPELLINGS: Final[dict[str, Callable[[bytes], bytes]]] = {
    "as it is": lambda secret: secret,
    "hex": lambda secret: secret.hex().encode(),
    "HEX": lambda secret: secret.hex().upper().encode(),
    "escaped": _escaped,
    "JSON": _in_json,
} | {
    f"{name} at {skipped}": _base64(skipped, encode)
    for name, encode in (("base64", b64encode), ("base64url", urlsafe_b64encode))
    for skipped in range(3)
}
"""How bytes become text."""


# -- the search --------------------------------------------------------------------------------


class Detector:
    """Knows hidden values, and finds them."""

    def __init__(self) -> None:
        self._needles: dict[bytes, dict[bytes, str]] = {}  # by their first bytes
        self._ids: dict[tuple[int, ...], str] = {}
        self._logprobs: dict[tuple[float, ...], str] = {}

    def __len__(self) -> int:
        """How many strings of bytes and runs of numbers are looked for."""
        needles = sum(map(len, self._needles.values()))
        return needles + len(self._ids) + len(self._logprobs)

    def know_bytes(self, what: str, secret: bytes) -> None:
        """Look for bytes: a key, or a part of what is sealed."""
        for name, spell in SPELLINGS.items():
            needle = spell(secret)
            if spell in {_escaped, _in_json}:
                needle = _plain_escapes(needle)
            assert len(needle) >= NEEDLE_BYTES_MIN, f"{what} is too short to be looked for"
            same_start = self._needles.setdefault(needle[:NEEDLE_BYTES_MIN], {})
            same_start.setdefault(needle, f"{what}, {name}")

    def know_ids(self, what: str, ids: Sequence[int]) -> None:
        """Look for every run of :data:`RUN` ids."""
        for start, run in _runs(ids):
            self._ids.setdefault(run, f"{what}, decimal")
            for name, pack in PACKINGS.items():
                packed = _long_enough(ids, start, pack)
                if packed is not None:
                    self.know_bytes(f"{what}, {name}", packed)

    def know_logprobs(self, what: str, logprobs: Sequence[float]) -> None:
        """Look for every run of :data:`RUN` logprobs."""
        for start, run in _runs(logprobs):
            self._logprobs.setdefault(tuple(map(abs, run)), f"{what}, decimal")
            for name, pack in FLOATS.items():
                packed = _long_enough(logprobs, start, pack)
                if packed is not None:
                    self.know_bytes(f"{what}, {name}", packed)

    def search(self, place: str, said: bytes) -> list[Leak]:
        """Every hidden value in some bytes."""
        found = [*self._search_bytes(said), *self._search_numbers(said)]
        if b"\\" in said:
            found += self._search_bytes(_plain_escapes(said))
        return [Leak(what, place, offset) for what, offset in found]

    def _search_bytes(self, said: bytes) -> Iterator[tuple[str, int]]:
        starts = self._needles.keys()
        for offset in range(len(said) - NEEDLE_BYTES_MIN + 1):
            start = said[offset : offset + NEEDLE_BYTES_MIN]
            if start in starts:
                for needle, what in self._needles[start].items():
                    if said.startswith(needle, offset):
                        yield what, offset

    def _search_numbers(self, said: bytes) -> Iterator[tuple[str, int]]:
        """A sign is no part of a number here: a dash may stand between two."""
        row: list[tuple[bytes, int]] = []
        end = 0
        for match in _NUMBER.finditer(said):
            between = said[end : match.start()]
            if _WORD.search(between) or len(_SPACE.sub(b"", between)) > SEPARATOR_CHARACTERS_MAX:
                row.clear()
            row = [*row[1 - RUN :], (match[0], match.start())]
            end = match.end()
            if len(row) == RUN:
                what = self._known_row([number for number, _ in row])
                if what is not None:
                    yield what, row[0][1]

    def _known_row(self, row: Sequence[bytes]) -> str | None:
        if all(number.isdigit() for number in row):
            return self._ids.get(tuple(map(int, row)))
        if not all(b"." in number for number in row):
            return None
        given = [float(number) for number in row]
        for run, what in self._logprobs.items():
            if all(abs(a - b) <= _NEAR for a, b in zip(run, given, strict=True)):
                return what
        return None


def _runs(numbers: Sequence[Any]) -> Iterator[tuple[int, tuple[Any, ...]]]:
    for start in range(len(numbers) - RUN + 1):
        run = tuple(numbers[start : start + RUN])
        if len(set(run)) >= DISTINCT_MIN:
            yield start, run


def _long_enough(numbers: Sequence[Any], start: int, pack: Callable[[Any], bytes]) -> bytes | None:
    """A run that takes enough bytes, or ``None`` where there are no more numbers."""
    packed = b"".join(map(pack, numbers[start : start + RUN]))
    for number in numbers[start + RUN :]:
        if len(packed) >= NEEDLE_BYTES_MIN:
            break
        packed += pack(number)
    return packed if len(packed) >= NEEDLE_BYTES_MIN else None
