"""Who may open a review: this machine alone, one page, one user.

It listens on loopback only. A request whose ``Host`` is another name than this machine's is refused (DNS rebinding);
one that another page sends is refused by its ``Origin``; and changes have to be JSON, which a form cannot send.
Another user of the same machine is kept out by a key, which the printed address holds and the browser then keeps in a
cookie. It lies in the run's folder, readable by its owner only, so that a page that is open goes on after a restart.
"""

from __future__ import annotations

import os
import secrets
import socket
from pathlib import Path

from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from weakmedsam.errors import ConfigError, check_range
from weakmedsam.run.clicks import REVIEW
from weakmedsam.system.atomic_io import replacing

HOSTS = ("127.0.0.1", "localhost")
KEY, COOKIE = ".key", "weakmedsam_review"
LARGEST_BODY = 10_000
"""Bytes of a request; a click has 80."""

HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "img-src data:; connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class Guard:
    """Refuses requests of other hosts, other pages and other users, before anything is looked at.

    Args:
        app: what answers the rest.
        port: that is listened on.
        key: which the browser has to know.
    """

    def __init__(self, app: ASGIApp, port: int, key: str) -> None:
        self.app, self.key = app, key
        self.hosts = {f"{host}:{port}" for host in HOSTS}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or say why not."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = Request(scope)
        fault = self._fault(request)
        if fault:
            await PlainTextResponse(fault, 403, HEADERS)(scope, receive, send)
        elif request.url.path == "/" and _same(request.query_params.get("key"), self.key):
            answer = RedirectResponse("/", 303, HEADERS)
            answer.set_cookie(_cookie(request), self.key, httponly=True, samesite="strict")
            await answer(scope, receive, send)
        elif not _same(request.cookies.get(_cookie(request)), self.key):
            said = "open the address that `weakmedsam review` has printed; it holds a key\n"
            await PlainTextResponse(said, 403, HEADERS)(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def _fault(self, request: Request) -> str | None:
        host, origin = request.headers.get("host", ""), request.headers.get("origin")
        if host not in self.hosts:
            return "this page is for this machine only: another host\n"
        if origin is not None and origin not in {f"http://{one}" for one in self.hosts}:
            return "this page is for itself only: another origin\n"
        if request.headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            return "this page is for itself only: another site\n"
        if request.method not in ("GET", "HEAD"):
            if request.headers.get("content-type", "").partition(";")[0] != "application/json":
                return "changes are JSON\n"
            if int(request.headers.get("content-length") or LARGEST_BODY + 1) > LARGEST_BODY:
                return "a change has a length, and is small\n"
        return None


def read_key(run: Path) -> str:
    """The key of a run's review; made where there is none."""
    path = run / REVIEW / KEY
    if path.is_file() and len(held := path.read_text(encoding="utf-8").strip()) >= 32:
        return held
    key = secrets.token_urlsafe(24)
    with replacing(path) as part:
        os.close(os.open(part, os.O_CREAT | os.O_WRONLY, 0o600))
        part.write_text(key, encoding="utf-8")
    return key


def listen(port: int) -> socket.socket:
    """A socket on loopback.

    Raises:
        ConfigError: there is no such port, it is in use, or it is not ours to take.
    """
    check_range("--port", port, 0, 65_535)
    found = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((HOSTS[0], port))
        found.listen()
    except OSError as error:
        found.close()
        raise ConfigError(f"--port {port}: {error.strerror}; choose another one, or 0 for any that is free") from error
    return found


def _same(given: str | None, key: str) -> bool:
    return given is not None and secrets.compare_digest(given.encode(), key.encode())


def _cookie(request: Request) -> str:
    """Cookies are of a host, not of a port: two reviews at once have one each."""
    return f"{COOKIE}_{request.url.port}"
