"""Cases of the keys that say in which form a model is exported. `test_every_key.py` runs them."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from finery.parity import reopened
from watched import Bench, Outcome

GPTQ = {"export_quantization_bit": 4, "export_quantization_dataset": "sums"}
PLAIN = {"export_verify": False}


def method(run: Outcome) -> str | None:
    """What config.json calls the way in which weights are held."""
    return json.loads((run.folder / "config.json").read_text()).get("quantization_config", {}).get("quant_method")


def export_format(bench: Bench) -> None:
    assert "model.safetensors" in bench.export(**PLAIN).files
    few = PLAIN | {"export_quantization_bit": 8}
    assert [method(bench.export(**few, export_format=name)) for name in ("torchao", "hqq")] == ["torchao", "hqq"]


def export_quantization_bit(bench: Bench) -> None:
    def size(bits: int) -> int:
        run = bench.export(**PLAIN, export_format="hqq", export_quantization_bit=bits)
        return (run.folder / "model.safetensors").stat().st_size

    assert size(4) < size(8)


def dtype(run: Outcome) -> torch.dtype:
    return run.weights("model.safetensors")["model.norm.weight"].dtype


def export_dtype(bench: Bench) -> None:
    assert dtype(bench.export(**PLAIN, infer_dtype="bfloat16")) == torch.bfloat16
    assert dtype(bench.export(**PLAIN, infer_dtype="bfloat16", export_dtype="float32")) == torch.float32


def export_verify(bench: Bench) -> None:
    bench.patch.setattr(subprocess, "run", lambda command, **_: reopened.main(Path(command[-1])) or subprocess.CompletedProcess(command, 0))
    for asked in (True, False):
        run = bench.export(export_verify=asked)
        assert json.loads((run.folder / "parity.json").read_text())["verified"] is asked


def blends(key: str, value: Any) -> Callable[[Bench], None]:
    """A case of two adapters that are made one, with and without the key."""

    def case(bench: Bench) -> None:
        made = [str(bench.train(seed=seed, learning_rate=0.05, max_steps=2).folder) for seed in (1, 2)]
        both = PLAIN | {"adapter_name_or_path": made} | ({} if key == "export_merge_type" else {"export_merge_type": "ties"})
        before, after = (bench.export(**both, **more).weights("model.safetensors") for more in ({}, {key: value}))
        assert any(not torch.equal(before[name], after[name]) for name in before)

    return case


def uploads(key: str, value: Any, wanted: Any) -> Callable[[Bench], None]:
    """A case that looks at what is handed to the upload."""

    def case(bench: Bench) -> None:
        sent: list[tuple[str, bool | None]] = []
        bench.patch.setattr("finery.upload.check_upload", lambda *given: None)
        bench.patch.setattr("finery.upload.upload", lambda folder, name, tokens, private: sent.append((name, private)) or "there")
        bench.export(**PLAIN)
        assert not sent
        bench.export(**(PLAIN | {"export_hub_model_id": "me/mine", key: value}))
        assert sent == [wanted]

    return case


def calibrated(bench: Bench, **changes: Any) -> list[list[int]]:
    """The windows of text that GPTQ would look at."""
    found: list[list[list[int]]] = []

    def stop(merged: Any, folder: Path, asked: Any, *how: Any) -> None:
        found.append(asked.quantizer.windows)
        raise InterruptedError("that is all we wanted to know")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("finery.models.repacked.repacked", stop)
        patch.setattr("finery.exports.gptq.need", lambda *words: None)
        patch.setattr("finery.compat.need", lambda *words: None)
        with pytest.raises(InterruptedError):
            bench.export(**(PLAIN | GPTQ | changes))
    return found[0]


def looks_at(key: str, value: Any, look: Callable[[list[list[int]]], Any], wants: tuple[Any, Any] | None) -> Callable[[Bench], None]:
    """A case that looks at the windows with the default and with another value."""

    def case(bench: Bench) -> None:
        before, after = look(calibrated(bench)), look(calibrated(bench, **{key: value}))
        assert before != after if wants is None else (before, after) == wants

    return case


def longest(windows: list[list[int]]) -> int:
    return max(map(len, windows))


def export_gguf_type(bench: Bench) -> None:
    """The tiny model has 32 bits, which is what `auto` keeps."""
    found: list[Path] = []
    for changes in ({}, {"export_gguf_type": "f16"}):
        found += bench.export(**PLAIN, export_format="gguf", **changes).folder.glob("*.gguf")
    assert [file.name.rpartition("-")[2] for file in found] == ["f32.gguf", "f16.gguf"]
    assert found[0].stat().st_size > 1.3 * found[1].stat().st_size  # the tokens take the rest


OTHERS = {case.__name__: case for case in (export_format, export_quantization_bit, export_dtype, export_verify, export_gguf_type)} | {
    "export_merge_type": blends("export_merge_type", "cat"),
    "export_adapter_weights": blends("export_adapter_weights", [0.9, 0.1]),
    "export_density": blends("export_density", 0.9),
    "export_hub_model_id": uploads("export_hub_model_id", "me/other", ("me/other", None)),
    "export_hub_private": uploads("export_hub_private", True, ("me/mine", True)),
    "export_quantization_dataset": looks_at("export_quantization_dataset", "names", lambda windows: windows, None),
    "export_quantization_nsamples": looks_at("export_quantization_nsamples", 1, lambda windows: len(windows) > 1, (True, False)),
    "export_quantization_maxlen": looks_at("export_quantization_maxlen", 32, longest, (512, 32)),
}
