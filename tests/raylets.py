"""A Ray cluster of several hosts on one machine, started by `ray start`. Each host has its own home, cache and work folder."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from studies import environment, free_port

LOOPBACK = ("--node-ip-address", "127.0.0.1", "--disable-usage-stats", "--object-store-memory", str(80 * 2**20))
PORTS = (
    "node-manager-port",
    "object-manager-port",
    "runtime-env-agent-port",
    "metrics-export-port",
    "dashboard-agent-listen-port",
    "dashboard-agent-grpc-port",
)


@dataclass
class Host:
    """One raylet and all processes that it has started."""

    process: subprocess.Popen[bytes]
    work: Path

    @property
    def family(self) -> list[psutil.Process]:
        with suppress(psutil.NoSuchProcess):
            own = psutil.Process(self.process.pid)
            return [own, *own.children(recursive=True)]
        return []

    def kill(self) -> None:
        """Kill the raylet and everything that it has started, as a power cut would."""
        for process in self.family:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()


@dataclass
class Hosts:
    """Ray's head, which has no cores for tasks, and hosts that can be started and killed at any time."""

    folder: Path
    port: int = field(default_factory=free_port)
    running: dict[str, Host] = field(default_factory=dict)

    @property
    def variables(self) -> dict[str, str]:
        """The environment variables with which a study can use the cluster."""
        return {"RAY_ADDRESS": f"127.0.0.1:{self.port}", **self._access}

    @property
    def _access(self) -> dict[str, str]:
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64, "RAY_raylet_start_wait_time_s": "120"}

    def start(self, name: str, *arguments: str, **variables: str) -> Host:
        """Start a raylet; the first one is started as Ray's head. Call `wait` before using it."""
        home = self.folder / name
        home.mkdir()
        own = {
            "HOME": str(home),
            "XDG_CACHE_HOME": str(home / ".cache"),
            "DIT_WORK": str(home / "work"),
            "DVC_SITE_CACHE_DIR": str(home / "site"),
        }
        first = not self.running
        number = len(self.running)
        where = (
            ["--head", "--port", str(self.port), "--include-dashboard", "false"]
            if first
            else ["--address", f"127.0.0.1:{self.port}"]
        )
        lowest = 20000 + 500 * number
        chosen = {"min-worker-port": lowest, "max-worker-port": lowest + 400, **{name: free_port() for name in PORTS}}
        ports = [f"--{name}={port}" for name, port in chosen.items()]  # raylets that start at once would choose the same ports
        with (home / "ray.log").open("wb") as log:
            process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "ray.scripts.scripts",
                    "start",
                    "--block",
                    *LOOPBACK,
                    *where,
                    *ports,
                    *arguments,
                ],
                cwd=home,
                env=environment(self.folder) | self._access | own | variables,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self.running[name] = Host(process, home / "work")
        return self.running[name]

    def wait(self) -> None:
        """Wait until all raylets that were started have joined the cluster."""
        for name, host in self.running.items():
            while "Ray runtime started" not in (said := (self.folder / name / "ray.log").read_text()):
                assert host.process.poll() is None, said
                time.sleep(0.05)


@contextmanager
def hosts(folder: Path, names: Mapping[str, int]) -> Iterator[Hosts]:
    """A cluster in `folder`, with hosts of these names; `names` also gives the number of cores of each."""
    folder.mkdir()
    cluster = Hosts(folder)
    try:
        cluster.start("ray-head", "--num-cpus", "0")
        cluster.wait()
        for name, cores in names.items():  # one after the other: raylets that start at once choose the same sockets
            cluster.start(name, "--num-cpus", str(cores))
            cluster.wait()
        yield cluster
    finally:
        for host in reversed(cluster.running.values()):
            host.kill()
