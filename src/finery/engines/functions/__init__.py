"""What engines are made of: caches of many rows, choosing tokens, and text that comes piece by piece."""
