"""Whether an export is what was trained: the same prompts through both, compared token by token."""
