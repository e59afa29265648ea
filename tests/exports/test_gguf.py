"""GGUF files: every family and kind of number read back as it was, and the whole way from a run to another program."""

import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

from conftest import build_model, build_tokenizer
from finery.commands.export import export
from finery.engines.openvino import loaded_apart
from finery.errors import UserError
from finery.models.gguf import convert
from finery.models.gguf_reading import Contents
from finery.models.gguf_tokens import splittings
from finery.models.gguf_writing import DTYPES, in_pairs, write_gguf
from finery.models.merging import Merged
from finery.models.tokenizer import load_tokenizer
from finery.run import Run

PLAIN = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
THETA = {"rope_theta": 50_000.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": 1.3, "beta_fast": 16.0}
SLOWED = [1.0 + place / 8 for place in range(8)]
SLOWER = [2 * each for each in SLOWED]
LONG = {"rope_type": "longrope", "short_factor": SLOWED, "long_factor": SLOWER, "original_max_position_embeddings": 64}
FULL = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0}
GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8}
GEMMA3 = {"num_hidden_layers": 7, "rope_parameters": {"full_attention": FULL, "sliding_attention": {"rope_type": "default", **THETA}}}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"rope_parameters": {"rope_type": "default", **THETA}}),
    "llama, tied": ("llama", {"tie_word_embeddings": True, "head_dim": 32}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama 3.1": ("llama", {"rope_parameters": LLAMA3 | THETA, "rms_norm_eps": 1e-5}),
    "llama, unlike 3.1": ("llama", {"rope_parameters": LLAMA3 | THETA | {"low_freq_factor": 2.0}}),
    "llama, linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.5} | THETA}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral, window": ("mistral", {"sliding_window": 8, "head_dim": 32}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2, yarn": ("qwen2", {"rope_parameters": YARN | THETA}),
    "qwen3": ("qwen3", {"head_dim": 32, "rope_parameters": {"rope_type": "default", **THETA}}),
    "gemma": ("gemma", {"head_dim": 32, "num_key_value_heads": 1}),
    "gemma2": ("gemma2", GEMMA | {"attn_logit_softcapping": 20.0, "final_logit_softcapping": 10.0}),
    "gemma3": ("gemma3_text", GEMMA | GEMMA3),
    "phi3": ("phi3", {"num_key_value_heads": 4}),
    "phi3, long": ("phi3", {"rope_parameters": LONG | THETA, "original_max_position_embeddings": 64}),
    "phi4": ("phi3", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.75} | THETA, "tie_word_embeddings": True}),
}


class Held(Merged):
    """A model as an export is given it."""

    def __init__(self, model: Any) -> None:
        self.model, self.config, self.generation_config = model, model.config, model.generation_config

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, weight in self.model.state_dict().items():
            if name != "lm_head.weight" or not self.config.tie_word_embeddings:
                yield name, weight


def random_model(model_type: str, changes: dict[str, Any], num_rows: int, dtype: torch.dtype = torch.float32) -> Any:
    """With norms and biases that differ, too: as transformers begins them, an exchange of two could not be seen."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **PLAIN | {"vocab_size": num_rows} | changes))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * (0.2 if weight.dim() == 1 else 0.05))
    return model.to(dtype).eval()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(folder)
    return load_tokenizer(folder, False)


@torch.no_grad()
def logits(model: Any, num_rows: int) -> Tensor:
    """Of a text longer than every window, and one longer than what longrope takes for short."""
    torch.manual_seed(1)
    texts = [torch.randint(3, num_rows, (1, length)) for length in (24, 80)]
    return torch.cat([model(text).logits[0] for text in texts])


def read_back(file: Path, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    folder.mkdir()
    convert(file, folder, dtype)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@pytest.mark.parametrize("case", MODELS)
def test_every_family_comes_back(case: str, tokenizer: Any, tmp_path: Path) -> None:
    model_type, changes = MODELS[case]
    num_rows = len(tokenizer) + 7  # rows without a token
    model = random_model(model_type, changes, num_rows)
    write_gguf(tmp_path / "m-f32.gguf", Held(model), "f32", tokenizer, frozenset({2}))
    found = read_back(tmp_path / "m-f32.gguf", tmp_path / "back")
    ours, theirs = model.state_dict(), found.state_dict()
    assert ours.keys() == theirs.keys()
    shifted = "gemma" in model_type  # 1 is added to a norm and taken off again
    assert all(torch.allclose(ours[name], theirs[name], rtol=0, atol=1e-6 if shifted else 0) for name in ours)
    assert (logits(model, num_rows) - logits(found, num_rows)).abs().max() < 2e-5
    assert found.config.model_type == {"mistral": "llama"}.get(case, model_type)  # without a window they are the same
    for key in ("rms_norm_eps", "max_position_embeddings", "vocab_size", "tie_word_embeddings"):
        assert getattr(found.config, key) == getattr(model.config, key)
    if case != "llama, unlike 3.1":  # whose factors come back as they are
        told, back = flat(model.config.rope_parameters), flat(found.config.rope_parameters)
        assert {name: back[name] for name in told} == pytest.approx(told)


def flat(parameters: dict[str, Any]) -> dict[str, float]:
    """Numbers of positions by their path; a part of a head that is the whole of it is none."""
    found = {}
    for name, value in parameters.items():
        inner = value if isinstance(value, dict) else dict(enumerate(value)) if isinstance(value, list) else None
        if inner is not None:
            found |= {f"{name}.{path}": each for path, each in flat({str(key): one for key, one in inner.items()}).items()}
        elif isinstance(value, (int, float)) and not (name == "partial_rotary_factor" and value == 1):
            found[name] = value
    return found


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize("case", ["llama, tied", "qwen3", "gemma2", "phi3"])
def test_half_precision_is_kept_bit_by_bit(case: str, kind: str, tokenizer: Any, tmp_path: Path) -> None:
    model_type, changes = MODELS[case]
    model = random_model(model_type, changes, len(tokenizer), DTYPES[kind])
    file = tmp_path / f"m-{kind}.gguf"
    write_gguf(file, Held(model), kind, tokenizer, frozenset({2}))
    tensors, theirs = Contents(file).names, read_back(file, tmp_path / "back", DTYPES[kind]).state_dict()
    assert {tensor.tensor_type.name for tensor in tensors.values()} == {"F32", kind.upper()}
    assert {name for name, tensor in tensors.items() if tensor.tensor_type.name == "F32"} == {name for name in tensors if "norm" in name}
    for name, weight in model.state_dict().items():
        near = "gemma" in model_type and name.endswith("norm.weight")
        assert torch.allclose(weight, theirs[name], rtol=0, atol=1e-6) if near else torch.equal(weight, theirs[name]), name


@pytest.mark.parametrize("case", ["llama", "qwen2", "gemma3", "phi3"])
def test_eight_bits_are_near(case: str, tokenizer: Any, tmp_path: Path) -> None:
    model_type, changes = MODELS[case]
    model = random_model(model_type, changes, len(tokenizer))
    file = tmp_path / "m-q8_0.gguf"
    write_gguf(file, Held(model), "q8_0", tokenizer, frozenset({2}))
    assert {tensor.tensor_type.name for tensor in Contents(file).names.values()} == {"F32", "Q8_0"}
    found = read_back(file, tmp_path / "back").state_dict()
    for name, weight in model.state_dict().items():
        steps = weight.abs().amax(-1, keepdim=True) / 127  # as large as the step of any block of a row
        assert ((weight - found[name]).abs() <= 0.57 * steps + 1e-6).all() or weight.dim() == 1, name


def test_what_does_not_fit_a_kind_is_kept_better(tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = random_model("llama", {"intermediate_size": 40}, len(tokenizer))
    write_gguf(tmp_path / "m-q8_0.gguf", Held(model), "q8_0", tokenizer, frozenset({2}))
    assert Contents(tmp_path / "m-q8_0.gguf").names["blk.0.ffn_down.weight"].tensor_type.name == "F16"
    assert "blk.0.ffn_down.weight (of 2 tensors that q8_0 does not fit) is written as f16" in capsys.readouterr().err
    model.lm_head.weight.data[3, 3] = 1e5
    write_gguf(tmp_path / "m-f16.gguf", Held(model), "f16", tokenizer, frozenset({2}))
    assert Contents(tmp_path / "m-f16.gguf").names["output.weight"].tensor_type.name == "F32"
    assert "numbers beyond 65504" in capsys.readouterr().err


def test_transformers_alone_reads_the_plain_case(tokenizer: Any, tmp_path: Path) -> None:
    """Without what we mend."""
    model = random_model("llama", {}, len(tokenizer))
    write_gguf(tmp_path / "m-f32.gguf", Held(model), "f32", tokenizer, frozenset({2}))
    where = {"pretrained_model_name_or_path": str(tmp_path), "gguf_file": "m-f32.gguf"}
    found = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True))
    assert torch.equal(logits(found, len(tokenizer)), logits(model, len(tokenizer)))


def test_rows_are_put_in_pairs() -> None:
    rows = torch.arange(8).reshape(8, 1)  # two heads of four, which turn 0 with 2 and 1 with 3
    assert in_pairs(rows, 2).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "experts": ("mixtral", {}, "writes llama, mistral, qwen2.*of the family mixtral"),
    "activation": ("llama", {"hidden_act": "relu"}, "no words for the activation relu"),
    "caps": ("gemma2", GEMMA | {"final_logit_softcapping": None}, "a model without final_logit_softcapping"),
    "scale": ("gemma2", GEMMA | {"query_pre_attn_scalar": 48}, "query_pre_attn_scalar: 48"),
    "layers": ("gemma3_text", GEMMA | GEMMA3 | {"layer_types": ["full_attention"] * 7}, "other than every 6"),
    "bias": ("qwen3", {"attention_bias": True}, "no place for model.layers.0.self_attn.q_proj.bias"),
    "positions": ("qwen2", {"rope_parameters": LLAMA3 | THETA}, "positions of the kind llama3"),
    "more of positions": ("llama", {"rope_parameters": YARN | THETA | {"mscale": 0.7}}, "positions with mscale"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_told_is_refused(case: str, tokenizer: Any, tmp_path: Path) -> None:
    model_type, changes, complaint = REFUSED[case]
    model = random_model(model_type, changes, len(tokenizer))
    with pytest.raises(UserError, match=complaint):
        write_gguf(tmp_path / "m-f32.gguf", Held(model), "f32", tokenizer, frozenset({2}))


def test_what_is_only_nearly_told_is_said(tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dynamic = {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0} | THETA}
    cases = {"mistral": ({"sliding_window": 8}, "sees 8 tokens at a time"), "llama": (dynamic, "right for texts of up to 256 tokens")}
    for model_type, (changes, said) in cases.items():
        held = Held(random_model(model_type, changes, len(tokenizer)))
        write_gguf(tmp_path / f"{model_type}-f32.gguf", held, "f32", tokenizer, frozenset({2}))
        assert said in capsys.readouterr().err


# ------------------------------------------------------------------ from a run


def exported(keys: Callable[..., dict[str, Any]], **changes: Any) -> Path:
    return export(Run.from_dict(keys(do_train=None, export_format="gguf", **changes)))


@pytest.mark.parametrize(("kind", "written"), [("auto", "f32"), ("q8_0", "q8_0")])
def test_a_run_writes_a_file_and_a_modelfile(kind: str, written: str, keys: Callable[..., dict[str, Any]], tiny_model: Path) -> None:
    folder = exported(keys, export_gguf_type=kind, template="chatml", export_verify=kind == "auto")
    file = folder / f"{tiny_model.name}-{written}.gguf"
    assert {path.name for path in folder.iterdir()} == {file.name, "Modelfile", "parity.json"}
    facts, modelfile = Contents(file).facts, (folder / "Modelfile").read_text()
    assert kind != "auto" or json.loads((folder / "parity.json").read_text())["passed"]
    assert f"FROM ./{file.name}\n" in modelfile and 'PARAMETER stop "<|im_end|>"' in modelfile
    assert facts["general.file_type"] == {"f32": 0, "q8_0": 7}[written]
    assert facts["general.name"] == tiny_model.name and facts["general.architecture"] == "llama"
    assert facts["tokenizer.ggml.eos_token_id"] == 2 and facts["llama.context_length"] == 512
    turn = "<|im_start|>{{ .Role }}"  # the template of both is the run's
    assert "<|im_start|>" in facts["tokenizer.chat_template"] and "<|im_start|>user" in modelfile.replace(turn, "<|im_start|>user")


def test_new_tokens_are_in_the_file(tmp_path: Path) -> None:
    """A vocabulary that an adapter has grown, rounded up to 64 rows; the rows without a token have names that no text holds."""
    folder = build_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<new>"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|call|>"]}, replace_extra_special_tokens=False)
    rows = -(-len(tokenizer) // 64) * 64
    write_gguf(tmp_path / "m-f32.gguf", Held(random_model("llama", {}, rows)), "f32", tokenizer, frozenset({2}))
    back = tmp_path / "back"
    model = read_back(tmp_path / "m-f32.gguf", back)
    found = load_tokenizer(back, False)
    assert model.config.vocab_size == rows
    text = "a <new> one<|call|>"
    assert found(text)["input_ids"] == tokenizer(text)["input_ids"] and len(tokenizer("<new>")["input_ids"]) == 1


FRANCE = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.mark.real
def test_another_program_answers_the_same(real_model: Path, tmp_path: Path) -> None:
    """openvino-genai 2026.4 reads f16 and q8_0 of llama and qwen, and no f32 or bf16."""
    if importlib.util.find_spec("openvino_genai") is None:
        pytest.skip("needs openvino-genai")
    tokenizer = AutoTokenizer.from_pretrained(real_model)
    model: Any = AutoModelForCausalLM.from_pretrained(real_model, dtype=torch.float32)
    file = tmp_path / "smollm2-f16.gguf"
    write_gguf(file, Held(model), "f16", tokenizer, frozenset({2}))
    inputs = tokenizer.apply_chat_template(FRANCE, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    said = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    told, ids, answer = other_program(file, 12)
    assert told == tokenizer.apply_chat_template(FRANCE, add_generation_prompt=True, tokenize=False)
    assert ids == inputs["input_ids"][0].tolist()
    assert answer == said.tolist()
    assert tokenizer.decode(answer, skip_special_tokens=True) == "The capital of France is Paris."


def other_program(file: Path, num_tokens: int) -> tuple[str, list[int], list[int]]:
    """The prompt as its template writes it, the prompt's tokens, and the answer's."""
    import openvino_genai

    pipe = loaded_apart(lambda: openvino_genai.LLMPipeline(str(file), "CPU"))
    reader, settings = pipe.get_tokenizer(), openvino_genai.GenerationConfig()
    settings.max_new_tokens, settings.do_sample = num_tokens, False
    prompt = reader.apply_chat_template(FRANCE, add_generation_prompt=True)
    asked = reader.encode(prompt, add_special_tokens=False)
    return prompt, asked.input_ids.data[0].tolist(), list(pipe.generate(asked, settings).tokens[0])


@pytest.mark.parametrize("case", ["qwen2", "qwen3"])
def test_another_program_reads_the_qwens(case: str, tmp_path: Path) -> None:
    """Random weights, and a small vocabulary whose text is split as Qwen's is: the same words as transformers says."""
    if importlib.util.find_spec("openvino_genai") is None:
        pytest.skip("needs openvino-genai")
    from tokenizers import Regex, pre_tokenizers

    build_tokenizer(tmp_path / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    split = pre_tokenizers.Split(Regex(splittings()["qwen2"]["steps"][0]["Split"]), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    model_type, changes = MODELS[case]
    model = random_model(model_type, changes | {"head_dim": 16}, len(tokenizer))
    file = tmp_path / f"{case}-f16.gguf"
    write_gguf(file, Held(model), "f16", tokenizer, frozenset({2}))
    assert Contents(file).facts["tokenizer.ggml.pre"] == "qwen2"
    inputs = tokenizer.apply_chat_template(FRANCE, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    said = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    _, ids, answer = other_program(file, 6)
    assert ids == inputs["input_ids"][0].tolist()
    assert answer == said.tolist()
