"""The tables of cases on W&B's page of the run."""

from __future__ import annotations

from pathlib import Path

from lightning import LightningModule, Trainer
from lightning.pytorch import Callback
from lightning.pytorch.loggers import WandbLogger

from weakmedsam.system.atomic_io import read_table

TABLES = {"test": ("cases", "cam_cases"), "predict": ("quality",)}
"""What a stage may leave in the run's folder, by case and class: scores of the network or of the activation
maps, quality of the pseudo-labels."""


class SendTables(Callback):
    """Send a stage's tables of cases to W&B as they lie in the run's folder; numbers as numbers."""

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """After all hooks that write them."""
        if not trainer.is_global_zero:
            return
        for name in TABLES.get(stage, ()):
            rows = read_table(Path(trainer.default_root_dir) / f"{name}.csv")
            for logger in trainer.loggers:
                if rows and isinstance(logger, WandbLogger):
                    cells = [[_cell(column, text) for column, text in row.items()] for row in rows]
                    logger.log_table(name, columns=list(rows[0]), data=cells, step=trainer.global_step)


def _cell(column: str, text: str) -> str | float | None:
    """A number where it is one, None where the cell is empty: W&B wants one type a column."""
    if column in ("case", "class"):
        return text
    try:
        return float(text) if text else None
    except ValueError:
        return text
