"""The local services come up whatever an earlier one left behind."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from studies import command

from dit.errors import UserError
from pipelines import databases, gate, services


def test_a_damaged_database_is_set_aside_and_a_good_one_is_not(tmp_path: Path) -> None:
    good = tmp_path / "good.db"
    with sqlite3.connect(good) as database:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("CREATE TABLE runs (name TEXT)")
        database.executemany("INSERT INTO runs VALUES (?)", [("x" * 500,)] * 100)
    database.close()
    whole = good.read_bytes()
    for damaged in (b"garbage" * 1000, whole[: len(whole) // 2], whole[:4096] + b"\xff" * 4096 + whole[8192:]):
        path = tmp_path / "prefect.db"
        path.write_bytes(damaged)
        said: list[str] = []
        databases.mend(path, said.append)
        assert len(said) == 1
        assert not path.exists()
        assert (tmp_path / "prefect.db.damaged").read_bytes() == damaged
    (tmp_path / "prefect.db").mkdir()
    databases.mend(tmp_path / "prefect.db", print)
    assert not (tmp_path / "prefect.db").exists()
    databases.mend(good, pytest.fail)
    assert good.read_bytes() == whole
    with sqlite3.connect(good) as busy:
        busy.execute("BEGIN EXCLUSIVE")
        databases.mend(good, pytest.fail)
    assert good.exists()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    services.private_folder(services.SERVICES)
    return tmp_path


DAMAGED = ["", "{", "[]", "{}", '{"name": "prefect", "pid": "7", "created": 0, "url": ""}', "\x00\x01"]


@pytest.mark.parametrize("text", DAMAGED)
def test_a_damaged_file_of_a_service_that_is_gone_is_removed(
    folder: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    file = services.SERVICES / "prefect.json"
    file.write_text(text)
    assert services.running() == {}
    assert not file.exists()
    assert capsys.readouterr().err.startswith(f"{file} was damaged and is removed; nothing")
    services.down(print)
    assert capsys.readouterr().out == "nothing was running\n"


def test_a_damaged_file_of_a_service_that_runs_is_written_anew(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [sys.executable, "-c", "import time; time.sleep(60)", "pipelines.gate:prefect", "--port", "4711"]
    running = subprocess.Popen(arguments, env={**os.environ, gate.PASSWORD: "study:secret"}, start_new_session=True)
    file = services.SERVICES / "prefect.json"
    file.write_text('{"name": "prefect", "pi')
    try:
        found = services.running()["prefect"]
        assert (found.pid, found.url, found.password) == (running.pid, "http://127.0.0.1:4711", "study:secret")
        assert json.loads(file.read_text())["pid"] == running.pid
        assert file.stat().st_mode & 0o077 == 0
        services.down(print)
        running.wait(60)
    finally:
        running.kill()
    assert "secret" not in "".join(capsys.readouterr())


def test_a_server_that_ends_at_once_is_told_at_once(folder: Path) -> None:
    ended = subprocess.Popen(["false"])
    server = services.PrefectServer(services.prefect_environment("http://127.0.0.1:9/api", "study:x"), ended)
    begun = time.monotonic()
    with pytest.raises(UserError, match=r"does not answer; see \.scratch/services"):
        server.wait()
    assert time.monotonic() - begun < 50


@pytest.mark.parametrize(
    ("ports", "message"),
    [
        (("99999", "5000"), "PREFECT_PORT = 99999: expected a whole number from 1 to 65535"),
        (("4200", "-5"), "MLFLOW_PORT = -5: expected a whole number from 1 to 65535"),
        (("4300", "4300"), "PREFECT_PORT and MLFLOW_PORT are both 4300: expected two different ports"),
        (("4200", "9" * 5000), "MLFLOW_PORT = 9999"),
    ],
)
def test_ports_that_are_none_are_one_clear_line(folder: Path, ports: tuple[str, str], message: str) -> None:
    done = command(folder, "pipelines", "up", PREFECT_PORT=ports[0], MLFLOW_PORT=ports[1])
    assert done.returncode == 2
    assert done.stdout.startswith(f"error: {message}")
    assert len(done.stdout.splitlines()) == 1
    assert len(done.stdout) < 300
