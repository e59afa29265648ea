"""A name becomes a model: folder, config, weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from finery.compat import quiet_transformers
from finery.errors import UserError
from finery.hub import HUBS, Hub, UnknownName, active_hub, fetch, folder_of, is_local, is_path
from finery.log import get_logger
from finery.models.composite import auto_class
from finery.models.gguf import gguf_of, plain_folder
from finery.models.listed import did_you_mean, hub_id
from finery.models.new_tokens import TokenOptions, start_rows
from finery.models.quantized import opening, settle
from finery.models.quantizers.base import Quantizing
from finery.models.rope import Kind
from finery.models.shards import Shards
from finery.options import CommaList, Finding, OptionGroup

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

log = get_logger(__name__)


class ModelOptions(OptionGroup):
    model_name_or_path: str
    """The base model: a folder, a name on the hub, or one that `finery options models` lists."""
    adapter_name_or_path: CommaList = ()
    """Adapters to start from: all but the last are merged, the last is trained on (or all are merged)."""
    adapter_folder: str | None = None
    """The folder inside of each adapter's that holds it."""
    served_adapters: dict[str, str] = {}
    """Adapters beside the model, by the names with which requests to `finery api` choose them as their 'model': {poet: saves/poet}."""
    cache_dir: str | None = None
    """Where downloads are kept."""
    model_revision: str = "main"
    """Branch, tag or commit on the hub."""
    hf_hub_token: str | None = None
    """Access token for Hugging Face."""
    ms_hub_token: str | None = None
    """Access token for ModelScope."""
    om_hub_token: str | None = None
    """Access token for openMind (Modelers)."""
    trust_remote_code: bool = False
    """Run code that comes with the model. Off: such a model is refused."""
    resize_vocab: bool = False
    """Let the embeddings grow where the tokenizer knows more tokens than the model."""
    upcast_layernorm: bool = False
    """Keep normalisation weights in fp32."""
    pure_bf16: bool = False
    """Train with bf16 weights throughout, without fp32 copies."""
    rope_scaling: Kind | None = None
    """Scale rotary positions for rows longer than the model was made for, by the smallest whole factor with which cutoff_len fits; chat and
    export take the factor that was trained with, or 2 for a model that no run has trained."""
    train_from_scratch: bool = False
    """Begin with random weights, drawn by 'seed': of the model only the config and the tokenizer are read."""
    use_reentrant_gc: bool | None = None
    """Recompute activations by torch's older, re-entrant way, one micro-batch at a time; not given, by the newer, with the same result."""
    print_param_status: bool = False
    """List every weight with shape, number format, device and whether it is trained."""
    infer_dtype: Literal["auto", "float16", "bfloat16", "float32"] = "auto"
    """Number format in chat and of exported weights; auto: the model's own where the device computes it."""

    @property
    def recomputation(self) -> dict[str, bool]:
        """What `use_reentrant_gc` asks of torch."""
        return {} if self.use_reentrant_gc is None else {"use_reentrant": self.use_reentrant_gc}

    @property
    def download(self) -> dict[str, Any]:
        """What `finery.hub.fetch` needs to know."""
        return {"cache_dir": self.cache_dir, "tokens": {"hf": self.hf_hub_token, "ms": self.ms_hub_token, "om": self.om_hub_token}}

    def check(self, run: Any) -> Iterator[Finding]:
        """Only an adapter method can take adapters; folders that are named must be there."""
        if self.adapter_name_or_path and not run.adapter.takes_adapters:
            yield Finding(
                "adapter_name_or_path", f"needs a 'finetuning_type' that goes on with adapters, found {run.choices.finetuning_type!r}"
            )
        if (folder_of(self.model_name_or_path) / "adapter_config.json").exists():
            text = f"names {self.model_name_or_path}, which holds an adapter; give it as 'adapter_name_or_path', and here the base model"
            yield Finding("model_name_or_path", text)
        else:
            yield from _check_model(self.model_name_or_path)
        needed = f"{self.adapter_folder}/adapter_config.json" if self.adapter_folder else "adapter_config.json"
        for name in self.adapter_name_or_path:
            yield from _check_folder("adapter_name_or_path", name, (needed,))
        for name in self.served_adapters.values():
            yield from _check_folder("served_adapters", name, (needed,))
        yield from self._check_start(run)

    def _check_start(self, run: Any) -> Iterator[Finding]:
        """Random weights must be saved; threads cannot share a re-entrant backward pass."""
        if self.train_from_scratch and run.adapter.takes_adapters:
            text = f"needs all weights to be saved: set 'finetuning_type' to full, found {run.choices.finetuning_type!r}"
            yield Finding("train_from_scratch", text)
        if self.train_from_scratch and run.quantization.quantization_bit:
            yield Finding("train_from_scratch", "and 'quantization_bit' exclude each other: keep one")
        if self.use_reentrant_gc and (run.loop.micro_batches_at_once or 1) > 1:
            yield Finding("use_reentrant_gc", "works on one micro-batch: set 'micro_batches_at_once' to 1, or leave one out")
        given = (run.trainer.get("activation_checkpointing_kwargs") or {}).get("use_reentrant", self.use_reentrant_gc)
        if self.use_reentrant_gc is not None and given != self.use_reentrant_gc:
            yield Finding("use_reentrant_gc", "and 'activation_checkpointing_kwargs' say different things: keep one")


def _check_model(name: str) -> Iterator[Finding]:
    """A folder, a GGUF file, or a name that the hub in use has."""
    try:
        if gguf_of(name):
            return
    except UserError as error:
        yield Finding("model_name_or_path", str(error).partition(": ")[2])
        return
    yield from _check_folder("model_name_or_path", name, ("config.json",))
    yield from _check_listed(name)


def _check_folder(key: str, name: str, needed: Sequence[str]) -> Iterator[Finding]:
    """What is wrong with a name, as far as the disk tells: one that looks like a path is never asked of a hub."""
    folder = folder_of(name)
    if not name.strip() or is_path(name):
        try:
            folder = fetch(name, kind="model")
        except UserError as error:
            yield Finding(key, f"cannot be used: {error}")
            return
    if folder.is_dir() and not any((folder / file).exists() for file in needed):
        yield Finding(key, f"names {folder}, which holds no {' or '.join(needed)}")


def _check_listed(name: str) -> Iterator[Finding]:
    """Whether the hub in use is known to have a listed model."""
    if not is_local(name):
        try:
            hub_id(name, active_hub())
        except UserError as error:
            yield Finding("model_name_or_path", f"cannot be used: {error}")


def locate_model(options: ModelOptions) -> Path:
    """The base model's folder, downloaded where needed; a listed name is looked up, unless a folder is called so."""
    name, hub = options.model_name_or_path, active_hub()
    if file := gguf_of(name):
        return plain_folder(file)
    try:
        return fetch(name if is_local(name) else _listed_id(name, hub), kind="model", revision=options.model_revision, **options.download)
    except UnknownName as error:
        raise UserError(f"{error}{did_you_mean(name, hub)}") from None


@cache  # so that it is said once
def _listed_id(name: str, hub: Hub) -> str:
    found = hub_id(name, hub)
    if found != name:
        log.info("%s is %s on %s", name, found, HUBS[hub].title)
    return found


def locate_adapters(options: ModelOptions) -> list[Path]:
    """The folders of `adapter_name_or_path`, each checked to hold an adapter."""
    return [_locate_adapter(options, name, "adapter_name_or_path") for name in options.adapter_name_or_path]


def locate_served(options: ModelOptions) -> dict[str, Path]:
    """The folders of `served_adapters`, by name, each checked to hold an adapter."""
    return {name: _locate_adapter(options, folder, "served_adapters") for name, folder in options.served_adapters.items()}


def _locate_adapter(options: ModelOptions, name: str, key: str) -> Path:
    found = fetch(name, kind="model", **options.download)
    folder = found / options.adapter_folder if options.adapter_folder else found
    if not (folder / "adapter_config.json").exists():
        raise UserError(f"{key!r}: {folder} holds no adapter (no adapter_config.json)")
    return folder


def load_model(
    folder: Path,
    dtype: torch.dtype,
    trust_remote_code: bool,
    asked: Quantizing | None = None,
    device: torch.device | None = None,
    change: Callable[[Any], None] | None = None,
    from_scratch: bool = False,
) -> Any:
    """A causal language model with weights of one `dtype`, on the CPU; raises `UserError`, also where a weight is not there.

    One that sees or hears comes with all of its parts.
    Where it comes quantised, or is to be (`asked`), its linear layers hold their weights in few bits, on `device`. `change` is made to
    the config before; `from_scratch`, weights are drawn by torch's dice and not read.
    """
    import torch

    quiet_transformers()
    from safetensors import SafetensorError

    if from_scratch:
        return _random_model(read_model_config(folder, trust_remote_code, change), folder, dtype, trust_remote_code)
    device = device or torch.device("cpu")
    way = opening(folder, asked, dtype, device)
    how: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code, **(way.arguments if way else {})}
    if change:
        how["config"] = read_model_config(folder, trust_remote_code, change)
    if way and way.bits is None:
        model = way.quantizer.read(folder, how.get("config") or read_model_config(folder, trust_remote_code, None), dtype, device)
        if model is not None:
            return settle(model, way, dtype, device)
    try:
        loaded: Any = auto_class(folder).from_pretrained(str(folder), **how, output_loading_info=True, ignore_mismatched_sizes=True)
    except SafetensorError as error:
        if Shards.there(folder):
            _ = Shards(folder).files  # names the one that is damaged
        raise not_loaded(folder, "causal language model", error) from None
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise not_loaded(folder, "causal language model", error) from None
    model, found = loaded
    # transformers would fill such weights with random numbers
    if lacking := sorted({*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])}):
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        raise UserError(f"{folder} holds no weights that fit its config.json for {lacking[0]}{more}")
    return settle(model, way, dtype, device) if way else model


def read_model_config(folder: Path, trust_remote_code: bool, change: Callable[[Any], None] | None) -> Any:
    """A model's config, with `change` made to it; raises `UserError`."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise not_loaded(folder, "model", error) from None
    if change:
        change(config)
    return config


def has_own_code(folder: Path) -> bool:
    """Whether a model brings Python files that compute it."""
    import json

    try:
        return bool(json.loads((folder / "config.json").read_text(encoding="utf-8")).get("auto_map"))
    except (OSError, ValueError):  # told where the model is loaded
        return False


def _random_model(config: Any, folder: Path, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    from transformers import GenerationConfig

    try:
        model = auto_class(folder).from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise not_loaded(folder, "causal language model", error) from None
    if (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(str(folder))
    log.info("'train_from_scratch': %s with random weights", type(model).__name__)
    return model.eval()


def not_loaded(folder: Path, what: str, error: Exception) -> UserError:
    """What to tell of a folder that transformers cannot load."""
    if "trust_remote_code" in str(error):
        return UserError(f"{folder} brings its own code; set 'trust_remote_code: true' if you trust it")
    return UserError(f"{folder} holds no {what} that can be loaded: {(str(error) or type(error).__name__).splitlines()[0]}")


def own_dtype(folder: Path, trust_remote_code: bool) -> torch.dtype:
    """The number format that a model's weights are saved in; fp32 where its config does not say."""
    import torch
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise not_loaded(folder, "model", error) from None
    found = config.dtype or config.get_text_config().dtype
    found = getattr(torch, found) if isinstance(found, str) else found
    return found if isinstance(found, torch.dtype) else torch.float32


def fit_vocabulary(
    model: Any, tokenizer: PreTrainedTokenizerBase, resize: bool, num_known: int | None = None, asked: TokenOptions | None = None
) -> range:
    """Let embeddings grow for tokens that they have no row for; returns the ids that are new to the model.

    They grow to a multiple of 64. Without `resize` they do so only since an id without a row could not be trained at all, and that is
    said. New are also tokens above the first `num_known`, whose rows a model may have to spare: nothing has trained them.
    """
    num_rows = int(model.get_input_embeddings().weight.shape[0])
    new = range(num_rows if num_known is None else min(num_rows, num_known), len(tokenizer))
    if len(tokenizer) > num_rows:
        if not resize and not (asked and (asked.add_tokens or asked.special)):
            num_lacking = len(tokenizer) - num_rows
            log.warning(
                "the tokenizer has %d tokens that the model has no row for: the embeddings grow ('resize_vocab: true')", num_lacking
            )
        model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64, mean_resizing=False)
    if new:
        start_rows(model, tokenizer, new, max(new.stop, num_rows), asked)
    return new


def upcast_norms(model: torch.nn.Module) -> None:
    """Hold normalisation weights in fp32, and compute with them there: modules with nothing but vectors whose name says norm or ln."""
    import torch

    for path, module in model.named_modules():
        own = dict(module.named_parameters(path, recurse=False))
        if own and all(weight.ndim == 1 and ("norm" in name or "ln" in name) for name, weight in own.items()):
            if any(weight.dtype != torch.float32 for weight in own.values()):
                _compute_in_fp32(module)
            for weight in own.values():
                weight.data = weight.data.float()


def _compute_in_fp32(norm: torch.nn.Module) -> None:
    """What comes out keeps the format of what went in: the next layer has no weights in fp32."""
    forward = norm.forward

    def upcast(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return forward(hidden.float(), *args, **kwargs).to(hidden.dtype)

    norm.forward = upcast
