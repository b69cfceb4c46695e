import csv
import errno
import os
import subprocess
import sys

import pytest
import torch

from weakmedsam.errors import DataError, DiskError
from weakmedsam.system.atomic_io import (
    SEGMENTATIONS,
    STORE,
    WEIGHTS_CACHE,
    read_table,
    replacing,
    rows_before,
    write_table,
    write_whole,
)


def test_a_file_is_replaced_whole_and_nothing_is_left_beside_it(tmp_path):
    path = tmp_path / "folder" / "file"
    for content in (b"a long first content", "kürzer"):
        write_whole(path, content)
    assert [other.name for other in path.parent.iterdir()] == ["file"]
    assert path.read_bytes() == "kürzer".encode()


def test_what_fails_half_way_leaves_the_earlier_file(tmp_path):
    path = tmp_path / "file"
    write_whole(path, "whole")

    def fail():
        with replacing(path) as part:
            part.write_text("ha")
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        fail()
    assert [other.name for other in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "whole"


def test_a_table_leaves_empty_what_a_row_lacks(tmp_path):
    path = tmp_path / "table.csv"
    write_table(path, ["case", "dice"], [{"case": "a, b", "dice": 0.5}, {"case": "c"}])
    with path.open(newline="", encoding="utf-8") as file:
        assert list(csv.DictReader(file)) == [{"case": "a, b", "dice": "0.5"}, {"case": "c", "dice": ""}]


# In a process of its own, because the limit cannot be raised again: files may have 200 kB at most.
FULL = """
import resource, sys
from pathlib import Path
import numpy as np, torch
from safetensors.numpy import save_file
from weakmedsam.cli import WholeCheckpoints
from weakmedsam.errors import DiskError
from weakmedsam.system.atomic_io import replacing, write_whole
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
path = Path(sys.argv[1])
for write in (
    lambda: WholeCheckpoints().save_checkpoint({"state_dict": {"a": torch.zeros(100_000)}}, str(path)),
    lambda: write_whole(path, bytes(400_000)),
):
    try:
        write()
    except DiskError as error:
        print(error)
try:
    with replacing(path) as part:
        save_file({"a": np.zeros(100_000)}, part)
except DiskError as error:
    print(error)
"""


def test_on_a_full_disk_the_error_names_file_and_mend_and_the_earlier_checkpoint_loads(tmp_path):
    path = tmp_path / "last.ckpt"
    torch.save({"epoch": 1}, path)
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(path)], capture_output=True, text=True, check=True, timeout=120
    )
    told = done.stdout.splitlines()
    assert len(told) == 3, done.stdout + done.stderr
    assert all(f"{path} could not be written: its disk is full" in line for line in told)
    assert all("Free space there, or put the run elsewhere (make RUNS=" in line for line in told)
    assert torch.load(path, weights_only=True) == {"epoch": 1}
    assert sorted(other.name for other in tmp_path.iterdir()) == ["last.ckpt"]


def test_what_fails_otherwise_is_not_taken_for_a_full_disk(tmp_path):
    for wrong in (ValueError("odd"), DataError("bad"), PermissionError(errno.EACCES, "no")):
        with pytest.raises(type(wrong)), replacing(tmp_path / "file"):
            raise wrong
    for number in (errno.ENOSPC, errno.EDQUOT):
        with pytest.raises(DiskError), replacing(tmp_path / "file"):
            raise RuntimeError("of a library") from OSError(number, os.strerror(number))
    assert not list(tmp_path.iterdir())


def test_a_table_is_read_as_it_was_written_line_breaks_in_cells_included(tmp_path):
    rows = [{"case": "a", "reason": "two\nlines\u2028and \x0c more"}, {"case": 'b"', "reason": ""}]
    write_table(tmp_path / "t.csv", ("case", "reason"), rows)
    assert read_table(tmp_path / "t.csv") == rows


def test_of_a_damaged_table_by_epoch_what_can_be_read_is_kept(tmp_path):
    path = tmp_path / "history.csv"
    assert rows_before(path, 5) == []
    path.write_text("epoch,loss\n0,1\n1,0.5\n2,0.25\n,7\nx,8\n1.5,9\n3\n1,2,3\n")
    assert [row["loss"] for row in rows_before(path, 2)] == ["1", "0.5"]
    assert "1.5,9" in (tmp_path / "history.csv.old1").read_text()  # nothing is lost
    for content in (b"", b"\xff\xfe\x00", b"loss\n1\n", b"x" * 200_000 + b"\n1\n"):
        path.write_bytes(content)
        assert rows_before(path, 5) == []
    path.write_bytes(b"epoch,loss\n0,0.5\n1,\xff\n")
    assert [row["epoch"] for row in rows_before(path, 5)] == ["0", "1"]
    path.unlink()
    path.mkdir()
    assert rows_before(path, 5) == []
    assert not path.exists()


def test_the_option_of_the_folder_that_is_full_is_named(tmp_path):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    for movable, option in (
        (STORE, "--data.prepare.store_dir"),
        (SEGMENTATIONS, "OUT="),
        (WEIGHTS_CACHE, "WEAKMEDSAM_CACHE"),
    ):
        with pytest.raises(DiskError, match=option) as found, replacing(tmp_path / "file", movable):
            raise full
        assert "RUNS" not in str(found.value)
    with pytest.raises(DiskError, match="RUNS="), replacing(tmp_path / "file"):
        raise full


# Files may have 20 kB at most: volumes, stores and segmentations are larger.
PLACES = """
import resource, sys
from pathlib import Path
import numpy as np
from data_modules.cases import Case, Intensity
from data_modules.store_index import StoreSpec, SCAN_SLICES, write_text
from data_modules.phantom import write_phantom
from data_modules.phantom_drawing import PhantomParameters
from data_modules.store import read_case, write_case
from weakmedsam.errors import DiskError
folder = Path(sys.argv[1])
root = write_phantom(folder / "scans", PhantomParameters(slices=8, size=64), 1)
names = [root / kind / "phantom_000.nii.gz" for kind in ("images", "masks")]
spec = StoreSpec("phantom", str(root), "", 64, "axial", Intensity(), {"lesion": (1,), "distractor": (2,)}, ())
arrays = read_case(Case("a", "a", *map(str, names)), spec)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
for store in (folder / "data/store", folder / "out" / SCAN_SLICES / "store"):
    store.mkdir(parents=True)
    for write in (lambda: write_case(arrays, store), lambda: write_text(store / "index.json", "x" * 30_000)):
        try:
            write()
        except DiskError as error:
            print(error)
try:
    write_phantom(folder / "more", PhantomParameters(slices=40, size=128), 1)
except DiskError as error:
    print(error)
print(sorted(p.name for p in folder.rglob("*") if p.is_file() and "part" in p.name))
"""


def test_stores_new_scans_and_drawn_scans_name_the_option_of_their_own_folder(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", PLACES, str(tmp_path)], capture_output=True, text=True, check=True, timeout=120
    )
    told = done.stdout.splitlines()
    options = ["--data.prepare.store_dir", "--data.prepare.store_dir", "OUT=", "OUT=", "--data.data_dir"]
    assert len(told) == 6, done.stdout + done.stderr
    assert all(option in line and "RUNS" not in line for option, line in zip(options, told, strict=False))
    assert told[-1] == "[]"
