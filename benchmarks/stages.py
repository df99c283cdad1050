"""How much time the tools around the science take: `python benchmarks/stages.py`.

It measures how long each stage takes to start, and how long a micro study takes as plain function calls in one process, by
`dvc repro`, and as the Prefect flow with its MLflow view; then the last two again with nothing to do.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from measuring import Result, heading, machine, write
from rich.console import Console
from rich.table import Table

from dit.config import load
from pipelines import design
from pipelines.overrides import override

ROOT = Path(__file__).parents[1]
STAGES = ("images", "autoencoder", "latents", "features", "design", "analyse", "train", "evaluate", "compare")
MICRO: dict[str, Any] = {
    "study.factors": {},
    "study.declared": [],
    "study.sample": "all",
    "study.strategies": ["adaln_zero", "head_xavier"],
    "study.seeds": [0, 1],
    "images.size": 16,
    "images.source.train_per_class": 16,
    "images.source.validation_per_class": 4,
    "autoencoder.channels": [8, 8, 8],
    "autoencoder.steps": 10,
    "autoencoder.threads": 1,
    "latents.threads": 1,
    "model.name": "DiT-Micro/2",
    "analyse.widths": [64, 128],
    "train.steps": 50,
    "train.batch_size": 16,
    "train.validation.samples": 16,
    "evaluate.num_samples": 16,
    "evaluate.steps": 5,
    "evaluate.kernel_subset_size": 8,
    "features.size": 32,
}
IN_ONE_PROCESS = """
from importlib import import_module
from dit.config import load
from pipelines import design
from pipelines.stages.design import write_design
params = load()
design.write(design.Path(), params)
write_design(params)
for name, items in design.items(params).items():
    for item in items.values():
        getattr(import_module(f"pipelines.stages.{name}"), name)(params.with_values(item.setting.levels), item)
"""


def main(
    repeats: Annotated[int, typer.Option(min=1, help="starts of each stage; the median counts")] = 3,
    output: Annotated[Path | None, typer.Option(help="where to write JSON")] = None,
) -> None:
    """Measure starts and orchestration."""
    report: Result = {"machine": machine(torch.device("cpu")), "start_seconds": {}, "study_seconds": {}}
    code = {"python": "pass", "import torch": "import torch"}
    code |= {f"stage {stage}": f"import pipelines.stages.{stage}" for stage in STAGES}
    for name, text in code.items():
        times = [timed(ROOT, sys.executable, "-c", text) for _ in range(repeats)]
        report["start_seconds"][name] = statistics.median(times)
    write(report, output)
    with tempfile.TemporaryDirectory() as directory:
        ways = {
            "one process": (sys.executable, "-c", IN_ONE_PROCESS),
            "dvc repro": (sys.executable, "-m", "dvc", "repro"),
            "make study": (sys.executable, "-m", "pipelines", "study"),
        }
        for name, command in ways.items():
            root = copy(Path(directory) / name.replace(" ", "-"))
            report["study_seconds"][name] = timed(root, *command)
            if name != "one process":
                report["study_seconds"][f"{name}, nothing to do"] = timed(root, *command)
            write(report, output)
    Console().print(starts(report))
    Console().print(studies(report))


def copy(root: Path, overrides: Mapping[str, Any] = MICRO) -> Path:
    """Copy this working tree into a repository of its own, with `overrides`, by default those of the micro study."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, root / name)
    (root / "params.yaml").write_text(override((ROOT / "params.yaml").read_text(), overrides))
    design.write(root, load(root / "params.yaml"))  # otherwise `dvc repro` ends, and asks to be started again
    subprocess.run(["git", "init", "--quiet"], cwd=root, check=True)
    return root


def timed(root: Path, *command: str) -> float:
    """Seconds that a command takes in `root`. If it fails, raises `CalledProcessError` with what it printed."""
    own = {"PYTHONPATH": str(root), "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
    started = time.perf_counter()
    done = subprocess.run(
        command, cwd=root, env={**os.environ, **own}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    seconds = time.perf_counter() - started
    if done.returncode:
        print(done.stdout)
    done.check_returncode()
    return seconds


def starts(report: Result) -> Table:
    """A table of the time that programs take to start."""
    shown = Table("start", "s", "x torch", title=heading(report))
    for name, seconds in report["start_seconds"].items():
        shown.add_row(name, f"{seconds:.2f}", f"{seconds / report['start_seconds']['import torch']:.1f}")
    return shown


def studies(report: Result) -> Table:
    """A table of the time that the micro study takes in each way."""
    shown = Table("micro study", "s", "x one process", title=f"{os.cpu_count()} cores")
    for name, seconds in report["study_seconds"].items():
        shown.add_row(name, f"{seconds:.1f}", f"{seconds / report['study_seconds']['one process']:.2f}")
    return shown


if __name__ == "__main__":
    typer.run(main)
