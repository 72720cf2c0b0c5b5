"""A conversation whose relay is behind, put right from a replica that has all that was admitted.

After a loss of the log a room takes what proves itself, from anybody who may read. Structs that say
nothing (collected, deleted) prove nothing, and any replica may have some under a node's client ids;
but what a true replica has at those clocks is known then, and never comes in any more. So somebody
who means harm can leave a room behind for good. The register's tips say which replica is true: this
module owns putting it in the place of what is stored. That is an operator's to do, not a client's,
since it drops what was written while the room was behind. It must not know files, frames or
sockets, and no room of the conversation may be open.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

from crdt_llm.errors import Behind, LocalMisuse
from crdt_llm.store.memory import MemoryDisk, MemoryLog
from crdt_llm.store.register import MemoryRegister
from crdt_llm.sync.relay.hub import Hub
from crdt_llm.sync.room.ledger import missing_tips
from crdt_llm.sync.room.upkeep import replica_of

if TYPE_CHECKING:
    from crdt_llm.document.conversation import Conversation
    from crdt_llm.store.log import UpdateLog
    from crdt_llm.store.register import Register

logger = logging.getLogger("crdt_llm.sync")


async def replace_stored(
    conversation: str, update: bytes, *, log: UpdateLog, register: Register, relay_key: bytes
) -> tuple[str, ...]:
    """Put a replica in the place of what is stored, where that lacks something admitted.

    It is judged as after a loss of the log, and nothing is dropped before it was found to be right.

    Args:
        conversation: Its id.
        update: All of a replica.
        log: Where conversations are stored.
        register: What outlives the log.
        relay_key: The relay's public key.

    Returns:
        The entries that only the stored document had: they are dropped.

    Raises:
        LocalMisuse: Nothing that was admitted is missing in what is stored.
        Behind: The replica lacks something that was admitted too.
        Refused: It does not prove itself.
        StoreFailed: Nothing was replaced, or what was stored is gone: try again.
    """
    row = await register.load(conversation)
    stored = await _stored(log, conversation)
    if row is None or not missing_tips(row, stored):
        raise LocalMisuse(f"{conversation} lacks nothing here: import it without --replace")
    trial_log = MemoryLog(MemoryDisk("a trial"), clock=lambda: 0)
    await _bring(conversation, update, trial_log, MemoryRegister({conversation: row}), relay_key)
    found = await _stored(trial_log, conversation)
    if missing_tips(row, found):
        raise Behind("this replica lacks something that was admitted, too: another may have it")
    dropped = tuple(sorted(set(stored.tree.entries) - set(found.tree.entries)))
    if dropped:  # said before: if this fails half-way, nobody can tell any more
        logger.warning("conversation %s: dropping %s", conversation, ", ".join(dropped))
    await log.delete(conversation)
    await _bring(conversation, update, log, register, relay_key)
    return dropped


async def _stored(log: UpdateLog, conversation: str) -> Conversation:
    loaded = await log.load(conversation)
    return await replica_of(loaded, conversation, int.from_bytes(os.urandom(4), "big"))


async def _bring(
    conversation: str, update: bytes, log: UpdateLog, register: Register, relay_key: bytes
) -> None:
    hub = Hub(log, register=register, relay_key=relay_key)
    try:
        await hub.import_trusted(conversation, update)
    finally:
        await hub.close()
