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
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from crdt_llm.document.conversation import ACCESS, ENTRIES, LEASES, META, ROOTS
from crdt_llm.document.rules import NODE_FIELDS, is_meta
from crdt_llm.document.schema import ENTRY_FIELDS, PRINCIPAL_CHARACTERS_MAX, normalise
from crdt_llm.errors import Forbidden, Refused
from crdt_llm.sync.update.structure import Id, Kind, SharedType, TypeRef, covers

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping

    from crdt_llm.document.conversation import Change
    from crdt_llm.sync.update.structure import Struct, UpdateStructure

_KINDS: Final = frozenset(
    {Kind.GC, Kind.SKIP, Kind.DELETED, Kind.ANY, Kind.BINARY, Kind.STRING, Kind.TYPE}
)
_REMAINS: Final = frozenset({Kind.GC, Kind.SKIP, Kind.DELETED})
_TYPES: Final = frozenset({TypeRef.MAP, TypeRef.TEXT, TypeRef.ARRAY})
_SEQUENCES: Final = frozenset({TypeRef.TEXT, TypeRef.ARRAY})

NEIGHBOURS_MAX: Final = 10_000
"""Values of one key, each in the place of the one before, that are followed to the first."""

_REWRITTEN: Final = frozenset({"stop", "redacted"})  # what a person adds to an entry later on
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
        if item.parent_sub is not None and _is_run(item, structure):
            raise Refused("schema", "a key holds one value")


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


def _is_run(item: Struct, structure: UpdateStructure) -> bool:
    """Whether a struct holds more than the one value that a key has.

    Values that replaced each other are written as one struct by replicas that keep what was
    deleted, for the sake of undo; then all but the last are in the update's delete set.
    """
    if item.kind is Kind.STRING:
        return True
    if item.kind is not Kind.ANY or item.length == 1:
        return False
    replaced = range(item.clock, item.end - 1)
    return not covers(structure.deleted.get(item.client, ()), [replaced])


def _is_gone(item: Struct, structure: UpdateStructure) -> bool:
    """Whether nothing of a struct is left by the end of its update."""
    clocks = range(item.clock, item.end)
    return item.kind in _REMAINS or covers(structure.deleted.get(item.client, ()), [clocks])


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
    value that lost against another one of the same key is not seen either, nor is one that was
    written and deleted at once, so ``True`` asks for :class:`Places`.

    Raises:
        Refused: It has what only a node writes.
    """
    written = 0
    brought: dict[Id, TypeRef] | None = None
    for item in fresh(structure, known):
        if _is_run(item, structure):
            raise Refused("schema", "only a reply's text grows, and only by the node")
        if _is_gone(item, structure):
            if item.origin is not None or item.right_origin is not None:
                return True
        elif isinstance(item.parent, Id):
            if brought is None:
                brought = types_of(structure)
            written += item.parent not in brought  # what a new entry is born with is judged as one
        else:
            written += 1
    seen = sum(edit.action in ("add", "update") and len(edit.path) <= 1 for edit in change.edits)
    return written > seen


@dataclass(frozen=True, slots=True)
class Places:
    """Where the structs of a person's update stand, and who may write there.

    Attributes:
        structure: The update.
        known: What was known before it.
        held: The whole document, with or without the update.
        added: The entries that came with it, as readers see it.
        is_entry: Whether readers see an entry of this name now.
        meta: The root ``meta``, as readers see it.
        principal: Who wrote it.
        owner: Whether that is an owner.
    """

    structure: UpdateStructure
    known: Mapping[int, int]
    held: UpdateStructure
    added: Collection[str]
    is_entry: Callable[[str], bool]
    meta: Mapping[str, Any]
    principal: str
    owner: bool

    def check(self) -> None:
        """Refuse what stands where only others write, though no reader sees it.

        Raises:
            Refused: Something does.
        """
        for item in fresh(self.structure, self.known):
            if item.kind in (Kind.GC, Kind.SKIP):
                continue
            place, key = self._place_of(item)
            value = item.content[-1] if isinstance(item.content, tuple) else item.content
            is_gone = _is_gone(item, self.structure)
            if place == ENTRIES and key is not None:
                if key not in self.added and self.is_entry(key):
                    raise Refused("frozen", "an entry is never replaced or deleted")
            elif place == LEASES or (place == ACCESS and not self.owner):
                raise Forbidden(str(place), f"{place} is not yours to write")
            elif place == META and not is_gone:
                self._check_meta(key or "", normalise(value))
            elif isinstance(place, Id):
                self._check_field(place, key)
                if key == "stop" and not is_gone and value != self.principal:
                    raise Refused("stop", "a stop names who asks")
            elif place is None and not is_gone:
                raise Refused("frozen", "what that would stand in is gone")

    def _check_meta(self, key: str, value: Any) -> None:
        same = key in {"schema", "birth"} and value == self.meta.get(key)
        if not same and not is_meta(key, value):
            raise Refused("meta", f"meta.{key} is malformed")

    def _check_field(self, parent: Id, key: str | None) -> None:
        found = self._struct_at(parent)
        content = found.content if found is not None else None
        if found is None or found.kind in _REMAINS:
            raise Refused("frozen", "what that would stand in is gone")
        if not isinstance(content, SharedType) or content.ref is not TypeRef.MAP or key is None:
            raise Refused("schema", "only an entry has fields")
        is_new = parent.clock >= self.known.get(parent.client, 0)
        if not is_new and key not in _REWRITTEN:
            raise Refused("frozen", f"{key} is not written again")

    def _place_of(self, item: Struct) -> tuple[str | Id | None, str | None]:
        """What a struct hangs at, or else what the one beside it does."""
        for _ in range(NEIGHBOURS_MAX):
            if item.parent is not None:
                return item.parent, item.parent_sub
            beside = item.origin or item.right_origin
            neighbour = self._struct_at(beside) if beside is not None else None
            if neighbour is None or neighbour.kind in (Kind.GC, Kind.SKIP):
                return None, None  # collected, and this with it
            item = neighbour
        raise Refused("schema", "a value was overwritten too often to be found")

    def _struct_at(self, target: Id) -> Struct | None:
        return struct_at(self.structure, target) or struct_at(self.held, target)


def check_parents(structure: UpdateStructure, held: UpdateStructure) -> None:
    """Refuse fields of what is no entry, in a document that comes whole.

    Raises:
        Refused: A value stands in something else than an entry.
    """
    for structs in structure.structs.values():
        for item in structs:
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
