"""What a check leaves: ``check.html`` with its pictures, ``check.json``, ``check.csv`` and ``cases.csv``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import quote

from data_modules.findings import Checked, orientation_of
from data_modules.store_index import Entry
from weakmedsam.contracts import SOMEWHERE
from weakmedsam.report.check_pictures import COLOURS, MOST_DRAWN, draw_sheet
from weakmedsam.report.run_page import templates
from weakmedsam.system.atomic_io import write_table, write_whole
from weakmedsam.system.file_lock import alone

PAGE = "check.html"


def write_check(checked: Checked, folder: Path) -> Path:
    """Write all files of a check, each whole or not at all, the page last.

    Args:
        checked: what was looked at.
        folder: where they go; made where it is missing.

    Returns:
        The page.

    Raises:
        DiskError: the disk is full.
    """
    cases = [case_row(checked, name) for name in checked.entries]
    findings = [asdict(finding) for finding in checked.findings]
    held = {
        "data_set": checked.data_set,
        "data_dir": checked.data_dir,
        "passed": checked.passed,
        "cases": checked.total,
        "usable": len(cases),
        "splits": checked.counts,
        "findings": findings,
        "scans": cases,
    }
    with alone(folder, wait=True):
        for part in [*folder.glob(".*.part"), *folder.glob("pictures/.*.part")]:  # of a call that was killed
            part.unlink()
        write_table(folder / "check.csv", ("must", "kind", "case", "text"), findings)
        write_table(folder / "cases.csv", tuple(cases[0]) if cases else ("case",), cases)
        write_whole(folder / "check.json", json.dumps(held, indent=1, ensure_ascii=False) + "\n")
        pictures = draw_sheet(checked, folder)
        write_whole(folder / PAGE, _render(checked, cases, pictures))
    return folder / PAGE


def case_row(checked: Checked, name: str) -> dict[str, Any]:
    """A case's row of the tables: sizes in pixels and mm, values of the file that become 0 and 1."""
    entry: Entry = checked.entries[name]
    apart, row, column = entry.geometry.spacing
    return {
        "case": name,
        "patient": entry.patient,
        "split": checked.split.get(name, ""),
        "slices": entry.depth,
        "rows": entry.frame.height,
        "columns": entry.frame.width,
        "slice_mm": round(apart, 4),
        "row_mm": round(row, 4),
        "column_mm": round(column, 4),
        "axes": orientation_of(entry),
        "low": round(entry.low, 4),
        "high": round(entry.high, 4),
        "mean": round(entry.mean, 4),
        "mask": "yes" if entry.has_mask else "no",
        **{
            f"with {label}": "some" if count == SOMEWHERE else count
            for label, count in zip(checked.classes, checked.positives[name], strict=True)
        },
        "findings": sum(finding.case == name for finding in checked.findings),
    }


def short_text(text: str, data_dir: str) -> str:
    """A finding's text with paths from the folder of the scans on; that folder itself by its name."""
    for folder in {data_dir, str(Path(data_dir).resolve())}:
        text = text.replace(f"{folder.rstrip('/')}/", "").replace(f"{folder.rstrip('/')}:", f"{Path(folder).name}:")
    return text


def _render(checked: Checked, cases: list[dict[str, Any]], pictures: Mapping[str, str]) -> str:
    kinds = {must: [one for one in checked.findings if one.must is must] for must in (True, False)}
    return (
        templates()
        .get_template("check_page.html")
        .render(
            checked=checked,
            cases=cases,
            mend=kinds[True],
            look=kinds[False],
            short=lambda text: short_text(text, checked.data_dir),
            pictures=[(name, quote(f"pictures/{name}.png"), said) for name, said in pictures.items()],
            drawn=set(pictures),
            noted={finding.case for finding in checked.findings},
            colours=dict(zip(checked.classes, COLOURS * len(checked.classes), strict=False)),
            most=MOST_DRAWN,
        )
    )
