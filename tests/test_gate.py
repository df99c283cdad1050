"""Who gets into the servers of `make up`: this machine's user, unasked; no page of another origin, and no other user."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
from browser import CHROMIUM, MISSING
from studies import ROOT, command, environment, free_port, git

from dit.errors import UserError
from pipelines import guard, local_http, services

ANOTHER_USER = """
import encodings.idna, json, os, sys, urllib.request
os.setgroups([]); os.setgid(65534); os.setuid(65534)
for path in sys.argv[2:]:
    try:
        open(path).read()
        print("read", path)
    except PermissionError:
        print("refused")
for url in json.loads(sys.argv[1]):
    try:
        print(urllib.request.urlopen(urllib.request.Request(url, b"{}", {"Content-Type": "application/json"})).status)
    except urllib.error.HTTPError as error:
        print(error.code)
"""
"""What a process of another user tries: to read files, and to use the servers without a password."""

FOREIGN_PAGE = """<!doctype html><pre id="log"></pre><script>
const say = text => document.getElementById("log").textContent += text + ";\\n";
const body = JSON.stringify(BODY);
const attempts = {
  json: url => fetch(url, {method: "POST", body, headers: {"Content-Type": "application/json"}}),
  simple: url => fetch(url, {method: "POST", body, mode: "no-cors", credentials: "include"}),
  untyped: url => fetch(url, {method: "POST", body: new Blob([body]), mode: "no-cors", credentials: "include"}),
  read: url => fetch(url, {credentials: "include"}),
};
(async () => {
  for (const url of URLS) for (const [name, attempt] of Object.entries(attempts)) {
    try { const answer = await attempt(url); say(`${name}: ${answer.type} ${answer.status} ${await answer.text()}`); }
    catch (error) { say(`${name}: ${error.name}`); }
  }
  say("done");
})();
</script>"""


@dataclass(frozen=True)
class Up:
    """A project folder whose services run, what `up` printed, and the password of each service."""

    root: Path
    output: str
    prefect: str
    mlflow: str
    passwords: dict[str, str]

    def link(self, service: str) -> str:
        """The link for browsers that `up` printed for `service`."""
        return next(line.split()[1] for line in self.output.splitlines() if line.startswith(service))


@pytest.fixture(scope="module")
def project() -> Iterator[Path]:
    """A copy of this working tree under a folder that every user may enter."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        root.chmod(0o755)
        for file in git(ROOT, "ls-files", "--cached", "--others", "--exclude-standard", "-z").split("\0"):
            if file and (ROOT / file).exists():
                (root / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / file, root / file)
        git(root, "init", "--quiet")
        yield root


@pytest.fixture(scope="module")
def up(project: Path) -> Iterator[Up]:
    ports = {"PREFECT_PORT": str(free_port()), "MLFLOW_PORT": str(free_port())}
    done = command(project, "pipelines", "up", fresh=True, **ports)
    assert done.returncode == 0, done.stdout
    folder = project / ".scratch/services"
    passwords = {name: json.loads((folder / f"{name}.json").read_text())["password"] for name in ("prefect", "mlflow")}
    addresses = (f"http://127.0.0.1:{port}" for port in ports.values())
    yield Up(project, done.stdout, *addresses, passwords)
    command(project, "pipelines", "down", fresh=True)


def ask(url: str, body: Any = None, password: str = "", **headers: str) -> tuple[int, str]:
    """Status and text of the answer to a request, a POST if it has a `body`, with just these `headers`."""
    parts = urlsplit(url)
    connection = HTTPConnection(parts.netloc, timeout=60)
    own = {"Authorization": f"Basic {base64.b64encode(password.encode()).decode()}"} if password else {}
    own |= {} if body is None else {"Content-Type": "application/json"}
    sent = {**own, **{name.replace("_", "-"): value for name, value in headers.items()}}
    text = None if body is None else json.dumps(body)
    path = parts.path + (f"?{parts.query}" if parts.query else "")
    connection.request("GET" if body is None else "POST", path, text, sent)
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def browse(url: str, profile: Path) -> str:
    """The document after a headless browser opened `url` and its scripts ran."""
    assert CHROMIUM, MISSING
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    options += [f"--user-data-dir={profile}", "--virtual-time-budget=10000", "--dump-dom"]
    return subprocess.run([CHROMIUM, *options, url], capture_output=True, text=True, check=True, timeout=300).stdout


def deployment(up: Up) -> str:
    _, found = ask(f"{up.prefect}/api/deployments/filter", {}, up.passwords["prefect"])
    return str(json.loads(found)[0]["id"])


def flow_runs(up: Up) -> int:
    return int(ask(f"{up.prefect}/api/flow_runs/count", {}, up.passwords["prefect"])[1])


def experiments(up: Up) -> int:
    _, found = ask(f"{up.mlflow}/api/2.0/mlflow/experiments/search?max_results=99", None, up.passwords["mlflow"])
    return len(json.loads(found)["experiments"])


def test_prefect_in_the_folder_needs_no_password(up: Up) -> None:
    assert "study/local" in command(up.root, "prefect", "deployment", "ls").stdout


@pytest.fixture(scope="module")
def signed_in(up: Up, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The profile of a browser that has opened both links."""
    profile = tmp_path_factory.mktemp("browser")
    assert "Dashboard" in browse(up.link("Prefect"), profile)
    browse(up.link("MLflow"), profile)
    return profile


def test_a_link_signs_one_browser_in_once(up: Up, signed_in: Path, tmp_path: Path) -> None:
    assert "study" in browse(f"{up.prefect}/v2/flows", signed_in)
    assert "Experiments" in browse(up.link("MLflow").partition("/sign-in")[0], signed_in)
    for service in ("Prefect", "MLflow"):
        assert "open the link that it prints" in browse(up.link(service), tmp_path)


def test_a_foreign_page_in_a_signed_in_browser_changes_and_reads_nothing(up: Up, signed_in: Path) -> None:
    before = flow_runs(up), experiments(up)
    seen, cookies = browse_foreign_page(up, signed_in)
    assert seen["read"] == seen["json"] == {"TypeError"}
    assert all(answer.startswith("opaque 0") for kind in ("simple", "untyped") for answer in seen[kind])
    assert (flow_runs(up), experiments(up)) == before
    secrets = [password.partition(":")[2] for password in up.passwords.values()]
    assert not any(secret in cookie for secret in secrets for cookie in cookies)  # browsers send those of one port to all


def browse_foreign_page(up: Up, profile: Path) -> tuple[dict[str, set[str]], set[str]]:
    """What a page from another port gets in a browser that is signed in: answers by kind of attempt, and cookies."""
    cookies: set[str] = set()
    urls = [f"{up.prefect}/api/deployments/{deployment(up)}/create_flow_run", f"{up.mlflow}/api/2.0/mlflow/experiments/create"]
    urls.append(urls[1].replace(up.mlflow, up.link("MLflow").partition("/sign-in")[0]))
    page = FOREIGN_PAGE.replace("BODY", json.dumps({"name": "foreign"})).replace("URLS", json.dumps(urls))

    class Pages(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            cookies.add(self.headers.get("Cookie", ""))
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(page.encode())

        def log_message(self, *_: Any) -> None:
            return

    with ThreadingHTTPServer(("127.0.0.1", 0), Pages) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        text = browse(f"http://127.0.0.1:{server.server_port}/", profile)
        server.shutdown()
    log = text.partition('<pre id="log">')[2].partition("</pre>")[0]
    assert log.strip().endswith("done;")
    seen: dict[str, set[str]] = {}
    for line in log.strip().split(";\n")[:-1]:
        kind, _, answer = line.partition(": ")
        seen.setdefault(kind, set()).add(answer)
    return seen, cookies


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "rebound.example:4200"},
        {"Origin": "http://elsewhere.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
        {"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "no-cors"},
        {"Sec_Fetch_Site": "same-site", "Sec_Fetch_Mode": "navigate", "Sec_Fetch_Dest": "iframe"},
    ],
    ids=str,
)
def test_foreign_hosts_and_origins_are_refused_even_with_the_password(up: Up, headers: dict[str, str]) -> None:
    for url, password in ((up.prefect, up.passwords["prefect"]), (up.mlflow, up.passwords["mlflow"])):
        for path, body in (("/", None), ("/sign-in", {}), ("/api/flows/count", {}), ("/health", None)):
            status, text = ask(url + path, body, password, **headers)
            assert status in (400, 403)
            assert "refused" in text or "Invalid host" in text


def test_reports_and_no_other_file_are_served_to_who_has_the_password(up: Up) -> None:
    (up.root / "reports").mkdir(exist_ok=True)
    (up.root / "reports/index.html").write_text("the report")
    (up.root / "reports/summary.json").write_text("secret")
    kept = up.root / ".scratch/experiments/study-abc"
    kept.mkdir(parents=True)
    (kept / "index.html").write_text("of an experiment")
    password = up.passwords["mlflow"]
    for path, text in (("/reports/index.html", "the report"), ("/reports/study-abc/index.html", "of an experiment")):
        assert ask(up.mlflow + path)[0] == 401
        assert ask(up.mlflow + path, None, up.passwords["prefect"])[0] == 401
        assert ask(up.mlflow + path, None, password, Origin="http://elsewhere.example")[0] == 403
        assert ask(up.mlflow + path, None, password, Host="rebound.example")[0] == 400
        assert ask(up.mlflow + path, None, password) == (200, text)
    for path in ("/reports/", "/reports/summary.json", "/reports/../services/index.html", "/reports/%2e%2e/index.html"):
        assert "secret" not in ask(up.mlflow + path, None, password)[1]
        assert ask(up.mlflow + path, None, password)[0] in (200, 404)
    assert ask(f"{up.mlflow}/reports/gone/index.html", None, password) == (404, "There is no such report.")


def test_websockets_of_foreign_pages_are_refused(up: Up) -> None:
    upgrade = {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec_WebSocket_Version": "13",
        "Sec_WebSocket_Key": "a" * 22 + "==",
    }
    url = f"{up.prefect}/api/events/out"
    assert ask(url, **upgrade, Origin="http://elsewhere.example")[0] == 403
    assert ask(url, **upgrade, Host="rebound.example")[0] == 400
    assert ask(url, **upgrade, Origin=up.prefect)[0] == 403  # as of Prefect: no password


def test_a_link_elsewhere_may_lead_to_the_pages(up: Up) -> None:
    headers = {"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "navigate", "Sec_Fetch_Dest": "document"}
    assert ask(f"{up.prefect}/v2/", **headers)[0] == 200


def test_runs_through_the_worker_choose_no_command_environment_or_folder(up: Up) -> None:
    url = f"{up.prefect}/api/deployments/{deployment(up)}/create_flow_run"
    before = flow_runs(up)
    for chosen in ({"command": "touch /tmp/x"}, {"env": {"PATH": "/tmp"}}, {"env.PATH": "/tmp"}, {"working_dir": "/tmp"}):
        status, text = ask(url, {"job_variables": chosen}, up.passwords["prefect"])
        assert status == 422, text
        assert "were unexpected" in text or "was unexpected" in text
    assert flow_runs(up) == before


def test_a_worker_that_is_told_a_command_does_not_heed_it(up: Up) -> None:
    chosen = {"command": "touch /tmp/x", "env": {"PATH": "/tmp"}, "env.HOME": "/tmp", "working_dir": "/tmp", "name": "x"}
    script = f"""
import asyncio
from prefect.workers.process import ProcessJobConfiguration
from pipelines.deploy import JOB_TEMPLATE
made = asyncio.run(ProcessJobConfiguration.from_template_and_values(JOB_TEMPLATE, {chosen}))
print(made == ProcessJobConfiguration())
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=up.root, env=environment(up.root), capture_output=True, text=True, check=True
    )
    assert done.stdout == "True\n"


def test_two_runs_of_the_deployment_at_once_queue(up: Up) -> None:
    password = up.passwords["prefect"]
    url = f"{up.prefect}/api/deployments/{deployment(up)}/create_flow_run"
    ids = [json.loads(ask(url, {"parameters": {"targets": ["design"]}}, password)[1])["id"] for _ in range(2)]
    ended = time.monotonic() + 180
    runs: list[dict[str, Any]] = []
    while time.monotonic() < ended and not (runs and all(run["end_time"] for run in runs)):
        time.sleep(1)
        runs = [json.loads(ask(f"{up.prefect}/api/flow_runs/{each}", None, password)[1]) for each in ids]
    assert [run["state_type"] for run in runs] == ["COMPLETED"] * 2, [run["state"]["message"] for run in runs]
    first, second = sorted(runs, key=lambda run: str(run["start_time"]))
    assert second["start_time"] >= first["end_time"]
    states = json.loads(ask(f"{up.prefect}/api/flow_run_states/?flow_run_id={second['id']}", None, password)[1])
    assert "AwaitingConcurrencySlot" in {state["name"] for state in states}


def test_passwords_are_on_no_command_line_and_in_no_log(up: Up) -> None:
    folder = up.root / ".scratch/services"
    texts = [up.output, *(log.read_text() for log in folder.glob("*.log"))]
    for file in folder.glob("*.json"):
        process = psutil.Process(json.loads(file.read_text())["pid"])
        texts += [" ".join(one.cmdline()) for one in (process, *process.children(recursive=True))]
    for password in up.passwords.values():
        secret = password.partition(":")[2]
        assert len(secret) > 40
        assert not any(secret in text or base64.b64encode(password.encode()).decode() in text for text in texts)


def holds_any(path: Path, secrets: list[bytes]) -> bool:
    """Whether one of `secrets` is in the file `path`; false for folders, sockets and files that a server removes meanwhile."""
    with suppress(FileNotFoundError):
        return path.is_file() and any(secret in path.read_bytes() for secret in secrets)
    return False


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_another_user_reads_no_password_and_gets_no_answer(up: Up) -> None:
    pids = [json.loads(file.read_text())["pid"] for file in (up.root / ".scratch/services").glob("*.json")]
    public = {"inductor", "matplotlib", "recovery"}  # caches of libraries, and the copy of dvc.lock, which git holds too
    kept = [file for file in (up.root / ".scratch").glob("*/*.*") if file.parent.name not in public]
    files = [*map(str, kept), *(f"/proc/{pid}/environ" for pid in pids)]
    urls = [f"{up.prefect}/api/flow_runs/count", f"{up.mlflow}/api/2.0/mlflow/experiments/create", f"{up.mlflow}/sign-in"]
    script = [sys.executable, "-c", ANOTHER_USER, json.dumps([*urls, f"{up.prefect}/sign-in"]), *files]
    done = subprocess.run(script, cwd="/", capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["refused"] * len(files) + ["401"] * 4
    secrets = [password.partition(":")[2].encode() for password in up.passwords.values()]
    holding = [file for file in (up.root / ".scratch").rglob("*") if holds_any(file, secrets)]
    assert len(holding) >= len(secrets)
    for file in holding:
        assert file.stat().st_mode & 0o777 == 0o600, file
    assert (up.root / ".scratch/prefect/profiles.toml").stat().st_mode & 0o777 == 0o600


def test_a_program_that_takes_the_port_first_is_not_taken_for_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(local_http, "START_SECONDS", 3.0)
    asked: list[str] = []

    class Impostor(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()

    server = services.prefect_server({})
    assert server.process
    with ThreadingHTTPServer(("127.0.0.1", urlsplit(server.environment["PREFECT_API_URL"]).port or 0), Impostor) as impostor:
        threading.Thread(target=impostor.serve_forever, daemon=True).start()
        with pytest.raises(UserError, match="does not answer"):
            server.wait()
        impostor.shutdown()
    guard.stop(server.process)
    assert asked == []


def test_the_server_of_one_study_wants_a_password_as_well(prefect_api: dict[str, str]) -> None:
    url, password = f"{prefect_api['PREFECT_API_URL']}/flow_runs/count", prefect_api["PREFECT_API_AUTH_STRING"]
    assert ask(url, {})[0] == 401
    assert ask(url, {}, password)[0] == 200
    assert ask(url, {}, password, Origin="http://elsewhere.example")[0] == 403
