"""What a check says in the terminal: some 20 lines of 80 columns; all of it is on the page."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data_modules.findings import Checked, Finding, orientation_of
from weakmedsam.report.check_page import short_text

WIDTH, MARGIN = 80, 11
"""Columns: of a line, and before what it says."""

SHOWN_KINDS = {True: (5, 2), False: (6, 1)}
"""To be mended or not -> how many kinds of findings are shown, and in how many lines each."""

SHOWN_CLASSES = 4


def summary_lines(checked: Checked, page: Path) -> list[str]:
    """The lines of the terminal.

    Args:
        checked: what was looked at.
        page: where all of it stands.
    """
    lines = [line for what, how in _describe(checked) for line in wrapped(what, how, 2)]
    for must, what in ((True, "mend"), (False, "look")):
        found: dict[str, list[Finding]] = {}
        for finding in checked.findings:
            if finding.must is must:
                found.setdefault(finding.kind, []).append(finding)
        kinds, most = SHOWN_KINDS[must]
        for number, (kind, some) in enumerate(list(found.items())[:kinds]):
            count = f" ({len(some)})" if len(some) > 1 else ""
            lines += wrapped(
                what if not number else "", f"{kind}{count}: {short_text(some[0].text, checked.data_dir)}", most
            )
        if len(found) > kinds:
            lines += wrapped("", f"and {len(found) - kinds} more kinds", 1)
    mend = sum(finding.must for finding in checked.findings)
    verdict = f"{mend or 'nothing'} to mend, {len(checked.findings) - mend or 'nothing'} worth a look"
    return [*lines, *wrapped("result", verdict, 1), f"{'page':<{MARGIN}}{page}"]  # a path is copied whole


def wrapped(what: str, how: str, most: int) -> list[str]:
    """A row of the terminal, ``what`` before its first line.

    Args:
        what: it is about.
        how: what is said.
        most: lines; what does not fit is left out.
    """
    lines = textwrap.wrap(how, WIDTH - MARGIN, max_lines=most, placeholder=" ...", break_on_hyphens=False)
    return [f"{what if not number else '':<{MARGIN}}{line}" for number, line in enumerate(lines)]


def _describe(checked: Checked) -> Iterator[tuple[str, str]]:
    """(what, how) of what is there."""
    entries = list(checked.entries.values())
    if not entries:
        return
    patients = len({entry.patient for entry in entries})
    yield "cases", f"{len(entries)} of {checked.total} can be used, {patients} patient(s)"
    apart, row, column = np.median([entry.geometry.spacing for entry in entries], axis=0)
    depth, tall, wide = np.median([(entry.depth, entry.frame.height, entry.frame.width) for entry in entries], axis=0)
    axes = ", ".join(f"{code} {count}" for code, count in Counter(map(orientation_of, entries)).most_common(3))
    sizes = f"{depth:.0f} of {tall:.0f} x {wide:.0f}, {row:.2f} x {column:.2f} mm, {apart:.2f} mm apart (medians)"
    yield "slices", f"{sizes}; axes {axes}"
    low, high = min(entry.low for entry in entries), max(entry.high for entry in entries)
    yield "values", f"{low:g} to {high:g} become 0 to 1 ({entries[0].window_rule})"
    if checked.counts:
        of = {split: f"{part['cases']} {split}" for split, part in checked.counts.items()}
        yield "splits", f"{', '.join(of.values())} cases"
        for number, name in enumerate(checked.classes[:SHOWN_CLASSES]):
            said = ", ".join(_count_positives(part, split, name) for split, part in checked.counts.items())
            yield "" if number else "classes", f"{name}: {said}{'' if said.endswith('scans') else ' slices'}"
        if len(checked.classes) > SHOWN_CLASSES:
            yield "", f"and {len(checked.classes) - SHOWN_CLASSES} more"


def _count_positives(part: Mapping[str, Any], split: str, name: str) -> str:
    """How many slices of a split show a class, or how many scans, where no more is known."""
    if "positive_scans" in part:
        return f"{part['positive_scans'][name]} of {part['cases']} {split} scans"
    return f"{part['positive_slices'][name]} of {part['slices']} {split}"
