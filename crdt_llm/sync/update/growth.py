"""The commonest update of all, read at a glance: the next words of a reply.

While a reply streams, nearly every update is of one shape, as a node writes it for each token:
under one or two client ids one struct each, which begins at the first clock that is not known and
stands behind something known. It holds plain text or one blob, and nothing is deleted::

    update = n, n * (1, client, clock, struct), 0
    struct = (128 + 4) origin, varString                      ; a run of text
           | (128 + 8) origin, 1, 116 varBytes                ; one value: bytes

This module owns recognising that shape. It is a short cut and never the judge: an update is of this
shape only if :func:`crdt_llm.sync.update.structure.read_update` reads the same from it and nothing
that is asked of a structure speaks against it; everything else is left to them, errors included. It
is pure; it must not know replicas, schemas, principals or sockets.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from crdt_llm.errors import MalformedMessage
from crdt_llm.sync.update.structure import Id, Kind, Struct, UpdateStructure
from crdt_llm.sync.wire.y_websocket import CLOCK_MAX, read_var_uint

if TYPE_CHECKING:
    from collections.abc import Mapping

GROWTH_BYTES_MAX: Final = 32 << 10
"""The longest that is looked at: far below every limit on updates, and read within 0.1 ms."""

SECTIONS_MAX: Final = 2
"""A node's text, and its hidden ids under a client id of their own."""

_TEXT: Final = 0x80 | Kind.STRING
_VALUE: Final = 0x80 | Kind.ANY
_ONE_BLOB: Final = b"\x01\x74"  # one value, of type 116


class _AnotherShape(Exception):  # noqa: N818 - a signal inside this module
    """It is for the whole reading."""


def read_growth(update: bytes, known: Mapping[int, int]) -> UpdateStructure | None:
    """Read an update if it is of the shape above; else ``None``, which says nothing about it.

    What is answered has no gap, brings something, repeats nothing, and its structs stand in what
    is known already.

    Args:
        update: A Yjs v1 update.
        known: The receiver's state vector: client -> first unknown clock.
    """
    if len(update) > GROWTH_BYTES_MAX:
        return None
    structs: dict[int, tuple[Struct]] = {}
    try:
        at = 1
        for _ in range(update[0]):
            item, at = _read_section(update, at, known)
            if item.client in structs or len(structs) == SECTIONS_MAX:
                return None
            structs[item.client] = (item,)
        is_all = update[at] == 0 and at + 1 == len(update)
    except (_AnotherShape, MalformedMessage, IndexError, UnicodeDecodeError):
        return None  # whoever reads all of it says what is wrong with it, if anything is
    return UpdateStructure(structs, {}) if structs and is_all else None


def _read_section(update: bytes, at: int, known: Mapping[int, int]) -> tuple[Struct, int]:
    """Read a section, whose number of structs is at ``at``; the struct and the position behind."""
    begin = at + 1
    client, at = read_var_uint(update, begin)
    name = update[begin:at]
    clock, at = read_var_uint(update, at)
    info = update[at]
    at += 1
    if update.startswith(name, at):  # no number is the beginning of another one
        beside, at = client, at + len(name)
    else:
        beside, at = read_var_uint(update, at)
    target, at = read_var_uint(update, at)
    is_next = update[begin - 1] == 1 and clock == known.get(client)
    if not is_next or target >= known.get(beside, 0):
        raise _AnotherShape
    origin = Id(beside, target)
    if info == _TEXT:
        raw, at = _read_buffer(update, at)
        text = raw.decode()
        length = len(raw) if text.isascii() else len(text.encode("utf-16-le")) // 2
        item = Struct(Kind.STRING, client, clock, length, origin, None, None, None, text)
    elif info == _VALUE and update.startswith(_ONE_BLOB, at):
        raw, at = _read_buffer(update, at + len(_ONE_BLOB))
        item = Struct(Kind.ANY, client, clock, 1, origin, None, None, None, (raw,))
    else:
        raise _AnotherShape
    if item.length == 0 or item.end > CLOCK_MAX:
        raise _AnotherShape
    return item, at


def _read_buffer(update: bytes, at: int) -> tuple[bytes, int]:
    size, at = read_var_uint(update, at)
    end = at + size
    if end > len(update):
        raise _AnotherShape
    return update[at:end], end
