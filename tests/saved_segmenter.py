"""A segmentation network in a checkpoint."""

import torch
from torch import nn

from weakmedsam.config_diff import RUN_KEY, data_digest
from weakmedsam.segmentation.module import Segmenter

CLASSES = ["lesion", "cyst"]


BRIGHT = {"class_path": "saved_segmenter.Brightness", "arguments": {}}


class Brightness(nn.Module):
    """Class 1 above a level, class 2 far below it."""

    def __init__(self, spatial_dims, in_channels, out_channels, level=0.5):
        super().__init__()
        assert (spatial_dims, in_channels, out_channels) == (2, 1, 3)
        self.level = nn.Parameter(torch.tensor(level))

    def forward(self, image):
        above = 40 * (image - self.level)
        return torch.cat([torch.zeros_like(above), above, -above - 12], dim=1)


class Identity(nn.Module):
    """Class k where the image is k / C."""

    def __init__(self, spatial_dims, in_channels, out_channels):
        super().__init__()
        self.levels = nn.Parameter(torch.linspace(0, 1, out_channels)[:, None, None])

    def forward(self, image):
        return -100 * (image - self.levels).abs()


class Nothing(nn.Module):
    """No class anywhere."""

    def __init__(self, spatial_dims, in_channels, out_channels):
        super().__init__()
        self.level = nn.Parameter(torch.zeros(out_channels - 1))

    def forward(self, image):
        return torch.cat([torch.zeros_like(image) + 9, image * 0 + self.level[:, None, None]], dim=1)


def save(path, level=0.5, network="saved_segmenter.Brightness", classes=CLASSES, data=None, **arguments):
    segmenter = Segmenter(network, classes, arguments)
    if network.endswith("Brightness"):
        nn.init.constant_(segmenter.network.level, level)
    checkpoint = {"state_dict": segmenter.state_dict()}
    if data is not None:
        data.prepare_data()
        data.setup("test")
        checkpoint[RUN_KEY] = {"settings": {}, "data": data_digest(data), "version": "0.2.0"}
    segmenter.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, path)
    return segmenter
