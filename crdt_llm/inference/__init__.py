"""Derived state: what is computed from a conversation, and may be thrown away and computed again.

:mod:`~crdt_llm.inference.contract` says what an engine is. Whoever uses one (``node``, ``replay``)
stands on it and on ``prompt``; the one that is ours (``engine``) stands on it, on ``forward`` and
on ``kv``. Neither side knows the other.
"""
