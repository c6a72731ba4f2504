"""Checkpoints inside an epoch: every so many minutes, and before a command leaves."""

from __future__ import annotations

import time

from ..runs.directory import RunDir
from ..train import Trainer
from .signals import Signals

__all__ = ["MIDWAY", "Saver"]

MIDWAY = "midway"
"""The checkpoint of a position inside an epoch. It has a file of its own: ``last.pt`` is the end of an epoch, to be
evaluated, and becomes ``last_good.pt`` where the next one collapses."""


class Saver:
    """Called between updates: saves where it is time to, or where a signal asks to leave, which it then does.

    Args:
        trainer: whose state is saved.
        run: the directory.
        signals: of this command.
        minutes: from one checkpoint to the next; 0 for none by time.
    """

    def __init__(self, trainer: Trainer, run: RunDir, signals: Signals, minutes: float) -> None:
        self.trainer, self.run, self.signals, self.seconds = trainer, run, signals, 60 * minutes
        self._last = time.monotonic()
        self.updates = 0 if trainer.position is None else trainer.position.updates

    def __call__(self) -> None:
        if self.signals.asked is not None:
            self.save()
            self.signals.leave_if_asked()
        elif self.seconds and time.monotonic() - self._last >= self.seconds:
            self.save()

    def save(self) -> None:
        """Write the checkpoint, unless a number is not finite.

        Raises:
            NotFinite: where one is; the checkpoint from before stays.
            BilevelError: where it cannot be written.
        """
        self.trainer.check()
        self.run.save_checkpoint(MIDWAY, self.trainer.state_dict())
        self.updates = 0 if self.trainer.position is None else self.trainer.position.updates
        self._last = time.monotonic()

    def close_epoch(self) -> None:
        """The epoch's end is saved: what was saved inside it is not needed."""
        self.run.remove_checkpoint(MIDWAY)
        self.updates, self._last = 0, time.monotonic()
