"""The commands of docs/from_zero.md, one by one, on a folder as a clinic exports it."""

import re
import shlex
import shutil
from pathlib import Path

import nibabel as nib
import pytest
from clinic import draw_clinic
from commands import as_it_was

from weakmedsam.__main__ import main
from weakmedsam.system.atomic_io import read_table

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/from_zero.md"
SMALL = (
    "--model.sce.sub_classes.number 2 --model.pam.prompts.grid 2 --model.pam.walk.map_size 16 --trainer.max_epochs 1 "
    "--segment.model.network_args '{features: [8, 8, 8, 8, 8, 8]}' --data.num_workers 0 --trainer.logger false"
)


def commands():
    blocks = re.findall(r"```\n(weakmedsam .*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


def status_of(words):
    with as_it_was():
        try:
            main(words)
        except SystemExit as end:
            return end.code or 0
    return 0


def test_the_commands_of_the_page_lead_from_a_folder_to_masks(tmp_path, monkeypatch):
    cases = draw_clinic(tmp_path / "scans/clinic")
    draw_clinic(tmp_path / "scans/new", 1)
    shutil.copytree(ROOT / "experiments", tmp_path / "experiments")  # the wheel brings them
    monkeypatch.chdir(tmp_path)
    said = commands()
    assert [line.split()[1] for line in said] == ["init", "check", "train", "predict", "review", "train"]
    for line in said[:4]:  # of the review tests/review knows
        words = shlex.split(line.replace(" /", f" {tmp_path}/"))[1:]
        if words[0] == "train":
            words += ["--", *shlex.split(SMALL)]
        assert status_of(words) == 0, line
    assert (tmp_path / "runs/clinic/check/check.html").is_file()
    assert (tmp_path / "runs/clinic/default/report.html").is_file()
    assert len(list((tmp_path / "runs/clinic/default/pseudo_labels").glob("*.safetensors"))) < len(cases)
    (mask,) = (tmp_path / "masks").glob("*.nii.gz")
    assert nib.load(mask).shape == cases["PAT000"].shape
    assert read_table(tmp_path / "masks/volumes.csv")[0]["class"] == "tumour"
