"""What a review asks of a run's networks: answers to clicks, class activation, predictions; what it has seen it keeps.

The image encoder looks at a slice once. A click then costs no more than the mask decoder.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from data_modules.slice_datasets import make_volume_batch
from data_modules.store import SliceReader
from data_modules.store_index import Entry
from weakmedsam.classification.module import WeakMedSAM
from weakmedsam.geometry import inside_box, min_max_inside
from weakmedsam.inference.trained_run import with_weights
from weakmedsam.pam.self_training import load_segmenter
from weakmedsam.segmentation.module import Segmenter

KEPT_CASES = 3
"""Cases whose embeddings are kept; of SAM's ViT-B a slice has 4 MB."""


class Seen(NamedTuple):
    """What the networks have said of a case so far, by number of slice.

    Attributes:
        embeddings: (1, E, h', w') each.
        cams: (C, h, w) each, in [0, 1].
    """

    embeddings: dict[int, Tensor]
    cams: dict[int, Tensor]


class Networks:
    """The networks of a run; they may be asked from several threads.

    Args:
        module: the classification network, whose weights ``checkpoint`` brings when it is first needed.
        checkpoint: of the classification.
        segmenter: checkpoint of the segmentation network; None: there is none.
        reader: of the slice store.
    """

    def __init__(self, module: WeakMedSAM, checkpoint: Path, segmenter: Path | None, reader: SliceReader) -> None:
        self.class_names = module.class_names
        self._module, self._checkpoint = module, checkpoint
        self._loaded = False
        self._segmenter, self._segmentation = segmenter, cast(Segmenter | None, None)
        self._reader = reader
        self._seen: OrderedDict[str, Seen] = OrderedDict()
        self._wanted = ""
        self._lock = threading.RLock()
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def has_prediction(self) -> bool:
        """Whether there is a segmentation network."""
        return self._segmenter is not None

    def answer(self, entry: Entry, number: int, x: int, y: int) -> NDArray[np.float32]:
        """(S, S) mask logits of a slice for a prompt in the middle of pixel (x, y)."""
        with self._lock, torch.no_grad():
            embedding = self._look(entry, [number]).embeddings[number]
            points = torch.tensor([[x + 0.5, y + 0.5]], device=self._device)
            logits = self._module.backbone.masks_at_points(embedding, points).float()
            size = (entry.frame.size, entry.frame.size)
            return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)[0, 0].cpu().numpy()

    def look_ahead(self, entry: Entry, rows: Sequence[int]) -> None:
        """Encode slices one by one, so that clicks that come meanwhile wait for one slice only.

        It ends early where another case is looked at.
        """
        self._wanted = entry.name
        for z in rows:
            if self._wanted != entry.name:
                return
            with self._lock:
                self._look(entry, [z])

    def cams(self, entry: Entry, rows: Sequence[int]) -> NDArray[np.uint8]:
        """(D, C, h, w) class activation of slices ``rows``, scaled as PAM takes it, 255 = 1; 0 in the other slices."""
        self.look_ahead(entry, rows)
        with self._lock:
            seen = self._look(entry, rows)
            maps = torch.stack([seen.cams[z] for z in rows]) if rows else torch.zeros(0, len(self.class_names), 1, 1)
        found = np.zeros((entry.depth, *maps.shape[1:]), np.uint8)
        found[list(rows)] = (maps * 255).round().to(torch.uint8).cpu().numpy()
        return found

    def prediction(self, entry: Entry) -> NDArray[np.uint8]:
        """(D, S, S) class ids of the segmentation network, where there is one."""
        assert self._segmenter is not None
        with self._lock, torch.no_grad():
            if self._segmentation is None:
                self._segmentation, _ = load_segmenter(self._segmenter, self.class_names, entry.frame.size)
                self._segmentation.to(self._device)
            image = self._batch(entry)[0]
            parts = [self._segmentation(some).argmax(1) for some in image.split(self._segmentation.slices_per_step)]
            return torch.cat(parts).to(torch.uint8).cpu().numpy()

    def _look(self, entry: Entry, rows: Sequence[int]) -> Seen:
        """Encode those of some slices that are not; what is kept of the case."""
        seen = self._seen.setdefault(entry.name, Seen({}, {}))
        self._seen.move_to_end(entry.name)
        if len(self._seen) > KEPT_CASES:
            self._seen.popitem(last=False)
        new = [z for z in rows if z not in seen.embeddings]
        if new:
            module = self._ready()
            image, box = self._batch(entry, new)
            with torch.no_grad():
                for z, one in zip(new, image.split(1), strict=True):
                    activation = module(one, box)
                    cam = min_max_inside(activation.cam, inside_box(box, one.shape[-1], activation.cam.shape[-1]))
                    seen.embeddings[z] = module.embedding(activation, one)
                    seen.cams[z] = cam[0]
        return seen

    def _ready(self) -> WeakMedSAM:
        if not self._loaded:
            module = cast(WeakMedSAM, with_weights(self._module, self._checkpoint))
            self._module = module.to(self._device).eval().requires_grad_(False)
            self._loaded = True
        return self._module

    def _batch(self, entry: Entry, rows: Sequence[int] | slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Images (n, 1, S, S) of slices, and the box (1, 4) of the scan."""
        image = self._reader.image(entry.name)[list(rows) if not isinstance(rows, slice) else rows]
        batch = make_volume_batch(image, entry.name, entry.frame, entry.geometry.spacing)
        return batch["image"].to(self._device), batch["box"][None].to(self._device)
