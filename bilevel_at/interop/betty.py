"""Betty (betty-ml): a bilevel problem as a level of a Betty program, and a Betty level as a lower problem.

    Level        a Betty problem whose gradient is a solver's hypergradient; the levels above may differentiate it
    LowerLevel   a lower problem whose δ are the weights of a Betty problem

docs/betty.md says how to install betty-ml, which of its own hypergradients are right, and has a program of three
levels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .. import policy
from ..anchors import Anchor, Attacker
from ..batch import Batch
from ..constraints import Range
from ..draws import Draws, generator_on
from ..errors import InputError
from ..modes import same_buffers
from ..problem import BilevelProblem, LowerProblem, objective_gradient, solve_by_descent
from ..solution import Hypergradient, Solution
from ..solver import Solver
from ._differences import differentiable_loss

try:
    from betty.configs import Config
    from betty.problems import ImplicitProblem
except ImportError as error:
    raise ImportError(
        f"bilevel_at.interop.betty needs betty-ml ({error}): on Python 3.10, pip install betty-ml==0.2.1; on 3.11 and "
        "later, which 0.2.1 runs on but does not declare, pip install --ignore-requires-python betty-ml==0.2.1"
    ) from None

__all__ = ["Level", "LowerLevel", "Seen", "as_batch"]


def as_batch(batch: Any) -> Batch:
    """A batch of a Betty data loader: (x,), (x, y), a dictionary of tensors with x among them, or a Batch."""
    if isinstance(batch, Batch):
        return batch
    if isinstance(batch, Mapping):
        return Batch(**batch)
    if not 1 <= len(batch) <= 2:
        raise InputError(
            f"a batch of {len(batch)} tensors: pass Level(batch=...), which makes a Batch of what is loaded"
        )
    return Batch(*batch)


class Seen(nn.Module):
    """A level's network, called as it is, with those of levels above as attributes by the names of the levels."""

    def __init__(self, network: nn.Module, above: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.network = network
        for name, module in above.items():
            if hasattr(self, name):
                raise InputError(f"a level above is called {name!r}, which a network has as an attribute; rename it")
            setattr(self, name, module)

    def forward(self, *args: Any, **more: Any) -> Any:
        return self.network(*args, **more)


class Level(ImplicitProblem):
    """A bilevel problem as a Betty problem: its loss is F(θ) = mean f(θ, δ*(θ)), and its gradient the solver's.

    The loss that :meth:`training_step` returns can be differentiated by autograd, so that Betty treats the level as any
    other: in θ and in the weights of ``above`` its first derivative is the hypergradient, its second a central
    difference of hypergradients (two a product). z, and all that is drawn, stay fixed for a batch, so that F is a
    function. What the problem and the solver remember observes each batch once.

    Args:
        name: of the Betty problem.
        problem: the two players. Their losses get the network; with ``above``, a :class:`Seen`.
        solver: couples them.
        config: Betty's, which says how the levels above differentiate this one; "darts" if not given.
        module, optimizer, scheduler, train_data_loader: as Betty has them.
        above: names of Betty problems whose modules f or g read.
        batch: what the data loader yields -> :class:`Batch`.
        seed: of the draws.

    Raises:
        InputError: where a batch cannot be read; and what :meth:`Solver.hypergradient` raises.
    """

    def __init__(
        self,
        name: str,
        problem: BilevelProblem,
        solver: Solver,
        config: Config | None = None,
        module: nn.Module | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        scheduler: Any = None,
        train_data_loader: Any = None,
        above: Sequence[str] = (),
        batch: Callable[[Any], Batch] = as_batch,
        seed: int = 0,
    ) -> None:
        super().__init__(name, Config() if config is None else config, module, optimizer, scheduler, train_data_loader)
        self._bilevel, self._solver = problem, solver
        self._above, self._as_batch, self._seed = tuple(above), batch, seed
        self._generator: torch.Generator | None = None
        self._at: tuple[Any, Draws, Tensor] | None = None  # the batch, what is drawn for it, and z
        self.hypergradient: Hypergradient | None = None

    def seen(self) -> nn.Module:
        """The network as the losses get it."""
        above = {name: getattr(self, name).module for name in self._above}
        return Seen(self.module, above) if above else self.module

    def training_step(self, batch: Any) -> Tensor:
        """F at the present weights, a tensor without axes."""
        model = self.seen()
        if self._at is None or self._at[0] is not batch:
            step = self._first(model, batch)
        else:
            step = self._again(model)
        return differentiable_loss(step, model, lambda: self._again(model))

    def get_loss(self, batch: Any) -> tuple[Tensor, dict[str, Any]]:
        """As Betty calls it for an update, not for differences around one: what is remembered observes it."""
        new = self._at is None or self._at[0] is not batch
        result: tuple[Tensor, dict[str, Any]] = super().get_loss(batch)
        if new:
            assert self.hypergradient is not None
            policy.observe((self._bilevel, self._solver), self.hypergradient)
        return result

    def get_batch(self) -> Any:
        """The next batch, with new draws even where it is the same object again."""
        self._at = None
        return super().get_batch()

    def _first(self, model: nn.Module, batch: Any) -> Hypergradient:
        seen = self._as_batch(batch)
        if self._generator is None:
            self._generator = generator_on(seen.x.device, self._seed)
        draws = Draws(self._generator, seen.x.device)
        step = self._solver.hypergradient(self._bilevel, model, seen, generator=self._generator)
        self._at, self.hypergradient = (batch, draws, step.solution.anchor), step
        return step

    def _again(self, model: nn.Module) -> Hypergradient:
        """At other weights, with the same batch, z and draws; the network's buffers stay as they are."""
        assert self._at is not None
        batch, draws, anchor = self._at
        seen = self._as_batch(batch)
        fixed = anchor if len(anchor) in (1, len(seen)) else None  # several δ an example: drawn again, the same
        with draws.again() as generator, same_buffers(model):
            return self._solver.hypergradient(self._bilevel, model, seen, fixed, generator)

    def state_dict(self) -> dict[str, Any]:
        """Betty's, with what the problem and the solver remember, and the state of the draws."""
        drawn = None if self._generator is None else self._generator.get_state()
        remembered = policy.state_of((self._bilevel, self._solver))
        return {**super().state_dict(), "policies": remembered, "draws": drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        super().load_state_dict(state)
        policy.load_state((self._bilevel, self._solver), state["policies"])
        if state["draws"] is not None:
            self._generator = generator_on(next(self.module.parameters()).device, self._seed)
            self._generator.set_state(state["draws"])
        self._at = None


class _Weights(Anchor):
    """z is where the weights are."""

    def draw(
        self, lower: Attacker, model: nn.Module, batch: Batch, generator: torch.Generator | None
    ) -> tuple[Tensor, None]:
        return lower.base(model, batch), None


class LowerLevel(LowerProblem):
    """A Betty problem as a lower level: δ ``[1, n]`` are the weights of its module, g is its training loss.

    Together with an upper loss and one of this library's solvers it makes a :class:`Level` that goes above ``level`` in
    an Engine whose dependencies have it under "l2u" alone, so that Betty calls it and leaves its gradient to it.

    Args:
        level: the Betty problem. Its loss is that of the batch it has seen last, as in Betty's own hypergradients.
        tol: None takes the weights that Betty has reached for δ*. A number descends from them until the largest
            component of ∇g is below it, and leaves the module as it is.
        max_iter: steps allowed for that.

    Raises:
        InputError: from a solve, where ``level`` has not seen a batch yet.
        ConvergenceError: from a solve, where ``tol`` is not reached.
    """

    mode = "train"

    def __init__(self, level: Any, tol: float | None = None, max_iter: int = 10_000) -> None:
        self.level, self.tol, self.max_iter = level, tol, max_iter
        self.constraint, self.anchor = Range(bounds=None), _Weights()

    def network(self, delta: Tensor) -> Callable[..., Any]:
        """The level's module with δ for its weights, as the upper loss calls it: ``network(delta)(batch.x)``."""
        weights = self._weights(delta)
        return lambda *args, **more: functional_call(self.level.module, weights, args, more)

    def base(self, model: nn.Module, batch: Batch) -> Tensor:
        """The weights now, ``[1, n]``."""
        return torch.cat([p.detach().flatten() for p in self._named().values()])[None]

    def objective(self, model: nn.Module, batch: Batch, delta: Tensor, anchor: Tensor) -> Tensor:
        """g, the level's training loss with δ for its weights; ``batch`` is the upper level's, and not used."""
        if self.level.cur_batch is None and self.level.train_data_loader is not None:
            raise InputError(f"the Betty problem {self.level.name!r} has seen no batch yet; let it make a step first")
        swapped = {f"module.{name}": value for name, value in self._weights(delta).items()}
        loss: Tensor = functional_call(_TrainingStep(self.level), swapped, (self.level.cur_batch,))
        return loss

    def solve_at(self, model: nn.Module, batch: Batch, anchor: Tensor, differentiable: bool) -> Solution:
        if self.tol is not None:
            return solve_by_descent(self, model, batch, anchor, differentiable, tol=self.tol, max_iter=self.max_iter)
        gradient = objective_gradient(self, model, batch, anchor, anchor) if differentiable else None
        return Solution(anchor, anchor, batch, gradient=gradient)

    def _named(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.level.module.named_parameters() if p.requires_grad}

    def _weights(self, delta: Tensor) -> dict[str, Tensor]:
        named = self._named()
        parts = delta.flatten().split([p.numel() for p in named.values()])
        return {name: part.view_as(p) for part, (name, p) in zip(parts, named.items(), strict=True)}


class _TrainingStep(nn.Module):
    """A Betty problem's training step as a module, so that torch swaps the weights of what it calls."""

    def __init__(self, level: Any) -> None:
        super().__init__()
        self.module = level.module
        self.step = level.training_step_exec

    def forward(self, batch: Any) -> Tensor:
        result = self.step(batch)
        loss: Tensor = result["loss"] if isinstance(result, dict) else result
        return loss
