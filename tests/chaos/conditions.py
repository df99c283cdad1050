"""The conditions under which a study runs: as an ordinary user, on a disk that fills up, with little memory, and others.

A condition is a context manager. It prepares the study, yields a function that disturbs the study once whenever it is called,
and cleans up when the block ends.
"""

from __future__ import annotations

import os
import random
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from studies import environment, free_port

from chaos.micro import NOBODY, SOMEBODY, Study, differences

Hit = Callable[[subprocess.Popen[str]], str | None]
"""Disturbs the running study as the condition demands, and returns what it did, or None if it could do nothing."""
Condition = Callable[[Study, random.Random], AbstractContextManager[Hit]]

CGROUP = Path("/sys/fs/cgroup/memory")
DISK_MEGABYTES = 600
LONGEST_START = 60.0


def _nothing(_process: subprocess.Popen[str]) -> str | None:
    return None


@contextmanager
def plain(_study: Study, _draws: random.Random) -> Iterator[Hit]:
    """No special condition: the study is only disturbed as under every other condition."""
    yield _nothing


@contextmanager
def ordinary_user(study: Study, _draws: random.Random) -> Iterator[Hit]:
    """The study runs as a user who is not root and has no home; a hit makes `runs` read-only for up to 20 s."""
    study.own(NOBODY)
    study.variables |= {"HOME": "/nonexistent", "XDG_CACHE_HOME": "", "XDG_CONFIG_HOME": ""}
    study.variables["DVC_SITE_CACHE_DIR"] = str(study.root / ".scratch" / "site")

    def hit(process: subprocess.Popen[str]) -> str | None:
        folder = study.root / "runs"
        if not folder.exists() or not folder.stat().st_mode & 0o200:
            return None
        folder.chmod(0o555)
        with suppress(subprocess.TimeoutExpired):
            process.wait(20)
        folder.chmod(0o755)
        return "runs/ read-only"

    yield hit


JUMPING = """
import time
from pathlib import Path
offset, now, now_ns = Path(__file__).with_name("offset"), time.time, time.time_ns
time.time = lambda: now() + int(offset.read_text() or 0)
time.time_ns = lambda: now_ns() + int(offset.read_text() or 0) * 10**9
"""
"""A module `sitecustomize`, which every Python process imports when it starts (docs.python.org, module site)."""


@contextmanager
def jumping_clock(study: Study, draws: random.Random) -> Iterator[Hit]:
    """`time.time()` of every process of the study jumps to any time between three days ago and three days from now."""
    folder = study.root.with_name(f"{study.root.name}.clock")
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(JUMPING)
    offset = folder / "offset"
    offset.write_text("0")
    study.variables["PYTHONPATH"] = os.pathsep.join([str(folder), str(study.root)])

    def hit(_process: subprocess.Popen[str]) -> str | None:
        offset.write_text(str(draws.randint(-3 * 86400, 3 * 86400)))
        return "clock jumps"

    yield hit


@contextmanager
def little_memory(study: Study, _draws: random.Random) -> Iterator[Hit]:
    """A control group limits the study to the memory that it already uses, so the kernel kills a process that needs more."""
    group = CGROUP / f"chaos-{os.getpid()}-{study.root.name}"
    group.mkdir()
    limit = group / "memory.limit_in_bytes"

    def hit(process: subprocess.Popen[str]) -> str | None:
        with suppress(psutil.Error, OSError):
            for each in (*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)):
                (group / "cgroup.procs").write_text(str(each.pid))
        killed = _kills(group)
        for _ in range(50):
            in_use = int((group / "memory.usage_in_bytes").read_text())
            with suppress(OSError):
                limit.write_text(str(max(in_use, 1 << 20)))
            time.sleep(0.1)
            if _kills(group) > killed or process.poll() is not None:
                break
        limit.write_text("-1")
        return "killed by the kernel for memory" if _kills(group) > killed else None

    yield hit
    with suppress(OSError):
        group.rmdir()


def _kills(group: Path) -> int:
    return int((group / "memory.oom_control").read_text().split("oom_kill ")[1])


@contextmanager
def small_disk(study: Study, draws: random.Random) -> Iterator[Hit]:
    """The study has a disk of its own, which another program fills up for some seconds."""
    copy = study.root.with_name(f"{study.root.name}.copy")
    study.root.rename(copy)
    study.root.mkdir()
    options = ["-o", f"size={DISK_MEGABYTES}m,mode=755"]
    subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", str(study.root)], check=True)
    shutil.copytree(copy, study.root, symlinks=True, dirs_exist_ok=True)

    def hit(process: subprocess.Popen[str]) -> str | None:
        filler = study.root / "filler"
        until = time.monotonic() + draws.uniform(2, 10)
        with filler.open("wb") as file, suppress(OSError):
            while time.monotonic() < until and process.poll() is None:
                with suppress(OSError):
                    file.write(bytes(1 << 20))
                    file.flush()
                    continue
                time.sleep(0.01)
        filler.unlink()
        return "disk full"

    try:
        yield hit
    finally:
        shutil.rmtree(copy)
        kept = study.outputs()
        study.outputs = lambda: kept  # type: ignore[method-assign]
        subprocess.run(["umount", "--lazy", str(study.root)], check=True)


@contextmanager
def server_that_goes(study: Study, _draws: random.Random) -> Iterator[Hit]:
    """The tracking server is killed while the study runs. Afterwards it is started again, and must take the runs."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    store = study.root.parent / f"{study.root.name}.mlflow"
    server = _serve(store, port)
    study.variables["MLFLOW_TRACKING_URI"] = address

    def hit(_process: subprocess.Popen[str]) -> str | None:
        if server.poll() is not None:
            return None
        _end(server)
        return "tracking server killed"

    yield hit
    _end(server)
    again = _serve(store, port)
    try:
        code = study.start("mlflow").wait(300)
    finally:
        _end(again)
        shutil.rmtree(store)
    if code:
        raise AssertionError(f"`python -m pipelines mlflow` ended with {code} though the server is there again")


def _serve(store: Path, port: int) -> subprocess.Popen[bytes]:
    store.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{store}/mlflow.db", "--artifacts-destination", str(store / "artifacts")]
    server = subprocess.Popen(
        command, cwd=store, env=environment(store), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    until = time.monotonic() + LONGEST_START
    while time.monotonic() < until:
        with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
            return server
        time.sleep(0.2)
    raise RuntimeError("the tracking server did not start")


def _end(server: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(server.pid, 9)
    server.wait()


@contextmanager
def server_that_drips(study: Study, _draws: random.Random) -> Iterator[Hit]:
    """The tracking server accepts connections, but sends only one byte every five seconds."""

    def answer(connection: socket.socket) -> None:
        with connection, suppress(OSError):
            while True:
                connection.sendall(b"H")
                time.sleep(5)

    def serve(listening: socket.socket) -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=answer, args=(listening.accept()[0],), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=serve, args=(listening,), daemon=True).start()
        study.variables["MLFLOW_TRACKING_URI"] = f"http://127.0.0.1:{listening.getsockname()[1]}"
        yield _nothing


@contextmanager
def two_studies(study: Study, _draws: random.Random) -> Iterator[Hit]:
    """Somebody starts the same study again while it runs; this second start must be refused with one line."""

    def hit(process: subprocess.Popen[str]) -> str | None:
        second = Study(study.root, study.log.with_suffix(".second.log"), study.variables, study.user)
        code = second.start().wait(120)
        if process.poll() is None and (code == 0 or second.said().count("\n") != 1):
            raise AssertionError(f"a second study beside the first ended with {code}: {second.said()[-500:]}")
        second.log.unlink()
        return "second study"

    yield hit


READ = """
import os, sys
for path in sys.argv[1:]:
    for mode in ("rb", "r+b"):
        try:
            open(path, mode)
            print(mode, path)
        except OSError:
            pass
"""
"""A program that prints which of the given files its user can read or write."""
PRIVATE = (".scratch/services/**/*", ".scratch/prefect/**/*", ".dvc/tmp/site/**/*")
"""Files that no other user may read or write."""


@contextmanager
def two_users(study: Study, _draws: random.Random) -> Iterator[Hit]:
    """Another user runs the same study in another folder at the same time. Neither may access the other's private files."""
    before = _own_files(NOBODY, SOMEBODY)
    other = Study(study.root.with_name(f"{study.root.name}.other"), study.log.with_suffix(".other.log"))
    shutil.copytree(study.root, other.root, symlinks=True)
    for each, user in ((study, NOBODY), (other, SOMEBODY)):
        each.own(user)
        each.variables |= {
            "USER": str(user),
            "DVC_SITE_CACHE_DIR": "",
            "HOME": str(each.root / ".scratch"),
            "XDG_CACHE_HOME": "",
        }
    process = other.start()
    yield _nothing
    if process.wait():
        raise AssertionError(f"the study of another user ended with an error: {other.said()[-500:]}")
    if different := differences(study.outputs(), other.outputs()):
        raise AssertionError(f"the study of another user has other outputs: {different[:5]}")
    for own, reader in ((study, SOMEBODY), (other, NOBODY)):
        files = [str(file) for pattern in PRIVATE for file in own.root.glob(pattern) if file.is_file()]
        script = [sys.executable, "-c", READ, *files]
        who: dict[str, Any] = {"user": reader, "group": reader, "extra_groups": []}
        told = subprocess.run(script, **who, capture_output=True, text=True, check=False)
        if not files or told.returncode or told.stdout:
            raise AssertionError(f"another user gets at {told.stdout or told.stderr or 'nothing, since there is none'}")
    if left := _own_files(NOBODY, SOMEBODY) - before:
        raise AssertionError(f"left in folders that all users share: {sorted(left)[:5]}")
    shutil.rmtree(other.root)


def _own_files(*users: int) -> set[str]:
    """Paths that belong to these users in folders that all users of the machine can write."""
    places = [Path(name) for name in ("/tmp", "/var/tmp", "/dev/shm")]
    there = [each for place in places if place.is_dir() for each in (*place.glob("*"), *place.glob("dvc/repo/*"))]
    return {str(each) for each in there if each.lstat().st_uid in users}


CONDITIONS: dict[str, Condition] = {
    "plain": plain,
    "ordinary user": ordinary_user,
    "jumping clock": jumping_clock,
    "little memory": little_memory,
    "small disk": small_disk,
    "server that goes": server_that_goes,
    "server that drips": server_that_drips,
    "two studies": two_studies,
    "two users": two_users,
}


def possible() -> list[str]:
    """The conditions that can be created on this machine: some need root, or a control group."""
    root = os.geteuid() == 0
    needs = {
        "ordinary user": root and _runs_python(NOBODY),
        "two users": root and _runs_python(NOBODY),
        "small disk": root,
        "little memory": root and os.access(CGROUP / "cgroup.procs", os.W_OK),
    }
    return [name for name in CONDITIONS if needs.get(name, True)]


def _runs_python(user: int) -> bool:
    """Whether another user may run this interpreter: not if it is in a home that others cannot enter."""
    with suppress(PermissionError):
        return subprocess.run([sys.executable, "-c", ""], user=user, group=user, extra_groups=[], check=False).returncode == 0
    return False
