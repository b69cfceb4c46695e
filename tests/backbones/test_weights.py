"""Official weights by name, declared in the backbones' files; several processes that download them."""

import re
import time
from pathlib import Path

import pytest
from weights_server import CONTENT, ITEM, KEPT, PACKED, child, get, impatient, shop, visible  # noqa: F401

from weakmedsam.backbones import weights
from weakmedsam.backbones.weights import declared, find
from weakmedsam.errors import CheckpointError, ConfigError

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("impatient")


def test_two_processes_at_once_fetch_once(tmp_path):
    with shop(tricks=[{"stall"}]) as server:
        first = child(tmp_path, server)
        assert server.reached.wait(30)  # it is in the middle of fetching
        second = child(tmp_path, server)
        said = second.stderr.readline()
        server.release.set()
        answers = [process.communicate(timeout=60) for process in (first, second)]
    assert "another process is downloading it; waiting" in said
    assert [answer[0].strip() for answer in answers] == [str(tmp_path / "net.pth")] * 2
    assert len(server.sent) == 2
    assert [asked[1] for asked in server.asked] == [None, f"bytes={KEPT}-"]  # both of the first process


def test_a_killed_download_is_continued_by_the_next_process(tmp_path):
    part = tmp_path / ".net.pth.part"
    with shop(tricks=[{"stall"}]) as server:
        process = child(tmp_path, server)
        assert server.reached.wait(30)
        for _ in range(500):
            if part.exists() and part.stat().st_size == KEPT:
                break
            time.sleep(0.01)
        process.kill()
        process.communicate(timeout=30)
        assert part.stat().st_size == KEPT
        assert visible(tmp_path) == []
        get(tmp_path, server)
        assert server.asked[1] == ("/net.pth", f"bytes={KEPT}-")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv(weights.CACHE, str(folder))
    monkeypatch.setattr(weights, "declared", lambda: {"sam_vit_b": ITEM, "samus": ITEM, "pocket": None})
    return folder


def test_offline_it_says_which_file_to_put_where(cache, monkeypatch):
    with pytest.raises(CheckpointError) as caught:
        find("sam_vit_b")
    said = str(caught.value)
    assert "http://official.invalid/weights/net.pth" in said
    assert str(cache / "net.pth") in said
    assert "weights: none" in said
    monkeypatch.setattr(weights, "declared", lambda: {"sam_vit_b": PACKED})
    with pytest.raises(CheckpointError, match=r"net\.pth lies in it.*put it at .*/cache/net\.pth\.zip"):
        find("sam_vit_b")


def test_a_mirror_by_environment(cache, monkeypatch):
    with shop() as server:
        monkeypatch.setenv(weights.MIRROR, f"{server.url}/mirror/")
        assert find("sam_vit_b") == cache / "net.pth"
        assert [asked[0] for asked in server.asked] == ["/mirror/net.pth"]
    monkeypatch.setenv(weights.MIRROR, "file:///data")
    with pytest.raises(ConfigError, match="no http address"):
        find("sam_vit_b")


def test_an_unknown_name_lists_the_known():
    with pytest.raises(ConfigError, match=r"'sam_vit_x'.*sam_vit_b, sam_vit_h"):
        find("sam_vit_x")


def test_the_cache_folder(monkeypatch):
    monkeypatch.setenv(weights.CACHE, "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert weights.cache_folder() == Path("/a")
    monkeypatch.delenv(weights.CACHE)
    assert weights.cache_folder() == Path("/b/weakmedsam")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert weights.cache_folder() == Path.home() / ".cache/weakmedsam"


def test_the_command(cache, capsys):
    with shop() as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv(weights.MIRROR, server.url)
        assert weights.main(["pocket", "samus", "sam_vit_b"]) == 0
        assert len(server.asked) == 1
    said = capsys.readouterr().out
    assert "pocket: nothing to download" in said
    assert said.count(str(cache / "net.pth")) == 2
    assert weights.main(["nonsense"]) == 1
    assert "error: 'nonsense' has no official weights" in capsys.readouterr().err


def test_the_command_lists_what_is_declared(capsys):
    assert weights.main([]) == 0
    said = capsys.readouterr().out
    for item in filter(None, declared().values()):
        assert all(fact in said for fact in (item.file, f"{item.size:,}", item.sha256, item.url, item.licence))
    assert "pocket: nothing to download" in said


def test_every_backbone_declares_its_weights_or_that_there_are_none():
    known = declared()
    for item in filter(None, known.values()):
        assert re.fullmatch(r"[0-9a-f]{64}", item.sha256)
        assert item.url.startswith("https://")
    backbones = {path.stem for path in (ROOT / "experiments/backbone").glob("*.yaml")}
    assert backbones - known.keys() == set(), "declare WEIGHTS in the backbone's file: docs/extending.md"
    assert known["samus"] is known["sam_vit_b"]


def test_a_new_backbone_declares_its_weights_in_its_own_file(tmp_path):
    fields = {"url": ITEM.url, "size": ITEM.size, "sha256": ITEM.sha256, "licence": ITEM.licence}
    declaration = {"mine": fields, "mine_frozen": "mine", "small": None}
    (tmp_path / "mine.py").write_text(f"import nowhere\nWEIGHTS = {declaration}\n")  # it is not imported
    (tmp_path / "decoder.py").write_text("SIZES = {'a': 1}\n")
    assert declared(tmp_path) == {"mine": ITEM, "mine_frozen": ITEM, "small": None}


@pytest.mark.parametrize(
    ("declaration", "said"),
    [
        ("make()", r"mine\.py: WEIGHTS is a literal dictionary, .*malformed node"),
        ("{'mine': {'url': 'x'}}", r"mine\.py: .*missing 3 required .* 'size', 'sha256'"),
        ("{'mine': 'theirs'}", "names theirs, declared nowhere"),
        ("['mine']", r"mine\.py: .*literal dictionary"),
    ],
)
def test_a_wrong_declaration_is_named(tmp_path, declaration, said):
    (tmp_path / "mine.py").write_text(f"WEIGHTS = {declaration}\n")
    with pytest.raises(ConfigError, match=said):
        declared(tmp_path)


def test_a_name_that_two_files_declare_is_named(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.py").write_text("WEIGHTS = {'mine': None}\n")
    with pytest.raises(ConfigError, match=r"b\.py: .*'mine' is declared twice"):
        declared(tmp_path)
