"""Elementwise work in C, built by the machine's own compiler on first use; where there is none, torch's operations serve."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finery.compat import processor_flags
from finery.files import cache_folder, digest
from finery.log import get_logger

if TYPE_CHECKING:
    import torch

log = get_logger(__name__)

SOURCES = ("kernels.c", "bodies.h", "norms.h", "panels.h", "team.h", "decoder.h")
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC", "-shared")
"""No -ffast-math: what is infinite or no number must stay so, the guards look for it."""


def call(name: str, *arguments: Any) -> bool:
    """Run the function `name` for the first tensor's number format; false where it cannot serve, and nothing was done then.

    Tensors go by address, `None` as none; every one must be on the CPU. What the functions expect of shapes and strides is said in
    bodies.h.
    """
    import torch

    first = next(value for value in arguments if isinstance(value, torch.Tensor))
    if first.device.type != "cpu" or first.dtype not in (torch.float32, torch.bfloat16) or (library := _library()) is None:
        return False
    function = getattr(library, f"{name}_{'fp32' if first.dtype == torch.float32 else 'bf16'}")
    function(*[_as_c(value) for value in arguments], ctypes.c_int(torch.get_num_threads()))
    return True


def function(name: str) -> Any:
    """A function that takes structures of its own, which its header tells of; None where there is no library."""
    library = _library()
    return None if library is None else getattr(library, name)


def serves(tensor: torch.Tensor) -> bool:
    """Whether `call` works for a tensor of this format and device; not for one that holds its numbers in a way of its own, as torchao's."""
    import torch

    return (
        type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and tensor.device.type == "cpu"
        and tensor.dtype in (torch.float32, torch.bfloat16)
        and _library() is not None
    )


def _as_c(value: Any) -> Any:
    """An argument as C takes it: numbers by their kind, tensors by where their first element lies."""
    if value is None:
        return ctypes.c_void_p()
    if isinstance(value, bool):
        return ctypes.c_int(value)
    if isinstance(value, int):
        return ctypes.c_int64(value)
    if isinstance(value, float):
        return ctypes.c_float(value)
    return ctypes.c_void_p(value.data_ptr())


@cache
def _library() -> ctypes.CDLL | None:
    """The built functions, from the cache where they are there; None without a C compiler, which is said once."""
    compiler = next((found for name in (os.environ.get("CC"), "cc", "gcc", "clang") if name and (found := shutil.which(name))), None)
    if compiler is None or os.name != "posix":
        log.info("no C compiler was found: elementwise work is left to torch, which is slower")
        return None
    try:
        return ctypes.CDLL(str(_built(compiler)))
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", "") or str(error)
        log.info("%s cannot build the elementwise kernels, torch's operations serve: %s", compiler, said.strip().splitlines()[-1:])
        return None


def _built(compiler: str) -> Path:
    """The shared library for this source, compiler and processor; other processes may build it at the same time."""
    folder = Path(__file__).parent
    openmp = _torch_openmp()
    # `-march=native` depends on the processor, and the cache may be shared between machines
    name = digest(*(folder / part for part in SOURCES), " ".join(FLAGS), compiler, str(openmp), processor_flags() or platform.processor())
    target = cache_folder() / "native" / f"{name}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as beside:
            made = Path(beside) / target.name
            command = [compiler, *FLAGS, str(folder / SOURCES[0]), "-o", str(made), *([str(openmp)] if openmp else []), "-lm"]
            subprocess.run(command, check=True, capture_output=True, text=True)
            made.replace(target)
    return target


def _torch_openmp() -> Path | None:
    """The OpenMP that torch brings: with another one there would be two pools of threads, each waiting for the other's cores."""
    import torch

    return next(iter(sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))), None)
