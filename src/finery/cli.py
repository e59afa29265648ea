"""The words after `finery` choose a command; nothing heavy is imported until it is known."""

import errno
import gc
import os
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path

from finery import __version__, compat
from finery.commands import command_names
from finery.errors import Stopped, UserError, suggestion

DISK_TROUBLE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.ENOTCONN}
"""What a disk or a mount is at fault for, wherever it is met."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code: 2 for what the user can mend, with one line for each complaint."""
    # processes that share cores with others must not spin while they wait: a busy machine made steps ten times slower
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # imports make a million objects that stay: looking through them for garbage took a quarter of their time
    gc.set_threshold(200_000, 50, 50)
    compat.ONE_COMMAND = argv is None
    words = list(sys.argv[1:] if argv is None else argv)
    name = words.pop(0) if words else "help"
    try:
        if name in ("-h", "--help"):
            name = "help"
        if name in ("-v", "--version"):
            name = "version"
        return _run(name, words)
    except UserError as error:
        for complaint in error.complaints:
            print(f"error: {complaint}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader (`finery options | head`) has seen enough
        sys.stderr.close()
        return 0
    except OSError as error:
        if error.errno not in DISK_TROUBLE:
            raise
        place = f"{error.filename}: " if error.filename else ""
        print(f"error: {place}{error.strerror}", file=sys.stderr)
        return 2
    except Stopped as end:
        return 0 if end.saved else 1
    except KeyboardInterrupt:
        return 130


def _run(name: str, words: list[str]) -> int:
    if name not in command_names():
        raise UserError(_unknown(name))
    from importlib import import_module

    module = import_module(f"finery.commands.{name}")
    parser = ArgumentParser(f"finery {name}", description=module.__doc__, allow_abbrev=False, formatter_class=RawDescriptionHelpFormatter)
    module.add_arguments(parser)
    args, rest = parser.parse_known_args(words)
    return module.run(args, rest)


def _unknown(name: str) -> str:
    from finery.files import read_yaml

    later = read_yaml(Path(__file__).with_name("not_yet.yaml"))["commands"]
    if name in later:
        return f"`finery {name}` is not built yet ({later[name]}); finery {__version__} has: {', '.join(command_names())}"
    return f"there is no command {name!r}{suggestion(name, command_names())}; there are: {', '.join(command_names())}"


if __name__ == "__main__":
    raise SystemExit(main())
