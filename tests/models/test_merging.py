"""Merged layer by layer, a model computes what it computed with its adapters beside it, whatever their kind."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import build_model
from finery.errors import UserError
from finery.models import merging
from finery.models.adapters.lora import LoRA
from finery.models.lineage import FILE, fingerprint, true_base, write_lineage
from finery.models.load import fit_vocabulary, load_model
from finery.models.shards import Shards, write_shards
from finery.models.tokenizer import load_tokenizer
from finery.models.trained import Trained, load_trained

IDS = torch.tensor([[5, 9, 40, 77, 3, 120, 1, 7]])
LAYERS = ["q_proj", "v_proj", "up_proj", "down_proj"]
CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")  # of adapters beside tied weights, which is what is tested
ADAPTER = LoRA(LoRA.Options.model_validate({}))


def lora(**how: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(**({"r": 4, "target_modules": LAYERS} | how))


def other(kind: str, **how: Any) -> Any:
    import peft

    return getattr(peft, f"{kind}Config")(**({"target_modules": LAYERS} | how))


CONFIGS: dict[str, Callable[[], Any]] = {
    "lora": lora,
    "dora": lambda: lora(use_dora=True),
    "rslora and patterns": lambda: lora(use_rslora=True, rank_pattern={"layers.0.*q_proj": 8}, alpha_pattern={"layers.1.*v_proj": 3}),
    "beside the embedding": lambda: lora(target_modules=["embed_tokens", "q_proj"]),
    "beside the head": lambda: lora(target_modules=["lm_head", "q_proj"]),
    "single tokens": lambda: lora(trainable_token_indices={"embed_tokens": [1, 5, 7]}),
    "embedding and head whole": lambda: lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    "embedding whole": lambda: lora(modules_to_save=["embed_tokens"]),
    "norms and head whole": lambda: lora(modules_to_save=["input_layernorm", "lm_head"]),
    "parameters": lambda: lora(target_modules=[], target_parameters=["q_proj.weight"]),
    "oft": lambda: other("OFT", oft_block_size=4),
    "boft": lambda: other("BOFT", boft_block_size=4),
    "vera": lambda: other("Vera", r=4, target_modules=["q_proj"]),
    "ia3": lambda: other("IA3", target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "adalora": lambda: other("AdaLora", total_step=10, tinit=1, tfinal=2),
    "loha": lambda: other("LoHa", r=4),
    "lokr": lambda: other("LoKr", r=4),
    "fourierft": lambda: other("FourierFT", n_frequency=20, target_modules=["q_proj"]),
    "ln_tuning": lambda: other("LNTuning", target_modules=["input_layernorm"]),
    "c3a": lambda: other("C3A", block_size=8, target_modules=["q_proj"]),
}


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("bases") / "base", tie_word_embeddings=request.param)


def trained(base: Path, config: Any, folder: Path, seed: int = 1, tokenizer: Any = None) -> tuple[Path, Any]:
    """An adapter with random weights, and the model beside which it lies."""
    from peft import get_peft_model

    config = copy.deepcopy(config)
    config.task_type = "CAUSAL_LM"
    model = load_model(base, torch.float32, False)
    if tokenizer is not None:
        fit_vocabulary(model, tokenizer, resize=True)
    torch.manual_seed(seed)
    model = get_peft_model(model, config)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data += torch.randn_like(weight) * 0.05
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return folder, model.eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(IDS).logits


def saved(found: Trained, folder: Path, tokenizer: Any = None, dtype: torch.dtype = torch.float32) -> tuple[Any, Path]:
    folder.mkdir()
    whole = merging.merged(found, ADAPTER, tokenizer or load_tokenizer(found.base, False), False, dtype, CPU)
    whole.save(folder, 10**9)
    return whole, folder


@pytest.mark.parametrize("name", CONFIGS)
def test_every_kind_of_adapter(name: str, base: Path, tmp_path: Path) -> None:
    adapter, beside = trained(base, CONFIGS[name](), tmp_path / "adapter")
    wanted, plain = logits(beside), logits(load_model(base, torch.float32, False))
    assert (wanted - plain).abs().max() > 1e-4 or name in ("parameters", "vera"), "the adapter does nothing: the test would show nothing"
    found = Trained(base, [adapter], True)
    whole, folder = saved(found, tmp_path / "merged")
    assert type(whole).__name__ == "_Layered"
    assert torch.allclose(logits(load_model(folder, torch.float32, False)), wanted, atol=1e-5)
    in_memory = load_trained(found, ADAPTER, load_tokenizer(base, False), False, torch.float32, CPU)
    assert torch.allclose(logits(in_memory), wanted, atol=1e-5)  # as chat answers


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("lora", False),
        ("single tokens", False),
        ("embedding and head whole", False),
        ("embedding whole", True),
        ("beside the embedding", True),
        ("beside the head", True),
    ],
)
def test_tied_weights_part_only_where_they_were_trained_apart(name: str, parts: bool, tmp_path: Path) -> None:
    base = build_model(tmp_path / "base")
    adapter, _ = trained(base, CONFIGS[name](), tmp_path / "adapter")
    _, folder = saved(Trained(base, [adapter], True), tmp_path / "merged")
    assert ("lm_head.weight" in Shards(folder).files) is parts
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is not parts


def test_adapters_one_after_the_other(base: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    folders = [trained(base, CONFIGS[name](), tmp_path / name, seed)[0] for seed, name in enumerate(("oft", "dora", "embedding whole"))]
    model = load_model(base, torch.float32, False)
    for folder in folders:  # each where the one before has been merged
        model = PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    _, out = saved(Trained(base, folders, True), tmp_path / "merged")
    assert torch.allclose(logits(load_model(out, torch.float32, False)), logits(model), atol=1e-5)


def test_new_tokens_are_alive(base: Path, tmp_path: Path) -> None:
    tokenizer: Any = load_tokenizer(base, False)
    known = len(tokenizer)
    tokenizer.add_tokens(["<new-1>", "<new-2>"])
    rows = {"embed_tokens": [known, known + 1]}
    adapter, beside = trained(base, lora(trainable_token_indices=rows), tmp_path / "adapter", tokenizer=tokenizer)
    _, folder = saved(Trained(base, [adapter], True), tmp_path / "merged", tokenizer)
    model = load_model(folder, torch.float32, False)
    ids = torch.tensor([[5, known, 9, known + 1, 3]])
    with torch.no_grad():
        assert torch.allclose(model.eval()(ids).logits, beside(ids).logits, atol=1e-5)
    assert model.config.vocab_size == model.get_input_embeddings().weight.shape[0] >= known + 2


def test_files_of_weights_and_their_order(base: Path, tmp_path: Path) -> None:
    adapter, beside = trained(base, CONFIGS["lora"](), tmp_path / "adapter")
    many = tmp_path / "many"
    shutil.copytree(base, many)
    (many / "model.safetensors").unlink()
    write_shards(((name, Shards(base).tensor(name)) for name in Shards(base).files), many, 20_000)
    assert len(list(many.glob("*.safetensors"))) > 3
    whole = merging.merged(Trained(many, [adapter], True), ADAPTER, load_tokenizer(many, False), False, torch.bfloat16, CPU)
    (tmp_path / "out").mkdir()
    whole.save(tmp_path / "out", 20_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    wanted = beside.merge_and_unload().state_dict()
    for name in Shards(tmp_path / "out").files:
        assert torch.equal(Shards(tmp_path / "out").tensor(name), wanted[name].bfloat16()), name  # rounded once, at the end
    next(many.glob("model-00002*")).unlink()
    with pytest.raises(UserError, match=r"lacks model-00002-of-\d+.safetensors, one of the \d+ files"):
        merging.merged(Trained(many, [adapter], True), ADAPTER, load_tokenizer(base, False), False, torch.float32, CPU)


def test_names_that_the_code_does_not_have_are_merged_in_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import load_file, save_file

    base = build_model(tmp_path / "base", tie_word_embeddings=False)
    adapter, beside = trained(base, CONFIGS["lora"](), tmp_path / "adapter")
    weights = load_file(base / "model.safetensors")
    save_file(weights | {"left.over": torch.zeros(2)}, base / "model.safetensors", metadata={"format": "pt"})
    whole, folder = saved(Trained(base, [adapter], True), tmp_path / "merged")
    assert type(whole).__name__ == "_Whole" and "held in memory for the merge: left.over is in its files" in capsys.readouterr().err
    assert torch.allclose(logits(load_model(folder, torch.float32, False)), logits(beside), atol=1e-5)
    assert dict(whole.tensors()).keys() == Shards(folder).files.keys()


def test_what_changes_no_weights_cannot_be_merged(base: Path, tmp_path: Path) -> None:
    from peft import PromptTuningConfig

    adapter, _ = trained(base, PromptTuningConfig(num_virtual_tokens=3), tmp_path / "adapter")
    with pytest.raises(UserError, match="cannot be merged into weights"):
        saved(Trained(base, [adapter], True), tmp_path / "merged")


# ------------------------------------------------------------------ the base that was trained on


def test_the_base_is_known_by_its_weights(base: Path, tmp_path: Path) -> None:
    adapter, _ = trained(base, CONFIGS["lora"](), tmp_path / "adapter")
    assert true_base(base, [adapter]) == base  # it tells nothing
    write_lineage(adapter, str(base), base)
    moved = tmp_path / "moved"
    shutil.copytree(base, moved)
    assert true_base(moved, [adapter]) == moved
    other = build_model(tmp_path / "other", hidden_size=48)
    assert true_base(other, [adapter]) == base  # where it lay when it was trained
    told = json.loads((adapter / FILE).read_text())
    (adapter / FILE).write_text(json.dumps({"base": told["base"] | {"name": "org/the-name", "folder": None}}))
    with pytest.raises(UserError, match=r"was trained on other weights than those in .*other: on org/the-name"):
        true_base(other, [adapter])
    (adapter / FILE).write_text(json.dumps({"base": told["base"] | {"folder": None, "quantised": "gptq"}}))
    assert true_base(other, [adapter]) == other  # its original, as far as anybody can tell


def test_a_fingerprint_sees_a_single_weight_change(base: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    copied = tmp_path / "copy"
    shutil.copytree(base, copied)
    assert fingerprint(copied) == fingerprint(base)
    weights = load_file(copied / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] *= 1.001
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint(copied) != fingerprint(base)
