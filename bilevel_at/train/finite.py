"""Numbers that are not finite: noticed without a wait for the device, named by step and examples, or left out."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .. import shares
from ..batch import Batch, on_host
from ..errors import BilevelError
from ..solution import Hypergradient
from ..solver import Solver
from .watch import Watch

__all__ = ["LeftOut", "NotFinite", "Sentinel", "first_not_finite", "leaving_out", "size"]

REMEMBERED = 256  # batches; a look at a GPU arrives 16 to 32 batches after what it is about
NAMED = 8  # examples


class NotFinite(BilevelError):
    """A loss, a gradient or a weight is not finite; ``samples`` are the examples' indices."""


class LeftOut(NotFinite):
    """A step that is to be left out."""


def _floating(model: nn.Module) -> dict[str, Tensor]:
    """The weights and buffers that are floating-point numbers, by name."""
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: t.detach() for name, t in named.items() if t.is_floating_point() and t.numel()}


def size(model: nn.Module) -> Tensor:
    """The sum of the norms of the weights and buffers, 0-dim on their device: not finite if an entry is not.

    One call, of 30 µs for the digits' network; a norm can overflow where no entry does, above 1e19 in float32.
    """
    norms = torch._foreach_norm(list(_floating(model).values()))
    return torch.stack([n.float() for n in norms]).sum().double() if norms else torch.zeros(())


def first_not_finite(model: nn.Module) -> str | None:
    """The name of the first weight or buffer with an entry that is not finite. Waits for the device."""
    if math.isfinite(size(model).item()):
        return None
    return next((name for name, t in _floating(model).items() if not t.isfinite().all()), None)


class Sentinel:
    """Stops training soon after a number that is not finite: on a CPU at once, on a GPU when a copy has arrived.

    Args:
        model: the network.
        solver: its name, for messages.
        remedy: words on what may help.
    """

    def __init__(self, model: nn.Module, solver: str, remedy: str) -> None:
        self.model, self.solver, self.remedy = model, solver, remedy
        self._watch = Watch(self._check)
        self._steps: deque[tuple[int, int, Tensor, Tensor | None]] = deque(maxlen=REMEMBERED)

    def note(self, step: int, epoch: int, batch: Batch, losses: Tensor) -> None:
        """Remember the losses of step ``step`` of the run, in epoch ``epoch`` (both from 0)."""
        self._steps.append((step, epoch, losses, batch.index))
        if on_host(losses):
            self._check(losses.sum().item())

    def look(self, total: Tensor) -> None:
        """Look at the sum of all losses, which stays not finite, and at the weights; without a wait."""
        self._watch.see(total + size(self.model))

    def check(self) -> None:
        """Look at what is noted and at the weights now; waits for the device.

        Raises:
            NotFinite: where a loss, weight or buffer is not finite.
        """
        if (name := first_not_finite(self.model)) is not None or not self._finite():
            raise self.error(name)

    def _finite(self) -> bool:
        return not self._steps or bool(torch.stack([losses.sum() for _, _, losses, _ in self._steps]).isfinite().all())

    def _check(self, value: float) -> None:
        if not math.isfinite(value):
            name = first_not_finite(self.model)
            if name is not None or not self._finite():  # or else only a norm has overflowed
                raise self.error(name)

    def error(self, weight: str | None) -> NotFinite:
        """What is known, in a line.

        Args:
            weight: the name of a weight or buffer that is not finite.
        """
        bad = next((i for i, (_, _, losses, _) in enumerate(self._steps) if not losses.isfinite().all()), None)
        # On a CPU the first such loss is seen before its own update: weights that are not finite are from the one
        # before. A GPU has gone on since, and buffers follow the pass of the loss itself.
        weights_first = bool(bad) and weight in dict(self.model.named_parameters()) and on_host(self._steps[0][2])
        if bad is None or weights_first:
            what = f"{weight or 'a number'} is not finite"
            if self._steps:
                step, epoch, _, _ = self._steps[-1 if bad is None else bad - 1]
                what += f" after step {step + 1} (epoch {epoch + 1}), whose loss was finite"
            return NotFinite(f"{what}, with {self.solver}; {self.remedy}")
        step, epoch, losses, index = self._steps[bad]
        wrong = ~losses.isfinite()
        examples = [] if index is None else index[wrong if wrong.shape == index.shape else slice(None)].tolist()
        more = f" and {len(examples) - NAMED} more" if len(examples) > NAMED else ""
        of = f" on the training examples {', '.join(map(str, examples[:NAMED]))}{more}" if examples else ""
        what = f"the loss is {losses[wrong].flatten()[0].item()} in step {step + 1} (epoch {epoch + 1}){of}"
        return NotFinite(f"{what}, with {self.solver}; {self.remedy}", examples)


@contextmanager
def leaving_out(solver: Solver, model: nn.Module) -> Iterator[None]:
    """``backward`` raises :class:`LeftOut` before anything is learnt from a step that is not finite.

    As for every error of ``hypergradient``, ``.grad`` and what is remembered are then as they were; here the network's
    buffers are, too. Each step is looked at before it is taken, which waits for a GPU.
    """
    own = vars(solver).get("hypergradient")  # a compiled one
    plain = solver.hypergradient

    def checked(*args: Any, **options: Any) -> Hypergradient:
        buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
        step = plain(*args, **options)
        gradients = [g.detach() for g in step.grads.values() if g is not None and g.numel()]
        numbers = [step.losses.sum(), *torch._foreach_norm(gradients)]
        wrong = ~torch.stack([number.float() for number in numbers]).isfinite().all()
        if shares.total(wrong.int()):
            for buffer, value in buffers:
                buffer.data.copy_(value)
            raise LeftOut("a loss or a gradient is not finite")
        return step

    object.__setattr__(solver, "hypergradient", checked)
    try:
        yield
    finally:
        if own is None:
            object.__delattr__(solver, "hypergradient")
        else:
            object.__setattr__(solver, "hypergradient", own)
