"""Forms in which a trained model is written: `export_format: NAME` is NAME.py here."""

from finery.registry import Registry

EXPORTS = Registry(__name__)
