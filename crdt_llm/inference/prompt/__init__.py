"""Render once: from entries to token ids and back, by a template, a tokenizer and the path.

No engine and no KV is known here, and torch is not loaded.
"""
