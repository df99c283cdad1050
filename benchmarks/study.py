"""How long a study takes until its answer, by phase, and how much of it is overhead: `python benchmarks/study.py`.

A micro study runs as by `make study`: with stages that start cold, then warm, then warm with one stage at a time, and then
with nothing to do. Its stages also run as plain function calls in one process, which measures their own work. With `--shipped`,
the study of `params.yaml` runs once instead, warm; with `--profile gpu`, the study of `profiles/gpu.yaml`.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer
from measuring import Result, heading, machine, write
from rich.console import Console
from rich.table import Table
from stages import MICRO, ROOT, copy

from dit import yamlfile
from dit.devices import resolve_device

OWN_WORK = """
import json, time
from importlib import import_module
from dit.config import load
from pipelines import design
from pipelines.stages.design import write_design
params = load()
design.write(design.Path(), params)
stages = design.items(params)
modules = {name: import_module(f"pipelines.stages.{name}") for name in stages}
seconds = {}
def timed(name, act, *arguments):
    begun = time.perf_counter()
    act(*arguments)
    seconds[name] = time.perf_counter() - begun
timed("design", write_design, params)
for stage, items in stages.items():
    for key, item in items.items():
        name = stage if stage == "compare" else f"{stage}@{key}"
        timed(name, getattr(modules[stage], stage), params.with_values(item.setting.levels), item)
print("\\n" + json.dumps(seconds))
"""
LINE = re.compile(r"(\S+) +\| (started|cached|done in .* s)$")
WAYS = {"cold": {"DIT_WARM": "0"}, "warm": {}, "warm, one at a time": {"DIT_WORKERS": "1"}}


def main(
    shipped: Annotated[bool, typer.Option(help="the study of params.yaml, once, instead of the micro study")] = False,
    profile: Annotated[str | None, typer.Option(help="the same, with what this profile changes, such as gpu")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="stages at once  [default: as `make study`]")] = None,
    note: Annotated[str, typer.Option(help="what else is to be known of the machine, such as who shared it")] = "",
    output: Annotated[Path | None, typer.Option(help="where to write JSON")] = None,
) -> None:
    """Measure the time to the answer."""
    changes = yamlfile.read(ROOT / "profiles" / f"{profile}.yaml") if profile else {} if shipped else MICRO
    once = shipped or bool(profile)
    report: Result = {"machine": machine(resolve_device("auto")), "cores": os.cpu_count(), "note": note}
    report |= {"study": profile or ("shipped" if shipped else "micro"), "workers": workers, "studies": {}}
    given = {"DIT_WORKERS": str(workers)} if workers else {}
    with tempfile.TemporaryDirectory() as folder:
        if not once:
            report["own_seconds"] = own_work(copy(Path(folder) / "one-process"))
        for way, own in {"warm": WAYS["warm"]}.items() if once else WAYS.items():
            root, variables = copy(Path(folder) / way.replace(" ", "-"), changes), given | own
            report["studies"][way] = study(root, variables)
            write(report, output)
        report["studies"]["nothing to do"] = study(root, variables)
        write(report, output)
    Console().print(phases(report))
    if not once:
        Console().print(overhead(report))


def own_work(root: Path) -> dict[str, float]:
    """Seconds of each stage as a function call, in one process that has imported all of them."""
    done = subprocess.run(
        [sys.executable, "-c", OWN_WORK], cwd=root, env=environment(root), capture_output=True, text=True, check=True
    )
    seconds: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return seconds


def study(root: Path, variables: dict[str, str]) -> Result:
    """Run `make study` in `root`. Returns when stages began and ended, and when an answer appeared, in seconds from the start.

    The output of the study is shown while it runs.
    """
    begun = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "pipelines", "study"],
        cwd=root,
        env=environment(root) | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    started, ended = {}, {}
    found: Result = {}
    for line in process.stdout or ():
        now = time.perf_counter() - begun
        print(line, end="", file=sys.stderr, flush=True)
        if match := LINE.match(line):
            (started if match[2] == "started" else ended)[match[1]] = now
        elif "first answer, from a part of the runs" in line:
            found["first answer"] = now
    if code := process.wait():
        sys.exit(code)
    found["total"] = time.perf_counter() - begun
    if started:
        found |= {"first stage begins": min(started.values()), "report": ended["compare"]}
    found["stages"] = {name: ended[name] - started[name] for name in started}
    return found


def environment(root: Path) -> dict[str, str]:
    """The environment of a study of the code in `root`."""
    own = {"PYTHONPATH": str(root), "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
    return {**os.environ, **own}


def phases(report: Result) -> Table:
    """A table of the times at which each study reached its phases."""
    names = ("first stage begins", "first answer", "report", "total")
    shown = Table("study", *(f"{name}, s" for name in names), "x warm", title=f"{heading(report)}, {report['cores']} cores")
    warm = report["studies"]["warm"]["total"]
    for way, found in report["studies"].items():
        times = (f"{found[name]:.1f}" if name in found else "-" for name in names)
        shown.add_row(way, *times, f"{found['total'] / warm:.2f}")
    return shown


def overhead(report: Result) -> Table:
    """A table of the time that a stage takes beyond its own work, with one stage at a time: the median of each kind."""
    own, taken = report["own_seconds"], report["studies"]["warm, one at a time"]["stages"]
    shown = Table("stage", "own work, s", "as a stage, s", "beyond it, s", title="warm, one at a time, medians")
    for kind in dict.fromkeys(name.partition("@")[0] for name in taken):
        names = [name for name in taken if name.partition("@")[0] == kind and name in own]
        if names:
            work, whole = (statistics.median(times[name] for name in names) for times in (own, taken))
            beyond = statistics.median(taken[name] - own[name] for name in names)
            shown.add_row(f"{kind} ({len(names)})", f"{work:.2f}", f"{whole:.2f}", f"{beyond:.2f}")
    return shown


if __name__ == "__main__":
    typer.run(main)
