"""What is trained of a model: `finetuning_type: NAME` is NAME.py here."""

from finery.registry import Registry

ADAPTERS = Registry(__name__)
