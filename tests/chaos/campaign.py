"""Studies are disturbed until they have ended, and then compared with an undisturbed study."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from studies import micro_project

from chaos.conditions import CONDITIONS, Hit
from chaos.micro import KINDS, Study, differences, family

MOMENTS = {
    "lock": ".dvc/tmp/dvc.lock.partial",
    "rwlock": ".dvc/tmp/rwlock.partial",
    "cache": ".dvc/cache/files/md5/**/*.tmp",
    "checkpoint": ".scratch/*/.checkpoint.pt.partial",
    "output": "runs/*/.*.partial",
    "data": "data/.*.partial",
    "report": ".reports.partial",
    "mlflow": "mlflow.db-journal",
}
"""A pattern for each moment at which a study can be disturbed: a matching file exists while something is being written."""
DAMAGED = (
    ".scratch/*/checkpoint.pt",
    ".scratch/recovery/dvc.lock",
    ".scratch/prefect/prefect.db",
    ".dvc/tmp/rwlock",
    "data/*/*",
    "data/*/*/*",
    "runs/*/*/*",
    "reports/*",
    "mlflow.db",
)
"""Patterns of files to damage: one bit of a file is flipped between two runs of a study, while no process writes the file."""
LONGEST_WAIT, LONGEST_RUN, MOST_RUNS = 20.0, 1800.0, 30
HIT_SHARE, STOP_SHARE, DAMAGE_SHARE = 0.25, 0.15, 0.6


@dataclass
class Found:
    """What a campaign found."""

    seed: int
    studies: int = 0
    identical: int = 0
    conditions: Counter[str] = field(default_factory=Counter)
    disturbances: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    @property
    def kills(self) -> int:
        """How many processes were killed."""
        return sum(count for what, count in self.disturbances.items() if what.startswith("kill"))


def campaign(
    folder: Path, found: Found, conditions: list[str], tell: Callable[[str], None], disturbances: tuple[int, int] = (4, 10)
) -> Iterator[None]:
    """Run and disturb one study in each iteration, without end, under the `conditions` in turn.

    The number of disturbances is drawn from the range `disturbances`; a study that ends earlier is disturbed less often.
    """
    draws = random.Random(found.seed)
    pristine = micro_project(folder / "template")
    calm = Study(Path(shutil.copytree(pristine, folder / "calm", symlinks=True)), folder / "calm.log")
    if calm.start().wait() != 0:
        raise SystemExit(f"the undisturbed study failed:\n{calm.said()[-3000:]}")
    expected = calm.outputs()
    while True:
        name, condition = f"study-{found.studies}", conditions[found.studies % len(conditions)]
        study = Study(Path(shutil.copytree(pristine, folder / name, symlinks=True)), folder / f"{name}.log")
        wrong = _one(study, condition, found, draws, draws.randint(*disturbances))
        different = differences(expected, study.outputs())
        found.studies += 1
        found.conditions[condition] += 1
        found.identical += not wrong and not different
        if wrong or different:
            kept = f"see {study.log}"
            found.faults.append(f"{name}, {condition}: {wrong or 'other outputs'}: {', '.join(different[:5])}; {kept}")
            tell(f"FAULT {found.faults[-1]}")
        shutil.rmtree(study.root, ignore_errors=True)  # after a fault, processes of the study may still write there
        tell(f"{found.studies} studies, {found.identical} identical, {sum(found.disturbances.values())} disturbances")
        yield


def _one(study: Study, condition: str, found: Found, draws: random.Random, disturbances: int) -> str | None:
    """Run a study under a condition until it has ended; return what is wrong, or None."""
    try:
        with CONDITIONS[condition](study, draws) as hit:
            wrong = _until_it_has_ended(study, hit, found, draws, disturbances)
    except AssertionError as error:
        return str(error)
    if not wrong and "Traceback (most recent call last)" in study.said():
        return "a traceback was printed"
    return wrong


def _until_it_has_ended(study: Study, hit: Hit, found: Found, draws: random.Random, left: int) -> str | None:
    for _ in range(MOST_RUNS):
        begun = time.monotonic()
        process = study.start()
        while process.poll() is None and left > 0:
            if done := _disturb(study, process, hit, draws):
                found.disturbances[done] += 1
                left -= 1
        try:
            code = process.wait(LONGEST_RUN - (time.monotonic() - begun))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            return f"did not end in {LONGEST_RUN:.0f} s"
        if code == 0:
            return None
        if left > 0 and draws.random() < DAMAGE_SHARE and (damaged := _damage(study.root, draws)):
            found.disturbances[f"flip a bit of {damaged}"] += 1
            left -= 1
    return f"did not end in {MOST_RUNS} runs"


def _disturb(study: Study, process: subprocess.Popen[str], hit: Hit, draws: random.Random) -> str | None:
    """Wait for a moment, then kill or stop a process, or do what the condition does; return what was done, or None."""
    kind, moment = draws.choice(list(KINDS)), draws.choice(["random", *MOMENTS])
    by_condition, stop = draws.random() < HIT_SHARE, draws.random() < STOP_SHARE
    _wait_for(study.root, moment, process, draws)
    if process.poll() is not None:
        return None
    if by_condition and (done := hit(process)):
        return done
    if not (chosen := family(process, kind)):
        return None
    victim = draws.choice(chosen)
    with suppress(psutil.Error):
        if stop:
            victim.suspend()
            time.sleep(draws.uniform(0.5, 5))
            victim.resume()
        else:
            victim.kill()
        return f"{'stop' if stop else 'kill'} {kind}, moment: {moment}"
    return None


def _wait_for(root: Path, moment: str, process: subprocess.Popen[str], draws: random.Random) -> None:
    """Wait for a random time, or until a file of the `moment` is being written; but not longer than the study runs."""
    until = time.monotonic() + (draws.uniform(0, LONGEST_WAIT) if moment == "random" else LONGEST_WAIT)
    while process.poll() is None and time.monotonic() < until:
        if moment != "random" and next(root.glob(MOMENTS[moment]), None):
            return
        time.sleep(0.01 if moment == "random" else 0.001)


def _damage(root: Path, draws: random.Random) -> str | None:
    """Flip one bit of a file that a study has left; return the pattern that matches the file, or None if no file does."""
    kinds = {
        pattern: sorted(file for file in root.glob(pattern) if file.is_file() and file.stat().st_size) for pattern in DAMAGED
    }
    there = [pattern for pattern, files in kinds.items() if files]
    if not there:
        return None
    pattern = draws.choice(there)
    file = draws.choice(kinds[pattern])
    data = bytearray(file.read_bytes())
    data[draws.randrange(len(data))] ^= 1 << draws.randrange(8)
    mode = file.stat().st_mode
    file.chmod(mode | 0o200)
    file.write_bytes(data)
    file.chmod(mode)
    return pattern
