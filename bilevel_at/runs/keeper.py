"""The files written after every epoch: metrics, history, and checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np

from .checkpoints import weights
from .directory import RunDir
from .history import write_history
from .metrics import Collapse, Epoch, catastrophic_overfitting, last_is_first_to_fall, rank

__all__ = ["Keeper"]


class Keeper:
    """Saves ``last`` after every epoch, ``best`` if it is the best so far, and ``last_good`` if robustness collapses.

    Args:
        run: the directory; epochs whose metrics it has count as done.
    """

    def __init__(self, run: RunDir) -> None:
        self.run = run

    @cached_property
    def lines(self) -> list[dict[str, Any]]:
        """The metrics, epoch by epoch."""
        return self.run.metrics()

    def keep(self, epoch: Epoch, state: Mapping[str, Any], history: Mapping[str, np.ndarray]) -> Collapse | None:
        """Write the files of an epoch, as one change.

        Args:
            epoch: its metrics.
            state: the trainer's state after it.
            history: the recorder's arrays; if there are none, no history is written.

        Returns:
            The collapse of robustness if it happened in this epoch, else None.
        """
        line = epoch.asdict()
        earlier = list(self.lines)
        self.lines.append(line)
        collapse = catastrophic_overfitting(self.lines)
        in_this_epoch = collapse is not None and collapse.after is line
        with self.run.together():
            if all(rank(line) > rank(before) for before in earlier):
                self.run.save_checkpoint("best", {"model": weights(dict(state)), "epochs": epoch.epoch})
            # Later collapses are ignored: last_good is the epoch before the first one.
            if (collapse is None or in_this_epoch) and last_is_first_to_fall(self.lines):
                self.run.save_weights_of("last", to="last_good")  # "last" is still the epoch before
            self.run.write_metrics(self.lines)
            if history:
                write_history(self.run, history)
            self.run.save_checkpoint("last", state)
        return collapse if in_this_epoch else None
