"""What the segmentation network learns of a pseudo-label, and how: cross-entropy plus Dice loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from monai.losses import DiceLoss
from torch import Tensor

from weakmedsam.contracts import BACKGROUND, IGNORE
from weakmedsam.errors import LARGEST_WEIGHT, check_range


@dataclass(frozen=True)
class Loss:
    """Weights of the loss, and what is left out of it.

    Attributes:
        background_weight: weight of a background pixel's cross-entropy against 1 for a class's, above 0 and at most
            1,000,000. Default 1, with the Dice loss against imbalance; published 10, which asks for few false
            positives.
        dice_weight: weight of the Dice loss beside the cross-entropy, 0 to 1,000,000; published 0.
        ignore_below: confidence in [0, 1] under which a pixel is left out; 0 (published) keeps all.
        min_quality: quality of a pseudo-label in [0, 1] under which its slice is left out; 0 (published) keeps all. A
            slice's quality is that of its worst class; slices without a class have 1.
        quality_weight: weigh slices by that quality; published: no.
        trusted_weight: weight of a slice that a person has corrected or accepted (`make review`) against 1 for others,
            above 0 and at most 1,000,000; published: -.

    Raises:
        ConfigError: a number out of its range.
    """

    background_weight: float = 1.0
    dice_weight: float = 1.0
    ignore_below: float = 0.0
    min_quality: float = 0.0
    quality_weight: bool = False
    trusted_weight: float = 3.0

    def __post_init__(self) -> None:
        check_range("model.loss.background_weight", self.background_weight, 0, LARGEST_WEIGHT, above=True)
        check_range("model.loss.dice_weight", self.dice_weight, 0, LARGEST_WEIGHT)
        check_range("model.loss.ignore_below", self.ignore_below, 0, 1)
        check_range("model.loss.min_quality", self.min_quality, 0, 1)
        check_range("model.loss.trusted_weight", self.trusted_weight, 0, LARGEST_WEIGHT, above=True)


def segmentation_loss(
    logits: Tensor,
    target: Tensor,
    kept: Tensor,
    settings: Loss,
    slice_weight: Tensor | None = None,
) -> Tensor:
    """Cross-entropy plus Dice loss over the pixels that are kept.

    Args:
        logits: (B, C + 1, H, W), background first.
        target: (B, H, W) int64 class ids; what stands at pixels not kept is not read.
        kept: (B, H, W) bool.
        settings: the weights. The Dice loss is taken over the batch as a whole and over the classes without
            background, so that slices without a class do no harm.
        slice_weight: (B,) 0 or more, a slice's weight in both; None = all alike.

    Returns:
        The loss, float32, a scalar; 0 with a gradient of 0 where no pixel is kept.
    """
    logits = logits.float()
    weights = logits.new_ones(logits.shape[1])
    weights[BACKGROUND] = settings.background_weight
    known = target.where(kept, torch.full_like(target, IGNORE))
    entropy = F.cross_entropy(logits, known, weight=weights, ignore_index=IGNORE, reduction="none")
    readable = target.where(kept, torch.zeros_like(target))
    share = kept.to(logits.dtype)
    if slice_weight is not None:
        share = share * slice_weight.to(logits.dtype)[:, None, None]
    # reduction="mean" is NaN where all pixels are left out.
    total = (weights[readable] * share).sum().clamp_min(torch.finfo(weights.dtype).tiny)
    loss = (entropy * share).sum() / total
    if settings.dice_weight > 0:
        classes = F.one_hot(readable, logits.shape[1]).movedim(-1, 1)
        inside = share[:, None]
        probabilities = logits.softmax(1)
        if slice_weight is None:
            overlap = DiceLoss(include_background=False, batch=True)(probabilities * inside, classes * inside)
        else:
            overlap = _weighted_dice_loss(probabilities[:, 1:], classes[:, 1:], inside)
        loss = loss + settings.dice_weight * overlap
    return loss


def _weighted_dice_loss(probabilities: Tensor, classes: Tensor, weight: Tensor, smooth: float = 1e-5) -> Tensor:
    """MONAI's Dice loss over a batch as a whole, with a weight of each pixel.

    Where both of MONAI's arguments are weighted, their product has the square: weights above 1 make Dice more than 1.
    """
    over = (0, 2, 3)
    shared = (weight * probabilities * classes).sum(over)
    both = (weight * (probabilities + classes)).sum(over)
    return (1 - (2 * shared + smooth) / (both + smooth)).mean()
