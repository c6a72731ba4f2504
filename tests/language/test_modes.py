"""Attack passes run in the lower problem's mode, and every module's flag is restored."""

from __future__ import annotations

import pytest
import torch
from networks import ATK, SOLVERS, batch_of, dense, taylor, with_batch_norm
from torch import nn

import bilevel_at as ba
from bilevel_at.modes import full_precision, same_buffers
from bilevel_at.problems import fastat
from bilevel_at.solvers import ZeroIG


class Watching(nn.Module):
    """Notes the mode of every forward pass."""

    def __init__(self):
        super().__init__()
        self.inner, self.modes = dense(6, 5, 3), []

    def forward(self, x):
        self.modes.append(self.training)
        return self.inner(x)


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_attack_passes_see_the_mode_of_the_problem(solver, mode):
    for outer in (True, False):
        model = Watching().train(outer)
        solver.hypergradient(taylor(mode=mode, step=0.005), model, batch_of(3, 6))
        assert model.training is outer
        assert model.modes[0] is (mode == "train") and model.modes[1] is outer
        assert all(m is (mode == "train") for m in model.modes[2:])  # the Hessian's passes


def test_modes_are_restored_module_by_module_whatever_happens():
    model = with_batch_norm().train()
    model[2].eval()  # a frozen layer, as in fine-tuning
    before = [m.training for m in model.modules()]

    def explodes(model, batch, delta):
        raise RuntimeError("boom")

    for loss in (ATK, explodes):
        problem = ba.BilevelProblem(ba.UpperProblem(), ba.Linearized(loss, ba.LinfBall(0.1), mode="eval"))
        try:
            ZeroIG().hypergradient(problem, model, batch_of(3, 6))
        except RuntimeError as error:
            assert "boom" in str(error)
        assert [m.training for m in model.modules()] == before


def test_eval_mode_attacks_leave_batch_statistics_alone():
    for mode, moves in (("eval", 1), ("train", 2)):
        model = with_batch_norm().train()
        ZeroIG().hypergradient(fastat.problem(mode=mode), model, batch_of(6, 6))
        assert model[2].num_batches_tracked == moves  # the upper pass, and the attack's only in train mode


class Counted(nn.Module):
    """A network that puts new tensors in its buffers' places."""

    def __init__(self):
        super().__init__()
        self.inner = dense(6, 5, 3)
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x):
        self.passes = self.passes + 1
        return self.inner(x)


def test_buffers_have_their_values_again_also_where_a_pass_replaces_them():
    model = Counted()
    before = model.passes
    with same_buffers(model):
        model(batch_of(3, 6).x)
        assert model.passes == 1
    assert model.passes is before and model.passes == 0


def test_full_precision_is_full_under_autocast():
    a = torch.rand(4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (a @ a).dtype == torch.bfloat16
        with full_precision(a.device):
            assert (a @ a).dtype == torch.float32
        assert (a @ a).dtype == torch.bfloat16
