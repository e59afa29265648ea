"""The functions of llama.h as Finery uses them, told as llama-cpp-python 0.3.36 tells them; the model is read from the GGUF file."""

import ctypes
from pathlib import Path
from typing import Any

import pytest
import torch

from engines.fakes_model import FakeModel, install

FLOATS = ctypes.POINTER(ctypes.c_float)


class ModelParams(ctypes.Structure):
    _fields_ = (("n_gpu_layers", ctypes.c_int32), ("vocab_only", ctypes.c_bool), ("check_tensors", ctypes.c_bool))


class ContextParams(ctypes.Structure):
    _fields_ = (
        ("n_ctx", ctypes.c_uint32),
        ("n_batch", ctypes.c_uint32),
        ("n_ubatch", ctypes.c_uint32),
        ("n_seq_max", ctypes.c_uint32),
        ("n_threads", ctypes.c_int32),
        ("n_threads_batch", ctypes.c_int32),
        ("pooling_type", ctypes.c_int),
        ("embeddings", ctypes.c_bool),
        ("kv_unified", ctypes.c_bool),
    )


class Batch:
    """llama_batch_init: arrays of so many tokens."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.n_tokens = 0
        self.token, self.pos, self.n_seq_id = ((ctypes.c_int32 * size)() for _ in range(3))
        self.seq_id = [(ctypes.c_int32 * 1)() for _ in range(size)]
        self.logits = (ctypes.c_int8 * size)()


class Context:
    """The tokens of each sequence, and the scores of those that were asked for."""

    def __init__(self, model: FakeModel, params: ContextParams) -> None:
        self.model = model
        self.params = ContextParams.from_buffer_copy(params)
        self.sequences: dict[int, list[int]] = {}
        self.scores: dict[int, Any] = {}
        self.mean: Any = None


def _decode(context: Context, batch: Batch) -> int:
    params = context.params
    assert batch.n_tokens <= min(batch.size, params.n_batch)
    context.scores.clear()
    if sum(map(len, context.sequences.values())) + batch.n_tokens > params.n_ctx:
        return 1
    for at in range(batch.n_tokens):
        row = batch.seq_id[at][0]
        assert batch.n_seq_id[at] == 1 and row < params.n_seq_max
        ids = context.sequences.setdefault(row, [])
        if batch.pos[at] != len(ids):
            return -1
        ids.append(batch.token[at])
        if batch.logits[at] and not params.embeddings:
            context.scores[at] = _floats(context.model.scores(ids))
    if params.embeddings:
        assert params.pooling_type == 1 and all(batch.logits[: batch.n_tokens])
        with torch.no_grad():
            states = context.model.model.get_decoder()(torch.tensor([context.sequences[0]])).last_hidden_state[0]
        context.mean = _floats(states.mean(0))
    return 0


def _floats(values: torch.Tensor) -> Any:
    return ctypes.cast((ctypes.c_float * len(values))(*values.tolist()), FLOATS)


def _load(path: bytes, params: ModelParams) -> FakeModel | None:
    from finery.models.gguf import plain_folder

    return FakeModel(plain_folder(Path(path.decode())), {}) if Path(path.decode()).read_bytes()[:4] == b"GGUF" else None


def _context_params() -> ContextParams:
    return ContextParams(n_ctx=512, n_batch=2048, n_ubatch=512, n_seq_max=1, n_threads=4, n_threads_batch=4, pooling_type=-1)


def fake_llamacpp(patch: pytest.MonkeyPatch) -> None:
    """Let `llama_cpp` be what is here."""
    functions = {
        "LLAMA_POOLING_TYPE_MEAN": 1,
        "llama_backend_init": lambda: None,
        "llama_model_default_params": lambda: ModelParams(n_gpu_layers=-1),
        "llama_context_default_params": _context_params,
        "llama_model_load_from_file": _load,
        "llama_init_from_model": Context,
        "llama_n_ctx": lambda context: context.params.n_ctx,
        "llama_model_get_vocab": lambda model: model,
        "llama_vocab_n_tokens": lambda model: model.model.get_input_embeddings().weight.shape[0],
        "llama_model_n_embd": lambda model: model.model.config.hidden_size,
        "llama_batch_init": lambda size, embd, most: Batch(size),
        "llama_batch_free": lambda batch: None,
        "llama_decode": _decode,
        "llama_get_logits_ith": lambda context, at: context.scores[at],
        "llama_get_embeddings_seq": lambda context, row: context.mean,
        "llama_get_memory": lambda context: context,
        "llama_memory_seq_rm": lambda context, row, start, end: context.sequences.pop(row, None) is not None,
        "llama_free": lambda context: context.sequences.clear(),
        "llama_model_free": lambda model: None,
    }
    install(patch, llama_cpp={}, llama_cpp__llama_cpp=functions)
