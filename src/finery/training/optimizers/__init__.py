"""Optimizers beside those that `optim` names: `use_NAME: true` (or a key of its own) switches on NAME.py here."""

from finery.registry import Registry

OPTIMIZERS = Registry(__name__)
