"""Sub-AT (Li et al., 2022): Fast-AT, once to find a subspace of the weights and once more within it.

    sampling:   Fast-AT from θ₀, with snapshots θ₀, θ₁, …, θ_S of all weights
    basis:      P, the first n principal components of the centred snapshots, n × |θ|, orthonormal
    training:   from θ₀ again,  g = ∇ mean_i ℓ_CE(θ, δ*_i),   θ ← SGD on PᵀP g,   so that θ stays in θ₀ + span P
    δ* = P_C(z + 1.25 ε · sign ∇_δ ℓ_CE(θ, z)),   z uniform in the cube, then clipped to the input range

A solver that wraps another one: its ``backward`` takes the snapshots, and, as training begins, puts the network back at
θ₀, running statistics included (the one change of weights by a solver); ``hypergradient`` projects. Both phases are one
run here: the first ``--sampling`` of its epochs, and the rest. A run of one epoch only samples.

Published settings (the authors' code): 65 epochs of sampling at ε = 8/255, with a snapshot after step 200 and at the
end of each, n = 80, then 40 epochs with ε and the step doubled (``--widen``), rate 1, momentum 0.9 and no weight decay;
the model in train mode throughout. The optimiser is one here: the rate is 0.1 throughout, and the projected gradient is
multiplied by 10 (``--gain``), which makes it 1; there is no weight decay in sampling either (5e-4 as published), since
that would take θ out of the subspace; and the momentum of the last sampling steps moves θ after θ₀ is restored.
Checkpoints have the snapshots or the basis in them: n |θ| floats, 3.6 GB for 80 × 11.2 M.

On the digits ε is the same in both phases, and the rate of training is 0.2: at 1, without batch normalisation, one run
of three learnt nothing.

Figures: ATAS' Table I (ResNet-18, 30 epochs, 8/255): 77.43 clean, PGD-50 45.03, AutoAttack 41.49; 14.48 at 16/255.
Whether these runs had the 65 epochs of sampling is not known.

When to use it: to hold one-step training in a small subspace of the weights. It needs a sampling run and memory for the
snapshots, and on the digits one run of five fell to chance.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import bilevel_at as ba
from bilevel_at.errors import positive, whole_number
from bilevel_at.policy import Number, number
from bilevel_at.runs.recipe import CIFAR, DIGITS, IMAGENET, Recipe
from bilevel_at.solvers import ZeroIG


def sampling_epochs(share: float, epochs: int) -> int:
    """How many of the epochs sample: the nearest whole number, and one at least."""
    return max(1, round(share * epochs))


def check_share(share: float) -> float:
    """``share``, where it is above 0 and at most 1."""
    if positive("sampling", share) > 1:
        raise ba.InputError(f"sampling is {share:g}; it must be a share of the epochs, above 0 and at most 1")
    return share


class Widened(ba.Schedule):
    """A radius, and ``factor`` times it once sampling is over."""

    def __init__(self, radius: Number, factor: float, sampling: float) -> None:
        super().__init__(self._at)
        self.radius, self.factor, self.sampling = radius, positive("widen", factor), sampling

    def _at(self, epoch: int, epochs: int) -> float:
        later = epoch >= sampling_epochs(self.sampling, epochs)
        return number(self.radius) * (self.factor if later else 1.0)


def principal_components(rows: Tensor, count: int) -> Tensor:
    """The first ``count`` principal components of the rows, centred: ``[≤ count, d]``, orthonormal.

    Fewer where the centred rows have a smaller rank. What centring rounds is relative to the rows themselves, and no
    component: projected on one, a gradient would go where no snapshot is.
    """
    centred = rows - rows.mean(0)
    _, sizes, components = torch.linalg.svd(centred, full_matrices=False)
    largest = torch.maximum(sizes[0], rows.norm(dim=1).max())
    rank = int((sizes > 4 * len(rows) * torch.finfo(rows.dtype).eps * largest).sum())
    return components[: min(count, rank)].clone()  # not a view of all of them, which a checkpoint would store


class Subspace(ba.Solver):
    """Another solver's hypergradient g: as it is while weights are sampled, then gain · PᵀP g (Li et al., 2022).

    Args:
        inner: the solver.
        components: n, the number of principal components, at least 1.
        sampling: the share of the epochs that sample, above 0 and at most 1; the nearest whole number, at least one.
        every: a snapshot is taken as an epoch begins and after every so many of its steps, at least 1.
        gain: what the projected gradient is multiplied by.

    Raises:
        InputError: for values outside these ranges; from ``backward``, where training begins without snapshots, and
            where they are of another network.
    """

    def __init__(
        self,
        inner: ba.Solver | None = None,
        components: int = 80,
        sampling: float = 65 / 105,
        every: int = 200,
        gain: float = 10.0,
    ) -> None:
        self.inner = ZeroIG() if inner is None else inner
        self.components, self.every = whole_number("components", components, 1), whole_number("every", every, 1)
        self.sampling, self.gain = check_share(sampling), positive("gain", gain)
        self.epoch, self.epochs, self.count = 0, 1, 0
        self.start: dict[str, Tensor] = {}
        self.snapshots: list[Tensor] = []
        self.basis: Tensor | None = None

    @property
    def samples(self) -> bool:
        """Whether this epoch samples."""
        return self.epoch < sampling_epochs(self.sampling, self.epochs)

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
        """The inner solver's, both terms projected where there is a basis."""
        step = self.inner.hypergradient(problem, model, batch, anchor, generator, scale=scale)
        if self.basis is None:
            return step
        return replace(step, direct=self._projected(step.direct, model), implicit=self._projected(step.implicit, model))

    def _projected(self, gradients: Mapping[str, Tensor | None], model: nn.Module) -> dict[str, Tensor | None]:
        if all(gradient is None for gradient in gradients.values()) or self.basis is None:
            return dict(gradients)
        named = _trained(model)
        parts = [gradients.get(name) for name in named]
        pairs = zip(parts, named.values(), strict=True)
        flat = torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten() for g, p in pairs])
        if self.basis.shape[1] != len(flat):
            raise ba.InputError(f"the subspace is of {self.basis.shape[1]} weights; this network has {len(flat)}")
        basis = self.basis.to(flat)
        within = self.gain * (basis.T @ (basis @ flat))
        sizes = [p.numel() for p in named.values()]
        split = zip(named.items(), within.split(sizes), strict=True)
        return {name: part.reshape(p.shape) for (name, p), part in split}

    def backward(
        self,
        problem: ba.BilevelProblem,
        model: nn.Module,
        batch: ba.Batch,
        generator: torch.Generator | None = None,
        *,
        weight: float = 1.0,
        scaler: torch.amp.GradScaler | None = None,
    ) -> ba.Hypergradient:
        """As of every solver; takes a snapshot where one is due, and puts the network back at θ₀ as training begins.

        Raises:
            Exception: what ``hypergradient`` raises; the network and what is remembered are then as they were.
        """
        before = self.start, self.snapshots, self.basis
        restored: dict[str, Tensor] = {}
        try:
            if self.basis is None and not self.samples:
                restored = _copies(model)
                self._begin_training(model)
            elif self.samples and self.count % self.every == 0:
                self.start = self.start or _copies(model)
                self.snapshots = [*self.snapshots, _flat(model)]
            return super().backward(problem, model, batch, generator, weight=weight, scaler=scaler)
        except BaseException:
            self.start, self.snapshots, self.basis = before
            if restored:
                model.load_state_dict(restored)
            raise

    def _begin_training(self, model: nn.Module) -> None:
        if not self.snapshots:
            raise ba.InputError("Sub-AT trains in the subspace of its snapshots; there are none of the epochs before")
        last = _flat(model)
        if len(last) != len(self.snapshots[0]):
            raise ba.InputError(f"the snapshots are of {len(self.snapshots[0])} weights; this network has {len(last)}")
        basis = principal_components(torch.stack([s.to(last) for s in [*self.snapshots, last]]), self.components)
        self.basis, self.snapshots = basis.to(next(model.parameters()).device), []
        model.load_state_dict(self.start)

    def observe(self, step: ba.Hypergradient) -> None:
        self.count += 1

    def set_epoch(self, epoch: int, epochs: int) -> None:
        self.epoch, self.epochs, self.count = epoch, epochs, 0

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "start": self.start, "snapshots": self.snapshots, "basis": self.basis}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count, self.start = state["count"], {name: t.clone() for name, t in state["start"].items()}
        self.snapshots = [snapshot.clone().cpu() for snapshot in state["snapshots"]]
        self.basis = None if state["basis"] is None else state["basis"].clone()


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _flat(model: nn.Module) -> Tensor:
    """The weights that are trained, as one vector, on the CPU."""
    return torch.cat([p.detach().flatten().cpu() for p in _trained(model).values()])


def _copies(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def problem(
    epsilon: float = 8 / 255,
    step: float | None = None,
    widen: float = 2.0,
    sampling: float = 65 / 105,
    every: int = 200,
    gain: float = 10.0,
    label_smoothing: float = 0.0,
) -> ba.BilevelProblem:
    """One sign step from a uniform draw in an ℓ∞ ball, which is larger once weights have been sampled.

    Args:
        epsilon: radius ε of the ball.
        step: length of the sign step, 1.25 times the radius if not given.
        widen: what the radius of training is multiplied by after sampling.
        sampling: the share of the epochs that sample.
        every: for the solver: a snapshot is taken as an epoch begins and after every so many of its steps.
        gain: for the solver: what the projected gradient is multiplied by.
        label_smoothing: share of the label that is spread over all classes, for both players.
    """
    whole_number("every", every, 1)
    positive("gain", gain)
    radius = Widened(epsilon, widen, check_share(sampling))
    loss, length = ba.CrossEntropy(label_smoothing), 1.25 * radius if step is None else step
    lower = ba.Linearized(ba.minus(loss), ba.LinfBall(radius), ba.Uniform(radius), "sign", length, "train")
    return ba.BilevelProblem(ba.UpperProblem(loss), lower, ba.LinfBall(epsilon))


def solver(components: int = 80, sampling: float = 65 / 105, every: int = 200, gain: float = 10.0) -> Subspace:
    """ZeroIG, within the subspace once that is known.

    Args:
        components: n, the number of principal components.
        sampling: the share of the epochs that sample.
        every: a snapshot is taken as an epoch begins and after every so many of its steps.
        gain: what the projected gradient is multiplied by.
    """
    return Subspace(ZeroIG(), components, sampling, every, gain)


def recipe() -> dict[str, Recipe]:
    # An average would cross the return to θ₀, and a decay leave the subspace, in --recipe modern too.
    own: dict[str, Any] = {
        "lr": 0.1,
        "schedule": "constant",
        "momentum": 0.9,
        "peak_momentum": None,
        "weight_decay": 0.0,
    }
    recipes = {
        "digits": DIGITS.playing(widen=1.0, sampling=0.4, every=5, gain=2.0),
        "cifar10": replace(CIFAR, epochs=105),
        "imagenet": IMAGENET,
    }
    return {data: replace(recipe, **own, modern={**own, "ema": 0.0}) for data, recipe in recipes.items()}
