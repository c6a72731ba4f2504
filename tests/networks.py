"""Small networks, batches, views and problems of the tests."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import nn

import bilevel_at as ba
from bilevel_at.solvers import FullKKT, HessianFreeKKT, ZeroIG
from bilevel_at.testing import strategies as bst

F64 = torch.float64
ATK = ba.minus(ba.cross_entropy)
SOLVERS = [ZeroIG(), HessianFreeKKT(), FullKKT(), FullKKT(method="cg", curvature="attack", damping=200.0)]


def dense(*widths, activation=nn.Tanh):
    torch.manual_seed(0)
    layers = [nn.Flatten()]
    for a, b in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(a, b), activation()]
    return nn.Sequential(*layers[:-1]).double()


def with_batch_norm():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()


def batch_of(n, *shape, classes=3):
    g = torch.Generator().manual_seed(1)
    return ba.Batch(torch.rand((n, *shape), generator=g, dtype=F64), torch.arange(n) % classes)


def taylor(epsilon=0.3, step=1.0, **more):
    return ba.BilevelProblem(
        ba.UpperProblem(), ba.Linearized(ATK, ba.LinfBall(epsilon), "zero", "taylor", step, **more)
    )


def proximal(lam=20.0, epsilon=0.3, **more):
    return ba.BilevelProblem(ba.UpperProblem(), ba.Proximal(ATK, ba.LinfBall(epsilon), lam, "zero", tol=1e-12, **more))


def network(seed=0):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Tanh(), torch.nn.Flatten(), torch.nn.Linear(16, 3))
    return model.double(), torch.rand(5, 1, 4, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])


def small():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(6, 3))
    return model, ba.Batch(torch.rand(4, 6), torch.tensor([0, 1, 2, 0]), torch.tensor([7, 1, 5, 2]))


@st.composite
def views(draw, n, padding):
    g = torch.Generator().manual_seed(draw(bst.seeds))
    return ba.CropFlip.draw(n, padding, g, torch.device("cpu"))


class Quadratic(ba.LowerProblem):
    """Only an objective and a constraint: the base class solves it."""

    constraint = ba.LinfBall(0.2)

    def objective(self, model, batch, delta, anchor):
        out = model(batch.x + delta)
        return -out.gather(1, batch.y[:, None]).squeeze(1).tanh() + 15 * delta.flatten(1).square().sum(1)
