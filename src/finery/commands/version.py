"""Print the version."""

from argparse import ArgumentParser, Namespace

from finery import __version__


def add_arguments(parser: ArgumentParser) -> None:
    """None."""


def run(args: Namespace, words: list[str]) -> int:
    """One line."""
    print(f"finery {__version__}")
    return 0
