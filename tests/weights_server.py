"""A local HTTP server of weights that truncates, stalls and lies, and a small published file on it."""

import re
import subprocess
import sys
import threading
import time
import zipfile
from contextlib import contextmanager
from dataclasses import replace
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO

import pytest
import torch

from weakmedsam.backbones import download, weights
from weakmedsam.backbones.weights import Weights, obtain

CONTENT = bytes(torch.randint(256, (300_000,), generator=torch.Generator().manual_seed(0)).tolist())
ITEM = Weights("http://official.invalid/weights/net.pth", len(CONTENT), sha256(CONTENT).hexdigest(), "none")
PACKED = replace(ITEM, url=f"{ITEM.url}.zip")
HALF = len(CONTENT) // 2
KEPT = HALF // 2**16 * 2**16
"""What of the half is kept of a connection that breaks: whole chunks."""


@pytest.fixture
def impatient(monkeypatch):
    """No proxy, no mirror, and little patience with the server."""
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv(weights.MIRROR, raising=False)
    for name, value in (("TIMEOUT", 0.3), ("RETRIES", 2), ("PAUSE", 0.01)):
        monkeypatch.setattr(download, name, value)


class Shop(ThreadingHTTPServer):
    """Serves one content; ``tricks`` are taken one per request, then it is honest.

    A trick is a set of words: ``cut`` (half of what is asked for, then the connection closes), ``stall``
    (half, then silence), ``wobble`` (half or a quarter, in turn), ``whole`` (ignores Range), ``short`` and
    ``long`` (a wrong Content-Length), or a status code.
    """

    daemon_threads = True

    def __init__(self, content=CONTENT, tricks=(), always=()):
        super().__init__(("127.0.0.1", 0), Counter)
        self.content, self.tricks, self.always = content, list(tricks), set(always)
        self.asked, self.sent = [], []
        self.release, self.reached = threading.Event(), threading.Event()
        self.gate = threading.Lock()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Counter(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        shop = self.server
        with shop.gate:
            trick = set(shop.tricks.pop(0)) if shop.tricks else shop.always
            shop.asked.append((self.path, self.headers.get("Range")))
        code = next((word for word in trick if isinstance(word, int)), 200)
        if code != 200:
            self.send_error(code)
            return
        start, range_ = 0, re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if range_ and "whole" not in trick:
            start = int(range_[1])
        if start >= len(shop.content):
            self.send_error(416)
            return
        body = shop.content[start:]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(shop.content) - 1}/{len(shop.content)}")
        self.send_header("Content-Length", str(len(body) - 7 * ("short" in trick) + 7 * ("long" in trick)))
        self.end_headers()
        part = body[: len(body) // 2] if trick & {"cut", "stall", "wobble"} else body
        if "wobble" in trick and len(shop.asked) % 2 == 0:
            part = part[: len(part) // 2]
        if "stall" in trick:
            self.wfile.write(part[:-100])
            time.sleep(0.05)  # the last bytes come as a small piece of their own
            self.wfile.write(part[-100:])
        else:
            self.wfile.write(part)
        shop.sent.append(len(part))
        if "stall" in trick:
            shop.reached.set()
            shop.release.wait(10)
        self.close_connection = True


@contextmanager
def shop(content=CONTENT, tricks=(), always=()):
    server = Shop(content, tricks, always)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.release.set()
        server.shutdown()
        server.server_close()
        thread.join(5)


def get(folder, server, item=ITEM):
    path = obtain(item, folder, server.url)
    assert path.read_bytes() == CONTENT
    return path


def visible(folder):
    """What a reader of the folder takes for a file of weights."""
    return sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))


def zipped(*members):
    data = BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in members:
            packed.writestr(name, content)
    return data.getvalue()


CHILD = """
import sys
{before}
from weakmedsam.backbones import download
from weakmedsam.backbones.weights import Weights, obtain
from pathlib import Path
download.TIMEOUT, download.RETRIES, download.PAUSE = 10, 2, 0.01
print(obtain({item!r}, Path({folder!r}), {url!r}))
assert "torch" not in sys.modules
"""


def child(folder, server, before=""):
    code = CHILD.format(before=before, item=ITEM, folder=str(folder), url=server.url)
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", code], stdout=pipe, stderr=pipe, text=True)
