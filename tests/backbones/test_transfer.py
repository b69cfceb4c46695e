"""Fetching against a local HTTP server that truncates, stalls and lies."""

import json
import os
import re
from hashlib import sha256

import pytest
from weights_server import CONTENT, HALF, HASTY, ITEM, child, get, shop, visible

from weakmedsam.backbones import checkpoints, fetching, transfer
from weakmedsam.backbones.fetching import obtain
from weakmedsam.backbones.transfer import Patience
from weakmedsam.errors import CheckpointError


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv(checkpoints.MIRROR, raising=False)


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
