"""The services of this folder: each has a file that names its process, and that only its owner may read."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil
from pydantic import TypeAdapter

from pipelines import gate
from pipelines.gate import HOST

SERVICES = Path(".scratch/services")
PREFECT_HOME = Path(".scratch/prefect")
DATABASE = PREFECT_HOME / "prefect.db"
MARKS = {
    "prefect": ("pipelines.gate:prefect", gate.PASSWORD),
    "mlflow": ("gate", gate.MLFLOW_PASSWORD),
    "worker": ("worker", ""),
}
"""For each service: a word of its command, and the environment variable that holds its password."""


@dataclass(frozen=True)
class Service:
    """A process in the background, as its file in `SERVICES` describes it."""

    name: str
    pid: int
    created: float
    url: str
    password: str = field(default="", repr=False)

    @property
    def pages(self) -> str:
        """The address at which a browser opens the service."""
        if self.name != "mlflow":
            return self.url
        return self.url.replace(HOST, gate.pages_host(self.password))

    @property
    def process(self) -> psutil.Process | None:
        """The process, if it still runs; another process that got the same id later does not count."""
        try:
            process = psutil.Process(self.pid)
            return process if process.create_time() == self.created and process.status() != psutil.STATUS_ZOMBIE else None
        except psutil.NoSuchProcess:
            return None


def running() -> dict[str, Service]:
    """The running services of this folder, by name."""
    found = [_described(file) for file in sorted(SERVICES.glob("*.json"))]
    return {service.name: service for service in found if service and service.process}


def _described(file: Path) -> Service | None:
    """The service that a file describes. A damaged file is rewritten from the running process, or removed if there is none."""
    try:
        return TypeAdapter(Service).validate_json(file.read_bytes(), strict=True)
    except FileNotFoundError:
        return None
    except (ValueError, OSError):
        shutil.rmtree(file) if file.is_dir() else file.unlink()
    service = _found(file.stem)
    if service:
        write_private(file, json.dumps(asdict(service)))
    ending = "written anew" if service else "removed; nothing that it may have named runs in this folder"
    say(f"{file} was damaged and is {ending}")
    return service


def _found(name: str) -> Service | None:
    """The service `name` of this folder, found among the running processes. The own server of a study does not count."""
    mark, password = MARKS.get(name, ("", ""))
    for process in psutil.process_iter():
        try:
            command = process.cmdline()
            own = mark in command and process.cwd() == str(Path.cwd()) and os.getsid(process.pid) == process.pid
            if mark and own:
                url = f"http://{HOST}:{command[command.index('--port') + 1]}" if password else ""
                secret = process.environ().get(password, "") if password else ""
                return Service(name, process.pid, process.create_time(), url, secret)
        except (psutil.Error, ProcessLookupError):
            continue
    return None


def private_folder(path: Path) -> Path:
    """A folder that only its owner may enter."""
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    path.chmod(0o700)
    return path


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner may read, from the start and at once."""
    descriptor, name = tempfile.mkstemp(dir=private_folder(path.parent), prefix=f".{path.name}.")
    with open(descriptor, "w") as file:
        file.write(text)
    Path(name).replace(path)


def say(text: str) -> None:
    """Tell the user what was repaired."""
    print(text, file=sys.stderr)
