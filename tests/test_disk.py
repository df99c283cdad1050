"""A full disk is one message that says what to free; nothing half-written stays, and the next run goes on."""

from __future__ import annotations

import os
import sqlite3
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from studies import command, git

from dit import checkpoint, yamlfile
from dit.data.store import StoreWriter
from dit.errors import ConfigError
from pipelines import dag, disk
from pipelines.files import complete_directory
from pipelines.stages.entry import exit_codes


def by_sqlite(folder: Path) -> None:
    with sqlite3.connect(folder / "a.db") as database:
        database.execute("CREATE TABLE t (x BLOB)")
        database.execute("INSERT INTO t VALUES (?)", [bytes(20 << 20)])


def by_store(folder: Path) -> None:
    writer = StoreWriter(folder / "store", a=(np.uint8, ()))
    for _ in range(20):
        writer.append("a", np.zeros(1 << 20, np.uint8))


WRITES: dict[str, Callable[[Path], object]] = {
    "text": lambda folder: (folder / "a").write_text("x" * (20 << 20)),
    "safetensors": lambda folder: save_file({"a": torch.zeros(5 << 20)}, folder / "a"),
    "checkpoint": lambda folder: checkpoint.save(folder, {"a": torch.zeros(5 << 20)}),
    "picture": lambda folder: Image.fromarray(np.random.default_rng(0).integers(0, 256, (3000, 3000, 3), np.uint8)).save(
        folder / "a.png"
    ),
    "sqlite": by_sqlite,
    "store": by_store,
}


@pytest.mark.parametrize("name", WRITES)
def test_whatever_writes_on_a_full_disk_ends_with_one_message_and_leaves_what_was_there(
    small: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with complete_directory(small / "out") as out:
        (out / "first").touch()
    before = sorted(small.rglob("*"))
    with pytest.raises(SystemExit) as ended, exit_codes(), complete_directory(small / "out") as out:
        WRITES[name](out)
    assert ended.value.code == os.EX_TEMPFAIL
    assert sorted(small.rglob("*")) == before
    said = capsys.readouterr().err
    assert said.startswith("error: no space left on the disk of ")
    assert "`dvc gc --workspace`" in said
    assert said.count("\n") == 1


def test_a_checkpoint_that_has_no_room_leaves_those_before_it(small: Path) -> None:
    for step in (1, 2):
        checkpoint.save(small, {"step": step, "weights": torch.zeros(1 << 19)})
    before = {path: path.read_bytes() for path in small.iterdir()}
    assert len(before) == 2
    with pytest.raises(Exception) as error:  # noqa: PT011
        checkpoint.save(small, {"step": 3, "weights": torch.zeros(5 << 20)})
    assert disk.full_path(error.value) is not None
    assert {path: path.read_bytes() for path in small.iterdir()} == before
    found = checkpoint.load(small, torch.device("cpu"))
    assert found is not None
    assert found["step"] == 2


def test_a_stage_whose_output_has_no_room_in_the_cache_is_told_once_and_made_by_the_next_run(small: Path) -> None:
    (small / "dvc.yaml").write_text("stages:\n  a:\n    cmd: head -c 4000000 /dev/zero > a\n    outs: [a]\n")
    git(small, "init", "--quiet")
    assert command(small, "dvc", "init", "--quiet").returncode == 0
    with dag.Processes(small, {}) as processes:
        (small / "filler").write_bytes(bytes(6_500_000))
        with pytest.raises(dag.StageError, match="no space left on the disk of") as error:
            processes.run("a", print)
        assert error.value.exit_code == os.EX_TEMPFAIL
        assert not error.value.transient
        (small / "filler").unlink()
        processes.run("a", print)
        lock = (small / "dvc.lock").read_bytes()
        whole = subprocess.run(["df", "--output=avail", "-B1", str(small)], capture_output=True, text=True, check=True)
        (small / "filler").write_bytes(bytes(int(whole.stdout.split()[-1])))
        (small / "dvc.yaml").write_text((small / "dvc.yaml").read_text().replace("4000000", "40"))
        with pytest.raises(dag.StageError, match="no space left on the disk of"):
            processes.run("a", print)
        assert (small / "dvc.lock").read_bytes() == lock
        (small / "filler").unlink()
        processes.run("a", print)
    assert (small / "a").stat().st_size == 40
    assert yamlfile.read(small / "dvc.lock")["stages"]["a"]["outs"][0]["size"] == 40


def test_a_study_does_not_start_where_there_is_hardly_any_space(small: Path) -> None:
    done = command(small, "pipelines", "study")
    assert done.returncode == os.EX_TEMPFAIL
    assert done.stdout.startswith("error: no space left on the disk of ")
    assert done.stdout.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(28, "No space left on device"), True),
        (OSError(122, "Disk quota exceeded"), True),
        (RuntimeError("PytorchStreamWriter failed"), False),
        (sqlite3.OperationalError("database or disk is full"), True),
        (ConfigError("train.steps = 0"), False),
    ],
)
def test_a_full_disk_is_recognised_and_nothing_else_is_taken_for_it(error: Exception, full: bool) -> None:
    assert (disk.full_path(error) is not None) is full
