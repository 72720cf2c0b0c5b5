"""A person's device: its replicas, their logs on disk, and one connection to the relay.

This package owns what a program sees of conversations, that a local write is on disk when its call
returns, and how a device and a relay come into step. It must not know rooms or models.
"""
