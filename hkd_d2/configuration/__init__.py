"""Config files found, read and merged, and the keys that they may set."""
