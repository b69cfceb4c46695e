import errno
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from terminals import Terminal

from data_modules import wholeness
from data_modules.cases import Case, Intensity
from data_modules.formats import nifti
from data_modules.prepare import _bare_workers, prepare, table_labels
from data_modules.store import SliceReader
from data_modules.store_index import StoreSpec, read_index
from data_modules.wholeness import find_broken_files
from tests.fakes import RAS, SHAPE, draw_scan, fake_folder, save_nifti
from weakmedsam.errors import DataError, MemoryShortError

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent


def cases_of(root: Path, number: int = 4) -> list[Case]:
    names = [f"scan{n}" for n in range(number)]
    return [Case(n, n, str(root / "images" / f"{n}.nii.gz"), str(root / "masks" / f"{n}.nii.gz")) for n in names]


def spec_of(root: Path) -> StoreSpec:
    return StoreSpec("fake", str(root), "", 16, "axial", Intensity(), {"tumour": (1,)}, ())


@pytest.fixture
def root(tmp_path) -> Path:
    return fake_folder(tmp_path / "scans", 4)


@pytest.fixture
def reads(monkeypatch) -> Counter:
    """How often each file is opened."""
    counter: Counter = Counter()
    opened = nifti._open

    def count(path):
        counter[Path(path).name] += 1
        return opened(path)

    monkeypatch.setattr(nifti, "_open", count)
    return counter


def content(store: Path) -> dict[str, bytes]:
    return {str(p.relative_to(store)): p.read_bytes() for p in sorted(store.rglob("*")) if p.is_file()}


def test_each_volume_is_read_once_and_then_no_more(root, tmp_path, reads):
    store = spec_of(root).folder(tmp_path / "data")
    prepare(cases_of(root), spec_of(root), tmp_path / "data", workers=1)
    assert sum(reads.values()) == 8
    before = {p: p.stat().st_mtime_ns for p in store.rglob("*") if p.name != ".lock"}
    reads.clear()
    index = prepare(cases_of(root), spec_of(root), tmp_path / "data", workers=1)
    assert not reads
    assert {p: p.stat().st_mtime_ns for p in store.rglob("*") if p.name != ".lock"} == before
    assert read_index(store) == index


def test_whatever_has_taken_the_place_of_the_lock_goes(root, tmp_path):
    lock = spec_of(root).folder(tmp_path) / ".lock"
    lock.parent.mkdir()
    lock.symlink_to(lock)
    prepare(cases_of(root)[:1], spec_of(root), tmp_path, workers=1)
    lock.unlink()
    lock.mkdir()
    prepare(cases_of(root)[:1], spec_of(root), tmp_path, workers=1)
    assert lock.is_file()


def test_a_changed_source_is_read_again_and_others_are_not(root, tmp_path, reads):
    prepare(cases_of(root), spec_of(root), tmp_path, workers=1)
    image = draw_scan(99)[0]
    save_nifti(root / "images" / "scan2.nii.gz", image)
    reads.clear()
    index = prepare(cases_of(root), spec_of(root), tmp_path, workers=1)
    assert sum(reads.values()) == 2
    assert index.entries["scan2"].high == pytest.approx(np.percentile(image[image > 0], 99.5))


def test_processes_write_what_one_writes_and_show_how_far_they_are(root, tmp_path, monkeypatch):
    terminal = Terminal(monkeypatch, 80)
    prepare(cases_of(root), spec_of(root), tmp_path / "one", workers=1)
    prepare(cases_of(root), spec_of(root), tmp_path / "two", workers=2)
    count = len(cases_of(root))
    assert [re.sub(r" +━+ ", " ", line)[:-5] for line in terminal.lines()] == [
        f"  volume {count}/{count} 100%    took"
    ] * 2  # each bar ends whole
    key = spec_of(root).folder("").name
    assert content(tmp_path / "one" / key) == content(tmp_path / "two" / key)


def run_script(text: str, path: Path, *arguments: object) -> subprocess.CompletedProcess:
    path.write_text(textwrap.dedent(text))
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "src", ROOT / "tests", HERE))),
    }
    return subprocess.run(
        [sys.executable, str(path), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )


def test_a_killed_preparation_is_continued_to_the_same_files(root, tmp_path, reads):
    script = """
        import os, signal, sys
        from pathlib import Path
        import numpy as np
        from data_modules.prepare import prepare
        from test_prepare import cases_of, spec_of
        save, calls = np.savez_compressed, []
        def kill_at_third(path, **arrays):
            calls.append(path)
            if len(calls) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            save(path, **arrays)
        np.savez_compressed = kill_at_third
        root = Path(sys.argv[1])
        prepare(cases_of(root), spec_of(root), sys.argv[2], workers=1)
    """
    done = run_script(script, tmp_path / "killed.py", root, tmp_path / "killed")
    assert done.returncode == -signal.SIGKILL, done.stderr
    store = spec_of(root).folder(tmp_path / "killed")
    assert any(p.name.startswith(".part-") for p in store.iterdir())
    assert sorted(p.name for p in store.iterdir() if not p.name.startswith(".")) == ["scan0", "scan1"]
    prepare(cases_of(root), spec_of(root), tmp_path / "killed", workers=1)
    assert sum(reads.values()) == 4  # the two that were finished are not read again
    prepare(cases_of(root), spec_of(root), tmp_path / "whole", workers=1)
    assert content(store) == content(spec_of(root).folder(tmp_path / "whole"))


def test_a_killed_worker_is_said_with_what_to_lower_and_the_same_call_continues(root, tmp_path):
    done = threading.Event()

    def kill():
        while not done.wait(0.05):
            for child in multiprocessing.active_children():
                os.kill(child.pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        with pytest.raises(MemoryShortError, match=r"prepares volumes was ended: .*--data\.prepare\.workers"):
            prepare(cases_of(root), spec_of(root), tmp_path / "data", workers=2)
    finally:
        done.set()
        killer.join()
    assert len(prepare(cases_of(root), spec_of(root), tmp_path / "data", workers=2).entries) == 4


def test_workers_end_with_a_killed_parent(root, tmp_path):
    script = """
        import multiprocessing, os, signal, sys, threading, time
        from pathlib import Path
        from data_modules.prepare import prepare
        from test_prepare import cases_of, spec_of
        def kill_when_started():
            while len(children := multiprocessing.active_children()) < 2:
                time.sleep(0.01)
            print(*(child.pid for child in children), flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        threading.Thread(target=kill_when_started).start()
        root = Path(sys.argv[1])
        prepare(cases_of(root), spec_of(root), sys.argv[2], workers=2)
    """
    done = run_script(script, tmp_path / "parent.py", root, tmp_path / "data")
    assert done.returncode == -signal.SIGKILL
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 2
    until = time.monotonic() + 120
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < until, "orphaned workers are still there"
        time.sleep(0.1)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_an_unguarded_script_is_not_run_again_by_workers(root, tmp_path):
    script = """
        import sys
        from pathlib import Path
        from data_modules.prepare import prepare
        from test_prepare import cases_of, spec_of
        print("started")
        root = Path(sys.argv[1])
        print(len(prepare(cases_of(root), spec_of(root), sys.argv[2], workers=2).entries))
    """
    done = run_script(script, tmp_path / "plain.py", root, tmp_path / "data")
    assert done.stdout.split() == ["started", "4"], done.stderr


def spoil(root: Path) -> None:
    """scan1 becomes constant, scan3's mask gets an unknown value."""
    save_nifti(root / "images" / "scan1.nii.gz", np.ones(SHAPE, np.int16))
    mask = draw_scan(3)[1]
    mask[0, 0, 0] = 9
    save_nifti(root / "masks" / "scan3.nii.gz", mask)


def test_all_bad_cases_are_told_at_once(root, tmp_path):
    spoil(root)
    cases = [*cases_of(root), Case("scan4", "scan4", "", problem="scan4: is a mask without its image")]
    with pytest.raises(DataError, match=r"(?s)3 of 5 .*scan1.*constant.*scan3.*values 9.*scan4.*skip"):
        prepare(cases, spec_of(root), tmp_path, workers=1)


def test_bad_cases_are_left_out_and_listed_on_request(root, tmp_path, reads, caplog):
    spoil(root)
    index = prepare(cases_of(root), spec_of(root), tmp_path, workers=1, on_bad_case="skip")
    assert sorted(index.entries) == ["scan0", "scan2"]
    listed = (spec_of(root).folder(tmp_path) / "skipped.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in listed] == ["case", "scan1", "scan3"]
    assert "scan1" in caplog.text
    reads.clear()
    prepare(cases_of(root), spec_of(root), tmp_path, workers=1, on_bad_case="skip")
    assert not reads  # an unchanged bad case is not tried again
    save_nifti(root / "images" / "scan1.nii.gz", draw_scan(1)[0])
    assert "scan1" in prepare(cases_of(root), spec_of(root), tmp_path, 1, "skip").entries


def test_nothing_left_is_an_error(root, tmp_path):
    for number in range(4):
        save_nifti(root / "images" / f"scan{number}.nii.gz", np.ones(SHAPE, np.int16))
    with pytest.raises(DataError, match="No case is left"):
        prepare(cases_of(root), spec_of(root), tmp_path, workers=1, on_bad_case="skip")


@pytest.mark.parametrize("up", [1.0, -1.0])
def test_a_table_counts_along_the_files_own_axis(tmp_path, up):
    image, mask = draw_scan(0)
    mask[..., 1:4] = 0  # present in slice 4 of the file only
    affine = np.diag([1.0, 1.0, up, 1.0])
    paths = [str(save_nifti(tmp_path / n, v, affine)) for n, v in (("i.nii", image), ("m.nii", mask))]
    table = {k: (int(mask[..., k].any()),) for k in range(SHAPE[2])}
    index = prepare([Case("a", "a", *paths, table)], spec_of(tmp_path), tmp_path, workers=1)
    entry = index.entries["a"]
    assert entry.counts is not None
    assert entry.table == tuple((int(row[0] > 0),) for row in entry.counts)
    assert entry.table.index((1,)) == (4 if up > 0 else 1)
    assert SliceReader(spec_of(tmp_path).folder(tmp_path)).mask("a")[4 if up > 0 else 1].any()


def test_a_corrected_table_costs_no_reading(root, tmp_path, reads):
    first = [replace(case, table=dict.fromkeys(range(6), (0,))) for case in cases_of(root)]
    prepare(first, spec_of(root), tmp_path, workers=1)
    reads.clear()
    second = [replace(case, table=dict.fromkeys(range(6), (1,))) for case in cases_of(root)]
    assert prepare(second, spec_of(root), tmp_path, workers=1).entries["scan0"].table == ((1,),) * 6
    assert not reads


def test_a_table_that_does_not_fit_is_refused(root, tmp_path):
    cases = [replace(case, table=dict.fromkeys(range(7), (0,))) for case in cases_of(root)[:1]]
    with pytest.raises(DataError, match=r"slices 0 to 5; labels\.csv has rows for 6, which are not there"):
        prepare(cases, spec_of(root), tmp_path, workers=1)
    spec = replace(spec_of(root), plane="coronal")
    index = prepare(cases_of(root)[:1], spec, tmp_path, workers=1)
    with pytest.raises(DataError, match="third axis"):
        table_labels(cases[0], index.entries["scan0"])


def test_cases_up_to_date_are_not_opened(tmp_path, reads):
    root = fake_folder(tmp_path / "scans", 1)
    image, mask = root / "images" / "scan0.nii.gz", root / "masks" / "scan0.nii.gz"
    cases = [Case(f"c{n}", f"c{n}", str(image), str(mask)) for n in range(9)]
    prepare(cases, spec_of(root), tmp_path, workers=1)
    assert sum(reads.values()) == 18
    prepare(cases, spec_of(root), tmp_path, workers=1)
    assert sum(reads.values()) == 18


def test_headers_without_a_unit_are_named_once(tmp_path, caplog):
    image, mask = draw_scan(0)
    (tmp_path / "scans").mkdir()
    for name, voxels in (("i", image), ("m", mask)):
        nib.save(nib.Nifti1Image(voxels, RAS), tmp_path / f"scans/{name}.nii.gz")
    cases = [Case("bare", "bare", str(tmp_path / "scans/i.nii.gz"), str(tmp_path / "scans/m.nii.gz"))]
    for said in (["1 header(s) state no unit of length, taken as mm: bare"], []):
        caplog.clear()
        prepare(cases, spec_of(tmp_path / "scans"), tmp_path, workers=1)
        assert caplog.messages == said


def test_a_corrected_patient_costs_no_reading_and_is_kept(root, tmp_path, reads):
    prepare(cases_of(root), spec_of(root), tmp_path, workers=1)
    reads.clear()
    corrected = [replace(case, patient="one and the same") for case in cases_of(root)]
    for cases, patients in (
        (corrected, {"one and the same"}),
        (cases_of(root), {f"scan{n}" for n in range(4)}),
    ):
        index = prepare(cases, spec_of(root), tmp_path, workers=1)
        assert {entry.patient for entry in index.entries.values()} == patients
        assert read_index(spec_of(root).folder(tmp_path)) == index
    assert not reads


def test_a_mask_that_comes_and_goes_is_noticed(root, tmp_path):
    without = [replace(case, mask=None) for case in cases_of(root)]
    for cases, masked in ((without, False), (cases_of(root), True), (without, False)):
        index = prepare(cases, spec_of(root), tmp_path, workers=1)
        assert {entry.has_mask for entry in index.entries.values()} == {masked}


def garble(path: Path, how: str) -> None:
    """Damage a file, or what lies there: as disks, copies and people do."""
    content = path.read_bytes()
    path.unlink()
    if how == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif how == "flipped":
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    elif how == "another":
        path.write_text('["valid", "but", "of", "another", "kind"]')
    elif how == "folder":
        path.mkdir()


@pytest.mark.parametrize("how", ["gone", "cut", "flipped", "another", "folder"])
@pytest.mark.parametrize("name", ["image.npy", "mask.npy", "mask_native.npz", "entry.json"])
def test_a_damaged_volume_alone_is_prepared_again(root, tmp_path, reads, caplog, name, how):
    store = spec_of(root).folder(tmp_path)
    prepare(cases_of(root), spec_of(root), tmp_path, workers=1)
    before = content(store)
    garble(store / "scan2" / name, how)
    assert list(find_broken_files(store)) == [str(store / "scan2" / name)]
    reads.clear()
    prepare(cases_of(root), spec_of(root), tmp_path, workers=1)
    assert sum(reads.values()) == 2
    assert content(store) == before
    assert find_broken_files(store) == {}
    assert f"scan2/{name}" in caplog.text
    assert "the volume is prepared again" in caplog.text


@pytest.mark.parametrize("how", ["gone", "cut", "flipped", "another", "folder"])
@pytest.mark.parametrize("name", ["index.json", "skipped.csv"])
def test_a_damaged_index_is_made_anew_without_reading_a_volume(root, tmp_path, reads, name, how):
    store = spec_of(root).folder(tmp_path)
    prepare(cases_of(root), spec_of(root), tmp_path, workers=1)
    before = content(store)
    garble(store / name, how)
    assert list(find_broken_files(store)) == [str(store / name)] * (name == "index.json")
    if name == "index.json":
        assert read_index(store) is None
    reads.clear()
    prepare(cases_of(root), spec_of(root), tmp_path, workers=1)
    assert not reads
    assert content(store) == before


def test_the_folder_of_another_case_in_a_cases_place_is_noticed(root, tmp_path):
    store = spec_of(root).folder(tmp_path)
    prepare(cases_of(root), spec_of(root), tmp_path, workers=1)
    before = content(store)
    shutil.rmtree(store / "scan0")
    shutil.copytree(store / "scan1", store / "scan0")
    (store / "scan3").rename(tmp_path / "scan3")
    (store / "scan3").touch()  # a file in a folder's place
    assert set(find_broken_files(store)) & {str(store / "scan0/image.npy"), str(store / "scan0/entry.json")}
    prepare(cases_of(root), spec_of(root), tmp_path, workers=1)
    assert content(store) == before


def test_a_copied_store_is_as_good(root, tmp_path, reads):
    store = spec_of(root).folder(tmp_path)
    prepare(cases_of(root), spec_of(root), tmp_path, workers=1)
    copied = shutil.copytree(store, tmp_path / "moved" / store.name, copy_function=shutil.copy)  # with new times
    assert find_broken_files(copied) == {}
    reads.clear()
    prepare(cases_of(root), spec_of(root), tmp_path / "moved", workers=1)
    assert not reads


def test_a_case_that_could_not_be_read_for_the_moment_is_tried_again(root, tmp_path, monkeypatch):
    cases, opened = cases_of(root), nifti._open
    for fault in (OSError(errno.EIO, "Input/output error"), MemoryError()):

        def fail(path, fault=fault):
            if Path(path).name == "scan1.nii.gz":
                raise fault
            return opened(path)

        monkeypatch.setattr(nifti, "_open", fail)
        index = prepare(cases, spec_of(root), tmp_path, workers=1, on_bad_case="skip")
        assert list(index.skipped) == ["scan1"]
        assert "scan1.nii.gz: " in index.skipped["scan1"][1]
        monkeypatch.setattr(nifti, "_open", opened)
        index = prepare(cases, spec_of(root), tmp_path, workers=1, on_bad_case="skip")
        assert index.skipped == {}
        shutil.rmtree(spec_of(root).folder(tmp_path))


def test_a_store_that_was_copied_without_its_times_is_read_whole_once(root, tmp_path, monkeypatch):
    store = spec_of(root).folder(tmp_path)
    prepare(cases_of(root), spec_of(root), tmp_path, workers=1)
    for path in store.rglob("*"):
        os.utime(path, (2e9, 2e9))
    read = []
    checksum = wholeness.checksum
    monkeypatch.setattr(wholeness, "checksum", lambda path: read.append(path) or checksum(path))
    for path in store.rglob("entry.json"):
        os.utime(path, (1, 1))
    for path in store.rglob("*.np?"):
        os.utime(path, (2, 2))
    assert find_broken_files(store) == {}
    assert len(read) == 12
    assert find_broken_files(store) == {}
    assert len(read) == 12


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_ctrl_c_is_the_callers_to_answer_not_its_workers():
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        with _bare_workers():
            blocked = pool.submit(signal.pthread_sigmask, signal.SIG_BLOCK, [])
        assert signal.SIGINT in blocked.result(timeout=60)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
