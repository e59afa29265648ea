"""Merge what was trained into the base model and save it whole."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from finery.errors import UserError
from finery.log import get_logger
from finery.run import Run

log = get_logger(__name__)


def add_arguments(parser: ArgumentParser) -> None:
    """All words are the run's."""
    parser.usage = "finery export RUN.yaml [key=value | --key value] ...    (export_dir, export_size, …: finery options)"


def run(args: Namespace, words: list[str]) -> int:
    """Export, and say where."""
    export(Run.read(words))
    return 0


def export(run: Run) -> Path:
    """Merged in fp32, saved in the model's own format; returns the folder."""
    from finery.files import new_folder, usual_modes
    from finery.models.export import merge_device, ollama_file, save_model
    from finery.models.precision import named_dtype
    from finery.models.quantized import leave_out_others
    from finery.models.tokenizer import load_tokenizer, save_tokenizer
    from finery.models.trained import checkpoint_hint, find_trained, load_trained, trained_dtype
    from finery.training.preparation import run_template

    target = _target(run)
    found = find_trained(run.model, run.adapter, run.loop.output_dir)
    if any(target.resolve() in (folder.resolve(), *folder.resolve().parents) for folder in (found.base, *found.adapters)):
        raise UserError(f"'export_dir': {target} is or holds what is to be exported; name another folder")
    if not found.is_tuned and run.loop.output_dir and (hint := checkpoint_hint(Path(run.loop.output_dir))):
        raise UserError(f"'output_dir': {run.loop.output_dir} holds no finished model{hint}")
    if not found.is_tuned:
        log.warning("no trained adapter or model was named or found: exporting %s itself", run.model.model_name_or_path)
    leave_out_others(found.base, None)
    tokenizer = load_tokenizer(found.tokenizer_folder, run.model.trust_remote_code)
    template = run_template(run, tokenizer)
    dtype = named_dtype(run.model.infer_dtype, trained_dtype(found, run.model))
    model = load_trained(found, run.adapter, tokenizer, run.model.trust_remote_code, dtype, merge_device(run.export))
    with new_folder(target) as folder:
        save_model(model, folder, run.export.export_size, template.stop_ids)
        save_tokenizer(tokenizer, folder, template.jinja)
        (folder / "Modelfile").write_text(ollama_file(tokenizer, template.stop_ids, run.rows.cutoff_len), encoding="utf-8")
        usual_modes(folder)
    log.info("exported to %s (%s); `finery chat model_name_or_path=%s` talks to it", target, str(dtype).removeprefix("torch."), target)
    return target


def _target(run: Run) -> Path:
    from finery.models.export import is_export

    if run.export.export_dir:
        target = Path(run.export.export_dir).resolve()  # of "." the name and the parent are needed
    elif run.loop.output_dir:
        target = Path(f"{run.loop.output_dir.rstrip('/')}-merged")
    else:
        raise UserError("'export_dir' is needed and was not given: where the merged model goes")
    if target.exists() and not target.is_dir():
        raise UserError(f"'export_dir': {target} is a file; name a folder")
    if target.is_dir() and any(target.iterdir()) and not is_export(target):
        raise UserError(f"'export_dir': {target} holds files that no export has written; name another folder")
    return target
