"""The inference node: it seats itself at conversations, orders entries and writes replies.

Knows an engine by its contract alone, and everything else outside by the contracts in ``seat``.
From the outside in:

- ``node`` has the engine, ``desk`` a place in one conversation, ``sitting`` the time in one seat.
- ``workplace`` says how things are there, and ``evaluate`` what is next.
- ``leasing``, ``admission``, ``replies``, ``overflow``, ``ahead`` and ``withdrawals`` do it;
  ``shared`` is what they take of the node, ``turns`` who may use the engine, ``held`` what waits.
- ``generation`` is one reply at work, ``reply`` what becomes of it in the document.
- ``fed``, ``drafts``, ``accounting`` and ``digests`` keep what an engine was given and computed.
- ``presence`` and ``figures`` show it.
"""
