"""Our engine, in a process of its own: requests, their order, sampling, and the pipe to its caller.

One way to keep :mod:`crdt_llm.inference.contract`. Token ids cross the pipe; texts, templates and
documents are not known here, nor what computes a row.
"""
