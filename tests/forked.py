"""Runs Python modules in forks of a process that has imported the libraries of this project already, which takes seconds.

Each fork is what `python -m MODULE` is: a process of its own, with its own working directory, environment and import path,
which imports the code of `dit`, `pipelines` and Prefect itself. Prefect reads its settings when it is imported, so it is no
library here.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path

LIBRARIES = (
    *("torch", "diffusers.models", "pandas", "scipy.sparse", "PIL.Image", "mlflow.tracking", "mlflow.genai", "dvc.repo"),
    *("fastapi", "griffe", "prometheus_client", "opentelemetry.sdk.trace", "websockets", "pendulum", "httpx", "h2.connection"),
    *("pydantic_settings", "anyio", "rich.console", "dill", "jsonschema", "sqlparse", "typer.rich_utils", "ruamel.yaml"),
)
MOST_BYTES = 1 << 20
DESCRIPTORS = 2


def run(root: Path, arguments: tuple[str, ...], environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """What `python -m ARGUMENTS` does in `root`: its exit code, and its stdout and stderr together."""
    (said, output), (ended, status) = os.pipe(), os.pipe()
    request = [str(root), list(arguments), dict(environment)]
    socket.send_fds(_server(), [json.dumps(request).encode()], [output, status])
    os.close(output)
    os.close(status)
    with open(said) as file:
        text = file.read()
    with open(ended) as file:
        return subprocess.CompletedProcess(arguments, int(file.read()), text)


@cache
def _server() -> socket.socket:
    """The connection to the process that forks, which ends with this one."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-P", __file__, str(theirs.fileno())]
    nothing = subprocess.DEVNULL
    process = subprocess.Popen(command, env=environment, stdin=nothing, stdout=nothing, pass_fds=[theirs.fileno()])
    theirs.close()
    atexit.register(process.wait)
    atexit.register(ours.close)
    return ours


def _fork_for_each_request(channel: socket.socket) -> tuple[str, list[str], dict[str, str]]:
    """Fork a process for each request, and one above it that tells its end. Return in the process of a request."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nothing waits for forks but the process above each
    while True:
        text, held, _, _ = socket.recv_fds(channel, MOST_BYTES, DESCRIPTORS)
        if not text:
            os._exit(0)
        if os.fork() == 0:
            channel.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            output, status = held
            if (pid := os.fork()) == 0:
                os.close(status)
                for standard in (1, 2):
                    os.dup2(output, standard)
                os.close(output)
                root, arguments, environment = json.loads(text)
                return root, arguments, environment
            os.close(output)
            os.write(status, str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])).encode())
            os._exit(0)
        for descriptor in held:
            os.close(descriptor)


def _main() -> None:
    channel = socket.socket(fileno=int(sys.argv[1]))
    for name in LIBRARIES:
        importlib.import_module(name)
    gc.freeze()  # forks share the memory of objects that the collector does not visit again
    root, arguments, environment = _fork_for_each_request(channel)
    os.chdir(root)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = [root, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    sys.argv, sys.orig_argv = arguments, [sys.executable, "-m", *arguments]
    runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _main()
