"""An export, loaded anew in a process of its own as anybody would load it, and asked the probes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from finery.parity.answers import Answers, answers
from finery.parity.probes import Probe


@dataclass(frozen=True)
class Reopened:
    """What was found; where the folder could not be loaded, `failure` says why and all else is empty."""

    failure: str = ""
    ids: Sequence[list[int]] = ()  # what its own tokenizer and template make of the probes
    stop_ids: Sequence[int] = ()  # where its generation config ends answers
    answers: Answers | None = None


def reopen(form: Any, folder: Path, probes: Sequence[Probe], stop_ids: Sequence[int], dtype: str, scratch: Path) -> Reopened:
    """Start the process and read what it found; `form` is a `finery.exports.base.Export`, `dtype` what is computed in."""
    job = {
        "form": form.name,
        "options": form.options.model_dump(mode="json"),
        "shared": form.shared.model_dump(mode="json"),
        "folder": str(folder),
        "dtype": dtype,
        "probes": [asdict(probe) for probe in probes],
        "stop_ids": list(stop_ids),
    }
    path = scratch / "job.json"
    path.write_text(json.dumps(job), encoding="utf-8")
    result = subprocess.run([sys.executable, "-m", __name__, str(path)], capture_output=True, text=True, check=False)
    if result.returncode:
        lines = result.stderr.strip().splitlines() or [f"its process ended with code {result.returncode}"]
        return Reopened(failure=lines[-1][:500])
    return _read(scratch)


def _read(scratch: Path) -> Reopened:
    from safetensors.torch import load_file

    found = json.loads((scratch / "found.json").read_text(encoding="utf-8"))
    logits = load_file(scratch / "logits.safetensors")
    said = Answers([logits[str(number)] for number in range(len(logits))], found["written"])
    return Reopened(ids=found["ids"], stop_ids=found["stop_ids"], answers=said)


def main(path: Path) -> None:
    """Read the job beside which the result is written."""
    import torch
    from safetensors.torch import save_file

    from finery.compat import quiet_transformers
    from finery.exports import EXPORTS
    from finery.exports.base import ExportOptions

    job = json.loads(path.read_text(encoding="utf-8"))
    quiet_transformers()
    part = EXPORTS[job["form"]]
    form = part(part.Options(**job["options"]), ExportOptions(**job["shared"]))
    model, tokenizer = form.open(Path(job["folder"]), getattr(torch, job["dtype"]))
    probes = [Probe(**probe) for probe in job["probes"]]
    ends = model.generation_config.eos_token_id
    said = answers(model, probes, job["stop_ids"])
    found = {
        "ids": [_ids(probe, tokenizer) for probe in probes],
        "stop_ids": sorted(ends if isinstance(ends, list) else [] if ends is None else [ends]),
        "written": said.written,
    }
    save_file({str(number): logits.contiguous() for number, logits in enumerate(said.logits)}, path.with_name("logits.safetensors"))
    path.with_name("found.json").write_text(json.dumps(found), encoding="utf-8")


def _ids(probe: Probe, tokenizer: Any) -> list[int]:
    """No tokens where the template is not there, or refuses."""
    from jinja2 import TemplateError

    try:
        return probe.again(tokenizer)
    except (TemplateError, ValueError, TypeError):
        return []


if __name__ == "__main__":
    main(Path(sys.argv[1]))
