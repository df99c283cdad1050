"""`make chaos`: micro studies whose processes are killed, stopped, and whose files are damaged, against an undisturbed one.

Each study is disturbed until it has ended; then every output and `dvc.lock` must be as without. Disturbances
come at random moments, or at chosen ones: while a file of a certain kind is being written. The seed is printed, and decides
which disturbance comes when; what it hits depends on the machine's speed as well.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
from studies import environment, micro_project  # noqa: E402

from dit.checksums import sha256  # noqa: E402

OUTPUTS = ("dvc.lock", "data", "runs", "reports")
KINDS = {
    "study": ("pipelines", "study"),
    "guard": ("guard.py",),
    "dvc": ("atomic_dvc.py", "repro"),
    "stage": ("pipelines.stages.",),
    "server": ("pipelines.gate:prefect",),
}
"""Processes of a study, by words of their command."""
MOMENTS = {
    "lock": ".dvc/tmp/dvc.lock.partial",
    "rwlock": ".dvc/tmp/rwlock.partial",
    "checkpoint": ".scratch/*/.checkpoint.pt.partial",
    "output": "runs/*/.*.partial",
    "data": "data/.*.partial",
    "report": ".reports.partial",
    "mlflow": "mlflow.db-journal",
}
"""Files that are there while something is being written."""
DAMAGED = (".scratch/*/checkpoint.pt", ".scratch/recovery/dvc.lock", ".dvc/tmp/rwlock")
"""Files of which one bit is changed, where there is no process that writes them: between two runs."""
LONGEST_WAIT, LONGEST_RUN, MOST_RUNS = 20.0, 1800.0, 30


@dataclass
class Found:
    """What a campaign found."""

    seed: int
    minutes: float
    studies: int = 0
    identical: int = 0
    disturbances: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)


def outputs(root: Path) -> dict[str, str]:
    """The SHA-256 of every output, and of `dvc.lock`."""
    files = [file for name in OUTPUTS for file in ((root / name).rglob("*") if (root / name).is_dir() else [root / name])]
    return {file.relative_to(root).as_posix(): sha256(file) for file in sorted(files) if file.is_file()}


def start(root: Path, log: Path) -> subprocess.Popen[str]:
    with log.open("a") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "pipelines", "study"],
            cwd=root,
            env=environment(root),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )


def family(process: subprocess.Popen[str], kind: str) -> list[psutil.Process]:
    """The living processes of a study that are of a kind."""
    with suppress(psutil.Error):
        root = psutil.Process(process.pid)
        return [each for each in (root, *root.children(recursive=True)) if _is(each, kind)]
    return []


def _is(process: psutil.Process, kind: str) -> bool:
    with suppress(psutil.Error):
        command = process.cmdline()
        guarded = kind != "guard" and any("guard.py" in word for word in command)
        return not guarded and all(any(word in part for part in command) for word in KINDS[kind])
    return False


def wait_for(root: Path, moment: str, process: subprocess.Popen[str], draws: random.Random) -> None:
    """Wait for a moment, as long as the study runs: a random one, or until a file is being written."""
    until = time.monotonic() + (draws.uniform(0, LONGEST_WAIT) if moment == "random" else LONGEST_WAIT)
    while process.poll() is None and time.monotonic() < until:
        if moment != "random" and next(root.glob(MOMENTS[moment]), None):
            return
        time.sleep(0.01 if moment == "random" else 0.001)


def disturb(process: subprocess.Popen[str], kind: str, stop: bool, draws: random.Random) -> bool:
    """Kill a process of a kind, or stop it for a while; whether there was one."""
    chosen = family(process, kind)
    if not chosen:
        return False
    victim = draws.choice(chosen)
    with suppress(psutil.Error):
        if stop:
            victim.suspend()
            time.sleep(draws.uniform(0.5, 5))
            victim.resume()
        else:
            victim.kill()
        return True
    return False


def damage(root: Path, draws: random.Random) -> str | None:
    """Change one bit of a file that a study left; its name."""
    files = sorted(file for pattern in DAMAGED for file in root.glob(pattern) if file.stat().st_size)
    if not files:
        return None
    file = draws.choice(files)
    data = bytearray(file.read_bytes())
    data[draws.randrange(len(data))] ^= 1 << draws.randrange(8)
    file.write_bytes(data)
    return file.name


def run_disturbed(root: Path, log: Path, found: Found, draws: random.Random, kills: int) -> str | None:
    """A study with so many disturbances, run again until it has ended; what is wrong, if anything is."""
    for _ in range(MOST_RUNS):
        begun = time.monotonic()
        process = start(root, log)
        while process.poll() is None and kills > 0:
            kind, moment = draws.choice(list(KINDS)), draws.choice(["random", *MOMENTS])
            stop = draws.random() < 0.2
            wait_for(root, moment, process, draws)
            if disturb(process, kind, stop, draws):
                found.disturbances[f"{'stop' if stop else 'kill'} {kind}, {moment}"] += 1
                kills -= 1
        try:
            code = process.wait(LONGEST_RUN - (time.monotonic() - begun))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            return f"did not end in {LONGEST_RUN:.0f} s"
        if code == 0:
            return None
        if kills > 0 and draws.random() < 0.5 and (name := damage(root, draws)):
            found.disturbances[f"flip {name}"] += 1
            kills -= 1
    return f"did not end in {MOST_RUNS} runs"


def campaign(folder: Path, found: Found, tell: Callable[[str], None]) -> Iterator[None]:
    """Disturb studies for ever, one at each step."""
    draws = random.Random(found.seed)
    pristine = micro_project(folder / "template")
    calm = shutil.copytree(pristine, folder / "calm", symlinks=True)
    log = folder / "calm.log"
    if start(calm, log).wait() != 0:
        raise SystemExit(f"the undisturbed study failed:\n{log.read_text()[-3000:]}")
    expected = outputs(calm)
    while True:
        name = f"study-{found.studies}"
        root, log = shutil.copytree(pristine, folder / name, symlinks=True), folder / f"{name}.log"
        wrong = run_disturbed(root, log, found, draws, kills=draws.randint(3, 8))
        got = outputs(root)
        different = sorted(file for file in expected.keys() | got.keys() if expected.get(file) != got.get(file))
        found.studies += 1
        found.identical += not wrong and not different
        if wrong or different:
            found.faults.append(f"{name}: {wrong or 'other outputs'}: {', '.join(different[:5])}; see {log}")
            tell(f"FAULT {found.faults[-1]}")
        else:
            shutil.rmtree(root)
        tell(f"{found.studies} studies, {found.identical} identical, {sum(found.disturbances.values())} disturbances")
        yield


def main() -> None:
    """Run a campaign of some minutes, and exit with 1 where anything came out otherwise."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--minutes", type=float, default=30.0)
    arguments.add_argument("--seed", type=int, default=None)
    arguments.add_argument("--output", type=Path, default=Path(".scratch/chaos.json"))
    given = arguments.parse_args()
    found = Found(random.randrange(10**6) if given.seed is None else given.seed, given.minutes)
    print(f"seed {found.seed}", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    until = time.monotonic() + 60 * given.minutes
    for _ in campaign(folder, found, lambda text: print(text, flush=True)):
        given.output.parent.mkdir(parents=True, exist_ok=True)
        given.output.write_text(json.dumps(vars(found), indent=2) + "\n")
        if time.monotonic() > until:
            break
    if found.faults:
        sys.exit(1)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
