"""Kinds of rows: what `Method.rows` names is a file here."""

from finery.registry import Registry

ROWS = Registry(__name__)
