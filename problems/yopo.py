"""YOPO-m-n (Zhang et al., 2019): m full passes an update, after each n attack steps through the first layer.

    η uniform in [−ε, ε]^d;   m times:
        h = L(x + η),  a = ∇_θ mean_i ℓ(F(h_i)),  p = ∇_h mean_i ℓ(F(h_i))         a full pass; f = F ∘ L
        n times:  η ← P_C(η + step · sign ∇_η ⟨p, L(clip(x + η))⟩)                  p is constant
        b = ∇_θ ⟨p, L(clip(x + η))⟩                                                 which moves L's parameters alone
    θ ← θ − rate · Σ (a + b)

L is whatever comes before the first convolution's output: the normalisation of the inputs and the convolution. A solver
of its own, which sums gradients at m points; the problem says where η begins, and under another solver it is training
on that noise. The whole network is in the mode that it is in: train, when it is trained.

Published settings (the authors' code): m = 5, n = 3, step 2/255 (ε/4), CIFAR-10 in batches of 256 for 36 epochs, rate
0.2/m divided by 10 after epochs 30 and 34, weight decay 5e-4. Both a and b move the first layer, so that it moves about
twice as far; the paper has b alone (``--no-both``). η is not clipped to the input range before the first pass. The code
makes one more pass, for an accuracy that it prints, which moves running statistics only and is not copied.

Figures: ATAS' Table I (ResNet-18, 12 epochs, 8/255): 74.72 clean, PGD-50 35.79, AutoAttack 33.21; 8.66 at 16/255.

When to use it: to reproduce it, or to study attacks through the first layer alone. At the cost of five standard steps
it does not reach Fast-AT on the digits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

import bilevel_at as ba
from bilevel_at import shares
from bilevel_at.batch import per_sample
from bilevel_at.errors import whole_number
from bilevel_at.losses import check_prepared, check_values
from bilevel_at.runs.recipe import CIFAR, DIGITS, IMAGENET, Recipe
from bilevel_at.steps import Step, step_policy

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Reached(Exception):
    """Ends a pass of the network at the output of its first convolution."""


@contextmanager
def first_convolution(model: nn.Module, stop: bool = False) -> Iterator[list[Tensor]]:
    """The outputs of the convolution that a pass of the network meets first, one for each pass that is made meanwhile.

    Args:
        model: the network.
        stop: end each pass there, by :class:`Reached`.
    """
    first: list[nn.Module] = []
    outputs: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if not first:
            first.append(module)
        if module is first[0]:
            outputs.append(output)
            if stop:
                raise Reached

    hooks = [module.register_forward_hook(keep) for module in model.modules() if isinstance(module, CONVOLUTIONS)]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def first_layer(model: nn.Module, x: Tensor) -> Tensor:
    """L(x): the pass of the network up to the output of its first convolution."""
    with first_convolution(model, stop=True) as outputs:
        try:
            model(x)
        except Reached:
            return outputs[0]
    raise ba.InputError("YOPO splits a network at its first convolution; this one has none")


class YOPO(ba.Solver):
    """m full passes, each followed by n steps through the first layer; the gradient is Σ (a + b).

    It takes the upper loss of the problem, which must pass the network once, and begins at the anchor of the lower one.

    Args:
        m: full passes of an update, at least 1.
        n: steps after each, at least 1.
        step: their length, a number or a policy; a quarter of the constraint's radius, as it is then, if not given.
        both: whether a moves the first layer too, rather than b alone.

    Raises:
        InputError: for values outside these ranges; from :meth:`hypergradient`, for a network without a convolution, an
            upper problem that passes the network more than once, a constraint without a radius where there is no step,
            and a network in which no parameter requires a gradient.
    """

    implicit = False

    def __init__(
        self, m: int = 5, n: int = 3, step: Step | ba.Schedule | float | None = None, both: bool = True
    ) -> None:
        self.m, self.n = whole_number("m", m, 1), whole_number("n", n, 1)
        if step is not None:
            step_policy(step)  # which checks it
        self.step, self.both = step, both

    @torch.enable_grad()
    def hypergradient(
        self,
        problem: ba.BilevelProblem,
        model: nn.Module,
        batch: ba.Batch,
        anchor: Tensor | None = None,
        generator: torch.Generator | None = None,
        *,
        scale: float = 1.0,
    ) -> ba.Hypergradient:
        """Σ (a + b) by parameter name; the losses, δ and v = ∇_δ f are those of the last full pass."""
        upper, lower = problem.upper, problem.lower
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not named:
            raise ba.InputError("no parameter of the model requires a gradient; there is nothing to differentiate in")
        seen = check_prepared(upper, upper.prepare(model, batch, generator))
        if any(value.requires_grad for value in seen.more.values()):
            raise ba.InputError(
                f"YOPO splits a single pass at its first convolution; {type(upper).__name__} makes another before it"
            )
        steps = self._steps(lower)
        solution = lower.solve(model, batch, anchor, generator)
        eta = solution.anchor
        total: dict[str, Tensor | None] = dict.fromkeys(named)
        for _ in range(self.m):
            eta = eta.detach().requires_grad_()
            with first_convolution(model) as outputs:
                losses = upper.loss_at(model, seen, replace(solution, delta=eta), generator)
            check_values("the upper loss", losses, batch)
            if len(outputs) != 1:
                made = f"the network {len(outputs)} times" if outputs else "no convolution"
                raise ba.InputError(f"YOPO splits a single pass at its first convolution; the upper loss passes {made}")
            *full, p, v = torch.autograd.grad(
                shares.mean(losses) * scale, [*named.values(), outputs[0], eta], allow_unused=True
            )
            point = eta.detach()
            for _ in range(self.n):
                eta = eta.detach().requires_grad_()
                (slope,) = torch.autograd.grad(self._product(p, model, batch, eta, lower), eta)
                size = per_sample(steps.size(batch, slope), eta)
                eta = lower.constraint.project(eta.detach() + size * slope.sign(), batch.x)
            product = self._product(p, model, batch, eta.detach(), lower)
            first: Sequence[Tensor | None] = [None] * len(named)
            if product.requires_grad:  # not where the first layer is frozen
                first = torch.autograd.grad(product, list(named.values()), allow_unused=True)
            for name, a, b in zip(named, full, first, strict=True):
                for part in (a if self.both or b is None else None, b):
                    if part is not None:
                        before = total[name]
                        total[name] = part if before is None else before + part
        return ba.Hypergradient(
            losses.detach(), total, {}, replace(solution, delta=point), torch.zeros_like(eta) if v is None else v, scale
        )

    def _steps(self, lower: ba.LowerProblem) -> Step:
        """The steps' length."""
        if self.step is not None:
            return step_policy(self.step)
        radius = getattr(lower.constraint, "radius", None)
        if radius is None:
            raise ba.InputError(f"YOPO steps a quarter of a radius; {lower.constraint!r:.60} has none, so give a step")
        return step_policy(radius / 4)

    @staticmethod
    def _product(p: Tensor, model: nn.Module, batch: ba.Batch, eta: Tensor, lower: ba.LowerProblem) -> Tensor:
        """⟨p, L(clip(x + η))⟩."""
        bounds = getattr(lower.constraint, "bounds", None)
        x = batch.x + eta
        return (p * first_layer(model, x if bounds is None else torch.clamp(x, *bounds))).sum()


def problem(epsilon: float = 8 / 255, label_smoothing: float = 0.0) -> ba.BilevelProblem:
    """An ℓ∞ ball, and a start in it that is uniform and not clipped to the input range.

    Args:
        epsilon: radius ε of the ball.
        label_smoothing: the share of a label that is spread over all classes, in the attack and in training.
    """
    lower = ba.AtAnchor(ba.LinfBall(epsilon), ba.Uniform(epsilon, clip=False), "train")
    return ba.BilevelProblem(ba.UpperProblem(ba.CrossEntropy(label_smoothing)), lower)


def solver(m: int = 5, n: int = 3, step: float | None = None, both: bool = True) -> YOPO:
    """YOPO-m-n.

    Args:
        m: full passes of an update.
        n: steps through the first layer after each.
        step: their length, ε/4 if not given.
        both: the full passes move the first layer too, rather than the steps through it alone.
    """
    return YOPO(m, n, step, both)


def recipe() -> dict[str, Recipe]:
    cifar = replace(
        CIFAR,
        epochs=36,
        batch_size=256,
        lr=0.2 / 5,
        peak_momentum=None,
        schedule="multistep",
        milestones=(30, 34),
    )
    imagenet = replace(IMAGENET, lr=IMAGENET.lr / 5)
    recipes = {"digits": replace(DIGITS, lr=0.1 / 5), "cifar10": cifar, "imagenet": imagenet}
    return {data: replace(recipe, modern={"lr": 0.1 / 5}) for data, recipe in recipes.items()}
