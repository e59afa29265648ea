"""Find what is wrong with a run, or with a data file, before anything is trained: exit code 0 clean, 1 findings, 2 it cannot run."""

import json
import re
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path

from finery.checks import CHECKS
from finery.checks.base import Check, Finding
from finery.checks.data import Data
from finery.data.files import kind_of
from finery.data.load import DataOptions
from finery.errors import UserError
from finery.run import Run

_RUN_KEYS = re.compile(r'"(model_name_or_path|output_dir|dataset)"\s*:')
"""What tells the .json file of a run from one of data."""


def add_arguments(parser: ArgumentParser) -> None:
    """The form; all else is the run's, or names data files."""
    parser.usage = "finery check RUN.yaml [--json] [key=value | --key value] ...    or    finery check DATA.jsonl ... [--json]"
    parser.add_argument("--json", action="store_true", help="print one JSON object: findings, checked, exit_code")


def run(args: Namespace, words: list[str]) -> int:
    """Print what there is to mend, then one line that sums it up."""
    if words and _names_data(words[0]):
        checks: list[Check] = [data := Data()]
        found = data.look(_data_alone(words), {})
    else:
        checks = [CHECKS[name]() for name in CHECKS.names()]
        try:
            chosen = Run.read(words, trains=True)
        except UserError as error:
            if not args.json:
                raise
            found = (Finding("config", complaint, effect="stops the run") for complaint in error.complaints)
        else:
            found = (finding for check in checks for finding in check.findings(chosen))
    kept: list[Finding] = []
    for finding in found:
        kept.append(finding)
        if not args.json:
            print(finding, flush=True)
    code = 2 if any(finding.fatal for finding in kept) else min(len(kept), 1)
    if args.json:
        told = {"findings": [finding.as_dict() for finding in kept], "checked": [one.as_dict() for one in _checked(checks)]}
        print(json.dumps({**told, "exit_code": code}, ensure_ascii=False, indent=1))
    else:
        print("\n".join([*map(str, _checked(checks)), _summary(kept, checks, code)]))
    return code


def _names_data(word: str) -> bool:
    """Whether a word is a data file, a folder or a pattern rather than the file of a run."""
    path = Path(word)
    if "=" in word or word.startswith("-") or path.suffix in (".yaml", ".yml"):
        return False
    if path.suffix == ".json" and path.is_file():
        with path.open("rb") as file:
            head = file.read(1 << 16).decode("utf-8", "replace").lstrip("\ufeff \t\r\n")
        return not (head.startswith("{") and _RUN_KEYS.search(head))
    return bool(kind_of(path) or path.exists() or set("*?[") & set(word))


def _data_alone(words: Sequence[str]) -> DataOptions:
    """Options that say nothing but which files are meant."""
    if strange := [word for word in words if not _names_data(word)]:
        raise UserError(f"a check of data files takes no keys, found {strange[0]!r}; give the file of a run instead")
    return DataOptions.model_validate({"dataset": words, "dataset_dir": {}})


def _checked(checks: Sequence[Check]) -> Iterator:
    return (one for check in checks for one in check.checked)


def _summary(found: Sequence[Finding], checks: Sequence[Check], code: int) -> str:
    checked = [one for one in _checked(checks) if not one.again]
    where = f"{_counted(sum(one.num_rows for one in checked), 'row')} of {_counted(len(checked), 'data set')}"
    if not code:
        return f"clean: nothing to mend in {where}"
    return f"{_counted(len(found), 'finding')} in {where}" + ("; a run cannot begin with this" if code > 1 else "")


def _counted(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"
