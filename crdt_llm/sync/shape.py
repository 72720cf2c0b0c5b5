"""The shape of a conversation's document: what of an update's structs has a place in it at all.

The rules of :mod:`crdt_llm.document.rules` judge what a reader of the document sees. This module
owns what no reader sees, or two readers see differently: roots and content kinds that the schema
does not have, values without a key in a map, keys in a text, runs of values under one key. Such
structs would be kept and passed on by every replica without being part of the conversation. It is
pure; it must not know replicas, rooms or principals.

Only structs with new clocks are looked at: what is known was looked at when it came. What a struct
hangs at follows from the update alone or, where its parent is older, from a table of the shared
types of the document (:func:`types_of`), which costs a reading of all of it and is asked for only
when a struct does something that readers need not see.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from typing import TYPE_CHECKING, Final

from crdt_llm.document.conversation import ACCESS, ENTRIES, LEASES, META, ROOTS
from crdt_llm.document.rules import NODE_FIELDS
from crdt_llm.document.schema import ENTRY_FIELDS, PRINCIPAL_CHARACTERS_MAX
from crdt_llm.errors import Forbidden, Refused
from crdt_llm.sync.structure import Id, Kind, SharedType, TypeRef

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from crdt_llm.document.conversation import Change
    from crdt_llm.sync.structure import Struct, UpdateStructure

_KINDS: Final = frozenset(
    {Kind.GC, Kind.SKIP, Kind.DELETED, Kind.ANY, Kind.BINARY, Kind.STRING, Kind.TYPE}
)
_REMAINS: Final = frozenset({Kind.GC, Kind.SKIP, Kind.DELETED})
_TYPES: Final = frozenset({TypeRef.MAP, TypeRef.TEXT, TypeRef.ARRAY})
_SEQUENCES: Final = frozenset({TypeRef.TEXT, TypeRef.ARRAY})

_META_KEYS: Final = frozenset({"schema", "birth", "title", "created_at", "head", "model", "policy"})
_KEY_CHARACTERS_MAX: Final[Mapping[str, int]] = {
    ACCESS: PRINCIPAL_CHARACTERS_MAX,
    LEASES: 16,  # the digits of the largest epoch
    ENTRIES: 26,  # a ULID
}


def fresh(structure: UpdateStructure, known: Mapping[int, int]) -> Iterator[Struct]:
    """The structs of an update that have clocks which are not known."""
    for client, structs in structure.structs.items():
        start = known.get(client, 0)
        if structs[-1].end > start:
            for item in structs:
                if item.end > start:
                    yield item


def check_shape(structure: UpdateStructure, known: Mapping[int, int], *, node: bool) -> None:
    """Refuse what has no place in a conversation's document.

    Args:
        structure: The update.
        known: The receiver's state vector.
        node: Whether it comes from a node, the only one that grows texts and lists.

    Raises:
        Refused: It has a root, a kind or a key that the schema has not, or hides a value.
    """
    brought: dict[Id, TypeRef] | None = None
    for item in fresh(structure, known):
        if item.kind not in _KINDS:
            raise Refused("schema", f"a conversation holds no {item.kind.name.lower()}")
        content, parent = item.content, item.parent
        if isinstance(content, SharedType) and content.ref not in _TYPES:
            raise Refused("schema", f"a conversation holds no {content.ref.name.lower()}")
        if parent is None:
            continue
        if isinstance(parent, str):
            _check_root_key(parent, item.parent_sub)
        else:
            if brought is None:
                brought = types_of(structure)
            _check_field(item, brought.get(parent), node=node)
        if item.parent_sub is not None:
            _check_keyed(item)


def _check_root_key(root: str, key: str | None) -> None:
    if root not in ROOTS:
        raise Refused("schema", f"a conversation has no root {root[:50]!r}")
    if key is None:
        raise Refused("schema", f"{root} is a map: a value in it has a key")
    allowed = key in _META_KEYS if root == META else len(key) <= _KEY_CHARACTERS_MAX[root]
    if not allowed:
        raise Refused("schema", f"{root} has no {key[:50]!r}")


def _check_field(item: Struct, parent: TypeRef | None, *, node: bool) -> None:
    """A struct at a shared type that came along, or (``None``) that is older."""
    key = item.parent_sub
    if key is None:
        if parent is None and not node and item.kind not in _REMAINS:
            raise Forbidden("node-field", "only the node writes in a reply")
        if parent is not None and parent not in _SEQUENCES:
            raise Refused("schema", "an entry is a map: a value in it has a key")
    elif key not in ENTRY_FIELDS:
        raise Refused("schema", f"an entry has no field {key[:50]!r}")
    elif key in NODE_FIELDS and not node:
        raise Forbidden("node-field", f"only the node writes {key}")
    elif parent is not None and parent is not TypeRef.MAP:
        raise Refused("schema", "a text or a list has no fields")


def _check_keyed(item: Struct) -> None:
    if item.kind is Kind.STRING or (item.kind is Kind.ANY and item.length > 1):
        raise Refused("schema", "a key holds one value")


def types_of(structure: UpdateStructure) -> dict[Id, TypeRef]:
    """Which shared type each struct that makes one stands for."""
    return {
        Id(item.client, item.clock): item.content.ref
        for structs in structure.structs.values()
        for item in structs
        if isinstance(item.content, SharedType)
    }


def hides(structure: UpdateStructure, known: Mapping[int, int], change: Change) -> bool:
    """Whether a person's update that was applied may hold what no reader sees.

    A person writes values under keys, one each; ``False`` means that all of them were seen. A
    value that lost against another one of the same key is not seen either, so ``True`` asks for
    :func:`check_parents`.
    """
    unseen: Counter[str] = Counter()
    brought: dict[Id, TypeRef] | None = None
    for item in fresh(structure, known):
        if item.kind is Kind.STRING or (item.kind is Kind.ANY and item.length > 1):
            raise Refused("schema", "only a reply's text grows, and only by the node")
        if isinstance(item.parent, Id) and item.parent_sub is not None:
            if brought is None:
                brought = types_of(structure)
            if item.parent not in brought:
                unseen[item.parent_sub] += 1
    for edit in change.edits:
        if edit.root == ENTRIES and len(edit.path) == 1 and edit.key is not None:
            unseen[edit.key] -= 1
    return any(count > 0 for count in unseen.values())


def check_parents(
    structure: UpdateStructure, known: Mapping[int, int], held: UpdateStructure
) -> None:
    """Refuse values whose parent is no entry.

    Args:
        structure: The update.
        known: What was known before it.
        held: The whole document.

    Raises:
        Refused: A value stands in something else than an entry.
    """
    for item in fresh(structure, known):
        if isinstance(item.parent, Id) and item.parent_sub is not None:
            parent = struct_at(held, item.parent)
            content = parent.content if parent is not None else None
            is_map = isinstance(content, SharedType) and content.ref is TypeRef.MAP
            if parent is not None and parent.kind not in _REMAINS and not is_map:
                raise Refused("schema", "only an entry has fields")


def struct_at(structure: UpdateStructure, target: Id) -> Struct | None:
    """The struct that has a clock."""
    structs = structure.structs.get(target.client, ())
    position = bisect_right(structs, target.clock, key=lambda item: item.clock) - 1
    found = structs[position] if position >= 0 else None
    return found if found is not None and target.clock < found.end else None
