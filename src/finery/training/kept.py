"""Hugging Face's loop, kept from losing anything: whole checkpoints, a resume to the last bit, an end when it is told."""

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers.trainer_callback import ExportableState

from finery.errors import Stopped, UserError
from finery.log import get_logger
from finery.training import checkpoints
from finery.training.choices import Choices
from finery.training.dice import random_states, restore_random_states, undisturbed_dice
from finery.training.guards import Guards
from finery.training.loading import keep_formats, load_renamed
from finery.training.manifest import Stream
from finery.training.proof import Moved
from finery.training.signals import Signals
from finery.training.starting import Facts
from finery.training.state_files import Unsavable, load_state, save_state

log = get_logger(__name__)

PROGRESS = "progress.json"
"""In a checkpoint: where between two steps it was taken, and what the loop had summed up."""
RETRY_SECONDS = 60.0
"""After a checkpoint that could not be written, the next try; and between tries to write the trained weights."""
FINAL_TRIES = 10


class EvaluationBroken(Exception):
    """The run was told to end in the middle of an evaluation."""


class _Marks(transformers.TrainerCallback):
    """Tells the trainer where the loop is."""

    def __init__(self, trainer: "KeptTrainer") -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The loop is set up, and no step has been done."""
        self.trainer.go_on()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """What is due after a step comes next."""
        self.trainer.epoch_done = False

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """What is due after an epoch comes next."""
        self.trainer.epoch_done = True


class KeptTrainer(transformers.Trainer):
    """The part of our trainer that keeps: what a step is and what it costs, its subclass says."""

    choices: Choices
    save_beside: Callable[[Path], None]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        keep_formats(self.model)
        self.folder = Path(str(self.args.output_dir))
        self.guards = Guards("stop")  # as the session's options say
        self.facts = Facts({})  # what a run must share to go on; the session tells
        self.signals = Signals()
        self.stream = Stream()
        self.first_step = 0  # of this session: a resumed run did the steps before it elsewhere
        self.epoch_done = False  # whether the loop is at the end of an epoch, and not of a step within it
        self.before_save: list[Callable[[], None]] = []  # what a checkpoint counts on
        self._resumed: Path | None = None  # until what it holds is taken over
        self._figures: dict[str, float | None] = {}  # of the last step, which an epoch's line repeats
        self._saved_step = -1
        self._whole = False  # the next checkpoint holds the optimizer's state, also where only models are saved
        self._best_before: tuple[float | None, int | None] = (None, None)
        self._moved: Moved | None = None
        self._moved_before = False  # whether weights had moved in an earlier session
        self._missed: float | None = None  # when a checkpoint could not be written
        self._tr_loss = torch.zeros(())  # what steps since the last line of the log have cost, summed; the loop's

    def watch_weights(self) -> None:
        """From now on it is known whether one of them moves."""
        self._moved = Moved(self.model)  # type: ignore[arg-type]

    def has_moved(self) -> bool:
        """Whether a trained weight is no longer what it was when the run began."""
        return self._moved_before or (self._moved is not None and self._moved.any(self.model))  # type: ignore[arg-type]

    def keep(self) -> None:
        """Called when all other watchers are there: what they do when training begins comes first."""
        self.add_callback(_Marks(self))

    def any_rank(self, flag: bool) -> bool:
        """Whether a flag is set in any of the processes; all must ask."""
        if self.args.world_size == 1:
            return flag
        return bool(self.accelerator.reduce(torch.tensor(float(flag), device=self.args.device), "sum") > 0)  # type: ignore[operator]

    def _first_trouble(self, told: str) -> str:
        """What any process has to complain about; all must ask."""
        if self.args.world_size == 1:
            return told
        found: list[Any] = [None] * self.args.world_size
        torch.distributed.all_gather_object(found, told)
        return next((text for text in found if text), "")

    # -- what is due after a step or an epoch

    def _maybe_log_save_evaluate(self, tr_loss: Any, grad_norm: Any, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        told = {"grad_norm": grad_norm, "learning_rate": kwargs.get("learning_rate")}  # tensors, of some optimizers
        self._figures = {name: float(value) if value is not None else None for name, value in told.items()}
        again = self._missed is not None and time.monotonic() - self._missed >= RETRY_SECONDS
        if self.any_rank(self.signals.save or again):
            self.control.should_save, self.signals.save, self._whole = True, False, True
        self._best_before = self.state.best_metric, self.state.best_global_step
        try:
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, *args, **kwargs)
        except EvaluationBroken:
            self._end_here(model)
        if self.any_rank(self.signals.stop):
            self._end_here(model)

    def _end_here(self, model: Any) -> None:
        """Save what is not saved yet, and leave the loop."""
        if self._saved_step != self.state.global_step:
            self._whole = True
            self._save_checkpoint(model, None)
        raise Stopped(self._saved_step == self.state.global_step)

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        begun = len(self.state.log_history)
        try:
            return super()._evaluate(*args, **kwargs)
        except EvaluationBroken:
            del self.state.log_history[begun:]  # it is done again, whole
            raise

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Leaves all dice as they were: a run is the same with evaluations and without."""
        with undisturbed_dice():
            return super().evaluate(*args, **kwargs)

    def heed(self) -> None:
        """Within an evaluation: end where the run was told to. Several processes would not do so at the same batch: they go on."""
        if self.signals.stop and self.args.world_size == 1:
            raise EvaluationBroken

    # -- saving

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write beside, sync, rename. A disk's trouble costs this checkpoint alone: it is told, and tried again."""
        self.store_flos()
        step, first, best = self.state.global_step, self.args.should_save, self.state.best_model_checkpoint
        lean, self.args.save_only_model = self.args.save_only_model, self.args.save_only_model and not self._whole
        try:
            trouble, resumable = self._write(step, first), not self.args.save_only_model
        finally:
            self.args.save_only_model, self._whole = lean, False
        if trouble:
            self.state.best_model_checkpoint = best
            if self.state.best_global_step == step:  # it is not kept: the next that is better than those before it may be
                self.state.best_metric, self.state.best_global_step = self._best_before
            if first:
                with contextlib.suppress(OSError):
                    checkpoints.give_up(self.folder, step)
                log.warning("the checkpoint of step %d could not be written: %s. The run goes on, and tries again", step, trouble)
            self._missed = time.monotonic()
            return
        self._saved_step, self._missed = step if resumable else -1, None
        if first:
            checkpoints.rotate(self.folder, self.args.save_total_limit, self.state.best_model_checkpoint, step)

    def _write(self, step: int, first: bool) -> str:
        """A checkpoint beside, and then in its place; or what there is to complain about."""
        room, num_bytes = checkpoints.beside(self.folder, step), self._num_bytes()
        trouble = self._first_trouble(self._trying(lambda: checkpoints.begin(self.folder, step, num_bytes)) if first else "")
        trouble = trouble or self._first_trouble(self._trying(lambda: self._fill(room)))
        if not trouble and first:
            trouble = self._trying(lambda: checkpoints.finish(self.folder, step, not self.args.save_only_model))
        return self._first_trouble(trouble)

    def _trying(self, work: Callable[[], Any]) -> str:
        """What a disk has to complain about; other faults are raised."""
        try:
            work()
        except Exception as error:  # tokenizers and safetensors tell of disks by exceptions of their own
            if not checkpoints.is_disk_trouble(error) and not isinstance(error, Unsavable):
                raise
            return (isinstance(error, OSError) and error.strerror) or " ".join(str(error).split())
        return ""

    def _num_bytes(self) -> int:
        """About what a checkpoint takes: weights that are saved, and the optimizer's state."""
        adapter = hasattr(self.model, "peft_config")
        saved = sum(p.nbytes for p in self.model.parameters() if p.requires_grad or not adapter)  # type: ignore[union-attr]
        held = [value for state in self.optimizer.state.values() for value in (state.values() if isinstance(state, dict) else ())]  # type: ignore[union-attr]
        return saved + (0 if self.args.save_only_model else sum(v.nbytes for v in held if isinstance(v, torch.Tensor)))

    def _fill(self, folder: Path) -> None:
        for work in self.before_save:
            work()
        self.save_model(str(folder), _internal_call=True)
        best = checkpoints.NAME.format(self.state.best_global_step)
        if self.state.best_global_step and (self.state.best_global_step == self.state.global_step or (self.folder / best).is_dir()):
            self.state.best_model_checkpoint = str(self.folder / best)
        if not self.args.save_only_model:
            self._save_optimizer_and_scheduler(str(folder))
            self._save_scaler(str(folder))
            self._save_rng_state(str(folder))
        if self.args.should_save:
            for callback in [one for one in [*self.callback_handler.callbacks, self.control] if isinstance(one, ExportableState)]:
                self.state.stateful_callbacks[type(callback).__name__] = callback.state()  # type: ignore[index]
            self.state.save_to_json(str(folder / "trainer_state.json"))
            (folder / PROGRESS).write_text(json.dumps(self._progress(), indent=1) + "\n", encoding="utf-8")
            self.facts.write(folder)

    def _progress(self) -> dict[str, Any]:
        due = [word for word in ("should_log", "should_evaluate") if getattr(self.control, word)]
        return {
            "epoch_done": self.epoch_done,
            "due": [*due, *(["should_save"] if due and self.control.should_save else [])],
            "ends": self.control.should_training_stop and self.state.global_step < self.state.max_steps,
            "total_loss": self._total_loss_scalar,
            "last_logged": self._globalstep_last_logged,
            "figures": self._figures,
            "stream": self.stream.digest,
            "moved": self.has_moved(),
            "highest_lr": self.guards.highest_lr,
        }

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        self.accelerator.unwrap_model(self.model).save_pretrained(str(folder), state_dict=state_dict)
        self.save_beside(folder)

    def save_trained(self, last: str) -> None:
        """The trained weights and what belongs to them into the run's folder, `last` after all other files. Raises `UserError`.

        Where the disk does not take them, it is tried again for some minutes: they are all that a run is for.
        """

        def save() -> None:
            with checkpoints.swapped_in(self.folder, last) if self.args.should_save else contextlib.nullcontext(self.folder) as folder:
                self.save_model(str(folder), _internal_call=True)

        trouble = ""
        for left in reversed(range(FINAL_TRIES)):
            if not (trouble := self._first_trouble(self._trying(save))):
                return
            if self.any_rank(self.signals.stop):
                break
            if left:
                log.warning("the trained weights could not be written: %s. Tried again in %.0f s", trouble, RETRY_SECONDS)
                time.sleep(RETRY_SECONDS)
        raise UserError(f"the trained weights could not be written to {self.folder}: {trouble}; its newest checkpoint is all there is")

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.args.should_save:
            save_state(Path(output_dir), "optimizer", self.optimizer.state_dict() | {"kind": self._optimizer_kind})  # type: ignore[union-attr]
            save_state(Path(output_dir), "scheduler", self.lr_scheduler.state_dict())  # type: ignore[union-attr]
            self.choices.save(Path(output_dir))

    @property
    def _optimizer_kind(self) -> str:
        """What the optimizer is called in code; its state fits no other."""
        kind = type(getattr(self.optimizer, "optimizer", self.optimizer))  # accelerate wraps it
        return f"{kind.__module__.partition('.')[0]}'s {kind.__name__}"

    def _save_scaler(self, output_dir: str) -> None:
        if self.accelerator.scaler is not None and self.args.should_save:
            save_state(Path(output_dir), "scaler", self.accelerator.scaler.state_dict())

    def _save_rng_state(self, output_dir: str) -> None:
        """What each process has of its own: dice, and the losses summed since the last line of the log."""
        own = {"dice": random_states(), "loss": self._tr_loss.clone()}
        save_state(Path(output_dir), f"rank_{self.args.process_index}", own)

    # -- going on

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> Any:
        started = super()._init_training_state(max_steps, *args, **kwargs)
        checkpoint = args[2] if len(args) > 2 else kwargs.get("resume_from_checkpoint")
        self._resumed = Path(checkpoint) if checkpoint is not None else None
        if self._resumed is not None:
            self.args.eval_on_start = False  # it was done
            self._find_best(json.loads((self._resumed / "trainer_state.json").read_text(encoding="utf-8"))["best_model_checkpoint"])
        self.state.compute_steps(self.args, max_steps)  # this run's save, eval and logging steps, not the checkpoint's
        return started

    def _find_best(self, told: str | None) -> None:
        """The best checkpoint lies beside the others, also where the folder was moved."""
        if told and self.state.best_model_checkpoint is None and checkpoints.read(self.folder / Path(told).name) is not None:
            self.state.best_model_checkpoint = str(self.folder / Path(told).name)

    def go_on(self) -> None:
        """Take over what the loop had summed up, and do what was due when the checkpoint was taken."""
        self.first_step = self.state.global_step
        if self._resumed is None:
            return
        folder, self._resumed = self._resumed, None
        told = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
        self._tr_loss += load_state(folder, f"rank_{self.args.process_index}")["loss"].to(self._tr_loss.device)
        self._total_loss_scalar, self._globalstep_last_logged = told["total_loss"], told["last_logged"]
        self._figures, self.epoch_done, self.stream.digest = told["figures"], told["epoch_done"], told["stream"]
        self._moved_before, self.guards.highest_lr = told["moved"], told["highest_lr"]
        self._saved_step = self.state.global_step
        if told["due"]:
            for word in told["due"]:
                setattr(self.control, word, True)
            self._after_the_fact()
        is_last = told["ends"] or self.state.global_step >= self.state.max_steps  # the loop cuts the epoch short, and ends it
        if (is_last or self.state.epoch == int(self.state.epoch or 0)) and not self.epoch_done:
            self.control = self.callback_handler.on_epoch_end(self.args, self.state, self.control)
            self._after_the_fact()
        self.control.should_training_stop |= told["ends"]

    def _after_the_fact(self) -> None:
        start = time.time()
        model: Any = self.model_wrapped
        self._maybe_log_save_evaluate(
            self._tr_loss, self._figures["grad_norm"], model, None, self.state.epoch or 0.0, None, start,
            learning_rate=self._figures["learning_rate"],
        )  # fmt: skip

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        if not self.control.should_training_stop:
            super()._run_epoch(*args, **kwargs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        limit, self.args.save_total_limit = self.args.save_total_limit, None  # it would delete the newest before the weights are saved
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The mean loss at the end is that of all steps, also of those before this session."""
        if "train_loss" in logs:
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 1)
        super().log(logs, *args, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None = None) -> None:
        if checkpoint is None:
            return
        try:
            state = load_state(Path(checkpoint), "optimizer")
            if (kind := state.pop("kind", self._optimizer_kind)) != self._optimizer_kind:
                raise ValueError(f"it is that of {kind}, and this run's is {self._optimizer_kind}")
            self.optimizer.load_state_dict(state)  # type: ignore[union-attr]
            self.lr_scheduler.load_state_dict(load_state(Path(checkpoint), "scheduler"))  # type: ignore[union-attr]
        except (ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise UserError(f"the optimizer's state in {checkpoint} does not fit this run's settings, or is damaged: {error}") from None

    def _load_scaler(self, checkpoint: str | None) -> None:
        if self.accelerator.scaler is not None and checkpoint is not None and (Path(checkpoint) / "scaler.json").exists():
            self.accelerator.scaler.load_state_dict(load_state(Path(checkpoint), "scaler"))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        try:
            if not load_renamed(self.model, Path(resume_from_checkpoint)):
                super()._load_from_checkpoint(resume_from_checkpoint, model)
        except (RuntimeError, ValueError, OSError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"the checkpoint {resume_from_checkpoint} does not fit this run's settings: {reason}") from None

    def _load_best_model(self) -> None:
        if not load_renamed(self.model, Path(str(self.state.best_model_checkpoint))):
            super()._load_best_model()

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            restore_random_states(load_state(Path(checkpoint), f"rank_{self.args.process_index}")["dice"])
