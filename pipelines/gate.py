"""The gate in front of Prefect's server and the MLflow UI: it admits this machine's user, but no other user and no web page.

The password is passed in the environment, which only the same user can read. A browser signs in by a link that `make up`
prints; the link works once, and holds no password.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import secrets
import time
from pathlib import Path

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HOST = "127.0.0.1"
HOSTS = (HOST, "localhost")
SIGN_IN = "/sign-in"
PASSWORD = "PREFECT_SERVER_API_AUTH_STRING"
MLFLOW_PASSWORD = "DIT_MLFLOW_PASSWORD"
TICKET_SECONDS = 3600.0
REPORT_PATH = re.compile(r"/reports/(?:(?P<experiment>[A-Za-z0-9_-]+)/)?index\.html")
COOKIE = "password"
COOKIE_SECONDS = 30 * 24 * 3600
ADVICE = "Run `make up` in the project's folder, and open the link that it prints."
PAGE = f"""<!doctype html>
<meta charset="utf-8">
<title>Sign in</title>
<p>{ADVICE}</p>
<script>
  const [ticket, page] = location.hash.slice(1).split("&page=");
  history.replaceState(null, "", location.pathname);
  fetch(location.pathname, {{method: "POST", body: ticket}}).then(async answer => {{
    const password = answer.ok && await answer.text();
    if (password) localStorage.setItem("prefect-password", password);
    if (!answer.ok && !localStorage.getItem("prefect-password")) return;
    location.replace(page ? "/#" + page : "/");
  }});
</script>
"""
"""The page by which a browser signs in. Prefect's pages look for `prefect-password` in the storage of their own origin."""


def pages_host(password: str) -> str:
    """The host name under which a browser opens pages to which it signs in by a cookie.

    Browsers send a cookie to all ports of a host name, so for 127.0.0.1 also to a server of another user. Nobody else knows
    this name. Names under `.localhost` are this machine (RFC 6761, 6.3).
    """
    return f"mlflow-{hashlib.sha256(password.encode()).hexdigest()[:20]}.localhost"


def authorization(password: str) -> str:
    """The value of the header `Authorization` that Prefect and this gate expect."""
    return f"Basic {base64.b64encode(password.encode()).decode()}"


class Gate:
    """Refuses requests from pages of other origins, and lets a browser sign in.

    If the application `checks` passwords itself, as Prefect does (on websockets too), signing in gives its pages the password.
    Otherwise the gate requires the password, in a header or in a cookie that no script can read.
    """

    def __init__(self, app: ASGIApp, password: str, *, checks: bool) -> None:
        self.app, self.password, self.checks = app, password, checks
        self.tickets: dict[str, float] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or let the application answer it."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        answer = await self._answer(scope, receive)
        await (answer or self.app)(scope, receive, _unframed(send))

    async def _answer(self, scope: Scope, receive: Receive) -> Response | None:
        """The gate's own answer to a request; None if the application is to answer."""
        headers = Headers(scope=scope)
        method = scope.get("method", "")
        if not _same_origin(headers, method):
            return PlainTextResponse("Requests of pages from elsewhere are refused.", 403)
        if self.checks and method == "GET" and _hostname(headers) != HOST:  # browsers keep the password for one name
            return RedirectResponse(Request(scope).url.replace(hostname=HOST))
        if scope["path"] == SIGN_IN and method == "GET":
            return HTMLResponse(PAGE, headers={"Cache-Control": "no-store"})
        if scope["path"] == SIGN_IN and method == "POST":
            return await self._sign_in(Request(scope, receive))
        if self.checks or self._knows(headers.get("authorization"), authorization(self.password)) or self._has_cookie(scope):
            return None
        return PlainTextResponse(ADVICE, 401)

    async def _sign_in(self, request: Request) -> Response:
        """Answer a password with a new ticket, and a ticket with the password, as a cookie if the gate checks passwords."""
        now = time.monotonic()
        self.tickets = {ticket: end for ticket, end in self.tickets.items() if end > now}
        if self._knows(request.headers.get("authorization"), authorization(self.password)):
            ticket = secrets.token_urlsafe(16)
            self.tickets[ticket] = now + TICKET_SECONDS
            return PlainTextResponse(ticket)
        ticket = (await request.body()).decode(errors="replace")
        misplaced = not self.checks and _hostname(request.headers) != pages_host(self.password)
        if misplaced or (self.tickets.pop(ticket, None) is None and not self._has_cookie(request.scope)):
            return PlainTextResponse(ADVICE, 401)
        if self.checks:
            return PlainTextResponse(authorization(self.password).removeprefix("Basic "))
        answer = PlainTextResponse("")
        answer.set_cookie(COOKIE, self.password, COOKIE_SECONDS, httponly=True, samesite="strict")
        return answer

    def _has_cookie(self, scope: Scope) -> bool:
        if self.checks or scope["type"] != "http":
            return False
        return self._knows(Request(scope).cookies.get(COOKIE), self.password)

    def _knows(self, given: str | None, expected: str) -> bool:
        return given is not None and secrets.compare_digest(given.encode(), expected.encode())


def prefect() -> ASGIApp:
    """Prefect's API and pages behind the gate; the API checks the password in `PASSWORD` itself."""
    from prefect.server.api.server import create_app

    return _guarded(create_app(), os.environ[PASSWORD], checks=True)


def mlflow() -> ASGIApp:
    """MLflow's API and pages behind the gate, which asks for the password in `MLFLOW_PASSWORD`. Run by `mlflow server`."""
    from mlflow.server.fastapi_app import app

    return _guarded(Reports(app, Path.cwd()), os.environ[MLFLOW_PASSWORD], checks=False)


class Reports:
    """Serves the reports of the folder `root`, and lets the application answer everything else.

    These are the study's report and one for each experiment; no other file can be requested. The scripts of a report run in a
    sandbox without an origin, so they cannot use the API under the same host name.
    """

    def __init__(self, app: ASGIApp, root: Path) -> None:
        self.app, self.root = app, root

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        named = REPORT_PATH.fullmatch(scope["path"]) if scope["type"] == "http" else None
        if named is None:
            await self.app(scope, receive, send)
            return
        file = self.root / report_file(named["experiment"])
        headers = {"Content-Security-Policy": "sandbox allow-scripts allow-downloads allow-popups", "Cache-Control": "no-cache"}
        answer = FileResponse(file, headers=headers, media_type="text/html") if file.is_file() else None
        await (answer or PlainTextResponse("There is no such report.", 404))(scope, receive, send)


def report_path(experiment: str | None) -> str:
    """The path under which the report of the study, or of one experiment, is served."""
    return f"/reports/{f'{experiment}/' if experiment else ''}index.html"


def report_file(experiment: str | None) -> Path:
    """The file of that report, relative to the project's folder."""
    return Path(".scratch/experiments", experiment, "index.html") if experiment else Path("reports/index.html")


def _guarded(app: ASGIApp, password: str, *, checks: bool) -> ASGIApp:
    hosts = HOSTS if checks else (*HOSTS, pages_host(password))
    return TrustedHostMiddleware(Gate(app, password, checks=checks), hosts, www_redirect=False)


def _same_origin(headers: Headers, method: str) -> bool:
    """Whether a request comes from no page, or from one of this server's pages.

    Of other pages, only links may lead here: browsers send `Origin` with websockets and with every request that may change
    something, and `Sec-Fetch-Site` with every request. Another port of this machine is another origin.
    """
    if headers.get("origin", f"http://{headers['host']}") != f"http://{headers['host']}":
        return False
    if headers.get("sec-fetch-site", "none") in ("none", "same-origin"):
        return True
    return method == "GET" and headers.get("sec-fetch-mode") == "navigate" and headers.get("sec-fetch-dest") == "document"


def _hostname(headers: Headers) -> str:
    return headers["host"].partition(":")[0].lower()


def _unframed(send: Send) -> Send:
    """Add headers that forbid other pages to show an answer in a frame, where a user could be made to click on it."""

    async def sent(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers["X-Frame-Options"] = "SAMEORIGIN"
            headers["X-Content-Type-Options"] = "nosniff"
            headers["Referrer-Policy"] = "same-origin"
        await send(message)

    return sent
