"""Weights & Biases as the stages use it: a server that cannot be reached ends no training."""

from __future__ import annotations

import netrc
import os
import re
import secrets
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_warn

from weakmedsam.errors import DataError, check_range
from weakmedsam.system.atomic_io import put_away, write_whole
from weakmedsam.system.json_files import read_text
from weakmedsam.system.progress import is_verbose

NUMBER = "wandb_run.txt"


def use_wandb_offline_unless_asked() -> None:
    """W&B goes online when the user is logged in or has set WANDB_MODE; else it writes to disk only.

    Of what wandb prints only warnings and errors are shown, unless verbose or the environment says otherwise.
    """
    if not is_verbose():
        os.environ.setdefault("WANDB_SHOW_INFO", "false")
    if "WANDB_MODE" in os.environ or os.environ.get("WANDB_API_KEY"):
        return
    try:
        logged_in = netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        logged_in = False
    if not logged_in:
        os.environ["WANDB_MODE"] = "offline"
        if not is_verbose():
            os.environ.setdefault("WANDB_SILENT", "true")


class WeightsAndBiases(WandbLogger):
    """Lightning's logger, named after the run's folder, that goes on writing to disk without a server.

    A stage that is stopped and continued with the server there goes on as the same run: its number lies in
    ``wandb_run.txt`` of the stage's folder. Offline each part is a run of its own, of the same name and group,
    because a sync of one would take the place of the other.

    wandb's own process writes every figure to a file under ``save_dir/wandb`` before it sends it. If the
    server is lost in the middle of a run, that file is whole at the end; if it is not there at the start,
    the run is an offline one. ``wandb sync --no-skip-online`` sends either later.

    Args:
        project: name on the server.
        save_dir: the stage's folder; the run's files lie in ``wandb`` below it.
        name: of the run; None takes the end of ``save_dir``, ``<dataset>/<experiment>/<stage>``.
        group: runs that belong together; None takes ``<dataset>/<experiment>``.
        tags: words to find the run by.
        entity: user or team on the server; None takes the account's own.
        lineage: log checkpoints and pseudo-labels as artifacts, and which run used which:
            see ``callbacks/lineage.py``.
        init_timeout: seconds to wait for the server at the start, 1 or more.
        finish_timeout: seconds to wait at the end for what is not sent yet, 0 or more; 0 waits for ever.

    Raises:
        ConfigError: a number out of its range.
    """

    def __init__(
        self,
        project: str = "weakmedsam",
        save_dir: str = ".",
        name: str | None = None,
        group: str | None = None,
        tags: list[str] | None = None,
        entity: str | None = None,
        lineage: bool = False,
        init_timeout: float = 60.0,
        finish_timeout: float = 300.0,
    ) -> None:
        check_range("trainer.logger.init_timeout", init_timeout, 1)
        check_range("trainer.logger.finish_timeout", finish_timeout, 0)
        place = Path(save_dir).parts[-3:]
        super().__init__(
            name="/".join(place) or None if name is None else name,
            save_dir=save_dir,
            project=project,
            group="/".join(place[:-1]) or None if group is None else group,
            tags=tags,
            entity=entity,
            settings={"init_timeout": init_timeout, "finish_timeout": finish_timeout, "silent": not is_verbose()},
        )
        self.lineage = lineage
        # Lightning passes it on even where nobody set it, and wandb then warns that it has no effect.
        self._wandb_init.pop("anonymous", None)

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """Wandb's run, started when first asked for; rank 0 only."""
        from wandb.errors import CommError

        started = self._experiment is None
        if started:
            self._go_on()
        try:
            run = super().experiment
            if started and not is_verbose() and getattr(run, "url", None):
                print(f"  W&B: {run.url}", flush=True)
            return run
        except CommError as error:
            reason = str(error).splitlines()[0]
            rank_zero_warn(
                f"W&B cannot be reached ({reason}). This run goes on offline: "
                f"`wandb sync {self.save_dir}/wandb/offline-run-*` sends it later"
            )
            # WANDB_MODE is read once a process, so a change of it would come too late.
            self._wandb_init["mode"] = "offline"
            self._wandb_init["id"] = None
            return super().experiment

    def _go_on(self) -> None:
        """Take the number of the run that this stage has on the server, or keep a new one for later."""
        # WANDB_RUN_ID is that of a sweep's agent.
        online = os.environ.get("WANDB_MODE", "online") == "online" and "WANDB_RUN_ID" not in os.environ
        if not online or self._wandb_init.get("id") or self._wandb_init.get("mode") not in (None, "online"):
            return
        path = Path(self.save_dir or ".") / NUMBER
        try:
            number = read_text(path).strip()
        except DataError:
            number = ""
        if not re.fullmatch(r"[0-9a-z]{8}", number):  # none yet, or a damaged one
            put_away(path)
            number = secrets.token_hex(4)
            write_whole(path, number + "\n")
        self._wandb_init["id"] = number
