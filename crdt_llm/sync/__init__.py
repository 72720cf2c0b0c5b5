"""Transport: how replicas of a conversation meet, and what is believed of whom.

What crosses the wire is read in :mod:`~crdt_llm.sync.wire`, and what is in an update without
applying it in :mod:`~crdt_llm.sync.update`. :mod:`~crdt_llm.sync.room` is where a conversation's
writes are judged and put in order, and :mod:`~crdt_llm.sync.relay` brings its peers there. At the
other end of the wire, reached by :mod:`~crdt_llm.sync.transport`, are a person's device
(:mod:`~crdt_llm.sync.client`) and the node that answers (:mod:`~crdt_llm.sync.node`).

Imports point one way::

    client, node -> transport -> wire
    relay -> room -> update -> wire

The two lines meet in ``wire`` and ``update`` alone.
"""
