"""Keys and values of tokens: which are resident, where they lie, and which are on disk.

Knows token ids and rows. What computes a row, and who asks for it, is not known here. ``tree`` says
which slot holds what, ``pool`` is the memory, ``checkpoint`` the files.
"""
