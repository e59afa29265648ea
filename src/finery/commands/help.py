"""List the commands."""

import ast
from argparse import ArgumentParser, Namespace
from pathlib import Path

from finery.commands import command_names


def add_arguments(parser: ArgumentParser) -> None:
    """None."""


def run(args: Namespace, words: list[str]) -> int:
    """One line for each command, read as text from its file."""
    print("usage: finery COMMAND ...        (llamafactory-cli is the same program)\n")
    for name in command_names():
        text = (Path(__file__).parent / f"{name}.py").read_text(encoding="utf-8")
        print(f"  {name:<9} {(ast.get_docstring(ast.parse(text)) or '').partition(chr(10))[0]}")
    print("\nfinery COMMAND --help tells more; `finery options` lists every key of a run's YAML file.")
    return 0
