"""Adapters beside one model: rows that want different ones, in one batch, get what each gives when it is merged."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from finery.engines.functions.beside import Adapters
from finery.errors import UserError
from finery.models.load import load_model
from finery.models.peft_adapter import open_adapter


def adapter(model_folder: Path, folder: Path, seed: int, size: float = 0.3, **changes: Any) -> Path:
    """A LoRA adapter with random weights, big enough to change what comes out."""
    torch.manual_seed(seed)
    model = get_peft_model(
        load_model(model_folder, torch.float32, False), LoraConfig(r=4, target_modules=["q_proj", "down_proj"], **changes)
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.normal_(0, size)
    model.save_pretrained(str(folder))
    return folder


def test_rows_of_one_batch_have_adapters_of_their_own(tiny_model: Path, tmp_path: Path) -> None:
    folders = {
        "poet": adapter(tiny_model, tmp_path / "poet", 1),
        "clerk": adapter(tiny_model, tmp_path / "clerk", 2, use_rslora=True, alpha_pattern={"down_proj": 3}),
    }
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12], [5, 6, 7, 8], [5, 6, 7, 8]])
    model = load_model(tiny_model, torch.float32, False)
    plain = model(input_ids=ids).logits
    beside = Adapters(model, folders)
    beside.rows = ["poet", None, "clerk", "poet"]
    found = model(input_ids=ids).logits
    for row, name in enumerate(beside.rows):
        if name is None:
            assert torch.equal(found[row], plain[row])
            continue
        merged = open_adapter(load_model(tiny_model, torch.float32, False), folders[name]).merge_and_unload()
        wanted = merged(input_ids=ids[row : row + 1]).logits[0]
        assert torch.allclose(found[row], wanted, atol=1e-4)
        assert not torch.allclose(found[row], plain[row], atol=1e-2)
    assert not any("lora" in name for name, _ in model.named_modules()), "the model itself is left as it was"


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
@pytest.mark.parametrize("changes", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [3]}])
def test_more_than_plain_lora_is_refused(tiny_model: Path, tmp_path: Path, changes: Any) -> None:
    folder = adapter(tiny_model, tmp_path / "more", 1, **changes)
    model = load_model(tiny_model, torch.float32, False)
    with pytest.raises(UserError, match="cannot stay beside the model"):
        Adapters(model, {"more": folder})
    assert not any("lora" in name for name, _ in model.named_modules())
