"""The command line. Importing it is cheap: every command imports what it needs when it runs."""

from crdt_llm.cli.app import main

__all__ = ["main"]
