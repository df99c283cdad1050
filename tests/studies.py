"""Studies for tests: parameters of a micro study, and commands as a person types them."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked

from dit import config
from dit.config import Params
from dit.data.images import ImageStore
from pipelines import design
from pipelines.overrides import override
from pipelines.stages.entry import Stage

ROOT = Path(__file__).parents[1]
Read = Callable[..., ImageStore]
"""The type of fixture `read`."""
ONE_SETTING: dict[str, Any] = {"study.factors": {}, "study.declared": [], "study.sample": "all"}
"""A study without factors in which every run is sampled."""
MICRO: dict[str, Any] = {
    **ONE_SETTING,
    "study.strategies": ["adaln_zero", "symmetric"],
    "study.seeds": [0, 1],
    "images.size": 16,
    "images.source.train_per_class": 8,
    "images.source.validation_per_class": 4,
    "autoencoder.channels": [8, 8, 8],
    "autoencoder.steps": 2,
    "autoencoder.threads": 1,
    "latents.threads": 1,
    "model.name": "DiT-Micro/2",
    "analyse.steps": 3,
    "analyse.batch_size": 4,
    "analyse.widths": [64, 128],
    "train.steps": 60,
    "train.batch_size": 8,
    "train.log_every": 10,
    "train.diagnose_every": 20,
    "train.validate_every": 20,
    "train.validation.samples": 16,
    "train.checkpoint_every": 4,
    "evaluate.num_samples": 8,
    "evaluate.steps": 2,
    "evaluate.kernel_subset_size": 4,
    "evaluate.kernel_subsets": 2,
    "evaluate.nearest_k": 2,
    "evaluate.grid_rows": 1,
    "features.size": 32,
}
STAGES = 16
"""How many stages the micro study has."""

HUB: dict[str, Any] = {
    "kind": "huggingface",
    "config": None,
    "image_column": "image",
    "label_column": "label",
    "train_split": "train",
    "validation_split": None,
    "validation_fraction": 0.25,
}
"""An image source for the `datasets` library, without its `path`, which each test adds."""


def micro_project(root: Path) -> Path:
    """Copy all files that git does not ignore to `root`, with parameters of a micro study that has not run yet, and commit."""
    for name in git(ROOT, "ls-files", "--cached", "--others", "--exclude-standard", "-z").split("\0"):
        if name and (ROOT / name).is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, root / name)
    (root / "dvc.lock").unlink(missing_ok=True)
    (root / "params.yaml").write_text(override((root / "params.yaml").read_text(), MICRO))
    design.write(root, config.load(root / "params.yaml"))
    git(root, "init", "--quiet")
    git(root, "add", ".")
    git(root, "commit", "--quiet", "--message", "micro")
    return root


def failing_stages(marks: str) -> str:
    """Stages for a dvc.yaml: `wrong`, which notes each attempt in the folder `marks` and fails, and `below`, which needs it."""
    return f"""
  wrong:
    cmd: "echo attempt >> {marks}/attempts; echo 'error: params.yaml: it is wrong' >&2; exit 2"
    deps: [params.yaml]
    outs: [wrong]
  below:
    cmd: cp wrong below
    deps: [wrong]
    outs: [below]
"""


def command(root: Path, *arguments: str, fresh: bool = False, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m ARGUMENTS` in `root` as a person would; the result has stdout and stderr together.

    A command of this project is forked from a process that has imported the libraries (`forked.py`). If `fresh`, Python starts
    anew; at least one test starts each command so.
    """
    if not fresh and arguments[0] in ("pipelines", "dit.cli"):
        return forked.run(root, arguments, environment(root) | variables)
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=root,
        env=environment(root) | variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def environment(root: Path) -> dict[str, str]:
    """This process's environment variables without settings of Prefect, MLflow, DVC or `DIT_...`; `python` is this interpreter.

    `MPLCONFIGDIR` and torch's cache are left out too, because `import pipelines` has set them to folders of this process.
    """
    settings = ("PREFECT", "MLFLOW", "DVC", "DIT", "MPLCONFIGDIR", "TORCHINDUCTOR_CACHE_DIR")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(settings)}
    own = {"PYTHONPATH": str(root if (root / "pipelines").exists() else ROOT), "DVC_SITE_CACHE_DIR": str(root.parent / "site")}
    return {**kept, **own, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}


def run_stage(stage: Stage, params: Params, key: str = design.ALL) -> None:
    """Run one stage of the study in this process; it reads and writes in the working directory."""
    item = design.item_named(params, stage.__name__, key)
    stage(params.with_values(item.setting.levels), item)


def git(root: Path, *arguments: str) -> str:
    person = ["-c", "user.name=t", "-c", "user.email=t@t"]
    return subprocess.run(["git", *person, *arguments], cwd=root, check=True, capture_output=True, text=True).stdout


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
