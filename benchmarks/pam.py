"""Pseudo-labels of a slice: this project's way against the published procedure, in one run.

The published procedure, written here anew: the image is encoded again for every prompt, the logits are
summed, and the transition is a dense N x N matrix. Both sides use an encoder of ViT-B size at 256 pixels
(32 x 32 tokens) with random weights, and segment-anything's full-size decoder; published by its own code. Here some
slices are encoded at once, as a run does, with the project's attention, in bfloat16 as ``--trainer.precision
bf16-mixed`` does; ``speedup_float32`` is without.

``slice_seconds``: PAM of a slice with the repository's settings, ``pocket`` and an untrained local encoder, on a
volume of the default phantom (``--size``: drawn in that size).

``decode_speedup``: masks of all prompts of one embedding, by segment-anything's own call and here.

``callback_overhead``: what the callback adds to a validation epoch of SAMUS ViT-B at the same size, in shares
of the forward passes; it refines only slices that have a class, a half of them here (``--positive``). One
picture grid an epoch comes on top, whatever the epoch's length.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, TwoWayTransformer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks._pam_slice import CLOCK, pam_of_slice, seconds
from weakmedsam.backbones.attention import Attention
from weakmedsam.backbones.prompting import decode_points
from weakmedsam.backbones.samus import SAMUS
from weakmedsam.callbacks import PromptAffinityMining
from weakmedsam.classification.module import WeakMedSAM
from weakmedsam.figures import PictureRow, draw_grid
from weakmedsam.geometry import min_max
from weakmedsam.metrics.overlap_surface import VolumeDice
from weakmedsam.pam.affinity import edge_weights, grid_points, half_disc, onto_map, random_walk
from weakmedsam.pam.config import Affinity, Prompts, Walk
from weakmedsam.pam.thresholding import threshold_scores
from weakmedsam.pam.volumes import draw_row

SIZE, MAP, GRID, RADIUS, BETA, STEPS = 256, 64, 4, 5.0, 4.0, 4
ROWS = 6  # of a picture grid
TOGETHER = 4  # slices encoded at once


class PeakMemory(TorchDispatchMode):
    """Largest sum of bytes of all tensors that operations inside have made and that are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.alive:
                    self.alive[storage.data_ptr()] = storage.nbytes()
                    weakref.finalize(storage, self.alive.pop, storage.data_ptr(), None)
        self.peak = max(self.peak, sum(self.alive.values()))
        return result


def build() -> tuple[ImageEncoderViT, PromptEncoder, MaskDecoder]:
    """ViT-B with 32 x 32 tokens, and SAM's prompt encoder and decoder."""
    torch.manual_seed(0)
    encoder = ImageEncoderViT(
        img_size=SIZE, patch_size=8, embed_dim=768, depth=12, num_heads=12, out_chans=256,
        use_rel_pos=True, window_size=14, global_attn_indexes=(2, 5, 8, 11),
    )  # fmt: skip
    prompts = PromptEncoder(256, (32, 32), (SIZE, SIZE), 16)
    decoder = MaskDecoder(transformer_dim=256, transformer=TwoWayTransformer(2, 256, 8, 2048))
    return encoder.eval(), prompts.eval(), decoder.eval()


def dense_walk(cam: Tensor, summed: Tensor) -> Tensor:
    """The walk with the whole matrix: cam (1, C, s, s), summed (1, 1, s, s)."""
    size = summed.shape[-1]
    flat = summed.flatten()
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    near = (y.flatten()[:, None] - y.flatten()) ** 2 + (x.flatten()[:, None] - x.flatten()) ** 2 < RADIUS**2
    weights = torch.exp(-(flat[:, None] - flat).abs()) ** BETA * near
    transition = weights / weights.sum(dim=1, keepdim=True)
    maps = cam.flatten(2)[0]
    for _ in range(STEPS):
        maps = min_max((maps @ transition.T).view(-1, size, size)).flatten(1)
    return maps.view(1, -1, size, size)


def stencil_walk(cam: Tensor, maps: Tensor) -> Tensor:
    """The same walk by this project."""
    offsets = half_disc(RADIUS)
    return random_walk(cam, edge_weights(maps, offsets, BETA, 1.0), offsets, STEPS)


def their_masks(embedding: Tensor, points: Tensor, parts: tuple[ImageEncoderViT, PromptEncoder, MaskDecoder]) -> Tensor:
    """segment-anything's own decoder: (1, E, h, w) and (P, 2) -> (1, P, 4h, 4w)."""
    _, prompts, decoder = parts
    asked = points[:, None] - 0.5, torch.ones(len(points), 1)
    sparse, dense = prompts(points=asked, boxes=None, masks=None)
    masks, _ = decoder(embedding, prompts.get_dense_pe(), sparse, dense, multimask_output=False)
    return masks.transpose(0, 1)


def our_masks(embedding: Tensor, points: Tensor, parts: tuple[ImageEncoderViT, PromptEncoder, MaskDecoder]) -> Tensor:
    """The same from this project."""
    _, prompts, decoder = parts
    return decode_points(prompts, decoder, embedding, points, candidates=slice(0, 1))[0].squeeze(2)


def published(image: Tensor, cam: Tensor, parts: tuple[ImageEncoderViT, PromptEncoder, MaskDecoder]) -> Tensor:
    """Encode for the classifier, then again for each prompt; dense walk."""
    encoder, _, _ = parts
    encoder(image)
    logits = [their_masks(encoder(image), point[None], parts) for point in grid_points(GRID, SIZE)]
    summed = F.interpolate(torch.cat(logits, dim=1).sum(1, keepdim=True), size=(MAP, MAP), mode="bilinear")
    return dense_walk(cam, summed)


def ours(
    images: Tensor, cam: Tensor, parts: tuple[ImageEncoderViT, PromptEncoder, MaskDecoder], rough: bool = False
) -> Tensor:
    """Encode once, decode all prompts from the embedding, walk on the stencil: (B, 3, S, S), and (B, C, s, s)."""
    encoder, _, _ = parts
    with torch.autocast("cpu", torch.bfloat16, enabled=rough):
        embedding = encoder(images)
    logits = our_masks(embedding.float(), grid_points(GRID, SIZE), parts)
    return stencil_walk(cam, onto_map(logits.float().sigmoid(), MAP))


def with_own_attention(encoder: ImageEncoderViT) -> ImageEncoderViT:
    """The same encoder as the project's backbones have it."""
    own = copy.deepcopy(encoder)
    for block in own.blocks:
        block.attn = Attention(block.attn, "auto", False)
    return own


def callback_overhead(slices: int, positive: float, repeats: int) -> tuple[float, float, float]:
    """Seconds a slice: forward pass; refinement and both Dice; and seconds of one picture grid.

    Args:
        slices: of a validation batch.
        positive: share of them that have a class.
        repeats: the best of so many is taken.
    """
    torch.manual_seed(0)
    model = WeakMedSAM(SAMUS(weights="none"), ["a"]).eval()
    miner = PromptAffinityMining(Prompts(GRID), Affinity(radius=RADIUS, beta=BETA), Walk(STEPS))
    image, box = torch.rand(slices, 1, SIZE, SIZE), torch.tensor([[0, SIZE, 0, SIZE]]).expand(slices, 4)
    truth = torch.randint(0, 2, (slices, SIZE, SIZE))
    chosen = torch.arange(max(1, round(positive * slices)))
    dice = [VolumeDice(["case"] * slices, 1) for _ in range(2)]
    seen = model(image, box)

    def mine() -> tuple[Tensor, Tensor]:
        label = torch.ones(len(chosen), 1)
        refined = miner.refine(model, image[chosen], seen.rows(chosen), label, box[chosen])
        before, after = (
            threshold_scores(scores, miner.settings.threshold.value)[0] for scores in (refined.before, refined.after)
        )
        for metric, ids in zip(dice, (before, after), strict=True):
            metric.update(ids, truth[chosen], chosen)
        shown.append(draw_row(model, "", image[0, 0], refined, 0, before[0], after[0], truth[0]))
        return before, after

    shown: list[PictureRow] = []
    forward, mined = seconds(lambda: model(image, box), repeats), seconds(mine, 2 * repeats)
    with tempfile.TemporaryDirectory() as folder:
        picture = seconds(lambda: draw_grid(shown[:1] * ROWS, Path(folder) / "grid.png"), 1)
    return forward / slices, mined / slices, picture


def peak(work: Callable[[], object]) -> int:
    """Bytes."""
    with PeakMemory() as memory:
        work()
    return memory.peak


@torch.no_grad()
def main() -> None:
    """Measure, print a table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="repeat each measurement")
    parser.add_argument("--positive", type=float, default=0.5, help="share of validation slices with a class")
    parser.add_argument("--size", type=int, default=64, help="of the slices of slice_seconds, pixels")
    parser.add_argument("--slice-only", action="store_true", help="slice_seconds alone")
    parser.add_argument(
        "--cpu-time", action="store_true", help="processor time, where other work runs beside; one thread"
    )
    arguments = parser.parse_args()
    repeats = 3 if arguments.full else 1
    CLOCK[0] = time.process_time if arguments.cpu_time else time.perf_counter
    of_slice = {"slice_seconds": pam_of_slice(arguments.size, 2 * repeats)}
    print(f"PAM of a slice of {arguments.size} pixels: {of_slice['slice_seconds'] * 1e3:.0f} ms")
    if arguments.slice_only:
        print(json.dumps(of_slice))
        return
    parts = build()
    image, cam = torch.rand(1, 3, SIZE, SIZE), torch.rand(1, 1, MAP, MAP)
    summed, points = torch.randn(1, 1, MAP, MAP), grid_points(GRID, SIZE)
    embedding = parts[0](image)
    own = with_own_attention(parts[0]), *parts[1:]
    some, cams = image.expand(TOGETHER, -1, -1, -1), cam.expand(TOGETHER, -1, -1, -1)
    ours(image, cam, own)
    theirs_first = seconds(lambda: published(image, cam, parts), repeats)
    difference = (dense_walk(cam, summed) - stencil_walk(cam, summed)).abs().max().item()
    masks = their_masks(embedding, points, parts), our_masks(embedding, points, parts)
    apart = (masks[0] - masks[1]).abs().max() / masks[0].abs().max()
    rows = {
        "pseudo-label of a slice, bfloat16 encoder": (
            theirs_first,
            seconds(lambda: ours(some, cams, own, rough=True), 2 * repeats) / TOGETHER,
        ),
        "affinity and walk": (
            seconds(lambda: dense_walk(cam, summed), 5),
            seconds(lambda: stencil_walk(cam, summed), 20),
        ),
        "masks of a grid of prompts": (
            seconds(lambda: their_masks(embedding, points, parts), 5),
            seconds(lambda: our_masks(embedding, points, parts), 5),
        ),
        "pseudo-label of a slice, float32": (
            theirs_first,
            seconds(lambda: ours(some, cams, own), repeats) / TOGETHER,
        ),
    }
    memory = peak(lambda: dense_walk(cam, summed)), peak(lambda: stencil_walk(cam, summed))
    table = Table("what", "published", "here", "ratio", title="PAM, ViT-B encoder at 256 pixels, one slice")
    for name, (theirs, mine) in rows.items():
        table.add_row(name, f"{theirs * 1e3:.1f} ms", f"{mine * 1e3:.1f} ms", f"{theirs / mine:.1f} times")
    table.add_row(
        "peak memory of the walk",
        f"{memory[0] / 1e6:.1f} MB",
        f"{memory[1] / 1e6:.2f} MB",
        f"{memory[1] / memory[0]:.4f}",
    )
    Console().print(table)
    forward, mined, picture = callback_overhead(2, arguments.positive, repeats)
    print(
        f"validation, a slice: forward {forward * 1e3:.0f} ms, callback {mined * 1e3:.0f} ms "
        f"({arguments.positive:.0%} of the slices have a class); picture grid {picture:.1f} s an epoch"
    )
    print(f"largest difference between the two walks on the same map: {difference:.1e}")
    print(f"largest difference between the two decoders' logits, of their largest: {apart:.1e}")
    speedups = [theirs / mine for theirs, mine in rows.values()]
    figures = {
        **of_slice,
        "speedup": speedups[0],
        "speedup_float32": speedups[3],
        "walk_speedup": speedups[1],
        "decode_speedup": speedups[2],
        "walk_memory_ratio": memory[1] / memory[0],
        "callback_overhead": mined / forward,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
