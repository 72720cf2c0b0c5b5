"""Replies gone over again from the document alone: made anew, or scored id by id.

``replay`` makes them anew and ``audit`` has them scored. Both need a replica, a model and the key
of the hidden fields; no relay, no lease and no seat.
"""
