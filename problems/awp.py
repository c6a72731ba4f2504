"""Adversarial weight perturbation (Wu et al., 2020): the network is trained where its loss is worse, nearby in θ.

    V_l = γ ‖θ_l‖ G_l/‖G_l‖,   G = ∇_θ mean_i f(θ, δ*_i),   for every weight θ_l with more than one dimension
    θ ← θ − rate · ∇ mean_i f(θ + V, δ*_i),   V constant, δ* at θ                                  (equations 8 to 10)

An upper problem around any other, which moves nothing of the lower level: the Jacobian of δ* is at θ, and v = ∇_δ f at
θ + V. G takes one more pass of f, with copies of the buffers and the same random draws. Biases and the scales of batch
normalisation are not moved. With γ = 0 every step is the inner problem's, bit for bit.

Published settings (the authors' code): AT-AWP is PGD-10 with γ = 0.01 from the first epoch on; TRADES-AWP
(``--of trades --gamma 0.005 --gamma-from 10``) has γ = 0.005 from epoch 10 on, counted from 0. PreActResNet-18, 200
epochs of batch 128, rate 0.1 divided by 10 after epochs 100 and 150. Figures of the authors' log for AT-AWP: PGD-20
55.39 at the best epoch and 54.30 at the last, against 52.79 and 43.75 without; for WideResNet-34-10, AutoAttack 53.97
(AT-AWP) and 56.17 (TRADES-AWP).

In the code the optimiser's weight decay acts on θ + V. ``--moved-decay`` makes up for that by a term of the loss,
moved_decay · ⟨V, θ⟩, whose gradient is what the decay of V adds; it is 5e-4, the weight decay of the recipe, and 0
leaves the decay to θ. The code differs in these: its attack has two more passes in train mode that only move running
statistics, and it pads crops by reflection.

When to use it: around another method whose robust accuracy falls after its best epoch in long training. Not for short
runs of small networks: on the digits its accuracy varies far more over seeds than PGD's.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

import bilevel_at as ba
from bilevel_at import shares
from bilevel_at.errors import at_least, whole_number
from bilevel_at.policy import Number, checked, number
from bilevel_at.runs.problem_file import ProblemFile
from bilevel_at.runs.recipe import CIFAR, DIGITS, IMAGENET, Recipe
from bilevel_at.solvers import ZeroIG

TINY = 1e-20  # the authors', which keeps V finite where a gradient is zero


class Elsewhere(nn.Module):
    """The model with other tensors in place of some of its parameters and buffers; it shares everything else."""

    def __init__(self, model: nn.Module, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.model, self.tensors = model, tensors
        self.training = model.training

    def forward(self, *args: Any, **more: Any) -> Any:
        return functional_call(self.model, self.tensors, args, more)


class AWP(ba.UpperProblem):
    """f(θ + V, δ) of another upper problem, with V_l = γ ‖θ_l‖ G_l/‖G_l‖ constant (Wu et al., 2020, equations 8 to 10).

    What the inner problem prepares belongs to f, so it is prepared at θ + V, and after the attack, where γ > 0.

    Args:
        upper: the inner upper problem.
        gamma: γ, at least 0; a number or a :class:`~bilevel_at.Schedule`.
        moved_decay: the weight decay that V is to have too, at least 0: the loss has moved_decay · ⟨V, θ⟩ besides.

    Raises:
        InputError: where γ or the decay is below 0 or ``upper`` is no upper problem, or an AWP itself; from
            ``loss_at``, where no weight of the network has more than one dimension, and where the inner problem shares
            the attack's pass.
    """

    def __init__(self, upper: ba.UpperProblem, gamma: Number, moved_decay: float = 0.0) -> None:
        if not isinstance(upper, ba.UpperProblem) or isinstance(upper, AWP):
            raise ba.InputError(f"AWP(upper, gamma): {upper!r:.60} must be an UpperProblem other than AWP")
        self.upper = upper
        self.gamma = checked(at_least, "gamma", gamma)
        self.moved_decay = at_least("moved_decay", moved_decay)

    @property
    def size(self) -> float:
        """γ of the current epoch."""
        return at_least("gamma", number(self.gamma))

    def prepare(self, model: nn.Module, batch: ba.Batch, generator: torch.Generator | None) -> ba.Batch:
        return batch if self.size else self.upper.prepare(model, batch, generator)

    def inner_loss(
        self, model: nn.Module, batch: ba.Batch, solution: ba.Solution, generator: torch.Generator | None
    ) -> Tensor:
        """f of the inner problem, with what it prepares."""
        return self.upper.loss_at(model, self.upper.prepare(model, batch, generator), solution, generator)

    def perturbation(
        self, model: nn.Module, batch: ba.Batch, solution: ba.Solution, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """V by parameter name. Changes neither the network's buffers nor the generator.

        Raises:
            InputError: where no weight has more than one dimension.
        """
        weights = {
            name: p.detach().requires_grad_()
            for name, p in model.named_parameters()
            if p.requires_grad and p.ndim > 1 and "weight" in name
        }
        if not weights:
            raise ba.InputError("AWP moves weights of more than one dimension; the model has none")
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        copied = Elsewhere(model, {**weights, **buffers})
        solution = replace(solution, delta=solution.delta.detach())
        loss = shares.mean(self.inner_loss(copied, batch, solution, _same_draws(generator)))
        parts = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
        gradients = [None if part is None else shares.total(part) for part in parts]
        return {
            name: self.size * weight.detach().norm() * gradient / (gradient.norm() + TINY)
            for (name, weight), gradient in zip(weights.items(), gradients, strict=True)
            if gradient is not None
        }

    def loss_at(
        self, model: nn.Module, batch: ba.Batch, solution: ba.Solution, generator: torch.Generator | None = None
    ) -> Tensor:
        """f(θ + V, δ) + moved_decay · ⟨V, θ⟩, ``[B]`` or one number."""
        if not self.size:
            return self.upper.loss_at(model, batch, solution, generator)
        if solution.kept_output is not None:
            raise ba.InputError(
                f"{type(self.upper).__name__} shares the attack's pass, which is at θ, and AWP's loss is at θ + V; "
                "AWP needs a lower problem without keep_output=True"
            )
        moves = self.perturbation(model, batch, solution, generator)
        weights = {name: p for name, p in model.named_parameters() if name in moves}
        moved = {name: p + moves[name] for name, p in weights.items()}
        losses = self.inner_loss(Elsewhere(model, moved), batch, solution, generator)
        if self.moved_decay:
            products = torch.stack([(moves[name] * p).sum() for name, p in weights.items()])
            losses = losses + self.moved_decay * products.sum()
        return losses


def _same_draws(generator: torch.Generator | None) -> torch.Generator | None:
    """A generator that will draw what this one will."""
    if generator is None:
        return None
    twin = torch.Generator(generator.device)
    twin.set_state(generator.get_state())
    return twin


def problem(
    epsilon: float = 8 / 255,
    gamma: float = 0.01,
    of: str = "minmax",
    gamma_from: int = 0,
    moved_decay: float = 5e-4,
    label_smoothing: float | None = None,
) -> ba.BilevelProblem:
    """Another problem file, with its own defaults for this ε, trained at perturbed weights.

    Args:
        epsilon: radius ε of the ball.
        gamma: length of the perturbation of a weight, as a share of the weight's.
        of: the problem file, by its name or path.
        gamma_from: the epoch, from 0, from which on weights are perturbed.
        moved_decay: the optimiser's weight decay, where it is to act on perturbed weights, as published; else 0.
        label_smoothing: of the inner problem, its own if not given.
    """
    whole_number("gamma_from", gamma_from, 0)
    given = {} if label_smoothing is None else {"label_smoothing": label_smoothing}
    inner = inner_problem(of, epsilon, **given)
    # Of another copy of this module, perhaps, which isinstance(inner.upper, AWP) would not see.
    if isinstance(getattr(inner.upper, "upper", None), ba.UpperProblem):
        raise ba.InputError(f"--of is {of}, which moves weights itself; choose a file that does not")
    at_least("gamma", gamma)
    size = ba.Schedule(lambda epoch, epochs: gamma if epoch >= gamma_from else 0.0) if gamma_from else gamma
    return ba.BilevelProblem(AWP(inner.upper, size, moved_decay), inner.lower, inner.threat)


_FILES: dict[tuple[str, str], ProblemFile] = {}


def inner_file(of: str) -> ProblemFile:
    """Another problem file. The same module each time, so that its solver knows the classes of its problem."""
    file = ProblemFile(of)
    return _FILES.setdefault((str(file.path.resolve()), file.sha256), file)


def inner_problem(of: str, epsilon: float, **given: Any) -> ba.BilevelProblem:
    """The problem of another file, with its defaults for this ε but for the arguments ``given``."""
    file = inner_file(of)
    made: ba.BilevelProblem = file.make(file.problem, ba.BilevelProblem, epsilon=epsilon, **given)
    return made


def inner_solver(of: str, epsilon: float) -> ba.Solver:
    """The solver that another file's problem is trained with."""
    file = inner_file(of)
    if file.solver is None:
        return ZeroIG()
    takes_epsilon = "epsilon" in inspect.signature(file.solver).parameters
    made: ba.Solver = file.make(file.solver, ba.Solver, **({"epsilon": epsilon} if takes_epsilon else {}))
    return made


def solver(epsilon: float = 8 / 255, of: str = "minmax") -> ba.Solver:
    """The solver of the inner file."""
    return inner_solver(of, epsilon)


def recipe() -> dict[str, Recipe]:
    cifar = replace(CIFAR, epochs=200, lr=0.1, schedule="multistep", milestones=(100, 150))
    return {
        "digits": DIGITS,
        "cifar10": cifar,
        "imagenet": IMAGENET.playing(moved_decay=IMAGENET.weight_decay),
    }
