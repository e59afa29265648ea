"""One training session: where it starts, in which formats it computes, what it writes."""

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from finery.compat import is_first, num_ranks, without_datasets
from finery.data import ledger
from finery.data.differences import first_difference
from finery.data.load import DataOptions, Sets
from finery.data.rows.base import Rows
from finery.data.template import Template
from finery.errors import UserError
from finery.files import usual_modes
from finery.log import get_logger
from finery.methods.base import Method
from finery.models.adapters.base import Adapter, num_trained, set_trainable
from finery.models.ending import save_stop_tokens
from finery.models.head import bare
from finery.models.lineage import write_lineage
from finery.models.load import ModelOptions, locate_adapters, locate_model, upcast_norms
from finery.models.precision import choose_precision
from finery.models.quantized import num_weights
from finery.models.quantizers.base import Quantizing
from finery.models.rope import longest, original_length, save_positions, scale_row_by_row, to_train
from finery.models.status import weight_lines
from finery.models.tokenizer import save_tokenizer
from finery.models.trained import RUN_FILE, Trained, find_trained, is_finished
from finery.options import OptionGroup
from finery.training import manifest
from finery.training.arguments import LoopOptions, training_arguments
from finery.training.checkpoints import Checkpoint, tidy
from finery.training.choices import Choices
from finery.training.fast import Fast, make_fast
from finery.training.fp8 import Fp8Options, check_device, recipe, without_others
from finery.training.guards import Guards
from finery.training.lanes import draws_dice, most_lanes
from finery.training.lock import Lock
from finery.training.memory import fit
from finery.training.optimizers.base import Optimizer
from finery.training.output import SIGNATURE, Line, keep_foreign, write_run_file
from finery.training.proof import prove_saved
from finery.training.starting import Facts, check_inputs, check_not_done, lies_in, normal, starting_point
from finery.training.trackers import guard_trackers

if TYPE_CHECKING:
    from finery.training.trainer import Trainer

log = get_logger(__name__)


class Session:
    """Holds what the steps of a run share: options, decisions and the folder."""

    def __init__(
        self,
        loop: LoopOptions,
        rest: Mapping[str, Any],
        model: ModelOptions,
        adapter: Adapter,
        switched: tuple[Sequence[Optimizer], Fp8Options, Quantizing | None],
        asked: Mapping[str, Any],
    ) -> None:
        """`asked` holds all that the training was asked for, by key: a run is gone on with only where that is the same."""
        optimizers, self.fp8, self.quantizing = switched
        self.loop = loop
        self.rest = dict(rest)
        if model.use_reentrant_gc is not None:
            self.rest["activation_checkpointing_kwargs"] = {**(rest.get("activation_checkpointing_kwargs") or {}), **model.recomputation}
        self.model = model
        self.adapter = adapter
        self.stretched = False  # whether positions are others than the base's config tells
        self.optimizer = optimizers[0] if optimizers else None  # which a key has switched on; otherwise the one that `optim` names
        if self.optimizer is not None and self.optimizer.stand_in:
            self.rest["optim"] = self.optimizer.stand_in
        self.folder = Path(str(loop.output_dir))
        self.facts = Facts(normal(asked), num_ranks())
        self.lock = Lock(self.folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if loop.do_train and is_first():
                self.lock.take()
                tidy(self.folder)
        except OSError as error:
            raise UserError(f"'output_dir': {self.folder} cannot be made or written to: {error.strerror}") from None
        self.start: Checkpoint | None = None
        try:
            if loop.do_train:
                finished = is_finished(self.folder, adapter)
                self.start = starting_point(self.folder, loop.resume_from_checkpoint, loop.overwrite_output_dir, finished, self.facts)
            self._settle(loop, model)
        except BaseException:
            self.lock.release()
            raise

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *fault: object) -> None:
        self.lock.release()

    def _settle(self, loop: LoopOptions, model: ModelOptions) -> None:
        """What is settled before anything is loaded."""
        adapter, rest = self.adapter, self.rest
        self.device = device = _device(rest)
        keeps_formats = self.optimizer is not None and self.optimizer.keeps_formats
        check_device(self.fp8, device)
        self.precision = choose_precision(
            self.fp8.fp8 or loop.bf16, loop.fp16, model.pure_bf16, device, adapter.frozen_base or keeps_formats
        )
        recompute = False if loop.disable_gradient_checkpointing else loop.gradient_checkpointing
        pinned = {
            "token_budget": loop.token_budget,
            "micro_batches_at_once": loop.micro_batches_at_once,
            "gradient_checkpointing": recompute,
        }
        self.choices = Choices(pinned, self.start.folder if self.start is not None else None)
        self.fast = Fast()
        self._settled: dict[str, tuple[Any, str]] = dict(adapter.decided())
        if self.start is not None and loop.resume_from_checkpoint is None:
            self._settled["resume_from_checkpoint"] = (None, f"went on with {self.start.folder}")
        if self.optimizer is not None and self.optimizer.steps_in_hooks and loop.max_grad_norm:
            self.loop = loop.model_copy(update={"max_grad_norm": 0.0})
            self._settled["max_grad_norm"] = (0.0, "weights are stepped before the length of all gradients is known")
        if loop.eval_strategy == "steps" and loop.eval_steps is None:
            self._settled["eval_steps"] = (loop.logging_steps, "as logging_steps")
        self.watchers: list[Any] = []
        if self.precision.why:
            log.warning(self.precision.why)
            if not model.pure_bf16:
                self._settled["bf16" if loop.bf16 else "fp16"] = (False, self.precision.why)
        elif loop.bf16 is None and not loop.fp16 and not model.pure_bf16:
            has = self.precision.autocast is not None
            self._settled["bf16"] = (has, f"this {device.type.upper()} {'computes' if has else 'has no'} bf16")

    def source(self) -> Trained:
        """What is trained on: the base and the given adapters; to evaluate alone, what an earlier run left here as well."""
        if self.loop.do_train:
            found = Trained(locate_model(self.model), locate_adapters(self.model))
            if self.folder.resolve() in [folder.resolve() for folder in (found.base, *found.adapters)]:
                raise UserError(f"'output_dir': {self.folder} is what the run starts from, and would be written over; name another folder")
            self._settled |= self.adapter.continued(found.adapters)
            return found
        return find_trained(self.model, self.adapter, str(self.folder))

    @property
    def from_scratch(self) -> bool:
        """Whether training begins with random weights."""
        return self.model.train_from_scratch and self.loop.do_train

    def reshape(self, found: Trained, cutoff_len: int) -> Callable[[Any], None] | None:
        """How the base's config is changed: positions as its adapters were trained with, and then as `rope_scaling` asks."""
        asked = self.model.rope_scaling if self.loop.do_train or not found.is_tuned else None
        if found.positions is None and asked is None:
            return None

        def change(config: Any) -> None:
            if found.positions is not None:
                found.positions(config)
                self.stretched = True
                log.info("positions are scaled as %s was trained", found.adapters[-1])
            if asked is not None:
                self._stretch(config, asked, cutoff_len)

        return change

    def tell_length(self, asked: int, taken: int) -> None:
        """Rows are cut shorter than `cutoff_len` asks: run.yaml has the length that counts."""
        if taken != asked:
            self._settled["cutoff_len"] = (taken, "the positions that the model has learnt")

    def _stretch(self, config: Any, kind: str, cutoff_len: int) -> None:
        rope, made_for = to_train(kind, cutoff_len, config), original_length(config)
        if rope is None:
            why = f"not needed, cutoff_len {cutoff_len} fits into the {longest(config)} positions of the model"
        else:
            why = f"factor {rope.factor:g}, since the model was made for {made_for} positions and cutoff_len is {cutoff_len}"
            rope.set(config)
            self.stretched = True
        log.info("rope_scaling %s: %s", kind, why)
        self._settled["rope_scaling"] = (kind, why)

    def tell_template(self, template: Template, tokenizer: Any, own: str, asked: str | None) -> None:
        """Say which template is used where that is not plain, before weights are loaded."""
        if asked is None:
            if not own:
                log.warning("the model has no chat template of its own: template 'default' is used")
            self._settled["template"] = (None, f"{template.name} template") if own else (template.name, "the model has none of its own")
        elif own and (difference := first_difference(template, tokenizer, own)):
            log.warning("template %r is not the one that this model was made with: %s. It is trained as asked", asked, difference)

    def set_formats(self, model: Any) -> Any:
        """Trained weights in their format, norms in fp32 where asked; says how much is trained."""
        if self.optimizer is None or not self.optimizer.keeps_formats:
            set_trainable(model, self.precision.trained)
        if self.model.upcast_layernorm:
            upcast_norms(model)
        trained = num_trained(model)
        everything = num_weights(model)
        log.info("training %s of %s weights (%.2f %%)", f"{trained:,}", f"{everything:,}", 100 * trained / everything)
        return model

    def speed_up(self, model: Any, kernels: Mapping[str, OptionGroup], longest: int) -> None:
        """Put kernels in place and settle how much is worked on at once; rows have at most `longest` tokens."""
        device = self.device
        if any(weight.device != device for weight in model.parameters()):  # one of few bits lies there already
            model.to(device)
        scale_row_by_row(model)
        kernels = without_others(kernels, self.fp8)
        asked = self.choices.pinned["gradient_checkpointing"]
        if kernels["unsloth"].model_dump()["use_unsloth_gc"] and asked is None:
            asked = True
        found = fit(model, longest, device, asked)
        self.choices.settle("gradient_checkpointing", lambda: (found.recompute, found.why))
        self.choices.settle("token_budget", lambda: (found.token_budget, found.why))
        self.fast = make_fast(model, kernels, self.choices, self.precision.autocast)
        self.choices.settle("micro_batches_at_once", lambda: self._at_once(model, device))
        if self.model.print_param_status and is_first():
            log.info("parameters:\n%s", "\n".join(weight_lines(model)))

    def _at_once(self, model: Any, device: torch.device) -> tuple[int, str]:
        """How many micro-batches are worked on side by side, and why."""
        if device.type != "cpu":
            return 1, "a GPU works on one"
        if num_ranks() > 1:
            return 1, "there are several processes"
        if self.optimizer is not None and self.optimizer.in_turn:
            return 1, self.optimizer.in_turn
        if (self.rest.get("activation_checkpointing_kwargs") or {}).get("use_reentrant"):
            return 1, "re-entrant recomputation cannot tell the gradients of threads apart"
        if draws_dice(model):
            return 1, "training draws random numbers, whose order must not depend on threads"
        threads = torch.get_num_threads()
        number = most_lanes(model, threads)
        return number, "one for each thread" if number == threads else "more would take much memory for gradients"

    @property
    def decided(self) -> dict[str, tuple[Any, str]]:
        """Keys whose value this run settled, and why."""
        return self._settled | {name: (False, why) for name, why in self.fast.left.items()} | self.choices.decided()

    @property
    def has_work(self) -> bool:
        """Whether anything is trained or evaluated; data may be encoded alone."""
        return self.loop.do_train or self.loop.do_eval or self.loop.measures

    def keep_tokens(self, sets: Sets, data: DataOptions) -> Path:
        """Nothing is trained: the encoded data are all that was asked for."""
        found = ledger.report(sets.by_name)
        sets.stop()
        sets.confirm()
        log.info("%s\nencoded data are in %s", ledger.table(found), data.tokenized_path)
        return Path(str(data.tokenized_path))

    def tell_data(self, sets: Sets) -> None:
        """The ledger, as a table and as a file of the run."""
        if is_first():
            found = ledger.report(sets.by_name)
            ledger.write(self.folder, found)
            log.info("%s", ledger.table(found))

    def build_trainer(
        self, method: Method, rows: Rows, sets: Sets, model: Any, template: Template, tokenizer: Any, watchers: Mapping[str, OptionGroup]
    ) -> "Trainer":
        """The trainer with its watchers."""
        from transformers import TrainerCallback

        from finery.training.callbacks import CALLBACKS

        with without_datasets():
            from finery.training.trainer import Trainer

        loop = self.loop
        arguments = training_arguments(loop, self.rest, self.precision, self.folder, self.choices["gradient_checkpointing"])
        arguments.mixed_precision = "fp8" if self.fp8.fp8 else arguments.mixed_precision
        wanted = [(CALLBACKS[name], options) for name, options in watchers.items() if CALLBACKS[name].wanted(options)]
        parts = [type(part.__name__, (part, TrainerCallback), {})(options, method.plots) for part, options in wanted]

        base = locate_model(self.model)  # once: a hub may be asked for it

        def save_beside(folder: Path) -> None:
            save_tokenizer(tokenizer, folder, template.jinja)
            save_stop_tokens(model, folder, template.stop_ids)
            if self.adapter.takes_adapters:
                save_positions(bare(model), folder, self.stretched)
                write_lineage(folder, self.model.model_name_or_path, base)
            usual_modes(folder)

        try:  # an optimizer may need a package or a device
            Trainer.get_optimizer_cls_and_kwargs(arguments, model)
        except (ImportError, ValueError, RuntimeError) as error:
            raise UserError(f"'optim: {self.rest.get('optim', 'adamw_torch')}' cannot be used: {' '.join(str(error).split())}") from None
        trainer = Trainer(
            method=method,
            rows=rows,
            step_size=loop.per_device_train_batch_size * loop.gradient_accumulation_steps,
            choices=self.choices,
            order=sets.order,
            optimizer_part=self.optimizer,
            save_beside=save_beside,
            model=model,
            args=arguments,
            train_dataset=sets.train,
            eval_dataset=sets.eval,
            callbacks=[*parts, _after_steps(self.adapter)],
            recipes=[recipe(self.fp8)] if self.fp8.fp8 else [],
        )
        guard_trackers(trainer, self.rest.get("report_to"))
        for part in parts:
            part.trainer = trainer
        self.watchers = parts
        trainer.keep()
        trainer.facts, trainer.guards = self.facts, Guards(loop.on_nonfinite)
        self.reopen = partial(prove_saved, trainer, self.model, (self.adapter, self.quantizing), tokenizer)
        if loop.do_train:
            self._check_steps(trainer)
            self.adapter.begin(model, self._num_steps(trainer))
        return trainer

    def _check_steps(self, trainer: "Trainer") -> None:
        """Raise `UserError` where the scheduler cannot be had, or no step is left to do."""
        num_steps = self._num_steps(trainer)
        trainer.try_scheduler(num_steps)
        if self.start is not None:
            named = isinstance(self.loop.resume_from_checkpoint, str)  # which is a wish to do its steps again
            done = None if named or not lies_in(self.start, self.folder) else manifest.planned_steps(self.folder)
            check_not_done(self.start, num_steps, done)

    def know(self, inputs: Mapping[str, str], expected: Mapping[str, str] | None = None) -> None:
        """Digests of what the run reads. Raises `UserError` where a run that is gone on with, or repeated, has read something else."""
        if expected is not None:
            manifest.check_inputs(expected, inputs)
        self.facts.inputs.update(inputs)
        if self.start is not None:
            check_inputs(self.facts, self.start.folder)

    def write_settings(self, resolve: Callable[[Mapping[str, tuple[Any, str]]], Iterable[Line]]) -> None:
        """run.yaml, of what was trained and not of a later evaluation; written again where a choice is changed on the way.

        `resolve` gives its lines for the keys that this session has decided.
        """
        self.resolve = resolve
        self.facts.decided.update({key: value for key, (value, _) in self.decided.items()})
        if is_first() and self.loop.do_train:
            keep_foreign(self.folder / RUN_FILE, SIGNATURE)  # the user's own file may bear this name
            write_run_file(self.folder / RUN_FILE, resolve(self.decided))

    def _num_steps(self, trainer: "Trainer") -> int:
        steps = len(trainer.get_train_dataloader())
        if not steps:
            raise UserError("'dataloader_drop_last' leaves no step: there are fewer samples than one step holds")
        return self.loop.max_steps if self.loop.max_steps > 0 else math.ceil(self.loop.num_train_epochs * steps)


def _device(rest: Mapping[str, Any]) -> torch.device:
    """Where this process trains."""
    if not torch.cuda.is_available() or rest.get("use_cpu"):
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def _after_steps(adapter: Adapter) -> Any:
    """Tells the adapter of every step that weights have made."""
    from transformers import TrainerCallback

    class AfterSteps(TrainerCallback):
        """Between the optimizer's step and the end of the gradients."""

        def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            """See `Adapter.after_step`."""
            adapter.after_step(model, state.global_step + 1)

    return AfterSteps()
