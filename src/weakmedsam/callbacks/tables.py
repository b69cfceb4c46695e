"""The tables of a test on W&B's page of the run."""

from __future__ import annotations

from pathlib import Path

from lightning import LightningModule, Trainer
from lightning.pytorch import Callback
from lightning.pytorch.loggers import WandbLogger

from weakmedsam.files import read_table

TABLES = ("cases.csv", "cam_cases.csv")
"""What a test may leave in the run's folder: scores of the network, or of the activation maps, by case."""


class SendTables(Callback):
    """Send the test's tables of cases to W&B as they lie in the run's folder; numbers as numbers."""

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After the test has written them."""
        if not trainer.is_global_zero:
            return
        for name in TABLES:
            rows = read_table(Path(trainer.default_root_dir) / name)
            for logger in trainer.loggers:
                if rows and isinstance(logger, WandbLogger):
                    cells = [[_cell(column, text) for column, text in row.items()] for row in rows]
                    logger.log_table(name.removesuffix(".csv"), columns=list(rows[0]), data=cells)


def _cell(column: str, text: str) -> str | float | None:
    """A number where it is one, None where the cell is empty: W&B wants one type a column."""
    if column in ("case", "class"):
        return text
    try:
        return float(text) if text else None
    except ValueError:
        return text
