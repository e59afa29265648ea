"""Train a model as a YAML file says."""

from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from finery.compat import free_memory, garbage_collected, is_first
from finery.errors import UserError
from finery.log import get_logger
from finery.run import Run
from finery.training.signals import saving_passed_over

if TYPE_CHECKING:
    from finery.training.session import Session

log = get_logger(__name__)


def add_arguments(parser: ArgumentParser) -> None:
    """All words are the run's."""
    parser.usage = "finery train RUN.yaml [--detach [--name NAME]] [key=value | --key value] ...    (keys: finery options)"
    parser.add_argument("--detach", action="store_true", help="train in the background, as a job: finery jobs")
    parser.add_argument("--name", help="what the job is called, beside its id")


def run(args: Namespace, words: list[str]) -> int:
    """Check the run, then train here or once for every device; or leave that to a job."""
    from finery.launch import needs_torchrun, torchrun

    if args.detach:
        return detach(words, args.name)
    if args.name:
        raise UserError("'--name' is that of a job and needs --detach")
    checked = Run.read(words, trains=True)
    if needs_torchrun():
        return torchrun(words)
    train(checked)
    return 0


def detach(words: Sequence[str], name: str | None) -> int:
    """Start a job, print its id and leave."""
    from finery.jobs import start

    job = start(words, Path.cwd(), name)
    log.info("job %s trains in the background, in %s", job.id, job.output_dir)
    log.info("follow it: finery jobs follow %s    stop it: finery jobs stop %s    see all: finery jobs", job.id, job.id)
    print(job.id)
    return 0


@saving_passed_over()
@garbage_collected()
def train(run: Run, expected: Mapping[str, str] | None = None) -> Path:
    """Train as the run says, then let what was trained answer, if that is asked for; returns the output folder.

    `expected` are digests of what a run read that is repeated; where others are found, nothing is trained.
    """
    if not run.loop.generates:
        return _in_session(run, expected)
    from finery.commands.chat import open_engine
    from finery.predictions.metric import load_metric
    from finery.predictions.predict import predict

    metric = load_metric(run.loop.predict_metric)  # before anything takes long
    folder = _in_session(run, expected) if run.loop.do_train or run.loop.do_eval else run.folder
    if is_first():
        free_memory()  # the trained model is loaded anew, as chat loads it
        predict(run, open_engine, metric)
    return folder


def _in_session(run: Run, expected: Mapping[str, str] | None) -> Path:
    """No other run can be at work in the folder meanwhile."""
    from finery.training.session import Session

    with Session(run.loop, run.trainer, run.model, run.adapter, (run.switched_on, run.fp8, run.quantizing), run.asked()) as session:
        return _train(run, session, expected)


def _train(run: Run, session: "Session", expected: Mapping[str, str] | None) -> Path:
    """The whole story."""
    from finery.checks.template import prove
    from finery.data.load import load_rows, load_sets
    from finery.models.load import fit_vocabulary, load_model
    from finery.models.new_tokens import tell_untrained
    from finery.models.quantized import leave_out_others
    from finery.models.tokenizer import load_tokenizer, own_template
    from finery.training.manifest import inputs_of
    from finery.training.preparation import prepare, run_rows, run_template

    found = session.source()
    if run.steps_plainly:
        leave_out_others(found.base, run.quantizing)
    from transformers import set_seed

    tokenizer = load_tokenizer(found.tokenizer_folder, run.model.trust_remote_code)
    own, num_known = own_template(tokenizer), len(tokenizer)
    template = run_template(run, tokenizer)
    session.tell_template(template, tokenizer, own, run.template.template)
    options = run_rows(run, found.base)
    session.tell_length(run.rows.cutoff_len, options.cutoff_len)
    rows = load_rows(run.method.rows, template, options, run.packing)
    prepared = prepare(run.loop, run.trainer, run.model.download, rows, run.method)
    with load_sets(run.loop.measured(run.data), run.packing, prepared) as sets:
        if not session.has_work:
            return session.keep_tokens(sets, run.data)
        session.know(inputs_of(found, sets, prepared.key), expected)
        prove(run, template, sets)
        set_seed(run.loop.seed)
        start = (run.quantizing, session.device, session.reshape(found, options.cutoff_len), session.from_scratch)
        model = load_model(found.base, session.precision.frozen, run.model.trust_remote_code, *start)
        new_tokens = fit_vocabulary(model, tokenizer, run.model.resize_vocab, num_known, run.tokens)
        model = run.adapter.apply(model, found.adapters, new_tokens)
        tell_untrained(model, new_tokens)
        model = session.set_formats(model)
        run.method.attach(model)
        session.speed_up(model, run.switched["kernel"], options.cutoff_len)
        trainer = session.build_trainer(run.method, rows, sets, model, template, tokenizer, run.switched["callback"])
        session.write_settings(run.resolved)
        from finery.training.work import Work  # the trainer's own import comes first: it is lighter there

        return Work(session, trainer).run(sets, run.data, run.choices.stage, run.choices.finetuning_type, run.model.model_name_or_path)
