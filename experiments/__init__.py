"""Training runs side by side: the quickstart, the published methods, the ways to pre-train."""
