"""How whoever calls a relay reaches it: a socket of frames, and when to come back.

Clients and nodes share this package; a relay is what is called. It must not know what a frame says.
"""
