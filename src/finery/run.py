"""Everything one run needs: each chosen part claims its own keys, the rest is the trainer's."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from finery.compat import is_on
from finery.data.load import DataOptions
from finery.data.packing import PackingOptions
from finery.data.registry import PACKAGED, default_folder
from finery.data.rows import ROWS
from finery.data.rows.base import RowOptions
from finery.data.template import TemplateOptions
from finery.engines import ENGINES
from finery.engines.base import Engine, EngineOptions, GenerationOptions
from finery.errors import Complaint, UserError, in_order, nearest, suggestion
from finery.exports import EXPORTS
from finery.exports.base import Export, ExportOptions
from finery.files import read_yaml
from finery.log import get_logger
from finery.methods import METHODS
from finery.methods.base import LearningOptions, Method
from finery.models.adapters import ADAPTERS
from finery.models.adapters.base import Adapter, AdapterOptions
from finery.models.kernels import KERNELS
from finery.models.load import ModelOptions
from finery.models.new_tokens import TokenOptions
from finery.models.quantizers import QUANTIZERS
from finery.models.quantizers.base import QuantizationOptions, Quantizer, Quantizing
from finery.options import Entry, Finding, Keys, OptionGroup, one_of
from finery.reader import read_keys
from finery.registry import Registry
from finery.training.arguments import RENAMED, LoopOptions, claim_trainer_keys, trainer_fields
from finery.training.callbacks import CALLBACKS
from finery.training.fp8 import Fp8Options
from finery.training.optimizers import OPTIMIZERS
from finery.training.optimizers.base import ADAMW, Optimizer
from finery.training.output import Line, is_secret

log = get_logger(__name__)


class Choices(OptionGroup):
    stage: str = "sft"
    """The training method."""
    finetuning_type: str = "lora"
    """What is trained: an adapter, some layers, or all."""
    quantization_method: str = "bnb"
    """How weights are held in the bits that quantization_bit asks for."""
    infer_backend: str = "huggingface"
    """The engine that generates text."""
    export_format: str | None = None
    """The form in which a model is exported; not given: safetensors, or gptq where export_quantization_bit is given."""


GROUPS: dict[str, type[OptionGroup]] = {
    "choices": Choices,
    "model": ModelOptions,
    "tokens": TokenOptions,
    "quantization": QuantizationOptions,
    "adapters": AdapterOptions,
    "data": DataOptions,
    "rows": RowOptions,
    "packing": PackingOptions,
    "template": TemplateOptions,
    "loop": LoopOptions,
    "learning": LearningOptions,
    "fp8": Fp8Options,
    "generation": GenerationOptions,
    "engines": EngineOptions,
    "export": ExportOptions,
}
"""Options that every run has; the parts' own come with the parts."""

ANSWERING = ("generation", "engines", "export")
"""Groups that training does not read; nor does it these keys of others."""
ANSWERING_KEYS = ("infer_backend", "export_format", "infer_dtype", "served_adapters")

PARTS: dict[str, tuple[Registry, str]] = {
    "method": (METHODS, "stage"),
    "adapter": (ADAPTERS, "finetuning_type"),
    "quantizer": (QUANTIZERS, "quantization_method"),
    "engine": (ENGINES, "infer_backend"),
    "form": (EXPORTS, "export_format"),
}
"""Parts that a key chooses."""

SWITCHED: dict[str, Registry] = {"kernel": KERNELS, "optimizer": OPTIMIZERS, "callback": CALLBACKS}
"""Parts of which each has a key that switches it on or off."""


@dataclass(frozen=True)
class Run:
    """What was chosen and set, checked; nothing has been loaded yet."""

    choices: Choices
    model: ModelOptions
    tokens: TokenOptions
    quantization: QuantizationOptions
    adapters: AdapterOptions
    data: DataOptions
    rows: RowOptions
    packing: PackingOptions
    template: TemplateOptions
    loop: LoopOptions
    learning: LearningOptions
    fp8: Fp8Options
    generation: GenerationOptions
    engines: EngineOptions
    export: ExportOptions
    method: Method
    adapter: Adapter
    quantizer: Quantizer
    engine: type[Engine]
    engine_options: OptionGroup
    form: Export
    switched: Mapping[str, Mapping[str, OptionGroup]]  # options of parts that are switched on or off: by kind, then by name
    trainer: Mapping[str, Any]  # what is handed to TrainingArguments as it is
    written: Mapping[str, Entry]  # the user's keys, each with its place

    @classmethod
    def read(cls, words: Iterable[str], *, trains: bool = False) -> "Run":
        """From a command line: a file, then overrides. Raises `UserError` with all complaints at once.

        Only where the run `trains` (or evaluates) must its data and its loop fit together: the same file serves chat
        and export, perhaps on a machine that has no data.
        """
        complaints: list[Complaint] = []
        return cls.from_keys(read_keys(words, complaints), complaints, trains=trains)

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any], *, trains: bool = False) -> "Run":
        """From Python; see `read`."""
        complaints: list[Complaint] = []
        return cls.from_keys(read_keys(mapping, complaints), complaints, trains=trains)

    @classmethod
    def from_keys(cls, written: Keys, unread: Iterable[Complaint] = (), *, trains: bool = False) -> "Run":
        """Let every chosen part claim its keys, then hear what the parts have to say about each other.

        `unread` is what the reader has to complain about. All complaints are told at once: keys with a fault have
        their defaults while the others are looked at.
        """
        complaints = list(unread)
        keys = _new_names(written, complaints)
        renamed = dict(keys)
        groups = {name: group.claim(keys, complaints) for name, group in GROUPS.items()}
        names = groups["choices"].model_dump()
        exports: Any = groups["export"]
        names["export_format"] = names["export_format"] or ("gptq" if exports.export_quantization_bit else "safetensors")
        chosen = {name: _choose(registry, names[key], key, keys, written, complaints) for name, (registry, key) in PARTS.items()}
        parts = {"quantizer": chosen["quantizer"][0](chosen["quantizer"][1])}
        parts["method"] = chosen["method"][0](chosen["method"][1], groups["learning"])
        parts["adapter"] = chosen["adapter"][0](chosen["adapter"][1], groups["adapters"])
        parts["form"] = chosen["form"][0](chosen["form"][1], groups["export"])
        parts["engine"], parts["engine_options"] = chosen["engine"]  # an engine is built when its model is there
        switched = {
            kind: {name: registry[name].Options.claim(keys, complaints) for name in registry.names()} for kind, registry in SWITCHED.items()
        }
        _answer_listed(keys, complaints)  # before the trainer takes what it would not honour here
        trainer = claim_trainer_keys(keys, complaints)
        _answer_rest(keys, complaints)
        run = cls(**groups, **parts, switched=switched, trainer=trainer, written=renamed)  # type: ignore[arg-type]
        UserError.raise_any(in_order(run._check(complaints, trains)))
        return run

    def source(self, key: str) -> str:
        """Where a key was written; `default` where it was not."""
        return self.written[key].source if key in self.written else "default"

    @property
    def folder(self) -> Path:
        """`output_dir`; raises `UserError` where it is not given."""
        if self.loop.output_dir is None:
            raise UserError("'output_dir' is needed and was not given: the folder for everything that the run writes")
        return Path(self.loop.output_dir)

    @property
    def quantizing(self) -> Quantizing | None:
        """What `quantization_bit` asks for; nothing where weights stay as they are."""
        bits = self.quantization.quantization_bit
        return Quantizing(self.quantizer, bits, self.quantization.quantization_device_map) if bits else None

    @property
    def switched_on(self) -> list[Optimizer]:
        """The optimizer that a key has switched on, if any; more than one is a contradiction, which they find themselves."""
        parts = [OPTIMIZERS[name](options) for name, options in self.switched["optimizer"].items()]
        return [part for part in parts if part.serves(self)]

    @property
    def steps_plainly(self) -> bool:
        """Whether the optimizer is torch's own, which needs none of the packages that hold weights in few bits."""
        return not self.switched_on and str(self.trainer.get("optim", "")) in ("", *ADAMW)

    def asked(self) -> dict[str, Any]:
        """What this run's training was asked for, by key; secrets are left out."""
        parts = [self.method.options, self.adapter.options, self.quantizer.options]
        parts += [options for switched in self.switched.values() for options in switched.values()]
        values = _values([*(getattr(self, name) for name in GROUPS if name not in ANSWERING), *parts]) | dict(self.trainer)
        values["packing"] = self.packing.packs(ROWS[self.method.rows].answers)  # what it comes to where it is not given
        return {key: value for key, value in values.items() if not is_secret(key) and key not in ANSWERING_KEYS}

    def resolved(self, decided: Mapping[str, tuple[Any, str]]) -> Iterator[Line]:
        """Every key that this run reads, with the value that counts: `decided` holds what the run settled, and why."""
        groups = [getattr(self, name) for name in GROUPS] + [
            self.method.options,
            self.adapter.options,
            self.quantizer.options,
            self.engine_options,
            self.form.options,
            *(options for parts in self.switched.values() for options in parts.values()),
        ]
        values = _values(groups) | dict(self.trainer)
        if self.source("dataset_dir") == "default" and default_folder(str(self.data.dataset_dir)) == PACKAGED:
            decided = {**decided, "dataset_dir": (str(PACKAGED), "there is no folder data: the packaged sets")}
        for key, value in values.items():
            source = self.source(key)
            if key in decided:
                settled, why = decided[key]
                said = f"; {source} said {json.dumps(value)}" if source != "default" else ""
                yield Line(key, settled, f"decided: {why}{said}")
            elif value is not None or source != "default":
                yield Line(key, value, source)

    def _findings(self, trains: bool) -> Iterator[Finding]:
        always = [
            self.model,
            self.tokens,
            self.quantization,
            self.template,
            self.generation,
            self.export,
            self.form,
            self.adapter,
            self.engine_options,
        ]
        switched = [SWITCHED[kind][name](options) for kind, parts in self.switched.items() for name, options in parts.items()]
        if trains:
            yield from self.quantization.check_training(self)
        for checked in [
            *always,
            *([self.data, self.rows, self.packing, self.loop, self.learning, self.fp8, self.method, *switched] if trains else []),
        ]:
            yield from checked.check(self)

    def _check(self, complaints: list[Complaint], trains: bool) -> list[Complaint]:
        """`complaints` with those about keys that do not fit together; what only follows from a fault is left out."""
        told = {key for complaint in complaints if not complaint.follows for key in complaint.about}
        told |= {name for name, entry in self.written.items() if entry.faulty}
        complaints = [complaint for complaint in complaints if not (complaint.follows and complaint.about & told)]
        told |= {key for complaint in complaints for key in complaint.about}
        for finding in self._findings(trains):
            complaint = Complaint(f"{finding.key!r} {finding.text}", self.source(finding.key).removeprefix("default"))
            if finding.fatal and not finding.keys & told:
                complaints.append(complaint)
            elif not finding.fatal and not complaints:
                log.warning(complaint)
        return complaints


def _values(groups: Iterable[OptionGroup]) -> dict[str, Any]:
    return {key: value for group in groups for key, value in group.model_dump(mode="json").items()}


def _choose(registry: Registry, name: str, key: str, keys: Keys, written: Keys, complaints: list[Complaint]) -> tuple[Any, OptionGroup]:
    """The part that `key` names, and its options with its own keys claimed.

    For a name that there is not, the nearest or else the default stands in, so that the other keys can be looked at.
    """
    names = registry.names()
    if name not in names:
        source = written[key].source
        if name in not_yet()["choices"].get(key, []):
            complaints.append(Complaint(f"{key!r} {name!r} is not built yet; there are: {', '.join(names)}", source, [key]))
        else:
            complaints.append(Complaint(f"{key!r} {one_of(name, names)}, found {name!r}", source, [key]))
        name = nearest(name, names) or Choices.model_fields[key].default or "safetensors"
    part = registry[name]
    return part, part.Options.claim(keys, complaints)


def _new_names(written: Keys, complaints: list[Complaint]) -> Keys:
    """Old names made new; both at once is a contradiction."""
    keys: Keys = {}
    for name, entry in written.items():
        new = RENAMED.get(name, name)
        if new != name and new in written:
            text = f"{name!r} is an old name of {new!r}, given at {written[new].source}; keep one"
            complaints.append(Complaint(text, entry.source, [name, new]))
        else:
            keys[new] = entry
    return keys


# ------------------------------------------------------------------ keys that nobody claimed

_FOLDER = Path(__file__).parent


@cache
def not_yet() -> dict[str, Any]:
    """What the reference has and we have not yet: `keys` (with the default that is harmless), `choices`, `commands`."""
    return read_yaml(_FOLDER / "not_yet.yaml")


@cache
def never() -> dict[str, dict[str, Any]]:
    """Keys that will not come: the default that asks for nothing, what to do instead, and whether any value is `harmless`."""
    return read_yaml(_FOLDER / "never.yaml")


@cache
def owners() -> dict[str, str]:
    """Keys of every part there is, by key: `adapter 'freeze'`."""
    found = {}
    for kind, (registry, _) in PARTS.items():
        for name in registry.names():
            found |= dict.fromkeys(registry[name].Options.model_fields, f"{kind} {name!r}")
    return found


@cache
def all_options() -> dict[str, type[OptionGroup]]:
    """Every group of options there is, by the name that a reader knows it by."""
    groups = dict(GROUPS)
    for kind, (registry, _) in PARTS.items():
        groups |= {f"{kind} {name}": registry[name].Options for name in registry.names()}
    switched = [(kind, registry, name) for kind, registry in SWITCHED.items() for name in registry.names()]
    return groups | {f"{kind} {name}": registry[name].Options for kind, registry, name in switched}


@cache
def own_keys() -> set[str]:
    """Every key that a part of ours claims."""
    return {key for group in all_options().values() for key in group.model_fields}


def _answer_listed(keys: Keys, complaints: list[Complaint]) -> None:
    """Take out what is not built yet or will never come, and say so of every value that asks for something."""
    listed = not_yet()["keys"] | {name: line["default"] for name, line in never().items()}
    for name in [name for name in keys if name in listed]:
        entry = keys.pop(name)
        if _asks_nothing(entry.value, listed[name]):
            continue
        if name not in never():
            complaints.append(Complaint(f"{name!r} is not built yet; leave it out", entry.source, [name]))
        elif never()[name].get("harmless"):
            log.warning("%s: %r has no effect: %s", entry.source, name, never()[name]["instead"])
        else:
            complaints.append(Complaint(f"{name!r} will not come: {never()[name]['instead']}", entry.source, [name]))


def _answer_rest(keys: Keys, complaints: list[Complaint]) -> None:
    """Say of every key left what it is: another part's, or nobody's."""
    for name, entry in keys.items():
        if name in owners():
            log.warning("%s: %r belongs to %s, which this run does not use", entry.source, name, owners()[name])
        elif is_on("ALLOW_EXTRA_ARGS"):
            log.warning("%s: no such key: %r; ignored, as ALLOW_EXTRA_ARGS asks", entry.source, name)
        else:
            known = own_keys() | trainer_fields().keys() | RENAMED.keys() | not_yet()["keys"].keys() | never().keys()
            meant = nearest(name, sorted(known))
            complaints.append(
                Complaint(f"no such key: {name!r}{suggestion(name, known)}", entry.source, [name, *([meant] if meant else [])])
            )


def _asks_nothing(value: Any, default: Any) -> bool:
    """Whether a value is empty, or what happens anyway; `false` is nothing where nothing is the default."""
    if value is None or value == default or (default is None and value is False):
        return True
    return isinstance(default, bool) and str(value).lower() == str(default).lower()
