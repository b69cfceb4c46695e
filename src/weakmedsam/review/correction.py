"""What clicks make of a pseudo-label: a pure function of the label, the clicks and what the prompts answer.

A click is a point prompt. Its mask joins the class (an including click) or leaves it (an excluding one), in the order
of the clicks, so that the last one wins; only the part of the mask that holds the click counts, and the pixels next to
it always follow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from weakmedsam.contracts import BACKGROUND, SliceState
from weakmedsam.errors import DataError
from weakmedsam.run.clicks import ACCEPTED, Click, Decision, Reviewed

Answer = Callable[[int, int, int], NDArray[np.float32]]
"""(number of a slice, x, y) -> (S, S) mask logits of a prompt in the middle of that pixel, 0 = the border."""

AROUND = 1.0
"""Pixels about a click that follow it whatever the prompt answers."""

REACH = 2
"""Slices either way into which a click goes on at most."""

ALIKE = 0.5
"""IoU with the slice before from which on a click goes on into the next slice."""

Changes = dict[int, NDArray[np.uint8]]
"""Number of a slice -> its (S, S) class ids."""


class Corrected(NamedTuple):
    """A pseudo-label with the clicks replayed.

    Attributes:
        label: (D, S, S) uint8 class ids.
        state: (D,) uint8, a ``SliceState`` each.
    """

    label: NDArray[np.uint8]
    state: NDArray[np.uint8]


def find_fault(click: Click, present: NDArray[np.bool_], class_names: Sequence[str]) -> str | None:
    """Why a click cannot be, in words; None where it can.

    Args:
        click: to be looked at.
        present: (D, C) which classes slices are labelled with.
        class_names: id 1 first.
    """
    has = present[click.slice]
    if has[class_names.index(click.class_name)]:
        return None
    said = " and ".join(name for name, there in zip(class_names, has, strict=True) if there)
    return (
        f"slice {click.slice} is labelled without {click.class_name}"
        f" ({f'it has {said} only' if said else 'it has no class'}): correct its image-level label first"
    )


def apply_click(
    label: NDArray[np.uint8], click: Click, class_names: Sequence[str], present: NDArray[np.bool_], answer: Answer
) -> Changes:
    """The slices that a click changes, as they are then; the clicked one is among them even if nothing changed.

    The click goes on into a neighbouring slice where the class may be there, the pixel is as wrong as in the clicked
    slice, and the masks overlap by ``ALIKE``, up to ``REACH`` slices.

    Args:
        label: (D, S, S) class ids, as they are; not written to.
        click: a possible one, see ``find_fault``.
        class_names: id 1 first.
        present: (D, C) which classes slices are labelled with.
        answer: of the prompts.
    """
    class_id = 1 + class_names.index(click.class_name)
    wrong = (label[:, click.y, click.x] == class_id) != (click.sign > 0)
    could = present[:, class_id - 1] & wrong
    regions = {click.slice: _region(answer, click.slice, click)}
    for step in (-1, 1):
        before = regions[click.slice]
        for z in _neighbours(click.slice, could, step):
            region = _region(answer, z, click)
            if np.count_nonzero(region & before) < ALIKE * np.count_nonzero(region | before):
                break
            regions[z] = before = region
    return {z: _edited(label[z], region, class_id, click.sign) for z, region in regions.items()}


def correct(
    label: NDArray[np.uint8],
    reviewed: Reviewed,
    class_names: Sequence[str],
    present: NDArray[np.bool_],
    answer: Answer,
) -> Corrected:
    """Replay the clicks of a case.

    Args:
        label: (D, S, S) class ids of the pseudo-label.
        reviewed: clicks and decisions on this case.
        class_names: id 1 first.
        present: (D, C) which classes slices are labelled with.
        answer: of the prompts.

    Returns:
        A new label; without a row the same content, every slice ``unchanged``.

    Raises:
        DataError: a click is of a class that its slice is labelled without.
    """
    found, changed = label.copy(), set[int]()
    for changes in replay(label, reviewed.clicks, class_names, present, answer):
        changed |= set(changes)
        for z, ids in changes.items():
            found[z] = ids
    return Corrected(found, slice_states(len(label), reviewed, changed))


def replay(
    label: NDArray[np.uint8],
    clicks: Sequence[Click],
    class_names: Sequence[str],
    present: NDArray[np.bool_],
    answer: Answer,
) -> Iterator[Changes]:
    """What each click changes, one after another; arguments and errors as of ``correct``."""
    found = label.copy()
    for click in clicks:
        fault = find_fault(click, present, class_names)
        if fault:
            raise DataError(f"clicks.csv: the click into {click.case} at {click.time}: {fault}, or remove its row")
        changes = apply_click(found, click, class_names, present, answer)
        for z, ids in changes.items():
            found[z] = ids
        yield changes


def slice_states(depth: int, reviewed: Reviewed, changed: set[int]) -> NDArray[np.uint8]:
    """(D,) ``SliceState`` of the slices of a case.

    A slice that was clicked into is trusted, since it was looked at. A decision on the case holds for all its slices,
    one on a slice wins over it.

    Args:
        depth: number of slices.
        reviewed: clicks and decisions on this case.
        changed: slices that clicks have changed.
    """
    state = np.full(depth, SliceState.unchanged, np.uint8)
    state[sorted(changed)] = SliceState.changed
    state[[click.slice for click in reviewed.clicks]] = SliceState.trusted
    for decision in sorted(reviewed.decisions, key=_is_of_slice):
        chosen = slice(None) if decision.slice is None else decision.slice
        state[chosen] = SliceState.trusted if decision.decision == ACCEPTED else SliceState.left_out
    return state


def _is_of_slice(decision: Decision) -> bool:
    return decision.slice is not None


def _neighbours(middle: int, could: NDArray[np.bool_], step: int) -> list[int]:
    """Slices one after another in a direction, as far as a click could go."""
    found = []
    for z in range(middle + step, middle + step * (REACH + 1), step):
        if not (0 <= z < len(could) and could[z]):
            break
        found.append(z)
    return found


def _region(answer: Answer, number: int, click: Click) -> NDArray[np.bool_]:
    """The part of a slice's mask that holds the click, and the pixels next to it."""
    mask = answer(number, click.x, click.y) > 0
    rows, columns = np.ogrid[: mask.shape[0], : mask.shape[1]]
    near = (rows - click.y) ** 2 + (columns - click.x) ** 2 <= AROUND**2
    parts, _ = ndimage.label(mask | near)
    return np.asarray(parts == parts[click.y, click.x])


def _edited(ids: NDArray[np.uint8], region: NDArray[np.bool_], class_id: int, sign: int) -> NDArray[np.uint8]:
    """Class ids of a slice with a region put in, or taken out of the class."""
    if sign > 0:
        return np.where(region, np.uint8(class_id), ids)
    return np.where(region & (ids == class_id), np.uint8(BACKGROUND), ids)
