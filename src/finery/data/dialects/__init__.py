"""Tool dialects: `tool_format: NAME` in a template is NAME.py here."""

from finery.registry import Registry

DIALECTS = Registry(__name__)
"""How models are told of tools, and how they call them: one file each."""
