"""Studies on a Ray cluster: two hosts on one machine, which share nothing but the DVC remote, against one machine alone."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import fsspec
import psutil
import pytest
from studies import MICRO, ROOT, command, environment, failing_stages, free_port, git, micro_project

from dit import config, yamlfile
from dit.config import Params
from dit.errors import UserError
from pipelines import dag, design, disk
from pipelines.experiments import override

pytest.importorskip("prefect_ray", reason="the extra `cluster` is not installed")

from raylets import Hosts, hosts

from pipelines.cluster import node, resources, snapshot
from pipelines.cluster.checkpoints import Mirror, Place
from pipelines.cluster.engine import narrowed
from pipelines.cluster.node import Node, Shared, Study
from pipelines.cluster.results import cache_folder, opened
from pipelines.cluster.transport import Remote
from pipelines.lockfile import LockFile

TRAINED = "train@symmetric-0"
SHELL_STAGES = """
stages:
  fine:
    cmd: echo ran >> $COUNTED/fine; echo well > fine
    deps: [params.yaml]
    outs: [fine]
  flaky:
    cmd: test -e $COUNTED/tried || { touch $COUNTED/tried; exit 75; }; cp fine flaky
    deps: [fine]
    outs: [flaky]
  large:
    cmd: head -c 20000000 /dev/zero > large
    deps: [params.yaml]
    outs: [large]
  cut:
    cmd: rm -r $REMOTE && touch $REMOTE && echo made > cut
    deps: [params.yaml]
    outs: [cut]
  long:
    cmd: echo $$ > $COUNTED/pid; while ! test -e $COUNTED/go; do sleep 0.1; done; cp fine long
    deps: [fine]
    outs: [long]
"""


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which stages leave marks for the tests; no stage reads it to make its output."""
    return tmp_path_factory.mktemp("counted")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, counted: Path) -> Iterator[Hosts]:
    """Hosts `a` and `b`, of one core each."""
    os.environ["COUNTED"] = str(counted)
    with hosts(tmp_path_factory.mktemp("cluster") / "hosts", {"a": 1, "b": 1}) as running:
        yield running
    del os.environ["COUNTED"]


@pytest.fixture
def shell(bare: Path, tmp_path: Path, databases: Path) -> Path:
    """The project `bare`, with a remote, and with databases of Prefect and MLflow."""
    shutil.copytree(databases, bare, dirs_exist_ok=True)
    with_remote(bare, tmp_path / "remote")
    return bare


@pytest.fixture
def bare(tmp_path: Path, counted: Path) -> Path:
    """A project whose stages are shell commands, without a remote; marks of other tests are gone."""
    for mark in counted.iterdir():
        mark.unlink()
    root = tmp_path / "project"
    root.mkdir()
    own = f"# {tmp_path}\n"  # so that no host has results of another test
    (root / "params.yaml").write_text(own + override((ROOT / "params.yaml").read_text(), MICRO))
    (root / "dvc.yaml").write_text(SHELL_STAGES + failing_stages("$COUNTED"))
    (root / ".gitignore").write_text("/.scratch\n/mlflow.db*\n/mlartifacts\n")
    git(root, "init", "--quiet")
    assert command(root, "dvc", "init", "--quiet").returncode == 0
    return root


def with_remote(root: Path, remote: Path) -> None:
    remote.mkdir()
    assert command(root, "dvc", "remote", "add", "--local", "--default", "here", str(remote)).returncode == 0


def with_s3(root: Path, url: str) -> None:
    """A remote on the S3 server at `url`, whose keys are in DVC's configuration of the head alone."""
    settings = {"endpointurl": url, "access_key_id": "key", "secret_access_key": "secret", "region": "us-east-1"}
    assert command(root, "dvc", "remote", "add", "--local", "--default", "s3", "s3://studies/one").returncode == 0
    for name, value in settings.items():
        assert command(root, "dvc", "remote", "modify", "--local", "s3", name, value).returncode == 0


@pytest.fixture
def servers(cluster: Hosts, prefect_api: dict[str, str]) -> dict[str, str]:
    """What a driver must know of the cluster, and of a Prefect server that it need not start."""
    return cluster.variables | prefect_api


def study(root: Path, servers: Mapping[str, str], *targets: str) -> subprocess.CompletedProcess[str]:
    return command(root, "pipelines", "study", "--engine", "ray", *targets, **servers)


def started(root: Path, servers: Mapping[str, str], *targets: str) -> subprocess.Popen[str]:
    """A study that runs meanwhile; what it prints goes to `study.log` beside its folder."""
    with (root.parent / "study.log").open("w") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "pipelines", "study", "--engine", "ray", *targets],
            cwd=root,
            env=environment(root) | dict(servers),
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
        )


def wait_until(condition: Callable[[], object], running: subprocess.Popen[str]) -> None:
    while not condition():
        assert running.poll() is None
        time.sleep(0.02)


def has_ended(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_stages_that_fail_on_nodes_are_told_and_tried_again_as_on_one_machine(
    shell: Path, servers: dict[str, str], counted: Path
) -> None:
    done = study(shell, servers, "flaky", "below")
    assert done.returncode == 1, done.stdout
    lines = done.stdout.splitlines()
    assert sum("it runs again in 5 s" in line for line in lines) == 1, done.stdout
    assert any(line.startswith("flaky ") and "done in" in line for line in lines)
    assert (shell / "flaky").read_text() == "well\n"
    failure = next(line for line in lines if line.startswith("error: "))
    assert failure.startswith("error: stage 'wrong' failed with exit code 2: params.yaml: it is wrong, on node ")
    assert lines[lines.index(failure) + 1] == "not run because of that: below"
    assert (counted / "attempts").read_text() == "attempt\n"
    assert "Traceback" not in done.stdout
    assert (counted / "fine").read_text() == "ran\n"
    alone = shutil.copytree(shell, shell.with_name("alone"))
    (alone / "dvc.lock").unlink()
    assert command(alone, "dvc", "repro", "flaky").returncode == 0
    assert (counted / "fine").read_text() == "ran\n"  # DVC alone finds the results in its run cache
    assert (alone / "dvc.lock").read_bytes() == (shell / "dvc.lock").read_bytes()


def test_nodes_that_see_the_heads_folder_link_its_files_and_copy_none(
    bare: Path, counted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COUNTED", str(counted))
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path / "site"))
    (counted / "go").touch()
    commit, bundle = snapshot.take(bare)
    (bare / node.FOLDER).mkdir(parents=True)
    (bare / node.FOLDER / f"{commit}.bundle").write_bytes(bundle)
    shared = Shared(str(bare), cache_folder(bare))
    with TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else tmp_path) as other, opened(bare, None) as results:
        for stage, work in {"fine": tmp_path / "work", "long": Path(other)}.items():  # the second on another disk
            monkeypatch.setenv(node.WORK, str(work))
            Node(Study(commit, None, shared, None, {}), results.upstream(["fine"])).run(stage, print)
            assert results.restore(stage)
            assert [path.name for path in work.iterdir()] == ["studies"]
        (clone,) = (path for path in Path(other).glob("studies/*/*") if path.is_dir())
        for name in ("fine", "long"):
            assert Path(shared.cache) in (clone / name).resolve().parents
    alone = shutil.copytree(bare, bare.with_name("alone"))
    (alone / "dvc.lock").unlink()
    shutil.rmtree(alone / ".dvc/cache")
    assert command(alone, "dvc", "repro", "long").returncode == 0
    assert (alone / "dvc.lock").read_bytes() == (bare / "dvc.lock").read_bytes()


def test_a_node_that_does_not_see_the_heads_folder_says_what_is_missing(bare: Path) -> None:
    shared = Shared(str(bare), str(bare / ".dvc/cache"))
    with pytest.raises(dag.StageError, match=rf"{bare}/.* not found: the study has no DVC remote, so this node must see"):
        Node(Study("0" * 40, None, shared, None, {}), "").run("fine", print)


def test_interrupting_a_study_ends_what_it_runs_on_the_nodes(shell: Path, servers: dict[str, str], counted: Path) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    running = started(shell, servers, "long")
    wait_until(lambda: (counted / "pid").exists() and (counted / "pid").read_text(), running)
    pid = int((counted / "pid").read_text())
    running.send_signal(signal.SIGINT)
    assert running.wait(300) == 128 + signal.SIGINT
    assert "interrupted; the next run goes on from here" in (shell.parent / "study.log").read_text()
    wait_for_end(pid)


def test_a_study_whose_head_was_killed_goes_on_with_what_was_done(shell: Path, cluster: Hosts, counted: Path) -> None:
    running = started(shell, cluster.variables, "long")
    wait_until(lambda: (counted / "pid").exists() and (counted / "pid").read_text(), running)
    pid = int((counted / "pid").read_text())
    for process in [psutil.Process(running.pid), *psutil.Process(running.pid).children(recursive=True)]:
        process.kill()
    running.wait()
    wait_for_end(pid)
    (shell / "dvc.lock").unlink(missing_ok=True)  # as if it had not been written yet
    shutil.rmtree(shell / ".dvc" / "cache")
    (counted / "go").touch()
    done = study(shell, cluster.variables, "long")
    assert done.returncode == 0, done.stdout
    assert (shell / "long").read_text() == "well\n"
    assert (counted / "fine").read_text() == "ran\n"


def wait_for_end(pid: int) -> None:
    deadline = time.monotonic() + 300
    while not has_ended(pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_node_with_other_packages_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = node.installed()
    node.check_versions(known)
    monkeypatch.syspath_prepend(other_torch(tmp_path))
    with pytest.raises(UserError, match=rf"other packages than on the head: torch 0\.1 instead of {known['torch']}; install"):
        node.check_versions(known)


def other_torch(folder: Path) -> Path:
    """A folder that has to come before all others for Python to find another version of torch."""
    found = folder / "other/torch-0.1.dist-info"
    found.mkdir(parents=True)
    (found / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 0.1\n")
    return found.parent


@pytest.fixture
def on_node(bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Runs a stage of `bare` as a node does, in this process; what is said of its failure."""
    monkeypatch.setenv("REMOTE", str(tmp_path / "remote"))
    monkeypatch.setenv(node.WORK, str(tmp_path / "work"))
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path / "site"))

    def failed(stage: str) -> str:
        commit, bundle = snapshot.take(bare)
        remote = Remote.of(bare)
        assert remote
        remote.put(bundle, node.STUDIES, f"{commit}.bundle")
        with pytest.raises(dag.StageError) as error:
            Node(Study(commit, remote, None, None, {}), "").run(stage, print)
        assert "\n" not in str(error.value)
        return str(error.value)

    return failed


def test_a_disk_of_a_node_that_is_full_is_named_with_what_can_be_freed(
    on_node: Callable[[str], str], shell: Path, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = (
        f"stage '{{}}' failed with exit code 75: node {node.here()}: no space left on the disk of {small}/work "
        "(0 MB are free): free some, for example by removing this folder while no study runs, or choose another disk there "
        "by DIT_WORK; the next run goes on from here"
    )
    monkeypatch.setenv(node.WORK, str(small / "work"))
    assert on_node("large") == said.format("large")
    shutil.rmtree(small / "work")
    (small / "filler").write_bytes(bytes(disk.free_bytes(small) - 30_000))
    assert on_node("large") == said.format("large")  # there is no room for the clone


def test_a_remote_that_a_node_cannot_reach_is_named_with_what_to_do(on_node: Callable[[str], str], shell: Path) -> None:
    remote = shell.parent / "remote"
    said = on_node("cut")
    assert said.startswith(
        f"stage 'cut' failed: node {node.here()}: the DVC remote 'here' at {remote} cannot be used, "
        "pushing the outputs of stage 'cut': [Errno 20] Not a directory: "
    )
    assert said.endswith("; see that it can be reached, or correct its settings by `dvc remote modify here`")


@pytest.mark.slow
def test_a_study_whose_remote_does_not_answer_is_refused_in_one_message(bare: Path, prefect_api: dict[str, str]) -> None:
    pytest.importorskip("dvc_s3")
    with_s3(bare, url := f"http://127.0.0.1:{free_port()}")
    done = study(bare, prefect_api, "fine")
    assert done.returncode == 1
    (line,) = done.stdout.splitlines()
    assert line.startswith("error: the DVC remote 's3' at s3://studies/one cannot be used, writing ")
    assert url in line
    assert line.endswith("; see that it can be reached, or correct its settings by `dvc remote modify s3`")


@pytest.mark.slow
def test_a_study_through_s3_keeps_its_results_and_checkpoints_there(tmp_path: Path, servers: dict[str, str]) -> None:
    """Against a server that speaks S3, moto's, with its keys in DVC's configuration of the head alone."""
    pytest.importorskip("dvc_s3")
    server = pytest.importorskip("moto.server")
    served = server.ThreadedMotoServer("127.0.0.1", free_port())
    served.start()
    try:
        url = "http://{}:{}".format(*served.get_host_and_port())
        root = micro_project(tmp_path / "study")
        with_s3(root, url)
        bucket = fsspec.filesystem("s3", key="key", secret="secret", endpoint_url=url)
        bucket.mkdir("studies")
        done = study(root, servers, "train@adaln_zero-0")
        assert done.returncode == 0, done.stdout
        assert bucket.ls("studies/one/scratch/train@adaln_zero-0")
        again = tmp_path / "again"
        git(tmp_path, "clone", "--quiet", str(root), str(again))
        shutil.copy(root / ".dvc/config.local", again / ".dvc/config.local")
        shutil.copy(root / "dvc.lock", again / "dvc.lock")
        assert command(again, "dvc", "pull", "--quiet", "train@adaln_zero-0").returncode == 0
        for file in (root / "runs/train/adaln_zero-0").iterdir():
            assert (again / "runs/train/adaln_zero-0" / file.name).read_bytes() == file.read_bytes()
    finally:
        served.stop()


@pytest.mark.slow
@pytest.mark.parametrize("place", ["remote", "shared"])
def test_a_whole_study_ends_as_on_one_machine(tmp_path: Path, cluster: Hosts, servers: dict[str, str], place: str) -> None:
    """Through a remote; and on a shared file system, where nodes keep no copies."""
    root = micro_project(tmp_path / "study")
    alone = shutil.copytree(root, tmp_path / "alone")
    if place == "remote":
        with_remote(root, tmp_path / "remote")

    def copies() -> set[Path]:
        return {path for host in cluster.running.values() for path in host.work.glob("cache/**/*")}

    before = copies()
    done = study(root, servers)
    assert done.returncode == 0, done.stdout
    assert (copies() == before) == (place == "shared")
    beside = command(alone, "pipelines", "study")
    assert beside.returncode == 0, beside.stdout
    assert (root / "dvc.lock").read_bytes() == (alone / "dvc.lock").read_bytes()
    assert (root / "reports/index.html").read_bytes() == (alone / "reports/index.html").read_bytes()
    assert "nothing to do: 16 of 16 stages are up to date" in study(root, servers).stdout
    trial = study(root, servers, "--set", "train.steps=61", TRAINED)
    assert trial.returncode == 0, trial.stdout
    assert f"{TRAINED:<26} | done in " in trial.stdout


@pytest.mark.slow
def test_two_hundred_short_stages_end_as_those_of_dvc_alone(tmp_path: Path, servers: dict[str, str]) -> None:
    root = tmp_path / "project"
    root.mkdir()
    (root / "params.yaml").write_text(override((ROOT / "params.yaml").read_text(), MICRO))
    names = ", ".join(f"s{index}" for index in range(200))
    (root / "dvc.yaml").write_text(
        f"stages:\n  work:\n    foreach: [{names}]\n    do:\n      cmd: echo ${{item}} > ${{item}}\n"
        "      deps: [params.yaml]\n      outs: ['${item}']\n"
    )
    (root / ".gitignore").write_text("/.scratch\n/mlflow.db*\n/mlartifacts\n")
    git(root, "init", "--quiet")
    assert command(root, "dvc", "init", "--quiet").returncode == 0
    alone = shutil.copytree(root, tmp_path / "alone")
    with_remote(root, tmp_path / "remote")
    done = study(root, servers)
    assert "200 stages ran, 0 were cached" in done.stdout
    assert command(alone, "dvc", "repro", "--quiet").returncode == 0
    assert (root / "dvc.lock").read_bytes() == (alone / "dvc.lock").read_bytes()


def test_what_no_node_can_run_is_told_before_the_study_starts(params: Params) -> None:
    wide = params.with_values({"train.processes": 8, "train.device": "cuda"})
    with pytest.raises(UserError, match=r"stage 'train' needs 8 CPUs and 8 GPUs on one node; .* have 16 CPUs and 4 GPUs"):
        resources.needs(wide, ["train"], [resources.Need(16, 4)] * 2, None)
    assert resources.needs(params, ["train"], [resources.Need(16, 4)] * 2, 16)["train"] == resources.Need(0.5, 0.5)
    assert resources.needs(params, ["train"], [resources.Need(1)], None)["train"] == resources.Need(1)


def test_a_node_reads_of_the_design_only_what_its_stage_needs(tmp_path: Path) -> None:
    root = micro_project(tmp_path / "project")
    every = dag.read(root)
    wanted = {"design", "latents@all", "train@symmetric-1"}
    (root / "design.yaml").write_text(narrowed(yamlfile.read(root / "design.yaml"), wanted))
    found = dag.read(root)
    assert found.keys() == wanted | {"compare"}
    assert found["train@symmetric-1"].outs == every["train@symmetric-1"].outs
    assert found["train@symmetric-1"].upstream == every["train@symmetric-1"].upstream


def test_a_lock_file_put_together_from_entries_has_the_bytes_that_dvc_writes(shell: Path) -> None:
    os.environ["COUNTED"] = str(shell.parent)
    assert command(shell, "dvc", "repro", "flaky", COUNTED=str(shell.parent), tried="").returncode in (0, 1, 255)
    assert command(shell, "dvc", "repro", "flaky", COUNTED=str(shell.parent)).returncode == 0
    whole = (shell / "dvc.lock").read_text()
    entries = yamlfile.read(shell / "dvc.lock")["stages"]
    made = LockFile(shell / "made.lock", ["fine", "flaky"])
    for name in ("flaky", "fine"):
        made.add(name, entries[name])
    made.write()
    assert (shell / "made.lock").read_text() == whole
    assert LockFile(shell / "dvc.lock").text(["fine", "flaky"]) == whole


def test_a_snapshot_holds_uncommitted_work_and_leaves_the_repository_alone(tmp_path: Path) -> None:
    root = tmp_path / "project"
    root.mkdir()
    git(root, "init", "--quiet")
    (root / "kept").write_text("kept\n")
    (root / "changed").write_text("before\n")
    (root / ".gitignore").write_text("/ignored\n")
    git(root, "add", ".")
    git(root, "commit", "--quiet", "--message", "first")
    (root / "changed").write_text("after\n")
    (root / "new").write_text("new\n")
    (root / "ignored").write_text("ignored\n")
    before = git(root, "status", "--porcelain")
    commit, bundle = snapshot.take(root)
    assert (commit, git(root, "status", "--porcelain")) == (snapshot.take(root)[0], before)
    (tmp_path / "bundle").write_bytes(bundle)
    snapshot.check_out(tmp_path / "bundle", commit, tmp_path / "clone")
    found = {file.name: file.read_text() for file in (tmp_path / "clone").iterdir() if file.is_file()}
    assert found == {"kept": "kept\n", "changed": "after\n", "new": "new\n", ".gitignore": "/ignored\n"}
    (tmp_path / "clone/.gitignore").write_text("/ignored\n/made\n")
    assert snapshot.is_clean(tmp_path / "clone", commit)
    (tmp_path / "clone/kept").write_text("edited\n")
    assert not snapshot.is_clean(tmp_path / "clone", commit)


def test_a_scratch_folder_comes_back_on_another_node_as_it_was_last_seen(tmp_path: Path) -> None:
    place = Place.at((tmp_path / "kept").as_uri()).below("train@a")
    with Mirror(tmp_path / "one", place, pytest.fail) as first:
        (first.folder / "run").mkdir()
        (first.folder / "run/checkpoint.pt").write_bytes(b"step 4")
        os.link(first.folder / "run/checkpoint.pt", first.folder / "run/recent.pt")
        (first.folder / "run/.checkpoint.pt.partial").write_bytes(b"half")
    assert len(list((tmp_path / "kept/train@a").iterdir())) == 2  # one blob and the manifest
    with Mirror(tmp_path / "two", place, pytest.fail) as second:
        assert (second.folder / "run/checkpoint.pt").read_bytes() == b"step 4"
        assert (second.folder / "run/recent.pt").samefile(second.folder / "run/checkpoint.pt")
        assert not (second.folder / "run/.checkpoint.pt.partial").exists()
        shutil.rmtree(second.folder / "run")
    assert not (tmp_path / "kept/train@a").exists()


def test_a_study_of_which_a_node_is_lost_in_training_ends_as_on_one_machine(
    tmp_path: Path, cluster: Hosts, servers: dict[str, str], first: tuple[Path, str], databases: Path
) -> None:
    root = shutil.copytree(databases, micro_project(tmp_path / "study"), dirs_exist_ok=True)
    alone = shutil.copytree(first[0], tmp_path / "alone", symlinks=True)  # what comes before `train` has run there
    for each in (root, alone):
        (each / "params.yaml").write_text(override((each / "params.yaml").read_text(), {"train.steps": 200}))
    with_remote(root, tmp_path / "remote")
    running = started(root, servers, TRAINED)

    said = (tmp_path / "study.log").read_text
    held: dict[str, psutil.Process] = {}

    def holds(name: str, files: str) -> bool:
        """Whether a host that has such files trains; the training then waits."""
        host = cluster.running[name]
        for process in host.family if list(host.work.glob(files)) else ():
            with suppress(psutil.NoSuchProcess):
                if "pipelines.stages.train" in process.cmdline():
                    process.suspend()
                    held[name] = process
        return name in held

    def kept() -> bool:
        """Whether others can see a checkpoint."""
        manifests = (tmp_path / "remote/scratch").glob("train@*/manifest.json")
        return any("/checkpoint.pt" in manifest.read_text() for manifest in manifests)

    wait_until(lambda: any(holds(name, "studies/*/*.scratch/*/checkpoint.pt") for name in "ab"), running)
    wait_until(kept, running)
    (lost,) = held
    cluster.running[lost].kill()
    (other,) = {"a", "b"} - {lost}
    wait_until(lambda: holds(other, "studies"), running)
    wait_until(lambda: "was lost; what it ran goes on elsewhere" in said(), running)
    held[other].resume()
    (alone / "dvc.lock").unlink()
    design.write(alone, config.load(alone / "params.yaml"))
    beside = command(alone, "dvc", "repro", TRAINED)
    assert beside.returncode == 0, beside.stdout
    assert beside.stdout.count("is cached - skipping run") == 3, beside.stdout
    assert running.wait(500) == 0, said()
    assert ": resumed at step " in said(), said()
    assert (root / "dvc.lock").read_bytes() == (alone / "dvc.lock").read_bytes()
    for file in (alone / "runs/train/symmetric-0").iterdir():
        assert (root / "runs/train/symmetric-0" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.slow
def test_what_goes_wrong_on_a_node_is_told_in_one_message(
    shell: Path, cluster: Hosts, servers: dict[str, str], small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk, another version of torch, and a remote that is lost while a stage runs, each on a node that is alone."""
    monkeypatch.setenv("REMOTE", str(tmp_path / "remote"))
    for host in list(cluster.running.values())[1:]:
        host.kill()

    def told(name: str, target: str, code: int, words: str, **variables: str) -> None:
        host = cluster.start(name, "--num-cpus", "1", **variables)
        cluster.wait()
        done = study(shell, servers, target)
        host.kill()
        assert done.returncode == code, done.stdout
        assert "Traceback" not in done.stdout
        (error,) = (line for line in done.stdout.splitlines() if line.startswith("error: "))
        assert words in error

    told("full", "large", 75, f"no space left on the disk of {small}", DIT_WORK=str(small / "work"))
    torch = os.pathsep.join(map(str, (other_torch(tmp_path), ROOT)))
    told("other", "fine", 1, "other packages than on the head: torch 0.1 instead of ", PYTHONPATH=torch)
    told("cut-off", "cut", 1, f"the DVC remote 'here' at {tmp_path}/remote cannot be used, pushing the outputs of stage 'cut'")
