"""DVC's graph as Python, stages run side by side, and isolated experiments: on a small DVC project of shell commands."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import given, settings, strategies as st

from dit import yamlfile
from dit.errors import ConfigError
from pipelines import dag, experiments, guard
from pipelines.overrides import override

ROOT = Path(__file__).parents[1]
STAGES = """
stages:
  data:
    cmd: mkdir -p out && cp source.txt out/data && echo copied
    deps: [source.txt]
    outs: [out/data]
  train:
    matrix:
      strategy: ${study.strategies}
    cmd: sh train.sh ${item.strategy}
    deps: [train.sh, out/data]
    params: ["strategies.${item.strategy}", train]
    outs: ["out/${item.strategy}"]
  compare:
    cmd: cat out/* > report
    deps: ["out/a", "out/b"]
    outs: [report]
"""
PARAMS = "study: {strategies: [a, b]}  # which\nstrategies: {a: 1, b: 2}\ntrain: {steps: 3}  # how long\n"


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `project` is a copy of."""
    root = tmp_path_factory.mktemp("template")
    (root / "dvc.yaml").write_text(STAGES)
    (root / "params.yaml").write_text(PARAMS)
    (root / "source.txt").write_text("source\n")
    (root / "train.sh").write_text('echo "training $1"; echo $1 > out/$1\n')
    (root / ".gitignore").write_text("/out\n/report\n/.scratch\n")
    (root / ".dvcignore").write_text("/.scratch/\n")
    git(root, "init", "--quiet")
    dag.dvc(root, "init", "--quiet")
    git(root, "add", ".")
    git(root, "-c", "user.name=t", "-c", "user.email=t@t", "commit", "--quiet", "--message", "project")
    return root


@pytest.fixture
def project(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A committed DVC project with stages data, train@a, train@b and compare, of which none has run; git knows no person."""
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path / "site"))
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    return shutil.copytree(template, tmp_path / "project")


@pytest.fixture(scope="session")
def finished_template(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `finished` is a copy of."""
    root = shutil.copytree(template, tmp_path_factory.mktemp("finished") / "project")
    run_all(root)
    return root


@pytest.fixture
def finished(project: Path, finished_template: Path) -> Path:
    """The project after all its stages have run."""
    shutil.rmtree(project)
    return shutil.copytree(finished_template, project)


def git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True, text=True).stdout


def run_all(root: Path) -> dict[str, dag.Outcome]:
    with dag.Processes(root, {}) as processes:
        return {name: processes.run(name, print) for name in dag.read(root)}


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_graph_is_dvcs_own(project: Path) -> None:
    stages = dag.read(project)
    assert {name: stage.upstream for name, stage in stages.items()} == {
        "data": (),
        "train@a": ("data",),
        "train@b": ("data",),
        "compare": ("train@a", "train@b"),
    }
    assert list(stages).index("data") == 0
    assert list(stages)[-1] == "compare"
    assert not any(stage.up_to_date for stage in stages.values())


def test_targets_bring_what_they_need(project: Path) -> None:
    stages = dag.read(project)
    assert list(dag.select(stages, ["train@a"])) == ["data", "train@a"]
    assert list(dag.select(stages, ["train"])) == list(dag.select(stages, ["*@?"])) == ["data", "train@a", "train@b"]
    assert list(dag.select(stages, None)) == list(stages)
    with pytest.raises(ConfigError, match=r"no stage is called 'trian'; did you mean train"):
        dag.select(stages, ["trian"])


def test_one_strategys_edit_reruns_its_stages_alone(finished: Path) -> None:
    assert all(stage.up_to_date for stage in dag.read(finished).values())
    edit(finished / "params.yaml", "b: 2", "b: 5")
    assert [name for name, stage in dag.read(finished).items() if not stage.up_to_date] == ["train@b", "compare"]
    outcomes = run_all(finished)
    assert [name for name, outcome in outcomes.items() if outcome is dag.Outcome.RAN] == ["train@b"]


def test_a_stage_below_an_output_that_came_out_as_it_was_is_unchanged(finished: Path) -> None:
    (finished / "train.sh").write_text("echo $1 > out/$1  # another way to the same\n")
    assert [name for name, stage in dag.read(finished).items() if not stage.up_to_date] == ["train@a", "train@b", "compare"]
    with dag.checking(finished) as unchanged, dag.Processes(finished, {}) as processes:
        assert not unchanged("train@a")
        for name in ("train@a", "train@b"):
            assert processes.run(name, print) is dag.Outcome.RAN
        assert unchanged("compare")
        (finished / "out" / "a").write_text("another")
        assert not unchanged("compare")


def test_side_by_side_gives_the_lock_file_of_dvc_repro(project: Path) -> None:
    twin = project.with_name("twin")
    shutil.copytree(project, twin)
    dag.dvc(twin, "repro")
    with dag.Processes(project, {}) as processes, ThreadPoolExecutor() as pool:
        processes.run("data", print)
        list(pool.map(lambda name: processes.run(name, print), ["train@b", "train@a"]))
        processes.run("compare", print)
    dag.order_lock(project, dag.read(project).values())
    assert (project / "dvc.lock").read_bytes() == (twin / "dvc.lock").read_bytes()


def test_output_arrives_line_by_line_without_dvcs_chatter(project: Path) -> None:
    lines: list[str] = []
    with dag.Processes(project, {}) as processes:
        assert processes.run("data", lines.append) is dag.Outcome.RAN
        assert lines == ["copied"]
        assert processes.run("data", lines.append) is dag.Outcome.CACHED


@pytest.mark.parametrize(
    ("script", "exit_code", "transient", "reason"),
    [
        ("echo 'error: params.yaml: train.steps = -1' >&2; exit 2", 2, False, "params.yaml: train.steps = -1"),
        ("echo no space left >&2; exit 75", 75, True, "no space left"),
        ("echo Traceback; exit 1", 1, False, "Traceback"),
        ("kill -KILL $$", -9, True, "killed by SIGKILL"),
    ],
)
def test_failure_says_what_happened_and_whether_to_retry(
    project: Path, script: str, exit_code: int, transient: bool, reason: str
) -> None:
    (project / "train.sh").write_text(script)
    with dag.Processes(project, {}) as processes:
        processes.run("data", print)
        with pytest.raises(dag.StageError, match=reason) as failure:
            processes.run("train@a", print)
    assert failure.value.transient is transient
    assert failure.value.exit_code in (exit_code, guard.SIGNAL_BASE - exit_code)


def test_leaving_ends_what_runs_and_dvc_stays_whole(project: Path) -> None:
    (project / "train.sh").write_text("echo $$ > ../pid; sleep 60\n")
    pid = project.parent / "pid"
    with ThreadPoolExecutor() as pool:
        with dag.Processes(project, {}) as processes:
            processes.run("data", print)
            running = pool.submit(processes.run, "train@a", print)
            wait_until(lambda: pid.exists() and bool(pid.read_text()))
        with pytest.raises(dag.StoppedError):
            running.result()
    assert not psutil.pid_exists(int(pid.read_text()))
    assert [name for name, stage in dag.read(project).items() if stage.up_to_date] == ["data"]


def test_a_dvc_that_is_killed_is_noticed_at_once_and_leaves_nothing_beside_the_next_try(project: Path) -> None:
    (project / "train.sh").write_text("echo $$ > ../pid; test -e ../again || sleep 60; echo $1 > out/$1\n")
    pid = project.parent / "pid"
    with ThreadPoolExecutor() as pool, dag.Processes(project, {}) as processes:
        processes.run("data", print)
        running = pool.submit(processes.run, "train@a", print)
        wait_until(lambda: pid.exists() and bool(pid.read_text()))
        stage = psutil.Process(int(pid.read_text()))
        killed = time.monotonic()
        next(process for process in stage.parents() if "atomic_dvc" in " ".join(process.cmdline())).kill()
        with pytest.raises(dag.StageError, match="killed by SIGKILL") as failure:
            running.result()
        assert time.monotonic() - killed < 50  # the stage would sleep for 60
        assert failure.value.transient
        assert not stage.is_running()
        (project.parent / "again").touch()
        assert processes.run("train@a", print) is dag.Outcome.RAN
        assert (project / "out" / "a").read_text() == "a\n"


def test_nothing_outlives_a_starter_that_is_killed(tmp_path: Path) -> None:
    program = "import os, sys, time; from pathlib import Path; from pipelines import guard\n"
    program += "guard.start(['sh', '-c', 'echo $$ > pid; sleep 60'], Path.cwd(), os.environ); time.sleep(60)"
    starter = subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)})
    pid = tmp_path / "pid"
    wait_until(lambda: pid.exists() and bool(pid.read_text()))
    starter.send_signal(signal.SIGKILL)
    starter.wait()
    wait_until(lambda: not psutil.pid_exists(int(pid.read_text())))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has ended")
def test_a_server_does_not_outlive_a_guard_that_is_killed(tmp_path: Path) -> None:
    process = guard.start(["sh", "-c", "echo $$ > pid; sleep 60"], tmp_path, os.environ)
    pid = tmp_path / "pid"
    wait_until(lambda: pid.exists() and bool(pid.read_text()))
    process.kill()
    process.wait()
    wait_until(lambda: not psutil.pid_exists(int(pid.read_text())))


def test_experiment_has_uncommitted_work_and_overrides_and_leaves_no_trace(finished: Path) -> None:
    edit(finished / "source.txt", "source", "edited")
    (finished / "new.txt").write_text("new")
    (finished / "train.sh").write_text("cat ../../../new.txt new.txt > out/$1\n")
    before = snapshot(finished)

    def use() -> None:
        with experiments.workspace(finished, {"train.steps": 9}, "name") as workspace:
            assert (workspace / "source.txt").read_text() == "edited\n"
            assert (workspace / "new.txt").read_text() == "new"
            assert yamlfile.read(workspace / "params.yaml")["train"] == {"steps": 9}
            experiments.forget_stale(workspace)
            assert not (workspace / "out" / "a").exists()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        use()
    assert list((finished / experiments.EXPERIMENTS).glob("name*")) == []
    assert git(finished, "worktree", "list").count("\n") == 1
    assert snapshot(finished) == before


def test_experiment_restores_what_still_holds_and_dvc_lists_it(finished: Path) -> None:
    before = snapshot(finished)
    with experiments.workspace(finished, {"strategies.b": 7}, "seven") as workspace:
        stages = dag.read(workspace)
        assert [name for name, stage in stages.items() if stage.up_to_date] == ["data", "train@a"]
        run_all(workspace)
        experiments.save(finished, workspace, "seven", stages)
    assert "seven" in dag.dvc(finished, "exp", "list", "--name-only")
    assert snapshot(finished) == before
    dag.dvc(finished, "exp", "apply", "seven")
    assert all(stage.up_to_date for stage in dag.read(finished).values())


def test_worktree_of_a_killed_experiment_is_cleared_away(project: Path) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    left = project / experiments.EXPERIMENTS / f"left.{gone.pid}"
    git(project, "worktree", "add", "--detach", "--quiet", str(left))
    with experiments.workspace(project, {"train.steps": 9}, "next"):
        assert not left.exists()


@settings(deadline=None)
@given(st.sampled_from(["train.steps", "train.validation.seed", "study.seeds", "strategies.new"]), st.data())
def test_override_changes_one_value_and_keeps_the_rest(key: str, data: st.DataObject) -> None:
    numbers = st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
    scalars = st.none() | st.booleans() | numbers | st.text() | st.text(" a#:'\"\n\t\x85\u2028")
    value = data.draw(scalars | st.lists(scalars, max_size=3))
    text = (ROOT / "params.yaml").read_text()
    expected = yamlfile.parse(text, "text")
    section, name = expected, key
    while "." in name:
        head, _, name = name.partition(".")
        section = section[head]
    section[name] = value
    changed = override(text, {key: value})
    assert yamlfile.parse(changed, "changed") == expected
    assert changed.count("#") >= text.count("#") - 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"train.stepz": 3}, r"train\.stepz is not a known key"),
        ({"training.steps": 3}, r"overrides: training\.steps is not a known key"),
        ({"train.steps": -3}, r"train\.steps = -3; it should be"),
        ({"evaluate.scheduler": "nope"}, r"evaluate\.scheduler = 'nope'; it should be 'ddpm', 'ddim'"),
        ({"model.name": "DiT-Tiny/8", "images.size": 16}, "patch size 8 does not divide the latent size 4"),
        ({"study.strategies": ["adaln_zero", "nope"]}, r"unknown strategy 'nope'; expected one of adaln_zero"),
    ],
)
def test_wrong_override_is_one_clear_error(overrides: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        experiments.parameters(ROOT, overrides)


def test_every_parameter_counts_for_dvcs_run_cache() -> None:
    """DVC's run cache ignores keys called `size` and `nfiles` inside a section: such a key must be named by itself."""
    stages = yamlfile.read(ROOT / "dvc.yaml")["stages"]
    params = yamlfile.read(ROOT / "params.yaml")
    for stage in stages.values():
        for section in stage.get("params", []):
            ignored = {"size", "nfiles"} & set(params.get(section, {}))
            assert {f"{section}.{key}" for key in ignored} <= set(stage["params"])


def snapshot(root: Path) -> dict[str, bytes | str]:
    """What git and DVC see of a workspace."""
    files = {name: (root / name).read_bytes() for name in ("dvc.lock", "params.yaml", "dvc.yaml")}
    return {**files, "git": git(root, "status", "--porcelain"), "dvc": dag.dvc(root, "status")}


def wait_until(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_every_profile_gives_valid_parameters_and_another_name_is_one_clear_error() -> None:
    folder = ROOT / "profiles"
    profiles = [path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml")]
    assert {"gpu", "evidence/heads"} <= set(profiles)
    for name in profiles:
        experiments.parameters(ROOT, {**experiments.profile(ROOT, name), "autoencoder.device": "auto"})
    for name in ("gpu8", "../params"):
        with pytest.raises(ConfigError, match=rf"profiles/{name}\.yaml: no such profile; there are .*gpu"):
            experiments.profile(ROOT, name)
    for name in ("gpuu", "profiles/gpu.yaml"):
        with pytest.raises(ConfigError, match=r"no such profile; there are .*; did you mean gpu\?$"):
            experiments.profile(ROOT, name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("study.seeds: [", r"profiles/mine\.yaml: not valid YAML"),
        ("5: 3", r"profiles/mine\.yaml: expected dotted keys of params\.yaml"),
        ("train: {steps: 3}", r"profiles/mine\.yaml: expected dotted keys of params\.yaml"),
        ("train.stepz: 3", r"profiles/mine\.yaml: train\.stepz is not a known key"),
        ("trian.steps: 3", r"profiles/mine\.yaml: trian\.steps is not a known key"),
        ("train.processes: 3", r"profiles/mine\.yaml: train: batch_size = 32; it should be a multiple of processes = 3"),
    ],
)
def test_a_wrong_profile_is_told_with_its_file(tmp_path: Path, text: str, message: str) -> None:
    shutil.copy(ROOT / "params.yaml", tmp_path)
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "mine.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        experiments.profile(tmp_path, "mine")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (experiments.profile(ROOT, "gpu"), r"with overrides: autoencoder\.device = 'cuda' is not on this machine"),
        (
            {"latents.device": "cuda"},
            r"latents\.device = 'cuda' is not on this machine, which has auto, .*with latents\.device=auto",
        ),
        (
            {"latents.backend": "fused"},
            r"latents\.backend = 'fused' cannot run here; use auto.*powers of two",
        ),
        (
            {"train.backend": "fused"},
            r"yaml with overrides: train\.backend = 'fused' cannot run here; use auto",
        ),
    ],
)
def test_what_this_machine_cannot_do_is_told_before_any_work(
    overrides: dict[str, object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=message):
        experiments.parameters(ROOT, overrides)
