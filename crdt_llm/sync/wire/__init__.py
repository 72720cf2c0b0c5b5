"""What both ends of a connection agree on: the grammars of both dialects, and their words.

This package owns bytes and values: frames of the native dialect, messages of the y-websocket
dialect, verdicts and close codes, drafts and leases as they are told. Nothing here does I/O, keeps
the time, or knows who is at which end.
"""
