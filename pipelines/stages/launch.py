"""Run a stage as several processes on this machine, started as by `torchrun`. On several machines, use `torchrun` itself."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import tempfile
import threading
import time
import uuid
from typing import TYPE_CHECKING

import torch

from dit.devices import resolve_device
from dit.distributed import MEETING
from dit.errors import ConfigError

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    from dit.sections import EvaluateParams, LatentsParams, TrainParams

WRONG_INPUT = 2
"""The exit code of a stage whose input is wrong."""

LAUNCHER = "DIT_LAUNCHER"
"""The environment variable that tells ranks which process started them."""

PR_SET_PDEATHSIG = 1
"""linux/prctl.h: the signal that a process gets when its parent ends."""


def in_group() -> bool:
    """Whether this process already belongs to a group."""
    return "RANK" in os.environ


def join_group(section: str, settings: TrainParams | EvaluateParams | LatentsParams | None) -> None:
    """Check that the group has as many processes as `settings` ask for; if `run_group` started it, end with that process.

    `section` is the name of `settings` in `params.yaml`; a stage with one process has none. Raises `ConfigError` if the
    numbers differ.
    """
    size = int(os.environ["WORLD_SIZE"])
    if settings is None:
        raise ConfigError(f"WORLD_SIZE = {size}: this stage is one process; start it without torchrun")
    if settings.processes != size:
        raise ConfigError(f"{section}.processes = {settings.processes}, but torchrun started {size} processes")
    if LAUNCHER in os.environ:
        end_with(int(os.environ[LAUNCHER]))


def check_devices(section: str, settings: TrainParams | EvaluateParams | LatentsParams) -> None:
    """Raises `ConfigError` if there are fewer GPUs than processes."""
    if resolve_device(settings.device).type == "cuda" and settings.processes > (count := torch.cuda.device_count()):
        raise ConfigError(f"{section}.processes = {settings.processes}; it should be at most {count} here, one for each GPU")


def end_with(parent: int) -> None:
    """Have this process killed when its parent ends, even by SIGKILL; otherwise it would wait, or write, for nobody."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
    else:
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGKILL)


def run_group(count: int) -> int:
    """Run the command of this process as `count` ranks. Returns 0 or the exit code of the first failure (negative: a signal).

    If one rank fails, or if this process is asked to end, the other ranks are ended, and one message says why.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ[LAUNCHER] = str(os.getpid())
    loopback = "lo" if sys.platform == "linux" else "lo0"
    os.environ |= {"GLOO_SOCKET_IFNAME": loopback, "NCCL_SOCKET_IFNAME": loopback}
    try:
        with tempfile.TemporaryDirectory() as directory:  # torch's server for it would listen on every interface
            os.environ[MEETING] = f"{directory}/ranks"
            config = LaunchConfig(
                min_nodes=1,
                max_nodes=1,
                nproc_per_node=count,
                run_id=uuid.uuid4().hex,
                rdzv_backend="c10d",
                rdzv_endpoint=f"{directory}/launcher",
                rdzv_configs={"store_type": "file"},
                local_addr="127.0.0.1",
                max_restarts=0,
                logs_specs=DefaultLogsSpecs(log_dir=os.devnull),
            )
            elastic_launch(config, sys.executable)(*sys.orig_argv[1:])
    except ChildFailedError as error:
        rank, failure = min(error.failures.items(), key=lambda failed: _order(failed[1]))
        code = failure.exitcode
        if code == WRONG_INPUT:  # each rank has said what is wrong
            return code
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        print(f"error: process {rank} of {count} {how}; the others were ended, and no output was written", file=sys.stderr)
        return code
    except SignalException as error:
        print(f"error: {error.sigval.name}; all {count} processes were ended, and no output was written", file=sys.stderr)
        return -error.sigval
    return 0


def _order(failure: ProcessFailure) -> tuple[bool, bool, int]:
    """A sort key for failures: the first cause comes first. If a rank is killed, others fail, or are asked to end."""
    asked = failure.exitcode == -signal.SIGTERM
    return failure.exitcode > 0 or asked, asked, failure.timestamp
