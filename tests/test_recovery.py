"""What a killed process or a bad disk leaves behind is mended by the next study, without hands: on a small DVC project."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from dvc import rwlock
from dvc.fs import LocalFileSystem
from hypothesis import given, settings, strategies as st
from studies import command, git

from dit import yamlfile
from pipelines import recovery

STAGES = """
stages:
  data:
    cmd: mkdir -p out && cp source.txt out/data && echo ran >> log
    deps: [source.txt]
    outs: [out/data]
  train:
    foreach: [a, b, c]
    do:
      cmd: mkdir -p out/${item} && cp out/data out/${item}/weights && echo ran >> log
      deps: [out/data]
      outs: ["out/${item}"]
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DVC project whose stages data, train@a, train@b and train@c have run, with the copy of its `dvc.lock`."""
    root = tmp_path_factory.mktemp("template") / "project"
    root.mkdir()
    (root / "dvc.yaml").write_text(STAGES)
    (root / "source.txt").write_text("source\n")
    (root / ".gitignore").write_text("/.scratch\n/log\n")
    git(root, "init", "--quiet")
    for arguments in (["init", "--quiet"], ["repro", "--quiet"]):
        done = command(root, "dvc", *arguments)
        assert done.returncode == 0, done.stdout
    recovery.keep_lock(root)
    return root


@pytest.fixture
def project(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of `finished`."""
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path / "site"))
    return shutil.copytree(finished, tmp_path / "project")


def test_a_lock_that_was_cut_off_anywhere_is_restored(finished: Path) -> None:
    whole = (finished / "dvc.lock").read_bytes()

    @settings(deadline=None, max_examples=100)
    @given(st.integers(0, len(whole) - 1), st.booleans())
    def restored(length: int, at_line: bool) -> None:
        with TemporaryDirectory() as name:
            root = Path(name)
            shutil.copytree(finished / ".scratch", root / ".scratch")
            end = whole.rfind(b"\n", 0, length) + 1 if at_line else length
            (root / "dvc.lock").write_bytes(whole[:end])
            said: list[str] = []
            recovery.restore_lock(root, said.append)
            assert (root / "dvc.lock").read_bytes() == whole
            assert len(said) == 1

    restored()


def test_whatever_else_is_in_a_damaged_lock_the_study_goes_on(finished: Path) -> None:
    @settings(deadline=None, max_examples=50)
    @given(st.binary(max_size=300), st.booleans())
    def usable(garbage: bytes, kept: bool) -> None:
        with TemporaryDirectory() as name:
            root = Path(name)
            if kept:
                shutil.copytree(finished / ".scratch", root / ".scratch")
            (root / "dvc.lock").write_bytes(garbage)
            recovery.restore_lock(root, lambda _text: None)
            if kept:
                assert (root / "dvc.lock").read_bytes() == (finished / "dvc.lock").read_bytes()
            else:
                assert not (root / "dvc.lock").exists()

    usable()


def test_what_was_done_since_the_copy_is_rescued_and_the_rest_is_found_in_the_cache(project: Path) -> None:
    whole = yamlfile.read(project / "dvc.lock")
    kept = project / recovery.KEPT
    kept.write_text("".join(kept.read_text().partition("  train@b:")[:1]))
    text = (project / "dvc.lock").read_text()
    (project / "dvc.lock").write_text(text[: text.index("train@c") + 40])
    recovery.restore_lock(project, print)
    assert yamlfile.read(project / "dvc.lock")["stages"].keys() == {"data", "train@a", "train@b"}
    (project / "log").unlink()
    assert command(project, "dvc", "repro").returncode == 0
    assert not (project / "log").exists()
    assert yamlfile.read(project / "dvc.lock") == whole


def test_a_lock_that_is_whole_is_left_alone(project: Path) -> None:
    whole = (project / "dvc.lock").read_text()
    for text in (whole, whole.replace("size: 7", "size: 8"), whole.replace("train@b", "train@d")):
        (project / "dvc.lock").write_text(text)
        recovery.restore_lock(project, pytest.fail)
        assert (project / "dvc.lock").read_text() == text
    (project / "dvc.lock").unlink()
    recovery.restore_lock(project, pytest.fail)
    assert not (project / "dvc.lock").exists()


@pytest.mark.parametrize("delay", [0.0, 0.3])
def test_a_dvc_that_is_killed_while_it_writes_leaves_its_lock_files_whole(project: Path, delay: float) -> None:
    """Writing is made slow, so that the kill hits it; whatever the moment, the file is the old or the new one."""
    program = (
        "import sys, time; sys.argv = ['dvc', 'repro', '--force']\n"
        "from pipelines import atomic_dvc; from ruamel.yaml.emitter import Emitter\n"
        "whole = Emitter.emit\n"
        "slow = lambda self, event: [open('writing', 'w').close(), time.sleep(0.004), whole(self, event)]\n"
        "Emitter.emit = slow; atomic_dvc.install(); from dvc.cli import main; main(sys.argv[1:])"
    )
    (project / "source.txt").write_text("edited\n")
    paths = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    running = subprocess.Popen([sys.executable, "-c", program], cwd=project, env={**os.environ, "PYTHONPATH": paths})
    wait_until((project / "writing").exists)
    time.sleep(delay)
    running.kill()
    running.wait()
    assert yamlfile.read(project / "dvc.lock")["stages"].keys() == {"data", "train@a", "train@b", "train@c"}
    recovery.workspace(project, lambda said: None)
    assert command(project, "dvc", "repro").returncode == 0
    assert (project / "out/c/weights").read_text() == "edited\n"


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"write": {"x": 3}}', '{"read": {"x": [{"pid": "no", "cmd": ""}]}}', "\x00\xff"]
)
def test_a_damaged_list_of_files_in_use_is_begun_anew(project: Path, text: str) -> None:
    (project / ".dvc/tmp/rwlock").write_text(text)
    said: list[str] = []
    recovery.release_rwlock(project, said.append)
    assert len(said) == 1
    assert command(project, "dvc", "repro").returncode == 0


def test_a_list_of_files_in_use_of_which_any_bit_is_flipped_can_be_read_by_dvc_again(project: Path) -> None:
    holder = {"pid": os.getpid(), "cmd": "dvc repro"}
    whole = json.dumps({"write": {str(project / "out/a"): holder}, "read": {str(project / "out/data"): [holder]}}).encode()
    path = project / ".dvc/tmp/rwlock"

    @settings(deadline=None, max_examples=200)
    @given(st.integers(0, 8 * len(whole) - 1))
    def readable(bit: int) -> None:
        path.write_bytes(bytes(byte ^ (1 << bit % 8) * (place == bit // 8) for place, byte in enumerate(whole)))
        recovery.release_rwlock(project, lambda said: None)
        with rwlock._edit_rwlock(str(path.parent), LocalFileSystem(), False):
            pass

    readable()


def test_a_file_is_not_in_use_by_a_process_that_only_has_the_id_of_a_dvc(project: Path) -> None:
    other = subprocess.Popen(["sleep", "60"])
    dvc = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", "dvc"])
    held = {
        str(project / "out"): {"pid": other.pid, "cmd": "dvc repro"},
        str(project / "elsewhere"): {"pid": dvc.pid, "cmd": "dvc repro"},
    }
    (project / ".dvc/tmp/rwlock").write_text(json.dumps({"write": held, "read": {}}))
    said: list[str] = []
    try:
        recovery.release_rwlock(project, said.append)
        assert said == ["files that an earlier DVC left marked as in use are free again"]
        left = json.loads((project / ".dvc/tmp/rwlock").read_text())
        assert left == {"write": {str(project / "elsewhere"): held[str(project / "elsewhere")]}, "read": {}}
        assert command(project, "dvc", "repro", "--force").returncode == 0
    finally:
        for process in (other, dvc):
            process.kill()
            process.wait()


def wait_until(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
