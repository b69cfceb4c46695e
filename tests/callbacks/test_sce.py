"""SCE as a callback: sources, sharing between processes, figures, pictures, resuming."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pooch
import pytest
import torch
import two_ranks
from classifiers import Die, explorer, module, trainer
from commands import as_it_was, run_ranks
from lightning.pytorch.loggers import WandbLogger
from PIL import Image
from sklearn.metrics import adjusted_mutual_info_score
from tiny import tiny_phantom
from torchvision.models import resnet18
from weights_server import shop

from weakmedsam.backbones import weights
from weakmedsam.backbones.resnet18 import ResNet18
from weakmedsam.backbones.weights import Weights
from weakmedsam.callbacks import SubClassExploration
from weakmedsam.callbacks.feature_bank import FeatureBank
from weakmedsam.errors import CheckpointError, ConfigError
from weakmedsam.sce.figures import ClusterRow, draw_clusters

HERE = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scans")
    tiny_phantom(folder).prepare_data()
    return folder


# The bank


class Ranks:
    """A strategy that sees what all ranks would send, one after the other."""

    def __init__(self, banks):
        self.banks, self.is_global_zero, self.sent = banks, True, []

    def reduce(self, value, reduce_op):
        assert reduce_op == "max"
        return torch.tensor(max(sum(map(len, bank._index)) for bank in self.banks))

    def all_gather(self, tensor):
        others = []
        for bank in self.banks[1:]:
            source = torch.cat(bank._index if tensor.ndim == 1 else bank._features)
            filled = tensor.new_full((len(tensor), *tensor.shape[1:]), -1)
            filled[: len(source)] = source
            others.append(filled)
        return torch.stack([tensor, *others])

    def broadcast(self, value):
        return value


def test_ranks_with_unequal_shares_are_put_together_and_what_two_saw_is_averaged():
    banks = [FeatureBank(), FeatureBank()]
    banks[0].add(torch.tensor([2, 0]), torch.tensor([[2.0, 2.0], [0.0, 1.0]]))
    banks[0].add(torch.tensor([3]), torch.tensor([[3.0, 0.0]]))
    banks[1].add(torch.tensor([1, 0]), torch.tensor([[5.0, 5.0], [4.0, 3.0]]))
    found, complete = banks[0].gather(4, 2, Ranks(banks), torch.device("cpu"))
    assert complete
    assert found.tolist() == [[2, 2], [5, 5], [2, 2], [3, 0]]
    _, complete = banks[0].gather(5, 2, Ranks(banks), torch.device("cpu"))
    assert not complete
    banks[0].clear()
    assert not banks[0]._index


@pytest.mark.ddp
def test_two_processes_find_the_ids_of_one(tmp_path):
    runs = []
    for devices in (1, 2):
        file = tmp_path / str(devices)
        if devices == 1:
            with as_it_was():
                two_ranks.main(1, file)
        else:
            run_ranks([HERE / "two_ranks.py", devices, file], processes=devices)
        runs += [torch.load(f"{file}.{rank}", weights_only=True) for rank in range(devices)]
    one = runs[0]["ids"]  # before epoch 0 by a pass, before epoch 1 and after it from the bank
    assert one.shape == (3, 41, 2)
    assert (one.amax((0, 1)) == 3).all()
    assert not one[:, 1::2, 0].any()  # the second rank has no slice of class "even"
    for run in runs[1:]:
        assert torch.equal(run["ids"], one)
    assert runs[0]["logged"] == pytest.approx(runs[1]["logged"], abs=1e-5)
    assert runs[0]["logged"]["sce/kept/even"] == 1
    # Losses are the mean over both ranks' slices, which are another half each; the sampler repeats one of 41.
    assert runs[1]["trained"] == runs[2]["trained"]
    assert runs[1]["trained"].keys() == {"train/loss", "train/class_loss", "train/subclass_loss"}
    assert runs[1]["trained"] == pytest.approx(runs[0]["trained"], rel=0.05)
    assert (tmp_path / "2.run/subclasses/epoch_000_even.png").is_file()


# Sources


def test_the_first_clustering_can_wait_for_the_bank_of_epoch_0(scans, tmp_path):
    sce = explorer(first="bank", every_n_epochs=3)
    sce._pass = None  # no extra pass
    model, run = module(sce), trainer(tmp_path, 2)
    run.fit(model, tiny_phantom(scans))
    assert model.subclass_ids.max() == 3
    history = (tmp_path / "history.csv").read_text().splitlines()
    rows = [dict(zip(history[0].split(","), line.split(","), strict=True)) for line in history[1:]]
    assert rows[0]["train/subclass_loss"] == ""  # the first epoch learns classes only
    assert float(rows[1]["train/subclass_loss"]) > 0
    assert float(rows[0]["sce/inertia/lesion"]) >= 0
    assert rows[1]["sce/inertia/lesion"] == "nan"  # not due before the third


def test_figures_are_those_of_the_ids(scans, tmp_path):
    model, run = module(), trainer(tmp_path, 1)
    run.fit(model, tiny_phantom(scans))
    sizes = np.bincount(model.subclass_ids[:, 1].numpy(), minlength=4)[1:]
    logged = {key: float(value) for key, value in run.callback_metrics.items()}
    assert logged["sce/used/cyst"] == (sizes > 0).sum()
    assert (logged["sce/size_min/cyst"], logged["sce/size_max/cyst"]) == (sizes.min(), sizes.max())
    assert logged["sce/imbalance/cyst"] == pytest.approx(sizes.max() / sizes.mean())
    assert 0 <= logged["sce/kept/cyst"] <= 1
    ids, case = model.subclass_ids[:, 1].numpy(), run.datamodule.train_cases()
    found = adjusted_mutual_info_score(case[ids > 0], ids[ids > 0])
    assert logged["sce/case_information/cyst"] == pytest.approx(found, abs=1e-6)
    assert logged["sce/inertia/cyst"] > 0


def test_the_number_of_sub_classes_survives_a_kill(scans, tmp_path):
    def fresh():
        return module(explorer("auto", 4))

    model = fresh()
    with pytest.raises(RuntimeError, match="killed"):
        trainer(tmp_path, 3, Die(1, 0)).fit(model, tiny_phantom(scans))
    counts = model.subclass_counts.clone()
    assert ((counts >= 1) & (counts <= 4)).all()
    assert model.subclass_head.out_channels == 2 * 4 + 1
    # What was chosen stays, whatever would be chosen now.
    path = tmp_path / "checkpoints/last.ckpt"
    content = torch.load(path, weights_only=True)
    content["state_dict"]["subclass_counts"] = 5 - counts
    torch.save(content, path)
    again = fresh()
    trainer(tmp_path, 3).fit(again, tiny_phantom(scans), ckpt_path=path, weights_only=True)
    assert torch.equal(again.subclass_counts, 5 - counts)
    assert (again.subclass_ids.amax(0) <= 5 - counts).all()
    with pytest.raises(CheckpointError, match=r"sub_classes 'auto, at most 4', this run has 3"):
        trainer(tmp_path / "b", 3).fit(module(), tiny_phantom(scans), ckpt_path=path, weights_only=True)


def test_resnet18_clusters_once_on_features_of_its_own(scans, tmp_path):
    sce = explorer(source="resnet18", weights="none", every_n_epochs=0, pictures=0)
    model = module(sce)
    seen = []
    sce.on_train_epoch_start = lambda *_: seen.append(model.subclass_ids.clone())
    trainer(tmp_path, 2).fit(model, tiny_phantom(scans))
    assert seen[0].max() == 3
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], model.subclass_ids)
    assert not (tmp_path / "subclasses").exists()


def test_official_weights_of_resnet18_come_through_the_cache(tmp_path, monkeypatch):
    file = tmp_path / "made.pth"
    torch.manual_seed(3)
    made = resnet18()
    state = {key: value for key, value in made.state_dict().items() if "num_batches" not in key}
    torch.save(state, file)
    address = "http://official.invalid/resnet18-x.pth"
    item = Weights(address, file.stat().st_size, pooch.file_hash(file), "none")
    monkeypatch.setattr(weights, "declared", lambda: {"resnet18": item})
    monkeypatch.setenv(weights.CACHE, str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    with shop(content=file.read_bytes()) as server:
        monkeypatch.setenv(weights.MIRROR, server.url)
        network = ResNet18()
        assert [asked[0] for asked in server.asked] == ["/resnet18-x.pth"]
    image = torch.rand(2, 1, 64, 64)
    rgb = (image.repeat(1, 3, 1, 1) - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor(
        [0.229, 0.224, 0.225]
    )[:, None, None]
    made.eval().fc = torch.nn.Identity()
    assert torch.allclose(network(image), made(rgb), atol=1e-5)
    assert network(image).shape == (2, 512)
    torch.save({"fc.weight": torch.zeros(2)}, file)
    with pytest.raises(CheckpointError, match=r"model\.sce\.weights: .* this backbone is ResNet-18"):
        ResNet18(str(file))
    with pytest.raises(CheckpointError, match=r"model\.sce\.weights: .*nowhere does not exist"):
        ResNet18(str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "disk"}, r"sce\.source: 'disk' is unknown; choose one of bank, pass, resnet18"),
        ({"first": "disk"}, r"sce\.first: 'disk' is unknown"),
        ({"first": "bank", "source": "pass"}, r"sce\.first is bank"),
        ({"source": "resnet18"}, r"sce\.every_n_epochs is 1, but .* set 0"),
        ({"pictures": -1}, r"sce\.pictures is -1"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_key(settings, message):
    with pytest.raises(ConfigError, match=message):
        SubClassExploration(**settings)


# Pictures


def test_pictures_at_the_first_and_the_last_clustering(scans, tmp_path):
    sce = explorer(every_n_epochs=2, pictures=3)
    told = []
    run = trainer(tmp_path, 5)
    logger = WandbLogger.__new__(WandbLogger)
    logger.log_image = lambda key, images, step: told.append((key, images))
    draw = sce._draw
    # Only where pictures go is looked at: no W&B is started.
    sce._draw = lambda trainer, *rest: draw(
        SimpleNamespace(
            loggers=[logger],
            datamodule=trainer.datamodule,
            default_root_dir=trainer.default_root_dir,
            current_epoch=trainer.current_epoch,
            global_step=trainer.global_step,
        ),
        *rest,
    )
    run.fit(module(sce), tiny_phantom(scans))
    names = sorted(path.name for path in (tmp_path / "subclasses").iterdir())
    assert names == [f"epoch_{n:03d}_{c}.png" for n in (0, 3) for c in ("cyst", "lesion")]
    assert [key for key, _ in told] == ["subclasses", "subclasses"]
    assert [Path(path).name for path in told[0][1]] == ["epoch_000_lesion.png", "epoch_000_cyst.png"]


def test_each_cluster_is_a_row_of_slices(tmp_path):
    rows = [
        ClusterRow("1: 20", [np.full((300, 200), value, np.float32) for value in (0.0, 0.25)]),
        ClusterRow("2: 1", [np.full((300, 200), 0.5, np.float32)]),
    ]
    for name in ("a", "b"):
        draw_clusters(rows, "lesion", tmp_path / f"{name}.png", side=50)
    picture = np.asarray(Image.open(tmp_path / "a.png").convert("L"))
    assert {0, round(0.25 * 255), round(0.5 * 255)} <= set(np.unique(picture).tolist())
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
