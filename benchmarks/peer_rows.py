"""The rows that the peer, LLaMA-Factory 0.9.5, makes of data sets: what tests/data/test_reference_rule.py compares with, and its speed.

It runs inside the peer's own environment, which stays outside of this project's (some 5.5 GB, a few minutes):

    python3 -m venv peer && peer/bin/pip install torch==2.13.0 && peer/bin/pip install llamafactory==0.9.5

    peer/bin/python benchmarks/peer_rows.py rows MODEL KEYS OUT       one run: a JSON line for every row; prints the rows per second
    peer/bin/python benchmarks/peer_rows.py golden MODEL DATA OUT     every combination: rows and reference_rows.json in the folder OUT

MODEL is a folder with the tokenizer (`python -c "from finery.models.demo_model import demo_model; print(demo_model())"`), KEYS a JSON file
with keys of the peer's YAML (dataset, dataset_dir, template, cutoff_len, mask_history, ...), DATA the folder of the demo sets.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

from peer_sets import CUTOFFS, ENTRIES, LATE_END, OPTIONS, TEMPLATES, Pair, Records, digest, read_sets

REWRITTEN = "detailed thinking off"  # what the peer's format `openai` makes of, or adds to, every system text


def encode(model: str, keys: dict[str, Any]) -> tuple[Any, float, float]:
    """The peer's encoded training set, and the seconds and processor seconds (its workers' too) of its tokenising step alone."""
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer, loader
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_tokenizer

    fixed = {"stage": "sft", "do_train": True, "use_cpu": True, "report_to": "none", "output_dir": "unused", "overwrite_cache": True}
    model_args, data_args, training_args, _, _ = get_train_args({"model_name_or_path": model, **fixed, **keys})
    module: Any = load_tokenizer(model_args)
    template = get_template_and_fix_tokenizer(module["tokenizer"], data_args)
    tokenise, seconds = loader._get_preprocessed_dataset, []

    def timed(*args: Any, **options: Any) -> Any:
        began, busy = time.perf_counter(), sum(os.times()[:4])
        found = tokenise(*args, **options)
        seconds.extend((time.perf_counter() - began, sum(os.times()[:4]) - busy))
        return found

    with patch.object(loader, "_get_preprocessed_dataset", timed), contextlib.redirect_stdout(sys.stderr):  # it prints its first row
        train = get_dataset(template, model_args, data_args, training_args, stage="sft", **module)["train_dataset"]
    return train, seconds[0], seconds[1]


def write(train: Any, path: Path) -> list[Pair]:
    """Write one JSON line a row; returns the rows."""
    rows = [(row["input_ids"], row["labels"]) for row in train]
    lines = (json.dumps({"input_ids": ids, "labels": labels}) for ids, labels in rows)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return rows


def write_sets(data: Path, folder: Path) -> list[str]:
    """Write the sets and dataset_info.json; returns the names.

    The peer's format `openai` rewrites system texts, which Finery does not: the truth for `messages` is the same file read as
    sharegpt. Two more sets prove that nothing else differs: `openai` on the same file, and sharegpt on texts that are rewritten already.
    """
    sets = read_sets(data)
    entries = {name: {"file_name": f"{name}.json", **entry} for name, entry in ENTRIES.items()}
    entries["openai"] = entries["messages"]
    entries["messages"] = {**entries["openai"], "formatting": "sharegpt"}
    entries["rewritten"] = {**entries["messages"], "file_name": "rewritten.json"}
    sets["rewritten"] = [{"messages": list(_rewritten(record["messages"]))} for record in sets["messages"]]
    folder.mkdir(parents=True, exist_ok=True)
    for name, records in sets.items():
        (folder / f"{name}.json").write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    (folder / "dataset_info.json").write_text(json.dumps(entries), encoding="utf-8")
    return list(entries)


def _rewritten(messages: Records) -> Iterator[dict[str, Any]]:
    system = "".join(f"{message['content']}\n" for message in messages if message["role"] == "system")
    yield {"role": "system", "content": system + REWRITTEN}
    yield from (message for message in messages if message["role"] != "system")


def golden(model: str, data: Path, folder: Path) -> None:
    """Encode every set with every template, option and cutoff."""
    names = write_sets(data, folder)
    digests: dict[str, dict[str, dict[str, list[Any]]]] = {}
    for template, name, option, cutoff_len in product((*TEMPLATES, LATE_END), names, OPTIONS, CUTOFFS):
        if (template, option) == (LATE_END, "train_on_prompt"):
            continue
        keys = {"dataset": name, "dataset_dir": str(folder), "template": template, "cutoff_len": cutoff_len, **OPTIONS[option]}
        rows = write(encode(model, keys)[0], folder / f"{template} {name} {option} {cutoff_len}.jsonl")
        digests.setdefault(template, {}).setdefault(name, {})[f"{option} {cutoff_len}"] = digest(rows)
    if any(sets.pop("openai") != sets.pop("rewritten") for sets in digests.values()):
        raise SystemExit("the peer's format 'openai' differs in more than the system text")
    packages = {name: version(name) for name in ("llamafactory", "transformers", "tokenizers", "datasets")}
    facts = {"how": "benchmarks/peer_rows.py golden; learnt rows, rows without a label, digest", "packages": packages, "digests": digests}
    (folder / "reference_rows.json").write_text(json.dumps(facts), encoding="utf-8")


def main(words: list[str]) -> None:
    """Run what the words name; nothing where the peer is not."""
    if len(words) != 4 or find_spec("llamafactory") is None:
        print(__doc__)
        return
    command, model, first, out = words[0], words[1], Path(words[2]), Path(words[3])
    if command == "golden":
        golden(model, first, out)
        return
    train, seconds, busy = encode(model, json.loads(first.read_text(encoding="utf-8")))
    facts = {"rows": len(write(train, out)), "seconds": round(seconds, 3), "processor_seconds": round(busy, 3)}
    print(json.dumps({**facts, "rows_per_second": round(len(train) / seconds, 1)}))


if __name__ == "__main__":
    main(sys.argv[1:])
