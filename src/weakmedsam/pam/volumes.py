"""What PAM does with whole volumes: pseudo-labels with quality, Dice in the test, refined predictions."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from weakmedsam.backbones.base import Backbone
from weakmedsam.classification.module import Activation, WeakMedSAM
from weakmedsam.contracts import VolumeBatch
from weakmedsam.figures import PictureRow
from weakmedsam.geometry import inside_box, to_native
from weakmedsam.metrics.no_image import ellipsoid_dice
from weakmedsam.metrics.overlap_surface import dice_from_counts, overlap_counts
from weakmedsam.pam.occlusion import Drops, drops_under_occlusion
from weakmedsam.pam.refiner import PamBatch, Refined, Refinement, find_levels, mine, score_maps
from weakmedsam.pam.self_training import find_present
from weakmedsam.pam.tables import CaseDice
from weakmedsam.pam.thresholding import PseudoLabel, agreement, mean_confidence, threshold_scores
from weakmedsam.pam.volume_affinity import relative_thickness

Look = Callable[[VolumeBatch], Activation]


def labelled_rows(batch: VolumeBatch) -> Tensor:
    """Numbers of the slices that have some class."""
    return batch["label"].any(dim=1).nonzero().flatten()


def refine_volume(
    module: WeakMedSAM,
    activation: Activation,
    batch: VolumeBatch,
    settings: Refinement,
    backbone: Backbone | None = None,
    drops: Drops | None = None,
) -> Iterator[tuple[Tensor, Refined]]:
    """Refine the slices of a volume that have a class, with thresholds of the volume.

    Args:
        module: the network.
        activation: of the slices that ``labelled_rows`` gives, in their order.
        batch: the volume.
        settings: the numbers of PAM.
        backbone: answers the prompts; None takes the module's.
        drops: of the class logits under occlusion; None asks the module.

    Yields:
        Numbers of some slices, and what became of them; scores of the whole volume are never held at once.
    """
    rows = labelled_rows(batch)
    if not len(rows):
        return
    box = batch["box"].expand(len(rows), 4)
    image = batch["image"][rows]
    embedding = module.embedding(activation, image) if settings.prompted else None
    slices = PamBatch(image, activation.cam, embedding, batch["label"][rows], box)
    thickness = relative_thickness(batch["spacing"], batch["frame"].side, settings.walk.map_size)
    chunk = module.slices_per_step
    asked = module.backbone if backbone is None else backbone
    occluded = drops_under_occlusion(module.evidence) if drops is None else drops
    mined = mine(asked, slices, settings, chunk, rows, thickness, occluded)
    levels = find_levels(mined, slices, settings, rows, len(batch["image"]))
    for first in range(0, len(rows), chunk):
        some = slice(first, first + chunk)
        own = None if levels is None else levels[some]
        yield rows[some], score_maps(mined.rows(some), slices.rows(some), settings, own)


def score_volume(
    module: WeakMedSAM,
    activation: Activation,
    batch: VolumeBatch,
    settings: Refinement,
    backbone: Backbone | None = None,
    drops: Drops | None = None,
) -> list[CaseDice]:
    """Dice of a volume on the scan's own slices, before and after refinement, and without any image; one a class.

    Args:
        module: the network.
        activation: of all its slices.
        batch: the volume, with ``mask``.
        settings: the numbers of PAM.
        backbone: answers the prompts; None takes the module's.
        drops: of the class logits under occlusion; None asks the module.
    """
    truth, names = batch["mask"], module.class_names
    empty = ~batch["label"].any(dim=1)
    # What lies in slices without a label is missed by both.
    missed = overlap_counts(torch.zeros_like(truth[empty]), truth[empty], len(names)).sum(0).cpu()
    counts = {"cam": missed, "pam": missed}
    labelled = activation.rows(labelled_rows(batch))
    for rows, refined in refine_volume(module, labelled, batch, settings, backbone, drops):
        for name, scores in (("cam", refined.before), ("pam", refined.after)):
            ids, _ = threshold_scores(to_native(scores, batch["frame"]), settings.threshold.value)
            counts[name] = counts[name] + overlap_counts(ids, truth[rows], len(names)).sum(0).cpu()
    cam, pam = (dice_from_counts(counts[name]).tolist() for name in ("cam", "pam"))
    no_image = map(tuple, ellipsoid_dice(batch["label"], truth).tolist())
    return [CaseDice(batch["case"], *row) for row in zip(names, cam, pam, no_image, strict=True)]


def refine_prediction(
    module: WeakMedSAM, activation: Activation, batch: VolumeBatch, settings: Refinement
) -> Iterator[tuple[Tensor, Refined]]:
    """Refine what a segmentation network predicts of a volume; neither labels nor a mask are looked at.

    Args:
        module: the network, with a ``start``.
        activation: of all its slices.
        batch: the volume.
        settings: the numbers of PAM.

    Yields:
        As ``refine_volume``, of the slices that are said to have a class.
    """
    said = batch.copy()
    inside = inside_box(batch["box"][None], batch["frame"].size, activation.cam.shape[-1])
    said["label"] = find_present(activation.cam * inside, module.log_odds_of_presence(activation.logits)).float()
    yield from refine_volume(module, activation.rows(labelled_rows(said)), said, settings)


def segment_volume(
    module: WeakMedSAM,
    activation: Activation,
    batch: VolumeBatch,
    settings: Refinement,
    scores: Tensor | None = None,
) -> Tensor:
    """Segment a volume by what is refined, with nothing known of it: the start says which classes its slices have.

    Args:
        module: the network, with a ``start``.
        activation: of all its slices.
        batch: the volume; neither its labels nor a mask are looked at.
        settings: the numbers of PAM.
        scores: (D, C, H0, W0) float32 zeros, which takes the scores; None: they are not kept.

    Returns:
        (D, H0, W0) uint8 class ids on the scan's own slices; background in slices that are said to have no class.
    """
    frame = batch["frame"]
    ids = torch.zeros(len(batch["image"]), frame.height, frame.width, dtype=torch.uint8)
    for rows, refined in refine_prediction(module, activation, batch, settings):
        native = to_native(refined.after, frame)
        ids[rows.cpu()] = threshold_scores(native, settings.threshold.value)[0].cpu()
        if scores is not None:
            scores[rows.cpu()] = native.float().cpu()
    return ids


def label_volume(
    module: WeakMedSAM, activation: Activation, batch: VolumeBatch, settings: Refinement, look: Look
) -> tuple[PseudoLabel, PictureRow | None]:
    """Pseudo-labels of all slices, and the picture's row; none for a volume without a class.

    Args:
        module: the network.
        activation: of all D slices.
        batch: the volume.
        settings: the numbers of PAM; with ``flips`` the stability is measured too.
        look: encodes slices again, for the mirrored ones.
    """
    size, label = module.backbone.image_size, batch["label"]
    result = PseudoLabel(
        torch.zeros(len(label), size, size, dtype=torch.uint8),
        torch.ones(len(label), size, size),
        torch.full(label.shape, torch.nan),
        torch.full(label.shape, torch.nan),
    )
    shown: PictureRow | None = None
    largest = -1
    labelled = activation.rows(labelled_rows(batch))
    for some, refined in refine_volume(module, labelled, batch, settings):
        after, confidence = threshold_scores(refined.after, settings.threshold.value)
        before, _ = threshold_scores(refined.before, settings.threshold.value)
        rows = some.cpu()
        result.label[rows], result.confidence[rows] = after.cpu(), confidence.cpu()
        result.quality[rows] = mean_confidence(after, confidence, label[some]).cpu()
        areas = (after > 0).flatten(1).sum(1)
        best = int(areas.argmax())
        if int(areas[best]) > largest:
            z, largest = int(some[best]), int(areas[best])
            title, image = f"{batch['case']} slice {z}\n", batch["image"][z, 0]
            shown = draw_row(module, title, image, refined, best, before[best], after[best], None)
    if settings.views.stability:
        result.stability.copy_(_stability(module, batch, settings, look, result.label))
        result.quality.mul_(result.stability)
    return result, shown


def _stability(module: WeakMedSAM, batch: VolumeBatch, settings: Refinement, look: Look, label: Tensor) -> Tensor:
    """(D, C) mean agreement of pseudo-labels with those of both mirrored volumes, NaN where absent.

    Only slices that have a class are encoded again.
    """
    present = batch["label"].cpu()
    measured = []
    for axis in (-1, -2):
        mirrored = _mirrored(batch, axis)
        again = torch.zeros_like(label)
        rows = labelled_rows(batch)
        if len(rows):
            seen = look(VolumeBatch(image=mirrored["image"][rows], box=mirrored["box"], case=batch["case"]))
            for some, refined in refine_volume(module, seen, mirrored, settings):
                ids, _ = threshold_scores(refined.after, settings.threshold.value)
                again[some.cpu()] = ids.cpu().flip(axis)
        measured.append(agreement(label, again, present))
    return torch.stack(measured).mean(dim=0)


def _mirrored(batch: VolumeBatch, axis: int) -> VolumeBatch:
    """The volume with its frames mirrored along columns (-1) or rows (-2), the scan's box with them."""
    size = batch["image"].shape[-1]
    top, bottom, left, right = batch["box"].unbind()
    box = (top, bottom, size - right, size - left) if axis == -1 else (size - bottom, size - top, left, right)
    return VolumeBatch(
        image=batch["image"].flip(axis),
        label=batch["label"],
        case=batch["case"],
        frame=batch["frame"],
        spacing=batch["spacing"],
        box=torch.stack(box),
    )


def draw_row(
    module: WeakMedSAM,
    title: str,
    image: Tensor,
    refined: Refined,
    i: int,
    before: Tensor,
    after: Tensor,
    mask: Tensor | None,
) -> PictureRow:
    """The picture's row of slice ``i`` of ``refined``; it shows the class with the highest score in it.

    Args:
        module: names the classes.
        title: case and slice.
        image: (S, S).
        refined: of some slices.
        i: which of them.
        before: (S, S) class ids of the activation as it was.
        after: (S, S) class ids of the refined one.
        mask: (S, S) expert class ids, where there are any.
    """
    c = int(refined.after[i].flatten(1).sum(1).argmax())
    return PictureRow(
        title + module.class_names[c],
        image=image.float().cpu().numpy(),
        cam=refined.cam[i, c].float().cpu().numpy(),
        affinity=refined.affinity[i].float().cpu().numpy(),
        refined=refined.walked[i, c].float().cpu().numpy(),
        pseudo_label=after.to(torch.uint8).cpu().numpy(),
        mask=None if mask is None else mask.to(torch.uint8).cpu().numpy(),
        unrefined=before.to(torch.uint8).cpu().numpy(),
        start="class activation" if module.start is None else "prediction",
    )


def volume_fingerprint(module: nn.Module) -> str:
    """Short hash of the network's weights: pseudo-labels of another network are not its own."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
