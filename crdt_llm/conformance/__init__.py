"""A suite that anyone can run against any endpoint of the protocol."""
