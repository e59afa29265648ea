"""What watches a run: each file holds one callback, with the key that switches it on (if any)."""

from finery.registry import Registry

CALLBACKS = Registry(__name__)
