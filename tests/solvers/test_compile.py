"""Solver.compile: one graph for attack, upper loss and double backward, with the numbers of the uncompiled step."""

from __future__ import annotations

import copy
import importlib
import pickle
import sys
from dataclasses import dataclass

import pytest
import torch
from networks import batch_of, dense, taylor

import bilevel_at as ba
from bilevel_at import compiled, policy
from bilevel_at.models import build_model
from bilevel_at.problems import fastat, fastbat
from bilevel_at.solvers import FullKKT, GaussNewtonKKT, HessianFreeKKT, Lazy, ProjectionAdjoint, ValueFunction, ZeroIG

sys.path.insert(0, str(importlib.import_module("pathlib").Path(__file__).parents[1] / "machinery"))
from marks import fast  # noqa: E402
from running import PROBLEMS  # noqa: E402

NO_GRAPH = {"beta", "smooth_beta", "yopo"}
"""An optimiser of torch's and hooks are no part of a graph."""


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def batches(count, examples=8, draws=0):
    g = torch.Generator().manual_seed(draws)
    for i in range(count):
        index = (torch.arange(examples) + 4 * i) % 12
        yield ba.Batch(torch.rand(examples, 1, 8, 8, generator=g), index % 10, index, examples=12)


def trained(problem, solver, steps=3, seed=1):
    """Everything that steps of SGD give: losses, δ*, both terms, weights and buffers, and the generators' states."""
    torch.manual_seed(0)
    model, generator, out = build_model("small_cnn", (1, 8, 8), 10), torch.Generator().manual_seed(seed), []
    policy.set_epoch((problem, solver), 1, 3)
    for i, batch in enumerate(batches(steps)):
        policy.set_step((problem, solver), i, 30)
        model.zero_grad()
        step = solver.backward(problem, model, batch, generator)
        out += [step.losses, step.solution.delta, *step.direct.values(), *step.implicit.values()]
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad
    return [t for t in out if t is not None] + [
        *model.state_dict().values(),
        generator.get_state(),
        torch.get_rng_state(),
    ]


def of_file(name):
    module = importlib.import_module(f"bilevel_at.problems.{name}")
    return module.problem(epsilon=0.1), module.solver() if hasattr(module, "solver") else ZeroIG()


@pytest.mark.parametrize("name", fast(PROBLEMS, ["atas", "beta", "fastbat"]))
def test_every_problem_s_graph_is_the_step_bit_for_bit_or_there_is_none(name):
    plain, (problem, solver) = of_file(name), of_file(name)
    solver.compile("eager")
    if name in NO_GRAPH:
        with pytest.raises(ba.InputError, match="no single graph of this can be compiled, so leave out") as error:
            trained(problem, solver)
        assert "\n" not in str(error.value) and len(str(error.value)) < 400
        return
    for want, got in zip(trained(*plain), trained(problem, solver), strict=True):
        assert torch.equal(want, got)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nuat", "liet", "atas"])
def test_counting_batches_and_epochs_does_not_compile_each_anew(name):
    """A counter that is read in every step is a symbol; memories are known from the second epoch on."""
    torch._dynamo.utils.counters.clear()
    problem, solver = of_file(name)
    solver.compile("eager")
    model = build_model("small_cnn", (1, 8, 8), 10)
    for epoch in range(3):
        policy.set_epoch((problem, solver), epoch, 3)
        for batch in [*batches(30), *batches(1, examples=5)]:
            solver.backward(problem, model, batch, torch.Generator())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 12


@pytest.mark.parametrize("by", ["epoch", "step"])
def test_a_number_that_takes_no_symbol_has_a_graph_for_each_of_its_values(by):
    """A radius is checked as a number."""
    radius = ba.Schedule(lambda now, total: 0.1 * (now + 1) / total, by=by)
    solvers, problems, model = [ZeroIG(), ZeroIG()], [taylor(), taylor()], dense(6, 5, 3)
    solvers[1].compile("eager")
    for now in range(4):
        deltas = []
        for problem, solver in zip(problems, solvers, strict=True):
            problem.lower.constraint = ba.LinfBall(radius)
            problem.set_epoch(now, 4)
            problem.set_step(now, 4)
            deltas.append(solver.backward(problem, model, batch_of(4, 6)).solution.delta)
        assert torch.equal(*deltas) and deltas[0].abs().max() > 0.02 * (now + 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "solver", [ZeroIG(), HessianFreeKKT(ig_weight=0.5), HessianFreeKKT(cross_at="solution")], ids=str
)
def test_compiled_code_is_the_step_up_to_rounding(solver):
    compiled = copy.deepcopy(solver)
    compiled.compile()
    torch.manual_seed(0)
    model = build_model("small_cnn", (1, 8, 8), 10).double()
    for batch in batches(3):
        batch = batch.replace(x=batch.x.double())
        flat = []
        for one in (solver, compiled):
            generator = torch.Generator().manual_seed(1)
            step = one.hypergradient(fastbat.problem(epsilon=0.2, step=2.0), model, batch, generator=generator)
            flat.append(torch.cat([g.flatten() for g in step.grads.values()]))
        assert (flat[0] - flat[1]).norm() < 1e-12 * flat[0].norm()


def test_lazy_tosses_its_coin_outside():
    plain, lazy = Lazy(HessianFreeKKT(ig_weight=0.5), 0.5), Lazy(HessianFreeKKT(ig_weight=0.5), 0.5)
    lazy.compile("eager")
    for want, got in zip(trained(taylor(), plain, 4, seed=3), trained(taylor(), lazy, 4, seed=3), strict=True):
        assert torch.equal(want, got)


def test_what_the_library_says_of_a_batch_it_still_says():
    solver, model = HessianFreeKKT(), dense(6, 5, 3)
    solver.compile("eager")
    solver.hypergradient(taylor(), model, batch_of(4, 6))
    with pytest.raises(ba.InputError, match=r"y is torch.float32 of shape \(4,\); class labels are int64"):
        solver.hypergradient(taylor(), model, batch_of(4, 6).replace(y=torch.zeros(4)))
    outside = batch_of(4, 6)
    with pytest.raises(ba.InputError, match=r"this constraint takes inputs in \[0, 1\]"):
        solver.hypergradient(fastbat.problem(epsilon=0.1), model, outside.replace(x=outside.x + 1))
    with pytest.raises(ba.InputError, match="label 3 is out of range: the model has 3 outputs"):
        solver.hypergradient(taylor(), model, batch_of(4, 6).replace(y=torch.arange(4)))


@pytest.mark.parametrize("solver", [FullKKT(), GaussNewtonKKT(damping=1.0), ProjectionAdjoint()], ids=str)
def test_solvers_that_decide_by_values_are_refused_in_one_line(solver):
    solver = copy.deepcopy(solver)
    solver.compile("eager")
    model, problem = dense(6, 5, 3), taylor()
    if isinstance(solver, FullKKT):
        problem.lower = ba.Proximal(problem.lower.attack_loss, problem.lower.constraint, lam=20.0, anchor="zero")
    with pytest.raises(ba.InputError, match="no single graph of this can be compiled, so leave out --compile") as error:
        solver.hypergradient(problem, model, batch_of(4, 6))
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize(
    ("solver", "instead"),
    [
        (HessianFreeKKT(cross_at="merged"), 'cross_at="anchor" or "solution"'),
        (ValueFunction(), "HessianFreeKKT"),
        (Lazy(ValueFunction()), "HessianFreeKKT"),
    ],
    ids=str,
)
def test_solvers_without_double_backward_say_what_to_take_instead(solver, instead):
    with pytest.raises(ba.InputError, match="leave out --compile") as error:
        solver.compile("eager")
    assert str(error.value).endswith(f"or take {instead}") and "\n" not in str(error.value)
    assert "hypergradient" not in vars(solver)  # and it goes on uncompiled


def test_unknown_backends_and_older_torches_are_named(monkeypatch):
    with pytest.raises(ba.InputError, match="backend 'fast' is not known; torch has "):
        ZeroIG().compile("fast")
    config = importlib.import_module("torch._dynamo").config

    class Older:
        pass

    monkeypatch.setattr(torch._dynamo, "config", Older())
    with pytest.raises(ba.InputError, match=r"torch \S+ cannot compile torch.autograd.grad; a newer one is needed"):
        ZeroIG().compile()
    assert hasattr(config, "trace_autograd_ops")


@dataclass(slots=True)
class Slotted(ZeroIG):
    note: str = ""


def test_copies_and_pickles_are_not_compiled_and_have_their_own_settings():
    solver = HessianFreeKKT(ig_weight=0.5)
    solver.compile("eager")
    for copied in (copy.copy(solver), copy.deepcopy(solver), pickle.loads(pickle.dumps(solver))):
        assert copied == solver and "hypergradient" in vars(solver) and "hypergradient" not in vars(copied)
        copied.ig_weight = 0.0
        assert not copied.hypergradient(taylor(), dense(6, 5, 3), batch_of(4, 6)).implicit
    assert copy.deepcopy(Slotted("kept")).note == "kept"


def test_compiling_once_more_is_compiling_anew():
    solver, model, batch = HessianFreeKKT(ig_weight=0.5), dense(6, 5, 3), batch_of(4, 6)
    want = solver.hypergradient(taylor(), model, batch, generator=torch.Generator())
    for _ in range(2):
        solver.compile("eager")
    got = solver.hypergradient(taylor(), model, batch, generator=torch.Generator())
    assert all(torch.equal(want.grads[name], got.grads[name]) for name in want.grads)


def test_torch_s_own_generator_moves_on_as_it_does_uncompiled():
    problem, model = fastat.problem(epsilon=0.1), dense(6, 5, 3)

    def anchors(solver):
        torch.manual_seed(5)
        generators = (torch.default_generator, torch.default_generator, None)
        steps = [solver.hypergradient(problem, model, batch_of(4, 6), None, generator) for generator in generators]
        return [step.solution.anchor for step in steps]

    solver = ZeroIG()
    want = anchors(solver)
    solver.compile("eager")
    got = anchors(solver)
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True)) and not torch.equal(got[0], got[1])


def test_more_shapes_than_graphs_are_kept_for(monkeypatch):
    monkeypatch.setattr(compiled, "VARIANTS", 2)

    def losses(solver):
        problem, model = fastbat.problem(epsilon=0.1), dense(6, 5, 3)
        for examples in range(2, 7):
            g = torch.Generator().manual_seed(examples)
            yield solver.hypergradient(problem, model, batch_of(examples, 6), generator=g).losses

    solver = ZeroIG()
    want = list(losses(solver))
    solver.compile("eager")
    assert all(torch.equal(a, b) for a, b in zip(want, losses(solver), strict=True))


def test_under_autocast_the_step_is_one_graph_too():
    steps = []
    for compile_it in (False, True):
        solver, model = HessianFreeKKT(ig_weight=0.5), build_model("small_cnn", (1, 8, 8), 10)
        torch.manual_seed(0)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        if compile_it:
            solver.compile("eager")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            generator = torch.Generator().manual_seed(0)
            steps.append(solver.hypergradient(fastbat.problem(epsilon=0.1), model, next(batches(1)), None, generator))
    want, got = steps
    assert torch.equal(want.solution.delta, got.solution.delta)
    assert all(torch.equal(want.grads[name], got.grads[name]) for name in want.grads)
