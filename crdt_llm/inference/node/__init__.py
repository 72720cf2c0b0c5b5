"""The inference node: it seats itself at conversations, orders entries and writes replies.

Knows an engine by its contract alone, and rooms by the contracts of
:mod:`~crdt_llm.inference.node.seat`.
"""
