"""See the modules of this room; the map is in README.md."""
