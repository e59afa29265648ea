"""Engines that generate text: `infer_backend: NAME` is NAME.py here."""

from finery.registry import Registry

ENGINES = Registry(__name__)
