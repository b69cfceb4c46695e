"""What of a test and of pseudo-labels goes to W&B."""

import pytest
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from lightning.pytorch.trainer.states import TrainerFn

from weakmedsam.callbacks.wandb_tables import SendTables
from weakmedsam.system.atomic_io import write_table


class Logger(WandbLogger):
    def __init__(self):  # no run
        self.tables = {}

    def log_table(self, key, columns=None, data=None, step=None):
        assert step == 7
        self.tables[key] = (columns, data)


class Trainer:
    def __init__(self, folder, loggers, rank=0):
        self.default_root_dir, self.loggers, self.is_global_zero = folder, loggers, rank == 0
        self.global_step = 7


@pytest.fixture
def tested(tmp_path):
    rows = [
        {"case": "a", "class": "liver", "dice": 0.5, "hd95_mm": ""},
        {"case": "7", "class": "liver", "dice": 0.25},
    ]
    write_table(tmp_path / "cases.csv", ["case", "class", "dice", "hd95_mm"], rows)
    return tmp_path


def test_the_table_of_cases_is_sent_with_numbers(tested):
    logger = Logger()
    SendTables().teardown(Trainer(tested, [logger, CSVLogger(tested)]), None, "test")
    columns, data = logger.tables.pop("cases")
    assert columns == ["case", "class", "dice", "hd95_mm"]
    assert data == [["a", "liver", 0.5, None], ["7", "liver", 0.25, None]]  # a case's name stays text
    assert logger.tables == {}


def test_the_quality_of_pseudo_labels_is_sent_too(tmp_path):
    logger = Logger()
    write_table(tmp_path / "quality.csv", ["case", "quality"], [{"case": "a", "quality": 0.75}])
    SendTables().teardown(Trainer(tmp_path, [logger]), None, TrainerFn.PREDICTING)
    assert logger.tables == {"quality": (["case", "quality"], [["a", 0.75]])}


def test_other_ranks_and_runs_without_tables_send_nothing(tested, tmp_path):
    logger = Logger()
    SendTables().teardown(Trainer(tested, [logger], rank=1), None, "test")
    SendTables().teardown(Trainer(tmp_path / "none", [logger]), None, "test")
    SendTables().teardown(Trainer(tested, [logger]), None, "fit")
    assert logger.tables == {}
