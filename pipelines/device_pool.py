"""Which stages run at the same time: each on its own GPUs if the study uses GPUs, otherwise as many as the cores allow."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from dit.config import Params
from dit.sections import EvaluateParams, LatentsParams, TrainParams

NO_GPU = ""
"""The name that a stage acquires in a pool without GPUs."""
MPS_FOLDER = "/tmp/nvidia-mps"
"""Where NVIDIA's multi-process service has its files, unless CUDA_MPS_PIPE_DIRECTORY says otherwise (NVIDIA, "Multi-Process
Service").
"""


class DevicePool:
    """GPUs that stages acquire and release; a GPU that is listed n times is shared by up to n stages."""

    def __init__(self, gpus: Sequence[str], max_parallel: int, processes: Mapping[str, int]) -> None:
        """At most `max_parallel` stages run at once.

        `processes` gives, by a stage's name before the @, how many processes it has; each of them needs a GPU.
        """
        self.max_parallel = max_parallel
        self._free = Counter(gpus)
        self.shares_gpus = NO_GPU not in gpus and max(self._free.values()) > 1
        self._different = len(self._free)
        self._processes = processes
        self._running = 0

    def acquire(self, stage: str) -> list[str] | None:
        """The GPUs for `stage`, preferring those that the fewest stages use; None if the stage must wait.

        A stage that needs more GPUs than the pool has gets all of them, and then reports the error itself.
        """
        count = min(self._processes.get(stage.partition("@")[0], 1), self._different)
        chosen = [gpu for gpu, free in self._free.most_common(count) if free]
        if self._running == self.max_parallel or len(chosen) < count:
            return None
        self._free.subtract(chosen)
        self._running += 1
        return chosen

    def release(self, gpus: list[str]) -> None:
        """Give back what `acquire` returned."""
        self._free.update(gpus)
        self._running -= 1


def device_pool(params: Params, workers: int | None) -> DevicePool:
    """The devices of this machine for a study with `params`.

    At most `workers` stages run at once; by default one for each GPU, or as many as the CPU's cores allow.
    """
    sections: dict[str, LatentsParams | TrainParams | EvaluateParams] = {
        "latents": params.latents,
        "train": params.train,
        "evaluate": params.evaluate,
    }
    devices = {params.analyse.device, *(section.device for section in sections.values())}
    if devices & {"auto", "cuda"} and (gpus := visible_gpus()):
        parallel = workers or len(gpus)
        processes = {name: section.processes for name, section in sections.items()}
        return DevicePool(gpus * -(-parallel // len(gpus)), parallel, processes)
    if torch.backends.mps.is_available() and devices & {"auto", "mps"}:
        return _without_gpus(workers or 1)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    busy = max(section.threads * section.processes for section in (params.train, params.evaluate))
    return _without_gpus(workers or max(1, cores // busy))


def visible_gpus() -> list[str]:
    """The names of the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    if not torch.cuda.is_available():
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    return visible.split(",")


def _without_gpus(max_parallel: int) -> DevicePool:
    return DevicePool([NO_GPU] * max_parallel, max_parallel, {})


def advice(pool: DevicePool) -> str | None:
    """What would speed up the stages of `pool`: NVIDIA's multi-process service, if they share GPUs without it; else None."""
    if not pool.shares_gpus or multi_process_service():
        return None
    return (
        "several stages share a GPU and take turns on it; they run faster together after `nvidia-cuda-mps-control -d` "
        "(docs/speed.md, Many small runs on one GPU)"
    )


def multi_process_service() -> bool:
    """Whether NVIDIA's multi-process service runs on this machine."""
    return (Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY", MPS_FOLDER)) / "control").exists()


def environment(gpus: list[str]) -> dict[str, str]:
    """The environment variables that let a stage see only its own GPUs."""
    return {"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if any(gpus) else {}
