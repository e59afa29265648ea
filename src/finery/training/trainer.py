"""Hugging Face's loop with the loss taken from the method: what a step holds, what it costs, how an evaluation counts."""

import contextlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput
from transformers.training_args import OptimizerNames

from finery.data.order import Order, Sequential
from finery.data.rows.base import Row, Rows
from finery.errors import UserError
from finery.log import get_logger
from finery.methods.base import Loss, Method
from finery.models.head import Scores, bare, teach
from finery.models.kernels.functions.mixed_linear import COPIES
from finery.training.accuracy import Accuracy
from finery.training.choices import Choices
from finery.training.clock import Clock, bound, flops_each, product_peak
from finery.training.dice import random_states, restore_random_states
from finery.training.kept import KeptTrainer
from finery.training.lanes import Lanes, share_out
from finery.training.memory import is_out_of_memory
from finery.training.optimizers.base import Optimizer, Setting
from finery.training.reference import StartModel, reference_inputs
from finery.training.sampler import StepLoader, StepSampler
from finery.training.steps import Parts, silent, tokens_of

log = get_logger(__name__)

Units = list[list[Row]]


class Trainer(KeptTrainer):
    """A step is `step_size` samples of each rank, whatever they are cut into.

    The loss of a step is the sum over its micro-batches and ranks, divided by the step's total weight. So batch
    size, accumulation, padding and number of ranks never change the gradient.
    """

    def __init__(
        self,
        *,
        method: Method,
        rows: Rows,
        step_size: int,
        choices: Choices,
        order: Order | None,
        optimizer_part: Optimizer | None,
        save_beside: Callable[[Path], None],
        **kwargs: Any,
    ) -> None:
        self.recipes = kwargs.pop("recipes", [])  # of number formats, for accelerate
        super().__init__(**kwargs)
        self.method = method
        self.rows = rows
        self.step_size = step_size
        self.choices = choices
        teach(bare(self.model))
        self.lanes = Lanes(self.model, choices["micro_batches_at_once"])  # type: ignore[arg-type]
        measured = method.needs_reference and order is not None
        self.reference = StartModel(self.model, self._scores) if measured else None  # type: ignore[arg-type]
        self.clock = Clock(self.args.device)
        self._flops_each = flops_each(bare(self.model))
        self._num_weights = sum(weight.numel() for weight in self.model.parameters())  # type: ignore[union-attr]
        self._peak = 0.0  # of products, measured when it is first told
        self.optimizer_part = optimizer_part  # which a key has switched on; None: the one that `optim` names
        self.order = order  # in which the training set is dealt
        self.save_beside = save_beside
        self._sampler: StepSampler
        self.last_loss = float("nan")  # of the newest step, for whoever watches
        self.step_rows: list[Row] = []  # of the newest step
        self.watch: Callable[[Sequence[Row]], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext  # around each loss
        self.tokens_trained = 0
        self._skips = False  # the step is left out
        self._last_finite = 0.0  # loss

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        found = super()._build_accelerator_args(**kwargs)
        return found | {"kwargs_handlers": [*found["kwargs_handlers"], *self.recipes]}

    # -- what a step holds

    def get_train_dataloader(self) -> DataLoader:
        """Whole steps; accelerate has no part in dealing samples to ranks."""
        assert self.order is not None
        return self._loader(self.train_dataset, self.step_size, self.order, self.args.dataloader_drop_last)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Batches in order, the same number on every rank."""
        chosen = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(chosen, str):
            chosen = self.eval_dataset[chosen]  # type: ignore[index]
        return self._loader(chosen, self.args.per_device_eval_batch_size, Sequential(len(chosen)), drop_last=False)  # type: ignore[arg-type]

    def _loader(self, units: Any, size: int, order: Order, drop_last: bool) -> StepLoader:
        args = self.args
        sampler = StepSampler(order, size, watcher=units, rank=args.process_index, num_ranks=args.world_size, drop_last=drop_last)
        if units is self.train_dataset:
            self._sampler = sampler
        workers = {"num_workers": args.dataloader_num_workers, "prefetch_factor": args.dataloader_prefetch_factor}
        # an own generator: a loader draws a seed for its workers, and must not move the run's own dice for that
        dice = torch.Generator().manual_seed(args.seed)
        return StepLoader(
            units, batch_sampler=sampler, collate_fn=_flat, generator=dice, persistent_workers=args.dataloader_persistent_workers, **workers
        )

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of one whole step; returns this rank's share of its mean loss."""
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()  # type: ignore[union-attr]  # schedule-free optimizers have two modes
        self.step_rows = rows = inputs
        self.clock.mark("data")
        self.stream.add(self.state.global_step, rows)
        num_tokens = tokens_of(rows)
        self.tokens_trained += num_tokens * self.args.world_size
        scale = self.args.world_size / max(self._total(self.method.weight(rows)), 1)
        dice = random_states()
        while True:
            try:
                share = self._forward_and_backward(model, rows, scale)
                break
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self._take_less(rows, str(error))
            # outside of `except`, whose error would hold on to everything that the step had made
            model.zero_grad(set_to_none=True)
            if self.args.device.type == "cuda":
                torch.cuda.empty_cache()
            restore_random_states(dice)
        COPIES.clear()
        num_supervised = sum(row.num_supervised for row in rows)
        self.clock.count(num_tokens, num_supervised, self._flops_each[0] * num_tokens + self._flops_each[1] * num_supervised)
        self.last_loss = float(share)
        self.guards.see_step(self, rows, num_supervised, self.last_loss)
        if self.any_rank(not math.isfinite(self.last_loss)):
            self.guards.nonfinite(self, rows, "loss")
            self._skips = True
            return torch.full_like(share, self._last_finite)  # the mean is that of the other steps
        self._last_finite = self.last_loss
        self.guards.finite()
        return share

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm: Any = super()._get_grad_norm(model, grad_norm=grad_norm)
        if self._skips:
            self._skips = False
            return 0.0
        if self.accelerator.scaler is None:  # that one tries scales, and steps over what overflows
            length = float(norm)
            if not math.isfinite(length):  # the same in all processes
                self.guards.nonfinite(self, self.step_rows, "gradient")
                return 0.0
            self.guards.see_norm(None if self.steps_in_hooks else length)  # hooks have let gradients go
        return norm

    @property
    def steps_in_hooks(self) -> bool:
        """Whether weights are stepped in the backward pass: there is no way back from such a step."""
        return self.optimizer_part is not None and self.optimizer_part.steps_in_hooks

    def parts(self, rows: Sequence[Row]) -> list[list[Row]]:
        """The micro-batches of some rows."""
        return [part for lane in self._share_out(rows) for part in lane]

    def total_of(self, rows: Sequence[Row]) -> Tensor:
        """The loss of one micro-batch in training, a sum, to go backward from."""
        self.model.train()  # type: ignore[union-attr]
        return self._measure(self.model, rows).total  # type: ignore[arg-type]

    def loss_of(self, model: nn.Module, rows: Sequence[Row]) -> float:
        """The mean loss of some rows as an evaluation sees it, each by itself, with this model or another."""
        model.eval()
        total, weight = 0.0, 0.0
        for row in rows:
            batch: Any = self._prepare_inputs(self.rows.collate([row]))  # type: ignore[arg-type]
            with torch.no_grad(), self.compute_loss_context_manager():
                loss = self.method.loss(model, batch)
            total, weight = total + float(loss.total), weight + float(loss.weight)
        return total / max(weight, 1)

    def told(self, place: int) -> str:
        """Where a sample of the training set comes from."""
        return self.train_dataset.samples.told(place)  # type: ignore[union-attr]

    def _share_out(self, rows: Sequence[Row]) -> list[Parts]:
        """Micro-batches of each lane; one of a silent row where there are no rows."""
        budget, end_to_end = self.choices["token_budget"], self.choices["packed_attention"]
        return share_out(rows, budget, self.lanes.most, self.lanes.threads, end_to_end) or [[[silent()]]]

    def _forward_and_backward(self, model: nn.Module, rows: list[Row], scale: float) -> Tensor:
        """The step in micro-batches; a rank without rows still takes part in the exchange of gradients."""
        lanes = self._share_out(rows)
        last = lanes[-1][-1]
        if self.reference is not None:
            self.reference.prepare(lanes, self.lanes)

        def work(part: list[Row], is_first: bool) -> Tensor:
            if self.optimizer_part is not None:
                self.optimizer_part.ends_step = part is last
            with contextlib.nullcontext() if part is last else self.accelerator.no_sync(model=model):
                loss = self._measure(model, part)
                if is_first:
                    self.clock.mark("forward")
                # DDP averages over ranks, a step's loss is a sum: hence the number of ranks in `scale`
                if not self.lanes.backward(loss.total * scale):
                    self.accelerator.backward(loss.total * scale)
                if is_first:
                    self.clock.mark("backward")
            return loss.total.detach() * scale

        share = torch.stack(self.lanes.run(lanes, work)).sum()
        self.clock.mark("backward")
        return share

    def _take_less(self, rows: list[Row], said: str) -> None:
        """Halve the budget, or where a single row is too much, recompute activations; the step is then done again.

        With several processes there is no way back: the others wait in the exchange of gradients. Nor is there one where weights
        have been stepped already.
        """
        longest = max(len(row.ids) for row in rows)
        step = self.state.global_step
        if self.args.world_size > 1 or self.steps_in_hooks:
            advice = "set 'token_budget' lower, or 'gradient_checkpointing: true'"
            raise UserError(f"out of memory in step {step + 1} with micro-batches of {self.choices['token_budget']} tokens: {advice}")
        if sum(map(len, self._share_out(rows))) < len(rows):
            half = min(self.choices["token_budget"], tokens_of(rows)) // 2
            log.warning("out of memory: from step %d on, micro-batches hold %d tokens; the step is done again", step + 1, half)
            self.choices.change("token_budget", half, "memory was used up", step)
        elif not bare(self.model).is_gradient_checkpointing and self.choices.pinned.get("gradient_checkpointing") is not False:
            bare(self.model).gradient_checkpointing_enable(self.args.activation_checkpointing_kwargs or {"use_reentrant": False})
            log.warning("out of memory: from step %d on, activations are computed again in the backward pass", step + 1)
            self.choices.change("gradient_checkpointing", True, "memory was used up", step)
        else:
            text = f"out of memory in step {step + 1} with a single row of {longest} tokens"
            raise UserError(f"{text}: a lower 'cutoff_len', 'bf16: true' or a smaller model would need less ({said[:200]})")

    def _batch(self, rows: Sequence[Row]) -> dict[str, Any]:
        return self._prepare_inputs(self.rows.collate(rows, end_to_end=self.choices["packed_attention"]))  # type: ignore[return-value]

    def _measure(self, model: nn.Module, rows: Sequence[Row]) -> Loss:
        batch = self._batch(rows)
        if self.reference is not None and model.training:
            batch["reference"] = self.reference.scores(rows)
        with self.compute_loss_context_manager(), self.watch(rows):
            return self.method.loss(model, batch)

    def _scores(self, rows: Sequence[Row]) -> Scores:
        """What the model as it is now gives to the supervised tokens."""
        with self.compute_loss_context_manager():
            return self.model(**reference_inputs(self._batch(rows)))  # type: ignore[misc]

    def _total(self, weight: float) -> float:
        if self.args.world_size == 1:
            return weight
        return float(self.accelerator.reduce(torch.tensor(float(weight), device=self.args.device), "sum"))  # type: ignore[arg-type]

    def _show_answering_weights(self) -> None:
        """Schedule-free optimizers train other weights than those that answer; `training_step` goes back to the former."""
        if callable(getattr(self.optimizer, "eval", None)):
            self.optimizer.eval()  # type: ignore[union-attr]

    # -- evaluation: a sum over all tokens, divided once

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: Any = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """`<prefix>_loss` is the sum over all supervised tokens / their number, whatever the batches; NaN stays NaN."""
        model = self.model  # not the wrapper, whose exchange of buffers would wait for ranks with fewer batches
        model.eval()  # type: ignore[union-attr]
        self._show_answering_weights()
        total, weight = 0.0, 0.0
        accuracy = Accuracy(self.method.measures_accuracy)

        def measure(part: list[Row], _: bool) -> Loss:
            with accuracy.of(part):
                return self._measure(model, part)  # type: ignore[arg-type]

        for rows in dataloader:
            self.heed()
            with torch.no_grad():
                for loss in self.lanes.run(self._share_out(rows), measure):
                    total += float(loss.total)
                    weight += float(loss.weight)
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        COPIES.clear()
        total, weight = self._total(total), self._total(weight)
        metrics = {f"{metric_key_prefix}_loss": total / weight if weight else float("nan"), **accuracy.told(metric_key_prefix, self._total)}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=len(dataloader.dataset))  # type: ignore[arg-type]

    # -- counts that the loop asks for

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """With the speeds since the last line."""
        super().log(logs | self._with_peak(self.clock.lap()) if "loss" in logs else logs, *args, **kwargs)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Called when a step is done; what happens in here is no part of it."""
        self.clock.mark("optimizer")
        super()._maybe_log_save_evaluate(*args, **kwargs)
        self.clock.start()

    def speeds(self) -> dict[str, float]:
        """Tokens a second, the share of each phase, and of the machine's peak (of one device and process), in this session."""
        return self._with_peak(self.clock.report())

    def _with_peak(self, report: dict[str, float]) -> dict[str, float]:
        if not report:
            return {}
        if not self._peak:
            weight = next(p for p in self.model.parameters() if p.ndim == 2)  # type: ignore[union-attr]
            dtype = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else weight.dtype
            self._peak = product_peak(dtype, self.args.device)
        return report | {"peak_tflops": round(self._peak / 1e12, 4), "mfu": round(report["tflops"] * 1e12 / self._peak, 4)}

    def bound(self) -> str:
        """A sentence for the end of a run: how fast, and what bounds it."""
        found = self.speeds()
        if not found:
            return ""
        shares = ", ".join(f"{name} {found[f'{name}_share']:.0%}" for name in ("data", "forward", "backward", "optimizer"))
        speed = f"{found['tokens_per_second']:.0f} tokens/s ({found['supervised_tokens_per_second']:.0f} supervised)"
        peak = f"{found['mfu']:.0%} of the {found['peak_tflops']:.3g} TFLOP/s that products reach here"
        return f"{speed}, {peak}; {shares}. What bounds it: {bound(found, found['mfu'])}"

    def num_samples_in(self, num_steps: int) -> int:
        """How many samples so many steps from the beginning hold, all ranks together."""
        steps = len(self.get_train_dataloader())
        epochs, rest = divmod(num_steps, max(steps, 1))
        samples = len(self.train_dataset)  # type: ignore[arg-type]
        return epochs * samples + min(rest * self.step_size * self.args.world_size, samples)

    def floating_point_ops(self, inputs: Any) -> int:
        """The usual estimate of 6 operations per weight and token (Kaplan et al., 2020, arXiv 2001.08361)."""
        return 6 * tokens_of(inputs) * self._num_weights

    def _track_num_input_tokens(self, inputs: Any) -> None:
        if self.args.include_num_input_tokens_seen != "no":
            self.state.num_input_tokens_seen += int(self._total(tokens_of(inputs)))

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        self._show_answering_weights()
        super()._save(output_dir, state_dict)

    # -- what the loop builds

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The one that a key has switched on, else that of `optim`."""
        if self.optimizer is None and self.optimizer_part is not None:
            chosen: Any = self.model if model is None else model
            kind, arguments = self.get_optimizer_cls_and_kwargs(self.args, chosen)
            decayed = frozenset(self.get_decay_parameter_names(chosen))
            setting = Setting(OptimizerNames(self.args.optim).value, kind, arguments, self.args.weight_decay, decayed)
            self.optimizer = self.optimizer_part.build(chosen, setting)
            self.optimizer_part.join(self.accelerator)
        return super().create_optimizer(model)

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """As the loop does, with faults in `lr_scheduler_kwargs` told."""
        try:
            return super().create_scheduler(*args, **kwargs)
        except (TypeError, ValueError, KeyError) as error:
            raise UserError(f"'lr_scheduler_type' and 'lr_scheduler_kwargs' do not fit: {error}") from None

    def try_scheduler(self, num_steps: int) -> None:
        """Tell faults in the scheduler's settings before anything of an earlier run is cleared away."""
        self.create_scheduler(num_steps, torch.optim.SGD([torch.zeros(1, requires_grad=True)], self.args.learning_rate))

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> Any:
        started = super()._init_training_state(max_steps, *args, **kwargs)
        self._sampler.skipped = 0 if self.args.ignore_data_skip else started[1]  # the loop passes over as many
        return started


def _flat(units: Units) -> list[Row]:
    """The rows of a step's samples, one after the other."""
    return [row for unit in units for row in unit]
