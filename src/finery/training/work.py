"""What a session does with its trainer: the loop, the proof of what came out, and what is left in the folder."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from finery.compat import free_memory, is_first, num_ranks
from finery.data.load import DataOptions, Sets
from finery.errors import Stopped, UserError
from finery.log import get_logger
from finery.models.trained import RUN_FILE
from finery.training import manifest
from finery.training.checkpoints import NAME, newest, set_aside
from finery.training.kept import EvaluationBroken
from finery.training.output import CARD_MARK, keep_foreign, write_card, write_run_file
from finery.training.proof import batch_of
from finery.training.session import Session
from finery.training.starting import clear, lies_in
from finery.training.trackers import leave_trackers
from finery.training.trainer import Trainer

log = get_logger(__name__)


class Work:
    """Training and evaluation, as far as they are asked for."""

    def __init__(self, session: Session, trainer: Trainer) -> None:
        self.session = session
        self.trainer = trainer
        self.loop, self.folder, self.start = session.loop, session.folder, session.start
        self.proof: dict[str, Any] = {}

    def run(self, sets: Sets, data: DataOptions, method: str, adapter: str, base: str) -> Path:
        """Train and evaluate as asked, save weights, results and the card; returns the folder."""
        if self.loop.do_train and is_first():
            keep_foreign(self.folder / "README.md", CARD_MARK)
        try:
            metrics = self._train() if self.loop.do_train else {}
            if self.trainer.eval_dataset is not None:
                measured = self._just_measured() or self.trainer.evaluate()
                self.trainer.save_metrics("eval", measured)
                metrics |= measured
                if self.loop.measures:
                    self.trainer.save_metrics(
                        "predict", {f"predict_{name.removeprefix('eval_')}": value for name, value in measured.items()}
                    )
        finally:
            leave_trackers(self.trainer)
            self.session.tell_data(sets)
            sets.stop()
        sets.confirm()
        if self.loop.do_train and is_first():
            write_card(self.folder / "README.md", base, method, adapter, data.dataset, metrics)
            self._write_manifest(metrics)
        names = ("train_loss", "eval_loss", "train_runtime")
        shown = [f"{name} {metrics[name]:.4g}" for name in names if name in metrics]
        if speed := self.trainer.bound():
            log.info("%s", speed)
        log.info("done: %s; everything is in %s", ", ".join(shown), self.folder)
        self.trainer.end()  # processes part before they end: threads that still waited for the others have aborted one that was done
        return self.folder

    def _train(self) -> dict[str, Any]:
        """The loop, and what it leaves: weights, state and results."""
        if is_first():
            own = self.start is not None and lies_in(self.start, self.folder)
            if self.loop.overwrite_output_dir and not own:
                clear(self.folder)
            if self.start is not None and own:
                set_aside(self.folder, self.start.step)
            (self.folder / manifest.FILE).unlink(missing_ok=True)  # it stands for a run that has ended
        self.trainer.accelerator.wait_for_everyone()
        began = time.monotonic()
        self.trainer.watch_weights()
        try:
            how = self._how_to_go_on()
            with _heard(self.trainer, how), _workers_told(self.trainer, how):
                result = self.trainer.train(resume_from_checkpoint=str(self.start.folder) if self.start else None)
                self.trainer.save_trained(self.session.adapter.config_file)
        finally:
            for watcher in self.session.watchers:
                watcher.close()
            if is_first():  # a choice may have been changed on the way
                with suppress(OSError):
                    write_run_file(self.folder / RUN_FILE, self.session.resolve(self.session.decided))
        seconds = max(time.monotonic() - began, 1e-9)
        first, last = self.trainer.first_step, self.trainer.state.global_step
        samples = self.trainer.num_samples_in(last) - self.trainer.num_samples_in(first)
        metrics = result.metrics | {
            "train_runtime": round(seconds, 4),
            "train_samples_per_second": round(samples / seconds, 3),
            "train_steps_per_second": round((last - first) / seconds, 3),
            "train_tokens_per_second": round(self.trainer.tokens_trained / seconds, 1),
            **{f"train_{name}": value for name, value in self.trainer.speeds().items() if name != "tokens_per_second"},
        }
        self.trainer.save_metrics("train", metrics)
        self.trainer.save_state()
        self._prove()
        return metrics

    def _how_to_go_on(self) -> str:
        """For a run that was told to end; the same command would not do in every case."""
        if self.loop.overwrite_output_dir or isinstance(self.loop.resume_from_checkpoint, str):
            return "with 'resume_from_checkpoint: true', and without 'overwrite_output_dir', the same command goes on with"
        return "the same command goes on with"

    def _prove(self) -> None:
        """Raises `UserError` where nothing was learnt, or where what was saved is not what was trained."""
        trainer = self.trainer
        if trainer.state.global_step and not trainer.has_moved():
            why, is_wanted = self._why_nothing_moved()
            told = f"the run has changed nothing: every trained weight is what it was before, to the bit ({why})"
            if not is_wanted:
                raise UserError(told)
            log.warning("%s", told)
        self.proof = {"weights_changed": trainer.has_moved()}
        best = trainer.state.best_global_step
        if self.loop.load_best_model_at_end and best and trainer.state.best_model_checkpoint is None:
            self.proof["best"] = f"the best weights, of step {best}, could not be kept; these are those of step {trainer.state.global_step}"
            log.warning("%s", self.proof["best"])
        if self.loop.save_verify and is_first():
            free_memory()  # of the last step: the model is loaded once more beside the trained one
            order = self.trainer.order.at(0, 0, 4 * self.trainer.step_size).tolist()  # type: ignore[union-attr]
            self.proof["saved"] = self.session.reopen(batch_of(self.trainer.train_dataset, order))
            log.info("%s", self.proof["saved"])

    def _why_nothing_moved(self) -> tuple[str, bool]:
        """Why no trained weight has moved, and whether that was asked for."""
        steps, guards = self.trainer.state.global_step, self.trainer.guards
        if self.loop.learning_rate == 0:
            return "'learning_rate' is 0", True
        if not guards.highest_lr:
            return "the learning rate was 0 in every step", steps == 1  # one step to see whether a run begins: warmup starts at 0
        if guards.num_skipped and guards.num_skipped == steps - self.trainer.first_step:
            return "every step was skipped", False
        return "steps were too small for the number format", False

    def _write_manifest(self, metrics: Mapping[str, Any]) -> None:
        state = self.trainer.state
        told = {
            "steps": state.global_step,
            "planned_steps": state.max_steps,
            "in_parts": self.session.facts.history,
            "seed": self.loop.seed,
            "inputs": self.session.facts.inputs,
            "stream": {"steps": min(state.global_step, manifest.FIRST_STEPS), "digest": self.trainer.stream.digest},
            "versions": manifest.versions(),
            "machine": manifest.machine(self.session.device, num_ranks()),
            "choices": {key: value for key, (value, _) in self.session.choices.decided().items()},
            "proof": self.proof,
            "results": manifest.results(self.folder, metrics),
        }
        manifest.write(self.folder, told)

    def _just_measured(self) -> dict[str, float] | None:
        """What the loop measured after its last step, if these weights are still the ones in the model."""
        if isinstance(self.trainer.eval_dataset, dict):
            return None
        lines = [line for line in self.trainer.state.log_history if "eval_loss" in line and line["step"] == self.trainer.state.global_step]
        if not self.loop.do_train or self.loop.load_best_model_at_end or not lines:
            return None
        return {name: value for name, value in lines[-1].items() if name != "step"}


@contextmanager
def _workers_told(trainer: Trainer, how: str) -> Iterator[None]:
    """A process that loads data may be killed for want of memory: torch tells that by an error of no kind of its own.

    `how` says how to go on.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        last = newest(trainer.folder)
        further = f"{how} {last.folder}" if last is not None else "there is no checkpoint yet"
        told = "a process that loads data was killed, perhaps for want of memory; 'dataloader_num_workers: 0' does without"
        raise UserError(f"{told}. {further}") from None


@contextmanager
def _heard(trainer: Trainer, how: str) -> Iterator[None]:
    """Signals are the trainer's within the block; an end that was asked for is told when it comes, and `how` to go on."""
    with trainer.signals:
        try:
            yield
        except EvaluationBroken:
            log.info("ended before the first step, as it was told: nothing had been trained yet")
            raise Stopped(True) from None
        except Stopped as end:
            step, last = trainer.state.global_step, trainer.state.max_steps
            if end.saved:
                log.info("ended after step %d of %d, as it was told: %s %s", step, last, how, trainer.folder / NAME.format(step))
            else:
                log.error("ended after step %d of %d, as it was told, but it could not be saved", step, last)
            raise
