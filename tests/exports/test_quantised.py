"""Exports in few bits: merged and packed in one pass, and right when they are opened again."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from conftest import CHATML, build_model
from finery import compat
from finery.commands.export import export
from finery.commands.train import train
from finery.errors import UserError
from finery.exports import EXPORTS
from finery.exports.gptq import gptq_arguments, row_widths
from finery.models.quantized import held_layers
from finery.models.trained import find_trained, load_trained
from finery.run import Run

Keys = Callable[..., dict[str, Any]]
IDS = torch.arange(5, 45)[None]
FORMS = [("bnb", 4), ("bnb", 8), ("torchao", 4), ("torchao", 8), *(("hqq", bits) for bits in EXPORTS["hqq"].bits)]
METHODS = {"bnb": "bitsandbytes", "torchao": "torchao", "hqq": "hqq"}
"""What config.json calls them."""
FARTHEST = {8: 0.06, 6: 0.13, 5: 0.25, 4: 0.6, 3: 1.0, 2: 1.5, 1: 2.0}
"""How far logits may be from the trained model's, as a part of their length."""


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits.float()


def apart(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first - second).norm() / second.norm())


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def stored(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- not a dict


class Trained:
    """A LoRA that has moved its model visibly, and what it says."""

    def __init__(self, given: dict[str, Any]) -> None:
        self.given = given
        run = Run.from_dict(given, trains=True)
        train(run)
        self.model = self._load(given)
        self.logits = logits(self.model)
        untouched = {key: value for key, value in given.items() if key != "output_dir"}
        self.base_logits = logits(self._load(untouched))

    def _load(self, given: dict[str, Any]) -> Any:
        from finery.models.tokenizer import load_tokenizer

        run = Run.from_dict(given)
        found = find_trained(run.model, run.adapter, run.loop.output_dir)
        tokenizer = load_tokenizer(found.tokenizer_folder, False)
        return load_trained(found, run.adapter, tokenizer, False, torch.float32, torch.device("cpu"))

    def export(self, folder: Path, **changes: Any) -> tuple[Run, Path]:
        run = Run.from_dict(self.given | {"export_dir": str(folder), "export_verify": False} | changes)
        return run, export(run)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> Trained:
    folder = tmp_path_factory.mktemp("few")
    base = build_model(folder / "model", hidden_size=128, intermediate_size=256, initializer_range=0.1)
    return Trained({
        "model_name_or_path": str(base), "finetuning_type": "lora", "dataset": "sums", "dataset_dir": str(data_dir), "cutoff_len": 128,
        "output_dir": str(folder / "out"), "do_train": True, "max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 2e-2,
        "save_strategy": "no", "report_to": "none", "bf16": False,
    })  # fmt: skip


@pytest.fixture(scope="module")
def plain_size(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> int:
    return size(trained.export(tmp_path_factory.mktemp("plain") / "merged")[1])


# ------------------------------------------------------------------ every form that this machine makes


@pytest.mark.parametrize(("form", "bits"), FORMS)
def test_what_is_opened_again_is_what_was_trained(trained: Trained, plain_size: int, tmp_path: Path, form: str, bits: int) -> None:
    run, folder = trained.export(tmp_path / "few", export_format=form, export_quantization_bit=bits)
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == METHODS[form]
    assert config["use_cache"] and size(folder) < 0.75 * plain_size
    assert all(path.is_file() for path in folder.iterdir())  # nothing is left of the plain weights
    assert "Modelfile" not in {path.name for path in folder.iterdir()}  # Ollama could not read them
    model, tokenizer = run.form.open(folder, torch.float32)
    assert tokenizer.chat_template == CHATML and 2 in np.atleast_1d(model.generation_config.eos_token_id)
    found = logits(model)
    assert apart(found, trained.logits) < FARTHEST[bits]
    if bits >= 4:
        assert apart(found, trained.logits) < apart(trained.base_logits, trained.logits)


@pytest.mark.parametrize(("form", "bits"), [("bnb", 4), ("torchao", 8), ("hqq", 4)])
def test_a_fresh_process_finds_the_same(trained: Trained, tmp_path: Path, form: str, bits: int) -> None:
    _, folder = trained.export(tmp_path / "few", export_format=form, export_quantization_bit=bits, export_verify=True)
    report = json.loads((folder / "parity.json").read_text())
    assert report["verified"] and report["passed"] and report["distance"]["num_places"] > 100


@pytest.mark.parametrize(("form", "bits"), [("bnb", 4), ("bnb", 8), ("torchao", 4), ("torchao", 8), ("hqq", 5)])
def test_half_precision_is_opened_in_whichever_is_asked_for(trained: Trained, tmp_path: Path, form: str, bits: int) -> None:
    run, folder = trained.export(tmp_path / "few", export_format=form, export_quantization_bit=bits, export_dtype="bfloat16")
    for dtype in (torch.float32, torch.bfloat16):
        assert apart(logits(run.form.open(folder, dtype)[0]), trained.logits) < FARTHEST[bits]


@pytest.mark.parametrize("form", ["bnb", "torchao", "hqq"])
def test_finery_goes_on_with_it(trained: Trained, tmp_path: Path, form: str) -> None:
    """It is a base like any other: an adapter is trained beside it."""
    _, folder = trained.export(tmp_path / "few", export_format=form, export_quantization_bit=8)
    out = train(Run.from_dict(trained.given | {"model_name_or_path": str(folder), "output_dir": str(tmp_path / "more")}, trains=True))
    assert (out / "adapter_model.safetensors").exists()


def test_shards(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model has no GB to cut."""
    from dataclasses import replace

    from finery.commands import export as command

    for form in ("bnb", "torchao", "hqq"):
        run = Run.from_dict(trained.given | {"export_format": form, "export_quantization_bit": 8})
        with command.opened_source(run) as (source, _):
            folder = tmp_path / form
            folder.mkdir()
            run.form.write(replace(source, shard_bytes=60_000), folder)
        assert len(list(folder.glob("*.safetensors"))) > 1
        assert apart(logits(run.form.open(folder, torch.float32)[0]), trained.logits) < FARTHEST[8]


# ------------------------------------------------------------------ bitsandbytes' packed weights


def test_four_bits_of_bnb_are_stored_as_they_were_packed(trained: Trained, tmp_path: Path) -> None:
    """Packed scales are what every CPU unpacks rightly, also one with AVX512-bf16 once it has answered."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    from finery.models.load import load_model

    run, folder = trained.export(tmp_path / "four", export_format="bnb", export_quantization_bit=4)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["bnb_4bit_use_double_quant"] and config["bnb_4bit_quant_type"] == "nf4" and config["bnb_4bit_quant_storage"] == "uint8"
    weights, plain = stored(folder), trained.model.state_dict()
    paths = [name.removesuffix(".weight.quant_state.bitsandbytes__nf4") for name in weights if name.endswith("bitsandbytes__nf4")]
    assert len(paths) == 14
    for path in paths:
        packed, state = quantize_4bit(plain[f"{path}.weight"], quant_type="nf4", compress_statistics=True)
        assert torch.equal(weights[f"{path}.weight"], packed) and f"{path}.weight.nested_absmax" in weights
        assert apart(dequantize_4bit(packed, state), plain[f"{path}.weight"]) < 0.15
    model, _ = run.form.open(folder, torch.float32)
    assert logits(model).isfinite().all()  # the pass that repacks weights where a processor has such instructions
    held = model.state_dict()
    assert all(torch.equal(held[f"{path}.weight"], weights[f"{path}.weight"]) for path in paths)  # its scales it rounds, there
    again = load_model(folder, torch.float32, False)
    assert apart(logits(again), logits(model)) < FARTHEST[8]
    held = again.state_dict()
    assert all(torch.equal(held[name], weight) for name, weight in weights.items())  # Finery's own way to open it keeps all as it is


def test_hqq_s_layers_are_as_they_were_packed(trained: Trained, tmp_path: Path) -> None:
    run, folder = trained.export(tmp_path / "three", export_format="hqq", export_quantization_bit=3)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]["quant_config"]["weight_quant_params"]
    assert (config["nbits"], config["group_size"], config["axis"]) == (3, 64, 1)
    held = dict(held_layers(run.form.open(folder, torch.float32)[0]))
    assert len(held) == 14
    plain = trained.model.state_dict()
    assert all(apart(one.weight(torch.float32), plain[f"{path}.weight"]) < 0.3 for path, one in held.items())


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"export_format": "bnb", "export_quantization_bit": 3}, "'export_quantization_bit' does not fit 'export_format: bnb'"),
        ({"export_format": "hqq", "export_quantization_bit": 7}, "which makes 1, 2, 3, 4, 5, 6, 8, found 7"),
        ({"export_format": "torchao"}, "'export_quantization_bit' is needed by 'export_format: torchao' (4, 8)"),
        ({"export_quantization_bit": 5}, "'export_format: gptq', which makes 2, 3, 4, 8, found 5"),
        ({"export_quantization_bit": 4}, "'export_quantization_dataset' is needed by 'export_format: gptq'"),
    ],
    ids=str,
)
def test_what_does_not_fit(keys: Keys, changes: dict[str, Any], told: str) -> None:
    given = {"export_quantization_dataset": "sums"} if changes.get("export_quantization_bit") == 5 else {}
    with pytest.raises(UserError) as caught:
        Run.from_dict(keys(**changes, **given))
    (complaint,) = caught.value.complaints
    assert told in complaint


@pytest.mark.parametrize(
    ("form", "told"),
    [
        ("bnb", "the package 'bitsandbytes' is not installed ('export_format: bnb'); it comes with: pip install \"finery[quant]\""),
        ("gptq", "the package 'gptqmodel' is not installed ('export_format: gptq'); it comes with: pip install \"finery[gptq]\""),
    ],
)
def test_a_package_that_is_not_there(keys: Keys, monkeypatch: pytest.MonkeyPatch, form: str, told: str) -> None:
    run = Run.from_dict(keys(export_format=form, export_quantization_bit=4, export_quantization_dataset="sums"))
    monkeypatch.setattr(compat, "have", lambda module: False)
    with pytest.raises(UserError) as caught:
        export(run)
    assert str(caught.value) == told


def test_four_bits_in_bytes_are_told(keys: Keys, capsys: pytest.CaptureFixture[str]) -> None:
    Run.from_dict(keys(export_format="torchao", export_quantization_bit=4))
    assert "as large as 8" in capsys.readouterr().err


# ------------------------------------------------------------------ what gptqmodel is asked for


@pytest.mark.parametrize(("widths", "group"), [({4096, 11008}, 128), ({576, 1536}, 64), ({32, 64}, 32), ({48}, -1)])
def test_scales_are_shared_by_as_many_as_divide_every_row(widths: set[int], group: int) -> None:
    assert gptq_arguments(4, [[1, 2]], widths)["group_size"] == group


@pytest.mark.parametrize("bits", EXPORTS["gptq"].bits)
def test_arguments_are_taken_by_transformers(bits: int) -> None:
    from transformers import GPTQConfig

    config = GPTQConfig(**gptq_arguments(bits, [[5, 6, 7], [8, 9]], {64}))
    assert (config.bits, config.group_size, config.sym, config.desc_act, config.model_seqlen) == (bits, 64, True, False, 3)
    assert config.dataset == [
        {"input_ids": [[5, 6, 7]], "attention_mask": [[1, 1, 1]]},
        {"input_ids": [[8, 9]], "attention_mask": [[1, 1]]},
    ]


def test_what_is_asked_of_gptqmodel(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything but the packing itself, which needs the package."""
    from types import SimpleNamespace

    from finery.models import repacked as module

    asked: list[Any] = []

    def spy(merged: Any, folder: Path, quantizing: Any, *how: Any) -> Any:
        asked.append(quantizing)
        model = trained.model
        model.config.quantization_config = SimpleNamespace(dataset="windows", to_dict=lambda: {"quant_method": "gptq"})
        monkeypatch.setattr(model, "save_pretrained", lambda *args, **more: asked.append(model.config.quantization_config.dataset))
        return model

    monkeypatch.setattr(module, "repacked", spy)
    monkeypatch.setattr("finery.exports.gptq.need", lambda *words: None)
    monkeypatch.setattr(compat, "need", lambda *words: None)
    trained.export(
        tmp_path / "four",
        export_quantization_bit=4, export_quantization_dataset="sums", export_quantization_nsamples=3, export_quantization_maxlen=32,
    )  # fmt: skip
    quantizing, dataset = asked
    assert quantizing.bits == 4 and [len(ids) for ids in quantizing.quantizer.windows] == [32] * 3 and dataset is None
    made = quantizing.quantizer.arguments(4, torch.float32, torch.device("cpu"))["quantization_config"]
    assert (made.group_size, len(made.dataset)) == (128, 3)
    assert row_widths(trained.model.config, False) == {128, 256}
    del trained.model.config.quantization_config
