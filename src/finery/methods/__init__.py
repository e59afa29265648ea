"""Training methods: `stage: NAME` is NAME.py here; base.py says what a method must have."""

from finery.registry import Registry

METHODS = Registry(__name__)
