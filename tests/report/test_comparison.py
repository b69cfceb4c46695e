"""Several runs on one page: what differs, who belongs together, and that a browser shows it."""

import csv
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from drawn_run import CASES, NASTY, draw_run, write_csv

from weakmedsam.errors import ConfigError, DataError
from weakmedsam.report.compare_cli import main, page_path, write_comparison
from weakmedsam.report.comparison import group_by_seed, read_contenders, spread

# Name -> what its classify/config.yaml says beside what all say.
RUNS = {"k8": {"seed": 0, "k": 8}, "k8b": {"seed": 1, "k": 8}, "k4": {"seed": 0, "k": 4}}


def write_config(run: Path, seed: int, k: int) -> None:
    callbacks = [{"class_path": "a.ModelCheckpoint", "init_args": {"dirpath": str(run), "monitor": "val/auroc", "mode": "max"}}]  # fmt: skip # noqa: E501
    sce = {"init_args": {"sub_classes": {"number": k}}}
    config = {
        "seed_everything": seed,
        "model": {"class_path": "x.Y", "init_args": {"sce": sce, "pam": {"init_args": {"beta": 4.0}}}},
        "trainer": {"default_root_dir": str(run), "callbacks": callbacks},
    }
    (run / "classify/config.yaml").write_text(yaml.safe_dump(config))


def shift(run: Path, by: float) -> None:
    """Move the test's Dice, but for cases that were missed."""
    path = run / "test/cases.csv"
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        if float(row["dice"] or 0) > 0:
            row["dice"] = f"{float(row['dice']) + by:.6f}"
    write_csv(path, rows)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    for name, (label, facts) in enumerate(RUNS.items()):
        run = draw_run(runs / "phantom" / label)
        write_config(run, **facts)
        shift(run, 0.03 * name)
    return runs


@pytest.fixture
def runs(tmp_path: Path, drawn: Path) -> Path:
    """Finished runs of one's own, to break."""
    return Path(shutil.copytree(drawn, tmp_path / "runs"))


NAMES = [f"phantom/{name}" for name in RUNS]


def page_of(runs: Path, *names: str) -> str:
    return write_comparison(list(names) or NAMES, runs).read_text(encoding="utf-8")


def section(page: str, name: str) -> str:
    found = re.search(rf'<(section|header) id="{name}">.*?</\1>', page, re.DOTALL)
    assert found, f"no section {name}"
    return found.group()


def test_runs_that_differ_in_the_seed_alone_are_one_group(runs: Path) -> None:
    groups = group_by_seed(read_contenders(NAMES, runs))
    assert [group.label for group in groups] == ["phantom/k8 and 1 more", "phantom/k4"]
    assert [[one.seed for one in group.members] for group in groups] == [["0", "1"], ["0"]]


def test_a_group_has_mean_and_spread(runs: Path) -> None:
    one, two, _ = (c.figures["dice"].overall for c in read_contenders(NAMES, runs))
    mean, deviation = (one + two) / 2, abs(one - two) / 2**0.5
    assert one != two
    assert f"{mean:.3f} ± {deviation:.3f}" in section(page_of(runs), "groups")
    assert spread([0.5, float("nan")])[2] == 1


def test_the_settings_that_differ_are_shown_and_no_others(runs: Path) -> None:
    shown = section(page_of(runs), "settings")
    names = sorted(re.findall(r"<code>(.*?)</code>", shown))
    assert names == ["classify.model.sce.sub_classes.number", "classify.seed_everything"]
    row = re.search(r"model\.sce\.sub_classes\.number</code></td>(.*?)</tr>", shown, re.DOTALL)
    assert row
    assert re.findall(r'value">(.*?)<', row.group(1)) == ["8", "8", "4"]
    assert "no spread over seeds" not in page_of(runs)
    assert "no spread over seeds" in section(page_of(runs, NAMES[0], NAMES[2]), "headline")


def test_curves_of_all_runs_lie_over_each_other(runs: Path) -> None:
    history = runs / "phantom/k4/classify/history.csv"
    history.write_text("\n".join(history.read_text().splitlines()[:4]) + "\n")  # a run that was stopped
    shown = section(page_of(runs), "curves")
    assert shown.count("<svg") == 6
    auroc = shown[shown.index("Class AUROC") :]
    auroc = auroc[: auroc.index("</figure>")]
    assert auroc.count("<polyline") == 3
    assert auroc.count("phantom/k4, epoch") == 3
    assert auroc.count("phantom/k8, epoch") == 8
    assert auroc.count("dashed") == 2  # the second seed, in drawing and legend


def test_cases_of_run_against_run(runs: Path) -> None:
    path = runs / "phantom/k4/test/cases.csv"
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["case"] != CASES[0]]
    write_csv(path, rows)
    shown = section(page_of(runs), "cases")
    assert shown.count("<svg") == 2
    assert "phantom/k8b is better in 13 of 14, worse in 0" in shown  # one was missed in both
    assert "phantom/k4 is better in 11 of 12, worse in 0" in shown
    assert "3 without a Dice in one of the two" in shown
    assert NASTY not in shown


def test_the_best_of_a_column_is_marked(runs: Path) -> None:
    shown = section(page_of(runs), "groups")
    best = read_contenders(NAMES, runs)[2].figures["dice"].overall
    assert f"<strong>{best:.3f}</strong>" in shown


def test_page_asks_for_nothing_outside_itself(runs: Path) -> None:
    page = page_of(runs)
    assert not re.search(
        r"https?:|url\(|@import|<link|<iframe|\bnan\b(?!\")", re.sub(r"<script>.*?</script>", "", page)
    )
    assert "default-src 'none'" in page


def test_half_finished_and_empty_runs_can_be_compared(runs: Path) -> None:
    shutil.rmtree(runs / "phantom/k4/test")
    (runs / "phantom/new").mkdir()
    page = page_of(runs, *NAMES, "phantom/new")
    assert section(page, "cases").count("<svg") == 1
    assert "phantom/new" in section(page, "runs")
    (runs / "phantom/newer").mkdir()
    page = page_of(runs, "phantom/new", "phantom/newer")
    assert page.count('class="missing"') >= 3
    assert len(group_by_seed(read_contenders(["phantom/new", "phantom/newer"], runs))) == 2


def test_other_data_sets_are_named(runs: Path) -> None:
    (runs / "phantom/k4").rename(runs / "other")
    (runs / "brats").mkdir()
    (runs / "other").rename(runs / "brats/k4")
    assert "different data sets: phantom, brats" in section(page_of(runs, NAMES[0], "brats/k4"), "headline")


@pytest.mark.parametrize(
    ("names", "error", "said"),
    [
        (["phantom/k8"], ConfigError, "needs two runs or more"),
        (["phantom/k8", "phantom/k4", "phantom/./k8"], ConfigError, "names phantom/./k8 twice"),
        (["phantom/k8", "phantom/k9"], DataError, "k9: no such run"),
    ],
)
def test_what_cannot_be_compared_is_refused(runs: Path, names: list[str], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=re.escape(said)):
        write_comparison(names, runs)
    assert main([*names, "--runs", str(runs)]) == 1
    assert not (runs / "compare").exists()


def test_each_choice_of_runs_has_a_page_of_its_own(runs: Path) -> None:
    some = [page_path(read_contenders(names, runs), runs) for names in (NAMES, NAMES[:2], NAMES[::-1])]
    assert len(set(some)) == 3
    assert all(len(path.name) < 120 and path.parent == runs / "compare" for path in some)


def test_comparing_loads_neither_torch_nor_lightning(runs: Path) -> None:
    heavy = "{'torch', 'lightning', 'matplotlib'}"
    code = f"import sys, weakmedsam.report.comparison_page; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
    command = [sys.executable, "-m", "weakmedsam.report.compare_cli", *NAMES, "--runs", str(runs)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert Path(done.stdout.split("comparison: ")[1].strip()).is_file()


# Clicks every heading twice and looks at what a reader would see.
BROWSER_CHECK = """<script>
const found = [];
const tables = document.querySelectorAll("table.sortable");
if (tables.length < 3) found.push("tables are missing");
for (const table of tables) {
  for (const open of document.querySelectorAll("details")) open.open = true;
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const values = () => [...table.tBodies[0].rows].map((row) => row.cells[column].dataset.value);
    head.querySelector("button").click();
    const up = values().map(Number).filter((v) => !Number.isNaN(v));
    head.querySelector("button").click();
    const down = values().map(Number).filter((v) => !Number.isNaN(v));
    if (String(up) !== String([...up].sort((a, b) => a - b))) found.push("not rising: " + head.textContent);
    if (String(down) !== String([...up].reverse())) found.push("not falling: " + head.textContent);
    if (head.getAttribute("aria-sort") !== "descending") found.push("not marked: " + head.textContent);
  });
}
for (const svg of document.querySelectorAll("svg"))
  if (svg.getBoundingClientRect().width < 200) found.push("a small drawing: " + svg.ariaLabel);
if (document.querySelectorAll("svg").length < 8) found.push("drawings are missing");
if (document.documentElement.scrollWidth > innerWidth) found.push("wider than the window");
document.body.textContent = found.length ? found.join("; ") : "all is well";
</script>"""


@pytest.mark.parametrize("width", [1280, 500])
def test_in_a_browser(runs: Path, tmp_path: Path, width: int) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    page = write_comparison(NAMES, runs)
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
