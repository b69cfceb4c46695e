"""SCE by one process or two over the same slices: ``python two_ranks.py DEVICES FILE``; no test by itself."""

import sys

import numpy as np
import torch
from lightning import LightningDataModule, Trainer
from sklearn.datasets import make_blobs
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from weakmedsam.backbones.base import Backbone, Encoded
from weakmedsam.callbacks import SubClassExploration
from weakmedsam.classification.module import WeakMedSAM
from weakmedsam.sce.config import SubClassTask

SLICES = 41  # odd: the sampler repeats one
FEATURES = 6


class Given(Backbone):
    """The features are the image's first row."""

    name = "given"
    feature_dim = FEATURES

    def __init__(self):
        super().__init__()
        self.image_size = FEATURES
        self.scale = nn.Parameter(torch.ones(()))

    def encode(self, image):
        features = (self.scale * image[:, 0, 0])[:, :, None, None].expand(-1, -1, 2, 2)
        return Encoded(features, features)

    def masks_at_points(self, embedding, points):
        raise NotImplementedError

    def set_trainable(self, policy):
        self.requires_grad_(True)


class Blobs(Dataset):
    """Class "even" is in even rows only: of two ranks the second has none. Class "both" is everywhere."""

    def __init__(self):
        points, owner = make_blobs(SLICES, FEATURES, centers=4, cluster_std=0.5, random_state=1)
        self.image = torch.tensor(points, dtype=torch.float32)[:, None, None, :].expand(-1, 1, FEATURES, -1)
        even = (np.arange(SLICES) % 2 == 0) & (owner < 3)
        self.labels = np.stack([even, owner > 0], axis=1).astype(np.float32)

    def __len__(self):
        return SLICES

    def __getitem__(self, index):
        box = torch.tensor([0, FEATURES, 0, FEATURES])
        return {
            "image": self.image[index],
            "label": torch.from_numpy(self.labels[index]),
            "index": index,
            "box": box,
        }


class Data(LightningDataModule):
    train_slices = SLICES

    def train_labels(self):
        return Blobs().labels

    def train_cases(self):
        return np.arange(SLICES) // 5

    def train_dataloader(self):
        place = {"num_replicas": self.trainer.world_size, "rank": self.trainer.global_rank}
        return DataLoader(Blobs(), batch_size=4, sampler=DistributedSampler(Blobs(), shuffle=False, **place))

    def features_dataloader(self, rank, world):
        # Uneven on purpose: 21 and 20 slices.
        return DataLoader(Blobs(), batch_size=4, sampler=range(rank, SLICES, world))


def main(devices, file):
    torch.manual_seed(0)
    sce = SubClassExploration(SubClassTask(3), pictures=2)
    # So slow that the features of two runs with different batches are the same.
    model = WeakMedSAM(Given(), ["even", "both"], learning_rate=1e-9, sce=sce)
    states = []
    sce.on_train_epoch_start = lambda *_: states.append(model.subclass_ids.clone())
    trainer = Trainer(
        default_root_dir=f"{file}.run",
        max_epochs=2,
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, Data())
    figures = {key: float(value) for key, value in trainer.callback_metrics.items()}
    logged = {key: value for key, value in figures.items() if key.startswith("sce/")}
    trained = {key: value for key, value in figures.items() if key.startswith("train/")}
    states.append(model.subclass_ids)
    torch.save({"ids": torch.stack(states), "logged": logged, "trained": trained}, f"{file}.{trainer.global_rank}")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
