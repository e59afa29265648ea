"""What the fakes of other libraries answer with: a real tiny model, computed anew for every token, and our own way to choose one."""

import importlib.machinery
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from finery.engines.base import Ask, GenerationOptions
from finery.engines.functions.choosing import Chooser
from finery.models.load import load_model


class FakeModel:
    """A model and the adapters that are beside it."""

    def __init__(self, folder: Path, adapters: Mapping[str, str]) -> None:
        from peft import PeftModel

        self.model: Any = load_model(folder, torch.float32, False).eval()
        self.names = list(adapters)
        for name, path in adapters.items():
            if isinstance(self.model, PeftModel):
                self.model.load_adapter(path, adapter_name=name)
            else:
                self.model = PeftModel.from_pretrained(self.model, path, adapter_name=name).eval()
        self.longest = int(self.model.config.max_position_embeddings)

    def scores(self, ids: Sequence[int], adapter: str | None = None) -> Tensor:
        """Of the token after the last, (V)."""
        assert len(ids) <= self.longest, "there are no more positions"
        with torch.no_grad():
            if adapter is not None:
                assert adapter in self.names
                self.model.set_adapter(adapter)
            elif self.names:
                with self.model.disable_adapter():
                    return self.model(torch.tensor([list(ids)])).logits[0, -1].float()
            return self.model(torch.tensor([list(ids)])).logits[0, -1].float()


def chooser(prompt: Sequence[int], seed: int | None, num_logprobs: int | None, **options: Any) -> Chooser:
    """Chooses as a library's own sampling parameters say, told in our words."""
    return Chooser(Ask(prompt, GenerationOptions.model_validate(options), seed=seed, num_logprobs=num_logprobs), torch.device("cpu"))


def install(patch: pytest.MonkeyPatch, **modules: Mapping[str, Any]) -> None:
    """Let modules of these names (`__` for a dot) be found and imported, with these contents."""
    for name, contents in sorted(modules.items()):
        name = name.replace("__", ".")
        module = ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        module.__path__ = []
        for key, value in contents.items():
            setattr(module, key, value)
        patch.setitem(sys.modules, name, module)
        before, _, last = name.rpartition(".")
        if before:
            setattr(sys.modules[before], last, module)
