"""A lease as its holder hears of it.

This module owns what a grant says. It must not know who grants leases or what is done under one.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Granted:
    """A lease, ready to be used.

    Attributes:
        conversation: Whose.
        epoch: Its epoch, durable.
        node: The holder's public key.
        signature: The relay's, over the three.
        ttl_s: How long it goes on from now without a renewal.
    """

    conversation: str
    epoch: int
    node: bytes
    signature: bytes
    ttl_s: float
