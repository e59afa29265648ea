"""Any other method of the package peft, by its own name and keys."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any, get_args, get_type_hints

from pydantic import Field

from finery.errors import UserError, suggestion
from finery.models.composite import Parts
from finery.models.peft_adapter import PeftAdapter, any_transposed, targets
from finery.options import Finding, OptionGroup, one_of, shown

__all__ = ["Peft"]

OURS = frozenset({"task_type", "peft_type", "base_model_name_or_path", "inference_mode", "revision", "auto_mapping", "peft_version"})
"""What the run settles by itself."""
NO_LINEAR_LAYERS = frozenset({"ln_tuning"})
"""Methods that train other modules, which peft knows for each family of models."""
BEGIN_AT_THE_MODEL: dict[str, dict[str, Any]] = {"fourierft": {"init_weights": True}, "c3a": {"init_weights": True}}
"""Methods that would otherwise begin with another model than the one that is given, and what keeps them from it."""


class Peft(PeftAdapter):
    """`peft_type` names the method, `peft_config` holds its keys, checked against peft's own config class."""

    class Options(OptionGroup):
        peft_type: str = "lora"
        """The method: vera, ia3, adalora, boft, loha, lokr, hra, randlora, fourierft, …"""
        peft_config: dict[str, Any] = Field({}, json_schema_extra={"additionalProperties": True})
        """Its keys, as peft calls them: {r: 8, target_modules: [q_proj, v_proj]}."""

    options: Options

    def check(self, run: Any) -> Iterator[Finding]:
        """The method is one that peft has and that learns weights; its keys are known, and of the right types."""
        yield from super().check(run)
        methods = weight_methods()
        name = self.options.peft_type.lower()
        if name not in methods:
            yield Finding("peft_type", f"{one_of(name, sorted(methods))}, found {self.options.peft_type!r}")
        else:
            yield from _check_keys(methods[name], self.options.peft_config)

    def config(self, model: Any, parts: Parts, new_tokens: range) -> Any:
        """peft's own config; layers are all linear ones where the method needs some and none are named."""
        name = self.options.peft_type.lower()
        kind = weight_methods()[name]
        known = {field.name for field in fields(kind)}
        given = {key: value for key, value in BEGIN_AT_THE_MODEL.get(name, {}).items() if key in known} | self.options.peft_config
        if "target_modules" in known and (name not in NO_LINEAR_LAYERS or given.get("target_modules")):
            named = given.get("target_modules") or "all"
            asked = [named] if isinstance(named, str) else list(named)
            given["target_modules"] = targets(model, "peft_config", ["all"] if asked == ["all-linear"] else asked, parts)
        if "feedforward_modules" in known and "feedforward_modules" not in given:
            inner = ("down_proj", "fc2", "w2")  # the layers after an activation, as families of models call them
            given["feedforward_modules"] = [path for path in given["target_modules"] if path.rpartition(".")[2] in inner]
        if "fan_in_fan_out" in known and any_transposed(model, given.get("target_modules", ())):
            given["fan_in_fan_out"] = True
        if "modules_to_save" in known and self.shared.additional_target:
            given["modules_to_save"] = self.additional(model, parts)
        if "total_step" in known:
            # the run's own number of steps is told before the first, see `begin`; until then, one that leaves room
            given["total_step"] = given.get("tinit", 0) + given.get("tfinal", 0) + 1
        try:
            return kind(task_type="CAUSAL_LM", **given)
        except (ValueError, TypeError) as error:
            raise UserError(f"'peft_config' does not fit {self.options.peft_type}: {' '.join(str(error).split())}") from None

    def begin(self, model: Any, num_steps: int) -> None:
        """AdaLoRA (Zhang et al., 2023, arXiv 2303.10512) takes away ranks on a schedule over all steps."""
        if (allocator := getattr(model.base_model, "rankallocator", None)) is not None:
            config = model.peft_config[model.active_adapter]
            if config.tinit >= num_steps - config.tfinal:
                told = f"'tinit' ({config.tinit}) and 'tfinal' ({config.tfinal}) leave none of {num_steps} steps in between"
                raise UserError(f"'peft_config': {told}, in which ranks are taken away")
            config.total_step = num_steps
            allocator.set_total_step(num_steps)

    def after_step(self, model: Any, step: int) -> None:
        """AdaLoRA looks at the gradients, and takes away the ranks that matter least."""
        if getattr(model.base_model, "rankallocator", None) is not None:
            model.base_model.update_and_allocate(step)


def weight_methods() -> dict[str, Any]:
    """peft's methods that learn weights, and their config classes, by the names that users write; prompts that are learnt are none."""
    from peft.config import PromptLearningConfig
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    found = {kind.value.lower(): config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    left_out = {"xlora", "poly", "adaption_prompt", "shadow", "cartridge", "trainable_tokens"}  # other models, or prompts
    return {name: kind for name, kind in found.items() if not issubclass(kind, PromptLearningConfig) and name not in left_out}


def _check_keys(kind: Any, given: dict[str, Any]) -> Iterator[Finding]:
    """Every key is one of the config class, is the user's to set, and simple values have the right type."""
    known = {field.name for field in fields(kind)} - OURS
    hints = get_type_hints(kind)
    for key, value in given.items():
        if key not in known:
            yield Finding("peft_config", f"has no key {key!r} for this method{suggestion(key, known)}")
        elif not _fits(value, hints.get(key)):
            yield Finding("peft_config", f"holds {shown(value)} for {key!r}, which is of another type there ({_words(hints.get(key))})")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a simple value is of a simple type; what is not simple is left to peft."""
    simple = {kind for kind in (hint, *get_args(hint)) if kind in (int, float, bool, str, type(None))}
    others = any(kind not in (int, float, bool, str, type(None)) for kind in (get_args(hint) or (hint,)))
    if others or not simple:
        return True
    return type(value) in simple or (isinstance(value, int) and not isinstance(value, bool) and float in simple)


def _words(hint: Any) -> str:
    return str(hint).replace("<class '", "").replace("'>", "").replace("typing.", "")
