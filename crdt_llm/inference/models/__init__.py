"""Model folders: their names, how the default one is fetched and converted, and what is damaged.

``folders`` finds and fetches them, ``convert`` makes the default one of what was fetched. Neither
torch nor transformers is loaded here, nor anything that reads a tensor.
"""
