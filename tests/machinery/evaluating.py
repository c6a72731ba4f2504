"""Small networks and images for the tests of evaluation: the embedded digits, trained for a second or two."""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import nn

from bilevel_at.data import load_data
from bilevel_at.evaluate import Attack
from bilevel_at.problems import fastat, minmax, standard
from bilevel_at.solvers import ZeroIG
from bilevel_at.train import DIGITS, Trainer

EPS = 0.2
TRAIN, TEST = load_data("digits")
FEW = TEST[slice(0, 40)]
QUIET = {"checks": 0}


def cnn():
    layers = [nn.Conv2d(1, 16, 3, padding=1, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(256, 64), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(64, 10))


def mlp(width=128):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))


def linear():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


PROBLEMS = {"minmax": minmax.problem(EPS, 5), "fastat": fastat.problem(EPS), "standard": standard.problem()}


@functools.cache
def trained(network, problem, epochs, seed=0):
    """That network (``cnn``, ``mlp``, ``linear``) after so many epochs, in eval mode; tests leave it as it is."""
    torch.manual_seed(seed)
    recipe = dataclasses.replace(DIGITS, epochs=epochs)
    trainer = Trainer(PROBLEMS[problem], ZeroIG(), network(), TRAIN, FEW, recipe, Attack("clean"), seed)
    list(trainer.epochs())
    return trainer.model.eval()


class Fixed:
    """A stage that moves images as it is told."""

    name = "fixed"

    def __init__(self, move):
        self.move = move

    def rows(self, classes):
        return 1

    def __call__(self, model, batch, generator):
        return self.move(batch.x)


def accuracy(model, x, y):
    with torch.no_grad():
        return (model(x).argmax(1) == y).float().mean().item()
