"""Stages that a warm server forks are as those that DVC starts by itself: same state, same processes, same ends."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from textwrap import indent

import psutil
import pytest
from studies import ROOT, environment, git

from pipelines import dag, warm

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has warm stages")

STAGES = """
stages:
  state:
    cmd: python -m pipelines.stages.state a=1 b-2.5
    outs: [state.json]
  busy:
    cmd: python -m pipelines.stages.busy
    outs: [busy.txt]
  wrong:
    cmd: python -m pipelines.stages.wrong
    outs: [wrong.txt]
  shell:
    cmd: echo well > shell.txt
    outs: [shell.txt]
"""
STATE = """
import json, os, random, signal, sys, threading
import numpy, torch
VOLATILE = {"RANDOM", "_", "SHLVL", "PWD", "OLDPWD", "PYTEST_CURRENT_TEST"}  # of the shell by which DVC starts a stage
flags = [torch.get_num_threads(), torch.get_num_interop_threads(), torch.are_deterministic_algorithms_enabled(),
         torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark, str(torch.get_default_dtype()),
         torch.is_grad_enabled(), numpy.geterr(), sys.getrecursionlimit(), sys.flags.hash_randomization]
tasks = {open(f"/proc/self/task/{task}/comm").read().strip() for task in os.listdir("/proc/self/task")} - {"jemalloc_bg_thd"}
state = {
    "flags": flags, "threads": threading.active_count(), "tasks": len(tasks), "name": __name__,
    "argv": sys.argv, "orig_argv": sys.orig_argv[1:], "path": sys.path[0], "cwd": os.getcwd(), "package": __package__,
    "main": sys.modules["__main__"].__spec__.name, "stdin": os.readlink("/proc/self/fd/0"),
    "signals": {each.name: str(signal.getsignal(each)).split(" at ")[0] for each in signal.valid_signals()
                if isinstance(each, signal.Signals)},
    "mask": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])), "buffered": sys.stdout.line_buffering,
    "environment": {name: value for name, value in os.environ.items() if name not in VOLATILE},
    "leads": [os.getpid() == os.getpgrp(), os.getpgrp() == os.getsid(0)],
}
json.dump(state, open("state.json", "w"))
print("state written")
"""
BUSY = """
import os, pathlib, time
pathlib.Path("../pid.new").write_text(str(os.getpid()))
os.rename("../pid.new", "../pid")
begun = time.process_time()
while time.process_time() < begun + 0.7:
    pass
while not os.path.exists("../go"):
    time.sleep(0.02)
pathlib.Path("busy.txt").write_text("done")
"""
WRONG = """
import sys
print("error: params.yaml: it is wrong", file=sys.stderr)
sys.exit(2)
"""


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DVC project with this project's code and stages of its own."""
    root = tmp_path_factory.mktemp("template") / "project"
    for package in ("dit", "pipelines"):
        shutil.copytree(ROOT / package, root / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name, text in {"state": STATE, "busy": BUSY, "wrong": WRONG}.items():
        program = f"if __name__ == '__main__':\n{indent(text, '    ')}"
        (root / "pipelines" / "stages" / f"{name}.py").write_text(program)
    (root / "dvc.yaml").write_text(STAGES)
    git(root, "init", "--quiet")
    dag.dvc(root, "init", "--quiet")
    return root


@pytest.fixture
def project(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, none of whose stages has run."""
    root = shutil.copytree(template, tmp_path / "project", symlinks=True)
    for name, value in environment(root).items():
        monkeypatch.setenv(name, value)
    return root


@pytest.fixture
def said() -> list[str]:
    """What the server told."""
    return []


@pytest.fixture
def processes(project: Path, said: list[str]) -> Iterator[dag.Processes]:
    """Stages of the project, which start warm."""
    with dag.Processes(project, {}) as processes:
        processes.warm_up(dag.read(project).values(), said.append)
        yield processes


def run(processes: dag.Processes, stage: str, log: Callable[[str], None] = print, **variables: str) -> dag.Outcome:
    return processes.run(stage, log, variables, dag.read(processes.root)[stage].command)


@contextmanager
def busy(processes: dag.Processes) -> Iterator[tuple[Future[dag.Outcome], psutil.Process]]:
    """Stage `busy` while it runs, which it does until the block is left."""
    with ThreadPoolExecutor() as pool:
        running = pool.submit(run, processes, "busy")
        try:
            yield running, begun(processes.root)
        finally:
            go(processes.root)


def go(project: Path) -> None:
    """Let stage `busy` end."""
    (project.parent / "go").touch()


def begun(project: Path) -> psutil.Process:
    """The stage `busy`, once it runs."""
    wait_until((project.parent / "pid").exists)
    return psutil.Process(int((project.parent / "pid").read_text()))


def wait_until(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def cpu_seconds_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def command_of(process: psutil.Process) -> list[str]:
    return [word for word in process.cmdline() if word]


def above(stage: psutil.Process) -> tuple[psutil.Process, psutil.Process, psutil.Process]:
    """DVC, its guard, and the warm server above a stage."""
    dvc, guard, server = stage.parents()[:3]
    return dvc, guard, server


def test_a_stage_finds_the_state_of_a_fresh_process(project: Path, processes: dag.Processes, said: list[str]) -> None:
    lines: list[str] = []
    assert run(processes, "state", lines.append, CUDA_VISIBLE_DEVICES="7") is dag.Outcome.RAN
    assert lines == ["state written"]
    found = json.loads((project / "state.json").read_text())
    (project / "state.json").unlink()
    shutil.rmtree(project / ".dvc" / "cache", ignore_errors=True)
    (project / "dvc.lock").unlink()
    with dag.Processes(project, {}) as cold:
        assert cold.run("state", print, {"CUDA_VISIBLE_DEVICES": "7"}) is dag.Outcome.RAN
    assert found == json.loads((project / "state.json").read_text())
    assert found["environment"]["CUDA_VISIBLE_DEVICES"] == "7"
    assert said == []


def test_its_processes_are_those_of_a_cold_start(project: Path, processes: dag.Processes) -> None:
    before = cpu_seconds_of_children()
    with busy(processes) as (running, stage):
        dvc, guard, server = above(stage)
        assert command_of(stage) == [sys.executable, "-m", "pipelines.stages.busy"]
        repro = [sys.executable, "-P", str(project / "pipelines/atomic_dvc.py"), "--wait-for-lock", "repro", "--single-item"]
        assert command_of(dvc) == [*repro, "busy"]
        assert command_of(guard)[2:4] == [str(project / "pipelines/guard.py"), "1"]
        assert command_of(guard)[5:] == [*repro, "busy"]
        assert command_of(server) == [sys.executable, "-m", "pipelines.warm_server"]
        assert os.getpgid(stage.pid) == os.getpgid(dvc.pid) == os.getsid(stage.pid) == guard.pid
        go(project)
        assert running.result() is dag.Outcome.RAN
    processes.__exit__(None, None, None)
    assert cpu_seconds_of_children() - before > 0.7
    assert not server.is_running()


def test_what_it_ends_with_is_told(processes: dag.Processes) -> None:
    with pytest.raises(dag.StageError, match=r"stage 'wrong' failed with exit code 2: params\.yaml: it is wrong") as failure:
        run(processes, "wrong")
    assert not failure.value.transient


@pytest.mark.parametrize("who", ["stage", "dvc", "guard"])
def test_a_process_that_is_killed_is_noticed_and_the_stage_tried_again(
    project: Path, processes: dag.Processes, who: str, said: list[str]
) -> None:
    with busy(processes) as (running, stage):
        dvc, guard, server = above(stage)
        {"stage": stage, "dvc": dvc, "guard": guard}[who].kill()
        if who == "guard":  # DVC finishes what it does
            go(project)
        with pytest.raises(dag.StageError, match="killed by SIGKILL") as failure:
            running.result(120)
        assert failure.value.transient
    assert not stage.is_running()
    go(project)
    assert run(processes, "busy") is (dag.Outcome.CACHED if who == "guard" else dag.Outcome.RAN)
    assert server.is_running()
    assert said == []


def test_without_its_server_a_study_goes_on_cold_and_says_so_in_one_line(
    project: Path, processes: dag.Processes, said: list[str]
) -> None:
    with busy(processes) as (running, stage):
        above(stage)[2].kill()
        go(project)
        assert running.result() is dag.Outcome.RAN  # what had begun goes on
    assert run(processes, "state") is dag.Outcome.RAN
    assert run(processes, "shell") is dag.Outcome.RAN
    assert said == ["stages start cold from here on, which takes some seconds each: their warm server was killed"]


def test_code_that_changes_while_a_study_runs_is_not_run_from_memory(
    project: Path, processes: dag.Processes, said: list[str]
) -> None:
    go(project)
    assert run(processes, "busy") is dag.Outcome.RAN
    (project / "pipelines/stages/state.py").write_text("open('state.json', 'w').write('new')")
    assert run(processes, "state") is dag.Outcome.RAN
    assert (project / "state.json").read_text() == "new"
    assert said == ["stages start cold from here on, which takes some seconds each: the code of dit or pipelines has changed"]


def test_a_library_that_starts_a_thread_on_import_is_named(project: Path, said: list[str]) -> None:
    library = project / "library"
    library.mkdir()
    (library / "__init__.py").write_text("import library.quiet, library.threads, library.later")
    (library / "quiet.py").touch()
    (library / "later.py").touch()
    (library / "threads.py").write_text("from threading import Event, Thread\nThread(target=Event().wait, daemon=True).start()")
    stage = project / "pipelines/stages/state.py"
    stage.write_text(f"import library\n{stage.read_text()}")
    with dag.Processes(project, {}) as processes:
        processes.warm_up(dag.read(project).values(), said.append)
        assert run(processes, "state") is dag.Outcome.RAN
    start, _, name = said.pop().rpartition(": ")
    assert start.endswith("a library has started threads while library.threads was imported by pipelines")
    assert name
    assert json.loads((project / "state.json").read_text())["threads"] == 2


def test_a_library_that_asks_for_gpus_on_import_opens_none_and_a_stage_asks_again(project: Path, said: list[str]) -> None:
    (project / "library.py").write_text("import torch\nasked = torch.accelerator.is_available.__module__\n")
    program = "import json, library, torch\nfrom diffusers.utils.torch_utils import TorchDeviceBackend\n"
    main = "info = TorchDeviceBackend._detect_device_type.cache_info()\n"
    main += "found = [library.asked, torch.accelerator.is_available.__module__, info.hits, info.misses]\n"
    main += "json.dump(found, open('state.json', 'w'))\n"
    (project / "pipelines/stages/state.py").write_text(f"{program}if __name__ == '__main__':\n{indent(main, '    ')}")
    with dag.Processes(project, {}) as processes:
        processes.warm_up(dag.read(project).values(), said.append)
        assert run(processes, "state") is dag.Outcome.RAN
    assert json.loads((project / "state.json").read_text()) == ["__main__", "torch.accelerator", 0, 1]
    assert said == []


def test_what_a_stage_leaves_to_its_end_is_done(project: Path, said: list[str]) -> None:
    program = "import atexit, pathlib, tempfile, torch._dynamo.utils\nfolder = tempfile.TemporaryDirectory()\n"
    program += "pathlib.Path('../folder').write_text(folder.name)\natexit.register(pathlib.Path('state.json').touch)\n"
    (project / "pipelines/stages/state.py").write_text(f"if __name__ == '__main__':\n{indent(program, '    ')}")
    with dag.Processes(project, {}) as processes:
        processes.warm_up(dag.read(project).values(), said.append)
        assert run(processes, "state") is dag.Outcome.RAN
    assert (project / "state.json").exists()
    assert not Path((project.parent / "folder").read_text()).exists()
    assert said == []


def test_leaving_ends_everything(project: Path, processes: dag.Processes) -> None:
    with busy(processes) as (running, stage):
        family = [stage, *above(stage)]
        processes.__exit__(None, None, None)
        with pytest.raises(dag.StoppedError):
            running.result()
    wait_until(lambda: not any(process.is_running() for process in family))


def test_nothing_outlives_a_study_that_is_killed(project: Path) -> None:
    program = "from pathlib import Path; from pipelines import dag; stages = dag.read(Path.cwd())\n"
    program += "with dag.Processes(Path.cwd(), {}) as processes:\n"
    program += "    processes.warm_up(stages.values(), print); processes.run('busy', print, {}, stages['busy'].command)"
    starter = subprocess.Popen([sys.executable, "-c", program], cwd=project)
    stage = begun(project)
    family = [stage, *above(stage)]
    starter.kill()
    starter.wait()
    wait_until(lambda: not any(process.is_running() for process in family))


def test_a_module_whose_import_does_not_end_keeps_nothing_alive(project: Path) -> None:
    (project / "pipelines/stages/busy.py").write_text("import time\ntime.sleep(600)")
    program = "from pathlib import Path; from pipelines import dag; import time\n"
    program += "processes = dag.Processes(Path.cwd(), {}); processes.warm_up(dag.read(Path.cwd()).values(), print)\n"
    program += "print('up', flush=True); time.sleep(600)"
    starter = subprocess.Popen([sys.executable, "-c", program], cwd=project, stdout=subprocess.PIPE, text=True)
    assert starter.stdout
    assert starter.stdout.readline() == "up\n"
    (server,) = psutil.Process(starter.pid).children()
    wait_until(lambda: not server.is_running() or server.cmdline()[2:3] == ["pipelines.warm_server"])
    starter.kill()
    starter.wait()
    wait_until(lambda: not server.is_running())


@pytest.mark.parametrize(("given", "threads"), [({}, "1"), ({"TORCHINDUCTOR_COMPILE_THREADS": "4"}, "4")])
def test_torch_starts_no_processes_to_compile_unless_the_user_wants_them(given: dict[str, str], threads: str) -> None:
    variables = {name: value for name, value in os.environ.items() if name != "TORCHINDUCTOR_COMPILE_THREADS"} | given
    script = "import pipelines.warm_server, torch._inductor.config as config; print(config.compile_threads)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=variables, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [threads]


def test_it_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    assert warm.wanted()
    monkeypatch.setenv("DIT_WARM", "0")
    assert not warm.wanted()
