"""Cases of the keys that engines and generation read. `test_every_key.py` runs them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import keys_of_libraries
from finery.commands.chat import open_engine
from finery.engines.base import Ask
from finery.run import Run
from watched import Bench


def opened(bench: Bench, **changes: Any) -> tuple[Any, Any]:
    """The engine that these keys open, and how it generates."""
    run = Run.from_dict(bench.keys(do_sample=False, max_new_tokens=6, **changes))
    return open_engine(run)[0], run.generation


def use_kv_cache(bench: Bench) -> None:
    texts = []
    for value, way in ((None, "together"), (False, "anew")):
        engine, options = opened(bench, use_kv_cache=value)
        assert engine.batch.way == way
        texts.append(engine.generate([5, 6, 7], options))
        engine.close()
    assert texts[0] == texts[1], "it is only slower"


def seen(bench: Bench, prompt: list[int], count: int, **changes: Any) -> tuple[int, int]:
    """The most rows, and the most new tokens of a row, that went through the model at once."""
    engine, options = opened(bench, **changes)
    forward, shapes = engine.batch._forward, []

    def noting(parts: Any, answers: Any) -> Any:
        shapes.append((sum(len(ids) for _, ids in parts), max(ids.shape[1] for _, ids in parts)))
        return forward(parts, answers)

    engine.batch._forward = noting
    for stream in [engine.begin(Ask(prompt, options)) for _ in range(count)]:
        list(stream)
    engine.close()
    return max(rows for rows, _ in shapes), max(new for _, new in shapes)


def max_batch_size(bench: Bench) -> None:
    assert seen(bench, [5, 6, 7], 3)[0] == 3
    assert seen(bench, [5, 6, 7], 3, max_batch_size=1)[0] == 1


def prefill_chunk(bench: Bench) -> None:
    assert seen(bench, [5] * 40, 1)[1] == 40
    assert seen(bench, [5] * 40, 1, prefill_chunk=16)[1] == 16


def served_adapters(bench: Bench) -> None:
    """Each answers as the model does into which it is merged, all in one batch."""
    from engines.test_beside import adapter

    model = Path(bench.keys()["model_name_or_path"])
    folders = {name: str(adapter(model, bench.tmp_path / name, seed, 1.5)) for seed, name in enumerate(("poet", "clerk"), 1)}
    engine, options = opened(bench, served_adapters=folders)
    asks = [Ask([5, 6, 7], options, adapter=name) for name in (None, *folders)]
    together = ["".join(piece.text for piece in stream) for stream in [engine.begin(ask) for ask in asks]]
    assert engine.adapters == tuple(folders)
    engine.close()
    for text, folder in zip(together, (None, *folders.values()), strict=True):
        alone, _ = opened(bench, adapter_name_or_path=folder)
        assert alone.generate([5, 6, 7], options) == text
        alone.close()
    assert len(set(together)) == 3


class Only:
    """Lets one token come."""

    def __init__(self, token: int) -> None:
        self.token = token

    def allowed(self) -> Any:
        return np.asarray([self.token])

    def take(self, token: int) -> None:
        """There is nothing to remember."""


def skip_special_tokens(bench: Bench) -> None:
    for skip, wanted in ((True, ""), (False, "<|im_start|>" * 6)):
        engine, options = opened(bench, skip_special_tokens=skip)
        token = engine.tokenizer.convert_tokens_to_ids("<|im_start|>")
        assert "".join(piece.text for piece in engine.begin(Ask([5, 6], options, constraint=Only(token)))) == wanted
        engine.close()


def min_p(bench: Bench) -> None:
    drawn = {"do_sample": True, "temperature": 5.0, "top_k": 0, "top_p": 1.0}
    assert bench.chat(**drawn, min_p=1.0) == bench.chat() != bench.chat(**drawn)


def presence_penalty(bench: Bench) -> None:
    assert bench.chat(presence_penalty=2.0, max_new_tokens=30) != bench.chat(max_new_tokens=30)


def frequency_penalty(bench: Bench) -> None:
    assert bench.chat(frequency_penalty=2.0, max_new_tokens=30) != bench.chat(max_new_tokens=30)


OTHERS: dict[str, Callable[[Bench], None]] = keys_of_libraries.OTHERS | {
    "use_kv_cache": use_kv_cache,
    "served_adapters": served_adapters,
    "max_batch_size": max_batch_size,
    "prefill_chunk": prefill_chunk,
    "skip_special_tokens": skip_special_tokens,
    "min_p": min_p,
    "presence_penalty": presence_penalty,
    "frequency_penalty": frequency_penalty,
}
