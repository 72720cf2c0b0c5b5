"""What a client's replica may bring back after the log was lost, and what must stand in it.

This module owns the rules of a restore. A client writes neither the model's words nor other
people's; after a loss it is the only one who has them. So what it brings is believed as far as it
proves itself: places, replies and their hidden chunks by the chain, by the node's signatures and by
the relay's own signatures on the leases. It is pure: a replica that the update was applied to and a
row of the register go in, refusals and findings come out. It must not know rooms, logs or sockets.

The rules, numbered so that tests can cite them; the word after each is the refusal's code:

* X1 ``birth`` - the document is this conversation's, and the register's owner owns it.
* X2 ``leases`` - each lease is signed by this relay, and no later than the last one granted.
* X3 ``proof`` - an admitted entry has a chain digest that follows from its parent's and is signed
  by the node of its lease; so have the end of a reply, its text, its calls and its hidden ids.
  Where all that was admitted is here, it is one of the registered tips or stands before one: a node
  that lost its lease can still sign. A registered tip has the registered digest.
* X4 ``proof`` - of a reply that still streams the chunks are signed, the last one over all of its
  text, and each one before it over a beginning of that, and all over what it was answered from.
  What is written at its end is not there yet.
* X5 ``node-field`` - an entry without a place has no field of the node, but for the end of a
  request that was never answered. What an answer cost was written under a client id of a node.
* X6 ``redacted`` - an entry is withdrawn if the register says so, or if whoever brings it back
  withdrew it and may.
* X7 ``born``, ``content``, ``meta``, ``schema``, ``stop``, ``clock`` - all else has the forms that
  the schema gives it.
* X8 ``frozen`` - what an entry without a place was born with stands there as its own client wrote
  it, in the place of nothing else.
* X9 ``meta``, ``stop``, ``node-field`` - a fact of the conversation, a stop and the end of an entry
  without a place, that was written under a client id that is known, is or was as the register has
  it, or it is its bringer's own. An unknown client id stops in the name of a writer who brings it.
* X10 ``forbidden`` - whoever may only read, or has a token for that only, brings no entry in its
  own name that the register does not know its client id of.
* X11 ``forged-author`` - nobody brings an entry without a place in another's name under a client id
  that the register does not know: whose words were ever acknowledged, their client id is known.

Rights are the register's, whatever the document says (:func:`wrong_rights`), and what was withdrawn
stays so (:func:`leftovers`). A client id proves nothing to a room that has lost what was written
under it, so another's title, stop and end without a place count only as the register has them. What
it had before comes with a replica that is older, and is left out (:func:`unearned`,
:func:`wrong_stops`, :func:`wrong_ends`). What it never had was never acknowledged, and nobody heard
of it: its own author may have it, and who else brings it has made it up. That is refused, for it
would stand at clocks that are another's, and what a room writes to put it right would hang at it.
A pending entry of somebody else is carried, and waits for its author (:func:`unconfirmed`): nothing
proves it but the replica that wrote it.

The register has digests of the facts and not their values, so one that is missing is put back from
the first restore that has it (:func:`told_again`), even if a forgery took its clocks before.

A row from before facts were registered knows none of that. Then whoever may write changes facts,
anybody else brings them only where there are none and under a client id that is known, and a stop
or an end is believed by its client id alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from crdt_llm.document.chain import (
    commit_calls,
    lease_message,
    parent_digest,
    verify_entry,
)
from crdt_llm.document.conversation import ACCESS, ENTRIES, LEASES, META
from crdt_llm.document.keys import verify
from crdt_llm.document.rules import check_born, is_meta
from crdt_llm.document.schema import (
    ENDED,
    REDACTION_DELETES,
    ROOT,
    SCHEMA_VERSION,
    Grant,
    State,
    is_entry_id,
    normalise,
    whole,
)
from crdt_llm.document.seal import FINAL_CHUNK, place_of, verify_chunk
from crdt_llm.errors import BadProof, Forbidden, Gap, Refused
from crdt_llm.sync.room.ledger import (
    ROOMS_OWN,
    are_of_a_node,
    clients_of,
    digest_of_value,
    missing_tips,
    stop_of,
    was_registered,
)
from crdt_llm.sync.room.rights import WRITERS, right_of
from crdt_llm.sync.update.provenance import Provenance, client_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from crdt_llm.document.conversation import Change, Conversation, Edit
    from crdt_llm.document.rules import Author
    from crdt_llm.document.schema import Entry
    from crdt_llm.store.register import Row
    from crdt_llm.sync.update.structure import Struct, UpdateStructure

CHUNK_SIGNATURES_MAX: Final = 20_000
"""Signatures that are tried to find where the chunks of one reply begin: 2 s in a thread's time,
and twice the text that any model here writes. What is beyond stays with the last chunk's."""

SIGNATURES_AT_ONCE: Final = 4
"""Signatures that are tried before others may go on: 0.1 ms each."""

_UNPLACED: Final = frozenset({"state", "usage"})
_AT_THE_END: Final = ("proof", "salt", "usage", "calls")
_NODE_FIELDS: Final = ("place", "state", "calls", "reads", "sealed", "usage", "salt", "proof")


@dataclass(frozen=True, slots=True)
class Claim:
    """A restore to be judged.

    Attributes:
        conversation: The replica, **after** the update was applied to it.
        change: What the update did.
        row: What the register says; of an import what the document itself does.
        author: Who brings it.
        relay: The relay's public key; ``None`` if there is none to check leases against.
        clients: Client id -> whose it is, as far as that was known before.
        known: The state vector from before the update.
        sources: Where in the replica things stand.
        doubts: ``None`` to refuse what does not prove itself; a list to believe it, and to be told
            there, one line each.
        told: Registered facts that the replica lacks and the update has (:func:`told_again`).
        lost: The facts that were registered when the loss was found. A fact of somebody's own from
            a replica that is older may have taken the place of one of them since.
    """

    conversation: Conversation
    change: Change
    row: Row
    author: Author
    relay: bytes | None
    clients: Mapping[int, str]
    known: Mapping[int, int]
    sources: Provenance
    doubts: list[str] | None = field(default=None)
    told: Mapping[str, Any] = field(default_factory=dict)
    lost: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def may_write(self) -> bool:
        """Whether whoever brings it may write, as the register says and its token allows."""
        return self.doubts is not None or right_of(self.row, self.author) in WRITERS

    @property
    def knows_facts(self) -> bool:
        """Whether the register says which facts, stops and ends there are."""
        return self.doubts is None and self.row.facts is not None

    @property
    def knows_clients(self) -> bool:
        """Whether the register says whose all client ids are that anybody ever heard of."""
        return self.knows_facts and "" not in self.row.former

    def is_anothers(self, item: Struct | None) -> bool:
        """Whether something was written under a client id of somebody else, who is known."""
        whose = client_of(item, self.clients)
        return whose not in (None, ROOMS_OWN, clients_of(self.author.principal))

    def is_own(self, item: Struct | None) -> bool:
        """Whether a writer brings something under its own client id, or one nobody knows."""
        whose = client_of(item, self.clients)
        return self.may_write and whose in (None, clients_of(self.author.principal))

    def brought(self, item: Struct | None) -> bool:
        """Whether something came with this update, rather than was here before."""
        return item is not None and item.end > self.known.get(item.client, 0)

    def doubt(self, code: str, reason: str) -> None:
        """Refuse, or take note."""
        if self.doubts is None:
            raise Refused(code, reason)
        self.doubts.append(reason)


def judge(claim: Claim) -> Iterator[None]:
    """Check a restore, step by step: whoever runs it may let others go on in between.

    Raises:
        Refused: a rule is broken.
        Gap: something that it builds on is not here.
    """
    touched: dict[str, None] = {}
    for edit in claim.change.edits:
        if edit.root == ENTRIES:
            touched[edit.entry or ""] = None
        elif edit.root == LEASES:
            _lease(claim, edit.key or "")
        elif edit.root == ACCESS:
            _need(not edit.path and not edit.shared, "schema", "access maps names to rights")
            known = edit.action == "delete" or edit.new in Grant.__members__.values()
            _need(known, "schema", "a right is owner, writer or reader")
    _meta(claim)
    yield
    # The parents first: an entry is proved by what it hangs at.
    tree = claim.conversation.tree
    for name in sorted(touched, key=lambda name: tree.facts(name).clock if name in tree else 0):
        yield from _entry(claim, name)
        yield
    _nothing_beside(claim, touched)


def _nothing_beside(claim: Claim, touched: Iterable[str]) -> None:
    """X3: what anybody ever heard of as admitted is a registered tip, or what one stands on."""
    tree, tips = claim.conversation.tree, claim.row.tips
    if claim.doubts is not None or missing_tips(claim.row, claim.conversation):
        return
    known: set[str] = set()
    for tip in tips:
        name = tip
        while name != ROOT and name not in known:
            known.add(name)
            name = tree.facts(name).parent or ROOT
    for name in touched:
        if tree.is_admitted(name) and name not in known:
            raise Refused("proof", f"entry {name} was never admitted, as far as is known here")


def _need(holds: bool, code: str, reason: str) -> None:  # noqa: FBT001 - reads as a sentence
    if not holds:
        raise Refused(code, reason)


def _meta(claim: Claim) -> None:
    """X1, X7."""
    conversation, row = claim.conversation, claim.row
    meta = conversation.meta_plain()
    if meta.get("birth") is None or meta.get("schema") is None:
        raise Gap("this conversation has no schema and birth yet")
    _need(
        whole(meta["schema"], SCHEMA_VERSION, SCHEMA_VERSION) is not None, "birth", "not schema 1"
    )
    birth = conversation.meta.birth
    same = birth is not None and (birth.owner, birth.nonce) == (row.owner, row.nonce)
    _need(same and conversation.id == row.conversation, "birth", "not this conversation's birth")
    for edit in claim.change.edits:
        if edit.root == META and edit.key not in {"schema", "birth"}:
            _need(not edit.path and not edit.shared, "schema", "meta holds plain values")
            fits = edit.action == "delete" or is_meta(edit.key or "", edit.new)
            _need(fits, "meta", f"meta.{edit.key} is malformed")
            _fact(claim, edit)


def _fact(claim: Claim, edit: Edit) -> None:
    """X9."""
    key, facts = edit.key or "", claim.row.facts
    if facts is None or not claim.knows_facts or edit.action == "delete":
        return
    digest = digest_of_value(edit.new)
    known = digest == facts.get(key) or was_registered(claim.row, key, digest)
    if not known and claim.is_anothers(claim.sources.meta(key)):
        claim.doubt("meta", f"meta.{key} was never so, as far as is known here")


def _lease(claim: Claim, name: str) -> None:
    """X2."""
    epoch = int(name) if name.isascii() and name.isdecimal() and str(int(name)) == name else -1
    lease = claim.conversation.lease(epoch)
    if lease is None or epoch > claim.row.epoch:
        claim.doubt("leases", f"no lease of epoch {name[:20]!r} was granted")
        return
    node, signature = lease
    if claim.relay is None:
        return
    try:
        verify(claim.relay, signature, lease_message(claim.row.conversation, epoch, node))
    except BadProof:
        claim.doubt("leases", f"this relay has not signed the lease of epoch {epoch}")


def _entry(claim: Claim, name: str) -> Iterator[None]:
    conversation = claim.conversation
    entry = conversation.entry(name)
    born = conversation.born_plain(name)
    if entry is None or not is_entry_id(name):
        raise Refused("born", "an entry has a canonical id and a well-formed born")
    _form(claim, entry, born)
    _redaction(claim, entry)
    _stop(claim, entry)
    if entry.place is None:
        _pending(claim, entry)
        return
    if not conversation.tree.is_admitted(name):
        raise Gap(f"entry {name} stands behind one that is not here")
    try:
        yield from _admitted(claim, entry)
    except BadProof as error:
        claim.doubt("proof", f"entry {name}: {error}")


def _form(claim: Claim, entry: Entry, born: dict[str, Any]) -> None:
    """X7."""
    conversation, tree = claim.conversation, claim.conversation.tree
    check_born(born, entry.born.role)
    after = entry.born.after
    if after != ROOT:
        if after not in tree:
            raise Gap(f"entry {entry.id} was written after one that is not here")
        _need(tree.facts(after).clock < entry.born.clock, "clock", "a clock is above its after's")
    kinds = {"sealed": "array", "content": "text" if entry.is_slot else ""}
    for key in (*_NODE_FIELDS, "content", "stop", "redacted", "born"):
        kind = conversation.kind(entry.id, key)
        _need(kind in (None, kinds.get(key, "")), "schema", f"{key} is not of its kind")
    stop = conversation.plain(entry.id, "stop")
    _need(
        not conversation.has(entry.id, "stop") or (entry.is_slot and isinstance(stop, str)),
        "stop",
        "a stop names who asks, in a slot",
    )
    said = entry.is_slot or conversation.has(entry.id, "content") or entry.redacted
    _need(said, "content", "an entry is born with its text")
    usage = conversation.plain(entry.id, "usage")
    _need(usage is None or isinstance(usage, dict), "node-field", "usage is a map")


def _pending(claim: Claim, entry: Entry) -> None:
    """X5, X8, X10."""
    conversation, sources = claim.conversation, claim.sources
    birth = sources.entry(entry.id)
    beside = () if birth is None else (birth.origin, birth.right_origin)
    if birth is None or any(one is not None and one.client != birth.client for one in beside):
        claim.doubt("frozen", f"entry {entry.id} stands in the place of another")
    for key in ("born", "content"):
        item = sources.field(entry.id, key)
        if birth is not None and item is not None and item.client != birth.client:
            claim.doubt("frozen", f"{key} of entry {entry.id} is not what it was born with")
    _unplaced(claim, entry)
    _in_its_name(claim, entry, birth)
    is_new = entry.born.author == claim.author.principal and claim.brought(birth)
    own = clients_of(claim.author.principal)
    if is_new and not claim.may_write and client_of(birth, claim.clients) != own:
        raise Forbidden("forbidden", "you may not write in this conversation")
    found = {key for key in _NODE_FIELDS if conversation.has(entry.id, key)}
    if entry.is_slot and conversation.has(entry.id, "content"):
        found.add("content")
    if entry.is_slot and entry.state in ENDED and entry.state is not State.DONE:
        found -= _UNPLACED
    if found:
        claim.doubt("node-field", f"entry {entry.id} has {min(found)} and no place")


def _in_its_name(claim: Claim, entry: Entry, birth: Struct | None) -> None:
    """X11."""
    if not claim.knows_clients or not claim.brought(birth):
        return
    author, whose = entry.born.author, client_of(birth, claim.clients)
    is_own = whose is None and author == claim.author.principal
    if not is_own and whose not in (clients_of(author), clients_of(author, node=True)):
        claim.doubt("forged-author", f"nobody has heard of entry {entry.id} by {author!r} here")


def _unplaced(claim: Claim, entry: Entry) -> None:
    """X9."""
    for key in sorted(_UNPLACED):
        item = claim.sources.field(entry.id, key)
        if not claim.brought(item) or _is_registered(claim, entry.id, key):
            continue
        whose = client_of(item, claim.clients)
        if not are_of_a_node(whose) or claim.knows_clients:
            claim.doubt("node-field", f"no node that is known here wrote {key} of {entry.id}")


def _stop(claim: Claim, entry: Entry) -> None:
    """X9."""
    item = claim.sources.field(entry.id, "stop")
    if not claim.brought(item) or _is_registered(claim, entry.id, "stop"):
        return
    named = claim.conversation.plain(entry.id, "stop")
    whose = client_of(item, claim.clients)
    if whose is None:
        if named != claim.author.principal or not claim.may_write:
            claim.doubt("stop", f"nobody stopped entry {entry.id}, as far as is known here")
    elif claim.knows_facts and named in claim.row.stops.get(entry.id, ()):
        pass  # from a replica that is older, or put back by a room
    elif not isinstance(named, str) or whose != clients_of(named):
        claim.doubt("stop", f"another than {named!r} stopped entry {entry.id} in that name")
    elif claim.knows_clients and claim.is_anothers(item):
        claim.doubt("stop", f"nobody stopped entry {entry.id}, as far as is known here")


def _is_registered(claim: Claim, name: str, key: str) -> bool:
    """Whether the register has a stop, an unplaced end or its cost just as it stands there."""
    if not claim.knows_facts:
        return False
    value = claim.conversation.plain(name, key)
    if key == "stop":
        return bool(value == stop_of(claim.row, name))
    state, cost = claim.row.ends.get(name, (None, b""))
    if key == "state":
        return bool(value == state)
    return bool(cost) and value is not None and digest_of_value(value) == cost


def _admitted(claim: Claim, entry: Entry) -> Iterator[None]:
    """X3, X4."""
    conversation = claim.conversation
    place = entry.place
    if place is None:
        raise BadProof("no place")
    parent = parent_digest(conversation, place.parent)
    if entry.is_slot and entry.state is State.STREAMING:
        early = [key for key in _AT_THE_END if conversation.has(entry.id, key)]
        if early:
            raise BadProof(f"{early[0]} before its end")
        if not entry.redacted:
            yield from verify_chunks(conversation, entry, claim.relay)
        return
    if entry.is_slot and entry.state not in ENDED:
        raise BadProof("a place without a state")
    verify_entry(conversation, entry, parent, claim.relay)
    registered = claim.row.tips.get(entry.id)
    if registered and entry.proof is not None and entry.proof.digest != registered:
        raise BadProof("it ended otherwise, as far as is known here")
    cost = claim.sources.field(entry.id, "usage")
    if claim.brought(cost) and claim.knows_clients:
        _need(
            are_of_a_node(client_of(cost, claim.clients)),
            "node-field",
            f"no node that is known here wrote usage of {entry.id}",
        )
    if not entry.redacted:
        yield from _committed(claim, entry)


def _committed(claim: Claim, entry: Entry) -> Iterator[None]:
    """X3: what an entry's proof commits to beside its text."""
    conversation, proof, salt = claim.conversation, entry.proof, entry.salt
    if proof is None or salt is None:
        raise BadProof("no salt")
    calls = commit_calls(salt, entry.calls) if entry.calls is not None else None
    if calls != proof.calls:
        raise BadProof("the calls are not the ones that were committed to")
    if proof.tokens is None:
        if entry.sealed:  # a node had to give it up as it stood
            yield from verify_chunks(conversation, entry, claim.relay)
    elif entry.sealed:
        if len(entry.sealed) != 1:
            raise BadProof("an ended reply has one sealed field")
        where = place_of(conversation, entry, FINAL_CHUNK)
        verify_chunk(conversation, entry.sealed[0], where, entry.content, claim.relay)
    else:
        raise BadProof("the sealed tokens that were committed to are missing")


def verify_chunks(conversation: Conversation, entry: Entry, relay: bytes | None) -> Iterator[None]:
    """X4: the chunks of a reply that streams belong to it and to its text.

    A chunk's signature covers the text as it stood, whose length is written nowhere: so each chunk
    is tried at every beginning of the text from the one before it on. That may take seconds, so
    whoever runs this may let others go on after each few of them.

    Raises:
        BadProof: one does not, or there is text without any.
    """
    text = entry.content
    where = place_of(conversation, entry)
    if not entry.sealed:
        if text:
            raise BadProof("there is text without sealed tokens")
        return
    last = len(entry.sealed) - 1
    verify_chunk(conversation, entry.sealed[-1], where.at(last), text, relay)
    begun, left = 0, CHUNK_SIGNATURES_MAX
    for chunk, blob in enumerate(entry.sealed[:-1]):
        for end in range(begun, len(text) + 1):
            left -= 1
            if left < 0:
                return
            if left % SIGNATURES_AT_ONCE == 0:
                yield
            try:
                verify_chunk(conversation, blob, where.at(chunk), text[:end], None)
            except BadProof:
                continue  # it was signed over more of the text, or is none of this reply
            begun = end
            break
        else:
            raise BadProof(f"chunk {chunk} is not of this reply")


def _redaction(claim: Claim, entry: Entry) -> None:
    """X6."""
    conversation, name = claim.conversation, entry.id
    if not conversation.has(name, "redacted"):
        _need(entry.is_slot or conversation.has(name, "content"), "content", "its text is missing")
        return
    said = conversation.plain(name, "redacted")
    _need(
        isinstance(said, dict)
        and set(said) == {"by", "at"}
        and isinstance(said["by"], str)
        and whole(said["at"], 0) is not None,
        "redacted",
        "a redaction says by whom and when",
    )
    if name in claim.row.redacted:
        return
    principal = claim.author.principal
    right = right_of(claim.row, claim.author)
    may = right is Grant.OWNER or (right is Grant.WRITER and entry.born.author == principal)
    if said["by"] != principal or not may:
        claim.doubt("redacted", f"nobody withdrew entry {name}, as far as is known here")


# -- what the register says -------------------------------------------------------------------


def wrong_rights(conversation: Conversation, row: Row) -> dict[str, Grant | None]:
    """What must be written so that the document's rights are the register's."""
    held, wanted = dict(conversation.access()), dict(row.access)
    names = sorted(held.keys() | wanted.keys())
    return {
        name: Grant(wanted[name]) if name in wanted else None
        for name in names
        if held.get(name) != wanted.get(name)
    }


def leftovers(conversation: Conversation, row: Row) -> tuple[str, ...]:
    """The withdrawn entries that the document has back with something that they said."""
    return tuple(
        name
        for name in sorted(row.redacted)
        if name in conversation.tree
        and (
            not conversation.is_redacted(name)
            or any(conversation.has(name, key) for key in REDACTION_DELETES)
        )
    )


def unearned(claim: Claim) -> dict[str, Any]:
    """The facts of the conversation that must be put back, with what they were before.

    And those that the register has and nobody had told here until now.
    """
    found = {
        edit.key: edit.old
        for edit in claim.change.edits
        if edit.root == META
        and edit.key not in {None, "schema", "birth"}
        and not _is_earned(claim, edit)
    }
    meta = claim.conversation.meta_plain()
    again = {key: value for key, value in claim.told.items() if key in found or key not in meta}
    return {**found, **again}


def _is_earned(claim: Claim, edit: Edit) -> bool:
    item = claim.sources.meta(edit.key or "")
    if claim.doubts is not None:
        return True
    if claim.row.facts is None:
        known = client_of(item, claim.clients) is not None
        return claim.may_write or (edit.action == "add" and known)
    if edit.action == "delete":
        return claim.may_write
    digest = digest_of_value(edit.new)
    if digest == claim.row.facts.get(edit.key or ""):
        return True
    return claim.is_own(item) or (claim.may_write and digest == claim.lost.get(edit.key or ""))


def told_again(lacking: Mapping[str, bytes], structure: UpdateStructure) -> Mapping[str, Any]:
    """The registered facts that a document lacks, as far as an update has their values.

    Args:
        lacking: Key -> digest; see :func:`crdt_llm.sync.room.ledger.missing_facts`.
        structure: The update.
    """
    if not lacking:
        return {}
    told = Provenance(structure)
    found: dict[str, Any] = {}
    for key, digest in lacking.items():
        item = told.meta(key)
        if item is not None and isinstance(item.content, tuple):
            value = normalise(item.content[-1])
            if is_meta(key, value) and digest_of_value(value) == digest:
                found[key] = value
    return found


def wrong_stops(claim: Claim) -> dict[str, str | None]:
    """Whose stops must be put back, or taken away (``None``): the register's are right.

    But a writer's own stays, and so does what was here before.
    """
    if not claim.knows_facts:
        return {}
    conversation, found = claim.conversation, dict[str, str | None]()
    for name in _slots(claim, claim.row.stops.keys()):
        said, wanted = conversation.plain(name, "stop"), stop_of(claim.row, name)
        item = claim.sources.field(name, "stop")
        is_own = said == claim.author.principal and claim.is_own(item)
        if said != wanted and (said is None or (claim.brought(item) and not is_own)):
            found[name] = wanted
    return found


def wrong_ends(claim: Claim) -> dict[str, dict[str, str | None]]:
    """What must be written, or taken away (``None``), in slots that ended without a place."""
    if not claim.knows_facts:
        return {}
    conversation, sources = claim.conversation, claim.sources
    found: dict[str, dict[str, str | None]] = {}
    for name in _slots(claim, claim.row.ends.keys()):
        if conversation.has(name, "place"):
            continue
        said, (wanted, _) = conversation.plain(name, "state"), claim.row.ends.get(name, (None, b""))
        fixed: dict[str, str | None] = {}
        if said != wanted and (said is None or claim.brought(sources.field(name, "state"))):
            fixed["state"] = wanted
        if claim.brought(sources.field(name, "usage")) and not _is_registered(claim, name, "usage"):
            fixed["usage"] = None
        if fixed:
            found[name] = fixed
    return found


def unproved_readings(claim: Claim) -> tuple[str, ...]:
    """Replies that have not said a word yet, with ``reads`` that nothing proves.

    Each chunk is signed together with what the reply was answered from; before the first one a
    node can as well read what the path says.
    """
    if claim.doubts is not None:
        return ()
    conversation, tree = claim.conversation, claim.conversation.tree
    return tuple(
        name
        for name in sorted(claim.change.entries)
        if name in tree
        and tree.is_admitted(name)
        and conversation.state(name) is State.STREAMING
        and claim.brought(claim.sources.field(name, "reads"))
        and (entry := conversation.entry(name)) is not None
        and not entry.sealed
    )


def _slots(claim: Claim, registered: Iterable[str]) -> list[str]:
    """Those of the document that a restore has touched, or that the register says something of."""
    tree = claim.conversation.tree
    names = {*registered, *claim.change.entries}
    return sorted(name for name in names if name in tree and tree.facts(name).slot)


@dataclass(frozen=True, slots=True)
class InDoubt:
    """A pending entry that somebody else than its author brought back.

    Attributes:
        author: In whose name it is written.
        client: The client id that it was written under.
        clocks: Those of the entry and of what it was born with.
    """

    author: str
    client: int
    clocks: range


def unconfirmed(claim: Claim) -> dict[str, InDoubt]:
    """The pending entries that wait for their author, as far as this restore touched them."""
    conversation = claim.conversation
    found: dict[str, InDoubt] = {}
    for name in sorted(claim.change.entries):
        born = conversation.born(name)
        if born is None or (born.author == claim.author.principal and claim.may_write):
            continue
        # One that only waits behind a later request may become the last of its line again.
        ended = conversation.state(name) in ENDED or conversation.is_redacted(name)
        if not conversation.tree.is_admitted(name) and not ended:
            found[name] = in_doubt(claim.sources, name, born.author)
    return found


def in_doubt(sources: Provenance, name: str, author: str) -> InDoubt:
    """Where a pending entry stands that waits for its author."""
    entry = sources.entry(name)
    if entry is None:
        return InDoubt(author, 0, range(0))  # nobody has the client id 0, so nobody confirms it
    fields = [sources.field(name, key) for key in ("born", "content", "redacted")]
    ends = (item.end for item in fields if item is not None and item.client == entry.client)
    return InDoubt(author, entry.client, range(entry.clock, max(ends, default=entry.end)))


def bindings(claim: Claim) -> dict[int, str]:
    """Whose the client ids are that nobody knew before, as far as this restore says.

    A client's own pending words and stops bind its ids as an update does, so that they can be
    brought back again. An operator's import binds all that it can.
    """
    conversation, sources = claim.conversation, claim.sources
    trusted = claim.doubts is not None
    found: dict[int, str] = {}

    def bind(item: Struct | None, whose: str) -> None:
        if item is not None and item.client not in claim.clients:
            found.setdefault(item.client, whose)

    for name in sorted(claim.change.entries):
        born = conversation.born(name)
        pending = born is not None and not conversation.tree.is_admitted(name)
        if born is not None and (trusted or (pending and born.author == claim.author.principal)):
            bind(sources.entry(name), clients_of(born.author))
        stop = conversation.plain(name, "stop")
        if isinstance(stop, str) and (trusted or stop == claim.author.principal):
            bind(sources.field(name, "stop"), clients_of(stop))
        if trusted:
            for key in ("place", "state"):
                bind(sources.field(name, key), clients_of(claim.author.principal, node=True))
    return found
