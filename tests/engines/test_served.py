"""What other libraries are given to answer with: GGUF files with everything merged, and adapters beside a model."""

import ctypes
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, LlamaConfig, MistralConfig, Qwen2Config

from conftest import build_model
from engines.opening import half_model, lora, opened
from finery.commands.export import export
from finery.engines.base import Ask, Engine, GenerationOptions
from finery.engines.functions.asked import plain_positions_of
from finery.errors import UserError
from finery.files import cache_folder
from finery.run import Run

GREEDY = GenerationOptions.model_validate({"do_sample": False, "max_new_tokens": 8})
PROMPTS = ["Who are you?", "fox", "你是谁？", "0123456789"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return half_model(tmp_path_factory.mktemp("half") / "base")


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {name: lora(base, folder / name, seed) for seed, name in enumerate(("poet", "clerk"), 1)}


def answers(engine: Engine, base: Path, adapter: str | None = None) -> list[list[int]]:
    tokenizer: Any = AutoTokenizer.from_pretrained(str(base))
    asks = [Ask(tokenizer(text)["input_ids"], GREEDY, adapter=adapter) for text in PROMPTS]
    return [[token.id for piece in stream for token in piece.tokens] for stream in [engine.begin(ask) for ask in asks]]


def merged_answers(base: Path, *adapters: Path) -> list[list[int]]:
    with opened("huggingface", base, adapters=adapters) as engine:
        return answers(engine, base)


@pytest.mark.parametrize("kind", ["openvino", "llamacpp", "vllm", "sglang"])
def test_what_was_trained_answers(kind: str, base: Path, adapters: dict[str, Path]) -> None:
    with opened(kind, base, adapters=[adapters["poet"]]) as engine:
        assert answers(engine, base) == merged_answers(base, adapters["poet"]) != merged_answers(base)


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_adapters_are_chosen_by_name(kind: str, base: Path, adapters: dict[str, Path]) -> None:
    """Also beside one that was trained, which answers where no name is asked for."""
    with opened(kind, base, served=adapters) as engine:
        assert engine.adapters == ("poet", "clerk")
        for name, folder in adapters.items():
            assert answers(engine, base, name) == merged_answers(base, folder)
        assert answers(engine, base) == merged_answers(base)
    with opened(kind, base, served={"poet": adapters["clerk"]}, adapters=[adapters["poet"]]) as engine:
        assert engine.adapters == ("poet",)
        assert answers(engine, base) == merged_answers(base, adapters["poet"])
        assert answers(engine, base, "poet") == merged_answers(base, adapters["clerk"])


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_what_cannot_be_beside_a_model_is_to_be_merged(kind: str, base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="takes one adapter, found 2: merge them"), opened(kind, base, adapters=list(adapters.values())):
        pass
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "OFT"}')
    with pytest.raises(UserError, match="is of OFT: merge it"), opened(kind, base, served={"turned": tmp_path}):
        pass
    with pytest.raises(UserError, match="from the model's config alone"), opened(kind, base, rope_scaling="linear"):
        pass


@pytest.mark.parametrize("kind", ["openvino", "llamacpp"])
def test_an_exported_file_answers_as_it_is(kind: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Named by its folder or itself; nothing else is written."""
    run = {"model_name_or_path": str(base), "export_format": "gguf", "export_gguf_type": "f16", "export_verify": False}
    folder = export(Run.from_dict(run | {"export_dir": str(tmp_path / "made")}))
    (file,) = folder.glob("*.gguf")
    monkeypatch.setenv("FINERY_CACHE", str(tmp_path / "cache"))
    for name in (folder, file):
        with opened(kind, base, model_name_or_path=str(name)) as engine:
            assert answers(engine, base) == merged_answers(base)
    assert not (cache_folder() / "served").exists()


def test_a_file_is_written_anew_when_what_it_is_made_of_changes(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINERY_CACHE", str(tmp_path / "cache"))
    found = []
    for seed in (1, 1, 5):
        folder = tmp_path / "poet"
        if seed != 1 or not folder.exists():
            lora(base, folder, seed)
        with opened("llamacpp", base, adapters=[folder]) as engine:
            assert answers(engine, base) == merged_answers(base, folder)
        (file,) = (cache_folder() / "served").rglob("*.gguf")
        found.append(file.stat().st_mtime_ns)
    assert found[0] == found[1] < found[2]


@pytest.mark.parametrize("kind", ["openvino", "llamacpp"])
def test_a_file_that_cannot_be_read_is_told(kind: str, base: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"not what it says")
    with pytest.raises(UserError, match=r"broken\.gguf"), opened(kind, base, model_name_or_path=str(tmp_path / "broken.gguf")):
        pass


def test_openvino_takes_no_positions_that_it_would_compute_otherwise(base: Path, tmp_path: Path) -> None:
    """Its reader of GGUF files looks at no scaling and no window."""
    parameters = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    scaled = build_model(tmp_path / "scaled", rope_parameters=parameters)
    with pytest.raises(UserError, match="would leave out this model's scaled positions"), opened("openvino", scaled):
        pass
    with pytest.raises(UserError, match="would leave out"), opened("openvino", base, rope_scaling="yarn"):
        pass
    config = LlamaConfig.from_pretrained(str(base))
    assert plain_positions_of(config, "openvino") == 512
    assert plain_positions_of(MistralConfig(sliding_window=64, max_position_embeddings=512), "openvino") == 64
    assert plain_positions_of(Qwen2Config(sliding_window=64, max_position_embeddings=512), "openvino") == 512, "no layer of it has one"


class Stack(ctypes.Structure):
    """On what signals are handled: `stack_t` of Linux."""

    _fields_ = (("begins", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


def signal_stack() -> int | None:
    found = Stack()
    assert ctypes.CDLL(None).sigaltstack(None, ctypes.byref(found)) == 0
    return found.begins


def test_signals_are_handled_on_memory_that_stays(base: Path) -> None:
    """OpenVINO's plugin sets a stack for signals and unmaps it in whatever thread it is closed: signals wrote into what came there."""
    before = signal_stack()
    with opened("openvino", base) as engine:
        assert answers(engine, base)
        assert signal_stack() == before


@pytest.mark.parametrize("kind", ["openvino", "llamacpp", "vllm", "sglang"])
def test_keys_that_do_not_fit(kind: str, tmp_path: Path) -> None:
    keys = {"model_name_or_path": str(build_model(tmp_path / "m")), "infer_backend": kind, "quantization_bit": 4}
    with pytest.raises(UserError, match=f"'quantization_bit' does not fit 'infer_backend: {kind}'"):
        Run.from_dict(keys)


@pytest.mark.parametrize("kind", ["openvino", "llamacpp"])
def test_one_file_holds_one_model(kind: str, base: Path, adapters: dict[str, Path]) -> None:
    keys = {"model_name_or_path": str(base), "infer_backend": kind, "served_adapters": {"poet": str(adapters["poet"])}}
    with pytest.raises(UserError, match=f"'served_adapters' does not fit 'infer_backend: {kind}'"):
        Run.from_dict(keys)


REFUSED = [
    ("vllm", {"temperature": 3.0}, "vLLM cannot answer so: temperature"),
    ("sglang", {"repetition_penalty": 3.0}, "SGLang cannot answer so"),
]


@pytest.mark.parametrize(("kind", "changes", "said"), REFUSED)
def test_what_a_library_refuses_is_told_before(kind: str, changes: dict[str, float], said: str, base: Path) -> None:
    with opened(kind, base) as engine, pytest.raises(UserError, match=said):
        engine.begin(Ask([5, 6], GenerationOptions.model_validate(changes)))


def test_sglang_has_seeds_where_it_is_told_to(base: Path) -> None:
    drawn, greedy = GenerationOptions.model_validate({}), GREEDY
    with opened("sglang", base, sglang_config={}) as engine:
        with pytest.raises(UserError, match="enable_deterministic_inference: true"):
            engine.begin(Ask([5, 6], drawn, seed=3))
        assert len(list(engine.begin(Ask([5, 6], greedy, seed=3)))) == 8
