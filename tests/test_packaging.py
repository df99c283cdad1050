"""The wheel, installed beside its declared dependencies alone, gives `dit`: no tool of the workflow is needed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from studies import ROOT

HELP_SECONDS = 1.0
"""CPU time that `dit --help` may take."""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Folders for `PYTHONPATH`: one with the wheel of this working tree, one with links to what it requires."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(folder / "wheel")]
    subprocess.run([*pip, str(wheel)], check=True)
    (folder / "links").mkdir()
    for required in closure(Distribution.at(next((folder / "wheel").glob("*.dist-info")))):
        link(required, folder / "links")
    return [folder / "wheel", folder / "links"]


def closure(package: Distribution) -> Iterator[Distribution]:
    """The installed distributions that a package requires without extras, what they require, and so on."""
    seen: set[tuple[str, str]] = set()
    waiting = [(package, "")]
    while waiting:
        current, extra = waiting.pop()
        for line in current.requires or ():
            required = Requirement(line)
            if required.marker and not required.marker.evaluate({"extra": extra}):
                continue
            for wanted in ("", *required.extras):
                if (required.name, wanted) not in seen:
                    seen.add((required.name, wanted))
                    try:
                        found = distribution(required.name)
                    except PackageNotFoundError:  # it is for another kind of machine, such as a GPU's
                        continue
                    waiting.append((found, wanted))
                    yield found


def link(package: Distribution, folder: Path) -> None:
    """Make what an installed distribution consists of importable from `folder`."""
    for top in {file.parts[0] for file in package.files or () if file.parts[0] not in ("..", "__pycache__")}:
        if not (folder / top).exists():
            (folder / top).symlink_to(package.locate_file(top))  # type: ignore[arg-type]


def python(installed: list[Path], folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python in an empty folder, with nothing to import but what is installed beside the wheel."""
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder), "PYTHONPATH": os.pathsep.join(map(str, installed))}
    command = [sys.executable, "-S", "-P", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def dit(installed: list[Path], folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command `dit` in the same way."""
    return python(installed, folder, str(installed[0] / "bin" / "dit"), *arguments)


def test_help_is_quick_and_names_every_command(installed: list[Path], tmp_path: Path) -> None:
    before = os.times()
    done = dit(installed, tmp_path, "--help")
    after = os.times()
    assert done.returncode == 0, done.stderr
    for command in ("check", "init", "wakeup", "audit", "sample", "evaluate", "export", "resume-from"):
        assert f" {command} " in done.stdout
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    assert cpu < HELP_SECONDS


def test_version(installed: list[Path], tmp_path: Path) -> None:
    assert dit(installed, tmp_path, "--version").stdout.startswith("dit 0.")


@pytest.mark.parametrize(
    "arguments",
    [
        ("audit", "diffusers:DiTTransformer2DModel"),
        ("audit", "strategy:adaln_zero"),
        ("init", "--diff", "adaln_zero", "head_xavier"),
        ("wakeup", "adaln_zero"),
    ],
)
def test_networks_are_looked_at_without_a_study(installed: list[Path], tmp_path: Path, arguments: tuple[str, ...]) -> None:
    done = dit(installed, tmp_path, *arguments)
    assert done.returncode == 0, done.stderr


def test_what_needs_more_says_what_to_install(installed: list[Path], tmp_path: Path) -> None:
    done = dit(installed, tmp_path, "plan")
    assert (done.returncode, done.stderr) == (2, "error: dvc is not installed; run `pip install 'dit-init-lab[workflow]'`\n")


API = """
import numpy as np

import dit

latents = np.random.default_rng(0).standard_normal((60, 4, 8, 8), dtype=np.float32)
run = dit.train("DiT-Micro/2", latents, np.arange(60) % 2, steps=2)
assert dit.sample(run.model, labels=[0, 1], steps=2).shape == (2, 4, 8, 8)
print(dit.audit_model(run.model).verdict)
"""


def test_the_python_api_works(installed: list[Path], tmp_path: Path) -> None:
    done = python(installed, tmp_path, "-c", API)
    assert done.returncode == 0, done.stderr
    assert "adaLN-Zero" in done.stdout
