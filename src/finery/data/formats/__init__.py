"""Data formats: `formatting: NAME` in dataset_info.json is NAME.py here."""

from finery.registry import Registry

FORMATS = Registry(__name__)
