"""Cases of the keys of adapters and of added tokens: what each does to what is trained. `test_every_key.py` runs them."""

from collections.abc import Callable
from typing import Any

from composites import build
from conftest import build_model
from watched import Bench, Case, Outcome, has, losses, says

OFT = {"finetuning_type": "oft", "oft_block_size": 8}
PEFT = {"finetuning_type": "peft", "peft_type": "loha"}
PISSA = {"pissa_init": True, "lora_rank": 4}
FREEZE = {"finetuning_type": "freeze"}


def ranks(run: Outcome) -> set[int]:
    return {weight.shape[0] for name, weight in run.weights().items() if ".lora_A." in name}


def adapted(run: Outcome) -> set[str]:
    """The layers that an adapter stands beside, by their last names."""
    return {name.partition(".oft_")[0].rpartition(".")[2] for name in run.weights() if ".oft_" in name}


def told(key: str) -> Callable[[Outcome], Any]:
    """What the adapter's own config says of a key."""
    return lambda run: run.adapter[key]


def trained_layers(run: Outcome) -> set[str]:
    return {
        name.split(".layers.")[1][0] for name, weight in run.trainer.model.named_parameters() if weight.requires_grad and ".layers." in name
    }


TRAINED: dict[str, Case] = {
    "use_rslora": Case(True, lambda run: (run.adapter["use_rslora"], losses(run))),
    "use_dora": Case(True, lambda run: any("magnitude" in name for name in run.weights()), (False, True)),
    "lora_rank_pattern": Case({"q_proj": 2}, ranks, ({8}, {2, 8})),
    "lora_alpha_pattern": Case({"q_proj": 99}, lambda run: (run.adapter["alpha_pattern"], losses(run))),
    "pissa_init": Case(True, lambda run: (run.adapter["r"], losses(run))),
    "pissa_iter": Case(-1, lambda run: sorted(float(weight.sum()) for weight in run.weights().values()), None, PISSA | {"pissa_iter": 0}),
    "pissa_convert": Case(True, has("pissa_backup"), (False, True), PISSA),
    "loftq_init": Case(True, says("set 'quantization_bit'"), (False, True)),
    "oft_rank": Case(2, told("r"), (0, 2), OFT),
    "oft_block_size": Case(4, told("oft_block_size"), (8, 4), OFT),
    "oft_target": Case("q_proj", adapted, ({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}, {"q_proj"}), OFT),
    "module_dropout": Case(0.5, says("peft 0.21 builds OFT's dropout and does not apply it"), (False, True), OFT),
    "peft_type": Case("lokr", told("peft_type"), ("LOHA", "LOKR"), PEFT),
    "peft_config": Case({"r": 2}, told("r"), (8, 2), PEFT),
    "use_llama_pro": Case(True, trained_layers, ({"0", "1"}, {"1"}), {"freeze_trainable_layers": 1}),
    "add_tokens": Case("plus", lambda run: any("token" in name for name in run.weights()), (False, True)),
    "add_special_tokens": Case("<|think|>", lambda run: any("token" in name for name in run.weights()), (False, True)),
}


def new_special_tokens_config(bench: Bench) -> None:
    path = bench.tmp_path / "tokens.yaml"
    path.write_text('"<|think|>": Who are you?\n')
    run = bench.train(new_special_tokens_config=str(path))
    assert any("token" in name for name in run.weights())


def init_special_tokens(bench: Bench) -> None:
    path = bench.tmp_path / "tokens.yaml"
    path.write_text('"<|think|>": Who are you?\n')
    rows = []
    for how in ("noise_init", "desc_init"):
        run = bench.train(new_special_tokens_config=str(path), init_special_tokens=how, learning_rate=0.0)
        rows.append(next(weight for name, weight in run.weights().items() if "token" in name))
    assert not rows[0].equal(rows[1])


def lora_target_parameters(bench: Bench) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    folder = build_model(bench.tmp_path / "experts")
    sizes: dict[str, Any] = {
        "vocab_size": 364,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    MixtralForCausalLM(MixtralConfig(**sizes, num_hidden_layers=1, num_local_experts=2)).save_pretrained(str(folder))
    base = {"model_name_or_path": str(folder), "lora_target": "q_proj"}
    plain = bench.train(**base)
    assert "get no adapter" in plain.said and not any("experts" in name for name in plain.weights())
    named = bench.train(**base, lora_target_parameters="mlp.experts.gate_up_proj")
    assert any("experts" in name for name in named.weights())


def adapter_folder(bench: Bench) -> None:
    first = bench.train(output_dir=str(bench.tmp_path / "repository" / "inner"), lora_rank=3)
    whole = {"adapter_name_or_path": str(first.folder.parent)}
    assert "holds no adapter_config.json" in bench.train(**whole).complaint
    assert bench.train(**whole, adapter_folder="inner").adapter["r"] == 3


def opens(key: str, value: bool, trains: str) -> Callable[[Bench], None]:
    """What a key of composite models lets learn, beside (or in place of) the language model."""

    def case(bench: Bench) -> None:
        base = {"model_name_or_path": str(build(bench.tmp_path / "llava", "llava")), "finetuning_type": "full"}
        assert "; trained: language model\n" in bench.train(**base).said
        changed = bench.train(**base, **{key: value}, **({"freeze_vision_tower": False} if value else {}))
        assert f"; trained: {trains}\n" in changed.said
        assert bool(changed.complaint) == value  # no text goes through the others

    return case


OTHERS: dict[str, Callable[[Bench], None]] = {
    case.__name__: case for case in (new_special_tokens_config, init_special_tokens, lora_target_parameters, adapter_folder)
} | {
    "freeze_vision_tower": opens("freeze_vision_tower", False, "language model and vision tower"),
    "freeze_multi_modal_projector": opens("freeze_multi_modal_projector", False, "language model and projector"),
    "freeze_language_model": opens("freeze_language_model", True, "vision tower"),
}
