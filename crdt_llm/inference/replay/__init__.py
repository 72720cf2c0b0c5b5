"""Replies gone over again from the document alone: made anew, or scored id by id.

Needs a replica, a model and the key of the hidden fields; no relay, no lease and no seat.
"""
