"""A run of eight tiny volumes that can be reviewed: a real network of random weights, pseudo-labels with errors."""

import json
from pathlib import Path

import numpy as np
import saved_segmenter
import torch
import yaml
from classifiers import module
from scipy import ndimage
from tiny import SIZE

from data_modules.phantom import Phantom
from data_modules.slice_datasets import slice_labels
from data_modules.store import SliceReader
from weakmedsam.inference.trained_run import instantiate
from weakmedsam.pam.pseudo_label_io import Origin, write_pseudo_label
from weakmedsam.pam.thresholding import PseudoLabel, mean_confidence


def write_run(folder: Path) -> Path:
    """The run's folder, as ``make train`` leaves it."""
    run = folder / "runs/phantom/default"
    torch.manual_seed(0)
    classifier = module(sce=False)
    data = {
        "data_dir": str(folder / "scans"),
        "num_volumes": 8,
        "phantom": {"slices": 12, "size": 48},
        "image_size": SIZE,
        "split": {"fractions": [0.5, 0.25, 0.25]},
        "slices": {"min_pixels": 3},
        "prepare": {"store_dir": str(folder / "store"), "workers": 1},
        "num_workers": 0,
    }
    config = {
        "seed_everything": 0,
        "model": {
            "class_path": "weakmedsam.classification.module.WeakMedSAM",
            "init_args": {"backbone": {"class_path": "tiny.TinyBackbone"}, "class_names": classifier.class_names},
        },
        "data": {"class_path": "data_modules.phantom.Phantom", "init_args": data},
        "trainer": {"precision": "32-true"},
    }
    for number, stage in enumerate(("classify", "pseudo_labels", "segment"), start=1):
        (run / stage / "checkpoints").mkdir(parents=True)
        (run / stage / "stage.json").write_text(json.dumps({"made": str(number), "settings": {"after": {}}}))
        (run / stage / "config.yaml").write_text(yaml.safe_dump(config))
    (run / "prepare").mkdir()
    (run / "prepare/data.json").write_text(json.dumps({"classes": {"lesion": [1], "cyst": [2]}}))
    checkpoint = {"state_dict": classifier.state_dict()}
    classifier.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, run / "classify/checkpoints/best.ckpt")
    saved_segmenter.save(run / "segment/checkpoints/best.ckpt")
    _, made = instantiate(yaml.safe_load(yaml.safe_dump(config)), classifier.class_names)
    write_pseudo_labels(run, made)
    return run


def write_pseudo_labels(run: Path, data: Phantom) -> None:
    """Expert masks, grown by a pixel and moved by two: wrong at the borders, as pseudo-labels are."""
    data.prepare_data()
    data.setup("predict")
    reader = SliceReader(data.store)
    for number, entry in enumerate(data.cases("train")):
        mask = np.array(reader.mask(entry.name))
        grown = np.roll(ndimage.grey_dilation(mask, (1, 3, 3)), 2, axis=2)
        present = slice_labels(entry, data.slices.min_pixels)
        allowed = np.concatenate([np.ones((len(mask), 1)), present], axis=1) > 0
        label = torch.from_numpy(
            np.where(np.take_along_axis(allowed, grown.reshape(len(mask), -1), 1).reshape(mask.shape), grown, 0)
        )
        sure = torch.full(label.shape, 0.9 - 0.2 * number)
        quality = mean_confidence(label, sure, torch.from_numpy(present))
        labels = PseudoLabel(label.to(torch.uint8), sure, quality, quality)
        origin = Origin(entry.name, {}, data.digest_volume(entry.name))
        write_pseudo_label(run / "pseudo_labels" / f"{entry.name}.safetensors", labels, origin)
