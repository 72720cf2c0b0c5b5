"""Writes updates by hand, struct by struct: also those that no library would write."""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING, Any

from crdt_llm.sync.update.structure import (
    Format,
    Id,
    Kind,
    SharedType,
    Struct,
    Subdocument,
    TypeRef,
    Undefined,
)
from crdt_llm.sync.wire.y_websocket import write_var_string, write_var_uint

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence


def any_bytes(value: Any) -> bytes:  # noqa: C901 - a table of types
    """A plain value, as lib0 writes it."""
    out = bytearray()
    match value:
        case Undefined.UNDEFINED:
            out.append(127)
        case None:
            out.append(126)
        case bool():
            out.append(120 if value else 121)
        case int():
            out.append(123)
            out += struct.pack(">d", value)
        case float():
            out.append(123)
            out += struct.pack(">d", value)
        case str():
            out.append(119)
            out += write_var_string(value)
        case bytes():
            out.append(116)
            out += write_var_uint(len(value))
            out += value
        case list():
            out.append(117)
            out += write_var_uint(len(value))
            out += b"".join(map(any_bytes, value))
        case dict():
            out.append(118)
            out += write_var_uint(len(value))
            for key, item in value.items():
                out += write_var_string(key)
                out += any_bytes(item)
        case _:
            raise AssertionError(f"not a plain value: {value!r}")
    return bytes(out)


def _content(item: Struct) -> bytes:  # noqa: C901 - a table of kinds
    out = bytearray()
    match item.kind, item.content:
        case ((Kind.GC | Kind.SKIP | Kind.DELETED), _):
            out += write_var_uint(item.length)
        case Kind.JSON, tuple() as values:
            out += write_var_uint(len(values))
            for value in values:
                out += write_var_string(json.dumps(value))
        case Kind.BINARY, bytes() as raw:
            out += write_var_uint(len(raw))
            out += raw
        case Kind.STRING, str() as text:
            out += write_var_string(text)
        case Kind.EMBED, (value,):
            out += write_var_string(json.dumps(value))
        case Kind.FORMAT, Format(key, value):
            out += write_var_string(key)
            out += write_var_string(json.dumps(value))
        case Kind.TYPE, SharedType(ref, name):
            out += write_var_uint(ref)
            if ref in (TypeRef.XML_ELEMENT, TypeRef.XML_HOOK):
                out += write_var_string(name or "x")
        case Kind.ANY, tuple() as values:
            out += write_var_uint(len(values))
            out += b"".join(map(any_bytes, values))
        case Kind.DOC, Subdocument(guid, options):
            out += write_var_string(guid)
            out += any_bytes(options)
        case _:
            raise AssertionError(f"{item.kind} does not hold {item.content!r}")
    return bytes(out)


def _id(out: bytearray, target: Id) -> None:
    out += write_var_uint(target.client)
    out += write_var_uint(target.clock)


def struct_bytes(item: Struct) -> bytes:
    """One struct, without its client and clock."""
    out = bytearray()
    if item.kind in (Kind.GC, Kind.SKIP):
        return bytes([item.kind]) + _content(item)
    has_parent = item.origin is None and item.right_origin is None
    out.append(
        item.kind
        | (0x80 if item.origin is not None else 0)
        | (0x40 if item.right_origin is not None else 0)
        | (0x20 if item.parent_sub is not None else 0)
    )
    for origin in (item.origin, item.right_origin):
        if origin is not None:
            _id(out, origin)
    if has_parent:
        if isinstance(item.parent, str):
            out.append(1)
            out += write_var_string(item.parent)
        else:
            assert item.parent is not None
            out.append(0)
            _id(out, item.parent)
        if item.parent_sub is not None:
            out += write_var_string(item.parent_sub)
    return bytes(out) + _content(item)


def update_bytes(
    structs: Iterable[Struct], deleted: Mapping[int, Sequence[range]] | None = None
) -> bytes:
    """An update of structs (each client's in a row) and a delete set."""
    by_client: dict[int, list[Struct]] = {}
    for item in structs:
        by_client.setdefault(item.client, []).append(item)
    out = bytearray()
    out += write_var_uint(len(by_client))
    for client, items in by_client.items():
        out += write_var_uint(len(items))
        out += write_var_uint(client)
        out += write_var_uint(items[0].clock)
        out += b"".join(map(struct_bytes, items))
    deleted = deleted or {}
    out += write_var_uint(len(deleted))
    for client, ranges in deleted.items():
        out += write_var_uint(client)
        out += write_var_uint(len(ranges))
        for clocks in ranges:
            out += write_var_uint(clocks.start)
            out += write_var_uint(len(clocks))
    return bytes(out)


class Pen:
    """Writes structs one after the other at the clocks of one client."""

    def __init__(self, client: int, clock: int = 0) -> None:
        self.client, self.clock = client, clock
        self.structs: list[Struct] = []

    def put(
        self,
        kind: Kind,
        content: Any = None,
        *,
        parent: str | Id | None = None,
        key: str | None = None,
        origin: Id | None = None,
        right: Id | None = None,
        length: int = 1,
    ) -> Id:
        """Write one struct; its id."""
        if kind is Kind.STRING:
            length = len(content.encode("utf-16-le")) // 2
        elif kind in (Kind.ANY, Kind.JSON):
            length = len(content)
        item = Struct(kind, self.client, self.clock, length, origin, right, parent, key, content)
        self.structs.append(item)
        self.clock += length
        return Id(item.client, item.clock)

    def value(self, parent: str | Id, key: str | None, value: Any) -> Id:
        return self.put(Kind.ANY, (value,), parent=parent, key=key)

    def type(self, ref: TypeRef, parent: str | Id, key: str | None) -> Id:
        return self.put(Kind.TYPE, SharedType(ref, None), parent=parent, key=key)

    def update(self, deleted: Mapping[int, Sequence[range]] | None = None) -> bytes:
        return update_bytes(self.structs, deleted)
