"""Fixtures that several test files share: shipped parameters, small latents, small networks."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from studies import ONE_SETTING, Read, command, git, micro_project

from dit import config, models
from dit.data.images import ImageStore, load_images, write_images
from dit.data.latents import LatentStore
from dit.data.store import StoreWriter
from dit.models.dit.network import DiT
from dit.sections import ImagesParams
from pipelines import guard, services

ROOT = Path(__file__).parents[1]

os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # processes that tests start need not compile everything anew

collect_ignore = [] if torch.cuda.is_available() else ["test_fused_cuda.py"]

LONG = (
    "test_cluster.py",
    "test_flows.py",
    "test_distributed.py",
    "test_reruns.py",
    "test_deployment.py",
    "test_report.py",
    "test_gate.py",
    "test_exchange.py",
    "test_finished_study.py",
    "test_wakeup.py",
    "test_tracking.py",
    "test_preflight.py",
    "test_dag.py",
    "test_packaging.py",
    "test_warm.py",
)
"""Files that take longest: they come first, so that no worker ends with one of them while another has nothing to do."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests of `LONG` files first."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def params() -> config.Params:
    """The shipped parameters, of a study without factors in which every run is sampled."""
    return config.load(ROOT / "params.yaml").with_values(ONE_SETTING)


@pytest.fixture(scope="session")
def prefect_api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Where a Prefect server answers that studies of several tests share; a study without these variables starts its own.

    The first worker that needs it starts it, and ends it when no other worker uses it any more.
    """
    server = None
    with made_once("prefect", tmp_path_factory) as folder, pytest.MonkeyPatch.context() as patch:
        folder.mkdir(exist_ok=True)
        patch.chdir(folder)
        address, users = folder / "api.json", (folder / "users").open("w")
        if not address.exists():
            server = services.prefect_server({})
            server.wait()
            make_databases(folder / "databases")
            api = {name: server.environment[name] for name in ("PREFECT_API_URL", "PREFECT_API_AUTH_STRING")}
            address.write_text(json.dumps(api))
        fcntl.flock(users, fcntl.LOCK_SH)
        found = json.loads(address.read_text())
    yield found
    if server and server.process:
        with made_once("prefect", tmp_path_factory):
            address.unlink()
        fcntl.flock(users, fcntl.LOCK_EX)
        guard.stop(server.process)
    users.close()


def make_databases(folder: Path) -> None:
    """Fill a folder with the database of the Prefect server in the working directory, which is new, and one of MLflow.

    Both are as in the folder of a study. Prefect takes 15 s to make one, and MLflow 3 s.
    """
    from mlflow import MlflowClient  # takes seconds, which most tests need not wait

    if not folder.exists():
        prefect = folder / services.DATABASE
        prefect.parent.mkdir(parents=True, mode=0o700)
        prefect.touch(0o600)
        with closing(sqlite3.connect(services.DATABASE)) as made, closing(sqlite3.connect(prefect)) as copied:
            made.backup(copied)
        MlflowClient(f"sqlite:///{folder / 'mlflow.db'}").search_experiments()


@contextmanager
def made_once(name: str, factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The path of a file or folder that takes long to make: the worker that finds nothing there makes it, for all workers."""
    own = factory.getbasetemp()
    path = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / name
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield path


@pytest.fixture(scope="session")
def databases(prefect_api: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with databases of Prefect and MLflow that hold no runs; a project that is given a copy need not make them."""
    with made_once("prefect", tmp_path_factory) as folder:
        return folder / "databases"


@pytest.fixture(scope="session")
def first(databases: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The micro study, run once from nothing, then committed; and what the command printed. No test changes it."""
    with made_once("study", tmp_path_factory) as folder:
        root, said = folder / "project", folder / "said"
        if not said.exists():
            shutil.copytree(databases, micro_project(root), dirs_exist_ok=True)
            imports = root / ".scratch" / "imports"
            imports.mkdir(parents=True)
            paths = os.pathsep.join([str(root), str(ROOT / "tests" / "imports")])
            done = command(root, "pipelines", "study", fresh=True, PYTHONPATH=paths, IMPORTS_FOLDER=str(imports))
            assert done.returncode == 0, done.stdout
            git(root, "add", "dvc.lock", "design.yaml")
            git(root, "commit", "--quiet", "--message", "study")
            said.write_text(done.stdout)
    return root, said.read_text()


@pytest.fixture(scope="module")
def study(first: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the finished micro study, for the tests of one file."""
    return shutil.copytree(first[0], tmp_path_factory.mktemp("finished") / "project", symlinks=True)


@pytest.fixture(scope="session")
def latents(latents_directory: Path) -> LatentStore:
    """The store at `latents_directory`."""
    return LatentStore(latents_directory)


@pytest.fixture(scope="session")
def latents_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Smooth random latents of 3 classes, 48 for training and 24 for validation, with mirror images; 4 x 8 x 8."""
    directory = tmp_path_factory.mktemp("store") / "latents"
    item = (np.float32, (2, 4, 8, 8))
    splits = {"train": 48, "validation": 24}
    kinds = {"mean": item, "std": item, "labels": (np.int64, ())}
    writer = StoreWriter(directory, **{f"{split}_{kind}": spec for split in splits for kind, spec in kinds.items()})
    draws = np.random.default_rng(0)
    for split, count in splits.items():
        coarse = draws.standard_normal((count, 4, 2, 2), dtype=np.float32)
        fine = coarse.repeat(4, axis=2).repeat(4, axis=3)
        mean = np.stack([fine, fine[..., ::-1]], axis=1)
        writer.append(f"{split}_mean", mean)
        writer.append(f"{split}_std", np.full_like(mean, 0.05))
        writer.append(f"{split}_labels", np.arange(count) % 3)
    unit = {"shift": [0.0] * 4, "scale": [1.0] * 4}
    writer.close(class_names=["a", "b", "c"], num_classes=3, flip=True, normalize=unit)
    return directory


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """Reads a source, given as in params.yaml, into a fresh store."""

    def run(source: dict[str, Any], name: str = "store", **settings: Any) -> ImageStore:
        values = {"size": 16, "channels": 3, "seed": 0, "workers": 0, "max_rejected": 0.0, **settings}
        images = TypeAdapter(ImagesParams).validate_python({**values, "source": source})
        write_images(images, tmp_path / name)
        return load_images(tmp_path / name)

    return run


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on a disk of its own, of 12 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only an administrator may mount the small disk that this test fills")
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path / "site"))
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def micro() -> Callable[..., DiT]:
    """Builds the smallest named network for latents of 4 x 8 x 8 and 3 classes."""

    def build(learn_sigma: bool = True) -> DiT:
        return models.build("DiT-Micro/2", latent_size=8, latent_channels=4, num_classes=3, learn_sigma=learn_sigma)

    return build
