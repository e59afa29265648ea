"""Models: loading, adapters, merging, export."""
