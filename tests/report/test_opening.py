"""What a report opens with: the run's state, the final Dice beside what it is to be compared with, three pictures."""

import base64
import csv
import io
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from drawn_run import CASES, CLASSES, NASTY, SECTIONS, draw_run, write_csv, write_stage
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from report_pages import page_of, printed, section

from weakmedsam.figures import draw_contours
from weakmedsam.report.final_dice import final_result, final_rows
from weakmedsam.report.run_data import read_run


@pytest.fixture(scope="module")
def drawn_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, small, seeded."""
    return draw_run(tmp_path_factory.mktemp("runs") / "phantom" / "k4")


@pytest.fixture
def run(tmp_path: Path, drawn_run: Path) -> Path:
    """One of one's own, to change."""
    return Path(shutil.copytree(drawn_run, tmp_path / "phantom" / "k4"))


def write_scores(run: Path, file: str, scores: dict[str, tuple[float, ...]], column: str = "dice") -> None:
    """A stage's table: case -> a figure a class."""
    rows = [{"case": case, "class": n, column: dice} for case, of in scores.items() for n, dice in zip(CLASSES, of)]  # noqa: B905
    write_csv(run / file, rows)
    write_stage(run, file.split("/")[0], 9.0)


def write_maps(run: Path, without: tuple[float, ...]) -> None:
    """Scores of maps: 0.3 refined, and those that no image gives."""
    rows = [
        {"case": "a", "class": name, "cam_dice": 0.2, "pam_dice": 0.3, "no_image_dice": dice}
        for name, dice in zip(CLASSES, without, strict=True)
    ]
    write_csv(run / "test_maps/cam_cases.csv", rows)
    write_stage(run, "test_maps", 9.0)


def opening_table(page: str) -> list[list[str]]:
    """Cells of the table that opens the page, heading first."""
    table = re.search(r'<table class="answer">.*?</table>', section(page, "headline"), re.DOTALL)
    assert table
    rows = re.findall(r"<tr.*?</tr>", table.group(), re.DOTALL)
    return [[re.sub("<.*?>", "", cell) for cell in re.findall(r"<t[hd].*?</t[hd]>", row, re.DOTALL)] for row in rows]


def test_the_page_opens_with_state_table_and_pictures_in_this_order(run: Path) -> None:
    write_maps(run, (0.2, 0.98))
    write_scores(run, "refined/cases.csv", dict.fromkeys(CASES, (0.5, 0.7)))
    write_scores(run, "upper_bound/test/cases.csv", dict.fromkeys(CASES, (0.8, 0.7)))
    page = page_of(run)
    places = [page.index(f' id="{name}">') for name in SECTIONS]
    assert places == sorted(places)
    opening = section(page, "headline")
    order = (
        "<h1>phantom / k4 ",
        ">complete<",
        "7 test cases",
        'class="answer"',
        "has not been learnt",
        "<img",
        "<nav>",
    )
    places = [opening.index(part) for part in order]
    assert places == sorted(places)
    assert opening_table(page) == [
        ["class", "Dice", "upper bound", "% of upper bound", "no image"],
        ["liver", "0.50", "0.80", "62", "0.20"],
        ["kidney", "0.70", "0.70", "100", "0.98"],
        ["mean", "0.60", "0.75", "80", "0.59"],
    ]
    assert opening.count("has not been learnt") == 1
    assert "kidney: the final Dice of 0.700 is no better than the 0.980" in opening
    assert "refined by PAM; no labels given" in opening


def test_without_upper_bound_the_table_is_narrower_and_says_how_to_make_one(run: Path) -> None:
    write_maps(run, (0.2, 0.1))
    page = page_of(run)
    assert opening_table(page)[0] == ["class", "Dice", "no image"]
    assert "make upper-bound DATASET=phantom EXPERIMENT=k4" in section(page, "headline")
    assert "has not been learnt" not in page
    shutil.rmtree(run / "test_maps")
    assert opening_table(page_of(run))[0] == ["class", "Dice"]


def test_an_upper_bound_of_other_classes_gives_no_share_of_the_mean(run: Path) -> None:
    write_csv(run / "upper_bound/test/cases.csv", [{"case": "a", "class": "liver", "dice": 0.9}])
    write_stage(run, "upper_bound", 9.0)
    *_, kidney, mean = opening_table(page_of(run))
    assert kidney[2:] == ["\N{EN DASH}"] * 2
    assert mean[2:] == ["0.90", "\N{EN DASH}"]


def test_the_final_dice_is_that_of_the_last_stage_that_was_scored(run: Path) -> None:
    write_maps(run, (0.2, 0.4))
    for stage, left in (("refined", "test"), ("test", "test_maps")):
        assert final_result(read_run(run)).stage == stage  # type: ignore[union-attr]
        shutil.rmtree(run / stage)
        assert final_result(read_run(run)).stage == left  # type: ignore[union-attr]
    page = page_of(run)
    assert "pseudo-labels (PAM), image-level labels given" in section(page, "headline")
    assert [row.dice for row in final_rows(read_run(run))] == ["0.30"] * 3
    assert "kidney: the final Dice of 0.300 is no better than the 0.400" in section(page, "headline")
    assert section(page, "headline").count("<figure") == 0  # of maps none are drawn
    shutil.rmtree(run / "test_maps")
    assert final_result(read_run(run)) is None
    assert "No test case has been scored yet" in section(page_of(run), "headline")


def test_one_class_has_no_row_of_means(run: Path) -> None:
    for stage in ("test", "refined"):
        rows = [row for row in csv.DictReader((run / stage / "cases.csv").open()) if row["class"] == "liver"]
        write_csv(run / stage / "cases.csv", rows)
    assert [row[0] for row in opening_table(page_of(run))] == ["class", "liver"]


def test_without_test_masks_the_page_says_so_and_nothing_is_missing(run: Path) -> None:
    for stage in ("test", "refined"):
        shutil.rmtree(run / stage)
    (run / "prepare/data.json").write_text(json.dumps({"splits": {"test": {"cases": 4, "masked": 0}}}))
    page = page_of(run)
    opening = section(page, "headline")
    assert "No test case has an expert mask" in opening
    assert "quality of the pseudo-labels 0." in opening
    assert ">complete<" in opening
    assert "<figure" not in opening
    for name in ("test", "refined"):
        assert f'id="{name}"' not in page
        assert f'href="#{name}"' not in page
    assert "not done" not in printed(run)


def test_what_the_labels_say_too_little_of_stands_in_the_opening(run: Path) -> None:
    assert "Labels:" not in section(page_of(run), "headline")
    warnings = ["the labels say little about liver: it is in 97 % of the training slices", NASTY]
    (run / "prepare/data.json").write_text(json.dumps({"label_warnings": warnings}))
    opening = section(page_of(run), "headline")
    assert f'<p class="missing">Labels: {warnings[0]}.</p>' in opening
    assert opening.count("Labels: ") == 2
    assert NASTY not in opening


def test_the_pictures_are_of_the_best_median_and_worst_case_by_final_dice(run: Path) -> None:
    order = dict(zip(CASES, (0.3, 0.9, 0.1, 0.5, 0.7, 0.6, 0.2), strict=True))
    write_scores(run, "refined/cases.csv", {case: (dice, dice) for case, dice in order.items()})
    write_scores(run, "test/cases.csv", {case: (1 - dice, 1 - dice) for case, dice in order.items()})
    (run / "refined/pictures" / f"{CASES[6]}.png").unlink(missing_ok=True)
    shown = re.findall(r"<figcaption>(.*?)</figcaption>", section(page_of(run), "headline"))
    assert shown == [
        f"best: {CASES[1]}, Dice 0.90",
        f"median: {CASES[3]}, Dice 0.50",
        f"worst: {CASES[2]}, Dice 0.10",
    ]


def test_a_case_without_picture_keeps_its_place_and_its_name_is_escaped(run: Path) -> None:
    write_scores(run, "refined/cases.csv", {NASTY: (0.99, 0.99), CASES[0]: (0.5, 0.5), CASES[1]: (0.1, 0.1)})
    opening = section(page_of(run), "headline")
    assert opening.count("<figure") == 3
    assert opening.count("<img") == 2
    assert "<script>" not in opening
    assert "best: &lt;b&gt;x&lt;/b&gt;&amp;&#39;&#34;&lt;script&gt;alert(1)&lt;/script&gt;, Dice 0.99" in opening


def test_hostile_names_of_classes_are_escaped(run: Path) -> None:
    write_csv(run / "refined/cases.csv", [{"case": CASES[0], "class": NASTY, "dice": 0.5}])
    page = page_of(run)
    assert NASTY not in page
    assert opening_table(page)[1][0] == "&lt;b&gt;x&lt;/b&gt;&amp;&#39;&#34;&lt;script&gt;alert(1)&lt;/script&gt;"


def first_picture(page: str) -> Image.Image:
    found = re.search(r"base64,([^\"]+)", section(page, "headline"))
    assert found
    return Image.open(io.BytesIO(base64.b64decode(found.group(1))))


@pytest.mark.parametrize(("height", "width"), [(40, 40), (20, 64)])
def test_a_cases_picture_is_shown_without_its_title_and_legend(run: Path, height: int, width: int) -> None:
    ids = torch.zeros(height, width, dtype=torch.uint8)
    ids[2:-2, 2:-2] = 1
    png = draw_contours(torch.rand(height, width), ids, ids, (1.0, 1.0, 1.0), "a long title\nDice liver 0.50")
    for case in CASES:
        (run / "refined/pictures" / f"{case}.png").write_bytes(png)
    picture = first_picture(page_of(run)).convert("RGB")
    assert max(picture.size) == 560
    assert picture.height / picture.width == pytest.approx(height / width, abs=0.01)
    corners = [picture.getpixel((x, y)) for x in (0, picture.width - 1) for y in (0, picture.height - 1)]
    assert all(max(corner) - min(corner) == 0 for corner in corners)  # of the grey slice


@pytest.mark.parametrize("box", ["", "1 2 3", "a b c d", "-1 0 20 20", "0 0 9999 9999", "20 0 10 30"])
def test_a_picture_that_does_not_say_where_its_slice_lies_is_shown_whole(run: Path, box: str) -> None:
    facts = PngInfo()
    facts.add_text("slice box", box)
    for case in CASES:
        Image.new("RGB", (90, 120)).save(run / "refined/pictures" / f"{case}.png", pnginfo=facts)
    assert first_picture(page_of(run)).size == (90, 120)
