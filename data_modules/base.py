"""SliceDataModule: from a data set's cases to the batches of the contract.

Expert masks are in two places only: ``mask`` of validation and test batches, and, for the fully supervised upper
bound alone, ``target`` of training batches (``labels.supervision: expert``).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from lightning import LightningDataModule
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from data_modules.augmentation import Augmentation, augment_batch
from data_modules.cases import Case, DatasetInfo, choose_classes
from data_modules.config import Labels, Preparation, Slices, Split
from data_modules.formats.read import READING
from data_modules.formats.volume import Reading
from data_modules.label_sizes import least_confidences
from data_modules.loaders import Order, ShareSampler, slice_loader, training_loader, volume_loader
from data_modules.prepare import lock_store, prepare
from data_modules.pseudo_labels import PseudoLabelReader
from data_modules.slice_datasets import (
    SliceDataset,
    SliceTable,
    VolumeDataset,
    check_positives,
    slice_labels,
    tabulate,
)
from data_modules.sources import Sources
from data_modules.splits import read_split, split_cases
from data_modules.store import SliceReader
from data_modules.store_index import Entry, Index, StoreSpec, read_index, write_rows
from data_modules.summary import (
    check_sizes,
    count_splits,
    describe_intensity,
    digest_content,
    digest_of,
    warn_of_false_spacing,
    warn_of_labels,
    warn_of_undefined,
)
from weakmedsam.errors import DataError, check_range
from weakmedsam.system.commands import command

DEFAULT_SLICES, DEFAULT_SPLIT, DEFAULT_LABELS, DEFAULT_PREPARATION = (
    Slices(),
    Split(),
    Labels(),
    Preparation(),
)

_log = logging.getLogger(__name__)


class SliceDataModule(LightningDataModule):
    """Slices of volumes with image-level labels. A data set is a subclass: ``info`` and ``find_cases``.

    The order of training slices and their augmentation follow from ``seed_everything`` and the epoch.

    Args:
        data_dir: folder of the volumes, in the data set's own layout.
        image_size: side of the square working frame, pixels, 8 to 4,096.
        classes: class name -> mask values, in order of their ids 1..C; None takes the data set's default.
        slices: which slices are taken, what counts as present, how intensities are scaled.
        split: which patients train, validate and test.
        labels: what training slices are labelled with.
        augment: ranges of random augmentation of training slices; None for none.
        batch_size: slices per step and process, 1 to 65,536.
        num_workers: processes that read slices, 0 to 256; 0 reads in the training process.
        prepare: how and where the slice store is written.

    Attributes:
        class_names: names of the classes, id 1 first.
        num_classes: how many, C.
        train_slices: how many training slices.
        has_val_masks: whether validation batches hold ``mask``.
        entries: case name -> what the index says of it.
        split: case name -> "train", "val" or "test".

    Raises:
        ConfigError: settings that contradict each other or the data set.
    """

    info: ClassVar[DatasetInfo]

    def __init__(
        self,
        data_dir: str,
        image_size: int = 256,
        classes: dict[str, list[int]] | None = None,
        slices: Slices = DEFAULT_SLICES,
        split: Split = DEFAULT_SPLIT,
        labels: Labels = DEFAULT_LABELS,
        augment: Augmentation | None = None,
        batch_size: int = 24,
        num_workers: int = 2,
        prepare: Preparation = DEFAULT_PREPARATION,
    ) -> None:
        super().__init__()
        check_range("data.image_size", image_size, 8, 4096)
        check_range("data.batch_size", batch_size, 1, 65_536)
        check_range("data.num_workers", num_workers, 0, 256)
        self.data_dir = data_dir
        self.image_size = image_size
        self.classes = choose_classes(self.info, classes)
        self.slices = slices
        self.split_settings = split
        self.labels = labels
        self.augment = augment
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.prepare = prepare
        self.intensity = slices.intensity(self.info.intensity)
        self.class_names = list(self.classes)
        self.num_classes = len(self.classes)
        self.entries: Mapping[str, Entry] = {}
        self.split: Mapping[str, str] = {}
        self._train: SliceTable | None = None
        self._least: dict[str, NDArray[np.uint8]] = {}  # of ``least_confidences``, once a training is set up
        self._first_epoch = 0

    # What a data set says

    def find_cases(self) -> list[Case]:
        """The data set's cases, sorted by name.

        Raises:
            DataError: none found; the message shows the expected layout.
        """
        raise NotImplementedError

    def draw_scans(self) -> None:
        """Draw the scans that are missing, of a data set that the program draws; of all others nothing."""

    def sources(self) -> Sources:
        """Where ``find_cases`` looks: by default at the NIfTI files in all folders of ``data_dir``."""
        return Sources(self.data_dir)

    def variant(self) -> str:
        """What else, beside the constructor's common arguments, tells the volumes apart: a modality."""
        return ""

    def reading(self) -> Reading:
        """What is taken of files that leave it open."""
        return READING

    def other_values(self) -> tuple[int, ...]:
        """Mask values that are known and become background if not chosen."""
        return self.info.values

    # Preparing

    @property
    def spec(self) -> StoreSpec:
        """Everything that changes what is in the store."""
        return StoreSpec(
            data_set=self.info.name,
            data_dir=str(Path(self.data_dir).resolve()),
            variant=self.variant(),
            image_size=self.image_size,
            plane=self.slices.plane,
            intensity=self.intensity,
            classes=self.classes,
            values=self.other_values(),
            reading=self.reading(),
        )

    @property
    def store(self) -> Path:
        """Folder of this data set's store under these settings."""
        return self.spec.folder(self.prepare.store_dir)

    def prepare_data(self) -> None:
        """Write the store and ``split-<name>.csv``; quick when all is there and unchanged.

        Raises:
            DataError: no data, bad cases, or an empty split.
        """
        self.draw_scans()
        cases = self.find_cases()
        if self.split_settings.file:  # its faults are told before volumes are read for hours
            names = [case.name for case in cases]
            read_split(Path(self.split_settings.file), names, names if self.prepare.on_bad_case == "raise" else ())
        index = prepare(cases, self.spec, self.prepare.store_dir, self.prepare.workers, self.prepare.on_bad_case)
        warn_of_false_spacing(index.entries, self.info)
        split, name = self._split(index)
        with lock_store(self.store):
            write_rows(self.store / f"split-{name}.csv", ("case", "split"), sorted(split.items()))

    def setup(self, stage: str) -> None:
        """Read the index and split the cases; every process does, and comes to the same.

        Raises:
            DataError: nothing prepared, a file of the store lost or of another size, an empty split, or a class
                without a positive training slice.
        """
        index = read_index(self.store)
        if index is None:
            raise DataError(
                f"{self.store}: nothing is prepared there, or its index.json is damaged. Run `{command('prepare')}`, "
                "or call prepare_data()."
            )
        check_sizes(self.store, index.entries)
        self.entries = index.entries
        self.split, _ = self._split(index)
        self._reader = SliceReader(self.store)
        scored = self.split_settings.scored
        needed = {"fit": ("train", "val"), "validate": ("val",), "test": (scored,), "predict": ("train",)}
        for split in needed[stage]:
            if not self.cases(split):
                raise DataError(
                    f"The {split} split of {self.info.name} is empty ({len(self.entries)} cases in all). "
                    "Correct data.split.file or data.split.fractions."
                )
        if self.cases("train"):
            self._train = tabulate(self.cases("train"), self.slices.min_pixels, self.labels.only_positive)
        if stage == "fit":
            self._check_fit()
        if stage == "test" and not self._scored_entries():
            raise DataError(f"No {scored} case of {self.info.name} has an expert mask: there is nothing to score.")

    def cases(self, split: str) -> list[Entry]:
        """The cases of a split, "train", "val" or "test", sorted by name."""
        return [entry for name, entry in self.entries.items() if self.split[name] == split]

    @property
    def has_val_masks(self) -> bool:
        """Whether validation batches hold ``mask``; validation cases without one are then left out."""
        return any(entry.has_mask for entry in self.cases("val"))

    @property
    def val_cases(self) -> list[str]:
        """The case of each validation slice, by ``index``: which volume it belongs to."""
        table = self._val_table()
        return [table.cases[case] for case in table.case]

    def val_labels(self) -> NDArray[np.float32]:
        """(N, C) image-level labels of the validation slices, by ``index``."""
        return self._val_table().labels

    def summary(self) -> dict[str, Any]:
        """What ``prepare_data`` has left, as plain values.

        Where, from what, how many cases, slices and positives, and what the labels say too little of.
        """
        index = read_index(self.store)
        if index is None:
            raise DataError(f"{self.store}: nothing is prepared there. Call prepare_data() first.")
        split, _ = self._split(index)
        sources = self.sources()._replace(
            root=str(Path(self.data_dir).resolve()),
            files=(str(Path(self.split_settings.file).resolve()),) if self.split_settings.file else (),
        )
        counts = count_splits(index.entries, split, self.class_names, self.slices.min_pixels)
        train = [entry for case, entry in index.entries.items() if split[case] == "train"]
        taken = (self.slices.min_pixels, self.labels.only_positive)
        return {
            "store": str(self.store),
            "data_dir": self.data_dir,
            "sources": sources._asdict(),
            "classes": self.classes,
            "splits": counts,
            "label_warnings": warn_of_labels(train, self.class_names, *taken),
            "content": digest_content(index.entries, split),
            "intensity": describe_intensity(train, str(self.intensity)),
        }

    def digest_volume(self, case: str) -> str:
        """Short hash of what a pseudo-label of a case is made of, network and settings apart: slices and labels."""
        entry = self.entries[case]
        return digest_of(entry.files, slice_labels(entry, self.slices.min_pixels).tolist())

    @property
    def train_slices(self) -> int:
        """How many training slices there are; ``index`` runs from 0 to below it."""
        return len(self._train_table())

    def train_labels(self) -> NDArray[np.float32]:
        """(N, C) image-level labels of the training slices, by ``index``."""
        return self._train_table().labels

    def train_cases(self) -> NDArray[np.int64]:
        """(N,) number of each training slice's case, by ``index``."""
        return self._train_table().case

    # Loaders

    def state_dict(self) -> dict[str, Any]:
        """In every checkpoint: the number of the epoch that comes next."""
        assert self.trainer is not None
        return {"next_epoch": self.trainer.fit_loop.epoch_progress.current.processed}  # type: ignore[attr-defined]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Let a continued run begin with the order of its epoch.

        Lightning builds the loader while optimisers are configured, before it has restored the epoch's number, and
        loaders with workers ask for the first batches at once: the order of epoch 0, otherwise.
        """
        self._first_epoch = state_dict["next_epoch"]

    def train_dataloader(self) -> DataLoader[Any]:
        """Training slices, shuffled; the order depends on seed and epoch only."""
        rank, world = self._place()
        return training_loader(
            self._train_dataset(),
            Order(_seed(), self._first_epoch, rank, world),
            self.batch_size,
            self.num_workers,
            self.augment if self._workers_augment else None,
        )

    def val_dataloader(self) -> DataLoader[Any]:
        """Validation slices with ``mask``; without masks, with pseudo-labels as ``target`` if those train."""
        masked, entries = self.has_val_masks, self._val_entries()
        unmasked = len(self.cases("val")) - len(entries)
        if unmasked:
            _log.warning("%d validation case(s) have no expert mask and are left out", unmasked)
        pseudo = None if masked else self._pseudo(entries)
        dataset = SliceDataset(self._val_table(entries), self._reader, masked, pseudo)
        return self._in_order(dataset, *self._place())

    def test_dataloader(self) -> DataLoader[Any]:
        """Volumes of ``split.scored`` with their expert masks, one a batch."""
        split, entries = self.split_settings.scored, self._scored_entries()
        unmasked = len(self.cases(split)) - len(entries)
        if unmasked:
            _log.warning("%d %s case(s) have no expert mask and are not scored", unmasked, split)
        return self._volumes(entries, with_mask=True)

    def predict_dataloader(self) -> DataLoader[Any]:
        """Volumes to make pseudo-labels for: training ones, and validation ones if those have no masks.

        Never test patients.
        """
        entries = self.cases("train") + ([] if self.has_val_masks else self.cases("val"))
        return self._volumes(entries)

    def features_dataloader(self, rank: int = 0, world: int = 1) -> DataLoader[Any]:
        """Training slices in order, not augmented, for clustering.

        Args:
            rank: of this process; it reads every ``world``-th slice.
            world: number of processes.
        """
        dataset = SliceDataset(self._train_table(), self._reader)
        return self._in_order(dataset, rank, world, persistent=False)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Augment training slices on the GPU they are on, unless the loader's processes have done it."""
        if self.augment is None or self.trainer is None or not self.trainer.training or self._workers_augment:
            return batch
        return augment_batch(batch, self.augment, _seed(), self.trainer.current_epoch)

    # Details

    @property
    def _workers_augment(self) -> bool:
        """On processors each worker augments what it reads, with one thread.

        The training process's threads would wait for each other in it (docs/performance.md).
        """
        on_cpu = self.trainer is not None and self.trainer.strategy.root_device.type == "cpu"
        return on_cpu and self.num_workers > 0

    def _split(self, index: Index) -> tuple[dict[str, str], str]:
        return split_cases(
            patients={name: entry.patient for name, entry in index.entries.items()},
            there={*index.entries, *index.skipped},
            settings=self.split_settings,
            published=self.info.published_split,
        )

    def _check_fit(self) -> None:
        train = self.cases("train")
        check_positives(self._train_table(), self.class_names, self.info.name)
        if self.labels.supervision == "image":
            warn_of_undefined(self._val_table(self.cases("val")).labels, self.class_names)
        if self.labels.supervision == "expert":
            unmasked = [entry.name for entry in train if not entry.has_mask]
            if unmasked:
                raise DataError(f"supervision: expert needs a mask for every training case; none for {unmasked[:10]}.")
            _log.warning("SUPERVISION BY EXPERT MASKS: this is the fully supervised upper bound")
        elif (pseudo := self._pseudo(train)) is not None:
            labelled = train if self.has_val_masks else train + self.cases("val")
            pseudo.check(labelled)
            if self.labels.trim_unsure:
                self._least = least_confidences({entry.name: pseudo.size(entry.name) for entry in labelled})

    def _pseudo(self, entries: Sequence[Entry]) -> PseudoLabelReader | None:
        if self.labels.supervision != "pseudo" or self.labels.pseudo_labels_dir is None or not entries:
            return None
        corrected = self.labels.corrected_dir
        folder = Path(self.labels.pseudo_labels_dir)
        return PseudoLabelReader(folder, None if corrected is None else Path(corrected), self._least)

    def _train_table(self) -> SliceTable:
        if self._train is None:
            raise DataError(f"{self.info.name} has no training slices here: call setup() first.")
        return self._train

    def _val_entries(self) -> list[Entry]:
        masked = self.has_val_masks
        return [entry for entry in self.cases("val") if entry.has_mask or not masked]

    def _val_table(self, entries: Sequence[Entry] | None = None) -> SliceTable:
        entries = self._val_entries() if entries is None else entries
        return tabulate(entries, self.slices.min_pixels, scored=True)

    def _train_dataset(self) -> SliceDataset:
        expert = self.labels.supervision == "expert"
        pseudo = self._pseudo(self.cases("train"))
        return SliceDataset(self._train_table(), self._reader, pseudo=pseudo, expert_target=expert)

    def _place(self) -> tuple[int, int]:
        """(rank, number of processes)."""
        if self.trainer is None:
            return 0, 1
        return self.trainer.global_rank, self.trainer.world_size

    def _in_order(self, dataset: SliceDataset, rank: int, world: int, persistent: bool = True) -> DataLoader[Any]:
        sampler = ShareSampler(len(dataset), rank, world)
        return slice_loader(dataset, sampler, self.batch_size, self.num_workers, persistent)

    def _scored_entries(self) -> list[Entry]:
        return [entry for entry in self.cases(self.split_settings.scored) if entry.has_mask]

    def _volumes(self, entries: Sequence[Entry], with_mask: bool = False) -> DataLoader[Any]:
        dataset = VolumeDataset(entries, self._reader, self.slices.min_pixels, with_mask)
        return volume_loader(dataset, *self._place(), self.num_workers)


def _seed() -> int:
    """What ``seed_everything`` was last called with, 0 if it was not; as Lightning's own samplers take it."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))
