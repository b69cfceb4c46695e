"""SliceDataModule: from a data set's cases to the batches of the contract.

Expert masks leave by two doors only: ``mask`` in validation and test batches, and, for the ceiling
experiment alone, ``target`` when ``supervision`` is "expert".
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from lightning import LightningDataModule
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from data_modules.augmentation import Augmentation, augment_batch
from data_modules.cases import Case, DataSet, Intensity, choose_classes
from data_modules.loaders import Order, ShareSampler, slice_loader, training_loader, volume_loader
from data_modules.prepare import OnBadCase, lock_store, prepare
from data_modules.slice_datasets import (
    PseudoLabelReader,
    SliceDataset,
    SliceTable,
    VolumeDataset,
    check_positives,
    slice_labels,
    tabulate,
)
from data_modules.sources import Sources
from data_modules.splits import check_fractions, read_split, split_cases
from data_modules.store import SliceReader
from data_modules.store_index import Entry, Index, StoreSpec, read_index, write_rows
from data_modules.summary import (
    check_sizes,
    count_splits,
    describe_intensity,
    digest_content,
    digest_of,
    warn_of_false_spacing,
    warn_of_undefined,
)
from data_modules.volumes import Plane, check_plane
from weakmedsam.errors import ConfigError, DataError, check_range

Supervision = Literal["image", "pseudo", "expert"]

_log = logging.getLogger(__name__)


class SliceDataModule(LightningDataModule):
    """Slices of volumes with image-level labels. A data set is a subclass: ``facts`` and ``find_cases``.

    Args:
        data_dir: folder of the volumes, in the data set's own layout.
        store_dir: where prepared slices go, a folder per data set and settings.
        image_size: side of the square working frame, pixels, 8 to 4,096.
        plane: which slices are taken: axial, coronal or sagittal.
        classes: class name -> mask values, in order of their ids 1..C; None takes the data set's default.
        min_pixels: a class counts as present in a slice if its mask has at least so many pixels of it
            on the scan's own slice. Below about ten it is the blurred end of an organ, which a reader
            does not name, and less than three pixels once 512 are resized to 256. A table wins over it.
        window: (level, width) in the file's units, HU for CT; None takes the data set's rule.
        percentiles: (lower, upper) in percent of the voxels above the volume's minimum; None takes the
            data set's rule. Only one of window and percentiles can be given.
        split_file: CSV (case, split) with split train, val or test; None takes the published split, if
            there is one and all its cases are there, else a seeded hash of the patient.
        split_fractions: of patients in train, val, test, for the hash.
        seed: of the hash, of the order of training slices, and of augmentation, 0 to 4,294,967,295.
        on_bad_case: "raise" ends with one error that lists them; "skip" leaves them out and lists them in
            the log and in the store's ``skipped.csv``.
        supervision: what training batches hold beside the image-level label: "image" nothing; "pseudo"
            ``target`` and ``confidence`` from ``pseudo_labels_dir``; "expert" the EXPERT MASK as target:
            no longer weak supervision, for the ceiling experiment only.
        pseudo_labels_dir: folder of pseudo-label files.
        only_positive: train on slices in which some class is present, only.
        augment: ranges of random augmentation of training slices; None for none.
        batch_size: slices per step and process, 1 to 65,536.
        num_workers: processes that read slices, 0 to 256; 0 reads in the training process.
        prepare_workers: processes that prepare volumes, 1 to 256; None takes one per processor.

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

    facts: ClassVar[DataSet]

    def __init__(
        self,
        data_dir: str,
        store_dir: str = "data",
        image_size: int = 256,
        plane: Plane = "axial",
        classes: dict[str, list[int]] | None = None,
        min_pixels: int = 10,
        window: tuple[float, float] | None = None,
        percentiles: tuple[float, float] | None = None,
        split_file: str | None = None,
        split_fractions: tuple[float, float, float] = (0.8, 0.1, 0.1),
        seed: int = 0,
        on_bad_case: OnBadCase = "raise",
        supervision: Supervision = "image",
        pseudo_labels_dir: str | None = None,
        only_positive: bool = False,
        augment: Augmentation | None = None,
        batch_size: int = 24,
        num_workers: int = 2,
        prepare_workers: int | None = None,
    ) -> None:
        super().__init__()
        check_plane(plane)
        if window is not None and percentiles is not None:
            raise ConfigError("data.window and data.percentiles are both given; set one of them to null.")
        if supervision == "pseudo" and pseudo_labels_dir is None:
            raise ConfigError(
                "data.supervision: pseudo needs data.pseudo_labels_dir, the folder of pseudo-label files."
            )
        check_range("data.min_pixels", min_pixels, 1, 2**31)
        check_range("data.image_size", image_size, 8, 4096)
        check_range("data.batch_size", batch_size, 1, 65_536)
        check_range("data.seed", seed, 0, 2**32 - 1)
        check_range("data.num_workers", num_workers, 0, 256)
        if prepare_workers is not None:
            check_range("data.prepare_workers", prepare_workers, 1, 256)
        check_fractions(split_fractions)
        self.data_dir = data_dir
        self.store_dir = store_dir
        self.image_size = image_size
        self.plane = plane
        self.classes = choose_classes(self.facts, classes)
        self.min_pixels = min_pixels
        self.intensity = self.facts.intensity
        if window is not None:
            self.intensity = Intensity(window=(window[0], window[1]))
        elif percentiles is not None:
            self.intensity = Intensity(percentiles=(percentiles[0], percentiles[1]))
        self.split_file = split_file
        self.split_fractions = tuple(split_fractions)
        self.seed = seed
        self.on_bad_case: OnBadCase = on_bad_case
        self.supervision: Supervision = supervision
        self.pseudo_labels_dir = pseudo_labels_dir
        self.only_positive = only_positive
        self.augment = augment
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.prepare_workers = prepare_workers
        self.class_names = list(self.classes)
        self.num_classes = len(self.classes)
        self.entries: Mapping[str, Entry] = {}
        self.split: Mapping[str, str] = {}
        self._train: SliceTable | None = None
        self._first_epoch = 0

    # What a data set says

    def find_cases(self) -> list[Case]:
        """The data set's cases, sorted by name.

        Raises:
            DataError: none found; the message shows the expected layout.
        """
        raise NotImplementedError

    def sources(self) -> Sources:
        """Where ``find_cases`` looks: by default at the NIfTI files in all folders of ``data_dir``."""
        return Sources(self.data_dir)

    def variant(self) -> str:
        """What else, beside the constructor's common arguments, tells the volumes apart: a modality."""
        return ""

    def other_values(self) -> tuple[int, ...]:
        """Mask values that are known and become background if not chosen."""
        return self.facts.values

    # Preparing

    @property
    def spec(self) -> StoreSpec:
        """Everything that changes what is in the store."""
        return StoreSpec(
            data_set=self.facts.name,
            data_dir=str(Path(self.data_dir).resolve()),
            variant=self.variant(),
            image_size=self.image_size,
            plane=self.plane,
            intensity=self.intensity,
            classes=self.classes,
            values=self.other_values(),
        )

    @property
    def store(self) -> Path:
        """Folder of this data set's store under these settings."""
        return self.spec.folder(self.store_dir)

    def prepare_data(self) -> None:
        """Write the store and ``split-<name>.csv``; quick when all is there and unchanged.

        Raises:
            DataError: no data, bad cases, or an empty split.
        """
        cases = self.find_cases()
        if self.split_file:  # its faults are told before volumes are read for hours
            names = [case.name for case in cases]
            read_split(Path(self.split_file), names, names if self.on_bad_case == "raise" else ())
        index = prepare(cases, self.spec, self.store_dir, self.prepare_workers, self.on_bad_case)
        warn_of_false_spacing(index.entries, self.facts)
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
                f"{self.store}: nothing is prepared there, or its index.json is damaged. Run `make prepare`, or call "
                "prepare_data()."
            )
        check_sizes(self.store, index.entries)
        self.entries = index.entries
        self.split, _ = self._split(index)
        self._reader = SliceReader(self.store)
        needed = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("train",)}
        for split in needed[stage]:
            if not self.cases(split):
                raise DataError(
                    f"The {split} split of {self.facts.name} is empty ({len(self.entries)} cases in all). "
                    "Correct split_file or split_fractions."
                )
        if self.cases("train"):
            self._train = tabulate(self.cases("train"), self.min_pixels, self.only_positive)
        if stage == "fit":
            self._check_fit()
        if stage == "test" and not any(entry.has_mask for entry in self.cases("test")):
            raise DataError(
                f"No test case of {self.facts.name} has an expert mask: there is nothing to score."
            )

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
        masked = self.has_val_masks
        entries = [entry for entry in self.cases("val") if entry.has_mask or not masked]
        table = tabulate(entries, self.min_pixels)
        return [table.cases[case] for case in table.case]

    def summary(self) -> dict[str, Any]:
        """What ``prepare_data`` has left, as plain values: where, from what, how many cases, slices and positives."""
        index = read_index(self.store)
        if index is None:
            raise DataError(f"{self.store}: nothing is prepared there. Call prepare_data() first.")
        split, _ = self._split(index)
        sources = self.sources()._replace(
            root=str(Path(self.data_dir).resolve()),
            files=(str(Path(self.split_file).resolve()),) if self.split_file else (),
        )
        counts = count_splits(index.entries, split, self.class_names, self.min_pixels)
        return {
            "store": str(self.store),
            "data_dir": self.data_dir,
            "sources": sources._asdict(),
            "classes": self.classes,
            "splits": counts,
            "content": digest_content(index.entries, split),
            "intensity": describe_intensity(
                [entry for case, entry in index.entries.items() if split[case] == "train"],
                str(self.intensity),
            ),
        }

    def digest_volume(self, case: str) -> str:
        """Short hash of what a pseudo-label of a case is made of, network and settings apart: slices and labels."""
        entry = self.entries[case]
        return digest_of(entry.files, slice_labels(entry, self.min_pixels).tolist())

    @property
    def train_slices(self) -> int:
        """How many training slices there are; ``index`` runs from 0 to below it."""
        return len(self._train_table())

    def train_labels(self) -> NDArray[np.float32]:
        """(N, C) image-level labels of the training slices, by ``index``."""
        return self._train_table().labels

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
            Order(self.seed, self._first_epoch, rank, world),
            self.batch_size,
            self.num_workers,
            self.augment if self._workers_augment else None,
        )

    def val_dataloader(self) -> DataLoader[Any]:
        """Validation slices with ``mask``; without masks, with pseudo-labels as ``target`` if those train."""
        masked = self.has_val_masks
        entries = [entry for entry in self.cases("val") if entry.has_mask or not masked]
        unmasked = len(self.cases("val")) - len(entries)
        if unmasked:
            _log.warning("%d validation case(s) have no expert mask and are left out", unmasked)
        pseudo = None if masked else self._pseudo(entries)
        dataset = SliceDataset(tabulate(entries, self.min_pixels), self._reader, masked, pseudo)
        return self._in_order(dataset, *self._place())

    def test_dataloader(self) -> DataLoader[Any]:
        """Test volumes with their expert masks, one a batch."""
        entries = [entry for entry in self.cases("test") if entry.has_mask]
        unmasked = len(self.cases("test")) - len(entries)
        if unmasked:
            _log.warning("%d test case(s) have no expert mask and are not scored", unmasked)
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
        return augment_batch(batch, self.augment, self.seed, self.trainer.current_epoch)

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
            split_file=Path(self.split_file) if self.split_file else None,
            published=self.facts.published_split,
            fractions=(self.split_fractions[0], self.split_fractions[1], self.split_fractions[2]),
            seed=self.seed,
        )

    def _check_fit(self) -> None:
        train = self.cases("train")
        check_positives(self._train_table(), self.class_names, self.facts.name)
        if self.supervision == "image":
            warn_of_undefined(tabulate(self.cases("val"), self.min_pixels).labels, self.class_names)
        if self.supervision == "expert":
            unmasked = [entry.name for entry in train if not entry.has_mask]
            if unmasked:
                raise DataError(
                    f"supervision: expert needs a mask for every training case; none for {unmasked[:10]}."
                )
            _log.warning("SUPERVISION BY EXPERT MASKS: this is the ceiling, not weak supervision")
        elif (pseudo := self._pseudo(train)) is not None:
            pseudo.check(train if self.has_val_masks else train + self.cases("val"))

    def _pseudo(self, entries: Sequence[Entry]) -> PseudoLabelReader | None:
        if self.supervision != "pseudo" or self.pseudo_labels_dir is None or not entries:
            return None
        return PseudoLabelReader(Path(self.pseudo_labels_dir))

    def _train_table(self) -> SliceTable:
        if self._train is None:
            raise DataError(f"{self.facts.name} has no training slices here: call setup() first.")
        return self._train

    def _train_dataset(self) -> SliceDataset:
        expert = self.supervision == "expert"
        pseudo = self._pseudo(self.cases("train"))
        return SliceDataset(self._train_table(), self._reader, pseudo=pseudo, expert_target=expert)

    def _place(self) -> tuple[int, int]:
        """(rank, number of processes)."""
        if self.trainer is None:
            return 0, 1
        return self.trainer.global_rank, self.trainer.world_size

    def _in_order(
        self, dataset: SliceDataset, rank: int, world: int, persistent: bool = True
    ) -> DataLoader[Any]:
        sampler = ShareSampler(len(dataset), rank, world)
        return slice_loader(dataset, sampler, self.batch_size, self.num_workers, persistent)

    def _volumes(self, entries: Sequence[Entry], with_mask: bool = False) -> DataLoader[Any]:
        dataset = VolumeDataset(entries, self._reader, self.min_pixels, with_mask)
        return volume_loader(dataset, *self._place(), self.num_workers)
