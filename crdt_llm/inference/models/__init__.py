"""Model folders: their names, how the default one is fetched and converted, and what is damaged.

Neither torch nor transformers is loaded here, nor anything that reads a tensor.
"""
