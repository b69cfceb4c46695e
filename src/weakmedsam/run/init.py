"""Describe a folder of scans by one commented YAML: ``weakmedsam init FOLDER``.

It looks at what lies there and guesses each setting, with the reason beside it. Nothing is copied or converted: the
YAML says where scans lie, and ``prepare`` reads them there. No torch.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import textwrap
from collections import Counter
from pathlib import Path

import numpy as np

from data_modules.formats.volume import NO_SPACING
from data_modules.nifti_files import describe_folder, name_paths
from data_modules.survey import Survey, look_into
from data_modules.survey_layout import Guess, count_formats
from data_modules.tables import name_first
from weakmedsam.errors import ConfigError
from weakmedsam.run.cli_errors import ending_in_a_message
from weakmedsam.run.request import EXPERIMENTS
from weakmedsam.system.atomic_io import write_whole
from weakmedsam.system.commands import command

WIDTH = 80
"""Columns of the summary."""
LINE = 120
"""Columns of the YAML."""
MARGIN = 36
"""Where comments of the YAML begin."""

FIXED = """\
    labels:
      supervision: image            # image: labels only; pseudo: + pseudo-labels; expert: MASKS, for the upper bound
      pseudo_labels_dir: null       # folder of <case>.safetensors, for supervision: pseudo
      corrected_dir: null           # those of them that `make review` has corrected; make train sets it
      trim_unsure: true             # trim unsure pseudo-labels that are larger than others
      only_positive: false          # train on slices with some class only
    augment:                        # never moves a pixel out of the frame, so the label stays true
{flip}
      flip_rows: 0.0                # probability of an up-down mirror
      rotation: 10.0                # degrees, either way
      shrink: 0.9                   # smallest scale, (0, 1]
      translation: 1.0              # part of the room that rotation and shrinking leave, [0, 1]
      gamma: 0.2                    # largest |log2| of the exponent of intensities
      brightness: 0.05              # either way; intensities are in [0, 1]
      contrast: 0.1                 # relative, [0, 1]
      noise: 0.02                   # largest standard deviation
    batch_size: 24                  # slices per step and process; published: 24
    num_workers: 2                  # processes that read slices
    prepare:                        # how volumes become slices; changes no result
      store_dir: data               # prepared slices go here, a folder per data set and settings
      workers: null                 # processes that prepare volumes; null: one per processor
      on_bad_case: raise            # raise: one error lists all bad cases; skip: they are left out and listed
"""


def dataset_name(folder: Path) -> str:
    """A folder's name as that of a data set."""
    return re.sub(r"[^\w.-]+", "_", folder.resolve().name).strip("._-").lower() or "scans"


def setting(indent: int, key: str, guess: Guess) -> str:
    """A line of YAML, its reason behind it, or above it where there is no room."""
    line = f"{' ' * indent}{key}: {json.dumps(guess.value, ensure_ascii=False)}"
    if isinstance(guess.value, str) and re.fullmatch(r"[A-Za-z_][\w/-]*", guess.value):
        line = f"{' ' * indent}{key}: {guess.value}"
    behind = f"{line:<{MARGIN}}# {guess.reason}" if len(line) < MARGIN else f"{line}  # {guess.reason}"
    if len(behind) <= LINE:
        return behind
    above = textwrap.wrap(guess.reason, LINE - indent - 2, break_long_words=False, break_on_hyphens=False)
    return "\n".join([*(f"{' ' * indent}# {part}" for part in above), line])


def describe(survey: Survey, folder: Path) -> str:
    """The YAML of a surveyed folder."""
    found = survey.guesses
    read = f"{len(survey.looks)} of {len(survey.cases)} scans were read"
    keys = ("images", "masks", "series", "channel", "spacing", "classes")
    lines = [
        f"# {folder.resolve().name}: written by `weakmedsam init`; {read}.",
        "# Each value is a guess, with its reason: look at it before you train. Rules: docs/files.md",
        "data:",
        "  class_path: data_modules.folder.Folder",
        "  init_args:",
        setting(4, "data_dir", Guess(survey.layout.data_dir, "folder of images, masks and tables")),
        *(setting(4, key, found[key]) for key in keys),
        setting(4, "background_values", Guess([], "further mask values that may occur; any other is an error")),
        setting(4, "image_size", found["image_size"]),
        "    slices:",
        *(setting(6, key, found[key]) for key in ("plane", "min_pixels", "percentiles", "window")),
        "    split:",
        setting(6, "file", Guess(None, "CSV case,split; null: by a seeded hash of the patient")),
        setting(6, "fractions", found["fractions"]),
        setting(6, "seed", Guess(0, "of the hash, >= 0")),
        setting(6, "scored", Guess("test", "whose volumes `test` scores: test; or val, to choose settings by")),
    ]
    return "\n".join(lines) + "\n" + FIXED.format(flip=setting(6, "flip_columns", found["flip_columns"]))


def summarise(survey: Survey) -> list[tuple[str, str]]:
    """(what, how) for the terminal."""
    found, cases, looks = survey.guesses, survey.cases, survey.looks
    files = [Path(file) for case in cases for file in case.image_files or (case.image,) if file]
    rows = [("scans", f"{len(cases)} case(s) of {len({case.patient for case in cases})} patient(s); {_names(survey)}")]
    rows += [("images", f"{found['images'].value}: {count_formats(files)}; {found['images'].reason}")]
    if survey.titles:
        rows += [("series", ", ".join(f"{title} ({count})" for title, count in Counter(survey.titles).most_common(6)))]
    rows += [("slices", _slices(survey))]
    masked = sum(case.mask is not None for case in cases)
    rows += [("masks", f"{found['masks'].value}: {masked} of {len(cases)} cases; {found['masks'].reason}")]
    rows += [("labels", (survey.table and f"labels.csv ({survey.table})") or "no labels.csv: " + _advice(masked))]
    rows += [("classes", ", ".join(f"{name} {values[:6]}" for name, values in found["classes"].value.items()))]
    taken = "window" if found["window"].value else "percentiles"
    rows += [("values", f"{taken} {found[taken].value}: {found['window'].reason}")]
    if len(cases) > 2 and len(patients := {case.patient for case in cases}) == 1:
        said = f"all cases are of {patients.pop()!r}: give patients.csv (case,patient), or there is no split"
        rows += [("patients", said)]
    if any(look.channels for look in looks):
        rows += [("channel", found["channel"].reason)]
    if survey.passed_over:
        root = Path(survey.layout.data_dir)
        rows += [("not taken", f"{len(survey.passed_over)} files: {name_paths(survey.passed_over[:3], root)}")]
    labelled = bool(masked or survey.table)  # else each case lacks a label, which is said once
    more = [case.problem for case in cases if case.problem and labelled]
    problems = list(dict.fromkeys([*survey.problems, *more]))
    told = [("faults", f"{len(problems)} case(s) cannot be used, the first {len(problems[:3])}:")] if problems else []
    return [*rows, *told, *(("", problem) for problem in problems[:3])]


def _names(survey: Survey) -> str:
    names = [case.name for case in survey.cases]
    return name_first(names[:3]) + (", ..." if len(names) > 3 else "")


def _advice(masked: int) -> str:
    return "masks say what is present" if masked else "write one (case,from,to,class) before you train"


def _slices(survey: Survey) -> str:
    geometries = [look.geometry for look in survey.looks]
    shapes = [g.to_slices(np.broadcast_to(0, g.shape)).shape for g in geometries]
    depth, rows, columns = (int(x) for x in np.median(shapes, axis=0))
    apart, row, column = (float(x) for x in np.median([g.spacing for g in geometries], axis=0))
    plane = survey.guesses["plane"].value
    if any(g.unit == NO_SPACING for g in geometries):
        size = "voxel size unknown"
    else:
        size = f"{row:.2f} x {column:.2f} mm, {apart:.2f} mm apart"
    return f"{depth} {plane} of {rows} x {columns}, {size} (median of {len(geometries)} read)"


def init(folder: Path, output: Path | None) -> Path:
    """Survey a folder, print what it holds, and write its YAML.

    Args:
        folder: of scans.
        output: the YAML; None: ``experiments/data/<name of the folder>.yaml``.

    Returns:
        The YAML.

    Raises:
        ConfigError: there is no such folder, or the YAML is there already.
        DataError: no scan that can be read, or a table with faults.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder}: {describe_folder(folder)}. Give the folder of the scans.")
    path = output or EXPERIMENTS / "data" / f"{dataset_name(folder)}.yaml"
    if path.exists():
        raise ConfigError(f"{path} is there already: remove it, or name another file with --output.")
    survey = look_into(folder)
    text = describe(survey, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text)
    for what, how in summarise(survey):
        wrapped = textwrap.wrap(how, WIDTH - 11, break_on_hyphens=False) or [""]
        print("\n".join(f"{what if not n else '':<11}{line}" for n, line in enumerate(wrapped)))
    print(f"{'written':<11}{path}")
    beside = path.parent == EXPERIMENTS / "data"
    check = (
        command("check", dataset=path.stem) if beside else shlex.join(["weakmedsam", "check", "--config", str(path)])
    )
    print(f"{'next':<11}look at it, then: {check}")
    return path


def main(words: list[str] | None = None) -> None:
    """Parse the command line; see ``init``."""
    parser = argparse.ArgumentParser(
        prog="weakmedsam init", description="Look at a folder of scans and write a commented YAML for it."
    )
    parser.add_argument("folder", type=Path, help="scans of any format and layout, with masks or labels.csv or both")
    parser.add_argument("--output", type=Path, help="YAML to write; default: experiments/data/<folder's name>.yaml")
    args = parser.parse_args(words)
    with ending_in_a_message("from the start", vars(args)):
        init(args.folder, args.output)


if __name__ == "__main__":
    main()
