"""``docs/extending.md``, followed in a copy of the repository: its files, its commands, the tests it names."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
STEP = re.compile(r"<!-- (file|append|run)(?:: (\S+))? -->\n```\w*\n(.*?)```", re.DOTALL)
COPIED = ("src", "data_modules", "experiments", "tests", "docs", "benchmarks", "pyproject.toml")


@pytest.fixture(scope="module")
def extended(tmp_path_factory) -> Path:
    """A copy of the repository with what the page adds."""
    root = tmp_path_factory.mktemp("extended")
    for name in COPIED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, root / name)
    done = []
    for kind, name, text in STEP.findall(PAGE):
        if kind == "run":
            subprocess.run(["bash", "-ec", text], cwd=root, check=True)
        elif kind == "file":
            (root / name).write_text(text)
        else:
            path = root / name
            path.write_text(f"{path.read_text()}\n\n{text}")
        done.append(kind)
    assert sorted(done) == ["append", "append", "file", "file", "file", "run"]
    return root


def run(root: Path, *words: str) -> str:
    environment = {**os.environ, "PYTHONPATH": f"{root / 'src'}:{root}"}
    done = subprocess.run(
        [sys.executable, "-m", *words], cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_the_tests_of_all_data_sets_backbones_and_affinities_find_what_the_page_adds(extended: Path) -> None:
    run(extended, "weakmedsam.settings_reference")
    assert "data_modules.paired.Paired" in (extended / "docs/configuration.md").read_text()
    assert "| `rounded_masks` |" in (extended / "docs/pam.md").read_text()
    tests = ["data_modules/test_every_data_set.py", "data_modules/test_base.py", "test_experiments.py",
             "backbones/test_backbones.py", "backbones/test_weights.py", "pam/test_affinity.py",
             "test_settings_reference.py", "test_costs.py"]  # fmt: skip
    names = "paired or Paired or plain or Plain or rounded_masks or up_to_date or declared"
    words = [
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        names,
        "-rpf",
        "--tb=short",
        *(f"tests/{name}" for name in tests),
    ]
    told = run(extended, "pytest", *words)
    passed = "\n".join(line for line in told.splitlines() if line.startswith("PASSED"))
    for found in ("test_every_data_set.py", "test_every_data_set_trains_a_step_of_each_stage[paired]",
                  "test_trains_refines_and_predicts_through_the_same_pipeline[plain]",
                  "test_every_backbone_keeps_the_contract", "test_every_affinity_gives_maps_and_their_weights",
                  "test_rounded_masks_are_zero_or_one", "test_the_page_is_up_to_date"):  # fmt: skip
        assert found in passed, told[-3000:]


def test_what_the_page_adds_is_clean(extended: Path) -> None:
    added = [name for kind, name, _ in STEP.findall(PAGE) if kind != "run" and name.endswith(".py")]
    run(extended, "ruff", "check", *added)
    run(extended, "ruff", "format", "--check", *added)
