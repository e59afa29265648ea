"""Models that see, trained on texts: which of their parts learn, what is saved of them, and how they come back."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from composites import build
from conftest import build_model
from finery.commands.chat import answer
from finery.commands.export import export
from finery.commands.train import train
from finery.errors import UserError
from finery.models.adapters import ADAPTERS
from finery.models.adapters.base import AdapterOptions, layer_stack, num_trained
from finery.models.composite import auto_class, parts_of
from finery.models.expansion import expand
from finery.models.load import load_model, own_dtype
from finery.run import Run

Keys = Callable[..., dict[str, Any]]
KINDS = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "gemma3", "llava"]
PARTS = {"freeze_vision_tower": "vision tower", "freeze_multi_modal_projector": "projector", "freeze_language_model": "language model"}
IDS = torch.tensor([[5, 9, 40, 77, 3, 120]])
LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.fixture(scope="module")
def composites(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("composites")
    return {kind: build(folder / kind, kind) for kind in KINDS}


@pytest.fixture(params=KINDS)
def composite(request: pytest.FixtureRequest, composites: dict[str, Path]) -> Path:
    return composites[request.param]


def load(folder: Path) -> Any:
    return load_model(folder, torch.float32, False)


def applied(folder: Path, adapter: str, **options: Any) -> Any:
    """The model, made trainable."""
    part = ADAPTERS[adapter]
    shared = AdapterOptions(**{key: value for key, value in options.items() if key in AdapterOptions.model_fields})
    own = part.Options(**{key: value for key, value in options.items() if key in part.Options.model_fields})
    return part(own, shared).apply(load(folder))


def plain_name(name: str) -> str:
    """A weight's path without what an adapter adds to it."""
    return name.removeprefix("base_model.model.").replace(".base_layer", "").replace(".modules_to_save.default", "")


def trained(model: Any) -> set[str]:
    return {plain_name(name) for name, weight in model.named_parameters() if weight.requires_grad}


def trained_parts(model: Any) -> set[str]:
    parts = parts_of(model)
    return {parts.of(name) for name, weight in model.named_parameters() if weight.requires_grad}


def adapted(model: Any) -> set[str]:
    """The paths of the layers that an adapter stands beside."""
    return {name.partition(".lora_")[0].partition(".oft_")[0] for name in trained(model)}


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "trainer_log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def complaint(work: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as caught:
        work()
    return str(caught.value)


# ------------------------------------------------------------------ what they are


def test_all_parts_are_loaded_and_told_apart(composite: Path) -> None:
    model = load(composite)
    parts = parts_of(model)
    assert parts.present == set(PARTS.values())
    for name, _ in model.named_parameters():
        dotted = f".{name}."
        sees = any(word in dotted for word in (".visual.", ".vision_tower."))
        joins = ".visual.merger." in dotted or ".multi_modal_projector." in dotted
        assert parts.of(name) == ("projector" if joins else "vision tower" if sees else "language model"), name


def test_the_language_model_s_layers_are_found_beside_a_deeper_tower(composite: Path) -> None:
    name, layers = layer_stack(load(composite))
    assert (name, len(layers)) == ("model.language_model.layers.", 2)


def test_a_plain_model_is_a_language_model_alone(tiny_model: Path) -> None:
    parts = parts_of(load(tiny_model))
    assert not parts.is_composite
    assert {parts.of("model.layers.0.mlp.up_proj"), parts.of("model.visual.merger")} == {"language model"}


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"model_type": "llama"}, "AutoModelForCausalLM"),
        ({"model_type": "unheard_of"}, "AutoModelForCausalLM"),
        ({"model_type": "llava"}, "AutoModelForMultimodalLM"),
        ({"model_type": "voxtral", "architectures": ["VoxtralForConditionalGeneration"]}, "AutoModelForMultimodalLM"),
        ({"model_type": "qwen3_5", "architectures": ["Qwen3_5ForConditionalGeneration"]}, "AutoModelForMultimodalLM"),
        ({"model_type": "qwen3_5", "architectures": ["Qwen3_5ForCausalLM"]}, "AutoModelForCausalLM"),
        ({"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"]}, "AutoModelForMultimodalLM"),
        ({"model_type": "own", "auto_map": {"AutoModelForImageTextToText": "code.Model"}}, "AutoModelForImageTextToText"),
        ({"model_type": "own", "auto_map": {"AutoModelForCausalLM": "code.Model"}}, "AutoModelForCausalLM"),
    ],
)
def test_which_class_reads_a_folder(config: dict[str, Any], name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert auto_class(tmp_path).__name__ == name


@pytest.mark.parametrize(
    ("kind", "why"), [("udop", "a decoder beside an encoder"), ("qwen2_5_omni", "qwen2_5_omni_thinker can be trained")]
)
def test_others_are_refused(kind: str, why: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    said = complaint(lambda: load(tmp_path))
    assert said.startswith(f"{tmp_path} holds a model of type {kind!r}, which cannot be trained here: ") and why in said


def test_the_number_format_may_stand_with_the_text(composites: dict[str, Path], tmp_path: Path) -> None:
    config = json.loads((composites["llava"] / "config.json").read_text())
    config |= {"dtype": None, "text_config": config["text_config"] | {"dtype": "bfloat16"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert own_dtype(tmp_path, False) == torch.bfloat16


# ------------------------------------------------------------------ what is trained

FLAGS = [
    dict(zip(PARTS, values, strict=True))
    for values in [
        (True, True, False),
        (False, True, False),
        (True, False, False),
        (False, False, False),
        (True, False, True),
        (False, True, True),
    ]
]


@pytest.mark.parametrize("flags", FLAGS, ids=lambda flags: "-".join(part for key, part in PARTS.items() if not flags[key]))
@pytest.mark.parametrize("adapter", ["full", "freeze", "lora", "oft"])
def test_just_the_parts_that_are_not_frozen_are_trained(adapter: str, flags: dict[str, bool], composites: dict[str, Path]) -> None:
    for kind in ("qwen2_5_vl", "llava"):
        model = applied(composites[kind], adapter, **flags, oft_block_size=8)
        assert trained_parts(model) == {part for key, part in PARTS.items() if not flags[key]}, kind


def test_full_trains_every_weight_of_an_open_part(composite: Path) -> None:
    model = applied(composite, "full", freeze_multi_modal_projector=False)
    parts = parts_of(model)
    assert trained(model) == {name for name, _ in model.named_parameters() if parts.of(name) != "vision tower"}


def test_freeze_counts_the_language_model_s_layers(composite: Path) -> None:
    assert {name.partition(".layers.")[::2][1][:2] for name in trained(applied(composite, "freeze", freeze_trainable_layers=1))} == {"1."}
    said = complaint(lambda: applied(composite, "freeze", freeze_trainable_layers=3))
    assert "but the model has 2 layers" in said


def test_freeze_trains_modules_beside_the_layers_in_open_parts_alone(composites: dict[str, Path]) -> None:
    named = {"freeze_trainable_modules": "q_proj", "freeze_extra_modules": "embed_tokens", "freeze_trainable_layers": 1}
    assert trained(applied(composites["llava"], "freeze", **named)) == {
        "model.language_model.embed_tokens.weight",
        "model.language_model.layers.1.self_attn.q_proj.weight",
    }
    said = complaint(lambda: applied(composites["llava"], "freeze", freeze_extra_modules="linear_1"))
    told = (
        "'freeze_extra_modules': 'linear_1' is in the projector of this model, which is frozen: set 'freeze_multi_modal_projector: false'"
    )
    assert said.startswith(told)


@pytest.mark.parametrize("adapter", ["lora", "oft", "peft"])
def test_all_is_all_linear_layers_of_the_language_model(adapter: str, composite: Path) -> None:
    layers = adapted(applied(composite, adapter, oft_block_size=8))
    assert {path.rpartition(".")[2] for path in layers} == LINEAR
    assert all(path.startswith("model.language_model.layers.") for path in layers) and len(layers) == 14


def test_all_reaches_an_open_projector(composites: dict[str, Path]) -> None:
    joined = {
        "qwen2_vl": "model.visual.merger.mlp.0",
        "qwen3_vl": "model.visual.merger.linear_fc1",
        "llava": "model.multi_modal_projector.linear_1",
    }
    for kind, path in joined.items():
        layers = adapted(applied(composites[kind], "lora", freeze_multi_modal_projector=False))
        assert path in layers and len(layers) == 16


def test_names_are_those_of_open_parts(composites: dict[str, Path]) -> None:
    """CLIP's tower has layers of the same name."""
    inside = {f"model.language_model.layers.{number}.self_attn.q_proj" for number in (0, 1)}
    tower = {f"model.vision_tower.encoder.layers.{number}.self_attn.q_proj" for number in (0, 1, 2)}
    for asked in ("q_proj", r".*\.q_proj"):
        assert adapted(applied(composites["llava"], "lora", lora_target=asked)) == inside
        assert adapted(applied(composites["llava"], "lora", lora_target=asked, freeze_vision_tower=False)) == inside | tower
        assert (
            adapted(applied(composites["llava"], "lora", lora_target=asked, freeze_vision_tower=False, freeze_language_model=True)) == tower
        )


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            {"lora_target": "fc1"},
            "'lora_target': 'fc1' is in the vision tower of this model, which is frozen: set 'freeze_vision_tower: false'",
        ),
        (
            {"lora_target": "q_proj", "freeze_language_model": True, "freeze_multi_modal_projector": False},
            "'lora_target': 'q_proj' is in the language model and vision tower of this model, which is frozen: "
            "set 'freeze_vision_tower: false', 'freeze_language_model: false'",
        ),
        ({"lora_target": ".*mlp.fc[12]"}, "'lora_target': '.*mlp.fc[12]' is in the vision tower of this model"),
        ({"additional_target": "multi_modal_projector"}, "'additional_target': 'multi_modal_projector' is in the projector of this model"),
        ({"lora_target": "fc3"}, "'lora_target': the model has no linear layer 'fc3'; there are: down_proj, fc1, "),
        ({"additional_target": "projektor"}, "'additional_target': the model has no module 'projektor'"),
    ],
)
def test_names_in_frozen_parts_are_refused(options: dict[str, Any], told: str, composites: dict[str, Path]) -> None:
    assert complaint(lambda: applied(composites["llava"], "lora", **options)).startswith(told)


def test_an_open_part_may_be_trained_whole_beside_an_adapter(composites: dict[str, Path]) -> None:
    model = applied(composites["gemma3"], "lora", freeze_multi_modal_projector=False, additional_target="multi_modal_projector")
    whole = {name for name in trained(model) if ".lora_" not in name}
    assert whole == {f"model.multi_modal_projector.{name}" for name in ("mm_input_projection_weight", "mm_soft_emb_norm.weight")}


def test_an_open_part_without_linear_layers_is_told(composites: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    applied(composites["gemma3"], "lora", freeze_multi_modal_projector=False)
    assert "the projector of this model has no linear layers; 'additional_target' may name its modules" in capsys.readouterr().err
    alone = {"freeze_multi_modal_projector": False, "freeze_language_model": True}
    assert complaint(lambda: applied(composites["gemma3"], "lora", **alone)).startswith("'lora_target': the projector of this model has no")


@pytest.mark.parametrize("adapter", ["full", "freeze", "lora", "oft", "peft"])
def test_all_parts_frozen(adapter: str, composites: dict[str, Path]) -> None:
    said = complaint(lambda: applied(composites["llava"], adapter, freeze_language_model=True))
    assert said.startswith(
        "'freeze_vision_tower', 'freeze_multi_modal_projector', 'freeze_language_model': all parts of this model are frozen"
    )


@pytest.mark.parametrize("adapter", ["full", "freeze", "lora", "oft"])
def test_keys_without_effect_on_a_plain_model_are_told_once(adapter: str, tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = num_trained(applied(tiny_model, adapter, oft_block_size=8))
    assert "no effect" not in capsys.readouterr().err
    assert num_trained(applied(tiny_model, adapter, oft_block_size=8, freeze_language_model=True, freeze_vision_tower=False)) == before
    told = "'freeze_vision_tower', 'freeze_language_model': no effect, since LlamaForCausalLM is a language model alone"
    assert capsys.readouterr().err.count(told) == 1


def test_llama_pro_s_layers_are_those_of_the_language_model(composites: dict[str, Path], tmp_path: Path) -> None:
    model = load(composites["llava"])
    before = logits(model)
    expand(model, 1)
    assert torch.allclose(logits(model), before, atol=1e-5) and model.config.text_config.num_hidden_layers == 3
    model.save_pretrained(str(tmp_path))
    added = {"use_llama_pro": True, "freeze_trainable_layers": 1}
    for adapter in ("lora", "freeze"):
        assert {name.split(".layers.")[1][0] for name in trained(applied(tmp_path, adapter, **added))} == {"2"}


# ------------------------------------------------------------------ whole runs


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_a_run_goes_on_comes_back_and_is_exported(adapter: str, composite: Path, keys: Keys, tmp_path: Path) -> None:
    """With embeddings that lie under other names in files than in the code, as most of these have them."""
    (composite / "preprocessor_config.json").write_text('{"image_processor_type": "CLIPImageProcessor"}')
    asked = {"model_name_or_path": str(composite), "finetuning_type": adapter, "learning_rate": 0.01}
    out = train(Run.from_dict(keys(**asked, max_steps=3, save_strategy="steps", save_steps=2), trains=True))
    again = {"output_dir": str(tmp_path / "again"), "resume_from_checkpoint": str(out / "checkpoint-2")}
    assert losses(train(Run.from_dict(keys(**asked, **again, max_steps=3), trains=True))) == losses(out)[2:]

    merged = export(Run.from_dict(keys(**asked, export_dir=str(tmp_path / "merged"))))
    for folder in (merged, out):
        assert (folder / "preprocessor_config.json").exists()
    found, base = load(merged), load(composite)
    assert type(found) is type(base)
    expected = ADAPTERS["lora"](ADAPTERS["lora"].Options()).merge(load(composite), [out]) if adapter == "lora" else load(out)
    assert torch.allclose(logits(found), logits(expected), atol=1e-4)
    assert not torch.allclose(logits(found), logits(base), atol=1e-2)
    for name in ("config.json", "model.safetensors"):
        assert (merged / name).exists()
    assert load_file(merged / "model.safetensors").keys() == load_file(composite / "model.safetensors").keys()
    ours = answer(Run.from_dict(keys(**asked, do_sample=False, max_new_tokens=6)), [{"role": "user", "content": "What is 3 plus 4?"}])
    theirs = answer(
        Run.from_dict({"model_name_or_path": str(merged), "do_sample": False, "max_new_tokens": 6}),
        [{"role": "user", "content": "What is 3 plus 4?"}],
    )
    assert ours == theirs


def test_rows_end_to_end_and_all_kernels_give_the_plain_losses(composite: Path, keys: Keys, tmp_path: Path) -> None:
    off = dict.fromkeys(("packed_attention", "head_loss", "rms_norm", "gated_mlp", "rotary", "lora_linear"), False)
    asked = {"model_name_or_path": str(composite), "learning_rate": 0.01}
    fast = train(Run.from_dict(keys(**asked), trains=True))
    plain = train(Run.from_dict(keys(**asked, **off, output_dir=str(tmp_path / "plain")), trains=True))
    assert losses(fast) == pytest.approx(losses(plain), rel=1e-4)


def test_a_tower_goes_on_as_it_is_in_attention(composites: dict[str, Path], keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    """It sees in both directions, which attention over rows of text does not."""
    from finery.training import session

    models: list[Any] = []
    monkeypatch.setattr(session, "make_fast", lambda model, *rest, plain=session.make_fast: models.append(model) or plain(model, *rest))
    train(Run.from_dict(keys(model_name_or_path=str(composites["llava"])), trains=True))
    config = models[0].config
    assert (config.text_config._attn_implementation, config.vision_config._attn_implementation) == ("finery", "sdpa")


def test_new_tokens_are_trained_in_the_language_model(composite: Path, keys: Keys) -> None:
    out = train(Run.from_dict(keys(model_name_or_path=str(composite), add_tokens="plus", resize_vocab=True), trains=True))
    rows = [name for name in load_file(out / "adapter_model.safetensors") if "token_adapter" in name or "trainable_tokens" in name]
    assert rows and all("language_model" in name or "lm_head" in name for name in rows)


def test_texts_cannot_teach_a_projector_alone(composites: dict[str, Path], keys: Keys) -> None:
    alone = {"freeze_language_model": True, "freeze_multi_modal_projector": False}
    asked = keys(model_name_or_path=str(composites["llava"]), **alone)
    said = complaint(lambda: train(Run.from_dict(asked, trains=True)))
    assert said.startswith("this step would learn nothing: only a vision tower or a projector is trained")


def test_the_best_of_several_checkpoints_is_read_back(composites: dict[str, Path], keys: Keys) -> None:
    """At a rate that spoils the model, the first is the best."""
    watched = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True}
    asked = {
        "model_name_or_path": str(composites["gemma3"]),
        "finetuning_type": "full",
        "val_size": 4,
        "max_steps": 3,
        "learning_rate": 3.0,
    }
    out = train(Run.from_dict(keys(**asked, **watched), trains=True))
    best = json.loads((out / "trainer_state.json").read_text())["best_model_checkpoint"]
    for name, weight in load_file(Path(best) / "model.safetensors").items():
        assert torch.equal(load_file(out / "model.safetensors")[name], weight), name


def test_a_model_of_other_names_in_its_files_goes_on(keys: Keys, tmp_path: Path) -> None:
    """Experts lie one by one in files, and fused in the code: transformers' own loop reads none of them."""
    from transformers import MixtralConfig, MixtralForCausalLM

    folder = build_model(tmp_path / "experts")
    sizes: dict[str, Any] = {
        "vocab_size": 364,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    torch.manual_seed(0)
    MixtralForCausalLM(MixtralConfig(**sizes, num_hidden_layers=1, num_local_experts=2)).save_pretrained(str(folder))
    asked = {"model_name_or_path": str(folder), "finetuning_type": "full", "learning_rate": 0.01, "max_steps": 3}
    out = train(Run.from_dict(keys(**asked, save_strategy="steps", save_steps=2), trains=True))
    again = {"output_dir": str(tmp_path / "again"), "resume_from_checkpoint": str(out / "checkpoint-2")}
    assert losses(train(Run.from_dict(keys(**asked, **again), trains=True))) == losses(out)[2:]
