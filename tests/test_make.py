"""What a person gives `make` arrives as it was given."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from pipelines.__main__ import Engine, app

ROOT = Path(__file__).parents[1]
RECORDER = f"""#!{sys.executable}
import json, os, sys
names = ("DIT_SET", "DIT_PROFILE", "DIT_WORKERS", "DIT_TARGETS", "DIT_ENGINE", "RAY_ADDRESS", "PREFECT_PORT")
print(json.dumps([sys.argv[1:], {{name: os.environ.get(name, "") for name in names}}]))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The Makefile, with an interpreter that tells what it was given."""
    for name in ("Makefile", "pyproject.toml", "requirements.lock"):
        shutil.copy(ROOT / name, tmp_path / name)
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(RECORDER)
    python.chmod(0o755)
    (tmp_path / ".venv/installed").touch()
    return tmp_path


def make(folder: Path, *arguments: str, **variables: str) -> tuple[list[str], dict[str, str]]:
    """The arguments and the variables that the interpreter was given."""
    given = (
        "SET",
        "PROFILE",
        "TARGETS",
        "WORKERS",
        "TESTS",
        "BENCH",
        "PREFECT_PORT",
        "MLFLOW_PORT",
        "MAKE",
        "MFLAGS",
        "DIT_",
        "ENGINE",
        "RAY_",
    )
    kept = {name: value for name, value in os.environ.items() if not name.startswith(given)}
    done = subprocess.run(
        ["make", "--silent", *arguments], cwd=folder, env=kept | variables, capture_output=True, text=True, check=True
    )
    received, environment = json.loads(done.stdout.splitlines()[-1])
    return received, {name: value for name, value in environment.items() if value}


@pytest.mark.parametrize(
    "text",
    [
        "train.steps=300 study.seeds=[0]",
        "study.name=it's",
        "a='; touch broken; '",
        'a="; touch broken; "',
        "a=$(touch broken) b=`touch broken` c=$(shell touch broken) d=$HOME",
        "a=* b=\\ c=#d",
    ],
)
def test_no_text_is_taken_for_a_command(folder: Path, text: str) -> None:
    assert make(folder, "study", f"SET={text}") == (["-m", "pipelines", "study"], {"DIT_SET": text})
    assert make(folder, "study", SET=text)[1] == {"DIT_SET": text}
    names = {"PROFILE": "DIT_PROFILE", "WORKERS": "DIT_WORKERS", "TARGETS": "DIT_TARGETS", "ENGINE": "DIT_ENGINE"}
    assert make(folder, "study", *(f"{name}={text}" for name in names))[1] == dict.fromkeys(names.values(), text)
    assert make(folder, "up", f"PREFECT_PORT={text}") == (["-m", "pipelines", "up"], {"PREFECT_PORT": text})
    make(folder, "test", f"TESTS={text}", "CHROMIUM=true")
    assert not (folder / "broken").exists()


def test_study_takes_what_make_gives_it(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {
        "SET": "train.steps=300 study.seeds=[0]",
        "PROFILE": "gpu",
        "WORKERS": "2",
        "TARGETS": "train evaluate",
        "ENGINE": "ray",
    }
    expected = {
        "set_": ["train.steps=300", "study.seeds=[0]"],
        "profile": "gpu",
        "workers": "2",
        "targets": ["train", "evaluate"],
        "engine": Engine.RAY,
    }
    nothing = {**dict.fromkeys(expected), "engine": Engine.LOCAL}
    for values, wanted in ((given, expected), (dict.fromkeys(given, ""), nothing)):
        for name, value in values.items():
            monkeypatch.setenv(f"DIT_{name}", value)
        context = typer.main.get_command(app).commands["study"].make_context("study", [])  # type: ignore[attr-defined]
        assert {name: value or None for name, value in context.params.items()} == wanted
