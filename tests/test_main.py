"""``weakmedsam COMMAND``: which module each command reaches, and what the wheel brings along."""

import contextlib
import json
import os
import shlex
import subprocess
import sys
import time
import zipfile
from importlib import import_module
from pathlib import Path

import pytest
from test_end_to_end import command

from weakmedsam import __main__ as command_line
from weakmedsam import cli
from weakmedsam.__main__ import COMMANDS, PIPELINE
from weakmedsam.run.stages import TARGETS

ROOT = Path(__file__).parent.parent


@pytest.fixture
def reached(monkeypatch):
    """Module and words that a command line reaches; nothing is run."""
    found = []
    for name in {module for module, _ in COMMANDS.values() if module}:
        monkeypatch.setattr(import_module(name), "main", lambda words, name=name: found.append((name, *words)))
    monkeypatch.setattr(cli, "main", lambda words: found.append(("lightning", *words)))

    def call(*words):
        with contextlib.suppress(SystemExit):  # the command's own status
            command_line.main(list(words))
        return found.pop()

    return call


def test_every_target_of_the_pipeline_is_a_command():
    assert {name for name, (module, _) in COMMANDS.items() if module == PIPELINE} == set(TARGETS)


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("train --dataset x -- --a 1", (PIPELINE, "train", "--dataset", "x", "--", "--a", "1")),
        ("report", (PIPELINE, "report")),
        ("prepare --dataset x -- --config a", (PIPELINE, "prepare", "--dataset", "x", "--", "--config", "a")),
        ("prepare --config a --data.x 1", ("lightning", "prepare", "--config", "a", "--data.x", "1")),
        ("predict --scans s", ("weakmedsam.run.predict", "--scans", "s")),
        ("predict --config=a", ("lightning", "predict", "--config=a")),
        ("check --dataset x -- --data.a 1", ("weakmedsam.run.check", "--dataset", "x", "--", "--data.a", "1")),
        ("check --config a --output b", ("lightning", "check", "--config", "a", "--output", "b")),
        ("compare a b", ("weakmedsam.report.compare_cli", "a", "b")),
        ("status", ("weakmedsam.run.status",)),
        ("study sets --seeds 0", ("weakmedsam.study.cli", "sets", "--seeds", "0")),
        ("fit --help", ("lightning", "fit", "--help")),
        ("test --config a", ("lightning", "test", "--config", "a")),
    ],
)
def test_a_command_reaches_its_module_with_the_words_behind_it(reached, words, found):
    assert reached(*words.split()) == found


def test_an_unknown_command_lists_those_that_there_are():
    with pytest.raises(SystemExit, match="there is no command 'trian'; there are: init, check, train, prepare, "):
        command_line.main(["trian"])


def test_help_lists_the_commands_at_once_and_no_command_that_looks_loads_torch(tmp_path):
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "weakmedsam", "--help"], capture_output=True, text=True, check=True)
    assert time.monotonic() - started < 1
    assert [line.split()[0] for line in done.stdout.splitlines()[2:]] == list(COMMANDS)
    code = """
import sys
from weakmedsam.__main__ import main
try:
    main()
except SystemExit:
    pass
assert not {"torch", "lightning"} & sys.modules.keys()
"""
    for words in (
        ["init", "--help"],
        ["status"],
        ["check", "--help"],
        ["train", "--help"],
        ["predict", "--help"],
        ["compare", "--help"],
        ["study", "--help"],
    ):
        subprocess.run([sys.executable, "-c", code, *words], check=True, cwd=tmp_path, capture_output=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    build = ["wheel", "--quiet", "--no-build-isolation", "--no-deps", "--no-index", "-w", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", *build, str(ROOT)], check=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.mark.slow
def test_the_wheel_holds_the_experiments(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    experiments = {str(path.relative_to(ROOT)) for path in ROOT.glob("experiments/**/*.yaml")}
    assert {f"weakmedsam/{name}" for name in experiments} <= names
    assert {
        "weakmedsam/__main__.py",
        "weakmedsam/backbones/pocket.safetensors",
        "data_modules/base.py",
    } <= names


@pytest.mark.slow
def test_an_installed_wheel_trains_in_an_empty_folder(wheel, tmp_path):
    environment, work = tmp_path / "environment", tmp_path / "work"
    work.mkdir()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    pip = [sys.executable, "-m", "pip", "--python", str(environment / "bin/python"), "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--no-index", str(wheel)], check=True)
    (packages,) = environment.glob("lib/python3*/site-packages")
    # Its dependencies are those that are here; the editable installation's own .pth is not followed.
    others = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "dependencies.pth").write_text("\n".join(others) + "\n")
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    script = str(environment / "bin/weakmedsam")

    def call(*words):
        done = subprocess.run(
            [script, *words], cwd=work, env=kept | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=900,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout
        return done.stdout

    words = command(work)
    call("train", *words[words.index("--") :])
    run = work / "runs/phantom/default"
    assert (run / "report.html").stat().st_size > 0
    noted = json.loads((run / "classify/stage.json").read_text())
    assert next(iter(noted["settings"]["configs"])) == "experiments/classify.yaml"
    assert str(packages) in shlex.split(noted["command"])[5]
    assert call("status").count(" done ") == 8
