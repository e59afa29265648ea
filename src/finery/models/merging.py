"""What was trained, merged into the base's weights one layer at a time: a layer and a file of weights are all that is in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finery.compat import large_blocks_returned, quiet_transformers
from finery.errors import UserError
from finery.log import get_logger
from finery.models.adapters.base import Adapter
from finery.models.composite import auto_class
from finery.models.load import fit_vocabulary, has_own_code, read_model_config
from finery.models.loftq import held_in
from finery.models.new_tokens import begin_rows
from finery.models.peft_adapter import not_mergeable, open_adapter, read_config
from finery.models.quantized import own_quantization
from finery.models.shards import Shards, tensors_once, write_shards
from finery.models.trained import Trained, load_trained

log = get_logger(__name__)

Weights = dict[str, Tensor]


class Merged:
    """A whole model as an export is given it."""

    config: Any
    generation_config: Any

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight once, by the name that transformers saves it under."""
        raise NotImplementedError

    def save(self, folder: Path, shard_bytes: int) -> None:
        """Weights as safetensors of at most so many bytes a file, and the config."""
        raise NotImplementedError


def merged(found: Trained, adapter: Adapter, tokenizer: Any, trust_remote_code: bool, dtype: torch.dtype, device: torch.device) -> Merged:
    """The base with its adapters in it, in `dtype`, computed in fp32 on `device`; layer by layer where that is possible.

    Raises `UserError` for an adapter that does not fit or cannot be merged.
    """
    reason = _needs_whole(found, trust_remote_code)
    if not reason:
        layered = _Layered(found, tokenizer, trust_remote_code, dtype, device)
        reason = layered.unlike
        if not reason:
            return layered
    log.info("the whole model is held in memory for the merge: %s", reason)
    model = load_trained(found, adapter, tokenizer, trust_remote_code, dtype, device)
    return _Whole(model.to(dtype))


def _needs_whole(found: Trained, trust_remote_code: bool) -> str:
    """Why a model cannot be merged layer by layer; empty where it can."""
    if own_quantization(found.base) or held_in(found.adapters):
        return "its weights come in few bits"
    if trust_remote_code and has_own_code(found.base):
        return "it brings its own code"
    if not Shards.there(found.base):
        return "its weights are not saved as safetensors"
    return ""


@dataclass
class _Whole(Merged):
    """A model in memory."""

    model: Any

    @property
    def config(self) -> Any:  # type: ignore[override]
        return self.model.config

    @property
    def generation_config(self) -> Any:  # type: ignore[override]
        return self.model.generation_config

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        return tensors_once(self.model)

    def save(self, folder: Path, shard_bytes: int) -> None:
        self.model.config.use_cache = True  # training switches it off
        self.model.save_pretrained(str(folder), max_shard_size=shard_bytes)


class _Layered(Merged):
    """A model of which only the adapters are in memory; its own weights stay in their files until they are asked for."""

    def __init__(self, found: Trained, tokenizer: Any, trust_remote_code: bool, dtype: torch.dtype, device: torch.device) -> None:
        from transformers import GenerationConfig

        quiet_transformers()
        self.found, self.dtype, self.device = found, dtype, device
        self.shards = Shards(found.base)
        self.config = read_model_config(found.base, trust_remote_code, found.change)
        self.bare = self._skeleton(tokenizer=None)
        self.generation_config = self.bare.generation_config
        if (found.base / "generation_config.json").exists():
            self.generation_config = GenerationConfig.from_pretrained(str(found.base))
        self.tokenizer = tokenizer
        self.num_rows = int(self.bare.get_input_embeddings().weight.shape[0])

    @property
    def unlike(self) -> str:
        """Why the files do not hold the weights under the names that the model's code has for them; empty where they do."""
        known = dict(self.bare.state_dict(keep_vars=True))
        owners: dict[int, str] = {}
        for name, weight in known.items():
            owners.setdefault(id(weight), name)
        alone = {owners[id(weight)] for weight in known.values()}
        lacking, more = alone - self.shards.files.keys(), self.shards.files.keys() - alone
        if lacking or more:
            return f"{sorted(lacking or more)[0]} is {'not ' if lacking else ''}in its files{'' if lacking else ', but not in its code'}"
        return "" if all(_mergeable(folder) for folder in self.found.adapters) else "an adapter repeats layers"

    def _skeleton(self, tokenizer: Any) -> Any:
        """The model without weights; with `tokenizer`, with rows for all of its tokens."""
        model = bare_model(self.found.base, self.config)
        if tokenizer is not None:
            fit_vocabulary(model, tokenizer, resize=True)
        return model

    @cached_property
    def layers(self) -> Sequence[_Adapter]:
        """The adapters, each beside a model without weights."""
        bare = ((_hollow(self._skeleton(self.tokenizer)), folder) for folder in self.found.adapters)
        return [_Adapter(open_adapter(model, folder, is_light=_opens_light(folder)), folder) for model, folder in bare]

    @cached_property
    def groups(self) -> set[str]:
        """Paths of the modules that an adapter changes, none inside of another."""
        paths = {path for layer in self.layers for path in layer.units}
        return {path for path in paths if not any(path.startswith(f"{other}.") for other in paths)}

    @cached_property
    def _token_rows(self) -> dict[str, str]:
        """Weights with a row for every token, and the name under which the files hold each: tied ones have one."""
        known = dict(self.bare.state_dict(keep_vars=True))
        names = [name for name, weight in known.items() if any(weight is row for row in self._row_weights)]
        held = {id(known[name]): name for name in reversed(names)}
        return {name: held[id(known[name])] for name in names}

    @property
    def _row_weights(self) -> list[Any]:
        layers = (self.bare.get_input_embeddings(), self.bare.get_output_embeddings())
        return [layer.weight for layer in layers if layer is not None]

    @property
    def _num_grown(self) -> int:
        return -(-len(self.tokenizer) // 64) * 64  # as `fit_vocabulary` does

    def _read(self, name: str) -> Tensor:
        """A weight as the base has it, in fp32, grown where the tokenizer has more tokens than the model had."""
        weight = self.shards.tensor(self._token_rows.get(name, name))
        if not weight.is_floating_point():
            return weight
        weight = weight.to(self.device, torch.float32)
        if name in self._token_rows and len(self.tokenizer) > self.num_rows:
            weight = torch.cat([weight, weight.new_zeros(self._num_grown - self.num_rows, weight.shape[1])])
            begin_rows(weight, range(self.num_rows, len(self.tokenizer)), len(self.tokenizer))
        return weight

    def _group(self, path: str) -> Weights:
        """The weights of a module, with everything that was trained in them."""
        names = [name for name in {*self.shards.files, *self._token_rows} if name.startswith(f"{path}.")]
        weights = {name: self._read(name) for name in sorted(names)}
        for layer in self.layers:
            weights = layer.merge(path, weights)
        return weights

    @cached_property
    def parted(self) -> bool:
        """Whether embedding and head were one weight and are no more, since they were trained apart."""
        embed, *others = self._token_rows
        if not others or set(self._token_rows.values()) != {embed}:
            return False
        touched = [any(name.startswith(f"{path}.") for path in self.groups) for name in self._token_rows]
        if not any(touched):
            return False
        ends = [self._final(name) for name in self._token_rows]
        if all(torch.equal(ends[0], end) for end in ends[1:]):
            return False
        log.info("embedding and head were one weight, and were trained apart: they are saved as two")
        return True

    def _final(self, name: str) -> Tensor:
        path = next((path for path in self.groups if name.startswith(f"{path}.")), None)
        return self._read(name) if path is None else self._group(path)[name]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """See `Merged`; in the order of the files."""
        with large_blocks_returned():
            yield from self._tensors()

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        done: set[str] = set()
        ties = {name for name, held in self._token_rows.items() if name != held}
        for name in [*self.shards.files, *sorted(ties if self.parted else ())]:
            path = next((path for path in self.groups if name.startswith(f"{path}.")), None)
            if name in done:
                continue
            weights = self._group(path) if path else {name: self._read(name)}
            for each, weight in weights.items():
                done.add(each)
                if each not in ties or self.parted:
                    yield each, weight.to("cpu", self.dtype) if weight.is_floating_point() else weight

    def save(self, folder: Path, shard_bytes: int) -> None:
        """See `Merged`."""
        from copy import deepcopy

        write_shards(self.tensors(), folder, shard_bytes)
        config = deepcopy(self.config)
        text = config.get_text_config()
        config.architectures, config.dtype, config.use_cache = [type(self.bare).__name__], self.dtype, True
        if len(self.tokenizer) > self.num_rows:
            text.vocab_size = self._num_grown
        if self.parted:
            config.tie_word_embeddings = text.tie_word_embeddings = False
        config.save_pretrained(str(folder))
        self.generation_config.save_pretrained(str(folder))


def hollow_model(folder: Path) -> Any:
    """The model in `folder` without weights, for adapters to be put beside."""
    return _hollow(bare_model(folder))


def bare_model(folder: Path, config: Any = None) -> Any:
    """The model in `folder` without weights, on no device; `config` is its own where none is given."""
    quiet_transformers()
    with torch.device("meta"):
        model = auto_class(folder).from_config(config or read_model_config(folder, False, None), dtype=torch.float32)
    model.tie_weights()
    return model


def _hollow(model: Any) -> Any:
    """A model on no device, put on the CPU without taking memory: every weight is a single zero, seen as many.

    peft puts an adapter's weights on the device of the layer that they belong to, and none at all beside one without a device.
    """
    made: dict[int, nn.Parameter] = {}
    for name, weight in list(model.named_parameters(remove_duplicate=False)):
        path, _, own = name.rpartition(".")
        hollow = made.setdefault(id(weight), nn.Parameter(torch.zeros(1).expand(weight.shape), requires_grad=False))
        model.get_submodule(path)._parameters[own] = hollow
    return model


@dataclass
class _Adapter:
    """An adapter beside a model without weights."""

    model: Any  # peft's
    folder: Path
    units: Mapping[str, Any] = field(init=False)  # what it has put in place of the model's modules, by path; none inside of another

    def __post_init__(self) -> None:
        if not hasattr(self.model.base_model, "merge_and_unload"):
            raise not_mergeable(self.folder, "it changes no weights")
        found = {path: module for path, module in self.base.named_modules() if _is_unit(module)}
        self.units = {path: module for path, module in found.items() if not any(path.startswith(f"{other}.") for other in found)}

    @property
    def base(self) -> Any:
        """The model that peft's wraps."""
        return self.model.base_model.model

    def merge(self, group: str, weights: Weights) -> Weights:
        """`weights` of the module at `group`, with this adapter in those that it changes."""
        merged = dict(weights)
        for path, unit in self.units.items():
            if path == group or path.startswith(f"{group}."):
                inside = {name.removeprefix(f"{path}."): weight for name, weight in merged.items() if name.startswith(f"{path}.")}
                merged |= {f"{path}.{name}": weight for name, weight in self._unit(unit, inside).items()}
        return merged

    def _unit(self, unit: Any, weights: Weights) -> Weights:
        with torch.no_grad(), _holding(unit, weights):
            try:
                if hasattr(unit, "unload_and_optionally_merge_module"):
                    module = unit.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
                else:
                    unit.merge(safe_merge=False)
                    module = unit.get_base_layer()
            except (NotImplementedError, AttributeError, ValueError, TypeError) as error:
                raise not_mergeable(self.folder, error) from None
            return {name: module.state_dict()[name].clone() for name in weights}


def _is_unit(module: Any) -> bool:
    return hasattr(module, "unload_and_optionally_merge_module") or (hasattr(module, "base_layer") and hasattr(module, "merge"))


@contextmanager
def _holding(unit: Any, weights: Weights) -> Iterator[None]:
    """The unit's original module with its weights, for as long as they are needed."""
    device = next(iter(weights.values())).device
    original: Any = unit.get_base_layer() if hasattr(unit, "get_base_layer") else unit.original_module
    for name, weight in weights.items():
        _put(original, name, weight)
    for part in unit.parameters():
        if part.device != device:
            part.data = part.data.to(device)
    yield
    for name, weight in weights.items():
        _put(original, name, torch.zeros(1).expand(weight.shape))
    for layer in unit.modules():  # nothing of it may hold on to what it was merged with
        if getattr(layer, "merged_adapters", None):
            layer.merged_adapters = []


def _put(module: nn.Module, name: str, weight: Tensor) -> None:
    path, _, own = name.rpartition(".")
    holder = module.get_submodule(path)
    if own in holder._buffers:
        holder._buffers[own] = weight
    else:
        holder._parameters[own] = nn.Parameter(weight, requires_grad=False)


def _opens_light(folder: Path) -> bool:
    """Whether peft 0.21 can open an adapter without drawing its weights first: not where AdaLoRA has taken ranks away."""
    config = read_config(folder)
    return config.get("peft_type") != "ADALORA" or not config.get("rank_pattern")


def _mergeable(folder: Path) -> bool:
    """Whether an adapter leaves the model's layers as many as they were."""
    try:
        return not json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("layer_replication")
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} holds no adapter that can be read: {error}") from None
