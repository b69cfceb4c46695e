"""What a check leaves: page, pictures, tables; and what it says in a terminal."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from report_pages import section

from data_modules.check import check
from data_modules.findings import Checked, Finding
from tests.data_modules.test_check import module_of
from tests.fakes import draw_scan, fake_folder, save_nifti
from weakmedsam.report import check_pictures
from weakmedsam.report.check_page import write_check
from weakmedsam.report.check_pictures import COLOURS, outline
from weakmedsam.report.check_summary import summary_lines


@pytest.fixture(scope="module")
def checked(tmp_path_factory) -> Checked:
    root = fake_folder(tmp_path_factory.mktemp("data") / "scans", 6)
    save_nifti(root / "masks" / "scan2.nii.gz", draw_scan(2)[1] * 7)
    save_nifti(root / "masks" / "scan1.nii.gz", draw_scan(1)[1] * 0)
    return check(module_of(root))


def test_the_page_holds_counts_findings_cases_and_pictures(checked, tmp_path):
    page = write_check(checked, tmp_path).read_text()
    assert "1 to mend" in section(page, "headline")
    mend = section(page, "mend")
    assert "<td>masks/scan2.nii.gz: holds unknown" in mend.replace(' class="value"', "")
    assert str(checked.data_dir) not in mend
    assert "its mask has no class" in section(page, "look")
    assert '<th class="n"><button>with tumour</button></th>' in section(page, "cases")
    assert '<a href="#case-scan1">scan1</a>' in section(page, "look")
    sheet = section(page, "pictures")
    assert '<figure id="case-scan1">' in sheet
    assert sheet.index("scan1") < sheet.index("scan0")  # those with findings first
    assert sheet.count('loading="lazy"') == 5
    assert "http" not in page.replace("http-equiv", "")
    assert "img-src &#39;self&#39; file: data:" in page


def test_names_are_escaped_on_the_page_and_in_addresses(checked, tmp_path):
    finding = Finding("case", "<b>", "<script>alert(1)</script>", must=True)
    page = write_check(replace(checked, findings=[finding]), tmp_path).read_text()
    assert "<script>alert" not in page
    assert "&lt;script&gt;" in page


def test_tables_hold_every_finding_and_every_case(checked, tmp_path):
    write_check(checked, tmp_path)
    held = json.loads((tmp_path / "check.json").read_text())
    assert (held["passed"], held["cases"], held["usable"]) == (False, 6, 5)
    rows = list(csv.DictReader((tmp_path / "check.csv").open()))
    assert [row["kind"] for row in rows] == [finding["kind"] for finding in held["findings"]]
    assert (rows[0]["must"], rows[0]["case"]) == ("True", "scan2")
    cases = list(csv.DictReader((tmp_path / "cases.csv").open()))
    assert [case["case"] for case in cases] == list(checked.entries)
    assert cases[0]["slice_mm"] == "3.0"
    assert cases[0]["axes"] == "RAS"
    assert cases[0]["with tumour"] == "4"


def test_pictures_have_true_proportions_and_the_outline_of_the_mask(checked, tmp_path):
    write_check(checked, tmp_path)
    with Image.open(tmp_path / "pictures" / "scan0.png") as picture:
        assert picture.size == (round(240 * 20 * 1.5 / 32), 240)  # 20 x 1.5 mm by 16 x 2 mm
        colours = {colour for _, colour in picture.convert("RGB").getcolors(2**16) or []}
    green = tuple(int(COLOURS[0][n : n + 2], 16) for n in (1, 3, 5))
    assert green in colours
    assert all(len(set(colour)) == 1 for colour in colours - {green})


def test_a_picture_is_drawn_again_only_where_slices_have_changed(checked, tmp_path):
    write_check(checked, tmp_path)
    first, gone = (tmp_path / "pictures" / f"{name}.png" for name in ("scan0", "scan5"))
    before = first.stat().st_mtime_ns
    changed = {**checked.entries, "scan3": replace(checked.entries["scan3"], files=())}
    del changed["scan5"]
    other = tmp_path / "pictures" / "mine.png"
    Image.new("L", (2, 2)).save(other)
    part = tmp_path / "pictures" / ".scan0.png.1.part"
    part.touch()
    third = (tmp_path / "pictures" / "scan3.png").stat().st_mtime_ns
    write_check(replace(checked, entries=changed), tmp_path)
    assert first.stat().st_mtime_ns == before
    assert (tmp_path / "pictures" / "scan3.png").stat().st_mtime_ns > third
    assert not gone.exists()  # a patient who was taken out
    assert other.exists()
    assert not part.exists()


def test_so_many_cases_are_drawn_at_most(checked, tmp_path, monkeypatch):
    monkeypatch.setattr(check_pictures, "MOST_DRAWN", 2)
    write_check(checked, tmp_path)
    assert {path.stem for path in tmp_path.glob("pictures/*.png")} == {"scan0", "scan1"}


def test_an_outline_is_the_rim_of_each_class():
    ids = np.zeros((6, 8), np.uint8)
    ids[1:5, 1:5], ids[1:5, 5:7] = 1, 2
    edge = outline(ids)
    assert edge.sum() == 4 * 6 - 4
    assert not edge[2:4, 2:4].any()
    assert edge[2, 4]
    assert edge[2, 5]


def test_a_set_without_a_usable_case_has_a_page_too(tmp_path):
    (tmp_path / "empty").mkdir()
    checked = check(module_of(tmp_path / "empty"))
    page = write_check(checked, tmp_path / "out").read_text()
    assert "No case can be used" in page
    assert summary_lines(checked, Path("p"))[-2] == "result     1 to mend, nothing worth a look"


def many(checked: Checked) -> Checked:
    """With more kinds of findings, and longer ones, than a terminal has room for."""
    long = f"{checked.data_dir}/images/{'x' * 90}.nii.gz: " + "is so bad that it takes many words to say it. " * 5
    kinds = [(f"kind {n}", n % 2 == 0) for n in range(20)]
    found = [Finding(kind, "scan0", long, must) for kind, must in kinds for _ in range(3)]
    return replace(checked, findings=found, classes=[f"class {n} {'y' * 40}" for n in range(1)])


def test_the_terminal_has_some_twenty_lines_of_eighty_columns(checked):
    lines = summary_lines(replace(many(checked), classes=checked.classes), Path("runs/scans/check/check.html"))
    assert max(map(len, lines)) <= 80
    assert len(lines) <= 30
    assert lines[-1] == "page       runs/scans/check/check.html"
    text = "\n".join(lines)
    assert "and 5 more kinds" in text
    assert "result     30 to mend, 30 worth a look" in text
    assert str(checked.data_dir) not in text


def test_the_terminal_says_what_is_there(checked):
    text = "\n".join(summary_lines(checked, Path("p")))
    assert "cases      5 of 6 can be used, 5 patient(s)" in text
    assert "slices     6 of 16 x 20, 2.00 x 1.50 mm, 3.00 mm apart (medians); axes RAS 5" in text
    assert "classes    tumour: " in text
    assert "mend       case: masks/scan2.nii.gz: holds unknown label values 7" in text


def test_labels_of_scans_are_counted_as_scans(tmp_path):
    root = fake_folder(tmp_path / "scans", 6)
    rows = [f"scan{number},{'none' if number % 2 else 'tumour'}" for number in range(6)]
    (root / "labels.csv").write_text("\n".join(["case,class", *rows]))
    checked = check(module_of(root))
    train = checked.counts["train"]
    said = " ".join(" ".join(summary_lines(checked, tmp_path)).split())
    assert f"tumour: {train['positive_scans']['tumour']} of {train['cases']} train scans" in said
    page = write_check(checked, tmp_path / "out").read_text()
    assert f"{train['positive_scans']['tumour']} scans</td>" in page
    cases = list(csv.DictReader((tmp_path / "out/cases.csv").open()))
    assert [row["with tumour"] for row in cases] == ["some", "0"] * 3
