"""Training runs on generated streets side by side: the quickstart's, and the methods'."""
