"""Ling and Bailing v2: as Qwen's, in a text of its own."""

from finery.data.dialects.qwen import Qwen

__all__ = ["Ling"]


class Ling(Qwen):
    """JSON in <tool_call>; the text ends by turning detailed thinking off."""
