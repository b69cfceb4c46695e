"""``weakmedsam check``: which settings it takes, where the page goes, and its exit status."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.fakes import draw_scan, fake_folder, save_nifti
from weakmedsam.data_commands import check_command
from weakmedsam.errors import ConfigError
from weakmedsam.run.check import check_words, main
from weakmedsam.run.init import init
from weakmedsam.run.pipeline import run
from weakmedsam.run.request import Request

ROOT = Path(__file__).parents[2]


def request_of(tmp_path: Path, **more) -> Request:
    settings = {"options": [("data.image_size", ["16"]), ("classify.trainer.max_epochs", ["1"])], **more}
    return Request("folder", "check", "pocket", str(tmp_path / "scans"), tmp_path / "runs", **settings)


def test_it_takes_the_settings_of_prepare_and_no_others(tmp_path):
    words = check_words(request_of(tmp_path), tmp_path / "out")
    assert words[:3] == ["check", "--output", str(tmp_path / "out")]
    assert words[3:5] == ["--config", "experiments/data/folder.yaml"]
    assert words[-4:] == ["--data.data_dir", str(tmp_path / "scans"), "--data.image_size", "16"]


def test_a_mistyped_option_or_data_set_is_told_at_once(tmp_path):
    with pytest.raises(ConfigError, match=r"--dta\.image_size concerns no stage"):
        check_words(request_of(tmp_path, options=[("dta.image_size", ["16"])]), tmp_path)
    with pytest.raises(SystemExit, match=r"there is no .*nowhere\.yaml|nowhere"):
        main(["--dataset", "nowhere"])


def test_no_run_takes_the_place_of_the_check(tmp_path):
    with pytest.raises(ConfigError, match="EXPERIMENT=check: the check lies in a folder of that name"):
        run("train", request_of(tmp_path))


def test_a_yaml_of_init_is_checked_and_faults_give_status_1(tmp_path, capsys):
    root = fake_folder(tmp_path / "scans", 6)
    yaml = init(root, tmp_path / "clinic.yaml")
    words = ["--config", str(yaml), "--output", str(tmp_path / "out"), "--data.prepare.store_dir", str(tmp_path / "s")]
    capsys.readouterr()
    assert check_command([*words, "--data.prepare.workers", "1"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "headers    6 case(s), 0 with a fault"
    assert said[-1] == f"page       {tmp_path / 'out' / 'check.html'}"
    assert "<h1>Check of clinic " in (tmp_path / "out" / "check.html").read_text()
    save_nifti(root / "masks" / "scan1.nii.gz", draw_scan(1)[1] * 7)
    assert check_command([*words, "--data.prepare.workers", "1"]) == 1
    assert "1 to mend" in capsys.readouterr().out


@pytest.mark.slow
def test_the_command_leaves_a_page_among_the_runs_and_its_status(tmp_path):
    root = fake_folder(tmp_path / "scans", 6)
    save_nifti(root / "masks" / "scan1.nii.gz", draw_scan(1)[1] * 7)
    own = ["--dataset", "folder", "--data-dir", str(root), "--runs", str(tmp_path / "runs")]
    data = [
        "--data.classes",
        "{tumour: [1]}",
        "--data.image_size",
        "16",
        "--data.prepare.store_dir",
        str(tmp_path / "s"),
    ]
    words = [sys.executable, "-m", "weakmedsam", "check", *own, "--", *data]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "")
    assert max(map(len, done.stdout.splitlines()[:-1])) <= 80
    assert (tmp_path / "runs" / "folder" / "check" / "check.html").is_file()
