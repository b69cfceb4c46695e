"""The report of a run, from generated folders: what it says and refuses, and that a browser shows it."""

import csv
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from drawn_run import CLASSES, NASTY, SECTIONS, draw_picture, draw_run, write_csv, write_stage
from PIL import Image
from report_pages import page_of, printed, section, table_rows
from terminals import Terminal

from weakmedsam.errors import DataError
from weakmedsam.report.charts import Chart, Line, ticks
from weakmedsam.report.cli import main, summary_table, write_report
from weakmedsam.report.images import Album, best_median_worst, mean_by_case
from weakmedsam.report.readers import EpochTable
from weakmedsam.report.run_data import Monitor, read_run
from weakmedsam.report.summary import DASH, cell, duration, number
from weakmedsam.run.clicks import ACCEPTED, Click, Decision, write_clicks, write_decisions


@pytest.fixture
def full_run(tmp_path: Path, drawn_run: Path) -> Path:
    """A finished run of one's own, to break."""
    return Path(shutil.copytree(drawn_run, tmp_path / "phantom" / "k4"))


@pytest.fixture(scope="module")
def drawn_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, small, seeded; one case's name is hostile."""
    return draw_run(tmp_path_factory.mktemp("runs") / "phantom" / "k4")


def test_stability_is_a_figure_where_it_was_measured(full_run: Path) -> None:
    assert "Stability" not in section(page_of(full_run), "figures")
    rows = [{"case": f"t{n}", "class": "liver", "slices": 3, "quality": 0.5, "stability": 0.625} for n in range(3)]
    write_csv(full_run / "pseudo_labels" / "quality.csv", rows)
    page = page_of(full_run)
    assert "Stability" in section(page, "figures")
    assert "0.625" in section(page, "pseudo-labels")


def test_full_run_shows_every_section_and_figure(full_run: Path) -> None:
    page = page_of(full_run)
    for name in SECTIONS:
        section(page, name)
    assert "phantom / k4" in section(page, "headline")
    assert "not complete" not in page
    shown = section(page, "figures")
    assert "liver or kidney" in shown
    for title in (
        "Class AUROC",
        "Refined CAM (PAM) Dice",
        "Jaccard",
        "HD95, mm, where found",
        "Cases missed",
    ):
        assert title in shown
    assert "validation, epoch 7" in shown
    assert section(page, "slices").count("<img") == 1
    assert section(page, "curves").count("<svg") >= 7
    assert "epoch_007.png" in page
    assert "val/auroc on validation cases" in page
    assert "commit 0123456789abcdef" in section(page, "environment")
    assert "learning_rate: 0.0001" in section(page, "settings")
    assert "<code>model.sce.sub_classes.number</code>" in section(page, "settings")


def test_no_nan_reaches_the_reader(full_run: Path) -> None:
    text = re.sub(r'data-value="nan"|<script>.*?</script>|base64,[^"]*', "", page_of(full_run), flags=re.DOTALL)
    assert not re.search(r"\bnan\b", text)
    assert DASH in section(text, "test")


def test_test_figures_are_means_of_class_means(full_run: Path) -> None:
    rows = list(csv.DictReader((full_run / "test" / "cases.csv").open()))
    means = []
    for name in CLASSES:
        values = [float(row["dice"]) for row in rows if row["class"] == name and row["dice"]]
        means.append(sum(values) / len(values))
    assert f"<strong>{sum(means) / 2:.3f}</strong>" in section(page_of(full_run), "figures")


def test_refined_predictions_have_figures_and_a_section_of_their_own(full_run: Path) -> None:
    means = {}
    for stage in ("test", "refined"):
        rows = list(csv.DictReader((full_run / stage / "cases.csv").open()))
        values = {name: [float(r["dice"]) for r in rows if r["class"] == name and r["dice"]] for name in CLASSES}
        means[stage] = sum(sum(some) / len(some) for some in values.values()) / 2
    page = page_of(full_run)
    shown = section(page, "figures")
    assert means["refined"] > means["test"] + 0.1
    assert all(f"<strong>{mean:.3f}</strong>" in shown for mean in means.values())
    assert "test, refined" in shown
    part = section(page, "refined")
    assert "refined by PAM; no labels given" in part
    assert section(page, "headline").count("<img") == section(page, "test").count("<img") == 3
    assert part.count("<img") == 0  # they open the page
    ended = table_rows(printed(full_run))["mean"]
    assert ended == {"network": f"{means['test']:.3f}", "refined": f"{means['refined']:.3f}"}
    shutil.rmtree(full_run / "refined")
    page = page_of(full_run)
    assert "make evaluate" in section(page, "refined")
    assert "test, refined (not run)" in section(page, "headline")


def test_the_volumes_dice_stands_before_that_of_other_protocols(full_run: Path) -> None:
    slice_wise = {"slice_wise": {"dice": {"mean": 0.5}}}
    (full_run / "test/summary.json").write_text(
        json.dumps({"classes": {"liver": slice_wise}, "mean": {"slice_wise": {"dice": 0.5}}})
    )
    shown = section(page_of(full_run), "figures").split(">test<")[1]
    assert 0 < shown.index(">Dice<") < shown.index(">Slice-wise Dice<")


def test_names_are_escaped(full_run: Path) -> None:
    page = page_of(full_run)
    assert NASTY not in page
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)" in page


def test_page_asks_for_nothing_outside_itself(full_run: Path) -> None:
    page = page_of(full_run)
    assert not re.search(r"""(src|href|action|data|poster)\s*=\s*["']?(?!#|data:image/png)[^"'>\s]*[/:]""", page)
    assert not re.search(r"https?:|url\(|@import|<link|<iframe", page)
    assert "default-src 'none'" in page


def test_a_name_cannot_reach_another_file(full_run: Path) -> None:
    draw_picture(full_run / "secret.png", ("secret",), 1, np.random.default_rng(1))
    write_csv(full_run / "test" / "cases.csv", [{"case": "../../secret", "class": "liver", "dice": 0.5}])
    assert section(page_of(full_run), "test").count("<img") == 0


@pytest.mark.parametrize("stage", ["classify", "pseudo_labels", "segment", "test"])
def test_a_run_without_a_stage_says_so(full_run: Path, stage: str) -> None:
    shutil.rmtree(full_run / stage)
    page = page_of(full_run)
    assert f"{stage.replace('_', '-')} (not run)" in section(page, "headline")
    target = {"pseudo_labels": "pseudo-labels", "test": "evaluate"}.get(stage, stage)
    assert f"make {target} DATASET=phantom EXPERIMENT=k4" in page


def test_an_interrupted_stage_shows_its_curves_so_far(full_run: Path) -> None:
    (full_run / "segment" / "stage.json").unlink()
    page = page_of(full_run)
    assert "segment (interrupted)" in section(page, "headline")
    assert "Dice, validation" in section(page, "curves")


def test_an_empty_run_gives_a_page(tmp_path: Path) -> None:
    page = page_of(tmp_path)
    for name in SECTIONS:
        section(page, name)
    assert page.count('class="missing"') >= 8
    assert "<svg" not in page


def test_the_upper_bound_is_called_one(full_run: Path) -> None:
    page = page_of(full_run)
    assert "the upper bound to compare with" not in page
    assert "make upper-bound" in section(page, "headline")
    (full_run / "segment" / "config.yaml").write_text("data: {init_args: {labels: {supervision: expert}}}\n")
    shown = section(page_of(full_run), "headline")
    assert "trained on the expert masks" in shown
    assert "make upper-bound" not in shown
    assert "validation and test cases only" not in page_of(full_run)


def test_random_weights_are_named(full_run: Path) -> None:
    config = full_run / "classify" / "config.yaml"
    for weights, named in (("official", False), ("none", True)):
        backbone = {"class_path": "weakmedsam.backbones.pocket.Pocket", "init_args": {"weights": weights}}
        config.write_text(json.dumps({"model": {"init_args": {"backbone": backbone}}}))
        page, said = page_of(full_run), "weights: none (random numbers)"
        assert (said in section(page, "headline")) is named
        assert (said in section(page, "settings")) is named
        assert (said in " ".join(printed(full_run).split())) is named


def test_maps_on_test_cases_stand_beside_validation(full_run: Path) -> None:
    rows = [{"case": f"t{n}", "class": "liver", "cam_dice": 0.2, "pam_dice": 0.4 + 0.1 * n} for n in range(3)]
    write_csv(full_run / "test_maps" / "cam_cases.csv", rows)
    shown = section(page_of(full_run), "figures")
    assert "3 test cases" in shown
    assert "0.500 ± 0.100" in shown


def test_other_protocols_come_from_the_summary(full_run: Path) -> None:
    liver = {"slice_wise": {"dice": {"mean": 0.123, "n": 9}}, "published": {"dice": {"mean": None, "n": 0}}}
    summary = {"cases": 7, "classes": {"liver": liver}, "mean": {"slice_wise": {"dice": 0.123}}}
    (full_run / "test" / "summary.json").write_text(json.dumps(summary))
    shown = section(page_of(full_run), "figures")
    assert "Slice-wise Dice" in shown
    assert "0.123" in shown
    assert "published code" not in shown


def test_one_class_has_one_column(full_run: Path) -> None:
    for path in (full_run / "classify" / "history.csv", full_run / "segment" / "history.csv"):
        rows = [{k: v for k, v in row.items() if "kidney" not in k} for row in csv.DictReader(path.open())]
        write_csv(path, rows)
    for path in (full_run / "test" / "cases.csv", full_run / "pseudo_labels" / "quality.csv"):
        write_csv(path, [row for row in csv.DictReader(path.open()) if row["class"] == "liver"])
    shown = section(page_of(full_run), "figures")
    assert "Mean of the classes" not in shown
    assert shown.count('<th class="n">liver</th>') == 1


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("test/cases.csv", "case,dice\na,0.5\n", "has no column class"),
        ("test/cases.csv", "case,class,dice\na,liver,high\n", "line 2, column dice: 'high' is not a number"),
        ("test/cases.csv", "case,class,dice\na,liver\n", "line 2: 2 cells under 3 columns"),
        ("test/cases.csv", "", "has no column case, class, dice"),
        ("pseudo_labels/quality.csv", "case,class\na,b\n", "has no column quality"),
        (
            "classify/history.csv",
            "epoch,val/auroc\n0,0.5\n1,?\n",
            "line 3, column val/auroc: '?' is not a number",
        ),
        ("segment/history.csv", "epoch,val/dice\n,0.5\n", "line 2: no epoch number"),
        ("segment/history.csv", 'epoch,val/dice\n0,"0.5\n', "is not valid CSV"),
        ("segment/stage.json", '{"stage": ', "is not valid JSON"),
        ("segment/stage.json", "[]", "should hold one JSON object"),
        ("classify/config.yaml", "a: [", "is not valid YAML"),
    ],
)
def test_a_damaged_file_is_named(full_run: Path, file: str, content: str, said: str) -> None:
    (full_run / file).write_text(content)
    with pytest.raises(DataError) as error:
        write_report(full_run)
    assert str(full_run / file) in str(error.value)
    assert said in str(error.value)
    assert not list(full_run.glob("*report.html*"))


def test_bytes_that_are_no_text_are_named(full_run: Path) -> None:
    (full_run / "test" / "cases.csv").write_bytes(b"case,class,dice\n\xff,a,0.5\n")
    with pytest.raises(DataError, match=r"cases\.csv: cannot be read as text"):
        write_report(full_run)


def test_no_such_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nothing")]) == 1
    assert "no such run" in capsys.readouterr().err


def test_a_damaged_picture_is_left_out_and_named(full_run: Path) -> None:
    path = full_run / "classify" / "pictures" / "epoch_007.png"
    path.write_bytes(path.read_bytes()[:300])
    assert "epoch_007.png cannot be read" in page_of(full_run)


def test_best_median_worst() -> None:
    scores = {"a": 0.3, "b": 0.9, "c": math.nan, "d": 0.5, "e": 0.1}
    assert best_median_worst(scores) == {"best": "b", "median": "a", "worst": "e"}
    assert best_median_worst({"a": 0.5, "b": 0.5, "c": 0.5}) == {"best": "c", "median": "b", "worst": "a"}
    assert best_median_worst({"a": 0.2, "b": 0.1}) == {"best": "a", "worst": "b"}
    assert best_median_worst({"a": 0.2}) == {"best": "a"}
    assert best_median_worst({"a": math.nan}) == {}


def test_a_case_is_scored_by_the_classes_it_has() -> None:
    rows = [{"case": "a", "dice": 0.2}, {"case": "a", "dice": math.nan}, {"case": "b", "dice": math.nan}]
    scores = mean_by_case(rows, "dice")
    assert scores["a"] == 0.2
    assert math.isnan(scores["b"])


def test_album_keeps_to_its_budget(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (200, 300, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    album = Album(budget=100_000, largest=50_000)
    first = album.add(tmp_path / "noise.png", "first", width=300)
    assert first is not None
    assert len(first.address) < 50_000 * 4 / 3 + 100
    pictures = [album.add(tmp_path / "noise.png", "more", width=300) for _ in range(8)]
    assert None in pictures
    assert album.budget >= 0
    assert "left out to keep the page small" in album.left_out[0]


def test_what_the_kept_epoch_lacks_is_of_the_nearest_that_has_it() -> None:
    history = EpochTable([0, 1, 2, 3], {"val/pam_dice": [math.nan, 0.1, math.nan, 0.3], "val/none": [math.nan] * 4})
    assert [history.at("val/pam_dice", epoch) for epoch in range(4)] == [(0.1, 1), (0.1, 1), (0.1, 1), (0.3, 3)]
    assert math.isnan(history.at("val/none", 2)[0])


def test_history_keeps_the_last_of_a_repeated_epoch(full_run: Path) -> None:
    (full_run / "segment" / "history.csv").write_text("epoch,val/dice\n0,0.1\n1,0.2\n1,0.3\n2,\n")
    history = read_run(full_run).histories["segment"]
    assert history.epochs == [0, 1, 2]
    assert history.at("val/dice", 2) == (0.3, 1)
    assert Monitor("val/dice", "max").kept_epoch(history) == 1
    assert Monitor("val/dice", "min").kept_epoch(history) == 0
    assert math.isnan(Monitor("val/none", "min").kept_epoch(history))


def test_a_chart_of_one_epoch_and_of_gaps() -> None:
    single = Chart("t", "", [3], [Line("<a>", [0.5], 1)], bounded=True).svg()
    assert "<title>&lt;a&gt;, epoch 3: 0.5</title>" in single
    gaps = Chart("t", "", [0, 1, 2], [Line("a", [0.5, math.nan, 0.7], 1)]).svg()
    assert gaps.count("<title>") == 2
    constant = Chart("t", "", [0, 1], [Line("a", [0.0, 0.0], 1)]).svg()
    assert "nan" not in constant


def test_ticks_and_words() -> None:
    assert ticks(0.65, 0.8, 0.05) == [0.65, 0.7, 0.75, 0.8]
    assert [duration(s) for s in (math.nan, 4.25, 59.4, 61, 7262)] == [
        DASH,
        "4.2 s",
        "59 s",
        "1 min 01 s",
        "2 h 01 min",
    ]
    assert number(math.nan) == DASH
    assert [cell(1.0, "missed"), cell(1.0, "dice"), cell(2.5, "hd95_mm"), cell("", "x")] == [
        "1",
        "1.000",
        "2.50",
        DASH,
    ]


def test_summary_table(full_run: Path) -> None:
    assert "no report yet" in printed(full_run)
    write_report(full_run)
    text = printed(full_run)
    for part in (
        "phantom / k4: Dice on 8 test cases\n",
        "network: HD95 9.00 mm, missed 1, false alarms 0",
        "refined: HD95 9.00 mm, missed 0, false alarms 0",
        "time of all stages: 34 min 26 s",
    ):
        assert part in text
    assert f"report: {full_run / 'report.html'}\n" in text
    assert "no report yet" not in text
    assert "not done" not in text
    shutil.rmtree(full_run / "test")
    assert "not done: test (not run)" in printed(full_run)


def test_reviews_are_counted_beside_the_pseudo_labels(full_run: Path) -> None:
    shown = section(page_of(full_run), "pseudo-labels")
    assert "make review DATASET=" in shown
    write_clicks(full_run, [Click("a", 0, 1, 2, 1, "lesion", "2026-01-31T12:00:00")])
    write_decisions(full_run, [Decision("b", None, ACCEPTED, "2026-01-31T12:00:00")])
    shown = section(page_of(full_run), "pseudo-labels")
    assert "Reviewed: 1 click and 1 decision on 2 of the cases" in shown
    assert "make review" not in shown  # who has begun knows the command


def test_without_expert_masks_the_end_says_how_good_the_pseudo_labels_are(full_run: Path) -> None:
    for stage in ("test", "refined"):
        shutil.rmtree(full_run / stage)
    text = printed(full_run)
    assert "no test case is scored; quality of the pseudo-labels 0." in text
    assert "━" not in text  # no table
    rows = [{"epoch": "0", "val/agreement": "0.625"}]
    write_csv(full_run / "segment/history.csv", rows)
    assert "; agreement of the network with them 0.625" in printed(full_run)


@pytest.mark.parametrize("columns", [80, 200])
def test_the_table_has_every_class_and_column_and_fits_the_terminal(full_run, monkeypatch, columns) -> None:
    tables = {
        "test_maps/cam_cases.csv": {"cam_dice": 0.125, "pam_dice": 0.375, "no_image_dice": 0.25},
        "upper_bound/test/cases.csv": {"dice": 0.875},
    }
    names = [*CLASSES, "a class whose name is long beyond all measure"]
    for file, figures in tables.items():
        write_csv(full_run / file, [{"case": "a", "class": name, **figures} for name in names])
        write_stage(full_run, file.split("/")[0], 61.0)
    rows = list(csv.DictReader((full_run / "test/cases.csv").open()))
    write_csv(full_run / "test/cases.csv", [*rows, {**rows[0], "class": names[-1]}])
    write_report(full_run)
    monkeypatch.chdir(full_run.parent)
    terminal = Terminal(monkeypatch, columns)
    summary_table(full_run)
    lines = terminal.lines()
    rows = table_rows("\n".join(lines))
    assert list(rows) == [*CLASSES, "a class whose…", "mean"]
    assert list(rows["mean"]) == ["CAM", "PAM", "network", "refined", "upper bound", "no image"]
    for row in rows.values():
        assert [row["CAM"], row["PAM"], row["upper bound"]] == ["0.125", "0.375", "0.875"]
    assert max(map(len, lines)) < 80
    assert lines[-1] == "report: k4/report.html"


def test_the_upper_bound_stands_beside_the_test(full_run: Path) -> None:
    assert "upper bound" not in printed(full_run)
    write_csv(full_run / "upper_bound/test/cases.csv", [{"case": "a", "class": "liver", "dice": 0.875}])
    write_stage(full_run, "upper_bound", 61.0)
    assert table_rows(printed(full_run))["mean"]["upper bound"] == "0.875"
    assert "0.875" in section(page_of(full_run), "figures")


def test_validation_and_test_figures_of_the_maps_are_told_apart(full_run: Path) -> None:
    rows = [{"case": "a", "class": name, "cam_dice": 0.125, "pam_dice": 0.375} for name in CLASSES]
    write_csv(full_run / "test_maps/cam_cases.csv", rows)
    write_stage(full_run, "test_maps", 9.0)
    ended = table_rows(printed(full_run))["mean"]
    assert [ended["CAM"], ended["PAM"]] == ["0.125", "0.375"]


def test_a_class_that_no_image_explains_as_well_is_said_not_to_be_learnt(full_run: Path) -> None:
    rows = [
        {"case": "a", "class": name, "cam_dice": 0.1, "pam_dice": 0.2, "no_image_dice": dice}
        for name, dice in zip(CLASSES, (0.0, 0.99), strict=False)
    ]
    assert "has not been learnt" not in printed(full_run)
    write_csv(full_run / "test_maps/cam_cases.csv", rows)
    write_stage(full_run, "test_maps", 9.0)
    for text in (printed(full_run), section(page_of(full_run), "headline")):
        assert text.count("has not been learnt") == 1
        assert f"{CLASSES[1]}: the final Dice of" in " ".join(text.split())
    assert "No image: centred ellipsoid" in section(page_of(full_run), "figures")


def test_report_loads_neither_torch_nor_lightning(full_run: Path) -> None:
    code = "import sys, weakmedsam.report.cli; print({'torch', 'lightning', 'matplotlib'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
    command = [sys.executable, "-m", "weakmedsam.report.cli", str(full_run)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "Dice on 8 test cases" in done.stdout
    assert f"report: {full_run / 'report.html'}\n" in done.stdout
    assert (full_run / "report.html").exists()
    assert not list(full_run.glob(".report*"))


# Clicks a heading twice and looks at what a reader would see; its answer stands in the page's title.
BROWSER_CHECK = """<script>
const found = [];
const cells = () => [...document.querySelectorAll("#test tbody td.n:nth-child(3)")];
const column = () => cells().map((cell) => cell.textContent);
const button = document.querySelector("#test thead th:nth-child(3) button");
button.click(); const rising = column(); button.click(); const falling = column();
if (cells().length < 5) found.push("the table has too few rows to sort");
if (document.images.length < 5) found.push("pictures are missing");
const numbers = (list) => list.filter((text) => text !== "\u2013").map(Number);
if (String(numbers(rising)) !== String(numbers(rising).sort((a, b) => a - b))) found.push("not rising");
if (String(numbers(falling)) !== String(numbers(rising).reverse())) found.push("not falling");
if (rising.at(-1) !== "\u2013" || falling.at(-1) !== "\u2013") found.push("a dash is not last");
for (const picture of document.images)
  if (!(picture.complete && picture.naturalWidth)) found.push("picture " + picture.alt);
if (document.documentElement.scrollWidth > innerWidth) found.push("wider than the window");
document.body.textContent = found.length ? found.join("; ") : "all is well";
</script>"""


@pytest.mark.parametrize("width", [1280, 500])  # headless Chromium has no narrower window
def test_in_a_browser(full_run: Path, tmp_path: Path, width: int) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    page = write_report(full_run)
    page.write_text(page.read_text().replace("</body>", f"{BROWSER_CHECK}</body>"))
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync --enable-logging=stderr --dump-dom"
    command = [
        browser,
        *flags.split(),
        f"--window-size={width},900",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    done = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr, done.stderr
    body = re.search(r"<body>(.*?)</body>", done.stdout, re.DOTALL)
    assert body
    assert body.group(1).strip() == "all is well"
