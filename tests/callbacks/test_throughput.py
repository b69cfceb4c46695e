"""What a run says of its speed, with a clock that the test turns."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.profilers import SimpleProfiler
from tiny import TinyBackbone, tiny_phantom

from weakmedsam.callbacks import Throughput, throughput
from weakmedsam.classification.module import WeakMedSAM
from weakmedsam.errors import ConfigError
from weakmedsam.system.atomic_io import read_table
from weakmedsam.system.progress import VERBOSE


class Clock:
    """Stands still but for what it is told: reading a batch takes a second, learning from it three."""

    now = 0.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(throughput, "time", clock)
    return clock


def train(folder, clock, callback, epochs=2, logger=False, profiler=None):
    data = tiny_phantom(folder)
    data.prepare_data()
    data.setup("fit")

    class Slow(WeakMedSAM):
        def training_step(self, batch, batch_idx):
            clock.now += 3
            return super().training_step(batch, batch_idx)

        def on_validation_start(self):
            clock.now += 100

    class SlowData(type(data.train_dataloader())):
        def __iter__(self):
            for batch in super().__iter__():
                clock.now += 1
                yield batch

    loader = data.train_dataloader()
    loader.__class__ = SlowData
    data.train_dataloader = lambda: loader
    torch.manual_seed(0)
    model = Slow(TinyBackbone(), data.class_names)
    trainer = Trainer(
        default_root_dir=folder / "run", max_epochs=epochs, accelerator="cpu", logger=logger, profiler=profiler,
        callbacks=[callback], enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(model, data)
    return data, trainer


def test_each_epoch_says_how_fast_it_was_and_how_long_it_waited(tmp_path, clock, capsys, monkeypatch):
    monkeypatch.setenv(VERBOSE, "1")
    logger = CSVLogger(tmp_path, "log", "0")
    data, trainer = train(tmp_path, clock, Throughput(warn_share=0.5, warn_batches=1), logger=logger)
    rows = read_table(tmp_path / "run/throughput.csv")
    assert [row["epoch"] for row in rows] == ["0", "1"]
    batches = len(data.train_dataloader())
    for row in rows:
        assert float(row["images_per_second"]) == pytest.approx(data.train_slices / (4 * batches), rel=1e-3)
        assert float(row["loader_wait"]) == 0.25
        assert row["gpu_memory_gib"] == ""
    logged = [row for row in read_table(tmp_path / "log/0/metrics.csv") if row["throughput/loader_wait"]]
    assert [row["epoch"] for row in logged] == ["0", "1"]
    assert not any("throughput" in name for name in trainer.callback_metrics)  # those are compared bit for bit
    said = capsys.readouterr().out
    assert "a step learns from 8 slices: 1 process(es) x data.batch_size 8" in said


def test_a_test_and_a_prediction_say_it_too_and_do_not_count_what_was_there(tmp_path):
    data = tiny_phantom(tmp_path)
    model = WeakMedSAM(TinyBackbone(), data.class_names)
    for stage in ("test", "predict"):
        folder = tmp_path / stage
        trainer = Trainer(
            default_root_dir=folder, accelerator="cpu", logger=CSVLogger(folder, "log", "0"), callbacks=[Throughput()],
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        getattr(trainer, stage)(model, data)
        (row,) = read_table(folder / "throughput.csv")
        assert row["epoch"] == "0"
        assert float(row["images_per_second"]) > 0
        assert 0 < float(row["loader_wait"]) < 1
        (logged,) = [row for row in read_table(folder / "log/0/metrics.csv") if row["throughput/loader_wait"]]
        assert float(logged["throughput/images_per_second"]) == pytest.approx(float(row["images_per_second"]), rel=1e-3)
    callback, module = Throughput(), SimpleNamespace(device=torch.device("cpu"))
    callback.on_predict_start(None, module)
    callback.on_predict_batch_end(None, module, None, {"image": torch.zeros(2, 1)}, 0)
    assert callback._images == 0


def test_on_a_gpu_the_most_memory_of_the_epoch_is_told(tmp_path, monkeypatch):
    gpu = torch.device("cuda", 0)
    reset = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset.append)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**29 if device == gpu else 0)
    trainer = SimpleNamespace(is_global_zero=True, world_size=1, default_root_dir=tmp_path, current_epoch=0, loggers=[])
    callback, module = Throughput(), SimpleNamespace(device=gpu)
    callback.on_train_epoch_start(trainer, module)
    callback.on_train_batch_end(trainer, module, None, {"image": torch.zeros(2, 1)}, 0)
    callback.on_train_epoch_end(trainer, module)
    (row,) = read_table(tmp_path / "throughput.csv")
    assert row["gpu_memory_gib"] == "1.5"
    assert reset == [gpu]


def test_a_loader_that_starves_the_device_is_named_with_the_flag_to_turn(tmp_path, clock):
    with pytest.warns(UserWarning, match=r"waiting for 25% of the epoch\. Raise --data\.num_workers \(now 0"):
        train(tmp_path, clock, Throughput(warn_share=0.2, warn_batches=1), epochs=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*loader keeps the device waiting.*")
        train(tmp_path, clock, Throughput(warn_share=0.2, warn_batches=99), epochs=1)


def test_a_profiler_of_the_users_own_stays(tmp_path, clock):
    train(tmp_path, clock, Throughput(warn_share=0.0, warn_batches=1), epochs=1, profiler=SimpleProfiler())
    (row,) = read_table(tmp_path / "run/throughput.csv")
    assert row["loader_wait"] == ""
    assert float(row["images_per_second"]) > 0


def test_a_continued_run_keeps_the_rows_before(tmp_path):
    path = tmp_path / "throughput.csv"
    for epoch, speed in ((0, 1.0), (1, 2.0), (2, 3.0), (1, 4.0)):
        throughput._keep(path, epoch, (speed, 0.1, float("nan")))
    assert [(row["epoch"], row["images_per_second"]) for row in read_table(path)] == [("0", "1"), ("1", "4")]


@pytest.mark.parametrize(
    ("words", "named"), [({"warn_share": 1.5}, "warn_share"), ({"warn_batches": 0}, "warn_batches")]
)
def test_numbers_out_of_range_are_named(words, named):
    with pytest.raises(ConfigError, match=f"throughput.{named}"):
        Throughput(**words)
