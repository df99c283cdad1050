"""A relative path in the parameters starts at the project's root, wherever a stage runs; DVC may have what is not here."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from studies import command, git, micro_project, run_stage

from dit import config
from dit.errors import ConfigError
from pipelines import dag, experiments, named_files, preflight
from pipelines.overrides import override
from pipelines.stages.images import images

OF_IMAGES = ["images"]


def name(root: Path, values: dict[str, Any]) -> None:
    """Write other values into the parameters of a project, and commit all of it."""
    (root / "params.yaml").write_text(override((root / "params.yaml").read_text(), values))
    git(root, "add", ".")
    git(root, "commit", "--quiet", "--allow-empty", "--message", "values")


def folder(path: str) -> dict[str, Any]:
    return {"images.source": {"kind": "folder", "root": path, "validation_root": None, "validation_fraction": 0.5}}


def draw(root: Path, classes: tuple[str, ...] = ("cats", "dogs")) -> None:
    """Pictures of some classes below `root`."""
    for label in classes:
        (root / label).mkdir(parents=True)
        for index in range(8):
            pixels = np.random.default_rng(index).integers(0, 255, (16, 16, 3), np.uint8)
            Image.fromarray(pixels).save(root / label / f"{index}.png")


def told_of_pictures(root: Path) -> list[str]:
    """What the pre-flight of the workflow in `root` says of the folder of pictures."""
    found = preflight.check(root, config.load(root / "params.yaml"), {"images"})
    return [finding.found for finding in found if finding.key == "images.source.root"]


def refusal(root: Path) -> str:
    """What the pre-flight of a study of stage `images` in `root` says."""
    return preflight.refusal(root, dag.select(dag.read(root), OF_IMAGES), lambda _: None)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A micro project, in which git ignores `pics`."""
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path / "site"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    root = micro_project(tmp_path / "study")
    monkeypatch.chdir(root)
    with (root / ".gitignore").open("a") as file:
        file.write("/pics/\n")
    return root


@pytest.mark.parametrize("path", ["pics", "new/pics", "../outside/pics", "../../outside"])
def test_an_experiment_reads_what_parameters_name_from_the_project(
    path: str, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw(project / path)
    name(project, folder(path))
    params = experiments.parameters(project, {"images.seed": 7})
    with experiments.workspace(project, {"images.seed": 7}, "seven", named_files.named_anywhere(params)) as workspace:
        assert refusal(workspace) == ""
        monkeypatch.chdir(workspace)
        run_stage(images, config.load())
        monkeypatch.chdir(project)
        assert (workspace / "data/images/manifest.json").is_file()
    assert len(list((project / path / "cats").iterdir())) == 8
    shutil.rmtree(project / path)


def test_an_experiment_has_all_of_a_folder_that_git_tracks_in_part(project: Path) -> None:
    draw(project / "pics", ("cats",))
    git(project, "add", "--force", "pics")
    draw(project / "pics", ("dogs",))
    draw(project / "pics" / "dogs", ("puppies",))
    name(project, folder("pics"))
    files = [("images.source.root", "pics")]
    with experiments.workspace(project, {"images.seed": 7}, "seven", files) as workspace:
        for each in (project, workspace):
            assert len(list((each / "pics").rglob("*.png"))) == 24
        assert not (workspace / "pics" / "dogs").is_symlink()
        assert git(workspace, "status", "--porcelain", "--untracked-files=no", "pics") == ""


def test_every_file_that_parameters_name_is_known_at_every_setting(project: Path) -> None:
    rule = {"role": "all", "init": "from_checkpoint", "path": "warm.pt", "sha256": "0" * 64}
    sources = [{**folder(path)["images.source"], "validation_root": "held_out"} for path in ("pics", "/more")]
    pretrained = {"kind": "pretrained", "path": "weights/vae", "revision": None, "latent_channels": 4, "downsample": 4}
    values = {
        "study.strategies": ["adaln_zero", "warm"],
        "study.factors": {"images.source.root": {"one": "pics", "other": "/more"}},
        "images.source": sources[0],
        "autoencoder": {**pretrained, "threads": 1, "device": "cpu"},
        "evaluate.reference": "reference.npz",
        "strategies": {"warm": {"description": "", "source": "", "rules": [rule]}},
    }
    name(project, values)
    assert set(named_files.named_anywhere(config.load())) == {
        ("images.source.root", "pics"),
        ("images.source.root", "/more"),
        ("images.source.validation_root", "held_out"),
        ("autoencoder.path", "weights/vae"),
        ("evaluate.reference", "reference.npz"),
        ("strategies.warm.rules[0].path", "warm.pt"),
    }


def test_shards_are_linked_one_by_one_and_absolute_paths_not_at_all(tmp_path: Path) -> None:
    home, copy = tmp_path / "home", tmp_path / "copy"
    (home / "data").mkdir(parents=True)
    (copy / "data").mkdir(parents=True)
    for index in range(3):
        (home / "data" / f"{index}.tar").write_text("")
    named_files.link({"images.source.shards": "data/{0..1}.tar", "features.weights": str(home / "data")}, home, copy)
    assert sorted(path.name for path in (copy / "data").iterdir()) == ["0.tar", "1.tar"]
    assert sorted(path.name for path in copy.iterdir()) == ["data"]


@pytest.mark.parametrize("path", [".", "data", "runs/"])
def test_a_folder_in_which_stages_write_is_never_linked(tmp_path: Path, path: str) -> None:
    home, copy = tmp_path / "home", tmp_path / "copy"
    for folder in ("data", "runs"):
        (home / folder).mkdir(parents=True)
    copy.mkdir()
    with pytest.raises(ConfigError, match=r"images\.source\.root = .*stages write their results there"):
        named_files.link({"images.source.root": path}, home, copy)
    assert list(copy.iterdir()) == []


def test_a_copy_that_dvc_made_reads_from_the_project_too(project: Path) -> None:
    """`dvc exp run --temp` copies only what git and DVC track."""
    draw(project / "pics")
    copy = project / ".dvc" / "tmp" / "exps" / "standalone" / "tmp1"
    copy.mkdir(parents=True)
    params = config.load().with_values(folder("pics"))
    named_files.link_from_home(params, copy)
    assert (copy / "pics" / "cats" / "0.png").is_file()
    draw(project.parent / "outside")
    with pytest.raises(ConfigError, match=r"images.source.root = ../outside: leads out of the project.*absolute path"):
        named_files.link_from_home(params.with_values(folder("../outside")), copy)
    named_files.link_from_home(params.with_values(folder("pics")), project)
    assert not (project / "pics").is_symlink()


def test_what_dvc_can_restore_need_not_be_here(project: Path, tmp_path: Path) -> None:
    draw(project / "pics")
    name(project, folder("pics"))
    assert command(project, "dvc", "repro", "--quiet", "images").returncode == 0
    name(project, {})
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "--quiet", str(project), str(clone))
    nothing, lacks = refusal(clone).split("\n")
    assert nothing.startswith("params.yaml: images.source.root = pics: no such folder")
    assert "1 result that DVC's cache on this machine lacks" in lacks
    assert "`dvc pull`" in lacks
    dag.dvc(clone, "cache", "dir", "--local", str(project / ".dvc" / "cache"))
    assert refusal(clone) == ""
    name(clone, {"train.steps": 64})  # stage design runs, and says of images what it said before
    assert refusal(clone) == ""
    assert command(clone, "dvc", "repro", "--quiet", "images").returncode == 0
    assert (clone / "data/images/manifest.json").read_bytes() == (project / "data/images/manifest.json").read_bytes()
    name(clone, {"images.seed": 1})
    assert refusal(clone).startswith("params.yaml: images.source.root = pics: no such folder")


def test_inputs_that_dvc_tracks_are_told_with_the_command_that_brings_them(project: Path, tmp_path: Path) -> None:
    (project / ".gitignore").write_text((project / ".gitignore").read_text().replace("/pics/\n", ""))
    draw(project / "pics")
    dag.dvc(project, "add", "--quiet", "pics")
    (project / "warm.pt").write_bytes(b"weights")
    dag.dvc(project, "add", "--quiet", "warm.pt")
    name(project, {**folder("pics"), "evaluate.reference": "warm.pt"})
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "--quiet", str(project), str(clone))
    told = "images.source.root = pics: tracked by DVC, and not here yet; expected `dvc {} pics.dvc`, which brings it"
    assert refusal(clone) == f"params.yaml: {told.format('pull')}"
    checked = {finding.where: finding for finding in preflight.check(clone, config.load(clone / "params.yaml"))}
    assert checked["evaluate.reference = warm.pt"].severity == "error"
    dag.dvc(clone, "cache", "dir", "--local", str(project / ".dvc" / "cache"))
    assert refusal(clone) == f"params.yaml: {told.format('checkout')}"
    dag.dvc(clone, "checkout", "--quiet", "pics.dvc")
    assert refusal(clone) == ""
    assert told_of_pictures(clone) == []
    (clone / "pics/cats/0.png").unlink()
    assert told_of_pictures(clone) == ["holds 15 files, and DVC tracks 16"]
