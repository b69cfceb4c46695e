"""What the command that segments unlabelled scans is told, and what it says; torch is not needed for it."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from fakes import save_nifti
from made_run import write_run

from data_modules.scan_io import find_scans, mark_of, segmentation_path, write_segmentation
from data_modules.store import stamp
from data_modules.volumes import read_volume
from weakmedsam.errors import ConfigError
from weakmedsam.run import predict as module
from weakmedsam.run.predict import CONFIG, main, predict, prediction_config
from weakmedsam.run.trained_network import find_network, name_maker
from weakmedsam.system.signals import REQUEUE, Relay


@pytest.fixture
def run(tmp_path) -> Path:
    return write_run(tmp_path / "runs/phantom/default")


@pytest.fixture
def scans(tmp_path) -> Path:
    for name in ("a", "b[x]"):
        save_nifti(tmp_path / f"scans/{name}.nii.gz", np.arange(60, dtype=np.int16).reshape(5, 4, 3))
    return tmp_path / "scans"


def test_the_prediction_has_the_runs_model_data_and_precision_and_nothing_of_its_training(run, tmp_path):
    config = prediction_config(find_network(run, plain=True), Path("scans"), tmp_path, "x", "CT*")
    data = config["data"]["init_args"]
    assert data["series"] == "CT*"
    assert data["like"]["init_args"] == {
        "data_dir": "elsewhere", "image_size": 32, "labels": {"supervision": "image"},
    }  # fmt: skip
    assert "class_names" not in config["model"]["init_args"]
    assert config["trainer"] == {
        "devices": 1, "precision": "bf16-mixed", "logger": False, "callbacks": [], "enable_checkpointing": False,
        "default_root_dir": str(tmp_path / "provenance"),
    }  # fmt: skip


def finish(scans, out, run, *names):
    """As the prediction does."""
    made_by = name_maker(find_network(run, plain=True), [])
    for case in find_scans(scans):
        if case.name in names:
            voxels, geometry = read_volume(case.image)
            ids = np.where(voxels < 20, 2, 0).astype(np.uint8)
            mark = mark_of(stamp(case, str(scans)), made_by)
            write_segmentation(segmentation_path(out, case.name), ids, geometry, mark)


@pytest.fixture
def started(monkeypatch):
    """What is started, instead of being run; ``also`` is called then, ``code`` is how it ends."""

    class Started(list):
        code = 0

        @staticmethod
        def also():
            return None

    held = Started()

    def note(relay, words):
        held.append([str(word) for word in words])
        held.also()
        return held.code

    monkeypatch.setattr(Relay, "run", note)
    return held


def test_what_is_all_done_is_measured_and_nothing_is_started(run, scans, tmp_path, started, capsys):
    out = tmp_path / "out"
    finish(scans, out, run, "a", "b[x]")
    (out / ".slices").mkdir()
    (out / ".a.nii.gz.1.part").touch()
    predict(run, scans, out, plain=True, options=[])
    said = capsys.readouterr().out
    assert "all 2 scans are segmented already" in said
    assert "b[x]" in said
    assert str(out / "volumes.csv") in said
    lines = (out / "volumes.csv").read_text().split()
    assert lines[0] == "case,class,ml,voxels,slices"
    assert lines[1:3] == ["a,left,0.000,0,0", "a,right,0.180,20,3"]  # 1.5 x 2 x 3 mm
    assert len(lines) == 5
    assert not started
    assert not list(out.glob(".*.part"))
    assert not (out / ".slices").exists()


def test_it_says_which_network_it_takes_and_how_far_it_has_come(run, scans, tmp_path, started, capsys):
    finish(scans, tmp_path / "out", run, "a")
    predict(run, scans, tmp_path / "out", plain=True, options=["--trainer.devices", "2"])
    said = capsys.readouterr().out
    assert f"network: {run / 'segment'}, not refined" in said
    assert "1 of 2 scans are segmented already" in said
    ((_, *words),) = started
    assert words == [
        "-m",
        "weakmedsam",
        "predict",
        "--config",
        str(tmp_path / "out" / CONFIG),
        "--trainer.devices",
        "2",
    ]
    held = yaml.safe_load((tmp_path / "out" / CONFIG).read_text())
    assert held["data"]["init_args"]["scans"] == str(scans)


@pytest.mark.parametrize(("asked", "code"), [(False, 3), (True, REQUEUE)])
def test_after_a_failure_or_a_signal_what_is_there_stays(run, scans, tmp_path, started, monkeypatch, asked, code):
    out = tmp_path / "out"
    finish(scans, out, run, "a")
    before = (out / "a.nii.gz").read_bytes()
    started.code = 3
    # As its handler notes it.
    monkeypatch.setattr(Relay, "asked", property(lambda relay: asked, lambda relay, value: None), raising=False)
    with pytest.raises(SystemExit) as left:
        predict(run, scans, out, plain=True, options=[])
    assert left.value.code == code
    assert (out / "a.nii.gz").read_bytes() == before


@pytest.mark.parametrize("alone", [False, True])
def test_scans_are_never_written_over(run, scans, tmp_path, alone):
    before = (scans / "a.nii.gz").read_bytes()
    with pytest.raises(ConfigError, match="folder of the scans, which would be written over"):
        predict(run, scans / "a.nii.gz" if alone else scans, tmp_path / "scans", plain=True, options=[])
    assert (scans / "a.nii.gz").read_bytes() == before


def test_segmentations_of_two_folders_are_not_mixed_and_a_moved_one_is_the_same(run, scans, tmp_path, started):
    out = tmp_path / "out"
    started.also = lambda: finish(scans, out, run, "a", "b[x]")
    predict(run, scans, out, plain=True, options=[])
    save_nifti(tmp_path / "others/a.nii.gz", np.zeros((5, 4, 3), np.int16))
    with pytest.raises(ConfigError, match=rf"--out .*holds segmentations of the scans in {scans}: name another"):
        predict(run, tmp_path / "others", out, plain=True, options=[])
    predict(run, scans.rename(tmp_path / "moved"), out, plain=True, options=[])
    assert len(started) == 1
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is a file; name a folder"):
        predict(run, tmp_path / "moved", tmp_path / "file", plain=True, options=[])


def test_a_scan_that_is_left_out_is_named_with_the_reason_each_time(run, scans, tmp_path, started, capsys):
    out = tmp_path / "out"

    def leave_one():
        finish(scans, out, run, "a")
        (out / ".slices/scans-1").mkdir(parents=True, exist_ok=True)
        (out / ".slices/scans-1/skipped.csv").write_text('case,reason\nb[x],"it is [broken]"\n')

    started.also = leave_one
    for _ in range(2):
        predict(run, scans, out, plain=True, options=[])
        assert "not segmented: b[x]: it is [broken]" in capsys.readouterr().out
        assert (out / "skipped.csv").read_text().split("\n")[1].strip() == "b[x],it is [broken]"
        assert {line.split(",")[0] for line in (out / "volumes.csv").read_text().split()[1:]} == {"a"}
    started.also = lambda: finish(scans, out, run, "b[x]")
    predict(run, scans, out, plain=True, options=[])
    assert not (out / "skipped.csv").exists()


def test_where_results_go_by_default(run, scans, started, monkeypatch):
    places = []
    monkeypatch.setattr(module, "predict", lambda run, scans, out, plain, options, *_: places.append((out, options)))
    common = ["--runs", str(run.parent.parent), "--scans"]
    main([*common, str(scans)])
    main([*common, str(scans / "a.nii.gz"), "--plain", "--", "--trainer.devices", "2"])
    assert places == [
        (run / "segmentations/scans", []),
        (run / "segmentations/a-plain", ["--trainer.devices", "2"]),
    ]


def test_the_command_line_says_what_is_wrong_in_one_message(tmp_path):
    with pytest.raises(SystemExit, match=r"weakmedsam: ConfigError: .*has no trained segmentation network"):
        main(["--scans", str(tmp_path), "--runs", str(tmp_path)])


def test_it_needs_no_torch():
    code = "import sys, weakmedsam.run.predict; sys.exit('torch' in sys.modules or 'lightning' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
