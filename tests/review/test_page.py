"""The page in a real browser: open, scroll, toggle, click, undo, save, reload; the server is killed, and it goes on."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser, wait_for

from weakmedsam.run.clicks import read_reviewed

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium"),
]
READY = "state.now && state.volumes.label && $('said').textContent === ''"


class Server:
    """``weakmedsam review`` as a process of its own."""

    def __init__(self, run: Path, port: int = 0) -> None:
        words = ["review", "--runs", str(run.parents[1]), "--port", str(port)]
        paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "weakmedsam", *words],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        )
        self.address = next(line for line in self.process.stdout if "http://" in line).split()[-1]
        self.port = int(self.address.split(":")[2].partition("/")[0])

    def stop(self, number: signal.Signals) -> int:
        self.process.send_signal(number)
        return self.process.wait(60)


@pytest.fixture
def server(run):
    found = Server(run)
    yield found
    found.process.kill()
    found.process.wait()


@pytest.fixture
def page(server, tmp_path):
    browser = Browser(tmp_path / "browser")
    browser.open(server.address)
    browser.until(READY)
    yield browser
    browser.close()


def middle(page: Browser, across: float = 0.5, down: float = 0.5) -> list[float]:
    box = "$('slice').getBoundingClientRect()"
    return page.run(f"[{box}.left + {box}.width * {across}, {box}.top + {box}.height * {down}]")


def pixels(page: Browser) -> str:
    return page.run("$('slice').toDataURL()")


def test_open_scroll_toggle_click_undo_reload_kill_and_go_on(run, server, page, tmp_path):
    assert page.run("location.search") == ""  # the key is not left in the address
    first = page.run("state.at.z")
    page.press("ArrowDown")
    page.until(f"state.at.z === {first + 1}")
    page.wheel(*middle(page), -100)
    page.until(f"state.at.z === {first}")

    for key, layer in (("c", "cam"), ("p", "prediction"), ("m", "mask"), ("o", "original")):
        before = pixels(page)
        page.press(key)
        page.until(f"state.volumes.{layer} && state.shown.has('{layer}')")
        page.press(key)
        page.until(f"!state.shown.has('{layer}')")
        assert pixels(page) == before, layer
    before = pixels(page)
    page.press("Space")
    page.until("state.hidden")
    assert pixels(page) != before
    page.press("Space")

    page.click(*middle(page, 0.3, 0.3))
    page.until("state.now.clicks === 1")
    assert "included in" in page.run("$('said').textContent")
    assert pixels(page) != before
    page.click(*middle(page), "right")
    page.until("state.now.clicks === 2")
    assert [click.sign for click in read_reviewed(run).clicks] == [1, -1]
    page.press("z")
    page.until("state.now.clicks === 1")
    page.press("a")
    page.until("state.now.decision === 'accepted'")
    assert page.run("document.querySelectorAll('.mark.accepted').length") == 1

    label = "Array.from(state.volumes.label.values).join()"
    kept, name = page.run(label), page.run("state.now.name")
    page.call("Page.reload")
    page.until(f"{READY} && state.now.clicks === 1")
    assert page.run("state.now.name") == name
    assert page.run(label) == kept
    assert page.complaints == []

    server.stop(signal.SIGKILL)
    page.click(*middle(page, 0.6, 0.4))
    page.until("$('said').classList.contains('problem')")
    assert "does not answer" in page.run("$('said').textContent")
    assert len(read_reviewed(run).clicks) == 1
    page.complaints.clear()  # the browser's own on the refused connection
    again = Server(run, server.port)
    try:
        page.click(*middle(page, 0.6, 0.4))
        page.until("state.now.clicks === 2")
        assert len(read_reviewed(run).clicks) == 2
        page.press("n")
        page.until(f"state.now.name !== '{name}' && {READY}")
        page.picture(tmp_path / "page.png")
        assert page.complaints == []
    finally:
        assert again.stop(signal.SIGINT) in (0, 1, -signal.SIGINT)
    wait_for(lambda: again.process.poll() is not None)


def test_the_page_fits_a_small_window_and_asks_nothing_of_others(page):
    page.call("Emulation.setDeviceMetricsOverride", width=1000, height=640, deviceScaleFactor=2, mobile=False)
    page.until("$('slice').width > $('slice').clientWidth")
    assert page.run("document.documentElement.scrollHeight <= innerHeight")
    assert page.run("performance.getEntriesByType('resource').every(({ name }) => name.startsWith(location.origin))")
    assert page.complaints == []


def test_a_click_into_another_class_is_refused_in_words(page):
    page.run("state.at.z = state.now.present.findIndex((has) => !has.some(Boolean)), draw()")
    page.click(*middle(page))
    page.until("$('said').classList.contains('problem')")
    assert "is labelled without" in page.run("$('said').textContent")
