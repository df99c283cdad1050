"""What may be shown: no password of a server, and nothing that a terminal acts on."""

from __future__ import annotations

import base64
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote, quote_plus

import pytest
from hypothesis import given, strategies as st

from dit.errors import DataError
from dit.terminal import plain
from pipelines import tracking
from pipelines.redaction import redacted, shown

ROOT = Path(__file__).parents[1]
LETTERS = st.characters(min_codepoint=33, max_codepoint=0x2FF, exclude_categories=["Z", "C"])
PASSWORDS = st.text(LETTERS, min_size=4).filter(lambda password: password not in "postgresql://user:***@host:1/mlflow failed")
SECRET = "s3cr3t/@:x"


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("http://user:secret@host:5000/a", "http://user:***@host:5000/a"),
        ("postgresql+psycopg2://user:a/b@c:d@host/mlflow", "postgresql+psycopg2://user:***@host/mlflow"),
        ("https://token@host", "https://***@host"),
        ("http://user:se[cret@host", "http://user:***@host"),
        (
            "postgresql://host/db?user=me&password=secret&sslmode=require",
            "postgresql://host/db?user=me&password=***&sslmode=require",
        ),
        ("http://a:b@c/ and http://d:e@f/", "http://a:***@c/ and http://d:***@f/"),
        ("sqlite:////home/a:b@c/mlflow.db", "sqlite:////home/a:b@c/mlflow.db"),
        (
            "http://127.0.0.1:5000/#/runs?viewStateShareKey=photos-32",
            "http://127.0.0.1:5000/#/runs?viewStateShareKey=photos-32",
        ),
    ],
)
def test_addresses_are_shown_without_their_passwords(address: str, expected: str) -> None:
    assert shown(address) == expected


@given(PASSWORDS)
def test_no_form_of_a_password_is_left_in_the_words_of_another_program(password: str) -> None:
    address = f"postgresql://user:{quote(password, safe='')}@host:1/mlflow"
    header = base64.b64encode(f"user:{password}".encode()).decode()
    forms = [password, quote(password), quote(password, safe=""), quote_plus(password), header]
    text = redacted("\n".join([f"{address} failed", *forms]), address, environment={})
    assert text == "\n".join(["postgresql://user:***@host:1/mlflow failed", *["***"] * len(forms)])


class Failing(BaseHTTPRequestHandler):
    """Answers the probe, and then fails with words that repeat what it was sent."""

    def do_GET(self) -> None:
        body = b"OK" if self.path == "/health" else f"no entry for {self.headers['Authorization']}".encode()
        self.send_response(200 if self.path == "/health" else 403)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        return


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Failing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://user:{quote(SECRET, safe='')}@127.0.0.1:{server.server_port}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        yield address
        server.shutdown()


def test_a_server_that_fails_after_the_probe_has_no_password_printed(failing: str, tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    done = subprocess.run(
        [sys.executable, "-m", "pipelines", "mlflow"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "does not take runs" in done.stdout
    assert "user:***@127.0.0.1" in done.stdout
    for form in (SECRET, quote(SECRET), quote(SECRET, safe=""), base64.b64encode(f"user:{SECRET}".encode()).decode()):
        assert form not in done.stdout


@pytest.mark.parametrize(
    "address", ["http://user:s3cr3t[x@127.0.0.1:1", "http://user:s3cr3t@127.0.0.1:port", "ftp://user:s3cr3t@host"]
)
def test_an_address_that_is_none_is_refused_without_its_password(
    address: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Exception, match=r"\*\*\*@") as caught:
        tracking.sync(ROOT)
    assert "s3cr3t" not in str(caught.value)


@given(st.text())
def test_text_is_made_safe_for_a_terminal(text: str) -> None:
    safe = plain(text)
    assert all(character.isprintable() or character in "\n\t" for character in safe)
    assert plain(safe) == safe
    safe.encode()
    if text.isprintable():
        assert safe == text


def test_errors_quote_names_without_their_terminal_escapes() -> None:
    assert str(DataError("cat\x1b[2J\x9b1m\u202e\udcff.png: it is wrong")) == r"cat\x1b[2J\x9b1m\u202e\udcff.png: it is wrong"
