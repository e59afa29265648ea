"""Commands: a file each, imported when it is called for."""

from pathlib import Path


def command_names() -> list[str]:
    """Every command there is; none is imported."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem != "__init__")
