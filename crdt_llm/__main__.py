"""``python -m crdt_llm`` is ``crdt-llm``."""

from crdt_llm.cli import main

if __name__ == "__main__":
    main()
