"""The results of a study of docs/evidence in one file for git: how every run ended, its curve, and what announced a failure."""

from __future__ import annotations

import json
import math
import platform
import subprocess
from collections.abc import Mapping
from contextlib import chdir
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from pydantic import ValidationError

from dit import checksums
from dit.analysis.failures import History, before, lead, sign
from dit.analysis.study import Trained
from dit.config import Params
from dit.errors import DataError, UserError
from pipelines import design
from pipelines.evidence.running import DATA, Workplace
from pipelines.files import json_text
from pipelines.records.base import Entry, Finite, Status
from pipelines.report.reading import read_run
from pipelines.report.runs import Run, trained

RESULTS = Path("docs/evidence")
DIGITS = 6
"""Significant digits of curves; final errors are written in full."""
VALUES = "values of parameters"
"""The name of `Results.values` in `Results.origin`, and in messages."""


class Made(Entry):
    """Which code made the results, on which machine, from which data, and in what time."""

    commit: str
    code: str
    """Digest of the code of stage `train`."""
    data: dict[str, str]
    """SHA-256 of the manifest of each folder of data."""
    device: str
    torch: str
    python: str
    workers: int
    """Runs at the same time on each GPU."""
    minutes: float
    """Minutes times the number of GPUs."""


class Warned(Entry):
    """What moved before a failure.

    `lead`: how many steps before the turning point each quantity of the training loop rose above its limit. `sign`: the
    indicator that had changed most by the last diagnosis before the turning point, in which block or role, by which factor, and
    how many steps earlier. The results of November 2026 have four indicators of blocks; update ratio and share of clipped steps
    were added later.
    """

    lead: dict[str, int]
    sign: dict[str, Any] | None


class Ended(Entry):
    """One run. `error` is the final validation error of the averaged weights, None if the run did not finish.

    `curve` holds validation errors of the trained weights at `steps`, as far as the run came. `failed_at` is the step at which
    the run collapsed or diverged.
    """

    name: str
    strategy: str
    seed: int
    rate: float
    place: list[tuple[str, str]]
    own: str
    length: int
    network: str
    data: str
    status: Status
    steps_done: int
    failed_at: int | None
    spikes: int
    initial: float | None
    zero_output_error: float
    error: float | None
    steps: list[int]
    curve: list[Finite]
    warned: Warned | None

    def trained(self) -> Trained:
        """The run in the form that the analysis needs."""
        whole = [math.nan if value is None else value for value in self.curve]
        return Trained(
            self.strategy,
            self.seed,
            self.rate,
            tuple(self.place),
            self.error,
            tuple(self.steps),
            tuple(whole),
            self.zero_output_error,
            self.data,
            self.network,
            self.length,
            self.own,
        )


class Results(Entry):
    """The runs of one study that have ended, out of `planned` runs. `values` are parameters that differ from params.yaml."""

    study: str
    values: dict[str, Any]
    planned: int
    made: list[Made]
    runs: list[Ended]

    @property
    def complete(self) -> bool:
        """Whether every run of the study has ended. A study that was cut has no answers."""
        return len(self.runs) == self.planned

    @property
    def origin(self) -> dict[str, Any]:
        """What all results in one file must have in common: parameters, code, data, device and version of torch."""
        first = self.made[0]
        return {
            VALUES: self.values,
            "code": first.code,
            "data": first.data,
            "device": first.device,
            "torch": first.torch,
        }

    def with_those_of(self, path: Path) -> Results:
        """These results, with runs of an earlier file that they lack.

        Raises `UserError` if the file has other parameters, code, data, device or torch, so that no run is lost silently.
        """
        if not path.exists():
            return self
        refuse_others(path, self.origin)
        earlier = Results.read(path)
        names = {run.name for run in self.runs}
        kept = [run for run in earlier.runs if run.name not in names]
        return self.model_copy(update={"made": [*earlier.made, *self.made], "runs": [*kept, *self.runs]})

    def write(self, path: Path) -> None:
        """Write JSON with one line for each run, so that a diff shows which runs are new."""
        head = json_text(self.model_dump(mode="json", exclude={"runs"})).removesuffix("\n}\n")
        lines = ",\n    ".join(json.dumps(run.model_dump(mode="json"), allow_nan=False) for run in self.runs)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'{head},\n  "runs": [\n    {lines}\n  ]\n}}\n')

    @classmethod
    def read(cls, path: Path) -> Results:
        """Read a file that `write` wrote. Raises `DataError` for one that is damaged."""
        try:
            return cls.model_validate_json(path.read_text())
        except ValidationError as error:
            raise DataError(f"{path}: {error.error_count()} wrong entries; take the committed file again") from None


def refuse_others(path: Path, origin: Mapping[str, Any]) -> None:
    """Raise `UserError` if the file at `path` holds results of another origin. What `origin` lacks is not compared."""
    if not path.exists():
        return
    earlier = Results.read(path).origin
    differ = [_different(key, value, earlier[key]) for key, value in origin.items() if earlier[key] != value]
    if differ:
        raise UserError(f"{path} holds results of other {', '.join(differ)}: give another --output, or remove it")


def names_in(path: Path) -> set[str]:
    """The names of the runs in the file at `path`; none if there is no such file."""
    return {run.name for run in Results.read(path).runs} if path.exists() else set()


def _different(key: str, value: Any, other: Any) -> str:
    """What differs, with the names of parameters, or with both values if they are short."""
    if isinstance(value, dict):
        names = [name for name in {**other, **value} if value.get(name) != other.get(name)]
        return f"{key} ({', '.join(names)})"
    return key if key == "code" else f"{key} ({other}, and here it is {value})"


def collect(name: str, place: Workplace, values: Mapping[str, Any], made: Made) -> Results:
    """Read the results of the runs in a study's folder."""
    with chdir(place.folder):
        ended = [_ended(place.params, read_run(run, sampled=False)) for run in place.done]
    return Results(study=name, values=dict(values), planned=len(design.items(place.params)["train"]), made=[made], runs=ended)


def origin_here(values: Mapping[str, Any]) -> dict[str, Any]:
    """The origin of results that would be made here and now, as far as it is known before there are data."""
    return {VALUES: dict(values), "code": design.code_digest("train"), "device": _device(), "torch": torch.__version__}


def data_of(place: Workplace) -> dict[str, str]:
    """SHA-256 of the manifest of each folder of data that is complete."""
    folders = [item.out for stage in DATA for item in design.items(place.params)[stage].values()]
    manifests = {folder: place.folder / folder / "manifest.json" for folder in folders}
    return {folder: checksums.sha256(path) for folder, path in manifests.items() if path.is_file()}


def made_here(place: Workplace, root: Path, workers: int, minutes: float) -> Made:
    """Which code, data and machine made the results in `place`."""
    return Made(
        commit=_commit(root),
        code=design.code_digest("train"),
        data=data_of(place),
        device=_device(),
        torch=torch.__version__,
        python=platform.python_version(),
        workers=workers,
        minutes=round(minutes, 2),
    )


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()


def _commit(root: Path) -> str:
    """The commit that is checked out, with a plus sign where files differ from it; empty where this is no git repository."""
    found = subprocess.run(["git", "describe", "--always", "--dirty=+"], cwd=root, capture_output=True, text=True, check=False)
    return found.stdout.strip()


def _ended(params: Params, run: Run) -> Ended:
    seen = trained(params, run)
    history = run.history()
    return Ended(
        name=run.name,
        strategy=run.strategy,
        seed=run.seed,
        rate=run.rate,
        place=list(seen.place),
        own=seen.own,
        length=seen.length,
        network=seen.network,
        data=seen.data,
        status=run.train.status,
        steps_done=run.train.steps_done,
        failed_at=history.failed_at,
        spikes=len(history.spike_steps),
        initial=run.train.initial.validation_mse,
        zero_output_error=seen.zero_output_error,
        error=run.error,
        steps=[int(step) for step in seen.steps],
        curve=[float(f"{error:.{DIGITS}g}") for error in seen.errors],
        warned=_warned(history) if history.failed_at is not None else None,
    )


def _warned(history: History) -> Warned:
    ratios = before(history)
    found = sign(history)
    moved = None
    if found is not None:
        moved = {key: None if pd.isna(value) else value for key, value in vars(found).items()}
    return Warned(lead={} if ratios is None else lead(ratios), sign=moved)
