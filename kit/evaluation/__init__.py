"""Look at the result: the same prompts, the held-out rows."""
