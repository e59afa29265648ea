"""A claimed key is one that does something: every key has a case here that changes it and sees the difference."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import keys_of_adapters
import keys_of_data
import keys_of_engines
import keys_of_exports
import keys_of_losses
import keys_of_optimizers
import keys_of_precision
import keys_of_predictions
import keys_of_watching
from conftest import build_model
from finery.data.rows.base import Row
from finery.errors import UserError
from finery.models.kernels import KERNELS
from finery.run import own_keys
from watched import Bench, Case, Outcome, adapter_sum, checkpoints, evaluated_at, has, losses, rates, says, steps


@pytest.fixture
def bench(keys: Callable[..., dict[str, Any]], data_dir: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(keys, data_dir, tiny_model, tmp_path, monkeypatch)


# ------------------------------------------------------------------ what a case looks at


def norm_dtype(run: Outcome) -> torch.dtype:
    return run.trainer.model.get_base_model().model.norm.weight.dtype


def targets(run: Outcome) -> set[str]:
    return {name.split(".")[-3] for name in run.weights() if ".lora_A." in name}


def trained_of_full(run: Outcome) -> set[str]:
    return {name for name, weight in run.trainer.model.named_parameters() if weight.requires_grad}


def num_trained_layers(run: Outcome) -> int:
    return len({name.split(".")[2] for name in trained_of_full(run) if ".layers." in name})


def lanes_of(run: Outcome) -> list[Any]:
    """What the first step is cut into."""
    return run.trainer._share_out(rows_of(run))


def rows_of(run: Outcome) -> list[Row]:
    """Those of the first four samples."""
    return [row for place in range(4) for row in run.trainer.train_dataset[place]]


LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
FREEZE = {"finetuning_type": "freeze", "freeze_trainable_layers": 1}
HELD_OUT = {"val_size": 4, "max_steps": 3}  # measured once more when all is done
EACH_STEP = {"save_strategy": "steps", "save_steps": 1}
SAVES = EACH_STEP | {"max_steps": 3}
ALL = ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
EPOCHS = keys_of_data.EPOCH

FROM_OTHERS = keys_of_data.TRAINED | keys_of_adapters.TRAINED | keys_of_losses.TRAINED | keys_of_optimizers.TRAINED
FROM_OTHERS |= keys_of_watching.TRAINED | keys_of_predictions.TRAINED
TRAINED: dict[str, Case] = FROM_OTHERS | {
    "stage": Case("dreaming", says("'dreaming'"), (False, True)),
    "finetuning_type": Case("full", has("model.safetensors"), (False, True)),
    "infer_backend": Case("telepathy", says("'telepathy'"), (False, True)),
    "upcast_layernorm": Case(True, norm_dtype, (torch.bfloat16, torch.float32), {"pure_bf16": True}),
    "pure_bf16": Case(True, lambda run: {tensor.dtype for tensor in run.weights().values()}, ({torch.float32}, {torch.bfloat16})),
    "resize_vocab": Case(True, says("the embeddings grow"), (True, False), {"template": "llama3"}),
    "template": Case("alpaca", says("is not the one that this model was made with"), (False, True)),
    "default_system": Case("Be very brief.", losses),
    "tool_format": Case("telepathy", says("'telepathy'"), (False, True)),
    "enable_thinking": Case(False, losses, None, {"template": "qwen3"}),
    "per_device_train_batch_size": Case(2, losses),
    "per_device_eval_batch_size": Case(1, lambda run: len(run.trainer.get_eval_dataloader()), (1, 4), HELD_OUT),
    "learning_rate": Case(2e-3, rates, ([1e-3, 5e-4], [2e-3, 1e-3])),
    "num_train_epochs": Case(2, steps, (2, 4), EPOCHS),
    "max_steps": Case(1, steps, (2, 1)),
    "lr_scheduler_type": Case("constant", rates, ([1e-3, 5e-4], [1e-3, 1e-3])),
    "warmup_ratio": Case(0.5, rates, ([1e-3, 5e-4], [0.0, 1e-3])),
    "warmup_steps": Case(1, rates, ([1e-3, 5e-4], [0.0, 1e-3])),
    "weight_decay": Case(0.5, adapter_sum),
    "max_grad_norm": Case(1e-3, adapter_sum),
    "logging_steps": Case(2, lambda run: len(losses(run)), (2, 1)),
    "save_strategy": Case("epoch", checkpoints, (ALL[:2], ALL[1:2]), EPOCHS | EACH_STEP),
    "save_steps": Case(2, checkpoints, (ALL, ALL[1:]), SAVES),
    "save_total_limit": Case(1, checkpoints, (ALL, ALL[2:]), SAVES),
    "eval_strategy": Case("epoch", evaluated_at, ([3], [2, 3]), HELD_OUT | {"per_device_train_batch_size": 10}),
    "eval_steps": Case(2, evaluated_at, ([1, 2, 3], [2, 3]), HELD_OUT | {"eval_strategy": "steps"}),
    "seed": Case(7, losses),
    "fp16": Case(True, says("fp16 needs a GPU"), (False, True)),
    "ddp_timeout": Case(77, lambda run: run.trainer.args.ddp_timeout, (1800, 77)),
    "plot_loss": Case(True, has("training_loss.png"), (False, True)),
    "freeze_trainable_layers": Case(2, num_trained_layers, (1, 2), FREEZE),
    "freeze_trainable_modules": Case("mlp", lambda run: any("self_attn" in name for name in trained_of_full(run)), (True, False), FREEZE),
    "freeze_extra_modules": Case("norm", lambda run: "model.norm.weight" in trained_of_full(run), (False, True), FREEZE),
    "lora_rank": Case(4, lambda run: {min(tensor.shape) for tensor in run.weights().values()}, ({8}, {4})),
    "lora_alpha": Case(64, lambda run: (run.adapter["lora_alpha"], losses(run))),
    "lora_dropout": Case(0.5, losses),
    "lora_target": Case("q_proj, v_proj", targets, (LINEAR, {"q_proj", "v_proj"})),
    **{key: Case(False, says(f"{key} in "), (True, False)) for key in ("rms_norm", "gated_mlp", "rotary", "lora_linear", "head_loss")},
    "mixed_linear": Case(False, says("mixed_linear in "), (True, False), {"finetuning_type": "full", "bf16": True}),
    "packed_attention": Case(False, says("rows end to end"), (True, False)),
    "flash_attn": Case("disabled", says("rows end to end"), (True, False)),
    "enable_liger_kernel": Case(True, says("Finery's own kernels serve"), (False, True)),
    "use_unsloth": Case(True, says("Finery's own kernels serve"), (False, True)),
    "use_unsloth_gc": Case(True, lambda run: run.trainer.args.activation_checkpointing, (False, True)),
    "token_budget": Case(40, lambda run: (run.trainer.choices["token_budget"], sum(map(len, lanes_of(run)))), ((1024, 1), (40, 4))),
    "micro_batches_at_once": Case(2, lambda run: run.trainer.lanes.most, (1, 2)),
    "profile": Case(True, lambda run: (run.folder / "profile" / "trace.json").exists(), (False, True)),
    "additional_target": Case("norm", lambda run: any(name.endswith("model.norm.weight") for name in run.weights()), (False, True)),
}
"""Keys that a training run shows by itself."""


@pytest.mark.parametrize("key", TRAINED)
def test_training_shows_it(key: str, bench: Bench) -> None:
    case = TRAINED[key]
    before, after = case.look(bench.once(**case.base)), case.look(bench.once(**{**case.base, key: case.value}))
    if case.wants is None:
        assert before != after
    else:
        assert (before, after) == case.wants


# ------------------------------------------------------------------ keys that need more than two runs to compare


def adapter_name_or_path(bench: Bench) -> None:
    first = bench.once(learning_rate=0.01)
    assert losses(bench.train(adapter_name_or_path=str(first.folder)))[0] < losses(bench.once())[0]


def create_new_adapter(bench: Bench) -> None:
    base = {"adapter_name_or_path": str(bench.once(learning_rate=0.01).folder), "lora_rank": 2}
    assert bench.train(**base).adapter["r"] == 8  # goes on with the adapter as it is
    assert bench.train(**base, create_new_adapter=True).adapter["r"] == 2


def model_name_or_path(bench: Bench) -> None:
    other = build_model(bench.tmp_path / "other", initializer_range=0.5)
    assert losses(bench.train(model_name_or_path=str(other))) != losses(bench.once())


def hub_keys(key: str, value: str, look: Callable[[dict[str, Any]], Any]) -> Callable[[Bench], None]:
    """A case that looks at what the hub is asked for."""

    def case(bench: Bench) -> None:
        asked: list[dict[str, Any]] = []

        def fetch(name: str, **how: Any) -> Path:
            asked.append(how)
            raise UserError("that is all we wanted to know")

        bench.patch.setattr("finery.models.load.fetch", fetch)
        for changes in ({}, {key: value}):
            bench.train(model_name_or_path="somebody/tiny", **changes)
        before, after = (look(how) for how in asked)
        assert (before, after) == ("main" if key == "model_revision" else None, value)

    return case


FOREIGN = """
from transformers import LlamaConfig, LlamaForCausalLM

class C(LlamaConfig):
    model_type = "foreign"

class M(LlamaForCausalLM):
    config_class = C
"""


def trust_remote_code(bench: Bench) -> None:
    from transformers import dynamic_module_utils

    bench.patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(bench.tmp_path / "modules"))
    model = shutil.copytree(bench.tiny_model, bench.tmp_path / "foreign")
    (model / "foreign.py").write_text(FOREIGN)
    config = json.loads((model / "config.json").read_text())
    auto = {"AutoConfig": "foreign.C", "AutoModelForCausalLM": "foreign.M"}
    (model / "config.json").write_text(json.dumps(config | {"model_type": "foreign", "auto_map": auto}))
    assert "set 'trust_remote_code: true'" in bench.train(model_name_or_path=str(model)).complaint
    assert losses(bench.train(model_name_or_path=str(model), trust_remote_code=True)) == losses(bench.once())


def dataset_dir(bench: Bench) -> None:
    folder = shutil.copytree(bench.data_dir, bench.tmp_path / "data")
    (folder / "sums.json").write_text((folder / "names.json").read_text())
    assert "train: 6 samples" in bench.train(dataset_dir=str(folder)).said


def output_dir(bench: Bench) -> None:
    elsewhere = bench.tmp_path / "elsewhere"
    assert bench.train(output_dir=str(elsewhere)).folder == elsewhere and (elsewhere / "adapter_model.safetensors").exists()


def overwrite_output_dir(bench: Bench) -> None:
    done = bench.train()
    assert "holds a trained model already" in bench.train(output_dir=str(done.folder)).complaint
    assert not bench.train(output_dir=str(done.folder), overwrite_output_dir=True).complaint


def do_train(bench: Bench) -> None:
    assert not has("adapter_model.safetensors")(bench.once(do_train=False, do_eval=True, val_size=4))
    assert has("adapter_model.safetensors")(bench.once(do_eval=True, val_size=4))


def do_eval(bench: Bench) -> None:
    assert "nothing to do" in bench.once(do_train=False, val_size=4).complaint
    assert has("eval_results.json")(bench.once(do_train=False, do_eval=True, val_size=4))


def gradient_accumulation_steps(bench: Bench) -> None:
    assert losses(bench.once(gradient_accumulation_steps=2)) == pytest.approx(losses(bench.once(per_device_train_batch_size=8)), abs=1e-6)
    assert losses(bench.once(gradient_accumulation_steps=2)) != losses(bench.once())


def load_best_model_at_end(bench: Bench) -> None:
    worse = (
        HELD_OUT | EACH_STEP | {"eval_strategy": "steps", "finetuning_type": "full", "learning_rate": 0.3, "lr_scheduler_type": "constant"}
    )
    run = bench.train(**worse, load_best_model_at_end=True)
    assert run.column("eval_loss")[-1] == min(run.column("eval_loss")) < run.column("eval_loss")[2]
    last = bench.train(**worse)
    assert last.column("eval_loss")[-1] == last.column("eval_loss")[2]


def bf16(bench: Bench) -> None:
    bench.patch.setattr("finery.models.precision.cpu_computes_bf16", lambda: True)
    run = bench.train(bf16=True)
    assert (bench.once().trainer.args.bf16, run.trainer.args.bf16) == (False, True)
    assert losses(run) != losses(bench.once())


def gradient_checkpointing(bench: Bench) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    forward, calls = LlamaMLP.forward, []

    def counted(self: Any, x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return forward(self, x)

    bench.patch.setattr(LlamaMLP, "forward", counted)
    own = {"micro_batches_at_once": 1}  # nor one that looks for dice
    own |= {KERNELS[name].switch: False for name in KERNELS.names()}  # the class's own forward, and no trial that runs it
    plain = bench.train(**own)
    num_plain = len(calls)
    recomputed = bench.train(gradient_checkpointing=True, **own)
    assert len(calls) - num_plain == 2 * num_plain
    assert adapter_sum(recomputed) == pytest.approx(adapter_sum(plain), rel=1e-6)


def disable_gradient_checkpointing(bench: Bench) -> None:
    assert not bench.train(disable_gradient_checkpointing=True).trainer.args.activation_checkpointing
    assert "exclude each other" in bench.train(gradient_checkpointing=True, disable_gradient_checkpointing=True).complaint


def resume_from_checkpoint(bench: Bench) -> None:
    whole = bench.once(**SAVES)
    rest = bench.train(**SAVES, resume_from_checkpoint=str(whole.folder / "checkpoint-2"))
    assert [line["current_steps"] for line in rest.log if "loss" in line] == [3]
    assert losses(rest) == losses(whole)[2:]


def generates(key: str, value: Any, **base: Any) -> Callable[[Bench], None]:
    """A case that compares two answers."""

    def case(bench: Bench) -> None:
        before, after = bench.chat(**base), bench.chat(**{**base, key: value})
        assert before and after and before != after

    return case


def max_new_tokens(bench: Bench) -> None:
    short, long = bench.chat(max_new_tokens=3), bench.chat(max_new_tokens=12)
    assert long.startswith(short) and len(short) < len(long)


def infer_dtype(bench: Bench) -> None:
    for asked, dtype in (("auto", torch.float32), ("bfloat16", torch.bfloat16)):
        assert bench.export(infer_dtype=asked).weights("model.safetensors")["model.norm.weight"].dtype == dtype


def export_dir(bench: Bench) -> None:
    assert bench.export(export_dir=str(bench.tmp_path / "here")).folder == bench.tmp_path / "here"
    assert bench.export().folder.name.endswith("-merged")


def export_size(bench: Bench) -> None:
    from finery.models.shards import write_shards

    # the key counts in GB, the tiny model has 0.00012 of them
    bench.patch.setattr("finery.models.merging.write_shards", lambda tensors, folder, size: write_shards(tensors, folder, int(size * 6e-5)))
    assert [len(list(bench.export(export_size=size).folder.glob("*.safetensors"))) for size in (5, 1)] == [1, 3]


def export_device(bench: Bench) -> None:
    from finery.models import merging

    devices: list[str] = []
    merged: Any = merging.merged

    def spy(*args: Any) -> Any:
        devices.append(args[-1].type)
        return merged(*args[:-1], torch.device("cpu"))

    bench.patch.setattr(merging, "merged", spy)
    bench.patch.setattr(torch.cuda, "is_available", lambda: True)
    assert not bench.export().complaint and not bench.export(export_device="auto").complaint
    assert devices == ["cpu", "cuda"]


def export_legacy_format(bench: Bench) -> None:
    assert "never written" not in bench.export().said
    assert "never written" in bench.export(export_legacy_format=True).said


NAMED: tuple[Any, ...] = (
    adapter_name_or_path, create_new_adapter, model_name_or_path, trust_remote_code, dataset_dir,
    output_dir, overwrite_output_dir, do_train, do_eval, gradient_accumulation_steps,
    load_best_model_at_end, bf16, gradient_checkpointing, disable_gradient_checkpointing, resume_from_checkpoint,
    max_new_tokens,
    infer_dtype, export_dir, export_size, export_device, export_legacy_format,
)  # fmt: skip

OTHERS: dict[str, Callable[[Bench], None]] = (
    keys_of_data.OTHERS
    | keys_of_adapters.OTHERS
    | keys_of_engines.OTHERS
    | keys_of_exports.OTHERS
    | keys_of_losses.OTHERS
    | keys_of_optimizers.OTHERS
    | keys_of_precision.OTHERS
    | keys_of_predictions.OTHERS
    | keys_of_watching.OTHERS
    | {case.__name__: case for case in NAMED}
    | {
        "model_revision": hub_keys("model_revision", "v2", lambda how: how["revision"]),
        "cache_dir": hub_keys("cache_dir", "/somewhere", lambda how: how["cache_dir"]),
        "hf_hub_token": hub_keys("hf_hub_token", "secret", lambda how: how["tokens"]["hf"]),
        "ms_hub_token": hub_keys("ms_hub_token", "secret", lambda how: how["tokens"]["ms"]),
        "om_hub_token": hub_keys("om_hub_token", "secret", lambda how: how["tokens"]["om"]),
        "do_sample": generates("do_sample", True),
        "temperature": generates("temperature", 0, do_sample=True),
        "top_p": generates("top_p", 1e-6, do_sample=True),
        "top_k": generates("top_k", 1, do_sample=True),
        "repetition_penalty": generates("repetition_penalty", 5.0),
    }
)
"""Keys that show elsewhere: in the hub's mail, in answers, in exports, in a second run."""


@pytest.mark.parametrize("key", OTHERS)
def test_it_shows_elsewhere(key: str, bench: Bench) -> None:
    OTHERS[key](bench)


def test_every_key_has_a_case() -> None:
    assert TRAINED.keys() | OTHERS.keys() == own_keys()
    assert not TRAINED.keys() & OTHERS.keys()


def test_secrets_are_not_written(bench: Bench) -> None:
    run = bench.train(hf_hub_token="hf_very_secret")
    assert "hf_very_secret" not in "".join(path.read_text() for path in _texts(run.folder)) + run.said


def _texts(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.suffix in (".yaml", ".json", ".jsonl", ".md"))
