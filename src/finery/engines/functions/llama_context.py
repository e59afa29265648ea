"""llama.cpp's low-level interface: one model, many sequences in one cache, the scores of each one's last token.

Written against llama-cpp-python 0.3.36, whose functions are those of llama.h.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from finery.compat import need
from finery.engines.base import EngineOptions
from finery.errors import UserError


@dataclass(frozen=True)
class Part:
    """Tokens that a sequence goes on with."""

    sequence: int
    start: int  # how many it has already
    ids: Sequence[int]
    wants_scores: bool  # of the token after its last


class LlamaContext:
    """A loaded model with the keys and values of its sequences; used by one thread at a time."""

    def __init__(self, file: Path, num_cells: int, shared: EngineOptions, config: Mapping[str, Any]) -> None:
        self.api: Any = need("llama_cpp", "'infer_backend: llamacpp'").llama_cpp
        model, context = self.api.llama_model_default_params(), self.api.llama_context_default_params()
        num_sequences, most_tokens = shared.max_batch_size, shared.max_batch_size + shared.prefill_chunk
        threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        _set(context, n_ctx=num_cells, n_seq_max=num_sequences, kv_unified=True, n_threads=threads, n_threads_batch=threads)
        _set(context, n_batch=most_tokens, n_ubatch=min(most_tokens, context.n_ubatch))
        for name, value in config.items():
            of = [parameters for parameters in (model, context) if name in dict(parameters._fields_)]
            if not of:
                raise UserError(f"'llamacpp_config': llama.cpp has no setting {name!r}")
            _set(of[0], **{name: value})
        logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)  # by which the package decides what llama.cpp may print
        self.api.llama_backend_init()
        self._context_parameters = context
        self.model = self.api.llama_model_load_from_file(str(file).encode(), model)
        if not self.model:
            raise UserError(f"llama.cpp cannot serve {file}: it knows no such model, or the file is broken")
        self.context = self.api.llama_init_from_model(self.model, context)
        if not self.context:
            raise UserError(f"llama.cpp has no memory for the keys and values of {num_cells:,} tokens: lower 'llamacpp_cache_tokens'")
        self.num_cells = int(self.api.llama_n_ctx(self.context))
        self.num_scores = int(self.api.llama_vocab_n_tokens(self.api.llama_model_get_vocab(self.model)))
        self.width = int(self.api.llama_model_n_embd(self.model))
        self.most_tokens = most_tokens
        self._batch = self.api.llama_batch_init(most_tokens, 0, 1)

    def decode(self, parts: Sequence[Part]) -> list[Tensor | None]:
        """Go on with some sequences; fp32 scores (V) of those that want them, a copy each."""
        ends = self._fill(self._batch, parts)
        self._run(self.context, self._batch)
        found: list[Tensor | None] = []
        for part, end in zip(parts, ends, strict=True):
            if part.wants_scores:
                scores = self.api.llama_get_logits_ith(self.context, end)
                found.append(torch.from_numpy(np.ctypeslib.as_array(scores, (self.num_scores,)).copy()))
            else:
                found.append(None)
        return found

    def forget(self, sequence: int) -> None:
        """Free the room of a sequence."""
        self.api.llama_memory_seq_rm(self.api.llama_get_memory(self.context), sequence, -1, -1)

    def embed(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """The mean of a text's last hidden states, in a context of its own."""
        parameters = type(self._context_parameters).from_buffer_copy(self._context_parameters)
        size = len(ids)
        _set(parameters, n_ctx=max(size, 32), n_batch=size, n_ubatch=size, n_seq_max=1, embeddings=True)
        parameters.pooling_type = self.api.LLAMA_POOLING_TYPE_MEAN
        context, batch = self.api.llama_init_from_model(self.model, parameters), self.api.llama_batch_init(size, 0, 1)
        if not context:
            raise UserError(f"llama.cpp has no memory for a text of {size:,} tokens")
        try:
            self._fill(batch, [Part(0, 0, ids, True)], every=True)
            self._run(context, batch)
            found = self.api.llama_get_embeddings_seq(context, 0)
            return np.ctypeslib.as_array(found, (self.width,)).copy()
        finally:
            self.api.llama_batch_free(batch)
            self.api.llama_free(context)

    def close(self) -> None:
        """Give its memory back."""
        self.api.llama_batch_free(self._batch)
        self.api.llama_free(self.context)
        self.api.llama_model_free(self.model)

    def _fill(self, batch: Any, parts: Sequence[Part], every: bool = False) -> list[int]:
        """Lay parts end to end; where each one's last token is."""
        at, ends = 0, []
        for part in parts:
            for place, token in enumerate(part.ids):
                batch.token[at], batch.pos[at] = token, part.start + place
                batch.n_seq_id[at], batch.seq_id[at][0] = 1, part.sequence
                batch.logits[at] = every or (part.wants_scores and place == len(part.ids) - 1)
                at += 1
            ends.append(at - 1)
        batch.n_tokens = at
        return ends

    def _run(self, context: Any, batch: Any) -> None:
        if (code := self.api.llama_decode(context, batch)) != 0:
            raise RuntimeError(f"llama_decode returned {code} for {batch.n_tokens} tokens")


def _set(parameters: ctypes.Structure, **values: Any) -> None:
    for name, value in values.items():
        try:
            setattr(parameters, name, value)
        except TypeError as error:
            raise UserError(f"'llamacpp_config': {name!r} does not take {value!r} ({error})") from None
