"""Weights in few bits: what they take, that products are those with the widened weights, and a life from training to export."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import build_model
from finery.commands.chat import answer
from finery.commands.export import export
from finery.commands.train import train
from finery.errors import UserError
from finery.models.adapters.lora import LoRA
from finery.models.head import bare, teach
from finery.models.kernels import KERNELS
from finery.models.kernels.base import Patches
from finery.models.load import load_model
from finery.models.quantized import held_layers, num_held, num_weights, widen
from finery.models.quantizers import QUANTIZERS
from finery.models.quantizers.base import Quantizing
from finery.run import Run

CPU = torch.device("cpu")
ON_CPU = [("bnb", 4), ("bnb", 8), ("torchao", 8), ("torchao", 4), ("quanto", 8), *(("hqq", bits) for bits in (1, 2, 3, 4, 5, 6, 8))]
"""What runs anywhere. quanto's 4 and 2 bits are built by a C++ compiler on first use, which takes a minute: see the slow test."""
FARTHEST = {8: 0.02, 6: 0.05, 5: 0.08, 4: 0.15, 3: 0.3, 2: 0.6, 1: 1.3}
"""How far weights may be from the plain ones, as a part of their length."""


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose layers are wide enough for blocks of 64 weights."""
    return build_model(tmp_path_factory.mktemp("wide") / "model", hidden_size=64, intermediate_size=128)


def load(folder: Path, method: str, bits: int, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    quantizer = QUANTIZERS[method](QUANTIZERS[method].Options(**options))
    return load_model(folder, dtype, False, Quantizing(quantizer, bits), CPU)


@pytest.mark.parametrize(("method", "bits"), ON_CPU)
def test_weights_take_the_bits_that_they_should(wide_model: Path, method: str, bits: int) -> None:
    model = load(wide_model, method, bits, torch.bfloat16)
    plain = load_file(wide_model / "model.safetensors")
    held = dict(held_layers(model))
    assert len(held) == 14  # all linear layers of two, but not the head
    each = 8 * sum(one.num_bytes for one in held.values()) / num_held(model)
    expected = QUANTIZERS[method](QUANTIZERS[method].Options()).bits_each(bits, torch.bfloat16)
    rows = 32 / 64  # a scale for each row, in fp32, which weighs here and hardly in a real model
    assert expected * 0.9 <= each <= (expected + (rows if bits == 8 else 0)) * 1.1
    assert num_weights(model) == sum(weight.numel() for weight in plain.values())
    for path, one in held.items():
        original = plain[f"{path}.weight"].float()
        assert float((one.weight(torch.float32) - original).norm() / original.norm()) < FARTHEST[bits]


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 2])
def test_quanto_in_fewer_bits(wide_model: Path, bits: int) -> None:
    test_weights_take_the_bits_that_they_should(wide_model, "quanto", bits)


@pytest.mark.parametrize(("method", "bits"), ON_CPU)
def test_fused_products_are_those_of_the_quantizer(wide_model: Path, method: str, bits: int) -> None:
    """Losses and gradients of adapters, by peft beside the quantizer's own layers, and by the kernel where it serves."""
    model = LoRA(LoRA.Options.model_validate({})).apply(load(wide_model, method, bits))
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(0, 0.1)
    teach(bare(model))
    ids = torch.arange(5, 29)[None]
    kernel, results = KERNELS["lora_linear"](KERNELS["lora_linear"].Options()), []
    exact = (method, bits) != ("bnb", 8)  # whose inputs are rounded
    for fused in (False, True):
        if fused:
            assert kernel.fits(bare(model)) == ("" if exact else "there is no plain LoRA layer")
            kernel.apply(bare(model), Patches())
        model.zero_grad()
        loss = model(input_ids=ids, targets=ids)
        loss.backward()
        results.append((loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}))
    (plain, wanted), (ours, found) = results
    assert float(ours) == pytest.approx(float(plain), rel=1e-5)
    assert wanted.keys() == found.keys() and len(found) == 28
    for name, gradient in wanted.items():
        assert torch.allclose(found[name], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()) + 1e-7), name


@pytest.mark.parametrize("changes", [{"quantization_type": "nf4"}, {"quantization_type": "fp4"}, {}], ids=["nf4", "fp4", "double"])
def test_an_answer_spoils_no_weights(wide_model: Path, changes: dict[str, Any]) -> None:
    """bitsandbytes 0.50.2 would repack weights in a pass without gradients on AVX512-bf16, and unpack them wrongly in `state_dict`."""
    double = {"double_quantization": not changes}
    model = load(wide_model, "bnb", 4, torch.bfloat16, **(changes | double)).eval()
    before = {path: one.weight(torch.float32) for path, one in held_layers(model)}
    with torch.no_grad():
        first = model(input_ids=torch.arange(5, 29)[None]).logits
    model.state_dict()
    assert all(torch.equal(one.weight(torch.float32), before[path]) for path, one in held_layers(model))
    with torch.no_grad():
        assert torch.equal(model(input_ids=torch.arange(5, 29)[None]).logits, first)


LIFE = [
    ("bnb", 4, {}), ("bnb", 8, {}), ("hqq", 3, {}), ("hqq", 2, {"bf16": True}), ("torchao", 8, {}), ("torchao", 4, {}), ("quanto", 8, {}),
    *(pytest.param("quanto", bits, {}, marks=pytest.mark.slow) for bits in (4, 2)),
]  # fmt: skip


@pytest.mark.parametrize(("method", "bits", "changes"), LIFE, ids=lambda value: str(value) if not isinstance(value, dict) else "")
def test_a_life_in_few_bits(keys: Callable[..., Any], wide_model: Path, tmp_path: Path, method: str, bits: int, changes: Any) -> None:
    """Trains, saves, resumes to the same weights, answers with the adapter beside packed weights, and is merged into the plain ones."""
    given = {
        "model_name_or_path": str(wide_model), "quantization_method": method, "quantization_bit": bits, "max_steps": 6, "val_size": 4,
        "save_strategy": "steps", "save_steps": 3, "learning_rate": 2e-2, "lora_rank": 4,
    } | changes  # fmt: skip
    folder = train(Run.from_dict(keys(**given), trains=True))
    log = [json.loads(line) for line in (folder / "trainer_log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in log if "loss" in line]
    assert losses[-1] < losses[0]
    adapter = load_file(folder / "adapter_model.safetensors")
    again = tmp_path / "again"
    resumed = given | {"output_dir": str(again), "resume_from_checkpoint": str(folder / "checkpoint-3")}
    train(Run.from_dict(keys(**resumed), trains=True))
    assert all(torch.equal(weight, load_file(again / "adapter_model.safetensors")[name]) for name, weight in adapter.items())
    run = keys(**(given | {"do_sample": False, "max_new_tokens": 5}))
    assert isinstance(answer(Run.from_dict(run), [{"role": "user", "content": "What is 3 plus 4?"}]), str)
    merged = load_file(export(Run.from_dict(run)) / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    stem = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    update = 2 * adapter[stem.format("B")].float() @ adapter[stem.format("A")].float()
    original = load_file(wide_model / "model.safetensors")[name].float()
    assert torch.allclose(merged[name].float(), original + update, atol=1e-5)


# ------------------------------------------------------------------ models that come quantised


def test_a_model_that_comes_in_bnb(keys: Callable[..., Any], wide_model: Path, tmp_path: Path) -> None:
    """Its adapter is trained beside it, and merged into its widened weights."""
    from transformers import AutoTokenizer

    folder = tmp_path / "four"
    packed = load(wide_model, "bnb", 4)
    packed.save_pretrained(str(folder))
    AutoTokenizer.from_pretrained(str(wide_model)).save_pretrained(str(folder))
    widened = {path: one.weight(torch.float32) for path, one in held_layers(packed)}
    given = keys(model_name_or_path=str(folder), do_sample=False, max_new_tokens=4)
    train(Run.from_dict(given, trains=True))
    assert isinstance(answer(Run.from_dict(given), [{"role": "user", "content": "Hello"}]), str)
    merged = export(Run.from_dict(given))
    assert "quantization_config" not in json.loads((merged / "config.json").read_text())
    name = "model.layers.1.mlp.down_proj"
    close = load_file(merged / "model.safetensors")[f"{name}.weight"].float()
    assert float((close - widened[name]).norm() / widened[name].norm()) < 0.1
    plain = widen(load_model(folder, torch.float32, False), torch.float32)
    assert not list(held_layers(plain)) and torch.equal(plain.get_submodule(name).weight, widened[name])


def test_a_model_that_comes_in_hqq(keys: Callable[..., Any], wide_model: Path, tmp_path: Path) -> None:
    """As transformers 4 saved such models; it answers as it was packed, trains an adapter, and is merged into its widened weights."""
    folder = with_method(wide_model, tmp_path / "three", quant_method="hqq")
    packed = load(wide_model, "hqq", 3)
    state = {
        name: weight.contiguous() for name, weight in packed.state_dict().items() if torch.is_tensor(weight) and name != "lm_head.weight"
    }
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    ids = torch.arange(5, 29)[None]
    again = load_model(folder, torch.float32, False)
    with torch.no_grad():
        assert len(list(held_layers(again))) == 14 and torch.equal(again(input_ids=ids).logits, packed.eval()(input_ids=ids).logits)
    given = keys(model_name_or_path=str(folder), do_sample=False, max_new_tokens=4)
    train(Run.from_dict(given, trains=True))
    assert isinstance(answer(Run.from_dict(given), [{"role": "user", "content": "Hello"}]), str)
    assert (export(Run.from_dict(given)) / "model.safetensors").exists()


def as_fp8(source: Path, folder: Path) -> Path:
    """A model with its linear layers in blocks of fp8, as DeepSeek's come."""
    weights = load_file(source / "model.safetensors")
    for name in [name for name in weights if name.endswith("_proj.weight")]:
        scale = weights[name].float().abs().max() / 448
        weights[name.replace(".weight", ".weight_scale_inv")] = scale.reshape(1, 1)
        weights[name] = (weights[name].float() / scale).to(torch.float8_e4m3fn)
    folder.mkdir()
    for path in source.iterdir():
        if path.suffix in (".json", ".jinja"):
            (folder / path.name).write_bytes(path.read_bytes())
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_model_that_comes_in_fp8_is_widened(keys: Callable[..., Any], wide_model: Path, tmp_path: Path) -> None:
    folder = as_fp8(wide_model, tmp_path / "fp8")
    model = load_model(folder, torch.float32, False)
    name = "model.layers.0.mlp.up_proj"
    original = load_file(wide_model / "model.safetensors")[f"{name}.weight"].float()
    assert float((model.get_submodule(name).weight.detach() - original).norm() / original.norm()) < 0.05
    given = keys(model_name_or_path=str(folder), finetuning_type="full")
    train(Run.from_dict(given, trains=True))  # all of it is trained, as of any plain model
    assert "quantization_config" not in json.loads((Path(given["output_dir"]) / "config.json").read_text())
    assert (export(Run.from_dict(given)) / "model.safetensors").exists()


def test_a_model_that_comes_in_mxfp4_is_widened(tmp_path: Path) -> None:
    """gpt-oss: experts in blocks of 32 numbers of 4 bits with a shared power of two; by the format's own table."""
    from transformers import GptOssConfig, GptOssForCausalLM

    small: dict[str, Any] = {
        "num_hidden_layers": 1,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "hidden_size": 64,
        "intermediate_size": 32,
    }
    config = GptOssConfig(vocab_size=60, head_dim=16, num_attention_heads=4, num_key_value_heads=2, **small)
    GptOssForCausalLM(config).save_pretrained(str(tmp_path))
    weights = load_file(tmp_path / "model.safetensors")
    dice = torch.Generator().manual_seed(0)
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
    wanted = {}
    for name in ("gate_up_proj", "down_proj"):
        path = f"model.layers.0.mlp.experts.{name}"
        experts, inputs, outputs = weights.pop(path).shape
        blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), generator=dice, dtype=torch.uint8)
        scales = torch.randint(118, 124, (experts, outputs, inputs // 32), generator=dice, dtype=torch.uint8)
        numbers = torch.stack([values[(blocks & 15).long()], values[(blocks >> 4).long()]], -1).flatten(-2)
        wanted[path] = (numbers * 2.0 ** (scales.float() - 127)[..., None]).flatten(2).transpose(1, 2)
        weights |= {f"{path}_blocks": blocks, f"{path}_scales": scales}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(found | {"quantization_config": {"quant_method": "mxfp4"}}))
    model = load_model(tmp_path, torch.float32, False)
    for path, weight in wanted.items():
        assert torch.equal(model.get_parameter(path).detach(), weight), path
    model.save_pretrained(str(tmp_path / "plain"))  # and is saved as a plain model
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    saved = load_file(tmp_path / "plain" / "model.safetensors")
    assert torch.equal(saved["model.layers.0.mlp.experts.down_proj"], wanted["model.layers.0.mlp.experts.down_proj"])


def with_method(source: Path, folder: Path, **config: Any) -> Path:
    """The model in `source` with a config that says that it is quantised."""
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    found = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(found | {"quantization_config": config}))
    return folder


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"quant_method": "gptq", "bits": 4}, "'gptqmodel' is not installed (the model comes quantised by GPTQ)"),
        ({"quant_method": "awq", "bits": 4}, "'gptqmodel' is not installed (the model comes quantised by AWQ)"),
        ({"quant_method": "aqlm"}, "'aqlm' is not installed (the model comes quantised by AQLM)"),
        ({"quant_method": "hqq"}, "but holds no layers of hqq in safetensors files"),
        ({"quant_method": "spqr"}, "comes quantised by 'spqr', which is not read here"),
    ],
    ids=lambda value: value["quant_method"] if isinstance(value, dict) else "",
)
def test_what_cannot_be_read_is_told(wide_model: Path, tmp_path: Path, config: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError) as caught:
        load_model(with_method(wide_model, tmp_path / "model", **config), torch.float32, False)
    assert told in str(caught.value)


def test_what_gptq_is_opened_with() -> None:
    """Plain torch, which keeps the way back to the inputs after an answer."""
    from finery.models.quantizers import gptq

    way = gptq.GPTQ(gptq.GPTQ.Options()).opening({"quant_method": "gptq", "bits": 3}, torch.float16)["quantization_config"]
    assert way.bits == 3 and way.backend == "torch"


def test_arguments_for_gpus() -> None:
    """What is asked of transformers where no machine at hand could answer."""
    gpu = torch.device("cuda")
    bnb = QUANTIZERS["bnb"](QUANTIZERS["bnb"].Options(quantization_type="fp4", double_quantization=False))
    four = bnb.arguments(4, torch.bfloat16, gpu)["quantization_config"]
    assert (four.bnb_4bit_quant_type, four.bnb_4bit_use_double_quant, four.bnb_4bit_compute_dtype) == ("fp4", False, torch.bfloat16)
    assert four.bnb_4bit_quant_storage == torch.bfloat16  # so that FSDP gathers weights of one format
    eetq = QUANTIZERS["eetq"](QUANTIZERS["eetq"].Options())
    assert eetq.arguments(8, torch.float16, gpu)["quantization_config"].weights == "int8"


# ------------------------------------------------------------------ what does not fit together


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"quantization_bit": 3}, "'quantization_bit' should be what 'quantization_method: bnb' makes (4, 8), found 3"),
        ({"quantization_bit": 4, "quantization_method": "gptq"}, "it reads models that come quantised"),
        ({"quantization_bit": 4, "finetuning_type": "full"}, "needs a 'finetuning_type' that leaves weights as they are, found 'full'"),
        ({"quantization_bit": 8, "quantization_method": "eetq"}, "needs"),
        ({"quantization_bit": 4, "quantization_device_map": "auto"}, "'quantization_device_map' is for chat alone"),
        ({"quantization_method": "qbits"}, "'quantization_method' should be one of"),
        ({"quantization_bit": 4, "quantization_type": "int4"}, "'quantization_type' should be one of nf4, fp4"),
    ],
)
def test_contradictions_are_told(keys: Callable[..., Any], changes: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError) as caught:
        Run.from_dict(keys(**changes), trains=True)
    assert told in str(caught.value)


def test_a_package_that_is_not_there_is_told(keys: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from finery.models.quantizers import base

    monkeypatch.setattr(base, "have", lambda name: name != "bitsandbytes")
    with pytest.raises(UserError, match=r'needs a package: pip install "finery\[quant\]"'):
        Run.from_dict(keys(quantization_bit=4), trains=True)
