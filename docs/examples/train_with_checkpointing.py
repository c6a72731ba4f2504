"""Gradient checkpointing under a hypergradient: ``python docs/examples/train_with_checkpointing.py``

Reentrant checkpointing refuses torch.autograd.grad, and so solvers refuse it; the other kind gives the same gradients.
"""

import copy

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint_sequential

import bilevel_at as ba
from bilevel_at.models import build_model
from bilevel_at.solvers import HessianFreeKKT


class Checkpointed(nn.Module):
    def __init__(self, network, use_reentrant=False):
        super().__init__()
        self.network, self.use_reentrant = network, use_reentrant

    def forward(self, x):
        return checkpoint_sequential(self.network, 3, x, use_reentrant=self.use_reentrant)


torch.manual_seed(0)
batch = ba.Batch(torch.rand(8, 1, 8, 8).double(), torch.arange(8))
plain = build_model("small_cnn", (1, 8, 8), 10, activation="softplus").double().network
less_memory = Checkpointed(copy.deepcopy(plain))
lower = ba.Linearized(ba.minus(ba.cross_entropy), ba.LinfBall(0.1), anchor="zero", direction="taylor", step=1.0)
problem, solver = ba.BilevelProblem(ba.UpperProblem(), lower), HessianFreeKKT()
for model in (plain, less_memory):
    step = solver.backward(problem, model, batch)

pairs = zip(plain.parameters(), less_memory.parameters(), strict=True)
gap = max((a.grad - b.grad).abs().max().item() for a, b in pairs)
try:
    solver.backward(problem, Checkpointed(plain, use_reentrant=True), batch)
except ba.InputError as error:
    refusal = str(error)
print(f"gradients differ by {gap:.0e} at most, {step.implicit_norm:.1e} is of the implicit term; {refusal}")
