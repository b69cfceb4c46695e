"""A trained run in Python: ``load_run("runs/heart/default").predict("scan.nii.gz")``.

The same networks, settings and reading as ``weakmedsam predict``, one scan at a time, and nothing written.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from jsonargparse import ArgumentParser
from lightning import LightningDataModule, LightningModule
from numpy.typing import NDArray

from data_modules.base import SliceDataModule
from data_modules.scan_io import find_scans
from data_modules.slice_datasets import make_volume_batch
from data_modules.store import find_window, read_case, scale_slices
from data_modules.store_index import StoreSpec
from weakmedsam.backbones.checkpoints import REPLACED, read_checkpoint
from weakmedsam.callbacks.pam import PromptAffinityMining
from weakmedsam.classification.module import WeakMedSAM
from weakmedsam.cli_parser import MODE
from weakmedsam.config_diff import check_version
from weakmedsam.contracts import VolumeBatch
from weakmedsam.errors import ConfigError, DataError
from weakmedsam.pam.self_training import SegmentedStart
from weakmedsam.pam.volumes import segment_volume
from weakmedsam.run.trained_network import Network, class_names, find_network
from weakmedsam.segmentation.module import Segmenter
from weakmedsam.system.fingerprints import check_checkpoint

Spacing = tuple[float, float, float]
"""(slice distance, row, column), mm."""


class TrainedRun:
    """The network of a run, ready to segment; made by ``load_run``.

    Attributes:
        class_names: names of the classes, id 1 first.
        plane: of the slices in which the network looks: axial, coronal or sagittal.
        image_size: S, side of the frame that it sees, pixels.
        intensity: how values become [0, 1].
        module: the Lightning module: of the classification, refined by PAM; else of the segmentation.
        said: which network it is, and how it is refined.
    """

    def __init__(self, network: Network, names: list[str], device: torch.device) -> None:
        model, data = instantiate(network.config, names)
        self.class_names = names
        self.plane = data.slices.plane
        self.image_size = data.image_size
        self.intensity = data.intensity
        self.said = network.said
        self._spec = data.spec
        self._series = network.config["data"]["init_args"].get("series")
        self._precision = str(network.config["trainer"].get("precision"))
        self._device = device
        self.module = with_weights(model, network.checkpoint).to(device).eval().requires_grad_(False)
        self._pam = _callback(self.module) if isinstance(self.module, WeakMedSAM) else None

    @torch.no_grad()
    def predict(self, scan: str | Path | NDArray[Any], spacing: Spacing | None = None) -> NDArray[np.uint8]:
        """Segment one scan.

        Args:
            scan: a file or folder as ``weakmedsam predict`` takes it (NIfTI, DICOM series, NRRD, MetaImage, pictures);
                or the slices, (D, H, W), numbers as in the training scans' files, in ``plane``.
            spacing: of an array, (slice distance, row, column) in mm: PAM walks through the volume by it.

        Returns:
            uint8 class ids, 0 = background; of a file (X, Y, Z), voxel for voxel as stored, of an array (D, H, W).

        Raises:
            DataError: the scan cannot be read, or several are meant.
            ConfigError: an array without ``spacing``, or a file with it.
        """
        if isinstance(scan, np.ndarray):
            return self._segment(_batch_of_array(scan, spacing, self._spec))
        if spacing is not None:
            raise ConfigError(f"spacing: {scan} says its own; it is of arrays only")
        found = find_scans(Path(scan), self._series)
        if len(found) != 1:
            raise DataError(f"{scan}: holds {len(found)} scans; predict takes one at a time.")
        folder = Path(scan).resolve()
        spec = replace(self._spec, data_set="scans", data_dir=str(folder.parent if folder.is_file() else folder))
        arrays = read_case(found[0], spec)
        entry = arrays.entry
        batch = make_volume_batch(arrays.image, entry.name, entry.frame, entry.geometry.spacing)
        return np.ascontiguousarray(entry.geometry.from_slices(self._segment(batch)))

    def _segment(self, batch: VolumeBatch) -> NDArray[np.uint8]:
        """(D, H0, W0) class ids on the scan's own slices."""
        batch["image"], batch["box"] = batch["image"].to(self._device), batch["box"].to(self._device)
        with self._autocast():
            if self._pam is None:
                ids = cast(Segmenter, self.module).segment_volume(batch["image"], batch["frame"])
            else:
                module = cast(WeakMedSAM, self.module)
                activation = module.look_at_volume(batch)
                ids = segment_volume(module, activation, batch, self._pam.settings)
        return ids.cpu().numpy()

    def _autocast(self) -> AbstractContextManager[None]:
        """As the run's trainer computes."""
        kinds = {"bf16": torch.bfloat16, "16": torch.float16}
        kind = kinds.get(self._precision.partition("-")[0])
        mixed = kind is not None and (self._device.type == "cuda" or kind is torch.bfloat16)
        return torch.autocast(self._device.type, kind) if mixed else nullcontext()


def load_run(folder: str | Path, refined: bool = True, device: str | torch.device | None = None) -> TrainedRun:
    """Load the network that a run has trained.

    Args:
        folder: of the run, ``runs/<data set>/<experiment>``.
        refined: PAM refines what the network predicts, as ``weakmedsam predict`` does; False: the network by itself.
        device: where it computes; None: a GPU where there is one.

    Raises:
        ConfigError: there is no such run, it has no trained network, or files of it are gone.
        CheckpointError: a checkpoint is damaged, or of another version.
    """
    run = Path(folder)
    network = find_network(run, plain=not refined)
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return TrainedRun(network, class_names(run, network), chosen)


def instantiate(config: dict[str, Any], names: list[str]) -> tuple[WeakMedSAM | Segmenter, SliceDataModule]:
    """The module of a stage's settings, whose weights a checkpoint brings, and the data module that it has learnt from.

    Args:
        config: the stage's, nested; ``model`` and ``data`` are read.
        names: of the classes, id 1 first.
    """
    model, data = config["model"], config["data"]
    model["init_args"] |= {"class_names": names}
    backbone = model["init_args"].get("backbone", {}).get("init_args", {})
    if "weights" in backbone:
        backbone["weights"] = REPLACED
    # What training batches held beside the image is of no use here, and its folder may be gone.
    data["init_args"]["labels"] = {"supervision": "image"}
    parser = ArgumentParser(parser_mode=MODE, exit_on_error=False)
    parser.add_subclass_arguments(LightningModule, "model", required=True)
    parser.add_subclass_arguments(LightningDataModule, "data", required=True)
    built = parser.instantiate_classes(parser.parse_object({"model": model, "data": data}))
    return built.model, built.data


def with_weights(model: WeakMedSAM | Segmenter, path: Path) -> WeakMedSAM | Segmenter:
    """The module with the weights of a checkpoint.

    Raises:
        CheckpointError: the file is gone, damaged, or of another model or version.
    """
    check_checkpoint(path, "checkpoint")
    held = read_checkpoint(path)
    check_version(held, str(path))
    model.on_load_checkpoint(held)
    model.load_state_dict(held["state_dict"])
    return model


def _callback(module: WeakMedSAM) -> PromptAffinityMining:
    """The module's PAM, which starts from its segmentation network."""
    (pam,) = (found for found in module.configure_callbacks() if isinstance(found, PromptAffinityMining))
    size, cells = module.backbone.image_size, pam.settings.walk.map_size
    module.start = SegmentedStart(Path(str(pam.start)), module.class_names, size, cells)
    return pam


def _batch_of_array(slices: NDArray[Any], spacing: Spacing | None, spec: StoreSpec) -> VolumeBatch:
    if slices.ndim != 3 or slices.dtype.kind not in "iuf":
        raise DataError(f"scan: an array of {slices.ndim} axes of {slices.dtype}; slices are (D, H, W), numbers.")
    if spacing is None:
        raise ConfigError("spacing: an array does not say it: give (slice distance, row, column), mm")
    low, high, _ = find_window(slices, spec.intensity, "scan")
    image, frame, _, _ = scale_slices(slices, low, high, spec.image_size)
    return make_volume_batch(image, "scan", frame, spacing)
