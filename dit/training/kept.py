"""The checkpoints of a run that outlive it: those asked for, the one before a collapse, and the last one of a finished run.

In the run's scratch folder, `kept/STEP` and `ended/STEP` hold one checkpoint each, the state before step STEP, and `run.json`
beside them says what run it is: with its latents, that is all that a continuation needs.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from dit import checkpoint
from dit.data.latents import LatentStore
from dit.data.store import MANIFEST
from dit.errors import ConfigError, explain
from dit.sections import DiffusionParams, ModelParams, Section, Seed, TrainParams
from dit.training.records import Event
from dit.training.stability import COLLAPSE_STEPS

BEFORE = 32
"""A checkpoint is good if it is at least this many steps before the first step of a spike or a collapse: gradient norms doubled
10 to 30 steps ahead in the collapse that `dit.training.stability` describes."""

RUN = "run.json"
RECENT, SUSPECT, KEPT, ENDED = "recent", "suspect", "kept", "ended"


class RunSettings(Section):
    """What a run is, beside its latents and its initial weights; `name` is for people."""

    name: str
    seed: Seed
    model: ModelParams
    diffusion: DiffusionParams
    train: TrainParams


class KeptRun(Section):
    """What `run.json` holds: the settings of a run, where its latents were and which ones, and how it computed.

    `sizes` are those that `dit.models.build` needs, `latents_digest` is what `digest` returns; `device`, `precision` and
    `backend` are those that the run had where its parameters say auto; `processes` is their number.
    """

    settings: RunSettings
    sizes: dict[str, int]
    latents: str
    latents_digest: str
    device: str
    precision: str
    backend: str
    processes: int
    torch: str

    @classmethod
    def read(cls, path: Path) -> KeptRun:
        """Read a `run.json`. Raises `ConfigError` where there is none, or it is of another version of this project."""
        try:
            data = json.loads(path.read_text())
        except FileNotFoundError:
            raise ConfigError(f"{path} not found: it says what run the checkpoints beside it belong to") from None
        except ValueError as error:
            raise ConfigError(f"{path}: not valid JSON: {error}") from None
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise ConfigError(explain(error, str(path), data)) from None


def digest(store: LatentStore) -> str:
    """A digest of all latents: of the manifest, which holds the checksums of the arrays."""
    return hashlib.sha256((store.store.directory / MANIFEST).read_bytes()).hexdigest()


class Shelf:
    """A folder with a checkpoint for each of some steps."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def path(self, step: int) -> Path:
        """The folder of one step."""
        return self.directory / str(step)

    def steps(self) -> list[int]:
        """The steps of all checkpoints, in order."""
        found = self.directory.glob(f"*/{checkpoint.FILE}")
        return sorted(int(path.parent.name) for path in found if path.parent.name.isdecimal())

    def before(self, step: int) -> int | None:
        """The last checkpoint at `step` or earlier."""
        return max((found for found in self.steps() if found <= step), default=None)

    def add(self, step: int, source: Path) -> None:
        """Keep the last checkpoint of the folder `source`, which is of `step`."""
        checkpoint.copy(source, self.path(step))

    def only(self, step: int | None, source: Path | None = None) -> None:
        """Keep no checkpoint but that of `step`, which is added where there is a `source`."""
        if step is not None and source is not None:
            self.add(step, source)
        for other in self.steps():
            if other != step:
                shutil.rmtree(self.path(other), ignore_errors=True)


class Keeper:
    """Decides which checkpoints of a run to keep.

    `recent` are the last checkpoints, as many as an event may yet ask for; `suspect` is the one before a spike that lasts.
    Before the first collapse, or a divergence, a checkpoint is kept unasked. These methods are for the main rank alone.
    """

    def __init__(self, scratch: Path, run: KeptRun | None) -> None:
        self.run = run
        self.recent, self.suspect, self.kept = (Shelf(scratch / name) for name in (RECENT, SUSPECT, KEPT))
        self._scratch = scratch

    def saved(self, step: int, asked_for: bool) -> None:
        """The checkpoint in the scratch folder is now that of `step`."""
        self.recent.add(step, self._scratch)
        reach = self.recent.before(step - BEFORE - COLLAPSE_STEPS)
        for old in self.recent.steps():
            if reach is not None and old < reach:
                shutil.rmtree(self.recent.path(old), ignore_errors=True)
        if asked_for:
            self._keep(step, self._scratch)

    def judged(self, event: Event, collapses: int) -> str:
        """Keep the checkpoint that an event calls for, after `collapses` collapses. Returns what was kept, in words, or
        nothing."""
        if event.kind == "recovery":
            self.suspect.only(None)
        elif event.kind == "collapse" and collapses == 1:
            return self.ending(event.step, "collapse")
        elif event.kind == "spike" and (good := self.recent.before(event.step - BEFORE)) is not None:
            self.suspect.only(good, self.recent.path(good))
        return ""

    def ending(self, step: int, what: str) -> str:
        """Keep the last good checkpoint before a collapse or a divergence at `step`, and say so; empty where there is none."""
        shelf = self.suspect if self.suspect.steps() else self.recent
        good = shelf.before(step - BEFORE)
        if good is None:
            return ""
        self._keep(good, shelf.path(good))
        size = megabytes(self.kept.path(good))
        return f"kept the checkpoint of step {good:,}, before the {what} at step {step:,}, in {self.kept.path(good)} ({size})"

    def forget(self) -> None:
        """The run has ended: remove what no event can ask for any more."""
        for shelf in (self.recent, self.suspect):
            shutil.rmtree(shelf.directory, ignore_errors=True)

    def _keep(self, step: int, source: Path) -> None:
        self.kept.add(step, source)
        describe(self.kept, self.run)


def describe(shelf: Shelf, run: KeptRun | None) -> None:
    """Write `run.json` beside the checkpoints."""
    if run is not None:
        partial = shelf.directory / f".{RUN}.partial"
        partial.write_text(json.dumps(run.model_dump(mode="json"), indent=2) + "\n")
        partial.replace(shelf.directory / RUN)


@dataclass(frozen=True)
class Kept:
    """A checkpoint that is kept: the state before `step` of `run`, in the folder `path`."""

    path: Path
    step: int
    run: KeptRun

    @property
    def size(self) -> str:
        """Its size in words."""
        return megabytes(self.path)

    def load(self) -> dict[str, Any]:
        """The state, in the memory of the host. Raises `ConfigError` where the file is damaged."""
        state = checkpoint.load(self.path, torch.device("cpu"))
        if state is None:
            raise ConfigError(f"{self.path}: no whole checkpoint is here; continue another one")
        return state


def kept_in(*scratch: Path) -> Iterator[Kept]:
    """All kept checkpoints of the runs that have these scratch folders."""
    for shelf in (Shelf(each / name) for each in scratch for name in (KEPT, ENDED)):
        if steps := shelf.steps():
            run = KeptRun.read(shelf.directory / RUN)
            yield from (Kept(shelf.path(step), step, run) for step in steps)


def megabytes(directory: Path) -> str:
    """The size of a checkpoint in words, such as "21.3 MB"."""
    return f"{(directory / checkpoint.FILE).stat().st_size / 1e6:,.1f} MB"
