"""Repeat a finished run and compare what comes out, or name the input that has changed."""

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from finery.errors import UserError
from finery.log import get_logger
from finery.run import Run

log = get_logger(__name__)


def add_arguments(parser: ArgumentParser) -> None:
    """The run, and where it is repeated."""
    parser.usage = "finery replay OUTPUT_DIR [--into DIR]"
    parser.add_argument("folder", metavar="OUTPUT_DIR", help="what a run has left: its run.yaml and manifest.json are read")
    parser.add_argument("--into", metavar="DIR", help="the folder for the second run (OUTPUT_DIR.replay)")


def run(args: Namespace, words: list[str]) -> int:
    """Train again, compare; 0 where everything is the same, else 1."""
    if words:
        raise UserError(f"replay repeats a run as it was; it takes no {words[0]!r}")
    from finery.commands.train import train
    from finery.models.trained import RUN_FILE
    from finery.training import manifest

    folder = Path(args.folder)
    before = manifest.read(folder)
    into = Path(args.into or f"{folder}.replay")
    if into.exists() and any(into.iterdir()):
        raise UserError(f"{into} is not empty: name another folder with --into")
    fresh = [f"output_dir={into}", "overwrite_output_dir=false", "resume_from_checkpoint=null", "report_to=none"]
    chosen = Run.read([str(folder / RUN_FILE), *fresh], trains=True)
    for name, was, now in _differences(before["versions"], manifest.versions()):
        log.warning("%s was %s, is %s: the result may differ for that", name, was, now)
    try:
        train(chosen, before["inputs"])
    except manifest.Changed as error:
        log.error("the run cannot be repeated, since what it read has changed: %s", "; ".join(error.names))
        return 1
    return _compare(folder, into, before, manifest.read(into))


def _compare(folder: Path, into: Path, before: Mapping[str, Any], after: Mapping[str, Any]) -> int:
    found = list(_told(folder, into, before, after))
    for line in found:
        print(line)
    if not found:
        print(f"the same: {before['steps']} steps, the stream of tokens, losses, and every byte of the weights")
        return 0
    for name, was, now in _differences(before["machine"], after["machine"]):
        print(f"  {name} was {was}, is {now}: sums may have been taken in another order")
    both = before["choices"].keys() & after["choices"].keys()
    for name in sorted(name for name in both if before["choices"][name] != after["choices"][name]):
        print(f"  {name} was settled as {before['choices'][name]}, is {after['choices'][name]}")
    for part in before["in_parts"]:
        print(f"  it was trained in parts, with other keys {part}: a replay trains with the last ones from the beginning")
    return 1


def _told(folder: Path, into: Path, before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    if before["steps"] != after["steps"]:
        yield f"steps: {before['steps']} were done, {after['steps']} are"
    if before["stream"] != after["stream"]:
        yield f"the first {before['stream']['steps']} steps were given other tokens or labels"
    was, now = before["results"], after["results"]
    for name, old, new in _differences(was["losses"], now["losses"]):
        yield f"{name}: was {old}, is {new}"
    for name, _, _ in _differences(was["weights"], now["weights"]):
        yield f"{name}: {_distance(folder / name, into / name)}"


def _distance(old: Path, new: Path) -> str:
    """How far the weights of two files lie apart."""
    from safetensors.torch import load_file

    if not (old.exists() and new.exists()):
        return "is there only once"
    ours, theirs = load_file(old), load_file(new)
    if ours.keys() != theirs.keys():
        return "holds other weights"
    pairs = [(ours[name].double(), theirs[name].double()) for name in ours if ours[name].shape == theirs[name].shape]
    far = max((float((one - other).abs().max()) for one, other in pairs if one.numel()), default=0.0)
    largest = max((float(one.abs().max()) for one, _ in pairs if one.numel()), default=0.0)
    return f"weights differ by up to {far:.3g}, the largest is {largest:.3g}"


def _differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for name in was.keys() | now.keys():
        if was.get(name) != now.get(name):
            yield name, was.get(name), now.get(name)
