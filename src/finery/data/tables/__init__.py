"""Kinds of files: what a file name ends in is a file here."""

from finery.registry import Registry

TABLES = Registry(__name__)
