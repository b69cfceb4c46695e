"""The commands on data alone: ``prepare`` and ``check``, with the options that ``data`` has in the other commands."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

from jsonargparse import ActionConfigFile
from lightning import LightningDataModule

from data_modules.base import SliceDataModule
from data_modules.check import check
from weakmedsam.cli_parser import MODE, PrepareParser, check_nulls
from weakmedsam.report.check_page import short_text, write_check
from weakmedsam.report.check_summary import summary_lines, wrapped
from weakmedsam.run.cli_errors import show_remarks
from weakmedsam.run.request import CHECK
from weakmedsam.system.atomic_io import write_whole


def prepare_command(words: list[str]) -> None:
    """``prepare --config experiments/data/<dataset>.yaml``: write the slice store, and nothing else.

    Options are those of ``data`` in the other commands; ``--summary FILE`` gets what was prepared as JSON. It ends with
    what the labels say too little of.
    """
    data, _, target = _parse_data("prepare", words, "--summary", "file to write a summary to")
    show_remarks()
    data.prepare_data()
    summary = data.summary()
    if target is not None:
        write_whole(target, json.dumps(summary, indent=2) + "\n")
    width = shutil.get_terminal_size().columns if sys.stderr.isatty() else sys.maxsize
    for sentence in summary["label_warnings"]:
        print(textwrap.fill(f"warning: {sentence}", width, subsequent_indent="  "), file=sys.stderr)


def check_command(words: list[str]) -> int:
    """``check --config experiments/data/<dataset>.yaml``: look at a data set, and write a page about it.

    Options are those of ``prepare``; ``--output FOLDER`` gets the page, by default ``runs/<dataset>/check``.

    Returns:
        The exit status: 1 where something must be mended, else 0.
    """
    data, name, folder = _parse_data("check", words, "--output", "folder of the page")
    checked = check(data, lambda line: print(*wrapped("headers", short_text(line, data.data_dir), 2), sep="\n"))
    checked = replace(checked, data_set=name or checked.data_set)
    page = write_check(checked, folder or Path("runs", checked.data_set, CHECK))
    print("\n".join(summary_lines(checked, page)))
    return 0 if checked.passed else 1


def _parse_data(command: str, words: list[str], option: str, meaning: str) -> tuple[SliceDataModule, str, Path | None]:
    """The data module of a command on data alone, its YAML's name, and the path that its one further option names."""
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument(option, type=Path, dest="path")
    known, rest = own.parse_known_args(words)
    PrepareParser.words = [command, *words]
    parser = PrepareParser(prog=f"python -m weakmedsam {command}", parser_mode=MODE)
    parser.add_argument("--config", action=ActionConfigFile, help="YAML of a data set")
    parser.add_argument(option, type=Path, help=meaning)
    parser.add_subclass_arguments(LightningDataModule, "data", required=True)
    options = parser.parse_args(rest)
    check_nulls(options.as_dict())
    name = Path(str(options.config[-1])).stem if options.config else ""
    return parser.instantiate_classes(options).data, name, known.path
