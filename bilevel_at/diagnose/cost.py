"""What a training step costs, told before it is run: operations, memory, and what is remembered.

A step is taken on torch's meta device, where tensors have shapes but no values: seconds, and no memory, for any network
and batch. A step that looks at values cannot be taken there; it is taken on a few real examples, and its figures are
extended to the batch.
"""

from __future__ import annotations

import copy
import textwrap
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import policy
from ..batch import Batch
from ..errors import InputError, positive, whole_number
from ..problem import BilevelProblem
from ..solver import Solver
from .counting import Moment, bytes_alive, extended, operations, tensors_in

__all__ = ["StepCost", "estimate"]

FEW = 4
"""Examples of a real step, where one on the meta device cannot be taken."""

STEPS = 3
"""Of a trial: two that are counted, and one whose memory is followed."""

Optimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True)
class StepCost:
    """What one training step costs: zeroed gradients, ``solver.backward``, and the optimiser's step where there is one.

    flops: floating-point operations of a step, as ``torch.utils.flop_counter`` counts them (convolutions and matrix
        products); the mean where the solver tosses a coin.
    first_flops: those of an epoch's first step, in which some methods do more.
    plain_flops: those of plain training on the same batch: a forward pass, and a backward pass to the parameters.
    peak_bytes: the most that is alive at once in a step, as torch's ``MemTracker`` estimates it: the network,
        gradients, the optimiser's state, the batch, activations, and what is remembered. Without what kernels take for
        themselves and what the allocator keeps in reserve. None where this torch has no such estimator.
    network_bytes: of parameters and buffers.
    optimizer_bytes: of the optimiser's state.
    remembered: the bytes of each policy's state, by its path in the problem, or ``solver``, for all ``examples``.
    examples: how many examples there are to remember something of.
    real_examples: 0 where the step was taken on the meta device; else on how many real examples, at most.
    reason: why it could not be taken on the meta device, in a line; "" where it was.
    """

    flops: float
    first_flops: float
    plain_flops: float
    peak_bytes: float | None
    network_bytes: int
    optimizer_bytes: int
    remembered: Mapping[str, float] = field(default_factory=dict)
    examples: int = 0
    real_examples: int = 0
    reason: str = ""

    @property
    def multiple(self) -> float:
        """Operations of a step as a multiple of plain training."""
        return self.flops / self.plain_flops

    @property
    def memory_bytes(self) -> float:
        """What stays from step to step: the network, the optimiser's state, and what is remembered."""
        return self.network_bytes + self.optimizer_bytes + sum(self.remembered.values())

    def seconds(self, flops_per_second: float, steps: int = 1) -> float:
        """The time of ``steps`` steps of an epoch at a measured throughput: operations over operations a second.

        Raises:
            InputError: where the throughput is not positive, or ``steps`` is below 1.
        """
        rest = whole_number("steps", steps, 1) - 1
        return (self.first_flops + rest * self.flops) / positive("flops_per_second", flops_per_second)


def estimate(
    problem: BilevelProblem,
    solver: Solver,
    model: nn.Module,
    batch: Batch,
    *,
    examples: int | None = None,
    optimizer: Optimizer | None = None,
    epoch: int = 0,
    epochs: int = 1,
) -> StepCost:
    """What a training step of ``solver`` on ``problem`` costs on such a batch. Works on copies: nothing changes.

    Args:
        problem, solver, model: as for ``solver.backward``; the network is put in train mode, as in training.
        batch: examples of the size that a step has. On the meta device their values are neither used nor checked.
        examples: of the training set, for what is remembered per example; those of the batch if not given.
        optimizer: makes the optimiser of some parameters, such as ``partial(torch.optim.SGD, lr=0.1, momentum=0.9)``.
        epoch, epochs: the step is one of epoch ``epoch`` of ``epochs`` (from 0).

    Raises:
        InputError: where ``examples`` are fewer than the batch has, and where the network does not take ``batch.x``.
        Exception: what a step raises on real examples.
    """
    examples = whole_number("examples", len(batch) if examples is None else examples, len(batch))
    branches = solver.mixture()
    costs = [_cost(_Trial(problem, part, model, optimizer, epoch, epochs), batch, examples) for _, part in branches]
    shares = [share for share, _ in branches]
    peaks = [cost.peak_bytes for cost in costs if cost.peak_bytes is not None]
    return replace(
        max(costs, key=lambda cost: cost.real_examples),
        flops=sum(share * cost.flops for share, cost in zip(shares, costs, strict=True)),
        first_flops=sum(share * cost.first_flops for share, cost in zip(shares, costs, strict=True)),
        peak_bytes=max(peaks) if len(peaks) == len(costs) else None,
    )


@dataclass(frozen=True)
class _Counts:
    """What was counted, and the bytes alive after each operation of a step, all linear in the batch's examples."""

    first_flops: float
    flops: float
    plain_flops: float
    alive: Sequence[Moment] | None
    remembered: Mapping[str, float]
    network_bytes: int
    optimizer_bytes: int

    def extended(self, fewer: _Counts, times: float) -> _Counts:
        """self + times · (self − fewer)."""

        def line(one: float, other: float) -> float:
            return one + times * (one - other)

        alive = extended(self.alive, fewer.alive, times) if self.alive and fewer.alive else None
        return replace(
            self,
            first_flops=line(self.first_flops, fewer.first_flops),
            flops=line(self.flops, fewer.flops),
            plain_flops=line(self.plain_flops, fewer.plain_flops),
            alive=alive,
            remembered={path: line(size, fewer.remembered.get(path, 0)) for path, size in self.remembered.items()},
        )

    def for_examples(self, more: _Counts, fewer: _Counts, times: float) -> _Counts:
        """With times · (more − fewer) remembered besides; the two differ in the number of examples alone."""
        besides = {path: times * (size - fewer.remembered.get(path, 0)) for path, size in more.remembered.items()}
        total = sum(besides.values())
        return replace(
            self,
            alive=None
            if self.alive is None
            else [moment._replace(alive=moment.alive + total) for moment in self.alive],
            remembered={path: size + besides.get(path, 0) for path, size in self.remembered.items()},
        )

    def cost(self, examples: int, real_examples: int = 0, reason: str = "") -> StepCost:
        return StepCost(
            flops=self.flops,
            first_flops=self.first_flops,
            plain_flops=self.plain_flops,
            peak_bytes=None if self.alive is None else max(moment.alive for moment in self.alive),
            network_bytes=self.network_bytes,
            optimizer_bytes=self.optimizer_bytes,
            remembered=self.remembered,
            examples=examples,
            real_examples=real_examples,
            reason=reason,
        )


@dataclass(frozen=True)
class _Trial:
    """The players and the network of trial steps; each trial is on copies of them."""

    problem: BilevelProblem
    solver: Solver
    model: nn.Module
    optimizer: Optimizer | None
    epoch: int
    epochs: int

    def run(self, batch: Batch, examples: int, device: torch.device) -> _Counts:
        """Three steps: the first two counted, the memory of the third followed.

        The largest index is that of the last of ``examples``. Torch's global generators are left as they were.
        """
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            return self._run(batch, examples, device)

    def _run(self, batch: Batch, examples: int, device: torch.device) -> _Counts:
        problem, solver, model = copy.deepcopy((self.problem, self.solver, self.model))
        model.train().to(device)
        index = torch.arange(len(batch), device=device) + (examples - len(batch))
        batch = batch.to(device).replace(index=index, examples=examples)
        generator = None if device.type == "meta" else torch.Generator(device).manual_seed(0)
        optimizer = None if self.optimizer is None else self.optimizer(model.parameters())
        players = (problem, solver)
        policy.set_epoch(players, self.epoch, self.epochs)

        def step(number: int) -> None:
            policy.set_step(players, self.epoch * STEPS + number, self.epochs * STEPS)
            model.zero_grad()
            solver.backward(problem, model, batch, generator)
            if optimizer is not None:
                optimizer.step()

        first, second = operations(lambda: step(0)), operations(lambda: step(1))
        plain = operations(lambda: _plain(model, batch.x))
        state = {} if optimizer is None else dict(optimizer.state)
        gradients = (p.grad for p in model.parameters())
        # Not kept in a variable: the step may free some of them.
        alive = bytes_alive(
            lambda: step(2), device, tensors_in([model, [*gradients], state, _states(players), *_tensors_of(batch)])
        )
        remembered = {path: float(size) for path, part in _states(players).items() if (size := _bytes(part))}
        return _Counts(first, second, plain, alive, remembered, _bytes(model), _bytes(state))


def _cost(trial: _Trial, batch: Batch, examples: int) -> StepCost:
    try:
        return trial.run(batch, examples, torch.device("meta")).cost(examples)
    except Exception as error:  # of whatever looks at values, or mixes devices; a step's own errors come again below
        reason = _in_a_line(error)
    device = batch.x.device
    most = min(len(batch), FEW)
    base = counts = trial.run(batch[:most], most, device)
    if len(batch) > most:
        few = most // 2
        counts = base.extended(trial.run(batch[:few], most, device), (len(batch) - most) / (most - few))
    if examples > most and base.remembered:
        twice = trial.run(batch[:most], 2 * most, device)
        counts = counts.for_examples(twice, base, (examples - most) / most)
    return counts.cost(examples, most, reason)


def _in_a_line(error: Exception) -> str:
    """Where it was raised, as far as that is not in torch, and what it says, cut to a line."""
    torch_s = Path(torch.__file__).parent
    frames = [f for f in traceback.extract_tb(error.__traceback__) if torch_s not in Path(f.filename).parents]
    message = " ".join(str(error).split()) or type(error).__name__
    return f"{Path(frames[-1].filename).name}, line {frames[-1].lineno}: {textwrap.shorten(message, 100)}"


def _plain(model: nn.Module, x: Tensor) -> None:
    """Plain training: a forward pass, and a backward pass to the parameters. Losses count for nothing."""
    try:
        out = model(x)
    except Exception as error:
        raise InputError(f"plain training is model(batch.x), which fails: {_in_a_line(error)}") from error
    if not isinstance(out, Tensor):
        raise InputError(f"the network gives {type(out).__name__}; plain training needs a tensor")
    torch.autograd.grad(out.sum(), [p for p in model.parameters() if p.requires_grad], allow_unused=True)


def _states(players: tuple[BilevelProblem, Solver]) -> dict[str, Any]:
    """The state of every policy by its path in the problem; the solver's begin with ``solver``."""
    by_path = {}
    for path, state in policy.state_of(players).items():
        whose, _, rest = path.partition(".")
        by_path[rest if whose == "0" else f"solver.{rest}".rstrip(".")] = state
    return by_path


def _tensors_of(batch: Batch) -> Iterator[Tensor]:
    view = [] if batch.view is None else vars(batch.view)
    return tensors_in([batch.x, batch.y, batch.index, batch.more, view])


def _bytes(value: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in {id(t): t for t in tensors_in(value)}.values())
