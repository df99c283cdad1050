"""The answer first: the first seed of every strategy and setting runs before other seeds, and gets a partial report.

The partial report is written where `compare` will write, or where an experiment keeps its report. It is no output of a stage:
DVC removes it when `compare` runs, and until then considers `compare` not up to date.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from dit.config import Params
from dit.terminal import plain
from pipelines import dag, design, guard

COMPARE = "compare"
MODULE = "pipelines.partial_report"
PATIENCE_SECONDS = 30.0
"""No partial report is made before this time, because the study may be over soon: making it takes some 10 s of one core."""


def ranks(params: Params) -> dict[str, int]:
    """For each stage that belongs to one seed: the position of this seed in the study, counted from 0."""
    seeds = params.study.seeds
    return {
        f"{stage}@{key}": seeds.index(item.seed)
        for stage, by_key in design.items(params).items()
        for key, item in by_key.items()
        if item.seed is not None
    }


class PartialReport:
    """Writes the partial report to `out` once, in a process beside the stages, while later seeds still have to run.

    It starts when all runs of the first seed have ended, but not in the first `patience` seconds. `say` gets one line with the
    result. The process has ended when the block is left.
    """

    def __init__(
        self,
        processes: dag.Processes,
        params: Params,
        stages: Mapping[str, dag.Stage],
        out: Path,
        say: Callable[[str], None],
        patience: float = PATIENCE_SECONDS,
    ) -> None:
        kinds = {"analyse", "train", *(["evaluate"] if params.study.sample == "all" else [])}
        seeds = ranks(params)
        own = [name for name in stages if name.partition("@")[0] in kinds]
        wanted = COMPARE in stages and not stages[COMPARE].up_to_date
        self.ranks = seeds
        self._later = {name for name in own if wanted and seeds.get(name) and not stages[name].up_to_date}
        self._missing = {name for name in own if not seeds.get(name)}
        self._processes, self._out, self._say = processes, out, say
        self._earliest = time.monotonic() + patience
        self._thread: threading.Thread | None = None
        self._process: guard.Guarded | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def note(self, stage: str) -> None:
        """Note that `stage` is up to date. Start the report if all stages that it needs are, and others still have to run."""
        self._missing.discard(stage)
        self._later.discard(stage)
        if self._later and not self._missing and self._thread is None and time.monotonic() >= self._earliest:
            command = [sys.executable, "-m", MODULE, str(self._out)]
            self._process = guard.start(command, self._processes.root, self._processes.environment)
            self._thread = threading.Thread(target=self._follow, args=(self._process,), daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """End the process: nothing is written after this."""
        process, self._process = self._process, None
        if process and self._thread:
            guard.stop(process)
            self._thread.join()

    def _follow(self, process: guard.Guarded) -> None:
        said = [plain(line.rstrip()) for line in process.stdout or ()]
        if process.wait() == 0:
            self._say(f"first answer, from a part of the runs: {self._out.resolve().as_uri()}")
        elif said and self._process:
            self._say(f"no report of the first runs alone: {said[-1]}")
