"""Opaque updates: joining them without a replica.

This module owns what can be done with update bytes alone. It must not know replicas or schemas.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pycrdt import merge_updates

from crdt_llm.errors import MalformedMessage

if TYPE_CHECKING:
    from collections.abc import Sequence


def merge(updates: Sequence[bytes]) -> bytes:
    """Join updates into one that does what they do together, in any order.

    Args:
        updates: At least one Yjs v1 update that passed a structure check.

    Raises:
        MalformedMessage: One of them is no update.
    """
    if len(updates) == 1:
        return updates[0]
    try:
        return bytes(merge_updates(*updates))
    except (ValueError, RuntimeError) as error:
        raise MalformedMessage(f"updates that cannot be joined: {error}") from error
