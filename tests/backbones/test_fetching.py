"""Several processes that fetch, and files that lie in archives."""

import re
import time

import pytest
from weights_server import CONTENT, HALF, HASTY, PACKED, child, get, shop, visible, zipped

from weakmedsam.backbones import checkpoints
from weakmedsam.backbones.fetching import obtain
from weakmedsam.errors import CheckpointError


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv(checkpoints.MIRROR, raising=False)


def test_two_processes_at_once_fetch_once(tmp_path):
    with shop(tricks=[{"stall"}]) as server:
        first = child(tmp_path, server)
        assert server.reached.wait(30)  # it is in the middle of fetching
        second = child(tmp_path, server)
        said = second.stderr.readline()
        server.release.set()
        answers = [process.communicate(timeout=60) for process in (first, second)]
    assert "another process is fetching it; waiting" in said
    assert [answer[0].strip() for answer in answers] == [str(tmp_path / "net.pth")] * 2
    assert sum(server.sent) == len(CONTENT)
    assert [asked[1] for asked in server.asked] == [None, f"bytes={HALF}-"]  # both of the first process


def test_a_killed_download_is_continued_by_the_next_process(tmp_path):
    part = tmp_path / ".net.pth.part"
    with shop(tricks=[{"stall"}]) as server:
        process = child(tmp_path, server)
        assert server.reached.wait(30)
        for _ in range(500):
            if part.exists() and part.stat().st_size == HALF:
                break
            time.sleep(0.01)
        process.kill()
        process.communicate(timeout=30)
        assert part.stat().st_size == HALF
        assert visible(tmp_path) == []
        get(tmp_path, server)
        assert server.asked[1] == ("/net.pth", f"bytes={HALF}-", '"1"')


def test_killed_between_the_last_byte_and_the_name(tmp_path):
    (tmp_path / ".net.pth.part").write_bytes(CONTENT)
    with shop() as server:
        get(tmp_path, server)
        assert server.asked == []


def test_an_archive_is_fetched_unpacked_and_verified(tmp_path):
    good = zipped(("__MACOSX/._net.pth", b"?"), ("net.pth", CONTENT))
    with shop(good, tricks=[{"cut"}]) as server:
        assert get(tmp_path, server, PACKED).read_bytes() == CONTENT
        assert [asked[:2] for asked in server.asked] == [
            ("/net.pth.zip", None),
            ("/net.pth.zip", f"bytes={len(good) // 2}-"),
        ]
    assert visible(tmp_path) == ["net.pth", "net.pth.verified"]
    assert not list(tmp_path.glob(".*part*"))


def test_an_archive_put_there_by_hand_is_unpacked(tmp_path):
    (tmp_path / "net.pth.zip").write_bytes(zipped(("net.pth", CONTENT)))
    assert obtain(PACKED, tmp_path, "http://127.0.0.1:9", HASTY).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (zipped(("../escaped", b"x"), ("net.pth", CONTENT)), "'../escaped', which leads out of its folder"),
        (zipped(("/tmp/escaped", b"x"), ("net.pth", CONTENT)), "leads out of its folder"),
        (zipped(("a\\..\\..\\escaped", b"x"), ("net.pth", CONTENT)), "leads out of its folder"),
        (zipped(("other.pth", CONTENT)), "does not hold net.pth of 300,000 bytes"),
        (zipped(("net.pth", CONTENT + b"x")), "does not hold net.pth of 300,000 bytes"),
        (zipped(("net.pth", CONTENT[1:] + b"x")), "another file than the published"),
        (zipped(("net.pth", CONTENT))[:-100], "not a sound zip file"),
    ],
)
def test_an_archive_of_something_else_is_refused(tmp_path, content, said):
    with shop(content) as server, pytest.raises(CheckpointError, match=re.escape(said)):
        get(tmp_path / "cache", server, PACKED)
    assert visible(tmp_path / "cache") == []
    assert visible(tmp_path) == ["cache"]


def test_a_damaged_archive_is_kept_and_fetched_again(tmp_path, capsys):
    (tmp_path / "net.pth.zip").write_bytes(b"PK\3\4 and nothing else")
    with shop(zipped(("net.pth", CONTENT))) as server:
        get(tmp_path, server, PACKED)
    assert "kept as net.pth.zip.damaged" in capsys.readouterr().err
    assert "net.pth.zip.damaged" in visible(tmp_path)
