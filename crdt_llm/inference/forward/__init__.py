"""The forward step: models that compute rows into the pool of KV, in kernels of ours or of others.

Knows slots and weights. Requests, paths, sampling and conversations are not known here.
"""
