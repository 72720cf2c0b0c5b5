"""What a Yjs v1 update says, read without applying it.

Applying hostile bytes is not safe: in trials a value nested 20,000 deep ended the process, a delete
set for clocks that did not exist yet ate the next write of its victim, and clock 2^32 became 0. So
every update is read here first: which clocks of which clients it brings, what they hold, on what
they build, what it deletes. This module owns that reading, the structural limits, and what can be
said from clocks alone: whether an update leaves a gap, brings anything, or rewrites what is known.
It must not know replicas, schemas, principals or sockets; it is pure.

The grammar, as ``UpdateEncoderV1`` of Yjs 13 writes it (numbers and text as in ``y_websocket``)::

    update    = n, n * section, deleteSet
    section   = structs, client, clock, structs * struct      ; clocks run on without holes
    struct    = 0 length                                      ; collected (GC)
              | 10 length                                     ; skipped: a hole, not in this update
              | info [origin] [rightOrigin] [parent [sub]] content
    info      = content kind (low 5 bits) + 128 if origin + 64 if right origin + 32 if sub
    origin    = client, clock                                 ; rightOrigin too
    parent    = 1 rootName | 0 client, clock                  ; only without both origins,
    sub       = varString                                     ; else both follow from the neighbour
    content   = 1 length | 2 n, n * json | 3 varBytes | 4 varString | 5 json | 6 key, json
              | 7 type [name] | 8 n, n * any | 9 guid, any
    deleteSet = n, n * (client, ranges, ranges * (clock, length))
    any       = 127 | 126 | 125 varInt | 124 float32 | 123 float64 | 122 int64 | 121 | 120
              | 119 varString | 118 n, n * (varString, any) | 117 n, n * any | 116 varBytes

A text's clocks are UTF-16 code units; every element of an array has one.

Readers disagree about some bytes that no writer makes (a client with two sections, flags on a
collected struct, an empty struct): one applies what another ignores. Those are refused too, so that
what was checked here is what every replica sees.
"""

from __future__ import annotations

import enum
import functools
import heapq
import math
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

from crdt_llm.errors import MalformedMessage, TooLarge
from crdt_llm.sync.wire.y_websocket import (
    CLIENT_ID_MAX,
    CLOCK_MAX,
    NESTING_MAX,
    STATE_VECTOR_CLIENTS_MAX,
    UPDATE_BYTES_MAX,
    VAR_UINT_MAX,
    parse_json,
    read_var_uint,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


@dataclass(frozen=True, slots=True)
class Limits:
    """How large an update may be, so that reading it has a bounded cost.

    Attributes:
        update_bytes: Bytes of the update.
        structs: Structs, each some 200 bytes of memory once read.
        values: Plain values (elements, members, JSON tokens), each up to 100 bytes of memory.
        deletions: Ranges of the delete set.
        remains: Of the structs those that hold nothing (collected, skipped, deleted). They take two
            bytes each, so that they are the cheapest way to keep a reader busy; what is honest has
            them joined into runs.
    """

    update_bytes: int
    structs: int
    values: int
    deletions: int
    remains: int


DOCUMENT_LIMITS: Final = Limits(UPDATE_BYTES_MAX, 2**19, 2**19, 2**19, 2**17)
"""A whole document, as in a Step2: one of 5,000 entries has 1.5 MB and 50,000 structs. A reply
leaves three or four remains: its state that was overwritten, its chunks, the head that moved."""

TRANSACTION_LIMITS: Final = Limits(2 * 2**20, 2**15, 2**15, 2**15, 2**12)
"""One live transaction: a long paste, or a reply's last words with its seal, many times over."""


HELD_LIMITS: Final = Limits(2 * UPDATE_BYTES_MAX, 2**22, 2**22, 2**22, 2**22)
"""What a replica of ours says: all of it was within the limits when it came, update by update."""


class Kind(enum.IntEnum):
    """What a struct is; the numbers are those of the format."""

    GC = 0
    DELETED = 1
    JSON = 2
    BINARY = 3
    STRING = 4
    EMBED = 5
    FORMAT = 6
    TYPE = 7
    ANY = 8
    DOC = 9
    SKIP = 10


class TypeRef(enum.IntEnum):
    """Which shared type a struct of kind ``TYPE`` makes; the numbers are those of the format."""

    ARRAY = 0
    MAP = 1
    TEXT = 2
    XML_ELEMENT = 3
    XML_FRAGMENT = 4
    XML_HOOK = 5
    XML_TEXT = 6


class Undefined(enum.Enum):
    """JavaScript's ``undefined``, which is not ``null``."""

    UNDEFINED = "undefined"


class Id(NamedTuple):
    """One clock of one client. A named tuple: there are three to a struct."""

    client: int
    clock: int


@dataclass(frozen=True, slots=True)
class SharedType:
    """The content of a ``TYPE``.

    Attributes:
        ref: Which type.
        name: The node or hook name that an XML element or hook carries.
    """

    ref: TypeRef
    name: str | None


@dataclass(frozen=True, slots=True)
class Format:
    """The content of a ``FORMAT``: a mark that opens or closes in rich text."""

    key: str
    value: Value


@dataclass(frozen=True, slots=True)
class Subdocument:
    """The content of a ``DOC``."""

    guid: str
    options: Value


Value: TypeAlias = (
    "bool | int | float | str | bytes | Undefined | list[Value] | dict[str, Value] | None"
)
"""A plain value. Whole numbers that the writer stored as floats stay floats."""

Content: TypeAlias = "str | bytes | tuple[Value, ...] | SharedType | Format | Subdocument | None"
"""By kind: ``STRING`` str; ``BINARY`` bytes; ``ANY``, ``JSON``, ``EMBED`` a tuple with a value for
every clock; ``TYPE``, ``FORMAT``, ``DOC`` their class; ``GC``, ``SKIP``, ``DELETED`` None."""


class Struct(NamedTuple):
    """A run of clocks of one client: ``[clock, clock + length)``.

    A named tuple, as :class:`Id` is: a document is 50,000 of them, and each token of a reply is
    one.

    Attributes:
        kind: What it is.
        client: Whose clocks these are.
        clock: The first one.
        length: How many, >= 1.
        origin: What stood to its left when it was written.
        right_origin: What stood to its right when it was written.
        parent: A root's name or the id of a shared type; ``None`` if it has an origin, from which
            parent and key then follow.
        parent_sub: The key in a map, where ``parent`` is given.
        content: What it holds, by kind (see :data:`Content`).
    """

    kind: Kind
    client: int
    clock: int
    length: int
    origin: Id | None
    right_origin: Id | None
    parent: str | Id | None
    parent_sub: str | None
    content: Content

    @property
    def end(self) -> int:
        """The first clock after it."""
        return self.clock + self.length


@dataclass(frozen=True, slots=True)
class UpdateStructure:
    """What one update says.

    Attributes:
        structs: Client -> its structs in clock order, each beginning where the last one ended.
            No client is without structs.
        deleted: Client -> the clocks it deletes, as half-open ranges, sorted, merged, never empty.
    """

    structs: Mapping[int, Sequence[Struct]]
    deleted: Mapping[int, Sequence[range]]

    @property
    def ends(self) -> dict[int, int]:
        """Client -> the first clock after the last struct; a whole document's state vector."""
        return {client: structs[-1].end for client, structs in self.structs.items()}


class Lack(enum.StrEnum):
    """Which part of an update builds on something the receiver does not know."""

    EARLIER = "the clocks before it"
    SKIPPED = "the clocks it skips"
    ORIGIN = "the origin of a struct"
    RIGHT_ORIGIN = "the right origin of a struct"
    PARENT = "the parent of a struct"
    DELETED = "what it deletes"
    CYCLE = "structs that wait for each other"


@dataclass(frozen=True, slots=True)
class Missing:
    """Why an update cannot be applied yet.

    Attributes:
        what: The part that is lacking.
        id: A clock that must be known first.
    """

    what: Lack
    id: Id

    def __str__(self) -> str:
        """Say it in one line, for people."""
        return f"waits for {self.what}: client {self.id.client}, clock {self.id.clock}"


def read_update(update: bytes, limits: Limits = DOCUMENT_LIMITS) -> UpdateStructure:
    """Read an update without applying it. Total: any bytes give a structure or an error below.

    Args:
        update: A Yjs v1 update.
        limits: What is too large.

    Returns:
        What it says. Every id in it is in range; a reference to a client's own clocks is to
        earlier ones; whether others exist is for :func:`find_gap`.

    Raises:
        MalformedMessage: No update.
        TooLarge: Over one of ``limits``, a value nested deeper than ``NESTING_MAX``, more clients
            than a state vector holds, or a client id or clock over 32 bits.
    """
    if len(update) > limits.update_bytes:
        raise TooLarge(
            "update-too-large", f"an update of {len(update)} bytes is over {limits.update_bytes}"
        )
    reader = _Reader(update, limits)
    structs = reader.sections()
    deleted = reader.delete_set()
    if reader.at != len(update):
        raise MalformedMessage(f"{len(update) - reader.at} bytes follow the update")
    return UpdateStructure(structs, deleted)


def find_gap(structure: UpdateStructure, known: Mapping[int, int]) -> Missing | None:
    """Find what an update builds on that is neither known nor brought by the update itself.

    A gap is no offence; such an update is not applied, and the sender is asked for the rest. The
    search follows the order in which a replica could integrate the structs, so an update without a
    gap leaves nothing pending. What is known already is not searched.

    Args:
        structure: The update.
        known: The receiver's state vector: client -> first unknown clock.

    Returns:
        The first thing found missing, or ``None`` if the update can be applied whole.
    """
    ends: dict[int, int] = {}
    for client, structs in structure.structs.items():
        start = known.get(client, 0)
        if structs[0].clock > start:
            return Missing(Lack.EARLIER, Id(client, start))
        ends[client] = max(start, structs[-1].end)
        for item in structs:
            if item.kind is Kind.SKIP and item.clock + item.length > start:
                return Missing(Lack.SKIPPED, Id(client, max(start, item.clock)))
    missing = _find_missing_reference(structure.structs, known, ends)
    if missing is not None:
        return missing
    for client, ranges in structure.deleted.items():
        end = ends.get(client)
        if end is None:
            end = known.get(client, 0)
        if ranges[-1].stop > end:
            return Missing(Lack.DELETED, Id(client, max(end, ranges[-1].start)))
    return None


def brings(
    structure: UpdateStructure,
    known: Mapping[int, int],
    deleted: Mapping[int, Sequence[range]] | None = None,
) -> bool:
    """Whether an update may change anything. ``False`` is certain: it is a no-op.

    Args:
        structure: The update.
        known: The receiver's state vector: client -> first unknown clock.
        deleted: What the receiver knows to be deleted, as in :attr:`UpdateStructure.deleted`;
            without it any deletion may be new.

    Returns:
        Whether it has a clock that is not known, or a deletion that is not.
    """
    for client, structs in structure.structs.items():
        if structs[-1].end > known.get(client, 0):
            return True
    if deleted is None:
        return bool(structure.deleted)
    return not all(
        covers(deleted.get(client, ()), ranges) for client, ranges in structure.deleted.items()
    )


def find_rewrite(structure: UpdateStructure, held: UpdateStructure) -> Id | None:
    """Find a clock that the receiver holds with another value.

    A replica would silently ignore the other value, and two replicas would differ for ever. The
    same struct has several honest forms, and they count as equal: cut at any clock, deleted or
    collected, a number as integer or float, and half of a surrogate pair as U+FFFD (which Yjs
    writes where a deletion cut the pair).

    Args:
        structure: The update.
        held: What the receiver holds: its document, or at least the clocks that both have.

    Returns:
        The first clock of a struct's part that differs, or ``None``.
    """
    # A long text is encoded once, not once for each of the pieces it is compared with.
    utf16 = functools.lru_cache(maxsize=2)(_utf16)
    for client, theirs in structure.structs.items():
        ours = held.structs.get(client, ())
        position = 0
        for item in theirs:
            while position < len(ours) and ours[position].end <= item.clock:
                position += 1
            # What overlaps the end of this struct may overlap the next one too.
            overlapping = position
            while overlapping < len(ours) and ours[overlapping].clock < item.end:
                own = ours[overlapping]
                start = max(item.clock, own.clock)
                if not _same(item, own, range(start, min(item.end, own.end)), utf16):
                    return Id(client, start)
                overlapping += 1
    return None


_REPLACEMENT: Final = 0xFFFD
_SURROGATES: Final = range(0xD800, 0xE000)
_VALUELESS: Final = (Kind.GC, Kind.SKIP, Kind.DELETED)


def _same(one: Struct, other: Struct, clocks: range, utf16: Callable[[str], bytes]) -> bool:
    """Whether two structs of one client say the same about ``clocks``, which both have."""
    if one.kind in _VALUELESS or other.kind in _VALUELESS:
        return True
    return (
        one.kind is other.kind
        and _place_at(one, clocks.start) == _place_at(other, clocks.start)
        and _same_content(one, other, clocks, utf16)
    )


def _same_content(one: Struct, other: Struct, clocks: range, utf16: Callable[[str], bytes]) -> bool:
    mine, theirs = one.content, other.content
    here = slice(clocks.start - one.clock, clocks.stop - one.clock)
    there = slice(clocks.start - other.clock, clocks.stop - other.clock)
    if isinstance(mine, str) and isinstance(theirs, str):
        return _same_text(
            utf16(mine)[2 * here.start : 2 * here.stop],
            utf16(theirs)[2 * there.start : 2 * there.stop],
        )
    if isinstance(mine, tuple) and isinstance(theirs, tuple):
        return _same_value(list(mine[here]), list(theirs[there]))
    if isinstance(mine, Format) and isinstance(theirs, Format):
        return mine.key == theirs.key and _same_value(mine.value, theirs.value)
    if isinstance(mine, Subdocument) and isinstance(theirs, Subdocument):
        return mine.guid == theirs.guid  # the options are each replica's own
    return mine == theirs


def _place_at(item: Struct, clock: int) -> tuple[object, ...]:
    """Where a struct would stand, were it cut at ``clock``."""
    if clock > item.clock:
        return Id(item.client, clock - 1), item.right_origin, None, None
    return item.origin, item.right_origin, item.parent, item.parent_sub


def _utf16(text: str) -> bytes:
    return text.encode("utf-16-le")


def _same_text(one: bytes, other: bytes) -> bool:
    """Compare equally long UTF-16; U+FFFD may stand for half of a pair."""
    if one == other:
        return True
    layout = f"<{len(one) // 2}H"
    return all(
        mine == theirs or (_REPLACEMENT in (mine, theirs) and min(mine, theirs) in _SURROGATES)
        for mine, theirs in zip(
            struct.unpack(layout, one), struct.unpack(layout, other), strict=True
        )
    )


def _same_value(one: object, other: object) -> bool:
    """Compare plain values; unlike ``==``, ``True`` is no number."""
    if isinstance(one, list):
        return (
            isinstance(other, list) and len(one) == len(other) and all(map(_same_value, one, other))
        )
    if isinstance(one, dict):
        return (
            isinstance(other, dict)
            and one.keys() == other.keys()
            and all(_same_value(value, other[key]) for key, value in one.items())
        )
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    return one is other or one == other


def covers(outer: Sequence[range], inner: Sequence[range]) -> bool:
    """Whether every clock of ``inner`` is in ``outer``, both sorted, merged and without empties."""
    position = 0
    for clocks in inner:
        while position < len(outer) and outer[position].stop < clocks.stop:
            position += 1
        if position == len(outer) or outer[position].start > clocks.start:
            return False
    return True


_REFERENCES: Final = (Lack.ORIGIN, Lack.RIGHT_ORIGIN, Lack.PARENT)


def _find_missing_reference(
    structs: Mapping[int, Sequence[Struct]], known: Mapping[int, int], ends: Mapping[int, int]
) -> Missing | None:
    """Integrate in thought: advance client by client, waiting where another must go first.

    Invariant: ``reached[client]`` is the first clock of a brought client that a replica could not
    have integrated yet. A client waits for one clock at a time, and each reference is waited for
    at most once, so hostile updates take n log n like honest ones.
    """
    reached = {client: known.get(client, 0) for client in structs}
    positions = dict.fromkeys(structs, 0)
    waiting: dict[int, list[tuple[int, int]]] = {}  # client -> heap of (its clock, who waits)
    ready = list(structs)
    while ready:
        client = ready.pop()
        own = structs[client]
        start = known.get(client, 0)
        position = positions[client]
        while position < len(own):
            item = own[position]
            end = item.clock + item.length
            if end > start:
                wanted = _first_unreached(item, known, reached)
                if wanted is not None:
                    lack, target = wanted
                    if target.clock >= ends.get(target.client, 0):
                        return Missing(lack, target)
                    heapq.heappush(waiting.setdefault(target.client, []), (target.clock, client))
                    break
                reached[client] = end
            position += 1
        positions[client] = position
        heap = waiting.get(client)
        while heap and heap[0][0] < reached[client]:
            ready.append(heapq.heappop(heap)[1])
    for client, heap in waiting.items():
        if heap:
            return Missing(Lack.CYCLE, Id(client, heap[0][0]))
    return None


def _first_unreached(
    item: Struct, known: Mapping[int, int], reached: Mapping[int, int]
) -> tuple[Lack, Id] | None:
    for lack, target in zip(
        _REFERENCES, (item.origin, item.right_origin, item.parent), strict=True
    ):
        if isinstance(target, Id):
            end = reached.get(target.client)
            if end is None:
                end = known.get(target.client, 0)
            if target.clock >= end:
                return lack, target
    return None


_HAS_ORIGIN: Final = 0x80
_HAS_RIGHT_ORIGIN: Final = 0x40
_HAS_SUB: Final = 0x20
_KIND_BITS: Final = 0x1F

_KINDS: Final = tuple(Kind)
_TYPE_REFS: Final = tuple(TypeRef)
_NAMED_TYPES: Final = (TypeRef.XML_ELEMENT, TypeRef.XML_HOOK)
_FLOAT32: Final = struct.Struct(">f")
_FLOAT64: Final = struct.Struct(">d")
_INT64: Final = struct.Struct(">q")


class _Reader:
    """A position in one update. Methods read what they are named after and move on."""

    __slots__ = ("at", "data", "deletions_left", "remains_left", "structs_left", "values_left")

    def __init__(self, data: bytes, limits: Limits) -> None:
        self.data = data
        self.at = 0
        self.structs_left = limits.structs
        self.values_left = limits.values
        self.deletions_left = limits.deletions
        self.remains_left = limits.remains

    def sections(self) -> dict[int, tuple[Struct, ...]]:
        sections: dict[int, tuple[Struct, ...]] = {}
        for _ in range(self.clients()):
            count = self.var_uint()
            self.structs_left -= count
            if self.structs_left < 0:
                raise TooLarge("too-many-structs", "the update has too many structs")
            client = self.client()
            clock = self.var_uint()
            if client in sections:
                raise MalformedMessage("the update has two sections of one client")
            structs: list[Struct] = []
            for _ in range(count):
                item = self.next_struct(client, clock)
                clock += item.length
                if clock > CLOCK_MAX:
                    raise TooLarge("clock-too-large", f"clock {clock} is over 32 bits")
                structs.append(item)
            if not structs:
                raise MalformedMessage("the update has an empty section")
            sections[client] = tuple(structs)
        return sections

    def clients(self) -> int:
        count = self.var_uint()
        if count > STATE_VECTOR_CLIENTS_MAX:
            raise TooLarge("too-many-clients", f"{count} clients fit in no state vector")
        return count

    def delete_set(self) -> dict[int, tuple[range, ...]]:
        deleted: dict[int, tuple[range, ...]] = {}
        for _ in range(self.clients()):
            client = self.client()
            count = self.var_uint()
            self.deletions_left -= count
            if self.deletions_left < 0:
                raise TooLarge("too-many-deletions", "the update deletes too many ranges")
            if client in deleted:
                raise MalformedMessage("the delete set names a client twice")
            ranges = [self.clock_range() for _ in range(count)]
            if not ranges:
                raise MalformedMessage("the delete set has a client without ranges")
            deleted[client] = _merged(ranges)
        return deleted

    def clock_range(self) -> range:
        clock = self.var_uint()
        end = clock + self.length()
        if end > CLOCK_MAX:
            raise TooLarge("clock-too-large", f"clock {end} is over 32 bits")
        return range(clock, end)

    def next_struct(self, client: int, clock: int) -> Struct:
        info = self.byte()
        number = info & _KIND_BITS
        if number >= len(_KINDS):
            raise MalformedMessage(f"content kind {number} is unknown")
        kind = _KINDS[number]
        if kind in _VALUELESS:
            self.remains_left -= 1
            if self.remains_left < 0:
                raise TooLarge("too-many-structs", "the update has too many collected structs")
        if kind is Kind.GC or kind is Kind.SKIP:
            if info != number:
                raise MalformedMessage("a collected or skipped struct has flags")
            return Struct(kind, client, clock, self.length(), None, None, None, None, None)
        origin = self.id(client, clock) if info & _HAS_ORIGIN else None
        right_origin = self.id(client, clock) if info & _HAS_RIGHT_ORIGIN else None
        parent: str | Id | None = None
        parent_sub = None
        if origin is None and right_origin is None:
            is_root = self.var_uint()
            if is_root > 1:
                raise MalformedMessage(f"parent form {is_root} is unknown")
            parent = self.string() if is_root else self.id(client, clock)
            if info & _HAS_SUB:
                parent_sub = self.string()
        length, content = _CONTENTS[kind](self)
        return Struct(
            kind, client, clock, length, origin, right_origin, parent, parent_sub, content
        )

    def text_run(self) -> tuple[int, Content]:
        text = self.string()
        if not text:
            raise MalformedMessage("a struct is empty")
        return len(text) if text.isascii() else len(text.encode("utf-16-le")) // 2, text

    def any_run(self) -> tuple[int, Content]:
        length = self.length()
        return length, tuple([self.any(0) for _ in range(self.charged(length))])

    def json_run(self) -> tuple[int, Content]:
        length = self.length()
        return length, tuple([self.json(undefined=True) for _ in range(length)])

    def shared_type(self) -> SharedType:
        number = self.var_uint()
        if number >= len(_TYPE_REFS):
            raise MalformedMessage(f"shared type {number} is unknown")
        ref = _TYPE_REFS[number]
        return SharedType(ref, self.string() if ref in _NAMED_TYPES else None)

    def any(self, depth: int) -> Value:
        """Read a plain value inside ``depth`` arrays and objects. The recursion ends with them."""
        tag = self.byte()
        if tag in _CONSTANTS:
            return _CONSTANTS[tag]
        read = _VALUES.get(tag)
        if read is None:
            raise MalformedMessage(f"value type {tag} is unknown")
        return read(self, depth)

    def array(self, depth: int) -> list[Value]:
        self.check_depth(depth)
        return [self.any(depth) for _ in range(self.charged(self.var_uint()))]

    def object(self, depth: int) -> dict[str, Value]:
        self.check_depth(depth)
        members: dict[str, Value] = {}
        for _ in range(self.charged(self.var_uint())):
            key = self.string()
            if key in members:
                raise MalformedMessage("an object has a key twice")
            members[key] = self.any(depth)
        return members

    def check_depth(self, depth: int) -> None:
        if depth > NESTING_MAX:
            raise TooLarge("too-deep", f"a value nests deeper than {NESTING_MAX}")

    def charged(self, count: int) -> int:
        """Take ``count`` plain values from what the update may have."""
        self.values_left -= count
        if self.values_left < 0:
            raise TooLarge("too-many-values", "the update has too many values")
        return count

    def json(self, *, undefined: bool = False) -> Value:
        text = self.string()
        self.charged(1 + text.count(",") + text.count("[") + text.count("{"))
        if undefined and text == "undefined":
            return Undefined.UNDEFINED
        value: Value = parse_json(text)
        return value

    def number(self, form: struct.Struct) -> int | float:
        end = self.at + form.size
        if end > len(self.data):
            raise MalformedMessage("truncated: the update ends inside a number")
        value: int | float = form.unpack_from(self.data, self.at)[0]
        self.at = end
        # The one NaN of this process: equal content stays equal inside of containers.
        return math.nan if value != value else value  # noqa: PLR0124 - true of NaN alone

    def var_int(self) -> int:
        """Read a signed number: its first byte is 128 more, 64 sign, 6 bits; then as varUint."""
        first = self.byte()
        value = first & 0x3F
        if first & 0x80:
            rest, self.at = read_var_uint(self.data, self.at)
            if rest == 0:
                raise MalformedMessage("a number is written longer than needed")
            value |= rest << 6
            if value > VAR_UINT_MAX:
                raise MalformedMessage("a number is over 2^53 - 1")
        return -value if first & 0x40 else value

    def id(self, client: int, clock: int) -> Id:
        """Read a reference made by the struct at ``clock`` of ``client``."""
        target = Id(self.client(), self.var_uint())
        if target.clock >= CLOCK_MAX:
            raise TooLarge("clock-too-large", f"clock {target.clock} is over 32 bits")
        if target.client == client and target.clock >= clock:
            raise MalformedMessage("a struct builds on itself or on a later one of its client")
        return target

    def client(self) -> int:
        client = self.var_uint()
        if client > CLIENT_ID_MAX:
            raise TooLarge("client-id-too-large", f"client id {client} is over 32 bits")
        return client

    def length(self) -> int:
        length = self.var_uint()
        if length == 0:
            raise MalformedMessage("a struct or range is empty")
        return length

    def string(self) -> str:
        try:
            return self.buffer().decode()
        except UnicodeDecodeError as error:
            raise MalformedMessage("text is no UTF-8") from error

    def buffer(self) -> bytes:
        length = self.var_uint()
        at = self.at
        end = at + length
        if end > len(self.data):
            raise MalformedMessage("truncated: the update ends inside its content")
        self.at = end
        return self.data[at:end]

    def byte(self) -> int:
        at = self.at
        if at >= len(self.data):
            raise MalformedMessage("truncated: the update ends inside a struct")
        self.at = at + 1
        return self.data[at]

    def var_uint(self) -> int:
        # Most numbers are one byte, and there are five to a struct.
        at = self.at
        data = self.data
        if at < len(data) and (byte := data[at]) < 0x80:  # noqa: PLR2004 - as in y_websocket
            self.at = at + 1
            return byte
        value, self.at = read_var_uint(data, at)
        return value


_CONTENTS: Final[dict[Kind, Callable[[_Reader], tuple[int, Content]]]] = {
    Kind.DELETED: lambda reader: (reader.length(), None),
    Kind.JSON: _Reader.json_run,
    Kind.BINARY: lambda reader: (1, reader.buffer()),
    Kind.STRING: _Reader.text_run,
    Kind.EMBED: lambda reader: (1, (reader.json(),)),
    Kind.FORMAT: lambda reader: (1, Format(reader.string(), reader.json())),
    Kind.TYPE: lambda reader: (1, reader.shared_type()),
    Kind.ANY: _Reader.any_run,
    Kind.DOC: lambda reader: (1, Subdocument(reader.string(), reader.any(0))),
}
"""What a kind holds: how many clocks it takes, and the content."""

_CONSTANTS: Final[dict[int, Value]] = {
    127: Undefined.UNDEFINED,
    126: None,
    121: False,
    120: True,
}

_VALUES: Final[dict[int, Callable[[_Reader, int], Value]]] = {
    125: lambda reader, _: reader.var_int(),
    124: lambda reader, _: reader.number(_FLOAT32),
    123: lambda reader, _: reader.number(_FLOAT64),
    122: lambda reader, _: reader.number(_INT64),
    119: lambda reader, _: reader.string(),
    118: lambda reader, depth: reader.object(depth + 1),
    117: lambda reader, depth: reader.array(depth + 1),
    116: lambda reader, _: reader.buffer(),
}
"""How a plain value of each type is read, given how many containers it is in."""


def _merged(ranges: list[range]) -> tuple[range, ...]:
    """Sort, and join what touches or overlaps."""
    ranges.sort(key=lambda clocks: clocks.start)
    merged = [ranges[0]]
    for clocks in ranges[1:]:
        last = merged[-1]
        if clocks.start > last.stop:
            merged.append(clocks)
        elif clocks.stop > last.stop:
            merged[-1] = range(last.start, clocks.stop)
    return tuple(merged)
