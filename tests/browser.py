"""A headless Chromium, spoken to by its DevTools protocol: as much of it as tests of a page need."""

import base64
import itertools
import json
import shutil
import subprocess
import time
from pathlib import Path

from websockets.sync.client import connect

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
KEYS = {"ArrowDown": 40, "ArrowUp": 38, "Space": 32}
PATIENCE = 60
"""Seconds; a busy machine is slow."""


class Browser:
    """One tab. What the page's console says, and what it throws, is kept in ``complaints``."""

    def __init__(self, folder: Path, size: tuple[int, int] = (1280, 800)) -> None:
        words = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
        words += [f"--user-data-dir={folder}", "--remote-debugging-port=0", "--window-size={},{}".format(*size)]
        self.process = subprocess.Popen([CHROMIUM, *words, "about:blank"], stderr=subprocess.DEVNULL)
        port = folder / "DevToolsActivePort"
        wait_for(lambda: port.is_file() and len(port.read_text().split()) == 2)
        number, path = port.read_text().split()
        self._socket = connect(f"ws://127.0.0.1:{number}{path}", max_size=None, open_timeout=PATIENCE)
        self._numbers, self._session = itertools.count(1), None
        self.complaints: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call(
            "Emulation.setDeviceMetricsOverride", width=size[0], height=size[1], deviceScaleFactor=1, mobile=False
        )

    def call(self, method: str, **parameters):
        number = next(self._numbers)
        said = {"id": number, "method": method, "params": parameters}
        self._socket.send(json.dumps(said | ({"sessionId": self._session} if self._session else {})))
        while True:
            heard = json.loads(self._socket.recv(timeout=PATIENCE))
            if heard.get("id") == number:
                assert "error" not in heard, (method, heard["error"])
                return heard["result"]
            self._note(heard)

    def _note(self, heard: dict) -> None:
        method, held = heard.get("method"), heard.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(held["exceptionDetails"])[:500])
        elif method == "Runtime.consoleAPICalled" and held["type"] in ("error", "warning", "assert"):
            self.complaints.append(json.dumps(held["args"])[:500])
        elif method == "Log.entryAdded" and held["entry"]["level"] in ("error", "warning"):
            self.complaints.append(f"{held['entry']['text']} {held['entry'].get('url', '')}")

    def open(self, address: str) -> None:
        self.call("Page.navigate", url=address)

    def run(self, script: str):
        """The value of an expression in the page, awaited."""
        found = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, script: str) -> None:
        """Wait until an expression holds; while a page loads, it has not what is asked for."""
        wait_for(lambda: self.run(f"(() => {{ try {{ return Boolean({script}); }} catch {{ return false; }} }})()"))

    def click(self, x: float, y: float, button: str = "left") -> None:
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button=button, clickCount=1)

    def wheel(self, x: float, y: float, by: float) -> None:
        self.call("Input.dispatchMouseEvent", type="mouseWheel", x=x, y=y, deltaX=0, deltaY=by)

    def press(self, key: str) -> None:
        code = KEYS.get(key, ord(key.upper()) if len(key) == 1 else 0)
        text = " " if key == "Space" else key
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=text, windowsVirtualKeyCode=code)

    def picture(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def close(self) -> None:
        self._socket.close()
        self.process.terminate()
        self.process.wait(PATIENCE)


def wait_for(holds) -> None:
    """Ask again and again."""
    end = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
