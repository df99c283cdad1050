"""The work pool and the deployments of prefect.yaml; `python -m pipelines.deploy` registers them with a server.

The imports of the flow take longer than everything else in `make up`, so they run while the server is starting.
"""

from __future__ import annotations

import hashlib
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from dit.errors import UserError
from pipelines.known_services import DATABASE, PREFECT_HOME, Service, write_private
from pipelines.local_http import fetch, wait
from pipelines.redaction import redacted, shown

POOL = "local"
JOB_TEMPLATE = {
    "job_configuration": {"stream_output": True},
    "variables": {"type": "object", "properties": {}, "additionalProperties": False},
}
"""A run through the worker may choose nothing about its process: neither its command nor its environment nor its folder."""
DEPLOYED = PREFECT_HOME / "deployed"
"""The file with the digest of what the deployments were made from."""
DEPLOYMENT = "/api/deployments/name/study/local"


def module(name: str) -> list[str]:
    """The command that runs a module by this Python."""
    return [sys.executable, "-m", name]


def make_pool(prefect: Service) -> None:
    """Make the work pool, or bring it up to date."""
    made = {"name": POOL, "type": "process", "base_job_template": JOB_TEMPLATE}
    if fetch(prefect, "/api/work_pools/", json.dumps(made).encode()) is None:  # it exists already
        fetch(prefect, f"/api/work_pools/{POOL}", json.dumps({"base_job_template": JOB_TEMPLATE}).encode(), "PATCH")


def is_deployed() -> bool:
    """Whether the deployments were last made from the present code and parameters."""
    return DATABASE.exists() and DEPLOYED.exists() and DEPLOYED.read_text() == _deployed_from()


def _deployed_from() -> str:
    """A digest of what deployments depend on: prefect.yaml, code, and parameters, profiles and strategies for the form."""
    code = [path for folder in ("dit", "pipelines") for path in sorted(Path(folder).rglob("*.py"))]
    files = [
        Path("prefect.yaml"),
        Path("params.yaml"),
        Path("dit/library.yaml"),
        *sorted(Path("profiles").rglob("*.yaml")),
        *code,
    ]
    digest = hashlib.sha256(str(Path.cwd()).encode())
    for path in files:
        digest.update(f"\n{path}\n".encode() + (path.read_bytes() if path.exists() else b""))
    return digest.hexdigest()


def start_deploying(environment: Mapping[str, str]) -> subprocess.Popen[str]:
    """Start a process that makes or updates the deployments of `prefect.yaml` as soon as the work pool exists."""
    command = module("pipelines.deploy")
    output = subprocess.PIPE
    return subprocess.Popen(
        command, env=dict(environment), stdout=output, stderr=subprocess.STDOUT, text=True, errors="replace"
    )


def finish_deploying(process: subprocess.Popen[str], environment: Mapping[str, str]) -> None:
    """Wait until the deployments are made. Raises `UserError` if that fails."""
    said, _ = process.communicate()
    if process.returncode:
        raise UserError(f"prefect deploy failed: {redacted(said.strip(), environment=environment)}")
    write_private(DEPLOYED, _deployed_from())


def wait_for_pool(environment: Mapping[str, str]) -> None:
    """Wait until the work pool exists on the server at `PREFECT_API_URL`. Raises `UserError` if it does not exist in time."""
    api = Service("prefect", 0, 0, environment["PREFECT_API_URL"], environment["PREFECT_API_AUTH_STRING"])
    if not wait(lambda: fetch(api, f"/work_pools/{POOL}") is not None):
        raise UserError(f"there is no work pool '{POOL}' at {shown(api.url)}")


def main() -> None:
    """Wait for the work pool, and run `prefect deploy`, which reads the flow from its file."""
    import prefect.cli  # noqa: F401

    from pipelines import experiments, live, tracking  # noqa: F401

    wait_for_pool(os.environ)
    sys.argv = ["prefect", "--no-prompt", "deploy", "--all"]
    runpy.run_module("prefect", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
