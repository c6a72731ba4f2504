"""The recorder of ``history.npz``: measurements of every example, and the first layer's filters."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed import ReduceOp

from .. import shares
from ..batch import Batch
from ..solution import Solution

__all__ = ["Recorder"]

MOST_EXAMPLES = 200_000  # of ImageNet's a float each, epoch by epoch, would be larger than the checkpoints
MOST_WEIGHTS = 4_000


class Recorder:
    """Rows of numbers by example, one row an epoch; :func:`bilevel_at.diagnose.read_history` reads the file.

    gradient_norm: ‖∇_δ ℓ_atk(θ, z_i)‖₂; step: the step 1/λ of its attack; both NaN where the lower level does not say.
    filters: the first convolution's weights, before training and after each epoch, where there are at most 4,000.
    These are what ATAS (Huang et al., 2023, section III) and GradAlign (Andriushchenko and Flammarion, 2020, section 4)
    look at.
    """

    def __init__(self, labels: Tensor, model: nn.Module) -> None:
        self.labels = labels
        self.epochs: list[tuple[Tensor, Tensor]] = []
        self.filters = [_filters(model)]
        self._norm, self._step = self._empty(), self._empty()
        self._when = torch.zeros_like(self._norm, dtype=torch.int64)  # of several processes: the update of each value
        self._unsaved: list[tuple[Tensor, Tensor]] = []

    @property
    def follows_examples(self) -> bool:
        return len(self.labels) <= MOST_EXAMPLES

    def _empty(self) -> Tensor:
        return torch.full((len(self.labels),), torch.nan, dtype=torch.float32, device=self.labels.device)

    def note(self, batch: Batch, solution: Solution, update: int) -> None:
        """Record the lower level's measurements of these examples, replacing earlier ones of the same epoch.

        Args:
            batch, solution: of a step.
            update: its number in the epoch: of several processes' values of an example, the last one counts.
        """
        rows, gradient = batch.index, solution.attack_gradient
        if rows is None or not self.follows_examples or len(solution.delta) != len(batch):
            return
        if shares.count() > 1:
            self._when[rows] = update + 1
        if gradient is not None and len(gradient) == len(rows):
            self._norm[rows] = gradient.flatten(1).float().norm(dim=1)
        lam = solution.lam
        if isinstance(lam, Tensor) and lam.shape == rows.shape:
            self._step[rows] = (1 / lam).to(self._step)
        elif not isinstance(lam, Tensor) and lam > 0:
            self._step[rows] = 1 / lam

    def close_epoch(self, model: nn.Module) -> None:
        """Finish the epoch."""
        self.epochs.append((of_all(self._norm, self._when).cpu(), of_all(self._step, self._when).cpu()))
        self.filters.append(_filters(model))
        self._norm, self._step = self._empty(), self._empty()
        self._when.zero_()

    def arrays(self) -> dict[str, np.ndarray]:
        """The records as plain arrays for a file."""
        history: dict[str, np.ndarray] = {}
        if self.follows_examples and self.epochs:
            norms, steps = (torch.stack(part).numpy() for part in zip(*self.epochs, strict=True))
            history = {"gradient_norm": norms, "step": steps, "label": self.labels.cpu().numpy()}
        filters = [f.cpu() for f in self.filters if f is not None]
        if history and filters and len(filters) == len(self.filters):
            history["filters"] = torch.stack(filters).numpy()
        return history

    def state_dict(self, unsaved: int) -> dict[str, Any]:
        """What a checkpoint inside an epoch needs: its rows so far, the filters, and epochs that no file has yet.

        Args:
            unsaved: how many of the last epochs are in no file.
        """
        closed = self.epochs[len(self.epochs) - unsaved :]
        norm, step = (of_all(values, self._when) for values in (self._norm, self._step))
        return {"norm": norm, "step": step, "closed": closed, "filters": self.filters}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; :meth:`restore` has the epochs that a file has."""
        if shares.rank() == 0:  # it has what all have recorded; the others' new values go before
            self._norm, self._step = (state[name].to(self.labels.device).clone() for name in ("norm", "step"))
        self._unsaved = [(norm.cpu(), step.cpu()) for norm, step in state["closed"]]
        self.epochs, self.filters = list(self._unsaved), list(state["filters"])

    def restore(self, arrays: Any, epochs: int) -> None:
        """Restore the records of ``epochs`` epochs from a file's arrays; NaN if an array is missing or does not fit."""
        unknown = torch.full((epochs, len(self.labels)), torch.nan)
        norms, steps = (_fitting(arrays, name, unknown) for name in ("gradient_norm", "step"))
        self.epochs = [*zip(norms, steps, strict=True), *self._unsaved]
        first = self.filters[0]
        # Before the first epoch has ended no file has filters, and a checkpoint inside an epoch has them all.
        if first is not None and epochs > 0 and len(self.filters) <= epochs:
            filters = _fitting(arrays, "filters", torch.full((epochs + 1, *first.shape), torch.nan))
            self.filters = list(filters)


def of_all(values: Tensor, when: Tensor) -> Tensor:
    """The values of all processes, the last one where several have a number.

    Args:
        values: this process's, NaN where it has none.
        when: the update that each is of.
    """
    if shares.count() == 1:
        return values
    mine = torch.where(values.isnan(), -1, when * shares.count() + shares.rank())  # no two processes have the same
    last = shares.summed(mine, ReduceOp.MAX)
    return torch.where(last < 0, torch.nan, shares.summed(torch.where((mine == last) & (last >= 0), values, 0)))


def _fitting(arrays: Any, name: str, like: Tensor) -> Tensor:
    array = arrays.get(name)
    if array is None or array.dtype.kind != "f" or array.shape[1:] != like.shape[1:] or len(array) < len(like):
        return like
    return torch.from_numpy(array[: len(like)].astype(np.float32))


def _filters(model: nn.Module) -> Tensor | None:
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if first is None or first.weight.numel() > MOST_WEIGHTS:
        return None
    return first.weight.detach().float().clone()
