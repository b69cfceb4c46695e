"""What ``make`` would run, and the files that say what is installed."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "Makefile").read_text()
INHERITED = ("MAKEFLAGS", "MFLAGS", "MAKEOVERRIDES", "MAKELEVEL", "ARGS")


def make(*words, environment=None):
    # What `make test ARGS=...` was called with is not for these.
    environment = {key: value for key, value in (environment or os.environ).items() if key not in INHERITED}
    done = subprocess.run(
        ["make", "--silent", "-o", ".venv/.installed", *words],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    return done.stdout


def words_of(folder, *words):
    """What a target would hand to Python: a script that prints its words stands in for it."""
    python = folder / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)
    said = make("-f", str(ROOT / "Makefile"), "-C", str(folder), *words).splitlines()
    return [word for word in said if not word.startswith("make")]


def test_help_lists_every_target_and_variable_once_without_python(tmp_path):
    for tool in ("make", "awk", "sh"):
        (tmp_path / tool).symlink_to(shutil.which(tool))
    lines = make("help", environment={"PATH": str(tmp_path)}).splitlines()
    named = [line.split()[0] for line in lines if line.startswith("  ")]
    targets = re.search(r"^\.PHONY: ((?:.*\\\n)*.*)", TEXT, re.MULTILINE).group(1).replace("\\\n", " ").split()
    variables = re.findall(r"^([A-Z_]+) \?=", TEXT, re.MULTILINE)
    assert sorted(named) == sorted(targets + variables)
    assert all(len(line.split()) > 2 for line in lines if line.startswith("  "))


@pytest.mark.parametrize(
    ("words", "command"),
    [
        (["RUNS=a/b c/d"], ["-m", "weakmedsam", "compare", "a/b", "c/d", "--runs", "runs"]),
        (
            ["COMPARE=a/b c/d", "RUNS=here"],
            ["-m", "weakmedsam", "compare", "a/b", "c/d", "--runs", "here"],
        ),
        (
            ["DATASET=abdomen", "RUNS=here"],
            ["-m", "weakmedsam", "report", "--dataset", "abdomen"],
        ),
    ],
)
def test_report_is_of_one_run_or_compares_several(tmp_path, words, command):
    assert words_of(tmp_path, "report", *words)[: len(command)] == command


NAMES = [
    "plain",
    "it's",
    "two words",
    "a,b",
    "a (b)",
    "[c]",
    'say "x"',
    "$HOME",
    "$(HOME)",
    "a;b&c|d",
    "größe",
    "`x`",
    "#1",
    "a\\b",
]
VARIABLES = {
    "train": {"DATA_DIR": "--data-dir", "RUNS": "--runs", "EXPERIMENT": "--experiment", "DATASET": "--dataset",
              "BACKBONE": "--backbone", "TRAINER": "--trainer", "LOGGER": "--logger", "LAUNCHER": "--launcher"},
    "predict": {"SCANS": "--scans", "OUT": "--out", "RUNS": "--runs", "EXPERIMENT": "--experiment"},
    "sweep": {"NAME": "--name", "DATA_DIR": "--data-dir", "RUNS": "--runs", "TRAINER": "--trainer", "COUNT": "--count"},
    "study": {"NAME": "--name", "DATA_DIR": "--data-dir", "RUNS": "--runs", "TRAINER": "--trainer",
              "BACKBONE": "--backbone", "LOGGER": "--logger", "LAUNCHER": "--launcher"},
    "report": {"DATASET": "--dataset", "EXPERIMENT": "--experiment"},
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("target", VARIABLES)
def test_what_is_given_reaches_python_as_it_is(tmp_path, target, name):
    given = [f"{variable}={name}" for variable in VARIABLES[target]]
    other = ["SCANS=x"] if target == "predict" and "SCANS" not in VARIABLES[target] else []
    said = words_of(tmp_path, target, *given, *other, "ARGS=--model.sce.sub_classes.number 4 --a 'b c'")
    for option in VARIABLES[target].values():
        assert said[said.index(option) + 1] == name, (option, said)
    assert target == "report" or said[-5:] == ["--", "--model.sce.sub_classes.number", "4", "--a", "b c"]


@pytest.mark.parametrize("target", ["train", "classify", "predict"])
def test_v_shows_more(tmp_path, target):
    assert ("-v" in words_of(tmp_path, target, "SCANS=x", "V=1")) != (
        "-v" in words_of(tmp_path / "b", target, "SCANS=x")
    )


def test_seeds_of_a_study_are_words(tmp_path):
    said = words_of(tmp_path, "study", "SEEDS=0 2", "STUDY=own")
    assert said[:4] == ["-m", "weakmedsam", "study", "own"]
    assert said[-3:] == ["--seeds", "0", "2"]
    assert "--seeds" not in words_of(tmp_path / "b", "study")


def test_names_of_runs_to_compare_are_words_whatever_is_in_them(tmp_path):
    said = words_of(tmp_path, "report", "COMPARE=a/it's b/$HOME", "RUNS=my, runs")
    assert said == ["-m", "weakmedsam", "compare", "a/it's", "b/$HOME", "--runs", "my, runs"]


@pytest.mark.parametrize("name", NAMES)
def test_one_run_and_no_other_is_removed(tmp_path, name):
    run, other = tmp_path / f"of {name}" / "set" / name, tmp_path / f"of {name}" / "set" / "other"
    run.mkdir(parents=True)
    other.mkdir()
    words_of(tmp_path, "clean-runs", f"RUNS=of {name}", "DATASET=set", f"EXPERIMENT={name}")
    assert other.is_dir()
    assert not run.exists()


@pytest.mark.parametrize(
    "words",
    [["EXPERIMENT=.."], ["EXPERIMENT=."], ["EXPERIMENT= "], ["DATASET=../.."], ["RUNS="], ["EXPERIMENT=/"]],
)
def test_nothing_but_a_run_is_removed(tmp_path, words):
    kept = tmp_path / "runs/phantom/default/file"
    kept.parent.mkdir(parents=True)
    kept.touch()
    with pytest.raises(subprocess.CalledProcessError):
        words_of(tmp_path, "clean-runs", *words)
    assert kept.is_file()


def test_every_benchmark_that_make_runs_is_a_command():
    said = make("--just-print", "bench")
    names = re.search(r"for name in (.*?); do", said).group(1).split()
    assert names == sorted(path.stem for path in (ROOT / "benchmarks").glob("[a-z]*.py") if path.stem != "costs")
    for name in names:
        text = (ROOT / f"benchmarks/{name}.py").read_text()
        assert re.search(r'^if __name__ == "__main__":$', text, re.MULTILINE), name
        main = text[text.index("def main(") :]
        assert re.search(r"print\(json\.dumps\(.*\)\)\n(\n|$)", main), f"{name}: its last line is no JSON object"


def test_conda_installs_the_same_versions():
    held = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    (pip,) = [part["pip"] for part in held if isinstance(part, dict)]
    assert pip == ["--constraint constraints.txt", "--editable .[dev]"]
    (python,) = [part for part in held if isinstance(part, str) and part.startswith("python=")]
    assert python.removeprefix("python=") in ("3.10", "3.11", "3.12", "3.13")
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] not in "# "]
    assert len(pins) > 50
    assert all(re.match(r"[\w.-]+==[\w.+]+( ;.*)?$", pin) for pin in pins)
