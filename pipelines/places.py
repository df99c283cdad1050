"""Where stages run at the same time: each on GPUs of its own, where GPUs are used, else as many at once as the cores allow."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence

import torch

from dit.config import Params
from dit.sections import EvaluateParams, LatentsParams, TrainParams

NOWHERE = ""
"""The place of a stage that is given no GPU."""


class Places:
    """GPUs that stages take, and give back; a GPU that is there several times holds as many stages at once."""

    def __init__(self, gpus: Sequence[str], most: int, processes: Mapping[str, int]) -> None:
        """At `most` so many stages at once. A stage, by its name before the @, has one GPU for each of its `processes`."""
        self.most = most
        self._free = Counter(gpus)
        self._different = len(self._free)
        self._processes = processes
        self._running = 0

    def take(self, stage: str) -> list[str] | None:
        """The GPUs of `stage`, those with the fewest stages first; None where it must wait.

        A stage that wants more than there are gets all: it then says itself what is wrong.
        """
        count = min(self._processes.get(stage.partition("@")[0], 1), self._different)
        chosen = [gpu for gpu, free in self._free.most_common(count) if free]
        if self._running == self.most or len(chosen) < count:
            return None
        self._free.subtract(chosen)
        self._running += 1
        return chosen

    def give_back(self, gpus: list[str]) -> None:
        """What a stage took."""
        self._free.update(gpus)
        self._running -= 1


def places_for(params: Params, workers: int | None) -> Places:
    """Those of this machine for a study with `params`; `workers` stages at once, or one for each GPU, or what cores allow."""
    sections: dict[str, LatentsParams | TrainParams | EvaluateParams] = {
        "latents": params.latents,
        "train": params.train,
        "evaluate": params.evaluate,
    }
    devices = {params.analyse.device, *(section.device for section in sections.values())}
    if torch.cuda.is_available() and devices & {"auto", "cuda"}:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
        gpus = visible.split(",")
        most = workers or len(gpus)
        return Places(gpus * -(-most // len(gpus)), most, {name: section.processes for name, section in sections.items()})
    if torch.backends.mps.is_available() and devices & {"auto", "mps"}:
        return _without_gpus(workers or 1)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    busy = max(section.threads * section.processes for section in (params.train, params.evaluate))
    return _without_gpus(workers or max(1, cores // busy))


def _without_gpus(most: int) -> Places:
    return Places([NOWHERE] * most, most, {})


def environment(gpus: list[str]) -> dict[str, str]:
    """What a stage must be told of its GPUs."""
    return {"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if any(gpus) else {}
