"""The axes of ``scaling.py`` that are sizes of a training step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from full_kkt import network
from scaling_measure import Advance, Axis, Run, measured
from torch import nn

import bilevel_at as ba
from bilevel_at.models.residual import small_resnet
from bilevel_at.models.small import small_cnn
from bilevel_at.runs.problem_file import ProblemFile
from bilevel_at.solvers import FullKKT, GaussNewtonKKT, HessianFreeKKT, ZeroIG

METHODS = {"standard": "standard", "Fast-AT": "fastat", "Fast-BAT": "fastbat"}


def step_of(problem: ba.BilevelProblem, solver: ba.Solver, model: nn.Module, batch: ba.Batch) -> Run:
    """A training step. Its rate is 0, so that every repeat meets the same weights."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        solver.backward(problem, model, batch, generator)
        optimizer.step()

    return step


def method_step(method: str, model: nn.Module, batch: ba.Batch, **arguments: Any) -> Run:
    """A training step of a problem file's method, with its defaults."""
    file = ProblemFile(method)
    solver = ZeroIG() if file.solver is None else file.solver()
    return step_of(file.problem(**arguments), solver, model, batch)


def examples(count: int, shape: Sequence[int], classes: int = 10) -> ba.Batch:
    """Noise with labels in turn."""
    return ba.Batch(torch.rand(count, *shape), torch.arange(count) % classes)


def _methods(cases: Sequence[tuple[nn.Module, ba.Batch]], methods: Mapping[str, str]) -> dict[str, list[Run]]:
    return {name: [method_step(method, *case) for case in cases] for name, method in methods.items()}


def _axis(name: str, title: str, label: str, about: str, points: Sequence[float], **more: Any) -> Axis:
    return Axis(name, title, label, about, list(points), reference="standard", counted="operations", **more)


def batch(points: Sequence[int], repeats: int, advance: Advance) -> Axis:
    """Examples in the batch."""
    model = small_resnet((3, 32, 32), 10).train()
    runs = _methods([(model, examples(size, (3, 32, 32))) for size in points], METHODS)
    about = "A training step of `small_resnet` on noise of 3×32×32."
    return _axis("batch", "Batch", "examples in the batch", about, points, lines=measured(runs, repeats, advance))


def size(points: Sequence[int], repeats: int, advance: Advance) -> Axis:
    """The side of the images."""
    cases = [(small_resnet((3, side, side), 10).train(), examples(32, (3, side, side))) for side in points]
    about = "A training step of `small_resnet` on 32 images of noise; work that is linear in pixels has exponent 2."
    lines = measured(_methods(cases, METHODS), repeats, advance)
    return _axis("size", "Image size", "side of the image (pixels)", about, points, lines=lines)


def width(points: Sequence[int], repeats: int, advance: Advance) -> Axis:
    """The channels of the network's first block."""
    data = examples(16, (3, 32, 32))
    cases = [(small_resnet((3, 32, 32), 10, width=channels).train(), data) for channels in points]
    about = (
        "A training step of `small_resnet` on 16 images of noise of 3×32×32; convolutions are quadratic in channels, "
        "all else is linear."
    )
    lines = measured(_methods(cases, METHODS), repeats, advance)
    return _axis("width", "Width", "channels of the first block", about, points, lines=lines)


def classes(points: Sequence[int], repeats: int, advance: Advance) -> Axis:
    """The classes that BETA aims at, all but the right one."""
    cases = [(small_cnn((1, 8, 8), aims + 1).train(), examples(16, (1, 8, 8), aims + 1)) for aims in points]
    names = {"standard": "standard", "PGD-10": "minmax", "BETA": "beta", "smooth BETA": "smooth_beta"}
    runs = {
        name: [method_step(method, *case, **({} if method == "standard" else {"steps": 10})) for case in cases]
        for name, method in names.items()
    }
    about = (
        "A training step of `small_cnn` on 16 images of noise of 1×8×8, attacks of 10 steps. BETA has a perturbation "
        "for every class but the right one, and trains on the best of them; smooth BETA trains on all."
    )
    lines = measured(runs, repeats, advance)
    return _axis("classes", "Classes", "classes aimed at, K − 1", about, points, lines=lines)


def dimension(points: Sequence[int], repeats: int, advance: Advance) -> Axis:
    """The values of an input, for solvers that use second derivatives."""
    solvers: dict[str, Callable[[], ba.Solver]] = {
        "HessianFreeKKT": HessianFreeKKT,
        "GaussNewtonKKT": lambda: GaussNewtonKKT(damping=3.0),
        "FullKKT, cg": lambda: FullKKT("cg", curvature="attack", damping=3.0),
        "FullKKT, dense": lambda: FullKKT("dense", curvature="attack", damping=3.0),
    }
    lower = ba.Linearized(ba.minus(ba.cross_entropy), ba.LinfBall(0.3, None), "zero", "taylor", 0.5)
    problem = ba.BilevelProblem(ba.UpperProblem(), lower)
    cases = [(network(d), examples(16, (d,))) for d in points]
    runs = {"standard": [method_step("standard", *case) for case in cases]}
    runs |= {name: [step_of(problem, solver(), *case) for case in cases] for name, solver in solvers.items()}
    about = (
        "A training step of Hessian-aware Fast-BAT (one step from 0) on 16 inputs of d values, a network of two hidden "
        "layers of 64 softplus units. Operations are those of matrix products; a Cholesky factorisation has none."
    )
    lines = measured(runs, repeats, advance)
    return _axis("d", "Dimension of the input", "values of an input, d", about, points, lines=lines)
