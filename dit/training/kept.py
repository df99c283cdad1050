"""The checkpoints that stay after a run: requested ones, the last good one before a collapse, and the last of a finished run.

In the run's scratch folder, each `kept/STEP` and `ended/STEP` holds one checkpoint, the state before step STEP. `run.json`
beside them describes the run. A continuation needs only these files and the latents of the run.
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
    """What defines a run, in addition to its latents and initial weights; `name` is only for the reader."""

    name: str
    seed: Seed
    model: ModelParams
    diffusion: DiffusionParams
    train: TrainParams


class KeptRun(Section):
    """The content of `run.json`: the settings of a run, the path and digest of its latents, and how it was computed.

    `sizes` are the sizes that `dit.models.build` needs; `digest` returns `latents_digest`; `device`, `precision` and `backend`
    are what the run used, also if its parameters say auto; `processes` is the number of processes.
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
        """Read a `run.json`. Raises `ConfigError` if it is missing, or is from another version of this project."""
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
    """A digest of all latents: the SHA-256 of the manifest, which contains the checksums of the arrays."""
    return hashlib.sha256((store.store.directory / MANIFEST).read_bytes()).hexdigest()


class Shelf:
    """A folder that holds checkpoints of several steps, each in a folder named after its step."""

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
        """The step of the last checkpoint at `step` or earlier; None if there is none."""
        return max((found for found in self.steps() if found <= step), default=None)

    def add(self, step: int, source: Path) -> None:
        """Keep the last checkpoint of the folder `source`, whose step is `step`."""
        checkpoint.copy(source, self.path(step))

    def only(self, step: int | None, source: Path | None = None) -> None:
        """Remove all checkpoints except that of `step`; with a `source`, first add it from there."""
        if step is not None and source is not None:
            self.add(step, source)
        for other in self.steps():
            if other != step:
                shutil.rmtree(self.path(other), ignore_errors=True)


class Keeper:
    """Decides which checkpoints of a run to keep.

    `recent` holds the last checkpoints, as far back as an event may need them; `suspect` holds the checkpoint before a spike
    that has not ended. The last good checkpoint before the first collapse, or before a divergence, is kept even if the user did
    not ask for it. Only the main rank calls these methods.
    """

    def __init__(self, scratch: Path, run: KeptRun | None) -> None:
        self.run = run
        self.recent, self.suspect, self.kept = (Shelf(scratch / name) for name in (RECENT, SUSPECT, KEPT))
        self._scratch = scratch

    def saved(self, step: int, asked_for: bool) -> None:
        """Record that the checkpoint in the scratch folder is now the one of `step`; keep it if the user `asked_for` it."""
        self.recent.add(step, self._scratch)
        reach = self.recent.before(step - BEFORE - COLLAPSE_STEPS)
        for old in self.recent.steps():
            if reach is not None and old < reach:
                shutil.rmtree(self.recent.path(old), ignore_errors=True)
        if asked_for:
            self._keep(step, self._scratch)

    def judged(self, event: Event, collapses: int) -> str:
        """Keep the checkpoint that `event` requires; `collapses` counts the collapses so far, with this event.

        Returns in words what was kept, or an empty string.
        """
        if event.kind == "recovery":
            self.suspect.only(None)
        elif event.kind == "collapse" and collapses == 1:
            return self.ending(event.step, "collapse")
        elif event.kind == "spike" and (good := self.recent.before(event.step - BEFORE)) is not None:
            self.suspect.only(good, self.recent.path(good))
        return ""

    def ending(self, step: int, what: str) -> str:
        """Keep the last good checkpoint before a collapse or a divergence at `step`.

        Returns in words what was kept, or an empty string if there is no good checkpoint.
        """
        shelf = self.suspect if self.suspect.steps() else self.recent
        good = shelf.before(step - BEFORE)
        if good is None:
            return ""
        self._keep(good, shelf.path(good))
        size = megabytes(self.kept.path(good))
        return f"kept the checkpoint of step {good:,}, before the {what} at step {step:,}, in {self.kept.path(good)} ({size})"

    def forget(self) -> None:
        """Remove the checkpoints in `recent` and `suspect`. Call it when the run has ended."""
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
        """The size of the checkpoint in words."""
        return megabytes(self.path)

    def load(self) -> dict[str, Any]:
        """The state, in host memory. Raises `ConfigError` if the file is damaged."""
        state = checkpoint.load(self.path, torch.device("cpu"))
        if state is None:
            raise ConfigError(f"{self.path}: no whole checkpoint is here; continue another one")
        return state


def kept_in(*scratch: Path) -> Iterator[Kept]:
    """All kept checkpoints in the scratch folders `scratch`, one folder for each run."""
    for shelf in (Shelf(each / name) for each in scratch for name in (KEPT, ENDED)):
        if steps := shelf.steps():
            run = KeptRun.read(shelf.directory / RUN)
            yield from (Kept(shelf.path(step), step, run) for step in steps)


def megabytes(directory: Path) -> str:
    """The size of a checkpoint in words, such as "21.3 MB"."""
    return f"{(directory / checkpoint.FILE).stat().st_size / 1e6:,.1f} MB"
