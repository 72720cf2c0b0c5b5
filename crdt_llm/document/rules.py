"""Checks by meaning: may this author have made this change?

This module owns the rules of who may write what, and the form that each value must have when it is
written. It runs right after an update was applied to a replica, on what the update *did*
(:class:`~crdt_llm.document.conversation.Change`), and the replica is thrown away if it raises. It
must not know sockets, rooms, stores or keys: whether a principal is who it says, whether a node
holds the lease, and whether a signature is genuine, others have found out.

Readers of a document are lenient (what is malformed counts as absent); these rules are what keeps
malformed values from getting in, so they are strict. The rules, numbered so that code, tests and
refusals can cite them; the word after each is the refusal's ``code``:

The conversation

* C1 ``birth`` - from the first write on there is ``schema`` 1 and a ``birth`` that hashes to the
  conversation's id; only the birth's owner creates the conversation. While either is missing it is
  a gap: a stock client may send a later write before the one that gives birth.
* C2 ``birth`` - ``schema`` and ``birth`` may be repeated with equal values, never changed or
  deleted.
* C3 ``forbidden`` - a stranger or a reader writes nothing, a node only what N1 and E1 give it. A
  token may allow less than its principal's right, never more.
* C4 ``meta`` - only known keys with well-formed values, by a writer.
* C5 ``access`` - only by an owner; known grants; the birth's owner stays an owner. Everybody else
  may delete their own right: that is leaving.
* C6 ``leases`` - only by the node, a well-formed value under a canonical epoch, its own, once.
* C7 ``schema`` - no shared type, key or place in the document beside the schema's.

Entries

* E1 ``forged-author`` - an entry is born under its writer's own name.
* E2 ``born`` - its id is canonical, its ``born`` well-formed, without unknown keys, in one value.
* E3 ``clock`` - its ``clock`` is greater than its ``after``'s, which is present (else a gap), and
  at most :data:`CLOCK_LEAD_MAX` ahead of every clock known before it.
* E4 ``content`` - an author's entry is born with its text as plain text; a slot without any.
* E5 ``frozen`` - what is written once is never written again; an entry is never replaced.
* E6 ``frozen`` - nothing is deleted but what a redaction withdraws, by its author, an owner, or the
  node, which clears away what was written beside the redaction.
* E7 ``stop`` - a slot's ``stop`` names the writer who asks.
* E8 ``redacted`` - ``redacted`` names its writer, who is the entry's author or an owner.

What only the node writes

* N0 ``stale-epoch`` - a node writes only while the lease of its epoch is the conversation's.
* N1 ``node-field`` - ``place``, ``state``, ``calls``, ``reads``, ``sealed``, ``usage``, ``salt``,
  ``proof`` and the text of a reply.
* N2 ``state`` - a slot's state only goes forward; ``streaming`` and ``done`` need a place,
  ``superseded`` has none.
* N3 ``place`` - a place hangs at an admitted parent that is not still being answered, under an
  epoch that has a lease, the writer's own; an author's entry is proved at once, a slot starts at
  once.
* N4 ``proof`` - a proof comes with its salt (a redacted entry never gets one), once its entry is
  admitted and, for a reply, ended; a placed reply does not end without.
* N5 ``growth`` - a reply's text and sealed chunks only grow at their end and only while it streams;
  the chunks become one blob in the update that ends it.
* N6 ``node-field`` - ``calls`` and ``reads`` are written until the end, ``usage`` at the end.

Sizes (``too-large``) are checked beside the values that they bound.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, Final

from crdt_llm.document.conversation import ACCESS, ENTRIES, LEASES, META
from crdt_llm.document.schema import (
    ENDED,
    ENTRIES_MAX,
    ENTRY_FIELDS,
    POLICY_VALUES,
    PRINCIPAL_CHARACTERS_MAX,
    REDACTION_DELETES,
    ROOT,
    SALT_BYTES,
    SCHEMA_VERSION,
    TEXT_BYTES_MAX,
    TITLE_CHARACTERS_MAX,
    WHOLE_MAX,
    Grant,
    Role,
    State,
    is_entry_id,
    read_params,
    read_place,
    read_proof,
    read_state,
    text,
    whole,
)
from crdt_llm.document.schema import conversation_id as id_of
from crdt_llm.errors import Forbidden, Gap, Refused, TooLarge

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from crdt_llm.document.conversation import Change, Conversation, Edit
    from crdt_llm.document.schema import Birth

# A clock is one more than the greatest that its author saw. One that leaps ahead makes everybody's
# later clocks leap too, towards the end of what JavaScript counts; offline work leaps this far.
CLOCK_LEAD_MAX: Final = 1_000
CALL_CHARACTERS_MAX: Final = 200  # an id that a model made up
MODEL_CHARACTERS_MAX: Final = 500  # a hub id or a path
DIGEST_BYTES: Final = 32  # SHA-256
PUBLIC_KEY_BYTES: Final = 32  # Ed25519
SIGNATURE_BYTES: Final = 64  # Ed25519

_EPOCH = re.compile(r"(?:0|[1-9][0-9]{0,15})\Z")

_BORN_KEYS: Final = frozenset(
    {"role", "author", "device", "at", "clock", "mode", "after", "params", "call", "covers"}
)
NODE_FIELDS: Final = frozenset(
    {"place", "state", "calls", "reads", "sealed", "usage", "salt", "proof"}
)
_SLOT_FIELDS: Final = frozenset({"state", "calls", "reads", "sealed", "usage", "stop"})
_REWRITTEN: Final = frozenset({"state", "stop", "redacted"})  # the others are written once
_EMPTY_PARAMS: Final[Mapping[str, Any]] = {"stop": [], "ignore_eos": False, "extend": False}


@dataclass(frozen=True, slots=True)
class Author:
    """Who sent an update.

    Attributes:
        principal: the authenticated name.
        node: whether it writes as the conversation's node.
        epoch: the epoch of the lease that it holds as the node, if it holds one.
        cap: the most that its token allows; ``None`` for all that the principal may.
    """

    principal: str
    node: bool = False
    epoch: int | None = None
    cap: Grant | None = None

    def bounded(self, grant: Grant | None) -> Grant | None:
        """What is left of the principal's right under this token."""
        if grant is None or self.cap is None:
            return grant
        return max(grant, self.cap, key=_RIGHTS.index)


_RIGHTS: Final = (Grant.OWNER, Grant.WRITER, Grant.READER)  # the most first


@dataclass(slots=True)
class _Touched:
    """What a change did to one entry; a new entry added all the fields that it came with."""

    id: str
    new: bool = False
    added: dict[str, Any] = field(default_factory=dict)
    updated: dict[str, tuple[Any, Any]] = field(default_factory=dict)  # key -> (old, new)
    deleted: set[str] = field(default_factory=set)
    text: list[Any] = field(default_factory=list)  # deltas inside `content`
    chunks: list[Any] = field(default_factory=list)  # deltas inside `sealed`

    def written(self) -> dict[str, Any]:
        """Every field that was set, with the value that it has now."""
        return self.added | {key: new for key, (_, new) in self.updated.items()}


def check(
    change: Change,
    conversation: Conversation,
    *,
    conversation_id: str,
    author: Author,
    epoch: int | None = None,
) -> None:
    """Ask whether ``author`` may have made ``change``.

    Costs what the change touched, not what the conversation holds; only a new entry with a clock
    far above its ``after``'s makes it look through all clocks.

    Args:
        change: what :meth:`Conversation.apply` answered for the update.
        conversation: the replica **after** the update.
        conversation_id: the id under which the update was sent.
        author: who sent it.
        epoch: the conversation's current epoch; ``None`` where no leases are kept, so that nobody
            is fenced off.

    Raises:
        Refused: a rule is broken. The replica must be thrown away, as after the next.
        Gap: something that this builds on is not here yet; no offence.
    """
    if change.is_empty:
        return  # known already: a no-op for everybody
    if author.node and epoch is not None:  # N0
        _need(author.epoch == epoch, "stale-epoch", "another node has the lease now, or none has")
    if author.node and is_growth(change, conversation, conversation_id=conversation_id):
        return
    _Check(change, conversation, conversation_id, author).run()


def is_growth(change: Change, conversation: Conversation, *, conversation_id: str) -> bool:
    """Whether a node's change is nothing but the next words of replies, as all the rules allow it.

    Nearly every change is: one for each token. What may be asked of such a change is asked here
    without the rest; ``False`` says nothing, and leaves it to the rest.

    Args:
        change: what a node holding the lease (N0) did.
        conversation: the replica after it.
        conversation_id: the id under which it was sent.

    Returns:
        ``True`` only if no rule refuses it: C1 and C2, as the birth that was checked before is
        untouched; C3, as it is a node's; N5, as below. The others are about keys, and no key of
        any map was touched.
    """
    birth = conversation.meta.birth
    if not change.edits or birth is None or _id_of(birth) != conversation_id:
        return False
    for edit in change.edits:
        if edit.root != ENTRIES or len(edit.path) != 2:  # noqa: PLR2004 - an entry and its field
            return False
        entry, name = str(edit.path[0]), edit.path[1]
        length = conversation.text_bytes(entry)
        if (
            length > TEXT_BYTES_MAX
            or conversation.state(entry) is not State.STREAMING
            or conversation.is_redacted(entry)
        ):
            return False
        is_word = name == "content" and edit.action == "text" and _is_last_word(edit.new, length)
        is_chunk = name == "sealed" and edit.action == "array" and _is_last_chunk(edit.new)
        if not (is_word or is_chunk):
            return False
    return True


def check_born(value: Mapping[str, Any], role: Role) -> None:
    """E2, but for whose it is: the forms of the values in a ``born`` with a known role.

    Raises:
        Refused: one of them is unknown, missing or malformed.
    """
    unknown = set(value) - _BORN_KEYS
    _need(not unknown, "born", f"born has no {min(unknown, default='')!r}")
    forms = (
        text(value.get("device"), PRINCIPAL_CHARACTERS_MAX) is not None,
        whole(value.get("at"), 0) is not None,
        value.get("mode") in ("continue", "fork"),
        value.get("after", ROOT) == ROOT or is_entry_id(value.get("after")),
        "params" not in value or (role is Role.ASSISTANT and _is_params(value["params"])),
        (role is Role.TOOL) == ("call" in value),
        "call" not in value or bool(text(value["call"], CALL_CHARACTERS_MAX)),
        "covers" not in value or (role is not Role.ASSISTANT and _is_covers(value["covers"])),
    )
    _need(all(forms), "born", "a value in born is missing or malformed")


def is_meta(key: str, value: Any) -> bool:
    """C4: whether ``meta`` may hold this plain value, ``schema`` and ``birth`` aside."""
    form = _META_FORMS.get(key)
    return form is not None and form(value)


class _Check:
    """One run of the rules; holds what they share."""

    def __init__(
        self, change: Change, conversation: Conversation, conversation_id: str, author: Author
    ) -> None:
        self._change = change
        self._conversation = conversation
        self._conversation_id = conversation_id
        self._author = author
        self._owner = ""

    def run(self) -> None:
        by_root: dict[str, list[Edit]] = {META: [], ACCESS: [], LEASES: [], ENTRIES: []}
        for edit in self._change.edits:
            by_root[edit.root].append(edit)
        birth = self._birth(by_root[META])
        self._owner = birth.owner
        # The node first: it writes most, and what it may do depends on no right.
        may_write = self._author.node or self._is_writer() or self._is_leaving()
        if not may_write:  # C3
            raise Forbidden("forbidden", "you may not write in this conversation")
        for edit in by_root[META]:
            self._meta(edit)
        for edit in by_root[ACCESS]:
            self._access(edit, birth)
        for edit in by_root[LEASES]:
            self._lease(edit)
        self._entries(by_root[ENTRIES])

    # -- the conversation ----------------------------------------------------------------------

    def _birth(self, edits: list[Edit]) -> Birth:
        """C1, C2."""
        written = False
        for edit in edits:
            if edit.key in {"schema", "birth"}:
                written = True
                _need(not edit.path and not edit.shared, "schema", f"{edit.key} is one plain value")
                same = edit.action == "add" or (edit.action == "update" and edit.old == edit.new)
                _need(same, "birth", f"{edit.key} of a conversation never changes")
        birth = self._conversation.meta.birth
        if not written and birth is not None:  # as it was when it was checked
            _need(self._is_ours(birth), "birth", "this birth belongs to another conversation id")
            return birth
        meta = self._conversation.meta_plain()
        if meta.get("schema") is None or meta.get("birth") is None:
            raise Gap("this conversation has no schema and birth yet")
        _need(
            whole(meta["schema"], SCHEMA_VERSION, SCHEMA_VERSION) is not None,
            "birth",
            f"this is not schema {SCHEMA_VERSION}",
        )
        if birth is None or set(meta["birth"]) != {"owner", "nonce"}:
            raise Refused("birth", "birth is a map of owner and a nonce of 16 bytes")
        _need(self._is_ours(birth), "birth", "this birth belongs to another conversation id")
        created = any(edit.key == "birth" and edit.action == "add" for edit in edits)
        if created and self._author.bounded(Grant.OWNER) is not Grant.OWNER:
            raise Forbidden("birth", "this token may not create a conversation")
        if created and birth.owner != self._author.principal:
            raise Forbidden("birth", "only its owner creates a conversation")
        return birth

    def _is_ours(self, birth: Birth) -> bool:
        return _id_of(birth) == self._conversation_id

    @cached_property
    def _right(self) -> Grant | None:
        """What the principal might do before the change, which may be about just that."""
        principal = self._author.principal
        if self._owner == principal:
            return Grant.OWNER
        for edit in self._change.edits:
            if edit.root == ACCESS and edit.key == principal and not edit.path:
                return _grant(edit.old)
        return self._conversation.grant_of(principal)

    @cached_property
    def _grant(self) -> Grant | None:
        """What is left of that under the author's token."""
        return self._author.bounded(self._right)

    def _is_writer(self) -> bool:
        return self._grant in {Grant.OWNER, Grant.WRITER}

    def _is_leaving(self) -> bool:
        """Whether all that changed is that the author gave up its right, with a token for that."""
        whole_right = self._right is not None and self._grant is self._right
        edits = self._change.edits
        return whole_right and bool(edits) and all(map(self._gives_up, edits))

    def _gives_up(self, edit: Edit) -> bool:
        own = edit.root == ACCESS and not edit.path and edit.key == self._author.principal
        return own and edit.action == "delete"

    def _meta(self, edit: Edit) -> None:
        """C4; ``schema`` and ``birth`` were C2's."""
        if edit.key in {"schema", "birth"} and not edit.path:
            return
        if not self._is_writer():
            raise Forbidden("meta", "only a writer changes the conversation's own facts")
        form = None if edit.path or edit.shared else _META_FORMS.get(edit.key or "")
        if form is None:
            raise Refused("schema", f"meta has no {edit.key!r}")
        _need(edit.action == "delete" or form(edit.new), "meta", f"meta.{edit.key} is malformed")

    def _access(self, edit: Edit, birth: Birth) -> None:
        """C5."""
        gives_up = self._gives_up(edit) and self._grant is self._right
        if self._grant is not Grant.OWNER and not gives_up:
            raise Forbidden("access", "only an owner gives or takes rights")
        if edit.path or edit.shared or not edit.key:
            raise Refused("schema", "access is a map of names to rights")
        _need(len(edit.key) <= PRINCIPAL_CHARACTERS_MAX, "access", "that name is too long")
        if edit.action != "delete":
            _need(_grant(edit.new) is not None, "access", "a right is owner, writer or reader")
        if edit.key == birth.owner:
            _need(edit.new == Grant.OWNER, "access", "who made a conversation stays its owner")

    def _lease(self, edit: Edit) -> None:
        """C6."""
        if not self._author.node:
            raise Forbidden("leases", "only the node records leases")
        if edit.path or edit.shared or edit.key is None:
            raise Refused("schema", "leases is a map of epochs to plain values")
        known = _EPOCH.match(edit.key) is not None and int(edit.key) <= WHOLE_MAX
        _need(known, "leases", "an epoch is a whole number, as text")
        _need(edit.action == "add", "leases", "a lease is written once")
        own = self._author.epoch in {None, int(edit.key)}
        _need(own, "leases", "a node records its own lease")
        value = edit.new
        _need(
            isinstance(value, dict)
            and set(value) == {"node", "signature"}
            and _is_bytes(value["node"], PUBLIC_KEY_BYTES)
            and _is_bytes(value["signature"], SIGNATURE_BYTES),
            "leases",
            "a lease is a node's public key and the relay's signature",
        )

    # -- entries -------------------------------------------------------------------------------

    def _entries(self, edits: list[Edit]) -> None:
        touched: dict[str, _Touched] = {}
        for edit in edits:
            entry = edit.entry or ""
            one = touched.setdefault(entry, _Touched(entry))
            if edit.path:
                self._collect(one, edit)
            else:
                self._collect_new(one, edit)
        new = [one for one in touched.values() if one.new]
        for one in new:
            self._born(one)
        self._clocks(new)
        for one in sorted(touched.values(), key=lambda one: one.id):
            self._fields(one)

    def _collect_new(self, one: _Touched, edit: Edit) -> None:
        """E2, E5, E6: the root of entries only ever gains canonical ids."""
        _need(
            edit.action == "add", "frozen", "an entry is never replaced or deleted, only redacted"
        )
        _need(is_entry_id(edit.key), "born", "an entry's id is a ULID in canonical form")
        if edit.shared != "map":
            raise Refused("schema", "an entry is a Y.Map")
        one.new = True
        for key, value in edit.new.items():
            self._field(one.id, key)
            one.added[key] = value

    def _collect(self, one: _Touched, edit: Edit) -> None:
        """C7."""
        match edit.path[1:], edit.action:
            case (), "delete":
                one.deleted.add(str(edit.key))
            case (), "add" if isinstance(edit.key, str):
                self._field(one.id, edit.key)
                one.added[edit.key] = edit.new
            case (), "update" if isinstance(edit.key, str):
                self._field(one.id, edit.key)
                one.updated[edit.key] = (edit.old, edit.new)
            case ("content",), "text":
                one.text.append(edit.new)
            case ("sealed",), "array":
                one.chunks.append(edit.new)
            case _:
                raise Refused("schema", "that place in an entry is not of this schema")

    def _field(self, entry: str, key: str) -> None:
        """C7: a field is known and of its kind."""
        _need(key in ENTRY_FIELDS, "schema", f"an entry has no field {key!r}")
        kind = self._conversation.kind(entry, key)
        born = self._conversation.born(entry)
        expected = ""
        if key == "sealed":
            expected = "array"
        elif key == "content" and born is not None and born.role is Role.ASSISTANT:
            expected = "text"
        code = "content" if key == "content" else "schema"
        _need(kind == expected, code, f"{key} is not of the kind that the schema gives it")

    def _born(self, one: _Touched) -> None:
        """E1, E2, E4."""
        value = one.added.get("born")
        born = self._conversation.born(one.id)
        if born is None or not isinstance(value, dict):
            raise Refused("born", "an entry needs a born with a known role and a clock")
        _need(born.author == self._author.principal, "forged-author", "write under your own name")
        check_born(value, born.role)
        if born.role is Role.ASSISTANT:
            return
        content = one.added.get("content")
        if content is None:
            _need("redacted" in one.added, "content", "an entry is born with its text")
            return
        _need(isinstance(content, str), "content", "an entry's text is one plain text")
        if len(content.encode()) > TEXT_BYTES_MAX:
            raise TooLarge("too-large", f"a text has at most {TEXT_BYTES_MAX} bytes")

    def _clocks(self, new: list[_Touched]) -> None:
        """E3, in the order of the clocks, so that entries may lean on others of the same update."""
        if not new:
            return
        if len(self._conversation.tree) > ENTRIES_MAX:
            raise TooLarge("too-large", f"a conversation has at most {ENTRIES_MAX} entries")
        tree = self._conversation.tree
        ids = {one.id for one in new}
        greatest = 0
        everything_seen = False
        for clock, entry in sorted((tree.facts(entry).clock, entry) for entry in ids):
            after = tree.facts(entry).after
            named = 0
            if after != ROOT:
                if after not in tree:
                    raise Gap(f"entry {entry} was written after one that is not here yet")
                named = tree.facts(after).clock
                _need(clock > named, "clock", "a clock is greater than its predecessor's")
            greatest = max(greatest, named)
            if clock > greatest + CLOCK_LEAD_MAX and not everything_seen:
                known = (tree.facts(other).clock for other in tree.entries if other not in ids)
                greatest, everything_seen = max(greatest, max(known, default=0)), True
            _need(clock <= greatest + CLOCK_LEAD_MAX, "clock", "a clock leaps ahead of all others")
            greatest = clock

    def _fields(self, one: _Touched) -> None:
        """E5 to E8 and N1, then what the node wrote."""
        born = self._conversation.born(one.id)
        if born is None:
            raise Refused("born", "an entry needs a born with a known role and a clock")
        slot = born.role is Role.ASSISTANT
        written = one.written()
        for key in one.updated:
            _need(key in _REWRITTEN, "frozen", f"{key} is written once")
        _need(
            one.new or ("born" not in written and (slot or "content" not in written)),
            "frozen",
            "what an entry is born with is written with it",
        )
        self._node_only(one, slot=slot)
        for key in sorted(_SLOT_FIELDS & written.keys()):
            _need(slot, "schema", f"only a slot has {key}")
        if "stop" in written:
            _need(written["stop"] == self._author.principal, "stop", "a stop names who asks")
        self._redaction(one, born.author)
        if self._author.node:
            self._node(one, slot=slot)

    def _node_only(self, one: _Touched, *, slot: bool) -> None:
        """N1."""
        if self._author.node:
            return
        written = one.written().keys()
        found = sorted(written & NODE_FIELDS)
        if (slot and "content" in written) or one.text:
            found.append("content")
        if one.chunks:
            found.append("sealed")
        if found:
            raise Forbidden("node-field", f"only the node writes {found[0]}")

    def _redaction(self, one: _Touched, entry_author: str) -> None:
        """E6, E8."""
        written = one.written()
        if not one.deleted and "redacted" not in written:
            return
        principal = self._author.principal
        undeletable = one.deleted - REDACTION_DELETES
        _need(not undeletable, "frozen", f"{min(undeletable, default='')} is never deleted")
        _need(
            self._conversation.has(one.id, "redacted"),
            "frozen",
            "content goes only with a redaction",
        )
        # What a redaction met on its way, the node clears away: a salt that it wrote at the same
        # time would let a short secret be guessed.
        clears_away = self._author.node and "redacted" not in written
        is_author = entry_author == principal and (self._is_writer() or self._author.node)
        if not (self._grant is Grant.OWNER or is_author or clears_away):
            raise Forbidden("redacted", "only its author or an owner withdraws an entry")
        if "redacted" in written:
            value = written["redacted"]
            _need(
                isinstance(value, dict)
                and set(value) == {"by", "at"}
                and value["by"] == principal
                and whole(value["at"], 0) is not None,
                "redacted",
                "a redaction says by whom (you) and when",
            )

    # -- what only the node writes -------------------------------------------------------------

    def _node(self, one: _Touched, *, slot: bool) -> None:
        written = one.written()
        self._state(one, written)
        if "place" in written:
            self._place(one.id, written["place"], slot=slot)
        self._proof(one, written, slot=slot)
        if one.text or one.chunks or "sealed" in written or (slot and "content" in written):
            self._growth(one, written)
        self._rest(one, written)

    def _state(self, one: _Touched, written: Mapping[str, Any]) -> None:
        """N2. An update may join several steps, so only where they lead matters."""
        if "state" not in written:
            return
        state = read_state(written["state"])
        before = read_state(one.updated["state"][0]) if "state" in one.updated else None
        if state is None:
            raise Refused("state", "that is no state of a slot")
        _need(before not in ENDED, "state", f"a slot that is {before} stays so")
        _need(
            before is None or state in {State.DONE, State.STOPPED, State.FAILED},
            "state",
            f"a slot does not go from {before} to {state}",
        )
        placed = self._conversation.tree.is_admitted(one.id)
        if state in {State.STREAMING, State.DONE}:
            _need(placed, "state", f"a slot is {state} only once it is admitted")
        if state is State.SUPERSEDED:
            _need(not placed, "state", "an admitted slot is not superseded")
        if placed and state in ENDED:
            _need(self._conversation.has(one.id, "proof"), "proof", "a reply ends with its proof")

    def _place(self, entry: str, value: Any, *, slot: bool) -> None:
        """N3."""
        place, tree = read_place(value), self._conversation.tree
        if place is None or set(value) != {"parent", "epoch"}:
            raise Refused("place", "a place is a parent and an epoch")
        _need(tree.is_admitted(place.parent), "place", "a parent is admitted before its children")
        own = self._author.epoch in {None, place.epoch}
        _need(own, "place", "a node places under the epoch of its own lease")
        _need(
            self._conversation.lease(place.epoch) is not None,
            "place",
            f"there is no lease for epoch {place.epoch}",
        )
        if place.parent != ROOT and tree.facts(place.parent).slot:
            _need(
                self._conversation.state(place.parent) in ENDED
                and self._conversation.has(place.parent, "proof"),
                "place",
                "a reply ends with its proof before anything is placed behind it",
            )
        if slot:
            started = self._conversation.state(entry) is not None
            _need(started, "place", "a slot starts in the update that admits it")
        else:
            proved = self._conversation.has(entry, "proof")
            _need(proved, "place", "an entry is proved in the update that admits it")

    def _proof(self, one: _Touched, written: Mapping[str, Any], *, slot: bool) -> None:
        """N4."""
        if "salt" not in written and "proof" not in written:
            return
        redacted = self._conversation.has(one.id, "redacted")
        if "salt" in written:
            _need(not redacted, "proof", "a redacted entry gets no salt")
            _need("proof" in written, "proof", "a salt comes with its proof")
            _need(_is_bytes(written["salt"], SALT_BYTES), "proof", "a salt has 16 bytes")
        _need(redacted or "salt" in written, "proof", "a proof comes with its salt")
        value = written["proof"]
        proof = read_proof(value)
        if proof is None or value != proof.plain():
            raise Refused("proof", "a proof holds commitments, a digest and a signature")
        digests = (proof.content, proof.tokens, proof.calls, proof.digest)
        _need(
            all(digest is None or len(digest) == DIGEST_BYTES for digest in digests)
            and len(proof.signature) == SIGNATURE_BYTES,
            "proof",
            "a digest has 32 bytes and a signature 64",
        )
        _need(slot or proof.tokens is None, "proof", "only a reply commits to tokens")
        admitted = self._conversation.tree.is_admitted(one.id)
        _need(admitted, "proof", "only an admitted entry is proved")
        if slot:
            ended = self._conversation.state(one.id) in ENDED
            _need(ended, "proof", "a reply is proved at its end")

    def _growth(self, one: _Touched, written: Mapping[str, Any]) -> None:
        """N5."""
        state = self._conversation.state(one.id)
        _need(
            state is State.STREAMING or (state in ENDED and "state" in written),
            "growth",
            "a reply grows only while it streams",
        )
        _need(not self._conversation.is_redacted(one.id), "growth", "a redacted reply stays empty")
        length = self._conversation.text_bytes(one.id)
        if length > TEXT_BYTES_MAX:
            raise TooLarge("too-large", f"a text has at most {TEXT_BYTES_MAX} bytes")
        for delta in one.text:
            _need(
                _is_append(delta, length),
                "growth",
                "a reply's text grows at its end",
            )
        for delta in one.chunks:
            _need(
                _is_chunks(delta, replacing=state in ENDED),
                "growth",
                "sealed chunks are appended, and become one at the end",
            )
        _need(
            all(_is_bytes(item) for item in written.get("sealed", ())),
            "growth",
            "a sealed chunk is bytes",
        )

    def _rest(self, one: _Touched, written: Mapping[str, Any]) -> None:
        """N6."""
        if not written.keys() & {"calls", "reads", "usage"}:
            return
        state = self._conversation.state(one.id)
        during = state is State.STREAMING or (state in ENDED and "state" in written)
        for key in ("calls", "reads"):
            if key in written:
                value = written[key]
                _need(during, "node-field", f"{key} are written until a reply ends")
                _need(isinstance(value, list), "node-field", f"{key} is a list")
        if "reads" in written:
            known = all(is_entry_id(item) for item in written["reads"])
            _need(known, "node-field", "reads names entries")
        if "usage" in written:
            _need(isinstance(written["usage"], dict), "node-field", "usage is a map")
            _need(state in ENDED, "node-field", "usage is written at the end")


_id_of = lru_cache(maxsize=1024)(id_of)  # the same few births, asked for with each token


def _need(holds: bool, code: str, reason: str) -> None:  # noqa: FBT001 - reads as a sentence
    if not holds:
        raise Refused(code, reason)


def _grant(value: Any) -> Grant | None:
    known = isinstance(value, str) and value in Grant.__members__.values()
    return Grant(value) if known else None


def _is_bytes(value: Any, length: int | None = None) -> bool:
    return isinstance(value, bytes) and (length is None or len(value) == length)


def _is_params(value: Any) -> bool:
    """Each parameter reads back as itself; an empty one may also be spelled out."""
    if not isinstance(value, dict):
        return False
    return all(
        read_params({key: item}).plain() == {key: item}
        or (key in _EMPTY_PARAMS and type(item) is type(_EMPTY_PARAMS[key]) and not item)
        for key, item in value.items()
    )


def _is_covers(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(is_entry_id, value))  # noqa: PLR2004 - the first and the last


def _is_policy(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(choice, str) and choice in POLICY_VALUES.get(name, ())
        for name, choice in value.items()
    )


def _is_last_word(delta: Any, length_after: int) -> bool:
    """Whether a delta is one plain insert at the end: what :func:`_is_append` mostly meets."""
    last = delta[-1] if delta else {}
    inserted = last.get("insert")
    if len(last) != 1 or not isinstance(inserted, str):
        return False
    kept = length_after - len(inserted.encode())
    return bool(delta == [{"retain": kept}, last] if kept else len(delta) == 1)


def _is_last_chunk(delta: Any) -> bool:
    """Whether a delta is one insert of bytes behind all others: so :func:`_is_chunks` mostly."""
    last = delta[-1] if delta else {}
    items = last.get("insert")
    if len(last) != 1 or not isinstance(items, list) or not all(map(_is_bytes, items)):
        return False
    kept = delta[0].get("retain") if len(delta) == 2 else None  # noqa: PLR2004 - what was, and what came
    return len(delta) == 1 or (isinstance(kept, int) and len(delta[0]) == 1)


def _is_append(delta: Any, length_after: int) -> bool:
    """Whether a delta (offsets in UTF-8 bytes) only added plain text at the end."""
    kept, added = 0, 0
    for step in delta:
        match step:
            case {"retain": int(count), **rest} if not rest and added == 0:
                kept += count
            case {"insert": str(inserted), **rest} if not rest:
                added += len(inserted.encode())
            case _:
                return False
    return kept + added == length_after


def _is_chunks(delta: Any, *, replacing: bool) -> bool:
    """Whether a delta appended bytes; a last one may delete the chunks before."""
    for step in delta:
        match step:
            case {"retain": int(), **rest} | {"delete": int(), **rest} if not rest:
                if "delete" in step and not replacing:
                    return False
            case {"insert": list(items), **rest} if not rest:
                if not all(_is_bytes(item) for item in items):
                    return False
            case _:
                return False
    return True


_META_FORMS: Final[Mapping[str, Callable[[Any], bool]]] = {
    "title": lambda value: text(value, TITLE_CHARACTERS_MAX) is not None,
    "created_at": lambda value: whole(value, 0) is not None,
    "head": lambda value: value == ROOT or is_entry_id(value),
    "model": lambda value: text(value, MODEL_CHARACTERS_MAX) is not None,
    "policy": _is_policy,
}
