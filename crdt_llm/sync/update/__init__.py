"""What a Yjs update says, read without applying it.

This package owns the structure of updates, what of it has a place in a conversation's document,
and whose client id a value was written under. Everything here is pure: whether a write is allowed
is said elsewhere.
"""
