"""How weights are held in few bits: `quantization_method: NAME` is NAME.py here."""

from finery.registry import Registry

QUANTIZERS = Registry(__name__)
