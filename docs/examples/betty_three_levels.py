"""Class weights learnt on clean held-out digits, above adversarial training, above the attacker: three levels in Betty.

    min_w  Σ ℓ_CE(θ*(w)) over held-out digits, unperturbed
    θ*(w) = argmin_θ mean_i w_{y_i} ℓ_CE(θ, δ*_i(θ)) over training digits, of which classes 5 to 9 have lost nine in ten
    δ*(θ) = Fast-BAT's linearised attacker in an ℓ∞ ball of 0.1

Betty has the upper two; the level in the middle is ``bilevel_at.interop.betty.Level``, whose gradient is Fast-BAT's
hypergradient, δ* included. Betty's ``darts`` differentiates that level; its ``cg`` is wrong in 0.2.1 (docs/betty.md).

    python docs/examples/betty_three_levels.py [--momentum 0.9] [--seed 1]
"""

from __future__ import annotations

import argparse
import logging

import torch
from betty.configs import Config, EngineConfig
from betty.engine import Engine
from betty.problems import ImplicitProblem
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import bilevel_at as ba
from bilevel_at.interop.betty import Level
from bilevel_at.solvers import HessianFreeKKT

RARE = range(5, 10)


class ClassWeights(nn.Module):
    """w = 10 softmax(s): positive, one on average."""

    def __init__(self):
        super().__init__()
        self.scores = nn.Parameter(torch.zeros(10))

    def forward(self, labels):
        return 10 * self.scores.softmax(0)[labels]


class HeldOut(ImplicitProblem):
    """The level above: the loss on clean held-out digits, as a function of the class weights."""

    def training_step(self, batch):
        x, y = batch
        return cross_entropy(self.robust(x), y)


def weighted(model, batch, delta):
    """f, per sample. The level's network has the module of the level above under that level's name."""
    return model.held_out(batch.y) * ba.cross_entropy(model, batch, delta)


def digits():
    """(training digits, without most of the rare classes; held-out; test)."""
    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x).float() / 16, torch.tensor(y)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, held, test = order[:1000], order[1000:1300], order[1300:]
    rare = torch.isin(y[train], torch.tensor(RARE))
    train = train[~rare | (torch.arange(len(train)) % 10 == 0)]
    return [TensorDataset(x[part], y[part]) for part in (train, held, test)]


def train(learn_weights, steps=600, momentum=0.0, seed=0):
    """Train with learnt weights, or with weights of 1; return what was reached."""
    torch.manual_seed(seed)
    sets = digits()
    network = nn.Sequential(nn.Linear(64, 64), nn.Softplus(), nn.Linear(64, 10))
    weights = ClassWeights()

    attacker = ba.Linearized(ba.minus(ba.cross_entropy), ba.LinfBall(0.1), "gradient-step", "taylor", step=1.0)
    robust = Level(
        "robust",
        ba.BilevelProblem(ba.UpperProblem(weighted), attacker),
        HessianFreeKKT(),
        Config(type="darts", unroll_steps=2),
        network,
        torch.optim.SGD(network.parameters(), lr=0.2, momentum=momentum),
        train_data_loader=DataLoader(sets[0], 64, shuffle=True),
        above=["held_out"],
    )
    held_out = HeldOut(
        "held_out",
        Config(retain_graph=True),
        weights,
        torch.optim.Adam(weights.parameters(), lr=0.02 if learn_weights else 0.0),
        train_data_loader=DataLoader(sets[1], 100, shuffle=True),
    )
    dependencies = {"u2l": {held_out: [robust]}, "l2u": {robust: [held_out]}}
    Engine([robust, held_out], EngineConfig(train_iters=steps, strategy="cpu"), dependencies).run()

    found = {"weights": 10 * weights.scores.detach().softmax(0)}
    for name, data in (("held-out", sets[1]), ("test", sets[2])):
        x, y = data.tensors
        found[f"{name} loss"] = cross_entropy(network(x), y).item()
    batch = ba.Batch(x, y)
    pgd = ba.Linearized.pgd(ba.minus(ba.cross_entropy), ba.LinfBall(0.1), steps=20, step=0.02)
    delta = pgd.solve(network, batch, generator=torch.Generator().manual_seed(0)).delta
    rare = torch.isin(y, torch.tensor(RARE))
    for name, inputs in (("clean", x), ("PGD-20", x + delta)):
        right = (network(inputs).argmax(1) == y).float()
        found[name] = [right[~rare].mean().item(), right[rare].mean().item()]
    return found


def main():
    logging.disable(logging.INFO)  # Betty tells when an Engine begins and ends
    options = argparse.ArgumentParser(description="Class weights learnt above adversarial training, in Betty.")
    options.add_argument("--momentum", type=float, default=0.0, help="of the network's optimiser (default: 0)")
    options.add_argument("--seed", type=int, default=0, help="(default: 0)")
    given = options.parse_args()
    for learn in (False, True):
        found = train(learn, momentum=given.momentum, seed=given.seed)
        print("weights learnt" if learn else "weights of 1")
        print("  weights of classes 0 to 9   " + " ".join(f"{w:.2f}" for w in found["weights"]))
        for name in ("held-out loss", "test loss"):
            print(f"  {name:<28}{found[name]:.3f}")
        for name in ("clean", "PGD-20"):
            common, scarce = found[name]
            print(f"  test accuracy, {name:<13}{100 * common:.1f} % of classes 0 to 4, {100 * scarce:.1f} % of 5 to 9")


if __name__ == "__main__":
    main()
