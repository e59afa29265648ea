"""Cases of the keys of engines that are other people's libraries, seen in what these libraries are given."""

from collections.abc import Callable
from typing import Any

import pytest

from engines.opening import lora, opened
from finery.engines.base import Ask
from finery.errors import UserError
from finery.run import Run
from watched import Bench


def greedy(bench: Bench, **keys: Any) -> tuple[Ask, Run]:
    run = Run.from_dict(bench.keys(do_sample=False, max_new_tokens=6, **keys))
    return Ask([5, 6, 7], run.generation), run


def given(bench: Bench, kind: str, **keys: Any) -> Any:
    """What the library's engine was built with."""
    with opened(kind, bench.tiny_model, **keys) as engine:
        built = engine.engine  # type: ignore[attr-defined]
        return built.args if kind == "vllm" else built.server_args


def gguf_type(bench: Bench) -> None:
    from finery.engines.functions import served_gguf

    kinds: list[str] = []
    write = served_gguf._write
    bench.patch.setattr(served_gguf, "_write", lambda source, file, kind: [kinds.append(kind), write(source, file, kind)][-1])
    bench.patch.setenv("FINERY_CACHE", str(bench.tmp_path / "cache"))
    for asked in ({}, {"gguf_type": "q8_0"}, {"gguf_type": "q8_0"}):
        with opened("llamacpp", bench.tiny_model, **asked):
            pass
    assert kinds == ["f16", "q8_0"], "each is written once"


def openvino_config(bench: Bench) -> None:
    pytest.importorskip("openvino_genai")
    import openvino_genai

    found: list[tuple[Any, str, dict[str, Any]]] = []
    build = openvino_genai.ContinuousBatchingPipeline

    def spy(file: Any, scheduler: Any, device: str, properties: dict[str, Any]) -> Any:
        found.append((scheduler.cache_size, device, properties))
        return build(file, scheduler, device, properties)

    bench.patch.setattr(openvino_genai, "ContinuousBatchingPipeline", spy)
    changed = {"openvino_config": {"EXECUTION_MODE_HINT": "PERFORMANCE", "cache_size": 1, "DEVICE": "CPU"}}
    for keys in ({}, changed):
        with opened("openvino", bench.tiny_model, **keys):
            pass
    assert found == [(0, "CPU", {"EXECUTION_MODE_HINT": "ACCURACY"}), (1, "CPU", {"EXECUTION_MODE_HINT": "PERFORMANCE"})]
    with pytest.raises(UserError, match="OpenVINO cannot serve"), opened("openvino", bench.tiny_model, openvino_config={"NO_SUCH": 1}):
        pass


def llamacpp_cache_tokens(bench: Bench) -> None:
    ask, _ = greedy(bench)
    for keys, longest in (({}, 512), ({"llamacpp_cache_tokens": 256}, 256)):
        with opened("llamacpp", bench.tiny_model, **keys) as engine:
            assert engine.longest == longest
            streams = [engine.begin(Ask([5] * (longest - 6), ask.options)) for _ in range(3)]
            assert all(len([token for piece in stream for token in piece.tokens]) == 6 for stream in streams), "one after the other"


def llamacpp_config(bench: Bench) -> None:
    with opened("llamacpp", bench.tiny_model, llamacpp_config={"n_threads": 1, "n_gpu_layers": 0}) as engine:
        assert engine.context._context_parameters.n_threads == 1  # type: ignore[attr-defined]
    for wrong in ({"n_thread": 1}, {"n_threads": "many"}):
        said = rf"'llamacpp_config': .*{min(wrong)}"
        with pytest.raises(UserError, match=said), opened("llamacpp", bench.tiny_model, llamacpp_config=wrong):
            pass


def vllm_maxlen(bench: Bench) -> None:
    assert given(bench, "vllm").max_model_len == 512, "the tiny model has no more places"
    assert given(bench, "vllm", vllm_maxlen=100).max_model_len == 100


def vllm_gpu_util(bench: Bench) -> None:
    assert given(bench, "vllm").gpu_memory_utilization == 0.7
    assert given(bench, "vllm", vllm_gpu_util=0.5).gpu_memory_utilization == 0.5


def vllm_enforce_eager(bench: Bench) -> None:
    assert [given(bench, "vllm", vllm_enforce_eager=value).enforce_eager for value in (False, True)] == [False, True]


def vllm_max_lora_rank(bench: Bench) -> None:
    small = lora(bench.tiny_model, bench.tmp_path / "small", 1)
    large = lora(bench.tiny_model, bench.tmp_path / "large", 2, rank=48)
    assert not given(bench, "vllm").enable_lora
    for folder, keys, rank in ((small, {}, 32), (small, {"vllm_max_lora_rank": 8}, 8), (large, {}, 64)):
        args = given(bench, "vllm", served={"poet": folder}, **keys)
        assert args.enable_lora and args.max_lora_rank == rank


def vllm_config(bench: Bench) -> None:
    for config in ({"max_num_seqs": 3, "max_model_len": 64}, '{"max_num_seqs": 3, "max_model_len": 64}'):
        args = given(bench, "vllm", vllm_config=config)
        assert (args.max_num_seqs, args.max_model_len) == (3, 64)
    with pytest.raises(UserError, match=r"vLLM cannot serve .*no_such"):
        given(bench, "vllm", vllm_config={"no_such": 1})


def sglang_maxlen(bench: Bench) -> None:
    assert given(bench, "sglang").context_length == 512
    assert given(bench, "sglang", sglang_maxlen=100).context_length == 100


def sglang_mem_fraction(bench: Bench) -> None:
    assert given(bench, "sglang").mem_fraction_static == 0.7
    assert given(bench, "sglang", sglang_mem_fraction=0.5).mem_fraction_static == 0.5


def sglang_tp_size(bench: Bench) -> None:
    import torch

    bench.patch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [given(bench, "sglang", sglang_tp_size=size).tp_size for size in (-1, 1)] == [2, 1]
    with pytest.raises(UserError, match="'sglang_tp_size' should be -1, or a number of GPUs"):
        greedy(bench, infer_backend="sglang", sglang_tp_size=0)


def sglang_config(bench: Bench) -> None:
    assert given(bench, "sglang", sglang_config={"max_running_requests": 3}).max_running_requests == 3
    with pytest.raises(UserError, match=r"SGLang cannot serve .*no_such"):
        given(bench, "sglang", sglang_config={"no_such": 1})
    with pytest.raises(UserError, match="'sglang_config' should be a mapping, or the JSON text of one"):
        given(bench, "sglang", sglang_config="{no json")


def sglang_lora_backend(bench: Bench) -> None:
    folder = lora(bench.tiny_model, bench.tmp_path / "poet", 1)
    for keys, backend in (({}, "triton"), ({"sglang_lora_backend": "csgmv"}, "csgmv")):
        args = given(bench, "sglang", served={"poet": folder}, **keys)
        assert (args.lora_backend, args.lora_paths) == (backend, {"poet": str(folder)})


OTHERS: dict[str, Callable[[Bench], None]] = {
    case.__name__: case
    for case in (
        gguf_type, openvino_config, llamacpp_cache_tokens, llamacpp_config,
        vllm_maxlen, vllm_gpu_util, vllm_enforce_eager, vllm_max_lora_rank, vllm_config,
        sglang_maxlen, sglang_mem_fraction, sglang_tp_size, sglang_config, sglang_lora_backend,
    )
}  # fmt: skip
