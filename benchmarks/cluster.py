"""How much work a stage causes for the head of a cluster: `python benchmarks/cluster.py`.

The study's stages do no work; each writes a few bytes. One DVC process makes all results beforehand in a clone that shares
only a DVC remote with the head, and the nodes do nothing, so the head is as busy as with many nodes. The benchmark measures
first the head's own work with results, and then the whole flow: Prefect, Ray and DVC.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import chdir
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch
import typer
from dvc.repo import Repo
from dvc.stage.serialize import to_single_stage_lockfile
from measuring import Result, heading, machine, shipped, write
from rich.console import Console
from rich.table import Table

from pipelines import dag, services
from pipelines.cluster.node import Node, Study
from pipelines.cluster.results import opened
from pipelines.cluster.transport import Remote
from pipelines.lockfile import LockFile

STAGES = """
vars: [list.yaml]
stages:
  first:
    cmd: cp params.yaml first.txt
    deps: [params.yaml]
    outs: [first.txt]
  work:
    foreach: ${keys}
    do:
      cmd: mkdir -p out/${item} && echo ${item} > out/${item}/result
      deps: [first.txt]
      outs: ["out/${item}"]
"""


def main(
    stages: Annotated[int, typer.Option(min=1, help="stages without work")] = 2000,
    output: Annotated[Path | None, typer.Option(help="where to write JSON")] = None,
) -> None:
    """Measure what a stage costs the head."""
    report: Result = {"machine": machine(torch.device("cpu")), "cores": os.cpu_count(), "stages": stages}
    output = output.absolute() if output else None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        head, node, fresh = project(folder / "head", stages), folder / "node", folder / "fresh"
        shutil.copytree(head, node)
        run(head, "repro", "--quiet", "--single-item", "first")
        make_all(node)
        run(node, "push", "--quiet", "--run-cache")
        shutil.copytree(head, fresh)
        report |= taken_in(head)
        write(report, output)
        report["flow"] = flow_over(fresh)
        for root in (head, fresh):
            assert (root / "dvc.lock").read_bytes() == (node / "dvc.lock").read_bytes()
            run(root, "status", "--quiet")  # fails where DVC would run anything
        write(report, output)
    Console().print(shown(report))


def project(root: Path, stages: int) -> Path:
    """Create a DVC project with this many stages, and a remote beside it."""
    root.mkdir()
    (root / "params.yaml").write_text("seed: 0\n")
    (root / "dvc.yaml").write_text(STAGES)
    (root / "list.yaml").write_text(f"keys: [{', '.join(f's{index}' for index in range(stages))}]\n")
    subprocess.run(["git", "init", "--quiet"], cwd=root, check=True)
    run(root, "init", "--quiet", "--no-scm")  # without a .gitignore of thousands of lines
    run(root, "remote", "add", "--quiet", "--default", "here", str(root.parent / "remote"))
    return root


def run(root: Path, *arguments: str) -> None:
    """A command of DVC."""
    subprocess.run([sys.executable, "-m", "dvc", *arguments], cwd=root, check=True)


def make_all(root: Path) -> None:
    """Run all stages of a project, with the same result as `dvc repro`, which takes seconds a stage if there are thousands."""
    with chdir(root), Repo() as repo, repo.lock:
        stages = repo.index.stages
        lock = LockFile(root / "dvc.lock", [stage.name for stage in stages])
        for stage in stages:
            subprocess.run(stage.cmd, shell=True, check=True)
            stage.save()
            stage.commit()
            repo.stage_cache.save(stage)
            lock.add(stage.name, to_single_stage_lockfile(stage))
        lock.write()


def taken_in(head: Path) -> dict[str, Any]:
    """Milliseconds of CPU time for each part of the head's work on a stage, and of wall-clock time for all parts."""
    begun = time.perf_counter()
    stages = dag.read(head)
    read_seconds = time.perf_counter() - begun
    remote = Remote.of(head)
    parts: dict[str, list[float]] = {
        "looks whether it is up to date": [],
        "prepares it for a node": [],
        "takes in its results": [],
    }
    study = Study("0" * 40, remote, None, None, {})
    begun = time.perf_counter()
    with opened(head, remote) as results:
        opened_seconds = time.perf_counter() - begun
        os.chdir(head)
        begun = time.perf_counter()
        for name, stage in stages.items():
            if name == "first":
                continue
            moments = [time.process_time()]
            assert not results.unchanged(name)
            moments.append(time.process_time())
            Node(study, results.upstream(stage.upstream))
            moments.append(time.process_time())
            assert results.restore(name, sent=True)
            moments.append(time.process_time())
            for part, start, end in zip(parts.values(), moments, moments[1:], strict=False):
                part.append(1e3 * (end - start))
    total = 1e3 * (time.perf_counter() - begun) / max(len(stages) - 1, 1)
    found = {name: {"median": statistics.median(part), "mean": statistics.fmean(part)} for name, part in parts.items()}
    return {
        "milliseconds": {**found, "all, with dvc.lock: wall clock": {"mean": total}},
        "seconds_once": {"reads the graph": read_seconds, "opens the project": opened_seconds},
    }


class Idle(Node):
    """A node that does nothing: the results are on the remote already."""

    def run(self, stage: str, log: Any, environment: Any = None, command: str = "") -> dag.Outcome:
        """Report that the stage ran."""
        return dag.Outcome.RAN

    def ran(self, stage: str, seconds: float) -> None:
        """Do nothing."""


def flow_over(head: Path) -> dict[str, Any]:
    """Run the flow over all stages; return its CPU time by process and its wall-clock time, in milliseconds a stage."""
    os.chdir(head)
    server = services.prefect_server({})
    os.environ.update(server.environment)
    server.wait()
    from prefect import flow
    from prefect.task_runners import ThreadPoolTaskRunner

    from pipelines import answer_first, flows
    from pipelines.cluster import engine
    from pipelines.stage_task import run_log

    engine.Node = Idle  # type: ignore[misc]
    stages = dag.read(head)
    figures: dict[str, Any] = {}

    @flow(name="many", task_runner=ThreadPoolTaskRunner(), persist_result=False)
    def many() -> None:
        with dag.Processes(head, {}) as processes, engine.connected(head, shipped(), stages, None, run_log()) as cluster:
            report = answer_first.PartialReport(processes, shipped(), stages, head / "report", print)
            before, begun = cpu_seconds(), time.perf_counter()
            states = flows.run_all(stages, processes, cluster.places, cluster.is_current, report, cluster)
            after, seconds = cpu_seconds(), time.perf_counter() - begun
            assert all(state.is_completed() for state in states.values()), [
                state.message for state in states.values() if not state.is_completed()
            ][:1]
            count = max(len(stages) - 1, 1)
            figures["wall_milliseconds"] = 1e3 * seconds / count
            figures["cpu_milliseconds"] = {name: 1e3 * (after[name] - before.get(name, 0.0)) / count for name in after}

    many()
    return figures


def cpu_seconds() -> dict[str, float]:
    """CPU time so far of the head, of Prefect's server, of Ray's processes that run stages, and of its other processes."""
    used: dict[str, float] = {"head": sum(psutil.Process().cpu_times()[:2])}
    for process in psutil.Process().children(recursive=True):
        words = " ".join(process.cmdline())
        name = (
            "Prefect's server"
            if "pipelines.gate:prefect" in words
            else "workers of Ray"
            if words.startswith("ray::")
            else "Ray"
        )
        used[name] = used.get(name, 0.0) + sum(process.cpu_times()[:2])
    return used


def shown(report: Result) -> Table:
    """The figures as a table."""
    table = Table("the head, for each stage", "median ms", "mean ms", title=f"{report['stages']} stages, {heading(report)}")
    for name, figures in report["milliseconds"].items():
        table.add_row(name, f"{figures['median']:.1f}" if "median" in figures else "", f"{figures['mean']:.1f}")
    for name, spent in report["flow"]["cpu_milliseconds"].items():
        table.add_row(f"whole flow, CPU of {name}", "", f"{spent:.1f}")
    table.add_row("whole flow, wall clock", "", f"{report['flow']['wall_milliseconds']:.1f}")
    return table


if __name__ == "__main__":
    typer.run(main)
