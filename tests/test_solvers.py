"""What solvers refuse, and how they live with torch: modes, accumulation, scalers, parameters that do not matter."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import bilevel_at as ba
from bilevel_at.linear import conjugate_gradients
from bilevel_at.problems import fastat, fastbat
from bilevel_at.runs.problem_file import packaged_problems
from bilevel_at.solvers import FullKKT, HessianFreeKKT, ZeroIG
from bilevel_at.testing import hypergradcheck
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


def batch_of(n, *shape, classes=3):
    g = torch.Generator().manual_seed(1)
    return ba.Batch(torch.rand((n, *shape), generator=g, dtype=F64), torch.arange(n) % classes)


def taylor(epsilon=0.3, step=1.0, **more):
    return ba.BilevelProblem(
        ba.UpperProblem(), ba.Linearized(ATK, ba.LinfBall(epsilon), "zero", "taylor", step, **more)
    )


def proximal(lam=20.0, epsilon=0.3, **more):
    return ba.BilevelProblem(ba.UpperProblem(), ba.Proximal(ATK, ba.LinfBall(epsilon), lam, "zero", tol=1e-12, **more))


# --- FullKKT ------------------------------------------------------------------------------------------------------


class Saddle(ba.LowerProblem):
    """g = ½ Σ_k a_k(x) δ_k², whose curvature in sample i is x_i itself, shifted: negative where x < ½."""

    constraint = ba.LinfBall(1.0, bounds=None)

    def objective(self, model, batch, delta, anchor):
        return 0.5 * ((batch.x - 0.5) * (delta - model(batch.x).mean(1, keepdim=True)) ** 2).flatten(1).sum(1)

    def solve(self, model, batch, anchor=None, generator=None):
        return ba.Solution(torch.full_like(batch.x, 0.1), torch.zeros_like(batch.x), batch)


@pytest.mark.parametrize("method", ["dense", "cg"])
def test_full_kkt_names_the_samples_it_refuses(method):
    x = torch.full((4, 3), 0.9, dtype=F64)
    x[1, 0] = x[3, 2] = 0.2
    batch = ba.Batch(x, torch.tensor([0, 1, 2, 0]))
    problem = ba.BilevelProblem(ba.UpperProblem(), Saddle())
    with pytest.raises(ba.CurvatureError, match="not positive definite on the free directions") as error:
        FullKKT(method=method).hypergradient(problem, dense(3, 3), batch)
    # Cholesky sees every indefinite sample; CG those whose right-hand side met the negative direction
    assert set(error.value.samples) <= {1, 3} and error.value.samples
    if method == "dense":
        assert error.value.samples == (1, 3)
    # a negative curvature that a bound holds down is no obstacle
    held = copy.deepcopy(problem)
    held.lower.constraint = ba.Polyhedron(torch.eye(3, dtype=F64), torch.full((3,), 0.1, dtype=F64))
    FullKKT(method=method).hypergradient(held, dense(3, 3), batch)
    FullKKT(method=method, damping=1.0).hypergradient(problem, dense(3, 3), batch)


def test_cg_states_where_it_did_not_converge():
    with pytest.raises(ba.ConvergenceError, match=r"did not reach tol=.* in max_iter=1 steps on sample"):
        FullKKT(method="cg", max_iter=1, tol=1e-14).hypergradient(proximal(), dense(6, 5, 3), batch_of(4, 6))


@given(seed=bst.seeds, n=st.integers(1, 4), d=st.integers(1, 8), coupled=st.booleans())
def test_conjugate_gradients_against_a_dense_solve(seed, n, d, coupled):
    g = torch.Generator().manual_seed(seed)
    root = torch.randn(n, d, d, generator=g, dtype=F64)
    A = root @ root.mT + torch.eye(d, dtype=F64) * torch.logspace(-2, 2, n, dtype=F64)[:, None, None]
    right = torch.randn(n, d, generator=g, dtype=F64)
    right[0] = 0  # a sample that has nothing to solve must not become NaN
    w = conjugate_gradients(
        lambda p: (A @ p[..., None]).squeeze(-1), right, right, tol=1e-11, max_iter=1000, coupled=coupled
    )
    torch.testing.assert_close(w, torch.linalg.solve(A, right), rtol=1e-6, atol=1e-7)


def test_hessian_aware_is_the_attack_hessian_plus_lambda():
    """curvature="attack" on a linearised problem: H = ∇²ℓ_atk(θ, δ*) + λI, transcribed."""
    model, batch, problem = dense(6, 5, 3), batch_of(3, 6), taylor(epsilon=0.01, step=0.05)
    for method in ("dense", "cg"):
        step = FullKKT(method=method, curvature="attack", tol=1e-13).hypergradient(problem, model, batch)
        solution = problem.lower.solve_differentiable(model, batch, anchor=torch.zeros_like(batch.x))
        delta = solution.delta.clone().requires_grad_()
        (v,) = torch.autograd.grad(ba.cross_entropy(model, batch, delta).mean(), delta)
        low, high = ba.LinfBall(0.01).box(batch.x)
        free = (solution.delta > low) & (solution.delta < high)
        assert 0 < free.sum() < free.numel()
        w = torch.zeros_like(v)
        for i in range(3):
            H = torch.autograd.functional.hessian(
                lambda d, i=i: ATK(model, batch[i : i + 1], d[None]).sum(), solution.delta[i]
            )
            F = free[i]
            w[i, F] = torch.linalg.solve((H + 20 * torch.eye(6, dtype=F64))[F][:, F], v[i, F])
        cross = torch.autograd.grad(solution.gradient, list(model.parameters()), w, allow_unused=True)
        direct = torch.autograd.grad(ba.cross_entropy(model, batch, solution.delta).mean(), list(model.parameters()))
        for got, d, c in zip(step.grads.values(), direct, cross, strict=True):
            torch.testing.assert_close(got, d if c is None else d - c)


def test_hessian_free_needs_a_curvature():
    problem = ba.BilevelProblem(ba.UpperProblem(), ba.Targeted(ba.LinfBall(0.1), steps=2))
    with pytest.raises(ba.CurvatureError, match=r"Targeted has no proximal term \(λ = 0\)"):
        HessianFreeKKT().hypergradient(problem, dense(6, 5, 3), batch_of(2, 6))
    HessianFreeKKT(damping=1.0).hypergradient(problem, dense(6, 5, 3), batch_of(2, 6))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FullKKT(method="lu"), "method is 'lu'"),
        (lambda: FullKKT(curvature="upper"), "curvature is 'upper'"),
        (lambda: FullKKT(damping=-1.0), "damping is -1.0"),
        (lambda: HessianFreeKKT(ig_weight=float("nan")), "ig_weight is nan"),
        (lambda: HessianFreeKKT(cross_at="middle"), "cross_at is 'middle'"),
    ],
)
def test_options_are_checked(make, message):
    with pytest.raises(ba.InputError, match=message):
        make()


def test_attack_curvature_needs_an_attack_loss():
    problem = ba.BilevelProblem(ba.UpperProblem(), Saddle())
    with pytest.raises(ba.InputError, match="needs an attack_loss, and Saddle has none"):
        FullKKT(curvature="attack").hypergradient(problem, dense(3, 3), batch_of(2, 3))


# --- A user's own lower problem -------------------------------------------------------------------------------------


class Quadratic(ba.LowerProblem):
    """Only an objective and a constraint: the base class solves it."""

    constraint = ba.LinfBall(0.2)

    def objective(self, model, batch, delta, anchor):
        out = model(batch.x + delta)
        return -out.gather(1, batch.y[:, None]).squeeze(1).tanh() + 15 * delta.flatten(1).square().sum(1)


def test_a_problem_of_two_lines_is_solved_and_differentiated():
    problem = ba.BilevelProblem(ba.UpperProblem(), Quadratic())
    for solver in (FullKKT(method="dense"), FullKKT(method="cg", tol=1e-12)):
        assert hypergradcheck(problem, solver, dense(6, 5, 3), batch_of(3, 6), eps=1e-5, rtol=1e-5)


# --- Modes ----------------------------------------------------------------------------------------------------------


def with_batch_norm():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()


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


def test_dense_hessian_of_a_train_mode_batch_norm_is_an_error():
    model, batch = with_batch_norm().train(), batch_of(6, 6)
    with pytest.raises(ba.InputError, match='use method="cg", or mode="eval"'):
        FullKKT(method="dense").hypergradient(proximal(lam=200.0, mode="train"), model, batch)
    FullKKT(method="dense").hypergradient(proximal(lam=200.0, mode="eval"), model, batch)


def test_cg_on_the_batch_as_one_system_is_exact_under_batch_norm():
    """In train mode the samples are coupled; the batch sum's Hessian-vector products still give the exact answer."""
    model, batch = with_batch_norm().train(), batch_of(6, 6)
    problem = proximal(lam=200.0, mode="train")
    for method in ("auto", "cg"):
        assert hypergradcheck(problem, FullKKT(method=method, tol=1e-12), model, batch, eps=1e-5, rtol=1e-6)
    assert hypergradcheck(taylor(mode="train"), HessianFreeKKT(), model, batch, eps=1e-5, rtol=1e-6)


# --- Living with torch ------------------------------------------------------------------------------------------------


def test_backward_accumulates_like_loss_backward():
    model, batch = dense(6, 5, 3), batch_of(4, 6)
    solver, problem = HessianFreeKKT(), taylor()
    once = solver.backward(problem, model, batch)
    assert all(torch.equal(p.grad, once.grads[n]) for n, p in model.named_parameters())
    solver.backward(problem, model, batch)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, 2 * once.grads[name])
    model.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    # and the returned gradients are not the ones an optimiser or clipping then changes
    step = solver.backward(problem, model, batch)
    kept = {n: g.clone() for n, g in step.grads.items()}
    nn.utils.clip_grad_norm_(model.parameters(), 1e-6)
    assert all(torch.equal(step.grads[n], kept[n]) for n in kept)


def test_frozen_and_unused_parameters_are_as_torch_has_them():
    class Partly(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.frozen, self.unused = nn.Linear(6, 5), nn.Linear(5, 3), nn.Linear(2, 2)
            self.tied = self.used
            self.frozen.requires_grad_(False)

        def forward(self, x):
            return self.frozen(torch.tanh(self.used(x)))

    model = Partly().double()
    for solver in SOLVERS:
        model.zero_grad()
        step = solver.backward(taylor(step=0.005), model, batch_of(3, 6))
        assert set(step.grads) == {"used.weight", "used.bias", "unused.weight", "unused.bias"}
        assert step.grads["unused.weight"] is None and model.unused.weight.grad is None
        assert model.frozen.weight.grad is None and model.used.weight.grad is not None
    model.requires_grad_(False)
    with pytest.raises(ba.InputError, match="no parameter of the model requires a gradient"):
        ZeroIG().backward(taylor(), model, batch_of(3, 6))


def test_works_under_no_grad_and_leaves_the_batch_alone():
    model, batch = dense(6, 5, 3), batch_of(4, 6)
    expected = FullKKT().hypergradient(proximal(), model, batch)
    with torch.no_grad():
        got = FullKKT().hypergradient(proximal(), model, batch)
    for name in expected.grads:
        torch.testing.assert_close(got.grads[name], expected.grads[name])
    assert not batch.x.requires_grad and batch.x.grad is None
    assert not got.solution.delta.requires_grad and not got.loss.requires_grad


def test_grad_scaler_unscales_to_the_same_gradient():
    """A scaler on the CPU: scaled .grad, and the optimiser's step is that without one."""
    batch, problem = batch_of(4, 6), taylor()
    results = []
    for scale in (None, 1024.0):
        model = dense(6, 5, 3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if scale is None:
            step = HessianFreeKKT().backward(problem, model, batch)
            optimizer.step()
        else:
            scaler = torch.amp.GradScaler("cpu", init_scale=scale)
            step = HessianFreeKKT().backward(problem, model, batch, scaler=scaler)
            assert model[1].weight.grad.abs().max() > 10 * results[0][0].grads["1.weight"].abs().max()
            scaler.step(optimizer)
            scaler.update()
        results.append((step, [p.detach().clone() for p in model.parameters()]))
    for a, b in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(a, b)
    assert torch.equal(results[0][0].loss, results[1][0].loss)
    torch.testing.assert_close(results[0][0].implicit_norm, results[1][0].implicit_norm)


def test_optimisers_and_schedulers_work_unchanged():
    model, batch = dense(6, 16, 3), batch_of(12, 6)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 10, 0.5)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        losses.append(HessianFreeKKT(ig_weight=0.1).backward(taylor(epsilon=0.02), model, batch).loss.item())
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
    assert losses[-1] < 0.8 * losses[0]


def test_autocast_gives_float32_gradients_near_the_exact_ones():
    model, batch = dense(6, 32, 3).float(), batch_of(8, 6)
    batch = ba.Batch(batch.x.float(), batch.y)
    exact = HessianFreeKKT().hypergradient(taylor(), copy.deepcopy(model).double(), ba.Batch(batch.x.double(), batch.y))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        step = HessianFreeKKT().hypergradient(taylor(), model, batch)
    got = torch.cat([g.flatten() for g in step.grads.values()])
    want = torch.cat([g.flatten() for g in exact.grads.values()]).float()
    assert got.dtype == torch.float32
    assert (got - want).norm() < 0.05 * want.norm()  # bfloat16 has 8 bits: 0.4 % in each operation


def test_wrong_shapes_and_labels_are_named():
    model = dense(6, 5, 3)
    with pytest.raises(ba.InputError, match="label 3 is out of range: the model has 3 outputs"):
        ZeroIG().hypergradient(taylor(), model, ba.Batch(torch.rand(2, 6, dtype=F64), torch.tensor([0, 3])))
    with pytest.raises(ba.InputError, match="label -1 is out of range"):
        ZeroIG().hypergradient(taylor(), model, ba.Batch(torch.rand(2, 6, dtype=F64), torch.tensor([0, -1])))
    with pytest.raises(ba.InputError, match=r"y has shape \(3,\); 2 inputs need \[2\]"):
        ba.Batch(torch.rand(2, 6), torch.zeros(3).long())
    with pytest.raises(ba.InputError, match="images lie in"):
        ba.Batch(torch.rand(2, 6) * 255, torch.zeros(2).long()).check()
    with pytest.raises(ba.InputError, match="takes inputs in"):
        ZeroIG().hypergradient(
            taylor(), model, ba.Batch(torch.full((2, 6), float("nan"), dtype=F64), torch.zeros(2).long())
        )

    class Mean(ba.UpperProblem):
        def loss(self, model, batch, delta):
            return super().loss(model, batch, delta).mean()

    with pytest.raises(ba.InputError, match=r"must be one value per sample, \[4\]"):
        ZeroIG().hypergradient(ba.BilevelProblem(Mean(), taylor().lower), model, batch_of(4, 6))


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
def test_every_solver_runs_fast_bat_on_images(solver):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    x, y = torch.rand(5, 1, 4, 4), torch.tensor([0, 1, 2, 0, 1])
    step = solver.backward(fastbat.problem(), model, ba.Batch(x, y))
    assert step.loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters())


# --- found by review --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ball", [ba.L2Ball(2.0), ba.LinfBall(0.2)], ids=["l2", "linf"])
def test_float32_gives_the_float64_hypergradient(ball):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.Tanh(), nn.Linear(16, 5))
    x, y = torch.rand(16, 3, 8, 8), torch.randint(0, 5, (16,))
    lower = ba.Linearized(ATK, ball, "zero", "taylor", step=50.0)
    problem = ba.BilevelProblem(ba.UpperProblem(), lower)
    single = HessianFreeKKT().hypergradient(problem, model, ba.Batch(x, y))
    double = HessianFreeKKT().hypergradient(problem, copy.deepcopy(model).double(), ba.Batch(x.double(), y))
    assert single.implicit_norm.item() == pytest.approx(double.implicit_norm.item(), rel=1e-3)
    for name, g in single.grads.items():
        torch.testing.assert_close(g.double(), double.grads[name], rtol=1e-3, atol=1e-5)


class Coupled(nn.Module):
    """Samples share a mean, without any batch normalisation to give it away."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x):
        h = torch.tanh(self.a(x))
        return self.b(h - h.mean(0))


def test_coupling_that_no_module_announces_is_noticed():
    torch.manual_seed(0)
    model, batch, problem = Coupled().double(), batch_of(4, 6), proximal(lam=30.0)
    with pytest.raises(ba.InputError, match="needs samples that share nothing"):
        FullKKT(method="dense").hypergradient(problem, model, batch)
    for method in ("auto", "cg"):
        assert hypergradcheck(problem, FullKKT(method=method, tol=1e-12), model, batch, eps=1e-5, rtol=1e-6)


@pytest.mark.parametrize("size", [1e-22, 1e-30, 1e10])
def test_conjugate_gradients_at_any_scale(size):
    """In float32 the square of 1e-22 is 0: confident samples have such gradients."""
    right = torch.full((2, 8), size)
    right[1] = 1.0
    w = conjugate_gradients(lambda p: 0.5 * p, right, right)
    torch.testing.assert_close(w, 2 * right)


def test_auto_goes_without_torch_func_where_it_must():
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.Dropout(0.5), nn.Tanh(), nn.Linear(5, 3)).double().train()
    problem = taylor(step=0.005, mode="train")
    assert FullKKT(curvature="attack").hypergradient(problem, model, batch_of(3, 6)).loss.isfinite()


def test_half_precision_is_not_factorised():
    model, batch = dense(6, 5, 3).to(torch.bfloat16), batch_of(3, 6)
    batch = ba.Batch(batch.x.to(torch.bfloat16), batch.y)
    solver = FullKKT(method="dense", curvature="attack", damping=20.0)
    step = solver.hypergradient(taylor(), model, batch)
    assert all(g.dtype == torch.bfloat16 and g.isfinite().all() for g in step.grads.values())


@given(s=bst.settings_of(bst.linearized, lambda s: bst.boxes()))
def test_conjugate_gradients_on_the_linearised_objective_find_lambda(s):
    """The Hessian of a linearised g, taken by differentiating g instead of being known, is λI all the same."""
    expected = HessianFreeKKT().hypergradient(s.problem, s.model, s.batch, anchor=s.anchor)
    s.problem.lower.hessian_is_lam = False
    got = FullKKT(method="cg", tol=1e-13).hypergradient(s.problem, s.model, s.batch, anchor=s.anchor)
    for name, g in expected.grads.items():
        torch.testing.assert_close(got.grads[name], g, rtol=1e-8, atol=1e-12)


def test_a_solution_needs_only_delta_and_anchor():
    class Own(ba.LowerProblem):
        constraint = ba.LinfBall(0.1)

        def objective(self, model, batch, delta, anchor):
            return 0.5 * (delta - anchor).flatten(1).square().sum(1) + ATK(model, batch, delta)

        def solve(self, model, batch, anchor=None, generator=None):
            class Found:
                delta, anchor = torch.zeros_like(batch.x), torch.zeros_like(batch.x)

            return Found()

    problem = ba.BilevelProblem(ba.UpperProblem(), Own())
    for solver in (ZeroIG(), HessianFreeKKT(damping=1.0), FullKKT(damping=5.0)):
        assert solver.backward(problem, dense(6, 5, 3), batch_of(3, 6)).loss.isfinite()


def test_an_objective_that_is_not_a_number_is_named_at_once():
    class Broken(ba.LowerProblem):
        constraint = ba.LinfBall(0.1)

        def objective(self, model, batch, delta, anchor):
            return (delta.flatten(1).sum(1) - 1).sqrt() * (batch.y == 1) + delta.flatten(1).square().sum(1)

    with pytest.raises(ba.ConvergenceError, match="is not a number on sample"):
        Broken().solve(dense(6, 5, 3), batch_of(3, 6))


def test_hypergradcheck_leaves_everything_as_it_was():
    model, batch = dense(6, 5, 3), batch_of(4, 6)
    batch = ba.Batch(batch.x, batch.y, torch.arange(4))
    lower = ba.Linearized(ATK, ba.LinfBall(0.2), "remembered", "taylor", ba.Adaptive(0.5, 1.0))
    problem = ba.BilevelProblem(ba.UpperProblem(), lower)
    ZeroIG().hypergradient(problem, model, batch)
    before = copy.deepcopy((model.state_dict(), problem.state_dict()))

    class Fails(ba.UpperProblem):
        calls = 0

        def loss(self, model, batch, delta):
            Fails.calls += 1
            if Fails.calls > 2:
                raise RuntimeError("in the middle")
            return super().loss(model, batch, delta)

    with pytest.raises(RuntimeError, match="in the middle"):
        hypergradcheck(ba.BilevelProblem(Fails(), lower), HessianFreeKKT(), model, batch)
    assert hypergradcheck(problem, HessianFreeKKT(), model, batch, eps=1e-5, rtol=1e-6)
    after = (model.state_dict(), problem.state_dict())
    assert all(torch.equal(before[0][k], after[0][k]) for k in before[0])
    for part in ("anchor", "step"):
        assert torch.equal(before[1][part]["values"], after[1][part]["values"])


def test_hypergradcheck_takes_upper_losses_that_differentiate():
    """GradAlign's regulariser differentiates inside the upper loss."""

    class Penalty(ba.UpperProblem):
        def loss(self, model, batch, delta):
            x = (batch.x + delta).detach().requires_grad_()
            out = ba.cross_entropy(model, ba.Batch(x, batch.y), torch.zeros_like(x))
            (g,) = torch.autograd.grad(out.sum(), x, create_graph=True)
            return super().loss(model, batch, delta) + 0.1 * g.flatten(1).square().sum(1)

    problem = ba.BilevelProblem(Penalty(), ba.Linearized(ATK, ba.LinfBall(0.2), "zero", "sign", 0.1))
    assert hypergradcheck(problem, ZeroIG(), dense(6, 5, 3), batch_of(3, 6), eps=1e-5, rtol=1e-6)


def test_problems_can_be_pickled_and_copied():
    import pickle

    for problem in (fastat.problem(), fastbat.problem()):
        again = pickle.loads(pickle.dumps(problem))
        a, b = (
            p.lower.solve(dense(6, 5, 3), batch_of(3, 6), generator=torch.Generator().manual_seed(0))
            for p in (problem, again)
        )
        assert torch.equal(a.delta, b.delta)


def test_inputs_that_require_a_gradient_leave_no_graph():
    batch = batch_of(3, 6)
    batch.x.requires_grad_()
    for problem in (taylor(), proximal()):
        solution = problem.lower.solve(dense(6, 5, 3), batch)
        assert not solution.delta.requires_grad and not solution.anchor.requires_grad


def test_a_named_policy_on_the_class_keeps_its_state():
    class Remembering(Quadratic):
        anchor = "remembered"

    one, two, batch = Remembering(), Remembering(), batch_of(3, 6)
    batch = ba.Batch(batch.x, batch.y, torch.arange(3))
    delta = one.solve(dense(6, 5, 3), batch).delta
    two.load_state_dict(one.state_dict())
    assert torch.equal(two.draw_anchor(dense(6, 5, 3), batch, None), delta)
    one.anchor = ba.Zero()  # and may be changed afterwards
    assert (one.solve(dense(6, 5, 3), batch).anchor == 0).all()


def test_hypergradcheck_does_not_pass_over_nan():
    class Spoilt(ba.UpperProblem):
        def loss(self, model, batch, delta):
            values = super().loss(model, batch, delta)
            return values if torch.equal(model[1].weight, kept) else values * float("nan")

    model = dense(6, 5, 3)
    kept = model[1].weight.detach().clone()
    lower = ba.Linearized(ATK, ba.LinfBall(0.1), "zero", "sign", 0.1)
    with pytest.raises(AssertionError, match="numeric nan"):
        hypergradcheck(ba.BilevelProblem(Spoilt(), lower), ZeroIG(), model, batch_of(3, 6))
    with pytest.raises(ba.InputError, match=r"batch\.x is torch.float32"):
        hypergradcheck(taylor(), ZeroIG(), dense(6, 5, 3), ba.Batch(torch.rand(2, 6), torch.tensor([0, 1])))


@pytest.mark.parametrize("ball", [ba.LinfBall(0.0), ba.L2Ball(0.0), ba.L2Ball(0.0, bounds=(0, 1))])
def test_a_ball_of_radius_zero_holds_everything(ball):
    lower = ba.Linearized(ATK, ball, "zero", "taylor", 1.0)
    problem = ba.BilevelProblem(ba.UpperProblem(), lower)
    step = HessianFreeKKT().hypergradient(problem, dense(6, 5, 3), batch_of(3, 6))
    assert step.implicit_norm == 0 and (step.solution.delta == 0).all()
    assert hypergradcheck(problem, HessianFreeKKT(), dense(6, 5, 3), batch_of(3, 6), rtol=1e-6, eps=1e-5)


def test_coupled_samples_are_solved_as_one_system_from_the_start():
    """Per-sample conjugate gradients would refuse systems that are positive definite as a whole."""
    torch.manual_seed(0)
    model, batch = Coupled().double(), batch_of(4, 6)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    for lam in (8.0, 15.0, 30.0):
        problem = ba.BilevelProblem(ba.UpperProblem(), ba.Linearized(ATK, ba.LinfBall(0.3), "zero", "taylor", 1 / lam))
        solution = problem.lower.solve_differentiable(model, batch)
        delta = solution.delta.flatten()
        H = torch.autograd.functional.hessian(lambda d: ATK(model, batch, d.reshape(4, 6)).sum(), delta)
        H = H + lam * torch.eye(24, dtype=F64)
        free = problem.lower.active(solution).free.flatten()
        v = torch.randn(4, 6, dtype=F64)
        solver = FullKKT(curvature="attack", tol=1e-12)
        if torch.linalg.eigvalsh(H[free][:, free]).min() > 0:
            w = torch.zeros(24, dtype=F64)
            w[free] = torch.linalg.solve(H[free][:, free], v.flatten()[free])
            torch.testing.assert_close(solver.adjoint(problem, model, solution, v).flatten(), w, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_independent_samples_are_not_taken_for_coupled(mode):
    """Also in float32, under autocast, with batch normalisation in eval mode and with tiny losses."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(16, 3)]
    if mode == "eval":
        layers.insert(1, nn.BatchNorm2d(4))
    model = nn.Sequential(*layers)
    batch = ba.Batch(torch.rand(5, 1, 4, 4), torch.tensor([0, 1, 2, 0, 1]))
    lower = ba.Linearized(lambda *a: 1e-6 * ATK(*a), ba.LinfBall(0.1), "uniform", "taylor", 0.5, mode=mode)
    # torch.func does not take batch normalisation under autocast: there "auto" goes on with cg
    for method, half in (("dense", False), ("auto", True), ("cg", True)):
        solver = FullKKT(method=method, curvature="attack")
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            assert solver.hypergradient(ba.BilevelProblem(ba.UpperProblem(), lower), model, batch).loss.isfinite()


@pytest.mark.parametrize("solver", [ZeroIG, HessianFreeKKT, FullKKT])
@pytest.mark.parametrize("name", sorted(path.stem for path, _ in packaged_problems()))
def test_every_problem_in_python_with_every_solver(name, solver):
    import importlib

    module = importlib.import_module(f"bilevel_at.problems.{name}")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)).train()
    x, y = torch.rand(6, 1, 4, 4), torch.arange(6) % 3
    made = solver(damping=255 / 2) if name.endswith("beta") and solver is not ZeroIG else solver()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    problem = module.problem(epsilon=0.1)
    for epoch in range(2):
        problem.set_epoch(epoch, 2)
        optimizer.zero_grad()
        step = made.backward(problem, model, ba.Batch(x, y, torch.arange(6)))
        optimizer.step()
        assert step.loss.isfinite() and model.training
    assert {"digits", "cifar10"} <= module.recipe().keys()
