"""An export that is not what was trained is caught, whatever broke it; and one that is passes."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import build_model
from finery.commands import export as command
from finery.commands.export import NotTheSame, export, verify_again
from finery.commands.train import train
from finery.models.adapters.lora import LoRA
from finery.models.load import load_model
from finery.models.merging import merged
from finery.models.tokenizer import load_tokenizer, save_tokenizer
from finery.models.trained import Trained
from finery.parity import reopened, verify
from finery.run import Run

CPU = torch.device("cpu")
Breaks = Callable[[Path, dict[str, Any]], None]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> dict[str, Any]:
    """Keys of a run that was trained with rslora and a new token."""
    folder = tmp_path_factory.mktemp("trained")
    keys = {
        "model_name_or_path": str(build_model(folder / "base")),
        "stage": "sft",
        "finetuning_type": "lora",
        "dataset": "sums",
        "dataset_dir": str(data_dir),
        "cutoff_len": 128,
        "output_dir": str(folder / "out"),
        "max_steps": 6,
        "learning_rate": 0.02,
        "use_rslora": True,
        "add_special_tokens": "<|sum|>",
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 6,
    }
    train(Run.from_dict(keys | {"do_train": True}))
    return keys


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Exports are opened again in this process, which is quicker; one test below does as users do."""

    def run(command: list[str], **_: Any) -> Any:
        try:
            reopened.main(Path(command[-1]))
        except Exception as error:
            return type("Ended", (), {"returncode": 1, "stderr": f"{type(error).__name__}: {error}"})
        return type("Ended", (), {"returncode": 0})

    monkeypatch.setattr(reopened.subprocess, "run", run)
    yield


def test_a_process_of_its_own_opens_what_was_exported(trained: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = export(Run.from_dict(trained | {"export_dir": str(tmp_path / "out")}))
    report = json.loads((folder / "parity.json").read_text())
    assert report["passed"] and report["ids_equal"] == report["num_probes"] == 11  # one of them is the new token
    assert report["distance"]["mean_kl"] < 1e-6 and report["exact"]["mean_kl"] < 1e-7
    assert report["effect"] == pytest.approx(1, abs=0.01) and report["moved"]["mean_kl"] > 1e-3
    assert len(report["texts"]) == 3 and all(text["trained"] == text["exported"] for text in report["texts"])
    assert report["lineage"]["base"]["name"] == trained["model_name_or_path"] and report["lineage"]["base"]["weights"]
    table = capfd.readouterr().err
    assert "prompts with the same tokens" in table and "11 of 11" in table and "mean KL from the trained model" in table


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_right_exports_pass(dtype: str, trained: dict[str, Any], tmp_path: Path, here: None) -> None:
    keys = trained | {"export_dir": str(tmp_path / "out"), "export_dtype": dtype}
    assert export(Run.from_dict(keys)) == tmp_path / "out"
    assert verify_again(Run.from_dict(keys)).passed


# ------------------------------------------------------------------ broken in nine ways, and some more


def remerged(folder: Path, keys: dict[str, Any], base: Path | None = None, repeat: int = 1, **config: Any) -> None:
    """Weights of a merge into another base, of a changed adapter, or of the same one again."""
    adapter = folder.parent / "changed"
    shutil.copytree(keys["output_dir"], adapter)
    told = json.loads((adapter / "adapter_config.json").read_text())
    assert config.keys() <= told.keys()
    (adapter / "adapter_config.json").write_text(json.dumps(told | config))
    base = base or Path(keys["model_name_or_path"])
    dtype = load_file(folder / "model.safetensors")["model.norm.weight"].dtype
    ours = LoRA(LoRA.Options.model_validate({}))
    whole = merged(Trained(base, [adapter] * repeat, True), ours, load_tokenizer(adapter, False), False, dtype, CPU)
    whole.save(folder, 10**9)


def wrong_base(folder: Path, keys: dict[str, Any]) -> None:
    model = load_model(Path(keys["model_name_or_path"]), torch.float32, False)
    other = folder.parent / "other"
    shutil.copytree(keys["model_name_or_path"], other)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    model.save_pretrained(str(other))
    generation = (folder / "generation_config.json").read_text()
    remerged(folder, keys, base=other)
    (folder / "generation_config.json").write_text(generation)


def untied_head(folder: Path, keys: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))


def lost_token(folder: Path, keys: dict[str, Any]) -> None:
    save_tokenizer(load_tokenizer(Path(keys["model_name_or_path"]), False), folder, None)


def lost_row(folder: Path, keys: dict[str, Any]) -> None:
    row = load_tokenizer(folder, False).convert_tokens_to_ids("<|sum|>")
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][row] = weights["model.embed_tokens.weight"][:row].float().mean(0)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def wrong_template(folder: Path, keys: dict[str, Any]) -> None:
    path = folder / "chat_template.jinja"
    assert "<|im_start|>" in path.read_text()
    path.write_text("{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:")


def alpha_off(folder: Path, keys: dict[str, Any]) -> None:
    remerged(folder, keys, lora_alpha=8)  # it is 16


def rslora_ignored(folder: Path, keys: dict[str, Any]) -> None:
    remerged(folder, keys, use_rslora=False)


def eos_lost(folder: Path, keys: dict[str, Any]) -> None:
    path = folder / "generation_config.json"
    config = json.loads(path.read_text())
    config.pop("eos_token_id")
    path.write_text(json.dumps(config))
    whole = json.loads((folder / "config.json").read_text()) | {"eos_token_id": None}
    (folder / "config.json").write_text(json.dumps(whole))


def a_shard_missing(folder: Path, keys: dict[str, Any]) -> None:
    from finery.models.shards import Shards, write_shards

    weights = {name: Shards(folder).tensor(name) for name in Shards(folder).files}
    (folder / "model.safetensors").unlink()
    write_shards(weights.items(), folder, 20_000)
    next(folder.glob("model-00002*")).unlink()


def applied_twice(folder: Path, keys: dict[str, Any]) -> None:
    remerged(folder, keys, repeat=2)


def not_applied(folder: Path, keys: dict[str, Any]) -> None:
    remerged(folder, keys, repeat=0)


def not_finite(folder: Path, keys: dict[str, Any]) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


BROKEN: dict[Breaks, str] = {
    wrong_base: r"nats \(mean KL\)",
    untied_head: "nats|cannot be loaded",
    lost_token: "makes other tokens of",
    lost_row: r"nats \(mean KL\)",
    wrong_template: "makes other tokens of",
    alpha_off: r"it has \d+% of what the training has changed|merged and rounded once",
    rslora_ignored: r"it has \d+% of what the training has changed|merged and rounded once",
    eos_lost: r"does not end answers at '<\|im_end\|>'",
    a_shard_missing: "cannot be loaded",
    applied_twice: "it has 1[5-9]\\d%|it has 2\\d\\d%|nats",
    not_applied: "nats",
    not_finite: "not finite",
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("breaks", BROKEN, ids=lambda breaks: breaks.__name__)
def test_a_broken_export_is_caught(breaks: Breaks, dtype: str, trained: dict[str, Any], tmp_path: Path, here: None) -> None:
    keys = trained | {"export_dir": str(tmp_path / "out"), "export_dtype": dtype}
    folder = export(Run.from_dict(keys | {"export_verify": False}))
    assert json.loads((folder / "parity.json").read_text())["verified"] is False
    breaks(folder, keys)
    with pytest.raises(NotTheSame, match=BROKEN[breaks]):
        verify_again(Run.from_dict(keys))
    report = json.loads((folder / "parity.json").read_text())
    assert not report["passed"] and report["faults"]


def test_a_failed_export_is_named_so_and_the_old_one_stays(
    trained: dict[str, Any], tmp_path: Path, here: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"{key}={json.dumps(value)}" for key, value in (trained | {"export_dir": str(tmp_path / "out")}).items()]
    assert command.run(command_arguments(), words) == 0
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    write = type(Run.from_dict(trained).form).write

    def broken(self: Any, source: Any, folder: Path) -> None:
        write(self, source, folder)
        eos_lost(folder, trained)

    monkeypatch.setattr(type(Run.from_dict(trained).form), "write", broken)
    for _ in range(2):  # a failed one makes room for the next
        assert command.run(command_arguments(), words) == 1
    assert "out-failed is not what was trained: its generation config does not end answers" in capsys.readouterr().err
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    assert json.loads((tmp_path / "out-failed" / "parity.json").read_text())["passed"] is False
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out-failed"]


def command_arguments(*words: str) -> Any:
    from argparse import ArgumentParser

    parser = ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(words)


def test_verify_only(trained: dict[str, Any], tmp_path: Path, here: None, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"{key}={json.dumps(value)}" for key, value in (trained | {"export_dir": str(tmp_path / "out")}).items()]
    from finery.errors import UserError

    with pytest.raises(UserError, match=r"there is nothing in .* that could be verified"):
        command.run(command_arguments("--verify-only"), words)
    assert command.run(command_arguments(), [*words, "export_verify=false"]) == 0
    weights = (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns
    assert command.run(command_arguments("--verify-only"), words) == 0
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == weights
    eos_lost(tmp_path / "out", trained)
    assert command.run(command_arguments("--verify-only"), words) == 1


# ------------------------------------------------------------------ other things that are compared


def test_what_was_trained_on_few_bits_is_told_apart(keys: Callable[..., dict[str, Any]], here: None) -> None:
    pytest.importorskip("bitsandbytes")
    run = Run.from_dict(keys(quantization_bit=4, max_steps=4, learning_rate=0.01, export_verify=True))
    train(run)
    report = json.loads((export(run) / "parity.json").read_text())
    assert report["passed"] and report["distance"]["mean_kl"] < 1e-6 < report["as_trained"]["mean_kl"]


def test_whole_models(keys: Callable[..., dict[str, Any]], here: None) -> None:
    run = Run.from_dict(keys(finetuning_type="full", export_verify=True))
    train(run)
    report = json.loads((export(run) / "parity.json").read_text())
    assert report["passed"] and report["moved"] is None and report["exact"]["mean_kl"] < 1e-7


def test_a_training_that_did_nothing_is_told(keys: Callable[..., dict[str, Any]], here: None, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run.from_dict(keys(learning_rate=1e-12, export_verify=True))
    train(run)
    export(run)
    assert "the training has changed too little to tell" in capsys.readouterr().err


def test_little_memory_compares_in_half_precision(
    trained: dict[str, Any], tmp_path: Path, here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "free_bytes", lambda device: 1000)
    folder = export(Run.from_dict(trained | {"export_dir": str(tmp_path / "out"), "export_dtype": "bfloat16"}))
    report = json.loads((folder / "parity.json").read_text())
    assert report["passed"] and report["computed_in"] == "bfloat16"


def test_adapters_alone(trained: dict[str, Any], tmp_path: Path, here: None) -> None:
    keys = trained | {"export_dir": str(tmp_path / "out"), "export_format": "adapter"}
    folder = export(Run.from_dict(keys))
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "lineage.json", "parity.json"} <= {
        path.name for path in folder.iterdir()
    }
    told = json.loads((folder / "adapter_config.json").read_text())
    assert told["base_model_name_or_path"] == trained["model_name_or_path"]
    (folder / "adapter_config.json").write_text(json.dumps(told | {"lora_alpha": 3}))
    with pytest.raises(NotTheSame):
        verify_again(Run.from_dict(keys))
