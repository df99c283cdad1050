"""How long a study takes until its answer, by phase, and how much of it is overhead: `python benchmarks/study.py`.

The stages of a micro study run as plain function calls in one process, which measures their own work. Then the study runs as
by `make study`: with stages that start cold, then warm, then warm with one stage at a time, and then with nothing to do. With
`--shipped`, the study of `params.yaml` runs instead, in one process and warm; with `--profile gpu`, that of
`profiles/gpu.yaml`.

All ways must give the same outputs. The exit status is 1 if the checksum of any output differs from that of the one process.
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
from collections.abc import Iterable, Mapping
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
STUDY = """
from pipelines import __main__ as program, services

def tell(holder, name, phase, after=""):
    act = getattr(holder, name)
    def told(*arguments, **options):
        print(f"begins: {phase}", flush=True)
        result = act(*arguments, **options)
        if after:
            print(f"begins: {after}", flush=True)
        return result
    setattr(holder, name, told)

wait = services.PrefectServer.wait

def imported(server):
    from pipelines import dag, preflight
    tell(dag, "read", "DVC reads the graph")
    tell(preflight, "refusal", "pre-flight", "the first stage is started")
    wait(server)

services.PrefectServer.wait = imported
tell(services.PrefectServer, "wait", "wait for Prefect's server", "the flow is started")
tell(services, "prefect_server", "Prefect is imported")
program.app(prog_name="python -m pipelines")
"""
"""`python -m pipelines`, which also tells what it does before the first stage."""
LINE = re.compile(r"(\S+) +\| (started|cached|done in .* s)$")
WAYS = {"cold": {"DIT_WARM": "0"}, "warm": {}, "warm, one at a time": {"DIT_WORKERS": "1"}}


def main(
    shipped: Annotated[bool, typer.Option(help="the study of params.yaml, warm only, instead of the micro study")] = False,
    profile: Annotated[str | None, typer.Option(help="the same, with what this profile changes, such as gpu")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="stages at once  [default: as `make study`]")] = None,
    note: Annotated[str, typer.Option(help="what else is to be known of the machine, such as who shared it")] = "",
    output: Annotated[Path | None, typer.Option(help="where to write JSON")] = None,
) -> None:
    """Measure the time to the answer."""
    changes = yamlfile.read(ROOT / "profiles" / f"{profile}.yaml") if profile else {} if shipped else MICRO
    ways = {"warm": WAYS["warm"]} if shipped or profile else WAYS
    report: Result = {"machine": machine(resolve_device("auto")), "cores": os.cpu_count(), "note": note}
    report |= {"study": profile or ("shipped" if shipped else "micro"), "workers": workers, "studies": {}}
    given = {"DIT_WORKERS": str(workers)} if workers else {}
    differing = []
    with tempfile.TemporaryDirectory() as folder:
        one_process = copy(Path(folder) / "one-process", changes)
        own = report["own_seconds"] = own_work(one_process)
        expected = checksums(one_process, own)
        for way in [*ways, "nothing to do"]:
            if way in ways:
                root, variables = copy(Path(folder) / way.replace(" ", "-"), changes), given | ways[way]
            found = report["studies"][way] = study(root, variables)
            wrong = [name for name, outs in checksums(root, own).items() if outs != expected[name]]
            found |= {"identical": not wrong, "beyond_own_work": beyond(found["stages"], own)}
            differing += [f"{way}: the outputs of {name} differ from those of one process" for name in wrong]
            write(report, output)
    for shown in (phases(report), beginning(report), overhead(report)):
        Console().print(shown)
    if differing:
        print("\n".join(differing), file=sys.stderr)
        sys.exit(1)


def own_work(root: Path) -> dict[str, float]:
    """Seconds of each stage as a function call, in one process that has imported all of them. Then DVC records its outputs."""

    def run(*arguments: str) -> str:
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=root, env=environment(root), stdout=subprocess.PIPE, text=True, check=True).stdout

    seconds: dict[str, float] = json.loads(run("-c", OWN_WORK).splitlines()[-1])
    run("-m", "dvc", "commit", "--force", "--quiet")
    return seconds


def checksums(root: Path, stages: Iterable[str]) -> dict[str, dict[str, str]]:
    """The MD5 of each output of these stages, from `dvc.lock`."""
    entries = yamlfile.read(root / "dvc.lock")["stages"]
    return {name: {out["path"]: out["md5"] for out in entries[name]["outs"]} for name in stages}


def study(root: Path, variables: dict[str, str]) -> Result:
    """Run `make study` in `root`. Returns how long it took to its first stage, by phase, and how long each stage took.

    It also returns when an answer appeared, in seconds from the start. The output of the study is shown while it runs.
    """
    begun = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", STUDY, "study"],
        cwd=root,
        env=environment(root) | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    started: dict[str, float] = {}
    ended: dict[str, float] = {}
    found: Result = {}
    begins = {"the program is started": 0.0}
    for line in process.stdout or ():
        now = time.perf_counter() - begun
        if line.startswith("begins: "):
            begins[line.removeprefix("begins: ").rstrip()] = now
            continue
        print(line, end="", file=sys.stderr, flush=True)
        if match := LINE.match(line):
            (started if match[2] == "started" else ended)[match[1]] = now
        elif "first answer, from a part of the runs" in line:
            found["first answer"] = now
    if code := process.wait():
        sys.exit(code)
    found["total"] = time.perf_counter() - begun
    if started:
        first = min(started.values())
        ends = [*begins.values(), first][1:]
        found["before_first_stage"] = {phase: end - begin for (phase, begin), end in zip(begins.items(), ends, strict=True)}
        found |= {"first stage begins": first, "report": ended["compare"]}
    found["stages"] = {name: ended[name] - started[name] for name in started}
    return found


def kinds(stages: Iterable[str]) -> dict[str, list[str]]:
    """Stages by kind, such as `train`."""
    found: dict[str, list[str]] = {}
    for name in stages:
        found.setdefault(name.partition("@")[0], []).append(name)
    return found


def beyond(taken: Mapping[str, float], own: Mapping[str, float]) -> dict[str, float]:
    """The time that a stage took beyond its own work: the median of each kind.

    Where stages run side by side, this includes by how much they slow each other down.
    """
    return {kind: statistics.median(taken[name] - own[name] for name in names) for kind, names in kinds(taken).items()}


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


def beginning(report: Result) -> Table:
    """A table of what happens before the first stage."""
    studies = {way: found["before_first_stage"] for way, found in report["studies"].items() if "before_first_stage" in found}
    shown = Table("before the first stage", *(f"{way}, s" for way in studies))
    for phase in next(iter(studies.values())):
        shown.add_row(phase, *(f"{found[phase]:.1f}" for found in studies.values()))
    return shown


def overhead(report: Result) -> Table:
    """A table of the time that a stage takes beyond its own work: the median of each kind."""
    studies = {way: found["beyond_own_work"] for way, found in report["studies"].items() if found["stages"]}
    shown = Table("stage", "own work, s", *(f"beyond it, {way}, s" for way in studies), title="medians")
    for kind, names in kinds(report["own_seconds"]).items():
        work = statistics.median(report["own_seconds"][name] for name in names)
        shown.add_row(f"{kind} ({len(names)})", f"{work:.2f}", *(f"{found[kind]:.2f}" for found in studies.values()))
    return shown


if __name__ == "__main__":
    typer.run(main)
