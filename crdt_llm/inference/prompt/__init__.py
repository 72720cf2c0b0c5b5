"""Render once: from entries to token ids and back, by a template, a tokenizer and the path.

No engine and no KV is known here, and torch is not loaded. From the outside in: ``transcript`` has
a path as ids, ``renderer`` an entry, from the ``scaffolds`` that a ``template`` writes around
contents; ``tokens`` are ids and their bytes.
"""
