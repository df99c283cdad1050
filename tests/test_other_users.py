"""No other user of the machine reads or writes DVC's index of a project, or what torch compiles for it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from dvc.repo import Repo
from studies import ROOT, git

from dit.errors import ConfigError
from pipelines import dag, experiments, private_dvc

INDEX = private_dvc.PLACE / "repo"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A committed DVC project of one stage, in which the place of the index is DVC's default."""
    monkeypatch.delenv(private_dvc.VARIABLE, raising=False)
    root = tmp_path / "project"
    root.mkdir()
    (root / "dvc.yaml").write_text("stages: {one: {cmd: echo 1 > one, outs: [one]}}\n")
    (root / "params.yaml").write_text("a: {b: 1}\n")
    (root / ".gitignore").write_text("/.scratch/\n")
    git(root, "init", "--quiet")
    subprocess.run([*dag.DVC, "init", "--quiet"], cwd=root, check=True, env={**os.environ, private_dvc.VARIABLE: str(tmp_path)})
    git(root, "add", ".")
    git(root, "commit", "--quiet", "--message", "project")
    return root


def indices(root: Path) -> list[Path]:
    return list((root / INDEX).glob("*/hashes"))


def test_the_index_is_in_the_project_also_for_dvc_as_a_person_types_it(project: Path) -> None:
    dag.read(project)
    assert len(indices(project)) == 1
    shutil.rmtree(project / INDEX)
    dag.dvc(project, "repro", "--quiet")
    subprocess.run([sys.executable, "-m", "dvc", "status", "--quiet"], cwd=project, check=True)
    assert len(indices(project)) == 1
    assert (project / private_dvc.PLACE).stat().st_mode & 0o777 == 0o700
    assert "site" not in git(project, "status", "--porcelain")


def test_an_experiments_index_is_as_private(project: Path) -> None:
    with experiments.workspace(project, {"a.b": 2}, "two") as workspace:
        dag.read(workspace)
        assert len(indices(workspace)) == 1
        assert (workspace / private_dvc.PLACE).stat().st_mode & 0o777 == 0o700


def test_a_copy_has_its_own_index_and_a_place_that_a_person_chose_stays(project: Path, tmp_path: Path) -> None:
    dag.read(project)
    copy = Path(shutil.copytree(project, tmp_path / "copy"))
    shutil.rmtree(copy / INDEX)
    dag.read(copy)
    assert len(indices(copy)) == 1
    chosen = Path(shutil.copytree(project, tmp_path / "chosen"))
    with Repo(str(chosen)) as repo, repo.config.edit("local") as settings:
        settings["core"][private_dvc.KEY] = str(tmp_path / "own")
    shutil.rmtree(chosen / INDEX)
    dag.read(chosen)
    assert indices(chosen) == []
    assert (tmp_path / "own" / "repo").is_dir()


@pytest.mark.parametrize("file", ["config", "config.local"])
def test_a_configuration_that_dvc_cannot_read_is_one_message(file: str, project: Path) -> None:
    (project / ".dvc" / file).write_text("[core\n")
    with pytest.raises(ConfigError, match=r"dvc\.yaml: .*config"):
        dag.read(project)


def test_what_torch_compiles_is_kept_in_the_project(tmp_path: Path) -> None:
    script = "import pipelines, torch; from torch._inductor.runtime.cache_dir_utils import cache_dir; print(cache_dir())"
    variables = {name: value for name, value in os.environ.items() if name not in ("TORCHINDUCTOR_CACHE_DIR", "DIT_SCRATCH")}
    variables["PYTHONPATH"] = str(ROOT)
    for scratch, place in ((None, ".scratch"), ("elsewhere", "elsewhere"), ("s3://bucket/scratch", ".scratch")):
        own = variables | ({"DIT_SCRATCH": scratch} if scratch else {})
        done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=own, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == str(tmp_path / place / "inductor")


def test_the_sockets_of_a_ray_that_a_study_starts_are_in_a_folder_of_its_user_alone(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    script = (
        "from pathlib import Path; import ray\n"
        "from pipelines.cluster import engine\n"
        "with engine._runner('listener'):\n"
        "    place = Path(ray._private.worker._global_node.plasma_store_socket_name).parents[3]\n"
        "    print(oct(place.stat().st_mode)[-3:], len(list(place.glob('ray/session_*/sockets/*'))) > 1)\n"
        "print(place.exists())\n"
    )
    variables = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=variables, capture_output=True, text=True, check=False
    )
    assert done.stdout.split()[-3:] == ["700", "True", "False"], done.stderr[-2000:]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_another_user_can_neither_read_nor_replace_the_index(project: Path, tmp_path: Path) -> None:
    dag.read(project)
    for folder in (project, *project.parents):
        if folder.is_relative_to(tmp_path.parent.parent):
            folder.chmod(0o755)
    (index,) = indices(project)
    commands = [["ls", str(index)], ["mv", str(index.parent), str(index.parent.with_name("mine"))], ["touch", str(index / "x")]]
    for each in commands:
        done = subprocess.run(each, user=65534, group=65534, extra_groups=[], capture_output=True, text=True, check=False)
        assert done.returncode != 0
        assert "Permission denied" in done.stderr
