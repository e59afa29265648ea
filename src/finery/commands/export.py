"""Merge what was trained into the base model and save it whole."""

from __future__ import annotations

import shutil
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from finery import __version__
from finery.compat import garbage_collected
from finery.errors import UserError
from finery.exports.base import Source, is_export, sign, written_files
from finery.log import get_logger
from finery.run import Run

if TYPE_CHECKING:
    from finery.data.template import Template
    from finery.models.trained import Trained
    from finery.parity.report import Report

log = get_logger(__name__)


def add_arguments(parser: ArgumentParser) -> None:
    """What is not a key of the run."""
    parser.usage = "finery export RUN.yaml [--verify-only] [key=value | --key value] ...    (export_dir, export_format, …: finery options)"
    parser.add_argument("--verify-only", action="store_true", help="compare a folder that was exported with what was trained, and no more")


def run(args: Namespace, words: list[str]) -> int:
    """Export, and say where; code 1 where the export is not what was trained."""
    chosen = Run.read(words)
    try:
        verify_again(chosen) if args.verify_only else export(chosen)
    except NotTheSame as error:
        log.error("%s", error)
        return 1
    return 0


class NotTheSame(Exception):
    """An export is not what was trained; `report` tells what was compared."""

    def __init__(self, folder: Path, report: Report) -> None:
        super().__init__(f"{folder} is not what was trained: {'; '.join(report.faults)}")
        self.folder = folder
        self.report = report


@garbage_collected()
def export(run: Run) -> Path:
    """Written in the form that was asked for, and compared with what was trained; returns the folder.

    Raises `NotTheSame` where they differ: the folder is then named as failed, and what was there before is left as it was.
    """
    from finery.compat import need
    from finery.files import new_folder, usual_modes
    from finery.upload import check_upload, upload

    target, hub_name, tokens = _free(_target(run)), run.export.export_hub_model_id, run.model.download["tokens"]
    if hub_name:
        check_upload(hub_name, tokens)
    if run.form.package:
        need(run.form.package, f"'export_format: {run.form.name}'")
    with opened_source(run) as (source, template):
        if any(target in (folder.resolve(), *folder.resolve().parents) for folder in (source.found.base, *source.found.adapters)):
            raise UserError(f"'export_dir': {target} is or holds what is to be exported; name another folder")
        with new_folder(target) as folder:
            run.form.write(source, folder)
            usual_modes(folder)
            _prove(run, source, template, folder, target)
    log.info("exported to %s (%s, %s)", target, run.form.name, str(source.dtype).removeprefix("torch."))
    if hub_name:
        log.info("uploaded to %s", upload(target, hub_name, tokens=tokens, private=run.export.export_hub_private))
    return target


def verify_again(run: Run) -> Report:
    """Compare what lies in the folder of the export with what was trained; raises `NotTheSame`."""
    from finery.parity.verify import verify

    target = _target(run)
    if not target.is_dir() or not any(target.iterdir()):
        raise UserError(f"'export_dir': there is nothing in {target} that could be verified")
    with opened_source(run) as (source, template):
        report = verify(source, template, run.form, target, run.quantizing, run.model)
    sign(target, report.told(), written_files(target) or ())  # what the user has put there since is not ours
    log.info("%s beside what was trained:\n%s", target, report.table())
    if not report.passed:
        raise NotTheSame(target, report)
    return report


def _prove(run: Run, source: Source, template: Template, folder: Path, target: Path) -> None:
    """Compare, write the report into the folder, and put the folder aside where it is not what was trained."""
    if not run.export.export_verify:
        sign(folder, {"finery": __version__, "form": run.form.name, "verified": False})
        return
    from finery.parity.verify import verify

    report = verify(source, template, run.form, folder, run.quantizing, run.model)
    sign(folder, report.told())
    log.info("the export beside what was trained:\n%s", report.table())
    for note in report.notes:
        log.warning("%s", note)
    if not report.passed:
        aside = target.with_name(f"{target.name}-failed")
        if aside.is_dir() and is_export(aside):
            shutil.rmtree(aside)
        folder.replace(aside)
        raise NotTheSame(aside, report)


@contextmanager
def opened_source(run: Run) -> Iterator[tuple[Source, Template]]:
    """What a run has trained, with its tokenizer and template; raises `UserError` where there is nothing to export."""
    import torch

    from finery.models.lineage import true_base
    from finery.models.precision import named_dtype
    from finery.models.quantized import leave_out_others
    from finery.models.tokenizer import load_tokenizer
    from finery.models.trained import checkpoint_hint, find_trained, trained_dtype
    from finery.training.preparation import run_template

    found = find_trained(run.model, run.adapter, run.loop.output_dir)
    if not found.is_tuned and run.loop.output_dir and (hint := checkpoint_hint(Path(run.loop.output_dir))):
        raise UserError(f"'output_dir': {run.loop.output_dir} holds no finished model{hint}")
    if not found.is_tuned:
        log.warning("no trained adapter or model was named or found: exporting %s itself", run.model.model_name_or_path)
    if run.export.export_verify and found.adapters:
        found = replace(found, base=true_base(found.base, found.adapters))
    leave_out_others(found.base, run.quantizing)
    tokenizer = load_tokenizer(found.tokenizer_folder, run.model.trust_remote_code)
    template = run_template(run, tokenizer)
    on_gpu = run.export.export_device == "auto" and torch.cuda.is_available()
    with _blended(run, found) as found:
        source = Source(
            found=found,
            adapter=run.adapter,
            tokenizer=tokenizer,
            stop_ids=template.stop_ids,
            jinja=template.jinja,
            base_name=run.model.model_name_or_path,
            dtype=named_dtype(run.export.export_dtype or run.model.infer_dtype, trained_dtype(found, run.model)),
            device=torch.device("cuda" if on_gpu else "cpu"),
            num_ctx=run.rows.cutoff_len,
            shard_bytes=int(run.export.export_size * 1e9),
            trust_remote_code=run.model.trust_remote_code,
            corpora={"dataset_dir": run.data.dataset_dir, "download": run.model.download, "seed": run.loop.seed},
        )
        yield source, template


@contextmanager
def _blended(run: Run, found: Trained) -> Iterator[Trained]:
    """One adapter in place of several where `export_merge_type` asks for it, for as long as it is needed."""
    options = run.export
    if options.export_merge_type is None:
        yield found
        return
    from finery.models.blending import blend

    weights = options.export_adapter_weights
    with tempfile.TemporaryDirectory() as scratch:
        how = options.export_merge_type
        folder = blend(found.base, found.adapters, how, weights, options.export_density, Path(scratch), run.loop.seed)
        for path in found.tokenizer_folder.glob("*token*"):  # what the adapters brought
            if path.is_file() and found.tokenizer_folder in found.adapters:
                shutil.copy2(path, folder / path.name)
        yield replace(found, adapters=[folder])


def _target(run: Run) -> Path:
    if run.export.export_dir:
        target = Path(run.export.export_dir).resolve()  # of "." the name and the parent are needed
    elif run.loop.output_dir:
        target = Path(f"{run.loop.output_dir.rstrip('/')}-merged")
    else:
        raise UserError("'export_dir' is needed and was not given: where the merged model goes")
    if target.exists() and not target.is_dir():
        raise UserError(f"'export_dir': {target} is a file; name a folder")
    return target


def _free(target: Path) -> Path:
    """The folder, where nothing that is not ours would be lost; raises `UserError`."""
    if target.is_dir() and any(target.iterdir()) and not is_export(target):
        raise UserError(f"'export_dir': {target} holds files that no export has written; name another folder")
    return target
