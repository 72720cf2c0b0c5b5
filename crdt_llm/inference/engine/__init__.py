"""Our engine, in a process of its own: requests, their order, sampling, and the pipe to its caller.

One way to keep :mod:`crdt_llm.inference.contract`. Token ids cross the pipe; texts, templates and
documents are not known here, nor what computes a row. From the outside in:

- ``process`` is the caller's side, ``pipe`` what crosses, ``worker`` the process.
- ``torch_engine`` goes step by step: ``schedule`` says who works, ``sampling`` chooses ids.
- ``team`` says how many threads compute.
"""
