"""A relay: the rooms of one process, and everyone who comes to them over a wire.

This package owns sockets and who may connect, the sessions of both dialects, leases, lists of
conversations, limits and counters. What is written in a conversation is its room's to judge.
"""
