"""Fetching against a local HTTP server that truncates, stalls and lies."""

import os
import re
from hashlib import sha256
from pathlib import Path

import pooch
import pytest
from weights_server import CONTENT, HALF, ITEM, KEPT, PACKED, child, get, impatient, shop, visible, zipped  # noqa: F401

from weakmedsam.backbones import download, weights
from weakmedsam.backbones.weights import obtain
from weakmedsam.errors import CheckpointError

pytestmark = pytest.mark.usefixtures("impatient")


def test_fetched_once_then_found_without_a_network_and_without_reading(tmp_path, monkeypatch, capsys):
    with shop() as server:
        path = get(tmp_path, server)
        assert path == tmp_path / "net.pth"
        assert server.asked == [("/net.pth", None)]
        # No bar in a log file for a short download.
        assert capsys.readouterr().err == f"downloading {server.url}/net.pth to {path}\n"
    monkeypatch.setattr(pooch, "file_hash", lambda *_: pytest.fail("hashed again"))
    assert obtain(ITEM, tmp_path, "http://127.0.0.1:9") == path
    assert visible(tmp_path) == ["net.pth", "net.pth.verified"]
    assert not list(tmp_path.glob(".*part*"))


def test_a_file_put_there_by_hand_is_verified_and_used(tmp_path):
    (tmp_path / "net.pth").write_bytes(CONTENT)
    assert obtain(ITEM, tmp_path, "http://127.0.0.1:9").read_bytes() == CONTENT


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_cache_serves_what_it_holds(tmp_path):
    (tmp_path / "net.pth").write_bytes(CONTENT)
    tmp_path.chmod(0o555)
    try:
        assert obtain(ITEM, tmp_path, "http://127.0.0.1:9").read_bytes() == CONTENT
    finally:
        tmp_path.chmod(0o755)


def test_a_stamp_that_cannot_be_written_is_done_without(tmp_path, monkeypatch):
    (tmp_path / "net.pth").write_bytes(CONTENT)

    def refuse(path, content):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(weights, "write_whole", refuse)
    assert obtain(ITEM, tmp_path, "http://127.0.0.1:9") == tmp_path / "net.pth"


def test_a_truncated_answer_is_continued_where_it_broke_off(tmp_path):
    with shop(tricks=[{"cut"}]) as server:
        get(tmp_path, server)
        assert server.asked == [("/net.pth", None), ("/net.pth", f"bytes={KEPT}-")]
        assert server.sent == [HALF, len(CONTENT) - KEPT]


def test_progress_starts_the_count_of_retries_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "CHUNK_BYTES", 2**10)
    with shop(tricks=[{"cut"}] * 6) as server:
        get(tmp_path, server)
    assert len(server.asked) > 1 + download.RETRIES
    starts = [int(asked[1][6:-1]) for asked in server.asked[1:]]
    assert starts == sorted(set(starts))


def test_a_server_that_always_truncates_is_given_up(tmp_path):
    with (
        shop(always={"cut", "whole"}) as server,
        pytest.raises(CheckpointError, match="150000 bytes read, 150000 more expected"),
    ):
        get(tmp_path, server)
    # The first attempt brought something new, the two retries after it nothing.
    assert len(server.asked) == 1 + download.RETRIES
    assert visible(tmp_path) == []


def test_bytes_that_came_before_are_no_progress(tmp_path):
    # It would go on for ever where each gain over the attempt before counted.
    with (
        shop(tricks=[{"wobble", "whole"}] * 20) as server,
        pytest.raises(CheckpointError, match="Connection broken"),
    ):
        get(tmp_path, server)
    assert len(server.asked) == 1 + download.RETRIES


def test_a_stalled_connection_is_given_up_and_continued(tmp_path, capsys):
    with shop(tricks=[{"stall"}]) as server:
        get(tmp_path, server)
        assert server.asked[1][1] == f"bytes={KEPT}-"
    assert "Read timed out" in capsys.readouterr().err


def test_a_server_that_ignores_ranges_is_read_from_the_start(tmp_path):
    with shop(tricks=[{"cut"}, {"whole"}]) as server:
        get(tmp_path, server)
    assert server.asked[1][1] == f"bytes={KEPT}-"
    assert server.sent == [HALF, len(CONTENT)]


def test_parts_of_two_versions_fail_the_hash_and_are_downloaded_again_in_one(tmp_path, monkeypatch, capsys):
    other = bytes(255 - byte for byte in CONTENT[:HALF]) + CONTENT[HALF:]
    monkeypatch.setattr(download, "RETRIES", 0)
    with shop(other, tricks=[{"cut"}] * 3) as server, pytest.raises(CheckpointError):
        get(tmp_path, server)  # leaves a part of the other version
    part = tmp_path / ".net.pth.part"
    assert part.read_bytes() == other[:KEPT]
    capsys.readouterr()
    with shop() as server:
        get(tmp_path, server)
        assert [asked[1] for asked in server.asked] == [f"bytes={KEPT}-", None]
    assert "It came in parts and is downloaded again in one" in capsys.readouterr().err


def test_a_part_of_something_else_fails_the_hash_and_is_downloaded_again(tmp_path):
    (tmp_path / ".net.pth.part").write_bytes(b"y" * 1000)
    with shop() as server:
        get(tmp_path, server)
        assert [asked[1] for asked in server.asked] == ["bytes=1000-", None]


def test_a_part_longer_than_the_file_is_downloaded_anew(tmp_path):
    (tmp_path / ".net.pth.part").write_bytes(CONTENT + b"y")
    with shop() as server:
        get(tmp_path, server)
        assert [asked[1] for asked in server.asked] == [f"bytes={len(CONTENT) + 1}-", None]


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
        pytest.raises(CheckpointError, match="26 bytes are offered, 300,000 are published"),
    ):
        get(tmp_path, server)


@pytest.mark.parametrize("trick", ["short", "long"])
def test_a_wrong_content_length_is_tried_again(tmp_path, trick):
    with shop(tricks=[{trick}]) as server:
        get(tmp_path, server)
        assert len(server.asked) == 2


def test_a_missing_file_is_not_asked_for_twice(tmp_path):
    with shop(always={404}) as server, pytest.raises(CheckpointError, match="404 Client Error"):
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
        for number, kept in enumerate(("net.pth.old1", "net.pth.old2")):
            path.write_bytes(altered)
            os.utime(path, ns=(number, number))
            get(tmp_path, server)
            assert (tmp_path / kept).read_bytes() == altered
            assert f"{path} is not the published file: kept as net.pth.old" in capsys.readouterr().err
        path.write_bytes(CONTENT[:100])
        get(tmp_path, server)
        assert len(server.asked) == 4


def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch):
    with shop() as server:
        usage = type("Usage", (), {"free": 1000})
        with monkeypatch.context() as patch:
            patch.setattr(download.shutil, "disk_usage", lambda path: usage)
            with pytest.raises(CheckpointError, match=r"300,000 bytes are needed in .*, 1,000 are free"):
                get(tmp_path, server)
        assert visible(tmp_path) == []
        # A disk that fills up while writing: a limit on the size of files fails in the same way.
        limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))"
        done = child(tmp_path, server, limit).communicate(timeout=60)
        assert re.search(r"CheckpointError: .*\.part cannot be written", done[1])
        assert visible(tmp_path) == []
        get(tmp_path, server)


def test_killed_between_the_last_byte_and_the_name(tmp_path):
    (tmp_path / ".net.pth.part").write_bytes(CONTENT)
    with shop() as server:
        get(tmp_path, server)
        assert server.asked == []


def test_an_archive_is_fetched_unpacked_and_verified(tmp_path):
    good = zipped(("__MACOSX/._net.pth", b"?"), ("net.pth", CONTENT))
    with shop(good, tricks=[{"cut"}]) as server:
        assert get(tmp_path, server, PACKED).read_bytes() == CONTENT
        assert server.asked == [
            ("/net.pth.zip", None),
            ("/net.pth.zip", f"bytes={len(good) // 2 // 2**16 * 2**16}-"),
        ]
    assert visible(tmp_path) == ["net.pth", "net.pth.verified"]
    assert not list(tmp_path.glob(".*part*"))


def test_an_archive_put_there_by_hand_is_unpacked(tmp_path):
    (tmp_path / "net.pth.zip").write_bytes(zipped(("net.pth", CONTENT)))
    assert obtain(PACKED, tmp_path, "http://127.0.0.1:9").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (zipped(("other.pth", CONTENT)), "does not hold net.pth of 300,000 bytes"),
        (zipped(("net.pth", CONTENT + b"x")), "does not hold net.pth of 300,000 bytes"),
        (zipped(("net.pth", CONTENT[1:] + b"x")), "does not match the known hash"),
        (zipped(("net.pth", CONTENT))[:-100], "not a sound zip file"),
    ],
)
def test_an_archive_of_something_else_is_refused(tmp_path, content, said):
    with shop(content) as server, pytest.raises(CheckpointError, match=re.escape(said)):
        get(tmp_path / "cache", server, PACKED)
    assert visible(tmp_path / "cache") == []
    assert visible(tmp_path) == ["cache"]


@pytest.mark.parametrize("name", ["../net.pth", "/tmp/weakmedsam-escaped/net.pth", "a\\..\\..\\escaped"])
def test_no_member_of_an_archive_leaves_the_folder(tmp_path, name):
    members = [(name, CONTENT)] + ([] if name.endswith("net.pth") else [("net.pth", CONTENT)])
    with shop(zipped(*members)) as server:
        get(tmp_path / "cache", server, PACKED)
    assert visible(tmp_path / "cache") == ["net.pth", "net.pth.verified"]
    assert visible(tmp_path) == ["cache"]
    assert not Path("/tmp/weakmedsam-escaped").exists()


def test_a_damaged_archive_is_kept_and_fetched_again(tmp_path, capsys):
    (tmp_path / "net.pth.zip").write_bytes(b"PK\3\4 and nothing else")
    with shop(zipped(("net.pth", CONTENT))) as server:
        get(tmp_path, server, PACKED)
    assert "kept as net.pth.zip.old" in capsys.readouterr().err
    assert "net.pth.zip.old1" in visible(tmp_path)
