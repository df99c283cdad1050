"""DVC's graph in Python: which stages there are, what each waits for, which are up to date, and how to run one.

The graph is read from DVC and not repeated anywhere. Stages run as `dvc repro --single-item`, so `dvc.lock` is the same
whoever starts them.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import Any

from dvc.exceptions import DvcException
from dvc.stage import PipelineStage

from dit.errors import ConfigError, UserError
from dit.terminal import plain
from pipelines import atomic_dvc, disk, guard, private_dvc, warm
from pipelines.lockfile import LockFile
from pipelines.targets import check, matching

DVC = (sys.executable, "-P", str(Path(atomic_dvc.__file__).resolve()))
_UP_TO_DATE = re.compile(r"^Stage '.*' (didn't change, skipping|is cached - skipping run)")
_CHATTER = re.compile(
    r"\s*(> |git add|dvc config core.autostage|Running stage|Updating lock|Generating lock|To track the|To enable auto"
    r"|Use `dvc push`|ERROR: failed to reproduce|$)"
)
"""Lines that DVC prints around every stage, or that only repeat the result of `run`."""
_EXIT_CODE = re.compile(r"failed to run: .*, exited with (-?\d+)")
_LOCKED = ("Unable to acquire lock", "is busy, it is being blocked by")


@dataclass(frozen=True)
class Stage:
    """One stage of `dvc.yaml`, such as `train@adaln_zero-0`."""

    name: str
    upstream: tuple[str, ...]
    """The stages whose outputs this stage reads."""
    outs: tuple[str, ...]
    """The paths that this stage writes."""
    up_to_date: bool
    """Whether command, parameters, dependencies and outputs of this stage and of all stages above agree with `dvc.lock`."""
    place: int = 0
    """Its position in `dvc.yaml`, counted from 0."""
    command: str = ""


class Outcome(Enum):
    """How a stage came to be up to date."""

    RAN = "ran"
    CACHED = "cached"


class StageError(Exception):
    """A stage failed. `exit_code` is the exit code of its command, or None if DVC itself failed."""

    def __init__(self, stage: str, exit_code: int | None, transient: bool, reason: str) -> None:
        super().__init__(f"stage '{stage}' failed{'' if exit_code is None else f' with exit code {exit_code}'}: {reason}")
        self.stage = stage
        self.exit_code = exit_code
        self.transient = transient
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:  # it may come from another machine
        return type(self), (self.stage, self.exit_code, self.transient, self.reason)


class StoppedError(Exception):
    """The stage was stopped from outside, and must not be tried again."""


def read(root: Path) -> dict[str, Stage]:
    """All stages of the project in `root` in an order in which they can run. Raises `ConfigError` where DVC cannot read it."""
    if not (root / "dvc.yaml").exists():
        raise ConfigError(f"{root / 'dvc.yaml'}: no such file; run this in the folder that holds the study's dvc.yaml")
    private_dvc.keep(root)
    try:
        with atomic_dvc.opened(root) as repo, repo.lock:
            graph = repo.index.graph
            listed = enumerate(_pipeline(repo.index.stages))
            stages = {stage.name: _stage(graph, stage, place) for place, stage in listed}
    except DvcException as error:
        raise ConfigError(f"{root / 'dvc.yaml'}: {error}") from None
    return _in_order(stages)


@contextmanager
def checking(root: Path) -> Iterator[Callable[[str], bool]]:
    """Yields a function that says whether `dvc repro` would have nothing to do for a stage, once the stages above are done.

    The function makes DVC's own comparison in this process, on a project that stays open. So no process has to start for a
    stage if the outputs above it came out unchanged. The project is read when the first stage is asked about.
    """
    with atomic_dvc.opened(root) as repo:
        stages: dict[str, Any] = {}

        def unchanged(name: str) -> bool:
            try:
                with repo.lock:
                    if not stages:
                        stages.update({stage.name: stage for stage in _pipeline(repo.index.stages)})
                    return not stages[name].status()
            except DvcException:  # for example, a dependency is in use; `dvc repro` waits, or reports what is wrong
                return False

        yield unchanged


def _pipeline(nodes: Iterable[Any]) -> list[Any]:
    """The stages of `dvc.yaml` among DVC's nodes, in DVC's order; data that `dvc add` added is no stage to run."""
    return [stage for stage in nodes if isinstance(stage, PipelineStage)]


def _stage(graph: Any, stage: PipelineStage, place: int) -> Stage:
    upstream = sorted(above.name for above in _pipeline(graph.successors(stage)))
    command = stage.cmd if isinstance(stage.cmd, str) else "\n".join(stage.cmd or ())
    return Stage(stage.name, tuple(upstream), tuple(out.def_path for out in stage.outs), not stage.status(), place, command)


def _in_order(stages: Mapping[str, Stage]) -> dict[str, Stage]:
    """The stages, upstream first, otherwise as in `dvc.yaml`; a stage below one that is not up to date is not up to date."""
    ordered: dict[str, Stage] = {}

    def add(name: str) -> None:
        stage = stages[name]
        for above in stage.upstream:
            if above not in ordered:
                add(above)
        fresh = stage.up_to_date and all(ordered[above].up_to_date for above in stage.upstream)
        ordered.setdefault(name, replace(stage, up_to_date=fresh))

    for name in stages:
        add(name)
    return ordered


def order_lock(root: Path, stages: Collection[Stage]) -> None:
    """Put the entries of `dvc.lock` in the order of `dvc.yaml`, as `dvc repro` does; parallel stages end in any order.

    `stages` are all stages of `dvc.yaml`. A lock file that is already in order is not written.
    """
    lock, order = root / "dvc.lock", [stage.name for stage in sorted(stages, key=lambda stage: stage.place)]
    if LockFile(lock, order).written:
        return
    with atomic_dvc.opened(root) as repo, repo.lock:
        LockFile(lock, order).write()


def select(stages: Mapping[str, Stage], targets: Collection[str] | None) -> dict[str, Stage]:
    """The stages that `targets` name, and all stages that they need; every stage if `targets` is None or empty.

    A target is a stage, a pattern such as `*@adaln_zero-*`, or a group such as `train`, which means every `train@...`.

    Raises `ConfigError` for a target that names no stage.
    """
    if not targets:
        return dict(stages)
    check(targets, stages)
    wanted = {name for target in targets for name in matching(target, stages)}
    for name in reversed(list(stages)):
        if name in wanted:
            wanted.update(stages[name].upstream)
    return {name: stage for name, stage in stages.items() if name in wanted}


class Processes:
    """Runs stages of one workspace side by side; when the block is left, it ends stages that still run."""

    def __init__(self, root: Path, environment: Mapping[str, str]) -> None:
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
        self.root = root
        self.environment = {**os.environ, "PATH": path, "PYTHONUNBUFFERED": "1", **environment}
        self._warm: warm.WarmServer | None = None
        self._running: set[guard.Guarded] = set()
        self._guard = threading.Lock()
        self._stopping = False

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._guard:
            self._stopping = True
            running = list(self._running)
        with ThreadPoolExecutor() as pool:
            list(pool.map(guard.stop, running))
        if self._warm:
            self._warm.close()

    def warm_up(self, stages: Iterable[Stage], tell: Callable[[str], None]) -> None:
        """Start a process that imports once what `stages` need, and from which they then start, if this machine can do so."""
        if warm.wanted() and (modules := warm.modules(stage.command for stage in stages)):
            self._warm = warm.WarmServer(self.root, self.environment, modules, tell)

    def run(
        self, stage: str, log: Callable[[str], None], environment: Mapping[str, str] | None = None, command: str = ""
    ) -> Outcome:
        """Bring one stage up to date, and give each line that it prints to `log`; `command` is the stage's command, if known.

        Raises `StageError`, or `StoppedError` once the block has been left.
        """
        last: deque[str] = deque(maxlen=50)
        process = self._start(stage, environment or {}, command)
        outcome = _follow(process, last, log)
        code = process.wait()
        with self._guard:
            self._running.discard(process)
        if self._stopping:
            raise StoppedError(f"stage '{stage}' was stopped")
        if code is warm.NOT_BEGUN:
            assert self._warm
            self._warm.give_up()
            return self.run(stage, log, environment)
        if code:
            raise _failure(stage, code, list(last))
        return outcome

    def _start(self, stage: str, environment: Mapping[str, str], command: str) -> guard.Guarded:
        arguments = ["--wait-for-lock", "repro", "--single-item", stage]
        process: guard.Guarded | None = None
        with self._guard:
            if self._stopping:
                raise StoppedError("no stage is started any more")
            if self._warm and command:
                process = self._warm.start(command, arguments, environment)
            if process is None:
                process = guard.start([*DVC, *arguments], self.root, {**self.environment, **environment}, spare=True)
            self._running.add(process)
        return process


def _follow(process: guard.Guarded, last: deque[str], log: Callable[[str], None]) -> Outcome:
    """Read everything that DVC and its stage print, and keep the `last` lines."""
    outcome = Outcome.RAN
    for line in (plain(line.rstrip()) for line in process.stdout or ()):
        last.append(line)
        if _UP_TO_DATE.match(line):
            outcome = Outcome.CACHED
        if not _CHATTER.match(line):
            log(line)
    return outcome


def _failure(stage: str, code: int, output: list[str]) -> StageError:
    """The error that a failed stage's output tells.

    Another try makes sense if the stage was killed, lacked resources other than disk space, or met a lock.
    """
    text = "\n".join(output)
    reported = _EXIT_CODE.search(text)
    exit_code = int(reported[1]) if reported else (code if _signal_number(code) else None)
    killed = _signal_number(exit_code or 0)
    said = [line for line in output if not _CHATTER.match(line)]
    errors = [line.removeprefix("error: ") for line in said if line.startswith("error: ")]
    reason = (errors or said or ["it said nothing"])[-1]
    if killed:
        reason = f"killed by {signal.Signals(killed).name}"
    if disk.is_full(text):
        full = reason if exit_code == disk.EXIT_CODE else str(disk.FullDiskError(Path.cwd()))
        return StageError(stage, disk.EXIT_CODE, False, full)
    transient = killed > 0 or exit_code == os.EX_TEMPFAIL or any(message in text for message in _LOCKED)
    return StageError(stage, exit_code, transient, reason)


def _signal_number(code: int) -> int:
    """The signal that ended a process with this exit code, or 0."""
    number = -code if code < 0 else code - guard.SIGNAL_BASE
    return number if number in set(signal.Signals) else 0


def dvc(root: Path, *arguments: str, environment: Mapping[str, str] | None = None) -> str:
    """Run a DVC command in `root` and return what it printed. Raises `UserError` with DVC's message if the command fails."""
    private_dvc.keep(root)
    variables = {**os.environ, **(environment or {})}
    done = subprocess.run([*DVC, *arguments], cwd=root, env=variables, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"dvc {arguments[0]} failed: {(done.stderr or done.stdout).strip()}")
    return done.stdout
