"""Lazy: unbiased, bit for bit the inner solver at p = 1, and cheap where the coin says no."""

from __future__ import annotations

import copy

import pytest
import torch
from networks import batch_of, dense, taylor
from torch.utils.flop_counter import FlopCounterMode

import bilevel_at as ba
from bilevel_at.draws import host_uniform
from bilevel_at.models import build_model
from bilevel_at.problems import fastbat, standard, subat
from bilevel_at.solvers import FullKKT, HessianFreeKKT, Lazy, ZeroIG


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def uniform():
    """A problem that draws."""
    problem = taylor(step=0.3)
    problem.lower.anchor = ba.Uniform()
    return problem


@pytest.mark.parametrize("inner", [HessianFreeKKT(ig_weight=0.5), FullKKT(curvature="attack", damping=9.0)])
def test_always_is_the_inner_solver_bit_for_bit(inner):
    models, generators = [dense(6, 5, 3), dense(6, 5, 3)], [seeded(1), seeded(1)]
    for _ in range(3):
        for model, solver, generator in zip(models, (inner, Lazy(inner, 1.0)), generators, strict=True):
            solver.backward(uniform(), model, batch_of(4, 6), generator)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 0.1 * parameter.grad
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(a, b) and torch.equal(a.grad, b.grad)
    assert torch.equal(generators[0].get_state(), generators[1].get_state())


def test_it_is_unbiased():
    """With the anchor fixed a step is the inner one with its term over p, or without: by frequency p, exactly."""
    model, batch, p = dense(6, 5, 3), batch_of(3, 6), 0.25
    z = torch.zeros_like(batch.x)
    inner = HessianFreeKKT().hypergradient(taylor(step=0.3), model, batch, anchor=z)
    assert inner.implicit_norm > 0.01 * inner.direct_norm
    solver, generator, counts = Lazy(HessianFreeKKT(), p), seeded(0), [0, 0]
    for _ in range(400):
        step = solver.hypergradient(taylor(step=0.3), model, batch, anchor=z, generator=generator)
        counts[bool(step.implicit)] += 1
        for name, g in inner.direct.items():
            assert torch.equal(step.direct[name], g)
            term = inner.implicit[name]
            if step.implicit and term is not None:
                torch.testing.assert_close(step.implicit[name], term / p, rtol=1e-12, atol=0)
    # 400 coins: three standard deviations
    assert abs(counts[1] / 400 - p) < 3 * (p * (1 - p) / 400) ** 0.5


def test_the_coin_is_the_first_draw():
    model, batch = dense(6, 5, 3), batch_of(3, 6)
    for seed in range(8):
        generator, coin = seeded(seed), seeded(seed)
        taken = torch.rand((), generator=coin).item() < 0.5
        inner = HessianFreeKKT() if taken else ZeroIG()
        expected = inner.hypergradient(uniform(), model, batch, generator=coin)
        step = Lazy(HessianFreeKKT(), 0.5).hypergradient(uniform(), model, batch, generator=generator)
        assert bool(step.implicit) == taken
        assert torch.equal(step.solution.anchor, expected.solution.anchor)
        for name, g in expected.direct.items():
            assert torch.equal(step.direct[name], g)
    state = torch.get_rng_state()
    Lazy(HessianFreeKKT(), 0.5).hypergradient(taylor(), model, batch, generator=seeded(0))
    assert torch.equal(state, torch.get_rng_state())


def test_a_step_costs_7_passes_or_11():
    """Floating-point operations of a PreActResNet-18 step: 2.33 or 3.71 of a standard one, 7 + 4p passes on average."""
    torch.manual_seed(0)
    model = build_model("preact_resnet18", (3, 32, 32), 10).train()
    batch = ba.Batch(torch.rand(2, 3, 32, 32), torch.tensor([3, 7]), torch.arange(2))

    def flops(problem, solver, seed=0):
        for parameter in model.parameters():
            parameter.grad = None
        with FlopCounterMode(display=False) as counter:
            solver.backward(problem, model, batch, seeded(seed))
        return counter.get_total_flops()

    base, problem = flops(standard.problem(), ZeroIG()), fastbat.problem()
    lazy = Lazy(HessianFreeKKT(), 0.5)
    coins = {torch.rand((), generator=seeded(seed)).item() < 0.5: seed for seed in range(8)}
    without, with_term = (flops(problem, lazy, coins[taken]) / base for taken in (False, True))
    print(f"{without:.3f} and {with_term:.3f} × a standard step")
    assert without <= 7 / 3 + 0.01
    assert 7 / 8 * without + 1 / 8 * with_term <= 2.52  # the mean at p = 1/8
    assert with_term <= 3.72 and with_term == pytest.approx(flops(problem, HessianFreeKKT()) / base)


def test_no_graph_without_the_term(monkeypatch):
    """The attack is then solved without one, which is what saves the memory."""
    asked, solve = [], ba.Linearized.solve_at

    def note(self, model, batch, anchor, differentiable):
        asked.append(differentiable)
        return solve(self, model, batch, anchor, differentiable)

    monkeypatch.setattr(ba.Linearized, "solve_at", note)
    for seed in range(12):
        Lazy(HessianFreeKKT(), 0.5).hypergradient(taylor(), dense(6, 5, 3), batch_of(2, 6), generator=seeded(seed))
    coins = [torch.rand((), generator=seeded(seed)).item() < 0.5 for seed in range(12)]
    assert asked == coins and 0 < sum(coins) < 12


def test_parts_of_the_inner_solver_observe():
    class Counting(HessianFreeKKT):
        seen = 0

        def observe(self, step):
            self.seen += 1

    inner = Counting()
    for seed in range(5):
        Lazy(inner, 0.5).backward(taylor(), dense(6, 5, 3), batch_of(2, 6), seeded(seed))
    assert inner.seen == 5
    assert copy.deepcopy(Lazy(inner, 0.5)).inner.seen == 5


@pytest.mark.parametrize("p", [0.0, -0.1, 1.5, float("nan")])
def test_probabilities(p):
    with pytest.raises(ba.InputError, match="p is "):
        Lazy(HessianFreeKKT(), p)


def test_nothing_to_leave_out():
    with pytest.raises(ba.InputError, match="ZeroIG has no implicit term"):
        Lazy(ZeroIG(), 0.5)
    with pytest.raises(ba.InputError, match="has no implicit term apart"):
        Lazy(HessianFreeKKT(cross_at="merged"), 0.5)
    with pytest.raises(ba.InputError, match="Subspace has a hypergradient of its own"):
        Lazy(subat.Subspace(HessianFreeKKT()), 0.5)
    assert Lazy(Lazy(HessianFreeKKT(), 0.5), 0.5).inner.p == 0.5
    with pytest.raises(ba.InputError, match="inner is 'hessian-free-kkt'; it must be a solver"):
        Lazy("hessian-free-kkt", 0.5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_coin_of_a_gpu_s_generator_is_fair_and_moves_it_on():
    generator = torch.Generator("cuda").manual_seed(0)
    coins = [host_uniform(generator) for _ in range(1000)]
    assert len(set(coins)) > 990 and 0.45 < sum(coins) / 1000 < 0.55
