import fcntl
from dataclasses import fields, is_dataclass
from importlib import import_module
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import jsonargparse
import lightning
import numpy as np
import pytest
import torch
from data_settings import data_settings
from safetensors.numpy import save_file

from data_modules import base
from data_modules.augmentation import Augmentation
from data_modules.base import SliceDataModule
from data_modules.folder import Folder
from data_modules.slice_datasets import slice_labels
from tests.fakes import fake_folder
from weakmedsam.cli_parser import MODE, constructor_arguments
from weakmedsam.errors import ConfigError, DataError

ROOT = Path(__file__).parents[2]
DATA_CONFIGS = sorted((ROOT / "experiments" / "data").glob("*.yaml"))
WEAK = {"image", "label", "index", "case", "slice", "box"}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return fake_folder(tmp_path_factory.mktemp("scans"), 6)


def make(root: Path, stage: str = "fit", **changes) -> Folder:
    settings = {
        "prepare__store_dir": str(root / "s"),
        "image_size": 32,
        "batch_size": 5,
        "num_workers": 0,
        "prepare__workers": 1,
    }
    module = Folder(str(root), **data_settings(**{"classes": {"tumour": [1]}, **settings, **changes}))
    module.prepare_data()
    module.setup(stage)
    return module


def test_training_batches_hold_no_expert_mask(root):
    module = make(root)
    for batch in (*module.train_dataloader(), *module.features_dataloader()):
        assert set(batch) == WEAK


def test_batches_are_as_agreed(root):
    batch = next(iter(make(root).val_dataloader()))
    assert set(batch) == WEAK | {"mask"}
    assert (batch["image"].shape, batch["image"].dtype) == ((5, 1, 32, 32), torch.float32)
    assert (batch["label"].shape, batch["label"].dtype) == ((5, 1), torch.float32)
    assert (batch["index"].dtype, batch["slice"].dtype) == (torch.int64, torch.int64)
    assert (batch["mask"].shape, batch["mask"].dtype) == ((5, 32, 32), torch.int64)
    assert isinstance(batch["case"], list)


def epoch_order(module: Folder, epoch: int) -> list[int]:
    loader = module.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return torch.cat([batch["index"] for batch in loader]).tolist()


def test_the_order_depends_on_seed_and_epoch_only(root, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    module = make(root)
    first, second = epoch_order(module, 0), epoch_order(module, 1)
    assert sorted(first) == sorted(second) == list(range(module.train_slices))
    assert first != second
    assert epoch_order(make(root), 1) == second  # as after a resume
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")  # as of seed_everything(1)
    assert epoch_order(make(root), 0) != first


def test_an_index_means_the_same_slice_under_any_shuffling(root):
    module = make(root)
    ordered = [(c, int(s)) for b in module.features_dataloader() for c, s in zip(b["case"], b["slice"], strict=True)]
    assert len(ordered) == module.train_slices
    for batch in module.train_dataloader():
        for index, case, number, label in zip(
            batch["index"], batch["case"], batch["slice"], batch["label"], strict=True
        ):
            assert ordered[index] == (case, int(number))
            assert module.train_labels()[index] == label
            assert module.cases("train")[module.train_cases()[index]].name == case


def test_ranks_share_the_features(root):
    module = make(root)
    shares = [torch.cat([b["index"] for b in module.features_dataloader(rank, 2)]).tolist() for rank in (0, 1)]
    assert sorted(shares[0] + shares[1]) == list(range(module.train_slices))


def test_pseudo_labels_are_never_made_of_test_patients(root):
    module = make(root)
    made = {volume["case"] for volume in module.predict_dataloader()}
    assert made == {entry.name for entry in module.cases("train")}
    tested = {volume["case"] for volume in make(root, "test").test_dataloader()}
    assert tested
    assert not tested & made
    assert all("mask" not in volume for volume in module.predict_dataloader())


def test_test_volumes_come_on_the_scans_own_slices(root):
    (volume,) = make(root, "test").test_dataloader()
    assert volume["image"].shape == (6, 1, 32, 32)
    assert volume["mask"].shape == (6, 16, 20)
    assert volume["mask"].dtype == torch.int64
    assert tuple(volume["frame"]) == (16, 20, 20, 32)


def test_settings_can_be_chosen_on_validation_volumes(root):
    module = make(root, "test", split__scored="val")
    volumes = list(module.test_dataloader())
    assert {volume["case"] for volume in volumes} == {entry.name for entry in module.cases("val")}
    assert all("mask" in volume for volume in volumes)


def test_without_masks_there_is_nothing_to_choose_by(tmp_path):
    root = fake_folder(tmp_path / "scans", 6)
    module = make(root)
    (entry,) = module.cases("val")
    rows = [
        f"{name},{z},{int(label[0])}"
        for name, held in module.entries.items()
        for z, label in enumerate(slice_labels(held, 10))
    ]
    (root / "labels.csv").write_text("\n".join(["case,slice,tumour", *rows]))
    (root / "masks" / f"{entry.name}.nii.gz").unlink()
    with pytest.raises(DataError, match=r"No val case of .* has an expert mask"):
        make(root, "test", split__scored="val")


def test_workers_read_the_same(root):
    alone = torch.cat([b["image"] for b in make(root).train_dataloader()])
    torch.testing.assert_close(torch.cat([b["image"] for b in make(root, num_workers=1).train_dataloader()]), alone)


def write_labels(folder, name, label, confidence):
    histogram = np.bincount(confidence[label == 1], minlength=256)[None]
    parts = {"label": label, "confidence": confidence, "quality": np.ones((6, 1), np.float32), "histogram": histogram}
    save_file(parts, folder / f"{name}.safetensors")


@pytest.mark.parametrize("trim", [True, False])
def test_unsure_pseudo_labels_that_are_too_large_are_trimmed(root, tmp_path, trim):
    first, *others = (entry.name for entry in make(root).cases("train"))
    for name in (first, *others):
        label, confidence = np.zeros((6, 32, 32), np.uint8), np.full((6, 32, 32), 200, np.uint8)
        label[:, :8, :8] = 1
        if name == first:
            label[:, :24] = 1
            spilt = np.arange(24 * 32).reshape(24, 32) % 50
            confidence[:, :24] = np.where(np.outer(np.arange(24) < 8, np.arange(32) < 8), 200, spilt)
        write_labels(tmp_path, name, label, confidence)
    settings = {"labels__pseudo_labels_dir": str(tmp_path), "labels__trim_unsure": trim, "num_workers": 0}
    module = make(root, labels__supervision="pseudo", **settings)
    found = {}
    for batch in module.train_dataloader():
        for case, target in zip(batch["case"], batch["target"], strict=True):
            found.setdefault(case, []).append(int((target == 1).sum()))
    assert len(others) > 1
    assert all(set(found[name]) == {64} for name in others)
    assert min(found[first]) >= (64 if trim else 24 * 32)
    assert max(found[first]) <= (120 if trim else 24 * 32)


def test_pseudo_labels_train(root, tmp_path):
    with pytest.raises(DataError, match="have no pseudo-label"):
        make(root, labels__supervision="pseudo", labels__pseudo_labels_dir=str(tmp_path))
    for name in (entry.name for entry in make(root).cases("train")):
        zeros = np.zeros((6, 32, 32), np.uint8)
        write_labels(tmp_path, name, zeros + 1, zeros + 51)
    module = make(root, labels__supervision="pseudo", labels__pseudo_labels_dir=str(tmp_path))
    batch = next(iter(module.train_dataloader()))
    assert set(batch) == WEAK | {"target", "confidence", "quality"}
    assert (batch["target"] == 1).all()
    assert torch.allclose(batch["confidence"], torch.tensor(0.2))


def test_the_upper_bound_says_what_it_is(root, caplog):
    batch = next(iter(make(root, labels__supervision="expert").train_dataloader()))
    assert set(batch) == WEAK | {"target", "confidence", "quality"}
    assert "EXPERT" in caplog.text


class Recorder(lightning.LightningModule):
    """Learns nothing; remembers what it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: dict[str, list] = {"train": [], "order": [], "val": []}

    def training_step(self, batch, batch_index):
        assert set(batch) - {"scan"} == WEAK  # augmented batches say where the scan lies now
        self.seen["train"].append(batch["image"])
        self.seen["order"].append(batch["index"].tolist())
        return self.weight.sum()

    def validation_step(self, batch, batch_index):
        self.seen["val"].append(batch["image"])

    def predict_step(self, volume, batch_index):
        return volume

    def test_step(self, volume, batch_index):
        self.seen.setdefault("test", []).append(volume)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def make_trainer(tmp_path: Path, epochs: int = 1) -> lightning.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", enable_checkpointing=False, default_root_dir=tmp_path, **quiet
    )


def run_epochs(module: Folder, epochs: int, tmp_path: Path) -> dict[str, list]:
    model = Recorder()
    make_trainer(tmp_path, epochs).fit(model, datamodule=module)
    return model.seen


def test_lightning_shuffles_by_epoch_and_augments_training_only(root, tmp_path):
    plain = run_epochs(make(root), 2, tmp_path)
    moved = run_epochs(make(root, augment=Augmentation(rotation=20)), 2, tmp_path)
    assert moved["order"] == plain["order"]
    half = len(plain["order"]) // 2
    assert plain["order"][:half] != plain["order"][half:]
    flat = [list(chain(*plain["order"][part])) for part in (slice(0, half), slice(half, None))]
    assert flat == [epoch_order(make(root), 0), epoch_order(make(root), 1)]
    assert all(torch.equal(a, b) for a, b in zip(plain["val"], moved["val"], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(plain["train"], moved["train"], strict=True))


def test_on_processors_workers_augment_as_the_training_process_would(root, tmp_path, monkeypatch):
    wild = Augmentation(rotation=20, noise=0.1, flip_rows=0.5)
    here = run_epochs(make(root, augment=wild), 2, tmp_path)
    monkeypatch.setattr("data_modules.base.augment_batch", None)  # nothing is left to do for it
    there = run_epochs(make(root, augment=wild, num_workers=2), 2, tmp_path)
    assert there["order"] == here["order"]
    assert all(torch.equal(a, b) for a, b in zip(there["train"], here["train"], strict=True))


@pytest.mark.parametrize(("device", "augmented"), [("cpu", True), ("cuda", False)])
def test_a_gpu_augments_itself(root, device, augmented):
    module = make(root, augment=Augmentation(rotation=20), num_workers=1)
    strategy = SimpleNamespace(root_device=torch.device(device))
    module.trainer = SimpleNamespace(strategy=strategy, training=True, current_epoch=0, global_rank=0, world_size=1)
    batch = next(iter(module.train_dataloader()))
    assert ("scan" in batch) == augmented
    assert "scan" in module.on_after_batch_transfer(batch, 0)


def test_lightning_hands_whole_volumes_to_prediction_and_test(root, tmp_path):
    module, model = make(root), Recorder()
    volumes = make_trainer(tmp_path).predict(model, datamodule=module)
    assert [volume["case"] for volume in volumes] == [entry.name for entry in module.cases("train")]
    assert all(volume["image"].shape == (6, 1, 32, 32) for volume in volumes)
    make_trainer(tmp_path).test(model, datamodule=module)
    (tested,) = model.seen["test"]
    assert tested["mask"].shape == (6, 16, 20)
    assert tested["frame"].side == 20


def test_labels_follow_min_pixels_without_preparing_again(root):
    module, strict = make(root), make(root, slices__min_pixels=10_000, stage="test")
    assert module.store == strict.store
    assert strict.train_labels().sum() == 0 < module.train_labels().sum()


def test_a_class_without_a_positive_is_named(root):
    with pytest.raises(DataError, match="No training slice of folder shows cyst"):
        make(root, classes={"tumour": [1], "cyst": [2]})


def test_an_empty_split_is_named(root, tmp_path):
    path = tmp_path / "split.csv"
    path.write_text("case,split\n" + "".join(f"scan{n},train\n" for n in range(6)))
    with pytest.raises(DataError, match="val split of folder is empty"):
        make(root, split__file=str(path))
    with pytest.raises(DataError, match="test split of folder is empty"):
        make(root, stage="test", split__file=str(path))


def test_the_split_is_written_down(root):
    module = make(root, split__fractions=(0.5, 0.25, 0.25))
    lines = (module.store / "split-seed0-0.5-0.25-0.25.csv").read_text().splitlines()
    assert lines[0] == "case,split"
    assert dict(line.split(",") for line in lines[1:]) == module.split


def test_nothing_prepared_is_said(tmp_path):
    with pytest.raises(DataError, match="nothing is prepared"):
        Folder(str(tmp_path), {"tumour": [1]}, **data_settings(prepare__store_dir=str(tmp_path))).setup("fit")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"slices__plane": "oblique"}, "plane"),
        ({"slices__window": (40, 400), "slices__percentiles": (1, 99)}, "both given"),
        ({"labels__supervision": "pseudo"}, "pseudo_labels_dir"),
        ({"slices__min_pixels": 0}, "min_pixels"),
        ({"image_size": 0}, "image_size"),
        ({"split__seed": -1}, "seed"),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path, change, said):
    with pytest.raises(ConfigError, match=said):
        Folder(str(tmp_path), {"tumour": [1]}, **data_settings(**change))


def test_intensities_are_told(root):
    assert make(root).summary()["intensity"].startswith("percentiles 0.5 and 99.5 above the minimum -> [0, 1]; mean 0.")


@pytest.mark.parametrize("path", DATA_CONFIGS, ids=lambda path: path.stem)
def test_each_configuration_builds_and_states_every_argument(path):
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--config", action="config")
    parser.add_subclass_arguments(SliceDataModule, "data")
    config = parser.parse_args([f"--config={path}"])
    module = parser.instantiate_classes(config).data
    assert isinstance(module, SliceDataModule)
    assert module.augment is not None
    if path.stem != "phantom":  # it leaves out what an embedded set does not need
        package, name = config.data.class_path.rsplit(".", 1)
        stated = path.read_text()
        arguments = constructor_arguments(getattr(import_module(package), name))
        groups = [hint for hint, _ in arguments.values() if is_dataclass(hint)]
        names = [*arguments, *(field.name for group in groups for field in fields(group))]
        assert [name for name in names if f"    {name}:" not in stated] == []
    for line in path.read_text().splitlines():
        is_value = line.startswith("    ") and not line.endswith(":")
        assert not is_value or "#" in line, f"no comment: {line}"


def test_a_misspelt_key_is_refused(tmp_path):
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(SliceDataModule, "data")
    with pytest.raises(jsonargparse.ArgumentError, match="imagesize"):
        parser.parse_args(["--data=data_modules.cardiac.MSDCardiac", "--data.data_dir=x", "--data.imagesize=3"])


def test_the_split_is_written_while_no_other_process_prepares(root, monkeypatch):
    # Two machines on one disk: the other one's preparation removes what looks half-written.
    module = make(root)
    write, held = base.write_rows, []

    def look(path, *parts):
        with (path.parent / ".lock").open("w") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held.append(False)
            except BlockingIOError:
                held.append(True)
        write(path, *parts)

    monkeypatch.setattr(base, "write_rows", look)
    module.prepare_data()
    assert held == [True]


def test_null_on_the_command_line_reaches_a_setting_of_a_group():
    parser = jsonargparse.ArgumentParser(exit_on_error=False, parser_mode=MODE)
    parser.add_argument("--config", action="config")
    parser.add_subclass_arguments(SliceDataModule, "data")
    cardiac = next(path for path in DATA_CONFIGS if path.stem == "cardiac")
    words = ["--data.slices.percentiles=null", "--data.slices.window=[40,400]", "--data.split.file=null"]
    held = parser.parse_args([f"--config={cardiac}", *words]).data.init_args
    assert (held.slices.percentiles, held.slices.window, held.slices.plane) == (None, (40, 400), "axial")
    assert (held.split.file, held.split.fractions) == (None, (0.7, 0.1, 0.2))
