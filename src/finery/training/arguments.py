"""The loop's keys: those of ours, and the rest of Hugging Face's TrainingArguments under old and new names."""

import ast
import json
import operator
import os
import re
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, field_validator

from finery.data.load import Sampling
from finery.errors import Complaint, UserError
from finery.options import Finding, Keys, PathText, one_of, shown
from finery.training.needs import check_rest
from finery.training.prediction import PredictionOptions

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from finery.models.precision import Precision

Strategy = Literal["no", "steps", "epoch"]
BEST_BY = "eval_loss"
"""What the best of a run is chosen by where metric_for_best_model is not given."""


class LoopOptions(PredictionOptions):
    output_dir: PathText | None = None
    """The folder for everything that the run writes."""
    overwrite_output_dir: bool = False
    """Start anew in a folder that holds a run already; otherwise its newest checkpoint is gone on with."""
    do_train: bool = False
    """Train."""
    do_eval: bool = False
    """Evaluate after training, or alone."""
    per_device_train_batch_size: int = Field(8, gt=0)
    """Samples a device holds in one micro-batch; with gradient_accumulation_steps and devices it makes a step."""
    gradient_accumulation_steps: int = Field(1, gt=0)
    """How many such batches make an optimizer step."""
    per_device_eval_batch_size: int = Field(8, gt=0)
    """Samples a device evaluates at once."""
    learning_rate: float = Field(5e-5, ge=0)
    """The highest learning rate."""
    num_train_epochs: float = Field(3.0, gt=0)
    """Passes over the data."""
    max_steps: int = Field(-1, ge=-1)  # not 0, see check
    """Optimizer steps; overrides num_train_epochs."""
    lr_scheduler_type: str = "linear"
    """How the learning rate falls: linear, cosine, constant, …"""
    warmup_ratio: float | None = Field(None, ge=0, le=1)
    """Share of the steps in which the learning rate rises from 0."""
    warmup_steps: float = Field(0, ge=0)
    """Steps in which the learning rate rises from 0; below 1 a share of all steps."""
    weight_decay: float = Field(0.0, ge=0)
    """Decay of weights, not of biases and norms."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Gradients longer than this are shortened; 0: never."""
    logging_steps: float = Field(500, gt=0)
    """Steps between two lines in the log; below 1 a share of all steps."""
    save_strategy: Literal["no", "steps", "epoch", "best"] = "steps"
    """When a checkpoint is written."""
    save_steps: float = Field(500, gt=0)
    """Steps between two checkpoints; below 1 a share of all steps."""
    save_total_limit: int | None = Field(None, gt=0)
    """How many checkpoints are kept."""
    eval_strategy: Strategy = "no"
    """When the evaluation set is measured."""
    eval_steps: float | None = Field(None, gt=0)
    """Steps between two evaluations; as logging_steps where it is not given."""
    load_best_model_at_end: bool = False
    """End with the checkpoint that evaluated best."""
    seed: int = Field(42, ge=0, lt=2**32)
    """Seed of every random choice."""
    disable_shuffling: bool = False
    """Take the samples in the order of the files."""
    train_sampling_strategy: Sampling = "random"
    """In which order samples are taken: random, sequential, or group_by_length, which puts those of like length into the same step."""
    bf16: bool | None = None
    """Mixed precision in bfloat16, where the device computes it; not given, it is used if the device has instructions for it."""
    fp16: bool = False
    """Mixed precision in float16, on a GPU."""
    ddp_timeout: int = Field(1800, gt=0)
    """Seconds that processes wait for each other."""
    token_budget: int | None = Field(None, gt=0)
    """Tokens that a device works on at once, chosen from memory where not given; which rows share a micro-batch does not change a step."""
    micro_batches_at_once: int | None = Field(None, gt=0)
    """Micro-batches that a CPU's threads work on side by side, of token_budget tokens together; one for each thread where not given."""
    gradient_checkpointing: bool | None = None
    """Recompute activations in the backward pass: less memory, more time. Only where they would not fit, unless it is given."""
    disable_gradient_checkpointing: bool = False
    """Never recompute activations."""
    resume_from_checkpoint: str | bool | None = None
    """A checkpoint folder to go on with, or true for the newest; not given, a run in output_dir is gone on with if it is the same."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What becomes of a step whose loss or gradient is not finite: the run ends with what is known of it, or goes on without the step."""
    save_verify: bool = True
    """When training ends, load what was saved anew and compare its loss on one batch."""

    @field_validator("eval_strategy", "save_strategy", mode="before")
    @classmethod
    def _no_means_no(cls, value: object) -> object:
        """YAML reads an unquoted `no` as false."""
        return "no" if value is False else value

    def check(self, run: Any) -> Iterator[Finding]:
        """Contradictions between the loop's keys and with the data."""
        evaluated = bool(run.data.val_size or run.data.eval_dataset)
        if not (self.do_train or self.do_eval or self.do_predict or run.data.tokenized_path):
            yield Finding("do_train", "should be true (or 'do_eval', or 'do_predict'): there is nothing to do")
        if self.do_train and not run.data.dataset:
            yield Finding("do_train", "needs 'dataset'")
        if (self.do_train or self.do_eval) and self.output_dir is None:
            key = "do_train" if self.do_train else "do_eval"
            yield Finding(key, "needs 'output_dir': the folder for everything that the run writes")
        if self.do_eval and not evaluated:
            yield Finding("do_eval", "needs something to evaluate on: set 'val_size' or 'eval_dataset'")
        if self.eval_strategy != "no" and not evaluated:
            yield Finding("eval_strategy", f"is {self.eval_strategy!r}, but nothing is held out: set 'val_size' or 'eval_dataset'")
        if self.fp16 and run.model.pure_bf16:
            yield Finding("fp16", "and 'pure_bf16' exclude each other: keep one")
        if isinstance(self.resume_from_checkpoint, str) and not Path(self.resume_from_checkpoint).is_dir():
            yield Finding(
                "resume_from_checkpoint", f"should be a checkpoint's folder or true; there is no folder {self.resume_from_checkpoint}"
            )
        if self.disable_shuffling and self.train_sampling_strategy == "group_by_length":
            yield Finding("disable_shuffling", "and 'train_sampling_strategy: group_by_length' exclude each other: keep one")
        yield from self._check_numbers()
        yield from self._check_evaluating()
        yield from self.check_predictions(run)
        yield from check_rest(run.trainer, self.save_strategy != "no")
        yield from self._check_metric(run.trainer.get("metric_for_best_model"), run.data, run.method)

    def _check_numbers(self) -> Iterator[Finding]:
        if self.bf16 and self.fp16:
            yield Finding("fp16", "and 'bf16' exclude each other: keep one")
        if self.gradient_checkpointing and self.disable_gradient_checkpointing:
            yield Finding("disable_gradient_checkpointing", "and 'gradient_checkpointing' exclude each other: keep one")
        if self.warmup_ratio and self.warmup_steps:
            yield Finding("warmup_ratio", "is not used beside 'warmup_steps'; keep one", fatal=False)
        if self.lr_scheduler_type not in (choices := enum_values("SchedulerType")):
            yield Finding("lr_scheduler_type", f"{one_of(self.lr_scheduler_type, choices)}, found {self.lr_scheduler_type!r}")
        if self.max_steps == 0:
            yield Finding("max_steps", "should be 1 or more, or -1 to train by num_train_epochs, found 0")
        for key in ("logging_steps", "save_steps", "eval_steps", "warmup_steps"):
            number = getattr(self, key)
            if number is not None and number > 1 and number != int(number):
                yield Finding(key, f"should be a whole number or a fraction below 1, found {number}")

    def _check_evaluating(self) -> Iterator[Finding]:
        """What evaluations are needed for, and when checkpoints must be written to keep the best."""
        if self.eval_strategy == "no":
            if self.load_best_model_at_end:
                yield Finding("load_best_model_at_end", "needs evaluations to choose by: set 'eval_strategy'")
            if self.save_strategy == "best":
                yield Finding("save_strategy", "is 'best', which needs evaluations: set 'eval_strategy'")
            if self.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy"):
                yield Finding("lr_scheduler_type", f"is {self.lr_scheduler_type!r}, which needs evaluations: set 'eval_strategy'")
        elif self.load_best_model_at_end and self.save_strategy not in (self.eval_strategy, "best"):
            found = f"found {self.save_strategy!r}"
            yield Finding("load_best_model_at_end", f"needs 'save_strategy' to be {self.eval_strategy!r} as 'eval_strategy', {found}")
        elif self.load_best_model_at_end and self.eval_strategy == self.save_strategy == "steps":
            each = self.eval_steps or self.logging_steps
            if abs(self.save_steps / each - round(self.save_steps / each)) > 1e-6 or (self.save_steps < 1) != (each < 1):
                found = f"found {self.save_steps:g} and {each:g}"
                yield Finding("load_best_model_at_end", f"needs 'save_steps' to be a multiple of 'eval_steps', {found}")

    def _check_metric(self, metric: str | None, data: Any, method: Any) -> Iterator[Finding]:
        """Evaluation measures the loss, and accuracy where that is asked for: once, or for each data set."""
        each = data.eval_dataset if data.eval_on_each_dataset else ()
        measures = ["loss", *(["accuracy"] if method.measures_accuracy else [])]
        known = [f"eval_{name}_{one}" for name in each for one in measures] or [*measures, *(f"eval_{one}" for one in measures)]
        if metric is not None and metric not in known and f"eval_{metric}" not in known:
            yield Finding("metric_for_best_model", f"should be {' or '.join(known)}, which is what evaluation measures, found {metric!r}")
        if metric is None and each and (self.load_best_model_at_end or self.save_strategy == "best"):
            yield Finding("eval_on_each_dataset", f"needs 'metric_for_best_model' to say which loss is to be lowest: {', '.join(known)}")


RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "activation_checkpointing": "gradient_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "no_cuda": "use_cpu",
    "use_liger_kernel": "enable_liger_kernel",
}
"""Old names of keys, and other names of the same, and what they are called here."""

_SOURCES = ("training_args.py", "trainer_utils.py", "debug_utils.py", "training_args_seq2seq.py")


@cache
def _classes() -> dict[str, ast.ClassDef]:
    """Classes of transformers' argument files, read as text: importing them takes seconds, this a tenth of one."""
    spec = find_spec("transformers")
    folder = Path(str(spec.origin)).parent if spec else Path()
    trees = [ast.parse((folder / name).read_text(encoding="utf-8")) for name in _SOURCES]
    return {node.name: node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)}


@cache
def enum_values(name: str) -> tuple[str, ...]:
    """The words that one of transformers' choices knows."""
    body = _classes()[name].body
    values = [node.value.value for node in body if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)]
    return tuple(value for value in values if isinstance(value, str))


@cache
def trackers() -> tuple[str, ...]:
    """The words that `report_to` knows; the file that names them is too big to be parsed for that."""
    spec = find_spec("transformers")
    text = (Path(str(spec.origin)).parent / "integrations/integration_utils.py").read_text(encoding="utf-8") if spec else ""
    table = re.search(r"^INTEGRATION_TO_CALLBACK = {(.*?)^}", text, re.MULTILINE | re.DOTALL)
    return ("none", "all", *re.findall(r'"(\w+)"', table[1] if table else ""))


@cache
def trainer_fields() -> dict[str, "TrainerField"]:
    """Every field of TrainingArguments by name."""
    return {
        node.target.id: TrainerField(node.target.id, node)
        for node in _classes()["TrainingArguments"].body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }


_TYPES = {"dict": dict, "list": list, "bool": bool, "int": int, "float": float, "str": str}
_WORDS = {"dict": "a mapping", "list": "a list", "bool": "true or false", "int": "a whole number", "float": "a number", "str": "text"}
_BOUNDS = {"ge": ("at least", operator.ge), "gt": ("above", operator.gt), "lt": ("below", operator.lt)}
_LEVELS = ("detail", "debug", "info", "warning", "error", "critical", "passive")
_CHOICES = {"log_level": _LEVELS, "log_level_replica": _LEVELS, "include_num_input_tokens_seen": ("all", "non_padding", "no")}
"""Words that transformers' source does not list beside the field."""
_RANGES: dict[str, dict[str, float]] = {
    "adam_beta1": {"ge": 0, "lt": 1},
    "adam_beta2": {"ge": 0, "lt": 1},
    "adam_epsilon": {"ge": 0},
    "dataloader_num_workers": {"ge": 0},
    "dataloader_prefetch_factor": {"gt": 0},
    "ddp_bucket_cap_mb": {"gt": 0},
    "eval_delay": {"ge": 0},
}
"""Limits that torch keeps and TrainingArguments does not check."""


class TrainerField:
    """One field of TrainingArguments as its source tells it: types, default, choices, range and help."""

    def __init__(self, name: str, node: ast.AnnAssign) -> None:
        annotation = re.sub(r"Literal\[(True|False)\]", "bool", ast.unparse(node.annotation))
        words = {keyword.arg: keyword.value for keyword in node.value.keywords} if isinstance(node.value, ast.Call) else {}
        plain = re.sub(r"\[[^\]]*\]| ", "", annotation).split("|")
        self.types = tuple(kind for kind in _TYPES if kind in plain and not (kind == "str" and name.endswith("_kwargs")))
        self.default = _default(words, node.value)
        enums = [enum_values(word) for word in re.findall(r"\w+", annotation) if word in _classes()]
        listed = trackers() if name == "report_to" else _CHOICES.get(name, ())
        self.choices = listed or _metadata(words, "choices") or (enums[0] if enums else ())
        self.range = _RANGES.get(name, {})
        self.help = " ".join("".join(_metadata(words, "help")).split())

    def read(self, value: Any) -> Any:
        """The value as the trainer wants it; raises `ValueError` that says what it should be."""
        if self.choices and not (isinstance(value, bool) and "bool" in self.types):
            return self._read_choice(value)
        if not self.types:
            return value
        read: Any = next((found for kind in self.types if (found := _convert(kind, value)) is not None), None)
        if read is None:
            raise ValueError(f"should be {' or '.join(_WORDS[kind] for kind in self.types)}")
        for bound, limit in self.range.items():
            word, within = _BOUNDS[bound]
            if not within(read, limit):
                raise ValueError(f"should be {word} {limit:g}")
        return read

    def _read_choice(self, value: Any) -> Any:
        if value is False and "no" in self.choices:
            return "no"  # YAML reads an unquoted `no` as false
        several = "list" in self.types
        words = value.replace(",", " ").split() if several and isinstance(value, str) else [value]
        words = value if several and isinstance(value, list) else words
        if any(word not in self.choices for word in words):
            raise ValueError(one_of(next(word for word in words if word not in self.choices), self.choices))
        return words if several and len(words) != 1 else words[0]


def _default(words: dict[str | None, ast.expr], whole: ast.expr | None) -> Any:
    """What a field is where it is not given: a constant, or a name that its class sets."""
    found = words.get("default", None if words else whole)
    if isinstance(found, ast.Name):
        set_here = [node for node in ast.walk(_classes()["TrainingArguments"]) if isinstance(node, ast.Assign)]
        values = [node.value for node in set_here if ast.unparse(node.targets[0]) == found.id]
        found = values[-1] if values else None  # the last one is that of a torch as new as ours
    if "default_factory" in words:
        return []
    return ast.literal_eval(found) if found is not None else None


def _metadata(words: dict[str | None, ast.expr], key: str) -> tuple[str, ...]:
    """The texts that stand beside a field under `key`."""
    metadata = words.get("metadata")
    if not isinstance(metadata, ast.Dict):
        return ()
    pairs = zip(metadata.keys, metadata.values, strict=True)
    parts = [part for name, value in pairs if isinstance(name, ast.Constant) and name.value == key for part in ast.walk(value)]
    return tuple(part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str))


def _convert(kind: str, value: Any) -> Any:
    """The value as one of `_TYPES`, or None where it is none; a mapping may be written as JSON."""
    if isinstance(value, bool) and kind != "bool":
        return None
    try:
        adapter = TypeAdapter(_TYPES[kind], config=ConfigDict(coerce_numbers_to_str=True))
        return adapter.validate_python(json.loads(value) if kind == "dict" and isinstance(value, str) else value)
    except (ValidationError, json.JSONDecodeError):
        return None


def claim_trainer_keys(keys: Keys, complaints: list[Complaint]) -> dict[str, Any]:
    """Take out of `keys` what TrainingArguments knows, values checked as far as its source tells; an empty one means the default."""
    fields = trainer_fields()
    taken = {name: keys.pop(name) for name in list(keys) if name in fields}
    read = {}
    for name, entry in taken.items():
        if entry.value is None:
            continue
        try:
            read[name] = fields[name].read(entry.value)
        except ValueError as error:
            complaints.append(Complaint(f"{name!r} {error}, found {shown(entry.value)}", entry.source, [name]))
    return read


def training_arguments(
    loop: LoopOptions, rest: Mapping[str, Any], precision: "Precision", folder: Path, recompute: bool
) -> "TrainingArguments":
    """What Hugging Face's loop reads. Its batches are our whole steps, so it must not accumulate by itself."""
    import torch
    from transformers import TrainingArguments

    ours = {
        "overwrite_output_dir",
        "disable_shuffling",
        "train_sampling_strategy",
        "resume_from_checkpoint",
        "gradient_accumulation_steps",
        "warmup_ratio",
        "do_train",
        "do_eval",
        "disable_gradient_checkpointing",
        "gradient_checkpointing",
        "token_budget",
        "micro_batches_at_once",
        "on_nonfinite",
        "save_verify",
    }
    values = loop.model_dump(exclude=ours | PredictionOptions.model_fields.keys()) | dict(rest)
    values |= {
        "output_dir": str(folder),
        "gradient_accumulation_steps": 1,
        "warmup_steps": loop.warmup_steps or min(loop.warmup_ratio or 0, 1 - 1e-9),  # from 1 on it would be a number of steps
        "activation_checkpointing": recompute,
        "bf16": precision.autocast == torch.bfloat16,
        "fp16": precision.autocast == torch.float16,
        "use_cpu": bool(rest.get("use_cpu")) or not torch.cuda.is_available(),
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "logging_nan_inf_filter": False,
        "report_to": "none",  # see `finery.training.trackers`
        "ddp_backend": rest.get("ddp_backend") if "LOCAL_RANK" in os.environ else None,  # one process has nobody to talk to
        "ddp_find_unused_parameters": rest.get("ddp_find_unused_parameters") or False,
    }
    if loop.save_strategy == "best" or loop.load_best_model_at_end:
        values["metric_for_best_model"] = rest.get("metric_for_best_model") or BEST_BY
        values["greater_is_better"] = bool(rest.get("greater_is_better", not values["metric_for_best_model"].endswith("loss")))
    try:
        arguments = TrainingArguments(**values)
    except (ValueError, RuntimeError, ImportError) as error:  # what needs the device or a package to be known
        raise UserError(f"the trainer refuses these settings: {' '.join(str(error).split())}") from None
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several GPUs in one process would mean DataParallel
    return arguments


def visible_devices() -> int:
    """How many accelerators this process sees; `CUDA_VISIBLE_DEVICES` decides."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return 0
    import torch

    return torch.cuda.device_count()
