"""Pre-train pocket to answer point prompts on drawn images; evaluate it on images it has not seen.

``make pocket`` runs this with its defaults. Killed, it continues from its last saved state.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from weakmedsam.backbones.pocket import EMBEDDED, Pocket
from weakmedsam.pretraining.grouping import Grouping
from weakmedsam.pretraining.scenes import ScenePrompts, Scenes, draw_prompts, draw_scenes, turn_scenes
from weakmedsam.system.atomic_io import replacing

HELD_OUT = 2**40
"""Seeds from here on are for evaluation; training counts up from 0."""


class DrawnPrompts(Dataset[ScenePrompts]):
    """One whole batch an item, which follows from seed and index: any step can be drawn again after a kill.

    Args:
        batch: images an item.
        prompts: points an image.
        steps: items.
        seed: of the first drawing; the following count up.
        reuse: items that show the same drawings, turned or mirrored and with other points. Drawing costs a
            processor about as much as learning from what is drawn.
        apart: items between two that show the same drawings.
    """

    def __init__(self, batch: int, prompts: int, steps: int, seed: int = 0, reuse: int = 1, apart: int = 4) -> None:
        self.batch, self.prompts, self.steps, self.seed = batch, prompts, steps, seed
        self.reuse, self.apart = reuse, apart
        self._drawn: dict[int, Scenes] = {}

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, index: int) -> ScenePrompts:
        if self.reuse == 1:
            return draw_prompts(draw_scenes(self.batch, self.seed + index), self.prompts, self.seed + index)
        number = index // (self.reuse * self.apart) * self.apart + index % self.apart
        if number not in self._drawn:
            while len(self._drawn) >= self.apart:
                del self._drawn[next(iter(self._drawn))]
            self._drawn[number] = draw_scenes(self.batch, self.seed + number)
        turned = turn_scenes(self._drawn[number], int(np.random.default_rng(index).integers(8)))
        return draw_prompts(turned, self.prompts, self.seed + index)


def overlap(logits: Tensor, masks: Tensor) -> Tensor:
    """Intersection over union of ``logits`` > 0 with ``masks``, over the last two dimensions."""
    chosen, truth = logits > 0, masks > 0.5
    union = (chosen | truth).flatten(-2).sum(-1).clamp_min(1)
    return (chosen & truth).flatten(-2).sum(-1) / union


def prompt_loss(logits: Tensor, quality: Tensor, masks: Tensor) -> Tensor:
    """BCE + Dice of the best of three candidates, and squared error of the predicted IoU of each.

    Only the best candidate learns from a question, as in SAM (Kirillov et al., ICCV 2023, section 3):
    a point on a part may mean the part or the whole. A twentieth of the mean over the candidates keeps
    all three alive. Logits (B, P, 3, S, S), quality (B, P, 3), masks (B, P, S, S).
    """
    truth = masks[:, :, None].expand_as(logits)
    bce = F.binary_cross_entropy_with_logits(logits, truth, reduction="none").flatten(-2).mean(-1)
    p = logits.sigmoid()
    dice = 1 - (2 * (p * truth).flatten(-2).sum(-1) + 1) / (p.flatten(-2).sum(-1) + truth.flatten(-2).sum(-1) + 1)
    each = 2 * bce + dice
    error = (quality - overlap(logits.detach(), truth)).square().mean()
    return each.min(dim=-1).values.mean() + 0.05 * each.mean() + error


@torch.no_grad()
def evaluate(model: Pocket, images: int = 256) -> dict[str, float]:
    """Mean IoU at one point on unseen drawn images: best of three candidates, and the one chosen."""
    device = next(model.parameters()).device
    best, chosen = [], []
    for batch in DataLoader(DrawnPrompts(16, 4, images // 16, HELD_OUT), batch_size=None):
        image, points, masks = (tensor.to(device) for tensor in batch[:3])
        logits, quality = model.candidates_at_points(model.embed(image), points)
        iou = overlap(logits, masks[:, :, None])
        best.append(iou.amax(-1).flatten())
        chosen.append(iou.gather(-1, quality.argmax(-1, keepdim=True)).flatten())
    return {"best_of_three": torch.cat(best).mean().item(), "chosen": torch.cat(chosen).mean().item()}


def write_weights(model: Pocket, path: Path) -> None:
    """Half precision, whole or not at all."""
    state = {key: value.half().contiguous() for key, value in model.pretrained_state().items()}
    with replacing(path) as part:
        save_file(state, part)


def train(args: argparse.Namespace) -> Pocket:
    """One-cycle AdamW over drawn batches, with a running average of the weights as the result."""
    torch.manual_seed(0)
    device = torch.device(args.device)
    # torch's own annotation of `to` leaves out memory_format.
    model: Pocket = Pocket(weights="none").to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if args.init is not None:
        # What these weights lack keeps its first values; what they have has to fit.
        given = {key: value.float() for key, value in load_file(args.init).items()}
        model.load_state_dict(model.state_dict() | given)
    model.requires_grad_(True)
    model.adapted.requires_grad_(False)
    grouping = Grouping().to(device)
    trained = [p for p in (*model.parameters(), *grouping.parameters()) if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, weight_decay=0.02, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps, pct_start=0.05)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.998), use_buffers=True)
    averaged = cast(Pocket, average.module)
    parts: dict[str, nn.Module | torch.optim.Optimizer | torch.optim.lr_scheduler.LRScheduler] = {
        "model": model, "grouping": grouping, "optimizer": optimizer, "schedule": schedule, "average": average,
    }  # fmt: skip
    state_file, start = args.work / "state.pt", 0
    args.work.mkdir(parents=True, exist_ok=True)
    if state_file.is_file():
        state = torch.load(state_file, weights_only=True)
        start = state.pop("step")
        for key, part in parts.items():
            part.load_state_dict(state[key])
    bar = tqdm(_batches(args, start), initial=start, total=args.steps, desc="pocket", mininterval=2)
    for step, batch in enumerate(bar, start=start + 1):
        image, points, masks, pieces = (tensor.to(device) for tensor in batch)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            embedding = model.embed(image)
            logits, quality = model.candidates_at_points(embedding, points)
        answers = prompt_loss(logits.float(), quality.float(), masks)
        groups = grouping(embedding.float(), pieces, torch.Generator().manual_seed(step))
        loss = answers + args.grouping * groups
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(model)
        bar.set_postfix(answers=f"{answers.item():.3f}", groups=f"{groups.item():.3f}", refresh=False)
        if step % args.save_every == 0 or step == args.steps:
            with replacing(state_file) as unfinished:
                state = {key: part.state_dict() for key, part in parts.items()}
                torch.save({"step": step, **state}, unfinished)
            figures = evaluate(averaged.eval(), 64)
            bar.write(f"step {step}: IoU on unseen images {figures}")
    return averaged.eval()


def _batches(args: argparse.Namespace, start: int) -> Iterator[ScenePrompts]:
    data = DrawnPrompts(args.batch, args.prompts, args.steps, args.seed, args.reuse)
    remaining = range(start, args.steps)
    return iter(DataLoader(data, batch_size=None, sampler=remaining, num_workers=args.workers))


def main() -> None:
    """Train, write the weights, print the figures."""
    parser = argparse.ArgumentParser(prog="python -m weakmedsam.pretraining", description=__doc__)
    parser.add_argument("--steps", type=int, default=5000, help="optimiser steps; 1.0 to 1.6 s each on two cores")
    parser.add_argument("--batch", type=int, default=16, help="images a step")
    parser.add_argument("--prompts", type=int, default=3, help="points an image")
    parser.add_argument("--reuse", type=int, default=4, help="steps that each drawing is used in")
    parser.add_argument("--seed", type=int, default=0, help="of the first drawing")
    parser.add_argument("--init", type=Path, default=None, help="weights file to begin from")
    parser.add_argument("--grouping", type=float, default=0.2, help="weight of the loss over pairs of cells")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--workers", type=int, default=1, help="processes that draw")
    parser.add_argument("--save-every", type=int, default=200, help="steps between saved states")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="bfloat16 autocast")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--work", type=Path, default=Path("runs/pocket"), help="state for continuing lies here")
    parser.add_argument("--out", type=Path, default=EMBEDDED, help="weights file to write")
    parser.add_argument("--evaluate", action="store_true", help="only evaluate the weights at --out")
    args = parser.parse_args()
    if args.evaluate:
        model = Pocket(weights=os.fspath(args.out)).eval()
    else:
        model = train(args).to("cpu")
        write_weights(model, args.out)
        model = Pocket(weights=os.fspath(args.out)).eval()
    figures = evaluate(model)
    print(
        ", ".join(f"IoU {name} {value:.3f}" for name, value in figures.items()),
        "on 1,024 points of 256 unseen images",
    )


if __name__ == "__main__":
    main()
