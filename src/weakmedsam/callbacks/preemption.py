"""A run that is told to end: at the end of its epoch where that comes soon, and so that it can go on later."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any, NoReturn

from lightning import LightningModule, Trainer
from lightning.pytorch import Callback

from weakmedsam.errors import ConfigError, check_range
from weakmedsam.system.signals import REQUEUE, SIGNALS

SAME = 5.0
"""Seconds within which further signals are the same one: several ways may lead it to a process."""


class Preemption(Callback):
    """End at a signal, with exit status 75 and nothing lost that a continued run would not make again.

    A training lets the running epoch end, if that comes within ``grace`` seconds, so that ``last.ckpt`` and the
    tables of that epoch are written; then it leaves. When the grace is over, or at a second signal (5 seconds or
    more after the first), it leaves at once: the checkpoint of the epoch before is whole, because checkpoints
    are renamed into place. Tests and predictions leave at once; a prediction goes on at its next volume. Nothing
    is saved in the middle of an epoch, where features for the clustering have been gathered in part: a
    continued run would not end with the files of an uninterrupted one.

    Takes the place of Lightning's own answer to SIGTERM, which ends in mid-epoch with exit status 0, as if the
    training were through.

    Args:
        grace: seconds that a running epoch is given, from the signal on; 0 leaves at once.
        signals: names of the signals that mean it.

    Raises:
        ConfigError: a negative time, or a name that is no signal or cannot be answered.
    """

    def __init__(self, grace: float = 100.0, signals: tuple[str, ...] = SIGNALS) -> None:
        check_range("preemption.grace", grace, 0)
        for name in signals:
            if name not in signal.Signals.__members__ or name in ("SIGKILL", "SIGSTOP", "SIGINT"):
                raise ConfigError(
                    f"preemption.signals: {name!r} cannot be answered; take SIGTERM, SIGUSR1, SIGUSR2 or the like"
                )
        self.grace = grace
        self.signals = tuple(signals)
        self._trainer: Trainer | None = None
        self._process = os.getpid()
        self._asked: float | None = None
        self._alarm: threading.Timer | None = None
        self._before: dict[str, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Listen from here on."""
        self._trainer, self._process = trainer, os.getpid()
        self._listen()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen anew: Lightning has just put its own handlers in."""
        self._listen()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The same."""
        self._listen()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The same."""
        self._listen()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The same."""
        self._listen()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Listen no more."""
        for name, handler in self._before.items():
            signal.signal(getattr(signal, name), handler)
        self._before = {}

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave here, where the epoch before has left its checkpoint and its rows; all ranks do, or none."""
        if trainer.strategy.reduce_boolean_decision(self._asked is not None, all=False):
            self._disarm()
            trainer.print("stopped by a signal after a whole epoch: the same command continues")
            raise SystemExit(REQUEUE)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The last epoch has ended: the training is through, whatever was asked."""
        self._disarm()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Whatever ends the run, no alarm goes off after it."""
        self._disarm()

    def _listen(self) -> None:
        if threading.current_thread() is threading.main_thread():  # others may set no handlers
            for name in self.signals:
                before = signal.signal(getattr(signal, name), self._answer)
                self._before.setdefault(name, before)

    def _answer(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a loader's worker, forked with this handler
            return
        now, name = time.monotonic(), signal.Signals(number).name
        if self._asked is not None:
            if now - self._asked > SAME:
                self._leave(f"a second {name}")
            return
        self._asked = now
        assert self._trainer is not None
        if self._trainer.strategy.launcher is not None:  # the ranks that this process has started
            self._trainer.strategy.launcher.kill(number)
        if self._trainer.state.fn != "fit" or not self.grace:
            self._leave(name)
        self._alarm = threading.Timer(self.grace, self._leave, [f"{name}, and the {self.grace:g} seconds are over"])
        self._alarm.daemon = True
        self._alarm.start()
        self._trainer.print(f"{name}: the running epoch has {self.grace:g} seconds to end")

    def _leave(self, why: str) -> NoReturn:
        """As after SIGKILL, which a run survives; from any thread, and out of any call that hangs."""
        sys.stderr.write(f"\nstopped at once ({why}): the same command continues from the last checkpoint\n")
        sys.stdout.flush()
        sys.stderr.flush()
        assert self._trainer is not None
        if self._trainer.strategy.launcher is not None:
            self._trainer.strategy.launcher.kill(signal.SIGKILL)
        os._exit(REQUEUE)

    def _disarm(self) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
