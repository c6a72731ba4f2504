"""What ``implicit_runs.py`` measures of a network: the hypergradient's two terms, and F beside the true loss.

F is Fast-BAT's upper objective, the mean cross-entropy at its own δ*; the true loss R is the mean cross-entropy under
PGD-20 on the same images. ∇R is taken with PGD's perturbation held, as Danskin's theorem has it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

import bilevel_at as ba
from bilevel_at.data import Images
from bilevel_at.diagnose import gradient_alignment
from bilevel_at.solution import Gradients
from bilevel_at.solver import Attacked
from bilevel_at.solvers import HessianFreeKKT, ZeroIG

LENGTHS = tuple(10 ** (k / 2) for k in range(-12, 1))
"""Step lengths t, from 1e-6 to 1."""


@dataclass(frozen=True, eq=False)
class At(ba.Start):
    """z is a tensor."""

    z: Tensor

    def fresh(self, constraint: ba.Constraint, base: Tensor, generator: torch.Generator | None) -> Tensor:
        return self.z


@dataclass(eq=False)
class FromStart(ba.Steps):
    """Steps that hand on where they began, as the memo: what the derivative through them needs."""

    def draw(
        self, lower: ba.Linearized, model: nn.Module, batch: ba.Batch, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        start, _ = self.start.draw(lower, model, batch, generator)
        z, _ = ba.Steps(At(start), self.direction, self.step, self.count).draw(lower, model, batch, generator)
        return z, start


class Through(HessianFreeKKT):
    """The derivative of δ* through its anchor too: autograd through every step from the start that was drawn."""

    def implicit_term(self, attacked: Attacked, v: Tensor) -> Gradients:
        lower, model, solution = attacked.problem.lower, attacked.model, attacked.solution
        delta = solution.memo.detach().requires_grad_()
        for _ in range(1 + lower.anchor.count):
            loss = lower.attack_loss(model, solution.batch, delta).sum()
            (slope,) = torch.autograd.grad(loss, delta, create_graph=True)
            delta = lower.constraint.project(delta - slope / solution.lam, solution.batch.x)
        named = attacked.parameters
        terms = torch.autograd.grad(delta, list(named.values()), self.ig_weight * v, allow_unused=True)
        return dict(zip(named, terms, strict=True))


class Noise(HessianFreeKKT):
    """The implicit term's norm without its direction: a Gaussian vector as long as it."""

    def implicit_term(self, attacked: Attacked, v: Tensor) -> Gradients:
        term = super().implicit_term(attacked, v)
        drawn = {
            name: None if part is None else torch.randn(part.shape, generator=attacked.generator, dtype=part.dtype)
            for name, part in term.items()
        }
        share = flat(term).norm() / flat(drawn).norm()
        return {name: None if part is None else share * part for name, part in drawn.items()}


class Coin(HessianFreeKKT):
    """The implicit term or its opposite, by a fair coin in every step: its second moments, and no mean."""

    def implicit_term(self, attacked: Attacked, v: Tensor) -> Gradients:
        sign = 2 * torch.randint(2, (), generator=attacked.generator).item() - 1
        term = super().implicit_term(attacked, v)
        return {name: None if part is None else sign * part for name, part in term.items()}


def flat(gradients: Mapping[str, Tensor | None]) -> Tensor:
    """All of them as one vector."""
    return torch.cat([part.detach().flatten() for part in gradients.values() if part is not None])


def cosine(a: Tensor, b: Tensor) -> float:
    """0 where either is zero."""
    return torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=0, eps=1e-300).item()


def batch_of(images: Images) -> ba.Batch:
    return ba.Batch(images.pixels(), images.y)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def look(problem: ba.BilevelProblem, model: nn.Module, images: Images) -> dict[str, float]:
    """Both terms at weight 1, F, R and how linear the loss is, on these images, with the same draws in every look."""
    batch, exact, lower = batch_of(images), HessianFreeKKT(), problem.lower
    step = exact.hypergradient(problem, model, batch, generator=generator())
    pgd = ba.Linearized.pgd(ba.minus(ba.cross_entropy), problem.threat, 20, problem.threat.radius / 4)
    worst = pgd.solve(model, batch, generator=generator(1)).delta
    losses = ba.cross_entropy(model, batch, worst)
    true = torch.cat([g.flatten() for g in torch.autograd.grad(losses.mean(), list(model.parameters()))])
    direct, implicit, whole = flat(step.direct), flat(step.implicit), flat(step.grads)
    through = Through().hypergradient(problem, model, batch, generator=generator())
    norms = step.solution.attack_gradient.flatten(1).norm(dim=1)
    return {
        "F": step.loss.item(),
        "R": losses.mean().item(),
        "alignment": gradient_alignment(model, images, problem.threat).nanmean().item(),
        "attack_gradient": norms.mean().item(),
        "free": exact.active(lower, model, step.solution).fraction_free(),
        "direct": direct.norm().item(),
        "ratio": (implicit.norm() / direct.norm()).item(),
        "cosine": cosine(direct, implicit),
        "cosine_through": cosine(implicit, flat(through.implicit)),
        "ratio_through": (flat(through.implicit).norm() / direct.norm()).item(),
        "true_direct": cosine(direct, true),
        "true_implicit": cosine(implicit, true),
        "true_whole": cosine(whole, true),
    }


def signal(problem: ba.BilevelProblem, model: nn.Module, images: Images, size: int, count: int = 8) -> dict[str, float]:
    """‖mean‖² over the mean of ‖·‖², over batches and draws, of each term: 1 without variance, 1/count for noise."""
    terms: dict[str, list[Tensor]] = {"direct": [], "implicit": [], "whole": []}
    for number in range(count):
        batch = batch_of(images.sample(size, seed=1 + number))
        step = HessianFreeKKT().hypergradient(problem, model, batch, generator=generator(number))
        for name, gradients in (("direct", step.direct), ("implicit", step.implicit), ("whole", step.grads)):
            terms[name].append(flat(gradients).double())
    means = {name: torch.stack(of).mean(0) for name, of in terms.items()}
    shares = {
        name: (means[name].square().sum() / torch.stack(of).square().sum(1).mean().clamp(min=1e-300)).item()
        for name, of in terms.items()
    }
    return shares | {"ratio_of_means": (means["implicit"].norm() / means["direct"].norm()).item()}


def least_curvature(problem: ba.BilevelProblem, model: nn.Module, images: Images) -> list[float]:
    """The least eigenvalue of ∇²ℓ_atk at δ*, in all coordinates, of each image."""
    batch, lower = batch_of(images), problem.lower
    delta = lower.solve(model, batch, generator=generator()).delta
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(d: Tensor, x: Tensor, y: Tensor) -> Tensor:
        output = torch.func.functional_call(model, parameters, ((x + d)[None],))
        return -torch.nn.functional.cross_entropy(output, y[None])

    matrices = torch.func.vmap(torch.func.hessian(loss))(delta, batch.x, batch.y)
    d = delta[0].numel()
    return torch.linalg.eigvalsh(matrices.detach().reshape(-1, d, d).double())[:, 0].tolist()


def decreases(
    problem: ba.BilevelProblem, model: nn.Module, own: Images, other: Images, lengths: Sequence[float] = LENGTHS
) -> dict[str, dict[str, float | list[float]]]:
    """F(θ) − F(θ − t u) in float64 for u = h, the exact hypergradient of ``own``, and for u = d, its direct term.

    Returns, by direction: ``slope``, the decrease that the hypergradient predicts for t = 1, ⟨h, u⟩; ``norm`` of u;
    and a list over t of the decrease of F on ``own`` with z held (``own``), with z taken anew from the same start
    (``anew``), and likewise on other images (``other``).
    """
    model, problem = copy.deepcopy(model).double(), copy.deepcopy(problem)
    batches = [ba.Batch(images.pixels().double(), images.y) for images in (own, other)]
    step = HessianFreeKKT().hypergradient(problem, model, batches[0], generator=generator())
    whole = flat(step.grads)
    before = nn.utils.parameters_to_vector(model.parameters()).detach()

    def objective(which: int, anchor: Tensor | None) -> float:
        solution = problem.lower.solve(model, batches[which], anchor, generator=generator())
        with torch.no_grad():
            return ba.cross_entropy(model, batches[which], solution.delta).mean().item()

    looks = {"own": (0, step.solution.anchor), "anew": (0, None), "other": (1, None)}
    base = {name: objective(*where) for name, where in looks.items()}
    found: dict[str, dict[str, float | list[float]]] = {}
    for name, u in (("h", whole), ("d", flat(step.direct))):
        series: dict[str, list[float]] = {name: [] for name in looks}
        for t in lengths:
            nn.utils.vector_to_parameters(before - t * u, model.parameters())
            for of, where in looks.items():
                series[of].append(base[of] - objective(*where))
        nn.utils.vector_to_parameters(before, model.parameters())
        found[name] = {"slope": (whole @ u).item(), "norm": u.norm().item(), **series}
    return found


def segment(
    problem: ba.BilevelProblem, before: nn.Module, after: nn.Module, images: Images, count: int = 64
) -> dict[str, float]:
    """How F changes on the straight line from ``before`` to ``after``, and what its derivative says of that.

    The integral of the derivative is by the midpoint rule at ``count`` points. It is that of :class:`Through`, which
    leaves out nothing but kinks, so the rest of the change are jumps: F is not continuous where a unit's kink passes z.

    Returns:
        ``change``, F after less F before; ``integral`` of the derivative; ``direct`` and ``implicit``, its two parts.
    """
    model, batch = copy.deepcopy(before), batch_of(images)
    first, last = (nn.utils.parameters_to_vector(of.parameters()).detach() for of in (before, after))
    change = last - first
    parts = {"direct": 0.0, "implicit": 0.0}
    for k in range(count):
        nn.utils.vector_to_parameters(first + (k + 0.5) / count * change, model.parameters())
        step = Through().hypergradient(problem, model, batch, generator=generator())
        for name, gradients in (("direct", step.direct), ("implicit", step.implicit)):
            parts[name] += (flat(gradients) @ change).item() / count
    ends = [ZeroIG().hypergradient(problem, of, batch, generator=generator()).loss.item() for of in (before, after)]
    return {"change": ends[1] - ends[0], "integral": sum(parts.values()), **parts}


def valid_length(predicted: float, decrease: Sequence[float], lengths: Sequence[float] = LENGTHS) -> float | None:
    """The largest t up to which the decrease is at least half of t · ``predicted``; None where the first is not."""
    valid = None
    for t, actual in zip(lengths, decrease, strict=True):
        if actual < t * predicted / 2:
            break
        valid = t
    return valid


def with_start(problem: ba.BilevelProblem) -> ba.BilevelProblem:
    """The same problem, whose anchor says where it began."""
    lower = problem.lower
    anchor = lower.anchor
    if isinstance(anchor, ba.Steps):
        own = FromStart(anchor.start, anchor.direction, anchor.step, anchor.count)
    else:
        own = FromStart(anchor, "taylor", lower.step, 0)
    return ba.BilevelProblem(problem.upper, replace(lower, anchor=own))
