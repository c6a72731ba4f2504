"""A solver in a loop of one's own, beside the same training by hand: ``python docs/examples/train_in_a_loop.py``"""

import torch
from torch.nn import functional as F

import bilevel_at as ba
from bilevel_at.data import load_data
from bilevel_at.models import build_model
from bilevel_at.problems import fgsm
from bilevel_at.solvers import ZeroIG

EPSILON = 0.1
train, test = load_data("digits")
problem, solver = fgsm.problem(EPSILON), ZeroIG()


def by_solver(model, x, y):
    solver.backward(problem, model, ba.Batch(x, y))


def by_hand(model, x, y):
    z = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(z), y, reduction="sum"), z)
    F.cross_entropy(model((x + EPSILON * gradient.sign()).clamp(0, 1)), y).backward()


def trained(backward):
    torch.manual_seed(0)
    model = build_model("small_cnn", train.shape, train.classes, train).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(4):
        for rows in torch.randperm(len(train)).split(64):
            optimizer.zero_grad()
            backward(model, train.x[rows].double(), train.y[rows])
            optimizer.step()
    return model.eval()


ours, theirs = trained(by_solver), trained(by_hand)
accuracy = (ours(test.x.double()).argmax(1) == test.y).double().mean().item()
gap = max((a - b).abs().max().item() for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
print(f"clean accuracy {accuracy:.1%}; the weights differ from those of the loop by hand by {gap:.0e} at most")
