"""A drawn scene for the tests of PAM."""

import torch
from pam_settings import pam_settings
from tiny import SIZE, TinyBackbone

from weakmedsam.pam.refiner import PamBatch


def drawn(slices):
    """Backbone and some slices of two classes, all present and without padding."""
    torch.manual_seed(0)
    box = torch.tensor([0, SIZE, 0, SIZE]).expand(slices, 4)
    backbone, cam, embedding = TinyBackbone(), torch.rand(slices, 2, 8, 8), torch.randn(slices, 16, 8, 8)
    return backbone, PamBatch(torch.rand(slices, 1, SIZE, SIZE), cam, embedding, torch.ones(slices, 2), box)


class BoxBackbone(TinyBackbone):
    """A point's mask is the box of a drawing that it lies in: embedding (B, 1, S, S) holds ids of boxes."""

    def __init__(self, quality=None):
        super().__init__()
        self.asked = 0
        self.largest = 0
        self.quality = quality

    def prompted(self, embedding, points):
        points = points.expand(len(embedding), *points.shape[-2:])
        self.asked += points.shape[0] * points.shape[1]
        self.largest = max(self.largest, points.shape[0] * points.shape[1])
        column, row = points.long().unbind(-1)
        rows = [drawing[0, y, x] for drawing, y, x in zip(embedding, row, column, strict=True)]
        hit = torch.stack(rows)
        masks = embedding == hit[..., None, None]
        quality = torch.ones_like(hit) if self.quality is None else self.quality[hit.long()]
        return masks * 20.0 - 10.0, quality

    def masks_at_points(self, embedding, points):
        return self.prompted(embedding, points)[0]


def scene(slices=1):
    """A drawing of two boxes on ground, and two classes whose activation peeps out of the first box.

    The boxes are 8..20 x 8..16 (id 1) and 8..20 x 16..28 (id 2).
    """
    drawing = torch.zeros(slices, 1, SIZE, SIZE)
    drawing[..., 8:20, 8:16] = 1
    drawing[..., 8:20, 16:28] = 2
    cam = torch.zeros(slices, 2, SIZE, SIZE)
    cam[:, 0, 9:15, 9:15] = 1.0
    cam[:, 1, 9:15, 18:26] = 1.0
    box = torch.tensor([0, SIZE, 0, SIZE]).expand(slices, 4)
    return PamBatch(drawing / 2, cam, drawing, torch.ones(slices, 2), box)


SCENE = pam_settings(prompts__grid=8, walk__map_size=SIZE, affinity__radius=3.0, walk__steps=8, threshold__sigma=0.0)


def dice(ids, truth):
    return float(2 * (ids & truth).sum() / (ids.sum() + truth.sum()))
