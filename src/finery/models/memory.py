"""How much memory this process may still take."""

import os
from pathlib import Path

import torch


def free_bytes(device: torch.device) -> int:
    """Memory that this process may still take: of the GPU, or of the machine and its control group."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    found = [_available(), _left_in_group()]
    return min(value for value in found if value is not None) if any(value is not None for value in found) else 4 * 2**30


def _available() -> int | None:
    """What the kernel reckons can be had without swapping, in Linux; else half of what is built in."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("MemAvailable"))) * 1024
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2 if hasattr(os, "sysconf") else None


def _left_in_group(folder: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What a container's limit leaves (control groups, version 2), file caches not counted as taken."""
    try:
        limit = (folder / "memory.max").read_text().strip()
        if limit == "max":
            return None
        stats = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return max(int(limit) - int((folder / "memory.current").read_text()) + int(stats.get("inactive_file", 0)), 0)
    except (OSError, ValueError):
        return None
