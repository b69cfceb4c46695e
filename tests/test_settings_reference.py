"""The reference of all settings is what the code says."""

import inspect
from pathlib import Path
from typing import Literal

import pytest
import yaml

from weakmedsam import settings_reference as reference
from weakmedsam.callbacks import SubClassExploration
from weakmedsam.errors import ConfigError
from weakmedsam.pam.affinity import AFFINITIES
from weakmedsam.pam.config import Refinement, dotted
from weakmedsam.run.request import EXPERIMENTS
from weakmedsam.sce.config import Clustering, SubClassTask
from weakmedsam.settings_reference import (
    PAGE,
    Named,
    fill_options,
    find_named,
    load,
    main,
    page,
    pages,
    table,
    type_words,
)

ROOT = Path(__file__).parent.parent
PAM, SCE = Path("docs/pam.md"), Path("docs/sce.md")


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_the_page_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == page(), "make docs"


def test_every_argument_has_a_meaning():
    text = page()
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert len(rows) > 150
    assert [row for row in rows if not row.split(" | ")[3].strip()] == []
    for named in find_named(EXPERIMENTS):
        assert f"### `{named.key}`: {named.path}\n" in text
    assert "### `throughput`: " in text


def test_every_value_that_a_file_sets_is_there_with_the_file():
    text = page()
    section = text[text.index("### `model.pam`") :]
    row = next(line for line in section.splitlines() if line.startswith("| `value`"))
    assert row.count("`0.5`") == 1
    assert row.rstrip("| ").endswith("| `0.75` in classify; `0.4` in refined")
    study = yaml.safe_load(Path("experiments/compare_refinements.yaml").read_text(encoding="utf-8"))
    (compared,) = study["trainer"]["callbacks"]
    # What would not fit on any screen is only counted.
    assert f"| {len(compared['init_args']['settings'])} entries in compare_refinements" in text
    assert max(map(len, text.splitlines())) < 1000
    # A backbone's file says another learning rate for the class that classify.yaml names.
    assert "`0.0001` in backbone/samus" in text


def test_a_class_of_another_file_is_found_and_described(tmp_path, monkeypatch):
    monkeypatch.setattr(reference, "EXPERIMENTS", tmp_path)
    file = tmp_path / "own.yaml"
    file.write_text("model: {sce: {class_path: weakmedsam.callbacks.SubClassExploration, init_args: {pictures: 7}}}\n")
    (named,) = find_named(tmp_path)
    assert named == Named("model.sce", "weakmedsam.callbacks.SubClassExploration", {str(file): {"pictures": 7}})
    assert any(line.startswith("| `pictures`") and "`7` in own" in line for line in table(named))
    file.write_text("model: [")
    with pytest.raises(ConfigError, match=r"own\.yaml, line 1, column \d+: is not valid YAML"):
        find_named(tmp_path)


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (int, "whole number"),
        (float | None, "number or null"),
        (list[str], "list of text"),
        (tuple[float, float], "list: number, number"),
        (dict[str, list[int]] | None, "mapping: text -> list of whole number or null"),
        (Literal["a", "b"], "`a` \\| `b`"),
        (int | Literal["auto"], "whole number or `auto`"),
        (Path, "`Path`"),
    ],
)
def test_types_are_told_in_words(annotation, words):
    assert type_words(annotation) == words


def test_a_class_that_is_not_there_is_named():
    for path in ("weakmedsam.nowhere.Thing", "weakmedsam.classification.module.Thing"):
        with pytest.raises(ConfigError, match="experiments/ names weakmedsam"):
            load(path)


def test_a_page_that_is_out_of_date_ends_with_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(reference, "PAGE", tmp_path / "page.md")
    with pytest.raises(SystemExit, match="out of date: make docs"):
        main(["--check"])
    main([])
    main(["--check"])


def test_the_page_on_pam_has_every_setting_and_every_affinity():
    text = (ROOT / "docs/pam.md").read_text()
    pam = next(named for named in find_named(EXPERIMENTS) if named.key == "model.pam")
    assert pages()[PAM] == text, "make docs"
    keys = dotted(Refinement())
    assert [key for key in keys if f"| `{key}` |" not in text] == []
    assert "| `affinity.contrast` | number | `10` |" in text
    assert "`15` in classify; `1` in published" in text
    assert all(f"| `{name}` " in text for name in AFFINITIES)
    with pytest.raises(ConfigError, match=r"docs/pam\.md: options: Wlak is none of .*Prompts, .*Walk"):
        fill_options(PAM, text.replace("options: Walk", "options: Wlak"), pam)


def test_the_page_on_sce_has_every_setting():
    text = (ROOT / SCE).read_text()
    assert pages()[SCE] == text, "make docs"
    groups = {"sub_classes": SubClassTask(), "kmeans": Clustering()}
    keys = [key for name, group in groups.items() for key in dotted(group, f"{name}.")]
    keys += [name for name in inspect.signature(SubClassExploration).parameters if name not in groups]
    assert [key for key in keys if text.count(f"| `{key}` |") != 1] == []
    assert "| `sub_classes.number` | whole number or `auto` | `8` |" in text
    assert "| `sub_classes` |" not in text
