"""One adapter of several: exact where peft's way is, drawn by seed where it draws, and refused where it would be something else."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

from finery.commands.export import export
from finery.commands.train import train
from finery.errors import UserError
from finery.models.blending import blend
from finery.run import Run

Keys = Callable[..., dict[str, Any]]


@pytest.fixture
def two(keys: Keys, tmp_path: Path) -> list[str]:
    return [str(train(Run.from_dict(keys(seed=seed, learning_rate=0.02, output_dir=str(tmp_path / f"a{seed}"))))) for seed in (1, 2)]


def weights(keys: Keys, two: list[str], tmp_path: Path, **how: Any) -> dict[str, torch.Tensor]:
    target = str(tmp_path / "merged")
    return load_file(export(Run.from_dict(keys(adapter_name_or_path=two, output_dir=None, export_dir=target, **how))) / "model.safetensors")


def change(folder: str) -> dict[str, torch.Tensor]:
    """What an adapter adds to each layer."""
    found = load_file(Path(folder) / "adapter_model.safetensors")
    names = [name.removesuffix(".lora_A.weight") for name in found if name.endswith(".lora_A.weight")]
    return {f"{n.removeprefix('base_model.model.')}.weight": 2.0 * found[f"{n}.lora_B.weight"] @ found[f"{n}.lora_A.weight"] for n in names}


def test_the_weighted_sum_is_exact(keys: Keys, two: list[str], tiny_model: Path, tmp_path: Path) -> None:
    base = load_file(tiny_model / "model.safetensors")
    got = weights(keys, two, tmp_path, export_merge_type="cat", export_adapter_weights=[0.75, 0.5])
    one, other = map(change, two)
    for name in one:
        assert torch.allclose(got[name], base[name] + 0.75 * one[name] + 0.5 * other[name], atol=1e-5), name
    apart = weights(keys, two, tmp_path)  # one after the other: each counts 1
    same = weights(keys, two, tmp_path, export_merge_type="cat")
    assert all(torch.allclose(apart[name], same[name], atol=1e-5) for name in apart)


@pytest.mark.parametrize("how", ["linear", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune"])
def test_other_ways_are_peft_s(how: str, keys: Keys, two: list[str], tiny_model: Path, tmp_path: Path) -> None:
    base = load_file(tiny_model / "model.safetensors")
    got = weights(keys, two, tmp_path, export_merge_type=how)
    assert any(not torch.equal(got[name], base[name]) for name in base)
    again = weights(keys, two, tmp_path, export_merge_type=how)
    assert all(torch.allclose(got[name], again[name], atol=1e-6) for name in got)
    if how.startswith("dare"):
        drawn = weights(keys, two, tmp_path, export_merge_type=how, seed=7)
        assert any(not torch.allclose(got[name], drawn[name], atol=1e-6) for name in got)


def test_what_cannot_be_blended(tiny_model: Path, tmp_path: Path) -> None:
    LoraConfig(r=4, use_dora=True, target_modules=["q_proj"]).save_pretrained(str(tmp_path / "dora"))
    with pytest.raises(UserError, match="holds a LoRA with use_dora, which cannot be blended"):
        blend(tiny_model, [tmp_path / "dora"] * 2, "cat", [], 0.5, tmp_path / "out", 0)
    (tmp_path / "oft").mkdir()
    (tmp_path / "oft" / "adapter_config.json").write_text('{"peft_type": "OFT"}')
    with pytest.raises(UserError, match="holds no LoRA"):
        blend(tiny_model, [tmp_path / "oft"] * 2, "cat", [], 0.5, tmp_path / "out", 0)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"export_merge_type": "cat"}, "'export_merge_type' makes one adapter of several"),
        ({"export_merge_type": "cat", "export_adapter_weights": [1.0]}, "'export_adapter_weights' should be one for each"),
        ({"export_merge_type": "mean"}, "'export_merge_type' should be one of"),
    ],
)
def test_keys_that_do_not_fit(changes: dict[str, Any], complaint: str, keys: Keys, two: list[str]) -> None:
    folders = two if "export_adapter_weights" in changes else two[:1]
    with pytest.raises(UserError, match=complaint):
        Run.from_dict(keys(adapter_name_or_path=folders) | changes)
