"""The forward step: models that compute rows into the pool of KV, in kernels of ours or of others.

Knows slots and weights. Requests, paths, sampling and conversations are not known here. From the
outside in:

- ``model`` is the contract with the engine and chooses between ``llama`` and
  ``transformers_model``.
- ``llama`` runs ``native_step`` (its kernels are in ``native``), or ``torch_step`` where those
  cannot be had (``attention`` and ``quantised`` are its arithmetic); ``weights`` reads the files,
  ``cpu`` says what there is to choose from.
"""
