"""Which network segments new scans, and what its command is told; torch is not needed for it."""

import json
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import yaml
from fakes import save_nifti

from weakmedsam import predict as module
from weakmedsam.contracts import ConfigError
from weakmedsam.predict import find_network, last_round, main, name_maker, predict, prediction_config

PAM = {
    "class_path": "weakmedsam.callbacks.PromptAffinityMining",
    "init_args": {"grid": 8, "presence": "given"},
}


def write_stage(run: Path, stage: str, made: int, network: str) -> None:
    """A stage as it lies there when it is done."""
    folder = run / stage
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints/best.ckpt").touch()
    (folder / "stage.json").write_text(json.dumps({"made": made}))
    args = {"class_names": ["left", "right"], "pam": json.loads(json.dumps(PAM))}
    config = {
        "seed_everything": 0,
        "model": {"class_path": network, "init_args": args},
        "data": {
            "class_path": "data_modules.phantom.Phantom",
            "init_args": {
                "data_dir": "elsewhere", "image_size": 32, "supervision": "pseudo", "pseudo_labels_dir": "gone",
            },
        },
        "trainer": {"devices": 8, "precision": "bf16-mixed", "max_epochs": 3, "logger": True, "callbacks": [1]},
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


@pytest.fixture
def run(tmp_path) -> Path:
    folder = tmp_path / "runs/phantom/default"
    write_stage(folder, "classify", 1, "WeakMedSAM")
    write_stage(folder, "segment", 2, "Segmenter")
    (folder / "prepare").mkdir()
    (folder / "prepare/data.json").write_text(json.dumps({"classes": {"left": [4], "right": [5]}}))
    return folder


@pytest.fixture
def scans(tmp_path) -> Path:
    for name in ("a", "b"):
        save_nifti(tmp_path / f"scans/{name}.nii.gz", np.arange(60, dtype=np.int16).reshape(5, 4, 3))
    return tmp_path / "scans"


def pam_of(config):
    return config["model"]["init_args"]["pam"]["init_args"]


def test_the_last_finished_round_is_taken(run):
    assert last_round(run) == 1
    write_stage(run, "segment_2", 3, "Segmenter")
    (run / "segment_3").mkdir()  # begun, not done
    assert last_round(run) == 2
    assert find_network(run, plain=True).checkpoint == run / "segment_2/checkpoints/best.ckpt"


def test_a_run_without_a_network_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"phantom/nobody has no trained segmentation network.*make train"):
        find_network(tmp_path / "phantom/nobody", plain=False)


def test_pam_has_the_settings_of_the_runs_own_stage(run):
    write_stage(run, "refined", 3, "WeakMedSAM")
    held = find_network(run, plain=False)
    assert pam_of(held.config) == PAM["init_args"] | {"start": str(run / "segment/checkpoints/best.ckpt")}
    assert held.checkpoint == run / "classify/checkpoints/best.ckpt"


def test_or_its_default_ones_where_no_test_case_had_a_mask(run):
    found = pam_of(find_network(run, plain=False).config)
    own = yaml.safe_load(Path("experiments/refined.yaml").read_text())["model"]["init_args"]["pam"][
        "init_args"
    ]
    assert found == PAM["init_args"] | own | {"start": str(run / "segment/checkpoints/best.ckpt")}
    assert found["presence"] == "predicted"


def test_the_prediction_has_the_runs_model_data_and_devices_and_nothing_of_its_training(run, tmp_path):
    config = prediction_config(find_network(run, plain=True), Path("scans"), tmp_path, "x")
    data = config["data"]["init_args"]
    assert data["like"]["init_args"] == {
        "data_dir": "elsewhere", "image_size": 32, "supervision": "image", "pseudo_labels_dir": None,
    }  # fmt: skip
    assert "class_names" not in config["model"]["init_args"]
    assert config["trainer"] == {
        "devices": 8, "precision": "bf16-mixed", "logger": False, "callbacks": [], "enable_checkpointing": False,
        "default_root_dir": str(tmp_path / "provenance"),
    }  # fmt: skip


def test_a_maker_has_another_name_with_other_weights_settings_or_options(run):
    def name(options=(), plain=True):
        return name_maker(find_network(run, plain), list(options))

    first = name()
    assert name() == first
    assert name(plain=False) != first
    assert name(["--trainer.precision", "32-true"]) != first
    path = run / "segment/stage.json"
    path.write_text(json.dumps({"made": 9}))
    assert name() != first
    path.write_text(json.dumps({"made": 2}))
    assert name() == first
    config = run / "segment/config.yaml"
    config.write_text(config.read_text().replace("image_size: 32", "image_size: 64"))
    assert name() != first


def test_a_run_that_is_moved_is_the_same_maker(run, tmp_path):
    names = [name_maker(find_network(run, plain), []) for plain in (True, False)]
    moved = run.rename(tmp_path / "moved")
    assert [name_maker(find_network(moved, plain), []) for plain in (True, False)] == names


def finish(scans, out, made_by):
    """As the prediction does."""
    from data_modules.new_scans import find_scans, mark_of, segmentation_path, write_segmentation
    from data_modules.volumes import read_volume

    for case in find_scans(scans):
        voxels, geometry = read_volume(case.image)
        ids = np.where(voxels < 20, 2, 0).astype(np.uint8)
        write_segmentation(segmentation_path(out, case.name), ids, geometry, mark_of(case, made_by))


def test_what_is_all_done_is_measured_and_nothing_is_started(run, scans, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module.subprocess, "run", lambda *words, **settings: pytest.fail("started"))
    out = tmp_path / "out"
    finish(scans, out, name_maker(find_network(run, plain=True), []))
    (out / ".slices").mkdir()
    predict(run, scans, out, plain=True, options=[])
    assert "all 2 scans are segmented already" in capsys.readouterr().out
    lines = (out / "volumes.csv").read_text().split()
    assert lines[0] == "case,class,ml,voxels,slices"
    assert lines[1:3] == ["a,left,0.000,0,0", "a,right,0.180,20,3"]  # 1.5 x 2 x 3 mm
    assert len(lines) == 5
    assert not (out / ".slices").exists()


def test_only_what_is_left_is_asked_for_and_a_failure_keeps_what_there_is(run, scans, tmp_path, monkeypatch):
    asked = []

    def fail(words, **settings):
        asked.append(words)
        return subprocess.CompletedProcess(words, 3)

    monkeypatch.setattr(module.subprocess, "run", fail)
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as left:
        predict(run, scans, out, plain=True, options=["--trainer.devices", "2"])
    assert left.value.code == 3
    assert asked[0][1:4] == ["-m", "weakmedsam", "predict"]
    assert asked[0][-2:] == ["--trainer.devices", "2"]
    held = yaml.safe_load((out / "provenance/predict.yaml").read_text())
    assert held["data"]["init_args"]["scans"] == str(scans)


def test_scans_are_never_written_over(run, scans, tmp_path):
    before = (scans / "a.nii.gz").read_bytes()
    for asked in (scans, scans / "a.nii.gz"):
        with pytest.raises(ConfigError, match="folder of the scans, which would be written over"):
            predict(run, asked, tmp_path / "scans", plain=True, options=[])
    assert (scans / "a.nii.gz").read_bytes() == before
    assert nib.load(scans / "a.nii.gz").shape == (5, 4, 3)


def test_a_scan_that_is_left_out_is_named(run, scans, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"

    def leave_one(words, **settings):
        finish(scans, out, name_maker(find_network(run, plain=True), []))
        (out / "b.nii.gz").unlink()
        return subprocess.CompletedProcess(words, 0)

    monkeypatch.setattr(module.subprocess, "run", leave_one)
    predict(run, scans, out, plain=True, options=[])
    assert "not segmented: " in capsys.readouterr().out
    assert {line.split(",")[0] for line in (out / "volumes.csv").read_text().split()[1:]} == {"a"}


def test_the_command_line_says_what_is_wrong_in_one_message(tmp_path):
    with pytest.raises(SystemExit, match=r"weakmedsam: ConfigError: .*has no trained segmentation network"):
        main(["--scans", str(tmp_path), "--runs", str(tmp_path)])


def test_it_needs_no_torch():
    code = "import sys, weakmedsam.predict; sys.exit('torch' in sys.modules or 'lightning' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
