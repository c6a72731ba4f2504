"""What a run writes after every epoch: metrics, history, and the checkpoints that are worth keeping."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .checkpoints import weights
from .directory import RunDir
from .history import write_history
from .metrics import Collapse, Epoch, catastrophic_overfitting, last_is_first_to_fall, rank

__all__ = ["Keeper"]


class Keeper:
    """Keeps ``last``; ``best``, where the epoch is the best so far; and ``last_good``, where robustness is falling.

    run: the directory; a keeper goes on after the epochs whose metrics it has.
    """

    def __init__(self, run: RunDir) -> None:
        self.run = run
        self.lines = run.metrics()

    def keep(self, epoch: Epoch, state: Mapping[str, Any], history: Mapping[str, np.ndarray]) -> Collapse | None:
        """Write what an epoch leaves behind. Returns the collapse of robustness, where it happened in this epoch.

        epoch: what it measured.
        state: the trainer's, after it.
        history: the recorder's arrays; nothing is written where there are none.
        """
        line = epoch.asdict()
        if all(rank(line) > rank(earlier) for earlier in self.lines):
            self.run.save_checkpoint("best", {"model": weights(dict(state)), "epochs": epoch.epoch})
        self.lines.append(line)
        collapse = catastrophic_overfitting(self.lines)
        in_this_epoch = collapse is not None and collapse.after is line
        # A later collapse is not looked for: last_good is the epoch before the first.
        if (collapse is None or in_this_epoch) and last_is_first_to_fall(self.lines):
            self.run.copy_checkpoint("last", "last_good")  # "last" is still the epoch before
        self.run.append_metrics(line)
        if history:
            write_history(self.run, history)
        self.run.save_checkpoint("last", state)
        return collapse if in_this_epoch else None
