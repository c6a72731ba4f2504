"""Checkpoints inside an epoch: every so many minutes, and before a command leaves."""

from __future__ import annotations

import time

import torch
from torch.distributed import ReduceOp

from .. import shares
from ..runs.directory import RunDir
from ..train import Trainer
from .signals import Signals

__all__ = ["MIDWAY", "Saver"]

MIDWAY = "midway"
"""The checkpoint of a position inside an epoch. It has a file of its own: ``last.pt`` is the end of an epoch, to be
evaluated, and becomes ``last_good.pt`` where the next one collapses."""

TOGETHER = 8  # updates; several processes wait for each other's CPUs to ask


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
        self._last, self._calls = time.monotonic(), 0
        self.updates = 0 if trainer.position is None else trainer.position.updates

    def __call__(self) -> None:
        asked, due = self.signals.asked, bool(self.seconds) and time.monotonic() - self._last >= self.seconds
        if shares.count() > 1:
            asked, due = self._agreed(asked, due)
        if asked is not None:
            self.save()
            self.signals.asked = asked
            self.signals.leave_if_asked()
        elif due:
            self.save()

    def _agreed(self, asked: int | None, due: bool) -> tuple[int | None, bool]:
        """A signal to any process, and the first one's clock; processes ask each other after every few updates."""
        self._calls += 1
        attacking = self.trainer.position is not None and self.trainer.position.measured is not None
        if self._calls % TOGETHER and not attacking:  # a round of an attack takes longer than to ask
            return None, False
        flags = shares.summed(torch.tensor([asked or 0, due and shares.rank() == 0]), ReduceOp.MAX).tolist()
        return flags[0] or None, bool(flags[1])

    def save(self) -> None:
        """Write the checkpoint, unless a number is not finite.

        Raises:
            NotFinite: where one is; the checkpoint from before stays.
            BilevelError: where it cannot be written.
        """
        self.trainer.check()
        state = self.trainer.state_dict()  # every process has a part in it
        shares.first(lambda: self.run.save_checkpoint(MIDWAY, state))
        self.updates = 0 if self.trainer.position is None else self.trainer.position.updates
        self._last = time.monotonic()

    def close_epoch(self) -> None:
        """The epoch's end is saved: what was saved inside it is not needed."""
        shares.first(lambda: self.run.remove_checkpoint(MIDWAY))
        self.updates, self._last = 0, time.monotonic()
