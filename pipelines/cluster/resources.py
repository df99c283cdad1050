"""How many cores and GPUs of the cluster each stage asks Ray for."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from dit.config import Params
from dit.errors import UserError

ON_GPU = ("auto", "cuda")
DEVICES = ("autoencoder", "latents", "analyse", "train", "evaluate", "features")
"""Sections of the parameters that choose a device. Each has the name of the stages that it configures."""


@dataclass(frozen=True)
class Need:
    """The cores and GPUs that one stage takes, or that a node has; a fraction of a GPU if several stages share it."""

    cpus: float
    gpus: float = 0.0

    def fits(self, node: Need) -> bool:
        """Whether a node with the resources `node` can run the stage."""
        return self.cpus <= node.cpus and self.gpus <= node.gpus

    def __str__(self) -> str:
        return f"{self.cpus:g} CPUs" + (f" and {self.gpus:g} GPUs" if self.gpus else "")


def nodes(listed: Collection[Mapping[str, Any]]) -> list[Need]:
    """The resources of each node that is alive; `listed` is what `ray.nodes()` returns."""
    alive = [node["Resources"] for node in listed if node["Alive"]]
    return [Need(has.get("CPU", 0.0), has.get("GPU", 0.0)) for has in alive]


def needs(params: Params, kinds: Collection[str], have: list[Need], workers: int | None) -> dict[str, Need]:
    """What a stage of each kind takes on a cluster whose nodes `have` these resources, if `workers` stages run at once.

    A stage that uses GPUs takes one for each of its processes. If there are more workers than GPUs, stages of one process share
    GPUs. Other stages take one core for each thread, but not more than the largest node has.

    Raises `UserError` for a stage that no node can run.
    """
    gpus = sum(node.gpus for node in have)
    share = 1.0 / -(-workers // int(gpus)) if workers and gpus >= 1 and workers > gpus else 1.0
    most = max((node.cpus for node in have), default=0.0)
    found = {kind: _need(params, kind, gpus > 0, share, most) for kind in kinds}
    for kind, need in found.items():
        if have and not any(need.fits(node) for node in have):
            raise UserError(f"stage '{kind}' needs {need} on one node; the nodes of the cluster have {_listed(have)}")
    return found


def _need(params: Params, kind: str, has_gpus: bool, share: float, most: float) -> Need:
    if kind == "images":
        return Need(min(max(params.images.workers, 1), most or 1))
    if kind not in DEVICES:
        return Need(1)
    section = getattr(params, kind)
    processes = getattr(section, "processes", 1)
    if has_gpus and section.device in ON_GPU:
        return Need(processes, processes) if processes > 1 else Need(share, share)
    threads = getattr(section, "threads", 1) * processes
    return Need(min(threads, most or threads))


def _listed(have: list[Need]) -> str:
    return "; ".join(dict.fromkeys(map(str, have)))
