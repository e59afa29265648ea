"""Which number formats a run computes in, and what it saves."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conftest import build_model
from finery.commands.export import export
from finery.commands.train import train
from finery.models.load import load_model, own_dtype, upcast_norms
from finery.models.precision import Precision, choose_precision, cpu_computes_bf16, inference_dtype
from finery.run import Run

Keys = Callable[..., dict[str, Any]]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CPU, GPU = torch.device("cpu"), torch.device("cuda")
IDS = torch.tensor([[5, 9, 40, 77, 3, 120]])


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Sets whether CPU and GPU compute bf16."""

    def set_(has_bf16: bool) -> None:
        monkeypatch.setattr("finery.models.precision.cpu_computes_bf16", lambda: has_bf16)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: has_bf16 or including_emulation)

    return set_


PLAIN = Precision(FP32, FP32, None)
SLOW = "this CPU has no bf16 instructions: pure_bf16 will be slow"
NO_CPU_BF16 = "this CPU has no bf16 instructions: training in fp32"
NO_GPU_BF16 = "this GPU has no bf16: training in fp32"
NO_FP16 = "fp16 needs a GPU, this run is on cpu: training in fp32"

TABLE = [  # asked, device, computes bf16, base is frozen, what is chosen
    ((), CPU, True, True, PLAIN),
    ((), GPU, True, True, PLAIN),
    (("bf16",), CPU, True, True, Precision(BF16, FP32, BF16)),
    (("bf16",), CPU, True, False, Precision(FP32, FP32, BF16)),
    (("bf16",), CPU, False, True, Precision(FP32, FP32, None, NO_CPU_BF16)),
    (("bf16",), CPU, False, False, Precision(FP32, FP32, None, NO_CPU_BF16)),
    (("bf16",), GPU, True, True, Precision(BF16, FP32, BF16)),
    (("bf16",), GPU, True, False, Precision(FP32, FP32, BF16)),
    (("bf16",), GPU, False, True, Precision(FP32, FP32, None, NO_GPU_BF16)),
    (("fp16",), GPU, True, True, Precision(FP16, FP32, FP16)),
    (("fp16",), GPU, False, False, Precision(FP32, FP32, FP16)),
    (("fp16",), CPU, True, True, Precision(FP32, FP32, None, NO_FP16)),
    (("pure_bf16",), CPU, True, True, Precision(BF16, BF16, None)),
    (("pure_bf16",), CPU, False, False, Precision(BF16, BF16, None, SLOW)),
    (("pure_bf16",), GPU, True, False, Precision(BF16, BF16, None)),
    (("bf16", "pure_bf16"), GPU, True, True, Precision(BF16, BF16, None)),
]


@pytest.mark.parametrize(("asked", "device", "has_bf16", "frozen_base", "chosen"), TABLE)
def test_choices(
    asked: tuple[str, ...], device: torch.device, has_bf16: bool, frozen_base: bool, chosen: Precision, machine: Callable[[bool], None]
) -> None:
    machine(has_bf16)
    assert choose_precision("bf16" in asked, "fp16" in asked, "pure_bf16" in asked, device, frozen_base) == chosen


@pytest.mark.parametrize(
    ("text", "has"),
    [
        ("processor : 0\nflags\t\t: fpu sse2 avx512f avx512_bf16\n", True),
        ("flags : fpu amx_tile amx_bf16\n", True),
        ("Features\t: fp asimd bf16 i8mm\n", True),
        ("flags : fpu avx512f avx2\n", False),
        ("model name : the bf16 special\nflags : fpu\n", False),
        ("", False),
    ],
)
def test_cpu_flags(text: str, has: bool, tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    assert cpu_computes_bf16(tmp_path / "cpuinfo") == has


def test_a_cpu_that_cannot_be_asked(tmp_path: Path) -> None:
    assert not cpu_computes_bf16(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("asked", "own", "device", "has_bf16", "dtype"),
    [
        ("auto", BF16, CPU, True, BF16),
        ("auto", BF16, CPU, False, FP32),
        ("auto", FP16, CPU, True, FP32),
        ("auto", FP32, CPU, True, FP32),
        ("auto", BF16, GPU, True, BF16),
        ("auto", FP16, GPU, True, FP16),
        ("bfloat16", FP32, CPU, False, BF16),
        ("float16", BF16, GPU, True, FP16),
        ("float32", BF16, GPU, True, FP32),
    ],
)
def test_answers(
    asked: str, own: torch.dtype, device: torch.device, has_bf16: bool, dtype: torch.dtype, machine: Callable[[bool], None]
) -> None:
    machine(has_bf16)
    assert inference_dtype(asked, own, device) == dtype


def test_refused_bf16_is_told_and_written_down(keys: Keys, machine: Callable[[bool], None], capsys: pytest.CaptureFixture[str]) -> None:
    machine(False)
    folder = train(Run.from_dict(keys(bf16=True)))
    assert f"warning: {NO_CPU_BF16}" in capsys.readouterr().err
    assert f"bf16: false  # decided: {NO_CPU_BF16}; Python said true" in (folder / "run.yaml").read_text().splitlines()
    assert {weight.dtype for weight in load_file(folder / "adapter_model.safetensors").values()} == {FP32}


def test_bf16_on_the_cpu(keys: Keys, machine: Callable[[bool], None]) -> None:
    machine(True)
    losses = []
    for name, changes in (("half", {"bf16": True}), ("whole", {})):
        folder = train(Run.from_dict(keys(output_dir=str(Path(keys()["output_dir"]) / name), **changes)))
        assert {weight.dtype for weight in load_file(folder / "adapter_model.safetensors").values()} == {FP32}
        losses.append(float((folder / "train_results.json").read_text().split('"train_loss": ')[1].split(",")[0]))
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], abs=0.02)


def test_pure_bf16_keeps_an_adapter_in_bf16(keys: Keys) -> None:
    run = Run.from_dict(keys(pure_bf16=True))
    folder = train(run)
    assert {weight.dtype for weight in load_file(folder / "adapter_model.safetensors").values()} == {BF16}


def test_pure_bf16_keeps_a_whole_model_in_bf16(keys: Keys) -> None:
    folder = train(Run.from_dict(keys(pure_bf16=True, finetuning_type="full")))
    assert {weight.dtype for weight in load_file(folder / "model.safetensors").values()} == {BF16}
    assert own_dtype(folder, False) == BF16


@pytest.mark.parametrize("changes", [{"pure_bf16": True}, {"bf16": True}], ids=["pure", "mixed"])
@pytest.mark.parametrize("upcast", [True, False])
def test_norms_in_fp32(
    changes: dict[str, Any], upcast: bool, keys: Keys, machine: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(True)
    seen = {}

    def look(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.update({name: weight.dtype for name, weight in args[3].get_base_model().named_parameters()})
        return build(self, *args, **kwargs)

    from finery.training.session import Session

    build = Session.build_trainer
    monkeypatch.setattr(Session, "build_trainer", look)
    train(Run.from_dict(keys(upcast_layernorm=upcast, **changes)))
    assert {dtype for name, dtype in seen.items() if "norm" in name} == {FP32 if upcast else BF16}
    assert seen["model.layers.0.self_attn.q_proj.base_layer.weight"] == BF16


def test_norms_in_fp32_compute_in_fp32(tiny_model: Path) -> None:
    model = load_model(tiny_model, BF16, False)
    upcast_norms(model)
    norm = model.model.norm
    hidden = torch.randn(2, 3, 32).to(BF16)
    assert norm(hidden).dtype == BF16
    assert torch.equal(norm(hidden), torch.nn.functional.rms_norm(hidden.float(), (32,), norm.weight, 1e-6).to(BF16))
    with torch.no_grad():
        assert torch.allclose(model(IDS).logits.float(), load_model(tiny_model, FP32, False)(IDS).logits, atol=0.02)


def test_a_whole_model_with_norms_in_fp32(keys: Keys) -> None:
    folder = train(Run.from_dict(keys(pure_bf16=True, upcast_layernorm=True, finetuning_type="full")))
    weights = load_file(folder / "model.safetensors")
    assert {weight.dtype for name, weight in weights.items() if "norm" in name} == {FP32}
    assert {weight.dtype for name, weight in weights.items() if "norm" not in name} == {BF16}


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_a_model_s_own_format(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = build_model(tmp_path / "model")
    load_model(folder, dtype, False).save_pretrained(str(folder))
    assert own_dtype(folder, False) == dtype


def test_export_in_another_format(keys: Keys, tmp_path: Path) -> None:
    folder = export(Run.from_dict(keys(infer_dtype="float16", export_dir=str(tmp_path / "half"))))
    assert {weight.dtype for weight in load_file(folder / "model.safetensors").values()} == {FP16}
    assert own_dtype(folder, False) == FP16
