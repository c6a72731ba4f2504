"""Attack passes run in the lower problem's mode, and every module's flag is restored."""

from __future__ import annotations

import pytest
from networks import ATK, SOLVERS, batch_of, dense, taylor, with_batch_norm
from torch import nn

import bilevel_at as ba
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
