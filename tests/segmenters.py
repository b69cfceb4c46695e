"""Tiny segmentation networks and their data."""

import torch
from lightning import LightningDataModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

from weakmedsam.segmentation.module import Segmenter

SIZE = 32


CLASSES = ("bright", "dark")


def draw_slices(count, seed):
    """Noisy slices with a bright disk (class 1), a dark one (class 2), or none."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.arange(SIZE)[:, None].float()
    image, mask = (
        0.5 + 0.05 * torch.randn(count, 1, SIZE, SIZE, generator=generator),
        torch.zeros(count, SIZE, SIZE),
    )
    for i in range(count):
        y, x = (8 + 16 * torch.rand(2, generator=generator)).tolist()
        mask[i][(rows - y) ** 2 + (rows.T - x) ** 2 < 36] = i % 3
    return (image + 0.3 * (mask == 1)[:, None] - 0.3 * (mask == 2)[:, None]).clamp(0, 1), mask.long()


class Disks(LightningDataModule):
    class_names = CLASSES

    def __init__(self, has_val_masks=True, volumes=()):
        super().__init__()
        self.has_val_masks = has_val_masks
        self.val_cases = [f"case{i // 6}" for i in range(24)]
        self.volumes = volumes

    def train_dataloader(self):
        image, mask = draw_slices(120, seed=0)
        items = [
            {"image": i, "target": m, "confidence": torch.ones(m.shape), "index": n}
            for n, (i, m) in enumerate(zip(image, mask, strict=True))
        ]
        return DataLoader(items, batch_size=8, shuffle=True)

    def val_dataloader(self):
        image, mask = draw_slices(24, seed=1)
        key = "mask" if self.has_val_masks else "target"
        items = [{"image": i, key: m, "index": n} for n, (i, m) in enumerate(zip(image, mask, strict=True))]
        return DataLoader(items, batch_size=12)

    def test_dataloader(self):
        return DataLoader(self.volumes, batch_size=None)


UNET = "monai.networks.nets.BasicUNet"


ORACLE = f"{__name__}.Oracle"


def features(width=8):
    return (width, width, 2 * width, 2 * width, 2 * width, width)


def segmenter(network=UNET, classes=CLASSES, network_args=None, **arguments):
    if network == UNET and network_args is None:
        network_args = {"features": features()}
    return Segmenter(network, list(classes), network_args, **arguments)


def trainer(folder, **arguments):
    return Trainer(
        default_root_dir=folder, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, **arguments,
    )  # fmt: skip


class Oracle(nn.Module):
    """Reads the class off the image: class k of C has the value k / C."""

    def __init__(self, spatial_dims, in_channels, out_channels):
        super().__init__()
        assert (spatial_dims, in_channels) == (2, 1)
        self.channels = out_channels
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, image):
        ids = torch.arange(self.channels).view(1, -1, 1, 1) / (self.channels - 1)
        return -1000 * (image - ids).abs() + self.bias


class Deaf(nn.Module):
    """Gives five channels, whatever it is asked for."""

    def __init__(self, spatial_dims, in_channels, out_channels):
        super().__init__()
        self.layer = nn.Conv2d(in_channels, 5, 1)

    def forward(self, image):
        return self.layer(image)


class Supervised(Deaf):
    """Gives a list, as networks with deep supervision do."""

    def forward(self, image):
        return [super().forward(image)]
