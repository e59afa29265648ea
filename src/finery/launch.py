"""More than one process: the run is checked here first, then torchrun starts Finery once for every device."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence

from finery.training.arguments import visible_devices


def num_processes(environment: Mapping[str, str] = os.environ) -> int:
    """How many processes `finery train` should start; 1 means that this one does the work.

    One for each visible device; `FORCE_TORCHRUN` starts torchrun for a single device as well, `NPROC_PER_NODE`
    overrides the number. A process that torchrun has started does the work itself.
    """
    if "LOCAL_RANK" in environment:
        return 1
    devices = visible_devices()
    if devices > 1 or _is_on(environment, "FORCE_TORCHRUN"):
        return int(environment.get("NPROC_PER_NODE", max(devices, 1)))
    return 1


def needs_torchrun(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether torchrun is to be started."""
    return "LOCAL_RANK" not in environment and (num_processes(environment) > 1 or _is_on(environment, "FORCE_TORCHRUN"))


def torchrun(words: Sequence[str], environment: Mapping[str, str] = os.environ) -> int:
    """Start `finery train WORDS` under torchrun and wait; returns its exit code."""
    command = torchrun_command(words, environment)
    process = subprocess.Popen(command, env={"OMP_NUM_THREADS": "1", **environment})
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:  # torchrun got it, too, and ends its children; wait for that
            continue


def torchrun_command(words: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """The command, from NNODES, NODE_RANK, NPROC_PER_NODE, MASTER_ADDR, MASTER_PORT, RDZV_ID, MIN_NNODES, MAX_NNODES, MAX_RESTARTS."""
    get = environment.get
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(num_processes(environment))]
    address, port = get("MASTER_ADDR", "127.0.0.1"), get("MASTER_PORT")
    if rendezvous := get("RDZV_ID"):
        elastic = f"{get('MIN_NNODES')}:{get('MAX_NNODES')}" if get("MIN_NNODES") and get("MAX_NNODES") else get("NNODES", "1")
        command += ["--nnodes", elastic, "--rdzv-id", rendezvous, "--rdzv-backend", "c10d"]
        command += ["--rdzv-endpoint", f"{address}:{port or 29400}", "--max-restarts", get("MAX_RESTARTS", "0")]
    elif get("NNODES", "1") == "1" and port is None:
        command += ["--standalone"]
    else:
        command += [
            "--nnodes",
            get("NNODES", "1"),
            "--node-rank",
            get("NODE_RANK", "0"),
            "--master-addr",
            address,
            "--master-port",
            port or "29500",
        ]
    return [*command, "-m", "finery", "train", *words]


def _is_on(environment: Mapping[str, str], name: str) -> bool:
    return environment.get(name, "").lower() in ("1", "true", "y")
