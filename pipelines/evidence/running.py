"""Run a study without DVC, many runs at a time on one machine: the same stages, called by a pool of processes.

DVC starts a process for each stage, which costs some seconds. This is too much if a run takes ten seconds and hundreds of runs
share one GPU, so this pool starts its processes only once. The stages are the same functions with the same parameters, so
their outputs are the same as those of `make study` on such a machine.
"""

from __future__ import annotations

import gc
import hashlib
import json
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import torch

from dit import config, design as designs, yamlfile
from dit.config import Params
from dit.errors import ConfigError, UserError
from dit.progress import progress
from pipelines import design
from pipelines.design import Item
from pipelines.device_pool import NO_GPU, environment, visible_gpus
from pipelines.overrides import override
from pipelines.records.training import TRAIN

PROFILES = Path("profiles/evidence")
A = TypeVar("A")
R = TypeVar("R")
DATA = ("images", "autoencoder", "latents")


@dataclass(frozen=True)
class Workplace:
    """Where a study runs: a folder with its parameters, its data and `runs/train`; and the parameters themselves."""

    folder: Path
    params: Params

    @property
    def done(self) -> list[designs.Run]:
        """The runs that have ended, in the order of the study."""
        return [run for run in designs.design(self.params.study).runs if (self.folder / TRAIN / run.name).is_dir()]


def prepare(name: str, root: Path, scratch: Path, overrides: Mapping[str, Any]) -> Workplace:
    """Prepare the folder in which `profiles/evidence/<name>.yaml` runs, with other values of parameters in `overrides`.

    The folder's name holds a digest of all parameters and of the code of training, so that only runs of an interrupted call
    with the same parameters and code are used again. Studies with the same data share one folder of data. Raises `ConfigError`
    for an unknown profile or a wrong key.
    """
    profile = root / PROFILES / f"{name}.yaml"
    known = sorted(file.stem for file in profile.parent.glob("*.yaml"))
    if name not in known:
        raise ConfigError(f"{PROFILES / name}.yaml: no such profile; there are {', '.join(known)}")
    text = override((root / "params.yaml").read_text(), {**yamlfile.read(profile, PROFILES / profile.name), **overrides})
    params = config.parse(yamlfile.parse(text, profile.name), profile.name)
    folder = scratch / f"{name}-{_digest([text, design.code_digest('train')])}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.yaml").write_text(text)
    found = design.items(params)
    made_of = [
        design.identity(params.with_values(item.setting.levels), item) for stage in DATA for item in found[stage].values()
    ]
    data = scratch / f"data-{_digest(made_of)}"
    data.mkdir(exist_ok=True)
    link = folder / "data"
    if not link.is_symlink():
        link.symlink_to(data.resolve())
    return Workplace(folder.resolve(), params)


def run(
    place: Workplace,
    workers: int,
    minutes: float,
    check: Callable[[], None] = lambda: None,
    known: Collection[str] = (),
) -> list[str]:
    """Make the data, call `check`, then train all runs, `workers` at a time on each GPU; start no run after `minutes`.

    Runs whose names are in `known` have results elsewhere, and are not trained. Seeds that choose learning rates come first,
    then the other seeds one after another, so that a study that is cut short has complete seeds. `check` may raise an error,
    and then no run starts. Returns a line for each run that ended by a fault of the program or of the machine. Raises
    `UserError` if such a fault occurs while the data are made.
    """
    until = time.monotonic() + 60 * minutes
    stages = design.items(place.params)
    faults: list[str] = []
    with _pools(place.folder, workers) as pools:
        for stage in DATA:
            wanted = [item for item in stages[stage].values() if not (place.folder / item.out).is_dir()]
            for future in [pools[0].submit(_run_stage, item) for item in wanted]:
                if fault := future.result():
                    raise UserError(f"stage {stage}: {fault}")
        check()
        ended = {run.name for run in place.done}.union(known)
        waiting = [item for item in _in_order(place.params, stages["train"].values()) if item.key not in ended]
        with progress(len(stages["train"]), place.params.study.name, "run", done=len(ended)) as bar:
            for fault in _train(pools * workers, waiting, until):
                faults += [fault] if fault else []
                bar.update()
    return faults


def _train(free: list[_Pool], waiting: list[Item], until: float) -> Iterator[str | None]:
    """Yields after each run the fault that ended it, or None if it ended normally.

    `free` has each pool once for each run that it can train at the same time.
    """
    running: dict[Future[str | None], _Pool] = {}
    todo = iter(waiting)
    while True:
        while free and time.monotonic() < until and (item := next(todo, None)):
            pool = free.pop(0)
            running[pool.submit(_run_stage, item)] = pool
        if not running:
            return
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            free.append(running.pop(future))
            try:
                yield future.result()
            except BrokenProcessPool:
                yield "a process of the pool was killed, perhaps for want of memory: fewer workers may help"
                return


def _in_order(params: Params, items: Iterable[Item]) -> list[Item]:
    """The order of the runs: longer runs first, so that no long run is left for the end; runs of one length seed by seed."""
    seeds = [*params.study.choose_on, *(seed for seed in params.study.seeds if seed not in params.study.choose_on)]
    return sorted(items, key=lambda item: (-item.setting.levels.get("train.steps", 0), seeds.index(item.seed or 0)))


class _Pool:
    """Processes that work in `folder` and see one GPU only.

    They are spawned: a fork of a process that has initialised CUDA could not use it. A library may read CUDA_VISIBLE_DEVICES as
    soon as it is imported, so it is set before a process starts, which may happen at any `submit`.
    """

    def __init__(self, folder: Path, workers: int, gpu: str) -> None:
        context = multiprocessing.get_context("spawn")
        self.processes = ProcessPoolExecutor(workers, mp_context=context, initializer=_enter, initargs=(folder,))
        self.environment = environment([gpu])

    def submit(self, function: Callable[[A], R], argument: A) -> Future[R]:
        """Call `function` in one of the processes."""
        before = dict(os.environ)
        os.environ.update(self.environment)
        try:
            return self.processes.submit(function, argument)
        finally:
            os.environ.clear()
            os.environ.update(before)


@contextmanager
def _pools(folder: Path, workers: int) -> Iterator[list[_Pool]]:
    """A pool of `workers` processes for each GPU; one pool where there is no GPU."""
    with ExitStack() as stack:
        pools = [_Pool(folder, workers, gpu) for gpu in visible_gpus() or [NO_GPU]]
        for pool in pools:
            stack.enter_context(pool.processes)
        yield pools


def _enter(folder: Path) -> None:
    """Work in `folder`, and print into a file there, because mixed lines of many runs would be hard to read."""
    os.chdir(folder)
    logs = Path("logs")
    logs.mkdir(exist_ok=True)
    log = (logs / f"{os.getpid()}.log").open("a", buffering=1)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(log.fileno(), stream.fileno())


@cache
def _parameters() -> Params:
    return config.load()


def _run_stage(item: Item) -> str | None:
    """Run one stage in this process; return what went wrong in one line, or None.

    Only the module of this stage is imported, because diffusers takes seconds to import and training does not need it.
    """
    try:
        run_stage = getattr(import_module(f"pipelines.stages.{item.stage}"), item.stage)
        run_stage(_parameters().with_values(item.setting.levels), item)
    except Exception as error:
        traceback.print_exc()
        return f"{item.stage}@{item.key}: {type(error).__name__}: {error}"
    finally:
        _free()
    return None


def _free() -> None:
    """Give memory of the GPU back that the next run of this process may not need: networks of other sizes would add up."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:8]
