"""Checkpoints against a local HTTP server that truncates, stalls and lies."""

import json
import os
import pickle
import re
import subprocess
import sys
import threading
import time
import zipfile
from contextlib import contextmanager
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from weakmedsam.backbones import checkpoints, fetching, transfer
from weakmedsam.backbones.checkpoints import KNOWN, check_fit, find, read_weights
from weakmedsam.backbones.fetching import Published, obtain
from weakmedsam.backbones.transfer import Patience
from weakmedsam.contracts import CheckpointError, ConfigError

CONTENT = bytes(torch.randint(256, (300_000,), generator=torch.Generator().manual_seed(0)).tolist())
ITEM = Published("net.pth", len(CONTENT), sha256(CONTENT).hexdigest(), "http://official.invalid/weights")
HASTY = Patience(timeout=0.3, retries=2, pause=0.01)
HALF = len(CONTENT) // 2


class Shop(ThreadingHTTPServer):
    """Serves one content; ``tricks`` are taken one per request, then it is honest.

    A trick is a set of words: ``cut`` (half of what is asked for, then the connection closes), ``stall``
    (half, then silence), ``wobble`` (half or a quarter, in turn), ``whole`` (ignores Range), ``ignorant``
    (ignores If-Range), ``short`` and ``long`` (a wrong Content-Length), ``bare`` (no ETag), or a status code.
    """

    daemon_threads = True

    def __init__(self, content=CONTENT, tricks=(), always=()):
        super().__init__(("127.0.0.1", 0), Counter)
        self.content, self.tag, self.tricks, self.always = content, '"1"', list(tricks), set(always)
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
            shop.asked.append((self.path, self.headers.get("Range"), self.headers.get("If-Range")))
        code = next((word for word in trick if isinstance(word, int)), 200)
        if code != 200:
            self.send_error(code)
            return
        start, range_ = 0, re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        same = self.headers.get("If-Range") in (None, shop.tag) or "ignorant" in trick
        if range_ and same and "whole" not in trick:
            start = int(range_[1])
        if start >= len(shop.content):
            self.send_error(416)
            return
        body = shop.content[start:]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(shop.content) - 1}/{len(shop.content)}")
        self.send_header("Content-Length", str(len(body) - 7 * ("short" in trick) + 7 * ("long" in trick)))
        if "bare" not in trick:
            self.send_header("ETag", shop.tag)
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


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv(checkpoints.MIRROR, raising=False)


def get(folder, server, item=ITEM, patience=HASTY):
    path = obtain(item, folder, server.url, patience)
    assert path.read_bytes() == CONTENT
    return path


def visible(folder):
    """What a reader of the folder takes for a file of weights."""
    return sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))


# Fetching


def test_fetched_once_then_found_without_a_network_and_without_reading(tmp_path, monkeypatch, capsys):
    with shop() as server:
        path = get(tmp_path, server)
        assert path == tmp_path / "net.pth"
        assert server.asked == [("/net.pth", None, None)]
        # No bar in a log file for a short download.
        assert capsys.readouterr().err == f"fetching {server.url}/net.pth to {path}\n"
    monkeypatch.setattr(fetching, "sha256", lambda path: pytest.fail("hashed again"))
    assert obtain(ITEM, tmp_path, "http://127.0.0.1:9", HASTY) == path
    assert visible(tmp_path) == ["net.pth", "net.pth.verified"]
    assert not list(tmp_path.glob(".*part*"))


def test_a_file_put_there_by_hand_is_verified_and_used(tmp_path):
    (tmp_path / "net.pth").write_bytes(CONTENT)
    assert obtain(ITEM, tmp_path, "http://127.0.0.1:9", HASTY).read_bytes() == CONTENT


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_cache_serves_what_it_holds(tmp_path):
    (tmp_path / "net.pth").write_bytes(CONTENT)
    tmp_path.chmod(0o555)
    try:
        assert obtain(ITEM, tmp_path, "http://127.0.0.1:9", HASTY).read_bytes() == CONTENT
    finally:
        tmp_path.chmod(0o755)


def test_a_stamp_that_cannot_be_written_is_done_without(tmp_path, monkeypatch):
    (tmp_path / "net.pth").write_bytes(CONTENT)

    def refuse(path, content):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(fetching, "write_whole", refuse)
    assert obtain(ITEM, tmp_path, "http://127.0.0.1:9", HASTY) == tmp_path / "net.pth"


def test_a_truncated_answer_is_continued_where_it_broke_off(tmp_path):
    with shop(tricks=[{"cut"}]) as server:
        get(tmp_path, server)
        assert server.asked[1] == ("/net.pth", f"bytes={HALF}-", '"1"')
        assert server.sent == [HALF, len(CONTENT) - HALF]


def test_progress_starts_the_count_of_retries_anew(tmp_path):
    with shop(tricks=[{"cut"}] * 6) as server:
        get(tmp_path, server)
    assert len(server.asked) == 7 > 1 + HASTY.retries
    assert sum(server.sent) == len(CONTENT)


def test_a_server_that_always_truncates_is_given_up(tmp_path):
    with (
        shop(always={"cut", "whole"}) as server,
        pytest.raises(CheckpointError, match="broke off after 150,000 of 300,000 bytes"),
    ):
        get(tmp_path, server)
    # The first attempt brought something new, the two retries after it nothing.
    assert len(server.asked) == 1 + HASTY.retries
    assert visible(tmp_path) == []


def test_bytes_that_came_before_are_no_progress(tmp_path):
    # It would go on for ever where each gain over the attempt before counted.
    with (
        shop(tricks=[{"wobble", "whole"}] * 20) as server,
        pytest.raises(CheckpointError, match="broke off after"),
    ):
        get(tmp_path, server)
    assert len(server.asked) == 1 + HASTY.retries


def test_a_stalled_connection_is_given_up_and_continued(tmp_path, capsys):
    with shop(tricks=[{"stall"}]) as server:
        get(tmp_path, server)
        assert server.asked[1][1] == f"bytes={HALF}-"
    assert "no byte for 0.3 s" in capsys.readouterr().err


def test_a_server_that_ignores_ranges_is_read_from_the_start(tmp_path):
    with shop(tricks=[{"cut"}, {"whole"}]) as server:
        get(tmp_path, server)
    assert server.asked[1][1] == f"bytes={HALF}-"
    assert server.sent == [HALF, len(CONTENT)]


@pytest.mark.parametrize("trick", [set(), {"ignorant"}])
def test_pieces_of_two_versions_are_not_put_together(tmp_path, trick, capsys):
    other = bytes(255 - byte for byte in CONTENT[:HALF]) + CONTENT[HALF:]
    with shop(other, tricks=[{"cut"}] * 3) as server, pytest.raises(CheckpointError):
        get(tmp_path, server, patience=Patience(0.3, 0, 0.01))  # leaves a piece of the other version
    part = tmp_path / ".net.pth.part"
    assert part.read_bytes() == other[:HALF]
    with shop(tricks=[trick]) as server:
        note = json.loads((tmp_path / ".net.pth.part.json").read_text())
        note["url"] = f"{server.url}/net.pth"  # the port is another one, the address is meant to be the same
        (tmp_path / ".net.pth.part.json").write_text(json.dumps(note))
        server.tag = '"2"'
        get(tmp_path, server)
        assert server.asked[0] == ("/net.pth", f"bytes={HALF}-", '"1"')
        assert server.sent[-1] == len(CONTENT)
    said = capsys.readouterr().err
    assert ("the file has changed" in said) is bool(trick)
    assert "came in pieces" not in said


def test_pieces_without_a_version_are_verified_together_and_fetched_again_in_one(tmp_path):
    with shop(tricks=[{"cut", "bare"}, {"bare"}, {"bare"}]) as server:
        real, received = transfer._receive, []

        def spoil(url, part, *rest):
            if len(received) == 1:
                part.write_bytes(b"x" + part.read_bytes()[1:])
            received.append(url)
            return real(url, part, *rest)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(transfer, "_receive", spoil)
            get(tmp_path, server)
        assert [asked[1] for asked in server.asked] == [None, f"bytes={HALF}-", None]


def test_a_piece_of_another_address_is_not_continued(tmp_path):
    (tmp_path / ".net.pth.part").write_bytes(b"y" * 1000)
    with shop() as server:
        get(tmp_path, server)
        assert server.asked == [("/net.pth", None, None)]


def test_other_bytes_of_the_right_length_are_refused(tmp_path):
    lie = CONTENT[:-1] + bytes([CONTENT[-1] ^ 1])
    with shop(lie) as server, pytest.raises(CheckpointError) as caught:
        get(tmp_path, server)
    assert sha256(lie).hexdigest() in str(caught.value)
    assert ITEM.sha256 in str(caught.value)
    assert len(server.asked) == 1  # the same again would bring the same
    assert visible(tmp_path) == []
    assert not (tmp_path / ".net.pth.part").exists()


def test_a_file_of_another_length_is_not_even_read(tmp_path):
    with (
        shop(b"<html>please log in</html>") as server,
        pytest.raises(CheckpointError, match="offers 26 bytes where 300,000 are published"),
    ):
        get(tmp_path, server)


@pytest.mark.parametrize("trick", ["short", "long"])
def test_a_wrong_content_length_is_tried_again(tmp_path, trick):
    with shop(tricks=[{trick}]) as server:
        get(tmp_path, server)
        assert len(server.asked) == 2


def test_a_missing_file_is_not_asked_for_twice(tmp_path):
    with shop(always={404}) as server, pytest.raises(CheckpointError, match="HTTP 404"):
        get(tmp_path, server)
    assert len(server.asked) == 1


def test_a_server_out_of_order_is_asked_again(tmp_path):
    with shop(tricks=[{500}, {503}]) as server:
        get(tmp_path, server)
        assert len(server.asked) == 3


def test_an_altered_file_is_named_kept_and_fetched_again(tmp_path, capsys):
    altered = b"z" + CONTENT[1:]
    with shop() as server:
        path = get(tmp_path, server)
        for number, kept in enumerate(("net.pth.damaged", "net.pth.damaged2")):
            path.write_bytes(altered)
            os.utime(path, ns=(number, number))
            get(tmp_path, server)
            assert (tmp_path / kept).read_bytes() == altered
            assert f"{path} is not the published file: kept as {kept}" in capsys.readouterr().err
        path.write_bytes(CONTENT[:100])
        get(tmp_path, server)
        assert len(server.asked) == 4


def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch):
    with shop() as server:
        usage = type("Usage", (), {"free": 1000})
        with monkeypatch.context() as patch:
            patch.setattr(transfer.shutil, "disk_usage", lambda path: usage)
            with pytest.raises(CheckpointError, match=r"300,000 bytes are needed in .*, 1,000 are free"):
                get(tmp_path, server)
        assert visible(tmp_path) == []
        # A disk that fills up while writing: a limit on the size of files fails in the same way.
        limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))"
        done = child(tmp_path, server, limit).communicate(timeout=60)
        assert re.search(r"CheckpointError: .*\.part cannot be written", done[1])
        assert visible(tmp_path) == []
        get(tmp_path, server)


# Several processes

CHILD = """
import sys
{before}
from weakmedsam.backbones.fetching import Published, obtain
from weakmedsam.backbones.transfer import Patience
from pathlib import Path
print(obtain(Published({item!r}, {size}, {hash!r}, ""), Path({folder!r}), {url!r}, Patience(10, 2, 0.01)))
assert "torch" not in sys.modules
"""


def child(folder, server, before=""):
    code = CHILD.format(
        before=before, item=ITEM.file, size=ITEM.size, hash=ITEM.sha256, folder=str(folder), url=server.url
    )
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", code], stdout=pipe, stderr=pipe, text=True)


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


# Archives


def zipped(*members):
    data = BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in members:
            packed.writestr(name, content)
    return data.getvalue()


PACKED = ITEM._replace(archive="net.pth.zip")


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


# By name


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv(checkpoints.CACHE, str(folder))
    monkeypatch.setitem(KNOWN, "sam_vit_b", ITEM)
    return folder


def test_offline_it_says_which_file_to_put_where(cache, monkeypatch):
    with pytest.raises(CheckpointError) as caught:
        find("sam_vit_b", patience=Patience(0.3, 0, 0))
    said = str(caught.value)
    assert "http://official.invalid/weights/net.pth" in said
    assert str(cache / "net.pth") in said
    assert "weights: none" in said
    monkeypatch.setitem(KNOWN, "sam_vit_b", PACKED)
    with pytest.raises(CheckpointError, match=r"net\.pth lies in it.*put it at .*/cache/net\.pth\.zip"):
        find("sam_vit_b", patience=Patience(0.3, 0, 0))


def test_a_mirror_by_argument_or_environment(cache, monkeypatch):
    with shop() as server:
        monkeypatch.setenv(checkpoints.MIRROR, f"{server.url}/mirror/")
        assert find("sam_vit_b", patience=HASTY) == cache / "net.pth"
        (cache / "net.pth").unlink()
        find("sam_vit_b", mirror=f"{server.url}/other", patience=HASTY)
        assert [asked[0] for asked in server.asked] == ["/mirror/net.pth", "/other/net.pth"]
    monkeypatch.setenv(checkpoints.MIRROR, "file:///data")
    with pytest.raises(ConfigError, match="no http address"):
        find("sam_vit_b")


def test_an_unknown_name_lists_the_known():
    with pytest.raises(ConfigError, match=r"'sam_vit_x'.*sam_vit_b, sam_vit_l"):
        find("sam_vit_x")


def test_the_cache_folder(monkeypatch):
    monkeypatch.setenv(checkpoints.CACHE, "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert checkpoints.cache_folder() == Path("/a")
    monkeypatch.delenv(checkpoints.CACHE)
    assert checkpoints.cache_folder() == Path("/b/weakmedsam")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert checkpoints.cache_folder() == Path.home() / ".cache/weakmedsam"


def test_the_command(cache, capsys):
    with shop() as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv(checkpoints.MIRROR, server.url)
        assert checkpoints.main(["pocket", "samus", "sam_vit_b"]) == 0
        assert len(server.asked) == 1
    said = capsys.readouterr().out
    assert "pocket: its weights are in the package; nothing to fetch" in said
    assert said.count(str(cache / "net.pth")) == 2
    assert checkpoints.main(["nonsense"]) == 1
    assert "error: 'nonsense' is no known checkpoint" in capsys.readouterr().err


def test_every_known_file_has_a_whole_hash_and_every_backbone_a_known_file():
    for item in KNOWN.values():
        assert re.fullmatch(r"[0-9a-f]{64}", item.sha256)
        assert item.base.startswith("https://")
    assert set(checkpoints.BACKBONES.values()) - {None} == set(KNOWN)
    backbones = Path(__file__).parent.parent / "experiments/backbone"
    assert {path.stem for path in backbones.glob("*.yaml")} <= set(checkpoints.BACKBONES)


def test_the_docs_name_every_file_with_size_and_hash():
    text = (Path(__file__).parent.parent / "docs/weights.md").read_text()
    for item in KNOWN.values():
        assert item.sha256 in text
        assert f"{item.size:,}" in text
        assert item.base in text
        assert (item.archive or item.file) in text


# Reading


def tensors():
    return {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.float16)}


def same(found):
    assert found.keys() == tensors().keys()
    assert all(
        torch.equal(found[key], value) and found[key].dtype == value.dtype for key, value in tensors().items()
    )


@pytest.mark.parametrize("form", ["flat", "model", "state_dict", "module", "old", "safetensors"])
def test_every_form_of_weights_is_read(tmp_path, form):
    path, own = tmp_path / "w.bin", tensors()
    if form == "safetensors":
        save_file(own, path)
    elif form == "module":
        torch.save({"state_dict": {f"module.{k}": v for k, v in own.items()}, "epoch": 3}, path)
    elif form == "old":
        torch.save(own, path, _use_new_zipfile_serialization=False)
    else:
        torch.save(own if form == "flat" else {form: own, "epoch": 3}, path)
    same(read_weights(path))


def test_a_common_prefix_only(tmp_path):
    torch.save({"module.a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "w.pth")
    assert list(read_weights(tmp_path / "w.pth")) == ["module.a", "b"]


class Payload:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("form", ["new", "old", "raw", "raw 0", "in model"])
def test_a_pickle_with_code_in_it_is_refused_and_not_run(tmp_path, form):
    path, trap = tmp_path / "w.pth", tmp_path / "sprung"
    content = {"a": torch.ones(2), "b": Payload(str(trap))}
    if form.startswith("raw"):
        path.write_bytes(pickle.dumps({"b": Payload(str(trap))}, protocol=0 if "0" in form else None))
    elif form == "in model":
        torch.save({"model": content}, path)
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "new")
    # The trap works: plain unpickling would spring it.
    if form == "raw":
        pickle.loads(path.read_bytes())
        trap.rmdir()
    said = (
        "not a checkpoint"
        if form == "raw 0"
        else r"refused: it contains code or objects \(\w+\.mkdir\), and only"
    )
    with pytest.raises(CheckpointError, match=said) as caught:
        read_weights(path)
    assert str(path) in str(caught.value)
    assert not trap.exists()


@pytest.mark.filterwarnings("ignore:.*TorchScript.*")
def test_a_program_is_refused(tmp_path):
    path = tmp_path / "net.jit"
    torch.jit.trace(torch.nn.Linear(1, 1), torch.ones(1, 1)).save(path)
    with pytest.raises(
        CheckpointError, match=r"refused: it contains code or objects \(a TorchScript program"
    ):
        read_weights(path)


@pytest.mark.parametrize("form", ["new", "old", "safetensors"])
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_a_truncated_file_is_named(tmp_path, form, share):
    path, own = tmp_path / "w.pth", {"a": torch.rand(1000)}
    if form == "safetensors":
        save_file(own, path)
    else:
        torch.save(own, path, _use_new_zipfile_serialization=form == "new")
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(CheckpointError, match=rf"{re.escape(str(path))} is damaged or not a checkpoint"):
        read_weights(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({}, "holds no weights but a dict"),
        ([1, 2], "holds no weights but a list"),
        ({"a": torch.ones(1), "epoch": 3}, "not a flat dictionary of tensors: 'epoch' is a int"),
        ({"model": {"net": {"a": torch.ones(1)}}}, "'net' is a dict"),
    ],
)
def test_what_is_no_dictionary_of_tensors_is_refused(tmp_path, content, said):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=said):
        read_weights(tmp_path / "w.pth")


def test_what_is_no_checkpoint_is_named(tmp_path):
    (tmp_path / "w.pth").write_text("<html>please log in</html>")
    with pytest.raises(CheckpointError, match=r"w\.pth is not a checkpoint"):
        read_weights(tmp_path / "w.pth")
    (tmp_path / "w.pth").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"w\.pth is not a checkpoint"):
        read_weights(tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"nowhere\.pth does not exist"):
        read_weights(tmp_path / "nowhere.pth")


# Fitting


def test_what_fits_passes_whatever_its_order_and_precision():
    own = tensors()
    check_fit(own, {key: value.half() for key, value in reversed(own.items())}, "file.pth", "net")


def test_what_does_not_fit_is_one_message_with_both_names_and_shapes():
    own = {f"k{n}": torch.ones(2, n) for n in range(6)}
    given = {"k0": torch.ones(2, 0), "k1": torch.ones(3, 1), "k2": torch.ones(2, 9), "new": torch.ones(5)}
    with pytest.raises(CheckpointError) as caught:
        check_fit(own, given, "file.pth", "net")
    said = str(caught.value)
    assert (
        "file.pth holds another network, this backbone is net: of 6 tensors 3 are missing and 2 have another shape"
        in said
    )
    assert "1 of the checkpoint's 4 are unknown" in said
    assert said.splitlines()[1:] == [
        "  k1: net (2, 1), checkpoint (3, 1)",
        "  k2: net (2, 2), checkpoint (2, 9)",
        "  k3: net (2, 3), checkpoint not there",
        "  k4: net (2, 4), checkpoint not there",
    ]
