"""Every hypergradient against central differences of F(θ) with the anchor fixed, in float64.

Mutations. Each of these, made one at a time in a copy of the package by ``python tests/mutate.py``, fails at least one
test of this file, or of the file named with it:

1. the sign of the implicit term (``solver.py``: ``-self.ig_weight * w`` without its minus)
2. the mask of active coordinates (``constraints.py``: ``tangent`` returns v)
3. the polyhedron's normals (``constraints.py``: ``tangent`` ignores them)
4. the point of the cross derivative (``kkt.py``: taken at δ* where "anchor" was asked)
5. λ in the Hessian-free adjoint (``kkt.py``: ``scalar_adjoint`` multiplies instead of dividing)
6. λ of the closed form (``lower.py``: ``lam`` is the step, not its inverse)
7. the ℓ2 ball's curvature μ (``constraints.py``: ``curvature`` left out)
8. the diagonal of the conjugate gradients' operator (``solvers/linear.py``: not added)
9. the Hessian (``solvers/full_kkt.py``: the curved part taken as zero)
10. the mean over the batch (``solver.py``: a sum)
11. the statistics that the attack has seen (``solver.py``: those that the upper loss has moved): ``test_solver.py``
12. the last epoch's exception (``anchors.py``: ATAS redraws in the last epoch too): ``test_anchors.py``
13. that a step is observed (``solver.py``: ``backward`` does not): ``test_policy.py``
14. that each policy is told once (``policy.py``: once for each path): ``test_policy.py``
15. couplings between samples of the same parity (``solvers/linear.py``): ``tests/solvers/test_full_kkt.py``
16. v during the warm-up (``steps.py``: always followed): ``test_steps.py``
17. the class of what is remembered (``targeted.py``: only the example): ``test_targeted.py``
18. the reference of the divergence (``problem.py``: with a graph that no solve needs): ``test_losses.py``
"""

from __future__ import annotations

import pytest
import torch
from examples import examples
from hypothesis import assume, given
from hypothesis import strategies as st

import bilevel_at as ba
from bilevel_at.solvers import (
    FullKKT,
    GaussNewtonKKT,
    HessianFreeKKT,
    Lazy,
    Neumann,
    ProjectionAdjoint,
    ValueFunction,
    ZeroIG,
)
from bilevel_at.testing import activity_margin, hypergradcheck
from bilevel_at.testing import strategies as bst

RTOL = 1e-6
EPS = 1e-5
MARGIN = 1e-3
# Conjugate gradients on a box are not slow, and differ from dense solves on the others in the operator alone.
METHODS = pytest.mark.parametrize("method", ["dense", pytest.param("cg", marks=pytest.mark.slow)])


def away_from_degeneracy(s):
    """Only examples whose activity does not change within the difference: elsewhere dF/dθ does not exist."""
    assume(activity_margin(s.problem, s.model, s.batch, s.anchor) > MARGIN)


def check(s, solver):
    """Where the implicit term is large enough for the tolerance to see it."""
    if solver.implicit:
        step = solver.hypergradient(s.problem, s.model, s.batch, anchor=s.anchor)
        assume(step.implicit_norm > 100 * RTOL * step.direct_norm)
    assert hypergradcheck(s.problem, solver, s.model, s.batch, eps=EPS, rtol=RTOL, anchor=s.anchor)


def grads(s, solver, batch=None, anchor=None):
    step = solver.hypergradient(s.problem, s.model, batch or s.batch, anchor=s.anchor if anchor is None else anchor)
    return {name: g for name, g in step.grads.items() if g is not None}


def assert_same(a, b, rtol=1e-9):
    assert a.keys() == b.keys()
    scale = torch.stack([g.norm() for g in b.values()]).norm()
    for name in a:
        assert (a[name] - b[name]).norm() <= rtol * scale + 1e-14, name


def boxes(shape):
    return bst.boxes()


def l2_balls(shape):
    return bst.l2_balls()


# 1. FullKKT on the proximal problem with a box, dense and matrix-free.
@pytest.mark.parametrize("method", ["dense", "cg"])
@examples(0.3)
@given(s=bst.settings_of(bst.proximal, boxes))
def test_full_kkt_on_a_box(method, s):
    away_from_degeneracy(s)
    check(s, FullKKT(method=method, tol=1e-12))


# 2. The same with a polyhedron, with and without an input range.
@METHODS
@examples(0.3)
@given(s=bst.settings_of(bst.proximal, bst.polyhedra, max_values=6, max_size=2))
def test_full_kkt_on_a_polyhedron(method, s):
    away_from_degeneracy(s)
    check(s, FullKKT(method=method, tol=1e-12))


# ... and an ℓ2 ball, whose boundary adds its curvature.
@METHODS
@examples(0.3)
@given(s=bst.settings_of(bst.proximal, l2_balls))
def test_full_kkt_on_an_l2_ball(method, s):
    away_from_degeneracy(s)
    check(s, FullKKT(method=method, tol=1e-12))


@pytest.mark.parametrize("method", ["dense", "cg"])
def test_full_kkt_where_every_sphere_is_active(method):
    """Its multiplier is a large part of the Hessian, of which random examples are not sure."""
    s = _some_setting()
    lower = ba.Proximal(ba.minus(ba.cross_entropy), ba.L2Ball(0.1), lam=2.0, tol=1e-13)
    s.problem = ba.BilevelProblem(ba.UpperProblem(), lower)
    z = 0.2 * torch.randn(s.batch.x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    solution = lower.solve(s.model, s.batch, z, differentiable=True)
    mu = lower.constraint.active(solution.delta, s.batch.x, solution.gradient.detach()).curvature
    assert (mu > 2).all()
    solver = FullKKT(method=method, tol=1e-12)
    step = solver.hypergradient(s.problem, s.model, s.batch, anchor=z)
    assert step.implicit_norm > 1e-3 * step.direct_norm
    assert hypergradcheck(s.problem, solver, s.model, s.batch, eps=EPS, rtol=RTOL, anchor=z)


# 3. HessianFreeKKT on the Taylor-linearised problem, on every constraint.
@pytest.mark.parametrize("constraint", [boxes, l2_balls, bst.polyhedra], ids=["box", "l2", "polyhedron"])
@examples(0.5)
@given(data=st.data())
def test_hessian_free_kkt_on_taylor(constraint, data):
    s = data.draw(bst.settings_of(bst.linearized, constraint, max_values=8))
    away_from_degeneracy(s)
    check(s, HessianFreeKKT())


@examples(0.5)
@given(s=bst.settings_of(lambda c, m: bst.linearized(c, m, "normalized"), boxes))
def test_hessian_free_kkt_on_normalized_gradients(s):
    away_from_degeneracy(s)
    gradient = s.problem.lower.solve(s.model, s.batch, anchor=s.anchor).attack_gradient
    assume(gradient.flatten(1).norm(dim=1).min() > 1e-2)
    check(s, HessianFreeKKT())


def test_every_entry_with_many_free_coordinates():
    """One full check, entry by entry, where the implicit term is a large part of the gradient."""
    torch.manual_seed(3)
    model = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(8, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)
    ).double()
    batch = ba.Batch(torch.rand(3, 2, 2, 2, dtype=torch.float64), torch.tensor([0, 1, 2]))
    lower = ba.Linearized(ba.minus(ba.cross_entropy), ba.LinfBall(0.3), "uniform", "taylor", step=1.0)
    problem = ba.BilevelProblem(ba.UpperProblem(), lower)
    generator = torch.Generator().manual_seed(0)
    assert hypergradcheck(
        problem, HessianFreeKKT(), model, batch, rtol=1e-6, eps=1e-5, mode="full", generator=generator
    )
    step = HessianFreeKKT().hypergradient(problem, model, batch, generator=generator)
    assert step.implicit_norm > 0.02 * step.direct_norm


# 4. FullKKT equals HessianFreeKKT on a linearised problem, and wherever ℓ_atk is linear in δ.
@examples(0.3)
@given(s=bst.settings_of(bst.linearized, boxes))
def test_full_equals_hessian_free_on_linearised(s):
    for method in ("dense", "cg"):
        assert_same(grads(s, FullKKT(method=method)), grads(s, HessianFreeKKT()))


@pytest.mark.parametrize("method", ["dense", "cg"])
@examples(0.3)
@given(data=st.data())
def test_full_equals_hessian_free_where_the_attack_is_linear(method, data):
    shape = data.draw(bst.shapes())
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(torch.Size(shape).numel(), 3)).double()
    batch = data.draw(bst.batches(shape, 3))
    ball = data.draw(bst.boxes())

    def linear_loss(model, batch, delta):
        return -(model(batch.x + delta) * torch.arange(1.0, 4.0, dtype=delta.dtype)).sum(1)

    lower = ba.Proximal(linear_loss, ball, lam=data.draw(st.floats(0.5, 5.0)), anchor="zero", tol=1e-13)
    s = bst.Setting(ba.BilevelProblem(ba.UpperProblem(), lower), model, batch, torch.zeros_like(batch.x))
    assert_same(grads(s, FullKKT(method=method)), grads(s, HessianFreeKKT()))


# 5. With a sign direction every solver gives ZeroIG's answer.
@examples(0.3)
@given(s=bst.settings_of(lambda c, m: bst.linearized(c, m, "sign"), boxes))
def test_every_solver_equals_zero_ig_for_sign(s):
    expected = grads(s, ZeroIG())
    solvers = [
        HessianFreeKKT(),
        FullKKT(),
        FullKKT(method="cg"),
        FullKKT(curvature="attack"),
        HessianFreeKKT(cross_at="solution"),
        HessianFreeKKT(cross_at="merged"),
        ProjectionAdjoint(),
        Neumann(3),
        ValueFunction(),
        GaussNewtonKKT(),
        Lazy(HessianFreeKKT(), 0.5),
    ]
    for solver in solvers:
        assert_same(grads(s, solver), expected, rtol=0)


@examples(0.5)
@given(s=bst.settings_of(lambda c, m: bst.linearized(c, m, "sign"), boxes))
def test_zero_ig_is_exact_for_sign(s):
    gradient = s.problem.lower.solve(s.model, s.batch, anchor=s.anchor).attack_gradient
    assume(gradient.abs().min() > 1e-3)
    check(s, ZeroIG())


# 6. Without constraints, the implicit function theorem, computed densely.
@examples(0.3)
@given(s=bst.settings_of(bst.proximal, lambda shape: st.just(ba.LinfBall(1e6, bounds=None)), max_size=2))
def test_unconstrained_is_the_implicit_function_theorem(s):
    lower, model, batch = s.problem.lower, s.model, s.batch
    delta = lower.solve(model, batch, anchor=s.anchor).delta
    names = [n for n, _ in model.named_parameters()]
    theta = tuple(p.detach() for p in model.parameters())
    shape, size = delta.shape, delta.numel()

    class Module(torch.nn.Module):
        def __init__(self, parameters):
            super().__init__()
            self.named = dict(zip(names, parameters, strict=True))

        def forward(self, x):
            return torch.func.functional_call(model, self.named, x)

    def g(flat, *parameters):
        return lower.objective(Module(parameters), batch, flat.reshape(shape), s.anchor).sum()

    def f(flat, *parameters):
        return ba.cross_entropy(Module(parameters), batch, flat.reshape(shape)).mean()

    flat = delta.flatten()
    H = torch.func.hessian(g)(flat, *theta)
    v = torch.func.grad(f)(flat, *theta)
    expected = {}
    for i, name in enumerate(names):
        direct = torch.func.grad(f, argnums=i + 1)(flat, *theta)
        cross = torch.func.jacrev(torch.func.grad(g), argnums=i + 1)(flat, *theta).reshape(size, -1)
        ddelta = -torch.linalg.solve(H, cross)  # dδ*/dθ
        expected[name] = direct + (v @ ddelta).reshape(direct.shape)
    for method in ("dense", "cg"):
        assert_same(grads(s, FullKKT(method=method, tol=1e-12)), expected, rtol=1e-8)


# 7. A batch's hypergradient is the mean of its samples'.
@pytest.mark.parametrize("solver", [ZeroIG(), HessianFreeKKT(), FullKKT(), FullKKT(method="cg", tol=1e-13)])
@examples(0.2)
@given(s=bst.settings_of(bst.proximal, boxes))
def test_batch_is_the_mean_of_its_samples(solver, s):
    whole = grads(s, solver)
    each = [grads(s, solver, s.batch[i : i + 1], s.anchor[i : i + 1]) for i in range(len(s.batch))]
    mean = {name: torch.stack([e[name] for e in each]).mean(0) for name in whole}
    assert_same(whole, mean, rtol=1e-8)


# 12. The cross derivative at δ* instead of the anchor is another gradient: its error is of the size of the move δ* − z
# and vanishes with it.
def test_cross_derivative_at_the_solution_is_an_approximation():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(10, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)
    ).double()
    batch = ba.Batch(torch.rand(4, 10, dtype=torch.float64), torch.tensor([0, 1, 2, 0]))
    anchor = torch.zeros_like(batch.x)
    errors = []
    for step in (0.4, 0.2, 0.1):
        lower = ba.Linearized(ba.minus(ba.cross_entropy), ba.LinfBall(10.0, bounds=None), "zero", "taylor", step=step)
        problem = ba.BilevelProblem(ba.UpperProblem(), lower)
        at_anchor = HessianFreeKKT().hypergradient(problem, model, batch, anchor=anchor)
        at_solution = HessianFreeKKT(cross_at="solution").hypergradient(problem, model, batch, anchor=anchor)
        gap = torch.stack([(at_anchor.grads[n] - at_solution.grads[n]).norm() for n in at_anchor.grads]).norm()
        errors.append((gap / at_anchor.implicit_norm).item())
        assert not hypergradcheck(
            problem, HessianFreeKKT(cross_at="solution"), model, batch, rtol=RTOL, eps=EPS, raise_exception=False
        )
        assert hypergradcheck(problem, HessianFreeKKT(), model, batch, rtol=RTOL, eps=EPS)
    assert errors[0] > 1e-3
    # relative to the implicit term itself the error is first order in the move, so halving the step halves it
    assert errors[1] / errors[0] == pytest.approx(0.5, rel=0.3)
    assert errors[2] / errors[1] == pytest.approx(0.5, rel=0.2)


@given(s=bst.settings_of(bst.linearized, lambda shape: st.just(ba.LinfBall(10.0, bounds=None))))
def test_the_error_of_the_other_point_is_first_order(s):
    """On random networks too: half the step, half the relative error, once the step is small."""
    errors = []
    for step in (2e-3, 1e-3):
        s.problem.lower = ba.Linearized(ba.minus(ba.cross_entropy), ba.LinfBall(10.0, None), "zero", "taylor", step)
        anchor = torch.zeros_like(s.batch.x)
        exact = HessianFreeKKT().hypergradient(s.problem, s.model, s.batch, anchor=anchor)
        other = HessianFreeKKT(cross_at="solution").hypergradient(s.problem, s.model, s.batch, anchor=anchor)
        assume(exact.implicit_norm > 1e-6 * exact.direct_norm)
        pairs = [(exact.grads[n], other.grads[n]) for n in exact.grads]
        errors.append((torch.stack([(a - b).norm() for a, b in pairs]).norm() / exact.implicit_norm).item())
    assume(errors[1] > 1e-5)
    assert errors[1] / errors[0] == pytest.approx(0.5, rel=0.1)


def test_ig_weight_scales_the_implicit_term():
    s = _some_setting()
    direct = grads(s, ZeroIG())
    full, half = grads(s, HessianFreeKKT()), grads(s, HessianFreeKKT(ig_weight=0.5))
    for name in full:
        torch.testing.assert_close(half[name] - direct[name], 0.5 * (full[name] - direct[name]))


def test_without_the_implicit_term_the_check_fails():
    """ZeroIG on a Taylor-linearised problem is wrong, and hypergradcheck says where."""
    s = _some_setting()
    with pytest.raises(AssertionError, match=r"ZeroIG disagrees .* most in 1\.weight: analytic .* numeric"):
        hypergradcheck(s.problem, ZeroIG(), s.model, s.batch, anchor=s.anchor)


def _some_setting():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(6, 5), torch.nn.Softplus(), torch.nn.Linear(5, 3)
    ).double()
    batch = ba.Batch(torch.rand(3, 6, dtype=torch.float64), torch.tensor([0, 1, 2]))
    lower = ba.Linearized(ba.minus(ba.cross_entropy), ba.LinfBall(0.3), "zero", "taylor", step=1.0)
    return bst.Setting(ba.BilevelProblem(ba.UpperProblem(), lower), model, batch, torch.zeros_like(batch.x))
