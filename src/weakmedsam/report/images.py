"""Pictures of a report: which cases are shown, and how their files become part of the page."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from weakmedsam.contracts import SLICE_BOX
from weakmedsam.report.readers import Row

RULE = (
    "best, median and worst by the mean over the classes of a case, NaN left out; of an even number the "
    "lower of the two in the middle; of equal ones the order of their names decides"
)
"""How cases are chosen, in words."""


@dataclass(frozen=True)
class Picture:
    """A picture on the page: its data address, its size in pixels and what stands below it."""

    address: str
    width: int
    height: int
    caption: str


@dataclass
class Album:
    """Takes pictures until a number of bytes is reached, and keeps account of what stayed outside.

    Attributes:
        budget: bytes of PNG left; base64 on the page takes 4/3 of it.
        largest: bytes from which on a picture is reduced to 256 colours, then to half its size.
        taken: how many pictures are on the page.
        left_out: sentences, one for each picture that could not be shown.
    """

    budget: int = 5_500_000
    largest: int = 1_500_000
    taken: int = 0
    left_out: list[str] = field(default_factory=list)

    def add(self, path: Path | None, caption: str, width: int) -> Picture | None:
        """A picture no wider than ``width`` pixels, or None where it is not there or does not fit.

        Of a case's picture with ``SLICE_BOX`` the slice alone is taken: the page has title and legend in its own words.
        """
        if path is None:
            return None
        try:
            data, size = _encode(path, width, self.largest)
        except (OSError, SyntaxError, ValueError) as error:  # Pillow raises all three on damaged files
            self.left_out.append(f"{path.name} cannot be read ({error})")
            return None
        if len(data) > self.budget:
            self.left_out.append(f"{path.name} was left out to keep the page small")
            return None
        self.budget -= len(data)
        self.taken += 1
        address = "data:image/png;base64," + base64.b64encode(data).decode("ascii")
        return Picture(address, *size, caption)


def _encode(path: Path, width: int, largest: int) -> tuple[bytes, tuple[int, int]]:
    """A PNG of at most this width and about this many bytes, and its size; the file's own where that is one."""
    data = path.read_bytes()
    with Image.open(io.BytesIO(data)) as opened:
        box = _slice_box(opened)
        picture = opened.convert("RGB")
        if opened.format == "PNG" and box is None and opened.width <= width and len(data) <= largest:
            return data, picture.size
    picture = picture.crop(box) if box else picture
    if picture.width > width:
        picture = picture.resize((width, round(picture.height * width / picture.width)), Image.Resampling.LANCZOS)
    data = _png(picture)
    if len(data) > largest:
        data = _png(picture.quantize(256))
    if len(data) > largest:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.LANCZOS)
        data = _png(picture.quantize(256))
    return data, picture.size


def _slice_box(picture: Image.Image) -> tuple[int, int, int, int] | None:
    """Where the slice lies in a case's picture; None where the file does not say, as those of earlier versions."""
    try:
        left, top, right, bottom = (int(word) for word in str(picture.info.get(SLICE_BOX, "")).split())
    except ValueError:
        return None
    inside = 0 <= left < right <= picture.width and 0 <= top < bottom <= picture.height
    return (left, top, right, bottom) if inside else None


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=3)  # a third of the default's time, 2 % more bytes
    return buffer.getvalue()


def mean_by_case(rows: Iterable[Row], column: str) -> dict[str, float]:
    """Mean of a column over the classes of each case; NaN left out, and NaN where none is left."""
    values: dict[str, list[float]] = {}
    for row in rows:
        value = float(row[column])
        values.setdefault(str(row["case"]), []).extend([] if math.isnan(value) else [value])
    return {case: sum(found) / len(found) if found else math.nan for case, found in values.items()}


def best_median_worst(scores: Mapping[str, float]) -> dict[str, str]:
    """The cases to show, by ``RULE``: role -> case; each case once, so that fewer than three give fewer."""
    ranked = sorted((score, case) for case, score in scores.items() if not math.isnan(score))
    if not ranked:
        return {}
    chosen = {"best": ranked[-1][1]}
    middle, worst = ranked[(len(ranked) - 1) // 2][1], ranked[0][1]
    if len(ranked) > 2:
        chosen["median"] = middle
    if len(ranked) > 1:
        chosen["worst"] = worst
    return chosen


def chosen_pictures(folder: Path, scores: Mapping[str, float], name: str, album: Album) -> list[Picture]:
    """Pictures of the best, median and worst case; ``name`` is the score's name in the caption.

    A case whose picture is not there, or cannot be shown, keeps its caption and has no address.
    """
    # Names come from a table: they are looked up among the files there, never made into a path.
    files = {path.stem: path for path in folder.glob("*.png")}
    pictures = []
    for role, case in best_median_worst(scores).items():
        caption = f"{role}: {case}, {name} {scores[case]:.2f}"
        if case not in files:
            album.left_out.append(f"{case} has no picture in {folder.parent.name}/{folder.name}")
        picture = album.add(files.get(case), caption, width=1400)
        pictures.append(picture or Picture("", 0, 0, f"{caption} (no picture)"))
    return pictures


def latest_epoch(folder: Path) -> Path | None:
    """The picture grid of the last epoch, ``epoch_<number>.png``."""
    numbered = [path for path in folder.glob("epoch_*.png") if path.stem.removeprefix("epoch_").isdigit()]
    return max(numbered, key=lambda path: int(path.stem.removeprefix("epoch_")), default=None)
