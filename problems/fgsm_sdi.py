"""FGSM-SDI (Jia et al., 2022): a second network, trained with the first, says where the attack begins.

    s = sign ∇_x ℓ(x),   z = G_φ(x, s) in ±ε,   δ* = clip(z + step · sign ∇_δ ℓ(x + z), −ε, ε)       (no input range)
    θ ← SGD on mean_i ℓ(θ, δ*_i);    φ ← Adam, up mean_i ℓ(θ, δ*_i(φ)), before every 20th batch's own attack

φ is reached through z and the clip to ±ε; the sign is constant. ℓ has targets of 0.5 on the label, the rest shared by
the other classes. The generator is a part of the attacker: the anchor keeps its weights and its optimiser's state; the
solver's ``backward`` lets it learn, and under another solver it stays as it was drawn. It is in eval mode in an attack
and in train mode where it learns; the network is in train mode throughout, so that its running statistics follow all of
these passes, 3 of a batch and 5 of one in which G learns.

Published settings (the authors' code): step ε, Adam with rate 0.001, 110 epochs of batch 128, rate 0.1 divided by 10
after epochs 100 and 105, weight decay 5e-4, momentum 0.9. G has 79,173 weights for three channels (and there one more,
which nothing uses): 2C → 64 channels by a convolution with batch normalisation and ReLU, a residual block of two, and a
convolution to C. The code clips step · sign to ±ε as well, which changes nothing at this step. x + δ may leave [0, 1];
the network is to withstand, and is evaluated in, the ball within that range.

Figures: ATAS' Table I (ResNet-18, 30 epochs): 78.15 clean, PGD-50 47.52, AutoAttack 42.04 at 8/255; 20.27 at 16/255.

When to use it: to study starts that a network learns. There is a second network to train, and training images leave the
input range.
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import bilevel_at as ba
from bilevel_at import shares
from bilevel_at.errors import at_least, positive, whole_number
from bilevel_at.policy import Number, checked, number
from bilevel_at.runs.recipe import CIFAR, DIGITS, Recipe
from bilevel_at.steps import step_policy

WIDTH = 64


class Residual(nn.Module):
    """h + conv(prelu(bn(conv(prelu(bn(h)))))), with batch normalisation without weights."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(2):
            conv = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
            nn.init.xavier_uniform_(conv.weight, math.sqrt(2))
            layers += [nn.BatchNorm2d(WIDTH, affine=False), nn.PReLU(), conv]
        self.layers = nn.Sequential(*layers)

    def forward(self, h: Tensor) -> Tensor:
        out: Tensor = h + self.layers(h)
        return out


def generator_network(channels: int, seed: int = 0) -> nn.Sequential:
    """G before its ε·tanh: ``[B, 2C, H, W] -> [B, C, H, W]``. Torch's global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = nn.Sequential(
            nn.Conv2d(2 * channels, WIDTH, 3, padding=1, bias=False),
            nn.BatchNorm2d(WIDTH, eps=1e-3),
            nn.ReLU(),
            Residual(),
            nn.BatchNorm2d(WIDTH, affine=False),
            nn.Conv2d(WIDTH, channels, 3, padding=1),
        )
    ba.distributed.synchronise(network)  # several processes have one generator
    return network


class Generated(ba.Anchor):
    """z = radius · tanh G_φ(x, sign ∇_x ℓ(x)), by a network made for the first batch, which learns in :meth:`learn`.

    Args:
        radius: ε, a number or a schedule.
        lr: Adam's rate.
        seed: of the first weights.

    Raises:
        InputError: where ``lr`` is not positive or ``seed`` no whole number; from a draw, where inputs are no images or
            have other channels than those the network was made for; from ``load_state_dict``, for other weights.
    """

    def __init__(self, radius: Number, lr: float = 1e-3, seed: int = 0) -> None:
        self.radius = checked(at_least, "radius", radius)
        self.lr, self.seed = positive("lr", lr), whole_number("seed", seed, 0)
        self.network: nn.Module | None = None
        self.adam: dict[str, Any] = {}

    def draw(
        self, lower: Any, model: nn.Module, batch: ba.Batch, generator: torch.Generator | None
    ) -> tuple[Tensor, None]:
        """z by G in eval mode; the batch may bring the signs as ``clean_sign``."""
        sign = batch.more.get("clean_sign")
        if sign is None:
            sign = clean_sign(lower, model, batch)
        network = self._network(batch.x)
        with torch.no_grad(), ba.attack_mode(network, "eval"):
            return self.start(network, batch.x, sign), None

    def start(self, network: nn.Module, x: Tensor, sign: Tensor) -> Tensor:
        """radius · tanh G(x, sign), with its graph in φ."""
        out: Tensor = network(torch.cat([x, sign], 1)).tanh()
        return number(self.radius) * out.to(x.dtype)  # G's output is bfloat16 under autocast

    def learn(
        self,
        lower: ba.Linearized,
        upper: ba.UpperProblem,
        model: nn.Module,
        batch: ba.Batch,
        sign: Tensor,
        generator: torch.Generator | None = None,
    ) -> None:
        """One step of Adam up the mean upper loss at δ*(φ); moves the network's running statistics by two passes."""
        network = copy.deepcopy(self._network(batch.x))
        optimizer = torch.optim.Adam(network.parameters(), lr=self.lr)
        if self.adam:
            optimizer.load_state_dict(self.adam)
        with torch.enable_grad(), ba.attack_mode(network, "train"):
            z = self.start(network, batch.x, sign)
            with ba.attack_mode(model, lower.mode):
                solution = lower.solve_at(model, batch, z.detach(), False)
                # δ* = P_C(z + step · sign), where the gradient's sign is constant in φ.
                gradient = solution.attack_gradient
                assert gradient is not None
                step = step_policy(lower.step).size(batch, gradient)
                delta = lower.constraint.project(z - step * gradient.sign(), batch.x)
            seen = upper.prepare(model, batch, generator)
            loss = shares.mean(upper.loss_at(model, seen, replace(solution, delta=delta), generator))
            gradients = [shares.total(g) for g in torch.autograd.grad(-loss, list(network.parameters()))]
        for parameter, gradient in zip(network.parameters(), gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        optimizer.zero_grad()
        self.network, self.adam = network, optimizer.state_dict()

    def _network(self, x: Tensor) -> nn.Module:
        """The network, or a new one, of the device and type of ``x``."""
        if x.ndim != 4:
            raise ba.InputError(f"x has shape {tuple(x.shape)}; the generator's inputs are images [B, C, H, W]")
        network = generator_network(x.shape[1], self.seed) if self.network is None else self.network
        channels = _channels(network)
        if channels != x.shape[1]:
            raise ba.InputError(f"the generator is for images of {channels} channels; these have {x.shape[1]}")
        weight = network.get_parameter("0.weight")
        if (weight.device, weight.dtype) == (x.device, x.dtype):
            return network
        return copy.deepcopy(network).to(x.device, x.dtype)  # .to changes a network itself

    def state_dict(self) -> dict[str, Any]:
        return {} if self.network is None else {"network": dict(self.network.state_dict()), "adam": self.adam}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        weights = state["network"]
        try:
            network = generator_network(weights["0.weight"].shape[1] // 2)
            network.to(weights["0.weight"]).load_state_dict(OrderedDict(weights))
        except (KeyError, RuntimeError, AttributeError, IndexError):
            raise ba.InputError("the generator's state is not of fgsm_sdi.py's network") from None
        self.network, self.adam = network, copy.deepcopy(state["adam"])


def _channels(network: nn.Module) -> int:
    return int(network.get_parameter("0.weight").shape[1]) // 2


def clean_sign(lower: Any, model: nn.Module, batch: ba.Batch) -> Tensor:
    """sign ∇_x ℓ(x), where the attack loss is −ℓ; in the mode that the network is in."""
    gradient, _ = ba.input_gradient(lower.attack_loss, model, batch, torch.zeros_like(batch.x))
    return -gradient.sign()


class SDI(ba.Solver):
    """w = 0; ``backward`` lets the generator learn before each ``every``-th batch of an epoch, the first too."""

    implicit = False

    def __init__(self, every: int = 20) -> None:
        self.every, self.counter = whole_number("every", every, 1), ba.Counter()

    def adjoint(self, problem: ba.BilevelProblem, model: nn.Module, solution: ba.Solution, v: Tensor) -> Tensor:
        """w = 0, shaped like v."""
        return torch.zeros_like(v)

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
        """As of every solver; where the generator learns, the pass at x serves that and the attack.

        Raises:
            InputError: where the lower problem is not sign-linearised around a :class:`Generated` anchor.
            Exception: what ``hypergradient`` raises; the generator is then as it was.
        """
        lower = problem.lower
        if not isinstance(lower, ba.Linearized) or not isinstance(lower.anchor, Generated):
            raise ba.InputError(f"SDI trains the generator of fgsm_sdi.py; {lower!r:.60} has none")
        if self.counter.count % self.every:
            return super().backward(problem, model, batch, generator, weight=weight, scaler=scaler)
        with _restored(lower.anchor):
            with ba.attack_mode(model, lower.mode):
                sign = clean_sign(lower, model, batch)
            lower.anchor.learn(lower, problem.upper, model, batch, sign, generator)
            marked = batch.replace(clean_sign=sign)
            return super().backward(problem, model, marked, generator, weight=weight, scaler=scaler)


@contextmanager
def _restored(anchor: Generated) -> Iterator[None]:
    """Where this is left by an exception, the generator is as it was."""
    before = anchor.network, anchor.adam
    try:
        yield
    except BaseException:
        anchor.network, anchor.adam = before
        raise


def problem(
    epsilon: float = 8 / 255,
    step: float | None = None,
    generator_lr: float = 1e-3,
    generator_seed: int = 0,
    label_smoothing: float = 0.5,
) -> ba.BilevelProblem:
    """One sign step from the start that the generator proposes, in an ℓ∞ ball without an input range.

    Args:
        epsilon: radius ε of the ball.
        step: length of the sign step, ε if not given.
        generator_lr: rate of the generator's optimiser.
        generator_seed: seed of the generator's first weights.
        label_smoothing: the share of a label that the other classes share, in the attack and in training.
    """
    loss = ba.CrossEntropy(label_smoothing, over="others")
    ball = ba.LinfBall(epsilon, bounds=None)
    anchor = Generated(epsilon, generator_lr, generator_seed)
    step = epsilon if step is None else step
    lower = ba.Linearized(ba.minus(loss), ball, anchor, "sign", step, "train")
    return ba.BilevelProblem(ba.UpperProblem(loss), lower, ba.LinfBall(epsilon))


def solver(every: int = 20) -> SDI:
    """The attack is a constant, and the generator has its lessons.

    Args:
        every: the generator learns before every so many batches.
    """
    return SDI(every)


def recipe() -> dict[str, Recipe]:
    cifar = replace(CIFAR, epochs=110, lr=0.1, peak_momentum=None, schedule="multistep", milestones=(100, 105))
    return {"digits": DIGITS, "cifar10": cifar}
