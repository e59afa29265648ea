"""Optional packages, and what differs between versions of the needed ones."""

import ctypes
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from finery.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

EXTRA_OF = {
    "modelscope": "modelscope",
    **dict.fromkeys(("bitsandbytes", "hqq", "torchao", "optimum.quanto"), "quant"),
    **dict.fromkeys(("gptqmodel", "optimum.gptq"), "gptq"),
    "jieba": "metrics",
    **dict.fromkeys(("fastapi", "uvicorn", "llguidance"), "serve"),
    "gradio": "web",
    **{"openvino_genai": "openvino", "llama_cpp": "llamacpp", "vllm": "vllm", "sglang": "sglang"},
    **dict.fromkeys(("galore_torch", "apollo_torch", "badam", "adam_mini"), "optim"),
}
"""Which extra of ours brings an optional package."""


def have(module: str) -> bool:
    """Whether an optional package is installed; it is not imported."""
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of `optimum.quanto` there is no `optimum`
        return False


def install_of(module: str) -> str:
    """The command that brings an optional package."""
    extra = EXTRA_OF.get(module)
    return f'pip install "finery[{extra}]"' if extra else f"pip install {module}"


def need(module: str, why: str = "") -> ModuleType:
    """Import an optional package, or raise a `UserError` that says how to get it."""
    if not have(module):
        raise UserError(f"the package {module!r} is not installed{f' ({why})' if why else ''}; it comes with: {install_of(module)}")
    return import_module(module)


def is_on(name: str, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a variable of the environment is `1`, `true` or `y`."""
    return environment.get(name, "").lower() in ("1", "true", "y")


def is_first() -> bool:
    """Whether this is the only process of a run, or the first: it alone writes files."""
    return os.environ.get("RANK", "0") == "0"


def num_ranks() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def processor_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The line in which Linux tells a processor's instructions; empty where it is not known."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.lower().startswith(("flags", "features"))), "")


ONE_COMMAND = False
"""Whether this process serves a single command, so that it is known from its beginning what it will need."""


def leave_out(packages: Iterable[str]) -> None:
    """Let transformers and peft believe that these packages are not there: they import every optional one that they find, which takes
    seconds. Only where this process serves a single command, and for packages that nobody has imported.
    """
    if ONE_COMMAND:
        for name in packages:
            sys.modules.setdefault(name, None)  # type: ignore[arg-type]


def quiet_transformers() -> None:
    """No bars for what takes a second, no advice that concerns the libraries and not the user."""
    import logging as python_logging
    import warnings

    for name in ("torchao", "bitsandbytes", "torch.utils._pytree"):  # what they miss for GPUs that are not there
        python_logging.getLogger(name).setLevel(python_logging.ERROR)
    from transformers.utils import logging

    logging.disable_progress_bar()
    # peft 0.21 still asks transformers 5.23 by the old name
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)


@contextmanager
def without_datasets() -> Iterator[None]:
    """Let transformers' Trainer be imported without `datasets`, which it would only look at to know such data sets; ours are others."""
    utils = import_module("transformers.utils")
    before = utils.is_datasets_available
    utils.is_datasets_available = lambda: False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        utils.is_datasets_available = before  # type: ignore[attr-defined]


def compiled_chat_template(tokenizer: "PreTrainedTokenizerBase") -> Callable[..., str] | None:
    """The chat template as a function of `messages`, `tools`, `documents` and `add_generation_prompt`, or nothing.

    `apply_chat_template` copies and checks every message each time, which costs more than the rendering; for messages of
    plain texts it calls this with the same arguments. Nothing is returned where the tokenizer has its own way.
    """
    from transformers import PreTrainedTokenizerBase

    own = type(tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template
    if own or not isinstance(tokenizer.chat_template, str):
        return None
    try:
        from transformers.utils.chat_template_utils import _compile_jinja_template
    except ImportError:  # private in transformers 5.23
        return None
    compiled = _compile_jinja_template(tokenizer.chat_template)
    known = {**compiled.globals, **tokenizer.special_tokens_map}  # `render` would gather the globals each time

    def render(**arguments: object) -> str:
        context = compiled.new_context(known | arguments, shared=True)
        return compiled.environment.concat(compiled.root_render_func(context))

    return render


def takes_varlen(query: "Tensor") -> bool:
    """Whether torch's own attention over rows of many lengths serves: half precision on a GPU that has flash attention, torch from 2.10."""
    return query.is_cuda and query.dtype.itemsize == 2 and have("torch.nn.attention.varlen") and _has_ampere()


def _has_ampere() -> bool:
    import torch

    return torch.cuda.get_device_capability()[0] >= 8


def varlen_attention(
    query: "Tensor", key: "Tensor", value: "Tensor", starts: "Tensor", longest: int, scale: float, window: int
) -> "Tensor":
    """Causal attention over rows end to end: (1, H, T, D), (1, K, T, D) to (1, T, H, D); `starts` (rows + 1) int32."""
    from inspect import signature

    from torch.nn.attention.varlen import varlen_attn

    known = signature(varlen_attn).parameters
    groups = query.shape[1] // key.shape[1]
    if "enable_gqa" not in known and groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    how: dict[str, object] = {"scale": scale, **({"enable_gqa": groups > 1} if "enable_gqa" in known else {})}
    behind = window - 1 if window < query.shape[2] else -1
    how |= {"window_size": (behind, 0)} if "window_size" in known else {"is_causal": True}
    q, k, v = (part[0].transpose(0, 1) for part in (query, key, value))
    return varlen_attn(q, k, v, starts, starts, longest, longest, **how)[None]  # type: ignore[arg-type, index]


def free_memory() -> None:
    """Give back what a model or a step that is no longer needed took, also on a GPU; glibc would keep gigabytes between what lives on."""
    import gc

    gc.collect()
    _tell_malloc("malloc_trim", 0)
    if (torch := sys.modules.get("torch")) is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


@contextmanager
def garbage_collected() -> Iterator[None]:
    """What is made meanwhile is gone at the end unless it is still used: a model and its trainer hold each other, and Python alone would
    leave them there, with their memory and open files, for many runs. What was there before is not looked through, at the end or between.
    """
    import gc

    gc.freeze()
    try:
        yield
    finally:
        free_memory()
        gc.unfreeze()


_M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
_LARGE, _USUAL = 1 << 20, 32 << 20  # bytes; glibc itself raises its threshold up to the latter


def give_back_memory() -> None:
    """Have memory of a megabyte or more go back to the system when it is let go, in this process: where glibc chooses by itself, what lives
    long lies between what does not, and a server's memory grows for hours."""
    _tell_malloc("mallopt", _M_MMAP_THRESHOLD, _LARGE)


@contextmanager
def large_blocks_returned() -> Iterator[None]:
    """Large blocks of memory go back to the system as soon as they are freed. glibc keeps them otherwise, and where small ones that stay
    lie between them, a program that never holds more than a layer grows to the size of the model. Elsewhere than on glibc, nothing is done.
    """
    _tell_malloc("mallopt", _M_MMAP_THRESHOLD, _LARGE)
    try:
        yield
    finally:
        _tell_malloc("mallopt", _M_MMAP_THRESHOLD, _USUAL)


def _tell_malloc(call: str, *words: int) -> None:
    """Call one of glibc's own functions; elsewhere nothing is done."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library
            getattr(ctypes.CDLL(None), call)(*words)
