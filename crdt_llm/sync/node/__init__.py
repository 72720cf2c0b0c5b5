"""The node's end of a connection: leases, and a seat in each conversation that it works in.

This package owns how a node that is elsewhere takes part. It must not know models, nor what a node
does in a seat.
"""
