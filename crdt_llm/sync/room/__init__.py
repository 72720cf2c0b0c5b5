"""One conversation where it is decided: a room, its log, and what it believes of whom.

This package owns the order of a conversation's writes, the judging of each, what becomes durable
when, and what a loss leaves. It must not know frames, sockets or models. The whole sequence is read
in :mod:`~crdt_llm.sync.room.room`.
"""
