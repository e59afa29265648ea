"""More than one process: the run is checked here first, then torchrun starts Finery once for every device."""

import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import FrameType

from finery.compat import is_on
from finery.errors import UserError
from finery.log import get_logger
from finery.training.arguments import visible_devices

log = get_logger(__name__)


def num_processes(environment: Mapping[str, str] = os.environ) -> int:
    """How many processes `finery train` should start; 1 means that this one does the work.

    One for each visible device; `FORCE_TORCHRUN` starts torchrun for a single device as well, `NPROC_PER_NODE`
    overrides the number. A process that torchrun has started does the work itself.
    """
    if "LOCAL_RANK" in environment:
        return 1
    devices = visible_devices()
    if devices > 1 or is_on("FORCE_TORCHRUN", environment):
        number = environment.get("NPROC_PER_NODE", str(max(devices, 1)))
        if not number.isdigit() or int(number) < 1:
            raise UserError(f"NPROC_PER_NODE in the environment should be a whole number from 1 on, found {number!r}")
        return int(number)
    return 1


def needs_torchrun(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether torchrun is to be started."""
    return "LOCAL_RANK" not in environment and (num_processes(environment) > 1 or is_on("FORCE_TORCHRUN", environment))


def torchrun(words: Sequence[str], environment: Mapping[str, str] = os.environ) -> int:
    """Start `finery train WORDS` once for every device, watched by torchrun's agent in this process; returns the exit code.

    What the user can mend ends with 2, as it does in one process.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        with _handed_on(signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            run(parse_args(torchrun_words(words, environment)))
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        if failure.exitcode != 2:
            log.error("a training process ended with exit code %s; what it said stands above", failure.exitcode)
        return failure.exitcode if failure.exitcode > 0 else 1
    return 0


@contextmanager
def _handed_on(*numbers: signal.Signals) -> Iterator[None]:
    """Within the block, signals go to the training processes, which end together after a step; they are in sessions of their own."""
    import psutil

    def hand_on(number: int, frame: FrameType | None) -> None:
        for child in psutil.Process().children():
            with suppress(psutil.Error):
                child.send_signal(number)

    before = {number: signal.signal(number, hand_on) for number in numbers if threading.current_thread() is threading.main_thread()}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def torchrun_words(words: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """What torchrun is told, from NNODES, NODE_RANK, NPROC_PER_NODE, MASTER_ADDR, MASTER_PORT, RDZV_ID, MIN_NNODES, MAX_NNODES
    and MAX_RESTARTS.
    """
    get = environment.get
    # of SIGTERM and SIGINT it would end all processes in the middle of a step
    command = ["--nproc-per-node", str(num_processes(environment)), "--signals-to-handle", "SIGHUP,SIGQUIT"]
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
