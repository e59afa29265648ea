"""LoRA: low-rank updates beside frozen weights."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from finery.log import get_logger
from finery.models.composite import LANGUAGE, Parts
from finery.models.loftq import starts_from_rounding
from finery.models.new_tokens import token_layers
from finery.models.peft_adapter import PeftAdapter, any_transposed, expanded_layers, is_called, named, targets
from finery.models.pissa import begins_with_main_parts
from finery.options import CommaList, Finding, OptionGroup

__all__ = ["LoRA"]

log = get_logger(__name__)


class LoRA(PeftAdapter):
    """Adapters in peft's format (Hu et al., 2021, arXiv 2106.09685): W + alpha / rank · B·A."""

    has_two_matrices = True
    shares = PeftAdapter.shares | {"freeze_trainable_layers", "use_llama_pro"}
    shown = {
        "lora_rank": "r",
        "lora_alpha": "lora_alpha",
        "lora_dropout": "lora_dropout",
        "lora_target": "target_modules",
        "use_rslora": "use_rslora",
        "use_dora": "use_dora",
    }

    class Options(OptionGroup):
        lora_rank: int = Field(8, gt=0)
        """Rank of the update."""
        lora_alpha: int | None = Field(None, ge=0)
        """Scale of the update; twice the rank where it is not given, or 0."""
        lora_dropout: float = Field(0.0, ge=0, lt=1)
        """Dropout before the update."""
        lora_target: CommaList = Field(("all",), min_length=1)
        """Which linear layers get an adapter: names, or one regular expression for whole paths; all of them but the head by default."""
        lora_rank_pattern: dict[str, int] = Field({}, json_schema_extra={"additionalProperties": {"type": "integer"}})
        """Other ranks for layers whose path matches: {"layers.0.*q_proj": 16}."""
        lora_alpha_pattern: dict[str, float] = Field({}, json_schema_extra={"additionalProperties": {"type": "number"}})
        """Other scales for layers whose path matches."""
        lora_target_parameters: CommaList = ()
        """Weights that are no layers of their own, such as mlp.experts.gate_up_proj of fused experts."""
        use_rslora: bool = False
        """Scale by alpha over the root of the rank (rank-stabilised LoRA; Kalajdzievski, 2023, arXiv 2312.03732)."""
        use_dora: bool = False
        """Train the length of every row apart from its direction (DoRA; Liu et al., 2024, arXiv 2402.09353)."""
        pissa_init: bool = False
        """Start from the main singular parts of the weights (PiSSA; Meng et al., 2024, arXiv 2404.02948)."""
        pissa_iter: int = Field(16, ge=-1)
        """Iterations of the fast decomposition for pissa_init; -1: an exact one."""
        pissa_convert: bool = False
        """Save the start and the trained pair of pissa_init as well, in pissa_init, pissa_backup and pissa_converted."""
        loftq_init: bool = False
        """Start from the main parts of what quantization_bit rounded off (LoftQ; Li et al., 2023, arXiv 2310.08659)."""

    options: Options

    @property
    def alpha(self) -> int:
        """`lora_alpha`, or twice the rank."""
        return self.options.lora_alpha or 2 * self.options.lora_rank

    def decided(self) -> Mapping[str, tuple[Any, str]]:
        """Alpha follows from the rank."""
        return {} if self.options.lora_alpha else {"lora_alpha": (self.alpha, "twice lora_rank")}

    def check(self, run: Any) -> Iterator[Finding]:
        """Starts that exclude each other, or need weights in few bits, or plain ones."""
        yield from super().check(run)
        bits, options = run.quantization.quantization_bit, self.options
        if options.pissa_init and bits:
            yield Finding("pissa_init", "needs plain weights: leave out 'quantization_bit', or take 'loftq_init', which is for few bits")
        if options.use_dora and bits and not run.quantizer.shows_lengths(bits):
            found = f"found {run.choices.quantization_method!r} with {bits} bits"
            yield Finding(
                "use_dora", f"needs weights whose lengths can be read: set 'quantization_bit' or 'quantization_method' otherwise, {found}"
            )
        if options.pissa_init and options.use_dora:
            yield Finding("pissa_init", "and 'use_dora' exclude each other: keep one")
        if options.loftq_init and not bits and run.loop.do_train:
            yield Finding("loftq_init", "starts from what few bits round off: set 'quantization_bit'")
        if options.pissa_convert and not options.pissa_init:
            yield Finding("pissa_convert", "has no effect without 'pissa_init'", fatal=False)
        if (options.pissa_init or options.loftq_init) and self.goes_on(run.model.adapter_name_or_path):
            key = "pissa_init" if options.pissa_init else "loftq_init"
            yield Finding(key, "has no effect on an adapter that is gone on with ('adapter_name_or_path')", fatal=False)

    def config(self, model: Any, parts: Parts, new_tokens: range) -> Any:
        """As the keys say; of a model that was expanded, only the added layers."""
        from peft import LoraConfig

        options = self.options
        layers = expanded_layers(model, self.shared.freeze_trainable_layers) if self.shared.use_llama_pro else None
        chosen = targets(model, "lora_target", options.lora_target, parts, layers)
        _tell_experts(model, options.lora_target_parameters)
        return LoraConfig(
            r=options.lora_rank,
            lora_alpha=self.alpha,
            lora_dropout=options.lora_dropout,
            target_modules=chosen,
            target_parameters=_parameters(model, options.lora_target_parameters, parts) or None,
            rank_pattern=dict(options.lora_rank_pattern),
            alpha_pattern=dict(options.lora_alpha_pattern),  # type: ignore[arg-type]
            use_rslora=options.use_rslora,
            use_dora=options.use_dora,
            fan_in_fan_out=any_transposed(model, chosen),
            modules_to_save=self.additional(model, parts) or None,
            trainable_token_indices=self._new_rows(model, parts, new_tokens),
            ensure_weight_tying=self._trains_tied(model),
            task_type="CAUSAL_LM",
        )

    def apply(self, model: Any, folders: Sequence[Path] = (), new_tokens: range = range(0)) -> Any:
        """See `PeftAdapter.apply`; a fresh adapter starts where the keys say."""
        made = super().apply(model, folders, new_tokens)
        fresh = not self.goes_on(folders)
        if fresh and self.options.pissa_init:
            begins_with_main_parts(made, self.options.pissa_iter, self.options.pissa_convert)
        if fresh and self.options.loftq_init:
            starts_from_rounding(made)
        return made

    def _new_rows(self, model: Any, parts: Parts, new_tokens: range) -> dict[str, list[int]] | None:
        """Train just the new tokens' rows, in the head too where it has rows of its own; not where they are trained whole, or frozen."""
        paths = [path for path in _embeddings(model) if path.rpartition(".")[2] not in self._whole]
        rows = {path if parts.is_composite else path.rpartition(".")[2]: list(new_tokens) for path in sorted(paths)}
        trained = new_tokens and LANGUAGE not in parts.frozen and not self._trains_tied(model)
        return rows if rows and trained else None

    def _trains_tied(self, model: Any) -> bool:
        """Whether the embedding is trained whole while it is the head as well: the two must stay one."""
        layers = [model.get_output_embeddings(), model.get_input_embeddings()]
        tied = layers[0] is not None and layers[0].weight is layers[1].weight
        return tied and any(module in layers for name, module in named(model) if name in self._whole)

    @property
    def _whole(self) -> set[str]:
        """The last names of `additional_target`."""
        return {name.rpartition(".")[2] for name in self.shared.additional_target}


def _tell_experts(model: Any, asked: Sequence[str]) -> None:
    """Say that experts whose weights are one block are no linear layers, which `lora_target` means."""
    blocks = [name for name, weight in model.named_parameters() if weight.ndim == 3 and ".experts." in name]
    fused = sorted({name.rpartition(".experts.")[2] for name in blocks})
    if fused and not asked:
        told = ", ".join(f"mlp.experts.{name}" for name in fused)
        log.warning("the experts' weights (%s) get no adapter: 'lora_target_parameters: %s' would give them one", ", ".join(fused), told)


def _parameters(model: Any, asked: Sequence[str], parts: Parts) -> list[str]:
    """`lora_target_parameters`, of composite models by whole paths; what no weight is called is peft's to tell."""
    if not parts.is_composite:
        return list(asked)
    called = {name: [path for path, _ in model.named_parameters() if is_called(path, name)] for name in asked}
    return sorted({path for name, found in called.items() for path in parts.opened(found, "lora_target_parameters", name) or [name]})


def _embeddings(model: Any) -> list[str]:
    """The paths of the modules that hold a row for every token."""
    layers = token_layers(model)
    return [path for path, module in model.named_modules() if module in layers]
