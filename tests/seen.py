"""What each process has been given; for runs that the tests start (``--trainer.callbacks+``)."""

from pathlib import Path

from lightning.pytorch import Callback


class Seen(Callback):
    """Write the name of each volume that a process predicts or tests into ``seen-<rank>.txt`` of the run's folder."""

    def on_predict_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        with (Path(trainer.default_root_dir) / f"seen-{trainer.global_rank}.txt").open("a") as file:
            file.write(batch["case"] + "\n")

    on_test_batch_end = on_predict_batch_end
