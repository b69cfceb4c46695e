"""What occlusion costs beside what PAM does anyway, a slice: ``python -m benchmarks.occlusion``.

Drawn scenes of 128 pixels, ``pocket`` and an untrained local encoder of the default size, the repository's
settings of PAM, eight adjacent slices of one volume. ``occlusion_share``: of the whole, occlusion's own; ``painted``:
masks painted a slice, of all that are asked for.
"""

from __future__ import annotations

import argparse
import json
from functools import partial

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks._pam_slice import seconds
from weakmedsam.backbones.pocket import Pocket
from weakmedsam.classification.cam import Pooling
from weakmedsam.classification.local_encoder import LocalEncoder
from weakmedsam.classification.module import WeakMedSAM
from weakmedsam.pam.config import Affinity, Occlusion, Prompts, Refinement, Threshold, Walk
from weakmedsam.pam.occlusion import logit_drops, same_as
from weakmedsam.pam.prompt_masks import PamBatch, decode_prompts, place_prompts
from weakmedsam.pam.refiner import mine
from weakmedsam.pretraining.scenes import draw_scenes

SIZE = 128


def _known(drops: Tensor, some: PamBatch, masks: Tensor) -> Tensor:
    return drops


@torch.inference_mode()
def main() -> None:
    """Print a table and a line of JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.occlusion", description=__doc__)
    parser.add_argument("--slices", type=int, default=8, help="of the volume")
    parser.add_argument("--full", action="store_true", help="more repeats")
    arguments = parser.parse_args()
    count, repeats = arguments.slices, 8 if arguments.full else 3
    torch.manual_seed(0)
    local = LocalEncoder(SIZE, frame=SIZE)
    model = WeakMedSAM(Pocket(SIZE), ["a"], local_encoder=local, pooling=Pooling("log_sum_exp")).eval()
    image = draw_scenes(count, 0).image
    box = torch.tensor([[0, SIZE, 0, SIZE]]).expand(count, 4)
    slices = PamBatch(image, model(image, box).cam, model.backbone.embed(image), torch.ones(count, 1), box)
    table, figures = Table("prompts a side", "masks", "occlusion", "all", "share", "painted"), {}
    for side in (4, 8):
        settings = Refinement(
            Prompts(side), Affinity("with_intensity", 0.67, contrast=15.0), Walk(32, extent="volume"),
            Occlusion(0.3), threshold=Threshold(0.75),
        )  # fmt: skip
        prompts = place_prompts(slices, settings)
        masks = decode_prompts(model.backbone, slices, prompts, settings).masks
        assert masks is not None
        asked = seconds(partial(decode_prompts, model.backbone, slices, prompts, settings), repeats)
        occluded = seconds(partial(logit_drops, model.evidence, image, box, masks), repeats)
        # With drops known, what is left is PAM without occlusion.
        known = partial(_known, logit_drops(model.evidence, image, box, masks))
        walk = partial(mine, model.backbone, slices, settings, count, thickness=1.0, drops=known)
        rest = seconds(walk, repeats)
        painted = sum(len(row.unique()) for row in same_as(masks)) / count
        share = occluded / (occluded + rest)
        times = (f"{1e3 * t / count:.0f} ms" for t in (asked, occluded, occluded + rest))
        table.add_row(str(side), *times, f"{share:.0%}", f"{painted:.0f} of {side * side}")
        figures = {"occlusion_share": round(share, 3), "painted": round(painted, 1)}
    Console().print(table)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
