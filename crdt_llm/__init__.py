"""crdt_llm: a replicated conversation store for language models."""
