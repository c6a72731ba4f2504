"""Betty: a bilevel problem as a level of its programs, a level of its programs as a lower problem, and three levels."""

from __future__ import annotations

import copy
import importlib.util
import logging
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

pytest.importorskip(
    "betty",
    reason="pip install betty-ml==0.2.1 on Python 3.10; with --ignore-requires-python from 3.11 on (docs/betty.md)",
)

from betty.configs import Config, EngineConfig
from betty.engine import Engine
from betty.problems import ImplicitProblem

import bilevel_at as ba
from bilevel_at.interop.betty import Level, LowerLevel, as_batch
from bilevel_at.solvers import FullKKT, HessianFreeKKT, ZeroIG
from bilevel_at.testing import hypergradcheck

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "betty.md").read_text()


@pytest.fixture(autouse=True)
def _quiet():
    logging.disable(logging.INFO)
    yield
    logging.disable(logging.NOTSET)


def network(*sizes):
    layers = [part for a, b in zip(sizes, sizes[1:], strict=False) for part in (nn.Linear(a, b), nn.Softplus())]
    return nn.Sequential(*layers[:-1]).double()


def batches(count, size=12):
    generator = torch.Generator().manual_seed(1)
    return [(torch.rand(size, 6, generator=generator).double(), torch.arange(size) % 3) for _ in range(count)]


def proximal(criterion=ba.cross_entropy):
    attacker = ba.Proximal(ba.minus(ba.cross_entropy), ba.LinfBall(0.2), lam=2.0, tol=1e-13)
    return ba.BilevelProblem(ba.UpperProblem(criterion), attacker)


def level(problem=None, solver=None, data=None, rate=0.1, **more):
    net = network(6, 8, 3)
    optimizer = torch.optim.SGD(net.parameters(), lr=rate, momentum=0.9)
    data = batches(1) if data is None else data
    return Level(
        "robust", problem or proximal(), solver or FullKKT(), None, net, optimizer, train_data_loader=data, **more
    )


def engine(problems, steps, u2l=None, l2u=None, **more):
    settings = EngineConfig(train_iters=steps, strategy="cpu", **more)
    return Engine(problems, settings, {"u2l": u2l or {}, "l2u": l2u or {}})


def loss_and_gradient(robust):
    loss = robust.training_step(robust.cur_batch)
    parameters = list(robust.module.parameters())
    return loss, torch.autograd.grad(loss, parameters, create_graph=True)


def shift(parameters, direction, by):
    with torch.no_grad():
        for p, d in zip(parameters, direction, strict=True):
            p.add_(d, alpha=by)


def started(robust):
    engine([robust], 0)
    robust.cur_batch = robust.get_batch()
    return robust


# --- a level


def test_the_problem_of_these_tests_passes_hypergradcheck():
    assert hypergradcheck(proximal(), FullKKT(), network(6, 8, 3), ba.Batch(*batches(1)[0]))


@pytest.mark.parametrize("h", [1e-5])
def test_the_gradient_is_the_hypergradient_and_the_difference_of_the_loss(h):
    robust = started(level())
    loss, gradient = loss_and_gradient(robust)
    step = FullKKT().hypergradient(
        proximal(), robust.module, ba.Batch(*robust.cur_batch), anchor=robust.hypergradient.solution.anchor
    )
    assert loss.item() == step.loss.item()
    for mine, theirs in zip(gradient, step.grads.values(), strict=True):
        assert torch.equal(mine, theirs)
    parameters = list(robust.module.parameters())
    direction = [torch.randn_like(p) for p in parameters]
    sides = []
    for by in (h, -2 * h):
        shift(parameters, direction, by)
        sides.append(robust.training_step(robust.cur_batch).item())
    exact = sum((g * d).sum() for g, d in zip(gradient, direction, strict=True)).item()
    assert (sides[0] - sides[1]) / (2 * h) == pytest.approx(exact, rel=1e-7)


def test_the_attacker_s_answer_matters_to_it():
    """Or the test above would pass with ZeroIG."""
    robust = started(level())
    _, gradient = loss_and_gradient(robust)
    direct = torch.cat([g.flatten() for g in robust.hypergradient.direct.values()])
    assert (torch.cat([g.flatten() for g in gradient]) - direct).norm() > 0.01 * direct.norm()


def test_second_derivatives_are_those_of_the_loss():
    robust = started(level())
    _, gradient = loss_and_gradient(robust)
    parameters = list(robust.module.parameters())
    direction = [torch.randn_like(p) for p in parameters]
    before = [p.detach().clone() for p in parameters]
    product = torch.autograd.grad(gradient, parameters, direction)
    assert all(torch.equal(p, old) for p, old in zip(parameters, before, strict=True))
    shift(parameters, direction, 1e-4)
    _, high = loss_and_gradient(robust)
    shift(parameters, direction, -2e-4)
    _, low = loss_and_gradient(robust)
    for mine, a, b in zip(product, high, low, strict=True):
        assert mine.detach() == pytest.approx(((a - b) / 2e-4).detach(), rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("solver", [ZeroIG(), HessianFreeKKT()], ids=lambda s: type(s).__name__)
def test_training_is_that_of_a_plain_loop_bit_for_bit(solver):
    """Random draws, a step that remembers, momentum: five steps in an Engine and five in a loop."""

    def problem():
        step = ba.Adaptive(gamma=0.3, c=0.01, beta=0.5)
        attacker = ba.Linearized(ba.minus(ba.cross_entropy), ba.LinfBall(0.2), "uniform", "taylor", step)
        return ba.BilevelProblem(ba.UpperProblem(), attacker)

    data = [(x, y, torch.arange(12)) for x, y in batches(2)]
    make = lambda raw: ba.Batch(raw[0], raw[1], index=raw[2], examples=12)  # noqa: E731
    robust = level(problem(), solver, data, batch=make, seed=3)
    plain, own = copy.deepcopy(robust.module), problem()
    engine([robust], 5).run()

    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(3)
    for i in range(5):
        optimizer.zero_grad()
        solver.backward(own, plain, make(data[i % 2]), generator)
        optimizer.step()
    for ours, theirs in zip(robust.module.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)


class Recording(ba.Anchor):
    def __init__(self):
        self.observed, self.drawn = 0, []

    def draw(self, lower, model, batch, generator):
        self.drawn.append(0.1 * torch.rand(batch.x.shape, generator=generator, dtype=batch.x.dtype))
        return self.drawn[-1], None

    def observe(self, step):
        self.observed += 1


def test_a_batch_is_observed_once_however_often_the_levels_above_look():
    anchor = Recording()
    attacker = ba.Linearized(ba.minus(ba.cross_entropy), ba.LinfBall(0.2), anchor, "taylor", step=0.3)
    robust = level(ba.BilevelProblem(ba.UpperProblem(weighted), attacker), HessianFreeKKT(), above=["held_out"])
    held_out = three(robust)
    engine([robust, held_out], 4, {held_out: [robust]}, {robust: [held_out]}).run()
    assert anchor.observed == 4 and len(anchor.drawn) == 4
    assert not torch.equal(anchor.drawn[0], anchor.drawn[1])


def test_rolling_back_is_no_second_batch():
    anchor = Recording()
    attacker = ba.Linearized(ba.minus(ba.cross_entropy), ba.LinfBall(0.2), anchor, "taylor", step=0.3)
    robust = level(ba.BilevelProblem(ba.UpperProblem(weighted), attacker), HessianFreeKKT(), above=["held_out"])
    held_out = three(robust)
    engine([robust, held_out], 3, {held_out: [robust]}, {robust: [held_out]}, roll_back=True).run()
    assert anchor.observed == 3


def test_running_statistics_are_moved_by_updates_alone():
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Softplus(), nn.Linear(8, 3)).double()
    attacker = ba.Linearized(ba.minus(ba.cross_entropy), ba.LinfBall(0.2), "uniform", "taylor", 0.3, mode="train")
    robust = level(ba.BilevelProblem(ba.UpperProblem(), attacker), HessianFreeKKT())
    robust.module = net
    started(robust)
    net.train()
    robust.training_step(robust.cur_batch)
    moved = net[1].running_mean.clone()
    assert not torch.equal(moved, torch.zeros(8).double())
    robust.training_step(robust.cur_batch)
    assert torch.equal(net[1].running_mean, moved)


def test_saved_and_restored_it_goes_on_as_if_it_had_not_stopped():
    def made():
        torch.manual_seed(0)
        attacker = ba.Linearized(
            ba.minus(ba.cross_entropy), ba.LinfBall(0.2), "uniform", "taylor", ba.Adaptive(gamma=0.3, c=0.01, beta=0.5)
        )
        data = [(x, y, torch.arange(12)) for x, y in batches(1)]
        make = lambda raw: ba.Batch(raw[0], raw[1], index=raw[2], examples=12)  # noqa: E731
        return level(ba.BilevelProblem(ba.UpperProblem(), attacker), HessianFreeKKT(), data, batch=make)

    whole, first, second = made(), made(), made()
    engine([whole], 4).run()
    engine([first], 2).run()
    saved = copy.deepcopy(first.state_dict())
    rest = engine([second], 2)
    second.load_state_dict(saved)
    rest.run()
    for a, b in zip(whole.module.parameters(), second.module.parameters(), strict=True):
        assert torch.equal(a, b)


# --- three levels


class Weights(nn.Module):
    def __init__(self):
        super().__init__()
        self.scores = nn.Parameter(torch.tensor([0.3, -0.2, 0.1]).double())

    def forward(self, labels):
        return 3 * self.scores.softmax(0)[labels]


def weighted(model, batch, delta):
    return model.held_out(batch.y) * ba.cross_entropy(model, batch, delta)


class HeldOut(ImplicitProblem):
    def training_step(self, batch):
        x, y = batch
        return nn.functional.cross_entropy(self.robust(x), y)

    def grad_callback(self):
        self.found = self.module.scores.grad.clone()


def three(robust, rate=0.1):
    weights = Weights()
    optimizer = torch.optim.SGD(weights.parameters(), lr=rate)
    return HeldOut("held_out", Config(retain_graph=True), weights, optimizer, train_data_loader=batches(3)[1:])


def through_betty(config):
    """(the gradient that Betty gives the class weights, the level, the level above), after one step."""
    robust = level(proximal(weighted), rate=0.0, above=["held_out"])
    robust._config = config
    held_out = three(robust, rate=0.0)
    engine([robust, held_out], 1, {held_out: [robust]}, {robust: [held_out]}).run()
    return held_out.found, robust, held_out


def derivatives(robust, held_out):
    """(v, ∇²_θθ F, ∇²_wθ F), by central differences of hypergradients of a problem that Betty has no part in."""
    parameters = list(robust.module.parameters())
    x, y = held_out.cur_batch
    v = torch.cat(
        [g.flatten() for g in torch.autograd.grad(nn.functional.cross_entropy(robust.module(x), y), parameters)]
    )
    anchor = robust.hypergradient.solution.anchor

    def gradient():
        step = FullKKT().hypergradient(proximal(weighted), robust.seen(), ba.Batch(*robust.cur_batch), anchor=anchor)
        return torch.cat([step.grads[f"network.{name}"].flatten() for name, _ in robust.module.named_parameters()])

    def column(value, place):
        sides = []
        for by in (1e-5, -2e-5):
            value.data.view(-1)[place] += by
            sides.append(gradient())
        value.data.view(-1)[place] += 1e-5
        return (sides[0] - sides[1]) / 2e-5

    hessian = torch.stack([column(p, i) for p in parameters for i in range(p.numel())])
    scores = held_out.module.scores
    return v, hessian, torch.stack([column(scores, i) for i in range(3)])


def test_darts_through_a_level_is_the_mixed_derivative():
    found, robust, held_out = through_betty(Config(type="darts", darts_alpha=1e-4))
    v, _, mixed = derivatives(robust, held_out)
    assert found == pytest.approx(-mixed @ v, rel=1e-4)
    assert found.norm() > 1e-4


def test_neumann_through_a_level_has_its_hessian_in_it():
    found, robust, held_out = through_betty(Config(type="neumann", neumann_iterations=2, neumann_alpha=0.3))
    v, hessian, mixed = derivatives(robust, held_out)
    keep = torch.eye(len(v)).double() - 0.3 * hessian
    series = 0.3 * (v + keep @ v + keep @ keep @ v)
    assert found == pytest.approx(-mixed @ series, rel=1e-4)


def test_the_example_learns_weights_that_lower_the_held_out_loss():
    spec = importlib.util.spec_from_file_location("example", ROOT / "docs" / "examples" / "betty_three_levels.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    equal, learnt = (example.train(learn, steps=300) for learn in (False, True))
    assert equal["weights"].tolist() == pytest.approx([1.0] * 10)
    assert learnt["weights"][5:].min() > 1 > learnt["weights"][:5].max()
    assert learnt["held-out loss"] < 0.9 * equal["held-out loss"]
    assert learnt["test loss"] < 0.9 * equal["test loss"]


# --- a Betty problem as a lower level


class Ridge(ImplicitProblem):
    """g = mean (x·w − y)² + Σ exp(θ) w²; θ is the module of the level above."""

    def training_step(self, batch):
        x, y = batch
        return mse_loss(self.module(x).squeeze(1), y) + (self.penalty.module.exp() * self.module.weight.square()).sum()


class Penalty(nn.Module):
    def __init__(self):
        super().__init__()
        self.log = nn.Parameter(torch.full((1, 5), -1.0).double())

    def exp(self):
        return self.log.exp()


def ridge():
    generator = torch.Generator().manual_seed(2)
    x, new_x = (torch.randn(30, 5, generator=generator).double() for _ in range(2))
    y, new_y = (part @ torch.ones(5).double() for part in (x, new_x))
    penalty, weights = Penalty(), nn.Linear(5, 1, bias=False).double()
    H = 2 * x.T @ x / 30 + 2 * torch.diag(penalty.log.detach().exp()[0])
    solution = torch.linalg.solve(H, 2 * x.T @ y / 30)
    v = 2 * new_x.T @ (new_x @ solution - new_y) / 30
    exact = -2 * penalty.log.detach().exp()[0] * solution * torch.linalg.solve(H, v)
    config = Config(type="neumann", neumann_iterations=2000, neumann_alpha=0.2)
    lower = Ridge("ridge", config, weights, torch.optim.SGD(weights.parameters(), lr=0.0), train_data_loader=[(x, y)])
    return lower, penalty, (new_x, new_y), solution, exact


def validation(lower):
    return lambda model, batch, delta: (lower.network(delta)(batch.x).squeeze(1) - batch.y).square()


@pytest.mark.parametrize("tol", [None, 1e-11])
def test_a_solver_differentiates_a_betty_level(tol):
    betty_level, penalty, held, solution, exact = ridge()
    if tol is None:
        betty_level.module.weight.data.copy_(solution)
    lower = LowerLevel(betty_level, tol)
    optimizer = torch.optim.SGD(penalty.parameters(), lr=0.0)
    problem = ba.BilevelProblem(ba.UpperProblem(validation(lower)), lower)
    above = Level("penalty", problem, FullKKT(), None, penalty, optimizer, train_data_loader=[held])
    found = []
    above.grad_callback = lambda: found.append(penalty.log.grad.clone())
    before = betty_level.module.weight.detach().clone()
    engine([betty_level, above], 1, None, {betty_level: [above]}).run()
    assert found[0][0] == pytest.approx(exact, rel=1e-8)
    assert torch.equal(betty_level.module.weight, before)


def test_betty_s_own_series_agrees():
    """The same program with Betty's neumann; its cg does not agree (test_conformance_betty.py)."""
    betty_level, penalty, held, solution, exact = ridge()
    betty_level.module.weight.data.copy_(solution)

    class Above(ImplicitProblem):
        def training_step(self, batch):
            x, y = batch
            return mse_loss(self.ridge.module(x).squeeze(1), y)

        def grad_callback(self):
            self.found = penalty.log.grad.clone()

    above = Above("penalty", Config(retain_graph=True), penalty, torch.optim.SGD(penalty.parameters(), lr=0.0),
                  train_data_loader=[held])  # fmt: skip
    engine([betty_level, above], 1, {above: [betty_level]}, {betty_level: [above]}).run()
    assert above.found[0] == pytest.approx(exact, rel=1e-8)


# --- mistakes


def test_a_lower_level_without_a_batch_is_a_mistake():
    betty_level, penalty, held, *_ = ridge()
    lower = LowerLevel(betty_level)
    problem = ba.BilevelProblem(ba.UpperProblem(validation(lower)), lower)
    with pytest.raises(ba.InputError, match="'ridge' has seen no batch yet"):
        FullKKT().hypergradient(problem, penalty, ba.Batch(*held))


def test_what_a_loader_yields_is_read():
    x, y = batches(1)[0]
    assert torch.equal(as_batch([x, y]).y, y) and as_batch((x,)).y is None
    assert torch.equal(as_batch({"x": x, "y": y, "z": y}).more["z"], y)
    with pytest.raises(ba.InputError, match="a batch of 3 tensors"):
        as_batch((x, y, y))


# --- the page


def test_the_page_s_programs_run():
    names: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    assert len(blocks) == 2
    for block in blocks:
        exec(block, names)


def test_the_page_s_figures_are_those_of_the_conformance_page():
    table = (ROOT / "docs" / "results" / "conformance.md").read_text().split("## Betty's conjugate gradients")[1]
    rows = {
        cells[1].strip(): cells[2:-1] for cells in (line.split("|") for line in table.splitlines()) if len(cells) > 3
    }
    for problem, shown in (("quadratic", (1.2, 0.99, 6.0)), ("Poisson", (0.66, 1.1, 9.3))):
        found = dict(zip(map(float, rows["problem"]), map(float, rows[problem]), strict=True))
        assert (found[1], found[5], found[40]) == shown
        assert all(f"{figure}" in PAGE for figure in shown)
